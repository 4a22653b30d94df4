# SPDX-License-Identifier: GPL-2.0-or-later
"""Whatever arrives, sessions raise nothing but their declared errors and leak no descriptor."""

from __future__ import annotations

import os
import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from godwit.vhost_user import (
    TABLE,
    BackendSession,
    DeviceError,
    DisconnectedError,
    FrontendSession,
    ProtocolError,
    ProtocolFeature,
    Request,
    RequestReceived,
    RequestRefused,
    SessionEnded,
)
from godwit.vhost_user.frames import NEED_REPLY, REPLY, close_fds, encode
from godwit.vhost_user.payloads import U64, VringIndex

small = st.integers(0, 3)
number = st.one_of(small, st.sampled_from([255, 256, 4096, 65535, 1 << 31, 1 << 32, (1 << 64) - 1]))
payloads = st.one_of(
    st.binary(max_size=300),
    st.lists(number, max_size=6).map(lambda values: struct.pack(f"={len(values)}Q", *values)),
    st.tuples(small, small).map(lambda values: struct.pack("=II", *values)),
    st.tuples(small, small, st.lists(small, min_size=4, max_size=4)).map(
        lambda values: struct.pack("=II4Q", values[0], values[1], *(value * 4096 for value in values[2]))
    ),
    st.lists(st.integers(1, 4), min_size=1, max_size=3, unique=True).map(
        lambda starts: (
            struct.pack("=II", len(starts), 0)
            + b"".join(struct.pack("=4Q", start << 20, 1 << 20, start << 30, 0) for start in starts)
        )
    ),
)
messages = st.tuples(
    st.one_of(st.sampled_from(sorted(TABLE)), st.integers(0, 100)),
    st.sampled_from([0, NEED_REPLY, NEED_REPLY, REPLY, 1 << 5]),
    payloads,
    st.sampled_from([0, 0, 1, 1, 2, 3, 9]),
)
# How the device takes each request: does it, cannot, or takes the descriptors and then cannot.
verdicts = st.lists(st.sampled_from(["does", "does", "does", "cannot", "takes"]), max_size=20)


def count() -> int:
    return len(os.listdir("/proc/self/fd"))


def fds(number: int) -> list[int]:
    return [os.eventfd(0, os.EFD_CLOEXEC) for _ in range(number)]


def work_off(session: BackendSession, verdicts: list[str]) -> bool:
    """Let a device carry out all that came; whether the session goes on."""
    for _ in range(1000):
        event = session.next_event()
        if event is None:
            return True
        if isinstance(event, SessionEnded):
            return False
        if isinstance(event, RequestRefused):
            continue
        assert isinstance(event, RequestReceived)
        verdict = verdicts.pop() if verdicts else "does"
        if verdict == "takes":
            taken = () if event.row.request == Request.REM_MEM_REG else event._fds
            event.take_arguments()
            close_fds(taken)
        if verdict == "does":
            session.complete(0 if event.row.request == Request.GET_VRING_BASE else None)
        else:
            session.fail(DeviceError("cannot"))
    raise AssertionError("a session that never comes to an end")


def prepared() -> BackendSession:
    session = BackendSession(features=(1 << 64) - 1, protocol_features=(1 << 64) - 1, max_mem_slots=3)
    session.receive(encode(Request.SET_PROTOCOL_FEATURES, 0, U64((1 << 64) - 1).pack()))
    session.receive(encode(Request.SET_OWNER, 0, b""))
    assert session.next_event() is None
    return session


@settings(max_examples=300)
@given(pieces=st.lists(st.tuples(st.binary(max_size=40), st.sampled_from([0, 0, 1, 2, 20])), max_size=10))
def test_any_bytes(pieces: list[tuple[bytes, int]]) -> None:
    """A back-end takes any bytes, with any descriptors, and holds none of these afterwards."""
    before = count()
    session = prepared()
    for data, number in pieces:
        session.receive(data, fds(number))
        work_off(session, [])
    session.close()
    assert count() == before


@settings(max_examples=500)
@given(messages=st.lists(messages, max_size=12), verdicts=verdicts, step=st.integers(1, 100), eof=st.booleans())
def test_any_messages(messages: list[tuple[int, int, bytes, int]], verdicts: list[str], step: int, eof: bool) -> None:
    """Whatever a front-end asks and whatever the device makes of it: every descriptor has one owner."""
    before = count()
    session = prepared()
    for request, flags, payload, number in messages:
        data = encode(request, flags, payload)
        for start in range(0, len(data), step):
            session.receive(data[start : start + step], fds(0 if start else number))
        if not work_off(session, verdicts):
            assert not session.wanted
    if eof:
        session.receive(b"")
        assert not work_off(session, verdicts)
    session.close()
    assert count() == before


@settings(max_examples=500)
@given(
    asked=st.lists(st.sampled_from([Request.GET_FEATURES, Request.GET_VRING_BASE, Request.SET_OWNER]), max_size=4),
    answers=st.lists(messages, max_size=6),
    eof=st.booleans(),
)
def test_any_replies(asked: list[Request], answers: list[tuple[int, int, bytes, int]], eof: bool) -> None:
    """Whatever a back-end answers, a front-end raises nothing but its declared errors."""
    before = count()
    session = FrontendSession()
    session.request(Request.SET_PROTOCOL_FEATURES, U64(ProtocolFeature.REPLY_ACK))
    for request in asked:
        session.request(request, VringIndex(0) if request == Request.GET_VRING_BASE else None)
    for request_number, flags, payload, number in answers:
        session.receive(encode(request_number, flags | REPLY, payload), fds(number))
    if eof:
        session.receive(b"")
    try:
        while (reply := session.next_reply()) is not None:
            close_fds(reply.fds)
    except (ProtocolError, DisconnectedError):
        assert not session.wanted
    session.close()
    assert count() == before
