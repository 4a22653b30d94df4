# SPDX-License-Identifier: GPL-2.0-or-later
"""What may happen to a source that has saved, or that is about to go on, besides what was meant to."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import select
import signal
import socket
import threading
import time
from collections.abc import Callable

import pytest

from godwit.lab.agent import AgentError
from godwit.lab.errors import LabError
from godwit.lab.guest import EmbeddedGuest
from godwit.lab.netns import wait_until
from godwit.lab.scenario import PORT, Load, Scenario

from .moves import (
    IDLE,
    OWN_PORT,
    RATE,
    close_with_reset,
    connection,
    datagrams,
    receive_all,
    saved,
    suspended,
    works_on,
)


def test_an_announcement_at_the_source_changes_nothing(scenario: Scenario, load: Load) -> None:
    """A front-end may be told to announce its guest when that has long moved away."""
    attempt = saved(scenario)
    assert isinstance(scenario.guest, EmbeddedGuest)
    mac = bytes.fromhex(scenario.guest.mac.replace(":", ""))
    attempt.source.announce(mac)
    attempt.switch_over()
    attempt.source.announce(mac)
    scenario.network.switch("b")
    load.wait_alive()
    attempt.source.announce(mac)
    attempt.finish()
    assert "roll-back" not in scenario.backends["a"].messages()
    works_on(scenario, load)


def test_a_helper_that_hangs_costs_nothing(scenario: Scenario, load: Load) -> None:
    """The save fails, and nothing stands still; what the helper does when it wakes up, another one undoes."""
    source = scenario.backends["a"]
    attempt = suspended(scenario)
    source.stop_helper()
    with pytest.raises(LabError):
        attempt.transfer()
    attempt.cancel()
    load.wait_alive()
    assert load.check_idle() == ""
    assert "stand still" not in source.messages()
    source.resume_helper()  # finds the request that it was sent, and the connection closed
    wait_until(lambda: "stand still" in source.messages(), "the late repair mode to be noticed", 20.0)
    source.start_helper()
    load.wait_alive()
    scenario.move()
    works_on(scenario, load)


def test_a_helper_that_acts_late_though_another_did_its_work(scenario: Scenario, load: Load) -> None:
    source = scenario.backends["a"]
    attempt = suspended(scenario)
    source.stop_helper()
    hung = source.leave_helper()
    helping = threading.Timer(1.0, source.start_helper)
    helping.start()
    attempt.transfer()
    helping.join()
    attempt.cancel()
    load.wait_alive()
    hung.send_signal(signal.SIGCONT)
    wait_until(lambda: "connections go on" in source.messages(), "the late repair mode to be ended", 20.0)
    works_on(scenario, load)
    hung.wait(10.0)


def test_a_second_migration_while_connections_wait_for_a_helper(scenario: Scenario, load: Load) -> None:
    """They are in repair mode, which is all that they need to be saved."""
    source = scenario.backends["a"]
    attempt = saved(scenario)
    source.kill_helper()
    attempt.cancel()
    wait_until(lambda: "stand still" in source.messages(), "the connections to be held")
    scenario.move()
    works_on(scenario, load)


@pytest.mark.parametrize("delay", [0.0, 0.3])
def test_stopped_when_the_connections_have_moved(delay: float) -> None:
    """SIGTERM right behind the end of the session, and while the daemon lingers: late packets get no reset."""
    with Scenario(godwit_arguments=["--one-off"]) as scenario:
        load = scenario.start_load(idle=IDLE, rate=RATE)
        source = scenario.backends["a"]
        attempt = saved(scenario)
        attempt.switch_over()
        attempt.finish()
        time.sleep(delay)
        source.terminate()
        if delay:
            assert source.wait(5.0) == 0
        time.sleep(3.0)
        scenario.network.switch("b")
        works_on(scenario, load)


def test_the_last_bytes_move_when_both_sides_have_closed(scenario: Scenario) -> None:
    """What the guest has been told is there is not left to a socket that no flow knows."""
    with connection(scenario, server_room=20_000) as (ours, peer):
        data = close_behind(scenario, ours, peer)
        scenario.move()
        assert receive_all(peer) == data


def close_behind(scenario: Scenario, ours: socket.socket, peer: socket.socket) -> bytes:
    """Have the peer close, then the guest send more than the peer takes, close, and be done with it."""
    data = random.randbytes(50_000)  # no more than a socket of the host's takes
    peer.shutdown(socket.SHUT_WR)
    assert ours.recv(1) == b""
    ours.sendall(data)
    ours.close()
    assert isinstance(scenario.guest, EmbeddedGuest)
    guest = scenario.guest
    wait_until(lambda: not guest.space.run("ss", "-Htn").stdout, "the guest to be done with it")
    return data


def test_what_a_peer_left_behind_moves(scenario: Scenario) -> None:
    """Both sides have closed, the peer knows nothing of it any more, and the guest reads slowly."""
    data = random.randbytes(60_000)  # no more than the host's socket takes, more than the guest's
    with connection(scenario, guest_room=20_000) as (ours, peer):
        ours.sendall(b"request")
        ours.shutdown(socket.SHUT_WR)
        assert receive_all(peer) == b"request"
        peer.sendall(data)
        peer.close()
        server = scenario.network.server
        wait_until(lambda: not server.run("ss", "-Htn", "sport", f":{OWN_PORT}").stdout, "the peer to be done with it")
        for _ in range(2):
            scenario.move()
        assert receive_all(ours) == data


def test_the_last_bytes_are_sent_when_the_guest_is_gone(scenario: Scenario) -> None:
    """Uploaded, closed, powered off: the kernel sends the rest."""
    assert isinstance(scenario.guest, EmbeddedGuest)
    with connection(scenario, server_room=20_000) as (ours, peer):
        data = close_behind(scenario, ours, peer)
        scenario.guest.disconnect()
        assert receive_all(peer) == data


@pytest.mark.parametrize("end", ["fin", "reset"])
def test_an_end_that_comes_while_connections_wait_for_a_helper(scenario: Scenario, end: str) -> None:
    """The guest is told when they go on."""
    with connection(scenario) as (ours, peer):
        source = scenario.backends["a"]
        attempt = saved(scenario)
        source.kill_helper()
        attempt.cancel()
        wait_until(lambda: "stand still" in source.messages(), "the connection to be held")
        peer.sendall(b"last words")
        (peer.close if end == "fin" else functools.partial(close_with_reset, peer))()
        time.sleep(0.5)
        source.start_helper()
        if end == "fin":
            assert receive_all(ours) == b"last words"
        else:
            with pytest.raises(ConnectionResetError):
                receive_all(ours)


def test_a_reset_that_the_guest_could_not_be_told_of_is_told_where_it_goes(scenario: Scenario) -> None:
    """The peer resets between the stop of the rings and the save."""
    with connection(scenario) as (ours, peer):
        attempt = suspended(scenario)
        close_with_reset(peer)
        time.sleep(0.2)
        attempt.transfer()
        attempt.switch_over()
        attempt.finish()
        scenario.network.switch("b")
        with pytest.raises(ConnectionResetError):
            ours.recv(1)


def test_a_target_with_too_few_descriptors_resets_the_rest() -> None:
    with Scenario(descriptors=300) as scenario:
        scenario.backends["a"].close()
        scenario.descriptors = None
        scenario.start_backend("a")
        assert isinstance(scenario.guest, EmbeddedGuest)
        scenario.guest.reconnect(scenario.backends["a"].socket)
        count = 400
        echo = scenario.guest.agent.echo(scenario.server_address, PORT, count)
        attempt = saved(scenario)
        attempt.switch_over()
        attempt.finish()
        scenario.network.switch("b")
        answers = scenario.guest.agent.check(echo, 10.0)
        assert answers.silent == 0
        assert 0 < answers.alive < 300
        wait_until(lambda: connections_at(scenario) == answers.alive, "the server to let go of the others", 15.0)


def test_a_connection_takes_one_descriptor_and_no_more_are_taken_than_there_are() -> None:
    """On either side of a move, with what else a back-end has; who comes too late is refused at once."""
    with Scenario(descriptors=600) as scenario:
        assert isinstance(scenario.guest, EmbeddedGuest)
        agent = scenario.guest.agent
        echo = agent.echo(scenario.server_address, PORT, 400)
        attempt = saved(scenario)
        attempt.switch_over()
        attempt.finish()
        scenario.network.switch("b")
        assert agent.check(echo, 10.0).alive == 400
        with pytest.raises(AgentError, match=r"of 200 connections .* failed"):
            agent.echo(scenario.server_address, PORT, 200, timeout=20.0)
        assert agent.check(echo, 10.0).alive == 400


def test_stopped_while_it_takes_the_guest_back(scenario: Scenario, load: Load) -> None:
    """SIGTERM waits for the roll-back, and the daemon ends in good order."""
    source = scenario.backends["a"]
    attempt = saved(scenario)
    source.stop_helper()  # the roll-back waits for it
    attempt.source.enable()
    attempt.source.start(attempt.record.bases)
    wait_until(lambda: "roll-back" in source.messages(), "the roll-back to begin")
    source.terminate()
    time.sleep(0.5)
    source.resume_helper()
    assert source.wait(15.0) == 0, source.messages()
    assert attempt.target is not None
    attempt.target.close()
    assert "Traceback" not in source.messages()


def test_connections_from_outside_that_are_lost_are_reset_on_both_sides() -> None:
    """Also where the peer is idle, and the daemon listens on the very port."""
    with Scenario(godwit_arguments=["--tcp-ports", str(PORT)]) as scenario:
        scenario.guest.agent.listen(PORT)
        echo = scenario.server.echo(scenario.network.a.address(False), PORT, IDLE)
        scenario.backends["b"].kill_helper()
        scenario.move()
        peers = ["ss", "-Htn", "state", "established", "dport", f":{PORT}"]
        wait_until(lambda: not scenario.network.server.run(*peers).stdout, "the peers to learn it", 15.0)
        assert scenario.server.check(echo).failed == IDLE
        another = scenario.server.echo(scenario.network.a.address(False), PORT, IDLE)
        assert scenario.server.check(another).alive == IDLE


@pytest.mark.parametrize("ipv6", [False, True])
def test_connections_from_outside_move(ipv6: bool) -> None:
    """Forwarded ports: the listening sockets freeze too, and each side lets go of them when it is its turn."""
    with Scenario(godwit_arguments=["--tcp-ports", str(PORT)], ipv6=ipv6) as scenario:
        assert isinstance(scenario.guest, EmbeddedGuest)
        scenario.guest.agent.listen(PORT)
        there = scenario.network.a.address(ipv6)
        load = scenario.load = Load(scenario.guest.agent, scenario.server, there, idle=IDLE, rate=RATE)
        for _ in range(2):
            scenario.move(switch_delay=0.3)
            assert load.check_idle() == ""
            another = scenario.server.echo(there, PORT, 3)
            assert scenario.server.check(another).alive == 3
        works_on(scenario, load)


def test_a_connection_that_comes_back_at_once_to_another_process() -> None:
    """A daemon for one guest lingers after it; the next one on that host gets the connection's ends from it."""
    with Scenario(godwit_arguments=["--one-off"]) as scenario:
        load = scenario.start_load(idle=IDLE, rate=RATE)
        first = scenario.backends["a"]
        scenario.move()
        scenario.start_backend("a")
        scenario.move()
        assert first.running
        assert f"{IDLE + 2} connections or UDP ports that had moved away come back" in first.messages()
        works_on(scenario, load)


