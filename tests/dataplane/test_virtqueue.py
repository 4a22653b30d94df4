# SPDX-License-Identifier: GPL-2.0-or-later
"""The rings, the device's side: what the standard allows, and what breaks a ring (virtio 1.2, 2.7)."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .driver import (
    EVENT_IDX,
    F_INDIRECT,
    F_NEXT,
    F_WRITE,
    FULL,
    MRG_RXBUF,
    PLAIN,
    PROTOCOL_FEATURES,
    RX,
    TX,
    V4,
    VERSION_1,
    Family,
    Guest,
    Part,
    open_pair,
    other_frame,
    pattern,
    read_exactly,
    wait_until,
)

SINGLE = FULL & ~MRG_RXBUF
MOST = 1024  # elements of one chain that are taken
FRAME = other_frame(60)


def frames_from(guest: Guest) -> int:
    return int(guest.engine.counters()["frames_from_guest"])


def raw(guest: Guest, index: int, entries: dict[int, tuple[int, int, int, int]], head: int = 0) -> None:
    """Write descriptors as they are, and make ``head`` available."""
    ring = guest.rings[index]
    for i, (addr, size, flags, following) in entries.items():
        ring.set_desc(i, addr, size, flags, following)
    ring.push(head)
    ring.publish(1, force=True)


def table(guest: Guest, entries: list[tuple[int, int, int, int]]) -> int:
    """An indirect table."""
    at = guest.memory.take(16 * len(entries))
    for i, entry in enumerate(entries):
        guest.memory.write(at + 16 * i, struct.pack("<QIHH", *entry))
    return at


def assert_goes_on(guest: Guest, index: int) -> None:
    """The ring, or what is left to the guest of its network, works."""
    if index == TX:
        before = frames_from(guest)
        guest.send(FRAME)
        assert frames_from(guest) == before + 1
    else:
        assert guest.engine.inject(FRAME)
        assert guest.receive().raw == FRAME


# ---- chains that the standard allows


@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
@pytest.mark.parametrize("parts", [1, 2, 7, MOST])
def test_chain_from_the_guest(indirect: bool, parts: int, family: Family) -> None:
    with Guest(num=2048) as guest:
        conn, sock = open_pair(guest, family)
        with sock:
            data = pattern(2000)
            frame = guest.vnet + bytes(conn.build(0x18, data))
            size = len(frame) // parts
            guest.send_parts(guest.layout(frame, [size] * (parts - 1)), indirect=indirect)
            assert read_exactly(sock, len(data)) == data


@pytest.mark.parametrize("parts", [(2048,), (12, 2036), (1,) * 11 + (1, 200, 1836)])
def test_indirect_buffer_for_the_guest(parts: tuple[int, ...]) -> None:
    with Guest(rx=()) as guest:
        for _ in range(3):
            buffers = [Part(guest.memory.take(size), size, write=True) for size in parts]
            guest.rx_buffers[guest.rx.add(buffers, indirect=True)] = buffers
            guest.rx.publish(1)
            guest.refill = False
            frame = other_frame(1514)
            assert guest.engine.inject(frame)
            assert guest.receive().raw == frame


def test_indirect_table_behind_a_descriptor(guest: Guest) -> None:
    """2.7.5.3.1 forbids what follows an indirect descriptor, not what comes before it."""
    parts = guest.layout(guest.vnet + FRAME, [12, 14])
    at = table(guest, [(parts[1].addr, parts[1].size, F_NEXT, 1), (parts[2].addr, parts[2].size, 0, 0)])
    raw(guest, TX, {0: (parts[0].addr, parts[0].size, F_NEXT, 1), 1: (at, 32, F_INDIRECT, 0)})
    wait_until(lambda: guest.tx.reap() == [(0, 0)])
    assert guest.engine.take_rare() == [FRAME]


def test_descriptors_of_no_length(guest: Guest) -> None:
    frame = guest.vnet + FRAME
    place = guest.tx_place
    guest.memory.write(place, frame)
    nothing = Part(1 << 50, 0, write=False)
    halves = Part(place, 20, write=False), Part(place + 20, len(frame) - 20, write=False)
    guest.send_parts([nothing, halves[0], nothing, nothing, halves[1], nothing])
    assert guest.engine.take_rare() == [FRAME]
    guest.send_parts([Part(place, 0, write=False)])
    assert guest.drops("short") == 1


def test_buffer_of_many_megabytes() -> None:
    """A frame is no larger for it, and says how large it is."""
    with Guest(rx=()) as guest:
        guest.hand_out([Part(guest.memory.take(32 << 20), 32 << 20, write=True)])
        for _ in range(3):
            assert guest.engine.inject(FRAME)
            assert guest.receive().raw == FRAME


@pytest.mark.parametrize("num", [1, 2, 32768])
def test_ring_sizes(num: int) -> None:
    with Guest(num=num, rx=((2048,),)) as guest:
        for _ in range(5):
            assert_goes_on(guest, RX)
            assert_goes_on(guest, TX)


@pytest.mark.parametrize("num", [0, 3, 255, 65536])
def test_ring_size_is_a_power_of_two(guest: Guest, num: int) -> None:
    with pytest.raises(ValueError, match="not a power of two"):
        guest.engine.ring_num(RX, num)


@pytest.mark.parametrize("features", [FULL, PLAIN], ids=["event_idx", "flags"])
def test_indices_wrap(features: int, family: Family) -> None:
    with Guest(features, start_index=65500, num=64, rx=((1600,),) * 32) as guest:
        conn, sock = open_pair(guest, family)
        with sock:
            data = pattern(100)
            for n in range(100):
                conn.push(data)
                if n % 3 == 0:
                    sock.sendall(data)
                    assert conn.read(len(data)) == data
            assert read_exactly(sock, 100 * len(data)) == 100 * data
        assert guest.tx.last_used < 1000
        assert guest.rx.last_used < 1000


# ---- chains that break a ring


# Puts a chain that is none into a ring; the last argument is the flag that is right for its direction.
Bad = Callable[[Guest, int, int], None]


def in_a_table(entries: Callable[[int, int], list[tuple[int, int, int, int]]], size: int | None = None) -> Bad:
    def put(g: Guest, index: int, d: int) -> None:
        rows = entries(g.tx_place, d)
        raw(g, index, {0: (table(g, rows), 16 * len(rows) if size is None else size, F_INDIRECT, 0)})

    return put


BROKEN: dict[str, Bad] = {
    "head_out_of_range": lambda g, i, d: raw(g, i, {0: (g.tx_place, 100, d, 0)}, g.rings[i].num),
    "head_far_out_of_range": lambda g, i, d: raw(g, i, {}, 65535),
    "next_out_of_range": lambda g, i, d: raw(g, i, {0: (g.tx_place, 100, d | F_NEXT, 256)}),
    "loop_of_one": lambda g, i, d: raw(g, i, {0: (g.tx_place, 100, d | F_NEXT, 0)}),
    "loop_of_none": lambda g, i, d: raw(g, i, {0: (g.tx_place, 0, d | F_NEXT, 0)}),
    "loop_of_two": lambda g, i, d: raw(
        g, i, {0: (g.tx_place, 100, d | F_NEXT, 1), 1: (g.tx_place, 100, d | F_NEXT, 0)}
    ),
    "wrong_direction": lambda g, i, d: raw(g, i, {0: (g.tx_place, 100, d ^ F_WRITE, 0)}),
    "wrong_direction_later": lambda g, i, d: raw(
        g, i, {0: (g.tx_place, 100, d | F_NEXT, 1), 1: (g.tx_place, 100, d ^ F_WRITE, 0)}
    ),
    "outside": lambda g, i, d: raw(g, i, {0: (1 << 50, 100, d, 0)}),
    "ends_outside": lambda g, i, d: raw(g, i, {0: (g.tx_place, 0xFFFFFFFF, d, 0)}),
    "address_wraps": lambda g, i, d: raw(g, i, {0: ((1 << 64) - 50, 100, d, 0)}),
    "indirect_outside": lambda g, i, d: raw(g, i, {0: (1 << 50, 32, F_INDIRECT, 0)}),
    "indirect_and_next": lambda g, i, d: raw(
        g, i, {0: (table(g, [(g.tx_place, 100, d, 0)]), 16, F_INDIRECT | F_NEXT, 1), 1: (g.tx_place, 100, d, 0)}
    ),
    "indirect_of_no_size": in_a_table(lambda at, d: [(at, 100, d, 0)], 0),
    "indirect_of_odd_size": in_a_table(lambda at, d: [(at, 100, d, 0)] * 2, 17),
    "indirect_too_large": in_a_table(lambda at, d: [(at, 1, d, 0)] * (MOST + 1)),
    "indirect_of_gigabytes": in_a_table(lambda at, d: [(at, 100, d, 0)], 0xFFFFFFF0),
    "indirect_next_out_of_range": in_a_table(lambda at, d: [(at, 100, d | F_NEXT, 1)]),
    "indirect_loop": in_a_table(lambda at, d: [(at, 100, d | F_NEXT, 1), (at, 100, d | F_NEXT, 0)]),
    "indirect_nested": in_a_table(lambda at, d: [(at, 16, F_INDIRECT, 0)]),
}


@pytest.mark.parametrize("index", [RX, TX], ids=["rx", "tx"])
@pytest.mark.parametrize("name", BROKEN)
def test_bad_chain_breaks_its_ring_alone(index: int, name: str) -> None:
    """The front-end is told, nothing comes back, the other ring goes on; started anew it is as good as new."""
    with Guest(rx=() if index == RX else ((2048,),) * 4) as guest:
        ring = guest.rings[index]
        BROKEN[name](guest, index, F_WRITE if index == RX else 0)
        if index == RX:
            assert guest.engine.inject(FRAME)
        assert ring.broken()
        assert guest.engine.rings()[index][2]
        assert ring.reap() == []
        other = TX if index == RX else RX
        assert not guest.rings[other].broken(0)
        assert_goes_on(guest, other)
        ring.kick()  # whatever the guest does now: it is not looked at
        guest.barrier()
        assert ring.reap() == []
        guest.engine.ring_stop(index)
        ring.start_at(0)
        guest.start_ring(index, 0)
        if index == RX:
            guest.post((2048,))
        assert_goes_on(guest, index)


@pytest.mark.parametrize("index", [RX, TX], ids=["rx", "tx"])
def test_index_that_runs_ahead(guest: Guest, index: int) -> None:
    """More entries than the ring has cannot be."""
    ring = guest.rings[index]
    guest.memory.store16(ring.avail + 2, ring.avail_idx + ring.num + 1)
    ring.kick()
    guest.engine.inject(FRAME)
    assert ring.broken()
    assert_goes_on(guest, 1 - index)


def test_chain_longer_than_is_taken() -> None:
    with Guest(num=2048) as guest:
        guest.send_parts([Part(guest.tx_place, 1, write=False)] * (MOST + 1), wait=False)
        assert guest.tx.broken()


def test_what_came_before_a_bad_chain_comes_back(guest: Guest) -> None:
    good = [guest.tx.add(guest.layout(guest.vnet + FRAME, ())) for _ in range(3)]
    guest.tx.push(9999)
    guest.tx.publish(4)
    assert guest.tx.broken()
    guest.barrier()  # the front-end is told before the turn ends, and with it what was used
    assert guest.tx.reap() == [(head, 0) for head in good]
    assert len(guest.engine.take_rare()) == 3


def test_frames_before_a_bad_buffer_arrive() -> None:
    with Guest(rx=()) as guest:
        guest.refill = False
        guest.engine.park()
        guest.post((200,))
        guest.post((200,))
        guest.rx.push(9999)
        guest.rx.publish(1)
        for _ in range(3):
            guest.engine.inject(FRAME)
        guest.engine.unpark()
        assert guest.rx.broken()
        guest.barrier()
        assert [frame.raw for frame in guest.collect()] == [FRAME] * 2
        assert guest.drops("ring_full") == 1


def test_buffer_shorter_than_the_header_breaks_the_ring() -> None:
    """5.1.6.3.1: at least the header's size, each."""
    for size in (0, 11):
        with Guest(rx=((size,),) if size else ()) as guest:
            if not size:
                raw(guest, RX, {0: (guest.tx_place, 0, F_WRITE, 0)})
            guest.engine.inject(FRAME)
            assert guest.rx.broken()
            assert_goes_on(guest, TX)


