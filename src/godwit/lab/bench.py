# SPDX-License-Identifier: GPL-2.0-or-later
"""Measurements of back-ends beside each other: godwit, passt, any other, the ideal one, and none at all.

All are behind the same front-end (the embedded guest's) on one host of the
laboratory's network, and each round measures one after the other, every second
round in the opposite order, so that what the machine does meanwhile meets all of
them. What is given is the median over the rounds, with the least and the most.

A *case* is a row of a table (``udp_bench.CASES``): a name, the MTU of guest
and network, and a function that measures it once on a ``Side``::

    with Bed(1500, ("godwit", "passt")) as bed:
        values = case.measure(bed.sides["godwit"], 1.0)
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from godwit import __version__
from godwit.lab import peer
from godwit.lab.backend import IDEAL, Backend, Kind, Program
from godwit.lab.closing import Closing
from godwit.lab.errors import LabError
from godwit.lab.guest import EmbeddedGuest
from godwit.lab.netns import HOST4, Namespace, Network
from godwit.vhost_user import VhostUserError

NONE = "none"  # no back-end: the host itself in the guest's place
KINDS: tuple[Kind, ...] = ("godwit", "passt", IDEAL, NONE)

FAILURES = (LabError, OSError, VhostUserError, subprocess.SubprocessError)
PATIENCE = 4  # failures on a side that was not used before, after which a kind is left out of a case
DESCRIPTORS = 20_000  # that a back-end may have, whatever the machine allows
FORMAT = 1  # of what `Results.dumps` gives

PORT_COUNT = 10
_FIRST_PORT = 20_000


def expect_descriptors() -> None:
    """Raise `LabError` unless a process may have `DESCRIPTORS`."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < DESCRIPTORS:
        raise LabError(f"{DESCRIPTORS} descriptors are needed for each process, {most} are allowed (ulimit -Hn)")


def cpu(*pids: int | None) -> float:
    """Processor time of these processes so far, in seconds: their own clocks (clock_getcpuclockid(3))."""
    return sum(time.clock_gettime(~pid << 3 | 2) for pid in pids if pid is not None)


def grounds(cleanup: contextlib.ExitStack, mtu: int) -> tuple[Network, str]:
    """A network, and a folder that back-ends of any user reach: what most beds are made on."""
    folder = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="godwit-bench-"))
    os.chmod(folder, 0o755)  # passt becomes another user
    return cleanup.enter_context(Network(mtu=mtu)), folder


class Side:
    """One back-end and the guest behind it, or neither (``NONE``).

    The guest's sockets are in ``space``, at ``addr``. The server's are in
    ``server``, bound to any address; the guest reaches them at ``server_addr``.
    ``port`` is the first of `PORT_COUNT` ports of the host, this side's own,
    which are forwarded to the same ports of the guest.

    Behind the ideal back-end the server is the guest itself.
    """

    def __init__(self, kind: Kind, net: Network, folder: str, port: int, cleanup: contextlib.ExitStack) -> None:
        self.kind = kind
        self.server: Namespace = net.server
        self.server_addr = net.server.addr4
        self.guest: EmbeddedGuest | None = None
        self.space: Namespace = net.a
        self.addr = HOST4
        self.port = port
        self._pid: int | None = None
        if kind == NONE:
            return
        ports = f"{port}-{port + PORT_COUNT - 1}"
        mtu = min(net.mtu, 65520)
        backend = cleanup.enter_context(
            Backend(net.a, folder, kind, helper=None, ports=ports, mtu=mtu, descriptors=DESCRIPTORS)
        )
        self.guest = cleanup.enter_context(EmbeddedGuest(f"guest-{kind}", mtu=net.mtu))
        self.guest.connect(backend.socket)
        self.guest.configure()
        self.space = self.guest.space
        self._pid = backend.pid
        if kind == IDEAL:
            self.server = self.space
            self.space.ip(f"neigh replace {self.server_addr} lladdr {net.server.mac} dev eth0 nud permanent")

    @property
    def pid(self) -> int | None:
        """The back-end's process, if there is one."""
        return self._pid

    def cpu(self) -> float:
        """Processor time of the back-end so far, user's and system's, in seconds; 0 where there is none."""
        return cpu(self._pid)

    def frames_from_guest(self) -> int:
        """Frames that the guest's card has sent so far."""
        return 0 if self.guest is None else self.guest.counters["from_guest_frames"]

    def check(self) -> None:
        """Raise `LabError` if the back-end broke a ring or is gone."""
        if self.guest is not None:
            self.guest.check()
            if self.guest.backend_gone:
                raise LabError(f"{self.kind} has hung up")


