# SPDX-License-Identifier: GPL-2.0-or-later
"""Connections that have only begun when the guest moves, and echoes: with the native stream these go along, too."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Iterator

import pytest

from godwit.lab.guest import EmbeddedGuest
from godwit.lab.migration import Migration
from godwit.lab.netns import Namespace, wait_until
from godwit.lab.scenario import PORT, Scenario

from .moves import OWN_PORT, receive_all, suspended

FORWARD = ["--tcp-ports", str(PORT)]
NATIVE = ["--migrate-version", "native", *FORWARD]
FAMILY = {False: socket.AF_INET, True: socket.AF_INET6}
ICMP_ECHO, ICMP_ECHO_REPLY = 8, 0
TIMEOUT = 20.0

both_families = pytest.mark.parametrize("ipv6", [False, True], ids=["IPv4", "IPv6"])
#: Whether the guest moves, or its source takes it back after the save.
both_ends = pytest.mark.parametrize("moves", [True, False], ids=["moves", "stays"])


@contextlib.contextmanager
def listening(space: Namespace, address: str, port: int, *, ipv6: bool) -> Iterator[socket.socket]:
    with space.enter(), socket.create_server((address, port), family=FAMILY[ipv6]) as sock:
        sock.settimeout(TIMEOUT)
        yield sock


@contextlib.contextmanager
def connecting(space: Namespace, address: str, port: int, *, ipv6: bool) -> Iterator[socket.socket]:
    """A socket that has asked, and does not wait for the answer."""
    with space.enter(), socket.socket(FAMILY[ipv6], socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        sock.connect_ex((address, port))
        yield sock


def connected(sock: socket.socket, timeout: float = TIMEOUT) -> int:
    """Wait for the end of an attempt to connect; returns its error number, or 0."""
    assert select.select([], [sock], [], timeout)[1], "neither connected nor refused"
    sock.settimeout(timeout)
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


def sockets_in(space: Namespace, state: str) -> bool:
    """Whether there is a TCP socket in that state, to or from the ports of these tests."""
    where = ("(", "dport", "=", f":{OWN_PORT}", "or", "sport", "=", f":{PORT}", ")")
    return bool(space.run("ss", "-Htn", "state", state, *where).stdout)


def finish(scenario: Scenario, attempt: Migration, moves: bool) -> None:
    """What comes after the guest was suspended: the move to ``b``, or back to ``a`` after all."""
    attempt.transfer()
    if not moves:
        attempt.cancel()
        return
    scenario.network.switch("b")
    attempt.switch_over()
    attempt.finish()


def talk(ours: socket.socket, peer: socket.socket) -> None:
    """Each way something arrives, and so does each end."""
    peer.settimeout(TIMEOUT)
    ours.settimeout(TIMEOUT)
    for sender, receiver in ((ours, peer), (peer, ours)):
        sender.sendall(b"x" * 100_000)
        sender.shutdown(socket.SHUT_WR)
        assert receive_all(receiver) == b"x" * 100_000


def embedded(scenario: Scenario) -> EmbeddedGuest:
    assert isinstance(scenario.guest, EmbeddedGuest)
    return scenario.guest


@both_families
@both_ends
@pytest.mark.parametrize("helper", [True, False], ids=["helper", "none"])
def test_the_guests_call_that_nobody_has_answered(ipv6: bool, moves: bool, helper: bool) -> None:
    """The target asks again; for that it needs no helper."""
    with Scenario(godwit_arguments=NATIVE, ipv6=ipv6) as scenario:
        if not helper:
            for backend in scenario.backends.values():
                backend.kill_helper()
        network = scenario.network
        with listening(network.server, scenario.server_address, OWN_PORT, ipv6=ipv6) as server:
            network.switch(None)
            with connecting(embedded(scenario).space, scenario.server_address, OWN_PORT, ipv6=ipv6) as ours:
                wait_until(lambda: sockets_in(network.a, "syn-sent"), "the host to ask")
                attempt = suspended(scenario)
                if not moves:
                    network.switch("a")
                finish(scenario, attempt, moves)
                assert connected(ours) == 0
                with server.accept()[0] as peer:
                    talk(ours, peer)
                if moves:
                    assert "1 connections go on here, 0 were lost" in scenario.backends["b"].messages()
                server.settimeout(0.3)
                with pytest.raises(TimeoutError):
                    server.accept()


@both_families
@both_ends
def test_the_guests_call_whose_answer_it_has_not_heard(ipv6: bool, moves: bool) -> None:
    with Scenario(godwit_arguments=NATIVE, ipv6=ipv6) as scenario:
        network = scenario.network
        with listening(network.server, scenario.server_address, OWN_PORT, ipv6=ipv6) as server:
            network.switch(None)
            with connecting(embedded(scenario).space, scenario.server_address, OWN_PORT, ipv6=ipv6) as ours:
                wait_until(lambda: sockets_in(network.a, "syn-sent"), "the host to ask")
                attempt = suspended(scenario)
                network.switch("a")
                with server.accept()[0] as peer:
                    peer.sendall(b"hello")
                    wait_until(lambda: sockets_in(network.a, "established"), "the host to be connected")
                    assert select.select([], [ours], [], 0)[1] == []
                    finish(scenario, attempt, moves)
                    assert connected(ours) == 0
                    assert ours.recv(5, socket.MSG_WAITALL) == b"hello"
                    talk(ours, peer)


@both_families
@both_ends
@pytest.mark.parametrize("closes", [False, True], ids=["", "closed"])
def test_a_call_from_outside_that_the_guest_has_not_answered(ipv6: bool, moves: bool, closes: bool) -> None:
    with Scenario(godwit_arguments=NATIVE, ipv6=ipv6) as scenario:
        network = scenario.network
        there = network.a.address(ipv6)
        with listening(embedded(scenario).space, "", PORT, ipv6=ipv6) as service:
            # The guest's address is known from what it has sent.
            with connecting(embedded(scenario).space, scenario.server_address, OWN_PORT, ipv6=ipv6) as asking:
                connected(asking)
            attempt = suspended(scenario)
            with connecting(network.server, there, PORT, ipv6=ipv6) as client:
                assert connected(client) == 0
                client.sendall(b"hello")
                if closes:
                    client.shutdown(socket.SHUT_WR)
                wait_until(lambda: sockets_in(network.a, "close-wait" if closes else "established"), "the call")
                finish(scenario, attempt, moves)
                with service.accept()[0] as peer:
                    peer.settimeout(TIMEOUT)
                    assert peer.recv(5, socket.MSG_WAITALL) == b"hello"
                    if not closes:
                        talk(client, peer)
                        return
                    assert peer.recv(1) == b""
                    peer.sendall(b"goodbye")
                assert receive_all(client) == b"goodbye"


def test_a_call_from_outside_is_reset_where_the_stream_cannot_carry_it() -> None:
    """Version 2 has no place for it: the caller hears so at once, from the target."""
    with Scenario(godwit_arguments=["--migrate-version", "2", *FORWARD]) as scenario:
        there = scenario.network.a.address(False)
        with listening(embedded(scenario).space, "", PORT, ipv6=False):
            attempt = suspended(scenario)
            with connecting(scenario.network.server, there, PORT, ipv6=False) as client:
                assert connected(client) == 0
                wait_until(lambda: sockets_in(scenario.network.a, "established"), "the host")
                client.sendall(b"a question")  # it waits for the answer
                attempt.transfer()
                scenario.network.switch("b")
                attempt.switch_over()
                attempt.finish()
                client.settimeout(5.0)
                with pytest.raises(ConnectionResetError):
                    client.recv(1)


def test_a_call_that_was_refused_meanwhile() -> None:
    with Scenario(godwit_arguments=NATIVE) as scenario:
        network = scenario.network
        network.switch(None)
        with connecting(embedded(scenario).space, scenario.server_address, OWN_PORT, ipv6=False) as ours:
            wait_until(lambda: sockets_in(network.a, "syn-sent"), "the host to ask")
            attempt = suspended(scenario)
            attempt.transfer()
            network.switch("b")
            attempt.switch_over()
            attempt.finish()
            assert connected(ours) == 111  # ECONNREFUSED


def request(number: int, ipv6: bool) -> bytes:
    """An echo request; the kernel fills in identifier and checksum."""
    return bytes((128 if ipv6 else ICMP_ECHO, 0, 0, 0, 0, 0)) + number.to_bytes(2, "big") + b"a question of some length"


@both_families
@both_ends
def test_an_echo_that_is_under_way(ipv6: bool, moves: bool) -> None:
    """The answer to a request of before arrives, and the next request leaves with the same identifier."""
    arguments = NATIVE
    protocol = socket.IPPROTO_ICMPV6 if ipv6 else socket.IPPROTO_ICMP
    with Scenario(godwit_arguments=arguments, ipv6=ipv6) as scenario, contextlib.ExitStack() as stack:
        network, guest = scenario.network, embedded(scenario)
        network.server.sysctl("net/ipv6/icmp/echo_ignore_all" if ipv6 else "net/ipv4/icmp_echo_ignore_all", "1")
        guest.space.sysctl("net/ipv4/ping_group_range", "0 2147483647")
        with guest.space.enter():
            asking = stack.enter_context(socket.socket(FAMILY[ipv6], socket.SOCK_DGRAM, protocol))
        with network.server.enter():
            server = stack.enter_context(socket.socket(FAMILY[ipv6], socket.SOCK_RAW, protocol))
        for sock in (asking, server):
            sock.settimeout(5.0)

        def asked() -> tuple[bytes, tuple[str, int]]:
            """The next echo request at the server, from its ICMP header on."""
            until = time.monotonic() + 5.0
            while time.monotonic() < until:
                data, name = server.recvfrom(2000)
                message = data if ipv6 else data[20:]
                if message[0] == (128 if ipv6 else ICMP_ECHO):
                    return message, name
            raise TimeoutError

        def answer(message: bytes, name: tuple[str, int]) -> None:
            # Over IPv6 the kernel sees to the checksum; over IPv4 it differs by the type, which has gone from 8 to 0.
            checksum = int.from_bytes(message[2:4], "big") + 0x0800
            checksum = (checksum & 0xFFFF) + (checksum >> 16)
            kind = 129 if ipv6 else ICMP_ECHO_REPLY
            server.sendto(bytes((kind, 0)) + checksum.to_bytes(2, "big") + message[4:], name)

        asking.sendto(request(1, ipv6), (scenario.server_address, 0))
        first, name = asked()
        attempt = suspended(scenario)
        finish(scenario, attempt, moves)
        answer(first, name)
        assert asking.recv(2000)[6:] == request(1, ipv6)[6:]
        asking.sendto(request(2, ipv6), (scenario.server_address, 0))
        second, name = asked()
        assert second[4:6] == first[4:6]
        answer(second, name)
        assert asking.recv(2000)[6:] == request(2, ipv6)[6:]
