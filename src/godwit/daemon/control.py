# SPDX-License-Identifier: GPL-2.0-or-later
"""The control socket: who may connect to it is told how things stand, and can change nothing.

Theory of operation. A client connects, sends one line, is answered, and the connection ends (``docs/control.md``).
Who may connect, the mode of the socket's file says. A client may be slow, silent or hostile: there are `MOST_CLIENTS`
of them at a time, and one more takes the place of that which has made no progress for the longest time; a request has
a length and a time in which it must come, each piece of an answer has one in which it must be taken. An answer is made
piece by piece, and the next one when the one before it is the kernel's: a client that does not read holds up nobody and
nothing but itself. Without clients there is no timer and no task: nobody is woken.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Final

from godwit.daemon.callers import Callers
from godwit.daemon.texts import to_json

log = logging.getLogger(__name__)

#: Connections at a time.
MOST_CLIENTS: Final = 16
#: Bytes of a request, with its end of line.
MOST_REQUEST: Final = 512
#: Seconds for a request to come, and for a piece of an answer to be taken.
REQUEST_SECONDS: Final = 5.0
TAKE_SECONDS: Final = 10.0
#: And for all of it.
ALL_SECONDS: Final = 120.0

#: Gives the pieces of an answer to the words of a request; `RequestError` before the first one if it is none.
Answers = Callable[[Sequence[str]], AsyncGenerator[str, None]]


class RequestError(Exception):
    """What was asked for is nothing that can be answered; says why."""


class _Client:
    def __init__(self, sock: socket.socket, now: float) -> None:
        self.sock = sock
        self.progress_at = now
        self.task: asyncio.Task[None] | None = None


class Control:
    """The socket, its path, and who is connected. The socket is this one's from now on."""

    def __init__(self, sock: socket.socket, path: str) -> None:
        sock.listen(MOST_CLIENTS)  # may wait, before one is turned away
        self.sock = sock
        self.path = path
        self._loop = asyncio.get_running_loop()
        self._answers: Answers | None = None
        self._clients: list[_Client] = []
        self._callers = Callers(sock, self._come, "the control socket cannot be answered for a while")

    def serve(self, answers: Answers) -> None:
        """Answer whoever connects, or has connected, from now on."""
        self._answers = answers
        self._callers.watch()

    def stop(self) -> None:
        """Let nobody in any more. Those who wait are another process's. May be repeated."""
        self._callers.stop()

    def close(self) -> None:
        """Hang up, and close the socket. May be repeated."""
        self.stop()
        for client in self._clients:
            self._send_away(client)
        self.sock.close()

    def _come(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        if len(self._clients) >= MOST_CLIENTS:
            self._send_away(min(self._clients, key=lambda client: client.progress_at))
        client = _Client(sock, self._loop.time())
        self._clients.append(client)
        client.task = self._loop.create_task(self._talk(client))
        client.task.add_done_callback(lambda _: self._gone(client))

    def _send_away(self, client: _Client) -> None:
        if client.task is not None:
            client.task.cancel()
        client.progress_at = float("inf")  # nobody else's place is taken for it

    def _gone(self, client: _Client) -> None:
        client.sock.close()
        self._clients.remove(client)

    async def _talk(self, client: _Client) -> None:
        try:
            async with asyncio.timeout(ALL_SECONDS):
                try:
                    async with asyncio.timeout(REQUEST_SECONDS):
                        words = await self._request(client.sock)
                    await self._answer(client, words)
                except RequestError as error:
                    _pass_over(client.sock)
                    await self._send(client, to_json({"error": str(error)}) + "\n")
                client.sock.shutdown(socket.SHUT_WR)
        except (OSError, TimeoutError) as error:
            log.debug("a client of the control socket: %r", error)
        except Exception:
            log.exception("a client of the control socket cannot be answered")

    async def _request(self, sock: socket.socket) -> list[str]:
        """The words of the line that it sends, or of all that it sends."""
        data = b""
        while b"\n" not in data and len(data) <= MOST_REQUEST:
            more = await self._loop.sock_recv(sock, MOST_REQUEST + 1 - len(data))
            if not more:
                break
            data += more
        if len(data) > MOST_REQUEST:
            raise RequestError(f"a request is a line of at most {MOST_REQUEST} bytes")
        return data.partition(b"\n")[0].decode(errors="replace").split()

    async def _answer(self, client: _Client, words: Sequence[str]) -> None:
        assert self._answers is not None  # since serve()
        async with contextlib.aclosing(self._answers(words)) as pieces:
            async for piece in pieces:
                await self._send(client, piece)

    async def _send(self, client: _Client, piece: str) -> None:
        async with asyncio.timeout(TAKE_SECONDS):
            await self._loop.sock_sendall(client.sock, piece.encode(errors="backslashreplace"))
        client.progress_at = max(client.progress_at, self._loop.time())


def _pass_over(sock: socket.socket) -> None:
    """Read what waits: closed on it, the connection would end with an error, and perhaps without the answer."""
    with contextlib.suppress(BlockingIOError):
        sock.recv(1 << 16)
