# SPDX-License-Identifier: GPL-2.0-or-later
"""Files of procfs that a process reads for as long as it lives, although it sees no procfs any more."""

from __future__ import annotations

import os
from typing import Final

DESCRIPTORS: Final = "/proc/self/fd"
MEMORY: Final = "/proc/self/statm"
UNIX_SOCKETS: Final = "/proc/self/net/unix"

_PIECE: Final = 65536
_NETWORK: Final = "/proc/thread-self/ns/net"
_kept: dict[str, int] = {}
_network: int | None = None


def keep() -> None:
    """Open all of them now. For the process that reads them: each shows who has opened it."""
    global _network
    _network = network_namespace()
    for path in (DESCRIPTORS, MEMORY, UNIX_SOCKETS):
        _kept[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def read(path: str) -> bytes:
    """What is in one of them now. OSError where it cannot be read."""
    fd = _kept.get(path)
    if fd is None:
        with open(path, "rb") as file:
            return file.read()
    parts: list[bytes] = []
    while part := os.pread(fd, _PIECE, sum(map(len, parts))):
        parts.append(part)
    return b"".join(parts)


def count_descriptors() -> int:
    """How many descriptors are open."""
    folder = _kept.get(DESCRIPTORS, DESCRIPTORS)
    # Since Linux 6.2 the size of the folder is their number, and there may be a hundred thousand. Listing takes one.
    return os.stat(folder).st_size or len(os.listdir(folder)) - 1


def network_namespace() -> int:
    """Which network namespace this process is in, by its number."""
    return os.stat(_NETWORK).st_ino if _network is None else _network
