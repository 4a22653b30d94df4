# SPDX-License-Identifier: GPL-2.0-or-later
"""Messages out of a stream of bytes and descriptors, and back.

A message is a header of three 32-bit numbers (request, flags, size of the
payload) and the payload; the specification, section "Message Specification".
"""

from __future__ import annotations

import os
import struct
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from godwit.vhost_user.errors import ProtocolError

HEADER = struct.Struct("=III")

VERSION = 1
VERSION_MASK = 0x3
REPLY = 1 << 2
NEED_REPLY = 1 << 3

MAX_PAYLOAD = 4096  # the largest message of the specification (GET_SHMEM_CONFIG) has half of it
MAX_FDS = 32  # per message; the specification has 8 at most, more are received only to be refused


class Frame(NamedTuple):
    """One message, not interpreted yet. Whoever holds it owns ``fds``."""

    request: int
    flags: int
    payload: bytes
    fds: tuple[int, ...]


class Outgoing(NamedTuple):
    """Bytes to send, with descriptors to attach to the first of them.

    ``owned``: the descriptors are to be closed once they are sent.
    """

    data: bytes
    fds: tuple[int, ...] = ()
    owned: bool = False


def encode(request: int, flags: int, payload: bytes) -> bytes:
    """A message as it goes over the wire; ``flags`` without the version."""
    return HEADER.pack(request, flags | VERSION, len(payload)) + payload


def close_fds(fds: Iterable[int]) -> None:
    """Close descriptors, whatever close() has to say about it."""
    for fd in fds:
        try:
            os.close(fd)
        except OSError:
            pass  # closed is closed: Linux gives the descriptor up even where close() reports an error


class FrameReader:
    """Cuts what arrives into frames.

    Descriptors belong to the message whose bytes they came with. To keep that
    unambiguous read no more than ``wanted`` bytes at a time from the socket;
    where more is fed in, descriptors go to the last message that the bytes
    belong to, since Linux ends a read after the bytes that carried some.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._fds: list[int] = []
        self._frames: deque[Frame] = deque()
        self._error: ProtocolError | None = None
        self._eof = False

    @property
    def wanted(self) -> int:
        """How many bytes complete the current header or payload; 0 if nothing more can be taken."""
        if self._error is not None or self._eof:
            return 0
        if len(self._buffer) < HEADER.size:
            return HEADER.size - len(self._buffer)
        return self._length() - len(self._buffer)

    @property
    def backlog(self) -> int:
        """Complete frames not taken yet."""
        return len(self._frames)

    @property
    def eof(self) -> bool:
        """The peer has closed its end."""
        return self._eof

    def feed(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Take bytes and descriptors, which are the reader's from now on; no bytes mean the end."""
        late = list(fds)  # not yet known to which message they belong
        if self._eof or self._error is not None:
            close_fds(late)
            return
        if not data:
            self._eof = True
            close_fds(late)
            if self._buffer:
                self._fail(f"the peer hung up {len(self._buffer)} bytes into a message")
            return
        self._buffer += data
        reason = ""
        while len(self._buffer) >= HEADER.size:
            request, flags, size = HEADER.unpack_from(self._buffer)
            reason = _header_fault(request, flags, size)
            if reason or len(self._buffer) < HEADER.size + size:
                break
            payload = bytes(self._buffer[HEADER.size : HEADER.size + size])
            del self._buffer[: HEADER.size + size]
            if not self._buffer:
                self._fds += late
                late = []
            self._frames.append(Frame(request, flags, payload, tuple(self._fds)))
            self._fds = []
        self._fds += late
        if not reason and len(self._fds) > MAX_FDS:
            reason = f"more than {MAX_FDS} descriptors came with a message"
        if reason:
            self._fail(reason)

    def fail(self, error: ProtocolError) -> None:
        """The stream is broken, for a reason found below (descriptors cut off, connection reset)."""
        if self._error is None and not self._eof:
            self._error = error
        self._drop_fds()

    def next_frame(self) -> Frame | None:
        """The next frame; None if there is none yet. Raises what ended the stream after the last one."""
        if self._frames:
            return self._frames.popleft()
        if self._error is not None:
            raise self._error
        return None

    def unread(self) -> tuple[bytes, tuple[int, ...]]:
        """The part of a message that has come, and its descriptors, which stay the reader's. No frame is left."""
        return bytes(self._buffer), tuple(self._fds)

    def close(self) -> None:
        """Close all descriptors still held, and take nothing more."""
        self._eof = True
        while self._frames:
            close_fds(self._frames.popleft().fds)
        self._drop_fds()

    def _length(self) -> int:
        size: int = HEADER.unpack_from(self._buffer)[2]
        return HEADER.size + size

    def _fail(self, reason: str) -> None:
        self._error = ProtocolError(reason, fatal=True)
        self._drop_fds()

    def _drop_fds(self) -> None:
        close_fds(self._fds)
        self._fds = []


def _header_fault(request: int, flags: int, size: int) -> str:
    """Why the stream cannot be followed beyond this header; empty if it can."""
    if flags & VERSION_MASK != VERSION:
        version = flags & VERSION_MASK
        return f"request {request} has version {version}, not {VERSION}: does the other side speak vhost-user?"
    if flags & ~(VERSION_MASK | REPLY | NEED_REPLY):
        return f"request {request} has unknown flags {flags:#x}"
    if size > MAX_PAYLOAD:
        return f"request {request} has a payload of {size} bytes, more than {MAX_PAYLOAD}"
    return ""
