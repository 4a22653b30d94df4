# SPDX-License-Identifier: GPL-2.0-or-later
"""What a migration costs, by the number of open connections and by what is queued on them.

Each kind has hosts, a server and a guest of its own, and two back-ends, between
which the guest moves there and back in each measurement:

* There step by step, the state kept in between: *stop* is GET_VRING_BASE, *save*
  is from SET_DEVICE_STATE_FD to the good answer to CHECK_DEVICE_STATE, *load* is
  the same on the target, and *start* lets the guest run there. Which part of the
  work a back-end does at which of these two is its own affair: what can be compared
  is *load until running*, both together. Processor time is
  that of the back-end and of its repair helper; the source's from the stop to the
  end of the save, the target's from the load until it is quiet again after the
  start, since a back-end may leave work for then (or until it has started, where it
  is not going to be quiet: see `queued`).
* Back as QEMU does it, the target loading what the source saves meanwhile:
  *blackout* is how long the guest stood still, *silence* the longest that a
  connection in use had, of some that the guest sends over all the time. godwit's
  guest runs before its connections do; passt's runs when they do.

Before the source is stopped it is cut off the network, which leads to the target
when that has loaded. The connections are the ``crowd``'s, real ones to a real
server, and are used after each move.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from godwit.lab.backend import Backend, Kind
from godwit.lab.bench import DESCRIPTORS, Case, cpu, expect_descriptors
from godwit.lab.closing import Closing
from godwit.lab.crowd import Crowd
from godwit.lab.errors import LabError
from godwit.lab.guest import EmbeddedGuest
from godwit.lab.migration import Migration
from godwit.lab.netns import wait_until
from godwit.lab.scenario import Scenario
from godwit.vhost_user import VhostUserError

MTU = 1500
MOVING = frozenset({"godwit", "passt"})  # all others are not moved here
PASSTS_MOST = 9000  # connections: of `DESCRIPTORS` it takes two for each
_TAKEN = 4096  # what a guest takes all the same that does not read, at most
_SAMPLE = 500  # connections that are used between two moves; after the second, all are
_LINGER = 0.0  # seconds for a back-end to end, which would stay for the sake of connections that have left
_QUIET = 0.05  # seconds in which a back-end uses no processor


def _cpu_of(backend: Backend) -> float:
    return cpu(backend.pid, backend.helper_pid)


def cpu_when_quiet(backend: Backend, timeout: float = 1.0) -> float:
    """Wait until a back-end and its helper have nothing to do, and return their processor time."""
    before, deadline = _cpu_of(backend), time.monotonic() + timeout
    while True:
        time.sleep(_QUIET)
        now = _cpu_of(backend)
        if now - before < _QUIET / 50 or time.monotonic() > deadline:
            return now
        before = now


@dataclass(frozen=True)
class Steps:
    """Seconds of a move step by step: what the clock says, and the processors."""

    stop: float
    save: float
    load: float
    start: float
    source_cpu: float
    target_cpu: float
    state: int  # bytes


class MoveSide(Closing):
    """Two back-ends of one kind, and a guest that moves between them with its connections."""

    def __init__(self, kind: Kind, mtu: int, dialect: str, *, descriptors: int = DESCRIPTORS) -> None:
        self.kind = str(kind)
        self._cleanup = contextlib.ExitStack()
        try:
            self._scenario = self._cleanup.enter_context(
                Scenario(
                    backends=(self.kind, self.kind),
                    godwit_arguments=["--migrate-version", dialect],
                    descriptors=descriptors,
                    mtu=mtu,
                )
            )
            guest = self._scenario.guest
            assert isinstance(guest, EmbeddedGuest)
            self.guest = guest
            self.crowd = self._cleanup.enter_context(
                Crowd(guest.space, self._scenario.network.server, self._scenario.server_address)
            )
        except BaseException:
            self._cleanup.close()
            raise

    def have(self, count: int) -> None:
        """Have so many idle connections open, and no more."""
        if self.crowd.count > count:
            self.crowd.drop()
        if self.crowd.count < count:
            self.crowd.open(count - self.crowd.count)
            self.crowd.expect_alive(_SAMPLE)

    @property
    def here(self) -> Backend:
        """The back-end that the guest is behind."""
        return self._scenario.backends[self._scenario.where]

    def _move(self, transfer: Callable[[Migration, Backend, Backend], None], *, in_use: bool = False) -> Migration:
        """Move to the other host; ``transfer`` has the guest stopped, and moves the state.

        ``in_use``: the guest sends over some connections from shortly before that on.
        """
        scenario, net = self._scenario, self._scenario.network
        source, target = scenario.where, net.other(scenario.where)
        if not scenario.backends[target].running:
            scenario.start_backend(target)
        for backend in scenario.backends.values():
            backend.ensure_helper()
        self._settle()
        migration = self.guest.migration(scenario.backends[target].socket)
        try:
            migration.connect_target()
            migration.log_on()
            if in_use:
                self.crowd.start_ticks()
                time.sleep(_QUIET)  # some go through
            net.switch(None)
            transfer(migration, scenario.backends[source], scenario.backends[target])
        except (LabError, VhostUserError, OSError) as error:
            for undo in (migration.cancel, functools.partial(net.switch, source)):
                with contextlib.suppress(LabError, VhostUserError, OSError):
                    undo()
            raise LabError(f"the guest does not move: {error}") from error
        scenario.where = target
        return migration

    def queued(self) -> int:
        """How many bytes are in the queues of the back-end's sockets."""
        table = self.here.space.run("ss", "-Htn", "state", "established").stdout
        return sum(sum(map(int, line.split()[:2])) for line in table.splitlines())

    def cut(self) -> None:
        """Cut the host off the network: until the next move."""
        self._scenario.network.switch(None)

    def _settle(self) -> None:
        for backend in self._scenario.backends.values():
            cpu_when_quiet(backend)

    def _left(self, migration: Migration) -> None:
        """Leave the source, and end it: the next move is to one that has nothing left of the connections."""
        left = self._scenario.backends[self._scenario.network.other(self._scenario.where)]
        migration.finish()
        left.close(_LINGER)
        self.guest.check()

    def step_by_step(self, *, quiet: bool = True) -> Steps:
        """Move, one thing after the other. ``quiet``: count the processor's time until the target has nothing to do."""
        found: list[float] = []

        def transfer(migration: Migration, source: Backend, target: Backend) -> None:
            def timed(step: Callable[[], object]) -> None:
                began = time.perf_counter()
                step()
                found.append(time.perf_counter() - began)

            def load() -> None:
                if not migration.load(migration.record.stream):
                    raise LabError(f"the target refuses the state: {target.messages()[-1000:]}")

            at_source = _cpu_of(source)
            timed(migration.suspend)
            timed(migration.save)
            found.append(_cpu_of(source) - at_source)
            at_target = _cpu_of(target)
            timed(load)
            self._scenario.network.switch(target.space.name)
            timed(migration.switch_over)
            found.append((cpu_when_quiet(target) if quiet else _cpu_of(target)) - at_target)

        migration = self._move(transfer)
        self._left(migration)
        stop, save, source_cpu, load, start, target_cpu = found
        return Steps(stop, save, load, start, source_cpu, target_cpu, len(migration.record.stream))

    def at_once(self) -> tuple[float, float]:
        """Move as QEMU does; how long the guest stood still, and the longest silence of a connection, in seconds."""
        running = 0.0

        def transfer(migration: Migration, source: Backend, target: Backend) -> None:
            nonlocal running
            migration.suspend()
            migration.transfer()
            self._scenario.network.switch(target.space.name)
            migration.switch_over()
            running = time.monotonic()

        migration = self._move(transfer, in_use=True)
        try:
            silence = max(self.crowd.gaps(running), default=0.0)
        finally:
            self._left(migration)
        return migration.record.downtime, silence

    def check(self) -> None:
        """Raise `LabError` if the back-end broke a ring or is gone."""
        self.guest.check()
        if self.guest.backend_gone:
            raise LabError(f"{self.kind} has hung up: {self.here.messages()[-1000:]}")

    def close(self) -> None:
        """Take it all down. May be repeated."""
        self._cleanup.close()


