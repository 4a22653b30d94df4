# SPDX-License-Identifier: GPL-2.0-or-later
"""The bytes that the laboratory's transfers carry: each one known in advance.

A stream has a seed. Its bytes repeat after ``PERIOD``, a prime, so that what
software likes to lose or to repeat (powers of two, whole segments) is never a
whole number of periods. One period comes from a linear congruential generator,
x = x * 1664525 + 1013904223 modulo 2**32 from x = seed on, whose top byte is
the stream's. The checksum is the CRC-32 of zlib over all bytes.

``guest_agent/agent.c`` computes the same inside a QEMU guest.
"""

from __future__ import annotations

import functools
import zlib

PERIOD = 65521


@functools.lru_cache(maxsize=64)
def period(seed: int) -> bytes:
    """Return the first ``PERIOD`` bytes of the stream, after which it repeats."""
    x = seed & 0xFFFFFFFF
    out = bytearray(PERIOD)
    for i in range(PERIOD):
        x = (x * 1664525 + 1013904223) & 0xFFFFFFFF
        out[i] = x >> 24
    return bytes(out)


def chunk(seed: int, offset: int, limit: int) -> memoryview:
    """Return up to ``limit`` bytes of the stream from ``offset`` on, without a copy; never none."""
    at = offset % PERIOD
    return memoryview(period(seed))[at : at + limit]


def crc32(seed: int, length: int) -> int:
    """Return the checksum of the first ``length`` bytes."""
    block = period(seed)
    crc = 0
    for _ in range(length // PERIOD):
        crc = zlib.crc32(block, crc)
    return zlib.crc32(block[: length % PERIOD], crc)


class Receiver:
    """Checks a stream as it arrives.

    ``received`` bytes came, ``crc`` is their checksum, ``wrong_at`` the offset
    of the first byte that is not the stream's (None while all are).
    """

    def __init__(self, seed: int) -> None:
        self._block = period(seed) * 2
        self.received = 0
        self.crc = 0
        self.wrong_at: int | None = None

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the stream."""
        view = memoryview(data)
        while view:
            at = self.received % PERIOD
            part, view = view[:PERIOD], view[PERIOD:]
            if self.wrong_at is None and part != self._block[at : at + len(part)]:
                good = next(i for i, byte in enumerate(part) if byte != self._block[at + i])
                self.wrong_at = self.received + good
            self.crc = zlib.crc32(part, self.crc)
            self.received += len(part)
