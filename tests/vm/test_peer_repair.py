# SPDX-License-Identifier: GPL-2.0-or-later
"""passt's helper, the real one, with our listener."""

from __future__ import annotations

import contextlib
import resource
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from godwit.lab import peer
from godwit.repair import client
from godwit.repair.client import RepairListener
from godwit.repair.protocol import MAX_SOCKETS, TCP_REPAIR, Repair, RepairError, send_request


def repair_modes(sockets: list[socket.socket]) -> list[int]:
    return [sock.getsockopt(socket.IPPROTO_TCP, TCP_REPAIR) for sock in sockets]


@pytest.fixture
def sockets() -> Iterator[list[socket.socket]]:
    """TCP sockets, more than two full requests of them."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, before[1]), before[1]))
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) for _ in range(2 * MAX_SOCKETS + 10)
        ]
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[RepairListener]:
    made = RepairListener(str(tmp_path / "s.repair"))
    yield made
    made.close()


@contextlib.contextmanager
def passt_repair(path: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run it; what is left of it at the end is killed."""
    with subprocess.Popen(peer.fetch().repair_command(path), stdin=subprocess.DEVNULL) as helper:
        try:
            yield helper
        finally:
            helper.kill()


@pytest.mark.parametrize("first", [1, 2, 100, MAX_SOCKETS])
def test_every_socket_is_set(listener: RepairListener, sockets: list[socket.socket], first: int) -> None:
    """Also where a small request comes before large ones."""
    fds = [sock.fileno() for sock in sockets]
    with passt_repair(listener.path) as helper:
        assert listener.wait(20), helper.poll()
        listener.set_mode(fds[:first], Repair.ON)
        assert repair_modes(sockets) == [1] * first + [0] * (len(fds) - first)
        listener.set_mode(fds[first:], Repair.ON)
        assert repair_modes(sockets) == [1] * len(fds)
        half = len(fds) // 2
        listener.set_mode(fds[:half], Repair.OFF)
        listener.set_mode(fds[half:], Repair.OFF_NO_WP)
        assert repair_modes(sockets) == [0] * len(fds)


def test_tried_out_it_takes_as_many_as_before(
    listener: RepairListener, sockets: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []

    def send_and_note(sock: socket.socket, mode: Repair, fds: Sequence[int]) -> None:
        sent.append(len(fds))
        send_request(sock, mode, fds)

    monkeypatch.setattr(client, "send_request", send_and_note)
    with passt_repair(listener.path) as helper:
        assert listener.wait(20), helper.poll()
        listener.try_out()
        assert (listener.connected(), listener.refused) == (True, "")
        listener.set_mode([sock.fileno() for sock in sockets], Repair.ON)
        assert repair_modes(sockets) == [1] * len(sockets)
    assert sent == [MAX_SOCKETS, MAX_SOCKETS, MAX_SOCKETS, 10]


def test_it_ends_with_our_connection(listener: RepairListener) -> None:
    with passt_repair(listener.path) as helper:
        assert listener.wait(20), helper.poll()
        listener.close()
        assert helper.wait(20) == 0


def test_it_waits_in_a_directory(tmp_path: Path, sockets: list[socket.socket]) -> None:
    """The name of the socket is what it looks for."""
    with passt_repair(str(tmp_path)) as helper:
        with pytest.raises(subprocess.TimeoutExpired):
            helper.wait(0.5)
        listener = RepairListener(str(tmp_path / "s.repair"))
        try:
            assert listener.wait(20), helper.poll()
            listener.set_mode([sockets[0].fileno()], Repair.ON)
            assert repair_modes(sockets[:1]) == [1]
        finally:
            listener.close()


def test_killed_it_is_noticed(listener: RepairListener, sockets: list[socket.socket]) -> None:
    with passt_repair(listener.path) as helper:
        assert listener.wait(20), helper.poll()
        helper.send_signal(signal.SIGKILL)
        helper.wait(20)
        assert not listener.connected()
        assert listener.ever_connected
        with pytest.raises(RepairError, match="no repair helper is connected"):
            listener.set_mode([sockets[0].fileno()], Repair.ON)
