# SPDX-License-Identifier: GPL-2.0-or-later
"""The messages between a back-end and its helper, both ways, and what is none."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Iterator

import pytest

from godwit.repair.protocol import (
    MAX_SOCKETS,
    MessageError,
    Repair,
    close_all,
    decode,
    encode,
    receive_request,
    send_request,
)

Pair = tuple[socket.socket, socket.socket]

MODES = [(Repair.ON, b"\x01"), (Repair.OFF, b"\x00"), (Repair.OFF_NO_WP, b"\xff")]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(10)
        yield ours, theirs


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(("mode", "byte"), MODES)
def test_the_byte_of_each_mode(mode: Repair, byte: bytes) -> None:
    assert encode(mode) == byte
    assert decode(byte) is mode


def test_every_other_byte_is_refused() -> None:
    known = {byte for _, byte in MODES}
    for value in range(256):
        data = bytes([value])
        if data not in known:
            with pytest.raises(MessageError, match="is no value of TCP_REPAIR"):
                decode(data)


@pytest.mark.parametrize("data", [b"", b"\x01\x01"])
def test_a_message_is_one_byte(data: bytes) -> None:
    with pytest.raises(MessageError, match="bytes where one was due"):
        decode(data)


@pytest.mark.parametrize(("mode", "byte"), MODES)
@pytest.mark.parametrize("count", [1, 2, MAX_SOCKETS])
def test_a_request_arrives_whole(pair: Pair, mode: Repair, byte: bytes, count: int) -> None:
    ours, theirs = pair
    send_request(ours, mode, [ours.fileno()] * count)
    assert theirs.recv(2, socket.MSG_PEEK) == byte
    request = receive_request(theirs)
    assert request is not None
    got, fds = request
    try:
        assert (got, len(fds)) == (mode, count)
        for fd in fds:
            assert os.path.samestat(os.fstat(fd), os.fstat(ours.fileno()))
            assert not os.get_inheritable(fd)
    finally:
        close_all(fds)


def test_requests_that_wait_stay_apart(pair: Pair) -> None:
    ours, theirs = pair
    send_request(ours, Repair.ON, [ours.fileno()] * 3)
    send_request(ours, Repair.OFF, [ours.fileno()] * 2)
    got: list[tuple[Repair, int]] = []
    while len(got) < 2:
        request = receive_request(theirs)
        assert request is not None
        got.append((request[0], len(request[1])))
        close_all(request[1])
    assert got == [(Repair.ON, 3), (Repair.OFF, 2)]


def test_one_too_many_is_not_sent(pair: Pair) -> None:
    ours, _ = pair
    with pytest.raises(OSError):
        send_request(ours, Repair.ON, [ours.fileno()] * (MAX_SOCKETS + 1))


def test_the_end_is_no_request(pair: Pair) -> None:
    ours, theirs = pair
    ours.close()
    assert receive_request(theirs) is None


def test_a_mode_without_sockets_is_refused(pair: Pair) -> None:
    ours, theirs = pair
    ours.send(encode(Repair.ON))
    with pytest.raises(MessageError, match="without a socket"):
        receive_request(theirs)


def test_no_descriptor_of_a_wrong_request_is_kept(pair: Pair) -> None:
    ours, theirs = pair
    before = descriptors()
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))
    ours.sendmsg([b"\x02"], [rights])
    with pytest.raises(MessageError, match="2 is no value of TCP_REPAIR"):
        receive_request(theirs)
    assert descriptors() == before
