# SPDX-License-Identifier: GPL-2.0-or-later
"""See _tcp.pyx."""

from collections.abc import Sequence

PATIENCE: int

class _Ends:
    @property
    def bytes(self) -> list[int]: ...
    def run(self) -> None: ...

class Sender(_Ends):
    def __init__(self, fds: Sequence[int]) -> None: ...
    def stop(self) -> None: ...

class Receiver(_Ends):
    def __init__(self, fds: Sequence[int], *, patience: int = ...) -> None: ...
