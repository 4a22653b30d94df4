# SPDX-License-Identifier: GPL-2.0-or-later
"""UDP ports: forwarded ones, those of the guest's own, what each datagram carries along, batches and their joins."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterator

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6

from godwit.lab.netns import Namespace

from .driver import (
    FULL,
    GUEST_USO4,
    GUEST_USO6,
    HOST_USO,
    PLAIN,
    V4,
    V6,
    Conn,
    Family,
    Frame,
    Guest,
    address,
    pattern,
)
from .test_datagram import Peer, is_udp, meet

UDP_SEGMENT, UDP_GRO = 103, 104  # linux/udp.h
IP_RECVTOS, IP_RECVTTL = 13, 12
IPV6_RECVTCLASS, IPV6_RECVHOPLIMIT, IPV6_TCLASS, IPV6_HOPLIMIT = 66, 51, 67, 52
USO = GUEST_USO4 | GUEST_USO6 | HOST_USO
SECOND = 1000


def ends(frame: Frame, family: Family) -> tuple[str, int, str, int]:
    ip, udp = frame.ether[IPv6 if family.v6 else IP], frame.ether[UDP]
    return ip.src, udp.sport, ip.dst, udp.dport


@contextlib.contextmanager
def forwarded(
    guest: Guest, family: Family, to: int, where: str | None = None, to_address: str | None = None
) -> Iterator[int]:
    """A forwarded port of the host's, its number; on every address, of both families, if none is said."""
    if where is None:
        sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(("::", 0))
    else:
        sock = socket.socket(family.af, socket.SOCK_DGRAM)
        sock.bind((where, 0))
    port: int = sock.getsockname()[1]
    guest.engine.listen(sock.detach(), to, address(to_address) if to_address else None)
    yield port


# ---- forwarded ports


@pytest.mark.parametrize("place", ["everywhere", "one_address"])
def test_first_datagram_from_outside(guest: Guest, family: Family, peer: Peer, place: str) -> None:
    where = None if place == "everywhere" else family.loopback
    with forwarded(guest, family, 53, where) as port:
        peer.sock.sendto(b"question", (family.loopback, port))
        frame = guest.receive(is_udp)
        assert frame.payload == b"question"
        assert ends(frame, family) == (family.gateway, peer.port, family.guest, 53)
        guest.send(guest.udp(family, 53, peer.port, b"answer"))
        assert peer.sock.recvfrom(100) == (b"answer", peer.sock.getsockname()[:0] + answer_from(family, port))
        assert guest.engine.counters()["flows"] == 1


def answer_from(family: Family, port: int) -> tuple[str, int] | tuple[str, int, int, int]:
    return (family.loopback, port, 0, 0) if family.v6 else (family.loopback, port)


@pytest.fixture
def peer(family: Family) -> Iterator[Peer]:
    with Peer(family) as it:
        yield it


def test_many_peers_of_one_forwarded_port(guest: Guest, family: Family) -> None:
    with forwarded(guest, family, 53) as port, contextlib.ExitStack() as stack:
        peers = [stack.enter_context(Peer(family)) for _ in range(50)]
        before = guest.engine.counters()["flows"]
        for n, one in enumerate(peers):
            one.sock.sendto(struct.pack("!H", n), (family.loopback, port))
        for _ in peers:
            frame = guest.receive(is_udp)
            guest.send(guest.udp(family, 53, frame.ether[UDP].sport, frame.payload * 2))
        for n, one in enumerate(peers):
            assert one.read() == struct.pack("!H", n) * 2
            assert one.guest[1] == port
        assert guest.engine.counters()["flows"] == before + 50


def test_guest_itself_sends_from_a_forwarded_port(guest: Guest, family: Family, peer: Peer) -> None:
    """As a server does that also calls others, or a peer whose port the world knows: it is seen with that port."""
    with forwarded(guest, family, 4500) as port:
        guest.send(guest.udp(family, 4500, peer.port, b"call"))
        assert peer.read() == b"call"
        assert peer.guest[1] == port


def test_one_address_does_not_send_for_others(guest: Guest, family: Family, peer: Peer) -> None:
    """From a port that is forwarded on one address only, what the guest calls gets a port of its own."""
    with forwarded(guest, family, 4500, family.loopback) as port:
        guest.send(guest.udp(family, 4500, peer.port, b"call"))
        assert peer.read() == b"call"
        assert peer.guest[1] != port
        # But who asked there gets the answer from there, from then on.
        peer.sock.sendto(b"ask", (family.loopback, port))
        assert guest.receive(is_udp).payload == b"ask"
        guest.send(guest.udp(family, 4500, peer.port, b"told"))
        assert peer.read() == b"told"
        assert peer.guest[1] == port
        assert guest.engine.counters()["flows"] == 1


