# SPDX-License-Identifier: GPL-2.0-or-later
"""The control socket and those who connect to it: slow, silent, hostile, and many."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import resource
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import pytest

from godwit.daemon import callers, control, lifecycle
from godwit.daemon.control import MOST_CLIENTS, MOST_REQUEST, Control, RequestError
from godwit.daemon.errors import SocketInUseError

PIECE = "x" * 65536
MANY = 200


class Answers:
    """Answers with the words themselves; ``much`` has many pieces, which are counted."""

    def __init__(self) -> None:
        self.made = 0
        self.over = 0

    async def answer(self, words: Sequence[str]) -> AsyncGenerator[str, None]:
        if list(words) == ["much"]:
            try:
                for _ in range(MANY):
                    self.made += 1
                    yield PIECE
            finally:
                self.over += 1
        elif list(words) == ["fails"]:
            yield "begun "
            raise RuntimeError("a fault of ours")
        elif list(words) == ["wrong"]:
            raise RequestError("that is nothing")
        else:
            yield " ".join(words) + "\n"


@contextlib.asynccontextmanager
async def listening(path: Path, answers: Answers | None = None) -> AsyncIterator[Control]:
    made = Control(lifecycle.listen(str(path), mode=0o600), str(path))
    made.serve((answers or Answers()).answer)
    try:
        yield made
    finally:
        made.close()
        await asyncio.sleep(0)


async def connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, str(path))
    return sock


async def ask(path: Path, request: bytes, *, end: bool = False) -> bytes:
    """Ask, and take the answer to its end."""
    loop = asyncio.get_running_loop()
    with await connect(path) as sock:
        await loop.sock_sendall(sock, request)
        if end:
            sock.shutdown(socket.SHUT_WR)
        return await rest(sock)


async def rest(sock: socket.socket, seconds: float = 20) -> bytes:
    loop = asyncio.get_running_loop()
    data = bytearray()
    async with asyncio.timeout(seconds):
        while more := await loop.sock_recv(sock, 1 << 20):
            data += more
    return bytes(data)


async def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # of a condition that nobody tells of
            await asyncio.sleep(0.005)


def test_a_line_an_answer_and_the_end(tmp_path: Path) -> None:
    async def run() -> None:
        async with listening(tmp_path / "c"):
            assert await ask(tmp_path / "c", b"what  is\tthis\n") == b"what is this\n"
            assert await ask(tmp_path / "c", b"without an end of line", end=True) == b"without an end of line\n"
            assert await ask(tmp_path / "c", b"one\ntwo\n") == b"one\n"
            assert await ask(tmp_path / "c", b"\n") == b"\n"
            wrong = json.loads(await ask(tmp_path / "c", b"wrong\n"))
            assert wrong == {"error": "that is nothing"}
            assert (await ask(tmp_path / "c", b"\xff\xfe\n")).decode() == "\ufffd\ufffd\n"

    asyncio.run(run())


@pytest.mark.parametrize("more", [1, 100, 60000])
def test_a_request_without_end(tmp_path: Path, more: int) -> None:
    async def run() -> None:
        async with listening(tmp_path / "c"):
            answer = json.loads(await ask(tmp_path / "c", b"x" * (MOST_REQUEST + more), end=True))
            assert str(MOST_REQUEST) in answer["error"]
            whole = b"x" * (MOST_REQUEST - 1) + b"\n"
            assert await ask(tmp_path / "c", whole) == whole

    asyncio.run(run())


def test_who_says_nothing_is_hung_up_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "REQUEST_SECONDS", 0.1)

    async def run() -> None:
        async with listening(tmp_path / "c"):
            with await connect(tmp_path / "c") as silent, await connect(tmp_path / "c") as slow:
                await asyncio.get_running_loop().sock_sendall(slow, b"stat")
                assert await rest(silent) == b""
                assert await rest(slow) == b""

    asyncio.run(run())


def test_who_does_not_read_holds_up_nobody_and_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer is made as it is taken: what is made is what the kernel's buffer has."""
    monkeypatch.setattr(control, "TAKE_SECONDS", 2.0)

    async def run() -> None:
        answers = Answers()
        async with listening(tmp_path / "c", answers):
            with await connect(tmp_path / "c") as deaf:
                await asyncio.get_running_loop().sock_sendall(deaf, b"much\n")
                await until(lambda: answers.made > 0)
                for _ in range(100):
                    assert await ask(tmp_path / "c", b"ping\n") == b"ping\n"
                assert answers.made < 20
                # It is hung up on, with what it has: no end, and no more of it is made.
                await until(lambda: answers.over > 0)
                assert len(await rest(deaf)) < 20 * len(PIECE)
                assert answers.made < 20
            assert len(await ask(tmp_path / "c", b"much\n")) == MANY * len(PIECE)

    asyncio.run(run())


