# SPDX-License-Identifier: GPL-2.0-or-later
"""The senders and receivers of the bench, between two sockets: do they count right?"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest

from godwit.lab._udp import MIN_SIZE, Echo, Receiver, ask, send_numbered
from godwit.lab.bench import Working

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other,
    ):
        for sock in (one, other):
            sock.bind(("127.0.0.1", 0))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        one.connect(other.getsockname())
        other.connect(one.getsockname())
        yield one, other


def datagram(number: int, size: int = 100) -> bytes:
    ends = struct.pack("=Q", number)
    return ends + bytes(size - 16) + ends


def count(pair: Pair, datagrams: list[bytes], size: int = 100) -> Receiver:
    """Send these and have them counted."""
    one, other = pair
    receiver = Receiver(other.fileno(), size=size, most=1000, quiet=20)
    for each in datagrams:
        one.send(each)
    working = Working(receiver.run)
    receiver.stop()
    working.result()
    return receiver


def test_all_is_well(pair: Pair) -> None:
    receiver = count(pair, [datagram(number) for number in range(100)])
    assert (receiver.received, receiver.duplicates, receiver.reordered, receiver.damaged) == (100, 0, 0, 0)
    assert receiver.highest == 99


def test_lost(pair: Pair) -> None:
    receiver = count(pair, [datagram(number) for number in range(100) if number % 10])
    assert (receiver.received, receiver.duplicates, receiver.reordered, receiver.damaged) == (90, 0, 0, 0)
    assert receiver.highest == 99


def test_nothing(pair: Pair) -> None:
    receiver = count(pair, [])
    assert (receiver.received, receiver.highest) == (0, -1)


def test_twice(pair: Pair) -> None:
    receiver = count(pair, [datagram(number) for number in (0, 1, 1, 2, 0, 3)])
    assert (receiver.received, receiver.duplicates, receiver.reordered, receiver.damaged) == (6, 2, 0, 0)


def test_late(pair: Pair) -> None:
    receiver = count(pair, [datagram(number) for number in (0, 3, 1, 2, 4)])
    assert (receiver.received, receiver.duplicates, receiver.reordered, receiver.damaged) == (5, 0, 2, 0)


def test_damaged(pair: Pair) -> None:
    halves = datagram(1)[:50] + datagram(2)[50:]
    too_high = datagram(1 << 40)
    receiver = count(pair, [datagram(0), halves, datagram(3)[:99], datagram(4) + b"x", b"", too_high, datagram(5)])
    assert (receiver.received, receiver.duplicates, receiver.reordered, receiver.damaged) == (2, 0, 0, 5)


def test_a_sender_and_a_receiver(pair: Pair) -> None:
    one, other = pair
    receiver = Receiver(other.fileno(), size=200)
    working = Working(receiver.run)
    sent, refused, seconds = send_numbered(one.fileno(), size=200, seconds=0.3, rate=2000)
    receiver.stop()
    working.result()
    assert 300 <= sent <= 601
    assert (refused, receiver.received, receiver.highest) == (0, sent, sent - 1)
    assert (receiver.duplicates, receiver.reordered, receiver.damaged) == (0, 0, 0)
    assert 0.3 <= seconds < 1
    assert 0 < receiver.seconds <= seconds


def test_joined(pair: Pair) -> None:
    """Many in one call, which the kernel or the card cuts up (udp(7), UDP_SEGMENT)."""
    one, other = pair
    receiver = Receiver(other.fileno(), size=200)
    working = Working(receiver.run)
    sent, refused, _ = send_numbered(one.fileno(), size=200, seconds=0.1, rate=20_000, joined=True)
    receiver.stop()
    working.result()
    assert (refused, receiver.received, receiver.highest) == (0, sent, sent - 1)
    assert (receiver.duplicates, receiver.reordered, receiver.damaged) == (0, 0, 0)


def test_without_a_rate_it_is_fast(pair: Pair) -> None:
    sent, _, seconds = send_numbered(pair[0].fileno(), size=MIN_SIZE, seconds=0.1)
    assert sent / seconds > 20_000


def test_a_port_that_is_closed(pair: Pair) -> None:
    """The sender goes on, and counts what was refused."""
    one, other = pair
    other.close()
    sent, refused, _ = send_numbered(one.fileno(), size=100, seconds=0.1, rate=1000)
    assert sent > 0
    assert refused > 0


def test_questions_and_answers(pair: Pair) -> None:
    one, _ = pair
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        one.connect(server.getsockname())
        echo = Echo(server.fileno())
        working = Working(echo.run)
        try:
            times, unanswered = ask(one.fileno(), size=64, seconds=0.2)
        finally:
            echo.stop()
            working.result()
    assert unanswered == 0
    assert len(times) == echo.returned
    assert len(times) > 10
    assert all(0 < ns < 1_000_000_000 for ns in times)


def test_no_answers(pair: Pair) -> None:
    times, unanswered = ask(pair[0].fileno(), size=64, seconds=0.1, patience=20)
    assert times == []
    assert 1 <= unanswered <= 6


@pytest.mark.parametrize("size", [MIN_SIZE - 1, 65537])
def test_impossible_sizes(pair: Pair, size: int) -> None:
    with pytest.raises(ValueError, match="a datagram has 16 to 65536 bytes"):
        send_numbered(pair[0].fileno(), size=size, seconds=0.1)
    with pytest.raises(ValueError, match="a datagram has 16 to 65536 bytes"):
        ask(pair[0].fileno(), size=size, seconds=0.1)


def test_an_error_is_the_callers(pair: Pair) -> None:
    with pytest.raises(OSError, match="sendmmsg"):
        send_numbered(pair[0].fileno(), size=65536, seconds=0.1)  # more than UDP has
    with pytest.raises(OSError, match="recvmmsg"):
        Receiver(-1, size=100).run()