def test_forward_to_another_address(guest: Guest, family: Family, peer: Peer) -> None:
    behind = "2001:db8::99" if family.v6 else "192.0.2.99"
    with forwarded(guest, family, 53, None, behind) as port:
        peer.sock.sendto(b"question", (family.loopback, port))
        frame = guest.receive(is_udp)
        assert ends(frame, family) == (family.gateway, peer.port, behind, 53)
        guest.send(guest.udp(family, 53, peer.port, b"answer", src=behind))
        assert peer.read() == b"answer"
        assert peer.guest[1] == port
    other = V4 if family.v6 else V6
    with Peer(other) as stranger:
        stranger.sock.sendto(b"x", (other.loopback, port))
        guest.barrier()
        assert guest.look(is_udp, 0.05) is None  # it has no such address
        assert guest.drops("unreachable") == 1


def other_address(family: Family) -> str:
    return "2001:db8::77" if family.v6 else "192.0.2.77"


def test_exchange_stays_with_the_guests_address(guest: Guest, family: Family, peer: Peer) -> None:
    """Whatever other address of its own the guest uses meanwhile, for other things: hosts with IPv6 have several."""
    with forwarded(guest, family, 4500) as port:
        peer.sock.sendto(b"question", (family.loopback, port))
        guest.receive(is_udp)
        guest.send(guest.udp(family, 4500, peer.port, b"answer"))
        assert peer.read() == b"answer"
        guest.send(guest.udp(family, 9, 9, b"x", src=other_address(family)))
        peer.write(b"more")
        assert ends(guest.receive(is_udp), family)[2] == family.guest
        # Who has not been answered from an address gets to that which is in use.
        with Peer(family) as new:
            new.sock.sendto(b"first", (family.loopback, port))
            assert ends(guest.receive(is_udp), family)[2] == other_address(family)
        # And so does who the guest has not answered for long.
        for _ in range(4):
            guest.engine.advance(50 * SECOND)
            peer.write(b"more")
            where = ends(guest.receive(is_udp), family)[2]
        assert where == other_address(family)


def test_two_addresses_of_the_guests_to_one_peer(guest: Guest, family: Family, peer: Peer) -> None:
    """One socket, so it cannot be told which is meant: the one that the guest used last."""
    with forwarded(guest, family, 4500):
        for source in (family.guest, other_address(family)) * 2:
            guest.send(guest.udp(family, 4500, peer.port, b"call", src=source))
            peer.read()
            peer.write(b"answer")
            assert ends(guest.receive(is_udp), family)[2] == source
    assert guest.engine.counters()["flows"] == 2


def test_exchange_when_the_guest_gets_another_address(guest: Guest, family: Family, peer: Peer) -> None:
    new = other_address(family)
    with forwarded(guest, family, 4500) as port:
        peer.sock.sendto(b"question", (family.loopback, port))
        guest.receive(is_udp)
        guest.send(guest.udp(family, 4500, peer.port, b"answer"))
        peer.read()
        guest.configure(**{"addr6" if family.v6 else "addr4": address(new)})
        guest.send(guest.udp(family, 9, 9, b"x", src=new))
        peer.write(b"more")
        assert ends(guest.receive(is_udp), family)[2] == new


def test_names_change(guest: Guest, family: Family, peer: Peer) -> None:
    """What the guest has begun goes on, when the host is called otherwise from now on."""
    meet(guest, peer)
    router = "2001:db8::fe" if family.v6 else "192.0.2.254"
    guest.configure(maps=[(address(router), 0, address(family.loopback), 0)])
    guest.send(guest.udp(family, 5000, peer.port, b"again"))
    assert peer.read() == b"again"
    peer.write(b"yes")
    assert ends(guest.receive(is_udp), family) == (family.gateway, peer.port, family.guest, 5000)


def test_two_names_of_one_peer(guest: Guest, family: Family, peer: Peer) -> None:
    other = "2001:db8::53" if family.v6 else "192.0.2.53"
    guest.configure(maps=[(address(name), 0, address(family.loopback), 0) for name in (family.gateway, other)])
    for name in (family.gateway, other) * 2:
        guest.send(guest.udp(family, 5000, peer.port, b"call", dst=name))
        peer.read()
        peer.write(b"answer")
        assert ends(guest.receive(is_udp), family)[0] == name


