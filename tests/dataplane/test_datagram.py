# SPDX-License-Identifier: GPL-2.0-or-later
"""UDP and ping, and the frames of neither that go to the control thread."""

from __future__ import annotations

import ipaddress
import select
import socket
import struct
from collections.abc import Iterator

import pytest
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import ICMPv6EchoReply, ICMPv6EchoRequest, ICMPv6ND_NS, IPv6
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Raw

from godwit.lab.netns import Namespace

from .driver import (
    EVENT_IDX,
    FULL,
    GUEST_MAC,
    OUR_MAC,
    PLAIN,
    PROTOCOL_FEATURES,
    V4,
    V6,
    VERSION_1,
    Family,
    Frame,
    Guest,
    Part,
    address,
    is_echo_reply,
    other_frame,
    pattern,
    wait_until,
)

LEGACY = PROTOCOL_FEATURES  # no feature at all: the virtio header is of 10 bytes
SINGLE = PROTOCOL_FEATURES | VERSION_1 | EVENT_IDX  # a frame goes into one buffer, whatever its size
ETHERNET = 12 + 1514  # a buffer as drivers have without mergeable ones and TSO


class Peer:
    """A UDP socket of the host's."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.sock = socket.socket(family.af, socket.SOCK_DGRAM)
        self.sock.bind((family.loopback, 0))
        self.sock.settimeout(10)
        self.port: int = self.sock.getsockname()[1]
        self.guest: tuple[str, int] = ("", 0)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.sock.close()

    def read(self) -> bytes:
        data, where = self.sock.recvfrom(65536)
        self.guest = where[:2]
        return data

    def write(self, data: bytes) -> None:
        self.sock.sendto(data, self.guest)


@pytest.fixture
def peer(family: Family) -> Iterator[Peer]:
    with Peer(family) as it:
        yield it


def meet(guest: Guest, peer: Peer, own: int = 5000) -> None:
    """Have the guest open a flow."""
    guest.send(guest.udp(peer.family, own, peer.port, b"hello"))
    assert peer.read() == b"hello"


def is_udp(frame: Frame) -> bool:
    return UDP in frame.ether


# ---- UDP


def sizes(family: Family) -> list[int]:
    """Around all that is a limit: nothing, a segment, the buffers first picked, what IP can say."""
    most = 65535 - 8 - (0 if family.v6 else 20)
    return [0, 1, 2, 1000, 1473, 2005, 2006, 2047, 2048, 2049, 4096, 30001, most - 1, most]


def test_sizes_from_the_guest(guest: Guest, family: Family, peer: Peer) -> None:
    loopback = 65536 - 48  # what it takes in one piece, and IPv6 is not cut up on the way
    for size in (min(size, loopback) if family.v6 else size for size in sizes(family)):
        data = pattern(size, size)
        guest.send(guest.udp(family, 5000, peer.port, data))
        assert peer.read() == data
    guest.send(guest.udp(family, 5000, peer.port, b"split"), sizes=[12, 14, family.ip_size, 3, 5, 1, 2])
    assert peer.read() == b"split"


@pytest.mark.parametrize(
    ("features", "rx"),
    [
        pytest.param(FULL, ((2048,),) * 64, id="mergeable"),
        pytest.param(FULL, ((1, 11, 14, 6, 34, 8, 100),) * 250, id="mergeable_scraps"),
        pytest.param(PLAIN, ((1526,),) * 64, id="plain"),
        pytest.param(PLAIN, ((2101,), (17, 1), (333,)) * 64, id="plain_odd"),
        pytest.param(SINGLE, ((12 + 14 + 65575,),) * 2, id="single"),
        pytest.param(SINGLE, ((12, 14 + 65575),) * 2, id="single_in_two"),
        pytest.param(LEGACY, ((10 + 14 + 65575,),) * 2, id="legacy"),
    ],
)
def test_sizes_to_the_guest(features: int, rx: tuple[tuple[int, ...], ...], family: Family, peer: Peer) -> None:
    with Guest(features, rx=rx, num=2048, mtu=0) as guest:
        meet(guest, peer)
        for size in sizes(family):
            data = pattern(size, size)
            if rx[0][0] == 1 and size > 20000:
                continue  # in so many parts it is more than a chain may have
            peer.write(data)
            frame = guest.receive(is_udp)
            assert frame.payload == data
            assert (frame.ether[UDP].sport, frame.ether[UDP].dport) == (peer.port, 5000)
            ip = frame.ether[IPv6 if family.v6 else IP]
            assert (ip.src, ip.dst) == (family.gateway, family.guest)
        assert guest.drops("ring_full") == 0


def test_buffers_of_one_ethernet_frame_each(family: Family, peer: Peer) -> None:
    """What is larger is dropped where the guest was told no MTU, and what comes after it is not held up."""
    with Guest(SINGLE, rx=((ETHERNET,),) * 8, mtu=0) as guest:
        meet(guest, peer)
        most = 1500 - family.ip_size - 8
        for size in (0, 100, most, most + 1, 2048, 9000, 60000, most, 1):
            peer.write(pattern(size))
        for size in (0, 100, most, most, 1):
            assert guest.receive(is_udp).payload == pattern(size)
        assert guest.drops("ring_full") == 4


def test_small_datagram_into_the_last_buffer(family: Family, peer: Peer) -> None:
    """A datagram needs room for itself, not for the largest that might have come."""
    with Guest(rx=((200,),)) as guest:
        guest.refill = False
        meet(guest, peer)
        peer.write(b"one")
        assert guest.receive(is_udp).payload == b"one"
        peer.write(b"two")  # there is no buffer: it waits in the socket
        guest.barrier()
        assert guest.collect() == []
        guest.post((200,))
        assert guest.receive(is_udp).payload == b"two"
        guest.post((200,))
        peer.write(pattern(1000))  # too large for what there is: more buffers may come
        guest.barrier()
        assert guest.collect() == []
        for _ in range(5):
            guest.post((200,))
        assert guest.receive(is_udp).payload == pattern(1000)
        assert guest.drops("ring_full") == 0


def test_buffers_that_come_while_the_ring_is_looked_at(family: Family, peer: Peer) -> None:
    """None is overlooked: the guest adds each when it likes, and nothing else wakes the data plane."""
    with Guest(rx=()) as guest:
        meet(guest, peer)
        guest.refill = False
        for n in range(500):
            peer.write(pattern(1000, n))
            for _ in range(6):
                guest.post((200,))
            assert guest.receive(is_udp).payload == pattern(1000, n)


def test_datagram_too_large_for_what_the_ring_has(family: Family, peer: Peer) -> None:
    with Guest(rx=((2048,),) * 4, mtu=0) as guest:
        meet(guest, peer)
        peer.write(pattern(60000))
        peer.write(b"small")
        assert guest.receive(is_udp).payload == b"small"
        assert guest.drops("ring_full") == 1


@pytest.mark.parametrize(("size", "count"), [(8000, 60), (60000, 12)])
def test_large_ones_wait_for_their_turn(family: Family, peer: Peer, size: int, count: int) -> None:
    """What the ring has no room for now, but will have, stays in the socket."""
    with Guest(mtu=65520) as guest:
        meet(guest, peer)
        with guest.engine.parked():
            for n in range(count):
                peer.write(pattern(size, n))
        for n in range(count):
            assert guest.receive(is_udp).payload == pattern(size, n)
        assert guest.drops("ring_full") == 0


def test_many_at_once_come_in_order(guest: Guest, family: Family, peer: Peer) -> None:
    """More than one look at the socket takes, and more than the ring has buffers."""
    meet(guest, peer)
    guest.refill = False
    guest.engine.park()
    for n in range(200):
        peer.write(struct.pack("!I", n))
    guest.engine.unpark()
    got = [guest.receive(is_udp) for _ in range(64)]  # two buffers each of 128
    guest.refill = True
    for _ in range(64):
        guest.post((2048,))
    got += [guest.receive(is_udp) for _ in range(136)]
    assert [struct.unpack("!I", frame.payload)[0] for frame in got] == list(range(200))


def test_many_at_once_need_no_kick(family: Family, peer: Peer) -> None:
    """Buffers that are there are used, though the guest adds none."""
    with Guest(num=1024, rx=((2048,),) * 600) as guest:
        meet(guest, peer)
        guest.refill = False
        guest.engine.park()
        for n in range(250):
            peer.write(struct.pack("!I", n))
        guest.engine.unpark()
        got = [guest.receive(is_udp) for _ in range(250)]
        assert [struct.unpack("!I", frame.payload)[0] for frame in got] == list(range(250))


def test_flows_are_told_apart(guest: Guest, family: Family) -> None:
    with Peer(family) as one, Peer(family) as two:
        for own in (5000, 5001):
            for peer in (one, two):
                guest.send(guest.udp(family, own, peer.port, struct.pack("!H", own)))
        seen = {}
        for peer in (one, two):
            for _ in range(2):
                own = struct.unpack("!H", peer.read())[0]
                seen[peer.port, own] = peer.guest
                peer.write(struct.pack("!H", own))
        # One port of the host's for each of the guest's, whoever it talks to (RFC 4787, 4.1).
        assert seen[one.port, 5000] == seen[two.port, 5000] != seen[one.port, 5001] == seen[two.port, 5001]
        for _ in range(4):
            frame = guest.receive(is_udp)
            assert frame.payload == struct.pack("!H", frame.ether[UDP].dport)
        assert guest.engine.counters()["flows"] == 4
        # From a stranger: not to this flow.
        with Peer(family) as stranger:
            stranger.sock.sendto(b"x", seen[one.port, 5000])
            guest.barrier()
            assert guest.look(is_udp, 0.05) is None
            assert guest.drops("no_flow") == 1


def test_refused_datagram_does_no_harm(guest: Guest, family: Family) -> None:
    """The error that an ICMP message leaves at the socket is not the next datagram's."""
    with Peer(family) as peer:
        port = peer.port
    for _ in range(3):
        guest.send(guest.udp(family, 5000, port, b"lost"))
    with socket.socket(family.af, socket.SOCK_DGRAM) as late:
        late.bind((family.loopback, port))
        late.settimeout(10)
        guest.send(guest.udp(family, 5000, port, b"found"))
        data, where = late.recvfrom(100)
        assert data == b"found"
        late.sendto(b"back", where)
        assert guest.receive(is_udp).payload == b"back"
    assert guest.drops("send") == 0


