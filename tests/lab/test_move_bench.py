# SPDX-License-Identifier: GPL-2.0-or-later
"""Crowds of connections, and what moving them costs."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from godwit.lab import crowd, move_bench
from godwit.lab.backend import Program
from godwit.lab.bench import Case, run
from godwit.lab.crowd import Crowd, RefusedError
from godwit.lab.errors import LabError
from godwit.lab.migration import Migration
from godwit.lab.move_bench import MoveBed, MoveSide, idle, queued
from godwit.lab.netns import Network


@pytest.fixture(scope="module")
def net() -> Iterator[Network]:
    with Network() as made:
        yield made


@pytest.fixture(scope="module")
def side() -> Iterator[MoveSide]:
    with MoveBed(1500, ["godwit"], "native") as bed:
        yield bed.sides["godwit"]


def test_a_crowd_without_a_back_end(net: Network) -> None:
    with Crowd(net.a, net.server, net.server.addr4) as made:
        made.open(50)
        assert made.count == 50
        assert made.check() == 46  # the others tick
        made.expect_alive()
        made.start_ticks()
        net.switch(None)
        net.switch("a")
        assert all(0 < gap < 5 for gap in made.gaps(time.monotonic()))
        for up in (True, False):
            full = made.open_full(5, up=up)
            # The guest has no room for so much, and there is no back-end that has.
            assert full.fill(8000, timeout=0.1) == (5 if up else 0)
            assert full.read() == 5
        made.expect_alive(10)
        # One that the server resets is missed.
        made._server.ask("drop", numbers=(0, 1))
        with pytest.raises(LabError, match="of 46 connections 45 are alive; of all, 1 have ended"):
            made.expect_alive()
        # What is not what was sent is told from what is.
        full = made.open_full(5, up=True)
        full.fill(8000)
        made._server.ask("drop", numbers=(made._next - 1, made._next))
        assert full.read() == 4
        made.drop()
        assert made.count == 0


def test_connections_that_are_refused(net: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    with Crowd(net.a, net.server, net.server.addr4) as made:
        made.open(10)
        monkeypatch.setattr(crowd, "PORTS", (1,))
        with pytest.raises(RefusedError, match="refused: Connection refused") as caught:
            made.open(10)
        assert caught.value.opened == 10
        assert caught.value.seconds < 1


def test_a_move_with_idle_connections(side: MoveSide) -> None:
    found = idle(side, 1.0, count=40)
    for metric in ("save us/flow", "save CPU us/flow", "load us/flow", "load CPU us/flow", "blackout ms", "silence ms"):
        assert 0 < found[metric] < 1e6, metric
    assert found["load until running us/flow"] == pytest.approx((found["load ms"] + found["start ms"]) * 1e3 / 40)
    assert found["silence ms"] >= found["blackout ms"] * 0.9
    side.check()
    side.have(0)
    assert side.crowd.count == 0


@pytest.mark.parametrize("up", [False, True], ids=["to the guest", "to the peer"])
def test_a_move_with_full_queues(side: MoveSide, up: bool) -> None:
    found = queued(side, 1.0, count=300, size=8192, up=up)
    assert found["state bytes/flow"] >= 8192
    side.check()


def test_only_what_migrates_is_moved() -> None:
    other = Program("other", ("other", "{socket}"))
    assert all(case.takes("godwit") for case in move_bench.CASES)
    assert not any(case.takes(kind) for case in move_bench.CASES for kind in ("none", "ideal", other))
    assert {case.takes("passt") for case in move_bench.CASES} == {True, False}


def test_a_move_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes after it is measured on hosts, back-ends and connections of its own."""
    sides: list[MoveSide] = []

    def measure(side: MoveSide, seconds: float) -> dict[str, float]:
        sides.append(side)
        if len(sides) > 1:
            return idle(side, seconds, count=10)
        side.have(10)
        side.cut()
        with monkeypatch.context() as patch:
            patch.setattr(Migration, "switch_over", fails)
            side.at_once()
        raise AssertionError("it has moved")

    def fails(migration: Migration) -> None:
        raise LabError("the target has the flu")

    case = Case("ill", "ill", 1500, measure, MoveBed)
    results = run([case], ["godwit"], rounds=1, seconds=1.0, step=lambda text: None)
    assert results.failures == ["ill, godwit: the guest does not move: the target has the flu"]
    (blackout,) = results.values["ill"]["blackout ms"]["godwit"]
    assert blackout > 0
    assert sides[0] is not sides[1]