def test_guest_without_an_address_yet(family: Family, peer: Peer) -> None:
    with Guest() as guest, forwarded(guest, family, 53) as port:
        guest.configure(**{"addr6" if family.v6 else "addr4": None})
        peer.sock.sendto(b"x", (family.loopback, port))
        guest.barrier()
        assert guest.look(is_udp, 0.05) is None
        guest.configure()
        peer.sock.sendto(b"y", (family.loopback, port))
        assert guest.receive(is_udp).payload == b"y"
        assert guest.drops("unreachable") == 1


def test_port_that_goes_while_another_has_datagrams_in_hand(family: Family, peer: Peer) -> None:
    """Who was called from a port of the guest's own asks at the forwarded one: nothing is left of the former."""
    with Guest(PLAIN, rx=()) as guest, forwarded(guest, family, 4500, family.loopback) as port:
        guest.refill = False
        guest.send(guest.udp(family, 4500, peer.port, b"call"))
        assert peer.read() == b"call"
        assert peer.guest[1] != port
        with Peer(family) as stranger, Peer(family) as last:
            stranger.sock.sendto(bytes(4000), (family.loopback, port))
            peer.sock.sendto(b"ask", (family.loopback, port))
            guest.barrier()
            guest.post((2048,), publish=False)
            guest.post((2048,), publish=False)
            guest.rx.publish(2)
            guest.barrier()  # both are in hand, and a fragment is left of the first
            time.sleep(0.02)  # the thread sleeps
            guest.post((2048,), publish=False)
            guest.post((2048,), publish=False)
            guest.memory.store16(guest.rx.avail + 2, guest.rx.avail_idx)  # seen when something else happens:
            peer.write(b"late")  # to the port of the guest's own
            guest.send(guest.udp(family, 5000, last.port, b"call"))  # and one takes its place in the table
            guest.barrier()
            frames = guest.collect()
            assert [frame.fragment is not None for frame in frames] == [True, True, True, False]
            assert frames[3].payload == b"ask"
            assert last.read() == b"call"
            for _ in range(5):
                last.write(b"answer")
                stranger.sock.sendto(b"more", (family.loopback, port))
                guest.barrier()
                guest.post((2048,))
                guest.post((2048,))
                assert {guest.receive(is_udp).payload for _ in range(2)} == {b"answer", b"more"}


@pytest.mark.parametrize("place", ["everywhere", "one_address"])
def test_flood_from_outside_leaves_room_for_the_guest(family: Family, place: str) -> None:
    """Flows that strangers open are a quarter of the table at most; beyond that they are served without one."""
    where = None if place == "everywhere" else family.loopback
    with Guest(max_flows=64) as guest, forwarded(guest, family, 53, where) as port, contextlib.ExitStack() as stack:
        peers = [stack.enter_context(Peer(family)) for _ in range(40)]
        for n, one in enumerate(peers):
            one.sock.sendto(struct.pack("!H", n), (family.loopback, port))
            assert guest.receive(is_udp).payload == struct.pack("!H", n)
        assert guest.engine.counters()["flows"] == 16
        for n, one in enumerate(peers[:32]):
            guest.send(guest.udp(family, 53, one.port, struct.pack("!H", n)))
            assert one.read() == struct.pack("!H", n)
            assert one.guest[1] == port


def test_next_guest_gets_nothing_of_the_last(family: Family, peer: Peer) -> None:
    """Neither what waits at a forwarded port, nor what was taken from it and found no room."""
    with Guest(rx=((2048,),)) as guest, forwarded(guest, family, 9) as port:
        guest.refill = False
        for n in range(20):
            peer.sock.sendto(bytes([n]), (family.loopback, port))
        assert guest.receive(is_udp).payload == b"\0"
        guest.barrier()
        guest.engine.close_flows()
        for _ in range(30):
            guest.post((2048,))
        assert guest.look(is_udp, 0.05) is None
        peer.sock.sendto(b"new", (family.loopback, port))
        assert guest.receive(is_udp).payload == b"new"


def test_what_came_while_there_was_no_guest_is_for_nobody(family: Family, peer: Peer) -> None:
    with Guest() as guest, forwarded(guest, family, 9) as port:
        guest.engine.park()
        for n in range(20):
            peer.sock.sendto(bytes([n]), (family.loopback, port))
        guest.engine.drain_forwards()
        guest.engine.unpark()
        peer.sock.sendto(b"new", (family.loopback, port))
        assert guest.receive(is_udp).payload == b"new"


