# SPDX-License-Identifier: GPL-2.0-or-later
"""Hours of mixed load on a guest, while at random everything happens to it that may: nothing but that may be lost.

``python -m godwit.lab.soak --seconds 7200 --seed 1`` (``make soak TIME=7200``). There are bulk streams and idle
connections each way and over IPv4 and IPv6, connections that come and go, questions and answers, slow readers,
trickling senders, half-closed connections, datagrams, pings and DHCP (`godwit.lab.users`). The events, and what each
may cost, are in `godwit.lab.soak_events`; their sequence follows from the seed. After each of them:

* what must live does, byte by byte; what may be gone is, or goes on, and whoever uses it is told;
* everybody gets on with what they do, with new connections too, within ``SETTLED`` seconds;
* the log has no error but those that the event is known for, and what is counted has not become less.

After every few there is a rest. By its end the back-ends count as many connections as there are, and they and their
helpers have no more memory and descriptors than after earlier rests. It ends at the first failure, with status 1, and
keeps the logs, and what sockets, queues and flows looked like.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import re
import shutil
import signal
import statistics
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from godwit.lab.agent import Agent
from godwit.lab.counters import Counters, ask
from godwit.lab.errors import LabError
from godwit.lab.guest import EmbeddedGuest
from godwit.lab.netns import Namespace, enter_user_namespace
from godwit.lab.say import say
from godwit.lab.scenario import PORT, Load, Scenario, qemu_guest
from godwit.lab.size import Size, growth, lean
from godwit.lab.soak_events import EVENTS, REFUSED, Cost, Event, Stage
from godwit.lab.traffic import Traffic
from godwit.lab.users import (
    Answers,
    Churn,
    Datagrams,
    Exchange,
    Grace,
    Leases,
    Odd,
    Pings,
    User,
    end_all,
    half_closed,
    slow_reader,
    trickle,
)
from godwit.vhost_user import VhostUserError

ODD_PORT = PORT + 1  # and those that follow, one for each kind of odd connection
LAST_PORT = PORT + 9
IDLE = 500  # connections for each way and IP version
RATE = 500_000  # bytes per second of each stream
SETTLED = 30.0  # seconds
REST = 12.0  # seconds after which sockets of what has moved away are closed
ENOUGH = 6  # looks at a process, before its later ones are compared: what it keeps to itself grows at first
REST_EVERY = 12  # events
MORE_MEMORY = 4 << 20  # bytes, in the second half of a process's looks: a state that was moved is there still, or not
LONG, SHORT = 160, 32  # events: processes stay through the former, so that what grows is seen, not through the latter
LOGS = "build/soak"
_SCENE = {"sockets": ("ss", "-Htanieom"), "udp": ("ss", "-Huanem"), "queues": ("tc", "-s", "qdisc")}

_ERROR = re.compile(r"^\S+ \S+ (?:ERROR|CRITICAL) (?P<text>.*)$|^Traceback .*$|^.*Sanitizer.*$", re.MULTILINE)


@dataclass(frozen=True)
class Extent:
    """How much load, how long to wait for what, and which events."""

    idle: int = IDLE
    rate: int = RATE
    settled: float = SETTLED
    rest: float = REST
    rest_every: int = REST_EVERY
    pace: float = 1.0
    events: Sequence[Event] = EVENTS
    once_each: bool = False
    """Each event once, in an order by chance, and that is all."""


@dataclass
class Report:
    """What came of it; times in seconds."""

    seed: int
    seconds: float = 0.0
    events: Counter[str] = field(default_factory=Counter)
    opened: int = 0
    refused: int = 0
    reset: int = 0
    bytes: int = 0
    datagrams: int = 0
    answered: int = 0
    leases: int = 0
    latencies: array[float] = field(default_factory=lambda: array("d"))
    rests: int = 0
    sizes: dict[str, list[Size]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{self.seconds / 3600:.2f} hours, {self.events.total()} events, seed {self.seed}",
            *(f"  {count:4} {name}" for name, count in self.events.most_common()),
            f"{self.opened} connections opened; {self.reset} were reset, {self.refused} refused, as events may cost",
            f"{self.bytes / 1e6:.0f} MB compared byte by byte, {'see below' if self.failures else '0 lost'}",
            f"{self.datagrams} datagrams and pings sent, {self.answered} answered; {self.leases} DHCP leases",
        ]
        if len(self.latencies) > 1:
            cuts = statistics.quantiles(self.latencies, n=1000)
            lines.append(
                f"{len(self.latencies)} questions: median {_ms(cuts[499])}, 99 % {_ms(cuts[989])},"
                f" 99.9 % {_ms(cuts[998])}, longest {_ms(max(self.latencies))}"
            )
        lines.append(f"after {self.rests} rests:")
        for name, looks in self.sizes.items():
            if len(looks) > 1:
                warm = f"{found[0]} -> " if (found := later(looks)) else ""
                lines.append(f"  {name}: {looks[0]} -> {warm}{looks[-1]} ({len(looks)} looks)")
        return "\n".join([*lines, *(f"FAILED: {failure}" for failure in self.failures)])


def later(looks: Sequence[Size]) -> Sequence[Size]:
    """Those of a process that are compared: the second half of them, once there are `ENOUGH`.

    What is to come to an end has by then, and what is lost bit by bit goes on.
    """
    return looks[len(looks) // 2 :] if len(looks) >= ENOUGH else ()


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


@dataclass
class _Idle:
    """Connections that carry something at each check only. ``agent`` has opened them to ``addr``."""

    agent: Agent
    addr: str
    count: int
    job: int = 0

    def open(self) -> None:
        self.job = self.agent.echo(self.addr, PORT, self.count)

    def check(self, *, all_alive: bool) -> int:
        """Use each; return how many are gone, which are to be none, or to have been told."""
        echoes = self.agent.check(self.job, SETTLED)
        if echoes.silent or (all_alive and echoes.failed):
            raise LabError(
                f"of {self.count} idle connections to {self.addr}, {echoes.alive} live, {echoes.failed} are"
                f" broken, {echoes.silent} silent"
            )
        return echoes.failed


class Log:
    """What a back-end and its helper have said, and how far it was looked at."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._at = 0

    def errors(self, known: str) -> list[str]:
        """What is new in it, and an error, and not ``known`` (a regular expression)."""
        with open(self._path, errors="replace") as file:
            file.seek(self._at)
            text = file.read()
        whole = text.rfind("\n") + 1
        self._at += len(text[:whole].encode(errors="replace"))
        found = [match[0] for match in _ERROR.finditer(text[:whole])]
        return [line for line in found if not (known and re.search(known, line))]


