# SPDX-License-Identifier: GPL-2.0-or-later
"""UDP ports go from one data plane to another, with what waits for the guest."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from godwit.daemon.datagrams import open_socket
from godwit.dataplane import Datagram, UdpPeer, UdpPort
from godwit.lab.netns import Namespace, wait_until

from .driver import FULL, GUEST_USO4, GUEST_USO6, PLAIN, Family, Guest, address

UDP_SEGMENT = 103  # linux/udp.h
HERE = {4: "198.51.100.2", 6: "2001:db8:ff::2"}


@pytest.fixture
def peer(family: Family) -> Iterator[socket.socket]:
    """Somebody at an address that is no loopback one, in a network of its own."""
    with Namespace("moves") as space:
        space.ip("link set lo up", f"addr add {HERE[4]}/32 dev lo", f"addr add {HERE[6]}/128 dev lo nodad")
        with space.enter(), socket.socket(family.af, socket.SOCK_DGRAM) as sock:
            sock.bind((HERE[6 if family.v6 else 4], 0))
            wait_until(lambda: hears_itself(sock), "the new address to be of use")
            sock.settimeout(5)
            yield sock


def hears_itself(sock: socket.socket) -> bool:
    """The first datagrams to an IPv6 address that was just set may be lost, on a machine that is busy."""
    sock.settimeout(0.2)
    sock.sendto(b"", sock.getsockname())
    try:
        while True:
            sock.recv(10)
            sock.settimeout(0)  # an earlier one may have been late only
    except OSError:
        return sock.gettimeout() == 0


def here(family: Family) -> str:
    return HERE[6 if family.v6 else 4]


def ask(guest: Guest, family: Family, peer: socket.socket, text: bytes = b"question") -> tuple[str, int]:
    guest.send(guest.udp(family, 5000, peer.getsockname()[1], text, dst=here(family)))
    data, name = peer.recvfrom(2000)
    assert data == text
    return (name[0], name[1])


def dump(guest: Guest) -> tuple[UdpPort, list[UdpPeer], list[Datagram]]:
    """The one port that there is, as a migration sees it."""
    [port] = guest.engine.udp_ports()
    waiting = guest.engine.udp_waiting(port)
    taken, all_taken = guest.engine.take_datagrams(port, 1 << 30, 64)
    assert all_taken
    state = guest.engine.udp_port_state(port)
    return state, [one for at, one in guest.engine.udp_peers() if at == port], waiting + taken


def load(guest: Guest, dumped: tuple[UdpPort, list[UdpPeer], list[Datagram]], fd: int) -> int:
    state, peers, waiting = dumped
    port = guest.engine.import_udp_port(state, fd)
    assert all(guest.engine.import_udp_peer(port, one) for one in peers)
    guest.engine.carry_datagrams(port, waiting)
    return port


@pytest.mark.parametrize("features", [FULL, PLAIN], ids=["full", "plain"])
def test_a_port_moves_with_what_waits(features: int, family: Family, peer: socket.socket) -> None:
    """With the guest, in hand, and in the socket: each once, in order, and again from the second to a third."""
    texts = [b"%d" % number * (1 + number * 7) for number in range(60)]
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(Guest(features, rx=((2048,),) * 8))
        name = ask(source, family, peer)
        source.refill = False
        for text in texts:
            peer.sendto(text, name)
        source.barrier()
        came = [frame.payload for frame in source.collect()]
        assert 0 < len(came) <= 8
        source.engine.park()
        dumped = dump(source)
        assert (came + [one.data for one in dumped[2]]) == texts
        assert dump(source) == dumped  # also when they were taken before
        assert dumped[0].guest_port == 5000
        assert dumped[0].local_port == name[1]
        assert [one.remote_port for one in dumped[1]] == [peer.getsockname()[1]]
        source.engine.forget_udp(source.engine.udp_ports())
        assert source.engine.udp_peers() == []
        source.engine.unpark()

        second = stack.enter_context(Guest(features, rx=((2048,),) * 8))
        second.engine.park()
        fd, same = open_socket(dumped[0])
        assert same
        load(second, dumped, fd)
        peer.sendto(b"later", name)
        again = dump(second)
        assert [one.data for one in again[2]] == [*(one.data for one in dumped[2]), b"later"]
        second.engine.unpark()
        for text in [*texts[len(came) :], b"later"]:
            assert second.receive(lambda frame: frame.ether.type != 0x88CC).payload == text
        assert ask(second, family, peer, b"the next question") == name


def test_a_port_that_is_taken(family: Family, peer: socket.socket) -> None:
    with Guest() as source, Guest() as target, socket.socket(family.af, socket.SOCK_DGRAM) as other:
        name = ask(source, family, peer)
        source.engine.park()
        dumped = dump(source)
        source.engine.forget_udp(source.engine.udp_ports())
        source.engine.unpark()
        other.bind(("", name[1]))
        target.engine.park()
        fd, same = open_socket(dumped[0])
        assert not same
        port = load(target, dumped, fd)
        with pytest.raises(ValueError, match="has this UDP port already"):
            target.engine.import_udp_port(dumped[0], fd)
        assert not target.engine.import_udp_peer(port, dumped[1][0])  # it is there
        target.engine.unpark()
        assert ask(target, family, peer)[1] not in (0, name[1])


def test_what_was_loaded_is_forgotten(family: Family, peer: socket.socket) -> None:
    """A load that is discarded: of a port of the guest's own all, of a forwarded one what came to it."""
    with Guest() as source, Guest() as target:
        ask(source, family, peer)
        source.engine.park()
        dumped = dump(source)
        source.engine.unpark()
        with socket.socket(family.af, socket.SOCK_DGRAM) as forwarded:
            forwarded.bind((here(family), 0))
            target.engine.listen(forwarded.detach(), 77)
        target.engine.park()
        [there] = target.engine.udp_ports()
        assert target.engine.find_udp_port(dumped[0]) is None
        assert target.engine.find_udp_port(target.engine.udp_port_state(there)) == there
        waiting = Datagram(address(here(family)), bytes(16), 9, b"x")
        target.engine.carry_datagrams(there, [waiting])
        assert target.engine.udp_waiting(there) == [waiting]
        port = load(target, (dumped[0], dumped[1], [waiting]), open_socket(dumped[0]._replace(local_port=1))[0])
        target.engine.forget_udp([port, there])
        assert target.engine.udp_ports() == [there]
        assert target.engine.udp_waiting(there) == []
        assert target.engine.udp_peers() == []
        with pytest.raises(ValueError, match=f"no UDP port {port}"):
            target.engine.udp_port_state(port)
        target.engine.carry_datagrams(there, [waiting])
        target.engine.drain_forwards()
        assert target.engine.udp_waiting(there) == []
        with pytest.raises(ValueError, match="a datagram of 65537 bytes"):
            target.engine.carry_datagrams(there, [waiting._replace(data=bytes(65537))])
        target.engine.unpark()


