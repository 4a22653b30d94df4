# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that wants to be in the way: rings that take long to read, that are broken, that are kicked all the time.

What is random, and frames, is in ``test_fuzz.py``; how much a guest can make grow in ``test_limits.py``. A longer run,
with figures: ``python -m godwit.lab.hostile``.
"""

from __future__ import annotations

import os
import select
import struct
import threading
from collections.abc import Callable

import pytest

from .driver import (
    F_INDIRECT,
    F_NEXT,
    F_WRITE,
    RX,
    SYN,
    TIMEOUT,
    TX,
    V4,
    Conn,
    Family,
    Guest,
    Server,
    open_pair,
    other_frame,
    pattern,
    read_exactly,
    wait_until,
)

FRAME = other_frame(60)
FF_RING_WAIT = 0x10  # plane.pxd
Entry = tuple[int, int, int, int]


def put(guest: Guest, index: int, entries: list[Entry]) -> None:
    """Descriptors as they are, from 0 on, and the first of them made available."""
    ring = guest.rings[index]
    for i, entry in enumerate(entries):
        ring.set_desc(i, *entry)
    ring.push(0)
    ring.publish(1, force=True)


# ---- rings that are broken


def faults(guest: Guest) -> list[tuple[int, str]]:
    """What the data plane says of broken rings, once it does."""
    told: list[tuple[int, str]] = []

    def hear() -> bool:
        told.extend(guest.engine.take_faults())
        return bool(told)

    wait_until(hear)
    return told


def table(guest: Guest, entries: list[Entry]) -> int:
    at = guest.memory.take(16 * len(entries))
    guest.memory.write(at, b"".join(struct.pack("<QIHH", *entry) for entry in entries))
    return at


BREAKS: dict[str, tuple[str, Callable[[Guest, int, int], list[Entry]]]] = {
    "loop": ("runs in a circle", lambda g, num, d: [(g.tx_place, 1, d | F_NEXT, 1), (g.tx_place, 1, d | F_NEXT, 0)]),
    "beyond": ("there is none of", lambda g, num, d: [(g.tx_place, 1, d | F_NEXT, num)]),
    "outside": ("memory that the guest does not have", lambda g, num, d: [(1 << 50, 100, d, 0)]),
    "direction": ("the other way round", lambda g, num, d: [(g.tx_place, 100, d ^ F_WRITE, 0)]),
    "table": ("indirect table", lambda g, num, d: [(table(g, [(g.tx_place, 100, d, 0)]), 17, F_INDIRECT, 0)]),
    "long": ("more descriptors", lambda g, num, d: [(g.tx_place, 1, d | F_NEXT, n + 1) for n in range(num - 1)]),
}


@pytest.mark.parametrize("index", [RX, TX], ids=["rx", "tx"])
@pytest.mark.parametrize("name", BREAKS)
def test_the_control_thread_hears_which_rule_was_broken(index: int, name: str) -> None:
    words, entries = BREAKS[name]
    num = 2048 if name == "long" else 256
    with Guest(num=num, rx=() if index == RX else ((2048,),) * 4) as guest:
        put(guest, index, entries(guest, num, F_WRITE if index == RX else 0))
        if index == RX:
            guest.engine.inject(FRAME)
        assert guest.rings[index].broken()
        told = faults(guest)
        assert [ring for ring, _ in told] == [index]
        assert words in told[0][1]
        guest.barrier()
        assert guest.engine.take_faults() == []


def test_a_ring_that_is_found_broken_at_the_end_of_a_turn(family: Family) -> None:
    """By who waits for its buffers: the control thread is called at once, and not when something else happens."""
    with Guest(rx=()) as guest:
        server = Server(family)
        guest.send((conn := Conn(guest, family, server.port)).build(SYN, options=conn.options()))
        wait_until(lambda: guest.engine.flows()[0]["flags"] & FF_RING_WAIT)
        guest.engine.take_rare()
        with guest.engine.parked():
            guest.memory.store16(guest.rx.avail + 2, guest.rx.avail_idx + guest.rx.num + 1)
        assert guest.rx.broken()
        assert select.select([guest.engine.rare_fileno()], [], [], TIMEOUT)[0]
        assert [index for index, _ in guest.engine.take_faults()] == [RX]
        server.close()


@pytest.mark.parametrize("index", [RX, TX], ids=["rx", "tx"])
def test_a_ring_that_runs_ahead_says_so(guest: Guest, index: int) -> None:
    ring = guest.rings[index]
    guest.memory.store16(ring.avail + 2, ring.avail_idx + ring.num + 1)
    ring.kick()
    guest.engine.inject(FRAME)
    assert ring.broken()
    told = faults(guest)
    assert told == [(index, "its available index is ahead by more entries than the ring has")]


# ---- rings that take long to read


@pytest.mark.parametrize("index", [RX, TX], ids=["rx", "tx"])
def test_descriptors_of_no_length_count_too(index: int) -> None:
    """Else each of a ring's entries could be a chain of all its descriptors, read to its end for one byte."""
    num = 4096
    right = F_WRITE if index == RX else 0
    with Guest(num=num, rx=() if index == RX else ((2048,),) * 4) as guest:
        nothing = [(0, 0, right | F_NEXT, n + 1) for n in range(num - 1)]
        put(guest, index, [*nothing, (guest.tx_place, 2048, right, 0)])
        if index == RX:
            guest.engine.inject(FRAME)
        assert guest.rings[index].broken()