class Soak:
    """A guest with everybody who uses its network, and what has come of it so far in ``report``."""

    def __init__(self, scenario: Scenario, seed: int, extent: Extent, say: Callable[[str], None]) -> None:
        self.report = Report(seed)
        self.grace = Grace()
        self.stage = Stage(scenario, seed, pace=extent.pace)
        self.over = False
        self._scenario = scenario
        self._extent = extent
        self._say = say
        self._began = time.monotonic()
        self._logs: dict[str, Log] = {}
        self._counters: dict[str, Counters] = {}
        self._users: list[User] = []
        self._cleanup = contextlib.ExitStack()
        host, server = scenario.network.a, scenario.network.server
        self._addresses = list(zip((host.addr4, host.addr6), (server.addr4, server.addr6), strict=True))
        self._enter_guest()
        self._open()
        self._start_users()

    # --- load ---------------------------------------------------------------------

    def _enter_guest(self) -> None:
        """Have an agent in the guest."""
        guest = self._scenario.guest
        if isinstance(guest, EmbeddedGuest):
            # One of our own, to be replaced: of what ends with its back-end, who only listens in there never hears.
            self._inside: Agent = Traffic(guest.space)
        else:
            self._inside = guest.agent
            self._inside.serve_datagrams(PORT)
        self._inside.listen(PORT)

    def _open(self) -> None:
        """Open the streams and the idle connections."""
        extent, server = self._extent, self._scenario.server
        self._loads = [Load(server, self._inside, there, idle=1, rate=extent.rate) for _, there in self._addresses]
        if isinstance(self._inside, Traffic):
            self._loads += [Load(self._inside, server, here, idle=1, rate=extent.rate) for here, _ in self._addresses]
        self._idles = [_Idle(server, here, extent.idle) for here, _ in self._addresses]
        self._idles += [_Idle(self._inside, there, extent.idle) for _, there in self._addresses]
        for idle in self._idles:
            idle.open()
        self.report.opened += self._open_connections()

    def _start_users(self) -> None:
        server, guest, grace = self._scenario.network.server, self._scenario.guest, self.grace
        for here, there in self._addresses:
            self._users += [Churn(server, here, grace), Exchange(server, here, grace), Datagrams(server, here, grace)]
            if not isinstance(guest, EmbeddedGuest):
                continue
            space = guest.space
            self._users += [Churn(space, there, grace), Exchange(space, there, grace), Datagrams(space, there, grace)]
            self._users.append(Pings(space, there))
        if isinstance(guest, EmbeddedGuest):
            space = guest.space
            self._users += [Answers(space), Answers(server)]
            self._users.append(Leases(space, guest.mac, self._scenario.network.a.addr4))
            ways: list[tuple[Namespace, str, Namespace]] = [(server, here, space) for here, _ in self._addresses]
            ways += [(space, there, server) for _, there in self._addresses]
            kinds = [(step, way) for step in (slow_reader, trickle, half_closed) for way in ways]
            # One of each kind in each direction; the IP version by turns.
            for number, (step, (one, addr, other)) in enumerate(kinds[::2] if self.report.rests % 2 else kinds[1::2]):
                self._users.append(Odd(step, one, addr, other, ODD_PORT + number, grace))

    def _end_users(self) -> None:
        """End them all, and count what they have done."""
        report = self.report
        users, self._users = self._users, []
        report.failures += end_all(users)
        for user in users:
            report.refused += user.refused
            report.reset += user.reset
            match user:
                case Churn() | Exchange():
                    report.opened += user.opened
                    report.failures += user.untold
                case Odd():
                    report.bytes += user.bytes
                case Datagrams() | Pings():
                    report.datagrams += user.asked
                    report.answered += user.done
                case Leases():
                    report.leases += user.done
            if isinstance(user, Exchange):
                report.latencies += user.latencies
                report.bytes += user.bytes

    # --- events -------------------------------------------------------------------

    def run(self, seconds: float) -> None:
        """Let things happen for so long.

        :raises LabError: something is wrong.
        """
        self._rest()
        until = time.monotonic() + seconds
        for event in self._choose():
            if time.monotonic() > until or self.over:
                break
            self._happen(event)
            if not self.report.events.total() % self._extent.rest_every:
                self._rest()
        self._rest()
        for load in self._loads:
            for outcome in load.finish():
                self.report.bytes += outcome.received
                if not outcome.ok:
                    raise LabError(f"{outcome}")
        self._end_users()

    def _choose(self) -> Iterator[Event]:
        qemu = not isinstance(self._scenario.guest, EmbeddedGuest)
        events = [event for event in self._extent.events if event.qemu or not qemu]
        chance = self.stage.random
        if self._extent.once_each:
            yield from chance.sample(events, len(events))
            return
        staying = [event for event in events if not event.ends] or events
        for among, count in itertools.cycle(((staying, LONG), (events, SHORT))):
            yield from chance.choices(among, [event.weight for event in among], k=count)

    def _happen(self, event: Event) -> None:
        self.report.events[event.name] += 1
        number = self.report.events.total()
        began = time.monotonic()
        self._watch_logs()
        try:
            with self.grace.handshakes() if event.cost is not Cost.NOTHING else contextlib.nullcontext():
                if event.cost is Cost.CONNECTIONS:
                    with self.grace.lives():
                        said = event.happen(self.stage)
                        self._open_again()
                else:
                    said = event.happen(self.stage)
            happened = time.monotonic()
            self._settle(event.said)
        except (LabError, VhostUserError, OSError) as error:
            raise LabError(f"event {number}, {event.name}: {error}") from error
        now = time.monotonic()
        self._say(
            f"{now - self._began:7.0f} s  {number:5} {event.name}: {said};"
            f" {happened - began:.1f} s, and well {now - happened:.1f} s later"
        )

    def _open_again(self) -> None:
        """Where connections may be gone, see that each goes on or is told of, and open others to another agent."""
        inside = self._inside
        gone = not isinstance(inside, Traffic)  # a QEMU is, with all that was in it
        for idle in self._idles:
            if not (gone and idle.agent is inside):
                self.report.reset += idle.check(all_alive=False)
                idle.agent.drop(idle.job)
        for load in self._loads:
            for came, ended in load.give_up(inside, self._extent.settled, gone=gone):
                self.report.bytes += came
                self.report.reset += ended
        if isinstance(inside, Traffic):
            inside.close()
        self._enter_guest()
        self._open()

    def _settle(self, known: str) -> None:
        """See that everything goes on."""
        limit = self._extent.settled
        done = [(user, user.done) for user in self._users if not isinstance(user, Answers)]
        until = time.monotonic() + limit
        while waiting := [user for user, before in done if user.done == before]:
            self._look_for_failures()
            if time.monotonic() > until:
                raise LabError(f"no more of {', '.join(map(str, waiting))} for {limit:g} s")
            time.sleep(0.01)
        for load in self._loads:
            load.wait_alive(limit)
        for idle in self._idles:
            idle.check(all_alive=True)
        for load in self._loads:
            if said := load.check_idle(limit):
                raise LabError(said)
        self._look_for_failures()
        self._look_for_errors(known)
        for name, backend in self._scenario.backends.items():
            if not backend.running or backend.helper_pid is None:
                raise LabError(f"the back-end on host {name}, or its helper, has ended")
            self._count(name)
        if isinstance(self._scenario.guest, EmbeddedGuest):
            self._scenario.guest.check()

    def _look_for_failures(self) -> None:
        failures = [failure for user in self._users for failure in user.failures]
        failures += [untold for user in self._users if isinstance(user, Churn | Exchange) for untold in user.untold]
        if failures:
            raise LabError("; ".join(failures[:5]))

    def _count(self, name: str) -> Counters:
        """Read what the back-end on a host counts, and compare with the last time."""
        counters = Counters.of(self._scenario.backends[name])
        before = self._counters.get(name)
        self._counters[name] = counters
        if before is not None and (less := counters.backwards(before)):
            raise LabError(f"the back-end on host {name} counts backwards: {'; '.join(less[:5])}")
        return counters

    def _open_connections(self) -> int:
        """How many the guest has, while nobody but the streams and the idle ones is there."""
        return sum(idle.count for idle in self._idles) + 3 * len(self._loads)

    def _expect_connections(self) -> None:
        """See that the back-ends count as many connections as there are, and find nothing amiss."""
        until = time.monotonic() + self._extent.settled
        for name in self._scenario.backends:
            there = self._open_connections() if name == self._scenario.where else 0
            while (counters := self._count(name)).connections != there and time.monotonic() < until:
                time.sleep(0.2)
            if counters.connections != there:
                raise LabError(f"the back-end on host {name} counts {counters.connections} connections of {there}")
            if counters.amiss:
                raise LabError(f"the back-end on host {name} finds something amiss: {', '.join(counters.amiss)}")

    def _watch_logs(self) -> None:
        for backend in self._scenario.backends.values():
            self._logs.setdefault(backend.log, Log(backend.log))

    def _look_for_errors(self, known: str) -> None:
        self._watch_logs()
        known = f"{known}|{REFUSED}" if known else REFUSED  # if out of time, the event has failed already
        errors = [line for log in self._logs.values() for line in log.errors(known)]
        if errors:
            raise LabError(f"in the log: {'; '.join(errors[:5])}")

    def _rest(self) -> None:
        """See how large the programs are when there has been nothing but streams and idle connections for a while."""
        self._end_users()
        if self.report.failures:
            raise LabError(self.report.failures.pop(0))
        self._expect_connections()
        time.sleep(self._extent.rest)
        for name, backend in self._scenario.backends.items():
            role = "with the guest" if name == self._scenario.where else "without"
            sizes = self.report.sizes
            for pid, what in (
                (backend.pid, f"{backend.name}, process {backend.pid}, {role}"),
                (backend.helper_pid, ""),
            ):
                if pid is not None:
                    what = what or f"the helper of {backend.name}, process {pid}"
                    sizes.setdefault(what, []).append(Size.of(pid, datagrams=False))
        self.report.rests += 1
        late = {name: found for name, looks in self.report.sizes.items() if (found := later(looks))}
        if grown := growth(late, MORE_MEMORY):
            raise LabError("; ".join(grown))
        self._start_users()
        self._settle("")

    def close(self) -> None:
        """End whoever is there still."""
        self.report.seconds = time.monotonic() - self._began
        self._end_users()
        if isinstance(self._inside, Traffic):
            self._inside.close()


