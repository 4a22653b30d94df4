# SPDX-License-Identifier: GPL-2.0-or-later
"""TCP connections of a guest's in every state that there is, to see what a migration makes of them.

A state is a class: made, it opens a connection and brings it there; ``go_on``
is called when the guest has moved and the network with it; ``finish`` uses the
connection to its end and says how it ended. Nothing waits without a limit, and
what is received is compared with what was sent::

    with Bed(scenario) as bed:
        held = [state(bed, outside) for state in STATES for outside in (False, True)]
        scenario.move()
        for connection in held:
            connection.go_on()
        ends = finish(held)

``outside`` is who opened it: the guest, or the peer, through a forwarded port.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import functools
import select
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from godwit.lab import stream
from godwit.lab.agent import Result
from godwit.lab.closing import Closing
from godwit.lab.errors import LabError
from godwit.lab.guest import EmbeddedGuest
from godwit.lab.netns import Namespace, wait_until
from godwit.lab.scenario import PORT, Scenario
from godwit.lab.traffic import Traffic, served

GUEST_PORT = PORT + 1  # the guest's, for connections from outside that are made by hand
SLOW_GUEST_PORT = PORT + 2  # where it does not answer before the move
SLOW_SERVER_PORT = PORT + 3  # where the server does not
FORWARDED = f"{PORT}-{SLOW_GUEST_PORT}"

KNOCKS = 10.0  # seconds after which no peer is told any more that its connection is gone (docs/architecture.md)
LIMIT = 20.0  # seconds in which anything that a connection is asked for must have come, or its end
RATE = 4_000_000  # bytes per second of a stream
ROOM = 20_000  # of a slow reader's receive buffer
PIECE = 100_000  # bytes of each exchange afterwards
BEHIND = 50_000  # bytes sent before a close: no more than a socket of the host's takes

_SILENCE = """
table inet silence {{
    chain in {{
        type filter hook input priority 0;
        tcp dport {} counter drop;
    }}
}}
"""


class Outcome(enum.Enum):
    """How a connection came through."""

    LIVES = "lives on"
    ENDS = "ends orderly"
    RESET = "reset"
    UNTOLD = "reset when it next sends"
    LOST = "lost"


@dataclass(frozen=True)
class End:
    """One connection's. ``lost``: bytes that were sent and never came, of a connection that was not reset.

    ``seconds``: the longest silence of a stream, or how long it took to be
    told of a reset, from when the network had been switched.
    """

    outcome: Outcome
    lost: int = 0
    seconds: float | None = None
    note: str = ""


class Bed(Closing):
    """What the connections need: listening sockets, and ports at which nobody answers until ``answer``."""

    def __init__(self, scenario: Scenario) -> None:
        assert isinstance(scenario.guest, EmbeddedGuest)
        self.scenario = scenario
        self.guest = scenario.guest.space
        self.server: Namespace = scenario.network.server
        self.family = socket.AF_INET6 if scenario.ipv6 else socket.AF_INET
        self.server_address = scenario.server_address
        self.host_address = scenario.network.a.address(scenario.ipv6)
        self._cleanup = contextlib.ExitStack()
        scenario.guest.agent.listen(PORT)
        try:
            self.slow_guest = self.listener(self.guest, SLOW_GUEST_PORT)
            self.slow_server = self.listener(self.server, SLOW_SERVER_PORT)
            self._silent = [(self.guest, SLOW_GUEST_PORT), (self.server, SLOW_SERVER_PORT)]
            for space, port in self._silent:
                space.run("nft", "-f", "-", stdin=_SILENCE.format(port))
        except BaseException:
            self.close()
            raise

    def answer(self) -> None:
        """Let be answered what was not until now. May be repeated."""
        while self._silent:
            space, _ = self._silent.pop()
            space.run("nft", "delete", "table", "inet", "silence")

    def asked(self, space: Namespace) -> bool:
        """Whether something has come to the port of that side at which nobody answers."""
        return " packets 0 " not in space.run("nft", "list", "table", "inet", "silence").stdout

    def listener(self, space: Namespace, port: int = 0, room: int = 0) -> socket.socket:
        """A listening socket; ``room``: the receive buffer of what it accepts, 0 for the usual."""
        sock = self.tcp_socket(space, room)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((self.server_address if space is self.server else "", port))
        sock.listen()
        return sock

    def tcp_socket(self, space: Namespace, room: int = 0) -> socket.socket:
        """A TCP socket, which waits for no longer than there is patience."""
        with space.enter():
            sock = self._cleanup.enter_context(socket.socket(self.family))
        sock.settimeout(LIMIT)
        if room:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
        return sock

    def connection(self, outside: bool, *, guest_room: int = 0, peer_room: int = 0) -> tuple[socket.socket, ...]:
        """An open connection: the guest's end and its peer's."""
        rooms = (guest_room, peer_room)
        spaces = (self.guest, self.server)
        if outside:
            listening = self.listener(self.guest, GUEST_PORT, guest_room)
            where, opener = (self.host_address, GUEST_PORT), 1
        else:
            listening = self.listener(self.server, 0, peer_room)
            where, opener = listening.getsockname()[:2], 0
        opening = self.tcp_socket(spaces[opener], rooms[opener])
        opening.connect(where)
        accepted = self._cleanup.enter_context(listening.accept()[0])
        accepted.settimeout(LIMIT)
        listening.close()
        return (accepted, opening) if outside else (opening, accepted)

    def close(self) -> None:
        """Close every connection. May be repeated."""
        self._cleanup.close()


class Held(ABC):
    """A connection that is held in a state while the guest moves."""

    name: ClassVar[str]
    #: What becomes of it if all goes well.
    good: ClassVar[Outcome] = Outcome.LIVES
    #: Who may have opened it.
    openers: ClassVar[tuple[bool, ...]] = (False, True)

    def __init__(self, bed: Bed, outside: bool) -> None:
        self.bed = bed
        self.outside = outside
        self._moved_at = 0.0
        self.begin()

    @abstractmethod
    def begin(self) -> None:
        """Open it and bring it into the state."""

    def about_to_move(self) -> None:  # noqa: B027, not all have to know
        """The guest is about to move."""

    def go_on(self) -> None:
        """The guest has moved, and the network has been switched."""
        self._moved_at = time.monotonic()

    @abstractmethod
    def finish(self) -> End:
        """Use it to its end. In a thread of its own; those whose ``agents`` is true share one."""

    agents: ClassVar[bool] = False


class Pair(Held):
    """One whose ends are both sockets here."""

    guest_room: ClassVar[int] = 0
    peer_room: ClassVar[int] = 0

    def begin(self) -> None:
        """Open it."""
        self.guest, self.peer = self.bed.connection(self.outside, guest_room=self.guest_room, peer_room=self.peer_room)
        self.hold()

    def hold(self) -> None:
        """Bring it into the state."""

    @abstractmethod
    def use(self) -> int:
        """Use it to its end; return how many bytes are missing. What is raised says how it ended instead."""

    def finish(self) -> End:
        """Use it; if it was reset, both ends must come to know."""
        try:
            lost = self.use()
        except WrongDataError as error:
            return End(Outcome.LOST, note=str(error))
        except TimeoutError:
            return End(Outcome.LOST, note="it hangs")
        except OSError as error:
            return self._was_reset(error)
        return End(Outcome.LOST if lost else self.good, lost)

    def _was_reset(self, error: OSError) -> End:
        for name, sock in (("guest", self.guest), ("peer", self.peer)):
            if sock.fileno() < 0:
                continue  # it was closed before the move
            try:
                _until_over(sock)
            except TimeoutError:
                return End(Outcome.LOST, note=f"reset ({error.strerror}), and the {name} does not come to know")
        return End(Outcome.RESET, seconds=time.monotonic() - self._moved_at, note=error.strerror or str(error))


QUESTION = b"what the caller asks for at once"


class WrongDataError(LabError):
    """Something arrived that was not sent."""


def _until_over(sock: socket.socket) -> None:
    """Read until there is an end of either sort; TimeoutError if there is none."""
    deadline = time.monotonic() + LIMIT
    try:
        while time.monotonic() < deadline:
            if not sock.recv(1 << 16):
                sock.send(b"?")  # an end in this direction alone is none
                time.sleep(0.05)
    except TimeoutError:
        raise
    except OSError:
        return
    raise TimeoutError


class Sender:
    """Sends the bytes of a stream, ``sent`` so far."""

    def __init__(self, sock: socket.socket, seed: int) -> None:
        self.sock = sock
        self.seed = seed
        self.sent = 0

    def send(self, count: int) -> None:
        """Send so many more."""
        end = self.sent + count
        while self.sent < end:
            self.sent += self.sock.send(stream.chunk(self.seed, self.sent, end - self.sent))

    def fill(self) -> None:
        """Send until no queue on the way takes more."""
        self.sock.setblocking(False)
        quiet = 0
        while quiet < 10:
            try:
                self.sent += self.sock.send(stream.chunk(self.seed, self.sent, 1 << 16))
                quiet = 0
            except BlockingIOError:
                quiet += 1
                time.sleep(0.02)
        self.sock.settimeout(LIMIT)


def _receive(sock: socket.socket, seed: int, count: int | None = None) -> int:
    """Receive so many bytes of a stream, or all up to its end; return how many came."""
    receiver = stream.Receiver(seed)
    while count is None or receiver.received < count:
        data = sock.recv(1 << 16 if count is None else min(1 << 16, count - receiver.received))
        if not data:
            break
        receiver.feed(data)
        if receiver.wrong_at is not None:
            raise WrongDataError(f"byte {receiver.wrong_at} is wrong")
    return receiver.received


@contextlib.contextmanager
def _meanwhile(work: Callable[[], None]) -> Iterator[None]:
    """Do ``work`` in a thread beside the block; what it raises comes out of the block."""
    raised: list[OSError] = []

    def run() -> None:
        try:
            work()
        except OSError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if raised:
        raise raised[0]


def _exchange(guest: socket.socket, peer: socket.socket) -> int:
    """Something each way, then an end each way; how much is missing."""
    missing = 0
    for sending, receiving in ((guest, peer), (peer, guest)):
        sender = Sender(sending, 11)
        with _meanwhile(functools.partial(sender.send, PIECE)):
            missing += PIECE - _receive(receiving, 11, PIECE)
    for sending, receiving in ((guest, peer), (peer, guest)):
        sending.shutdown(socket.SHUT_WR)
        if receiving.recv(1):
            raise WrongDataError("more comes than was sent")
    return missing


# ---- established


class Idle(Pair):
    """Nothing is on its way."""

    name = "established, idle"

    def hold(self) -> None:
        """It has been used."""
        self.guest.sendall(b"request")
        assert self.peer.recv(7) == b"request"
        self.peer.sendall(b"answer")
        assert self.guest.recv(6) == b"answer"

    def use(self) -> int:
        """Each way."""
        return _exchange(self.guest, self.peer)


class _Stream(Held):
    """A stream that flows all the time, between the traffic agents of guest and server."""

    agents = True
    upwards: ClassVar[bool]

    def begin(self) -> None:
        """Start it and see it flow."""
        assert isinstance(self.bed.scenario.guest, EmbeddedGuest)
        guest, server = self.bed.scenario.guest.agent, self.bed.scenario.server
        client, other = (server, guest) if self.outside else (guest, server)
        where = self.bed.host_address if self.outside else self.bed.server_address
        puts = self.upwards is not self.outside
        job = (client.put if puts else client.get)(where, PORT, 5, 0, RATE)
        ours, theirs = (client, job), (other, served(job))
        self.sender, self.receiver = (ours, theirs) if puts else (theirs, ours)
        wait_until(lambda: _bytes(self.receiver) > RATE // 20, f"a stream to flow: {self.name}")

    def about_to_move(self) -> None:
        """Measure from here."""
        agent, job = self.receiver
        agent.rewind(job)

    def finish(self) -> End:
        """See it flow on, stop it, and compare."""
        have = _bytes(self.receiver)
        with contextlib.suppress(LabError):  # what has failed does not flow, and cannot be stopped
            wait_until(lambda: self._flows_from(have) or self._over(), "it to go on", LIMIT, 0.02)
        with contextlib.suppress(LabError):
            self.sender[0].stop(self.sender[1])
        ends = []
        for agent, job in (self.sender, self.receiver):
            try:
                ends.append(agent.wait(job, LIMIT))
            except LabError:
                return End(Outcome.LOST, note="it hangs")
        sent, received = ends
        return self._judge(sent, received)

    def _flows_from(self, have: int) -> bool:
        return _bytes(self.receiver) > have + RATE // 20

    def _over(self) -> bool:
        ends = [agent.known(job) for agent, job in (self.sender, self.receiver)]
        return all(end is None or end.state != "running" for end in ends)

    def _judge(self, sent: Result, received: Result) -> End:
        if received.wrong_at is not None:
            return End(Outcome.LOST, note=f"byte {received.wrong_at} is wrong")
        if not sent.ok or not received.ok:
            return End(Outcome.RESET, note=sent.error or received.error)
        lost = sent.bytes - received.bytes
        same = sent.crc == received.crc and not lost
        return End(Outcome.LIVES if same else Outcome.LOST, lost, received.gap)


def _bytes(end: tuple[Traffic, int]) -> int:
    agent, job = end
    result = agent.known(job)
    return 0 if result is None else result.bytes


class Upload(_Stream):
    """The guest sends all the time."""

    name = "established, bulk up"
    upwards = True


class Download(_Stream):
    """The peer sends all the time."""

    name = "established, bulk down"
    upwards = False


class _Full(Pair):
    """All queues are full, since one side does not read."""

    def fill(self, sending: socket.socket, reading: socket.socket) -> None:
        """Send until nothing more is taken."""
        sending.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 17)
        self._sender, self._reading = Sender(sending, 7), reading
        self._sender.fill()

    def use(self) -> int:
        """Read it all, with more behind it, and the other direction."""

        def more() -> None:
            self._sender.send(PIECE)
            self._sender.sock.shutdown(socket.SHUT_WR)

        with _meanwhile(more):
            received = _receive(self._reading, 7)
        answer = Sender(self._reading, 8)
        with _meanwhile(lambda: answer.send(PIECE)):
            came = _receive(self._sender.sock, 8, PIECE)
        return self._sender.sent - received + PIECE - came


class PeerDoesNotRead(_Full):
    """The guest has sent more than its peer takes."""

    name = "queues full, the peer does not read"
    peer_room = ROOM

    def hold(self) -> None:
        """Fill it."""
        self.fill(self.guest, self.peer)


class GuestDoesNotRead(_Full):
    """The peer has sent more than the guest takes."""

    name = "queues full, the guest does not read"
    guest_room = ROOM

    def hold(self) -> None:
        """Fill it."""
        self.fill(self.peer, self.guest)


# ---- at their end


class _HalfClosed(Pair):
    """One side has sent its FIN, and the other goes on sending."""

    def half_close(self, ended: socket.socket, going_on: socket.socket) -> None:
        """End one direction, and see it end."""
        self._ended, self._going_on = ended, going_on
        ended.sendall(b"all")
        ended.shutdown(socket.SHUT_WR)
        assert going_on.recv(100) == b"all"
        assert going_on.recv(1) == b""

    def use(self) -> int:
        """The direction that is left, to its end."""
        sender = Sender(self._going_on, 9)

        def rest() -> None:
            sender.send(PIECE)
            self._going_on.shutdown(socket.SHUT_WR)

        with _meanwhile(rest):
            return PIECE - _receive(self._ended, 9)


class GuestHasEnded(_HalfClosed):
    """FIN_WAIT2 at the guest."""

    name = "the guest has sent FIN"

    def hold(self) -> None:
        """The guest ends its direction."""
        self.half_close(self.guest, self.peer)


class PeerHasEnded(_HalfClosed):
    """CLOSE_WAIT at the guest."""

    name = "the peer has sent FIN"

    def hold(self) -> None:
        """The peer ends its direction."""
        self.half_close(self.peer, self.guest)


class LastWordsToPeer(Pair):
    """Both have closed, the guest is done with it, and the peer does not read yet: LAST_ACK on the host."""

    name = "both FINs, data to the peer still queued"
    good = Outcome.ENDS
    peer_room = ROOM

    def hold(self) -> None:
        """The peer ends, the guest sends and closes."""
        self.peer.shutdown(socket.SHUT_WR)
        assert self.guest.recv(1) == b""
        ends = self.guest.getsockname()[1]
        Sender(self.guest, 3).send(BEHIND)
        self.guest.close()
        wait_until(lambda: not _sockets(self.bed.guest, f"sport = :{ends}", self.peer), "the guest to be done with it")

    def use(self) -> int:
        """All of it arrives, and the end."""
        return BEHIND - _receive(self.peer, 3)


class LastWordsToGuest(Pair):
    """Both have closed, the peer is done with it, and the guest does not read yet: what is queued is on the host."""

    name = "both FINs, data to the guest still queued"
    good = Outcome.ENDS
    guest_room = ROOM

    def hold(self) -> None:
        """The guest ends, the peer sends and closes."""
        self.guest.sendall(b"request")
        self.guest.shutdown(socket.SHUT_WR)
        assert self.peer.recv(100) == b"request"
        assert self.peer.recv(1) == b""
        ends = self.peer.getsockname()[1]
        Sender(self.peer, 4).send(BEHIND)
        self.peer.close()
        wait_until(lambda: not _sockets(self.bed.server, f"sport = :{ends}", self.guest), "the peer to be done with it")

    def use(self) -> int:
        """All of it arrives, and the end."""
        return BEHIND - _receive(self.guest, 4)


def _sockets(space: Namespace, where: str, other: socket.socket) -> str:
    """The sockets of a connection that are at ``where`` and not at their end, as ss says them."""
    there = other.getsockname()[1]
    said = space.run("ss", "-Htn", "state", "all", "exclude", "time-wait", "exclude", "listening", where).stdout
    return "\n".join(line for line in said.splitlines() if f":{there} " in f"{line} ")


class _TimeWait(Held):
    """Both have closed, and nothing is queued; who closed first waits for what may still come."""

    good = Outcome.ENDS
    first: ClassVar[int]  # who closed first: 0 the guest, 1 the peer

    def begin(self) -> None:
        """Open and close one; again, if a late segment was answered with a reset, which ends the wait."""
        for _ in range(3):
            with contextlib.suppress(LabError):
                self._open_and_close()
                return
        raise LabError("no socket stays in TIME_WAIT")

    def _open_and_close(self) -> None:
        ends = self.bed.connection(self.outside)
        self._space = (self.bed.guest, self.bed.server)[self.first]
        waiting, other = ends[self.first], ends[1 - self.first]
        self.guest_port, self.peer_name = ends[0].getsockname()[1], ends[1].getsockname()[:2]
        self._sport, self._dport = waiting.getsockname()[1], waiting.getpeername()[1]
        waiting.shutdown(socket.SHUT_WR)
        assert other.recv(1) == b""
        other.close()
        assert waiting.recv(1) == b""
        waiting.close()
        wait_until(self._waits, "a socket to be in TIME_WAIT", 3.0)

    def _waits(self) -> bool:
        where = ("sport", f":{self._sport}", "dport", f":{self._dport}")
        return bool(self._space.run("ss", "-Htn", "state", "time-wait", *where).stdout)

    def finish(self) -> End:
        """No late reset has ended it."""
        if not self._waits():
            return End(Outcome.LOST, note="a reset has ended it")
        return End(self.good)


class GuestWaits(_TimeWait):
    """The guest closed first."""

    name = "TIME_WAIT at the guest"
    first = 0


class PeerWaits(_TimeWait):
    """The peer closed first."""

    name = "TIME_WAIT at the peer"
    first = 1

    def finish(self) -> End:
        """The guest opens another from the same port, too."""
        end = super().finish()
        if self.outside or end.outcome is not self.good:
            return end
        try:
            with self.bed.tcp_socket(self.bed.server) as listening, self.bed.tcp_socket(self.bed.guest) as guest:
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listening.bind(self.peer_name)
                listening.listen()
                guest.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                guest.bind(("", self.guest_port))
                guest.connect(self.peer_name)
                peer, _ = listening.accept()
                with peer:
                    peer.settimeout(LIMIT)
                    missing = _exchange(guest, peer)
        except (OSError, WrongDataError) as error:
            return End(Outcome.LOST, note=f"the next connection from its port: {error}")
        return End(Outcome.LOST if missing else self.good, missing)


# ---- at their beginning


class OpeningFromGuest(Held):
    """SYN_SENT: the peer does not answer before the move."""

    name = "in handshake from the guest"
    openers = (False,)

    def begin(self) -> None:
        """Connect, and see the host's socket try."""
        host = self.bed.scenario.network.hosts[self.bed.scenario.where]
        self.guest = self.bed.tcp_socket(self.bed.guest)
        self.guest.setblocking(False)
        status = self.guest.connect_ex((self.bed.server_address, SLOW_SERVER_PORT))
        assert status == errno.EINPROGRESS, status
        wait_until(
            lambda: bool(host.run("ss", "-Htn", "state", "syn-sent", f"dport = :{SLOW_SERVER_PORT}").stdout),
            "the host to try",
        )

    def go_on(self) -> None:
        """The peer answers from here on."""
        super().go_on()
        self.bed.answer()

    def finish(self) -> End:
        """connect() ends, well or with an error, and no end is left alone."""
        left = self._moved_at + LIMIT - time.monotonic()
        _, ready, _ = select.select([], [self.guest], [], max(0.0, left))
        if not ready:
            return End(Outcome.LOST, note="connect() hangs")
        took = time.monotonic() - self._moved_at
        if status := self.guest.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            return End(Outcome.RESET, seconds=took, note=_strerror(status))
        self.guest.settimeout(LIMIT)
        try:
            peer, _ = self.bed.slow_server.accept()
            with peer:
                peer.settimeout(LIMIT)
                lost = _exchange(self.guest, peer)
        except WrongDataError as error:
            return End(Outcome.LOST, note=str(error))
        except OSError as error:
            return End(Outcome.LOST, note=f"open, and then: {error}")
        return End(Outcome.LOST if lost else Outcome.LIVES, lost)


