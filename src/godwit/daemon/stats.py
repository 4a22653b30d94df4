# SPDX-License-Identifier: GPL-2.0-or-later
"""Statistics in the log: what the data plane has done since the last line, so often at most.

While nothing happens there is no line, and nobody wakes up for one: the data
plane tells of the first frame, the line comes when the time after that is
over, and only then is the next frame waited for.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from godwit.dataplane import Engine

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
        parts.append(f"{more['retransmits']} segments sent again")
    if any(dropped.values()):
        parts.append("dropped " + ", ".join(f"{count} ({name})" for name, count in dropped.items() if count))
    return "statistics: " + "; ".join(parts)


def _size(count: float) -> str:
    power = 0
    while count >= 1000 and power < len(_UNITS) - 1:
        count /= 1000
        power += 1
    return f"{count:.3g} {_UNITS[power]}"