def test_connections_outlive_a_broken_ring(guest: Guest, family: Family) -> None:
    """A driver that is reset takes the rings into use again: nothing that was sent is lost."""
    conn, sock = open_pair(guest, family)
    with sock:
        guest.barrier()
        guest.refill = False
        guest.rx.start_at(guest.rx.last_used)
        guest.rx.push(9999)
        guest.rx.publish(1, force=True)
        sock.sendall(b"meanwhile")
        assert guest.rx.broken()
        conn.push(b"one way still works")
        assert read_exactly(sock, 19) == b"one way still works"
        guest.engine.ring_stop(RX)
        guest.rx.start_at(0)
        guest.rx.free.extend(range(guest.rx.num))
        guest.start_ring(RX, 0)
        for _ in range(16):
            guest.post((2048,))
        assert conn.read(9) == b"meanwhile"


# ---- notifications


@pytest.mark.parametrize("features", [FULL, FULL & ~EVENT_IDX], ids=["event_idx", "flags"])
def test_interrupts_are_those_wanted(features: int) -> None:
    with Guest(features) as guest:
        guest.rx.disarm()
        guest.rx.called()

        def inject(count: int) -> None:
            for _ in range(count):  # each in a turn of its own
                assert guest.engine.inject(FRAME)
                guest.barrier()

        inject(3)
        assert guest.rx.called() == 0
        assert len(guest.collect()) == 3
        guest.rx.arm()
        inject(1)
        assert guest.rx.called() == 1
        inject(2)
        # With the index there is one for the entry that was named, with the flag one for each.
        assert guest.rx.called() == (0 if features & EVENT_IDX else 2)
        guest.collect()


