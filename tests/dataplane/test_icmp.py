# SPDX-License-Identifier: GPL-2.0-or-later
"""ICMP errors: what the kernel heard reaches the guest, and what the guest says reaches the peer as far as it can."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, IPerror, UDPerror
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6PacketTooBig, ICMPv6TimeExceeded, IPerror6, IPv6
from scapy.packet import Raw

from godwit.lab.netns import Namespace

from .driver import FULL, Family, Frame, Guest, address, is_echo_reply, pattern
from .test_datagram import Peer, is_udp, meet
from .test_udp import forwarded, sent_until_refused

UNREACHABLE, TIME_EXCEEDED = 3, 11
NEAR4, ROUTER4, FAR4 = "198.51.100.1", "198.51.100.2", "203.0.113.9"
NEAR6, ROUTER6, FAR6 = "2001:db8:1::1", "2001:db8:1::2", "2001:db8:2::9"


def is_error(frame: Frame) -> bool:
    if IP in frame.ether:
        return ICMP in frame.ether and frame.ether[ICMP].type in (UNREACHABLE, TIME_EXCEEDED)
    return IPv6 in frame.ether and frame.ether[IPv6].nh == 58 and frame.ether[IPv6].payload.type in (1, 2, 3)


def inner(frame: Frame, family: Family) -> Any:
    return frame.ether[IPerror6 if family.v6 else IPerror]


@pytest.fixture
def peer(family: Family) -> Iterator[Peer]:
    with Peer(family) as it:
        yield it


def closed_port(family: Family) -> int:
    with Peer(family) as gone:
        return gone.port


# ---- to the guest


@pytest.mark.parametrize("size", [0, 1, 500, 1400])
def test_closed_port(guest: Guest, family: Family, size: int) -> None:
    port = closed_port(family)
    guest.send(guest.udp(family, 5000, port, pattern(size)))
    frame = guest.receive(is_error)
    ip = frame.ether[IPv6 if family.v6 else IP]
    assert (ip.src, ip.dst) == (family.gateway, family.guest)
    if family.v6:
        assert (frame.ether[ICMPv6DestUnreach].code, len(frame.raw) <= 14 + 1280) == (4, True)
    else:
        assert (frame.ether[ICMP].type, frame.ether[ICMP].code, len(frame.raw) <= 14 + 576) == (UNREACHABLE, 3, True)
    quoted = inner(frame, family)
    assert (quoted.src, quoted.dst) == (family.guest, family.gateway)
    assert (quoted[UDPerror].sport, quoted[UDPerror].dport) == (5000, port)
    load = frame.raw[14 + 2 * (family.ip_size + 8) :]
    assert pattern(size).startswith(load)
    assert len(load) >= min(size, 400)
    # Once for each datagram, and no other port of the guest's is meant.
    guest.send(guest.udp(family, 5001, port, b"again"))
    assert inner(guest.receive(is_error), family)[UDPerror].sport == 5001
    assert guest.look(is_error, 0.05) is None


def test_many_refused_in_one_batch(guest: Guest, family: Family, peer: Peer) -> None:
    """Each error is of its own datagram, and none costs another one."""
    port = closed_port(family)
    frames = []
    for n in range(30):
        frames.append(guest.udp(family, 5000, port if n % 2 else peer.port, bytes([n])))
    guest.send_all(frames)
    assert [peer.read()[0] for _ in range(15)] == list(range(0, 30, 2))
    assert guest.drops("send") <= 15
    assert inner(guest.receive(is_error), family)[UDPerror].dport == port


@pytest.fixture
def far(family: Family) -> Iterator[tuple[Guest, str, str]]:
    """A guest whose host has a router beside it: (guest, an address beyond, the router's)."""
    far, router, near = (FAR6, ROUTER6, NEAR6) if family.v6 else (FAR4, ROUTER4, NEAR4)
    length = 64 if family.v6 else 24
    with Namespace("far") as host, Namespace("router") as hop, contextlib.ExitStack() as stack:
        host.ip("link add h0 type veth peer name r0")
        host.ip(f"link set r0 netns {hop.path}")
        with host.enter():
            for space, name, own in ((host, "h0", near), (hop, "r0", router)):
                space.ip(f"link set {name} up")
                space.ip(f"addr add {own}/{length} dev {name}{' nodad' if family.v6 else ''}")
        hop.ip(f"addr add {far}/128 dev lo nodad" if family.v6 else f"addr add {far}/32 dev lo")
        hop.sysctl("net/ipv6/conf/all/forwarding" if family.v6 else "net/ipv4/ip_forward", "1")
        host.ip(f"route add default via {router}")
        hop.ip(f"route add default via {near}")
        stack.enter_context(host.enter())
        guest = stack.enter_context(Guest(FULL, mtu=65520))
        guest.configure(our4=address("192.0.2.1"), our_ll=address("fe80::1"), mtu=65520)
        yield guest, far, router


def test_time_exceeded(far: tuple[Guest, str, str], family: Family) -> None:
    """As traceroute makes use of it: a datagram, and a ping, that end at the router."""
    guest, there, router = far
    beyond = "2001:db8:3::1" if family.v6 else "192.0.2.200"  # not the router's own, so that it would have to forward
    fields = {"dst": beyond, "hlim" if family.v6 else "ttl": 1}
    for frame, port in (
        (guest.udp(family, 5000, 33434, b"probe", **fields), 33434),
        (guest.echo(family, 77, 3, b"probe", **fields), None),
    ):
        guest.send(frame)
        error = guest.receive(is_error)
        ip = error.ether[IPv6 if family.v6 else IP]
        assert (ip.src, ip.dst) == (router, family.guest)
        if family.v6:
            assert error.ether[ICMPv6TimeExceeded].code == 0
        else:
            assert (error.ether[ICMP].type, error.ether[ICMP].code) == (TIME_EXCEEDED, 0)
        quoted = inner(error, family)
        assert (quoted.src, quoted.dst) == (family.guest, beyond)
        if port:
            assert quoted[UDPerror].dport == port
        else:
            assert bytes(quoted.payload)[4:8] == b"\0\x4d\0\x03"
    assert there


def test_path_mtu(far: tuple[Guest, str, str], family: Family) -> None:
    """What does not fit the host's own link, and is not to be cut up: the guest is told, and what fits then."""
    guest, there, router = far
    unfragmented = {"dst": there} if family.v6 else {"dst": there, "flags": "DF"}
    for frame in (
        guest.udp(family, 5000, 9000, pattern(3000), **unfragmented),
        guest.echo(family, 9, 2, pattern(3000), **unfragmented),
    ):
        guest.send(frame)
        error = guest.receive(is_error)
        if family.v6:
            assert error.ether[ICMPv6PacketTooBig].mtu == 1500
        else:
            assert (error.ether[ICMP].code, error.ether[ICMP].nexthopmtu) == (4, 1500)
        quoted = inner(error, family)
        assert (quoted.src, quoted.dst) == (family.guest, there)
        if UDPerror in quoted:
            assert quoted[UDPerror].dport == 9000
        else:
            assert bytes(quoted.payload)[4:8] == b"\0\x09\0\x02"
        guest.barrier()
        assert guest.look(is_error, 0) is None  # it is told once
    # A batch that is joined for the kernel tells it as well.
    guest.send_all([guest.udp(family, 5000, 9000, pattern(2000), **unfragmented) for _ in range(5)])
    assert is_error(guest.receive(is_error))
    if not family.v6:
        # IPv4 without DF is cut up on the way, by the host.
        guest.send(guest.echo(family, 9, 3, pattern(3000), dst=there))
        assert guest.receive(is_echo_reply).payload == pattern(3000)
    assert router


def test_no_route(family: Family) -> None:
    with Namespace("alone") as space, space.enter(), Guest() as guest:
        guest.configure(our4=address("192.0.2.1"), our_ll=address("fe80::1"))
        there = FAR6 if family.v6 else FAR4
        guest.send(guest.udp(family, 5000, 9000, b"x", dst=there))
        error = guest.receive(is_error)
        ip = error.ether[IPv6 if family.v6 else IP]
        assert ip.src == ("fe80::1" if family.v6 else "192.0.2.1")
        if family.v6:
            assert error.ether[ICMPv6DestUnreach].code == 0
        else:
            assert (error.ether[ICMP].type, error.ether[ICMP].code) == (UNREACHABLE, 0)
        assert guest.drops("send") == 1


def test_host_that_does_not_answer(far: tuple[Guest, str, str], family: Family) -> None:
    """The kernel finds nobody with this address (ARP, or neighbour discovery)."""
    guest, _, router = far
    nobody = router[:-1] + "7"
    guest.send(guest.udp(family, 5000, 9000, b"x", dst=nobody))
    error = guest.receive(is_error, timeout=15)
    if family.v6:
        assert error.ether[ICMPv6DestUnreach].code == 3
    else:
        assert (error.ether[ICMP].type, error.ether[ICMP].code) == (UNREACHABLE, 1)
    assert inner(error, family).dst == nobody


# ---- from the guest


def unreachable(guest: Guest, family: Family, datagram: Frame, code: int | None = None) -> Any:
    """The guest's own answer to a datagram for a closed port."""
    quoted = datagram.raw[14:][:200]
    if family.v6:
        return guest.ip(family) / ICMPv6DestUnreach(code=4 if code is None else code) / Raw(quoted)
    return guest.ip(family) / ICMP(type=UNREACHABLE, code=3 if code is None else code) / Raw(quoted)


def test_guest_closes_its_port(guest: Guest, family: Family, peer: Peer) -> None:
    """The host's socket goes with it, so that the peer hears the same from the kernel."""
    meet(guest, peer)
    peer.sock.connect(peer.guest)
    peer.sock.send(b"too late")
    frame = guest.receive(is_udp)
    guest.send(unreachable(guest, family, frame))
    guest.barrier()
    assert guest.engine.counters()["flows"] == 0
    with pytest.raises(ConnectionRefusedError):
        sent_until_refused(peer.sock)


def test_other_peers_keep_the_port(guest: Guest, family: Family, peer: Peer) -> None:
    with Peer(family) as other:
        meet(guest, peer)
        meet(guest, other)
        peer.write(b"too late")
        guest.send(unreachable(guest, family, guest.receive(is_udp)))
        guest.barrier()
        assert guest.engine.counters()["flows"] == 1
        other.write(b"still")
        assert guest.receive(is_udp).payload == b"still"


def test_forwarded_port_that_is_closed_in_the_guest(guest: Guest, family: Family, peer: Peer) -> None:
    with forwarded(guest, family, 7) as port:
        peer.sock.sendto(b"x", (family.loopback, port))
        guest.send(unreachable(guest, family, guest.receive(is_udp)))
        guest.barrier()
        assert guest.engine.counters()["flows"] == 0
        peer.sock.sendto(b"y", (family.loopback, port))  # it may be open by now
        assert guest.receive(is_udp).payload == b"y"


def test_closed_port_in_the_midst_of_a_batch(guest: Guest, family: Family, peer: Peer) -> None:
    """What is on its way to the host goes to whom it was sent, whatever becomes of the flow."""
    with Peer(family) as one, Peer(family) as two:
        meet(guest, one)
        meet(guest, peer)
        one.write(b"x")
        error = unreachable(guest, family, guest.receive(is_udp))
        guest.send_all(
            [guest.udp(family, 5000, one.port, b"for one"), error, guest.udp(family, 5000, two.port, b"for two")]
        )
        assert one.read() == b"for one"
        assert two.read() == b"for two"


def test_errors_that_mean_nothing(guest: Guest, family: Family, peer: Peer) -> None:
    meet(guest, peer)
    peer.write(b"x")
    frame = guest.receive(is_udp)
    head = family.ip_size
    guest.send(unreachable(guest, family, frame, code=1))  # another reason: it may be over soon
    whole = bytes(unreachable(guest, family, frame))
    for size in (14 + head + 8, 14 + head + 8 + head, 14 + head + 8 + head + 7):  # cut off
        cut = bytearray(whole[:size])
        length = size - 14 - (head if family.v6 else 0)
        cut[14 + (4 if family.v6 else 2) : 14 + (6 if family.v6 else 4)] = length.to_bytes(2, "big")
        guest.send(bytes(cut))
    assert guest.drops("short") == 3
    strange = bytearray(whole)
    strange[14 + head + 8 + head + 1] ^= 1  # about another port
    guest.send(bytes(strange))
    assert guest.drops("no_flow") == 1
    foreign = bytearray(whole)
    foreign[14 + head + 8 + (39 if family.v6 else 19)] ^= 1  # not sent to this guest
    guest.send(bytes(foreign))
    guest.barrier()
    assert guest.engine.counters()["flows"] == 1
