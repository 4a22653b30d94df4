# SPDX-License-Identifier: GPL-2.0-or-later
"""Thousands of connections at once: both ends, each a process of its own, and what is done with all of them.

For what hangs on the number of connections: how long they take to move, what an
idle one costs. They are spread over the ports of the server, so that it is never
the kernel's search for a free port that is measured::

    with Crowd(guest.space, net.server, net.server.addr4) as crowd:
        crowd.open(9000)
        ...
        assert crowd.check() == 9000

Three kinds of connections:

* ``ECHO``: idle but for ``check``, in which both ends send and compare known bytes.
* ``FULL``: one end sends what the other does not read until it is told to. The
  guest has the least receive buffer that there is: what it does not read stays
  with its back-end, all but a segment or two.
* ``TICK``: carry a byte every few milliseconds between ``start_ticks`` and
  ``gaps``, which tells how long each was silent.

They are reset at their end, so that none is left in TIME_WAIT.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import functools
import hashlib
import itertools
import json
import os
import resource
import select
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, cast

from godwit.lab import stream
from godwit.lab.closing import Closing
from godwit.lab.errors import LabError
from godwit.lab.netns import Namespace

ECHO, FULL, TICK = 1, 2, 3
PORTS = range(6000, 6020)
MESSAGE = 64  # bytes of a check, each way
TICK_SECONDS = 0.002  # between two bytes of one connection
TICKERS = 4
AT_ONCE = 1.0

_HELLO = struct.Struct("!IB")  # the connection's number and kind: what the client says first
_AT_ONCE = 256  # connections being opened, or checked, at a time
_SMALL = 2304  # SOCK_MIN_RCVBUF of the kernel
_LARGE = 1 << 20
_SEED = 11
SIOCOUTQNSD = 0x894B  # linux/sockios.h


def _message(number: int, turn: int, way: bytes) -> bytes:
    return hashlib.blake2b(b"%d %d %s" % (number, turn, way), digest_size=MESSAGE).digest()


@functools.cache
def _block() -> bytes:
    return stream.period(_SEED) * 3


def _content(number: int, size: int) -> memoryview:
    """What a connection that is filled carries, up to two periods: different for each."""
    at = number * 97 % stream.PERIOD
    return memoryview(_block())[at : at + size]


def _unsent(sock: socket.socket) -> int:
    """How many bytes of a socket's queue were not sent yet, not even once."""
    (count,) = struct.unpack("i", fcntl.ioctl(sock, SIOCOUTQNSD, bytes(4)))
    return cast(int, count)


