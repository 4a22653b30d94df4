# SPDX-License-Identifier: GPL-2.0-or-later
"""The peers of connections that were lost in a move find out that they are connected to nobody.

The source may not tell them: its reset would come too early, or not at all.
So the target knocks from where the connection was (``sockstate.knock``), which
their own kernels answer with what ends it; some times over, since the network
may be switched late, and until then nobody hears it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import socket
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence

from godwit.dataplane import Engine, Side, sockstate

log = logging.getLogger(__name__)

#: Seconds, each after the one before; the first from the commit on.
KNOCKS = (0.0, 1.0, 2.0, 5.0)


class Knocks:
    """``schedule`` runs a function in another thread after some seconds."""

    def __init__(self, engine: Engine, schedule: Callable[[float, Callable[[], None]], None]) -> None:
        self._engine = engine
        self._schedule = schedule

    def begin(self, peers: Sequence[Side], scope: int) -> None:
        """Have these peers of lost connections told; ``scope`` is the interface index of link-local ones."""
        self._later(peers, scope, KNOCKS)

    def _later(self, peers: Sequence[Side], scope: int, delays: Sequence[float]) -> None:
        if peers and delays:
            self._schedule(delays[0], functools.partial(self._now, peers, scope, delays[1:]))

    def _now(self, peers: Sequence[Side], scope: int, delays: Sequence[float]) -> None:
        again: list[Side] = []
        failures: Counter[str] = Counter()
        with self._listening({peer.our_port for peer in peers}) as listening:
            for peer in peers:
                try:
                    with _shared(listening.get(peer.our_port, [])) as share:
                        ends = peer.our_addr, peer.our_port, peer.end_addr, peer.end_port
                        if not sockstate.knock(*ends, scope, share=share):
                            again.append(peer)
                except OSError as error:
                    why = str(error.strerror)
                    if error.errno == errno.EADDRNOTAVAIL:
                        why = "this host does not have the address that they know, and nobody here can speak for it"
                    failures[why] += 1
        for why, number in failures.items():
            log.warning("%d peers of lost connections will learn it only when they next send: %s", number, why)
        self._later(again, scope, delays)

    @contextlib.contextmanager
    def share(self, port: int) -> Iterator[bool]:
        """For a moment, let another socket of ours have a port that we may listen on; whether we do."""
        with self._listening({port}) as listening, _shared(listening.get(port, [])) as shared:
            yield shared

    @contextlib.contextmanager
    def _listening(self, ports: Container[int]) -> Iterator[dict[int, list[socket.socket]]]:
        """The listening sockets of these ports, by port. They stay the engine's."""
        found: dict[int, list[socket.socket]] = {}
        sockets = [socket.socket(fileno=fd) for fd in self._engine.listeners()]
        try:
            for sock in sockets:
                if (port := sock.getsockname()[1]) in ports:
                    found.setdefault(port, []).append(sock)
            yield found
        finally:
            for sock in sockets:
                sock.detach()


@contextlib.contextmanager
def _shared(listening: Sequence[socket.socket]) -> Iterator[bool]:
    """For a moment, let another socket of ours have the port of these; whether there are any."""
    try:
        for sock in listening:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        yield bool(listening)
    finally:
        for sock in listening:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)
