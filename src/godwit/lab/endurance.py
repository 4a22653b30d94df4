# SPDX-License-Identifier: GPL-2.0-or-later
"""One guest moves there and back, many times in a row, under load: nothing is lost, and nothing grows.

``python -m godwit.lab.endurance --moves 200`` (``make endurance``). Streams each
way, idle connections that are asked for an echo after each move, connections
that are opened, used and closed all along, and datagrams. The two back-ends are
the same processes from the beginning to the end. Ends with status 1 if a byte
or a connection is lost, or a back-end has more memory or descriptors in the
end than after the first moves.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from godwit.lab.errors import LabError
from godwit.lab.guest import EmbeddedGuest
from godwit.lab.netns import Namespace, enter_user_namespace, wait_until
from godwit.lab.scenario import PORT, Load, Scenario, qemu_guest

WARM = 20  # moves after which nothing is to grow any more
REST = 11.0  # seconds after which sockets of what has moved away are closed
RATE = 3_000_000  # bytes per second of each stream
IDLE = 10
CHURNS = 3  # that open and close connections at one time, from either side
LIMIT = 20.0  # seconds that a connection may keep anybody waiting
MORE_MEMORY = 4 << 20  # bytes: of what Python and the C library keep to themselves
MORE_DESCRIPTORS = 4


@dataclass(frozen=True)
class Size:
    """What a process has: bytes of its own memory, open descriptors."""

    memory: int
    descriptors: int

    @classmethod
    def of(cls, pid: int) -> Size:
        """Of a process, now. The guest's memory, which is shared, does not count."""
        with open(f"/proc/{pid}/status") as status:
            memory = next(int(line.split()[1]) for line in status if line.startswith("RssAnon:")) * 1024
        return cls(memory, len(os.listdir(f"/proc/{pid}/fd")))

    def __str__(self) -> str:
        return f"{self.memory / 1024:.0f} KiB, {self.descriptors} descriptors"


