# SPDX-License-Identifier: GPL-2.0-or-later
"""What tests of failing migrations share: migrations by steps, connections by hand, what is to hold in the end."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import NamedTuple

from godwit.lab.guest import EmbeddedGuest
from godwit.lab.migration import Migration
from godwit.lab.scenario import PORT, Load, Scenario

IDLE = 5
RATE = 30_000_000  # bytes per second of each stream: enough to be busy, not to fill all queues
OWN_PORT = 5999


def begin(scenario: Scenario) -> Migration:
    """A migration, to be taken step by step."""
    assert isinstance(scenario.guest, EmbeddedGuest)
    return scenario.guest.migration(scenario.backends["b"].socket)


def suspended(scenario: Scenario) -> Migration:
    """One up to where the guest stands still."""
    attempt = begin(scenario)
    for step in ("connect_target", "log_on", "suspend"):
        getattr(attempt, step)()
    return attempt


def saved(scenario: Scenario) -> Migration:
    """One up to where the target has loaded."""
    attempt = suspended(scenario)
    attempt.transfer()
    return attempt


def works_on(scenario: Scenario, load: Load) -> None:
    """Nothing was lost, and both streams and the idle connections go on."""
    load.wait_alive()
    assert load.check_idle() == ""
    for outcome in load.finish():
        assert outcome.ok, f"{outcome}\n{scenario.messages()}"


@contextlib.contextmanager
def connection(
    scenario: Scenario, *, guest_room: int = 0, server_room: int = 0, port: int = OWN_PORT
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection of the guest's own, and the server's end of it; ``_room``: the size of a receive buffer."""
    assert isinstance(scenario.guest, EmbeddedGuest)
    where = (scenario.server_address, port)
    with contextlib.ExitStack() as stack:
        with scenario.network.server.enter():
            listening = stack.enter_context(socket.socket())
            if server_room:
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, server_room)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(where)
            listening.listen(1)
        with scenario.guest.space.enter():
            ours = stack.enter_context(socket.socket())
            if guest_room:
                ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, guest_room)
            ours.settimeout(10.0)
            ours.connect(where)
        peer = stack.enter_context(listening.accept()[0])
        peer.settimeout(20.0)
        yield ours, peer


class Datagrams(NamedTuple):
    """Two sockets of the guest's, one at ``PORT`` and one at any; and the same of the server's."""

    service: socket.socket
    asking: socket.socket
    server: socket.socket
    client: socket.socket


@contextlib.contextmanager
def datagrams(scenario: Scenario, *, ipv6: bool = False) -> Iterator[Datagrams]:
    """UDP sockets, which wait for at most 5 s."""
    assert isinstance(scenario.guest, EmbeddedGuest)
    family = socket.AF_INET6 if ipv6 else socket.AF_INET
    with contextlib.ExitStack() as stack:
        made = []
        for space in (scenario.guest.space, scenario.network.server):
            with space.enter():
                made += [stack.enter_context(socket.socket(family, socket.SOCK_DGRAM)) for _ in range(2)]
        for sock in made:
            sock.settimeout(5)
        sockets = Datagrams(*made)
        sockets.service.bind(("::" if ipv6 else "", PORT))
        sockets.server.bind((scenario.server_address, PORT))
        yield sockets


def receive_exactly(sock: socket.socket, size: int) -> bytes:
    """So many bytes, or fewer and then the end. (MSG_WAITALL does not wait where the socket has a timeout.)"""
    data = b""
    while len(data) < size and (piece := sock.recv(size - len(data))):
        data += piece
    return data


def receive_all(sock: socket.socket) -> bytes:
    """Everything up to the end."""
    data = b""
    while piece := sock.recv(65536):
        data += piece
    return data


def close_with_reset(sock: socket.socket) -> None:
    """Close with a reset (socket(7), SO_LINGER)."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()
