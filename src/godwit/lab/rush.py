# SPDX-License-Identifier: GPL-2.0-or-later
"""A rush at a port: connections without end, from many addresses, each given up as soon as it is open; or held.

In a process of its own, in a namespace of the laboratory::

    process = space.popen(rush_command("192.0.2.10", 7000, sources, 1_000_000), stdout=subprocess.PIPE)
    ...
    print(Rushed.read(process))

Connections end with a reset, so that none is left in TIME_WAIT. With ``flood``
they are bare SYNs from addresses that nobody has, written into a raw socket: the
kernel of the host that is called answers them, and nobody answers that.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import json
import os
import random
import resource
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple, Self

AT_ONCE = 256  # connections that are being opened
PATIENCE = 5.0  # seconds for each
_RESET = struct.pack("ii", 1, 0)  # socket(7), SO_LINGER


class Rushed(NamedTuple):
    """What became of the connections: ``opened`` were taken by the host's kernel, ``ended`` of these while held."""

    opened: int
    refused: int
    silent: int
    ended: int
    seconds: float

    @classmethod
    def read(cls, process: subprocess.Popen[bytes], timeout: float = 600.0) -> Self:
        """Wait for the end of a rush."""
        said, _ = process.communicate(timeout=timeout)
        return cls(**json.loads(said))


def rush_command(
    addr: str, port: int, sources: Sequence[str], count: int, *, hold: float = 0.0, flood: bool = False
) -> list[str]:
    """The words that start a rush of ``count`` connections from these addresses, held for so many seconds."""
    words = [sys.executable, "-m", __name__, addr, str(port), str(count), "--sources", ",".join(sources)]
    return [*words, "--hold", str(hold), *(["--flood"] if flood else [])]


class _Rush:
    def __init__(self, where: tuple[str, int], sources: Sequence[str], count: int, hold: float) -> None:
        self._where = where
        self._sources = itertools.cycle(sources)
        self._left = count
        self._hold = hold
        self._poll = select.epoll()
        self._opening: dict[int, tuple[socket.socket, float]] = {}
        self._held: dict[int, socket.socket] = {}
        self.opened = self.refused = self.silent = self.ended = 0

    def run(self) -> None:
        while self._left or self._opening:
            while self._left and len(self._opening) < AT_ONCE:
                self._left -= 1
                self._begin()
            self._wait(0.2)
        end = time.monotonic() + self._hold
        while self._hold and (left := end - time.monotonic()) > 0:
            self._wait(left)

    def _begin(self) -> None:
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        sock.setsockopt(socket.IPPROTO_IP, 24, 1)  # IP_BIND_ADDRESS_NO_PORT
        sock.bind((next(self._sources), 0))
        failed = sock.connect_ex(self._where)
        if failed not in (0, errno.EINPROGRESS):
            self.refused += 1
            sock.close()
            return
        self._opening[sock.fileno()] = (sock, time.monotonic() + PATIENCE)
        self._poll.register(sock, select.EPOLLOUT | select.EPOLLRDHUP)

    def _wait(self, seconds: float) -> None:
        for fd, events in self._poll.poll(seconds, 2 * AT_ONCE):
            if fd in self._held:
                self.ended += 1
                self._held.pop(fd).close()
                continue
            sock, _ = self._opening.pop(fd)
            if events & select.EPOLLERR or sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self.refused += 1
                sock.close()
                continue
            self.opened += 1
            if self._hold:
                self._held[fd] = sock
                self._poll.modify(fd, select.EPOLLRDHUP)
            else:
                sock.close()
        now = time.monotonic()
        for fd in [fd for fd, (_, until) in self._opening.items() if until < now]:
            self.silent += 1
            self._opening.pop(fd)[0].close()


def _flood(where: tuple[str, int], count: int) -> None:
    """SYNs alone, from 198.18.0.0/15 (RFC 2544)."""
    raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    target = socket.inet_aton(where[0])
    for _ in range(count):
        source = struct.pack(">I", 0xC6120000 | random.getrandbits(17))
        tcp = struct.pack(
            ">HHIIBBHHH", random.randrange(1024, 65536), where[1], random.getrandbits(32), 0, 5 << 4, 2, 65535, 0, 0
        )
        total = sum(struct.unpack(">10H", tcp)) + sum(struct.unpack(">4H", source + target)) + 6 + len(tcp)
        total = (total & 0xFFFF) + (total >> 16)
        total = (total & 0xFFFF) + (total >> 16)
        tcp = tcp[:16] + struct.pack(">H", ~total & 0xFFFF) + tcp[18:]
        head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 40, 0, 0, 64, 6, 0, source, target)
        try:
            raw.sendto(head + tcp, (where[0], 0))
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise


def main() -> int:
    """Rush, and say what came of it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("addr")
    parser.add_argument("port", type=int)
    parser.add_argument("count", type=int)
    parser.add_argument("--sources", type=lambda text: text.split(","), required=True)
    parser.add_argument("--hold", type=float, default=0.0)
    parser.add_argument("--flood", action="store_true")
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    began = time.monotonic()
    if options.flood:
        _flood((options.addr, options.port), options.count)
        made = Rushed(0, 0, options.count, 0, time.monotonic() - began)
    else:
        rush = _Rush((options.addr, options.port), options.sources, options.count, options.hold)
        rush.run()
        made = Rushed(rush.opened, rush.refused, rush.silent, rush.ended, time.monotonic() - began)
    sys.stdout.write(json.dumps(made._asdict()) + "\n")
    sys.stdout.flush()
    os._exit(0)  # thousands of sockets are closed by the kernel sooner than one by one


if __name__ == "__main__":
    sys.exit(main())
