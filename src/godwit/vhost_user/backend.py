# SPDX-License-Identifier: GPL-2.0-or-later
"""The back-end's end of a vhost-user session, without I/O.

Bytes and descriptors go into ``receive``; ``next_event`` says what the device
has to do, one thing at a time; ``complete`` or ``fail`` says how that went;
``outgoing`` has what is to be sent. Requests that only concern the session
(owner, features offered, protocol features) are answered without an event.

A request that breaks the protocol is refused: with its own reply if that can
tell of a failure, with an acknowledgement if the front-end waits for one, and
with the end of the session if neither is there, since the front-end would go on
as if it had been done. A stream whose messages cannot be told apart any more
always ends the session.

The session owns every descriptor that it was fed until ``take_arguments`` hands
it to the device; ``close`` closes the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from godwit.vhost_user.errors import DeviceError, ProtocolError, VhostUserError
from godwit.vhost_user.frames import NEED_REPLY, REPLY, Frame, FrameReader, Outgoing, close_fds, encode
from godwit.vhost_user.messages import TABLE, Request, Row
from godwit.vhost_user.payloads import U64, LogReply, Payload, StateReply, VringIndex, VringState, decode
from godwit.vhost_user.state import SavedSession, SessionState


@dataclass(slots=True)
class RequestReceived:
    """The device is to carry out this request: call ``complete`` or ``fail`` on the session next."""

    row: Row
    payload: Payload
    ack: bool
    _fds: tuple[int, ...] = field(default=(), repr=False)

    def take_arguments(self) -> tuple[object, ...]:
        """The arguments of the device's method ``row.handler``. Their descriptors are the caller's now."""
        fds, self._fds = self._fds, ()
        if self.row.request == Request.REM_MEM_REG:
            close_fds(fds)
            fds = ()
        return self.payload.arguments(fds)

    def drop(self) -> None:
        """Close the descriptors that nobody took."""
        close_fds(self._fds)
        self._fds = ()


class RequestRefused(NamedTuple):
    """A request broke the protocol; the front-end was told and the session goes on."""

    error: ProtocolError


class SessionEnded(NamedTuple):
    """Nothing more will come: the front-end hung up (no error), or something ended the session."""

    error: VhostUserError | None


Event = RequestReceived | RequestRefused | SessionEnded


class BackendSession:
    """One session with a front-end.

    ``features`` and ``protocol_features`` are those offered, ``queues`` is the
    number of vrings, ``queue_num`` the answer to GET_QUEUE_NUM. ``saved``: go on
    with what ``save`` gave in another process; ``ProtocolError`` if that cannot
    be, and its descriptors stay the caller's then.
    """

    def __init__(
        self,
        *,
        features: int,
        protocol_features: int = 0,
        queues: int = 2,
        queue_num: int = 1,
        max_mem_slots: int = 8,
        saved: SavedSession | None = None,
    ) -> None:
        self.state = SessionState(features, protocol_features, queues, max_mem_slots)
        self._answers = {
            Request.GET_FEATURES: features,
            Request.GET_PROTOCOL_FEATURES: protocol_features,
            Request.GET_QUEUE_NUM: queue_num,
            Request.GET_MAX_MEM_SLOTS: max_mem_slots,
        }
        self._reader = FrameReader()
        if saved is not None:
            self.state.restore(saved)
            if saved.unread:
                self._reader.feed(saved.unread, saved.fds)
        self._outgoing: list[Outgoing] = []
        self._current: RequestReceived | None = None
        self._ended: SessionEnded | None = None

    @property
    def wanted(self) -> int:
        """How many bytes to read at most for descriptors to be attached right; 0 if nothing is expected."""
        return 0 if self._ended else self._reader.wanted

    @property
    def backlog(self) -> int:
        """Messages received but not looked at yet."""
        return self._reader.backlog

    def receive(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Take what arrived; ``b""`` for the end of the stream. The descriptors are the session's from now on."""
        self._reader.feed(data, fds)

    def receive_error(self, error: ProtocolError) -> None:
        """The transport broke. What arrived before is still worked off."""
        self._reader.fail(error)

    def next_event(self) -> Event | None:
        """What to do next, or None if more has to arrive first.

        Raises ``RuntimeError`` if the last request was neither completed nor failed.
        """
        if self._current is not None:
            raise RuntimeError(f"{self._current.row.name} is not completed yet")
        while self._ended is None:
            try:
                frame = self._reader.next_frame()
            except ProtocolError as error:
                return self._end(error)
            if frame is None:
                return self._end(None) if self._reader.eof else None
            event = self._look_at(frame)
            if event is not None:
                return event
        return self._ended

    def complete(self, value: object = None) -> None:
        """The current request was carried out; ``value`` is what the device's method returned."""
        request = self._take_current()
        if request.row.reply is not None:
            try:
                payload, fds = _own_reply(request, value)
            except ValueError as error:
                self._end(DeviceError(f"{request.row.name}: the device's answer is no answer: {error}"))
                return
            self._reply(request.row.request, payload, fds)
        elif request.ack:
            self._reply(request.row.request, U64(0))
        self.state.apply(request.row, request.payload)

    def fail(self, error: VhostUserError) -> bool:
        """The current request could not be carried out.

        Returns whether the session goes on; if the front-end could not be told, it is over.
        """
        request = self._take_current()
        if request.row.request == Request.CHECK_DEVICE_STATE:
            self.state.apply(request.row, request.payload)  # over is over, well or not
        if self._reply_failure(request.row, request.row.request, request.ack):
            return True
        self._end(error)
        return False

    def save(self) -> SavedSession:
        """The session between two requests, for another process. It is left as it is, and its descriptors with it.

        Raises ``RuntimeError`` while there is something to do, to send or to check: work off what ``next_event``
        gives first.
        """
        if self._current is not None or self._outgoing or self._ended or self.state.transfer or self._reader.backlog:
            raise RuntimeError("the session is in the midst of something")
        unread, fds = self._reader.unread()
        return self.state.save()._replace(unread=unread, fds=fds)

    def outgoing(self) -> list[Outgoing]:
        """What is to be sent now, in this order. Owned descriptors are the caller's to close."""
        outgoing, self._outgoing = self._outgoing, []
        return outgoing

    def close(self) -> None:
        """End the session and close every descriptor that it still holds."""
        if self._current is not None:
            self._take_current()
        self._end(None)
        for message in self.outgoing():
            if message.owned:
                close_fds(message.fds)

    def _look_at(self, frame: Frame) -> Event | None:
        row = TABLE.get(frame.request)
        ack = bool(frame.flags & NEED_REPLY) and self.state.reply_ack
        try:
            if frame.flags & REPLY:
                raise ProtocolError("is marked as a reply")
            if row is None:
                raise ProtocolError("is unknown")
            if not row.supported:
                raise ProtocolError("is not supported")
            payload = decode(row.payload, frame.payload, frame.fds, row.fds)
            self.state.check(row, payload)
        except ProtocolError as error:
            close_fds(frame.fds)
            name = f"request {frame.request}" if row is None else row.name
            reason = f"{name} {error}"
            if not self._reply_failure(row, frame.request, ack):
                return self._end(ProtocolError(reason, fatal=True))
            return RequestRefused(ProtocolError(reason))
        self._current = RequestReceived(row, payload, ack, frame.fds)
        if row.handler:
            return self._current
        self.complete(self._answers.get(row.request))
        return None

    def _take_current(self) -> RequestReceived:
        if self._current is None:
            raise RuntimeError("there is no request to complete")
        request, self._current = self._current, None
        request.drop()
        return request

    def _reply_failure(self, row: Row | None, request: int, ack: bool) -> bool:
        if row is not None and row.reply is not None:
            if row.failure is None:
                return False
            self._reply(request, row.failure)
        elif ack:
            self._reply(request, U64(1))
        else:
            return False
        return True

    def _reply(self, request: int, payload: Payload, fds: tuple[int, ...] = ()) -> None:
        self._outgoing.append(Outgoing(encode(request, REPLY, payload.pack()), fds, owned=True))

    def _end(self, error: VhostUserError | None) -> SessionEnded:
        if self._ended is None:
            self._ended = SessionEnded(error)
            self._reader.close()
        return self._ended


def _own_reply(request: RequestReceived, value: object) -> tuple[Payload, tuple[int, ...]]:
    """What the device's method returned, as the reply of its request; ``ValueError`` if it cannot be one."""
    kind = request.row.reply
    if kind is StateReply:
        if value is None:
            return StateReply(error=0, nofd=True), ()
        return StateReply(error=0, nofd=False), (_number(value),)
    if kind is VringState and isinstance(request.payload, VringIndex):
        return VringState(request.payload.index, _number(value)), ()
    if request.row.request == Request.CHECK_DEVICE_STATE:
        return U64(0 if value else 1), ()
    if kind is U64:
        return U64(_number(value)), ()
    return LogReply(), ()


def _number(value: object) -> int:
    if not isinstance(value, int):
        raise ValueError(f"{value!r} is no number")
    return value
