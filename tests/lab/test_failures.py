# SPDX-License-Identifier: GPL-2.0-or-later
"""Whatever fails in a migration, the guest's connections work on one side, and none hangs."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from godwit.lab.errors import LabError
from godwit.lab.guest import EmbeddedGuest
from godwit.lab.migration import Migration
from godwit.lab.netns import wait_until
from godwit.lab.scenario import PORT, Load, Scenario
from godwit.vhost_user import Direction, VhostUserError

from .moves import IDLE, RATE, begin, connection, receive_all, saved, suspended, works_on

GOLDEN = Path(__file__).parent.parent / "golden"

# What a stream of one flow and more is made of (docs/stream-v2.md).
HEADER = 16
OBSERVED = 42
COUNT = 4
FLOW = 112


def then_moves(scenario: Scenario, load: Load) -> None:
    """The next attempt succeeds."""
    load.wait_alive()
    scenario.move()
    assert scenario.where == "b"
    works_on(scenario, load)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_cancelled(scenario: Scenario, load: Load, steps: int) -> None:
    """After connecting, with the log on, in pre-switchover, and after a load that was good."""
    attempt = begin(scenario)
    for step in ("connect_target", "log_on", "suspend", "transfer")[:steps]:
        getattr(attempt, step)()
    time.sleep(0.3)
    attempt.cancel()
    then_moves(scenario, load)


def test_called_off_long_after_it_completed(scenario: Scenario, load: Load) -> None:
    """The front-end said "completed", seconds passed, the target never ran: the source takes the guest back."""
    attempt = saved(scenario)
    time.sleep(2.5)  # the peers retransmit meanwhile, to nobody
    attempt.cancel()
    works_on(scenario, load)


def test_target_killed_before_the_load(scenario: Scenario, load: Load) -> None:
    attempt = suspended(scenario)
    scenario.backends["b"].kill()
    with pytest.raises((LabError, VhostUserError, OSError)):
        attempt.transfer()
    attempt.cancel()
    then_moves(scenario, load)


def test_target_killed_after_the_load(scenario: Scenario, load: Load) -> None:
    attempt = saved(scenario)
    scenario.backends["b"].kill()
    attempt.cancel()
    then_moves(scenario, load)


def cuts() -> list[int]:
    """Within and at the end of each stage: header, observed addresses, count, flows, sockets and queues."""
    flows = HEADER + OBSERVED + COUNT
    return [0, 8, HEADER, HEADER + 20, HEADER + OBSERVED, flows, flows + 50, flows + FLOW, flows + 7 * FLOW + 30, -1]


@pytest.mark.parametrize("cut", cuts())
def test_pipe_cut(scenario: Scenario, load: Load, cut: int) -> None:
    attempt = suspended(scenario)
    stream = attempt.save()
    assert len(stream) > cuts()[-2]
    assert not attempt.load(stream[:cut])
    assert "not loaded" in scenario.backends["b"].messages()
    attempt.cancel()
    then_moves(scenario, load)


def test_source_reader_gone(scenario: Scenario, load: Load) -> None:
    """The front-end drops the source's pipe half-way: the save fails, the guest goes on."""
    attempt = suspended(scenario)
    reading = attempt.source.state_pipe(Direction.SAVE)
    os.read(reading, 10)
    os.close(reading)
    attempt.source.check()  # a stream small enough to lie in the pipe may have been written whole
    attempt.cancel()
    then_moves(scenario, load)


def test_target_without_helper(scenario: Scenario, load: Load) -> None:
    """The guest migrates all the same; its connections are reset at once, and new ones work."""
    scenario.backends["b"].kill_helper()
    attempt = begin(scenario)
    attempt.run(lambda: scenario.network.switch("b"))
    attempt.finish()
    assert_reset(scenario, load)
    scenario.load = None
    scenario.guest.agent.check(scenario.guest.agent.echo(scenario.server_address, 5001, 3))


def test_source_without_helper(scenario: Scenario) -> None:
    scenario.backends["a"].kill_helper()
    load = scenario.start_load(idle=IDLE, rate=RATE)
    assert len(connected(scenario)) == IDLE + 2
    attempt = begin(scenario)
    attempt.run(lambda: scenario.network.switch("b"))
    attempt.finish()
    assert_reset(scenario, load)


def assert_reset(scenario: Scenario, load: Load) -> None:
    """No connection hangs: within a few seconds the guest and the server know of all that they are gone."""
    wrong = load.check_idle(5.0)
    assert wrong == f"0 of {IDLE} alive, {IDLE} broken, 0 silent", f"{wrong}\n{scenario.messages()}"
    wait_until(lambda: not connected(scenario), "the server to let go of the connections", 10.0)


def connected(scenario: Scenario) -> list[str]:
    """The server's connections that are not at their end, as ss says them."""
    said = scenario.network.server.run("ss", "-Htn", "src", f"{scenario.server_address}:{PORT}").stdout
    return [line for line in said.splitlines() if not line.startswith("TIME-WAIT")]