def run(
    seconds: float,
    seed: int,
    extent: Extent | None = None,
    *,
    qemu: bool = False,
    logs: str | None = None,
    arguments: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Soak for so long; ``arguments`` are for ``godwit serve``, ``logs`` is where they are kept if anything fails."""
    ports = f"{PORT}-{LAST_PORT}"
    options = ["--tcp-ports", ports, "--udp-ports", ports, *arguments]
    make_guest = qemu_guest if qemu else None
    with lean(), Scenario(godwit_arguments=options, levels=True, make_guest=make_guest) as scenario:
        soak = Soak(scenario, seed, extent or Extent(), say)
        before = signal.signal(signal.SIGTERM, lambda *_: setattr(soak, "over", True))
        folder = None if logs is None else os.path.join(logs, f"seed-{seed}")
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            soak.run(seconds)
        except (LabError, VhostUserError, OSError) as error:
            soak.report.failures.append(f"{error}")
            if folder is not None:
                _keep_scene(scenario, folder)
        finally:
            signal.signal(signal.SIGTERM, before)
            soak.close()
            if soak.report.failures and folder is not None:
                os.makedirs(folder, exist_ok=True)
                for name in os.listdir(scenario.folder):
                    if name.endswith(".log"):
                        shutil.copy(os.path.join(scenario.folder, name), folder)
                soak.report.failures.append(f"the logs are in {folder}")
    return soak.report


def _keep_scene(scenario: Scenario, folder: str) -> None:
    """Keep what is to be seen at a failure, before anything is taken down: sockets, queues, the back-ends' flows."""
    os.makedirs(folder)
    net = scenario.network
    spaces = {"bridge": net.bridge, "server": net.server, **net.hosts}
    if isinstance(scenario.guest, EmbeddedGuest):
        spaces["guest"] = scenario.guest.space
    for name, space in spaces.items():
        for what, command in _SCENE.items():
            Path(folder, f"{name}.{what}").write_text(space.run(*command, check=False).stdout)
    for backend in scenario.backends.values():
        for what in ("status", "flows", "metrics"):
            with contextlib.suppress(LabError):  # it may be what has failed
                Path(folder, f"{backend.name}.{what}").write_bytes(ask(f"{backend.socket}.ctl", what))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m godwit.lab.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=7200.0, metavar="N", help="for how long (%(default)g)")
    parser.add_argument("--seed", type=int, help="of what happens (any)")
    parser.add_argument("--idle", type=int, default=IDLE, help="connections each way and IP version (%(default)s)")
    parser.add_argument("--rate", type=int, default=RATE, help="bytes per second of each stream (%(default)s)")
    parser.add_argument("--only", metavar="WORD", help="no events but those with this in their names")
    parser.add_argument("--qemu", action="store_true", help="a QEMU guest, not an embedded one")
    parser.add_argument("--logs", default=LOGS, metavar="FOLDER", help="for those of a failure (%(default)s)")
    parser.add_argument("argument", nargs="*", help="more options for godwit serve")
    options = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(1 << 31) if options.seed is None else options.seed
    events = [event for event in EVENTS if options.only is None or options.only in event.name]
    if not events:
        parser.error(f"no event has {options.only!r} in its name")

    try:
        enter_user_namespace()
        say(f"seed {seed}")
        extent = Extent(idle=options.idle, rate=options.rate, events=events)
        report = run(
            options.seconds,
            seed,
            extent,
            qemu=options.qemu,
            logs=options.logs,
            arguments=options.argument,
            say=say,
        )
    except LabError as error:
        say(f"FAILED: {error}")
        return 1
    say(str(report))
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
