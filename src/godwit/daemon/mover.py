# SPDX-License-Identifier: GPL-2.0-or-later
"""The device as its migration stages see it: flows frozen, moved, and let go.

The data plane's thread is parked from the freeze to the thaw on a source, and
from the first flow prepared to the commit or discard on a target. A socket
passes through three hands: the engine owns it, ``moving`` reads and fills
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
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from godwit.daemon import losses, signals
from godwit.daemon.awaited import PATIENCE, Awaited, Waiting, is_here, names
from godwit.daemon.datagrams import UdpArrivals, UdpDepartures
from godwit.daemon.knocks import Knocks
from godwit.daemon.linger import lingerers, reclaim
from godwit.daemon.rescue import Rescue
from godwit.dataplane import (
    Datagram,
    Engine,
    Observed,
    Ping,
    Side,
    SocketState,
    UdpPeer,
    UdpPort,
    layouts,
    moving,
    sockstate,
)
from godwit.migration.layout import printable
from godwit.net.change import differences
from godwit.net.config import Withdrawn
from godwit.net.records import SOCKET, STATE_LOST, address_text
from godwit.net.state import BATCH, NEVER_SEEN
from godwit.repair import Repair, RepairError, RepairListener, in_repair

log = logging.getLogger(__name__)

# How long after a move the kernel retransmits without ever longer waits: the
# network may be switched late. Below the 13 s in which it would give up.
HURRY_SECONDS = 8.0

# How often, and for how long after a helper has not answered, the sockets of
# running flows are looked at: it may set their repair mode when it wakes up.
LOOK_EVERY = 1.0
LOOK_SECONDS = 60.0

# What a source can make the log say at most of what differs, in characters.
MAX_DIFFERENCES = 1000

# Of the memory of this host, the part that queues may take until the commit: what is sent then, and what a socket had
# no room for.
QUEUES_SHARE = 1 / 4

# Bytes of sockets that are in memory at once as they are saved, or the queues of one.
PIECE = 1 << 18

_STATE = SOCKET.index("tcpi_state")


class _Entering(NamedTuple):
    """Flows that have come, by number, and what waits until the helper has done with their sockets."""

    numbers: Sequence[int]
    wait: Callable[[], None]


class Left(NamedTuple):
    """The sockets of a guest that has moved away: those of its connections, and of the UDP ports that were its own."""

    connections: list[int]
    ports: list[int]


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
        self._frozen: Sequence[int] = []  # source: flows whose socket is frozen
        self._locking: Callable[[], None] | None = None  # source: waits until the helper has set their repair mode
        self._in_repair: set[int] = set()  # of those, the ones in repair mode
        self._saved: set[int] = set()  # and of those, the ones whose socket is in the stream
        self._frozen_listeners: list[int] = []
        self._departures = UdpDepartures(engine)  # source
        self._local_moves = False  # a flow whose peer is this host itself moves like others: in tests
        self._arrivals: moving.Arrivals | None = None  # target: the flows that came, by their number
        self._entering: _Entering | None = None  # target: some whose sockets are just being put into repair mode
        self._lost: dict[int, str] = {}  # target: of these the ones that are, and why
        self._opens: list[int] = []  # target: those whose socket is opened at the commit
        self._waits: dict[int, Waiting] = {}  # target: those that wait for their address
        self._arriving = UdpArrivals(engine, self._reclaim, freebind=freebind)  # target
        self._pings: list[int] = []  # target: the flows of echoes that came
        self._seen_before: Observed | None = None  # target: the guest's addresses before those that came
        self._lingerers: list[str] = []  # target: who may have sockets of the flows that come
        self._told_elsewhere = Withdrawn()  # target: where the guest comes from
        self.went = 0, 0  # connections that moved in the last transfer, and those that it lost

    # ---- another process on this host goes on

    @property
    def settled(self) -> bool:
        """Nothing moves, no connection waits for a helper, and none that hangs may still touch any."""
        with self._lock:
            return not (
                self._parked or self._frozen or self._arrivals is not None or self._rescue.held() or self._watches()
            )

    @property
    def listeners_frozen(self) -> bool:
        """A guest has moved away, and none has come: who asks for a forwarded port gets no answer."""
        return bool(self._frozen_listeners)

    def take_over(self, *, listeners_frozen: bool) -> None:
        """Go on where another process's was; flows and listeners are in the engine."""
        if listeners_frozen:
            self._frozen_listeners = list(self._engine.listeners())
        self._schedule(HURRY_SECONDS, self._calm)

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
        """Freeze every flow and listener, and begin to have the helper set repair mode; ``dump`` waits for its end."""
        with self._lock:
            self.went = 0, 0
            self._park()
            self._freeze()

    def _freeze(self) -> None:
        for fd in self._engine.listeners():
            sockstate.freeze_listener(fd)
            self._frozen_listeners.append(fd)
        self._engine.accept_waiting()
        # A flow without a socket was reset, and the guest is to hear of it where it goes.
        self._frozen, failed = moving.freeze(self._engine)
        for flow, error in failed:
            log.error("flow %d cannot move: freezing its socket: %s", flow, os.strerror(error))
        # Those that stood still for want of a helper need none to move.
        self._rescue.release(self._frozen)
        if not self._frozen:
            return
        if not self.helper_expected and (self._repair is None or not self._repair.connected()):
            self._in_repair.update(flow for flow in self._frozen if self._is_in_repair(flow))
            log.warning(
                "no repair helper is connected: %d connections cannot move and will be reset; "
                "start `godwit repair` or passt-repair for %s",
                sum(not self.is_connecting(flow) for flow in self._frozen) - len(self._in_repair),
                "the repair socket" if self._repair is None else self._repair.path,
            )
            return
        # The flows themselves can be written while it is at work on their sockets.
        self._locking = self._beside(partial(self._set_mode, moving.sockets(self._engine, self._frozen), Repair.ON))

    def _locked(self) -> None:
        """Wait until the helper has set repair mode.

        :raises RepairError: there was one, and it is gone or failed.
        """
        if self._locking is None:
            return
        wait, self._locking = self._locking, None
        wait()
        self._in_repair.update(self._frozen)

    def _locked_or_not(self) -> None:
        """Wait until the helper touches these sockets no more, whatever has come of it."""
        with contextlib.suppress(Exception):
            self._locked()

    def flows(self) -> Sequence[int]:
        """All TCP flows, also those without a socket, and those in a handshake."""
        return self._engine.tcp_flows(handshakes=True)

    def is_connecting(self, flow: int) -> bool:
        """The guest has opened it, and its peer has not answered."""
        return self._engine.flow_is_connecting(flow)

    def flow_records(self, flows: Sequence[int], *, native: bool) -> bytes:
        """The flows as the guest's side knows them."""
        return moving.flow_records(self._engine, flows, native)

    def dump(self, flows: Sequence[int]) -> Iterator[bytes | str]:
        """The sockets and their queues; of one that cannot move, why.

        :raises RepairError: there was a helper, and it is gone or failed.
        """
        self._locked()
        first = 0
        for place, flow in enumerate(flows):
            waiting = self._awaited.get(flow)
            if waiting is None and flow in self._in_repair:
                continue
            yield from self._dump(flows[first:place])
            if waiting is None:
                yield losses.NOT_SAVED
            else:
                yield SOCKET.encode(waiting.on_time()) + waiting.sndq + waiting.rcvq
            first = place + 1
        yield from self._dump(flows[first:])

    def _dump(self, flows: Sequence[int]) -> Iterator[bytes | str]:
        """Those that are in repair mode."""
        at = 0
        while at < len(flows):
            end, found, error = moving.dump(self._engine, flows, at, PIECE, self._local_moves)
            self._saved.update(flows[at:end])
            if found:
                yield found
            at = end
            if error:
                here = error == errno.EXDEV
                why = (
                    "its peer is on this host, and does not move with it"
                    if here
                    else f"reading its socket's state: {os.strerror(error)}"
                )
                self.give_up(flows[at], why)
                yield losses.NOT_SAVED
                at += 1

    def _is_local(self, flow: int) -> bool:
        return self._engine.flow_is_local(flow) and not self._local_moves

    def give_up(self, flow: int, why: str) -> None:
        """The flow is not in the stream, or as lost: it is reset when the guest has moved."""
        log.error("flow %d cannot move: %s", flow, why)
        self._saved.discard(flow)

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
        self._locked_or_not()
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
        self._frozen = []
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
            self._set_mode(moving.sockets(self._engine, flows), Repair.OFF)
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
            self._engine.resume_flow(flow)
        self._schedule(HURRY_SECONDS, self._calm)

    def _calm(self) -> None:
        with self._lock:  # nobody else has flows in hand
            self._engine.calm()

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
                self._locked_or_not()
                # What could not be saved the caller resets, for the peer's sake: in repair mode that would say nothing.
                self._leave_repair([f for f in self._frozen if f in self._in_repair and f not in self._saved])
                for flow in self._frozen:
                    if flow not in self._saved:
                        self._engine.drop_flow_socket(flow)
                connections = [self._engine.release_flow(flow) for flow in self._frozen if flow in self._saved]
                self.went = len(connections), len(self._frozen) - len(connections)
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
            self.went = 0, 0
            self._park()  # from here on nobody looks for sockets in repair mode but us
            memory = int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * QUEUES_SHARE)
            self._arrivals = moving.Arrivals(self._engine, self.scope, memory)
        self._lingerers = lingerers()

    def _reclaim(self, sides: Sequence[Side]) -> None:
        """Have whoever lingers with sockets of these ends close them."""
        self._lingerers = reclaim(sides, self._lingerers)

    def prepare(self, records: bytes, *, native: bool) -> None:
        """Flows in the table, with frozen sockets in repair mode where they can be had."""
        self._begin_load()
        arrivals = self._arrivals
        assert arrivals is not None
        if self._lingerers:
            self._reclaim(layouts.ends(records, native))
        first = len(arrivals)
        trouble = arrivals.prepare(records, native)  # while the helper is still at work on those before
        for number, error in trouble:
            if arrivals.flow(number) < 0:
                log.error("a connection is lost: %s", losses.NO_PLACE[error])
            else:
                self._lose(number, losses.NO_DESCRIPTOR if error == errno.EMFILE else os.strerror(error))
        self._enter_repair(first)

    def _came(self) -> moving.Arrivals:
        """What has come, of which there is something; the helper has done what it was asked."""
        assert self._arrivals is not None
        self._entered()
        return self._arrivals

    def _enter_repair(self, first: int) -> None:
        """Begin with what has come from that number on, as far as it has sockets."""
        arrivals = self._came()
        numbers = arrivals.with_socket(first)
        fds = arrivals.sockets(numbers)
        self._entering = _Entering(numbers, self._beside(partial(self._set_mode, fds, Repair.ON)))

    def _entered(self) -> None:
        """Wait until the helper has done with those that were begun with."""
        if self._entering is None:
            return
        assert self._arrivals is not None
        (numbers, wait), self._entering = self._entering, None
        done = self._done(wait, len(numbers))
        self._arrivals.enter_repair(numbers[:done])
        for number in numbers[done:]:
            self._lose(number, "no repair helper")

    def _beside(self, work: Callable[[], None]) -> Callable[[], None]:
        """Have it done while we go on; what is returned waits for its end, and raises what it has raised.

        Where the data plane runs meanwhile there is nothing that we might do beside.
        """
        if self._held_alone:
            return work
        raised: list[BaseException] = []

        def run() -> None:
            try:
                work()
            except BaseException as error:
                raised.append(error)

        def wait() -> None:
            thread.join()
            if raised:
                raise raised[0]

        thread = threading.Thread(target=run, name="repair")
        try:
            with signals.blocked():
                thread.start()
        except RuntimeError:  # no thread is to be had: done when it is waited for
            return work
        return wait

    def restore(self, first: int, sockets: bytes) -> None:
        """Fill the sockets of prepared flows."""
        arrivals = self._came()
        trouble: list[tuple[int, int, int, int, str]] = []

        def fill(first: int, begin: int, end: int) -> None:
            found = arrivals.restore(first, memoryview(sockets)[begin:end])
            trouble.extend((number, begin + at, size, error, step) for number, at, size, error, step in found)

        # Nothing takes longer while the guest stands still, so it is done by two where it is much.
        count, middle = layouts.sound_sockets(sockets, 0, BATCH // 2)
        wait = self._beside(partial(fill, first + count, middle, len(sockets))) if middle < len(sockets) else None
        try:
            fill(first, 0, middle)
        finally:
            if wait is not None:
                wait()
        for number, at, size, error, step in sorted(trouble):
            data = sockets[at : at + size]
            if not error:
                ended = SOCKET.unpack(data[: SOCKET.size])[_STATE] != STATE_LOST
                self.mark_lost(number, "it ended meanwhile" if ended else "")
            elif error == errno.EDQUOT:
                self._lose(number, losses.NO_MEMORY)
            else:
                self._refused(number, OSError(error, f"{step or 'keeping its queues'}: {os.strerror(error)}"), data)

    def _refused(self, number: int, error: OSError, data: bytes) -> None:
        """The kernel does not take a socket; its address may come yet."""
        state = self._engine.flow_state(self._came().flow(number))
        ours = state.host_side
        here = error.errno != errno.EADDRNOTAVAIL or is_here(ours.our_addr, self.scope)
        if here or not self._freebind:
            self._lose(number, losses.advice(error, ours.our_addr, here=here))
        elif not self._came().take_memory(len(data) - SOCKET.size):
            self._lose(number, losses.NO_MEMORY)
        else:
            socket = SocketState._make(SOCKET.unpack(data[: SOCKET.size]))
            middle = SOCKET.size + socket.sndq
            self._await(number, Waiting(state, ours, socket, data[SOCKET.size : middle], data[middle:]))

    def open_anew(self, number: int) -> None:
        """Nobody had answered this one: it needs no socket that is restored, and no helper."""
        if self._came().flow(number) >= 0 and self._came().has_place(number):
            self._lose(number, "")
            self._opens.append(number)

    def pings(self) -> Sequence[Ping]:
        """The guest's echoes."""
        return self._engine.pings()

    def add_ping(self, ping: Ping) -> None:
        """Echoes of the guest's, if there is a place for them."""
        self._begin_load()
        index = self._engine.import_ping(ping)
        if index is not None:
            self._pings.append(index)

    def _await(self, number: int, waiting: Waiting) -> None:
        """Its address may come yet. A new socket is made then: the one that is there is bound to nothing."""
        self._came().free_socket(number)
        self._waits[number] = waiting
        self._awaited.scope = self.scope
        self._awaited.keep(waiting.ours.our_addr, waiting.ours.our_port)

    def _arrive(self, came: Mapping[int, Waiting], late: Mapping[int, Waiting]) -> None:
        """The addresses of some flows that wait are here, others have waited too long. The data plane is parked."""
        self._held_alone = True
        try:
            memory = sum(len(one.sndq) + len(one.rcvq) for one in came.values())
            arrivals = self._arrivals = moving.Arrivals(self._engine, self.scope, memory)
            for flow in came:
                number, error = arrivals.adopt(flow)
                if error:
                    self._lose(number, os.strerror(error))
            self._enter_repair(0)
            for number, waiting in enumerate(came.values()):
                self.restore(number, SOCKET.encode(waiting.on_time()) + waiting.sndq + waiting.rcvq)
            for flow, waiting in late.items():
                number, _error = arrivals.adopt(flow)
                address = address_text(waiting.ours.our_addr)
                self._lose(number, f"the address {address} has not come to this host within {PATIENCE:.0f} s")
            self._let_flows_go()
        finally:
            self._held_alone = False
            self._forget_arrivals()
        self._schedule(HURRY_SECONDS, self._calm)

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

    def mark_lost(self, number: int, why: str = "") -> None:
        """The source could not move this flow."""
        self._lose(number, f"the source could not move it{f': {why}' if why else ''}")

    def _lose(self, number: int, why: str) -> None:
        arrivals = self._came()  # no descriptor is closed that the helper is just being sent
        if arrivals.flow(number) >= 0:
            self._lost[number] = why
            arrivals.lose(number)

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
        self._schedule(HURRY_SECONDS, self._calm)
        self._watch()

    def _let_go(self) -> None:
        try:
            self._arriving.let_go()
        finally:
            self._let_flows_go()

    def _let_flows_go(self) -> None:
        if self._arrivals is None:
            return
        arrivals = self._came()
        for number in arrivals.not_restored():
            if number not in self._waits:
                self._lose(number, "it was not restored")
        self._leave_arrivals(arrivals.with_socket(0, restored=True))
        self._end_lost()

    def _leave_arrivals(self, numbers: array[int]) -> None:
        """End repair mode. While the helper is at work on some the next ones are completed, and those before go on."""
        out = numbers[:0]
        leaving = self._complete(numbers[:BATCH])
        for following in range(BATCH, len(numbers) + BATCH, BATCH):
            fds = self._came().sockets(leaving)
            wait = self._beside(partial(self._set_mode, fds, Repair.OFF))
            try:
                self._finish(out)
                complete = self._complete(numbers[following : following + BATCH])
            finally:
                done = self._done(wait, len(fds))
            out = leaving[:done]
            if done < len(fds):
                for number in (*leaving[done:], *complete, *numbers[following + BATCH :]):
                    self._lose(number, "no repair helper")
                break
            leaving = complete
        self._finish(out)

    def _complete(self, numbers: array[int]) -> array[int]:
        """All that they need but to be out of repair mode. Gives those that have it."""
        failed = dict(self._came().complete(numbers))
        for number, error in failed.items():
            self._lose(number, losses.why("completing its socket", error))
        return array("I", (number for number in numbers if number not in failed)) if failed else numbers

    def _done(self, wait: Callable[[], None], count: int) -> int:
        """How many sockets of so many the helper has set."""
        try:
            wait()
        except RepairError as error:
            log.error("%s", error)
            return error.done
        except Exception:
            log.exception("setting repair mode has failed")
            return 0
        return count

    def _finish(self, numbers: array[int]) -> None:
        """These are out of repair mode."""
        for number, error in self._came().finish(numbers):
            self._lose(number, losses.why("writing what was not sent yet", error))

    def _end_lost(self) -> None:
        """Reset what is lost, open what is opened here, and say how many there are."""
        flow_of = self._came().flow
        opens = [flow_of(number) for number in self._opens]
        opened = set(self._opens)
        lost = {flow_of(number): why for number, why in self._lost.items() if number not in opened}
        states = {flow: self._engine.flow_state(flow) for flow in lost}
        peers = [state.host_side for flow, state in states.items() if not self._is_local(flow)]
        for flow in lost:
            self._engine.reset_flow(flow)
        for flow in opens:
            self._engine.open_flow(flow)
        waits = {flow_of(number): waiting for number, waiting in self._waits.items() if number not in self._lost}
        going = len(self._arrived()) - len(lost) - len(waits)
        reset = sum(why == losses.RESET for why in lost.values())
        self.went = going, len(lost) - reset
        log.info("%d connections go on here, %d were lost", *self.went)
        if reset:
            log.info("%d connections were reset by their peers meanwhile", reset)
        if waits:
            missing = names(one.ours.our_addr for one in waits.values())
            log.warning("%d connections wait for their address to come to this host: %s", len(waits), missing)
        self._awaited.wait(waits)
        losses.report((why, states[flow]) for flow, why in lost.items() if why != losses.RESET)
        if lost and self._repair is not None:
            self._repair.end_guard()  # resets are wanted now
        self._knocks.begin(peers, self.scope)

    def discard(self) -> None:
        """Close all that was loaded; in repair mode a close says nothing."""
        with contextlib.ExitStack() as each:  # what fails keeps nothing else from being done
            each.callback(self._loaded)
            each.callback(self._engine.forget_pings, list(self._pings))
            each.callback(self._arriving.discard)
            for flow in self._arrived():
                each.callback(self._engine.forget_flow, flow)
            each.callback(self._awaited.forget)
            self._told_elsewhere = Withdrawn()

    def give_up_all(self) -> None:
        """After a transfer: should its end have failed, what stands still since is reset rather than left to hang."""
        with self._lock:
            self._locked_or_not()
            came = self._arrived()
            left = {*self._frozen, *came}
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
                came = [flow for flow in came if flow in left]
                peers = [self._engine.flow_state(flow).host_side for flow in came]
                for flow in left:
                    self._engine.reset_flow(flow)
                self._knocks.begin(peers, self.scope)

    def _arrived(self) -> list[int]:
        """The flows that have come and have a place in the table."""
        return [] if self._arrivals is None else self._came().flows()

    def _forget_arrivals(self) -> None:
        self._entered()
        self._arrivals = None
        self._lost.clear()
        self._opens.clear()
        self._waits.clear()

    def _loaded(self) -> None:
        """What came is the guest's, or gone: forget about it, and go on."""
        self._forget_arrivals()
        self._pings.clear()
        self._unpark()
