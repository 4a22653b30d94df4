# SPDX-License-Identifier: GPL-2.0-or-later
"""Forwarded ports with a guest behind them: who listens where, and where it leads."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Iterator

import pytest

from godwit.lab.backend import Backend
from godwit.lab.guest import EmbeddedGuest
from godwit.lab.netns import HOST4, HOST6, SERVER4, SERVER6, Namespace, Network, wait_until

from .world import run

# A second machine in the guest's network, in which it is the guest itself; and an address that the host gets late.
BEHIND4, BEHIND6 = "192.0.2.99", "2001:db8::99"
LATE4, LATE6 = "192.0.2.78", "2001:db8::78"

FORWARDS = (
    f"-t 2000-2010:3000-3010,~2005 -u 2000-2010:3000-3010,~2005"
    f" -t 0.0.0.0/4000:{BEHIND4}/4001 -t ::/4000:[{BEHIND6}]/4001 -u 4000:{BEHIND4}/4001 -u 4000:[{BEHIND6}]/4001"
    f" -t {HOST4}/5000:5001 -u {HOST4}/5000:5001 -t [{HOST6}]%eth0/5000:5002 -u [{HOST6}]%eth0/5000:5002"
    f" --freebind -t {LATE4}/6000 -u {LATE4}/6000 -t {LATE6}/6000 -u {LATE6}/6000"
)


class World:
    """A host, a guest behind it, and the server, which is the client here."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="godwit-lab."))
        os.chmod(folder, 0o755)  # the back-end drops root, and looks for its socket still
        self.network = stack.enter_context(Network())
        self.host = self.network.hosts["a"]
        backend = stack.enter_context(Backend(self.host, folder, helper=None, arguments=FORWARDS.split()))
        guest = EmbeddedGuest()
        stack.callback(guest.close)
        guest.connect(backend.socket)
        guest.configure()
        guest.space.ip(f"addr add {BEHIND4}/32 dev eth0", f"addr add {BEHIND6}/128 dev eth0 nodad")
        self.guest = guest.space


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with contextlib.ExitStack() as stack:
        yield World(stack)


def opened(space: Namespace, kind: socket.SocketKind, address: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with space.enter():
        sock = socket.socket(family, kind)
    sock.settimeout(5)
    return sock


KINDS = pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["tcp", "udp"])


def exchange(world: World, kind: socket.SocketKind, address: str, port: int, at: tuple[str, int]) -> None:
    """Ask from the server, at an address of the host's, and have it answered at an address of the guest's."""
    with opened(world.guest, kind, at[0]) as service, opened(world.network.server, kind, address) as client:
        service.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        service.bind(at)
        if kind == socket.SOCK_STREAM:
            service.listen()
        client.connect((address, port))
        client.send(b"question")
        if kind == socket.SOCK_STREAM:
            served, peer = service.accept()
            with served:
                served.settimeout(5)
                assert served.recv(100) == b"question"
                served.send(b"answer")
        else:
            data, peer = service.recvfrom(100)
            assert data == b"question"
            service.sendto(b"answer", peer)
        assert client.recv(100) == b"answer"
        assert peer[:2] == (SERVER6 if ":" in address else SERVER4, client.getsockname()[1])


@KINDS
@pytest.mark.parametrize("address", [HOST4, HOST6])
def test_a_range_to_another_one(world: World, kind: socket.SocketKind, address: str) -> None:
    for port in (2000, 2004, 2006, 2010):
        exchange(world, kind, address, port, (address, port + 1000))


@pytest.mark.parametrize("address", [HOST4, HOST6])
def test_what_was_taken_out_is_refused(world: World, address: str) -> None:
    for port in (1999, 2005, 2011):
        with opened(world.network.server, socket.SOCK_STREAM, address) as client, pytest.raises(ConnectionRefusedError):
            client.connect((address, port))


@KINDS
@pytest.mark.parametrize(("address", "behind"), [(HOST4, BEHIND4), (HOST6, BEHIND6)])
def test_another_target_than_the_guest(world: World, kind: socket.SocketKind, address: str, behind: str) -> None:
    exchange(world, kind, address, 4000, (behind, 4001))
    # The guest is not taken for that one now.
    exchange(world, kind, address, 2000, (address, 3000))


@KINDS
@pytest.mark.parametrize(("address", "port"), [(HOST4, 5001), (HOST6, 5002)])
def test_an_address_and_an_interface_to_listen_on(
    world: World, kind: socket.SocketKind, address: str, port: int
) -> None:
    exchange(world, kind, address, 5000, (address, port))


@KINDS
@pytest.mark.parametrize(("address", "own"), [(LATE4, HOST4), (LATE6, HOST6)])
def test_an_address_that_the_host_gets_late(world: World, kind: socket.SocketKind, address: str, own: str) -> None:
    length = "/128 nodad" if ":" in address else "/32"
    world.host.ip(f"addr add {address}{length} dev eth0")
    try:
        # The kernel has a worker make the route by which an IPv6 address takes packets: before it they are dropped.
        wait_until(lambda: run(world.host, "ip", "route", "get", address).stdout.startswith("local "), "the address")
        exchange(world, kind, address, 6000, (own, 6000))
    finally:
        world.host.ip(f"addr del {address}{length.split()[0]} dev eth0")