# ---- how long it is remembered


def test_times(guest: Guest, family: Family, peer: Peer) -> None:
    meet(guest, peer)
    guest.engine.advance(170 * SECOND)
    peer.write(b"still")
    assert guest.receive(is_udp).payload == b"still"
    guest.engine.advance(170 * SECOND)  # since the last datagram, of either side
    peer.write(b"there")
    assert guest.receive(is_udp).payload == b"there"
    guest.engine.advance(181 * SECOND)
    guest.barrier()
    assert guest.engine.counters()["flows"] == 0
    peer.write(b"late")  # the socket is closed, and the kernel says so
    peer.sock.connect(peer.guest)
    with pytest.raises(ConnectionRefusedError):
        sent_until_refused(peer.sock)


def sent_until_refused(sock: socket.socket) -> None:
    for _ in range(100):
        sock.send(b"too late")


def test_flow_that_the_guest_never_answers(guest: Guest, family: Family, peer: Peer) -> None:
    with forwarded(guest, family, 9) as port:
        peer.sock.sendto(b"x", (family.loopback, port))
        guest.receive(is_udp)
        guest.engine.advance(31 * SECOND)
        guest.barrier()
        assert guest.engine.counters()["flows"] == 0
        peer.sock.sendto(b"y", (family.loopback, port))  # the port itself stays
        assert guest.receive(is_udp).payload == b"y"
        guest.send(guest.udp(family, 9, peer.port, b"z"))
        guest.engine.advance(31 * SECOND)
        guest.barrier()
        assert guest.engine.counters()["flows"] == 1


# ---- what goes along


def control(sock: socket.socket) -> dict[tuple[int, int], int]:
    """The control messages of the next datagram."""
    _, found, _, _ = sock.recvmsg(65536, 256)
    return {(level, kind): int.from_bytes(data[:4], "little") for level, kind, data in found}


def test_hop_limit_and_traffic_class(guest: Guest, family: Family, peer: Peer) -> None:
    if family.v6:
        level, ttl, tos = socket.IPPROTO_IPV6, IPV6_HOPLIMIT, IPV6_TCLASS
        peer.sock.setsockopt(level, IPV6_RECVHOPLIMIT, 1)
        peer.sock.setsockopt(level, IPV6_RECVTCLASS, 1)
        names = ("hlim", "tc")
    else:
        level, ttl, tos = socket.IPPROTO_IP, socket.IP_TTL, socket.IP_TOS
        peer.sock.setsockopt(level, IP_RECVTTL, 1)
        peer.sock.setsockopt(level, IP_RECVTOS, 1)
        names = ("ttl", "tos")
    for hops, value in ((64, 0), (1, 0), (255, 0xB8), (64, 2), (64, 1)):
        guest.send(guest.udp(family, 5000, peer.port, b"x", **dict(zip(names, (hops, value), strict=True))))
        got = control(peer.sock)
        assert (got[level, ttl], got[level, tos] & 0xFF) == (hops, value)
    # In one batch too: each as it was sent.
    batch = [(3, 0), (4, 0), (5, 0x20)]
    guest.send_all([guest.udp(family, 5000, peer.port, b"x", **dict(zip(names, one, strict=True))) for one in batch])
    found = [control(peer.sock) for _ in batch]
    assert [(got[level, ttl], got[level, tos] & 0xFF) for got in found] == batch


def test_both_families_through_one_socket(guest: Guest) -> None:
    """What one family's datagram had set counts for the other's too."""
    with Peer(V6) as six, Peer(V4) as four, forwarded(guest, V4, 5353):
        four.sock.setsockopt(socket.IPPROTO_IP, IP_RECVTTL, 1)
        four.sock.setsockopt(socket.IPPROTO_IP, IP_RECVTOS, 1)
        six.sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVHOPLIMIT, 1)
        six.sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVTCLASS, 1)
        for hops, value in ((255, 0xB8), (7, 0)):
            guest.send(guest.udp(V6, 5353, six.port, b"x", hlim=hops, tc=value))
            got = control(six.sock)
            assert (got[socket.IPPROTO_IPV6, IPV6_HOPLIMIT], got[socket.IPPROTO_IPV6, IPV6_TCLASS]) == (hops, value)
            guest.send(guest.udp(V4, 5353, four.port, b"x", ttl=hops, tos=value))
            got = control(four.sock)
            assert (got[socket.IPPROTO_IP, socket.IP_TTL], got[socket.IPPROTO_IP, socket.IP_TOS] & 0xFF) == (
                hops,
                value,
            )