def test_a_port_that_nobody_came_along_with_is_not_kept(family: Family, peer: socket.socket) -> None:
    with Guest() as source, Guest() as target:
        ask(source, family, peer)
        source.engine.park()
        state, peers, _ = dump(source)
        source.engine.unpark()
        target.engine.park()
        ports = [
            load(target, (state._replace(guest_port=7000 + n), one, []), open_socket(state._replace(local_port=1))[0])
            for n, one in enumerate(([], peers))
        ]
        target.engine.forget_lone_udp(ports)
        assert target.engine.udp_ports() == ports[1:]
        target.engine.unpark()


def test_ports_that_lead_to_this_hosts_loopback_stay(family: Family) -> None:
    with Guest() as guest, socket.socket(family.af, socket.SOCK_DGRAM) as server:
        server.settimeout(5)
        server.bind((family.loopback, 0))
        guest.send(guest.udp(family, 5000, server.getsockname()[1], b"hello"))
        assert server.recv(100) == b"hello"
        guest.engine.park()
        assert guest.engine.udp_ports() == []
        assert guest.engine.udp_peers() == []
        guest.engine.unpark()


def test_a_peer_is_who_the_guest_would_reach_here(family: Family, peer: socket.socket) -> None:
    """A stream opens no way to this host's loopback, and none through a socket of the other family."""
    with Guest() as source, Guest() as target:
        ask(source, family, peer)
        source.engine.park()
        state, [one], _ = dump(source)
        source.engine.unpark()
        target.engine.park()
        port = target.engine.import_udp_port(state, open_socket(state._replace(local_port=1))[0])
        loopback, other = address(family.loopback), address(HERE[4 if family.v6 else 6])
        for wrong in (
            one._replace(remote_addr=loopback),
            one._replace(remote_addr=loopback, our_addr=loopback),
            one._replace(remote_addr=other, our_addr=other),
        ):
            assert not target.engine.import_udp_peer(port, wrong)
        target.engine.carry_datagrams(port, [Datagram(loopback, bytes(16), 9, b"x")])
        assert target.engine.udp_waiting(port) == []
        most = 65527 if family.v6 else 65507
        sizes = [Datagram(one.remote_addr, bytes(16), 9, bytes(size)) for size in (most, most + 1)]
        target.engine.carry_datagrams(port, sizes)
        assert target.engine.udp_waiting(port) == sizes[:1]  # headers cannot say more
        assert target.engine.import_udp_peer(port, one)
        target.engine.unpark()


