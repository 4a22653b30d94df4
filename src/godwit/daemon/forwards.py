# SPDX-License-Identifier: GPL-2.0-or-later
"""The forwarded ports and the descriptors that they take.

Each port takes one, each connection of the guest takes one, and there is a
limit. Ports that were named are opened whatever that leaves. Of ``all`` ports
only so many are that a share is left for the guest's own connections; the log
says in one line what is missing.
"""

from __future__ import annotations

import logging
import resource
import socket
from collections.abc import Callable
from typing import NamedTuple

from godwit.confine.procfs import count_descriptors
from godwit.daemon.options import Options
from godwit.dataplane import Engine
from godwit.net.config import packed16
from godwit.net.forward import Bound, Listener, open_listeners, share
from godwit.net.records import MAX_FLOWS

log = logging.getLogger(__name__)

# Descriptors that no flow and no port of ``all`` may take: a front-end's
# (rings, memory, log, state), a helper's, and some for the moment.
KEPT = 128
# Of the rest, for the guest's own connections where all ports are forwarded.
FLOWS_SHARE = 0.25
FEW = 1024  # descriptors for these: the log says so where the ports that were named leave no more


class Inherited(NamedTuple):
    """Sockets that another process has handed over.

    ``bound``: those of forwarded ports, taken out of there as they are used. ``udp`` puts one of UDP into the data
    plane. ``open``: how many descriptors flows and forwarded ports have already.
    """

    bound: dict[Bound, int]
    udp: Callable[[Listener], None]
    open: int


def open_forwards(engine: Engine, options: Options, inherited: Inherited | None = None) -> int:
    """Open the forwarded ports for both IP versions; returns how many descriptors are left for flows.

    Raises `ForwardError` for a port that cannot be had.
    """
    tcp, udp = options.tcp_ports, options.udp_ports
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = MAX_FLOWS + tcp.ports + udp.ports
    if limit != resource.RLIM_INFINITY:
        free = limit - count_descriptors() - KEPT + (0 if inherited is None else inherited.open)
    most = max(0, free - int(free * FLOWS_SHARE))
    opened = 0
    left_out: dict[str, int] = {}
    there = set() if inherited is None else set(inherited.bound.values())
    for name, forwards, kind in (("TCP", tcp, socket.SOCK_STREAM), ("UDP", udp, socket.SOCK_DGRAM)):
        # Both versions, whatever the host has by now: later we may not be allowed to.
        listeners = open_listeners(
            forwards,
            kind=kind,
            ipv4=options.net.ipv4,
            ipv6=options.net.ipv6,
            freebind=options.freebind,
            most=share(tcp, udp, most) if kind == socket.SOCK_STREAM else most - opened,
            inherited=None if inherited is None else inherited.bound,
        )
        opened += len(listeners)
        if listeners.left_out:
            left_out[name] = listeners.left_out
        made: list[Listener] = []
        for one in listeners:
            if inherited is not None and kind == socket.SOCK_DGRAM and one.fd in there:
                inherited.udp(one)
            else:
                made.append(one)
        engine.listen_many((one.fd, one.to_port, target(one)) for one in made)
    left = max(1, free - opened)
    if left_out:
        log.warning(
            "of all ports %s are not forwarded: each takes a descriptor, and the limit (ulimit -Hn) is %d, with %d of"
            " them kept for the guest's own connections; raise it to %d, or name the ports that matter",
            " and ".join(f"{count} {name} ports" for name, count in left_out.items()),
            limit,
            left,
            limit + int(sum(left_out.values()) / (1 - FLOWS_SHARE)) + 1,
        )
    elif opened > most and left < FEW:
        log.warning(
            "%d forwarded ports leave %d descriptors for the guest's own connections: the limit (ulimit -Hn) is %d,"
            " raise it or forward fewer",
            opened,
            left,
            limit,
        )
    return min(MAX_FLOWS, left)


def target(listener: Listener) -> bytes | None:
    """The address behind the guest's MAC address that the port leads to, 16 bytes; None: the guest's own."""
    return None if listener.to_address is None else packed16(listener.to_address)
