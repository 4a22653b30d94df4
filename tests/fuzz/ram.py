# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory and the rings of a guest that is driven in one thread, step by step.

It is two regions of one file, one behind the other for the guest and nowhere
near each other in the engine's address space: what lies across their border is
in two places. Whatever the engine may not write is compared with what was
there before.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
from collections.abc import Iterable
from typing import Final

from godwit.dataplane import Engine

from .devices import require

RX, TX = 0, 1
PAGE: Final = 4096
BASE: Final = 0x10_0000  # the guest's address of the first byte
USER: Final = 0x7F00_0000_0000  # what the front-end calls it, less that
FIRST: Final = 0x1_2000  # bytes of the first region
SIZE: Final = 0x2_0000  # of both
F_NEXT, F_WRITE, F_INDIRECT = 1, 2, 4

# Where the rings lie, from the first byte on.
DESC: Final = (0x0000, 0x1000)
AVAIL: Final = (0x2000, 0x2800)
USED: Final = (0x3000, 0x3800)
FREE: Final = 0x4000  # and what is behind them

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_PRIVATE, _ANONYMOUS, _FIXED_NOREPLACE = 0x02, 0x20, 0x100000


def guard(fd: int) -> None:
    """Have a page that nobody may touch before and behind each mapping of that file, where nothing else lies."""
    inode = str(os.fstat(fd).st_ino)
    with open("/proc/self/maps") as maps:
        found = [line.split() for line in maps]
    for line in found:
        if line[4] == inode:
            start, end = (int(number, 16) for number in line[0].split("-"))
            for at in (start - PAGE, end):
                taken = _libc.mmap(at, PAGE, 0, _PRIVATE | _ANONYMOUS | _FIXED_NOREPLACE, -1, 0)
                if taken == at and hasattr(_libc, "__asan_poison_memory_region"):
                    # What the kernel does for us there would otherwise only fail.
                    _libc.__asan_poison_memory_region(ctypes.c_void_p(at), ctypes.c_size_t(PAGE))


class Ram:
    """A guest's memory, with both rings in it."""

    def __init__(self, fill: int = 0xA5) -> None:
        self.fd = os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, SIZE)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        self.map = mmap.mmap(self.fd, SIZE)
        self.words = memoryview(self.map).cast("H")
        self.blank = bytes(FREE) + bytes([fill]) * (SIZE - FREE)
        self.before = bytearray(self.blank)  # what is there, but for what the engine may write
        self.eventfds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(6)]
        self.num = 0

    def kick_fd(self, ring: int) -> int:
        return self.eventfds[ring]

    def err_fd(self, ring: int) -> int:
        return self.eventfds[4 + ring]

    def table(self) -> list[tuple[int, int, int, int, int]]:
        """What Engine.set_memory() takes."""
        pieces = ((0, FIRST), (FIRST, SIZE - FIRST))
        return [(BASE + at, size, USER + BASE + at, at, os.dup(self.fd)) for at, size in pieces]

    def attach(self, engine: Engine, features: int, num: int, index: int = 0) -> None:
        """All that a front-end tells, of rings of ``num`` entries that have got to ``index``; the memory is as new."""
        engine.set_features(features)
        engine.set_memory(self.table())
        self.wipe()
        self.num = num
        for ring in (RX, TX):
            self.start(engine, ring, index)

    def wipe(self) -> None:
        """As it was at the beginning."""
        self.map[:] = self.before[:] = self.blank

    def start(self, engine: Engine, ring: int, index: int) -> None:
        """A ring, as if ``index`` entries had been through it."""
        self.store16(AVAIL[ring], 0)
        self.store16(AVAIL[ring] + 2, index)
        self.store16(USED[ring] + 2, index)
        engine.ring_num(ring, self.num)
        engine.ring_base(ring, index)
        desc, used, avail = (USER + BASE + at[ring] for at in (DESC, USED, AVAIL))
        engine.ring_addr(ring, 0, desc, used, avail, BASE + USED[ring])
        for number, call in enumerate((engine.ring_kick, engine.ring_call, engine.ring_err)):
            call(ring, os.dup(self.eventfds[2 * number + ring]))
        engine.ring_enable(ring, True)

    # ---- what the guest writes and reads, from the first byte on

    def write(self, at: int, data: bytes) -> None:
        end = at + len(data)
        self.map[at:end] = self.before[at:end] = data

    def store16(self, at: int, value: int) -> None:
        self.words[at // 2] = value & 0xFFFF  # one store
        self.before[at : at + 2] = struct.pack("<H", value & 0xFFFF)

    def load16(self, at: int) -> int:
        return self.words[at // 2]

    def set_desc(self, ring: int, number: int, addr: int, size: int, flags: int, following: int = 0) -> None:
        self.write(DESC[ring] + 16 * number, struct.pack("<QIHH", addr, size, flags, following))

    def push(self, ring: int, at: int, head: int) -> None:
        """Make an entry, the one of that index, and show it."""
        self.store16(AVAIL[ring] + 4 + 2 * (at % self.num), head)
        self.store16(AVAIL[ring] + 2, at + 1)

    def kick(self, ring: int) -> None:
        os.eventfd_write(self.kick_fd(ring), 1)

    def used(self, ring: int, last: int) -> list[tuple[int, int]]:
        """The (head, bytes written) that have come back since that index."""
        found = []
        while last != self.load16(USED[ring] + 2):
            at = USED[ring] + 4 + 8 * (last % self.num)
            found.append(struct.unpack("<II", self.map[at : at + 8]))
            last = (last + 1) & 0xFFFF
            require(len(found) <= self.num, "more used entries than the ring has")
        return found

    def broken(self, ring: int) -> bool:
        """Whether the engine has said so since the last question."""
        try:
            return os.eventfd_read(self.err_fd(ring)) > 0
        except BlockingIOError:
            return False

    # ---- what is to stay as it is

    def check(self, allowed: Iterable[tuple[int, int]]) -> None:
        """Nothing has changed but within the used rings and what is allowed: (first byte, one behind the last)."""
        rings = [(at, at + 6 + 8 * self.num) for at in USED]
        at = 0
        for start, end in sorted((*rings, *allowed)):
            if start > at and self.map[at:start] != self.before[at:start]:
                where = next(i for i in range(at, start) if self.map[i] != self.before[i])
                require(False, f"the byte at {where:#x} was written, {start - where} before what may be")
            at = max(at, end)
        require(self.map[at:] == self.before[at:], f"something behind {at:#x} was written")