def test_interrupt_at_the_entry_that_is_named() -> None:
    """2.7.7.2, also where it is passed amid a batch, and where the index wraps."""
    for start in (0, 65530):
        with Guest(start_index=start, rx=((200,),) * 64) as it:
            for count, named, due in ((1, 0, True), (1, 1, False), (5, 4, True), (5, 2, True), (5, 5, False)):
                it.engine.park()
                it.memory.store16(it.rx.avail + 4 + 2 * it.rx.num, it.rx.last_used + named)
                it.rx.called()
                for _ in range(count):
                    assert it.engine.inject(FRAME)
                it.engine.unpark()
                it.barrier()
                assert it.rx.called() == due
                assert len(it.collect()) == count


@pytest.mark.parametrize("features", [FULL, FULL & ~EVENT_IDX], ids=["event_idx", "flags"])
def test_kicks_are_those_wanted(features: int, family: Family) -> None:
    with Guest(features, rx=((2048,),) * 8) as guest:
        conn, sock = open_pair(guest, family)
        with sock:
            guest.barrier()
            guest.refill = False
            guest.engine.park()
            heads = []
            due = []
            for _ in range(3):
                heads.append(guest.tx.add(guest.layout(guest.vnet + FRAME, ())))
                due.append(guest.tx.publish(1))
            guest.engine.unpark()
            guest.reap_tx(heads[-1])
            guest.barrier()
            # An idle device wants one kick; with the flag it cannot say that one is enough.
            assert due == ([True, False, False] if features & EVENT_IDX else [True, True, True])
            # Receive buffers: of no interest, until somebody waits for one.
            buffers = [Part(guest.memory.take(2048), 2048, write=True)]
            guest.rx_buffers[guest.rx.add(buffers)] = buffers
            assert not guest.rx.publish(1)
            data = pattern(30_000)
            sock.sendall(data)
            taken = b""
            while guest.rx_buffers:
                taken += b"".join(frame.payload for frame in guest.collect() if conn.mine(frame))
            # A busy kernel may deliver the rest of the data a little later, and then somebody waits.
            used = guest.rx.avail_idx
            guest.rx_buffers[guest.rx.add(buffers)] = buffers
            wait_until(lambda: guest.rx.kick_due(used))
            assert guest.rx.publish(1)
            more = guest.receive(conn.mine).payload
            assert taken + more == data[: len(taken) + len(more)]
            assert more


