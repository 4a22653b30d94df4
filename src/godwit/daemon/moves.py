# SPDX-License-Identifier: GPL-2.0-or-later
"""What has come of migrations: the last one, and all of them in numbers.

A transfer *begins* when the front-end asks for it, is *done* when the device's state is written or read, and *ends*
when the front-end has shown what came of it (`godwit.migration.transfers`). The guest stands still for longer than is
seen here: on a source from the stop of its first ring until the state is written (or until it goes on, where it stays),
on a target from the beginning of the load until its connections go on. What is between these two is QEMU's.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Final

from godwit.migration import Direction, Outcome, State
from godwit.migration.errors import version_name

#: By direction, as it is told: out of this process, or into it.
WAYS: Final = {Direction.SOURCE: "out", Direction.TARGET: "in"}
#: How a migration can end, by direction.
RESULTS: Final = {"out": ("moved", "went_on", "failed"), "in": ("moved", "discarded", "failed")}
_ENDS: Final = {
    State.SAVED: "moved",
    State.LINGERING: "moved",
    State.ROLLED_BACK: "went_on",
    State.COMMITTED: "moved",
    State.DISCARDED: "discarded",
}


class Move:
    """One migration. Times are in seconds; ``result`` is empty until it has ended.

    ``stopped_at`` is when the guest's first ring was stopped (CLOCK_MONOTONIC), None if none was.
    """

    def __init__(self, way: str, stopped_at: float | None) -> None:
        self.way = way
        self.began_at = time.time()
        self.since = time.monotonic()
        self.stopped_at = stopped_at
        self.done_at: float | None = None
        self.still = 0.0
        self.version = ""
        self.size = 0  # bytes
        self.duration = 0.0
        self.moved = self.lost = 0  # connections
        self.result = ""
        self.error = ""

    def done(self, outcome: Outcome | None) -> None:
        """It was written or read, or that has failed; None: it did not come to that. From any thread."""
        if outcome is None:
            return
        self.done_at = time.monotonic()
        self.duration = self.done_at - self.since
        self.version = version_name(outcome.version) if outcome.version else ""
        self.size = outcome.size
        self.error = "" if outcome.error is None else str(outcome.error)

    def shown(self) -> dict[str, object]:
        """For people and programs."""
        return {
            "direction": self.way,
            "result": self.result or "under way",
            "error": self.error or None,
            "version": self.version or None,
            "began": self.began_at,
            "bytes": self.size,
            "duration_seconds": self.duration,
            "standstill_seconds": self.still,
            "connections_moved": self.moved,
            "connections_lost": self.lost,
        }


class Moves:
    """All migrations of a process, and of those that it took over from."""

    def __init__(self) -> None:
        self.last: Move | None = None
        self.numbers: Counter[str] = Counter()  # by names with dots, as another process is told them
        self.durations: Counter[str] = Counter()  # microseconds, by direction
        self.stills: Counter[str] = Counter()  # and those in which the guest stood still
        self._current: Move | None = None
        self._stopped_at: float | None = None

    @property
    def current(self) -> Move | None:
        """The one that has begun and not ended."""
        return self._current

    def ring_stopped(self) -> None:
        """The guest stands still, if it has not before."""
        self._stopped_at = self._stopped_at or time.monotonic()

    def ring_started(self) -> None:
        """It does not, as far as the front-end is concerned."""
        self._stopped_at = None

    def begin(self, direction: Direction) -> Move:
        """The front-end asks for a transfer. One that has not ended was given up for it."""
        self.end(None, (0, 0))
        self._current = self.last = made = Move(WAYS[direction], self._stopped_at)
        return made

    def end(self, state: State | None, connections: tuple[int, int]) -> None:
        """It has ended in that state (None: given up), with so many connections moved and lost."""
        move, self._current = self._current, None
        if move is None:
            return
        given_up = "went_on" if move.way == "out" else "discarded"
        failed = move.error or move.done_at is None
        move.result = "failed" if failed else given_up if state is None else _ENDS.get(state, "failed")
        if move.result == "moved":
            move.moved, move.lost = connections
        move.still = self._still(move)
        self.numbers[f"{move.way}.{move.result}"] += 1
        self.numbers[f"{move.way}.connections_moved"] += move.moved
        self.numbers[f"{move.way}.connections_lost"] += move.lost
        self.durations[move.way] += round(move.duration * 1e6)
        self.stills[move.way] += round(move.still * 1e6)

    @staticmethod
    def _still(move: Move) -> float:
        now = time.monotonic()
        if move.way == "in":
            return now - move.since
        began = move.since if move.stopped_at is None else move.stopped_at
        until = move.done_at if move.result == "moved" else now
        return max(0.0, (now if until is None else until) - began)

    def to_hand_over(self) -> dict[str, int]:
        """The numbers, for a process that goes on with the guest."""
        parts = {"": self.numbers, "duration.": self.durations, "still.": self.stills}
        return {f"moves.{part}{name}": value for part, counts in parts.items() for name, value in counts.items()}

    def take_over(self, counters: dict[str, int]) -> None:
        """Go on counting from what another process gave."""
        parts = {"duration.": self.durations, "still.": self.stills, "": self.numbers}
        for name, value in counters.items():
            prefix, dot, rest = name.partition(".")
            if prefix != "moves" or not dot:
                continue
            part = next(part for part in parts if rest.startswith(part))
            parts[part][rest.removeprefix(part)] = value
