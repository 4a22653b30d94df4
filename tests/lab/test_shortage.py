# SPDX-License-Identifier: GPL-2.0-or-later
"""The host is out of descriptors, ports, routes: what the guest and its peers see, and how it ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import socket
import struct
import termios
import time
from collections.abc import Iterator

import pytest

from godwit.lab.netns import wait_until

from .shim import CALLS, COUNT, FAULTS, Shim
from .watching import cpu_share, dropped, limited, sent_again
from .world import FAR, NOWHERE, SERVER, World, connect, mute, silent, tcp, udp

PORT = 7000
_SILENCE = """
table inet silence {{
    chain out {{
        type filter hook output priority 0
        {} daddr {} tcp dport 5004 drop
    }}
}}
"""
STATS = 1


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """A guest with a forwarded port."""
    with World("-t", str(PORT), "--stats", str(STATS)) as made:
        yield made


def echoed(ours: socket.socket, peer: socket.socket) -> None:
    """A connection works, both ways."""
    for one, other in ((ours, peer), (peer, ours)):
        one.sendall(b"all is well")
        assert other.recv(100) == b"all is well"


@contextlib.contextmanager
def from_inside(world: World, port: int = 5001) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection that the guest has opened, and the server's end of it."""
    with tcp(world.server, 4, SERVER[4], port) as listening:
        ours = connect(world.guest, SERVER[4], port)
        with ours, listening.accept()[0] as peer:
            yield ours, peer


@pytest.mark.parametrize("most", [3, None], ids=["none", "no-more"])
def test_out_of_descriptors_at_a_forwarded_port(world: World, most: int | None) -> None:
    """Nothing spins, what is there goes on, and who waits is seen to when the shortage ends."""
    pid = world.backend.pid
    with from_inside(world) as (ours, peer), contextlib.ExitStack() as stack:
        with limited(pid, most):
            waiting = []
            for _ in range(20):
                with world.server.enter():
                    waiting.append(stack.enter_context(socket.socket()))
                waiting[-1].setblocking(False)
                waiting[-1].connect_ex((world.net.a.addr4, PORT))
            assert cpu_share(pid, 0.5) < 0.2
            echoed(ours, peer)
        for sock in waiting:  # nobody listens there in the guest
            sock.settimeout(2)
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
    with (
        tcp(world.guest, 4, "", PORT) as service,
        connect(world.server, world.net.a.addr4, PORT) as client,
        service.accept()[0] as server,
    ):
        echoed(client, server)


def outcome(world: World, addr: str, port: int = 5001, patience: float = 10.0) -> str:
    """What becomes of a connection of the guest's, in some seconds: an error's name, "opened" or "silence".

    ICMP may be lost like anything else; then it comes again with the next SYN.
    """
    try:
        connect(world.guest, addr, port, patience).close()
    except TimeoutError:
        return "silence"
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "opened"


def test_the_guest_out_of_its_hosts_descriptors(world: World) -> None:
    """Unreachable, as of a translator that is out of what a connection takes (RFC 6888, REQ-8): not refused."""
    with from_inside(world) as (ours, peer), tcp(world.server, 4, SERVER[4], 5002):
        with limited(world.backend.pid, 3):
            assert [outcome(world, SERVER[4], 5002) for _ in range(100)] == ["EHOSTUNREACH"] * 100
            echoed(ours, peer)
        assert outcome(world, SERVER[4], 5002) == "opened"
    wait_until(lambda: dropped(world.messages()).get("no_socket", 0) >= 100, "the drops to be counted")
    said = [line for line in world.messages().splitlines() if "no descriptors left" in line]
    assert len(said) == 1, said


@pytest.mark.parametrize("family", [4, 6])
def test_no_local_port_is_left(world: World, family: int) -> None:
    before = world.host.run("cat", "/proc/sys/net/ipv4/ip_local_port_range").stdout
    with tcp(world.server, family, SERVER[family], 5003), contextlib.ExitStack() as stack:
        world.host.sysctl("net/ipv4/ip_local_port_range", "40000 40003")
        stack.callback(world.host.sysctl, "net/ipv4/ip_local_port_range", before)
        opened = [stack.enter_context(connect(world.guest, SERVER[family], 5003)) for _ in range(4)]
        assert outcome(world, SERVER[family], 5003) == "EHOSTUNREACH"
        opened[0].close()


@pytest.mark.parametrize("family", [4, 6])
def test_what_the_host_is_told_the_guest_is_told(world: World, family: int) -> None:
    """Each in the network's own words: unreachable, prohibited, refused, or nothing at all."""
    addr, kind = SERVER[family], "ip" if family == 4 else "ip6"
    assert outcome(world, addr, 5999) == "ECONNREFUSED"
    # The router's word.
    assert outcome(world, NOWHERE[family]) in ("ENETUNREACH", "EHOSTUNREACH")
    # The host's own.
    for route, seen in (("unreachable", "EHOSTUNREACH"), ("prohibit", "EACCES" if family == 6 else "EHOSTUNREACH")):
        world.host.ip(f"route add {route} {FAR[family]}")
        try:
            assert outcome(world, FAR[family]) == seen
        finally:
            world.host.ip(f"route del {route} {FAR[family]}")
    # And a filter's silence, on the host or beyond it.
    world.host.run("nft", "-f", "-", stdin=_SILENCE.format(kind, addr))
    try:
        assert outcome(world, addr, 5004, 2.0) == "silence"
    finally:
        world.host.run("nft", "delete", "table", "inet", "silence")