def busy_poll(guest: Guest, microseconds: int) -> None:
    guest.engine.park()
    guest.engine.busy_poll(microseconds)
    guest.engine.unpark()


@pytest.mark.parametrize("busy", [0, 5, 50])
@pytest.mark.parametrize("features", [FULL, FULL & ~EVENT_IDX], ids=["event_idx", "flags"])
def test_frames_that_come_while_the_ring_is_looked_at(features: int, busy: int) -> None:
    """None is overlooked: the driver kicks only where that is wanted, and nothing else wakes the data plane."""
    with Guest(features) as guest:
        busy_poll(guest, busy)
        parts = guest.layout(guest.vnet + FRAME, ())
        for _ in range(500):
            for _ in range(3):
                head = guest.tx.add(parts)
                guest.tx.publish(1)
            guest.reap_tx(head)
        assert frames_from(guest) == 1500


@pytest.mark.parametrize("features", [FULL, FULL & ~EVENT_IDX], ids=["event_idx", "flags"])
def test_no_kicks_for_one_that_looks_by_itself(features: int) -> None:
    with Guest(features) as guest:
        parts = guest.layout(guest.vnet + FRAME, ())
        busy_poll(guest, 20_000_000)
        guest.send(FRAME)  # for which a kick was asked before it began to look
        for _ in range(3):
            head = guest.tx.add(parts)
            assert not guest.tx.publish(1)
            guest.reap_tx(head)
        assert frames_from(guest) == 4


