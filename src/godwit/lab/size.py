# SPDX-License-Identifier: GPL-2.0-or-later
"""What a process has of memory and descriptors, and whether it grows."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

MORE_MEMORY = 4 << 20  # bytes: of what Python and the C library keep to themselves
MORE_DESCRIPTORS = 4

# One heap, not one for each few threads; no cache of freed blocks for each thread, which count as in use; and large
# blocks go back to the system when they are freed, which the C library gives up after the first (mallopt(3)).
_LEAN = "glibc.malloc.arena_max=1:glibc.malloc.tcache_count=0:glibc.malloc.mmap_threshold=131072"


@contextlib.contextmanager
def lean() -> Iterator[None]:
    """Have the programs that are started in the block keep as little as they can of what they have freed.

    What they have then is what they use, and holes between it; otherwise the C library's stores fill for hours.
    """
    name = "GLIBC_TUNABLES"
    before = os.environ.get(name)
    os.environ[name] = _LEAN
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@dataclass(frozen=True)
class Size:
    """What a process has: bytes of its own memory, open descriptors."""

    memory: int
    descriptors: int

    @classmethod
    def of(cls, pid: int, *, datagrams: bool = True) -> Size:
        """Of a process, now. The guest's memory, which is shared, does not count.

        Without ``datagrams`` neither do sockets for these, and for pings: with nobody to close them, they stay a while.
        """
        with open(f"/proc/{pid}/status") as status:
            memory = next(int(line.split()[1]) for line in status if line.startswith("RssAnon:")) * 1024
        return cls(memory, len(os.listdir(f"/proc/{pid}/fd")) - (0 if datagrams else _datagram_sockets(pid)))

    def __str__(self) -> str:
        return f"{self.memory / 1024:.0f} KiB, {self.descriptors} descriptors"


def _datagram_sockets(pid: int) -> int:
    inodes = set()
    for protocol in ("udp", "udp6", "icmp", "icmp6"):
        with open(f"/proc/{pid}/net/{protocol}") as table:
            next(table)
            inodes |= {f"socket:[{line.split()[9]}]" for line in table}
    count = 0
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            count += os.readlink(f"/proc/{pid}/fd/{name}") in inodes
    return count


def growth(sizes: Mapping[str, Sequence[Size]], more_memory: int = MORE_MEMORY) -> list[str]:
    """What has grown from the first look to the last, by its name; who was looked at once has not."""
    found = []
    for name, looks in sizes.items():
        first, last = looks[0], looks[-1]
        if last.memory > first.memory + more_memory:
            found.append(f"{name} has grown from {first.memory} to {last.memory} bytes")
        if last.descriptors > first.descriptors + MORE_DESCRIPTORS:
            found.append(f"{name} has {last.descriptors} descriptors open, and had {first.descriptors}")
    return found