def test_checksum_that_comes_out_as_zero(family: Family, peer: Peer) -> None:
    """Zero would say that there is none (RFC 768), which IPv6 forbids."""
    with Guest(PLAIN) as guest:
        meet(guest, peer)
        peer.write(bytes(2))
        value = guest.receive(is_udp).ether[UDP].chksum
        peer.write(struct.pack("!H", value))
        assert guest.receive(is_udp).ether[UDP].chksum == 0xFFFF


def test_lengths_that_contradict(guest: Guest, family: Family, peer: Peer) -> None:
    for length in (0, 7, 14, 65535):
        frame = guest.udp(family, 5000, peer.port, b"hello")
        frame[UDP].len = length
        guest.send(frame)
    assert guest.drops("malformed") == 4
    frame = guest.udp(family, 5000, peer.port, b"hello")
    frame[UDP].len = 10
    guest.send(frame)  # less than IP says is allowed: what is behind is padding
    assert peer.read() == b"he"
    frame = guest.ip(family)
    frame[IPv6 if family.v6 else IP].setfieldval("nh" if family.v6 else "proto", 17)
    guest.send(frame / Raw(b"1234567"))
    assert guest.drops("short") == 1
    guest.send(bytes(guest.udp(family, 5000, peer.port, b"hello")) + bytes(20))  # padding of Ethernet's
    assert peer.read() == b"hello"


