# SPDX-License-Identifier: GPL-2.0-or-later
"""Rings with anything in them: the target ``rings``.

Descriptors, tables, indices and addresses are what the script says: loops,
chains across the border of two regions, buffers over the rings, rings that are
stopped, started and disabled in between, memory that is taken away and comes
back. What holds: nothing is written but used rings and what a descriptor for
writing names; entries come back in order, with nothing written in those from
the guest; and whoever makes a mistake is told that the ring is broken, or gets
everything back.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from typing import Final

from godwit.dataplane import Engine
from godwit.net.config import packed16

from .devices import require
from .frames import ADDR4, ADDR6, FEATURES, GATEWAY4, GATEWAY6
from .nowhere import inside
from .ram import (
    AVAIL,
    BASE,
    DESC,
    F_INDIRECT,
    F_NEXT,
    F_WRITE,
    FIRST,
    FREE,
    RX,
    SIZE,
    TX,
    USER,
    Ram,
    guard,
)
from .script import Script, Writer
from .target import Target

SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128)
STEPS: Final = 64
DESCRIBE, TABLE, PUSH, INDEX, KICK, FRAME, RING, MEMORY = range(8)
PLACES: Final = (FREE, FREE + 0x400, FREE + 0x800)  # of frames from the guest that are good
REGION2: Final = (BASE + FIRST, SIZE - FIRST, USER + BASE + FIRST)


class Bench:
    """The engine and the guest's memory, which stays where it is."""

    def __init__(self) -> None:
        with inside():
            self.engine = Engine(max_flows=16)
        self.engine.configure(
            our_mac=bytes.fromhex("020000000001"),
            addr4=packed16(ADDR4),
            addr6=packed16(ADDR6),
            maps=[
                (packed16(GATEWAY4), 0, bytes(10) + b"\xff\xff\x7f\0\0\1", 0),
                (packed16(GATEWAY6), 0, bytes(15) + b"\1", 0),
            ],
        )
        self.ram = Ram()
        blank = bytearray(self.ram.blank)
        for at, frame in zip(PLACES, good_frames(), strict=True):
            blank[at : at + 12 + len(frame)] = bytes(12) + frame
        self.ram.blank = bytes(blank)
        self.ram.attach(self.engine, FEATURES[0], 1)
        guard(self.ram.fd)

    def run(self, data: bytes) -> bool:
        """An execution. Whether something came back."""
        with inside():
            run = Run(self, Script(data))
            try:
                return run.all()
            finally:
                run.restore()
                self.engine.close_flows()
                self.engine.step()
                self.engine.take_rare()


def good_frames() -> list[bytes]:
    """A datagram, a question and a ping."""
    head = bytes.fromhex("020000000001020000000002")
    return [
        head + bytes.fromhex("0800 4500002400000000401100 00c000020a c0000201 07d00050 0010 0000 6461746167726d21"),
        head + bytes.fromhex("0806 0001080006040001 020000000002 c000020a 000000000000 c0000201"),
        head + bytes.fromhex("86dd 60000000 0010 3a 40") + ADDR6.packed + GATEWAY6.packed
        + bytes.fromhex("8000 0000 0007 0001 70696e6770696e67"),
    ]  # fmt: skip


