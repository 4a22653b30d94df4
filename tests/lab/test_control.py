# SPDX-License-Identifier: GPL-2.0-or-later
"""The control socket of a back-end that carries a guest: flows, counters, and what it says of a migration."""

from __future__ import annotations

import ctypes
import itertools
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from godwit.cli import ctl
from godwit.lab.crowd import Crowd, RefusedError
from godwit.lab.guest import EmbeddedGuest
from godwit.lab.memory import TX
from godwit.lab.netns import HOST4, wait_until
from godwit.lab.scenario import PORT, Load, Scenario

from . import watching
from .moves import IDLE, begin, connection, datagrams, saved, suspended, works_on

UP, DOWN = 120_000, 300_000
MANY = 1500


def control(scenario: Scenario, name: str) -> str:
    return f"{scenario.backends[name].socket}.ctl"


def status(scenario: Scenario, name: str) -> dict[str, Any]:
    return watching.status(scenario.backends[name])


def flows(scenario: Scenario, words: str = "", name: str = "a") -> list[dict[str, Any]]:
    return list(ctl.flows(control(scenario, name), f"flows {words}"))


def metrics(scenario: Scenario, name: str = "a") -> dict[tuple[str, ...], float]:
    text = b"\n".join(ctl.ask(control(scenario, name), "metrics")).decode()
    return {
        (sample.name.removeprefix("godwit_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def end(name: tuple[Any, ...]) -> dict[str, Any]:
    return {"address": name[0], "port": name[1]}


@pytest.fixture
def crowd(scenario: Scenario) -> Iterator[Crowd]:
    """Many connections of the guest's."""
    assert isinstance(scenario.guest, EmbeddedGuest)
    with Crowd(scenario.guest.space, scenario.network.server, scenario.server_address) as made:
        made.open(MANY, tickers=0)
        yield made


def test_flows_are_what_the_guest_has(scenario: Scenario) -> None:
    with connection(scenario) as (ours, peer):
        for sender, receiver, count in ((ours, peer, UP), (peer, ours, DOWN)):
            thread = threading.Thread(target=sender.sendall, args=(bytes(count),))
            thread.start()
            left = count
            while left:
                left -= len(receiver.recv(left))
            thread.join(10)
        wait_until(lambda: flows(scenario, "tcp")[0]["in_flight_to_guest"] == 0, "the guest's acknowledgements")
        [flow] = flows(scenario)
        assert (flow["protocol"], flow["state"], flow["opened_by"]) == ("tcp", "established", "guest")
        assert flow["guest"] == end(ours.getsockname())
        assert flow["peer"] == flow["remote"] == end(peer.getsockname())
        assert flow["local"] == end(peer.getpeername())
        assert (flow["bytes_from_guest"], flow["bytes_to_guest"]) == (UP, DOWN)
        assert flow["idle_seconds"] < 10
        assert (flow["queue_to_peer"], flow["queue_to_guest"]) == (0, 0)
        # A peer that does not read: its window is full, and the rest waits in the socket.
        ours.settimeout(0.5)
        with pytest.raises(TimeoutError):
            ours.sendall(bytes(50_000_000))
        wait_until(lambda: flows(scenario)[0]["queue_to_peer"] > 100_000, "bytes that wait for the peer")
        for filters, found in (
            ("tcp", 1),
            ("udp", 0),
            ("udp ping", 0),
            (scenario.server_address, 1),
            (f"tcp {HOST4}", 1),
            ("192.0.2.77", 0),
            ("fd00::77", 0),
        ):
            assert len(flows(scenario, filters)) == found, filters
        peer.shutdown(socket.SHUT_WR)
        wait_until(lambda: flows(scenario)[0]["state"] == "closed by peer", "the peer's end")
    wait_until(lambda: flows(scenario, "tcp") == [], "the end of the flow")


def test_datagrams_and_pings_are_counted(scenario: Scenario) -> None:
    before = metrics(scenario)
    with datagrams(scenario) as sockets:
        for size in (1, 1000, 0, 30000):
            sockets.asking.sendto(bytes(size), (scenario.server_address, PORT))
            data, sender = sockets.server.recvfrom(65536)
            sockets.server.sendto(data + b"!", sender)
            assert len(sockets.asking.recv(65536)) == size + 1
        scenario.guest.agent.run("ping", "-c2", "-s200", "-i0.1", scenario.server_address)
        [udp] = flows(scenario, "udp")
        assert (udp["state"], udp["opened_by"]) == ("answered", "guest")
        assert udp["guest"] == end((HOST4, sockets.asking.getsockname()[1]))
        assert udp["remote"] == end((scenario.server_address, PORT))
        assert (udp["bytes_from_guest"], udp["bytes_to_guest"]) == (31001, 31005)
        [ping] = flows(scenario, "ping")
        assert (ping["bytes_from_guest"], ping["bytes_to_guest"]) == (400, 400)
        assert "queue_to_peer" not in ping
    now = metrics(scenario)
    more = {name: value - before[name] for name, value in now.items()}
    for protocol, number, up, down in (("udp", 4, 31001, 31005), ("ping", 2, 400, 400)):
        assert more["datagrams_total", protocol, "from_guest"] == number
        assert more["datagrams_total", protocol, "to_guest"] == number
        assert more["payload_bytes_total", protocol, "from_guest"] == up
        assert more["payload_bytes_total", protocol, "to_guest"] == down
        assert more["flows_opened_total", protocol] == now["flows", protocol] == 1
    assert more["frames_total", "from_guest"] >= 6
    assert status(scenario, "a")["flows"] == {"tcp": 0, "udp": 1, "ping": 1}


def test_the_guest_and_its_front_end(scenario: Scenario) -> None:
    guest = scenario.guest
    assert isinstance(guest, EmbeddedGuest)
    guest.agent.run("ping", "-c1", scenario.server_address)
    now = status(scenario, "a")
    assert now["front_end"]["connected"] is True
    assert "VIRTIO_F_VERSION_1" in now["front_end"]["features"]
    for ring in now["front_end"]["rings"].values():
        assert (ring["entries"], ring["started"], ring["enabled"], ring["broken"]) == (256, True, True, False)
    assert now["guest"]["seen"]["ipv4"] == HOST4
    assert now["guest"]["seen"]["mac"] == guest.mac
    assert now["guest"]["told"]["IPv4"].startswith(HOST4)
    assert now["repair_helper"]["connected"] is True
    assert now["health"] == {"state": "ok", "reasons": []}
    scenario.backends["a"].kill_helper()
    wait_until(lambda: reasons(scenario) == {"repair_helper"}, "that the helper is missed")
    assert {labels[0] for (name, *labels) in metrics(scenario) if name == "degraded"} == {"repair_helper"}


def test_what_is_said_of_a_migration(scenario: Scenario, load: Load) -> None:
    count = IDLE + 2
    attempt = begin(scenario)
    for step in ("connect_target", "log_on", "suspend"):
        getattr(attempt, step)()
    assert status(scenario, "a")["migration"]["state"] == "idle"
    attempt.transfer()
    assert status(scenario, "a")["migration"]["state"] == "saved"
    assert status(scenario, "b")["migration"]["state"] == "loaded"
    assert status(scenario, "a")["migration"]["last"]["result"] == "under way"
    # The connections stand still on both sides, and can be looked at.
    for name in ("a", "b"):
        assert metrics(scenario, name)["migration_under_way",] == 1
        assert len(flows(scenario, "tcp", name)) == count
    scenario._switch("b")
    attempt.switch_over()
    wait_until(lambda: status(scenario, "b")["migration"]["last"]["result"] == "moved", "the commit")
    attempt.finish()
    wait_until(lambda: status(scenario, "a")["migration"]["state"] == "lingering", "the front-end's end")
    assert status(scenario, "a")["migration"]["lingering_seconds"] > 0
    for name, way in (("a", "out"), ("b", "in")):
        migration = status(scenario, name)["migration"]
        last = migration["last"]
        assert (last["direction"], last["result"], last["version"], last["error"]) == (way, "moved", "2", None)
        assert (last["connections_moved"], last["connections_lost"]) == (count, 0)
        assert 0 < last["duration_seconds"] < 10
        assert 0 < last["standstill_seconds"] < 10
        assert last["bytes"] > 1000
        assert migration["counts"][way]["moved"] == 1
        assert sum(sum(numbers.values()) for numbers in migration["counts"].values()) == 1
        found = metrics(scenario, name)
        assert found["migrations_total", way, "moved"] == 1
        assert found["migrated_connections_total", way, "moved"] == count
        assert found["migration_standstill_seconds_total", way] == pytest.approx(last["standstill_seconds"], abs=1e-5)
        assert found["repair_sockets_total",] >= count
    assert metrics(scenario)["lingering_sockets",] >= count
    assert {flow["state"] for flow in flows(scenario, "tcp", "b")} == {"established"}
    before = metrics(scenario, "b")
    scenario.backends["b"].hand_over()
    for sample, value in metrics(scenario, "b").items():
        if sample[0].startswith(("migrat", "front_end", "flows_opened")):
            assert value == before[sample], sample
    works_on(scenario, load)


def test_what_is_said_of_those_that_come_to_nothing(scenario: Scenario, load: Load) -> None:
    saved(scenario).cancel()
    wait_until(lambda: status(scenario, "b")["migration"]["last"]["result"] == "discarded", "the discard")
    wait_until(lambda: status(scenario, "a")["migration"]["last"]["result"] == "went_on", "the roll-back")
    attempt = suspended(scenario)
    with pytest.raises(Exception, match="target"):
        attempt.transfer(cut=40)
    attempt.cancel()
    wait_until(lambda: status(scenario, "b")["migration"]["counts"]["in"]["failed"] == 1, "that the load has failed")
    assert status(scenario, "b")["migration"]["last"]["error"]
    wait_until(lambda: status(scenario, "a")["migration"]["counts"]["out"]["went_on"] == 2, "the second roll-back")
    for name in ("a", "b"):
        now = status(scenario, name)["migration"]
        assert now["state"] == "idle"
        assert (now["last"]["connections_moved"], now["last"]["connections_lost"]) == (0, 0)
    works_on(scenario, load)


def test_many_flows_and_the_guest_hardly_stands_still(scenario: Scenario, crowd: Crowd) -> None:
    """Listed while a stream runs: each once, in parts, none of which takes the data plane a millisecond."""
    load = scenario.start_load(idle=IDLE, rate=30_000_000)
    longest = []
    for _ in range(5):
        answer = b"\n".join(ctl.ask(control(scenario, "a"), "flows tcp"))
        document = ctl._checked("", answer)
        ends = [(flow["guest"]["port"], flow["peer"]["port"]) for flow in document["flows"]]
        assert len(set(ends)) == len(ends) == document["count"] >= MANY + IDLE + 2
        longest.append(document["longest_pause_seconds"])
    # This process or another may have the processor in the middle of one: not each time.
    assert min(longest) < 0.001
    assert crowd.check() == MANY
    works_on(scenario, load)


def test_those_who_hang_on_are_no_burden_to_a_migration(scenario: Scenario, crowd: Crowd) -> None:
    """They have asked for all flows, and do not read."""
    hung = []
    try:
        for _ in range(20):
            hung.append(socket.socket(socket.AF_UNIX))
            hung[-1].connect(control(scenario, "a"))
            hung[-1].sendall(b"flows\n")
        move = scenario.move()
        assert move.downtime < 5
        assert crowd.check() == MANY
        assert status(scenario, "a")["migration"]["last"]["connections_moved"] == MANY
        # None has got all of it, and none is in the way of who reads.
        assert len(flows(scenario, "tcp", "b")) == MANY
    finally:
        for sock in hung:
            sock.close()


def until_counted(scenario: Scenario, protocol: str, size: int) -> None:
    """The data plane counts what the kernel has taken, and the server may have it before that."""
    counted = "payload_bytes_total", protocol, "from_guest"
    wait_until(lambda: metrics(scenario)[counted] == size, f"{size} bytes of {protocol} to be counted")


def test_another_process_goes_on_counting(scenario: Scenario) -> None:
    with connection(scenario) as (ours, peer), datagrams(scenario) as sockets:
        for count in itertools.accumulate((1, 1, 1)):
            ours.sendall(b"12345")
            assert peer.recv(5, socket.MSG_WAITALL) == b"12345"
            sockets.asking.sendto(b"123", (scenario.server_address, PORT))
            assert sockets.server.recv(100) == b"123"
            pid = scenario.backends["a"].pid
            until_counted(scenario, "tcp", 5 * count)
            until_counted(scenario, "udp", 3 * count)
            found = metrics(scenario)
            assert found["payload_bytes_total", "tcp", "from_guest"] == 5 * count
            assert found["payload_bytes_total", "udp", "from_guest"] == 3 * count
            assert found["flows_opened_total", "tcp"] == found["flows_opened_total", "udp"] == 1
            assert found["front_end_sessions_total",] == 1
            [tcp] = flows(scenario, "tcp")
            assert tcp["bytes_from_guest"] == 5 * count
            scenario.backends["a"].hand_over()
            assert scenario.backends["a"].pid != pid
            assert status(scenario, "a")["pid"] == scenario.backends["a"].pid


def reasons(scenario: Scenario) -> set[str]:
    """What is amiss."""
    return {one["reason"] for one in status(scenario, "a")["health"]["reasons"]}


def test_a_guest_with_as_many_connections_as_there_may_be() -> None:
    """It is refused more, and that is told until there are fewer."""
    with Scenario(descriptors=400) as scenario:
        assert isinstance(scenario.guest, EmbeddedGuest)
        assert reasons(scenario) == set()
        with Crowd(scenario.guest.space, scenario.network.server, scenario.server_address) as crowd:
            with pytest.raises(RefusedError):
                crowd.open(400, tickers=0)
            assert reasons(scenario) == {"flows"}
            found = metrics(scenario)
            assert found["flow_sockets",] == found["flow_sockets_limit",] < 400
            assert found["dropped_frames_total", "table_full"] > 0
            assert found["process_max_fds",] == 400
            crowd.drop()
            wait_until(lambda: reasons(scenario) == set(), "that there are fewer")


def test_a_guest_that_breaks_a_ring(scenario: Scenario) -> None:
    """By an index that jumps. A ring that is broken is told, the other goes on."""
    guest = scenario.guest
    assert isinstance(guest, EmbeddedGuest)
    assert guest.attachment is not None
    guest.pause()
    _, available, _ = guest.memory.ring_addresses(TX)
    index = ctypes.c_uint16.from_address(available + 2)  # virtio 1.2, 2.7.6
    index.value += 1000  # more than the ring has entries
    os.eventfd_write(guest.attachment.kick(TX), 1)
    wait_until(lambda: reasons(scenario) == {"ring_broken"}, "that it is told")
    rings = status(scenario, "a")["front_end"]["rings"]
    assert {name: ring["broken"] for name, ring in rings.items()} == {"to_guest": False, "from_guest": True}
    assert metrics(scenario)["ring_broken", "from_guest"] == 1
