# SPDX-License-Identifier: GPL-2.0-or-later
"""The line of statistics: what it says, and when."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, cast

import pytest

from godwit.daemon.stats import Statistics, describe
from godwit.dataplane import Engine


def counters(**changes: Any) -> dict[str, Any]:
    """As those of an engine that has done nothing."""
    nothing = Engine(max_flows=1).counters()
    return nothing | changes | {"drops": nothing["drops"] | changes.get("drops", {})}


def test_one_line_with_what_is_new() -> None:
    before = counters(frames_from_guest=10, flows_opened=1, flows=1, drops={"no_flow": 1})
    now = counters(
        frames_from_guest=12,
        frames_to_guest=3,
        bytes_from_guest=999,
        bytes_to_guest=1_234_000,
        flows_opened=3,
        flows=2,
        retransmits=4,
        drops={"no_flow": 3, "window": 1},
    )
    assert describe(before, now) == (
        "statistics: from the guest 2 frames, 999 B of TCP; to it 3 frames, 1.23 MB; flows 2 opened, 0 reset, 2 open;"
        " 4 retransmissions; dropped 2 (no_flow), 1 (window)"
    )
    assert "dropped" not in describe(now, now)
    assert "5e+03 TB" in describe(before, counters(bytes_to_guest=5 * 10**15))


class Idle:
    """An engine of which only the statistics are of interest."""

    def __init__(self) -> None:
        self.frames = self.watched = self.asked = 0

    def counters(self) -> dict[str, Any]:
        self.asked += 1
        return counters(frames_from_guest=self.frames)

    def watch_activity(self) -> None:
        self.watched = self.frames

    def was_active(self) -> bool:
        return self.frames != self.watched


def test_a_line_comes_with_activity_and_not_too_often(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "godwit.daemon.stats")
    idle = Idle()

    async def run() -> None:
        statistics = Statistics(cast(Engine, idle), 0.2)
        statistics.look()
        await asyncio.sleep(0.3)
        assert (idle.asked, caplog.messages) == (1, [])  # nobody has looked
        began = time.monotonic()
        for _ in range(10):
            idle.frames += 1
            statistics.look()
            await asyncio.sleep(0.05)
        lines = len(caplog.messages)
        assert 2 <= lines <= (time.monotonic() - began) / 0.2
        idle.frames += 1
        statistics.look()
        statistics.close()
        assert len(caplog.messages) == lines + 1
        statistics.close()

    asyncio.run(run())
    assert sum(int(line.split()[4]) for line in caplog.messages) == 11
