# SPDX-License-Identifier: GPL-2.0-or-later
"""A short run of what `make soak` does for long; and that it finds what it is to find."""

from __future__ import annotations

import dataclasses
import os
import threading
from pathlib import Path

import pytest

from godwit.lab.counters import Counters
from godwit.lab.scenario import PORT
from godwit.lab.size import Size, growth
from godwit.lab.soak import ENOUGH, MORE_MEMORY, Extent, Log, Report, later, run
from godwit.lab.soak_events import EVENTS, Cost, Event, Stage

SMALL = Extent(idle=5, rate=300_000, pace=0.05, rest=0.1, rest_every=1000, once_each=True)
NAMED = {event.name: event for event in EVENTS}
TELLING = (
    "migration",
    "target killed in a migration",
    "helper killed in a migration",
    "front-end gone",
    "taken over",
    "another order",
    "link flaps",
)


def short(*events: Event, settled: float = 20.0) -> Report:
    return run(1000.0, 5, dataclasses.replace(SMALL, events=events, settled=settled))


def test_what_happens_to_a_guest_costs_what_it_may() -> None:
    report = short(*(NAMED[name] for name in TELLING))
    # Without a rest, sockets of what has moved away are there still; and the sanitizers keep what was freed.
    excused = ("descriptors", "has grown") if os.environ.get("GODWIT_SANITIZE") else ("descriptors",)
    assert not [failure for failure in report.failures if not any(word in failure for word in excused)], report
    assert report.events == dict.fromkeys(TELLING, 1)
    assert report.bytes > 1_000_000
    assert report.opened > 100
    assert report.answered
    assert report.leases
    assert len(report.latencies) > 100


def corrupt(stage: Stage) -> str:
    stage.weather.corrupt(100)
    return ""


def leak(stage: Stage) -> str:
    stage.scenario.server.echo(stage.network.a.addr4, PORT, 10)
    return ""


def hang(stage: Stage) -> str:
    stage.here.stop()
    threading.Timer(8.0, stage.here.resume).start()
    return ""


def test_errors_in_the_log_are_found_once(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("2026-01-01 00:00:00,000 INFO all is well\n2026-01-01 00:00:01,000 ERROR known\n")
    log = Log(str(path))
    with path.open("a") as file:
        file.write("2026-01-01 00:00:02,000 ERROR of\nTraceback (most recent call last):\n2026-01-01 00:00:03,000 ERR")
        file.flush()
        assert log.errors("known") == ["2026-01-01 00:00:02,000 ERROR of", "Traceback (most recent call last):"]
        assert log.errors("known") == []
        file.write("OR late\n")
    assert log.errors("") == ["2026-01-01 00:00:03,000 ERROR late"]


def test_what_grows_on_and_on_is_told_from_what_comes_to_an_end() -> None:
    levels_off = [Size((20 << 20) - int(0.75**look * (12 << 20)), 100) for look in range(16)]
    grows_on = [Size((20 << 20) + look * MORE_MEMORY // 6, 100) for look in range(16)]
    assert growth({"it": levels_off}, MORE_MEMORY)
    assert growth({"it": later(levels_off)}, MORE_MEMORY) == []
    assert later(grows_on[: ENOUGH - 1]) == ()
    assert growth({"it": later(grows_on[:ENOUGH])}, MORE_MEMORY) == []
    assert len(growth({"it": later(grows_on)}, MORE_MEMORY)) == 1
    assert len(growth({"it": later([Size(look * MORE_MEMORY, 100) for look in range(ENOUGH)])}, MORE_MEMORY)) == 1


def test_counting_backwards_is_found() -> None:
    before = Counters(1, {"a": 5, "b": 1}, {})
    assert before.backwards(before) == []
    assert Counters(1, {"a": 4, "b": 2}, {}).backwards(before) == ["a is 4, and was 5"]
    assert Counters(1, {"b": 1}, {}).backwards(before) == ["a is 0, and was 5"]
    assert Counters(2, {}, {}).backwards(before) == []  # another process


PLANTED = [
    (Event("a byte is changed on its way", Cost.NOTHING, 1, corrupt), "is wrong|came back for|differ|not the question"),
    (Event("connections are never closed", Cost.NOTHING, 1, leak), "counts 42 connections of 32"),
    (Event("nothing moves", Cost.NOTHING, 1, hang), "no more of"),
    (dataclasses.replace(NAMED["front-end gone"], cost=Cost.NOTHING), "Reset|ended|broken"),
]


@pytest.mark.parametrize(("event", "found"), PLANTED, ids=lambda one: one.name if isinstance(one, Event) else "")
def test_anything_else_is_found(event: Event, found: str) -> None:
    report = short(event, settled=4.0)
    assert report.failures
    with pytest.raises(AssertionError, match=found):
        raise AssertionError(report.failures[0])
