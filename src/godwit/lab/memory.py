# SPDX-License-Identifier: GPL-2.0-or-later
"""The embedded guest's memory: a sealed memfd with rings and buffers in it.

Two regions, as a machine with memory above 4 GiB has them: the first, at
guest-physical 0, holds the rings and the frames that the guest sends; the
second, at 4 GiB, the buffers for what it receives. In this process the two are
one mapping, so user addresses and offsets into the file go together.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from typing import NamedTuple

from godwit.vhost_user import MemoryRegion, VringAddr, VringFlag

PAGE = 4096
HIGH = 1 << 32  # where the second region begins, guest-physical

# A frame of the TAP device: 65535 of IP, Ethernet with a VLAN tag, the header; in pages.
TX_FRAME = 17 * PAGE

RX, TX = 0, 1  # the queues' numbers, virtio 1.3, 5.1.2


class RingPlace(NamedTuple):
    """Where the three parts of a ring are, as offsets into the memory."""

    descriptor: int
    available: int
    used: int


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


class GuestMemory:
    """Memory for two rings of ``num`` entries and their buffers."""

    def __init__(self, num: int, rx_size: int, table_size: int) -> None:
        at = 0

        def take(size: int) -> int:
            nonlocal at
            place, at = at, at + _pages(size)
            return place

        self.rings = tuple(RingPlace(take(16 * num), take(6 + 2 * num), take(6 + 8 * num)) for _ in (RX, TX))
        self.tables = take(table_size)
        self.tx_frames = take(num * TX_FRAME)
        self.low_size = at
        self.rx_buffers = take(num * rx_size)
        self.size = at
        self.fd = os.memfd_create("godwit-guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, self.size)
            # The back-end may rely on the size: a shrunken file would be a SIGBUS to it.
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self.map = mmap.mmap(self.fd, self.size)
        except BaseException:
            os.close(self.fd)
            raise
        anchor = ctypes.c_char.from_buffer(self.map)
        self.base = ctypes.addressof(anchor)
        del anchor  # the mapping can be closed again

    def gpa(self, offset: int) -> int:
        """Return the guest-physical address of an offset."""
        return offset if offset < self.low_size else HIGH + offset - self.low_size

    def ring_addresses(self, queue: int) -> tuple[int, int, int]:
        """Return descriptors, available and used ring as addresses of this process."""
        place = self.rings[queue]
        return self.base + place.descriptor, self.base + place.available, self.base + place.used

    def vring_addr(self, queue: int, *, log: bool) -> VringAddr:
        """Return the ring for SET_VRING_ADDR."""
        descriptor, available, used = self.ring_addresses(queue)
        flags = VringFlag.LOG if log else 0
        return VringAddr(flags, descriptor, used, available, self.gpa(self.rings[queue].used))

    def regions(self) -> list[MemoryRegion]:
        """Return both regions for SET_MEM_TABLE."""
        return [
            MemoryRegion(0, self.low_size, self.base, 0, self.fd),
            MemoryRegion(HIGH, self.size - self.low_size, self.base + self.low_size, self.low_size, self.fd),
        ]

    def close(self) -> None:
        """Unmap it. Nothing may use ``base`` any more."""
        self.map.close()
        os.close(self.fd)


class DirtyLog:
    """A log of dirty pages to share with a back-end: one bit for each page of 4 KiB."""

    def __init__(self, memory: GuestMemory) -> None:
        last = HIGH + memory.size - memory.low_size
        self.size = _pages(last // PAGE // 8 + 1)
        self.fd = os.memfd_create("godwit-log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, self.size)
        self._map = mmap.mmap(self.fd, self.size)

    def pages(self) -> set[int]:
        """Return the numbers (guest-physical address / 4096) of the pages logged so far."""
        found = set()
        data = self._map[:]
        at = 0
        while at < len(data):
            if data[at : at + PAGE].count(0) == PAGE:
                at += PAGE
                continue
            for index in range(at, at + PAGE):
                for bit in range(8):
                    if data[index] >> bit & 1:
                        found.add(index * 8 + bit)
            at += PAGE
        return found

    def close(self) -> None:
        """Give it up; the back-end may hold it for a while longer."""
        self._map.close()
        os.close(self.fd)
