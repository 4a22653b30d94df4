# SPDX-License-Identifier: GPL-2.0-or-later
"""The device as its migration stages see it: flows frozen, moved, and let go.

The data plane's thread is parked from the freeze to the thaw on a source, and
from the first flow prepared to the commit or discard on a target. A socket
passes through three hands: the engine owns it, ``sockstate`` reads and fills
it, the repair helper, through ``RepairListener``, sets its repair mode.

Every method may block and is called from a worker thread. Trouble with one
flow is kept with that flow. What is raised fails the whole transfer, and only
a source raises: when the helper is lost on the way, since there the guest is
better off where it is.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from godwit.daemon.awaited import PATIENCE, Awaited, Waiting, is_here, names
from godwit.daemon.datagrams import UdpArrivals, UdpDepartures
from godwit.daemon.knocks import Knocks
from godwit.daemon.linger import lingerers, reclaim
from godwit.daemon.rescue import Rescue
from godwit.dataplane import (
    Datagram,
    Engine,
    FlowState,
    Observed,
    Ping,
    Side,
    SocketState,
    UdpPeer,
    UdpPort,
    sockstate,
)
from godwit.migration.layout import printable
from godwit.net.change import differences
from godwit.net.config import Withdrawn
from godwit.net.records import address_text
from godwit.net.state import NEVER_SEEN
from godwit.repair import Repair, RepairError, RepairListener, in_repair

# TCP states as TCP_INFO gives them (the kernel's tcp_states.h).
TCP_ESTABLISHED = 1
TCP_FIN_WAIT1 = 4
TCP_CLOSE = 7
TCP_CLOSE_WAIT = 8
TCP_LAST_ACK = 9
TCP_CLOSING = 11
TCP_PEER_CLOSED = frozenset((TCP_CLOSE_WAIT, TCP_LAST_ACK, TCP_CLOSING))

EV_FIN_TO_SOCK = 0x10  # of FlowState.events

log = logging.getLogger(__name__)

# How long after a move the kernel retransmits without ever longer waits: the
# network may be switched late. Below the 13 s in which it would give up.
HURRY_SECONDS = 8.0

# How often, and for how long after a helper has not answered, the sockets of
# running flows are looked at: it may set their repair mode when it wakes up.
LOOK_EVERY = 1.0
LOOK_SECONDS = 60.0

# What a source can make the log say at most: characters of what differs, and reasons why connections were lost.
MAX_DIFFERENCES = 1000
MAX_REASONS = 20

# Of the memory of this host, the part that queues may take until the commit: what is sent then, and what a socket had
# no room for.
QUEUES_SHARE = 1 / 4


@dataclass
class _Arrival:
    """A flow that was loaded: its descriptor (-1: none), and what is written at the commit."""

    state: FlowState
    fd: int = -1
    in_repair: bool = False
    lost: str = ""
    has_place: bool = True  # there are descriptors for it
    opens: bool = False  # there is no socket yet: it is opened at the commit
    socket: SocketState | None = None
    sndq: bytes = b""
    waiting: Waiting | None = None  # for its address


class Left(NamedTuple):
    """The sockets of a guest that has moved away: those of its connections, and of the UDP ports that were its own."""

    connections: list[int]
    ports: list[int]


def _host_side(state: FlowState) -> Side:
    """The side of the remote peer."""
    return state.sides[0] if state.pif[0] == 1 else state.sides[1]


def _report(lost: Iterable[tuple[str, FlowState]]) -> None:
    """Say why connections were lost: the most frequent reasons, with one of the connections for each."""
    examples: dict[str, FlowState] = {}
    numbers: Counter[str] = Counter()
    for why, state in lost:
        numbers[why] += 1
        examples.setdefault(why, state)
    most = numbers.most_common(MAX_REASONS)
    for why, number in most:
        log.error("%d lost, %s%s: %s", number, _ends(examples[why]), " and so on" if number > 1 else "", why)
    if len(numbers) > len(most):
        log.error("%d lost for %d other reasons", numbers.total() - sum(n for _, n in most), len(numbers) - len(most))


def _advice(error: OSError, address: bytes, *, here: bool) -> str:
    """What the kernel said of a socket that was to have this address of ours, and what to do about it."""
    if error.errno != errno.EADDRNOTAVAIL:
        return str(error)
    if here:
        return f"{error}. Another socket on this host has the same two ends: end the process that has it"
    return (
        f"this host does not have the address {address_text(address)}: let it come to this host with the guest,"
        f" before it or (with --freebind) up to {PATIENCE:.0f} s after it"
    )


def _ends(state: FlowState) -> str:
    """Both ends of the host's side, for people."""
    side = _host_side(state)
    return f"{address_text(side.our_addr)} port {side.our_port} to {address_text(side.end_addr)} port {side.end_port}"


