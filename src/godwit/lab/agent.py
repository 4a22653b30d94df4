# SPDX-License-Identifier: GPL-2.0-or-later
"""The controlling side of the traffic agent in a QEMU guest.

The agent (``guest_agent/agent.c``, which describes its commands) answers over
a serial port, which is a socket here. The guest takes its end along when it
migrates: :meth:`Agent.attach` goes on with the socket of another QEMU.
"""

from __future__ import annotations

import itertools
import os
import shlex
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from godwit.lab.errors import CommandError, LabError

# One number for each job, whichever guest has it: what serves several guests tells them apart by it.
_JOBS = itertools.count(1)


class AgentError(LabError):
    """The agent in the guest refused a command, or is silent."""


@dataclass(frozen=True)
class Result:
    """How a transfer stands, as one of its ends sees it.

    ``state`` is ``running``, ``ok`` or ``failed``; ``wrong_at`` is the offset of
    the first wrong byte, or None; ``gap`` is the longest time without progress,
    in seconds; ``error`` says why it failed.
    """

    state: str
    bytes: int
    crc: int
    wrong_at: int | None
    gap: float
    error: str

    @property
    def ok(self) -> bool:
        """Whether the transfer is over, and every byte right."""
        return self.state == "ok"


@dataclass(frozen=True)
class Echoes:
    """How many of a job's connections gave back what was sent, failed, or kept silent."""

    alive: int
    failed: int
    silent: int


def _result(words: list[str]) -> Result:
    state, count, crc, wrong, gap, errno = words
    wrong_at = None if int(wrong) < 0 else int(wrong)
    error = os.strerror(int(errno)) if int(errno) else ("wrong data" if wrong_at is not None else "")
    return Result(state, int(count), int(crc, 16), wrong_at, int(gap) / 1000, error)