class MoveBed(Closing):
    """A side for each kind, each with a network of its own; ``dialect`` is what godwit writes."""

    def __init__(self, mtu: int, kinds: Sequence[Kind], dialect: str = "2") -> None:
        expect_descriptors()
        self._cleanup = contextlib.ExitStack()
        try:
            self.sides = {kind: self._cleanup.enter_context(MoveSide(kind, mtu, dialect)) for kind in kinds}
        except BaseException:
            self._cleanup.close()
            raise

    def close(self) -> None:
        """Take it all down. May be repeated."""
        self._cleanup.close()


def _metrics(steps: Steps, count: int) -> dict[str, float]:
    found = {
        "stop ms": steps.stop * 1e3,
        "save ms": steps.save * 1e3,
        "load ms": steps.load * 1e3,
        "start ms": steps.start * 1e3,
        "load until running ms": (steps.load + steps.start) * 1e3,
    }
    if not count:
        return {**found, "save CPU ms": steps.source_cpu * 1e3, "load CPU ms": steps.target_cpu * 1e3}
    return {
        **found,
        "save us/flow": steps.save * 1e6 / count,
        "save CPU us/flow": steps.source_cpu * 1e6 / count,
        "load us/flow": steps.load * 1e6 / count,
        "load until running us/flow": (steps.load + steps.start) * 1e6 / count,
        "load CPU us/flow": steps.target_cpu * 1e6 / count,
        "state bytes/flow": steps.state / count,
    }