class OpeningFromOutside(Held):
    """The host has answered its peer, which has asked something; the guest does not answer before the move."""

    name = "in handshake from outside"
    openers = (True,)

    def begin(self) -> None:
        """Connect; the guest has been asked when its filter has seen it."""
        self.peer = self.bed.tcp_socket(self.bed.server)
        self.peer.connect((self.bed.host_address, SLOW_GUEST_PORT))
        self.peer.sendall(QUESTION)
        wait_until(lambda: self.bed.asked(self.bed.guest), "the guest to be asked")

    def go_on(self) -> None:
        """The guest answers from here on."""
        super().go_on()
        self.bed.answer()

    def finish(self) -> End:
        """The guest accepts it, or the peer is told that there is nothing."""
        left = self._moved_at + KNOCKS - time.monotonic()
        ready, _, _ = select.select([self.bed.slow_guest, self.peer], [], [], max(0.0, left))
        if self.bed.slow_guest in ready:
            return self._accepted()
        took = time.monotonic() - self._moved_at
        try:
            if not ready:
                self.peer.send(b"?")
            said = self.peer.recv(1)
        except TimeoutError:
            return End(Outcome.LOST, note="the peer is not told")
        except OSError as error:
            return End(Outcome.RESET if ready else Outcome.UNTOLD, seconds=took, note=error.strerror or str(error))
        return End(Outcome.LOST, note=f"the peer is told {said!r}")

    def _accepted(self) -> End:
        guest, _ = self.bed.slow_guest.accept()
        with guest:
            guest.settimeout(LIMIT)
            try:
                lost = len(QUESTION) - len(guest.recv(len(QUESTION), socket.MSG_WAITALL))
                lost += _exchange(guest, self.peer)
            except WrongDataError as error:
                return End(Outcome.LOST, note=str(error))
            except OSError as error:
                return End(Outcome.LOST, note=f"open, and then: {error}")
        return End(Outcome.LOST if lost else Outcome.LIVES, lost)


