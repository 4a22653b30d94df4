# SPDX-License-Identifier: GPL-2.0-or-later
"""Peers that are slow, silent, or gone: the guest sees it as it would without us, and nothing is left of it."""

from __future__ import annotations

import contextlib
import functools
import random
import select
import socket
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from godwit.lab.netns import wait_until

from .moves import close_with_reset, receive_all
from .watching import descriptors
from .world import SERVER, World, connect, tcp

PORT = 7000
AT_ONCE = 1.0  # seconds, on a machine with much else to do
_SILENT = """
table inet silent {{
    chain in {{
        type filter hook input priority 0
        tcp dport {} drop
    }}
}}
"""


class Pair(NamedTuple):
    """A connection: the guest's end and the peer's."""

    guest: socket.socket
    peer: socket.socket


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """A guest with a forwarded port."""
    with World("-t", str(PORT)) as made:
        yield made


@pytest.fixture(autouse=True)
def _nothing_stays(world: World) -> Iterator[None]:
    """After each test no flow is left: the back-end has the descriptors that it had."""
    before = descriptors(world.backend.pid)
    yield
    wait_until(lambda: descriptors(world.backend.pid) <= before, "the flows to be released", 5.0)


@contextlib.contextmanager
def from_inside(world: World, port: int = 5001) -> Iterator[Pair]:
    with tcp(world.server, 4, SERVER[4], port) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 50_000)
        ours = connect(world.guest, SERVER[4], port)
        with ours, listening.accept()[0] as peer:
            yield Pair(ours, peer)


@contextlib.contextmanager
def from_outside(world: World) -> Iterator[Pair]:
    with (
        tcp(world.guest, 4, "", PORT) as listening,
        connect(world.server, world.net.a.addr4, PORT) as peer,
        listening.accept()[0] as ours,
    ):
        yield Pair(ours, peer)


BOTH_WAYS = pytest.mark.parametrize("opened", [from_inside, from_outside], ids=["inside", "outside"])


@contextlib.contextmanager
def silent(space_of: World, *, guest: bool) -> Iterator[None]:
    """The guest, or the server, answers nothing to what is meant for the ports of these tests."""
    space = space_of.guest if guest else space_of.server
    space.run("nft", "-f", "-", stdin=_SILENT.format(PORT if guest else 5001))
    try:
        yield
    finally:
        space.run("nft", "delete", "table", "inet", "silent")


def fill(sock: socket.socket) -> bytes:
    """Send until nothing more is taken for a while; what was sent."""
    sent = b""
    sock.settimeout(0.1)
    with contextlib.suppress(TimeoutError):
        while True:
            piece = random.randbytes(65536)
            sent += piece[: sock.send(piece)]
    sock.settimeout(5.0)
    return sent


