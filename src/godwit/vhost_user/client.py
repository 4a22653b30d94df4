# SPDX-License-Identifier: GPL-2.0-or-later
"""A blocking vhost-user front-end: one method per request, each of which returns when it is done."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from godwit.vhost_user import transport
from godwit.vhost_user.errors import DisconnectedError, ProtocolError, RequestFailedError
from godwit.vhost_user.frames import Outgoing, close_fds
from godwit.vhost_user.frontend import FrontendSession, Reply
from godwit.vhost_user.messages import Request
from godwit.vhost_user.payloads import (
    U64,
    Direction,
    Log,
    Mac,
    MemoryRegion,
    MemoryTable,
    Mtu,
    Payload,
    Phase,
    SingleRegion,
    StateTransfer,
    VringAddr,
    VringAddress,
    VringEnable,
    VringFd,
    VringIndex,
    VringState,
)


class FrontendClient:
    """The front-end's end of a session, over a connected UNIX stream socket that it then owns.

    ``timeout`` in seconds holds for each request; None waits for ever. Without
    ``acks`` requests that have no reply of their own return when they are
    sent. Descriptors passed to a method stay the caller's (the back-end gets
    duplicates). Not to be used from two threads at once.

    Every method may raise ``RequestFailedError`` (refused; the session goes on),
    ``DisconnectedError`` (the back-end is gone), ``TimeoutError``, or
    ``ProtocolError`` (nonsense came back). After any but the first, only
    ``close`` is left. ``ValueError``: the request cannot be sent like this.
    """

    def __init__(self, sock: socket.socket, *, timeout: float | None = 10.0, acks: bool = True) -> None:
        self.timeout = timeout
        self.session = FrontendSession(acks=acks)
        self._sock = sock
        self._sender = transport.Sender(sock)

    @classmethod
    def connect(cls, path: str | os.PathLike[str], *, timeout: float | None = 10.0, acks: bool = True) -> Self:
        """Connect to a back-end that listens at ``path``; ``OSError`` if nobody does."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout)
            sock.connect(os.fspath(path))
        except BaseException:
            sock.close()
            raise
        return cls(sock, timeout=timeout, acks=acks)

    def close(self) -> None:
        """Hang up."""
        self._sender.close()
        self.session.close()
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def fileno(self) -> int:
        """The socket's descriptor, to notice with poll() that the back-end hung up."""
        return self._sock.fileno()

    def get_features(self) -> int:
        """GET_FEATURES: the features that the back-end offers."""
        return self._number(Request.GET_FEATURES)

    def set_features(self, features: int) -> None:
        """SET_FEATURES: use these."""
        self._call(Request.SET_FEATURES, U64(features))

    def get_protocol_features(self) -> int:
        """GET_PROTOCOL_FEATURES: the protocol features that the back-end offers."""
        return self._number(Request.GET_PROTOCOL_FEATURES)

    def set_protocol_features(self, features: int) -> None:
        """SET_PROTOCOL_FEATURES: use these from now on."""
        self._call(Request.SET_PROTOCOL_FEATURES, U64(features))

    def set_owner(self) -> None:
        """SET_OWNER: begin."""
        self._call(Request.SET_OWNER)

    def reset_owner(self) -> None:
        """RESET_OWNER: disable all rings (deprecated)."""
        self._call(Request.RESET_OWNER)

    def get_queue_num(self) -> int:
        """GET_QUEUE_NUM: how many queues (a network device: queue pairs) the back-end has."""
        return self._number(Request.GET_QUEUE_NUM)

    def get_max_mem_slots(self) -> int:
        """GET_MAX_MEM_SLOTS: how many memory regions the back-end takes."""
        return self._number(Request.GET_MAX_MEM_SLOTS)

    def set_mem_table(self, regions: Sequence[MemoryRegion]) -> None:
        """SET_MEM_TABLE: these are the regions, at most 8, each with its ``fd``."""
        self._call(Request.SET_MEM_TABLE, MemoryTable(tuple(regions)), [region.fd for region in regions])

    def add_mem_region(self, region: MemoryRegion) -> None:
        """ADD_MEM_REG: one region more, with its ``fd``."""
        self._call(Request.ADD_MEM_REG, SingleRegion(region), [region.fd])

    def remove_mem_region(self, region: MemoryRegion) -> None:
        """REM_MEM_REG: one region less; its ``fd`` and ``mmap_offset`` do not matter."""
        self._call(Request.REM_MEM_REG, SingleRegion(region))

    def set_log_base(self, fd: int, size: int, offset: int = 0) -> None:
        """SET_LOG_BASE: log dirty pages in ``size`` bytes at ``offset`` of ``fd``."""
        self._call(Request.SET_LOG_BASE, Log(size, offset), [fd])

    def set_log_fd(self, fd: int) -> None:
        """SET_LOG_FD: the eventfd that the back-end may signal when the log has changed."""
        self._call(Request.SET_LOG_FD, fds=[fd])

    def set_vring_num(self, index: int, num: int) -> None:
        """SET_VRING_NUM: the ring has ``num`` entries."""
        self._call(Request.SET_VRING_NUM, VringState(index, num))

    def set_vring_addr(self, index: int, addr: VringAddr) -> None:
        """SET_VRING_ADDR: the ring is there."""
        self._call(Request.SET_VRING_ADDR, VringAddress(index, addr))

    def set_vring_base(self, index: int, base: int) -> None:
        """SET_VRING_BASE: the next available entry to take is ``base``."""
        self._call(Request.SET_VRING_BASE, VringState(index, base))

    def get_vring_base(self, index: int) -> int:
        """GET_VRING_BASE: stop the ring; the next available entry that it would have taken."""
        payload = self._call(Request.GET_VRING_BASE, VringIndex(index))
        assert isinstance(payload, VringState)
        if payload.index != index:
            raise ProtocolError(f"the reply to GET_VRING_BASE is for ring {payload.index}, not {index}", fatal=True)
        return payload.num

    def set_vring_kick(self, index: int, fd: int | None) -> None:
        """SET_VRING_KICK: start the ring, with this eventfd, or None to have it polled."""
        self._set_vring_fd(Request.SET_VRING_KICK, index, fd)

    def set_vring_call(self, index: int, fd: int | None) -> None:
        """SET_VRING_CALL: signal used buffers with this eventfd."""
        self._set_vring_fd(Request.SET_VRING_CALL, index, fd)

    def set_vring_err(self, index: int, fd: int | None) -> None:
        """SET_VRING_ERR: signal a broken ring with this eventfd."""
        self._set_vring_fd(Request.SET_VRING_ERR, index, fd)

    def set_vring_enable(self, index: int, enabled: bool) -> None:
        """SET_VRING_ENABLE: let the ring's buffers through, or not."""
        self._call(Request.SET_VRING_ENABLE, VringEnable(index, enabled))

    def send_rarp(self, mac: bytes) -> None:
        """SEND_RARP: announce the guest's address (6 bytes)."""
        self._call(Request.SEND_RARP, Mac(mac))

    def net_set_mtu(self, mtu: int) -> None:
        """NET_SET_MTU: the MTU in bytes."""
        self._call(Request.NET_SET_MTU, Mtu(mtu))

    def set_device_state_fd(self, direction: Direction, fd: int, phase: int = Phase.STOPPED) -> int | None:
        """SET_DEVICE_STATE_FD: begin to transfer the device's state over ``fd``, one end of a pipe.

        Close ``fd`` afterwards, or the pipe's end will not be seen. Returns a
        descriptor to use instead (the caller's from now on), or None.
        """
        reply = self._exchange(Request.SET_DEVICE_STATE_FD, StateTransfer(Direction(direction), phase), [fd])
        return reply.fds[0] if reply is not None and reply.fds else None

    def check_device_state(self) -> bool:
        """CHECK_DEVICE_STATE: wait for the transfer to end; whether it went well."""
        try:
            self._call(Request.CHECK_DEVICE_STATE)
        except RequestFailedError:
            return False
        return True

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes and descriptors as they are, right or wrong, to see how a back-end takes them."""
        self._send(Outgoing(data, tuple(fds)), self._deadline())

    def _set_vring_fd(self, request: Request, index: int, fd: int | None) -> None:
        self._call(request, VringFd(index, nofd=fd is None), [] if fd is None else [fd])

    def _number(self, request: Request) -> int:
        payload = self._call(request)
        assert isinstance(payload, U64)
        return payload.value

    def _call(self, request: Request, payload: Payload | None = None, fds: Sequence[int] = ()) -> Payload | None:
        reply = self._exchange(request, payload, fds)
        return None if reply is None else reply.payload

    def _exchange(self, request: Request, payload: Payload | None, fds: Sequence[int]) -> Reply | None:
        deadline = self._deadline()
        due = self.session.waiting
        message = self.session.request(request, payload, fds)
        self._send(message, deadline)
        if self.session.waiting == due:
            return None
        reply = self._receive(deadline)
        if reply.failed:
            close_fds(reply.fds)
            raise RequestFailedError(f"the back-end refused {request.name}: {reply.payload}")
        return reply

    def _send(self, message: Outgoing, deadline: float | None) -> None:
        self._sender.put([message])
        try:
            self._set_timeout(deadline)
            self._sender.send()
        except TimeoutError:
            raise
        except OSError as error:
            raise DisconnectedError(f"the back-end is gone: {error}") from error

    def _receive(self, deadline: float | None) -> Reply:
        while True:
            reply = self.session.next_reply()
            if reply is not None:
                return reply
            self._set_timeout(deadline)
            try:
                data, fds = transport.receive(self._sock, self.session.wanted)
            except TimeoutError:
                raise
            except OSError as error:
                raise DisconnectedError(f"the back-end is gone: {error}") from error
            self.session.receive(data, fds)

    def _deadline(self) -> float | None:
        return None if self.timeout is None else time.monotonic() + self.timeout

    def _set_timeout(self, deadline: float | None) -> None:
        if deadline is None:
            self._sock.settimeout(None)
            return
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the back-end did not answer in time")
        self._sock.settimeout(left)
