# SPDX-License-Identifier: GPL-2.0-or-later
"""The back-end session: what is legal when, what is refused and how, who owns descriptors."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

import pytest

from godwit.vhost_user import (
    BackendSession,
    DeviceError,
    Feature,
    Outgoing,
    ProtocolError,
    ProtocolFeature,
    Request,
    RequestReceived,
    RequestRefused,
    SessionEnded,
)
from godwit.vhost_user.frames import HEADER, NEED_REPLY, REPLY, close_fds, encode

R = Request
ALL_PROTOCOL = (
    ProtocolFeature.MQ
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.RARP
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.NET_MTU
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.DEVICE_STATE
)


def q(*values: int) -> bytes:
    return struct.pack(f"={len(values)}Q", *values)


def i(*values: int) -> bytes:
    return struct.pack(f"={len(values)}I", *values)


def table(*regions: tuple[int, int, int]) -> bytes:
    return i(len(regions), 0) + b"".join(q(guest, size, user, 0) for guest, size, user in regions)


def region(guest: int, size: int, user: int) -> bytes:
    return bytes(8) + q(guest, size, user, 0)


ADDRESS = q(0, 0, 0, 0)

# A message: request, payload, number of descriptors.
Message = tuple[int, bytes, int]

NEGOTIATED: list[Message] = [(R.SET_PROTOCOL_FEATURES, q(ALL_PROTOCOL), 0)]
OWNED: list[Message] = [*NEGOTIATED, (R.SET_OWNER, b"", 0)]
MAPPED: list[Message] = [*OWNED, (R.SET_MEM_TABLE, table((0, 100, 1000), (100, 100, 2000)), 2)]
SET_UP: list[Message] = [
    *MAPPED,
    (R.SET_VRING_NUM, i(0, 256), 0),
    (R.SET_VRING_ADDR, i(0, 0) + ADDRESS, 0),
]
RUNNING: list[Message] = [*SET_UP, (R.SET_VRING_KICK, q(0), 1)]
TRANSFER: list[Message] = [*SET_UP, (R.SET_DEVICE_STATE_FD, i(0, 0), 1)]

DEFAULTS = {R.GET_VRING_BASE: 0, R.CHECK_DEVICE_STATE: True}


def send(session: BackendSession, message: Message, flags: int = 0) -> None:
    number, payload, count = message
    session.receive(encode(number, flags, payload), [os.eventfd(0, os.EFD_CLOEXEC) for _ in range(count)])


def work_off(session: BackendSession) -> None:
    """Carry out what was sent, as a device that agrees to everything."""
    while (event := session.next_event()) is not None:
        assert isinstance(event, RequestReceived), event
        session.complete(DEFAULTS.get(event.row.request))
    session.outgoing()


def prepare(session: BackendSession, messages: list[Message]) -> None:
    for message in messages:
        send(session, message)
    work_off(session)


def replies(session: BackendSession) -> list[tuple[int, int, bytes]]:
    """Number, flags and payload of what is to be sent."""
    out = []
    for message in session.outgoing():
        number, flags, size = HEADER.unpack_from(message.data)
        assert len(message.data) == HEADER.size + size
        out.append((number, flags, message.data[HEADER.size :]))
        close_fds(message.fds)
    return out


# What a back-end in some state refuses, and why.
REFUSED: list[tuple[list[Message], Message, str]] = [
    (NEGOTIATED, (0, b"", 0), "request 0 is unknown"),
    (NEGOTIATED, (46, bytes(64), 3), "request 46 is unknown"),
    (NEGOTIATED, (R.SET_STATUS, q(0), 0), "SET_STATUS is not supported"),
    (NEGOTIATED, (R.SET_BACKEND_REQ_FD, b"", 1), "SET_BACKEND_REQ_FD is not supported"),
    (NEGOTIATED, (R.RESET_DEVICE, b"", 0), "RESET_DEVICE is not supported"),
    (NEGOTIATED, (R.SET_FEATURES, q(1 << 33), 0), "features 0x200000000, which were not offered"),
    (NEGOTIATED, (R.SET_FEATURES, b"", 0), "payload of 0 bytes"),
    (NEGOTIATED, (R.SET_FEATURES, bytes(9), 0), "payload of 9 bytes"),
    (NEGOTIATED, (R.SET_FEATURES, q(0), 1), "came with 1 descriptors"),
    (NEGOTIATED, (R.SET_OWNER, b"", 2), "came with 2 descriptors"),
    (NEGOTIATED, (R.SET_PROTOCOL_FEATURES, q(1 << 16), 0), "protocol features 0x10000, which were not offered"),
    (NEGOTIATED, (R.SET_PROTOCOL_FEATURES, q(1 << 63), 0), "which were not offered"),
    (NEGOTIATED, (R.SET_MEM_TABLE, table((0, 1, 0)), 1), "SET_MEM_TABLE came before SET_OWNER"),
    (NEGOTIATED, (R.SET_VRING_CALL, q(0), 1), "SET_VRING_CALL came before SET_OWNER"),
    (NEGOTIATED, (R.SET_LOG_FD, b"", 1), "SET_LOG_FD came before SET_OWNER"),
    (NEGOTIATED, (R.SEND_RARP, q(0), 0), "SEND_RARP came before SET_OWNER"),
    (OWNED, (R.SET_MEM_TABLE, table((0, 1, 0)), 0), "came with 0 descriptors instead of 1"),
    (OWNED, (R.SET_MEM_TABLE, table((0, 1, 0)), 2), "came with 2 descriptors instead of 1"),
    (OWNED, (R.SET_MEM_TABLE, table((0, 1, 0)), 9), "came with 9 descriptors"),
    (OWNED, (R.SET_MEM_TABLE, table((0, 0, 0)), 1), "a memory region of 0 bytes"),
    (OWNED, (R.SET_MEM_TABLE, table((0, 9, 0), (8, 1, 9)), 2), "overlap at guest addresses"),
    (OWNED, (R.SET_MEM_TABLE, table((0, 9, 0), (9, 9, 8)), 2), "overlap at user addresses"),
    (OWNED, (R.SET_MEM_TABLE, table(*((n, 1, n) for n in range(5))), 5), "5 memory regions, more than 4"),
    (OWNED, (R.ADD_MEM_REG, region(0, 1, 0), 0), "came with 0 descriptors"),
    (OWNED, (R.ADD_MEM_REG, region(0, 1, 0), 2), "came with 2 descriptors"),
    (OWNED, (R.REM_MEM_REG, region(0, 1, 0), 0), "at 0x0 that is not there"),
    (OWNED, (R.SET_LOG_FD, b"", 0), "came with 0 descriptors"),
    (OWNED, (R.SET_VRING_NUM, i(2, 256), 0), "names ring 2, but there are 2"),
    (OWNED, (R.SET_VRING_NUM, i(0, 0), 0), "gives ring 0 0 entries"),
    (OWNED, (R.SET_VRING_NUM, i(1, 3), 0), "gives ring 1 3 entries"),
    (OWNED, (R.SET_VRING_NUM, i(1, 65536), 0), "gives ring 1 65536 entries"),
    (OWNED, (R.SET_VRING_BASE, i(0, 65536), 0), "more than 16 bits"),
    (OWNED, (R.SET_VRING_ADDR, i(2, 0) + ADDRESS, 0), "names ring 2"),
    (OWNED, (R.SET_VRING_ADDR, i(0, 2) + ADDRESS, 0), "unknown flags 0x2"),
    (OWNED, (R.SET_VRING_ENABLE, i(2, 1), 0), "names ring 2"),
    (OWNED, (R.SET_VRING_ENABLE, i(0, 2), 0), "neither 1"),
    (OWNED, (R.SET_VRING_KICK, q(0), 1), "before ring 0 has a size and addresses"),
    (OWNED, (R.SET_VRING_CALL, q(2), 1), "names ring 2"),
    (OWNED, (R.SET_VRING_CALL, q(0), 0), "came with 0 descriptors instead of 1"),
    (OWNED, (R.SET_VRING_CALL, q(0x100), 1), "came with 1 descriptors instead of 0"),
    (OWNED, (R.SET_VRING_CALL, q(0), 2), "came with 2 descriptors"),
    (OWNED, (R.SET_VRING_ERR, q(0x200), 1), "reserved bits"),
    (OWNED, (R.NET_SET_MTU, q(67), 0), "MTU 67"),
    (SET_UP, (R.SET_VRING_KICK, q(1), 1), "before ring 1 has a size and addresses"),
    (MAPPED, (R.ADD_MEM_REG, region(199, 1, 5000), 1), "overlap at guest addresses"),
    (MAPPED, (R.ADD_MEM_REG, region(200, 1, 2099), 1), "overlap at user addresses"),
    (MAPPED, (R.REM_MEM_REG, region(0, 99, 1000), 1), "that is not there"),
    (RUNNING, (R.SET_VRING_NUM, i(0, 256), 0), "SET_VRING_NUM came while ring 0 is started"),
    (RUNNING, (R.SET_VRING_BASE, i(0, 0), 0), "SET_VRING_BASE came while ring 0 is started"),
    (RUNNING, (R.SET_FEATURES, q(Feature.VIRTIO_NET_F_MRG_RXBUF), 0), "changes features 0x8000 while a ring"),
    (RUNNING, (R.SET_PROTOCOL_FEATURES, q(ALL_PROTOCOL), 0), "came while a ring is started"),
]

# Refused with a reply of their own, whether an acknowledgement is asked for or not.
FAILED: list[tuple[list[Message], Message, str, int]] = [
    (OWNED, (R.SET_DEVICE_STATE_FD, i(2, 0), 1), "is malformed", 0x101),
    (OWNED, (R.SET_DEVICE_STATE_FD, i(0, 1), 1), "unknown phase 1", 0x101),
    (OWNED, (R.SET_DEVICE_STATE_FD, i(0, 0), 0), "came with 0 descriptors", 0x101),
    (OWNED, (R.SET_DEVICE_STATE_FD, i(0, 0), 2), "came with 2 descriptors", 0x101),
    (NEGOTIATED, (R.SET_DEVICE_STATE_FD, i(0, 0), 1), "before SET_OWNER", 0x101),
    (RUNNING, (R.SET_DEVICE_STATE_FD, i(0, 0), 1), "while a ring is started", 0x101),
    (OWNED, (R.CHECK_DEVICE_STATE, b"", 0), "without a transfer", 1),
    ([*TRANSFER, (R.CHECK_DEVICE_STATE, b"", 0)], (R.CHECK_DEVICE_STATE, b"", 0), "without a transfer", 1),
    ([*TRANSFER, RUNNING[-1]], (R.CHECK_DEVICE_STATE, b"", 0), "without a transfer", 1),
    (OWNED, (R.POSTCOPY_END, b"", 0), "is not supported", 1),
]

# Refused by ending the session: there is a reply, and it cannot tell of a failure.
FATAL: list[tuple[list[Message], Message, str]] = [
    (OWNED, (R.GET_VRING_BASE, i(2, 0), 0), "GET_VRING_BASE names ring 2"),
    (NEGOTIATED, (R.GET_VRING_BASE, i(0, 0), 0), "before SET_OWNER"),
    (OWNED, (R.SET_LOG_BASE, q(0, 0), 1), "a log of 0 bytes"),
    (OWNED, (R.SET_LOG_BASE, q(4096, 0), 0), "came with 0 descriptors"),
    (OWNED, (R.SET_LOG_BASE, bytes(8), 1), "payload of 8 bytes"),
    (OWNED, (R.GET_STATUS, b"", 0), "is not supported"),
    (OWNED, (R.GET_FEATURES, b"", 1), "GET_FEATURES came with 1 descriptors"),
    ([], (R.GET_QUEUE_NUM, b"", 0), "needs protocol feature MQ"),
    ([], (R.GET_MAX_MEM_SLOTS, b"", 0), "needs protocol feature CONFIGURE_MEM_SLOTS"),
    ([], (R.ADD_MEM_REG, region(0, 1, 0), 1), "needs protocol feature CONFIGURE_MEM_SLOTS"),
    ([], (R.SET_LOG_BASE, q(4096, 0), 1), "needs protocol feature LOG_SHMFD"),
    ([], (R.SEND_RARP, q(0), 0), "needs protocol feature RARP"),
    ([], (R.NET_SET_MTU, q(1500), 0), "needs protocol feature NET_MTU"),
    ([], (R.SET_FEATURES, q(1 << 63), 0), "which were not offered"),
]


@pytest.mark.parametrize(("before", "message", "reason"), REFUSED)
def test_refused_with_an_acknowledgement(
    backend: BackendSession, before: list[Message], message: Message, reason: str
) -> None:
    prepare(backend, before)
    state = repr([getattr(backend.state, name) for name in vars(backend.state)])
    send(backend, message, NEED_REPLY)
    event = backend.next_event()
    assert isinstance(event, RequestRefused)
    assert reason in str(event.error)
    assert not event.error.fatal
    assert replies(backend) == [(message[0], REPLY | 1, q(1))]
    assert repr([getattr(backend.state, name) for name in vars(backend.state)]) == state
    send(backend, (R.GET_FEATURES, b"", 0))
    assert backend.next_event() is None
    assert [number for number, _, _ in replies(backend)] == [R.GET_FEATURES]


@pytest.mark.parametrize(("before", "message", "reason"), REFUSED)
def test_refused_without_an_acknowledgement_is_the_end(
    backend: BackendSession, before: list[Message], message: Message, reason: str
) -> None:
    prepare(backend, before)
    send(backend, message)
    assert_ended(backend, reason)


@pytest.mark.parametrize("flags", [0, NEED_REPLY])
@pytest.mark.parametrize(("before", "message", "reason", "value"), FAILED)
def test_refused_with_a_reply_of_its_own(
    backend: BackendSession, before: list[Message], message: Message, reason: str, value: int, flags: int
) -> None:
    prepare(backend, before)
    send(backend, message, flags)
    event = backend.next_event()
    assert isinstance(event, RequestRefused)
    assert reason in str(event.error)
    assert replies(backend) == [(message[0], REPLY | 1, q(value))]
    assert backend.next_event() is None


@pytest.mark.parametrize("flags", [0, NEED_REPLY])
@pytest.mark.parametrize(("before", "message", "reason"), FATAL)
def test_refused_by_ending_the_session(
    backend: BackendSession, before: list[Message], message: Message, reason: str, flags: int
) -> None:
    prepare(backend, before)
    send(backend, message, flags)
    assert_ended(backend, reason)


def assert_ended(session: BackendSession, reason: str) -> None:
    event = session.next_event()
    assert isinstance(event, SessionEnded)
    assert isinstance(event.error, ProtocolError)
    assert event.error.fatal
    assert reason in str(event.error)
    assert not session.outgoing()
    assert session.wanted == 0
    send(session, (R.GET_FEATURES, b"", 1))
    assert session.next_event() is event


def test_without_protocol_features_there_are_none_of_their_requests() -> None:
    for request, payload in ((R.GET_PROTOCOL_FEATURES, b""), (R.SET_PROTOCOL_FEATURES, q(0))):
        session = BackendSession(features=Feature.VIRTIO_F_VERSION_1)
        send(session, (request, payload, 0))
        assert_ended(session, "needs VHOST_USER_F_PROTOCOL_FEATURES, which was not offered")
    session = BackendSession(features=Feature.VIRTIO_F_VERSION_1)
    send(session, (R.SET_OWNER, b"", 0))
    send(session, (R.SET_VRING_ENABLE, i(0, 1), 0))
    assert_ended(session, "SET_VRING_ENABLE needs VHOST_USER_F_PROTOCOL_FEATURES")


def test_a_reply_is_no_request(backend: BackendSession) -> None:
    send(backend, (R.GET_FEATURES, b"", 0), REPLY)
    event = backend.next_event()
    assert isinstance(event, SessionEnded)
    assert "GET_FEATURES is marked as a reply" in str(event.error)


# What is legal though one might doubt it.
ACCEPTED: list[tuple[list[Message], Message]] = [
    (OWNED, (R.SET_OWNER, b"", 0)),
    ([], (R.SET_FEATURES, q(0), 0)),
    (OWNED, (R.SET_MEM_TABLE, table(), 0)),
    (OWNED, (R.SET_MEM_TABLE, table(*((n, 1, n) for n in range(4))), 4)),
    (OWNED, (R.SET_MEM_TABLE, table((0, 8, 0), (8, 1, 8)), 2)),
    (OWNED, (R.SET_VRING_NUM, i(1, 32768), 0)),
    (OWNED, (R.SET_VRING_NUM, i(0, 1), 0)),
    (OWNED, (R.SET_VRING_BASE, i(0, 65535), 0)),
    (OWNED, (R.SET_VRING_ENABLE, i(1, 1), 0)),
    (OWNED, (R.GET_VRING_BASE, i(1, 0), 0)),
    (MAPPED, (R.ADD_MEM_REG, region(200, 1, 2100), 1)),
    (MAPPED, (R.REM_MEM_REG, region(100, 100, 2000), 0)),
    (MAPPED, (R.REM_MEM_REG, bytes(8) + q(100, 100, 2000, 77), 1)),
    (SET_UP, (R.SET_VRING_KICK, q(0x100), 0)),
    (RUNNING, (R.SET_VRING_KICK, q(0), 1)),
    (RUNNING, (R.SET_VRING_ADDR, i(0, 1) + ADDRESS, 0)),
    (RUNNING, (R.SET_VRING_NUM, i(1, 256), 0)),
    (RUNNING, (R.SET_FEATURES, q(Feature.VHOST_F_LOG_ALL), 0)),
    (RUNNING, (R.SET_LOG_BASE, q(4096, 4096), 1)),
    (RUNNING, (R.SET_MEM_TABLE, table((0, 100, 1000)), 1)),
    (RUNNING, (R.RESET_OWNER, b"", 0)),
    ([*RUNNING, (R.GET_VRING_BASE, i(0, 0), 0)], (R.SET_VRING_NUM, i(0, 512), 0)),
    ([*RUNNING, (R.GET_VRING_BASE, i(0, 0), 0)], (R.SET_VRING_KICK, q(0), 1)),
    ([*RUNNING, (R.GET_VRING_BASE, i(0, 0), 0)], (R.SET_DEVICE_STATE_FD, i(0, 0), 1)),
    (TRANSFER, (R.SET_DEVICE_STATE_FD, i(1, 0), 1)),
    (TRANSFER, (R.CHECK_DEVICE_STATE, b"", 0)),
]


@pytest.mark.parametrize(("before", "message"), ACCEPTED)
def test_accepted(backend: BackendSession, before: list[Message], message: Message) -> None:
    prepare(backend, before)
    send(backend, message, NEED_REPLY)
    work_off(backend)
    assert backend.wanted


def test_the_front_ends_usual_way(backend: BackendSession) -> None:
    """Connect, start, switch logging on, stop, save: every message is taken, in one piece."""
    ring: list[Message] = []
    for n in range(2):
        ring += [
            (R.SET_VRING_NUM, i(n, 256), 0),
            (R.SET_VRING_BASE, i(n, 0), 0),
            (R.SET_VRING_ADDR, i(n, 0) + ADDRESS, 0),
            (R.SET_VRING_KICK, q(n), 1),
            (R.SET_VRING_CALL, q(n), 1),
        ]
    way: list[Message] = [
        (R.GET_FEATURES, b"", 0),
        (R.GET_PROTOCOL_FEATURES, b"", 0),
        *NEGOTIATED,
        (R.GET_QUEUE_NUM, b"", 0),
        (R.GET_MAX_MEM_SLOTS, b"", 0),
        (R.SET_OWNER, b"", 0),
        (R.GET_FEATURES, b"", 0),
        (R.SET_VRING_CALL, q(0), 1),
        (R.SET_VRING_ERR, q(0), 1),
        (R.SET_VRING_CALL, q(1), 1),
        (R.SET_VRING_ERR, q(1), 1),
        (R.SET_VRING_ENABLE, i(0, 1), 0),
        (R.SET_VRING_ENABLE, i(1, 1), 0),
        (R.SET_FEATURES, q(1 << 32 | 1 << 30), 0),
        (R.SET_MEM_TABLE, table((0, 0xA0000, 1 << 40), (0xC0000, 1 << 30, (1 << 40) + 0xC0000)), 2),
        *ring,
        (R.SET_LOG_BASE, q(32768, 0), 1),
        (R.SET_FEATURES, q(1 << 32 | 1 << 30 | 1 << 26), 0),
        (R.SET_VRING_ADDR, i(0, 1) + ADDRESS, 0),
        (R.SET_VRING_ADDR, i(1, 1) + ADDRESS, 0),
        (R.GET_VRING_BASE, i(0, 0), 0),
        (R.GET_VRING_BASE, i(1, 0), 0),
        (R.SET_DEVICE_STATE_FD, i(0, 0), 1),
        (R.CHECK_DEVICE_STATE, b"", 0),
        # and on, as after a migration that failed
        (R.SET_VRING_ENABLE, i(0, 1), 0),
        (R.SET_FEATURES, q(1 << 32 | 1 << 30 | 1 << 26), 0),
        (R.SET_MEM_TABLE, table((0, 0xA0000, 1 << 40)), 1),
        *ring,
        (R.SET_FEATURES, q(1 << 32 | 1 << 30), 0),
    ]
    for message in way:
        send(backend, message)
    handled: list[int] = []
    while (event := backend.next_event()) is not None:
        assert isinstance(event, RequestReceived), event
        handled.append(event.row.request)
        backend.complete(DEFAULTS.get(event.row.request))
    assert handled == [number for number, _, _ in way if number not in SESSION_ANSWERS]
    assert [(number, payload) for number, _, payload in replies(backend)] == [
        (R.GET_FEATURES, q(backend.state.offered)),
        (R.GET_PROTOCOL_FEATURES, q(ALL_PROTOCOL)),
        (R.GET_QUEUE_NUM, q(1)),
        (R.GET_MAX_MEM_SLOTS, q(4)),
        (R.GET_FEATURES, q(backend.state.offered)),
        (R.SET_LOG_BASE, b""),
        (R.GET_VRING_BASE, i(0, 0)),
        (R.GET_VRING_BASE, i(1, 0)),
        (R.SET_DEVICE_STATE_FD, q(0x100)),
        (R.CHECK_DEVICE_STATE, q(0)),
    ]


SESSION_ANSWERS = {
    R.GET_FEATURES,
    R.GET_PROTOCOL_FEATURES,
    R.SET_PROTOCOL_FEATURES,
    R.GET_QUEUE_NUM,
    R.GET_MAX_MEM_SLOTS,
    R.SET_OWNER,
}


def test_acknowledged_only_if_negotiated_and_asked_for(backend: BackendSession) -> None:
    send(backend, (R.SET_OWNER, b"", 0), NEED_REPLY)
    work_off(backend)
    send(backend, (R.SET_PROTOCOL_FEATURES, q(ProtocolFeature.REPLY_ACK), 0), NEED_REPLY)
    assert backend.next_event() is None
    assert not replies(backend), "REPLY_ACK was not negotiated when these came"
    send(backend, (R.SET_OWNER, b"", 0), NEED_REPLY)
    send(backend, (R.SET_OWNER, b"", 0))
    send(backend, (R.SET_PROTOCOL_FEATURES, q(0), 0), NEED_REPLY)
    assert backend.next_event() is None
    assert replies(backend) == [(R.SET_OWNER, REPLY | 1, q(0)), (R.SET_PROTOCOL_FEATURES, REPLY | 1, q(0))]


def test_a_reply_of_its_own_is_the_acknowledgement(backend: BackendSession) -> None:
    prepare(backend, OWNED)
    send(backend, (R.GET_VRING_BASE, i(1, 0), 0), NEED_REPLY)
    event = backend.next_event()
    assert isinstance(event, RequestReceived)
    backend.complete(0xABCD)
    assert replies(backend) == [(R.GET_VRING_BASE, REPLY | 1, i(1, 0xABCD))]


def test_arguments_are_taken_with_their_descriptors(backend: BackendSession) -> None:
    prepare(backend, OWNED)
    send(backend, (R.SET_MEM_TABLE, table((0, 9, 0), (9, 9, 9)), 2))
    event = backend.next_event()
    assert isinstance(event, RequestReceived)
    (regions,) = event.take_arguments()
    assert isinstance(regions, list)
    backend.complete()
    for region_ in regions:
        os.close(region_.fd)


def test_a_descriptor_that_comes_with_a_removal_is_closed(backend: BackendSession) -> None:
    prepare(backend, MAPPED)
    send(backend, (R.REM_MEM_REG, region(0, 100, 1000), 1))
    event = backend.next_event()
    assert isinstance(event, RequestReceived)
    (removed,) = event.take_arguments()
    assert removed == (0, 100, 1000, 0, -1)
    backend.complete()
    assert [r.guest_addr for r in backend.state.regions] == [100]


def test_a_descriptor_for_the_front_end(backend: BackendSession, fd: Callable[[], int]) -> None:
    prepare(backend, OWNED)
    send(backend, (R.SET_DEVICE_STATE_FD, i(1, 0), 1))
    backend.next_event()
    ours = fd()
    backend.complete(ours)
    (message,) = backend.outgoing()
    assert message == Outgoing(encode(R.SET_DEVICE_STATE_FD, REPLY, q(0)), (ours,), owned=True)
    close_fds(message.fds)


def test_what_the_device_cannot_do(backend: BackendSession) -> None:
    prepare(backend, OWNED)
    send(backend, (R.ADD_MEM_REG, region(0, 1, 0), 1), NEED_REPLY)
    backend.next_event()
    assert backend.fail(DeviceError("no"))
    assert replies(backend) == [(R.ADD_MEM_REG, REPLY | 1, q(1))]
    assert not backend.state.regions
    send(backend, (R.SET_DEVICE_STATE_FD, i(1, 0), 1))
    backend.next_event()
    assert backend.fail(DeviceError("no"))
    assert replies(backend) == [(R.SET_DEVICE_STATE_FD, REPLY | 1, q(0x101))]
    send(backend, (R.ADD_MEM_REG, region(0, 1, 0), 1))
    backend.next_event()
    error = DeviceError("no")
    assert not backend.fail(error)
    assert backend.next_event() == SessionEnded(error)


def test_an_answer_that_is_none_ends_the_session(backend: BackendSession) -> None:
    prepare(backend, OWNED)
    send(backend, (R.GET_VRING_BASE, i(0, 0), 0))
    backend.next_event()
    backend.complete(None)
    event = backend.next_event()
    assert isinstance(event, SessionEnded)
    assert isinstance(event.error, DeviceError)


def test_one_request_at_a_time(backend: BackendSession) -> None:
    with pytest.raises(RuntimeError, match="no request"):
        backend.complete()
    prepare(backend, OWNED)
    send(backend, (R.SET_VRING_NUM, i(0, 2), 0))
    send(backend, (R.SET_VRING_NUM, i(1, 2), 0))
    assert isinstance(backend.next_event(), RequestReceived)
    with pytest.raises(RuntimeError, match="SET_VRING_NUM is not completed"):
        backend.next_event()
    backend.complete()
    work_off(backend)


def test_the_end(backend: BackendSession) -> None:
    send(backend, (R.SET_OWNER, b"", 0))
    backend.receive(b"")
    assert backend.next_event() == SessionEnded(None)
    assert backend.next_event() == SessionEnded(None)


def test_what_came_before_the_end_is_done_first(backend: BackendSession) -> None:
    prepare(backend, OWNED)
    send(backend, (R.SET_VRING_NUM, i(0, 2), 0))
    backend.receive(encode(R.SET_OWNER, 0, b"")[:5])
    backend.receive_error(ProtocolError("reset", fatal=True))
    assert isinstance(backend.next_event(), RequestReceived)
    backend.complete()
    event = backend.next_event()
    assert isinstance(event, SessionEnded)
    assert str(event.error) == "reset"


def test_close_in_the_middle_of_everything(backend: BackendSession, fd: Callable[[], int]) -> None:
    prepare(backend, OWNED)
    send(backend, (R.SET_DEVICE_STATE_FD, i(0, 0), 1))
    backend.next_event()
    backend.complete(fd())
    send(backend, (R.SET_VRING_CALL, q(0), 1))
    backend.next_event()
    send(backend, (R.SET_VRING_CALL, q(0), 1))
    backend.receive(encode(R.SET_VRING_CALL, 0, q(0))[:15], [fd(), fd()])
    backend.close()
    assert backend.next_event() == SessionEnded(None)


def test_packed_rings_have_other_sizes_and_bases() -> None:
    session = BackendSession(features=Feature.VIRTIO_F_RING_PACKED)
    prepare(
        session,
        [
            (R.SET_OWNER, b"", 0),
            (R.SET_FEATURES, q(Feature.VIRTIO_F_RING_PACKED), 0),
            (R.SET_VRING_NUM, i(0, 100), 0),
            (R.SET_VRING_BASE, i(0, 0x80008000), 0),
        ],
    )
    session.close()
