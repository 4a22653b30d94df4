# SPDX-License-Identifier: GPL-2.0-or-later
"""Connections that have come to this host before their address has (``--freebind``).

The kernel does not connect a socket from an IPv4 address that the host does
not have (it finds no route from there), so their sockets are made when it has
it. Until then such a flow is *held*, and its port is *kept*: a listening socket
may have an address that is yet to come, and one that is frozen swallows what
arrives (`sockstate.freeze_listener`). Without it the first packet that reaches
the new address before the flow's socket is there would be answered with a
reset, and end the connection.

Flows are named by index and generation: they may end meanwhile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping

from godwit.dataplane import Engine, FlowState, Side, SocketState, sockstate
from godwit.net.records import V4_MAPPED, address_text, unpacked

log = logging.getLogger(__name__)

#: Seconds that a flow waits for its address, from the commit.
PATIENCE = 60.0
LOOK_EVERY = 0.05

# linux/in.h, linux/in6.h; the socket module has neither.
_FREEBIND = {socket.AF_INET: (socket.IPPROTO_IP, 15), socket.AF_INET6: (socket.IPPROTO_IPV6, 78)}


@dataclasses.dataclass
class Waiting:
    """A flow whose address is not here, and all that came of its socket."""

    state: FlowState
    ours: Side
    socket: SocketState
    sndq: bytes
    rcvq: bytes
    generation: int | None = None
    deadline: float = 0.0
    since: float = dataclasses.field(default_factory=time.monotonic)

    def on_time(self) -> SocketState:
        """The socket, its clock (TCP_TIMESTAMP) put on by the time that it has waited.

        Where the source can still reach the peer it repeats what was not acknowledged, and the peer then takes
        nothing that is older (RFC 7323, 5.3). Bit 0 of the clock is none: it says that the rest is in microseconds,
        not in milliseconds (net/ipv4/tcp.c, since Linux 6.7).
        """
        if not self.socket.timestamp:
            return self.socket
        units = 1_000_000 if self.socket.timestamp & 1 else 1000
        waited = int((time.monotonic() - self.since) * units) & ~1
        return self.socket._replace(timestamp=(self.socket.timestamp + waited) & 0xFFFFFFFF)


def _family(address: bytes) -> socket.AddressFamily:
    return socket.AF_INET if address[:12] == V4_MAPPED else socket.AF_INET6


def _named(address: bytes, port: int, scope: int) -> tuple[str, int] | tuple[str, int, int, int]:
    found = unpacked(address)
    if found.version == 4:
        return str(found), port
    return str(found), port, 0, scope if found.is_link_local else 0


def is_here(address: bytes, scope: int) -> bool:
    """Whether this host has the address (16 bytes, IPv4 as v4-mapped), so that a socket can be bound to it."""
    try:
        probe = socket.socket(_family(address), socket.SOCK_DGRAM)
    except OSError:
        return False  # descriptors are short, which is no reason to fail: it may be seen later
    with probe as sock:
        try:
            sock.bind(_named(address, 0, scope))
        except OSError as error:
            return error.errno != errno.EADDRNOTAVAIL
    return True


def free_bind(sock: socket.socket) -> None:
    """Let a socket be bound to an address that the host does not have."""
    sock.setsockopt(*_FREEBIND[sock.family], 1)


class Awaited:
    """See the module. ``lock`` is the one under which flows are moved; every method is called with it held.

    ``arrive(those whose address has come, those that have waited long enough)`` sees to them, with the data plane
    parked. ``may`` says whether now is the time to look. ``shared(port)`` lets another socket have a port that we
    listen on, for a moment, and says whether we do. ``schedule`` runs a function in another thread after some seconds.
    """

    def __init__(
        self,
        engine: Engine,
        lock: threading.RLock,
        *,
        arrive: Callable[[Mapping[int, Waiting], Mapping[int, Waiting]], None],
        may: Callable[[], bool],
        shared: Callable[[int], contextlib.AbstractContextManager[bool]],
        schedule: Callable[[float, Callable[[], None]], None],
    ) -> None:
        self._engine = engine
        self._lock = lock
        self._arrive = arrive
        self._may = may
        self._shared = shared
        self._schedule = schedule
        self._waiting: dict[int, Waiting] = {}
        self._keepers: dict[tuple[bytes, int], socket.socket] = {}
        self._looking = False
        self.scope = 0

    def keep(self, address: bytes, port: int) -> None:
        """From now on have nobody answer what comes to that address and port, until `wait` has seen to it."""
        if (address, port) in self._keepers:
            return
        sock = socket.socket(_family(address), socket.SOCK_STREAM)
        try:
            if sock.family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free_bind(sock)
            sockstate.freeze_listener(sock.fileno())
            with self._shared(port) as shared:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)
                sock.bind(_named(address, port, self.scope))
                sock.listen(1)
        except OSError as error:
            sock.close()
            log.warning("%s port %d cannot be kept: %s", address_text(address), port, error.strerror)
        else:
            self._keepers[address, port] = sock

    def wait(self, flows: Mapping[int, Waiting]) -> None:
        """Hold these flows until their addresses come. The data plane is parked."""
        now = time.monotonic()
        for flow, waiting in flows.items():
            waiting.generation = self._engine.flow_generation(flow)
            waiting.deadline = now + PATIENCE
            self._waiting[flow] = waiting
        self._release_ports()
        if self._waiting and not self._looking:
            self._looking = True
            self._schedule(LOOK_EVERY, self._look)

    def get(self, flow: int) -> Waiting | None:
        """What is held of a flow, if it waits."""
        waiting = self._waiting.get(flow)
        return waiting if waiting and self._engine.flow_generation(flow) == waiting.generation else None

    def forget(self) -> None:
        """The guest is gone, or goes on with them elsewhere. Nobody hears of it."""
        self._waiting.clear()
        self._release_ports()

    def _release_ports(self) -> None:
        wanted = {(one.ours.our_addr, one.ours.our_port) for one in self._waiting.values()}
        for ends in self._keepers.keys() - wanted:
            self._keepers.pop(ends).close()

    def _look(self) -> None:
        try:
            with self._lock:
                if self._may():
                    self._see_to_them()
        finally:  # whatever became of some, the others wait
            self._looking = bool(self._waiting)
            if self._looking:
                self._schedule(LOOK_EVERY, self._look)

    def _see_to_them(self) -> None:
        self._waiting = {flow: one for flow, one in self._waiting.items() if self.get(flow)}
        now = time.monotonic()
        here = {one for one in {one.ours.our_addr for one in self._waiting.values()} if is_here(one, self.scope)}
        came = {flow: one for flow, one in self._waiting.items() if one.ours.our_addr in here}
        late = {flow: one for flow, one in self._waiting.items() if flow not in came and one.deadline <= now}
        if came or late:
            for flow in (*came, *late):
                del self._waiting[flow]
            with self._engine.parked():
                self._arrive(came, late)
        self._release_ports()


def names(addresses: Iterable[bytes]) -> str:
    """Addresses as people write them."""
    return ", ".join(sorted({address_text(one) for one in addresses}))
