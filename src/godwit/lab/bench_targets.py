# SPDX-License-Identifier: GPL-2.0-or-later
"""What godwit is to reach in the bench, in one table; what it reached is computed from the results."""

from __future__ import annotations

import enum
import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from godwit.lab.bench import Results, Summary
from godwit.lab.placement import PLACEMENTS, STREAM_PLACEMENTS

OURS, PEER = "godwit", "passt"
ENOUGH = 5  # values of each kind: of fewer, nothing is said


class Verdict(enum.Enum):
    """What the values say of a target."""

    MET = "met"
    MISSED = "missed"
    UNDECIDED = "undecided"
    UNMEASURED = "not measured"


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


@dataclass(frozen=True)
class Target:
    """A bound on a value of godwit's, or on its ratio to another one.

    ``than`` is what it is compared with: the peer's value of the same metric (by
    default), godwit's own of another case (``case:NAME``) or of another metric
    (``metric:NAME``), or nothing (None). The bound is the least or, if ``least`` is
    false, the most that it may be.
    """

    case: str
    metric: str
    bound: float
    least: bool = False
    than: str | None = PEER

    def _values(self, results: Results) -> tuple[list[float], list[float]]:
        """The values, and those that they are compared with; empty where there are none."""
        ours = results.values.get(self.case, {}).get(self.metric, {}).get(OURS, [])
        if self.than is None:
            return ours, [1.0] * len(ours)
        word, _, name = self.than.partition(":")
        case, metric, kind = self.case, self.metric, OURS
        if word == "case":
            case = name
        elif word == "metric":
            metric = name
        else:
            kind = self.than
        return ours, results.values.get(case, {}).get(metric, {}).get(kind, [])

    def reached(self, results: Results) -> float | None:
        """The value, or the ratio, of medians; None if it was not measured, or there is none to 0."""
        ours, theirs = map(_median, self._values(results))
        return None if ours is None or not theirs else ours / theirs

    def verdict(self, results: Results) -> Verdict:
        """Whether it is reached, and whether the values say so.

        They do not where there are too few of them, or fewer than there were rounds;
        nor where some rounds say yes and some no, unless the median of the rounds'
        ratios is farther from the bound than the middle half of them is wide.
        """
        ours, theirs = self._values(results)
        if not ours or not theirs:
            return Verdict.UNMEASURED
        if min(len(ours), len(theirs)) < max(ENOUGH, results.rounds):
            return Verdict.UNDECIDED
        rounds = list(zip(ours, theirs, strict=False))
        if len({self._met(*values) for values in rounds}) > 1:
            if not all(theirs):
                return Verdict.UNDECIDED
            ratios = Summary.of([our / their for our, their in rounds])
            if abs(ratios.median - self.bound) <= ratios.upper - ratios.lower:
                return Verdict.UNDECIDED
        return Verdict.MET if self._met(statistics.median(ours), statistics.median(theirs)) else Verdict.MISSED

    def _met(self, ours: float, theirs: float) -> bool:
        return ours >= self.bound * theirs if self.least else ours <= self.bound * theirs

    @property
    def words(self) -> str:
        """The bound, to be read."""
        bound = f"{'at least' if self.least else 'at most'} {self.bound:g}"
        if self.than is None:
            return bound
        word, _, name = self.than.partition(":")
        return f"{bound} × {f'its own in {name}' if word == 'case' else f'its {name}' if word == 'metric' else word}"


def _streams(mtu: int, rate: float, cpu: float) -> Iterator[Target]:
    for way, count, placement in itertools.product(("up", "down"), (1, 4), STREAM_PLACEMENTS):
        case = f"stream-{way}-{count}-{mtu}-{placement}"
        yield Target(case, "Gbit/s", rate, least=True)
        yield Target(case, "CPU s/GiB", cpu)


TARGETS: tuple[Target, ...] = (
    # Where the peer, too, passes 64 KiB at a time; and where only godwit has its guest leave that to the card.
    *_streams(65520, 1.5, 0.6),
    *_streams(1500, 4.0, 0.25),
    # The same of a guest that is a whole machine, whose own pace says nothing of the back-end's.
    *(
        Target(f"qemu-{way}-{count}-{mtu}", "CPU s/GiB", bound)
        for mtu, bound in ((65520, 0.6), (1500, 0.25))
        for way in ("up", "down")
        for count in (1, 4)
    ),
    *(
        target
        for placement in PLACEMENTS
        for target in (
            Target(f"rr-{placement}", "p50 us", 0.8),
            Target(f"rr-{placement}", "CPU us", 0.5),
            Target(f"crr-{placement}", "connections/s", 1.5, least=True),
            Target(f"crr-{placement}", "CPU us", 0.5),
            # Connections that do nothing cost nothing: what is above 1 is what a measurement varies by.
            Target(f"rr-idle-19000-{placement}", "CPU us", 1.1, than="metric:CPU us, none idle"),
            Target(f"crr-idle-19000-{placement}", "CPU us", 1.1, than="metric:CPU us, none idle"),
        )
    ),
    Target("up-1400", "delivered/s", 1.5, least=True),
    Target("up-1400", "CPU us", 0.5),
    Target("down-1400", "CPU us", 0.5),
    Target("flood", "lost of the slow %", 1.0, than=None),
    Target("up-8k-paced", "lost %", 1.0, than=None),
    Target("down-8k-paced", "lost %", 1.0, than=None),
    Target("limit", "flows", 19_000, least=True, than=None),
    Target("limit", "refused at once", 1, least=True, than=None),
    Target("limit-move", "alive after a move", 19_000, least=True, than=None),
    Target("idle-9000", "save us/flow", 0.25),
    Target("idle-9000", "save CPU us/flow", 0.25),
    Target("idle-9000", "load until running us/flow", 0.25),
    Target("idle-9000", "load CPU us/flow", 0.25),
    Target("idle-9000", "blackout ms", 150, than=None),
    *(
        Target(case, metric, 0.25)
        for case in ("queued-up-1000", "queued-down-1000")
        for metric in ("save ms", "load until running ms", "save CPU us/flow")
    ),
    Target("start", "start ms", 200, than=None),
    Target("memory", "PSS MB", 45, than=None),
    *(Target("memory", f"bytes/flow {which}", 300, than=None) for which in ("of 1000", "of 9000", "beyond 1000")),
    *(Target(case, "wake-ups/s", 0, than=None) for case in ("idle", "idle-5000")),
)
