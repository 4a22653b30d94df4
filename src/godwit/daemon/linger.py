# SPDX-License-Identifier: GPL-2.0-or-later
"""Sockets of a guest that moved away, kept open for a while: those of connections frozen and in repair mode.

While they are open the kernel does not answer a late packet with a reset, nor a
datagram with "port unreachable". But a guest may come back to this host sooner,
to another process (a daemon may serve one guest, once, and end), and the kernel
takes no second socket with the same two ends, or of UDP with the same port. So
who lingers listens on an abstract UNIX socket (unix(7)), whose names belong to
a network namespace as connections do, and gives up the sockets that a process
of the same user asks for.

The request is 36 bytes for each connection, up to the end of the stream: local
address (16 bytes, IPv4 as v4-mapped) and port (big-endian), then those of the
peer, zeros for a socket of UDP. The answer, when they are closed: how many there were (u32, big-endian).
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import itertools
import logging
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Sequence

from godwit.confine import procfs
from godwit.dataplane.state import Side
from godwit.net.config import packed16
from godwit.repair.client import peer_of

log = logging.getLogger(__name__)

#: Seconds for which the sockets stay.
LINGER_SECONDS = 10.0

_PREFIX = "godwit-linger-"
_ENDS = struct.Struct("!16sH16sH")
_COUNT = struct.Struct("!I")
_PATIENCE = 2.0  # seconds for the whole of a request to come
#: Seconds for the answer. The guest stands still, but who does not answer has sockets that it cannot come back without:
#: a busy host is no reason to lose them, and who has ended is not waited for.
_ANSWER = 5.0

_numbers = itertools.count()


class Linger:
    """The sockets of one guest that has moved; they are closed after a while, or by `close`.

    ``fewer`` is called when some of them have been closed.
    """

    def __init__(self, fds: Sequence[int], fewer: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        self._fds = set(fds)
        self._by_ends = {ends: fd for fd in fds if (ends := _ends_of(fd)) is not None}
        self._fewer = fewer
        self._server: asyncio.Server | None = None
        self._end = loop.call_later(LINGER_SECONDS, self.close)

    async def listen(self) -> None:
        """Give up what is asked for, from now on."""
        try:
            self._server = await asyncio.start_unix_server(
                self._serve, path=f"\0{_PREFIX}{os.getpid()}-{next(_numbers)}"
            )
        except OSError as error:
            log.warning("connections cannot come back to this host for %g s: %s", LINGER_SECONDS, error)

    def __len__(self) -> int:
        return len(self._fds)

    @property
    def remaining(self) -> float:
        """Seconds for which sockets are still kept."""
        return max(0.0, self._end.when() - asyncio.get_running_loop().time()) if self._fds else 0.0

    def leave_keeper(self) -> None:
        """Leave a process that keeps the sockets for the rest of the time, for one that has to end now.

        Not if that time is over. The keeper does nothing but wait: it gives nothing up.
        """
        left = self.remaining
        if left <= 0 or os.fork():
            return
        try:
            os.setsid()
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            low = 0
            for fd in sorted(self._fds):
                os.closerange(low, fd)
                low = fd + 1
            os.closerange(low, os.sysconf("SC_OPEN_MAX"))
            time.sleep(left)
        finally:
            os._exit(0)

    def close(self) -> None:
        """Close them. May be repeated."""
        self._end.cancel()
        if self._server is not None:
            self._server.close()
            self._server = None
        self._give_up(list(self._fds))
        self._by_ends.clear()

    def _give_up(self, fds: Sequence[int]) -> None:
        for fd in fds:
            os.close(fd)
        self._fds.difference_update(fds)
        if fds:
            self._fewer()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if not _is_ours(writer.get_extra_info("socket")):
                log.warning("another user asked for connections that have moved away: refused")
                return
            async with asyncio.timeout(_PATIENCE):
                request = await reader.read(-1)
                wanted = {request[at : at + _ENDS.size] for at in range(0, len(request), _ENDS.size)}
                found = [self._by_ends.pop(ends) for ends in wanted & self._by_ends.keys()]
                self._give_up(found)
                if found:
                    log.info("%d connections or UDP ports that had moved away come back to this host", len(found))
                writer.write(_COUNT.pack(len(found)))
                await writer.drain()
        except (OSError, TimeoutError) as error:
            log.debug("a request for connections that have moved away: %r", error)
        finally:
            writer.close()


def _is_ours(sock: socket.socket) -> bool:
    _, uid = peer_of(sock)
    return uid in (os.geteuid(), 0)


def _ends_of(fd: int) -> bytes | None:
    """Both ends of a socket, as in a request; None if it has none any more."""
    sock = socket.socket(fileno=fd)
    try:
        local = sock.getsockname()
        if sock.type == socket.SOCK_DGRAM:
            return _ENDS.pack(_packed(local[0]), local[1], bytes(16), 0)
        peer = sock.getpeername()
    except OSError:
        return None
    finally:
        sock.detach()
    return _ENDS.pack(_packed(local[0]), local[1], _packed(peer[0]), peer[1])


def _packed(address: str) -> bytes:
    return packed16(ipaddress.ip_address(address.partition("%")[0]))


def reclaim(sides: Sequence[Side], names: Sequence[str]) -> list[str]:
    """Have those that linger give up the sockets of connections that are about to be restored.

    Blocks, for a moment. Gives the names of those that answered: the others are
    not worth asking again.
    """
    request = b"".join(_ENDS.pack(side.our_addr, side.our_port, side.end_addr, side.end_port) for side in sides)
    return [name for name in names if _ask(name, request)]


def _ask(name: str, request: bytes) -> bool:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(_ANSWER)
            sock.connect(f"\0{name}")
            if not _is_ours(sock):
                return False  # a stranger's, and the guest's connections are none of its business
            sock.sendall(request)
            sock.shutdown(socket.SHUT_WR)
            return len(sock.recv(_COUNT.size)) == _COUNT.size
    except OSError:
        return False


def lingerers() -> list[str]:
    """The names of those that linger in this network namespace, us among them."""
    with contextlib.suppress(OSError):
        prefix = f"@{_PREFIX}".encode()
        return sorted(os.fsdecode(name[1:]) for name in procfs.unix_sockets() if name.startswith(prefix))
    return []