class Bed(Closing):
    """A network at one MTU, with the sides that are compared, each made by ``side``.

    All stay up; only one is used at a time.
    """

    def __init__(self, mtu: int, kinds: Sequence[Kind], side: Callable[..., Side] = Side) -> None:
        expect_descriptors()
        self._cleanup = contextlib.ExitStack()
        try:
            net, folder = grounds(self._cleanup, mtu)
            self.sides = {
                kind: side(kind, net, folder, _FIRST_PORT + 1000 * number, self._cleanup)
                for number, kind in enumerate(kinds)
            }
        except BaseException:
            self._cleanup.close()
            raise

    def close(self) -> None:
        """Take it all down. May be repeated."""
        self._cleanup.close()


class AnyBed(Protocol):
    """What a case is measured on: a side for each kind; a side has ``check()``, which raises `LabError` if it broke."""

    @property
    def sides(self) -> Mapping[Kind, Any]: ...


@dataclass(frozen=True)
class Case:
    """One thing that is measured.

    ``measure`` takes a side and about how many seconds, and returns values by
    metric, whose name holds the unit. ``bed`` makes what has the sides, of an MTU
    and the kinds that are compared; cases with the same bed and MTU share one, but
    after a failure, when it is made anew. ``without`` names kinds that it cannot be
    measured with; ``only``, where it is given, all those that it can.
    """

    name: str
    title: str
    mtu: int
    measure: Callable[[Any, float], dict[str, float]]
    bed: Callable[[int, Sequence[Kind]], AbstractContextManager[AnyBed]] = Bed
    without: frozenset[str] = frozenset()
    only: frozenset[str] | None = None

    def takes(self, kind: Kind) -> bool:
        """Whether it can be measured with this kind."""
        return str(kind) not in self.without and (self.only is None or str(kind) in self.only)


# What a metric is better for: more of it, by these names; less, unless it is better for neither.
MORE = frozenset(
    {
        "Gbit/s",
        "Gbit/s from the beginning",
        "alive after a move",
        "connections/s",
        "delivered/s",
        "fairness",
        "flows",
        "highest rate with < 1 % lost",
        "refused at once",
        "transactions/s",
    }
)
NEITHER = frozenset({"CPU s/s", "sent/s", "state bytes/flow"})


def better(metric: str) -> int:
    """1 if more is better, -1 if less is, 0 if neither."""
    return 0 if metric in NEITHER else 1 if metric in MORE else -1


@dataclass(frozen=True)
class Summary:
    """A metric over the rounds: the median, the quartiles around it (with linear interpolation), and the extremes."""

    median: float
    least: float
    most: float
    lower: float
    upper: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Summarise at least one value."""
        quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else list(values) * 3
        return cls(statistics.median(values), min(values), max(values), quartiles[0], quartiles[2], len(values))


@dataclass
class Results:
    """Values of each round, by case, metric and kind, and how they were found."""

    kinds: Sequence[str]
    rounds: int
    seconds: float
    about: dict[str, Any] = field(default_factory=dict)  # `machine`, and what the caller adds
    groups: dict[str, list[str]] = field(default_factory=dict)  # names of cases
    titles: dict[str, str] = field(default_factory=dict)  # by case
    load: dict[str, float] = field(default_factory=dict)  # the machine's load average before each case
    values: dict[str, dict[str, dict[str, list[float]]]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, case: str, kind: str, measured: Mapping[str, float]) -> None:
        """Take what one measurement gave."""
        for metric, value in measured.items():
            self.values.setdefault(case, {}).setdefault(metric, {}).setdefault(kind, []).append(value)

    def summary(self, case: str, metric: str, kind: str) -> Summary | None:
        """Return a metric of a kind, if it was measured."""
        values = self.values.get(case, {}).get(metric, {}).get(kind)
        return Summary.of(values) if values else None

    def ratio(self, case: str, metric: str, kind: str = "godwit", to: str = "passt") -> float | None:
        """Return the ratio of two kinds' medians; None where there is none."""
        ours, theirs = self.summary(case, metric, kind), self.summary(case, metric, to)
        return ours.median / theirs.median if ours and theirs and theirs.median else None

    def dumps(self) -> str:
        """Everything, as JSON; what `loads` takes. Of the values six digits are kept; a metric is one line."""
        made = {"format": FORMAT, **dataclasses.asdict(self)}
        del made["values"]
        cases = (
            f"  {json.dumps(case)}: {{\n   "
            + ",\n   ".join(
                f"{json.dumps(metric)}: "
                + json.dumps({kind: [float(f"{value:.6g}") for value in values] for kind, values in by_kind.items()})
                for metric, by_kind in metrics.items()
            )
            + "\n  }"
            for case, metrics in self.values.items()
        )
        return json.dumps(made, indent=1).removesuffix("\n}") + ',\n "values": {\n' + ",\n".join(cases) + "\n }\n}\n"

    @classmethod
    def loads(cls, text: str) -> Self:
        """The reverse of `dumps`; :class:`ValueError` if it is not that."""
        made = json.loads(text)
        if not isinstance(made, dict) or made.pop("format", None) != FORMAT:
            raise ValueError("this is no result of the bench, or one of another version of it")
        try:
            return cls(**made)
        except TypeError as error:
            raise ValueError(f"this is no result of the bench: {error}") from error


