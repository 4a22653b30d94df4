# SPDX-License-Identifier: GPL-2.0-or-later
"""Files of procfs that a process reads for as long as it lives, although it sees no procfs any more."""

from __future__ import annotations

import contextlib
import os
from typing import Final

from godwit.confine import _kernel

DESCRIPTORS: Final = "/proc/self/fd"
MEMORY: Final = "/proc/self/statm"
UNIX_SOCKETS: Final = "/proc/self/net/unix"

_PIECE: Final = 65536
_NETWORK: Final = "/proc/thread-self/ns/net"
_kept: dict[str, int] = {}
_network: int | None = None


def keep() -> None:
    """Open all of them now. For the process that reads them: each shows who has opened it.

    Where there is no procfs, they are missed when they are read.
    """
    global _network
    with contextlib.suppress(OSError):
        _network = network_namespace()
    for path in (DESCRIPTORS, MEMORY, UNIX_SOCKETS):
        with contextlib.suppress(OSError):
            _kept[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def detach() -> None:
    """Have no way from the folder that was kept to the rest of procfs and beyond.

    In a mount namespace of one's own, while it still has procfs: the folder becomes the root of a mount that is
    attached nowhere, whose parent is itself.
    """
    if DESCRIPTORS not in _kept:
        return
    tree = _kernel.open_tree(os.fsencode(DESCRIPTORS))
    try:
        inside = os.open(".", os.O_RDONLY | os.O_CLOEXEC, dir_fd=tree)
    finally:
        os.close(tree)
    os.close(_kept[DESCRIPTORS])
    _kept[DESCRIPTORS] = inside


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


def foreign_descriptors() -> list[int]:
    """The descriptors that are open now but for those that are kept here; none where there is no procfs."""
    try:
        return [fd for fd in map(int, os.listdir(DESCRIPTORS)) if fd not in _kept.values()]
    except OSError:
        return []


def unix_sockets() -> set[bytes]:
    """The names of the UNIX sockets in this network namespace, those of abstract ones with @ for each NUL."""
    # number, references, protocol, flags, type, state, inode, path
    return {words[7] for line in read(UNIX_SOCKETS).splitlines() if len(words := line.split()) == 8}