# ---- what the kernel refuses, whatever the reason


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, Shim]]:
    """A guest behind a back-end of whose system calls some can be told to fail."""
    shim = Shim(tmp_path_factory.mktemp("shim"), FAULTS)
    with World("-t", str(PORT), "-u", str(PORT), "--stats", str(STATS), wrapper=shim.wrapper) as made:
        yield made, shim


@contextlib.contextmanager
def failing(shim: Shim, call: str, number: int) -> Iterator[None]:
    """A call fails, until it has failed at least once; it does not do so without pause."""
    index = CALLS.index(call)
    shim.put(COUNT + index, 0)
    with shim.holding(index, number):
        yield
        wait_until(lambda: shim.get(COUNT + index) > 0, f"{call} to be tried")
        assert shim.get(COUNT + index) < 200


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.ENOBUFS, errno.ENFILE])
@pytest.mark.parametrize("call", ["socket", "connect", "epoll_ctl"])
def test_no_memory_for_the_guests_connections(faulty: tuple[World, Shim], call: str, number: int) -> None:
    world, shim = faulty
    with from_inside(world) as (ours, peer), tcp(world.server, 4, SERVER[4], 5002):
        with failing(shim, call, number):
            assert outcome(world, SERVER[4], 5002) == "EHOSTUNREACH"
            echoed(ours, peer)
        assert outcome(world, SERVER[4], 5002) == "opened"


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.ENOBUFS, errno.ENFILE])
def test_no_memory_for_connections_from_outside(faulty: tuple[World, Shim], number: int) -> None:
    """They wait, and nothing spins; with the shortage the wait ends."""
    world, shim = faulty
    with tcp(world.guest, 4, "", PORT) as service:
        with failing(shim, "accept4", number):
            client = connect(world.server, world.net.a.addr4, PORT)
            service.settimeout(0.5)
            with pytest.raises(TimeoutError):
                service.accept()
        service.settimeout(2.0)
        with client, service.accept()[0] as server:
            echoed(client, server)


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.ENOBUFS])
@pytest.mark.parametrize("call", ["sendmsg", "recvmsg"])
def test_no_memory_for_what_a_connection_carries(faulty: tuple[World, Shim], call: str, number: int) -> None:
    """Nothing is lost: it is sent again, by the guest or to it."""
    world, shim = faulty
    with from_inside(world) as (ours, peer):
        who, other = (ours, peer) if call == "sendmsg" else (peer, ours)
        with failing(shim, call, number):
            who.sendall(b"is anybody there?")
            other.settimeout(0.5)
            with pytest.raises(TimeoutError):
                other.recv(100)
        other.settimeout(5.0)
        assert other.recv(100) == b"is anybody there?"
        echoed(ours, peer)


@contextlib.contextmanager
def without_room(world: World, shim: Shim) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection whose socket had no room for what was acknowledged to the guest: in the end it comes."""
    with from_inside(world) as (ours, peer):
        with failing(shim, "sendmsg", errno.EAGAIN):
            ours.sendall(b"is anybody there?")
            wait_until(lambda: not unacknowledged(ours), "the guest's bytes to be acknowledged")
        yield ours, peer
        peer.settimeout(5.0)
        assert peer.recv(100) == b"is anybody there?"
        echoed(ours, peer)


def test_no_memory_for_what_a_socket_had_no_room_for(faulty: tuple[World, Shim]) -> None:
    """It was acknowledged to the guest, and is sent when it can be."""
    world, shim = faulty
    with without_room(world, shim) as (ours, peer), failing(shim, "send", errno.ENOMEM):
        peer.sendall(b"an event")
        assert ours.recv(100) == b"an event"


def unacknowledged(sock: socket.socket) -> int:
    """How many bytes of what was sent the other side has not acknowledged (tcp(7), SIOCOUTQ)."""
    (count,) = struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))
    return int(count)


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN])
def test_no_memory_for_datagrams(faulty: tuple[World, Shim], number: int) -> None:
    """They are dropped in silence, as by any queue that is full; what follows goes."""
    world, shim = faulty
    with udp(world.server, 4, SERVER[4], 5002) as there, udp(world.guest, 4) as here:
        here.connect((SERVER[4], 5002))
        with failing(shim, "sendmmsg", number):
            here.send(b"lost")
            assert silent(here)
        here.send(b"not lost")
        assert there.recv(100) == b"not lost"


def test_a_shortage_is_logged_once(faulty: tuple[World, Shim]) -> None:
    """All that these tests have done, together."""
    world, _ = faulty
    for what in ("no descriptors left", "no memory for sockets"):
        assert len([line for line in world.messages().splitlines() if what in line]) == 1


def test_no_memory_is_no_reason_to_send_the_guest_anything_again(faulty: tuple[World, Shim]) -> None:
    """That it is tried each second whether there is some again is no retry towards a guest that does not answer."""
    world, shim = faulty
    with without_room(world, shim) as (ours, peer):
        before = sent_again(world.backend)
        with mute(world.guest), failing(shim, "send", errno.ENOMEM):
            peer.sendall(b"an event")
            assert ours.recv(100) == b"an event"
            time.sleep(3.5)  # in which it is due twice
            assert sent_again(world.backend) - before <= 2