def test_extension_headers(guest: Guest) -> None:
    """Those that a router passes over are passed over."""
    with Peer(V6) as peer:
        datagram = bytes(guest.udp(V6, 5000, peer.port, b"hello"))[54:]
        options = bytes([60, 0, 1, 4, 0, 0, 0, 0]) + bytes([17, 1, 1, 12]) + bytes(12)
        ip = Ether(src=GUEST_MAC, dst=OUR_MAC) / IPv6(src=V6.guest, dst=V6.gateway, nh=0)
        guest.send(ip / Raw(options + datagram))
        assert peer.read() == b"hello"
        for raw, reason in (
            (bytes([17, 255]) + bytes(6) + datagram, "malformed"),  # longer than the packet
            (bytes([0, 0]) + bytes(2), "short"),
            (bytes([0, 0, 1, 4, 0, 0, 0, 0]) * 9 + datagram, "protocol"),  # too many
        ):
            before = guest.drops(reason)
            guest.send(ip / Raw(raw))
            assert guest.drops(reason) == before + 1
        assert peer.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        assert not select.select([peer.sock], [], [], 0)[0]


# ---- ping


@pytest.fixture(params=[FULL, PLAIN], ids=["full", "plain"])
def pinging(request: pytest.FixtureRequest) -> Iterator[Guest]:
    """A guest in a network of its own, for there it may ping (ping_group_range)."""
    with Namespace("dataplane") as space, space.enter(), Guest(request.param, mtu=0) as guest:
        yield guest


