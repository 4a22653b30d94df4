# SPDX-License-Identifier: GPL-2.0-or-later
from array import array
from collections.abc import Iterable

def open_ports(
    family: int,
    kind: int,
    address: bytes,
    scope: int,
    device: bytes,
    v6only: bool,
    freebind: bool,
    first: int,
    last: int,
    most: int,
) -> array[int]: ...
def sockets(fds: Iterable[int]) -> list[tuple[int, int, bool, bytes, int, int, bytes]]: ...
