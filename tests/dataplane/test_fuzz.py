# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that means ill, or is broken. The first line of each test states what holds all the same.

What is random comes from a seed, so that a failure comes again. All of it runs
in a network without a way out.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
from collections.abc import Callable, Iterator, Sequence

import pytest
from scapy.layers.inet import TCP, UDP
from scapy.layers.l2 import ARP, Ether

from godwit.lab.netns import Namespace

from .driver import (
    ACK,
    F_INDIRECT,
    F_NEXT,
    F_WRITE,
    FULL,
    GUEST_MAC,
    PAGE,
    PLAIN,
    PSH,
    RX,
    SYN,
    TX,
    USER_BASE,
    V4,
    V6,
    Conn,
    Family,
    Guest,
    Part,
    Piece,
    Ring,
    Server,
    open_pair,
    other_frame,
    pattern,
    read_exactly,
)

MIB = 1 << 20
ARENA = MIB  # bytes at the end of memory: all that a random descriptor may name
FEW = bool(os.environ.get("GODWIT_SANITIZE"))  # with the sanitizers there is `make fuzz`, which goes on from there
REGION = Piece(0x10_0000, 4 * MIB, 0)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with Namespace("fuzz") as space, space.enter():
        yield


def assert_works(guest: Guest, family: Family) -> None:
    """A connection opens, and carries data both ways."""
    conn, sock = open_pair(guest, family)
    with sock:
        conn.push(pattern(3000))
        assert read_exactly(sock, 3000) == pattern(3000)
        sock.sendall(pattern(20_000))
        assert conn.read(20_000) == pattern(20_000)


def assert_fresh_guest_works(guest: Guest) -> None:
    """The front-end connects anew, as after a reset of the machine."""
    guest.engine.detach()
    guest.engine.close_flows()
    again = Guest(guest.features, engine=guest.engine, rx=((2048,),) * 32)
    try:
        for family in (V4, V6):
            assert_works(again, family)
        guest.engine.detach()
    finally:
        for ring in again.rings:
            ring.close()
        again.memory.close()


def used_ring(ring: Ring) -> tuple[int, int]:
    return ring.used, ring.used + 6 + 8 * ring.num


class Watch:
    """The guest's memory but for some ranges: whether anything in it changes."""

    def __init__(self, guest: Guest, allowed: Sequence[tuple[int, int]]) -> None:
        self.memory = guest.memory
        self.ranges: list[tuple[int, int]] = []
        at = REGION.addr
        for start, end in sorted(allowed):
            self.ranges.append((at, start))
            at = end
        self.ranges.append((at, REGION.addr + REGION.size))
        self.before = self.now()

    def now(self) -> list[bytes]:
        return [self.memory.read(start, end - start) for start, end in self.ranges]

    def assert_same(self) -> None:
        assert self.now() == self.before


# ---- frames


def mutated(rng: random.Random, frame: bytes) -> bytes:
    data = bytearray(frame)
    for _ in range(rng.choice((0, 1, 1, 2, 5))):
        kind = rng.randrange(6)
        at = rng.randrange(len(data)) if data else 0
        if not data or kind == 0:
            data[at:at] = rng.randbytes(rng.randrange(1, 60))
        elif kind == 1:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif kind == 3:
            del data[at : at + rng.randrange(1, 40)]
        elif kind == 4:
            data[at : at + 2] = struct.pack("!H", rng.choice((0, 1, 20, 0x7FFF, 0xFFFF, rng.randrange(65536))))
        else:
            data = data[:at]
    return bytes(data)


def seeds(guest: Guest, family: Family, port: int) -> list[bytes]:
    """A good frame of each kind."""
    conn = Conn(guest, family, port).connect()
    options = [("MSS", 1460), ("NOP", None), ("WScale", 7), ("SAckOK", b""), ("Timestamp", (1, 2))]
    frames = [
        conn.build(SYN, options=options, seq=1),
        conn.build(ACK | PSH, b"data"),
        conn.build(ACK, pattern(1400)),
        conn.build(ACK | 1, b"end"),
        conn.build(4),
        guest.udp(family, 5000, port, b"datagram"),
        guest.udp(family, 68, 67, bytes(240)),
        guest.echo(family, 1, 1, b"ping"),
        Ether(src=GUEST_MAC) / ARP(pdst=V4.gateway),
        guest.ip(family) / TCP(sport=1, dport=2, dataofs=15),
    ]
    return [bytes(frame) for frame in frames] + [bytes(14), other_frame(100)]


