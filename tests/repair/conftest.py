# SPDX-License-Identifier: GPL-2.0-or-later
"""TCP connections to set into repair mode, and helpers that do as a test says."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from godwit.repair.client import RepairListener
from godwit.repair.protocol import TCP_REPAIR, Repair, close_all, encode, receive_request

#: What a helper does with a request: the bytes that it answers, None to close without an answer.
Act = Callable[[int, Repair, list[int]], bytes | None]


def repair_mode(sock: socket.socket) -> int:
    """What the kernel says: 1 in repair mode, 0 out of it."""
    return sock.getsockopt(socket.IPPROTO_TCP, TCP_REPAIR)


def obey(_number: int, mode: Repair, fds: list[int]) -> bytes | None:
    """Do what a helper does."""
    for fd in fds:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=fd)
        sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, mode)
        sock.detach()
    return encode(mode)


class FakeHelper:
    """A helper in a thread. ``requests``: modes and numbers of sockets; ``answered``: how many of them it has."""

    def __init__(self, path: str, act: Act = obey, name: bytes = b"") -> None:
        self.requests: list[tuple[Repair, int]] = []
        self.answered = 0
        self.ended = threading.Event()
        self._act = act
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(30)
        if name:
            self._sock.bind(name)
        self._sock.connect(path)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with self._sock, contextlib.suppress(OSError):
            while (request := receive_request(self._sock)) is not None:
                mode, fds = request
                self.requests.append((mode, len(fds)))
                try:
                    answer = self._act(len(self.requests), mode, list(fds))
                finally:
                    close_all(fds)
                if answer is None:
                    break
                self._sock.sendall(answer)
                self.answered += 1
        self.ended.set()

    def close(self) -> None:
        """Disconnect, as a helper that is killed would; returns when it is done."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(30)


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[RepairListener]:
    """Listen for helpers, with a short patience."""
    made = RepairListener(str(tmp_path / "s.repair"), timeout=1.0)
    yield made
    made.close()


@pytest.fixture
def helpers(listener: RepairListener) -> Iterator[Callable[..., FakeHelper]]:
    """Connect a helper to ``listener``: ``helpers(act, name)``."""
    made: list[FakeHelper] = []

    def connect(act: Act = obey, name: bytes = b"") -> FakeHelper:
        made.append(FakeHelper(listener.path, act, name))
        return made[-1]

    yield connect
    for helper in made:
        helper.close()


@pytest.fixture(scope="session")
def net_admin() -> None:
    """Fail here, with what to do, where repair mode cannot be had."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        except PermissionError:
            pytest.fail("TCP_REPAIR needs CAP_NET_ADMIN: run these tests as root", pytrace=False)


@pytest.fixture
def connections(net_admin: None) -> Iterator[Callable[[int], list[socket.socket]]]:
    """Make TCP connections: the ends that connected, ``connections(count)``."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1024))

        def connect(count: int) -> list[socket.socket]:
            made = []
            for _ in range(count):
                made.append(stack.enter_context(socket.create_connection(server.getsockname(), timeout=10)))
                stack.enter_context(server.accept()[0])
            return made

        yield connect