def test_traffic_class_to_the_guest(guest: Guest, family: Family, peer: Peer) -> None:
    meet(guest, peer)
    if family.v6:
        peer.sock.setsockopt(socket.IPPROTO_IPV6, IPV6_TCLASS, 0xBA)
    else:
        peer.sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0xBA)
    peer.write(b"x")
    ip = guest.receive(is_udp).ether[IPv6 if family.v6 else IP]
    assert (ip.tc if family.v6 else ip.tos) == 0xBA


def test_outbound_address(family: Family) -> None:
    """Where the guest's datagrams are to leave from is not where those to the loopback do."""
    with Namespace("outbound") as space, space.enter():
        nodad = " nodad" if family.v6 else ""
        for last in (1, 2):
            space.ip(f"addr add {f'2001:db8:7::{last}/64' if family.v6 else f'198.51.100.{last}/24'} dev lo{nodad}")
        chosen = "2001:db8:7::2" if family.v6 else "198.51.100.2"
        other = "2001:db8:7::1" if family.v6 else "198.51.100.1"
        with Guest() as guest, socket.socket(family.af, socket.SOCK_DGRAM) as sock, Peer(family) as near:
            guest.configure(**{"outbound6" if family.v6 else "outbound4": address(chosen)})
            sock.bind((other, 0))
            sock.settimeout(10)
            guest.send(guest.udp(family, 5000, sock.getsockname()[1], b"x", dst=other))
            assert sock.recvfrom(10)[1][0] == chosen
            guest.send(guest.udp(family, 5000, near.port, b"x"))
            assert near.read() == b"x"
            assert near.guest[0] == family.loopback


# ---- multicast and broadcast


@pytest.mark.parametrize(
    ("family", "where"), [(V4, "multicast"), (V4, "subnet"), (V4, "limited"), (V6, "multicast")], ids=str
)
def test_to_many(family: Family, where: str) -> None:
    group = {"multicast": "ff02::fb" if family.v6 else "224.0.0.251", "subnet": "192.0.2.255"}.get(
        where, "255.255.255.255"
    )
    with Namespace("many") as space, space.enter():
        space.ip("link add d0 type veth peer name d1")
        space.ip("link set d0 up")
        space.ip("link set d1 up")
        space.ip("addr add 192.0.2.10/24 dev d0")
        space.ip("addr add 2001:db8::10/64 dev d0")
        index = socket.if_nametoindex("d0")
        with Guest() as guest, socket.socket(family.af, socket.SOCK_DGRAM) as member:
            guest.configure(ifindex4=index, ifindex=index, broadcast4=address("192.0.2.255"))
            member.settimeout(10)
            # The host itself is a member: its own multicast comes back to it.
            if family.v6:
                member.setsockopt(
                    socket.IPPROTO_IPV6,
                    socket.IPV6_JOIN_GROUP,
                    socket.inet_pton(family.af, group) + struct.pack("@I", index),
                )
            elif where == "multicast":
                member.setsockopt(
                    socket.IPPROTO_IP,
                    socket.IP_ADD_MEMBERSHIP,
                    socket.inet_aton(group) + socket.inet_aton("192.0.2.10"),
                )
            member.bind(("", 0))
            port = member.getsockname()[1]
            guest.send(guest.udp(family, 5353, port, b"who?", dst=group))
            data, asker = member.recvfrom(100)
            assert data == b"who?"
            # Any address may answer, and from another port.
            with socket.socket(family.af, socket.SOCK_DGRAM) as answering:
                answering.bind((family.loopback if not family.v6 else "::", 0))
                answering.sendto(b"me", (*asker[:2], 0, index) if family.v6 else asker)
                frame = guest.receive(is_udp)
                assert frame.payload == b"me"
                assert frame.ether[UDP].sport == answering.getsockname()[1]
                assert frame.ether[UDP].dport == 5353
            # Who was not asked still is not heard at another port of the guest's.
            guest.send(guest.udp(family, 6000, port, b"x", dst=group))
            assert member.recvfrom(10)[1][1] == port_of(guest, 6000, asker, member)


def port_of(guest: Guest, own: int, asker: tuple[str, int], member: socket.socket) -> int:
    """The host's port for another one of the guest's: sent again, it is the same, and it is not the asker's."""
    guest.barrier()
    sent = [flow for flow in guest.engine.flows() if flow["guest"][1] == own]
    assert len(sent) == 1
    frame_to = sent[0]["remote"]
    assert frame_to[1] == member.getsockname()[1]
    guest.send(guest.udp(V6 if frame_to[0][:10] != bytes(10) else V4, own, frame_to[1], b"x", dst=name(frame_to[0])))
    where = member.recvfrom(10)[1]
    assert where[1] != asker[1]
    return int(where[1])


