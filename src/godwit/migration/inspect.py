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

from godwit.migration.errors import MigrationError, NotAStreamError, TrailingDataError, version_name
from godwit.migration.header import MAGIC, Header
from godwit.migration.stream import Reader
from godwit.migration.version import Item, Version, negotiate

MAX_PIECE = 1 << 24  # bytes; QEMU's are at most 1 MiB
SEARCHED = 1 << 20  # bytes at once
READ_AGAIN = 16  # times the length of a file: what is read of what may be streams in it, to judge them


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


def open_streams(
    file: BinaryIO, versions: Sequence[Version[Any]], *, magic: int = MAGIC, everything: bool = False
) -> tuple[list[tuple[int, BinaryIO]], int]:
    """The streams in a file, each with the offset at which it begins: the file is one, or QEMU's.

    In QEMU's, the guest's memory may have what looks like one, even all of one,
    but for the pieces that QEMU's are in: so those are given that are whole and
    end where their last piece does, and beside them the number of those that
    were passed over. If none is whole, those that were judged are given. With
    ``everything`` all are given: each that may be a stream.

    They are judged from the end of the file, where QEMU writes the state of
    devices. A guest may have filled its memory with what goes on to the end of
    the file, each place of it, so there is an end to the judging.

    :raises NotAStreamError: there is none.
    """
    if not file.seekable():
        return [(0, file)], 0  # of a pipe there is no looking back
    word = magic.to_bytes(8, "big")
    file.seek(0)
    begins = file.read(8)
    if len(begins) < 8 or begins == word:
        file.seek(0)
        return [(0, file)], 0
    places = [at for at in _places(file, word) if _plausible(file, at, magic)]
    if not places:
        raise NotAStreamError(
            f"there is no device state in it: neither at its beginning nor as QEMU writes it into a migration "
            f"(looked for {magic:#x})"
        )
    chosen = places if everything else _judged(file, places, versions, magic)
    return [(at, io.BufferedReader(_Pieces(file, at - 4))) for at in chosen], len(places) - len(chosen)


def _judged(file: BinaryIO, places: Sequence[int], versions: Sequence[Version[Any]], magic: int) -> list[int]:
    """Of the places those that are whole streams, or else all that could be judged."""
    whole: list[int] = []
    judged: list[int] = []
    left = max(READ_AGAIN * file.seek(0, io.SEEK_END), SEARCHED)
    for at in reversed(places):
        if left < 0:
            break
        pieces = _Pieces(file, at - 4)
        judged.insert(0, at)
        if _is_whole(pieces, versions, magic):
            whole.insert(0, at)
        left -= pieces.taken
    return whole or judged


def _is_whole(pieces: _Pieces, versions: Sequence[Version[Any]], magic: int) -> bool:
    try:
        for _ in inspect(io.BufferedReader(pieces), versions, magic=magic):
            pass
    except MigrationError:
        return False
    return pieces.ended


def _places(file: BinaryIO, word: bytes) -> Iterator[int]:
    """Where ``word`` is, one place after another. Each byte is read once, wherever the file stands meanwhile."""
    start, tail = 0, b""
    while True:
        file.seek(start + len(tail))
        data = tail + file.read(SEARCHED)
        if len(data) == len(tail):
            return
        place = data.find(word)
        while place >= 0:
            yield start + place
            place = data.find(word, place + 1)
        tail = data[1 - len(word) :]
        start += len(data) - len(tail)


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
        self.taken = 0  # bytes
        self.ended = False  # behind a length of 0, as QEMU ends them

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Some bytes of the piece in hand; 0 behind the last one."""
        if not self._left and not self._over:
            self._file.seek(self._at)
            length = self._file.read(4)
            self._left = int.from_bytes(length, "big")
            self._at += 4
            self.ended = length == bytes(4)
            self._over = not 0 < self._left <= MAX_PIECE
        if self._over:
            return 0
        self._file.seek(self._at)
        data = self._file.read(min(len(buffer), self._left))
        self._over = not data
        self._at += len(data)
        self._left -= len(data)
        self.taken += len(data)
        buffer[: len(data)] = data
        return len(data)
