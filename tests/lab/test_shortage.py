# SPDX-License-Identifier: GPL-2.0-or-later
"""The host is out of descriptors, ports, routes: what the guest and its peers see, and how it ends."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator

import pytest

from godwit.lab.netns import wait_until

from .watching import cpu_share, dropped, limited
from .world import FAR, NOWHERE, SERVER, World, connect, tcp

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


def outcome(world: World, addr: str, port: int = 5001) -> str:
    """What becomes of a connection of the guest's, within two seconds: an error's name, "opened" or "silence"."""
    try:
        connect(world.guest, addr, port, 2.0).close()
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
        assert outcome(world, addr, 5004) == "silence"
    finally:
        world.host.run("nft", "delete", "table", "inet", "silence")
