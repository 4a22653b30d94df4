# SPDX-License-Identifier: GPL-2.0-or-later
"""Sockets that linger, and who gets them to go."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from godwit.daemon import linger
from godwit.daemon.linger import Linger, lingerers, reclaim
from godwit.dataplane import Side


def packed(text: str) -> bytes:
    if ":" in text:
        return socket.inet_pton(socket.AF_INET6, text)
    return bytes(10) + b"\xff\xff" + socket.inet_pton(socket.AF_INET, text)


class Ends:
    """A connection: our descriptor, its name, and the peer."""

    def __init__(self, stack: contextlib.ExitStack, host: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        server = stack.enter_context(socket.create_server((host, 0), family=family))
        ours = socket.create_connection(server.getsockname()[:2])
        self.peer = stack.enter_context(server.accept()[0])
        local, remote = ours.getsockname(), ours.getpeername()
        self.side = Side(packed(local[0]), packed(remote[0]), local[1], remote[1])
        self.fd = ours.detach()

    @property
    def open(self) -> bool:
        self.peer.setblocking(False)
        try:
            return self.peer.recv(1) != b""
        except BlockingIOError:
            return True


@pytest.fixture
def connections() -> Iterator[list[Ends]]:
    with contextlib.ExitStack() as stack:
        yield [Ends(stack, host) for host in ("127.0.0.1", "127.0.0.1", "::1")]


def test_what_is_asked_for_goes_and_the_rest_stays(connections: list[Ends]) -> None:
    async def run() -> None:
        told: list[int] = []
        lingering = Linger([ends.fd for ends in connections], lambda: told.append(len(lingering)))
        await lingering.listen()
        stranger = connections[1].side._replace(our_port=connections[1].side.our_port ^ 1)
        await asyncio.to_thread(reclaim, [connections[0].side, connections[2].side, stranger], lingerers())
        assert [ends.open for ends in connections] == [False, True, False]
        assert told == [1]
        assert lingering.remaining > 9
        await asyncio.to_thread(reclaim, [connections[0].side], lingerers())  # again: nothing
        lingering.close()
        assert not connections[1].open
        assert told == [1, 0]
        assert lingering.remaining == 0
        lingering.close()

    asyncio.run(run())


def test_after_a_while_all_go(connections: list[Ends], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linger, "LINGER_SECONDS", 0.1)

    async def run() -> None:
        lingering = Linger([ends.fd for ends in connections], lambda: None)
        await lingering.listen()
        assert all(ends.open for ends in connections)
        await asyncio.sleep(0.3)
        assert not any(ends.open for ends in connections)
        assert lingerers() == []

    asyncio.run(run())


AS_NOBODY = """
import os, sys
from godwit.daemon.linger import lingerers, reclaim
from godwit.dataplane import Side
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
reclaim([Side(*eval(sys.argv[1]))], lingerers())
"""


def test_another_user_gets_nothing(connections: list[Ends], caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        lingering = Linger([ends.fd for ends in connections], lambda: None)
        await lingering.listen()
        words = [sys.executable, "-c", AS_NOBODY, repr(tuple(connections[0].side))]
        await asyncio.to_thread(subprocess.run, words, check=True, timeout=60)
        assert all(ends.open for ends in connections)
        lingering.close()

    assert os.geteuid() == 0, "this test has to be run as root"
    asyncio.run(run())
    assert "another user" in caplog.text


def test_a_request_that_makes_no_sense(connections: list[Ends]) -> None:
    async def run() -> None:
        lingering = Linger([ends.fd for ends in connections], lambda: None)
        await lingering.listen()
        (name,) = lingerers()
        for request in (b"", b"x", bytes(35), bytes(1000)):
            reader, writer = await asyncio.open_unix_connection(f"\0{name}")
            writer.write(request)
            writer.write_eof()
            assert await reader.read() == bytes(4)
            writer.close()
        assert all(ends.open for ends in connections)
        lingering.close()

    asyncio.run(run())


AS_NOBODY_LISTEN = """
import os, socket, sys
os.setgid(65534)
os.setuid(65534)
with socket.socket(socket.AF_UNIX) as listening:
    listening.bind("\\0godwit-linger-stranger")
    listening.listen()
    print("listens", flush=True)
    connection, _ = listening.accept()
    print(len(connection.recv(100)))
"""


def test_a_stranger_is_told_nothing(connections: list[Ends]) -> None:
    with subprocess.Popen([sys.executable, "-c", AS_NOBODY_LISTEN], stdout=subprocess.PIPE, text=True) as stranger:
        assert stranger.stdout is not None
        assert stranger.stdout.readline() == "listens\n"
        assert reclaim([connections[0].side], lingerers()) == []
        assert stranger.stdout.readline() == "0\n"
    for ends in connections:
        os.close(ends.fd)


def test_who_is_busy_for_a_while_is_waited_for(connections: list[Ends]) -> None:
    async def run() -> None:
        lingering = Linger([ends.fd for ends in connections], lambda: None)
        await lingering.listen()
        names = lingerers()
        asking = asyncio.create_task(asyncio.to_thread(reclaim, [ends.side for ends in connections], names))
        await asyncio.sleep(0)
        time.sleep(1.0)  # noqa: ASYNC251  # as on a host with too much to do
        assert await asking == names
        assert not any(ends.open for ends in connections)
        lingering.close()

    asyncio.run(run())


def test_who_does_not_answer_is_not_asked_again(connections: list[Ends], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linger, "_ANSWER", 0.2)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind("\0godwit-linger-silent")
        silent.listen()
        assert lingerers() == ["godwit-linger-silent"]
        assert reclaim([connections[0].side], lingerers()) == []
    for ends in connections:
        os.close(ends.fd)