def connections_at(scenario: Scenario) -> int:
    """How many established connections the server has."""
    said = scenario.network.server.run("ss", "-Htn", "state", "established", "sport", f":{PORT}").stdout
    return len(said.splitlines())


def test_out_of_descriptors() -> None:
    """Flows beyond what there is are refused at once; the rest works, and moves."""
    with Scenario(descriptors=500) as scenario:
        assert isinstance(scenario.guest, EmbeddedGuest)
        load = scenario.start_load(idle=100, rate=RATE)
        with contextlib.ExitStack() as opened:
            refused = 0
            for _ in range(500):
                try:
                    with scenario.guest.space.enter():
                        opened.enter_context(socket.create_connection((scenario.server_address, PORT), 5.0))
                except ConnectionRefusedError:
                    refused += 1
            assert refused > 100
            assert load.check_idle() == ""
            scenario.move()
            assert load.check_idle() == ""
        pid = scenario.backends[scenario.where].pid
        wait_until(lambda: len(os.listdir(f"/proc/{pid}/fd")) < 200, "the connections to come to their end")
        another = scenario.guest.agent.echo(scenario.server_address, PORT, 50)
        assert scenario.guest.agent.check(another).alive == 50
        works_on(scenario, load)


@pytest.mark.parametrize("ipv6", [False, True])
def test_datagrams_before_during_and_after_a_move(ipv6: bool) -> None:
    """A roll-back costs none that the guest has sent; after a move the forwarded port is the other host's.

    What comes while the guest stands still waits in the source's socket, and is
    the guest's once it runs there again.
    """
    with Scenario(godwit_arguments=["--udp-ports", str(PORT)], ipv6=ipv6) as scenario, contextlib.ExitStack() as stack:
        service, asking, server, client = stack.enter_context(datagrams(scenario, ipv6=ipv6))
        there = scenario.network.a.address(ipv6)

        def from_outside(text: bytes, *, meanwhile: Callable[[], None] = lambda: None, switched: bool = False) -> None:
            client.sendto(text, (there, PORT))
            meanwhile()
            while switched and not select.select([service], [], [], 2)[0]:
                client.sendto(text, (there, PORT))  # what comes while the network is switched may be lost
            question, peer = service.recvfrom(100)
            service.sendto(b"answer to " + question, peer)
            assert client.recv(100) == b"answer to " + text

        def from_inside(text: bytes) -> tuple[str, int]:
            asking.sendto(text, (scenario.server_address, PORT))
            question, peer = server.recvfrom(100)
            assert question == text
            server.sendto(b"answer", peer)
            assert asking.recv(100) == b"answer"
            return (peer[0], peer[1])

        from_outside(b"before")
        port = from_inside(b"before")
        attempt = saved(scenario)
        from_outside(b"meanwhile", meanwhile=attempt.cancel)
        assert from_inside(b"after a roll-back") == port
        from_outside(b"after a roll-back")
        scenario.move()
        assert scenario.where == "b"
        from_outside(b"after a move", switched=True)
        assert from_inside(b"after a move")[0] == port[0]
