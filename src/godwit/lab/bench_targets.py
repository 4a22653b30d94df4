# SPDX-License-Identifier: GPL-2.0-or-later
"""What godwit is to reach in the bench, in one table; what it reached is computed from the results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from godwit.lab.bench import Results

OURS, PEER = "godwit", "passt"


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

    def _medians(self, results: Results) -> tuple[float, float] | None:
        """The value, and what it is compared with; None if one was not measured."""
        ours = results.summary(self.case, self.metric, OURS)
        word, _, name = (self.than or "").partition(":")
        if ours is None or self.than is None:
            return None if ours is None else (ours.median, 1.0)
        if word == "case":
            theirs = results.summary(name, self.metric, OURS)
        elif word == "metric":
            theirs = results.summary(self.case, name, OURS)
        else:
            theirs = results.summary(self.case, self.metric, self.than)
        return None if theirs is None else (ours.median, theirs.median)

    def reached(self, results: Results) -> float | None:
        """The value, or the ratio, of medians; None if it was not measured, or there is none to 0."""
        medians = self._medians(results)
        return None if medians is None or not medians[1] else medians[0] / medians[1]

    def met(self, results: Results) -> bool | None:
        """Whether it is reached; None if that was not measured."""
        medians = self._medians(results)
        if medians is None:
            return None
        ours, theirs = medians
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
    for way in ("up", "down"):
        for count in (1, 4):
            yield Target(f"stream-{way}-{count}-{mtu}", "Gbit/s", rate, least=True)
            yield Target(f"stream-{way}-{count}-{mtu}", "CPU s/GiB", cpu)


TARGETS: tuple[Target, ...] = (
    # Where the peer, too, passes 64 KiB at a time; and where only godwit has its guest leave that to the card.
    *_streams(65520, 1.5, 0.6),
    *_streams(1500, 4.0, 0.25),
    # The same of a guest that is a whole machine, whose own pace says nothing of the back-end's.
    *(
        Target(f"qemu-{way}-{mtu}", "CPU s/GiB", bound)
        for mtu, bound in ((65520, 0.6), (1500, 0.25))
        for way in ("up", "down")
    ),
    Target("rr", "p50 us", 0.8),
    Target("rr", "CPU us", 0.5),
    Target("crr", "connections/s", 1.5, least=True),
    Target("crr", "CPU us", 0.5),
    # Connections that do nothing cost nothing: what is above 1 is what a measurement of the same thing varies by.
    Target("rr-idle-19000", "CPU us", 1.1, than="case:rr"),
    Target("crr-idle-19000", "CPU us", 1.1, than="case:crr"),
    Target("up-1400", "delivered/s", 1.5, least=True),
    Target("up-1400", "CPU us", 0.5),
    Target("down-1400", "CPU us", 0.5),
    # A slow flow loses less than the one that floods.
    Target("flood", "lost of the slow %", 1.0, than="metric:lost of the flood %"),
    Target("up-8k-paced", "lost %", 1.0, than=None),
    Target("down-8k-paced", "lost %", 1.0, than=None),
    Target("limit", "flows", 19_000, least=True, than=None),
    Target("limit", "refused at once", 1, least=True, than=None),
    Target("limit", "alive after a move", 19_000, least=True, than=None),
    Target("idle-9000", "save us/flow", 0.25),
    Target("idle-9000", "save CPU us/flow", 0.25),
    Target("idle-9000", "load until running us/flow", 0.25),
    Target("idle-9000", "load CPU us/flow", 0.25),
    Target("idle-9000", "blackout ms", 150, than=None),
    *(
        Target(case, metric, 0.25)
        for case in ("queued-up", "queued-down")
        for metric in ("save ms", "load until running ms", "save CPU us/flow")
    ),
    Target("start", "start ms", 200, than=None),
    Target("memory", "PSS MB", 45, than=None),
    Target("memory", "bytes/flow of 9000", 300, than=None),
    Target("idle", "wake-ups/s", 0, than=None),
)
