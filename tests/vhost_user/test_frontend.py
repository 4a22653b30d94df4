# SPDX-License-Identifier: GPL-2.0-or-later
"""The front-end session, alone and against the back-end session in memory."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from godwit.vhost_user import (
    BackendSession,
    DisconnectedError,
    FrontendSession,
    Outgoing,
    ProtocolError,
    ProtocolFeature,
    Reply,
    Request,
    RequestReceived,
)
from godwit.vhost_user.frames import NEED_REPLY, REPLY, encode
from godwit.vhost_user.payloads import (
    U64,
    Direction,
    Empty,
    Log,
    LogReply,
    Mac,
    MemoryRegion,
    MemoryTable,
    Mtu,
    Payload,
    SingleRegion,
    StateReply,
    StateTransfer,
    VringAddr,
    VringAddress,
    VringEnable,
    VringFd,
    VringIndex,
    VringState,
)

R = Request
PROTOCOL = (
    ProtocolFeature.MQ
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.RARP
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.NET_MTU
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.DEVICE_STATE
)
A = MemoryRegion(0, 4096, 1 << 40, 0)
B = MemoryRegion(4096, 4096, 1 << 41, 4096)
ADDR = VringAddr(0, 1 << 40, (1 << 40) + 4, (1 << 40) + 2)

# Request, payload, descriptors; what the device returns, the reply, what the device is called with (-1: a descriptor).
Case = tuple[Request, Payload, int, object, Payload, tuple[object, ...] | None]

SESSION: list[Case] = [
    (R.GET_FEATURES, Empty(), 0, None, U64(0x144008000), None),
    (R.GET_PROTOCOL_FEATURES, Empty(), 0, None, U64(PROTOCOL), None),
    (R.SET_OWNER, Empty(), 0, None, U64(0), None),
    (R.GET_QUEUE_NUM, Empty(), 0, None, U64(1), None),
    (R.GET_MAX_MEM_SLOTS, Empty(), 0, None, U64(4), None),
    (R.SET_FEATURES, U64(1 << 32), 0, None, U64(0), (1 << 32,)),
    (R.SET_MEM_TABLE, MemoryTable((A,)), 1, None, U64(0), ([A],)),
    (R.ADD_MEM_REG, SingleRegion(B), 1, None, U64(0), (B,)),
    (R.REM_MEM_REG, SingleRegion(B), 0, None, U64(0), (B,)),
    (R.SET_LOG_BASE, Log(4096, 8), 1, None, LogReply(), (-1, 4096, 8)),
    (R.SET_LOG_FD, Empty(), 1, None, U64(0), (-1,)),
    (R.SET_VRING_NUM, VringState(1, 256), 0, None, U64(0), (1, 256)),
    (R.SET_VRING_BASE, VringState(1, 7), 0, None, U64(0), (1, 7)),
    (R.SET_VRING_ADDR, VringAddress(1, ADDR), 0, None, U64(0), (1, ADDR)),
    (R.SET_VRING_ERR, VringFd(1, nofd=True), 0, None, U64(0), (1, None)),
    (R.SET_VRING_CALL, VringFd(1, nofd=False), 1, None, U64(0), (1, -1)),
    (R.SET_VRING_KICK, VringFd(1, nofd=False), 1, None, U64(0), (1, -1)),
    (R.SET_VRING_ENABLE, VringEnable(1, True), 0, None, U64(0), (1, True)),
    (R.NET_SET_MTU, Mtu(1500), 0, None, U64(0), (1500,)),
    (R.SEND_RARP, Mac(b"\x52\x54\0\1\2\3"), 0, None, U64(0), (b"\x52\x54\0\1\2\3",)),
    (R.GET_VRING_BASE, VringIndex(1), 0, 9, VringState(1, 9), (1,)),
    (R.SET_DEVICE_STATE_FD, StateTransfer(Direction.LOAD, 0), 1, None, StateReply(0, True), (Direction.LOAD, 0, -1)),
    (R.CHECK_DEVICE_STATE, Empty(), 0, False, U64(1), ()),
    (R.SET_DEVICE_STATE_FD, StateTransfer(Direction.SAVE, 0), 1, None, StateReply(0, True), (Direction.SAVE, 0, -1)),
    (R.CHECK_DEVICE_STATE, Empty(), 0, True, U64(0), ()),
    (R.RESET_OWNER, Empty(), 0, None, U64(0), ()),
]


def without_fds(value: object) -> object:
    """Arguments with descriptors closed and put as -1."""
    if isinstance(value, MemoryRegion):
        if value.fd >= 0:
            os.close(value.fd)
        return value._replace(fd=-1)
    if isinstance(value, list):
        return [without_fds(item) for item in value]
    return value


def plain(request: Request, arguments: tuple[object, ...]) -> tuple[object, ...]:
    position = {
        R.SET_LOG_BASE: 0,
        R.SET_LOG_FD: 0,
        R.SET_VRING_CALL: 1,
        R.SET_VRING_KICK: 1,
        R.SET_DEVICE_STATE_FD: 2,
    }.get(request)
    if position is None:
        return tuple(without_fds(argument) for argument in arguments)
    fd = arguments[position]
    assert isinstance(fd, int)
    os.close(fd)
    return (*arguments[:position], -1, *arguments[position + 1 :])


def cut(message: Outgoing, step: int) -> list[Outgoing]:
    """The message in pieces, as the kernel delivers them, with the receiver's descriptors on the first."""
    fds = tuple(os.dup(fd) for fd in message.fds)
    pieces = [message.data[start : start + step] for start in range(0, len(message.data), step)]
    return [Outgoing(piece, () if number else fds) for number, piece in enumerate(pieces)]