class Agent:
    """The agent of one guest."""

    def __init__(self, sock: socket.socket) -> None:
        self._changed = threading.Condition()
        self._buffer = b""
        self._lines: list[list[str]] = []
        self._gone = False
        self._listen_to(sock)

    def _listen_to(self, sock: socket.socket) -> None:
        self._sock = sock
        self._gone = False
        # All the time, not only while somebody waits: QEMU writes byte by byte, some hundred
        # of which fill a socket, and drops what has no room.
        self._reader = threading.Thread(target=self._read, args=(sock,), name="agent", daemon=True)
        self._reader.start()

    def attach(self, sock: socket.socket) -> None:
        """Go on with ``sock``: the guest has moved to another QEMU."""
        try:
            self._sock.shutdown(socket.SHUT_RD)  # what has come is still read
        except OSError:
            pass  # that QEMU has ended
        self._reader.join()
        self._listen_to(sock)

    # --- lines ---

    def _read(self, sock: socket.socket) -> None:
        while True:
            try:
                data = sock.recv(65536)
            except OSError:
                data = b""
            with self._changed:
                if data:
                    *lines, self._buffer = (self._buffer + data).split(b"\n")
                    self._lines += [line.decode(errors="replace").strip().split(" ") for line in lines if line.strip()]
                else:
                    self._gone = True
                self._changed.notify_all()
            if not data:
                return

    def _send(self, line: str) -> None:
        try:
            self._sock.sendall(line.encode() + b"\n")
        except OSError as error:
            raise AgentError(f"the guest's agent cannot be told {line!r}: {error}") from error

    def _wait(self, wanted: Callable[[list[str]], bool], what: str, timeout: float) -> list[str]:
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                for index, words in enumerate(self._lines):
                    if wanted(words):
                        return self._lines.pop(index)
                    if words[0] == "error":
                        self._lines.pop(index)
                        raise AgentError(f"{what}: the guest's agent says: {' '.join(words[1:])}")
                if self._gone:
                    raise AgentError(f"{what}: the guest is gone")
                if not self._changed.wait(deadline - time.monotonic()):
                    raise AgentError(f"{what}: nothing from the guest's agent for {timeout:g} s")

    def _answer(self, word: str, job: int, timeout: float) -> list[str]:
        return self._wait(lambda words: words[:2] == [word, str(job)], f"{word} {job}", timeout)[2:]

    # --- commands ---

    def hello(self, timeout: float) -> None:
        """Wait until the agent runs; it says so once by itself."""
        self._wait(lambda words: words[0].endswith("hello"), "hello", timeout)

    def run(self, *command: str, check: bool = True, timeout: float = 30.0) -> str:
        """Run a command in the guest and return its output, stderr with it.

        One word is for the guest's shell as it stands; of several, each reaches
        the command as one argument. The agent does nothing else meanwhile, so
        keep it short where transfers run. Raises :class:`CommandError` unless it
        exits with status 0, or ``check`` is false.
        """
        job = next(_JOBS)
        text = command[0] if len(command) == 1 else shlex.join(command)
        self._send(f"exec {job} {{ {text}; }} 2>&1 </dev/null")
        lines: list[str] = []

        def collect(words: list[str]) -> bool:
            return words[:2] in (["out", str(job)], ["exit", str(job)])

        while (words := self._wait(collect, text, timeout))[0] == "out":
            lines.append(" ".join(words[2:]))
        output, status = "\n".join(lines), int(words[2])
        if check and status:
            raise CommandError("guest", text, status, output)
        return output

    def get(self, addr: str, port: int, seed: int, length: int = 0, rate: int = 0) -> int:
        """Start a download of ``length`` bytes (0: until the server stops it) and return its job."""
        return self._transfer("get", addr, port, seed, length, rate)

    def put(self, addr: str, port: int, seed: int, length: int = 0, rate: int = 0) -> int:
        """Start an upload of ``length`` bytes (0: until :meth:`stop`) and return its job."""
        return self._transfer("put", addr, port, seed, length, rate)

    def _transfer(self, word: str, addr: str, port: int, seed: int, length: int, rate: int) -> int:
        job = next(_JOBS)
        self._send(f"{word} {job} {addr} {port} {seed} {length} {rate}")
        return job

    def flood(self, addr: str, port: int, seconds: float, *, up: bool, count: int = 1) -> tuple[int, float]:
        """Send, or receive unless ``up``, for so long what nobody looks at; return bytes and seconds.

        Over ``count`` connections at once, 16 at most. Only agents in QEMU guests do; all else waits meanwhile. The
        server is told in the first byte of each: ``u`` or ``d``.
        """
        job = next(_JOBS)
        self._send(f"flood {job} {addr} {port} {'u' if up else 'd'} {int(seconds * 1000)} {count}")
        carried, took = map(int, self._answer("flooded", job, seconds + 30.0))
        return carried, took / 1000

    def echo(self, addr: str, port: int, count: int, timeout: float = 60.0) -> int:
        """Open ``count`` connections that carry something at each :meth:`check` only; return the job.

        Raises :class:`AgentError` if not all of them open.
        """
        job = next(_JOBS)
        self._send(f"echo {job} {addr} {port} {count}")
        opened, failed = map(int, self._answer("open", job, timeout))
        if failed:
            raise AgentError(f"of {count} connections to {addr} port {port}, {failed} failed and {opened} opened")
        return job

    def check(self, job: int, timeout: float = 10.0) -> Echoes:
        """Send something over each connection of an echo job, and see it come back."""
        self._send(f"check {job} {int(timeout * 1000)}")
        alive, failed, silent = map(int, self._answer("alive", job, timeout + 10))
        return Echoes(alive, failed, silent)

    def status(self, job: int) -> Result:
        """Return how a transfer stands."""
        self._send(f"status {job}")
        return _result(self._answer("status", job, 10.0))

    def wait(self, job: int, timeout: float = 60.0) -> Result:
        """Wait for the end of a transfer and return how it went, good or bad."""
        return _result(self._answer("done", job, timeout))

    def stop(self, job: int) -> None:
        """End an upload here; :meth:`wait` for the server's confirmation."""
        self._send(f"stop {job}")
        self._answer("stopped", job, 10.0)

    def drop(self, job: int) -> None:
        """Close a job's connections and forget it."""
        self._send(f"drop {job}")
        self._answer("dropped", job, 10.0)

    def listen(self, port: int) -> None:
        """Serve transfers from outside on ``port``, over both IPv4 and IPv6."""
        self._send(f"listen {port}")
        self._wait(lambda words: words == ["listening", str(port)], f"listen {port}", 10.0)

    def serve_datagrams(self, port: int) -> None:
        """Give every datagram that comes to ``port`` back to its sender, over both IPv4 and IPv6."""
        self._send(f"datagrams {port}")
        self._wait(lambda words: words == ["serving", str(port)], f"datagrams {port}", 10.0)
