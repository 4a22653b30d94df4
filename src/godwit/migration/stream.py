# SPDX-License-Identifier: GPL-2.0-or-later
"""Bounded cursors over a stream: ``Reader`` pulls, ``Writer`` pushes.

Each works on a descriptor (a pipe or a socket; it is set non-blocking, and
waits are a poll on it and on the cancellation) or on a binary file object such
as ``io.BytesIO`` or an open file. Integers are big-endian; a device that must
read others declares them (``godwit.migration.section``).

The process must ignore SIGPIPE, as Python does by default: a reader that went
away is then an error of the write, ``PeerGoneError``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import threading
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import BinaryIO, Final, TypedDict, Unpack

from godwit.migration.errors import (
    AbortedError,
    BadRecordError,
    PeerGoneError,
    PipeError,
    TimedOutError,
    TruncatedError,
)

#: How much is read ahead, and how much is gathered before it is written. A pipe holds 64 KiB by default.
CHUNK: Final = 256 * 1024
#: What a pipe shall hold, where we may say so: the less often both sides have to wait for each other (pipe(7)).
PIPE: Final = 1 << 20
#: A part of a stream that is no longer than this is read as a whole: most are, and small values are then cheap to pull.
SMALL: Final = 4096


class Cancel:
    """A cancellation that a waiting cursor notices at once. Set from any thread."""

    def __init__(self) -> None:
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._reason = ""
        self._lock = threading.Lock()

    def set(self, reason: str) -> None:
        """Stop the transfer at its next read, write or stage, or the wait that it is in."""
        self._reason = reason or "cancelled"
        with self._lock:
            if self._event >= 0:
                os.eventfd_write(self._event, 1)

    def check(self) -> None:
        """:raises AbortedError: it was set."""
        if self._reason:
            raise AbortedError(f"transfer cancelled: {self._reason}")

    def fileno(self) -> int:
        """A descriptor that is readable once the cancellation is set."""
        return self._event

    def close(self) -> None:
        """Release the descriptor."""
        with self._lock:
            event, self._event = self._event, -1
            if event >= 0:
                os.close(event)

    def __del__(self) -> None:
        self.close()


class StreamOptions(TypedDict, total=False):
    """What a cursor may be told.

    ``timeout`` bounds each wait, in seconds; ``cancel`` ends it; ``copy`` is given
    all that is read or written, in pieces.
    """

    timeout: float | None
    cancel: Cancel | None
    copy: Callable[[bytes], None] | None


class _Stream:
    """What both cursors have: the file, the stage in hand for messages, waiting."""

    def __init__(self, file: int | BinaryIO, **options: Unpack[StreamOptions]) -> None:
        self.stage = "header"
        self.offset = 0
        self._copy = options.get("copy")
        self._timeout = options.get("timeout")
        self._cancel = options.get("cancel")
        self._check: int | None = None
        self._fd = -1
        self._file: BinaryIO | None = None
        if isinstance(file, int):
            self._fd = file
            try:
                os.set_blocking(file, False)
            except OSError as error:  # O_PATH: a file, and not to be used
                raise self._os_error(error, "used") from error
            with contextlib.suppress(OSError):  # no pipe, or the user has large ones already: it may be as it is
                fcntl.fcntl(file, fcntl.F_SETPIPE_SZ, PIPE)
        else:
            self._file = file

    def check_cancelled(self) -> None:
        """For stages that work for long between reads or writes.

        :raises AbortedError: the transfer was called off.
        """
        if self._cancel is not None:
            self._cancel.check()

    @property
    def check(self) -> int:
        """CRC-32 (as zlib has it) of all that passed since ``begin_check``; 0 before it."""
        return self._check or 0

    def begin_check(self) -> None:
        """Keep a CRC-32 of all that passes from here on."""
        self._check = 0

    def detach(self) -> None:
        """Forget the descriptor, which is about to be closed; whatever comes after this fails."""
        self._fd = -1

    def _wait(self, events: int, what: str) -> None:
        """Wait until the descriptor is ready. An error of the peer counts as ready."""
        poll = select.poll()
        poll.register(self._fd, events)
        if self._cancel is not None and self._cancel.fileno() >= 0:
            poll.register(self._cancel.fileno(), select.POLLIN)
        ready = poll.poll(None if self._timeout is None else max(1, int(self._timeout * 1000)))
        self.check_cancelled()
        if not ready:
            raise TimedOutError(f"{self.stage}: nothing could be {what} for {self._timeout:g} s")

    def _os_error(self, error: OSError, what: str) -> PipeError:
        return PipeError(f"{self.stage}: the stream cannot be {what}: {error.strerror or error}")


class Puller(ABC):
    """What can be pulled from: a whole stream (``Reader``) or a part of one (``Part``)."""

    @abstractmethod
    def pull_bytes(self, count: int, limit: int | None = None, name: str = "length") -> bytes:
        """The next ``count`` bytes; ``limit`` bounds a count that came from the stream."""

    @abstractmethod
    def place(self) -> tuple[str, int]:
        """The stage, and the offset in the whole stream."""

    def pull_u8(self) -> int:
        """The next byte."""
        return self.pull_bytes(1)[0]

    def pull_u16(self) -> int:
        """The next 2 bytes as a big-endian integer."""
        return int.from_bytes(self.pull_bytes(2), "big")

    def pull_u32(self) -> int:
        """The next 4 bytes as a big-endian integer."""
        return int.from_bytes(self.pull_bytes(4), "big")

    def pull_u64(self) -> int:
        """The next 8 bytes as a big-endian integer."""
        return int.from_bytes(self.pull_bytes(8), "big")

    def bad(self, record: str, field: str, value: object, why: str, back: int = 0) -> BadRecordError:
        """An error about a value that was read ``back`` bytes before the present offset."""
        stage, offset = self.place()
        return BadRecordError(stage, record, field, value, offset - back, why)


class Reader(_Stream, Puller):
    """A cursor over a stream that is believed in nothing.

    ``offset`` is the number of bytes taken so far. Every pull gives exactly
    what was asked for, or raises ``TruncatedError`` (or what the wait raises:
    ``TimedOutError``, ``AbortedError``, ``PipeError``).
    """

    def __init__(self, file: int | BinaryIO, **options: Unpack[StreamOptions]) -> None:
        super().__init__(file, **options)
        self._buffer = b""
        self._pos = 0
        self._eof = False

    def pull_bytes(self, count: int, limit: int | None = None, name: str = "length") -> bytes:
        """The next ``count`` bytes; ``limit`` bounds a count that came from the stream.

        Memory is taken as bytes arrive, not as they are announced.

        :raises BadRecordError: ``count`` is above ``limit``, or negative; ``name`` says of what.
        """
        if count < 0 or (limit is not None and count > limit):
            raise self.bad("stream", name, count, f"must be at most {limit}")
        start = self._pos
        end = start + count
        if end <= len(self._buffer):
            self._pos = end
            self.offset += count
            data = self._buffer[start:end]
        else:
            data = self._pull_long(count)
        if self._check is not None:
            self._check = zlib.crc32(data, self._check)
        return data

    def place(self) -> tuple[str, int]:
        """The stage and the offset."""
        return self.stage, self.offset

    def ahead(self) -> tuple[bytes, int]:
        """What was read ahead: a buffer, and where in it the next byte lies; it may be at its end. Nothing is taken.

        For whoever finds many small things in it at once, to pull them together.
        """
        return self._buffer, self._pos

    def at_end(self) -> bool:
        """Wait for one more byte or the end of the stream; True for the end."""
        if self._pos < len(self._buffer):
            return False
        self._buffer = self._read(CHUNK)
        self._pos = 0
        return not self._buffer

    def _pull_long(self, count: int) -> bytes:
        """``pull_bytes`` for more than is buffered."""
        parts = [self._buffer[self._pos :]]
        got = len(parts[0])
        self._buffer = b""
        self._pos = 0
        while got < count:
            data = self._read(max(CHUNK, min(count - got, 1 << 20)))
            if not data:
                raise TruncatedError(self.stage, self.offset, count, got)
            parts.append(data)
            got += len(data)
        surplus = got - count
        if surplus:
            last = parts[-1]
            self._buffer = last[len(last) - surplus :]
            parts[-1] = last[: len(last) - surplus]
        self.offset += count
        return b"".join(parts)

    def _read(self, most: int) -> bytes:
        """Some bytes, or none at the end of the stream."""
        if self._eof:
            return b""
        self.check_cancelled()
        try:
            data = self._read_fd(most) if self._file is None else self._file.read(most)
        except OSError as error:
            raise self._os_error(error, "read") from error
        self._eof = not data
        if self._copy is not None:
            self._copy(data)
        return data

    def _read_fd(self, most: int) -> bytes:
        while True:
            try:
                return os.read(self._fd, most)
            except BlockingIOError:
                self._wait(select.POLLIN, "read")


class Part(Puller):
    """A part of a stream, of a length that was announced: nothing behind it can be pulled.

    ``start`` is where it begins, in the whole stream; ``left`` is how many bytes of it were not pulled yet.
    """

    def __init__(self, whole: Reader, name: str, length: int) -> None:
        self._whole = whole
        self.name = name
        self.start = whole.offset
        self.left = length
        self._end = self.start + length
        self._data = whole.pull_bytes(length) if length <= SMALL else None

    @property
    def offset(self) -> int:
        """Of the whole stream."""
        return self._end - self.left

    def place(self) -> tuple[str, int]:
        """The stage, and the offset in the whole stream."""
        return self._whole.stage, self.offset

    def pull_bytes(self, count: int, limit: int | None = None, name: str = "length") -> bytes:
        """The next ``count`` bytes of the part.

        :raises BadRecordError: the part has no more so many.
        """
        if count > self.left:
            raise self.bad(self.name, name, count, f"and {self.left} bytes of it are left")
        if self._data is None or count < 0 or (limit is not None and count > limit):
            data = self._whole.pull_bytes(count, limit, name)
        else:
            at = len(self._data) - self.left
            data = self._data[at : at + count]
        self.left -= count
        return data

    def at_end(self) -> bool:
        """Whether all of it was pulled."""
        return not self.left

    def skip(self) -> int:
        """Pull what is left, a piece at a time; how many bytes that was."""
        skipped = self.left
        while self.left:
            self.pull_bytes(min(self.left, CHUNK))
        return skipped


class Writer(_Stream):
    """A cursor that gathers what is pushed and writes it in large pieces.

    ``offset`` is the number of bytes pushed so far. A push may write, and then
    raises what writing raises: ``PeerGoneError``, ``TimedOutError``, ``AbortedError``,
    ``PipeError``.
    """

    def __init__(self, file: int | BinaryIO, **options: Unpack[StreamOptions]) -> None:
        super().__init__(file, **options)
        self._parts: list[bytes] = []
        self._gathered = 0

    def push_bytes(self, data: bytes) -> None:
        """Append ``data`` as it is."""
        size = len(data)
        if self._check is not None:
            self._check = zlib.crc32(data, self._check)
        if size >= CHUNK:
            self.flush()  # so that it is written from where it is
        self.offset += size
        self._parts.append(data)
        self._gathered += size
        if self._gathered >= CHUNK:
            self.flush()

    def push_u8(self, value: int) -> None:
        """Append one byte."""
        self.push_bytes(value.to_bytes(1, "big"))

    def push_u16(self, value: int) -> None:
        """Append 2 bytes, big-endian."""
        self.push_bytes(value.to_bytes(2, "big"))

    def push_u32(self, value: int) -> None:
        """Append 4 bytes, big-endian."""
        self.push_bytes(value.to_bytes(4, "big"))

    def push_u64(self, value: int) -> None:
        """Append 8 bytes, big-endian."""
        self.push_bytes(value.to_bytes(8, "big"))

    def flush(self) -> None:
        """Write all that was gathered."""
        if not self._gathered:
            return
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self._gathered = 0
        self.check_cancelled()
        if self._copy is not None:
            self._copy(data)
        try:
            if self._file is not None:
                self._file.write(data)
                self._file.flush()
            else:
                self._write_fd(data)
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.ECONNRESET):
                raise PeerGoneError(f"{self.stage}: the reader closed the stream before its end") from error
            raise self._os_error(error, "written") from error

    def _write_fd(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:
                self._wait(select.POLLOUT, "written")
