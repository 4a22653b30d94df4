# SPDX-License-Identifier: GPL-2.0-or-later
"""A data plane's part of a hand-over: collected from one engine, put into another.

Nothing here touches a socket, a ring or the guest's memory: `godwit.dataplane.handover` has the reasons.
"""

from __future__ import annotations

import logging
import os
import socket

from godwit.daemon.forwards import Inherited, open_forwards, target
from godwit.daemon.options import Options
from godwit.dataplane import Datagram, Engine, handover
from godwit.dataplane.live import LiveFlag, LivePort
from godwit.net.forward import Bound, Listener, bound
from godwit.net.handover import Handed

log = logging.getLogger(__name__)

FORWARDED, FORWARDED_AT = 2, 3  # LivePort.kind


def collect(engine: Engine) -> Handed:
    """What the engine has. Its thread is parked, and its descriptors stay its own."""
    handover.flush_capture(engine)
    handed = Handed(
        observed=engine.observed(),
        regions=handover.regions(engine),
        rings=handover.rings(engine),
        listeners=engine.listeners(),
        tcp=handover.tcp(engine),
        pings=handover.pings(engine),
        partials=handover.partials(engine),
        frames=handover.frames(engine),
    )
    counters = engine.counters()
    drops = counters.pop("drops")
    handed.counters = {**counters, **{f"drops.{name}": count for name, count in drops.items()}}
    places: dict[int, int] = {}
    for index, port, fd in handover.ports(engine):
        places[index] = len(handed.ports)
        handed.ports.append((port, fd, engine.udp_waiting(index)))
    handed.peers = [(places[index], peer) for index, peer in handover.peers(engine)]
    return handed


def inherit(engine: Engine, options: Options, handed: Handed) -> int:
    """Put all that into a new engine, with the forwarded ports that this process is to have.

    Returns how many descriptors are left for flows. Raises ``ValueError``, ``OSError`` or ``ForwardError`` if this
    process cannot go on with it.
    """
    streams = [*handed.listeners, *(fd for _, fd, _, _ in handed.tcp if fd >= 0)]
    datagrams = [*(fd for _, fd, _ in handed.ports), *(fd for _, fd in handed.pings)]
    for fds, kind in ((streams, socket.SOCK_STREAM), (datagrams, socket.SOCK_DGRAM)):
        if any(each.kind != kind for each in bound(fds)):
            raise ValueError("a socket of another kind than it should be")
    handover.set_hash_key(engine, handed.process.hash_key)
    ports = _Ports(engine, handed)
    inherited = Inherited(ports.bound, ports.add_forwarded, handed.sockets())
    left = open_forwards(engine, options, inherited)
    for fd in ports.bound.values():
        os.close(fd)  # forwarded no more
    ports.add_own()
    for place, peer in handed.peers:
        index = ports.places[place]
        if index is not None:
            handover.add_peer(engine, index, peer)
    for flow, fd, to_guest, to_sock in handed.tcp:
        handover.add_tcp(engine, flow, fd, to_guest, to_sock)
    for ping, fd in handed.pings:
        handover.add_ping(engine, ping, fd)
    for place, partial in enumerate(handed.partials):
        handover.add_partial(engine, place, partial)
    _inherit_guest(engine, handed)
    handover.set_counters(engine, handed.counters)
    return left


def _inherit_guest(engine: Engine, handed: Handed) -> None:
    if handed.session is None:
        return
    engine.set_features(handed.session.features)
    engine.set_memory(handed.regions)
    for number, (ring, kick, call, err) in enumerate(handed.rings):
        handover.set_ring(engine, number, ring, kick, call, err)
    engine.set_observed(handed.observed)


class _Ports:
    """The UDP ports that were handed over, and where each is in the engine."""

    def __init__(self, engine: Engine, handed: Handed) -> None:
        self._engine = engine
        self._ports = handed.ports
        self.places: list[int | None] = [None] * len(handed.ports)  # None: not wanted here, or leads elsewhere now
        self._forwarded: dict[int, int] = {}  # place by descriptor
        for place, (port, fd, _) in enumerate(handed.ports):
            if port.flags & LiveFlag.FORWARD:
                self._forwarded[fd] = place
        forwarded = [*handed.listeners, *self._forwarded]
        self.bound: dict[Bound, int] = dict(zip(bound(forwarded), forwarded, strict=True))

    def add_forwarded(self, listener: Listener) -> None:
        """A port that is forwarded here too, with its peers if it leads where it did."""
        place = self._forwarded[listener.fd]
        port, fd, datagrams = self._ports[place]
        wanted = self._as_wanted(port, listener)
        same = (wanted.guest_addr, wanted.guest_port, wanted.kind) == (port.guest_addr, port.guest_port, port.kind)
        index = self._add(wanted, fd, datagrams if same else [])
        self.places[place] = index if same else None

    def _as_wanted(self, port: LivePort, listener: Listener) -> LivePort:
        address = target(listener)
        [at] = bound([listener.fd])
        wild = not any(at.address) and not at.device and address is None
        return port._replace(
            kind=FORWARDED if wild else FORWARDED_AT, guest_addr=address or bytes(16), guest_port=listener.to_port
        )

    def add_own(self) -> None:
        """Those that were opened when the guest first sent from them."""
        for place, (port, fd, datagrams) in enumerate(self._ports):
            if not port.flags & LiveFlag.FORWARD:
                self.places[place] = self._add(port, fd, datagrams)

    def _add(self, port: LivePort, fd: int, datagrams: list[Datagram]) -> int:
        return handover.add_port(self._engine, port, fd, datagrams)