class _Worker:
    """A thread that does something again and again until it is ended; ``failures`` say what was wrong."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.failures: list[str] = []
        self._ended = threading.Event()
        self._work = work
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self._work()
            except Exception as error:  # of any sort: it is told at the end
                self.failures.append(f"{self}: {type(error).__name__}: {error}")
                self._ended.wait(0.2)

    def end(self) -> list[str]:
        """End it, and return what was wrong."""
        self._ended.set()
        self._thread.join(LIMIT + 5)
        if self._thread.is_alive():
            self.failures.append(f"{self} hangs")
        else:
            self.close()
        return self.failures

    def close(self) -> None:
        """Let go of what it has."""


class Churn(_Worker):
    """Opens connections in ``space``, uses them for a moment, and closes them.

    One that is reset before its first answer was in its handshake; it counts as ``refused``
    and is no failure. One that gets neither an answer nor a reset is in ``untold``. From the
    first answer on it has to live.
    """

    def __init__(self, space: Namespace, addr: str) -> None:
        self.opened = self.refused = 0
        self.untold: list[str] = []
        self._where = (space, addr)
        self._step = ""
        self._pauses = itertools.cycle((0.0, 0.02, 0.1, 0.4))
        super().__init__(self._once)

    def __str__(self) -> str:
        return f"a connection from {self._where[0].name}, {self._step}"

    def _once(self) -> None:
        space, addr = self._where
        with space.enter():
            sock = socket.socket(socket.AF_INET6 if ":" in addr else socket.AF_INET)
        with sock:
            sock.settimeout(LIMIT)
            try:
                self._step = "connecting"
                sock.connect((addr, PORT))
                sock.sendall(b"echo 900000\n")
                self._ask(sock, b"the first")
            except ConnectionError:
                self.refused += 1
                time.sleep(0.02)
                return
            except TimeoutError:
                self.untold.append(f"{self}: nothing for {LIMIT:g} s")
                return
            self.opened += 1
            time.sleep(next(self._pauses))
            self._ask(sock, b"another one")
            self._step = "at its end"
            sock.shutdown(socket.SHUT_WR)
            if sock.recv(1):
                raise LabError("more comes back than was sent")

    def _ask(self, sock: socket.socket, question: bytes) -> None:
        self._step = f"asking {question.decode()}"
        sock.sendall(question)
        answer = b""
        while len(answer) < len(question):
            data = sock.recv(100)
            if not data:
                raise ConnectionResetError("it has ended")
            answer += data
        if answer != question:
            raise LabError(f"{answer!r} came back for {question!r}")


class Datagrams(_Worker):
    """Asks the guest from outside, through a forwarded port, over and over."""

    def __str__(self) -> str:
        return "datagrams"

    def __init__(self, space: Namespace, addr: str) -> None:
        self.asked = self.answered = 0
        with space.enter():
            self._sock = socket.socket(socket.AF_INET6 if ":" in addr else socket.AF_INET, socket.SOCK_DGRAM)
        self._sock.settimeout(0.2)
        self._where = (addr, PORT)
        super().__init__(self._once)

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    def _once(self) -> None:
        question = f"question {self.asked}".encode()
        self.asked += 1
        self._sock.sendto(question, self._where)
        try:
            while self._sock.recv(100) != question:
                pass  # the answer to an earlier one
        except (TimeoutError, ConnectionRefusedError):
            return  # a datagram may be lost while the network is switched
        self.answered += 1
        time.sleep(0.01)


class Answers(_Worker):
    """Gives each datagram back, in an embedded guest."""

    def __str__(self) -> str:
        return "the guest's answers"

    def __init__(self, space: Namespace, ipv6: bool) -> None:
        with space.enter():
            self._sock = socket.socket(socket.AF_INET6 if ipv6 else socket.AF_INET, socket.SOCK_DGRAM)
        self._sock.bind(("", PORT))
        self._sock.settimeout(0.2)
        super().__init__(self._once)

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    def _once(self) -> None:
        with contextlib.suppress(TimeoutError, ConnectionRefusedError):
            data, where = self._sock.recvfrom(1000)
            self._sock.sendto(data, where)


@dataclass
class Report:
    """What came of it; times in seconds."""

    moves: int = 0
    seconds: float = 0.0
    downtimes: list[float] = field(default_factory=list)
    blackouts: list[float] = field(default_factory=list)
    bytes: int = 0
    opened: int = 0
    refused: int = 0
    asked: int = 0
    answered: int = 0
    sizes: dict[str, list[Size]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    untold: list[str] = field(default_factory=list)
    """Connections that were in their handshake at a migration, and nobody told their peer that they are gone."""

    def __str__(self) -> str:
        still, silence = self.downtimes, self.blackouts
        lines = [
            f"{self.moves} migrations in {self.seconds:.0f} s",
            f"the guest stood still: median {_ms(statistics.median(still))}, longest {_ms(max(still))}",
            f"silence of a stream: median {_ms(statistics.median(silence))}, longest {_ms(max(silence))}",
            f"{self.bytes / 1e6:.0f} MB in long streams, compared byte by byte",
            f"{self.opened} connections opened and closed meanwhile, {self.refused} refused while in handshake",
            f"{self.asked} datagrams asked, {self.answered} answered",
        ]
        for name, sizes in self.sizes.items():
            said = " -> ".join(map(str, sizes))
            lines.append(f"back-end {name}: {said}")
        return "\n".join([*lines, *(f"FAILED: {failure}" for failure in (*self.failures, *self.untold))])


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"


class Journey:
    """The guest, its connections, and what has come of them so far in ``report``."""

    def __init__(self, scenario: Scenario, say: Callable[[str], None]) -> None:
        self.scenario = scenario
        self.report = Report(sizes={name: [] for name in scenario.backends})
        self._say = say
        self._there = there = scenario.network.a.address(scenario.ipv6)
        guest = scenario.guest
        guest.agent.listen(PORT)
        if isinstance(guest, EmbeddedGuest):
            self._answering = Answers(guest.space, scenario.ipv6)
        else:
            guest.agent.serve_datagrams(PORT)
        self._loads = [scenario.start_load(idle=IDLE, rate=RATE)]
        if isinstance(guest, EmbeddedGuest):
            self._loads.append(Load(guest.agent, scenario.server, there, idle=IDLE, rate=RATE))
        self._outside = scenario.server.echo(there, PORT, IDLE)
        self._began = time.monotonic()

    def go(self, moves: int) -> None:
        """Move so many times, with everything that goes on meanwhile."""
        scenario, report = self.scenario, self.report
        churns = [Churn(scenario.network.server, self._there) for _ in range(CHURNS)]
        if isinstance(scenario.guest, EmbeddedGuest):
            churns += [Churn(scenario.guest.space, scenario.server_address) for _ in range(CHURNS)]
        datagrams = Datagrams(scenario.network.server, self._there)
        try:
            for _ in range(moves):
                self._move(datagrams)
        finally:
            for worker in (*churns, datagrams):
                report.failures += worker.end()
            report.untold += [said for churn in churns for said in churn.untold]
            report.opened += sum(churn.opened for churn in churns)
            report.refused += sum(churn.refused for churn in churns)
            report.asked += datagrams.asked
            report.answered += datagrams.answered

    def _move(self, datagrams: Datagrams) -> None:
        report = self.report
        number = report.moves + 1
        move = self.scenario.move(switch_delay=0.2 if number % 5 == 0 else None)
        answered = datagrams.answered
        report.moves = number
        report.downtimes.append(move.downtime)
        report.blackouts += move.blackout.values()
        for load in self._loads:
            load.wait_alive()
            if said := load.check_idle():
                raise LabError(f"after {number} moves: {said}")
        if (echoes := self.scenario.server.check(self._outside)).alive != IDLE:
            raise LabError(f"after {number} moves, connections from outside: {echoes}")
        wait_until(lambda: datagrams.answered > answered, "datagrams to be answered", LIMIT)
        if number % 10 == 0:
            sizes = ", ".join(f"{n}: {Size.of(b.pid)}" for n, b in self.scenario.backends.items())
            self._say(f"{time.monotonic() - self._began:7.0f} s  {number} moves  {sizes}")

    def look(self, rest: float) -> None:
        """See how large the back-ends are, after a rest."""
        time.sleep(rest)
        for name, backend in self.scenario.backends.items():
            self.report.sizes[name].append(Size.of(backend.pid))

    def end(self) -> None:
        """End the streams, and compare."""
        report = self.report
        report.seconds = time.monotonic() - self._began
        for load in self._loads:
            for outcome in load.finish():
                report.bytes += outcome.received
                if not outcome.ok:
                    report.failures.append(f"{outcome}")
        if isinstance(self.scenario.guest, EmbeddedGuest):
            report.failures += self._answering.end()
            self.scenario.guest.check()
        report.failures += growth(report.sizes)


def run(
    moves: int,
    *,
    warm: int = WARM,
    rest: float = REST,
    qemu: bool = False,
    ipv6: bool = False,
    arguments: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Move ``moves`` times, ``warm`` of them before the first look; ``arguments`` are for ``godwit serve``.

    :raises LabError: a migration failed, or a connection has ended.
    """
    options = ["--tcp-ports", str(PORT), "--udp-ports", str(PORT), *arguments]
    with Scenario(godwit_arguments=options, ipv6=ipv6, make_guest=qemu_guest if qemu else None) as scenario:
        journey = Journey(scenario, say)
        for count in (warm, moves - warm):
            journey.go(count)
            journey.look(rest)
        journey.end()
    return journey.report


