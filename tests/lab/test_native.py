# SPDX-License-Identifier: GPL-2.0-or-later
"""Moves between two godwits that write their own device state."""

from __future__ import annotations

import pytest

from godwit.lab.guest import EmbeddedGuest
from godwit.lab.netns import HOST6, wait_until
from godwit.lab.scenario import PORT, Load, Scenario

from .moves import IDLE, RATE, begin, saved, suspended, works_on

ARGUMENTS = ["--migrate-version", "native", "--tcp-ports", str(PORT)]


@pytest.mark.parametrize("ipv6", [False, True])
@pytest.mark.parametrize("delay", [0.0, 0.3])
def test_there_and_back(ipv6: bool, delay: float) -> None:
    with Scenario(godwit_arguments=ARGUMENTS, ipv6=ipv6) as scenario:
        load = scenario.start_load(idle=IDLE, rate=RATE)
        for _ in range(2):
            scenario.move(switch_delay=delay)
            load.wait_alive()
        works_on(scenario, load)
        said = scenario.messages()
        assert said.count("device state saved: version 0x80000001") == 2
        assert said.count("device state loaded: version 0x80000001") == 2
        assert "another than the one" not in said


def test_a_roll_back_and_a_cut() -> None:
    with Scenario(godwit_arguments=ARGUMENTS) as scenario:
        load = scenario.start_load(idle=IDLE, rate=RATE)
        attempt = saved(scenario)
        attempt.cancel()
        load.wait_alive()
        attempt = suspended(scenario)
        scenario.backends["b"].kill()
        attempt.cancel()
        works_on(scenario, load)


def test_connections_from_outside_move() -> None:
    with Scenario(godwit_arguments=ARGUMENTS) as scenario:
        assert isinstance(scenario.guest, EmbeddedGuest)
        scenario.guest.agent.listen(PORT)
        there = scenario.network.a.address(False)
        load = scenario.load = Load(scenario.guest.agent, scenario.server, there, idle=IDLE, rate=RATE)
        scenario.move(switch_delay=0.3)
        works_on(scenario, load)


def test_connections_without_a_helper_are_reset_with_the_reason() -> None:
    with Scenario(godwit_arguments=ARGUMENTS) as scenario:
        scenario.backends["a"].kill_helper()
        scenario.start_load(idle=IDLE, rate=RATE)
        attempt = begin(scenario)
        attempt.run(lambda: scenario.network.switch("b"))
        attempt.finish()
        scenario.load = None
        assert "the source could not move it: the source could not save it" in scenario.messages()


def test_what_is_another_at_the_target_is_said() -> None:
    with Scenario(godwit_arguments=ARGUMENTS) as scenario:
        target = scenario.backends["b"]
        scenario.network.b.ip("addr add 2001:db8:9::10/64 dev eth0 nodad", f"addr del {HOST6}/64 dev eth0")
        wait_until(lambda: "IPv6 2001:db8:9::10/64" in target.messages(), "the target to follow its host")
        scenario.start_load(idle=IDLE, rate=RATE)
        scenario.move()
        assert (
            "this host is another than the one that the guest comes from: IPv6 2001:db8:9::10/64 (was "
            in target.messages()
        )
