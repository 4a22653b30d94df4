# SPDX-License-Identifier: GPL-2.0-or-later
"""On which processors a measurement runs.

Where those who pass something on wait for each other, it is their placement that
counts: on one processor they take turns, on two each wakes the other up, which takes
100 us in some virtual machines, and the kernel chooses anew now and then, or keeps
for half a minute to what costs ten times as much. So what is compared is placed the
same way.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

from godwit.lab.errors import LabError

TOGETHER, APART, SPLIT = "together", "apart", "split"
PLACEMENTS = {TOGETHER: "on one processor", APART: "back-end on a processor of its own"}  # of short exchanges
STREAM_PLACEMENTS = {TOGETHER: "on one processor", SPLIT: "guest on one processor, host on another"}


class _Side(Protocol):
    @property
    def pid(self) -> int | None: ...


S = TypeVar("S", bound=_Side)
R = TypeVar("R")


def _bind(pid: int, processors: set[int]) -> None:
    """Have all threads of a process on these; those that they start are where they are (sched_setaffinity(2))."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), processors)


@contextlib.contextmanager
def placed(backend: int | None, placement: str) -> Iterator[int]:
    """For a ``with`` block, have this process on one processor, and a back-end there as well or on another one.

    This process is front-end and ends. ``backend`` is the other's process, None for none; ``placement`` is one of
    `PLACEMENTS` or `STREAM_PLACEMENTS`. What is given is the processor for the server's ends, which they are to bind
    themselves to (`at`): with ``split`` it is the back-end's. `LabError` where there is one processor, and two are
    needed.
    """
    processors = sorted(os.sched_getaffinity(0))
    if placement != TOGETHER and len(processors) < 2:
        raise LabError("there is one processor only, and none that the back-end could have for itself")
    ours, theirs = processors[0], processors[placement != TOGETHER]
    places = {os.getpid(): ours}
    if backend is not None:
        places[backend] = theirs
    before = {pid: os.sched_getaffinity(pid) for pid in places}
    try:
        for pid, processor in places.items():
            _bind(pid, {processor})
        yield theirs if placement == SPLIT else ours
    finally:
        for pid in places:
            with contextlib.suppress(FileNotFoundError):  # it has ended
                _bind(pid, before[pid])


def at(processor: int, work: Callable[[], R]) -> R:
    """Work on this processor: the calling thread stays there."""
    os.sched_setaffinity(0, {processor})
    return work()


def measured(
    placement: str, measure: Callable[[S, float], dict[str, float]], side: S, seconds: float
) -> dict[str, float]:
    """Measure a side of the bench while it is `placed`."""
    with placed(side.pid, placement):
        return measure(side, seconds)
