# SPDX-License-Identifier: GPL-2.0-or-later
"""Datagrams in fragments: from the guest (put together), and to it (where they are beyond its MTU)."""

from __future__ import annotations

import random
import select
from collections.abc import Iterator

import pytest
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment
from scapy.layers.l2 import Ether
from scapy.packet import Raw

from godwit.lab.netns import Namespace

from ..fuzz.wire import ones_sum
from .driver import (
    FULL,
    GUEST_MAC,
    OUR_MAC,
    PLAIN,
    V6,
    Family,
    Fragment,
    Frame,
    Guest,
    is_echo_reply,
    pattern,
)
from .test_datagram import SINGLE, Peer, is_udp, meet

SECOND = 1000


@pytest.fixture
def peer(family: Family) -> Iterator[Peer]:
    with Peer(family) as it:
        yield it


def part(guest: Guest, family: Family, ident: int, offset: int, more: bool, data: bytes, proto: int = 17) -> bytes:
    """One fragment of the guest's."""
    if family.v6:
        head = IPv6(src=family.guest, dst=family.gateway, nh=44)
        return bytes(
            Ether(src=GUEST_MAC, dst=OUR_MAC)
            / head
            / IPv6ExtHdrFragment(id=ident, offset=offset // 8, m=int(more), nh=proto)
            / Raw(data)
        )
    ip = IP(src=family.guest, dst=family.gateway, id=ident, flags="MF" if more else 0, frag=offset // 8, proto=proto)
    return bytes(Ether(src=GUEST_MAC, dst=OUR_MAC) / ip / Raw(data))


def cut(
    guest: Guest, family: Family, datagram: bytes, *, ident: int = 1, each: int = 1448, proto: int = 17
) -> list[bytes]:
    """What is above IP, in fragments."""
    return [
        part(guest, family, ident, at, at + each < len(datagram), datagram[at : at + each], proto)
        for at in range(0, len(datagram), each)
    ]


def above(guest: Guest, family: Family, port: int, data: bytes) -> bytes:
    """A UDP datagram from its own header on."""
    return bytes(guest.udp(family, 5000, port, data))[14 + family.ip_size :]


def silent(peer: Peer) -> bool:
    return not select.select([peer.sock], [], [], 0.05)[0]


# ---- from the guest


@pytest.mark.parametrize("size", [1441, 1500, 8192, 30000, 65487])
@pytest.mark.parametrize("order", ["in_order", "backwards", "shuffled"])
def test_in_any_order(guest: Guest, family: Family, peer: Peer, size: int, order: str) -> None:
    data = pattern(size)
    fragments = cut(guest, family, above(guest, family, peer.port, data))
    if order == "backwards":
        fragments.reverse()
    elif order == "shuffled":
        random.Random(size).shuffle(fragments)
    guest.send_all(fragments)
    assert peer.read() == data
    assert guest.drops("fragment") == 0


def test_some_at_a_time(guest: Guest, family: Family, peer: Peer) -> None:
    """As many datagrams as are kept, each with a fragment of every other one between its own."""
    all_data = [pattern(5000, n) for n in range(16)]
    every = [cut(guest, family, above(guest, family, peer.port, data), ident=n) for n, data in enumerate(all_data)]
    for row in zip(*every, strict=True):
        guest.send_all(row)
    assert [peer.read() for _ in all_data] == all_data
    # One more, and the oldest is given up.
    guest.send_all([fragments[0] for fragments in every])
    guest.send(cut(guest, family, above(guest, family, peer.port, pattern(3000)), ident=99)[0])
    assert guest.drops("fragment") == 1
    guest.send_all(every[0][1:])
    assert silent(peer)
    guest.send_all(every[15][1:])
    assert peer.read() == all_data[15]


def test_same_fragment_twice(guest: Guest, family: Family, peer: Peer) -> None:
    fragments = cut(guest, family, above(guest, family, peer.port, pattern(4000)))
    guest.send_all([fragments[0], fragments[0], fragments[1], fragments[1], fragments[2]])
    assert peer.read() == pattern(4000)
    assert silent(peer)


def test_overlap_is_no_datagram(guest: Guest, family: Family, peer: Peer) -> None:
    """RFC 5722: none of it is taken."""
    datagram = above(guest, family, peer.port, pattern(4000))
    guest.send_all(
        [
            part(guest, family, 1, 0, True, datagram[:1448]),
            part(guest, family, 1, 1440, True, datagram[1440:2896]),
            part(guest, family, 1, 2896, False, datagram[2896:]),
        ]
    )
    assert silent(peer)
    assert guest.drops("fragment") >= 1


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (((0, True, 100),), "malformed"),  # not the last, and no multiple of 8
        (((65528, False, 100),), "malformed"),  # beyond what a datagram can be
        (((0, True, 0),), "malformed"),  # nothing
        (((8, False, 100), (16, False, 200)), "fragment"),  # two ends
        (((80, False, 8), (160, True, 8)), "fragment"),  # beyond the end
        (((24, True, 8), (8, False, 8)), "fragment"),  # the same, the other way round
    ],
)
def test_fragments_that_contradict(
    guest: Guest, family: Family, peer: Peer, what: tuple[tuple[int, bool, int], ...], reason: str
) -> None:
    for offset, more, size in what:
        guest.send(part(guest, family, 7, offset, more, bytes(size)))
    assert guest.drops(reason) == 1
    guest.send(guest.udp(family, 5000, peer.port, b"alive"))
    assert peer.read() == b"alive"