def test_more_than_there_may_be(tmp_path: Path) -> None:
    """The one that has made no progress for the longest time goes; who is answered stays."""

    async def run() -> None:
        answers = Answers()
        loop = asyncio.get_running_loop()
        before = len(os.listdir("/proc/self/fd"))
        async with listening(tmp_path / "c", answers):
            with contextlib.ExitStack() as held:
                busy = held.enter_context(await connect(tmp_path / "c"))
                await loop.sock_sendall(busy, b"much\n")
                taken = 0
                hung = []
                for _ in range(3 * MOST_CLIENTS):
                    hung.append(held.enter_context(await connect(tmp_path / "c")))
                    # One whose answer is long, and taken, is in nobody's way, though it came first.
                    before_it = answers.made
                    while answers.made == before_it:
                        piece = await loop.sock_recv(busy, len(PIECE))
                        assert piece, "it was hung up on"
                        taken += len(piece)
                assert taken + len(await rest(busy)) == MANY * len(PIECE)
                assert await ask(tmp_path / "c", b"ping\n") == b"ping\n"
                await until(lambda: len(os.listdir("/proc/self/fd")) - before < 3 * MOST_CLIENTS + MOST_CLIENTS + 5)
                gone = [sock for sock in hung if await _hung_up(sock)]
                assert gone == hung[: len(gone)]
                assert len(gone) >= 2 * MOST_CLIENTS
        await until(lambda: len(os.listdir("/proc/self/fd")) <= before)

    asyncio.run(run())


async def _hung_up(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False


def test_a_fault_of_ours_ends_one_connection(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        async with listening(tmp_path / "c"):
            assert await ask(tmp_path / "c", b"fails\n") == b"begun "
            assert await ask(tmp_path / "c", b"ping\n") == b"ping\n"

    with caplog.at_level(logging.DEBUG):
        asyncio.run(run())
    assert "a fault of ours" in caplog.text


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """No more of them are to be had."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        yield
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_without_descriptors_it_waits_and_does_not_spin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callers, "_AGAIN", 0.3)

    async def run() -> None:
        async with listening(tmp_path / "c"):
            sock = socket.socket(socket.AF_UNIX)
            sock.setblocking(False)
            with sock:
                with no_descriptors():
                    await asyncio.get_running_loop().sock_connect(sock, str(tmp_path / "c"))
                    await asyncio.get_running_loop().sock_sendall(sock, b"ping\n")
                    used = time.process_time()
                    await asyncio.sleep(0.2)
                    assert time.process_time() - used < 0.1
                assert await rest(sock) == b"ping\n"

    asyncio.run(run())


def test_nobody_is_woken_for_it(tmp_path: Path) -> None:
    """Without clients there is no timer, and no task."""

    async def run() -> None:
        async with listening(tmp_path / "c"):
            assert await ask(tmp_path / "c", b"ping\n") == b"ping\n"
            await until(lambda: len(asyncio.all_tasks()) == 1)
            scheduled = asyncio.get_running_loop()._scheduled  # type: ignore[attr-defined]
            assert [timer for timer in scheduled if not timer.cancelled()] == []

    asyncio.run(run())


def test_a_look_whether_it_lives_is_no_client(tmp_path: Path) -> None:
    async def run() -> None:
        async with listening(tmp_path / "c"):
            with pytest.raises(SocketInUseError):
                lifecycle.listen(str(tmp_path / "c"))
            assert await ask(tmp_path / "c", b"ping\n") == b"ping\n"

    asyncio.run(run())