@pytest.mark.parametrize("features", [FULL, FULL & ~EVENT_IDX], ids=["event_idx", "flags"])
def test_one_that_looks_by_itself_does_so_beside_events_without_end(features: int) -> None:
    with Guest(features) as guest:
        busy_poll(guest, 20_000_000)
        guest.send(FRAME)
        # It does not listen, has always hung up, and nothing can be accepted from it: an event in each turn.
        guest.engine.listen(socket.socket().detach(), 80)
        for _ in range(3):
            guest.send(FRAME)
        assert frames_from(guest) == 4


@pytest.mark.parametrize("features", [FULL, FULL & ~EVENT_IDX], ids=["event_idx", "flags"])
def test_one_that_has_looked_long_enough_sleeps(features: int) -> None:
    with Guest(features) as guest:
        busy_poll(guest, 1000)
        thread = next(one for one in threading.enumerate() if one.name == "data plane")
        task = Path(f"/proc/self/task/{thread.native_id}/stat")

        def ticks() -> int:
            return sum(map(int, task.read_text().rpartition(")")[2].split()[11:13]))

        def sleeps() -> bool:
            before = ticks()
            time.sleep(0.1)  # ten ticks
            return ticks() == before

        wait_until(sleeps)
        head = guest.tx.add(guest.layout(guest.vnet + FRAME, ()))
        assert guest.tx.publish(1)
        guest.reap_tx(head)


@pytest.mark.parametrize("busy", [0, 10_000_000])
def test_a_ring_that_is_stopped_wants_kicks(busy: int) -> None:
    """Without the event index: who serves it next may not know that it can say that it wants none."""
    with Guest(FULL & ~EVENT_IDX) as guest:
        busy_poll(guest, busy)
        guest.send(FRAME)
        guest.engine.ring_stop(TX)
        assert guest.memory.load16(guest.tx.used) == 0


# ---- life of a ring


