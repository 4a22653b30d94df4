# SPDX-License-Identifier: GPL-2.0-or-later
"""An input as a script: what is done, one thing after another, and with what numbers.

Each number is some bytes of it, so that whatever the fuzzer changes is another
script, and never no script at all. One that ends too early goes on with zeros.
`Writer` is the other way about: for scripts to begin with.
"""

from __future__ import annotations

import struct
from typing import Self


class Script:
    """An input, from its first byte on."""

    __slots__ = ("_at", "_data")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        """Whether there is more."""
        return self._at < len(self._data)

    def take(self, size: int) -> bytes:
        """The next bytes; at the end fewer."""
        start = self._at
        self._at += size
        return self._data[start : self._at]

    def number(self, size: int) -> int:
        """The next ``size`` bytes, little-endian."""
        return int.from_bytes(self.take(size), "little")

    def u8(self) -> int:
        return self.number(1)

    def u16(self) -> int:
        return self.number(2)

    def u32(self) -> int:
        return self.number(4)

    def u64(self) -> int:
        return self.number(8)

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(len(self._data))


class Writer:
    """A script that comes to be."""

    def __init__(self) -> None:
        self.data = b""

    def put(self, layout: str, *values: int) -> Self:
        """Numbers, of the sizes that ``struct`` has those letters for."""
        self.data += struct.pack("<" + layout, *values)
        return self

    def bytes(self, data: bytes) -> Self:
        self.data += data
        return self