def test_rest_that_comes_too_late(guest: Guest, family: Family, peer: Peer) -> None:
    fragments = cut(guest, family, above(guest, family, peer.port, pattern(2000)))
    guest.send(fragments[0])
    guest.engine.advance(61 * SECOND)
    guest.send(fragments[1])
    assert silent(peer)
    guest.send(fragments[0])
    assert peer.read() == pattern(2000)


def test_first_fragment_alone_is_all(guest: Guest, peer: Peer, family: Family) -> None:
    """RFC 6946: a fragment that is the whole is a datagram, even beside others of the same name."""
    datagram = above(guest, family, peer.port, b"whole")
    guest.send(cut(guest, family, above(guest, family, peer.port, pattern(3000)))[0])
    guest.send(part(guest, family, 1, 0, False, datagram))
    assert peer.read() == b"whole"


def test_ping_in_fragments(family: Family) -> None:
    with Namespace("fragments") as space, space.enter(), Guest(mtu=65520) as guest:
        echo = bytes(guest.echo(family, 7, 1, pattern(5000)))[14 + family.ip_size :]
        guest.send_all(cut(guest, family, echo, proto=58 if family.v6 else 1))
        assert guest.receive(is_echo_reply).payload == pattern(5000)


def test_header_that_is_cut(guest: Guest, peer: Peer, family: Family) -> None:
    """The first fragment need not have all of the header above IP."""
    datagram = above(guest, family, peer.port, pattern(100))
    guest.send_all(cut(guest, family, datagram, each=8))
    assert peer.read() == pattern(100)


def test_extension_headers_before_the_fragment(guest: Guest) -> None:
    with Peer(V6) as peer:
        datagram = above(guest, V6, peer.port, pattern(2000))
        ip = Ether(src=GUEST_MAC, dst=OUR_MAC) / IPv6(src=V6.guest, dst=V6.gateway, nh=0)
        options = bytes([44, 0, 1, 4, 0, 0, 0, 0])
        for at, more in ((0, 1), (1000, 0)):
            rest = datagram[at : at + 1000] if more else datagram[at:]
            guest.send(ip / Raw(options + bytes([17, 0]) + (at | more).to_bytes(2, "big") + bytes(4) + rest))
        assert peer.read() == pattern(2000)


def test_extension_headers_above_the_fragment(guest: Guest) -> None:
    """They lie in what is cut up (RFC 8200, 4.5), also where nothing was cut."""
    with Peer(V6) as peer:
        options = bytes([17, 1, 1, 12]) + bytes(12)
        whole = options + above(guest, V6, peer.port, pattern(2000))
        guest.send_all(cut(guest, V6, whole, each=1000, proto=60))
        assert peer.read() == pattern(2000)
        guest.send(part(guest, V6, 2, 0, False, options + above(guest, V6, peer.port, b"alone"), proto=60))
        assert peer.read() == b"alone"
        guest.send_all(cut(guest, V6, bytes([17, 0, 0, 1]) + bytes(4) + whole[16:], each=1000, proto=44))
        assert guest.drops("fragment") == 1  # a fragment that was in fragments
        guest.send_all(cut(guest, V6, bytes([17, 255]) + bytes(1998), each=1000, proto=60))
        assert guest.drops("malformed") == 1  # beyond the end


