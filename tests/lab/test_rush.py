# SPDX-License-Identifier: GPL-2.0-or-later
"""A crowd at a forwarded port: the guest's connections and the control thread go on, and all is as before afterwards.

By hand, with as many as there is time for: ``python -m tests.lab.test_rush 1000000``.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import resource
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from godwit.lab.netns import GATEWAY4, Namespace, wait_until
from godwit.lab.rush import Rushed, rush_command

from .moves import receive_exactly
from .shim import SLOW, Shim
from .watching import cpu_seconds, descriptors, dropped, resident
from .world import SERVER, World, connect, tcp

PORT = 7000
LIMIT = 4000  # descriptors
SOURCES = [f"192.0.2.{number}" for number in range(100, 200)]


@contextlib.contextmanager
def crowded(descriptors: int = LIMIT) -> Iterator[World]:
    """A guest with a forwarded port, behind a back-end with few descriptors, and a server with many addresses."""
    wrapper = ["prlimit", f"--nofile={descriptors}:{descriptors}"]
    with World("-t", str(PORT), "--stats", "1", wrapper=wrapper) as world:
        world.server.ip(*(f"addr add {source}/24 dev eth0" for source in SOURCES))
        yield world


class Service(threading.Thread):
    """Takes connections in the guest and lets go of them when the other side does; with ``keep`` all of them stay."""

    def __init__(self, world: World, *, keep: bool = False) -> None:
        super().__init__()
        self._listening = tcp(world.guest, 4, "", PORT)
        self._listening.listen(4096)
        self._keep = keep
        self._ended = False
        self.kept: list[socket.socket] = []
        self.taken = 0
        self.start()

    def run(self) -> None:
        self._listening.settimeout(0.2)
        while not self._ended:
            try:
                sock, _ = self._listening.accept()
            except TimeoutError:
                continue
            self.taken += 1
            if self._keep:
                self.kept.append(sock)
            else:
                sock.close()

    def close(self) -> None:
        self._ended = True
        self.join()
        self._listening.close()
        for sock in self.kept:
            sock.close()


class Watch(threading.Thread):
    """Uses an established connection of the guest's, opens new ones, and asks for an address, over and over."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world
        self._ended = False
        self.echoes: list[float] = []
        self.opens: list[float] = []
        self.answers: list[float] = []
        self._listening = tcp(world.server, 4, SERVER[4], 5001)
        self._ours = connect(world.guest, SERVER[4], 5001)
        self._peer, _ = self._listening.accept()
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            while not self._ended:
                self._look()
                time.sleep(0.05)
        except Exception as error:
            self.error = error

    def _look(self) -> None:
        began = time.monotonic()
        self._ours.settimeout(10.0)
        self._ours.sendall(b"question")
        assert self._peer.recv(100) == b"question"
        self._peer.sendall(b"answer")
        assert self._ours.recv(100) == b"answer"
        self.echoes.append(time.monotonic() - began)
        began = time.monotonic()
        with connect(self._world.guest, SERVER[4], 5001, 10.0), self._listening.accept()[0]:
            pass
        self.opens.append(time.monotonic() - began)
        self.answers.append(arp(self._world.guest))

    def close(self) -> None:
        self._ended = True
        self.join()
        for sock in (self._ours, self._peer, self._listening):
            sock.close()
        if self.error is not None:
            raise self.error


def arp(space: Namespace) -> float:
    """How long it takes to learn from the control thread who has the gateway's address, asked every second."""
    with space.enter(), socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0806)) as sock:
        sock.bind(("eth0", 0x0806))
        own = sock.getsockname()[4]
        ask = b"\xff" * 6 + own + b"\x08\x06\0\1\x08\0\6\4\0\1" + own + socket.inet_aton("192.0.2.10")
        sock.settimeout(1.0)
        began = time.monotonic()
        for _ in range(10):
            sock.send((ask + bytes(6) + socket.inet_aton(GATEWAY4)).ljust(60, b"\0"))
            with contextlib.suppress(TimeoutError):
                while sock.recv(100)[20:22] != b"\0\2":
                    pass
                return time.monotonic() - began
    raise AssertionError("nobody says who has the gateway's address")


def rush(world: World, count: int, *, hold: float = 0.0, flood: bool = False) -> Rushed:
    command = rush_command(world.net.a.addr4, PORT, SOURCES, count, hold=hold, flood=flood)
    return Rushed.read(world.server.popen(command, stdout=subprocess.PIPE))


def settled(world: World, before: int) -> None:
    wait_until(lambda: descriptors(world.backend.pid) <= before, "the flows to be released", 20.0)


def test_connections_that_come_and_go() -> None:
    with crowded() as world, contextlib.ExitStack() as stack:
        pid = world.backend.pid
        before = descriptors(pid)
        service = Service(world)
        stack.callback(service.close)
        with contextlib.closing(Watch(world)) as watch:
            made = rush(world, 5_000)
            assert made.opened > 4_900, made
            assert made.silent == 0, made
        assert max(watch.echoes) < 2.0, watch.echoes
        assert max(watch.answers) < 2.0, watch.answers
        settled(world, before)
        grown = resident(pid)
        assert rush(world, 5_000).silent == 0
        settled(world, before)
        assert resident(pid) - grown < 2 << 20


def test_connections_that_stay() -> None:
    """More than there are descriptors: the guest has its own all the same, and those that are too many are reset."""
    with crowded(800) as world, contextlib.ExitStack() as stack:
        before = descriptors(world.backend.pid)
        service = Service(world, keep=True)
        stack.callback(service.close)
        with contextlib.closing(Watch(world)) as watch:
            made = rush(world, 1_500, hold=1.0)
            assert made.refused + made.ended > 700, made
        assert max(watch.opens) < 2.0, watch.opens
        assert len(service.kept) < 800
        settled(world, before)
        wait_until(lambda: dropped(world.messages()).get("table_full", 0) > 700, "the drops to be counted")