def machine(kinds: Sequence[Kind]) -> dict[str, Any]:
    """What is measured, and on what."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "godwit": __version__,
        "passt": peer.fetch().version if "passt" in kinds else None,
        "backends": {kind.name: shlex.join(kind.words) for kind in kinds if isinstance(kind, Program)},
        "kernel": platform.release(),
        "congestion control": _congestion_control(),
        "python": platform.python_version(),
        "processor": _of_proc("cpuinfo", "model name") or platform.machine(),
        "processors": len(os.sched_getaffinity(0)),
        "memory": _of_proc("meminfo", "MemTotal"),
    }


def _congestion_control() -> str:
    with open("/proc/sys/net/ipv4/tcp_congestion_control") as file:
        return file.read().strip()


def _of_proc(file: str, key: str) -> str | None:
    with open(f"/proc/{file}") as lines:
        return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)


def run(
    cases: Sequence[Case],
    kinds: Sequence[Kind],
    *,
    rounds: int,
    seconds: float,
    step: Callable[[str], None],
    keep: Callable[[Results], None] = lambda results: None,
) -> Results:
    """Measure all cases. What fails is noted, and the rest goes on.

    ``step`` is told what happens, ``keep`` is given what there is after each case.
    """
    results = Results([str(kind) for kind in kinds], rounds, seconds, machine(kinds))
    results.titles = {case.name: case.title for case in cases}
    for make_bed, mtu in dict.fromkeys((case.bed, case.mtu) for case in cases):
        together = [case for case in cases if (case.bed, case.mtu) == (make_bed, mtu)]
        wanted = [kind for kind in kinds if any(case.takes(kind) for case in together)]
        if not wanted:
            continue
        with _Sides(functools.partial(make_bed, mtu, wanted)) as sides:
            for number, case in enumerate(together):
                try:
                    sides.open()
                except FAILURES as error:
                    _note(results, step, f"{', '.join(case.name for case in together[number:])}: {error}")
                    break
                step(case.title)
                results.load[case.name] = os.getloadavg()[0]
                _measure(case, sides, wanted, results, step)
                keep(results)
    return results


class _Sides(Closing):
    """The sides of a bed, which is made when it is needed: also again, after it was closed because something failed.

    What failed may have left anything: a network that is cut off, a guest halfway
    between two hosts, connections that nobody counts any more.
    """

    def __init__(self, make_bed: Callable[[], AbstractContextManager[AnyBed]]) -> None:
        self._make_bed = make_bed
        self._standing = contextlib.ExitStack()
        self._sides: Mapping[Kind, Any] | None = None
        self._used: set[Kind] = set()

    def open(self) -> Mapping[Kind, Any]:
        """Make the bed if there is none, and return its sides."""
        if self._sides is None:
            self._used.clear()
            self._sides = self._standing.enter_context(self._make_bed()).sides
        return self._sides

    def take(self, kind: Kind) -> tuple[Any, bool]:
        """Return a kind's side, and whether nothing was done with it before."""
        side, fresh = self.open()[kind], kind not in self._used
        self._used.add(kind)
        return side, fresh

    def close(self) -> None:
        """Take the bed down, until it is needed again. May be repeated."""
        self._sides = None
        self._standing.close()


def _note(results: Results, step: Callable[[str], None], failure: str) -> None:
    results.failures.append(failure)
    step(f"  {failure}")


def _measure(case: Case, sides: _Sides, kinds: Sequence[Kind], results: Results, step: Callable[[str], None]) -> None:
    failed = {kind: 0 if case.takes(kind) else PATIENCE for kind in kinds}
    done = dict.fromkeys(kinds, 0)
    for number in range(2 * results.rounds):  # the second half is for what failed in the first
        for kind in kinds if number % 2 == 0 else reversed(kinds):
            if failed[kind] == PATIENCE or done[kind] == results.rounds:
                continue
            fresh = True
            try:
                side, fresh = sides.take(kind)
                measured = case.measure(side, results.seconds)
                side.check()
            except FAILURES as error:
                failed[kind] += fresh  # on one that was used before it may be what that has left
                _note(results, step, f"{case.name}, {kind}: {error}")
                with contextlib.suppress(*FAILURES):
                    sides.close()
            else:
                done[kind] += 1
                results.add(case.name, str(kind), measured)


class Working(threading.Thread):
    """Runs a function beside the caller; ``result`` waits for it and returns what it returned, or raises its error."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self._result: object = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        """Work."""
        try:
            self._result = self._work()
        except BaseException as error:
            self._error = error

    def result(self, timeout: float = 60.0) -> object:
        """Wait for the end."""
        self.join(timeout)
        if self.is_alive():
            raise LabError("a measurement does not end")
        if self._error is not None:
            raise self._error
        return self._result