@pytest.mark.parametrize("step", [1, 7, 12, 1000])
@pytest.mark.parametrize("acks", [True, False])
def test_peer_against_peer(backend: BackendSession, step: int, acks: bool, fd: Callable[[], int]) -> None:
    frontend = FrontendSession(acks=acks)
    file = fd()
    exchange: list[Case] = [(R.SET_PROTOCOL_FEATURES, U64(PROTOCOL), 0, None, U64(0), None), *SESSION]
    for request, payload, count, value, reply, arguments in exchange:
        waiting = frontend.waiting
        for piece in cut(frontend.request(request, payload, [file] * count), step):
            backend.receive(*piece[:2])
        event = backend.next_event()
        if arguments is None:
            assert event is None
        else:
            assert isinstance(event, RequestReceived), event
            assert event.row.request == request
            assert plain(request, event.take_arguments()) == arguments
            backend.complete(value)
            assert backend.next_event() is None
        for message in backend.outgoing():
            for piece in cut(message, step):
                assert frontend.next_reply() is None
                frontend.receive(*piece[:2])
        if frontend.waiting > waiting:
            failed = request == R.CHECK_DEVICE_STATE and value is False
            assert frontend.next_reply() == Reply(request, reply, failed)
        else:
            assert request == R.SET_PROTOCOL_FEATURES or not acks
        assert frontend.next_reply() is None
    os.close(file)


def test_many_requests_before_the_first_reply(backend: BackendSession) -> None:
    frontend = FrontendSession()
    requests = [R.GET_FEATURES, R.GET_PROTOCOL_FEATURES, R.SET_OWNER, R.GET_FEATURES]
    backend.receive(b"".join(frontend.request(request).data for request in requests))
    assert frontend.waiting == 3
    assert backend.next_event() is None
    frontend.receive(b"".join(message.data for message in backend.outgoing()))
    answered = [reply.request for reply in iter(frontend.next_reply, None)]
    assert answered == [R.GET_FEATURES, R.GET_PROTOCOL_FEATURES, R.GET_FEATURES]


def test_a_descriptor_that_comes_back(fd: Callable[[], int]) -> None:
    frontend = FrontendSession()
    frontend.request(R.SET_PROTOCOL_FEATURES, U64(ProtocolFeature.DEVICE_STATE))
    file = fd()
    frontend.request(R.SET_DEVICE_STATE_FD, StateTransfer(Direction.SAVE, 0), [file])
    frontend.receive(encode(R.SET_DEVICE_STATE_FD, REPLY, U64(0).pack()), [file])
    assert frontend.next_reply() == Reply(R.SET_DEVICE_STATE_FD, StateReply(0, False), fds=(file,))
    os.close(file)


def test_a_failed_request_with_and_without_acknowledgement() -> None:
    frontend = FrontendSession()
    frontend.request(R.SET_PROTOCOL_FEATURES, U64(ProtocolFeature.REPLY_ACK | ProtocolFeature.DEVICE_STATE))
    message = frontend.request(R.SET_VRING_NUM, VringState(0, 1))
    assert message.data == encode(R.SET_VRING_NUM, NEED_REPLY, VringState(0, 1).pack())
    frontend.receive(encode(R.SET_VRING_NUM, REPLY, U64(22).pack()))
    assert frontend.next_reply() == Reply(R.SET_VRING_NUM, U64(22), failed=True)
    file = os.eventfd(0)
    for value in (0x101, 1):  # bit 8 is left out by some back-ends
        frontend.request(R.SET_DEVICE_STATE_FD, StateTransfer(Direction.SAVE, 0), [file])
        frontend.receive(encode(R.SET_DEVICE_STATE_FD, REPLY, U64(value).pack()))
        reply = frontend.next_reply()
        assert reply is not None
        assert reply.failed
        assert not reply.fds
    os.close(file)


