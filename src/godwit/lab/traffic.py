# SPDX-License-Identifier: GPL-2.0-or-later
"""Traffic between namespaces: one process that is either end of many connections.

The same agent as the one in QEMU guests (``guest_agent/agent.c``, which
describes commands, answers and what goes over a connection), for hosts and for
embedded guests::

    with Traffic(net.server) as server, Traffic(guest.space) as client:
        server.listen(5001)
        job = client.get(net.server.addr4, 5001, seed=1)
        ...
        server.stop(served(job))
        assert client.wait(job).ok and server.wait(served(job)).ok

Beyond that agent's commands, the jobs of whoever connects can be asked after,
stopped and waited for here too: under the negative of their number, which is
what :func:`served` returns. And ``rewind JOB`` measures the longest gap
afresh.

By hand: ``python -m godwit.lab.traffic``, commands on standard input::

    listen 5001
    get 1 192.0.2.2 5001 7 1000000 0
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import ipaddress
import itertools
import os
import resource
import select
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Sequence

from godwit.lab import stream
from godwit.lab.agent import Agent, AgentError, Result
from godwit.lab.closing import Closing
from godwit.lab.netns import Namespace

READ = 1 << 16
WRITE = 1 << 18
TURNS = 16  # reads or writes of one connection before the others have theirs
TICK = 0.005  # seconds between looks at senders with a rate
CONNECTING = 128  # connections of an echo job being opened at a time
TOKEN = 8


class MistakeError(Exception):
    """A command that cannot be carried out."""


@functools.lru_cache(maxsize=16)
def _block(seed: int) -> bytes:
    """Return enough whole periods of a stream to write from in large pieces."""
    return stream.period(seed) * (WRITE // stream.PERIOD + 2)


# --- connections ------------------------------------------------------------------


class _Connection:
    """A socket and what is to be done when it is ready."""

    def __init__(self, loop: Loop, sock: socket.socket) -> None:
        self.loop = loop
        self.sock = sock
        self.fd = sock.fileno()
        self._events = 0
        self.greeting = b""  # what is to be sent first
        self.connecting = False
        sock.setblocking(False)
        loop.poll.register(self.fd, 0)
        loop.connections[self.fd] = self

    def watch(self, events: int) -> None:
        """Wait for these events from now on."""
        if events != self._events:
            self._events = events
            self.loop.poll.modify(self.fd, events)

    def close(self) -> None:
        """Close the socket. May be repeated: by then the descriptor's number may be another one's."""
        if self.loop.connections.get(self.fd) is self:
            del self.loop.connections[self.fd]
            self.loop.poll.unregister(self.fd)
            self.sock.close()

    def open(self, addr: str, port: int, greeting: bytes) -> None:
        """Connect, and send ``greeting`` first."""
        self.greeting = greeting
        self.connecting = True
        self.watch(select.EPOLLOUT)
        status = self.sock.connect_ex((addr, port))
        if status not in (0, errno.EINPROGRESS):
            self.over(status)

    def event(self, events: int) -> None:
        """Do what can be done."""
        try:
            if self.connecting:
                status = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if status:
                    raise OSError(status, os.strerror(status))
                self.connecting = False
                self.connected()
            if self.greeting:
                self.greeting = self.greeting[self.sock.send(self.greeting) :]
                if self.greeting:
                    return
                self.greeted()
            self.ready(events)
        except BlockingIOError:
            pass
        except OSError as error:
            self.over(error.errno or errno.EIO)

    def connected(self) -> None:
        """Take note that the connection is open."""

    def greeted(self) -> None:
        """Take note that the greeting has been sent."""

    def ready(self, events: int) -> None:
        """Read or write; may raise any ``OSError``."""
        raise NotImplementedError

    def over(self, status: int) -> None:
        """End: 0 if all went as it should, otherwise an error's number."""
        self.close()