def read(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (piece := sock.recv(1 << 20)):
        data += piece
    return data


def hears_of_it(sock: socket.socket) -> None:
    """The connection has ended with an error, and this end is told at once, whether it reads or not."""
    poll = select.poll()
    poll.register(sock, 0)
    began = time.monotonic()
    while (left := began + AT_ONCE - time.monotonic()) > 0:
        if any(events & select.POLLERR for _, events in poll.poll(1000 * left)):
            return
    raise AssertionError("nothing was heard of it")


# ---- slow


@BOTH_WAYS
def test_neither_end_reads_for_long(
    world: World, opened: Callable[[World], contextlib.AbstractContextManager[Pair]]
) -> None:
    """Both queues fill and both windows close; other flows notice nothing; then every byte arrives."""
    with opened(world) as full:
        up, down = fill(full.guest), fill(full.peer)
        shown = functools.partial(world.guest.run, "ss", "-Htno", "dport", ":5001", "or", "sport", f":{PORT}")
        # The guest's kernel tries the window that we have closed.
        wait_until(lambda: "persist" in shown().stdout, "the guest to try the window", interval=0.1)
        began = time.monotonic()
        while time.monotonic() < began + 1.0:
            with from_inside(world, 5002) as other:
                asked = time.monotonic()
                other.guest.sendall(b"question")
                assert other.peer.recv(100) == b"question"
                assert time.monotonic() - asked < AT_ONCE
        assert read(full.peer, len(up)) == up
        assert read(full.guest, len(down)) == down
        for one, two in (full, reversed(full)):
            one.sendall(b"and on")
            assert two.recv(100) == b"and on"


def test_an_answer_that_comes_late(world: World) -> None:
    """The guest's SYN is sent again until the peer says something."""
    with tcp(world.server, 4, SERVER[4], 5001) as listening, contextlib.ExitStack() as stack:
        with silent(world, guest=False):
            with world.guest.enter():
                ours = stack.enter_context(socket.socket())
            ours.settimeout(0.5)
            with pytest.raises(TimeoutError):
                ours.connect((SERVER[4], 5001))
        ours.settimeout(8.0)
        peer = stack.enter_context(listening.accept()[0])
        ours.sendall(b"at last")
        assert peer.recv(100) == b"at last"


def test_an_answer_that_comes_too_late(world: World) -> None:
    """The guest has given up: the peer hears so when it answers, and nothing is left of it."""
    with tcp(world.server, 4, SERVER[4], 5001) as listening:
        with silent(world, guest=False), pytest.raises(TimeoutError):
            connect(world.guest, SERVER[4], 5001, 0.3)
        listening.settimeout(8.0)
        with listening.accept()[0] as peer:
            hears_of_it(peer)


# ---- resets, in every state


def idle(pair: Pair) -> None:
    """Established."""


def full(pair: Pair) -> None:
    """With bytes that wait in both queues."""
    fill(pair.guest)
    fill(pair.peer)


def guest_closed(pair: Pair) -> None:
    """The guest has said all that it has to say, and the peer has heard it."""
    pair.guest.shutdown(socket.SHUT_WR)
    assert pair.peer.recv(1) == b""


def peer_closed(pair: Pair) -> None:
    pair.peer.shutdown(socket.SHUT_WR)
    assert pair.guest.recv(1) == b""


def guest_closed_behind_data(pair: Pair) -> None:
    fill(pair.guest)
    pair.guest.shutdown(socket.SHUT_WR)


def peer_closed_behind_data(pair: Pair) -> None:
    fill(pair.peer)
    pair.peer.shutdown(socket.SHUT_WR)


@BOTH_WAYS
@pytest.mark.parametrize("by", ["guest", "peer"])
@pytest.mark.parametrize(
    "state", [idle, full, guest_closed, peer_closed, guest_closed_behind_data, peer_closed_behind_data]
)
def test_a_reset(
    world: World,
    opened: Callable[[World], contextlib.AbstractContextManager[Pair]],
    by: str,
    state: Callable[[Pair], None],
) -> None:
    with opened(world) as pair:
        state(pair)
        who, other = pair if by == "guest" else reversed(pair)
        close_with_reset(who)
        hears_of_it(other)


def test_a_reset_before_the_guest_has_answered(world: World) -> None:
    """The host has accepted, the guest has not: nothing is left of it when the caller goes."""
    before = descriptors(world.backend.pid)
    with silent(world, guest=True):
        caller = connect(world.server, world.net.a.addr4, PORT)
        wait_until(lambda: descriptors(world.backend.pid) == before + 1, "the connection to be accepted")
        close_with_reset(caller)
        wait_until(lambda: descriptors(world.backend.pid) == before, "the flow to be released", AT_ONCE)


@pytest.mark.parametrize("reset", [False, True])
def test_both_have_closed_and_the_last_bytes_wait(world: World, reset: bool) -> None:
    """The guest is done with it. The bytes it has left go, or are lost with the peer; the flow ends either way."""
    with from_inside(world) as (ours, peer):
        data = random.randbytes(100_000)
        peer.shutdown(socket.SHUT_WR)
        assert ours.recv(1) == b""
        ours.sendall(data)
        ours.close()
        wait_until(lambda: not world.guest.run("ss", "-Htn", "dport", ":5001").stdout, "the guest to be done with it")
        if reset:
            close_with_reset(peer)
        else:
            assert receive_all(peer) == data


@BOTH_WAYS
def test_both_close_at_the_same_time(
    world: World, opened: Callable[[World], contextlib.AbstractContextManager[Pair]]
) -> None:
    """The ends cross: each gets all, and the end."""
    with opened(world) as pair:
        world.embedded.pause()
        for number, sock in enumerate(pair):
            sock.sendall(b"last words of %d" % number)
            sock.shutdown(socket.SHUT_WR)
        world.embedded.resume()
        assert receive_all(pair.peer) == b"last words of 0"
        assert receive_all(pair.guest) == b"last words of 1"


# ---- errors of the network's


@BOTH_WAYS
@pytest.mark.parametrize("route", ["unreachable", "prohibit"])
def test_a_route_that_is_gone_for_a_while(
    world: World, opened: Callable[[World], contextlib.AbstractContextManager[Pair]], route: str
) -> None:
    """ICMP is no end of a connection that is established (RFC 1122, 4.2.3.9): it waits, and goes on."""
    with opened(world) as pair:
        world.host.ip(f"route add {route} {SERVER[4]}")
        try:
            pair.guest.sendall(b"is anybody there?")
            pair.peer.settimeout(0.25)
            with pytest.raises(TimeoutError):
                pair.peer.recv(100)
        finally:
            world.host.ip(f"route del {route} {SERVER[4]}")
        pair.peer.settimeout(5.0)
        assert pair.peer.recv(100) == b"is anybody there?"
