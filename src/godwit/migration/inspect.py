# SPDX-License-Identifier: GPL-2.0-or-later
"""What is in a stream, item by item, from a file of any size.

Nothing is taken in but what an item shows; of queues and the like only their
length and their CRC-32. A broken stream gives what comes before the break and
then an error as a target would give it. Entries that a target would refuse
because it does not know them are shown as such.

A stream may also lie in a file that QEMU has migrated to (``migrate
file:PATH``). There it is in pieces: the length of each (u32, big-endian), the
piece, and a length of 0 in the end.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from godwit.migration.errors import NotAStreamError, TrailingDataError, version_name
from godwit.migration.header import MAGIC, Header
from godwit.migration.stream import Reader
from godwit.migration.version import Item, Version, negotiate

MAX_PIECE = 1 << 24  # bytes; QEMU's are at most 1 MiB
SEARCHED = 1 << 20  # bytes at once


def inspect(file: BinaryIO, versions: Sequence[Version[Any]], *, magic: int = MAGIC) -> Iterator[Item]:
    """The items of the stream that begins where ``file`` stands.

    :raises MigrationError: the stream is broken: where and why.
    """
    reader = Reader(file)
    header = Header.parse(reader.pull_bytes(Header.size()), magic)
    names = {"version": version_name(header.version), "compatible down to": version_name(header.compat_version)}
    yield Item(0, Header.size(), "header", {**names})
    for stage in negotiate(header, versions).stages:
        reader.stage = stage.name
        if stage.inspect is not None:
            yield from stage.inspect(reader)
    reader.stage = "end of stream"
    if not reader.at_end():
        raise TrailingDataError(reader.offset)
    yield Item(reader.offset, 0, "end", {})


def open_streams(file: BinaryIO, magic: int = MAGIC) -> Iterator[tuple[int, BinaryIO]]:
    """The streams in a file, each with the offset at which it begins: the file is one, or QEMU's.

    In QEMU's, the guest's memory may have what looks like one: each that may be a stream is given, none is left out.

    :raises NotAStreamError: there is none.
    """
    if not file.seekable():
        yield 0, file  # of a pipe there is no looking back
        return
    word = magic.to_bytes(8, "big")
    file.seek(0)
    begins = file.read(8)
    if len(begins) < 8 or begins == word:
        file.seek(0)
        yield 0, file
        return
    found = 0
    at = _find(file, word, 0)
    while at >= 0:
        if _plausible(file, at, magic):
            found += 1
            yield at, io.BufferedReader(_Pieces(file, at - 4))
        at = _find(file, word, at + 1)
    if not found:
        raise NotAStreamError(
            f"there is no device state in it: neither at its beginning nor as QEMU writes it into a migration "
            f"(looked for {magic:#x})"
        )


def _find(file: BinaryIO, word: bytes, start: int) -> int:
    """Where ``word`` comes next, or -1."""
    file.seek(start)
    tail = b""
    while data := tail + file.read(SEARCHED):
        place = data.find(word)
        if place >= 0:
            return start + place
        if len(data) == len(tail):
            break
        tail = data[1 - len(word) :]
        start += len(data) - len(tail)
    return -1


def _plausible(file: BinaryIO, at: int, magic: int) -> bool:
    """Whether a piece may begin before this, and a header here."""
    if at < 4:
        return False
    file.seek(at - 4)
    length = int.from_bytes(file.read(4), "big")
    try:
        Header.parse(file.read(Header.size()).ljust(Header.size(), b"\1"), magic)
    except NotAStreamError:
        return False
    return Header.size() <= length <= MAX_PIECE


class _Pieces(io.RawIOBase):
    """What lies in a file in pieces, each behind its length."""

    def __init__(self, file: BinaryIO, at: int) -> None:
        self._file = file
        self._at = at
        self._left = 0
        self._over = False

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Some bytes of the piece in hand; 0 behind the last one."""
        if not self._left and not self._over:
            self._file.seek(self._at)
            self._left = int.from_bytes(self._file.read(4), "big")
            self._at += 4
            self._over = not 0 < self._left <= MAX_PIECE
        if self._over:
            return 0
        self._file.seek(self._at)
        data = self._file.read(min(len(buffer), self._left))
        self._over = not data
        self._at += len(data)
        self._left -= len(data)
        buffer[: len(data)] = data
        return len(data)
