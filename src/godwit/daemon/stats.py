# SPDX-License-Identifier: GPL-2.0-or-later
"""What is counted besides the data plane's own, and statistics in the log.

`Statistics` are what the data plane has done since the last line, so often at most.
While nothing happens there is no line, and nobody wakes up for one: the data
plane tells of the first frame, the line comes when the time after that is
over, and only then is the next frame waited for.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from godwit.confine import procfs
from godwit.dataplane import Engine
from godwit.vhost_user import Server

log = logging.getLogger(__name__)

_UNITS = ("B", "kB", "MB", "GB", "TB")


class Statistics:
    """``delay`` seconds between two lines, at least. `look` is to be called whenever the engine's rare event fires."""

    def __init__(self, engine: Engine, delay: float) -> None:
        self._engine = engine
        self._delay = delay
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._before = engine.counters()
        engine.watch_activity()

    def look(self) -> None:
        """Begin to wait for the next line, if there is something to tell."""
        if self._timer is None and self._engine.was_active():
            self._timer = self._loop.call_later(self._delay, self._report)

    def _report(self) -> None:
        self._timer = None
        now = self._engine.counters()
        if now != self._before:
            log.info("%s", describe(self._before, now), extra={"asked_for": True})
            self._before = now
        self._engine.watch_activity()

    def close(self) -> None:
        """Tell what has not been told yet."""
        if self._timer is not None:
            self._timer.cancel()
            self._report()


def describe(before: dict[str, Any], now: dict[str, Any]) -> str:
    """One line about the difference between two `Engine.counters`."""
    more = {name: value - before[name] for name, value in now.items() if name != "drops"}
    dropped = {name: count - before["drops"][name] for name, count in now["drops"].items()}
    parts = [
        f"from the guest {more['frames_from_guest']} frames, {_size(more['bytes_from_guest'])} of TCP",
        f"to it {more['frames_to_guest']} frames, {_size(more['bytes_to_guest'])}",
        f"flows {more['flows_opened']} opened, {more['flows_reset']} reset, {now['flows']} open",
    ]
    if more["retransmits"]:
        parts.append(f"{more['retransmits']} retransmissions")
    if any(dropped.values()):
        parts.append("dropped " + ", ".join(f"{count} ({name})" for name, count in dropped.items() if count))
    return "statistics: " + "; ".join(parts)


def _size(count: float) -> str:
    power = 0
    while count >= 1000 and power < len(_UNITS) - 1:
        count /= 1000
        power += 1
    return f"{count:.3g} {_UNITS[power]}"


class Sessions:
    """The sessions with front-ends, of a process and of those that it took over from, in numbers."""

    def __init__(self) -> None:
        self.open = False
        self._numbers: Counter[str] = Counter()

    def began(self, *, anew: bool) -> None:
        """A front-end is served; or one goes on to be, which another process has counted."""
        self.open = True
        self._numbers["sessions"] += anew

    def over(self, server: Server | None, error: object) -> None:
        """It is no more; ``server`` is None in stream mode, ``error`` what ended it unless it hung up."""
        self.open = False
        self._numbers["errors"] += error is not None
        self._numbers.update(_requests(server))

    def numbers(self, server: Server | None) -> Counter[str]:
        """``sessions``, ``errors`` that ended one; ``requests``, and of these the ``refused`` and ``failed`` ones.

        ``server`` is that of the session that is open.
        """
        return self._numbers + Counter(_requests(server))

    def to_hand_over(self, server: Server | None) -> dict[str, int]:
        """The numbers, for a process that goes on with the guest."""
        return {f"front_end.{name}": value for name, value in self.numbers(server).items()}

    def take_over(self, counters: Mapping[str, int]) -> None:
        """Go on counting from what another process gave."""
        for name, value in counters.items():
            if name.startswith("front_end."):
                self._numbers[name.removeprefix("front_end.")] = value


def _requests(server: Server | None) -> dict[str, int]:
    if server is None:
        return {}
    return {"requests": server.requests, "refused": server.refused, "failed": server.failed}


class ProcessStats:
    """What the kernel says of this process."""

    def __init__(self) -> None:
        self.began_at = time.time()
        self._since = time.monotonic()

    @property
    def uptime(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._since

    @staticmethod
    def cpu_seconds() -> float:
        """Of the processor, in user mode and in the kernel, all threads."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime

    def memory(self) -> tuple[int, int] | None:
        """(mapped, resident) bytes; None where that cannot be known. Of the guest's memory what was touched counts."""
        try:
            mapped, resident = procfs.read(procfs.MEMORY).split()[:2]
        except (OSError, ValueError):
            return None
        page = os.sysconf("SC_PAGE_SIZE")
        return int(mapped) * page, int(resident) * page

    def descriptors(self) -> int | None:
        """How many are open; None where that cannot be known."""
        try:
            return procfs.count_descriptors()
        except OSError:
            return None

    @staticmethod
    def most_descriptors() -> int | None:
        """How many there may be; None for any number."""
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return None if limit == resource.RLIM_INFINITY else limit