def shredded(guest: Guest, rng: random.Random, place: int, data: bytes) -> list[Part]:
    parts = []
    at = 0
    guest.memory.write(place, data)
    while at < len(data):
        size = rng.choice((1, 3, 12, 14, 20, 40, len(data)))
        parts.append(Part(place + at, min(size, len(data) - at), write=False))
        at += size
    return parts or [Part(place, 0, write=False)]


@pytest.mark.parametrize("features", [FULL, PLAIN], ids=["full", "plain"])
@pytest.mark.parametrize("seed", range(2 if FEW else 3))
def test_frames(seed: int, features: int, family: Family) -> None:
    """Every chain comes back, what is said to the guest is well-formed, and nobody else's connection suffers."""
    rng = random.Random(seed)
    with Guest(features, regions=(REGION,), max_flows=256, num=1024, rx=((1526,),) * 200) as guest:
        if seed % 2:
            guest.engine.set_limits(24, 8, 3)  # flows make room for others all the time
        bystander, sock = open_pair(guest, family)
        server = Server(family)
        good = seeds(guest, family, server.port)
        for _ in range(25):
            place = guest.tx_place
            chains = []
            for _ in range(40):
                frame = mutated(rng, rng.choice(good)) if rng.random() < 0.9 else rng.randbytes(rng.randrange(200))
                data = (rng.randbytes(12) if rng.random() < 0.5 else bytes(12)) + frame
                if rng.random() < 0.05:
                    data = data[: rng.randrange(13)]
                parts = shredded(guest, rng, place, data)[:20]
                chains.append(guest.tx.add(parts))
                place += 2100
            guest.tx.publish(len(chains))
            guest.reap_tx(chains[-1])
            guest.backlog += guest.collect()  # each is checked as it is taken apart
            guest.backlog = [frame for frame in guest.backlog if bystander.mine(frame)]
            guest.engine.take_rare()
        bystander.push(b"still here")
        assert read_exactly(sock, 10) == b"still here"
        sock.close()
        server.close()
        assert not guest.tx.broken(0)
        assert not guest.rx.broken(0)
        assert_fresh_guest_works(guest)


# ---- rings


def random_descriptor(rng: random.Random, guest: Guest, num: int, right: int) -> tuple[int, int, int, int]:
    """Wholly in the arena, or not wholly in memory."""
    end = REGION.addr + REGION.size
    kind = rng.random()
    if kind < 0.93:
        size = rng.choice((0, 1, 12, 100, 1526, 4096, rng.randrange(70_000)))
        addr = rng.randrange(end - ARENA, end - size)
    elif kind < 0.97:
        addr, size = end - rng.randrange(100), rng.randrange(100, 1 << 32)
    else:
        addr, size = rng.choice((0, 1, end, (1 << 64) - 1, rng.getrandbits(64) | 1 << 40)), rng.getrandbits(32) | 1
    flags = right if rng.random() < 0.95 else right ^ F_WRITE
    if rng.random() < 0.4:
        flags |= F_NEXT
    if rng.random() < 0.1:
        flags |= F_INDIRECT
        size = rng.choice((16, 32, 160, 17, size))
        addr = min(addr, end - 200) if kind < 0.93 else addr
    return addr, size, flags, rng.choice((rng.randrange(num), rng.randrange(num), num, 65535))