def test_calls_that_nobody_means() -> None:
    """A flood of SYNs, which the kernel answers."""
    with crowded() as world:
        before = descriptors(world.backend.pid)
        with contextlib.closing(Watch(world)) as watch:
            rush(world, 5_000, flood=True)
        assert max(watch.echoes) < 2.0, watch.echoes
        settled(world, before)
        service = Service(world)
        try:
            assert rush(world, 10).opened == 10
        finally:
            service.close()


class Trickled(NamedTuple):
    """What a trickle has cost: bytes that came, in how many seconds, and the back-end's processor time."""

    bytes: int
    seconds: float
    cpu: float


def trickle(world: World, service: Service, count: int, rounds: int) -> Trickled:
    """Have so many peers send one byte each, again and again; each byte has to come."""
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(connect(world.server, world.net.a.addr4, PORT)) for _ in range(count)]
        for peer in peers:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        wait_until(lambda: len(service.kept) == count, "the guest to take all", 30.0)
        began, cpu = time.monotonic(), cpu_seconds(world.backend.pid)
        for number in range(rounds):
            for peer in peers:
                peer.send(b"%c" % (number % 256))
        expected = bytes(number % 256 for number in range(rounds))
        for sock in service.kept:
            sock.settimeout(30.0)
            came = b""
            while len(came) < rounds and (piece := sock.recv(rounds)):
                came += piece
            assert came == expected
        return Trickled(count * rounds, time.monotonic() - began, cpu_seconds(world.backend.pid) - cpu)


@pytest.mark.parametrize(("count", "rounds", "most"), [(250, 20, 500e-6), (10, 20_000, 50e-6)])
def test_a_trickle_on_many_connections(count: int, rounds: int, most: float) -> None:
    """A byte costs what a packet costs, however many they are; other connections are not the slower for it.

    Nor where many wait that the kernel does not join: they take 100 us each then, if all are looked through each time.
    """
    with crowded() as world, contextlib.closing(Service(world, keep=True)) as service:
        with contextlib.closing(Watch(world)) as watch:
            made = trickle(world, service, count, rounds)
        assert watch.error is None, repr(watch.error)
        assert made.cpu / made.bytes < most, made
        assert max(watch.echoes) < 2.0, watch.echoes


def test_a_wait_for_the_processor_is_no_trickle(tmp_path: Path) -> None:
    """Looks that take long, and cost nothing: the guest's window is made use of all the same."""
    shim = Shim(tmp_path, SLOW)
    shim.put(0, 2_000_000)
    data = random.randbytes(1 << 18)
    with (
        World("-t", str(PORT), wrapper=shim.wrapper) as world,
        tcp(world.guest, 4, "", PORT) as listening,
        connect(world.server, world.net.a.addr4, PORT) as peer,
        listening.accept()[0] as sock,
    ):
        sender = threading.Thread(target=peer.sendall, args=(data,))
        sender.start()
        assert receive_exactly(sock, len(data)) == data
        sender.join()
    assert 0 < shim.get(1) < len(data) >> 12, shim.get(1)


def tell(name: str, times: list[float]) -> None:
    """Say how long something took."""
    sys.stdout.write(f"  {name}: median {1000 * statistics.median(times):.1f} ms, most {1000 * max(times):.0f} ms\n")


def main() -> None:
    """Say what a rush costs: of connections that come and go, that stay, and of bare SYNs."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab.test_rush", description=main.__doc__)
    parser.add_argument("connections", nargs="?", type=int, default=100_000, help="that come and go (100000)")
    count = parser.parse_args().connections
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    say = sys.stdout.write
    with crowded(20_000) as world, contextlib.closing(Service(world)) as service:
        pid = world.backend.pid
        rush(world, 20_000)
        time.sleep(1)
        before, memory, cpu = descriptors(pid), resident(pid), cpu_seconds(pid)
        with contextlib.closing(Watch(world)) as watch:
            made = rush(world, count)
        say(f"come and go: {made}, {made.opened / made.seconds:.0f}/s; the guest has taken {service.taken}\n")
        say(f"  the back-end's processor time: {cpu_seconds(pid) - cpu:.1f} s\n")
        for name, times in (("an echo", watch.echoes), ("an open", watch.opens), ("ARP", watch.answers)):
            tell(name, times)
        settled(world, before)
        say(f"  descriptors {before} -> {descriptors(pid)}, memory {memory >> 10} -> {resident(pid) >> 10} KiB\n")
        with contextlib.closing(Watch(world)) as watch:
            made = rush(world, count, flood=True)
        say(f"bare SYNs: {count / made.seconds:.0f}/s, an echo: most {1000 * max(watch.echoes):.0f} ms\n")
        settled(world, before)
    for number in (10, 4_000):
        with crowded(20_000) as world, contextlib.closing(Service(world, keep=True)) as service:
            with contextlib.closing(Watch(world)) as watch:
                slow = trickle(world, service, number, 200_000 // number)
            say(f"{number} that trickle: {slow}, {1e6 * slow.cpu / slow.bytes:.1f} us of processor time for a byte\n")
            tell("an echo", watch.echoes)
    with crowded(20_000) as world, contextlib.closing(Service(world, keep=True)) as service:
        with contextlib.closing(Watch(world)) as watch:
            made = rush(world, 19_900, hold=5.0)
        say(f"held: {made}; the guest has {len(service.kept)}, an open: most {1000 * max(watch.opens):.0f} ms\n")


if __name__ == "__main__":
    main()