class _Connection:
    def __init__(self, sock: socket.socket, number: int = -1, kind: int = 0) -> None:
        self.sock = sock
        self.number = number
        self.kind = kind
        self.came = bytearray()
        self.turn = 0
        self.last = 0.0  # when something came
        self.gap = 0.0
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class _End:
    """One of the two processes. Each command is a method, named in a line of JSON with its arguments."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._buffer = b""
        self._poll = select.epoll()
        self._poll.register(control.fileno(), select.EPOLLIN)
        self._listening: dict[int, socket.socket] = {}
        self._by_fd: dict[int, _Connection] = {}
        self._conns: dict[int, _Connection] = {}
        self._connecting: dict[int, int] = {}  # errors of those that have not opened, by number
        self._waiting: set[int] = set()  # numbers from which an echo is due
        self._ended: set[int] = set()
        self._ticking: threading.Event | None = None

    def run(self) -> None:
        """Serve until the other side hangs up."""
        while self._step(None):
            pass

    def _step(self, timeout: float | None) -> bool:
        """Wait for events and see to them; False when the one in control has gone."""
        asked = False
        for fd, events in self._poll.poll(timeout):
            if fd == self._control.fileno():
                asked = True
            elif fd in self._listening:
                with contextlib.suppress(BlockingIOError):
                    while True:
                        self._add(_Connection(self._listening[fd].accept()[0]))
            elif (conn := self._by_fd.get(fd)) is not None:
                try:
                    self._event(conn, events)
                except BlockingIOError:
                    pass
                except OSError as error:
                    self._over(conn, error.errno or errno.EIO)
        if asked:  # after the rest: a command may wait for events itself
            data = self._control.recv(1 << 16)
            if not data:
                return False
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            for line in lines:
                self._command(json.loads(line))
        return True

    def _command(self, words: dict[str, Any]) -> None:
        try:
            answer = getattr(self, words.pop("do"))(**words)
        except (OSError, LabError) as error:
            answer = {"error": str(error)}
        self._control.sendall(json.dumps(answer).encode() + b"\n")

    def _add(self, conn: _Connection, events: int = select.EPOLLIN) -> None:
        self._by_fd[conn.sock.fileno()] = conn
        self._poll.register(conn.sock.fileno(), events)

    def _over(self, conn: _Connection, status: int) -> None:
        if conn.number in self._connecting:
            self._connecting[conn.number] = status
        else:
            self._ended.add(conn.number)
        self._waiting.discard(conn.number)
        self._close(conn)

    def _close(self, conn: _Connection) -> None:
        self._by_fd.pop(conn.sock.fileno(), None)
        self._conns.pop(conn.number, None)
        conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        conn.sock.close()

    def _event(self, conn: _Connection, events: int) -> None:
        if conn.number in self._connecting:
            if status := conn.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(status, os.strerror(status))
            conn.sock.send(_HELLO.pack(conn.number, conn.kind))
            del self._connecting[conn.number]
            self._known(conn)
            return
        if not conn.kind:
            conn.came += conn.sock.recv(_HELLO.size - len(conn.came))
            if not conn.came:
                raise ConnectionResetError(errno.ECONNRESET, "closed before it said who it is")
            if len(conn.came) == _HELLO.size:
                conn.number, conn.kind = _HELLO.unpack(conn.came)
                conn.came.clear()
                self._known(conn)
            return
        if conn.kind == FULL:  # watched for its end only
            raise ConnectionResetError(errno.ECONNRESET, "ended")
        data = conn.sock.recv(4096)
        if not data:
            raise ConnectionResetError(errno.ECONNRESET, "ended")
        if conn.kind == TICK:
            now = time.monotonic()
            if conn.last:
                conn.gap = max(conn.gap, now - conn.last)
            conn.last = now
            return
        conn.came += data
        if len(conn.came) < MESSAGE:
            return
        if conn.came != _message(conn.number, conn.turn, b"up" if self._listening else b"down"):
            raise OSError(errno.EBADMSG, "not what was sent")
        conn.came.clear()
        if self._listening:
            conn.sock.send(_message(conn.number, conn.turn, b"down"))
        conn.turn += 1
        self._waiting.discard(conn.number)

    def _known(self, conn: _Connection) -> None:
        self._conns[conn.number] = conn
        self._poll.modify(conn.sock.fileno(), 0 if conn.kind == FULL else select.EPOLLIN)

    # --- commands ---

    def listen(self, ports: Sequence[int]) -> None:
        """Accept connections on these ports."""
        for port in ports:
            sock = socket.socket(socket.AF_INET6)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("", port))
            sock.listen(4096)
            sock.setblocking(False)
            self._listening[sock.fileno()] = sock
            self._poll.register(sock.fileno(), select.EPOLLIN)

    def open(
        self, addr: str, ports: Sequence[int], numbers: Sequence[int], kind: int, timeout: float
    ) -> dict[str, Any]:
        """Open connections; of those that do not, the number, the first one's error, and the longest wait for it.

        ``timeout``: seconds without one that opens, or fails, after which those under way are given up.
        """
        family = socket.AF_INET6 if ":" in addr else socket.AF_INET
        left = deque(range(*numbers))
        begun: dict[int, tuple[_Connection, float]] = {}
        slowest = 0.0
        progress, under_way = time.monotonic(), 0
        failed: list[int] = []
        while left or self._connecting:
            while left and len(self._connecting) < _AT_ONCE:
                number = left.popleft()
                conn = _Connection(socket.socket(family), number, kind)
                if kind == FULL:
                    conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL)
                begun[number] = conn, time.monotonic()
                self._connecting[number] = 0
                conn.sock.connect_ex((addr, ports[number % len(ports)]))
                self._add(conn, select.EPOLLOUT)
            under_way = len(self._connecting)
            self._step(0.1)
            if len(self._connecting) != under_way:
                progress = time.monotonic()
            late = time.monotonic() > progress + timeout
            for number in [n for n, failure in self._connecting.items() if failure or late]:
                conn, since = begun[number]
                slowest = max(slowest, time.monotonic() - since)
                if not (status := self._connecting.pop(number)):
                    status = errno.ETIMEDOUT
                    self._close(conn)
                failed.append(status)
            if failed and left:
                left.clear()  # those under way are still waited for
        return {"failed": len(failed), "status": failed[0] if failed else 0, "slowest": slowest}

    def known(self, numbers: Sequence[int], timeout: float) -> int:
        """How many of these connections are open here; waits until all are."""
        deadline = time.monotonic() + timeout
        while (count := sum(n in self._conns for n in range(*numbers))) < len(range(*numbers)):
            if time.monotonic() > deadline:
                break
            self._step(0.05)
        return count

    def check(self, numbers: Sequence[int], timeout: float) -> int:
        """Exchange a message over each of these ``ECHO`` connections; how many did."""
        due = deque(n for n in range(*numbers) if n in self._conns and self._conns[n].kind == ECHO)
        asked: set[int] = set()
        deadline = time.monotonic() + timeout
        silent: set[int] = set()
        while due or self._waiting:
            while due and len(self._waiting) < _AT_ONCE:
                if (conn := self._conns.get(due.popleft())) is not None:
                    conn.sock.send(_message(conn.number, conn.turn, b"up"))
                    self._waiting.add(conn.number)
                    asked.add(conn.number)
            if time.monotonic() > deadline:
                silent, self._waiting = self._waiting, set()
                due.clear()
                break
            self._step(0.05)
        return len(asked - silent - self._ended)

    def ended(self) -> int:
        """How many connections have ended or failed so far, and were not dropped."""
        before = -1
        while len(self._ended) > before:
            before = len(self._ended)
            self._step(0)
        return len(self._ended)

    def drop(self, numbers: Sequence[int]) -> None:
        """Reset these connections."""
        for number in range(*numbers):
            if (conn := self._conns.get(number)) is not None:
                self._close(conn)
            self._ended.discard(number)

    def fill(self, numbers: Sequence[int], size: int, timeout: float) -> int:
        """Send so many bytes over each of these ``FULL`` connections; from how many they have left.

        ``timeout``: seconds without one from which they have, after which the others are given up.
        """
        due = deque(range(*numbers))
        full: set[int] = set()  # numbers whose bytes have not all been sent yet
        stuck = 0
        deadline = time.monotonic() + timeout
        while due or full:
            while due and len(full) < _AT_ONCE:  # the guest's queue has not room for what all of them send
                number = due.popleft()
                sent = self._conns[number].sock.send(_content(number, size))
                if sent != size:
                    raise LabError(f"only {sent} of {size} bytes could be sent at once")
                full.add(number)
            left = {number for number in full if _unsent(self._conns[number].sock)}
            if len(left) < len(full):
                deadline = time.monotonic() + timeout
            elif time.monotonic() > deadline:
                stuck += len(left)
                left.clear()
            else:
                time.sleep(0.001)
            full = left
        return len(range(*numbers)) - stuck

    def read(self, numbers: Sequence[int], size: int, timeout: float) -> int:
        """Read so many bytes from each of these connections; from how many just those came that were sent.

        ``timeout``: seconds without one from which all have come.
        """
        due = deque(n for n in range(*numbers) if n in self._conns)
        missing: dict[int, bytearray] = {}
        deadline = time.monotonic() + timeout
        right = 0
        while (due or missing) and time.monotonic() < deadline:
            while due and len(missing) < _AT_ONCE:  # nor for what all of them have to say of their room
                number = due.popleft()
                self._conns[number].sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _LARGE)
                missing[number] = bytearray()
            for number, came in list(missing.items()):
                with contextlib.suppress(BlockingIOError):
                    try:
                        data = self._conns[number].sock.recv(size - len(came))
                    except ConnectionError:
                        data = b""
                    came += data
                    if not data or len(came) == size:
                        right += came == _content(number, size)
                        del missing[number]
                        deadline = time.monotonic() + timeout
            time.sleep(0.001)
        return right

    def tick(self, numbers: Sequence[int]) -> None:
        """Begin to send a byte now and then over each of these connections."""
        conns = [self._conns[number] for number in numbers]
        ending = self._ticking = threading.Event()

        def work() -> None:
            for conn in itertools.cycle(conns):
                if ending.wait(TICK_SECONDS / len(conns)):
                    return
                with contextlib.suppress(OSError):  # full while the guest stands still; the server sees what is lost
                    conn.sock.send(b".")

        threading.Thread(target=work, daemon=True).start()

    def stop(self) -> None:
        """End that."""
        if self._ticking is not None:
            self._ticking.set()

    def rewind(self) -> None:
        """Measure the silences afresh."""
        for conn in self._conns.values():
            conn.gap = conn.last = 0.0

    def gaps(self, numbers: Sequence[int], since: float, timeout: float) -> list[float]:
        """How long each of these connections was silent at most, in seconds.

        Waits until all have carried something after ``since``; -1 for one that does not, or has ended.
        """
        conns = [self._conns.get(number) for number in numbers]
        deadline = time.monotonic() + timeout
        while any(c is not None and (c.last <= since or not c.gap) for c in conns) and time.monotonic() < deadline:
            self._step(0.05)
        return [-1.0 if c is None or c.last <= since else c.gap for c in conns]


class _Process(Closing):
    """One end, as a process in ``space``."""

    def __init__(self, space: Namespace) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = space.popen(
                [sys.executable, "-m", "godwit.lab.crowd", "--control", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
            )
        self._answers = self._control.makefile("rb")

    def ask(self, do: str, *, patience: float = 60.0, **words: object) -> Any:
        """Have a command carried out; return its answer."""
        self._control.settimeout(patience)
        try:
            self._control.sendall(json.dumps({"do": do, **words}).encode() + b"\n")
            line = self._answers.readline()
        except OSError as error:
            raise LabError(f"an end of the connections does not answer {do}: {error}") from error
        if not line:
            raise LabError(f"an end of the connections is gone, asked to {do}")
        answer = json.loads(line)
        if isinstance(answer, dict) and "error" in answer:
            raise LabError(f"{do}: {answer['error']}")
        return answer

    def close(self) -> None:
        self._answers.close()
        self._control.close()
        self._process.kill()
        self._process.wait()


class RefusedError(LabError):
    """Some connections did not open.

    ``opened``: how many there are; ``at_once``: whether the guest was told within
    `AT_ONCE` seconds, and did not wait in vain; ``seconds``: the longest wait.
    """

    def __init__(self, opened: int, failed: int, status: int, seconds: float) -> None:
        self.opened = opened
        self.at_once = status != errno.ETIMEDOUT and seconds < AT_ONCE
        self.seconds = seconds
        super().__init__(f"{opened} connections are open, and {failed} more were refused: {os.strerror(status)}")


class Crowd(Closing):
    """Connections that ``guest`` opens to ``server`` at ``addr``. Numbered from 0 on in the order of their opening."""

    def __init__(self, guest: Namespace, server: Namespace, addr: str) -> None:
        self._addr = addr
        self._next = 0
        self._echoes: list[tuple[int, int, int]] = []  # first and last number, and how many of those are open
        self._tickers: list[int] = []
        self._cleanup = contextlib.ExitStack()
        try:
            self._server = self._cleanup.enter_context(_Process(server))
            self._client = self._cleanup.enter_context(_Process(guest))
            self._server.ask("listen", ports=list(PORTS))
        except BaseException:
            self.close()
            raise

    @property
    def count(self) -> int:
        """How many are open that stay idle or tick."""
        return sum(opened for _, _, opened in self._echoes) + len(self._tickers)

    def open(self, count: int, *, tickers: int = TICKERS) -> None:
        """Open idle connections, up to so many of them for ticks, evenly among them.

        :raises RefusedError: not all were opened; those that were stay.
        """
        tickers = min(tickers, count)
        parts = max(1, tickers)
        for part in range(parts):
            echoes = (count - tickers) * (part + 1) // parts - (count - tickers) * part // parts
            if echoes:
                self._echoes.append((*self._open(echoes, ECHO, PORTS), echoes))
            if tickers:
                self._tickers.append(self._open(1, TICK, PORTS)[0])

    def _open(self, count: int, kind: int, ports: Iterable[int]) -> tuple[int, int]:
        numbers = self._next, self._next + count
        self._next += count
        answer = self._client.ask(
            "open", patience=180.0, addr=self._addr, ports=list(ports), numbers=numbers, kind=kind, timeout=5.0
        )
        if answer["failed"]:
            opened = self._server.ask("known", numbers=numbers, timeout=0.5)
            if kind == ECHO:
                self._echoes.append((*numbers, opened))
            raise RefusedError(self.count, answer["failed"], answer["status"], answer["slowest"])
        if (known := self._server.ask("known", numbers=numbers, timeout=10.0)) != count:
            raise LabError(f"{count} connections are open at the guest, and {known} at the server")
        return numbers

    def check(self, most: int | None = None, timeout: float = 30.0) -> int:
        """Exchange known bytes over each idle connection, or ``most`` of them; return how many did, both ways."""
        alive = 0
        for first, end, _ in self._echoes:
            last = end if most is None else min(end, first + max(1, most // len(self._echoes)))
            alive += self._client.ask("check", patience=timeout + 30, numbers=(first, last), timeout=timeout)
        return alive

    def expect_alive(self, most: int | None = None) -> None:
        """The same, and that none has ended; :class:`LabError` if one is not well."""
        due = 0
        for _, _, opened in self._echoes:
            due += opened if most is None else min(opened, max(1, most // len(self._echoes)))
        alive = self.check(most)
        ended = self._client.ask("ended")
        if alive < due or ended:
            raise LabError(f"of {due} connections {alive} are alive; of all, {ended} have ended")

    def drop(self) -> None:
        """Reset all idle connections."""
        for end in (self._client, self._server):
            end.ask("drop", numbers=(0, self._next))
        self._echoes.clear()
        self._tickers.clear()

    def open_full(self, count: int, *, up: bool) -> Full:
        """Open connections that the guest sends over (its peer, unless ``up``) and the other end does not read."""
        numbers = self._open(count, FULL, PORTS)
        ends = self._client, self._server
        return Full(numbers, *(ends if up else reversed(ends)))

    def start_ticks(self) -> None:
        """Begin to send over some connections all the time."""
        self._used = [self._tickers[(len(self._tickers) - 1) * i // 3] for i in range(4)] if self._tickers else []
        self._used = list(dict.fromkeys(self._used))
        self._server.ask("rewind")
        if self._used:
            self._client.ask("tick", numbers=self._used)

    def gaps(self, since: float, timeout: float = 10.0) -> list[float]:
        """End that; return how long each of these connections was silent at most, in seconds.

        Each has to carry something after ``since`` (of ``time.monotonic``), or :class:`LabError`.
        """
        gaps = cast("list[float]", self._server.ask("gaps", numbers=self._used, since=since, timeout=timeout))
        self._client.ask("stop")
        if any(gap < 0 for gap in gaps):
            raise LabError(f"a connection that was in use has ended, or is silent for {timeout:g} s")
        return gaps

    def close(self) -> None:
        """End both processes. May be repeated."""
        self._cleanup.close()


class Full:
    """Connections with full queues."""

    def __init__(self, numbers: tuple[int, int], sender: _Process, reader: _Process) -> None:
        self._numbers = numbers
        self._sender = sender
        self._reader = reader
        self._size = 0

    def fill(self, size: int, timeout: float = 3.0) -> int:
        """Send so many bytes over each, once; from how many they have left, which is waited for so long."""
        self._size = size
        left = self._sender.ask("fill", patience=120.0, numbers=self._numbers, size=size, timeout=timeout)
        return cast(int, left)

    def read(self) -> int:
        """Read them, and end the connections; over how many all came, and nothing else."""
        words = {"numbers": self._numbers, "size": self._size, "timeout": 15.0}
        right = cast(int, self._reader.ask("read", patience=180.0, **words))
        for end in (self._sender, self._reader):
            end.ask("drop", numbers=self._numbers)
        return right


def main(arguments: Sequence[str] | None = None) -> int:
    """Be one end; commands over a socket."""
    parser = argparse.ArgumentParser(prog="python -m godwit.lab.crowd", description=main.__doc__)
    parser.add_argument("--control", type=int, required=True, help="the socket's descriptor")
    options = parser.parse_args(arguments)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    gone = contextlib.suppress(KeyboardInterrupt, BrokenPipeError, ConnectionResetError)
    with gone, socket.socket(fileno=options.control) as control:
        _End(control).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