def name(packed: bytes) -> str:
    if packed[:12] == bytes(10) + b"\xff\xff":
        return socket.inet_ntop(socket.AF_INET, packed[12:])
    return socket.inet_ntop(socket.AF_INET6, packed)


# ---- batches


def numbered(count: int, size: int) -> list[bytes]:
    return [struct.pack("!I", n) + pattern(size - 4, n) for n in range(count)]


@pytest.mark.parametrize("size", [4, 100, 1400])
def test_batch_arrives_as_it_was_sent(guest: Guest, family: Family, peer: Peer, size: int) -> None:
    """What is joined for the kernel's sake is apart again, in its order."""
    datagrams = numbered(120, size)
    peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    guest.send_all([guest.udp(family, 5000, peer.port, data) for data in datagrams])
    assert [peer.read() for _ in datagrams] == datagrams
    assert guest.drops("send") == 0


def test_batch_of_all_sizes_and_peers(guest: Guest, family: Family) -> None:
    sizes = [100, 100, 50, 100, 100, 0, 0, 100, 101, 101, 1, 1, 1400, 1400, 1400, 1399, 0, 7]
    with Peer(family) as one, Peer(family) as two:
        frames, expected = [], {one.port: list[bytes](), two.port: list[bytes]()}
        for n, size in enumerate(sizes * 3):
            port = one.port if n % 5 else two.port
            expected[port].append(pattern(size, n))
            frames.append(guest.udp(family, 5000 + (n // 20), port, pattern(size, n)))
        guest.send_all(frames)
        for it in (one, two):
            got = [it.read() for _ in expected[it.port]]
            assert sorted(got) == sorted(expected[it.port])


def test_frame_that_the_kernel_cuts_up(family: Family, peer: Peer) -> None:
    """VIRTIO_NET_F_HOST_USO: one frame of the guest's is several datagrams."""
    with Guest(FULL | USO) as guest:
        data = pattern(14 * 1000 + 3)
        header = struct.pack("<BBHHHHH", 0, 5, 14 + family.ip_size + 8, 1000, 0, 0, 0)
        frame = header + bytes(guest.udp(family, 5000, peer.port, data))
        for sizes in ([], [1, 2, 1, 1, 3, 30, 700]):
            guest.send_parts(guest.layout(frame, sizes))
            assert [peer.read() for _ in range(15)] == [data[at : at + 1000] for at in range(0, len(data), 1000)]
        # So many that each would be a call of the kernel's.
        guest.send_parts(guest.layout(frame[:4] + struct.pack("<H", 27) + frame[6:], []))
        assert guest.drops("malformed") == 1
        # A size that is nonsense, or was not negotiated, is not followed.
        for size in (0, 60000):
            wrong = frame[:4] + struct.pack("<H", size) + frame[6:]
            guest.send_parts(guest.layout(wrong, []))
            assert peer.read() == data
        with Guest(FULL) as other:
            other.send_parts(other.layout(frame, []))
            assert peer.read() == data


@pytest.mark.parametrize("features", [FULL | USO, FULL, PLAIN], ids=["uso", "full", "plain"])
def test_joined_by_the_kernel(family: Family, features: int) -> None:
    """What comes joined is one frame for a guest that can cut it up (VIRTIO_NET_F_GUEST_USO), else several."""
    data = pattern(20 * 1000 + 5)
    with Guest(features) as guest, Peer(family) as peer:
        meet(guest, peer)
        peer.sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1000)
        peer.write(data)
        frame = guest.receive(is_udp)
        if features & USO:
            assert (frame.gso, frame.gso_size, frame.payload) == (5, 1000, data)
            return
        got = [frame.payload] + [guest.receive(is_udp).payload for _ in range(20)]
        assert got == [data[at : at + 1000] for at in range(0, len(data), 1000)]


def test_joined_of_what_the_guest_gets_in_fragments(family: Family) -> None:
    """A frame that it cuts up itself does not become frames beyond its MTU."""
    with Guest(FULL | USO, mtu=1500) as guest, Peer(family) as peer:
        meet(guest, peer)
        peer.sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 3000)
        peer.write(pattern(9000))
        frames = [guest.receive() for _ in range(9)]
        assert [frame.fragment.more for frame in frames if frame.fragment] == [True, True, False] * 3
        assert max(len(frame.raw) for frame in frames) <= 14 + 1500


@pytest.mark.parametrize("features", [FULL | USO, FULL], ids=["uso", "full"])
def test_joined_where_the_ring_is_short(family: Family, features: int) -> None:
    data = pattern(30 * 1000)
    with Guest(features, rx=((2048,),) * 4) as guest, Peer(family) as peer:
        meet(guest, peer)
        guest.refill = False
        peer.sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1000)
        peer.write(data)
        got = b""
        for _ in range(30):
            got += guest.receive(is_udp).payload
            guest.post((2048,))
            if len(got) == len(data):
                break
        assert got == data
        assert guest.drops("ring_full") == 0


