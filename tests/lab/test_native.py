# SPDX-License-Identifier: GPL-2.0-or-later
"""Moves between two godwits that write their own device state."""

from __future__ import annotations

import contextlib
import os
import select
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from godwit.lab.guest import EmbeddedGuest
from godwit.lab.migration import MigrationError
from godwit.lab.netns import HOST6, wait_until
from godwit.lab.scenario import PORT, Load, Scenario
from godwit.migration.inspect import inspect
from godwit.net.versions import versions
from godwit.vhost_user import Direction

from .moves import IDLE, RATE, begin, datagrams, saved, suspended, works_on

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
        said = "the source could not move it: the source could not save it"
        wait_until(lambda: said in scenario.messages(), "the reason")


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


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where a daemon that has given up root may write."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o777)
        yield path


@pytest.mark.parametrize("version", ["2", "native"])
def test_states_are_recorded(folder: Path, version: str) -> None:
    """On either side, the same bytes, for nobody else to read."""
    arguments = ["--migrate-version", version, "--record", str(folder / "state")]
    with Scenario(godwit_arguments=arguments) as scenario:
        load = scenario.start_load(idle=IDLE, rate=RATE)
        for _ in range(2):
            scenario.move()
        works_on(scenario, load)
    files = sorted(path.name for path in folder.iterdir())
    assert files == ["state.1.loaded", "state.1.saved", "state.2.loaded", "state.2.saved"]
    for number in (1, 2):
        saved, loaded = (folder / f"state.{number}.{kind}" for kind in ("saved", "loaded"))
        assert saved.read_bytes() == loaded.read_bytes()
        assert saved.stat().st_mode & 0o777 == 0o600
        with saved.open("rb") as file:
            names = Counter(item.name for item in inspect(file, versions()))
        assert names["socket" if version == "2" else "TCP socket"] == IDLE + 2


def test_a_state_that_cannot_be_recorded_moves_all_the_same(tmp_path: Path) -> None:
    with Scenario(godwit_arguments=["--record", str(tmp_path / "none" / "state")]) as scenario:
        load = scenario.start_load(idle=IDLE, rate=RATE)
        scenario.move()
        works_on(scenario, load)
        assert "the device state is not recorded: cannot write" in scenario.messages()


@pytest.mark.parametrize("ipv6", [False, True])
def test_datagrams_move(ipv6: bool) -> None:
    """The guest's port is the same to its peers, and what waited for the guest comes, in order, before all else."""
    arguments = [*ARGUMENTS, "--udp-ports", str(PORT)]
    with Scenario(godwit_arguments=arguments, ipv6=ipv6) as scenario, contextlib.ExitStack() as stack:
        service, asking, server, client = stack.enter_context(datagrams(scenario, ipv6=ipv6))
        there = scenario.network.a.address(ipv6)
        asking.sendto(b"question", (scenario.server_address, PORT))
        question, address = server.recvfrom(100)
        assert question == b"question"
        attempt = suspended(scenario)
        for number in range(20):
            server.sendto(b"answer %d" % number, address)
            client.sendto(b"from outside %d" % number, (there, PORT))
        server.sendto(bytes(9000), address)
        time.sleep(0.2)
        attempt.transfer()
        scenario.network.switch("b")
        attempt.switch_over()
        attempt.finish()
        server.sendto(b"afterwards", address)
        assert [asking.recv(10000) for _ in range(22)] == [
            *(b"answer %d" % number for number in range(20)),
            bytes(9000),
            b"afterwards",
        ]
        came = [service.recvfrom(100) for _ in range(20)]
        assert [data for data, _ in came] == [b"from outside %d" % number for number in range(20)]
        service.sendto(b"thank you", came[-1][1])
        assert client.recvfrom(100)[0] == b"thank you"
        asking.sendto(b"another", (scenario.server_address, PORT))
        assert server.recvfrom(100) == (b"another", address)


def test_datagrams_stay_when_the_guest_does() -> None:
    """Over attempts that fail early, late and in the middle, with more datagrams each time."""
    arguments = [*ARGUMENTS, "--udp-ports", str(PORT)]
    with Scenario(godwit_arguments=arguments) as scenario, datagrams(scenario) as (service, asking, server, client):
        there = scenario.network.a.address(False)
        asking.sendto(b"question", (scenario.server_address, PORT))
        _, address = server.recvfrom(100)
        for again in range(5):
            attempt = suspended(scenario)
            for number in range(10):
                server.sendto(b"answer %d.%d" % (again, number), address)
                client.sendto(b"from outside %d.%d" % (again, number), (there, PORT))
            time.sleep(0.1)
            if again == 1:
                with pytest.raises(MigrationError, match="the target refused the state"):
                    attempt.transfer(cut=500)
            elif again == 2:
                os.close(attempt.source.state_pipe(Direction.SAVE))
                assert not attempt.source.check()
            elif again != 3:
                attempt.transfer()
            server.sendto(b"late %d" % again, address)
            attempt.cancel()
            assert [asking.recv(100) for _ in range(11)] == [
                *(b"answer %d.%d" % (again, one) for one in range(10)),
                b"late %d" % again,
            ]
            assert [service.recv(100) for _ in range(10)] == [b"from outside %d.%d" % (again, one) for one in range(10)]


@pytest.mark.parametrize("ipv6", [False, True])
def test_peers_hear_nothing_until_the_network_is_switched(ipv6: bool) -> None:
    """Nor that nobody is there, when the source's front-end has gone; and who comes back has the port again."""
    with Scenario(godwit_arguments=ARGUMENTS, ipv6=ipv6) as scenario, datagrams(scenario, ipv6=ipv6) as sockets:
        _, asking, server, _ = sockets
        source = scenario.backends["a"]
        asking.sendto(b"question", (scenario.server_address, PORT))
        _, address = server.recvfrom(100)
        attempt = saved(scenario)
        attempt.switch_over()
        attempt.finish()
        scenario.where = "b"
        wait_until(lambda: "1 of UDP, stay for 10 s" in source.messages(), "the source to linger")
        server.connect(address)
        for number in range(20):  # more than its queue holds
            server.send(b"late %d" % number * 200)
        assert not select.select([server], [], [], 0.5)[0]  # of an error it would be told
        scenario.network.switch("b")
        asking.sendto(b"another", (scenario.server_address, PORT))
        assert server.recv(100) == b"another"
        scenario.move()
        assert "1 connections or UDP ports that had moved away come back" in source.messages()
        asking.sendto(b"a third", (scenario.server_address, PORT))
        assert server.recv(100) == b"a third"