@pytest.mark.parametrize("index", [RX, TX], ids=["rx", "tx"])
def test_ring_disabled_and_enabled(guest: Guest, index: int, family: Family) -> None:
    conn, sock = open_pair(guest, family)
    with sock:
        guest.barrier()
        guest.engine.ring_enable(index, False)
        sock.sendall(b"to the guest")
        frame = guest.vnet + bytes(conn.build(0x18, b"from it"))
        if index == TX:
            head = guest.tx.add(guest.layout(frame, ()))
            guest.tx.publish(1, force=True)
        guest.barrier()
        if index == RX:
            assert guest.collect() == []
        else:
            assert guest.tx.reap() == []
            assert conn.read(12, ack=False) == b"to the guest"
        guest.engine.ring_enable(index, True)
        if index == RX:
            assert conn.read(12) == b"to the guest"
        else:
            guest.reap_tx(head)
            assert read_exactly(sock, 7) == b"from it"


def test_ring_stopped_and_started_where_it_was(guest: Guest, family: Family) -> None:
    """GET_VRING_BASE and SET_VRING_BASE, as at every pause: nothing is lost or comes twice."""
    conn, sock = open_pair(guest, family)
    with sock:
        data = pattern(100_000)
        for at in range(0, len(data), 20_000):
            sock.sendall(data[at : at + 20_000])
            guest.tx.add(guest.layout(guest.vnet + bytes(conn.build(0x18, b"x")), ()))
            guest.tx.publish(1)
            conn.seq += 1
            bases = [guest.engine.ring_stop(index) for index in (RX, TX)]
            assert [ring[0] for ring in guest.engine.rings()] == [False, False]
            for index, base in enumerate(bases):
                guest.start_ring(index, base)
            assert conn.read(20_000) == data[at : at + 20_000]
        assert read_exactly(sock, 5) == b"xxxxx"


def test_each_ring_has_its_own_index(guest: Guest) -> None:
    with pytest.raises(ValueError, match="no ring 2"):
        guest.engine.ring_enable(2, True)
    with pytest.raises(ValueError, match="polling is not supported"):
        guest.engine.ring_kick(RX, None)


# ---- buffers of all sizes


@pytest.mark.parametrize(
    ("features", "rx"),
    [
        pytest.param(FULL, ((2048,),) * 128, id="usual"),
        pytest.param(FULL, ((13,), (301,), (77, 1, 5), (2049,), (12,)) * 50, id="odd"),
        pytest.param(FULL, ((100,),) * 800, id="small"),
        pytest.param(FULL, ((65536,),) * 8, id="large"),
        pytest.param(PLAIN, ((1526,),) * 64, id="plain"),
        pytest.param(PLAIN, ((99,), (12, 14, 5), (700,)) * 100, id="plain_odd"),
        pytest.param(SINGLE, ((12, 65550),) * 8, id="single_tso"),
        pytest.param(PROTOCOL_FEATURES | VERSION_1, ((1526,),) * 64, id="single"),
        pytest.param(PROTOCOL_FEATURES, ((10, 1514),) * 64, id="legacy"),
    ],
)
def test_a_stream_into_any_buffers(features: int, rx: tuple[tuple[int, ...], ...], family: Family) -> None:
    with Guest(features, rx=rx, num=1024) as guest:
        conn, sock = open_pair(guest, family)
        with sock:
            data = pattern(50_000)
            sock.sendall(data)
            assert conn.read(len(data)) == data
            assert_goes_on(guest, TX)
            assert not guest.rx.broken(0)


def test_indirect_both_ways(family: Family) -> None:
    """As Linux's driver does it, when the ring is short."""
    with Guest(num=16, rx=(), mtu=0) as guest:
        for _ in range(8):
            parts = [Part(guest.memory.take(size), size, write=True) for size in (12, 1000, 3000)]
            guest.rx_buffers[guest.rx.add(parts, indirect=True)] = parts
            guest.rx.publish(1)
        guest.refill = False
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
            peer.bind((V4.loopback, 0))
            peer.settimeout(5)
            for n in range(4):
                guest.send(guest.udp(V4, 5000, peer.getsockname()[1], pattern(3000, n)), sizes=[12, 42], indirect=True)
                data, where = peer.recvfrom(65536)
                assert data == pattern(3000, n)
                peer.sendto(data, where)
                assert guest.receive().payload == data