class _Transfer(_Connection):
    """One end of a stream, and the job that it belongs to."""

    def __init__(self, loop: Loop, sock: socket.socket, job: int, seed: int, limit: int = 0) -> None:
        super().__init__(loop, sock)
        self.job = job
        self.seed = seed
        self.limit = limit
        self.state = "running"
        self.bytes = 0
        self.crc = 0
        self.wrong_at = -1
        self.status = 0
        self.started = self.progressed = time.monotonic()
        self.gap = 0.0
        loop.jobs[job] = self

    def progress(self) -> None:
        now = time.monotonic()
        self.gap = max(self.gap, now - self.progressed)
        self.progressed = now

    def report(self, word: str) -> None:
        """Say how it stands."""
        gap = self.gap
        if self.state == "running":
            gap = max(gap, time.monotonic() - self.progressed)
        self.loop.say(
            f"{word} {self.job} {self.state} {self.bytes} {self.crc:08x} {self.wrong_at}"
            f" {int(gap * 1000)} {self.status}"
        )

    def over(self, status: int) -> None:
        self.close()
        self.status = status
        self.state = "failed" if status or self.wrong_at >= 0 else "ok"
        self.loop.paused.discard(self)
        self.report("done")

    def connected(self) -> None:
        self.progress()


class _Sender(_Transfer):
    def __init__(self, loop: Loop, sock: socket.socket, job: int, seed: int, limit: int, rate: int) -> None:
        super().__init__(loop, sock, job, seed, limit)
        self.rate = rate
        self.stopped = False
        self._view = memoryview(_block(seed))
        self._ended = False
        self._answer = b""

    def greeted(self) -> None:
        self.started = time.monotonic()

    def ready(self, events: int) -> None:
        if events & (select.EPOLLIN | select.EPOLLERR | select.EPOLLHUP):
            data = self.sock.recv(1024)
            if data and self._ended and len(self._answer) < 1024:
                self._answer += data
            elif data or not self._ended:
                self.over(errno.EPROTO)
                return
            else:
                self.over(0 if self._agreed() else errno.EBADMSG)
                return
        if not self._ended and events & select.EPOLLOUT:
            self.send()

    def _agreed(self) -> bool:
        words = self._answer.split()
        return len(words) == 2 and words[0] == b"%d" % self.bytes and words[1] == b"%08x" % self.crc

    def send(self) -> None:
        """Send as much as is due and goes."""
        self.watch(select.EPOLLIN | select.EPOLLOUT)
        for _ in range(TURNS):
            left = self.limit - self.bytes if self.limit else WRITE
            if self.stopped or not left:
                self._ended = True
                self.sock.shutdown(socket.SHUT_WR)
                self.watch(select.EPOLLIN)
                return
            if self.rate:
                due = int((time.monotonic() - self.started) * self.rate) - self.bytes
                if due < min(left, max(1, self.rate // 100)):
                    self.loop.paused.add(self)
                    self.watch(select.EPOLLIN)
                    return
                left = min(left, due)
            at = self.bytes % stream.PERIOD
            piece = self._view[at : at + min(left, WRITE)]
            sent = self.sock.send(piece)
            self.crc = zlib.crc32(piece[:sent], self.crc)
            self.bytes += sent
            self.progress()


class _Receiver(_Transfer):
    def __init__(self, loop: Loop, sock: socket.socket, job: int, seed: int, limit: int) -> None:
        super().__init__(loop, sock, job, seed, limit)
        self._block = _block(seed)
        self.watch(select.EPOLLIN)

    def greeted(self) -> None:
        self.watch(select.EPOLLIN)

    def ready(self, events: int) -> None:
        for _ in range(TURNS):
            data = self.sock.recv(READ)
            self.progress()
            if not data:
                if self.limit and self.bytes != self.limit:
                    self.over(errno.ENODATA)
                    return
                self.sock.send(f"{self.bytes} {self.crc:08x}\n".encode())
                self.over(0)
                return
            at = self.bytes % stream.PERIOD
            # Two slices of bytes: anything else is compared octet by octet.
            if self.wrong_at < 0 and data != self._block[at : at + len(data)]:
                self.wrong_at = self.bytes + next(i for i, octet in enumerate(data) if octet != self._block[at + i])
            self.crc = zlib.crc32(data, self.crc)
            self.bytes += len(data)


class _EchoServer(_Connection):
    def __init__(self, loop: Loop, sock: socket.socket) -> None:
        super().__init__(loop, sock)
        self._due = b""
        self.watch(select.EPOLLIN)

    def ready(self, events: int) -> None:
        if not self._due:
            self._due = self.sock.recv(READ)
            if not self._due:
                self.close()
                return
        try:
            while self._due:
                self._due = self._due[self.sock.send(self._due) :]
        finally:
            if self.sock.fileno() >= 0:
                self.watch(select.EPOLLOUT if self._due else select.EPOLLIN)


class _EchoClient(_Connection):
    def __init__(self, loop: Loop, sock: socket.socket, echo: _Echo) -> None:
        super().__init__(loop, sock)
        self._echo = echo
        self._came = b""
        self.token = b""  # what is due back

    def connected(self) -> None:
        self._echo.has_opened(self)
        self.watch(select.EPOLLIN)

    def ask(self, token: bytes) -> None:
        """Send a token."""
        self.token = token
        try:
            if self.sock.send(token) != len(token):
                self.over(errno.ENOBUFS)
        except OSError as error:
            self.over(error.errno or errno.EIO)

    def ready(self, events: int) -> None:
        data = self.sock.recv(READ)
        if not data:
            self.over(errno.ECONNRESET)
            return
        self._came += data
        if len(self._came) >= TOKEN:
            if self._came != self.token:
                self.over(errno.EBADMSG)
                return
            self._came = self.token = b""
            self._echo.has_come(self)

    def over(self, status: int) -> None:
        self.close()
        self._echo.has_failed(self)


class _Echo:
    """The job of many connections that carry something at each check only."""

    def __init__(self, loop: Loop, job: int, addr: str, port: int, count: int) -> None:
        self.job = job
        self._loop = loop
        self._addr = addr
        self._port = port
        self._left = count
        self._connecting = 0
        self._failed = 0
        self._announced = False
        self._open: set[_EchoClient] = set()
        self._silent: set[_EchoClient] = set()
        self.deadline: float | None = None
        loop.jobs[job] = self
        self._more()

    def _more(self) -> None:
        while self._left and self._connecting < CONNECTING:
            self._left -= 1
            self._connecting += 1
            client = _EchoClient(self._loop, _socket(self._addr), self)
            client.open(self._addr, self._port, f"echo {self.job}\n".encode())
        if not self._left and not self._connecting and not self._announced:
            self._announced = True
            self._loop.say(f"open {self.job} {len(self._open)} {self._failed}")

    def has_opened(self, client: _EchoClient) -> None:
        self._connecting -= 1
        self._open.add(client)
        self._more()

    def has_failed(self, client: _EchoClient) -> None:
        self._failed += 1
        if client in self._open:
            self._open.remove(client)
            self.has_come(client)
        else:
            self._connecting -= 1
            self._more()

    def has_come(self, client: _EchoClient) -> None:
        if client in self._silent:
            self._silent.remove(client)
            if not self._silent:
                self.end_check()

    def check(self, timeout: float) -> None:
        """Send a token over each connection that is not still waited for."""
        self.deadline = time.monotonic() + timeout
        asked = [client for client in self._open if client not in self._silent]
        self._silent |= set(asked)
        for client in asked:
            client.ask(os.urandom(TOKEN))
        if not self._silent:
            self.end_check()

    def end_check(self) -> None:
        """Say how many are alive."""
        if self.deadline is not None:
            self.deadline = None
            alive = len(self._open) - len(self._silent)
            self._loop.say(f"alive {self.job} {alive} {self._failed} {len(self._silent)}")

    def close(self) -> None:
        """Close all connections."""
        for client in list(self._open):
            client.close()


class _Listener(_Connection):
    def __init__(self, loop: Loop, port: int) -> None:
        sock = socket.create_server(("::", port), family=socket.AF_INET6, backlog=4096, dualstack_ipv6=True)
        super().__init__(loop, sock)
        self.watch(select.EPOLLIN)

    def ready(self, events: int) -> None:
        while True:
            _Asked(self.loop, self.sock.accept()[0])

    def over(self, status: int) -> None:
        pass  # out of descriptors, or the peer was gone at once: go on listening


class _Asked(_Connection):
    """A connection from outside whose first line, which says what it is for, has not come."""

    def __init__(self, loop: Loop, sock: socket.socket) -> None:
        super().__init__(loop, sock)
        self.watch(select.EPOLLIN)

    def ready(self, events: int) -> None:
        # What follows the line is not for here: look first, then take no more.
        line, newline, _ = self.sock.recv(1024, socket.MSG_PEEK).partition(b"\n")
        if not newline:
            if not line or len(line) == 1024:
                self.close()
            return
        self.sock.recv(len(line) + 1)
        self.loop.poll.unregister(self.fd)
        del self.loop.connections[self.fd]
        try:
            self._begin(line.decode(errors="replace").split())
        except ValueError:
            self.sock.close()

    def _begin(self, words: list[str]) -> None:
        if words[0] == "get":
            job, seed, limit, rate = map(int, words[1:])
            _Sender(self.loop, self.sock, -job, seed, limit, rate).event(select.EPOLLOUT)
        elif words[0] == "put":
            job, seed = map(int, words[1:])
            _Receiver(self.loop, self.sock, -job, seed, 0)
        elif words[0] == "echo":
            _EchoServer(self.loop, self.sock)
        else:
            self.sock.close()


def _socket(addr: str) -> socket.socket:
    try:
        version = ipaddress.ip_address(addr.partition("%")[0]).version
    except ValueError as error:
        raise MistakeError(str(error)) from error
    return socket.socket(socket.AF_INET6 if version == 6 else socket.AF_INET, socket.SOCK_STREAM)


# --- the loop ---------------------------------------------------------------------


class Loop:
    """The agent itself: commands from ``control``, answers through ``write``."""

    def __init__(self, control: int, write: Callable[[bytes], object]) -> None:
        self.poll = select.epoll()
        self.connections: dict[int, _Connection] = {}
        self.jobs: dict[int, _Transfer | _Echo] = {}
        self.paused: set[_Transfer] = set()
        self._control = control
        self._write = write
        self._buffer = b""
        self.poll.register(control, select.EPOLLIN)

    def say(self, line: str) -> None:
        """Answer."""
        self._write(line.encode() + b"\n")

    def run(self) -> None:
        """Work until the control channel is closed."""
        self.say("hello 1")
        try:
            while True:
                for fd, events in self.poll.poll(self._timeout()):
                    if fd == self._control:
                        data = os.read(fd, 65536)
                        if not data:
                            return
                        self._commands(data)
                    elif (connection := self.connections.get(fd)) is not None:
                        connection.event(events)
                self._timers()
        finally:
            for connection in list(self.connections.values()):
                connection.close()
            self.poll.close()

    def _timeout(self) -> float | None:
        if self.paused:
            return TICK
        deadlines = [j.deadline for j in self.jobs.values() if isinstance(j, _Echo) and j.deadline is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _timers(self) -> None:
        for sender in list(self.paused):
            self.paused.discard(sender)
            sender.event(select.EPOLLOUT)
        now = time.monotonic()
        for job in self.jobs.values():
            if isinstance(job, _Echo) and job.deadline is not None and job.deadline <= now:
                job.end_check()

    def _commands(self, data: bytes) -> None:
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            words = line.decode(errors="replace").split()
            if not words:
                continue
            try:
                self._command(words[0], words[1:], line.decode(errors="replace"))
            except (MistakeError, ValueError, IndexError, OSError) as error:
                self.say(f"error {words[0]}: {error}")

    def _command(self, word: str, args: list[str], line: str) -> None:
        if word == "hello":
            self.say("hello 1")
        elif word in ("get", "put"):
            self._transfer(word, *args)
        elif word == "echo":
            job, port, count = int(args[0]), int(args[2]), int(args[3])
            self._unused(job)
            _Echo(self, job, args[1], port, count)
        elif word == "listen":
            _Listener(self, int(args[0]))
            self.say(f"listening {int(args[0])}")
        elif word == "exec":
            self._exec(int(args[0]), line.split(None, 2)[2])
        else:
            self._ask(word, self.jobs.get(int(args[0])), args)

    def _transfer(self, word: str, job: str, addr: str, port: str, seed: str, limit: str, rate: str) -> None:
        number = int(job)
        self._unused(number)
        sock = _socket(addr)
        if word == "get":
            receiver = _Receiver(self, sock, number, int(seed), int(limit))
            receiver.open(addr, int(port), f"get {number} {int(seed)} {int(limit)} {int(rate)}\n".encode())
        else:
            sender = _Sender(self, sock, number, int(seed), int(limit), int(rate))
            sender.open(addr, int(port), f"put {number} {int(seed)}\n".encode())

    def _unused(self, job: int) -> None:
        if job <= 0 or job in self.jobs:
            raise MistakeError(f"job {job} is not free")

    def _ask(self, word: str, job: _Transfer | _Echo | None, args: list[str]) -> None:
        if job is None:
            raise MistakeError(f"no job {args[0]}")
        if word == "drop":
            job.close()
            if isinstance(job, _Transfer):
                self.paused.discard(job)
            del self.jobs[job.job]
            self.say(f"dropped {job.job}")
        elif word == "check" and isinstance(job, _Echo):
            job.check(int(args[1]) / 1000)
        elif word == "status" and isinstance(job, _Transfer):
            job.report("status")
        elif word == "rewind" and isinstance(job, _Transfer):
            job.gap = 0.0
            self.say(f"rewound {job.job}")
        elif word == "stop" and isinstance(job, _Sender):
            job.stopped = True
            self.say(f"stopped {job.job}")
            if job in self.paused:
                self.paused.discard(job)
                job.event(select.EPOLLOUT)
        else:
            raise MistakeError(f"not for job {job.job}")

    def _exec(self, job: int, command: str) -> None:
        done = subprocess.run(
            command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
        for line in done.stdout.decode(errors="replace").splitlines():
            self.say(f"out {job} {line}")
        self.say(f"exit {job} {done.returncode}")


# --- the controlling side ---------------------------------------------------------


# One server may be asked by several agents: no two have the same job, nor the same as a QEMU guest's.
_numbers = itertools.count(10_000)


def served(job: int) -> int:
    """Return the number under which a server knows the job of who connected to it."""
    return -job


class Traffic(Agent, Closing):
    """An agent as a process in ``space``."""

    def __init__(self, space: Namespace) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = space.popen(
                [sys.executable, "-m", __spec__.name, "--control", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
            )
        super().__init__(ours)
        self._jobs = _numbers
        self._ours = ours
        try:
            self.hello(20.0)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The agent's process."""
        return self._process.pid

    def rewind(self, job: int) -> Result:
        """Return how a transfer stands, and measure its longest gap afresh from now on."""
        result = self.status(job)
        self._send(f"rewind {job}")
        self._answer("rewound", job, 10.0)
        return result

    def known(self, job: int) -> Result | None:
        """Return how a transfer stands, or None if there is no such job (yet)."""
        try:
            return self.status(job)
        except AgentError:
            return None

    def close(self) -> None:
        """End the agent, and with it every connection. May be repeated."""
        with contextlib.suppress(OSError):
            self._ours.shutdown(socket.SHUT_RDWR)  # a close would wait for the thread that reads from it
        self._ours.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """Be either end of connections that carry known streams; commands on standard input."""
    parser = argparse.ArgumentParser(prog="python -m godwit.lab.traffic", description=main.__doc__)
    parser.add_argument("--control", type=int, help="a connected socket for commands and answers, by its descriptor")
    options = parser.parse_args(arguments)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # Whoever is in control may go away at any time.
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError, ConnectionResetError):
        if options.control is None:
            Loop(sys.stdin.fileno(), functools.partial(os.write, sys.stdout.fileno())).run()
        else:
            with socket.socket(fileno=options.control) as control:
                Loop(control.fileno(), control.sendall).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