def ident(frame: Frame, family: Family) -> tuple[int, int]:
    message = frame.ether[ICMPv6EchoReply if family.v6 else ICMP]
    return message.id, message.seq


def test_ping(pinging: Guest, family: Family) -> None:
    most = 65536 - 48 if family.v6 else 65535 - 28  # the first is what the loopback takes in one piece
    for seq, size in enumerate((0, 1, 56, 1472, 2033, 2040, 2041, 2048, 9001, most - 1, most)):
        pinging.send(pinging.echo(family, 77, seq, pattern(size)))
        frame = pinging.receive(is_echo_reply)
        assert ident(frame, family) == (77, seq)
        assert frame.payload == pattern(size)
        ip = frame.ether[IPv6 if family.v6 else IP]
        assert (ip.src, ip.dst) == (family.gateway, family.guest)
    assert pinging.engine.counters()["flows"] == 1


def test_identifiers_are_the_guests_own(pinging: Guest, family: Family) -> None:
    """Two programs that ping get each its own answers, whatever the kernel calls them."""
    idents = (0, 1, 0x1234, 0xFFFF)
    for seq in (5, 6):
        pinging.send_all([pinging.echo(family, n, seq, struct.pack("!H", n)) for n in idents])
    frames = [pinging.receive(is_echo_reply) for _ in range(8)]
    assert sorted(ident(f, family) for f in frames) == sorted((n, seq) for n in idents for seq in (5, 6))
    assert all(f.payload == struct.pack("!H", ident(f, family)[0]) for f in frames)


@pytest.mark.parametrize("parts", [(12, 14, 20, 3, 2000), (1,) * 90, (12 + 14 + 20 + 4, 500), (12 + 14 + 40 + 1, 500)])
def test_reply_into_parts(family: Family, parts: tuple[int, ...]) -> None:
    """The header of the reply may be cut anywhere."""
    with (
        Namespace("dataplane") as space,
        space.enter(),
        Guest(PLAIN, rx=(parts,) * 4, num=512) as guest,
    ):
        guest.send(guest.echo(family, 9, 1, b"0123456789"), sizes=[12, 14, family.ip_size, 3, 3, 4])
        frame = guest.receive(is_echo_reply)
        assert ident(frame, family) == (9, 1)
        assert frame.payload == b"0123456789"