class Mover:
    """``godwit.net.state.FlowMover`` on an engine.

    ``scope`` is the interface index of link-local peers. ``schedule`` runs a
    function in another worker thread after some seconds: for what must not
    keep the guest waiting. ``configuration`` gives what the guest's network is
    here, by names for people, ``told`` what the guest was told of it. With
    ``freebind`` a connection whose address is not here waits for it.
    """

    def __init__(
        self,
        engine: Engine,
        repair: RepairListener | None,
        scope: int,
        schedule: Callable[[float, Callable[[], None]], None],
        configuration: Callable[[], Mapping[str, str]] = dict,
        told: Callable[[], Withdrawn] = Withdrawn,
        *,
        freebind: bool = False,
    ) -> None:
        self._engine = engine
        self._configuration = configuration
        self._told = told
        self._repair = repair
        self.scope = scope
        self._schedule = schedule
        self._lock = threading.RLock()
        self._rescue = Rescue(
            engine,
            repair,
            self._lock,
            leave_repair=self._leave_repair,
            resume=self._resume,
            schedule=schedule,
        )
        self._freebind = freebind
        self._knocks = Knocks(engine, schedule)
        self._awaited = Awaited(
            engine,
            self._lock,
            arrive=self._arrive,
            may=lambda: not self._parked,
            shared=self._knocks.share,
            schedule=schedule,
        )
        # Source: a helper was there when the migration began, so its absence later is a failure.
        self.helper_expected = False
        self._parked = False
        self._held_alone = False  # what is asked of the helper is for flows that are held while the guest runs
        self._frozen: list[int] = []  # source: flows whose socket is frozen
        self._in_repair: set[int] = set()  # of those, the ones in repair mode
        self._saved: set[int] = set()  # and of those, the ones whose socket is in the stream
        self._frozen_listeners: list[int] = []
        self._departures = UdpDepartures(engine)  # source
        self._arrivals: dict[int, _Arrival] = {}  # target: by flow
        self._prepared: list[int] = []  # target: all flows that came, -1 for one that has no place
        self._arriving = UdpArrivals(engine, self._reclaim, freebind=freebind)  # target
        self._pings: list[int] = []  # target: the flows of echoes that came
        self._seen_before: Observed | None = None  # target: the guest's addresses before those that came
        self._lingerers: list[str] = []  # target: who may have sockets of the flows that come
        self._room = 0  # target: bytes that queues may still take in our memory
        self._told_elsewhere = Withdrawn()  # target: where the guest comes from

    # ---- another process on this host goes on

    @property
    def settled(self) -> bool:
        """Nothing moves, no connection waits for a helper, and none that hangs may still touch any."""
        with self._lock:
            return not (self._parked or self._frozen or self._arrivals or self._rescue.held() or self._watches())

    @property
    def listeners_frozen(self) -> bool:
        """A guest has moved away, and none has come: who asks for a forwarded port gets no answer."""
        return bool(self._frozen_listeners)

    def take_over(self, *, listeners_frozen: bool) -> None:
        """Go on where another process's was; flows and listeners are in the engine."""
        if listeners_frozen:
            self._frozen_listeners = list(self._engine.listeners())
        self._schedule(HURRY_SECONDS, self._engine.calm)

    # ---- both sides

    def observed(self) -> Observed:
        """The guest's addresses as seen in its frames."""
        return self._engine.observed()

    def set_observed(self, observed: Observed) -> None:
        """What the source has seen, until the commit; ``NEVER_SEEN``: as it was before."""
        if observed != NEVER_SEEN:
            self._seen_before = self._seen_before or self._engine.observed()
            self._engine.set_observed(observed)
        elif self._seen_before is not None:
            self._engine.forget_observed(self._seen_before)
            self._seen_before = None

    def configuration(self) -> Mapping[str, str]:
        """What the guest's network is here."""
        return self._configuration()

    def compare(self, configuration: Mapping[str, str]) -> None:
        """Say what is another here than where the guest comes from."""
        differing = differences(configuration, self._configuration())
        if differing:
            shown = printable(differing, MAX_DIFFERENCES)
            log.warning("this host is another than the one that the guest comes from: %s", shown)

    def guest_told(self) -> Withdrawn:
        """What the guest was told of its network."""
        return self._told()

    def set_told(self, told: Withdrawn) -> None:
        """What it was told where it comes from."""
        self._told_elsewhere = told

    def take_told(self) -> Withdrawn:
        """After a commit: what the guest was told where it comes from; nothing where that is not known."""
        told, self._told_elsewhere = self._told_elsewhere, Withdrawn()
        return told

    def _park(self) -> None:
        if not self._parked:
            self._engine.park()
            self._parked = True

    def _unpark(self) -> None:
        if self._parked:
            self._parked = False
            self._engine.unpark()

    def _set_mode(self, fds: Sequence[int], mode: Repair) -> None:
        if self._repair is None:
            raise RepairError("there is no repair socket")
        if not self._held_alone:
            self._repair.set_mode(fds, mode)
            return
        # These flows are held: the others need not stand still for as long as a helper may take.
        self._engine.unpark()
        try:
            self._repair.set_mode(fds, mode)
        finally:
            self._engine.park()

    # ---- source

    def freeze(self) -> None:
        """Freeze every flow and listener, then have the helper set repair mode.

        :raises RepairError: there was a helper, and it is gone or failed.
        """
        with self._lock:
            self._park()
            self._freeze()

    def _freeze(self) -> None:
        for fd in self._engine.listeners():
            sockstate.freeze_listener(fd)
            self._frozen_listeners.append(fd)
        self._engine.accept_waiting()
        for flow in self._engine.tcp_flows(handshakes=True):
            fd, v6 = self._engine.flow_socket(flow)
            if fd < 0:
                continue  # reset, and the guest is to hear of it where it goes
            try:
                sockstate.freeze(fd, v6)
            except OSError as error:
                log.error("flow %d cannot move: %s", flow, error)
                continue
            self._frozen.append(flow)
        # Those that stood still for want of a helper need none to move.
        self._rescue.release(self._frozen)
        self._in_repair.update(flow for flow in self._frozen if self._is_in_repair(flow))
        if not self._frozen:
            return
        if not self.helper_expected and (self._repair is None or not self._repair.connected()):
            log.warning(
                "no repair helper is connected: %d connections cannot move and will be reset; "
                "start `godwit repair` or passt-repair for %s",
                sum(not self.is_connecting(flow) for flow in self._frozen) - len(self._in_repair),
                "the repair socket" if self._repair is None else self._repair.path,
            )
            return
        self._set_mode([self._engine.flow_socket(flow)[0] for flow in self._frozen], Repair.ON)
        self._in_repair.update(self._frozen)

    def flows(self, *, handshakes: bool = False) -> Sequence[int]:
        """The TCP flows that are established on the guest's side; or with ``handshakes`` those in a handshake, too."""
        return self._engine.tcp_flows(handshakes)

    def is_connecting(self, flow: int) -> bool:
        """The guest has opened it, and its peer has not answered."""
        return self._engine.flow_is_connecting(flow)

    def flow_state(self, flow: int) -> FlowState:
        """The flow as the guest's side knows it."""
        return self._engine.flow_state(flow)

    def dump(self, flow: int) -> tuple[SocketState, bytes, bytes] | None:
        """The socket and its queues; None: it cannot move."""
        if (waiting := self._awaited.get(flow)) is not None:
            return waiting.on_time(), waiting.sndq, waiting.rcvq
        if flow not in self._in_repair:
            return None
        if self._is_local(flow):
            self.give_up(flow, "its peer is on this host, and does not move with it")
            return None
        fd, _v6 = self._engine.flow_socket(flow)
        try:
            state, sndq, rcvq = sockstate.dump(fd)
        except OSError as error:
            self.give_up(flow, str(error))
            return None
        self._saved.add(flow)
        return self._whole(flow, state, sndq, rcvq)

    def _is_local(self, flow: int) -> bool:
        return self._engine.flow_is_local(flow)

    def give_up(self, flow: int, why: str) -> None:
        """The flow is not in the stream, or as lost: it is reset when the guest has moved."""
        log.error("flow %d cannot move: %s", flow, why)
        self._saved.discard(flow)

    def _whole(self, flow: int, state: SocketState, sndq: bytes, rcvq: bytes) -> tuple[SocketState, bytes, bytes]:
        """What the kernel has, and what an earlier migration left with the flow."""
        to_guest, to_sock = self._engine.carried(flow)
        tcp_state = state.tcpi_state
        if to_sock and self._engine.flow_state(flow).events & EV_FIN_TO_SOCK:
            tcp_state = TCP_LAST_ACK if tcp_state == TCP_CLOSE_WAIT else TCP_FIN_WAIT1
        if tcp_state == TCP_CLOSE:
            # Both have closed and know it. What is left is for the guest to read; no FIN is due.
            tcp_state = TCP_CLOSE_WAIT
        elif self._engine.peer_closed(flow):
            tcp_state = {TCP_ESTABLISHED: TCP_CLOSE_WAIT}.get(tcp_state, TCP_LAST_ACK)
        return (
            state._replace(
                tcpi_state=tcp_state,
                # Whatever the state says now, no FIN is in the number of the first byte.
                tcpi_options=state.tcpi_options | (sockstate.FIRST_BYTE if tcp_state != state.tcpi_state else 0),
                sndq=len(sndq) + len(to_sock),
                notsent=state.notsent + len(to_sock),
                rcvq=len(rcvq) + len(to_guest),
                seq_rcv=(state.seq_rcv - len(to_guest)) & 0xFFFFFFFF,
            ),
            sndq + to_sock,
            to_guest + rcvq,
        )

    def thaw(self) -> None:
        """Go on here as if nothing had been asked, also after a freeze that got half-way."""
        with self._lock:
            try:
                self._go_on()
            except BaseException:
                self.give_up_all()
                raise
            finally:
                self._clear()
                self._unpark()
        self._watch()

    def _go_on(self) -> None:
        self.thaw_listeners()
        # The socket itself says whether it is in repair mode: a helper that failed may have come to any point.
        self._leave_repair([flow for flow in self._frozen if self._is_in_repair(flow)])
        stuck = {flow for flow in self._frozen if self._is_in_repair(flow)}
        self._rescue.hold(stuck)
        self._resume(flow for flow in self._frozen if flow not in stuck)

    def rescue_found(self) -> None:
        """See to flows whose sockets are in repair mode while the guest runs.

        Where one was found all are looked at: one at which nothing arrives any
        more, since the helper has locked it too, gives no sign.
        """
        with self._lock:
            self._engine.take_found()
            if self._parked:
                return  # a migration is under way, and looks for itself when it goes on
            with self._engine.parked():
                sockets = {flow: self._engine.flow_socket(flow)[0] for flow in self._engine.tcp_flows(handshakes=True)}
                found = {flow for flow, fd in sockets.items() if fd >= 0 and in_repair(fd)}
                self._rescue.hold(found - self._rescue.held())

    def _watch(self) -> None:
        """For a while after a helper has not answered, look at the sockets now and then."""
        if self._watches():
            self._schedule(LOOK_EVERY, self._look)

    def _watches(self) -> bool:
        """Whether a helper has not answered a while ago."""
        hung_at = None if self._repair is None else self._repair.hung_at
        return hung_at is not None and time.monotonic() < hung_at + LOOK_SECONDS

    def _look(self) -> None:
        self.rescue_found()
        self._watch()

    def _is_in_repair(self, flow: int) -> bool:
        return in_repair(self._engine.flow_socket(flow)[0])

    def _clear(self) -> None:
        self._frozen.clear()
        self._in_repair.clear()
        self._saved.clear()
        self._departures.clear()

    def _leave_repair(self, flows: Sequence[int]) -> None:
        """Thaw these and end their repair mode, as far as a helper is there."""
        for flow in flows:
            self._thaw_socket(flow)
        if not flows:
            return
        try:
            # Repair.OFF, not OFF_NO_WP: the window probe makes the peer tell us where it is.
            self._set_mode([self._engine.flow_socket(flow)[0] for flow in flows], Repair.OFF)
        except RepairError as error:
            log.error("the repair helper failed as connections were to leave repair mode: %s", error)

    def _thaw_socket(self, flow: int) -> None:
        fd, v6 = self._engine.flow_socket(flow)
        try:
            sockstate.thaw(fd, v6)
        except OSError as error:
            log.error("the socket of flow %d cannot be set back to what it was: %s", flow, error)

    def _resume(self, flows: Iterable[int]) -> None:
        for flow in flows:
            self._thaw_socket(flow)
            self._engine.resume_flow(flow, watch=False)
        self._schedule(HURRY_SECONDS, self._engine.calm)

    def linger(self) -> None:
        """Nothing to do: the thread stays parked and the sockets frozen."""

    def leave(self) -> Left:
        """The front-end is gone after a save that stood: give up the flows, silently.

        Returns the moved flows' sockets, frozen and in repair mode, and those
        of UDP, of which nothing more is read. While they are open the kernel
        does not answer late packets with a reset, or that nobody is there. The
        caller closes them when the network has surely switched.
        """
        with self._lock:
            try:
                # What could not be saved the caller resets, for the peer's sake: in repair mode that would say nothing.
                self._leave_repair([f for f in self._frozen if f in self._in_repair and f not in self._saved])
                for flow in self._frozen:
                    if flow not in self._saved:
                        self._engine.drop_flow_socket(flow)
                connections = [self._engine.release_flow(flow) for flow in self._frozen if flow in self._saved]
                return Left(connections, self._departures.leave())
            finally:
                self._awaited.forget()
                self._clear()
                self._unpark()

    def close_flows(self) -> None:
        """The guest is gone: close its flows; peers are reset."""
        with self._lock:
            self._awaited.forget()
            self._engine.close_flows()

    def thaw_listeners(self) -> None:
        """A new guest is here: connections from outside are welcome again."""
        for fd in self._frozen_listeners:
            sockstate.thaw_listener(fd)
        self._frozen_listeners.clear()

    # ---- target

    def _begin_load(self) -> None:
        """Before anything is loaded; nothing if something was."""
        with self._lock:
            if self._parked:
                return
            self._park()  # from here on nobody looks for sockets in repair mode but us
        self._room = int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * QUEUES_SHARE)
        self._lingerers = lingerers()

    def _reclaim(self, sides: Sequence[Side]) -> None:
        """Have whoever lingers with sockets of these ends close them."""
        self._lingerers = reclaim(sides, self._lingerers)

    def prepare(self, flows: Sequence[FlowState]) -> Sequence[int]:
        """Flows in the table, with frozen sockets in repair mode where they can be had."""
        self._begin_load()
        self._reclaim([_host_side(state) for state in flows])
        ids = [self._place(state) for state in flows]
        self._enter_repair(flow for flow in ids if flow >= 0)
        self._prepared += ids
        return ids

    def _enter_repair(self, flows: Iterable[int]) -> None:
        """Of these, as far as they have sockets."""
        ready = [flow for flow in flows if self._arrivals[flow].fd >= 0]
        done = 0
        try:
            self._set_mode([self._arrivals[flow].fd for flow in ready], Repair.ON)
            done = len(ready)
        except RepairError as error:
            done = error.done
            log.error("%s", error)
        for flow in ready[:done]:
            self._arrivals[flow].in_repair = True
        for flow in ready[done:]:
            self._lose(flow, "no repair helper")

    def prepared(self) -> Sequence[int]:
        """All flows that came, in their order; -1 for one that has no place here."""
        return self._prepared

    def _place(self, state: FlowState) -> int:
        full = self._engine.is_full()
        try:
            flow = self._engine.import_flow(state)
        except ValueError as error:
            log.error("a connection is lost: %s", error)
            return -1
        arrival = self._arrivals[flow] = _Arrival(state, has_place=not full)
        if full:
            self._lose(flow, "there are too few descriptors for it")
        else:
            self._open(flow, arrival)
        return flow

    def _open(self, flow: int, arrival: _Arrival) -> None:
        """Give a flow a socket, frozen."""
        try:
            arrival.fd = sockstate.create(self._engine.flow_socket(flow)[1])
        except OSError as error:
            self._lose(flow, str(error))
        else:
            self._engine.set_flow_socket(flow, arrival.fd)

    def restore(self, flow: int, socket: SocketState, sndq: bytes, rcvq: bytes) -> None:
        """Fill the socket of a prepared flow."""
        arrival = self._arrivals.get(flow)
        if arrival is None or not arrival.in_repair or arrival.lost:
            return
        host = _host_side(arrival.state)
        try:
            left_out = sockstate.restore(
                arrival.fd,
                host.our_addr,
                host.our_port,
                host.end_addr,
                host.end_port,
                self.scope,
                socket,
                rcvq,
            )
        except OSError as error:
            here = error.errno != errno.EADDRNOTAVAIL or is_here(host.our_addr, self.scope)
            if here or not self._freebind:
                self._lose(flow, _advice(error, host.our_addr, here=here))
            elif self._has_room(flow, len(sndq) + len(rcvq)):
                self._await(flow, Waiting(arrival.state, host, socket, sndq, rcvq))
            return
        if not self._has_room(flow, len(sndq) + left_out):
            return
        arrival.socket = socket
        arrival.sndq = sndq
        if left_out:
            self._engine.carry(flow, rcvq[:left_out], b"")
        if socket.tcpi_state in TCP_PEER_CLOSED:
            self._engine.note_peer_closed(flow)

    def open_anew(self, flow: int) -> None:
        """Nobody had answered this one: it needs no socket that is restored, and no helper."""
        arrival = self._arrivals.get(flow)
        if arrival is not None and arrival.has_place:
            self._lose(flow, "")
            arrival.opens = True

    def pings(self) -> Sequence[Ping]:
        """The guest's echoes."""
        return self._engine.pings()

    def add_ping(self, ping: Ping) -> None:
        """Echoes of the guest's, if there is a place for them."""
        self._begin_load()
        index = self._engine.import_ping(ping)
        if index is not None:
            self._pings.append(index)

    def _has_room(self, flow: int, size: int) -> bool:
        """Whether there is memory for so much of a queue; else the flow is lost."""
        if size > self._room:
            self._lose(flow, "all queues together are too large for this host")
            return False
        self._room -= size
        return True

    def _await(self, flow: int, waiting: Waiting) -> None:
        """Its address may come yet. A new socket is made then: the one that is there is bound to nothing."""
        arrival = self._arrivals[flow]
        self._engine.drop_flow_socket(flow)
        arrival.fd = -1
        arrival.waiting = waiting
        self._awaited.scope = self.scope
        self._awaited.keep(waiting.ours.our_addr, waiting.ours.our_port)

    def _arrive(self, came: Mapping[int, Waiting], late: Mapping[int, Waiting]) -> None:
        """The addresses of some flows that wait are here, others have waited too long. The data plane is parked."""
        self._held_alone = True
        try:
            self._room = sum(len(one.sndq) + len(one.rcvq) for one in came.values())
            for flow, waiting in came.items():
                self._arrivals[flow] = _Arrival(waiting.state)
                self._open(flow, self._arrivals[flow])
            self._enter_repair(came)
            for flow, waiting in came.items():
                self.restore(flow, waiting.on_time(), waiting.sndq, waiting.rcvq)
            for flow, waiting in late.items():
                address = address_text(waiting.ours.our_addr)
                why = f"the address {address} has not come to this host within {PATIENCE:.0f} s"
                self._arrivals[flow] = _Arrival(waiting.state, lost=why)
            self._let_flows_go()
        finally:
            self._held_alone = False
            self._arrivals.clear()
        self._schedule(HURRY_SECONDS, self._engine.calm)

    def udp(self) -> Iterator[tuple[UdpPort, Sequence[UdpPeer], Sequence[Datagram]]]:
        """Each UDP port that has anything to move."""
        return self._departures.take()

    def add_udp_port(self, port: UdpPort) -> None:
        """The port that is forwarded here too, or a socket like the one it had."""
        self._begin_load()
        self._arriving.add_port(port)

    def add_udp_peers(self, number: int, peers: Sequence[UdpPeer]) -> None:
        """Peers of a port that came."""
        self._arriving.add_peers(number, peers)

    def add_datagrams(self, number: int, datagrams: Sequence[Datagram]) -> None:
        """Datagrams of a port that came; they are delivered after the commit."""
        self._arriving.add_datagrams(number, datagrams)

    def mark_lost(self, flow: int, why: str = "") -> None:
        """The source could not move this flow."""
        self._lose(flow, f"the source could not move it{f': {why}' if why else ''}")

    def _lose(self, flow: int, why: str) -> None:
        arrival = self._arrivals.get(flow)
        if arrival is None:
            return
        arrival.lost = why
        if arrival.fd >= 0:
            self._engine.drop_flow_socket(flow)
            arrival.fd = -1

    def commit(self) -> None:
        """The guest runs here: end repair mode, write the rest, thaw, and go."""
        with self._lock:
            try:
                self._let_go()
            except BaseException:
                self.give_up_all()
                raise
            finally:
                self._loaded()
                self._seen_before = None
        self._schedule(HURRY_SECONDS, self._engine.calm)
        self._watch()

    def _let_go(self) -> None:
        try:
            self._arriving.let_go()
        finally:
            self._let_flows_go()

    def _let_flows_go(self) -> None:
        waiting = {flow: one.waiting for flow, one in self._arrivals.items() if one.waiting and not one.lost}
        for flow, arrival in self._arrivals.items():
            if not (arrival.lost or arrival.opens or arrival.waiting or arrival.socket):
                self._lose(flow, "it was not restored")
        good = [flow for flow, arrival in self._arrivals.items() if arrival.socket and not arrival.lost]
        done = 0
        if good:
            # Thawed first: the answer to the probe that ends repair mode shall not be missed.
            for flow in good:
                self._thaw_socket(flow)
                self._complete(flow)
            good = [flow for flow in good if not self._arrivals[flow].lost]
            try:
                self._set_mode([self._arrivals[flow].fd for flow in good], Repair.OFF)
                done = len(good)
            except RepairError as error:
                done = error.done
                log.error("%s", error)
        for flow in good[:done]:
            self._finish(flow)
        for flow in good[done:]:
            self._lose(flow, "no repair helper")
        lost = {flow: arrival for flow, arrival in self._arrivals.items() if arrival.lost}
        peers = [_host_side(arrival.state) for flow, arrival in lost.items() if not self._is_local(flow)]
        for flow in lost:
            self._engine.reset_flow(flow)
        for flow, arrival in self._arrivals.items():
            if arrival.opens:
                self._engine.open_flow(flow)
        going = len(self._arrivals) - len(lost) - len(waiting)
        log.info("%d connections go on here, %d were lost", going, len(lost))
        if waiting:
            missing = names(one.ours.our_addr for one in waiting.values())
            log.warning("%d connections wait for their address to come to this host: %s", len(waiting), missing)
        self._awaited.wait(waiting)
        _report((arrival.lost, arrival.state) for arrival in lost.values())
        if lost and self._repair is not None:
            self._repair.end_guard()  # resets are wanted now
        self._knocks.begin(peers, self.scope)

    def _complete(self, flow: int) -> None:
        arrival = self._arrivals[flow]
        assert arrival.socket is not None  # or it would have been lost
        try:
            sockstate.complete(arrival.fd, arrival.socket, arrival.sndq)
        except OSError as error:
            self._lose(flow, str(error))

    def _finish(self, flow: int) -> None:
        arrival = self._arrivals[flow]
        assert arrival.socket is not None  # or it would have been lost
        unsent = arrival.sndq[len(arrival.sndq) - arrival.socket.notsent :]
        try:
            taken = sockstate.finish(arrival.fd, arrival.socket, unsent)
        except OSError as error:
            self._lose(flow, str(error))
            return
        if taken < len(unsent):
            self._engine.carry(flow, b"", unsent[taken:])
        self._engine.resume_flow(flow, watch=True)

    def discard(self) -> None:
        """Close all that was loaded; in repair mode a close says nothing."""
        with contextlib.ExitStack() as each:  # what fails keeps nothing else from being done
            each.callback(self._loaded)
            each.callback(self._engine.forget_pings, list(self._pings))
            each.callback(self._arriving.discard)
            for flow in self._arrivals:
                each.callback(self._engine.forget_flow, flow)
            each.callback(self._awaited.forget)
            self._told_elsewhere = Withdrawn()

    def give_up_all(self) -> None:
        """After a transfer: should its end have failed, what stands still since is reset rather than left to hang."""
        with self._lock:
            left = {*self._frozen, *self._arrivals}
            if not left and not self._parked:
                return
            log.error("%d connections are reset: the end of the migration has failed", len(left))
            with contextlib.ExitStack() as each:  # what fails keeps nothing else from being done
                each.callback(self._loaded)
                each.callback(self._awaited.wait, {})  # no port is kept for these
                each.callback(self._arriving.discard)
                each.callback(self._clear)
                each.callback(self.thaw_listeners)
                left = {flow for flow in left if self._engine.flow_generation(flow) is not None}
                repaired = [flow for flow in left if (fd := self._engine.flow_socket(flow)[0]) >= 0 and in_repair(fd)]
                self._leave_repair(repaired)  # in repair mode a reset is not said
                for flow in left:
                    self._engine.reset_flow(flow)
                self._knocks.begin([_host_side(one.state) for one in self._arrivals.values()], self.scope)

    def _loaded(self) -> None:
        """What came is the guest's, or gone: forget about it, and go on."""
        self._arrivals.clear()
        self._prepared.clear()
        self._pings.clear()
        self._unpark()
