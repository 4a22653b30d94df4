# SPDX-License-Identifier: GPL-2.0-or-later
"""An embedded guest with open connections moves from godwit to godwit."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from godwit.lab.scenario import Scenario


@pytest.mark.parametrize("ipv6", [False, True])
def test_streams_survive_there_and_back(ipv6: bool) -> None:
    with Scenario(ipv6=ipv6) as scenario:
        load = scenario.start_load(idle=10)
        for number in range(4):
            time.sleep(0.3)
            move = scenario.move()
            assert (move.source, move.target) == (("a", "b"), ("b", "a"))[number % 2]
            assert move.state_bytes
            assert load.check_idle() == ""
        for outcome in load.finish():
            assert outcome.ok, outcome


@pytest.mark.parametrize("delay", [0.0, 0.2, 1.0, 3.0])
def test_network_switched_later(delay: float) -> None:
    with Scenario() as scenario:
        load = scenario.start_load(rate=50_000_000)
        scenario.move(switch_delay=delay)
        assert load.check_idle() == ""
        for outcome in load.finish():
            assert outcome.ok, outcome


def test_a_thousand_connections_move_at_once() -> None:
    with Scenario() as scenario:
        load = scenario.start_load(idle=1000, rate=10_000_000)
        assert load.check_idle() == ""
        for _ in range(2):
            scenario.move()
            assert load.check_idle() == ""
        for outcome in load.finish():
            assert outcome.ok, outcome


def test_in_an_unprivileged_user_namespace(run_as_nobody: Callable[[str], Any]) -> None:
    done = run_as_nobody("""
from godwit.cli.demo import main
raise SystemExit(main(["--rate", "20000000"]))
""")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing lost" in done.stdout