def test_helper_of_the_source_killed_in_pre_switchover(scenario: Scenario, load: Load) -> None:
    """The save fails, since it would cost the connections, and the guest goes on where it is."""
    attempt = suspended(scenario)
    scenario.backends["a"].kill_helper()
    with pytest.raises(LabError):
        attempt.transfer()
    attempt.cancel()
    load.wait_alive()
    assert "the guest goes on here: its state was not saved" in scenario.backends["a"].messages()
    scenario.backends["a"].start_helper()
    then_moves(scenario, load)


def test_helper_of_the_source_killed_after_the_save(scenario: Scenario, load: Load) -> None:
    """Called off then, the connections stand until another helper comes; the guest runs meanwhile."""
    attempt = saved(scenario)
    scenario.backends["a"].kill_helper()
    attempt.cancel()
    assert scenario.guest.agent.run("true") == ""
    time.sleep(0.5)
    scenario.backends["a"].start_helper()
    works_on(scenario, load)


def test_a_connection_that_cannot_be_saved_is_reset_on_both_sides(scenario: Scenario, load: Load) -> None:
    """TCP_REPAIR knows nothing of urgent data; that connection goes, and no other."""
    with connection(scenario) as (ours, peer):
        ours.sendall(b"before")
        assert peer.recv(6) == b"before"
        attempt = suspended(scenario)
        peer.send(b"!", socket.MSG_OOB)
        time.sleep(0.1)
        attempt.transfer()
        attempt.switch_over()
        attempt.finish()
        scenario.network.switch("b")
        for end in (ours, peer):
            with pytest.raises(ConnectionResetError):
                receive_all(end)
    assert "cannot move" in scenario.backends["a"].messages()
    works_on(scenario, load)


def test_bad_streams_are_refused_and_the_next_good_one_is_taken(scenario: Scenario) -> None:
    """The real program, the real passt's streams cut short, and more: fewer than the log cuts short itself."""
    assert isinstance(scenario.guest, EmbeddedGuest)
    good = (GOLDEN / "half-closed-v4.bin").read_bytes()
    bad = [good[:size] for size in (0, 8, HEADER + 20, HEADER + OBSERVED + 2, 100, 300, len(good) - 1)]
    bad += [
        b"\0" * 8 + good[8:],
        good[:8] + b"\0\0\0\1\0\0\0\1" + good[16:],
        good[:8] + b"\0\0\0\7\0\0\0\5" + good[16:],
        good[:8] + b"\0\0\0\2\0\0\0\3" + good[16:],
        good[:58] + b"\xff\xff\xff\xff" + good[62:],
        good + b"\0",
    ]
    target = scenario.guest.attach(scenario.backends["b"].socket)
    try:
        attempt = Migration(scenario.guest, scenario.backends["b"].socket)
        attempt.target = target
        for number, stream in enumerate(bad):
            assert not attempt.load(stream), f"number {number} was taken"
        assert attempt.load((GOLDEN / "empty.bin").read_bytes())
        assert attempt.load(good)
    finally:
        target.close()
    said = scenario.backends["b"].messages()
    for reason in (
        "offset 389",
        "it begins with 0x0",
        "version 1 was withdrawn",
        "compatible down to 5",
        "count is",
        "bytes follow",
    ):
        assert reason in said, f"{reason!r} not in the log:\n{said}"
    scenario.start_load(idle=IDLE, rate=RATE)
    scenario.move()


@pytest.mark.parametrize("name", ["idle-v4", "idle-v6", "half-closed-v4", "half-closed-v6", "queues-v4"])
def test_streams_of_the_real_passt_are_restored(scenario: Scenario, name: str) -> None:
    """On a host that has the addresses of then, each connection is there, with its queues, and is frozen."""
    assert isinstance(scenario.guest, EmbeddedGuest)
    host = scenario.network.b
    host.ip("addr add 10.9.0.2/24 dev eth0", "addr add fd09::2/64 dev eth0 nodad")
    target = scenario.guest.attach(scenario.backends["b"].socket)
    try:
        attempt = Migration(scenario.guest, scenario.backends["b"].socket)
        attempt.target = target
        assert attempt.load((GOLDEN / f"{name}.bin").read_bytes())
        assert "lost" not in scenario.backends["b"].messages(), scenario.backends["b"].messages()
        peers = {
            line.split()[4]: (line.split()[0], int(line.split()[1]))
            for line in host.run("ss", "-Htn").stdout.splitlines()
        }
        expected = {
            "idle-v4": {"10.9.0.1:9003": 0},
            "idle-v6": {"[fd09::1]:9003": 0},
            "half-closed-v4": {"10.9.0.1:9005": 0, "10.9.0.1:9006": 0},
            "half-closed-v6": {"[fd09::1]:9005": 0, "[fd09::1]:9006": 0},
            "queues-v4": {"10.9.0.1:9002": 70264, "10.9.0.1:9004": 0},
        }[name]
        assert peers == {peer: ("ESTAB", queued) for peer, queued in expected.items()}
    finally:
        target.close()
