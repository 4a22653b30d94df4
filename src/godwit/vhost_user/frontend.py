# SPDX-License-Identifier: GPL-2.0-or-later
"""The front-end's end of a vhost-user session, without I/O.

``request`` encodes a request and remembers the reply that is due for it;
``receive`` takes what arrives and ``next_reply`` matches it with the oldest
request that waits for one. With ``acks`` every request that has no reply of its
own asks for an acknowledgement as soon as REPLY_ACK is negotiated, so that each
failure is known by its request; without, only those that must have a reply get
one, which is faster.

Descriptors passed to ``request`` stay the caller's; those that come with a
reply are the session's until ``next_reply`` hands them over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from godwit.vhost_user.errors import DisconnectedError, ProtocolError
from godwit.vhost_user.features import ProtocolFeature
from godwit.vhost_user.frames import NEED_REPLY, REPLY, Frame, FrameReader, Outgoing, close_fds, encode
from godwit.vhost_user.messages import TABLE, Request, Row
from godwit.vhost_user.payloads import U64, Empty, Payload, StateReply, decode


class Reply(NamedTuple):
    """What the back-end answered. ``failed``: it could not do what was asked. ``fds`` are the receiver's."""

    request: Request
    payload: Payload
    failed: bool = False
    fds: tuple[int, ...] = ()


class FrontendSession:
    """One session with a back-end."""

    def __init__(self, *, acks: bool = True) -> None:
        self.acks = acks
        self.protocol_features = 0
        self._reader = FrameReader()
        self._waiting: deque[tuple[Row, bool]] = deque()

    @property
    def wanted(self) -> int:
        """How many bytes to read at most for descriptors to be attached right; 0 if nothing is expected."""
        return self._reader.wanted

    @property
    def waiting(self) -> int:
        """How many replies are due."""
        return len(self._waiting)

    def request(self, request: Request, payload: Payload | None = None, fds: Sequence[int] = ()) -> Outgoing:
        """Encode a request; the answer to it comes out of ``next_reply`` if ``waiting`` went up.

        ``ValueError`` for a payload of the wrong type, a wrong number of
        descriptors, a request this package does not support, or one whose
        protocol feature is not negotiated.
        """
        row = TABLE[request]
        payload = Empty() if payload is None else payload
        self._check(row, payload, fds)
        ack = self.acks and row.reply is None and bool(self.protocol_features & ProtocolFeature.REPLY_ACK)
        if ack or row.reply is not None:
            self._waiting.append((row, ack))
        if request == Request.SET_PROTOCOL_FEATURES and isinstance(payload, U64):
            self.protocol_features = int(payload.value)
        return Outgoing(encode(request, NEED_REPLY if ack else 0, payload.pack()), tuple(fds))

    def receive(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Take what arrived; ``b""`` for the end of the stream. The descriptors are the session's from now on."""
        self._reader.feed(data, fds)

    def next_reply(self) -> Reply | None:
        """The next reply, or None if more has to arrive first.

        Raises ``ProtocolError`` (always fatal) for a reply that nobody asked
        for or that is malformed, ``DisconnectedError`` at the end of the stream.
        """
        frame = self._reader.next_frame()
        if frame is None:
            if self._reader.eof:
                due = f" instead of answering {self._waiting[0][0].name}" if self._waiting else ""
                raise DisconnectedError(f"the back-end hung up{due}")
            return None
        try:
            return self._match(frame)
        except ProtocolError as error:
            close_fds(frame.fds)
            fatal = ProtocolError(str(error), fatal=True)
            self._reader.fail(fatal)
            raise fatal from error

    def close(self) -> None:
        """Close every descriptor that the session still holds."""
        self._reader.close()

    def _check(self, row: Row, payload: Payload, fds: Sequence[int]) -> None:
        if not row.supported:
            raise ValueError(f"{row.name} is not supported")
        if not isinstance(payload, row.payload):
            raise ValueError(f"{row.name} takes {row.payload.__name__}, not {type(payload).__name__}")
        least, most = row.fds
        due = payload.descriptors
        if not least <= len(fds) <= most or due not in (None, len(fds)):
            raise ValueError(f"{row.name} does not go with {len(fds)} descriptors")
        if row.protocol & ~self.protocol_features:
            raise ValueError(f"{row.name} needs protocol feature {row.protocol.name}, which is not negotiated")

    def _match(self, frame: Frame) -> Reply:
        name = TABLE[frame.request].name if frame.request in TABLE else f"request {frame.request}"
        if not frame.flags & REPLY:
            raise ProtocolError(f"the back-end sent {name}, which is not marked as a reply")
        if not self._waiting:
            raise ProtocolError(f"the back-end sent a reply to {name} that nobody asked for")
        row, ack = self._waiting[0]
        if frame.request != row.request:
            raise ProtocolError(f"the back-end sent a reply to {name} instead of {row.name}")
        kind = U64 if ack or row.reply is None else row.reply
        try:
            payload = decode(kind, frame.payload, frame.fds, (0, 1 if kind is StateReply else 0))
        except ProtocolError as error:
            raise ProtocolError(f"the reply to {row.name} {error}") from error
        self._waiting.popleft()
        return Reply(row.request, payload, _failed(row, ack, payload), frame.fds)


def _failed(row: Row, ack: bool, payload: Payload) -> bool:
    if ack or row.request == Request.CHECK_DEVICE_STATE:
        return isinstance(payload, U64) and payload.value != 0
    return isinstance(payload, StateReply) and payload.error != 0