class Run:
    """One execution."""

    def __init__(self, bench: Bench, script: Script) -> None:
        self.engine, self.ram, self.script = bench.engine, bench.ram, script
        first = script.u8()
        self.num = SIZES[first >> 2 & 7]
        self.whole = True  # both regions are there
        self.writable: list[tuple[int, int]] = []  # what descriptors for writing name
        self.rows: list[int] = []  # where tables lie
        self.known = True  # who may be written; not if descriptors may have become others
        self.pushed: list[list[int] | None] = [[], []]  # and not back yet, if the order is known
        self.last = [0, 0]  # the used entries seen
        self.avail = [0, 0]
        self.came = False
        for ring in (RX, TX):
            self.engine.ring_stop(ring)
        self.ram.num = self.num
        self.ram.wipe()
        self.engine.set_features(FEATURES[first & 3])
        for ring in (RX, TX):
            self._start(ring, script.u16())

    def all(self) -> bool:
        """The whole script."""
        for _ in range(STEPS):
            if not self.script:
                break
            self._one()
        for ring in (RX, TX):
            self.ram.kick(ring)
        self._look()
        if self._safe():
            self.ram.check((at, min(end, SIZE)) for at, end in self.writable if at < end)
        return self.came

    def _start(self, ring: int, index: int) -> None:
        self.ram.start(self.engine, ring, index)
        self.last[ring] = self.avail[ring] = index
        self.pushed[ring] = []
        self.ram.broken(ring)

    def _one(self) -> None:
        script = self.script
        what = script.u8()
        kind, ring, more = what & 7, what >> 3 & 1, what >> 4
        if kind == DESCRIBE:
            self._describe(DESC[ring] + 16 * (script.u8() % self.num), more)
        elif kind == TABLE:
            at = FREE + 16 * (script.u16() % ((SIZE - FREE) // 16))
            self.rows.append(at)
            self._describe(at, more)
        elif kind == PUSH:
            head = script.u8() if more & 1 else script.u16()
            pushed = self.pushed[ring]
            if pushed is not None:
                pushed.append(head)
            self.ram.push(ring, self.avail[ring], head)
            self.avail[ring] = (self.avail[ring] + 1) & 0xFFFF
        elif kind == INDEX:
            self.avail[ring] = script.u16()
            self.pushed[ring] = None
            self.ram.store16(AVAIL[ring] + 2, self.avail[ring])
        elif kind == KICK:
            self.ram.kick(ring)
            self._look()
        elif kind == FRAME:
            self.engine.inject(b"\xee" * (14 + script.u16() % 2030))
            self._look()
        elif kind == RING:
            self._ring(ring, more)
        else:
            self._memory(more)

    def _ring(self, ring: int, how: int) -> None:
        if how < 4:
            self.engine.ring_enable(ring, bool(how & 1))
            return
        index = self.engine.ring_stop(ring)
        if self.whole:
            self._start(ring, index if how & 1 else self.script.u16())

    def _memory(self, how: int) -> None:
        if self.whole:
            self.engine.remove_region(*REGION2)
            self.whole = False
        else:
            self.restore()
        if how & 1:
            self._look()

    def restore(self) -> None:
        """Have both regions there."""
        if not self.whole:
            self.engine.add_region(*REGION2, FIRST, os.dup(self.ram.fd))
            self.whole = True

    def _describe(self, at: int, how: int) -> None:
        """A descriptor. ``how``: where what it names is, and of what size."""
        script = self.script
        kind = how & 3
        number = script.u16()
        offset = (
            (FREE + number % (SIZE - FREE)),
            PLACES[number % 3],
            FIRST - number % 2048,
            SIZE - number % 64 if number & 64 else number % FREE,
        )[kind]
        addr = BASE + offset
        flags = script.u8()
        size = script.u8() * 16 if how & 4 else script.u16() if flags & 8 else script.u8()
        if flags & 16:
            size = script.u32()
        if flags & 32:
            addr = script.u64()
            offset = addr - BASE
        following = script.u8() if flags & 64 else script.u16() if flags & 128 else (script.u8() % self.num)
        flags &= F_NEXT | F_WRITE | F_INDIRECT
        if offset < SIZE:
            if flags & F_WRITE:
                self.writable.append((max(offset, 0), min(offset + size, SIZE)))
            if flags & F_INDIRECT and (offset < FREE or offset % 16):
                self.known = False  # rows that were not meant to be any
        row = addr.to_bytes(8, "little") + size.to_bytes(4, "little")
        self.ram.write(at, row + flags.to_bytes(2, "little") + following.to_bytes(2, "little"))

    def _look(self) -> None:
        """Let the engine work, and see what it has done."""
        for _ in range(3):
            self.engine.step()
        for ring, state in enumerate(self.engine.rings()):
            started, enabled, broken = state[:3]
            told = self.ram.broken(ring)
            require(broken or not told, "a ring is said to be broken, and is not")
            pushed = self.pushed[ring]
            if not self._safe() or pushed is None:
                continue
            if len(pushed) > self.num:
                self.pushed[ring] = None  # not what a ring can hold
                continue
            back = self.ram.used(ring, self.last[ring])
            self.came |= bool(back)
            require([head for head, _ in back] == pushed[: len(back)], f"ring {ring}: another order")
            self.last[ring] = (self.last[ring] + len(back)) & 0xFFFF
            del pushed[: len(back)]
            if ring == TX:
                require(not any(size for _, size in back), "something was written for the guest's own")
                if started and enabled and not broken:
                    require(not pushed, "not all came back, and the ring is not broken")

    def _safe(self) -> bool:
        """Whether no buffer lies over a ring or a table."""
        if self.known:
            self.known = not any(
                start < FREE or any(start < row + 16 and row < end for row in self.rows) for start, end in self.writable
            )
        return self.known


bench: Callable[[], Bench] = cache(Bench)


def run(data: bytes) -> bool:
    """The target. Whether something came back."""
    return bench().run(data)


# ---- to begin with


def _row(writer: Writer, what: int, place: int, number: int, flags: int, size: int, following: int) -> Writer:
    layout = "B" if what & 7 == DESCRIBE else "H"
    return writer.put("B" + layout + "HBBB", what, place, number, flags, size, following)


def seeds() -> Iterator[bytes]:
    """Chains of one and of several, indirect ones, buffers, a stop, and memory that goes and comes."""
    for features in range(4):
        for size in (4, 6):
            for index in (0, 65533):
                head = features | size << 2
                small = Writer().put("BHH", head, index, index)
                for number in range(3):
                    _row(small, DESCRIBE | 1 << 3 | 1 << 4, number, number, 0, (54, 54, 82)[number], 0)
                    small.put("BB", PUSH | 1 << 3 | 1 << 4, number)
                yield small.put("B", KICK | 1 << 3).data
                yield small.put("BB", RING | 1 << 3 | 5 << 4, KICK | 1 << 3).put("BB", MEMORY, MEMORY).data
                chain = Writer().put("BHH", head, index, index)
                for number, part in enumerate((12, 20, 8, 14)):
                    follows = F_NEXT if number < 3 else 0
                    _row(chain, DESCRIBE | 1 << 3, number, sum((12, 20, 8, 14)[:number]), follows, part, number + 1)
                yield chain.put("BBB", PUSH | 1 << 3 | 1 << 4, 0, KICK | 1 << 3).data
                table = Writer().put("BHH", head, index, index)
                for number in range(2):
                    _row(table, TABLE, 0x300 + number, 27 * number, F_NEXT if not number else 0, 27, number + 1)
                _row(table, DESCRIBE | 1 << 3 | 4 << 4, 0, 0x3000, F_INDIRECT, 2, 0)
                yield table.put("BBB", PUSH | 1 << 3 | 1 << 4, 0, KICK | 1 << 3).data
                buffers = Writer().put("BHH", head, index, index)
                for number in range(4):
                    place = 0x4000 + 0x800 * number
                    _row(buffers, DESCRIBE | (2 if number == 3 else 0) << 4, number, place, F_WRITE | 8, 0, 0)
                    buffers.data = buffers.data[:-2]
                    buffers.put("HB", 1600, 0).put("BB", PUSH | 1 << 4, number)
                buffers.put("B", KICK)
                for length in (46, 1500, 2000):
                    buffers.put("BH", FRAME, length)
                yield buffers.put("B", KICK).data


TARGETS: Final = {"rings": Target(run, seeds, 1024)}