# ---- what goes wrong


@pytest.fixture
def lan() -> Iterator[Namespace]:
    """A host with a link, and a second address there that can go."""
    with Namespace("lan") as space, space.enter():
        space.ip("link add d0 type veth peer name d1")
        space.ip("link set d0 up")
        space.ip("link set d1 up")
        space.ip("addr add 192.0.2.10/24 brd + dev d0")
        space.ip("addr add 198.51.100.1/24 dev d0")
        yield space


def many_of(guest: Guest) -> None:
    index = socket.if_nametoindex("d0")
    guest.configure(ifindex4=index, ifindex=index, broadcast4=address("192.0.2.255"))


@pytest.mark.parametrize("group", ["224.0.0.251", "192.0.2.255"])
def test_to_many_from_a_forwarded_port(lan: Namespace, group: str) -> None:
    with Guest() as guest, forwarded(guest, V4, 5353) as port:
        many_of(guest)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as member_sock:
            if group.startswith("224"):
                member_sock.setsockopt(
                    socket.IPPROTO_IP,
                    socket.IP_ADD_MEMBERSHIP,
                    socket.inet_aton(group) + socket.inet_aton("192.0.2.10"),
                )
            member_sock.settimeout(10)
            member_sock.bind(("", 0))
            guest.send(guest.udp(V4, 5353, member_sock.getsockname()[1], b"who?", dst=group))
            data, where = member_sock.recvfrom(100)
            assert (data, where[1]) == (b"who?", port)


@pytest.mark.parametrize("where", [None, "0.0.0.0"], ids=["both_versions", "ipv4"])
def test_answer_to_a_broadcast(lan: Namespace, where: str | None) -> None:
    """The answer cannot come from where the question went: it comes from the host's address there."""
    with Guest() as guest, forwarded(guest, V4, 5353, where) as port:
        many_of(guest)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(("198.51.100.1", 0))
            sock.settimeout(10)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            sock.sendto(b"who?", ("192.0.2.255", port))
            frame = guest.receive(is_udp)
            guest.send(guest.udp(V4, 5353, frame.ether[UDP].sport, b"me", dst=frame.ether[IP].src))
            data, answering = sock.recvfrom(10)
            assert (data, answering[1]) == (b"me", port)
        assert guest.drops("send") == 0


@pytest.mark.parametrize("where", [None, "0.0.0.0"], ids=["both_versions", "ipv4"])
def test_address_that_was_asked_is_gone(lan: Namespace, where: str | None) -> None:
    with Guest() as guest, forwarded(guest, V4, 53, where) as port:
        many_of(guest)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(("192.0.2.10", 0))
            sock.settimeout(10)
            sock.sendto(b"x", ("198.51.100.1", port))
            frame = guest.receive(is_udp)
            answer = guest.udp(V4, 53, frame.ether[UDP].sport, b"y", dst=frame.ether[IP].src)
            guest.send(answer)
            assert sock.recvfrom(10) == (b"y", ("198.51.100.1", port))
            lan.ip("addr del 198.51.100.1/24 dev d0")
            guest.send(answer)
            assert sock.recvfrom(10) == (b"y", ("192.0.2.10", port))