def test_other_messages_go_nowhere(pinging: Guest, family: Family) -> None:
    message = ICMPv6EchoRequest if family.v6 else ICMP
    for kind in (5, 10, 11, 4, 130 if family.v6 else 0):
        frame = pinging.ip(family) / message(type=kind, code=0) / Raw(bytes(30))
        pinging.send(frame)
    assert pinging.drops("protocol") == 5
    raw = pinging.ip(family)
    raw[IPv6 if family.v6 else IP].setfieldval("nh" if family.v6 else "proto", 58 if family.v6 else 1)
    pinging.send(raw / Raw(b"\x80\0\0\0\0\0\0" if family.v6 else b"\x08\0\0\0\0\0\0"))
    assert pinging.drops("protocol") == 6
    pinging.send(pinging.echo(family, 1, 1, b"", dst="::1" if family.v6 else "127.0.0.1"))
    assert pinging.drops("unreachable") == 1
    assert pinging.engine.counters()["flows"] == 0
    assert pinging.look(is_echo_reply, 0.05) is None


# ---- frames for the control thread, and from it


def test_rare_frames_go_up(guest: Guest) -> None:
    ether = Ether(src=GUEST_MAC, dst="ff:ff:ff:ff:ff:ff")
    frames = [
        bytes(frame)
        for frame in (
            ether / ARP(pdst=V4.gateway),
            ether / IP(src="0.0.0.0", dst="255.255.255.255") / UDP(sport=68, dport=67) / Raw(bytes(300)),
            ether / IPv6(src="fe80::2", dst="ff02::2") / Raw(b"\x85" + bytes(7)),
            ether / IPv6(src="fe80::2", dst="ff02::1:2") / UDP(sport=546, dport=547) / Raw(bytes(50)),
        )
    ]
    frames[2] = frames[2][:20] + b"\x3a" + frames[2][21:]
    for n, frame in enumerate(frames):
        guest.send(frame, sizes=[12, 5, 9][n % 2 :])
    assert select.select([guest.engine.rare_fileno()], [], [], 10)[0]
    assert guest.engine.take_rare() == frames
    assert guest.engine.take_rare() == []


def test_an_address_is_learnt_before_it_is_used(guest: Guest) -> None:
    """From duplicate address detection, unless the guest has been seen to use another."""
    own, other = "2001:db8::67", "2001:db8::68"

    def asks(target: str, source: str = "::") -> bytes:
        ether = Ether(src=GUEST_MAC, dst="33:33:ff:00:00:67")
        return bytes(ether / IPv6(src=source, dst="ff02::1:ff00:67", hlim=255) / ICMPv6ND_NS(tgt=target))

    guest.send(asks("ff02::1"))
    guest.send(asks("2001:db8::1", source="fe80::5"))  # this one looks for a neighbour
    guest.send(
        bytes(Ether(src=GUEST_MAC, dst=OUR_MAC) / IPv6(src="::", dst="ff02::1", nh=58) / Raw(b"\x87" + bytes(7)))
    )
    guest.barrier()
    seen = guest.engine.observed()
    assert ipaddress.ip_address(seen.addr6).is_unspecified
    assert ipaddress.ip_address(seen.addr6_ll) == ipaddress.ip_address("fe80::5")
    guest.send(asks(own))
    guest.send(asks(other))
    guest.send(asks("fe80::6"))
    guest.barrier()
    seen = guest.engine.observed()
    assert ipaddress.ip_address(seen.addr6) == ipaddress.ip_address(own)
    assert ipaddress.ip_address(seen.addr6_ll) == ipaddress.ip_address("fe80::5")


def test_an_address_in_the_prefix_is_the_better_one(guest: Guest) -> None:
    def asks(target: str) -> bytes:
        ether = Ether(src=GUEST_MAC, dst="33:33:ff:00:00:67")
        return bytes(ether / IPv6(src="::", dst="ff02::1:ff00:67", hlim=255) / ICMPv6ND_NS(tgt=target))

    for target, expected in (
        ("2001:db8:5::67", "2001:db8:5::67"),
        ("2001:db8::67", "2001:db8::67"),
        ("2001:db8:5::67", "2001:db8::67"),
    ):
        guest.send(asks(target))
        guest.barrier()
        assert ipaddress.ip_address(guest.engine.observed().addr6) == ipaddress.ip_address(expected)