def idle(side: MoveSide, seconds: float, *, count: int) -> dict[str, float]:
    """Move with idle connections. ``seconds`` does not matter: it takes what it takes."""
    side.have(count)
    found = _metrics(side.step_by_step(), count)
    if count:
        side.crowd.expect_alive(_SAMPLE)
    blackout, silence = side.at_once()
    found["blackout ms"] = blackout * 1e3
    if count:
        found["silence ms"] = silence * 1e3
        side.crowd.expect_alive()
    return found


def queued(side: MoveSide, seconds: float, *, count: int, size: int, up: bool) -> dict[str, float]:
    """Move with ``size`` bytes at the back-end for each connection.

    If ``up`` they come from the guest, and the network is cut off before they are
    sent; otherwise they are for the guest, which does not read. passt is busy all
    the time then: its processor time is not waited for to end.
    """
    side.have(0)
    found: dict[str, float] = {}
    for back in (False, True):
        full = side.crowd.open_full(count, up=up)
        if up:
            side.cut()
        if (left := full.fill(size + (0 if up else _TAKEN))) != count:
            raise LabError(f"only {left} of {count} connections take what is to be queued on them")
        wait_until(lambda: side.queued() >= count * size, "what is to move to come to the back-end", 10.0)
        if back:
            found["blackout ms"] = side.at_once()[0] * 1e3
        else:
            found = _metrics(side.step_by_step(quiet=False), count)
        if (right := full.read()) != count:
            raise LabError(f"of {count} connections with full queues, {count - right} lost something or were lost")
    return found


@dataclass(frozen=True)
class _Dialect:
    """What godwit writes. The first is passt's, too."""

    bed: Callable[[int, Sequence[Kind]], MoveBed]
    suffix: str
    title: str
    spoken: frozenset[str]

    def case(self, name: str, title: str, count: int, measure: Callable[[MoveSide, float], dict[str, float]]) -> Case:
        """One that moves so many connections."""
        only = self.spoken & (_GODWIT if count > PASSTS_MOST else MOVING)
        beyond = " (beyond passt's limit)" if count > PASSTS_MOST else ""
        return Case(
            f"{name}{self.suffix}", f"move {title}{beyond}{self.title}", MTU, measure, self.bed, frozenset(), only
        )


_GODWIT = frozenset({"godwit"})
_SHARED = _Dialect(MoveBed, "", "", MOVING)
_NATIVE = _Dialect(functools.partial(MoveBed, dialect="native"), "-native", ", native dialect", _GODWIT)

_IDLE = (0, 1000, 9000, 10_000, 19_000)
# What fits into a few seconds, twice 100 MB at most: how many connections, KiB queued on each, in which dialects.
_QUEUED = ((1000, 24, (_SHARED, _NATIVE)), (9000, 8, (_SHARED,)), (19_000, 4, (_NATIVE,)))


def _cases() -> Iterator[Case]:
    for dialect in (_SHARED, _NATIVE):
        for count in _IDLE:
            title = f"{count:,} idle" if count else "without connections"
            yield dialect.case(f"idle-{count}", title, count, functools.partial(idle, count=count))
    for count, size, dialects in _QUEUED:
        for dialect in dialects:
            for name, way in (("up", "peer"), ("down", "guest")):
                title = f"{count:,}, {size} KiB each on the way to the {way}"
                measure = functools.partial(queued, count=count, size=size << 10, up=name == "up")
                yield dialect.case(f"queued-{name}-{count}", title, count, measure)


CASES: tuple[Case, ...] = tuple(_cases())
