# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether the daemon keeps memory: one kind of event at a time, again and again, as fast as it goes.

``python -m godwit.lab.leaks --times 200``. The kinds are those of a soak (`godwit.lab.soak_events`) and what a guest
and its peers do all the time. Each is done so often to a new pair of daemons; the memory of each is looked at half-way
and in the end, both after a rest. What is more in the end, for each event, is what would be lost by a daemon that has
been up for long. Some of it is none: a hash table of 1 MiB has a page more in use now and then, and the flow table
keeps the pages that the most flows of all time needed (224 bytes each). Ends with status 1 if a kind grows.

The daemons run with one heap, and no caches of threads (`lean`): what free(3) keeps to itself would hide what is lost.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from godwit.lab.backend import Backend
from godwit.lab.counters import metrics
from godwit.lab.errors import LabError
from godwit.lab.netns import enter_user_namespace
from godwit.lab.say import say
from godwit.lab.scenario import PORT, Scenario
from godwit.lab.size import Size, lean
from godwit.lab.soak_events import EVENTS, Cost, Event, Stage
from godwit.lab.traffic import Traffic
from godwit.lab.users import Answers, Churn, Datagrams, Grace, Leases, Pings, User, end_all

TIMES = 200
IDLE = 200  # connections each way
REST = 11.0  # seconds after which sockets of what has moved away are closed
PACE = 0.01  # of the times for which the events of a soak wait
LEAK = 4096  # bytes for each event, beyond ...
PAGES = 256 << 10  # ... bytes that come and go: pages of tables, holes in the heap


class Kept(NamedTuple):
    """What a process has more in the end than half-way, after so many events more."""

    name: str
    half: Size
    end: Size
    events: int

    @property
    def each(self) -> float:
        """Bytes for each event."""
        return (self.end.memory - self.half.memory) / self.events

    @property
    def is_leak(self) -> bool:
        """Whether it is more than comes and goes."""
        return self.end.memory - self.half.memory > max(PAGES, LEAK * self.events)

    def __str__(self) -> str:
        return f"{self.name}: {self.half} -> {self.end}, {self.each:.0f} bytes for each of {self.events} events"


# --- what goes on all the time ----------------------------------------------------


class _Churn(Churn):
    def pause(self, seconds: float) -> None:
        """Not at all."""


class _Datagrams(Datagrams):
    """From one port: each takes a place in the flow table for minutes."""

    QUESTIONS = 1 << 30

    def pause(self, seconds: float) -> None:
        """Not at all."""


class _Leases(Leases):
    def pause(self, seconds: float) -> None:
        """Not at all."""


class _Pings(Pings):
    def pause(self, seconds: float) -> None:
        """Not at all."""


def _used(make: Callable[[Stage], list[User]]) -> Callable[[Stage], str]:
    """They do it as often as they can, for a moment."""

    def happen(stage: Stage) -> str:
        users = make(stage)
        time.sleep(0.2)
        if failures := end_all(users):
            raise LabError("; ".join(failures))
        return f"{sum(user.done for user in users)} times"

    return happen


def _connections(stage: Stage) -> list[User]:
    network, grace = stage.network, Grace()
    return [
        _Churn(network.server, network.a.addr4, grace),
        _Churn(network.server, network.a.addr6, grace),
        _Churn(stage.guest.space, network.server.addr4, grace),
        _Churn(stage.guest.space, network.server.addr6, grace),
    ]


def _questions(stage: Stage) -> list[User]:
    network, inside = stage.network, stage.guest.space
    return [
        Answers(inside),
        Answers(network.server),
        _Datagrams(network.server, network.a.addr4),
        _Datagrams(inside, network.server.addr6),
        _Pings(inside, network.server.addr4),
        _Pings(inside, network.server.addr6),
    ]


def _leases(stage: Stage) -> list[User]:
    return [_Leases(stage.guest.space, stage.guest.mac, stage.network.a.addr4)]


def _asked(stage: Stage) -> str:
    return f"{len(metrics(f'{stage.here.socket}.ctl'))} families"


KINDS: Sequence[Event] = (
    *EVENTS,
    Event("connections come and go", Cost.NOTHING, 1, _used(_connections)),
    Event("datagrams and pings", Cost.NOTHING, 1, _used(_questions)),
    Event("leases", Cost.NOTHING, 1, _used(_leases)),
    Event("metrics are asked for", Cost.NOTHING, 1, _asked),
)


# --- and what it leaves -----------------------------------------------------------


class _Idle:
    """Connections both ways that carry something when they are looked at; ``count`` each way."""

    def __init__(self, stage: Stage, count: int) -> None:
        self._stage = stage
        self._count = count
        self._open()

    def _open(self) -> None:
        network, server = self._stage.network, self._stage.scenario.server
        self._inside = Traffic(self._stage.guest.space)
        self._inside.listen(PORT)
        self._jobs = [
            (server, server.echo(network.a.addr4, PORT, self._count)),
            (self._inside, self._inside.echo(network.server.addr6, PORT, self._count)),
        ]

    def open_again(self) -> None:
        """Others, after an event that may have cost these."""
        server, job = self._jobs[0]
        server.drop(job)
        self._inside.close()
        self._open()

    def check(self) -> None:
        """:class:`LabError` if they do not all live."""
        for agent, job in self._jobs:
            if (echoes := agent.check(job, 30.0)).alive != self._count:
                raise LabError(f"connections: {echoes}")

    def close(self) -> None:
        """Let them go."""
        self._inside.close()


def measure(
    event: Event, times: int, *, idle: int = IDLE, rest: float = REST, seed: int = 1, arguments: Sequence[str] = ()
) -> list[Kept]:
    """Have it happen so often. What the daemons keep that were there half-way and are in the end.

    ``arguments`` are for ``godwit serve``.

    :raises LabError: something went wrong otherwise.
    """
    ports = str(PORT)
    options = ["--tcp-ports", ports, "--udp-ports", ports, *arguments]
    with lean(), Scenario(godwit_arguments=options) as scenario:
        stage = Stage(scenario, seed, pace=PACE)
        with contextlib.closing(_Idle(stage, idle)) as connections:
            looks = []
            for _ in range(2):
                for _ in range(times // 2):
                    event.happen(stage)
                    if event.cost is Cost.CONNECTIONS:
                        connections.open_again()
                connections.check()
                time.sleep(rest)
                looks.append({backend.pid: (backend.name, _size(backend)) for backend in scenario.backends.values()})
    half, end = looks
    return [Kept(name, half[pid][1], size, times // 2) for pid, (name, size) in end.items() if pid in half]


def _size(backend: Backend) -> Size:
    return Size.of(backend.pid, datagrams=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(prog="python -m godwit.lab.leaks", description=__doc__)
    parser.add_argument("--times", type=int, default=TIMES, metavar="N", help="how often, of each (%(default)s)")
    parser.add_argument("--idle", type=int, default=IDLE, help="connections that are open, each way (%(default)s)")
    parser.add_argument("--only", metavar="WORD", help="no kinds but those with this in their names")
    parser.add_argument("argument", nargs="*", help="more options for godwit serve")
    options = parser.parse_args(arguments)
    kinds = [kind for kind in KINDS if options.only is None or options.only in kind.name]
    if not kinds:
        parser.error(f"no kind has {options.only!r} in its name")
    status = 0
    try:
        enter_user_namespace()
        for kind in kinds:
            for kept in measure(kind, options.times, idle=options.idle, arguments=options.argument):
                say(f"{'LEAK  ' if kept.is_leak else ''}{kind.name}, {kept}")
                status |= kept.is_leak
    except LabError as error:
        say(f"FAILED: {error}")
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