@pytest.mark.parametrize("where", [None, "0.0.0.0"], ids=["both_versions", "ipv4"])
def test_refused_for_another_reason(lan: Namespace, where: str | None) -> None:
    """What the kernel refuses not for its source still leaves from where the question went, and so does the next."""
    with (
        Guest(FULL | USO) as guest,
        forwarded(guest, V4, 53, where) as port,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking,
    ):
        asking.bind(("192.0.2.10", 0))
        asking.settimeout(10)
        asking.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        asking.sendto(b"?", ("198.51.100.1", port))
        question = guest.receive(is_udp).ether
        # More datagrams than the kernel makes of one message: it is sent in pieces.
        data = pattern(2000)
        frame = guest.udp(V4, 53, question[UDP].sport, data, dst=question[IP].src)
        guest.send_parts(guest.layout(struct.pack("<BBHHHHH", 0, 5, 42, 10, 0, 0, 0) + bytes(frame), []))
        answers = [asking.recvfrom(100) for _ in range(200)]
        assert b"".join(piece for piece, _ in answers) == data
        assert {source for _, source in answers} == {("198.51.100.1", port)}
        guest.send(guest.udp(V4, 53, question[UDP].sport, b"!", dst=question[IP].src))
        assert asking.recvfrom(100) == (b"!", ("198.51.100.1", port))


def test_same_address_on_two_links() -> None:
    """Link-local addresses are a link's own: who asked last gets the answer."""
    with Namespace("links") as space, contextlib.ExitStack() as stack:
        peers = [stack.enter_context(Namespace(f"link{n}")) for n in (1, 2)]
        for n, peer in enumerate(peers, 1):
            space.ip(f"link add a{n} type veth peer name b0 netns {peer.path}")
            space.ip(f"link set a{n} up")
            space.ip(f"addr add fe80::{n}00/64 dev a{n} nodad")
            peer.ip("link set b0 up")
            peer.ip("addr add fe80::5/64 dev b0 nodad")
        with space.enter():
            guest = stack.enter_context(Guest())
            port = stack.enter_context(forwarded(guest, V6, 53))
        guest.send(guest.udp(V6, 1, 9, b"x", src="fe80::10"))  # its address there
        for n, peer in enumerate(peers, 1):
            with peer.enter():
                sock = stack.enter_context(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
                link = socket.if_nametoindex("b0")
            sock.settimeout(10)
            sock.bind(("fe80::5", 7777, 0, link))
            sock.sendto(b"?", (f"fe80::{n}00", port, 0, link))
            question = guest.receive(is_udp).ether
            assert question[IPv6].src == "fe80::5"
            guest.send(guest.udp(V6, 53, 7777, b"!", src="fe80::10", dst="fe80::5"))
            assert sock.recv(10) == b"!"


@pytest.mark.parametrize("own_address", [V4.guest, "192.0.2.77"], ids=["the_hosts", "another"])
def test_own_broadcast_does_not_come_back(lan: Namespace, own_address: str) -> None:
    with Guest() as guest, forwarded(guest, V4, 9999, "0.0.0.0") as port:
        many_of(guest)
        guest.configure(
            addr4=address(own_address),
            ifindex4=socket.if_nametoindex("d0"),
            broadcast4=address("192.0.2.255"),
        )
        for own in (9999, 6000):
            guest.send(guest.udp(V4, own, port, b"hello", src=own_address, dst="192.0.2.255"))
        guest.barrier()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            other.bind(("192.0.2.10", 0))  # of the host, but not the guest's
            other.sendto(b"others", ("192.0.2.255", port))
            assert guest.receive(is_udp).payload == b"others"
        assert guest.look(is_udp, 0.05) is None


def test_datagrams_leave_descriptors_for_connections(family: Family, peer: Peer) -> None:
    with Guest() as guest, socket.create_server((family.loopback, 0), family=family.af) as server:
        guest.engine.limit_flows(16)
        for n in range(16):
            guest.send(guest.udp(family, 6000 + n, peer.port, b"x"))
            assert peer.read() == b"x"
        counters = guest.engine.counters()
        assert (counters["flows"], counters["flows_recycled"]) == (9, 7)
        Conn(guest, family, server.getsockname()[1]).connect()


def test_forwarded_ports_and_datagrams_leave_places_for_connections(family: Family) -> None:
    with (
        Guest(max_flows=128) as guest,
        contextlib.ExitStack() as stack,
        socket.create_server((family.loopback, 0), family=family.af) as server,
    ):
        for n in range(80):
            stack.enter_context(forwarded(guest, family, 1000 + n, family.loopback))
        guest.send_all([guest.udp(family, 5000, 1 + n, b"x") for n in range(64)])
        assert guest.engine.counters()["flows"] == 24
        Conn(guest, family, server.getsockname()[1]).connect()


def test_hop_limit_of_zero_goes_nowhere(guest: Guest, family: Family, peer: Peer) -> None:
    guest.send(guest.udp(family, 5000, peer.port, b"x", **{"hlim" if family.v6 else "ttl": 0}))
    assert guest.drops("malformed") == 1
    assert guest.engine.counters()["flows"] == 0