def test_a_socket_is_bound_as_the_ports_here_are(family: Family) -> None:
    """To the outbound address, never to the loopback because a stream says so; through the outbound interface."""
    guest, loopback = address(here(family)), address(family.loopback)
    state = UdpPort(0, guest, 7000, loopback, 45678, 0)
    with socket.socket(fileno=open_socket(state)[0]) as sock:
        assert sock.getsockname()[:2] == ("::" if family.v6 else "0.0.0.0", 45678)
    fd, same = open_socket(state, loopback, "lo")
    with socket.socket(fileno=fd) as sock:
        assert same
        assert sock.getsockname()[:2] == (family.loopback, 45678)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0") == b"lo"


def test_a_port_of_a_service_is_never_bound(family: Family) -> None:
    """Though we might: a stream can be anybody's, and the host's services have those ports."""
    state = UdpPort(0, address(here(family)), 7000, address(family.loopback), 1023, 0)
    for port, kept in ((1023, False), (1024, True)):
        fd, same = open_socket(state._replace(local_port=port))
        with socket.socket(fileno=fd) as sock:
            assert same == kept
            assert (sock.getsockname()[1] == port) == kept


def test_of_several_forwarded_sockets_the_one_like_it_is_found() -> None:
    with Guest() as guest:
        for name in ("127.0.0.1", "::1", "127.0.0.2"):
            with socket.socket(socket.AF_INET6 if ":" in name else socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.bind((name, 0))
                guest.engine.listen(sock.detach(), 77)
        guest.engine.park()
        states = {port: guest.engine.udp_port_state(port) for port in guest.engine.udp_ports()}
        assert len(states) == 3
        for port, state in states.items():
            assert guest.engine.find_udp_port(state) == port
        six = next(port for port, state in states.items() if state.local_addr == address("::1"))
        state = states[six]
        assert guest.engine.find_udp_port(state._replace(local_addr=address("2001:db8::1"))) == six
        assert guest.engine.find_udp_port(state._replace(local_addr=address("192.0.2.1"))) != six
        assert guest.engine.find_udp_port(state._replace(guest_port=78)) is None
        datagrams = [Datagram(address(name), bytes(16), 9, b"x") for name in HERE.values()]
        guest.engine.carry_datagrams(six, datagrams)
        assert guest.engine.udp_waiting(six) == datagrams[1:]
        guest.engine.note_any_peer(six)
        guest.engine.note_any_peer(six)  # it is counted once
        assert guest.engine.udp_port_state(six).any_peer == 1
        guest.engine.unpark()


def come(guest: Guest, count: int) -> list[bytes]:
    return [guest.receive(lambda frame: frame.ether.type != 0x88CC).payload for _ in range(count)]


@pytest.mark.parametrize("features", [FULL | GUEST_USO4 | GUEST_USO6, PLAIN], ids=["full", "plain"])
def test_what_was_taken_comes_first_when_the_guest_goes_on(features: int, family: Family, peer: socket.socket) -> None:
    """With the guest, in hand, taken by one attempt and by the next, and what came later: each once, in order."""
    with Guest(features, rx=((2048,),) * 8) as guest:
        name = ask(guest, family, peer)
        guest.refill = False
        texts = [b"%d" % number * (1 + number * 7) for number in range(90)]
        for text in texts[:40]:
            peer.sendto(text, name)
        guest.barrier()
        came = [frame.payload for frame in guest.collect()]
        assert 0 < len(came) <= 8
        guest.engine.park()
        for until in (60, 80):  # two attempts, one upon the other
            for text in texts[until - 20 : until]:
                peer.sendto(text, name)
            assert came + [one.data for one in dump(guest)[2]] == texts[:until]
        for text in texts[80:]:
            peer.sendto(text, name)
        guest.engine.unpark()
        for _ in range(8):
            guest.post((2048,))
        came += come(guest, 4)
        guest.engine.park()  # a third, with some of them gone
        came += [frame.payload for frame in (*guest.backlog, *guest.collect())]
        guest.backlog.clear()
        assert came + [one.data for one in dump(guest)[2]] == texts
        guest.engine.unpark()
        guest.refill = True
        for _ in range(8):
            guest.post((2048,))
        assert came + come(guest, len(texts) - len(came)) == texts
        assert ask(guest, family, peer, b"the next question") == name


def test_what_was_joined_stays_so(family: Family, peer: socket.socket) -> None:
    """Datagrams that the kernel has joined come to the guest as they would have, and with their traffic class."""
    with Guest(FULL | GUEST_USO4 | GUEST_USO6) as guest:
        name = ask(guest, family, peer)
        if family.v6:
            peer.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, 0xB8)
        else:
            peer.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0xB8)
        peer.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 100)
        guest.engine.park()
        peer.sendto(bytes(range(250)), name)
        waiting = dump(guest)[2]
        assert [one.data for one in waiting] == [bytes(range(250))[at : at + 100] for at in (0, 100, 200)]
        guest.engine.unpark()
        frame = guest.receive(lambda frame: frame.ether.type != 0x88CC)
        assert frame.payload == bytes(range(250))
        assert frame.gso_size == 100
        assert (frame.ether["IPv6"].tc if family.v6 else frame.ether["IP"].tos) == 0xB8


def test_what_is_beyond_the_limit_stays_in_the_socket(family: Family, peer: socket.socket) -> None:
    with Guest() as guest:
        name = ask(guest, family, peer)
        guest.engine.park()
        texts = [b"%d" % number * 1400 for number in range(10)]
        for text in texts:
            peer.sendto(text, name)
        [port] = guest.engine.udp_ports()
        assert guest.engine.take_datagrams(port, 0, 64) == ([], False)
        limit = 131072 + 2 * (1400 + 64)  # there has to be room for the largest
        taken, all_taken = guest.engine.take_datagrams(port, limit, 64)
        assert ([one.data for one in taken], all_taken) == (texts[:3], False)
        limit = 131072 + 6 * (1400 + 64)
        taken, all_taken = guest.engine.take_datagrams(port, limit, 64)
        assert ([one.data for one in taken], all_taken) == (texts[3:], True)  # just reached, and there are no more
        assert guest.engine.take_datagrams(port, limit, 64) == ([], True)
        guest.engine.unpark()
        assert come(guest, len(texts)) == texts