def growth(sizes: dict[str, list[Size]]) -> list[str]:
    """What has grown from the first look to the last."""
    found = []
    for name, (first, *_, last) in sizes.items():
        if last.memory > first.memory + MORE_MEMORY:
            found.append(f"back-end {name} has grown from {first.memory} to {last.memory} bytes")
        if last.descriptors > first.descriptors + MORE_DESCRIPTORS:
            found.append(f"back-end {name} has {last.descriptors} descriptors open, and had {first.descriptors}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(prog="python -m godwit.lab.endurance", description=__doc__)
    parser.add_argument(
        "--moves", type=int, default=200, metavar="N", help=f"how often: even, and more than {WARM} (%(default)s)"
    )
    parser.add_argument("--qemu", action="store_true", help="a QEMU guest, not an embedded one")
    parser.add_argument("--ipv6", action="store_true", help="over IPv6")
    parser.add_argument("argument", nargs="*", help="more options for godwit serve")
    options = parser.parse_args(arguments)
    if options.moves <= WARM or options.moves % 2:
        parser.error(f"--moves is even, so that the guest is where it was, and more than {WARM}, to see what grows")

    def say(text: str) -> None:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    try:
        enter_user_namespace()
        report = run(options.moves, qemu=options.qemu, ipv6=options.ipv6, arguments=options.argument, say=say)
    except LabError as error:
        say(f"FAILED: {error}")
        return 1
    say(str(report))
    return 1 if report.failures or report.untold else 0


if __name__ == "__main__":
    sys.exit(main())