# ---- to the guest


def put_together(frames: list[Frame]) -> bytes:
    """The datagram above IP from its fragments, with everything about them checked."""
    parts = [frame.fragment for frame in frames]
    found: list[Fragment] = [one for one in parts if one is not None]
    assert len(found) == len(frames)
    assert len({one.ident for one in found}) == 1
    data = b""
    for one in found:
        assert one.offset == len(data)
        data += one.data
    assert [one.more for one in found] == [True] * (len(found) - 1) + [False]
    return data


@pytest.mark.parametrize(
    ("features", "rx"),
    [
        pytest.param(FULL, ((2048,),) * 120, id="full"),
        pytest.param(PLAIN, ((300, 700),) * 120, id="plain"),
        pytest.param(SINGLE, ((12 + 1514,),) * 120, id="single"),
    ],
)
@pytest.mark.parametrize("mtu", [1280, 1500, 1501])
def test_beyond_the_guests_mtu(
    family: Family, peer: Peer, features: int, rx: tuple[tuple[int, ...], ...], mtu: int
) -> None:
    with Guest(features, rx=rx, mtu=mtu if features != SINGLE else 1500) as guest:
        if features == SINGLE:
            mtu = 1500
        meet(guest, peer)
        whole = mtu - family.ip_size - 8
        peer.write(pattern(whole))
        assert guest.receive(is_udp).payload == pattern(whole)
        for size in (whole + 1, 8192, 60000):
            peer.write(pattern(size, size))
            frames: list[Frame] = []
            while not frames or frames[-1].fragment is None or frames[-1].fragment.more:
                frames.append(guest.receive())
                assert len(frames[-1].raw) <= 14 + mtu
            datagram = put_together(frames)
            assert datagram[8:] == pattern(size, size)
            pseudo = frames[0].raw[22:54] if family.v6 else frames[0].raw[26:34]
            assert ones_sum(pseudo + b"\0\x11" + len(datagram).to_bytes(2, "big") + datagram) == 0xFFFF
        assert guest.drops("ring_full") == 0


def test_ring_is_short_between_fragments(family: Family, peer: Peer) -> None:
    """It goes on where it was, with the buffers that the guest adds."""
    with Guest(rx=((2048,),) * 3) as guest:
        meet(guest, peer)
        guest.refill = False
        peer.write(pattern(20000))
        peer.write(b"next")
        frames = []
        for _ in range(14):
            frames.append(guest.receive())
            guest.post((2048,))
        assert put_together(frames)[8:] == pattern(20000)
        assert guest.receive(is_udp).payload == b"next"


def test_big_answers_to_pings(family: Family) -> None:
    with Namespace("fragments") as space, space.enter(), Guest() as guest:
        guest.send(guest.echo(family, 7, 1, pattern(5000)))
        frames = [guest.receive() for _ in range(4)]
        message = put_together(frames)
        assert message[0] == (129 if family.v6 else 0)
        assert message[4:8] == b"\0\x07\0\x01"
        assert message[8:] == pattern(5000)


@pytest.mark.parametrize("size", [5000, 40000])
def test_big_answer_to_a_ping_where_the_ring_is_short(family: Family, size: int) -> None:
    """It goes on where it was: else it would begin anew for ever."""
    with Namespace("fragments") as space, space.enter(), Guest(num=32, rx=((2048,),) * 2) as guest:
        guest.send(guest.echo(family, 7, 1, pattern(size)))
        frames: list[Frame] = []
        while not frames or frames[-1].fragment is None or frames[-1].fragment.more:
            frames.append(guest.receive())
            assert len(frames) < 30
        assert put_together(frames)[8:] == pattern(size)
        guest.send(guest.echo(family, 7, 2, b"small"))
        assert guest.receive(is_echo_reply).payload == b"small"


def test_fragment_that_the_ring_never_has_room_for(family: Family, peer: Peer) -> None:
    """It is dropped, and does not stand in the way of all others."""
    with Guest(num=64, rx=((1526,),) * 32, mtu=65520) as guest:
        meet(guest, peer)
        peer.write(pattern(65527 if family.v6 else 65507))  # more than the MTU, with its headers
        peer.write(b"small")
        assert guest.receive(is_udp).payload == b"small"
        assert guest.drops("ring_full") == 1