# ---- what changes all the time


def test_kicks_in_a_storm(guest: Guest) -> None:
    """Of either ring, with nothing in it or with broken ones: what else there is to do is done."""
    conn, sock = open_pair(guest, V4)
    over = threading.Event()

    def storm() -> None:
        while not over.is_set():
            for ring in guest.rings:
                os.eventfd_write(ring.kick_fd, 1)

    thread = threading.Thread(target=storm)
    thread.start()
    try:
        with sock:
            for n in range(50):
                conn.push(b"%4d" % n)
                assert read_exactly(sock, 4) == b"%4d" % n
                sock.sendall(pattern(1000, n))
                assert conn.read(1000) == pattern(1000, n)
                with guest.engine.parked():
                    pass
            put(guest, TX, [(1 << 50, 100, 0, 0)])
            assert guest.tx.broken()
            assert guest.engine.inject(FRAME)
            assert guest.receive(lambda frame: frame.raw == FRAME).raw == FRAME
    finally:
        over.set()
        thread.join()


def test_memory_that_is_taken_away_and_comes_back_all_the_time(guest: Guest) -> None:
    """Rings stand still without it, nothing is read or written where it was, and all goes on with it."""
    conn, sock = open_pair(guest, V4)
    with sock:
        data = pattern(200_000)
        sent = memoryview(data)
        sock.setblocking(False)
        for _ in range(100):
            if sent:
                try:
                    sent = sent[sock.send(sent[:20_000]) :]
                except BlockingIOError:
                    pass
            guest.engine.set_memory([])
            guest.tx.kick()
            guest.engine.inject(FRAME)
            guest.engine.set_memory(guest.memory.table())
            conn.acknowledge()
        sock.setblocking(True)
        sock.sendall(sent)
        assert conn.read(len(data)) == data
        conn.push(b"from the guest")
        assert read_exactly(sock, 14) == b"from the guest"


def test_rings_lie_where_they_are_aligned() -> None:
    """Whatever the front-end calls that place: where its memory begins amid a word of the file, no ring can be."""
    with Guest() as guest:
        piece = guest.memory.regions[0]
        odd = os.memfd_create("odd", os.MFD_CLOEXEC)
        os.ftruncate(odd, piece.size + 1)
        guest.engine.set_memory([(piece.addr, piece.size, 1 << 40, 1, odd)])
        for index, ring in enumerate(guest.rings):
            with pytest.raises(OSError, match="does not lie in the memory"):
                guest.engine.ring_addr(
                    index, 0, (1 << 40) + ring.desc, (1 << 40) + ring.used, (1 << 40) + ring.avail, 0
                )