class OpenedAfterwards(Pair):
    """No state, but the proof that there is life after the move: a new connection."""

    name = "opened after the move"

    def begin(self) -> None:
        """Nothing yet."""

    def use(self) -> int:
        """Open it, and each way."""
        self.guest = self.peer = self.bed.tcp_socket(self.bed.guest)
        self.guest, self.peer = self.bed.connection(self.outside)
        return _exchange(self.guest, self.peer)


def finish(held: Sequence[Held]) -> list[End]:
    """Use all to their end, at one time: none waits for another that hangs."""
    ends: dict[Held, End] = {}

    def work(group: Sequence[Held]) -> None:
        for one in group:
            try:
                ends[one] = one.finish()
            except Exception as error:  # for the one who asked, and not for the thread
                ends[one] = End(Outcome.LOST, note=f"{type(error).__name__}: {error}")

    groups = [[one] for one in held if not one.agents] + [[one for one in held if one.agents]]
    threads = [threading.Thread(target=work, args=(group,)) for group in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [ends[one] for one in held]


def _strerror(number: int) -> str:
    return OSError(number, errno.errorcode.get(number, "?")).strerror or ""


STATES: tuple[type[Held], ...] = (
    Idle,
    Upload,
    Download,
    PeerDoesNotRead,
    GuestDoesNotRead,
    GuestHasEnded,
    PeerHasEnded,
    LastWordsToPeer,
    LastWordsToGuest,
    GuestWaits,
    PeerWaits,
    OpeningFromGuest,
    OpeningFromOutside,
    OpenedAfterwards,
)