def scribble(rng: random.Random, guest: Guest, index: int) -> list[int]:
    """Random descriptors, random tables, random heads. Returns the heads."""
    ring = guest.rings[index]
    right = F_WRITE if index == RX else 0
    for i in range(ring.num):
        ring.set_desc(i, *random_descriptor(rng, guest, ring.num, right))
    for _ in range(20):
        row = struct.pack("<QIHH", *random_descriptor(rng, guest, 10, right))
        guest.memory.write(REGION.addr + REGION.size - ARENA + 16 * rng.randrange(ARENA // 16), row)
    heads = [rng.randrange(ring.num) if rng.random() < 0.95 else 9999 for _ in range(rng.randrange(1, ring.num + 1))]
    for head in heads:
        ring.push(head)
    return heads


def restart(guest: Guest, index: int, at: int) -> None:
    ring = guest.rings[index]
    guest.engine.ring_stop(index)
    ring.start_at(at)
    guest.memory.store16(ring.avail, 0)
    guest.start_ring(index, at)
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(ring.err_fd)


@pytest.mark.parametrize("seed", range(1 if FEW else 4))
def test_ring_from_the_guest(seed: int) -> None:
    """Nothing but the used ring is written; every chain comes back in order, or the ring is broken and says so."""
    rng = random.Random(seed)
    with Guest(FULL if seed % 2 else PLAIN, regions=(REGION,), num=16, rx=()) as guest:
        for _ in range(60):
            restart(guest, TX, rng.choice((0, 65530, rng.randrange(65536))))
            heads = scribble(rng, guest, TX)
            guest.memory.store16(guest.tx.avail + 2, guest.tx.avail_idx)
            watch = Watch(guest, [used_ring(guest.tx), used_ring(guest.rx)])
            guest.tx.kick()
            guest.barrier()
            back = guest.tx.reap()
            assert back == [(head, 0) for head in heads[: len(back)]]
            assert len(back) == len(heads) or guest.tx.broken()
            watch.assert_same()
        assert_fresh_guest_works(guest)


@pytest.mark.parametrize("features", [FULL, PLAIN], ids=["full", "plain"])
@pytest.mark.parametrize("seed", range(1 if FEW else 3))
def test_ring_to_the_guest(seed: int, features: int, family: Family) -> None:
    """Nothing but the buffers given and the used ring is written; they come back in order, or the ring is broken."""
    rng = random.Random(seed)
    with Guest(features, regions=(REGION,), num=16, rx=((2048,),) * 8) as guest:
        end = REGION.addr + REGION.size
        conn, sock = open_pair(guest, family)
        guest.refill = False
        sock.setblocking(False)
        with sock:
            for _ in range(60):
                restart(guest, RX, rng.choice((0, 65530, rng.randrange(65536))))
                with contextlib.suppress(BlockingIOError):
                    sock.send(pattern(50_000))
                heads = scribble(rng, guest, RX)
                guest.memory.store16(guest.rx.avail + 2, guest.rx.avail_idx)
                watch = Watch(guest, [used_ring(guest.tx), used_ring(guest.rx), (end - ARENA, end)])
                guest.rx.kick()
                for size in (14, 60, 2048):
                    guest.engine.inject(other_frame(size))
                guest.barrier()
                back = guest.rx.reap()
                assert [head for head, _ in back] == heads[: len(back)]
                assert all(0 < written <= 65535 + 14 + 12 for _, written in back)
                watch.assert_same()
                conn.acknowledge(ack=conn.ack + sum(written for _, written in back) // 2)
        assert_fresh_guest_works(guest)


@pytest.mark.parametrize("features", [FULL, PLAIN], ids=["full", "plain"])
@pytest.mark.parametrize("seed", range(1 if FEW else 3))
def test_buffers_of_random_sizes(seed: int, features: int, family: Family) -> None:
    """Not a byte beside a buffer is written, and what is in the buffers is right, however they are cut."""
    rng = random.Random(seed)
    with (
        Guest(features, regions=(REGION,), num=512, rx=(), mtu=65520) as guest,
        socket.socket(family.af, socket.SOCK_DGRAM) as peer,
    ):
        peer.bind((family.loopback, 0))
        allowed = [(guest.tx_place, guest.tx_place + MIB)]
        for ring in guest.rings:
            allowed += [(ring.desc, ring.desc + 16 * ring.num), (ring.avail, ring.avail + 6 + 2 * ring.num)]
            allowed.append(used_ring(ring))
        for _ in range(100):
            sizes = [rng.choice((1, 7, 12, 60, 500, 1526, rng.randrange(1, 4000))) for _ in range(rng.randrange(1, 5))]
            sizes[0] += 12
            parts = [Part(guest.memory.take(size + 32, 1) + 16, size, write=True) for size in sizes]
            guest.hand_out(parts)
            allowed += [(part.addr, part.addr + part.size) for part in parts]
        watch = Watch(guest, allowed)
        conn, sock = open_pair(guest, family)
        guest.send(guest.udp(family, 5000, peer.getsockname()[1], b"?"))
        where = peer.recvfrom(10)[1]
        with sock:
            for _ in range(60):
                size = rng.choice((0, 1, 46, 1472, rng.randrange(3000), rng.randrange(30_000)))
                data = pattern(size, size)
                peer.sendto(data, where)
                assert guest.receive(lambda f: UDP in f.ether).payload == data
                sock.sendall(data)
                assert conn.read(size) == data
                frame = other_frame(14 + size % 2000)
                assert guest.engine.inject(frame)
                assert guest.receive(lambda f: f.ether.type == 0x0806).raw == frame
                watch.assert_same()


@pytest.mark.parametrize("index", [RX, TX], ids=["rx", "tx"])
def test_ring_that_changes_while_it_is_read(index: int, family: Family) -> None:
    """Nothing but the buffers given and the used rings is written, whenever the guest writes what into its rings."""
    rng = random.Random(index)
    with Guest(FULL, regions=(REGION,), num=16, rx=((2048,),) * 8) as guest:
        end = REGION.addr + REGION.size
        _conn, sock = open_pair(guest, family)
        guest.refill = False
        sock.setblocking(False)
        ring = guest.rings[index]
        given = [(part.addr, part.addr + part.size) for parts in guest.rx_buffers.values() for part in parts]
        own = [(ring.desc, ring.desc + 16 * ring.num), (ring.avail, ring.avail + 6 + 2 * ring.num)]
        watch = Watch(guest, [used_ring(guest.tx), used_ring(guest.rx), (end - ARENA, end), *own, *given])
        with sock:
            for _ in range(30):
                restart(guest, index, 0)
                with contextlib.suppress(BlockingIOError):
                    sock.send(pattern(50_000))
                for _ in range(10):
                    heads = scribble(rng, guest, index)
                    guest.memory.store16(ring.avail + 2, guest.memory.load16(ring.used + 2) + len(heads))
                    ring.kick()
                    guest.engine.inject(other_frame(60))
            guest.barrier()
            watch.assert_same()
        assert_fresh_guest_works(guest)


# ---- the control side


@pytest.mark.parametrize("seed", range(1 if FEW else 2))
def test_configuration(seed: int) -> None:
    """What makes no sense is refused with an error, and a table that does is taken at any time after."""
    rng = random.Random(seed)
    with Guest(regions=(REGION,), rx=((2048,),) * 8) as guest:
        engine = guest.engine

        def number() -> int:
            near = (0, 1, PAGE, REGION.addr, REGION.size, USER_BASE, USER_BASE + REGION.addr, 1 << 62, (1 << 64) - 1)
            return (rng.choice(near) + rng.choice((0, 0, 0, 1, -1, PAGE, -PAGE))) % (1 << 64)

        calls: dict[str, Callable[[], object]] = {
            "set_memory": lambda: engine.set_memory(
                [(number(), number(), number(), number(), os.dup(guest.memory.fd)) for _ in range(rng.randrange(3))]
            ),
            "add": lambda: engine.add_region(number(), number(), number(), number(), os.dup(guest.memory.fd)),
            "remove": lambda: engine.remove_region(number(), number(), number()),
            "log": lambda: engine.set_log(os.dup(guest.memory.fd), number() % (1 << 63), number()),
            "num": lambda: engine.ring_num(rng.randrange(2), 1 << rng.randrange(17)),
            "base": lambda: engine.ring_base(rng.randrange(2), rng.randrange(65536)),
            "addr": lambda: engine.ring_addr(rng.randrange(2), 1, number(), number(), number(), number()),
            "enable": lambda: engine.ring_enable(rng.randrange(2), rng.random() < 0.5),
            "features": lambda: engine.set_features(rng.getrandbits(64)),
            "good": lambda: engine.set_memory(guest.memory.table()),
            "start": lambda: guest.start_ring(rng.randrange(2), rng.randrange(65536)),
            "inject": lambda: engine.inject(other_frame(60)),
            "kick": lambda: guest.rings[rng.randrange(2)].kick(),
        }
        names = list(calls)
        for _ in range(300):
            with contextlib.suppress(OSError, ValueError):
                calls[rng.choice(names)]()
        guest.barrier()
        assert_fresh_guest_works(guest)
