# SPDX-License-Identifier: GPL-2.0-or-later
"""Those who use a guest's network all the time, each a thread, and say what went wrong.

What may go wrong is in a `Grace`, which whoever disturbs the network keeps up to date: connections of an earlier
*life* of the guest's may be reset, and handshakes may be refused while something goes on that costs them. Anything
else is a failure: a byte that is wrong, a reset out of time, and whoever waits for longer than ``LIMIT``.

    grace = Grace()
    churn = Churn(network.server, network.a.addr4, grace)
    with grace.handshakes():
        scenario.move()
    assert churn.end() == []
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import select
import socket
import struct
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

from godwit.lab import stream
from godwit.lab.errors import LabError
from godwit.lab.netns import Namespace

LIMIT = 20.0  # seconds that a connection may keep anybody waiting
SLICE = 1.0  # seconds of waiting after which it is seen whether there is anything to wait for
PORT = 5001  # where the agents of the laboratory listen
NUDGE = b"?"
AF = {4: socket.AF_INET, 6: socket.AF_INET6}


def version_of(addr: str) -> int:
    """The IP version of an address."""
    return 6 if ":" in addr else 4


def _end(sock: socket.socket) -> None:
    """Say that nothing more will be sent; `ConnectionError` if the connection is gone."""
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError as error:
        raise ConnectionResetError(f"{error}") from error


class Grace:
    """What connections may suffer just now.

    ``life`` counts the guest's: connections that were opened in an earlier one may be gone.
    """

    def __init__(self) -> None:
        self.life = 0
        self._ending = 0
        self._under_way = 0
        self._ended = float("-inf")

    def is_over(self, life: int) -> bool:
        """Whether what was opened in this life may be gone."""
        return self._ending > 0 or life < self.life

    @contextlib.contextmanager
    def lives(self) -> Iterator[None]:
        """For the length of the block, connections may be lost: also those that are opened in it."""
        self._ending += 1
        try:
            yield
        finally:
            self.life += 1
            self._ending -= 1

    @contextlib.contextmanager
    def handshakes(self) -> Iterator[None]:
        """For the length of the block, connections may be refused, or reset before their first answer."""
        self._under_way += 1
        try:
            yield
        finally:
            self._ended = time.monotonic()
            self._under_way -= 1

    def may_refuse(self, began: float) -> bool:
        """Whether a handshake that began then (``time.monotonic``) may be refused by now."""
        return self._under_way > 0 or self._ended >= began


class User:
    """A thread that does something again and again until it is ended.

    ``failures`` say what was wrong; ``done`` counts what went well, ``refused`` the handshakes, and ``reset`` the
    connections, that were lost and could be.
    """

    def __init__(self, grace: Grace | None = None) -> None:
        self.failures: list[str] = []
        self.done = self.refused = self.reset = 0
        self.grace = grace or Grace()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _once(self) -> None:
        raise NotImplementedError

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self._once()
            except Exception as error:  # of any sort: it is told at the end
                self.failures.append(f"{self}: {type(error).__name__}: {error}")
                self._ended.wait(0.2)

    def pause(self, seconds: float) -> None:
        """Do nothing for so long, or until the end."""
        self._ended.wait(seconds)

    def stop(self) -> None:
        """Have it end when it has done what it is at."""
        self._ended.set()

    def end(self) -> list[str]:
        """End it, and return what was wrong."""
        self.stop()
        self._thread.join(LIMIT + 5)
        if self._thread.is_alive():
            self.failures.append(f"{self} hangs")
        else:
            self.close()
        return self.failures

    def close(self) -> None:
        """Let go of what it has."""


def end_all(users: Sequence[User]) -> list[str]:
    """End them, all at the same time, and return what was wrong."""
    for user in users:
        user.stop()
    return [failure for user in users for failure in user.end()]


class Asking:
    """A connection whose other end gives back what it gets (``echo`` of the traffic agents)."""

    def __init__(self, space: Namespace, addr: str, grace: Grace) -> None:
        self._grace = grace
        self.life = grace.life
        with space.enter():
            self._sock = socket.socket(AF[version_of(addr)])
        try:
            self._sock.settimeout(LIMIT)
            self._sock.connect((addr, PORT))
            self._sock.sendall(b"echo 900000\n")
        except BaseException:
            self._sock.close()
            raise

    @property
    def may_be_gone(self) -> bool:
        """Whether it is of an earlier life."""
        return self._grace.is_over(self.life)

    def ask(self, question: bytes) -> None:
        """Send this and see it come back.

        Whoever only waits cannot be told that the connection is gone: so one that may be is sent something more.

        :raises ConnectionError: the connection is gone.
        :raises TimeoutError: nothing for ``LIMIT`` seconds.
        :raises LabError: something else came back.
        """
        self._sock.sendall(question)
        deadline = time.monotonic() + LIMIT
        answer = b""
        self._sock.settimeout(SLICE)
        while len(answer) < len(question):
            try:
                data = self._sock.recv(1 << 16)
            except TimeoutError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"nothing for {LIMIT:g} s") from None
                if self.may_be_gone:
                    self._sock.send(NUDGE)
                    question += NUDGE
                continue
            if not data:
                raise ConnectionResetError("it has ended")
            answer += data
        if answer != question:
            raise LabError(f"{answer[:100]!r} came back for {question[:100]!r}")

    def finish(self) -> None:
        """End it from here, and see it end there; raises as :meth:`ask` does."""
        self._sock.settimeout(LIMIT)
        _end(self._sock)
        if self._sock.recv(1):
            raise LabError("more comes back than was sent")

    def close(self) -> None:
        """Close it. May be repeated."""
        self._sock.close()


class _Client(User):
    """Opens connections in ``space`` to an agent at ``addr``.

    One that gets neither an answer nor a reset in its handshake is in ``untold``.
    """

    def __init__(self, space: Namespace, addr: str, grace: Grace) -> None:
        self.untold: list[str] = []
        self.opened = 0
        self._where = (space, addr)
        self._step = ""
        super().__init__(grace)

    def __str__(self) -> str:
        return f"{type(self).__name__.lower()} from {self._where[0].name} to {self._where[1]}, {self._step}"

    def _open(self) -> Asking | None:
        """A connection that has had its first answer; None if it was refused and could be."""
        began = time.monotonic()
        connection = None
        self._step = "connecting"
        try:
            connection = Asking(*self._where, self.grace)
            self._step = "asking for the first time"
            connection.ask(b"the first")
        except OSError as error:
            if connection is not None:
                connection.close()
            if isinstance(error, TimeoutError):
                self.untold.append(f"{self}: nothing for {LIMIT:g} s")
            elif self.grace.may_refuse(began):
                self.refused += 1
                self.pause(0.02)
            else:
                raise
            return None
        self.opened += 1
        return connection

    @contextlib.contextmanager
    def _lost_if_it_may(self, connection: Asking) -> Iterator[None]:
        """Take note of a connection that is lost in the block and may be."""
        try:
            yield
        except ConnectionError:
            if not connection.may_be_gone:
                raise
            self.reset += 1


class Churn(_Client):
    """Opens connections, uses each for a moment, and closes it. From the first answer on it has to live."""

    def __init__(self, space: Namespace, addr: str, grace: Grace) -> None:
        self._pauses = itertools.cycle((0.0, 0.02, 0.1, 0.4))
        super().__init__(space, addr, grace)

    def _once(self) -> None:
        connection = self._open()
        if connection is None:
            return
        with contextlib.closing(connection), self._lost_if_it_may(connection):
            self.pause(next(self._pauses))
            self._step = "asking once more"
            connection.ask(b"another one")
            self._step = "at its end"
            connection.finish()
            self.done += 1


class Exchange(_Client):
    """Asks over one connection for as long as it lives, which is until its life is over.

    ``latencies``: seconds from question to answer. ``bytes``: of answers, compared.
    """

    SIZES: ClassVar = (1, 64, 700, 1460, 3000, 20000)
    PAUSE: ClassVar = 0.02

    def __init__(self, space: Namespace, addr: str, grace: Grace) -> None:
        self._connection: Asking | None = None
        self.latencies = array("d")
        self.bytes = 0
        super().__init__(space, addr, grace)

    def _once(self) -> None:
        if self._connection is None:
            self._connection = self._open()
            if self._connection is None:
                return
        connection = self._connection
        self._step = "asking"
        good = self.done
        try:
            with self._lost_if_it_may(connection):
                began = time.monotonic()
                question = os.urandom(random.choice(self.SIZES))
                connection.ask(question)
                self.latencies.append(time.monotonic() - began)
                self.bytes += len(question)
                self.done += 1
        finally:
            if self.done == good:
                self.close()
        self.pause(self.PAUSE)

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Pair:
    """A connection with both ends in hand: what one sends of a known stream is what the other one takes."""

    def __init__(self, space: Namespace, addr: str, listening: socket.socket, grace: Grace) -> None:
        self._grace = grace
        self.life = grace.life
        self._seed = random.getrandbits(16)
        self.sent = 0
        self._came = stream.Receiver(self._seed)
        self._ends = contextlib.ExitStack()
        with space.enter():
            self.near = self._ends.enter_context(socket.socket(AF[version_of(addr)]))
        try:
            self.near.settimeout(LIMIT)
            self.near.connect((addr, listening.getsockname()[1]))
            token = os.urandom(8)
            self.near.sendall(token)
            self.far = self._accept(listening, token)
        except BaseException:
            self.close()
            raise

    def _accept(self, listening: socket.socket, token: bytes) -> socket.socket:
        """Take the other end, after those of connections that were given up."""
        while True:
            ready = select.select([self.near, listening], [], [], LIMIT)[0]
            if not ready:
                raise TimeoutError(f"not accepted for {LIMIT:g} s")
            if self.near in ready and not self.near.recv(1, socket.MSG_PEEK):
                raise ConnectionResetError("it has ended")
            if listening in ready:
                far, _ = listening.accept()
                far.settimeout(LIMIT)
                with contextlib.suppress(OSError):
                    if far.recv(len(token), socket.MSG_WAITALL) == token:
                        return self._ends.enter_context(far)
                far.close()

    @property
    def may_be_gone(self) -> bool:
        """Whether it is of an earlier life."""
        return self._grace.is_over(self.life)

    @property
    def received(self) -> int:
        """Bytes that have come, all as they were sent."""
        return self._came.received

    def send(self, count: int, *, wait: bool = True) -> None:
        """Send so many more bytes from the far end; without ``wait`` as many of them as there is room for."""
        data = stream.chunk(self._seed, self.sent, count)
        self.far.settimeout(LIMIT if wait else 0.0)
        if wait:
            self.far.sendall(data)
            self.sent += len(data)
        else:
            with contextlib.suppress(BlockingIOError):
                self.sent += self.far.send(data)

    def receive(self, most: int) -> bool:
        """Take what has come to the near end, or will; whether there was anything, and not the end.

        :raises TimeoutError: nothing for ``LIMIT`` seconds.
        """
        deadline = time.monotonic() + LIMIT
        self.near.settimeout(SLICE)
        while True:
            try:
                data = self.near.recv(most)
            except TimeoutError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"nothing for {LIMIT:g} s, byte {self.received} of {self.sent}") from None
                if self.may_be_gone:
                    self.send(1)
                continue
            self._came.feed(data)
            if self._came.wrong_at is not None:
                raise LabError(f"byte {self._came.wrong_at} is wrong")
            return bool(data)

    def catch_up(self) -> None:
        """Take all that was sent."""
        while self.received < self.sent:
            if not self.receive(1 << 16):
                raise ConnectionResetError(f"ended after {self.received} of {self.sent} bytes")

    def finish(self) -> None:
        """End it from the far end, and see that the near one has got everything, and the end."""
        _end(self.far)
        self.catch_up()
        if self.receive(1):
            raise LabError("more has come than was sent")

    def close(self) -> None:
        """Close both ends."""
        self._ends.close()


def slow_reader(pair: Pair, pause: Callable[[float], None]) -> None:
    """Send as fast as it goes, read a little now and then."""
    pair.send(1 << 16, wait=False)
    pair.receive(random.choice((1, 500, 4000)))
    pause(random.uniform(0.0, 0.2))


def trickle(pair: Pair, pause: Callable[[float], None]) -> None:
    """Send a few bytes at a time."""
    pair.send(random.choice((1, 1, 1, 7)))
    pair.catch_up()
    pause(random.uniform(0.0, 0.4))


def half_closed(pair: Pair, pause: Callable[[float], None]) -> None:
    """Say that nothing more is sent from the near end, and receive there for a long time."""
    if not pair.sent:
        _end(pair.near)
        if pair.far.recv(1):
            raise LabError("more has come than was sent")
    trickle(pair, pause)


class Odd(User):
    """Connections of an odd kind, one after the other, each for some seconds: ``step`` is done over and over.

    From ``space`` to ``addr``, which leads to ``port`` in ``other``.
    """

    SECONDS: ClassVar = (1.0, 6.0)

    def __init__(
        self,
        step: Callable[[Pair, Callable[[float], None]], None],
        space: Namespace,
        addr: str,
        other: Namespace,
        port: int,
        grace: Grace,
    ) -> None:
        self._step = step
        self._where = (space, addr)
        self.bytes = 0
        with other.enter():
            self._listening = socket.create_server(
                ("::", port), family=socket.AF_INET6, backlog=64, dualstack_ipv6=True
            )
        self._listening.settimeout(LIMIT)
        super().__init__(grace)

    def __str__(self) -> str:
        return f"{self._step.__name__} from {self._where[0].name} to {self._where[1]}"

    def _once(self) -> None:
        began = time.monotonic()
        try:
            pair = Pair(*self._where, self._listening, self.grace)
        except OSError:
            if not self.grace.may_refuse(began):
                raise
            self.refused += 1
            self.pause(0.1)
            return
        until = began + random.uniform(*self.SECONDS)
        with contextlib.closing(pair):
            try:
                while time.monotonic() < until and not self._ended.is_set():
                    self._step(pair, self.pause)
                    self.done += 1
                pair.finish()
            except ConnectionError:
                if not pair.may_be_gone:
                    raise
                self.reset += 1
            self.bytes += pair.received

    def close(self) -> None:
        """Close what listens."""
        self._listening.close()


class Datagrams(User):
    """Asks with datagrams of all sizes, from ``space``, whoever answers at ``addr``; one socket for ``QUESTIONS``.

    ``asked`` counts the questions, ``done`` the answers: a datagram may be lost.
    """

    SIZES: ClassVar = (16, 200, 1472, 1473, 4000, 9000)
    QUESTIONS: ClassVar = 50

    def __init__(self, space: Namespace, addr: str, grace: Grace | None = None, port: int = PORT) -> None:
        self.asked = 0
        self._space = space
        self._where = (addr, port)
        self._sock = self._open()
        super().__init__(grace)

    def __str__(self) -> str:
        return f"datagrams from {self._space.name} to {self._where[0]}"

    def _open(self) -> socket.socket:
        with self._space.enter():
            sock = socket.socket(AF[version_of(self._where[0])], socket.SOCK_DGRAM)
        sock.settimeout(0.2)
        return sock

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    def _once(self) -> None:
        size = random.choice(self.SIZES)
        question = self.asked.to_bytes(8, "big") + random.randbytes(size - 8)
        self.asked += 1
        if not self.asked % self.QUESTIONS:
            self.close()
            self._sock = self._open()
        try:
            self._sock.sendto(question, self._where)
            while (answer := self._sock.recv(1 << 16))[:8] != question[:8]:
                pass  # the answer to an earlier one
        except OSError:  # no answer, or nothing leads there at the moment
            self.pause(0.02)
            return
        if answer != question:
            raise LabError(f"the answer of {len(answer)} bytes is not the question of {len(question)}")
        self.done += 1
        self.pause(0.01)


class Answers(User):
    """Gives each datagram that comes to ``port`` in ``space`` back, over both IPv4 and IPv6."""

    def __str__(self) -> str:
        return f"answers from {self._space.name}"

    def __init__(self, space: Namespace, port: int = PORT) -> None:
        self._space = space
        self._socks = []
        for family in AF.values():
            with space.enter():
                sock = socket.socket(family, socket.SOCK_DGRAM)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(("", port))
            sock.setblocking(False)
            self._socks.append(sock)
        super().__init__()

    def close(self) -> None:
        """Close the sockets."""
        for sock in self._socks:
            sock.close()

    def _once(self) -> None:
        for sock in select.select(self._socks, [], [], 0.2)[0]:
            with contextlib.suppress(OSError):  # refused, or nothing leads there at the moment
                data, where = sock.recvfrom(1 << 16)
                sock.sendto(data, where)
                self.done += 1


class Pings(User):
    """Pings ``addr`` from ``space``."""

    def __init__(self, space: Namespace, addr: str) -> None:
        self.asked = 0
        self._where = (space, addr)
        self._request, self._reply, protocol = {
            4: (8, 0, socket.IPPROTO_ICMP),
            6: (128, 129, socket.IPPROTO_ICMPV6),
        }[version_of(addr)]
        with space.enter():
            self._sock = socket.socket(AF[version_of(addr)], socket.SOCK_DGRAM, protocol)
        self._sock.settimeout(0.5)
        super().__init__()

    def __str__(self) -> str:
        return f"ping from {self._where[0].name} to {self._where[1]}"

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    def _once(self) -> None:
        self.asked += 1
        body = random.randbytes(random.choice((8, 56, 1400)))
        number = struct.pack("!H", self.asked & 0xFFFF)
        try:
            self._sock.sendto(struct.pack("!BxHxx", self._request, 0) + number + body, (self._where[1], 0))
            while (answer := self._sock.recv(1 << 16))[6:8] != number:
                pass  # the answer to an earlier one
        except OSError:
            self.pause(0.05)
            return
        if answer[0] != self._reply or answer[8:] != body:
            raise LabError("the answer to a ping is not what was sent")
        self.done += 1
        self.pause(0.05)


class Leases(User):
    """Asks for the guest's lease by DHCP over and over (RFC 2131): ``addr`` it is to be."""

    PAUSE: ClassVar = 0.3
    _COOKIE: ClassVar = bytes((99, 130, 83, 99))

    def __init__(self, space: Namespace, mac: str, addr: str) -> None:
        self._mac = bytes.fromhex(mac.replace(":", ""))
        self._addr = socket.inet_aton(addr)
        with space.enter():
            self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
        self._sock.bind(("", 68))
        self._sock.settimeout(0.5)
        super().__init__()

    def __str__(self) -> str:
        return "DHCP"

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    def _once(self) -> None:
        xid = os.urandom(4)
        # BOOTREQUEST over Ethernet, the answer by broadcast; options 53 (3: DHCPREQUEST) and 50, and the end.
        head = struct.pack("!BBBx4sHH16x16s192x4s", 1, 1, 6, xid, 0, 0x8000, self._mac, self._COOKIE)
        try:
            self._sock.sendto(head + b"\x35\1\3" + b"\x32\4" + self._addr + b"\xff", ("255.255.255.255", 67))
            while (answer := self._sock.recv(1 << 16))[4:8] != xid:
                pass  # the answer to an earlier one
        except OSError:
            return
        if answer[16:20] != self._addr or answer[240:243] != b"\x35\1\5":
            raise LabError(f"no lease of the guest's address: {answer[16:20].hex()}, {answer[240:243].hex()}")
        self.done += 1
        self.pause(self.PAUSE)
