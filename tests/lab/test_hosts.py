# SPDX-License-Identifier: GPL-2.0-or-later
"""Hosts of other kinds, and options that change what leads where."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Iterator

import pytest

from godwit.lab.netns import GATEWAY4, GATEWAY6, Namespace
from godwit.net.config import OUR_MAC

from .world import FAMILY, HOST, LOOPBACK, NOWHERE, OTHER, SERVER, World, connect, run, silent, tcp, udp

PORT = 7001
GATEWAY = {4: GATEWAY4, 6: f"{GATEWAY6}%eth0"}
RECVERR = {4: (socket.IPPROTO_IP, 11), 6: (socket.IPPROTO_IPV6, 25)}  # linux/in.h, linux/in6.h
MAP_HOST = {4: "192.0.2.100", 6: "2001:db8::100"}
MAP_GUEST = {4: "192.0.2.101", 6: "2001:db8::101"}


def addressed(space: Namespace, address: str, port: int) -> tuple[str, int] | tuple[str, int, int, int]:
    """A socket address; an interface after ``%`` is one of that namespace."""
    name, percent, device = address.partition("%")
    if not percent:
        return name, port
    with space.enter():
        return name, port, 0, socket.if_nametoindex(device)


def asks(client: Namespace, server: Namespace, version: int, called: str, at: str, port: int = 6001) -> str:
    """Ask by UDP what is ``called`` by the client, ``at`` by the server; return who asks, as the server sees it."""
    with udp(server, version, at, port) as there, udp(client, version) as here:
        here.sendto(b"question", addressed(client, called, port))
        data, source = there.recvfrom(64)
        assert data == b"question"
        there.sendto(b"answer", source)
        data, answered = here.recvfrom(64)
        assert data == b"answer"
        assert answered[:2] == (called.partition("%")[0], port)
        return str(source[0]).partition("%")[0]


def connects(client: Namespace, server: Namespace, version: int, called: str, at: str, port: int = 6002) -> str:
    """The same by TCP."""
    with tcp(server, version, at, port) as there, connect(client, called, port) as here:
        accepted, source = there.accept()
        with accepted:
            here.sendall(b"question")
            assert accepted.recv(64) == b"question"
            accepted.sendall(b"answer")
            assert here.recv(64) == b"answer"
        return str(source[0]).partition("%")[0]


def pings(space: Namespace, version: int, address: str, wait: float = 2) -> bool:
    done = run(space, "ping", f"-{version}", "-n", "-q", "-c", "1", "-W", f"{wait:g}", address, check=False)
    assert ("1 received" in done.stdout) == (done.returncode == 0)
    return done.returncode == 0


# --- one IP version alone ---------------------------------------------------------


@pytest.mark.parametrize("version", [4, 6])
def test_host_of_one_version(version: int) -> None:
    """All works with the one; with the other the guest is told at once that it cannot be."""
    other = 10 - version
    with World("--tcp-ports", f"{PORT}", "--udp-ports", f"{PORT}", families=[version]) as world:
        assert asks(world.guest, world.server, version, SERVER[version], SERVER[version]) == HOST[version]
        assert asks(world.server, world.guest, version, HOST[version], "", PORT) == SERVER[version]
        assert connects(world.guest, world.server, version, SERVER[version], SERVER[version]) == HOST[version]
        assert connects(world.server, world.guest, version, HOST[version], HOST[version], PORT) == SERVER[version]
        assert pings(world.guest, version, SERVER[version])
        began = time.monotonic()
        with pytest.raises(OSError):
            connect(world.guest, SERVER[other], 6003).close()
        with udp(world.guest, other) as sock:
            sock.setsockopt(*RECVERR[other], 1)  # or the kernel keeps it to itself
            sock.connect((SERVER[other], 6003))
            sock.send(b"?")
            with pytest.raises(OSError) as caught:
                sock.recv(64)
            assert caught.value.errno == errno.ENETUNREACH
        assert time.monotonic() - began < 2  # and not after a timeout
        assert not pings(world.guest, other, SERVER[other], 0.5)


@pytest.mark.parametrize("version", [4, 6])
def test_back_end_of_one_version(version: int) -> None:
    """``--ipv4-only`` and ``--ipv6-only``: the host has both."""
    other = 10 - version
    with World(f"-{version}", "--udp-ports", f"{PORT}") as world:
        assert asks(world.guest, world.server, version, SERVER[version], SERVER[version]) == HOST[version]
        assert asks(world.server, world.guest, version, HOST[version], "", PORT) == SERVER[version]
        assert pings(world.guest, version, SERVER[version])
        with udp(world.guest, other) as sock, udp(world.server, other, SERVER[other], 6001) as server:
            sock.sendto(b"?", (SERVER[other], 6001))
            assert silent(server)
        with udp(world.guest, other, "", PORT) as guest, udp(world.server, other) as peer:
            peer.sendto(b"?", (HOST[other], PORT))
            assert silent(guest)


# --- what leads to the host -------------------------------------------------------


@pytest.fixture(scope="module", params=[False, True], ids=["gateway", "map"])
def mapped(request: pytest.FixtureRequest) -> Iterator[tuple[World, dict[int, str]]]:
    """A world and what leads to the host's loopback: by default the gateway's address, else what is named."""
    arguments = ["--tcp-ports", str(PORT), "--udp-ports", str(PORT)]
    if not request.param:
        with World(*arguments, map_gw=True) as world:
            yield world, GATEWAY
        return
    for version in (4, 6):
        arguments += ["--map-host-loopback", MAP_HOST[version], "--map-guest-addr", MAP_GUEST[version]]
    with World(*arguments) as world:
        yield world, MAP_HOST


@pytest.mark.parametrize("version", [4, 6])
def test_hosts_loopback(mapped: tuple[World, dict[int, str]], version: int) -> None:
    world, maps = mapped
    assert asks(world.guest, world.host, version, maps[version], LOOPBACK[version]) == LOOPBACK[version]
    assert connects(world.guest, world.host, version, maps[version], LOOPBACK[version]) == LOOPBACK[version]
    assert pings(world.guest, version, maps[version])


@pytest.mark.parametrize("version", [4, 6])
def test_host_asks_the_guest(mapped: tuple[World, dict[int, str]], version: int) -> None:
    """From the loopback, to a forwarded port: the guest sees the address that leads there."""
    world, maps = mapped
    seen = maps[version].partition("%")[0]
    assert asks(world.host, world.guest, version, LOOPBACK[version], "", PORT) == seen
    assert connects(world.host, world.guest, version, LOOPBACK[version], "::" if version == 6 else "", PORT) == seen


@pytest.mark.parametrize("version", [4, 6])
def test_where_the_gateway_leads(mapped: tuple[World, dict[int, str]], version: int) -> None:
    """With ``--no-map-gw`` to the gateway."""
    world, maps = mapped
    if maps is GATEWAY:
        with udp(world.server, version, "", 6005) as server, udp(world.guest, version) as guest:
            guest.sendto(b"?", addressed(world.guest, GATEWAY[version], 6005))
            assert silent(server)
        return
    with udp(world.server, version, "", 6005) as server, udp(world.guest, version) as guest:
        guest.sendto(b"?", addressed(world.guest, GATEWAY[version], 6005))
        data, source = server.recvfrom(64)
        assert data == b"?"
        if version == 4:
            assert source[0] == HOST[4]


@pytest.mark.parametrize("version", [4, 6])
def test_hosts_own_address(mapped: tuple[World, dict[int, str]], version: int) -> None:
    """``--map-guest-addr``."""
    world, maps = mapped
    if maps is MAP_HOST:
        assert asks(world.guest, world.host, version, MAP_GUEST[version], HOST[version]) == HOST[version]
        assert connects(world.guest, world.host, version, MAP_GUEST[version], HOST[version]) == HOST[version]
        assert pings(world.guest, version, MAP_GUEST[version])
    else:
        with udp(world.host, version, HOST[version], 6006) as host, udp(world.guest, version) as guest:
            guest.sendto(b"?", (MAP_GUEST[version], 6006))
            assert silent(host)


# --- how it leaves the host -------------------------------------------------------


def raw(space: Namespace, version: int) -> socket.socket:
    """A socket that sees all echo requests."""
    with space.enter():
        sock = socket.socket(
            FAMILY[version], socket.SOCK_RAW, socket.IPPROTO_ICMP if version == 4 else socket.IPPROTO_ICMPV6
        )
    sock.settimeout(3)
    return sock


def test_outbound_address() -> None:
    """``--outbound``: the source of all that the guest begins."""
    with World("--outbound", OTHER[4], "--outbound", OTHER[6]) as world:
        for version in (4, 6):
            assert asks(world.guest, world.server, version, SERVER[version], SERVER[version]) == OTHER[version]
            assert connects(world.guest, world.server, version, SERVER[version], SERVER[version]) == OTHER[version]
            with raw(world.server, version) as sock:
                assert pings(world.guest, version, SERVER[version])
                sources = set()
                while OTHER[version] not in sources:
                    sources.add(sock.recvfrom(2048)[1][0])
                assert HOST[version] not in sources


def add_side(world: World) -> None:
    """A second way out: an interface eth1 with a default route that counts for less, and ``NOWHERE`` behind it."""
    side = world.side
    world.host.ip(
        f"link add eth1 type veth peer name eth0 netns {side.path}",
        "addr add 10.1.0.10/24 dev eth1",
        "addr add 2001:db8:2::10/64 dev eth1 nodad",
        "link set eth1 up",
        "route add default via 10.1.0.1 dev eth1 metric 9000",
        "route add default via 2001:db8:2::1 dev eth1 metric 9000",
    )
    side.ip(
        "addr add 10.1.0.1/24 dev eth0",
        "addr add 2001:db8:2::1/64 dev eth0 nodad",
        "link set eth0 up",
        f"addr add {NOWHERE[4]}/32 dev lo",
        f"addr add {NOWHERE[6]}/128 dev lo nodad",
    )


def test_outbound_interface() -> None:
    """``--outbound-if4`` and ``--outbound-if6``: through there, whatever the routes say."""
    with World("--outbound-if4", "eth1", "--outbound-if6", "eth1", "--interface", "eth0", prepare=add_side) as world:
        for version, source in ((4, "10.1.0.10"), (6, "2001:db8:2::10")):
            assert asks(world.guest, world.side, version, NOWHERE[version], NOWHERE[version]) == source
            assert connects(world.guest, world.side, version, NOWHERE[version], NOWHERE[version]) == source
            assert pings(world.guest, version, NOWHERE[version])


# --- what is off ------------------------------------------------------------------


def test_without_udp() -> None:
    with World("--no-udp", "--tcp-ports", f"{PORT}") as world:
        for version in (4, 6):
            with udp(world.guest, version) as guest, udp(world.server, version, SERVER[version], 6001) as server:
                guest.sendto(b"?", (SERVER[version], 6001))
                assert silent(server)
            with udp(world.guest, version, "", PORT) as guest, udp(world.server, version) as peer:
                peer.sendto(b"?", (HOST[version], PORT))
                assert silent(guest)
            assert connects(world.guest, world.server, version, SERVER[version], SERVER[version]) == HOST[version]
            assert connects(world.server, world.guest, version, HOST[version], HOST[version], PORT) == SERVER[version]
            assert pings(world.guest, version, SERVER[version])


def test_without_tcp_and_icmp() -> None:
    """No ICMP is no neighbour discovery either, as passt has it: the guest has to know who its neighbours are."""
    with World("--no-tcp", "--no-icmp", "--udp-ports", f"{PORT}") as world:
        world.guest.ip(f"neigh replace {SERVER[6]} lladdr {OUR_MAC.hex(':')} dev eth0 nud permanent")
        for version in (4, 6):
            with tcp(world.server, version, SERVER[version], 6001), pytest.raises(OSError):
                connect(world.guest, SERVER[version], 6001, 0.5).close()
            with tcp(world.guest, version, HOST[version], PORT), pytest.raises(OSError):
                connect(world.server, HOST[version], PORT, 0.5).close()
            assert not pings(world.guest, version, SERVER[version], 0.5)
            assert asks(world.guest, world.server, version, SERVER[version], SERVER[version]) == HOST[version]
            assert asks(world.server, world.guest, version, HOST[version], "", PORT) == SERVER[version]
