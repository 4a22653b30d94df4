# SPDX-License-Identifier: GPL-2.0-or-later
"""The network leads to the target before the connections are there: `godwit repair --guard`."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from godwit.lab.errors import LabError
from godwit.lab.migration import Migration
from godwit.lab.netns import HOST4, HOST6, Host, wait_until
from godwit.lab.scenario import Scenario

from .moves import IDLE, RATE, close_with_reset, connection, saved, suspended, works_on

EARLY = 1.0  # seconds between the switch of the network and the guest's commit
GUARD = ("--guard", HOST4, "--guard", HOST6)
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
OWN = {4: HOST4, 6: HOST6}


def tables(host: Host) -> str:
    """What the host's packet filter has."""
    return host.run("nft", "list", "ruleset").stdout


@pytest.fixture(params=[4, 6], ids=["IPv4", "IPv6"])
def guarded(request: pytest.FixtureRequest) -> Iterator[Scenario]:
    """Host b's helper keeps back resets."""
    with Scenario(ipv6=request.param == 6) as scenario:
        guard(scenario)
        yield scenario


def guard(scenario: Scenario, *arguments: str) -> None:
    """Have another helper on host b, one that keeps back resets."""
    target = scenario.backends["b"]
    target.kill_helper()
    target.start_helper(*GUARD, *arguments)
    wait_until(lambda: "keeping back resets from" in target.messages(), "the guard")
    assert "flags owner" in tables(scenario.network.b)


def switched_early(scenario: Scenario) -> Migration:
    """A migration whose network leads to the target a second before the guest runs there."""
    attempt = suspended(scenario)
    scenario.network.switch("b")
    time.sleep(EARLY)
    attempt.transfer()
    attempt.switch_over()
    attempt.finish()
    return attempt


def gone(scenario: Scenario) -> None:
    wait_until(lambda: not tables(scenario.network.b), "the rule to be gone")


@pytest.mark.parametrize("ipv6", [False, True])
def test_without_the_guard_connections_are_reset(ipv6: bool) -> None:
    """Or there would be nothing to guard against."""
    with Scenario(ipv6=ipv6) as scenario:
        load = scenario.start_load(idle=IDLE, rate=RATE)
        switched_early(scenario)
        with pytest.raises(LabError, match="has ended"):
            load.wait_alive()
        download = load.finish(10)[0]  # the other peers had nothing to send, and have not learnt it yet
        assert "reset by peer" in download.error
        scenario.load = None


def test_with_it_all_live(guarded: Scenario) -> None:
    load = guarded.start_load(idle=IDLE, rate=RATE)
    switched_early(guarded)
    works_on(guarded, load)
    gone(guarded)
    assert "resets are kept back no longer" in guarded.backends["b"].messages()


def test_it_goes_with_a_migration_of_no_connection(guarded: Scenario) -> None:
    switched_early(guarded)
    gone(guarded)


def test_peers_of_lost_connections_hear_of_it_all_the_same() -> None:
    """The knock of the target wants the reset that was kept back."""
    with Scenario() as scenario, connection(scenario) as (_ours, peer):
        guard(scenario)
        scenario.backends["a"].kill_helper()  # so that the source can save none
        switched_early(scenario)
        peer.settimeout(10)
        with pytest.raises(ConnectionResetError):
            peer.recv(1)
        gone(scenario)


def test_it_goes_with_the_helper(guarded: Scenario) -> None:
    guarded.backends["b"].kill_helper()  # SIGKILL
    gone(guarded)


def test_it_goes_with_the_back_end(guarded: Scenario) -> None:
    guarded.backends["b"].kill()
    gone(guarded)


@pytest.mark.parametrize("loaded", [False, True])
def test_it_goes_with_a_migration_that_fails(guarded: Scenario, loaded: bool) -> None:
    load = guarded.start_load(idle=IDLE, rate=RATE)
    attempt = (saved if loaded else suspended)(guarded)
    assert tables(guarded.network.b)
    attempt.cancel()
    works_on(guarded, load)
    gone(guarded)


def test_it_goes_after_its_time() -> None:
    with Scenario() as scenario:
        began = time.monotonic()
        guard(scenario, "--guard-seconds", "2")
        gone(scenario)
        assert time.monotonic() - began > 2
        said = "resets are kept back no longer: no connection has come within 2 s"
        wait_until(lambda: said in scenario.backends["b"].messages(), "it to say so")
        load = scenario.start_load(idle=IDLE, rate=RATE)
        scenario.move()  # the helper helps on
        works_on(scenario, load)


@pytest.mark.parametrize("version", [4, 6])
def test_others_on_the_host_are_not_harmed(version: int) -> None:
    """A listener, a connection that is there, one that its own process resets, and the refusal of a closed port."""
    with Scenario() as scenario, contextlib.ExitStack() as stack:
        host, server = scenario.network.b, scenario.network.server
        scenario.network.switch("b")
        with host.enter():
            listening = stack.enter_context(socket.create_server((OWN[version], 0), family=FAMILY[version]))
        where = listening.getsockname()[:2]

        def both() -> tuple[socket.socket, socket.socket]:
            with server.enter():
                there = stack.enter_context(socket.create_connection(where, 5))
            here = listening.accept()[0]
            here.settimeout(5)
            return stack.enter_context(here), there

        before = both()
        guard(scenario)
        for here, there in (before, both()):
            data = os.urandom(1 << 20)
            sending = threading.Thread(target=here.sendall, args=(data,))
            sending.start()
            came = b""
            while len(came) < len(data):
                came += there.recv(1 << 16)
            sending.join()
            assert came == data
            there.sendall(b"thank you")
            assert here.recv(100) == b"thank you"
        closed = both()
        close_with_reset(closed[0])
        with pytest.raises(ConnectionResetError):
            closed[1].recv(1)
        listening.close()
        began = time.monotonic()
        with server.enter(), pytest.raises(ConnectionRefusedError):
            socket.create_connection(where, 5)
        assert time.monotonic() - began < 1
        assert tables(host)  # it was there all the time


def test_a_guard_that_cannot_be() -> None:
    """Refused in one line, before anything is done."""
    with Scenario() as scenario:
        target = scenario.backends["b"]
        for words in (["--guard", "nowhere"], ["--guard-seconds", "0"]):
            with pytest.raises(LabError, match="ended with 2"):
                target.start_helper(*words)
        assert not tables(scenario.network.b)


def test_a_guard_in_another_network_is_no_use() -> None:
    """The helper may be anywhere to set repair mode; its packet filter is where it is itself."""
    with Scenario() as scenario:
        target = scenario.backends["b"]
        guard(scenario)
        assert "another network than this one" not in target.messages()
        words = [sys.executable, "-m", "godwit.cli.main", "repair", *GUARD, f"{target.socket}.repair"]
        elsewhere = scenario.network.server.popen(words)
        wait_until(lambda: "keeps back resets of another network than this one" in target.messages(), "a warning")
        elsewhere.kill()
        elsewhere.wait()


def test_who_may_not_change_the_filter_is_told(
    run_as_nobody: Callable[[str], subprocess.CompletedProcess[str]],
) -> None:
    done = run_as_nobody(
        "from ipaddress import ip_address\n"
        "from godwit.repair.guard import Guard, GuardError\n"
        "try:\n    Guard([ip_address('192.0.2.10')])\n"
        "except GuardError as error:\n    print(error)\n"
    )
    assert "the packet filter does not take the guard: Operation not permitted (it needs" in done.stdout, done.stderr
