# SPDX-License-Identifier: GPL-2.0-or-later
"""On which processors a measurement runs.

Where a question and its answer take microseconds, it is the placement of those who
pass them on that counts: on one processor they take turns, on two each wakes the
other up, and the kernel chooses anew now and then. So what is compared is placed
the same way.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

from godwit.lab.errors import LabError

PLACEMENTS = {"together": "on one processor", "apart": "back-end on a processor of its own"}


class _Side(Protocol):
    @property
    def pid(self) -> int | None: ...


S = TypeVar("S", bound=_Side)


def _bind(pid: int, processors: set[int]) -> None:
    """Have all threads of a process on these; those that they start are where they are (sched_setaffinity(2))."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), processors)


@contextlib.contextmanager
def placed(backend: int | None, placement: str) -> Iterator[None]:
    """For a ``with`` block, have this process on one processor, and a back-end there as well or on another one.

    This process is front-end and ends. ``backend`` is the other's process, None for none; ``placement`` is one
    of `PLACEMENTS`. `LabError` where there is one processor, and two are needed.
    """
    processors = sorted(os.sched_getaffinity(0))
    if placement == "apart" and len(processors) < 2:
        raise LabError("there is one processor only, and none that the back-end could have for itself")
    places = {os.getpid(): processors[0]}
    if backend is not None:
        places[backend] = processors[placement == "apart"]
    before = {pid: os.sched_getaffinity(pid) for pid in places}
    try:
        for pid, processor in places.items():
            _bind(pid, {processor})
        yield
    finally:
        for pid in places:
            with contextlib.suppress(FileNotFoundError):  # it has ended
                _bind(pid, before[pid])


def measured(
    placement: str, measure: Callable[[S, float], dict[str, float]], side: S, seconds: float
) -> dict[str, float]:
    """Measure a side of the bench while it is `placed`."""
    with placed(side.pid, placement):
        return measure(side, seconds)