@pytest.mark.parametrize("reply", [b"", bytes(8)])
def test_both_replies_to_set_log_base(reply: bytes, fd: Callable[[], int]) -> None:
    frontend = FrontendSession()
    frontend.request(R.SET_PROTOCOL_FEATURES, U64(ProtocolFeature.LOG_SHMFD))
    file = fd()
    frontend.request(R.SET_LOG_BASE, Log(4096, 0), [file])
    frontend.receive(encode(R.SET_LOG_BASE, REPLY, reply))
    assert frontend.next_reply() == Reply(R.SET_LOG_BASE, LogReply())
    os.close(file)


# What comes back for GET_FEATURES: number, flags, payload, descriptors.
WRONG_REPLIES: list[tuple[int, int, bytes, int, str]] = [
    (R.GET_FEATURES, 0, bytes(8), 0, "not marked as a reply"),
    (R.SET_FEATURES, REPLY, bytes(8), 0, "a reply to SET_FEATURES instead of GET_FEATURES"),
    (1000, REPLY, bytes(8), 0, "a reply to request 1000 instead of GET_FEATURES"),
    (R.GET_FEATURES, REPLY, bytes(7), 0, "the reply to GET_FEATURES has a payload of 7 bytes"),
    (R.GET_FEATURES, REPLY, b"", 0, "payload of 0 bytes"),
    (R.GET_FEATURES, REPLY, bytes(8), 1, "came with 1 descriptors"),
    (R.GET_FEATURES, REPLY | 2, bytes(8), 0, "has version 3"),
]


@pytest.mark.parametrize(("number", "flags", "payload", "count", "reason"), WRONG_REPLIES)
def test_wrong_replies(number: int, flags: int, payload: bytes, count: int, reason: str, fd: Callable[[], int]) -> None:
    frontend = FrontendSession()
    frontend.request(R.GET_FEATURES)
    frontend.receive(encode(number, flags, payload), [fd() for _ in range(count)])
    for _ in range(2):
        with pytest.raises(ProtocolError, match=reason) as raised:
            frontend.next_reply()
        assert raised.value.fatal
    assert frontend.wanted == 0


@pytest.mark.parametrize(("value", "count"), [(0, 0), (0x100, 1), (0x101, 1), (0x200, 0), (0, 2)])
def test_wrong_replies_to_set_device_state_fd(value: int, count: int, fd: Callable[[], int]) -> None:
    frontend = FrontendSession()
    frontend.request(R.SET_PROTOCOL_FEATURES, U64(ProtocolFeature.DEVICE_STATE))
    file = fd()
    frontend.request(R.SET_DEVICE_STATE_FD, StateTransfer(Direction.SAVE, 0), [file])
    frontend.receive(encode(R.SET_DEVICE_STATE_FD, REPLY, U64(value).pack()), [fd() for _ in range(count)])
    with pytest.raises(ProtocolError, match="the reply to SET_DEVICE_STATE_FD"):
        frontend.next_reply()
    os.close(file)


def test_a_reply_that_nobody_asked_for() -> None:
    frontend = FrontendSession()
    frontend.receive(encode(R.GET_FEATURES, REPLY, bytes(8)))
    with pytest.raises(ProtocolError, match="nobody asked for"):
        frontend.next_reply()


def test_the_back_end_hangs_up(fd: Callable[[], int]) -> None:
    frontend = FrontendSession()
    frontend.request(R.GET_FEATURES)
    frontend.receive(encode(R.GET_FEATURES, REPLY, bytes(8)))
    frontend.request(R.GET_VRING_BASE, VringIndex(0))
    frontend.receive(b"")
    assert frontend.next_reply() is not None
    with pytest.raises(DisconnectedError, match="hung up instead of answering GET_VRING_BASE"):
        frontend.next_reply()

    frontend = FrontendSession()
    frontend.receive(bytes([1, 0]), [fd()])
    frontend.close()


def test_what_cannot_be_sent() -> None:
    frontend = FrontendSession()
    wrong: list[tuple[Request, Payload | None, list[int], str]] = [
        (R.GET_STATUS, None, [], "not supported"),
        (R.SET_FEATURES, None, [], "takes U64, not Empty"),
        (R.SET_VRING_KICK, VringFd(0, nofd=False), [], "0 descriptors"),
        (R.SET_VRING_KICK, VringFd(0, nofd=True), [1], "1 descriptors"),
        (R.SET_MEM_TABLE, MemoryTable((A,)), [1, 2], "2 descriptors"),
        (R.SET_OWNER, None, [1], "1 descriptors"),
        (R.SEND_RARP, Mac(bytes(6)), [], "needs protocol feature RARP"),
    ]
    for request, payload, fds, reason in wrong:
        with pytest.raises(ValueError, match=reason):
            frontend.request(request, payload, fds)
    assert not frontend.waiting


def test_close_closes_descriptors_of_replies(fd: Callable[[], int]) -> None:
    frontend = FrontendSession()
    frontend.receive(encode(R.GET_FEATURES, REPLY, bytes(8)), [fd()])
    frontend.receive(encode(R.GET_FEATURES, REPLY, bytes(8))[:3], [fd()])
    frontend.close()
