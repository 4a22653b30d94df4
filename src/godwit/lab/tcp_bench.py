# SPDX-License-Identifier: GPL-2.0-or-later
"""TCP cases of the bench: streams.

*Up* is from the guest to the server, *down* to the guest, over connections that
the guest has opened. What sends and receives (``_tcp``) are threads of this
process with sockets in the namespaces, one for each end, so that a back-end's
processor time is its own.

**Streams** send as much as goes, and the receiver throws it away unread. What is
measured begins when the windows have had time to open, and ends before the
senders do; then all that was sent must arrive. ``Gbit/s`` is the receiver's,
``CPU s/GiB`` and ``CPU s/s`` are the back-end's, ``fairness`` is Jain's index of
the streams' shares (1: all the same; 1/n: one has all).

A stream that stands still is a failure, never a low figure.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import time
from collections.abc import Iterator

from godwit.lab._tcp import Receiver, Sender
from godwit.lab.bench import Case, Side, Working
from godwit.lab.errors import LabError

GIB = 1 << 30
TIMEOUT = 5.0  # seconds for a connection to open
STREAMS = (1, 4, 16)
MTUS = (65520, 9000, 1500)


@contextlib.contextmanager
def _connections(side: Side, count: int) -> Iterator[tuple[list[socket.socket], list[socket.socket]]]:
    """Connections from the guest to a server: the guest's ends, and the server's in the same order."""
    guests: list[socket.socket] = []
    servers: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        with side.server.enter():
            listening = stack.enter_context(socket.create_server((side.server.addr4, 0)))
        listening.settimeout(TIMEOUT)
        for _ in range(count):
            with side.space.enter():
                guest = stack.enter_context(socket.create_connection(listening.getsockname(), TIMEOUT))
            server, _ = listening.accept()
            guests.append(guest)
            servers.append(stack.enter_context(server))
        for sock in (*guests, *servers):
            sock.setblocking(True)
        yield guests, servers


def _fds(socks: list[socket.socket]) -> list[int]:
    return [sock.fileno() for sock in socks]


def _fairness(shares: list[int]) -> float:
    """Jain's index (Jain, Chiu, Hawe 1984): 1 if all are the same, 1/n if one has all."""
    return sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares))


def _streams(side: Side, seconds: float, *, up: bool, count: int) -> dict[str, float]:
    with _connections(side, count) as (guests, servers):
        sources, targets = (guests, servers) if up else (servers, guests)
        sender, receiver = Sender(_fds(sources)), Receiver(_fds(targets))
        receiving, sending = Working(receiver.run), Working(sender.run)
        try:
            time.sleep(seconds / 4)
            began, cpu, before = time.monotonic(), side.cpu(), receiver.bytes
            time.sleep(seconds)
            took, cpu, after = time.monotonic() - began, side.cpu() - cpu, receiver.bytes
        finally:
            sender.stop()
            sending.result()
            receiving.result()
    if sender.bytes != receiver.bytes:
        raise LabError(f"{sender.bytes} bytes were sent, {receiver.bytes} have arrived")
    shares = [there - here for here, there in zip(before, after, strict=True)]
    total = sum(shares)
    if not total:
        raise LabError("nothing arrives")
    values = {"Gbit/s": total * 8 / took / 1e9}
    if side.guest is not None:
        values |= {"CPU s/GiB": cpu / total * GIB, "CPU s/s": cpu / took}
    if count > 1:
        values["fairness"] = _fairness(shares)
    return values


def _stream_cases() -> Iterator[Case]:
    for mtu in MTUS:
        for way in ("up", "down"):
            for count in STREAMS:
                yield Case(
                    f"stream-{way}-{count}-{mtu}",
                    f"{way}, {count} stream{'s' * (count > 1)}, MTU {mtu}",
                    mtu,
                    functools.partial(_streams, up=way == "up", count=count),
                )


CASES = tuple(_stream_cases())