def test_the_address_of_a_machine_behind_the_guest_is_not_the_guests(guest: Guest) -> None:
    """A forwarded port leads there; it asks whether somebody has its address as the guest does."""
    behind = {V4: "192.0.2.99", V6: "2001:db8::99"}
    for family, where in behind.items():
        sock = socket.create_server((family.loopback, 0), family=family.af)
        guest.engine.listen(sock.detach(), 80, address(where))
    guest.send(Ether(src=GUEST_MAC, dst="ff:ff:ff:ff:ff:ff") / ARP(hwsrc=GUEST_MAC, psrc=behind[V4], pdst=behind[V4]))
    ether = Ether(src=GUEST_MAC, dst="33:33:ff:00:00:99")
    guest.send(ether / IPv6(src="::", dst="ff02::1:ff00:99", hlim=255) / ICMPv6ND_NS(tgt=behind[V6]))
    guest.send(guest.udp(V4, 5000, 9, b"hello", src=behind[V4]))
    guest.send(guest.udp(V6, 5000, 9, b"hello", src=behind[V6]))
    guest.barrier()
    seen = guest.engine.observed()
    assert not any(seen.addr4 + seen.addr6)


def test_an_ipv4_address_is_learnt_from_arp(guest: Guest) -> None:
    def seen() -> str:
        guest.barrier()
        return str(ipaddress.ip_address(guest.engine.observed().addr4))

    ether = Ether(src=GUEST_MAC, dst="ff:ff:ff:ff:ff:ff")
    guest.send(ether / ARP(hwsrc=GUEST_MAC, psrc="0.0.0.0", pdst="192.0.2.9"))
    guest.send(ether / ARP(hwsrc=GUEST_MAC, psrc="127.0.0.1", pdst="192.0.2.9"))
    guest.send(ether / ARP(hwsrc=GUEST_MAC, psrc="224.0.0.1", pdst="192.0.2.9"))
    guest.send(ether / ARP(hwsrc="52:54:00:00:00:01", psrc="192.0.2.8", pdst="192.0.2.1"))
    guest.send(bytes(ether / ARP(hwsrc=GUEST_MAC, psrc="192.0.2.8"))[:40])
    assert seen() == "0.0.0.0"
    guest.send(ether / ARP(hwsrc=GUEST_MAC, psrc="192.0.2.9", pdst="192.0.2.9"))
    assert seen() == "192.0.2.9"


def test_another_guest_has_other_addresses(guest: Guest) -> None:
    guest.send(guest.udp(V4, 5000, 9, b"hello", src="192.0.2.9"))
    guest.send(guest.udp(V6, 5000, 9, b"hello", src="2001:db8::9"))
    guest.barrier()
    assert guest.engine.observed().addr6 == ipaddress.ip_address("2001:db8::9").packed
    guest.engine.detach()
    seen = guest.engine.observed()
    assert not any(seen.addr4 + seen.addr6 + seen.addr6_ll + seen.mac)


def test_too_many_rare_frames(guest: Guest) -> None:
    guest.send_all([other_frame(60)] * 70)
    assert guest.drops("rare_full") == 6
    guest.send(other_frame(2049))
    assert guest.drops("rare_full") == 7
    assert guest.engine.take_rare() == [other_frame(60)] * 64
    guest.send(other_frame(2048))
    assert guest.engine.take_rare() == [other_frame(2048)]


def test_frames_come_down(guest: Guest) -> None:
    for size in (14, 60, 1514, 2048):
        assert guest.engine.inject(other_frame(size))
        assert guest.receive().raw == other_frame(size)
    with pytest.raises(ValueError, match="too long"):
        guest.engine.inject(bytes(2049))


def test_frames_come_down_where_the_ring_is_short() -> None:
    with Guest(rx=()) as guest:
        assert guest.engine.inject(other_frame(60))
        wait_until(lambda: guest.drops("ring_full") == 1)
        guest.engine.park()
        for n in range(64):
            assert guest.engine.inject(other_frame(60 + n))
        assert not guest.engine.inject(other_frame(60))  # so many wait already
        for _ in range(64):
            guest.hand_out([Part(guest.memory.take(200), 200, write=True)])
        guest.engine.unpark()
        for n in range(64):
            assert guest.receive().raw == other_frame(60 + n)
