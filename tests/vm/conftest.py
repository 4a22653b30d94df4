# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU guests behind godwit and passt: the network, the guest, and its traffic."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import pytest

from godwit.lab import image, netns, overlay, peer, qemu
from godwit.lab.backend import Backend
from godwit.lab.netns import HOST4, HOST6, Network
from godwit.lab.qemu import Attempt, QemuGuest, Report
from godwit.lab.transfer import Peer

pytest.register_assert_rewrite(f"{__package__}.online")

INBOUND = 7000  # the port that is forwarded to the guest
FAMILIES = ("IPv4", "IPv6")
# Enough to keep every queue busy, and to leave the machine's two processors some air.
RATE = 4_000_000

FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep in mind which tests failed: their fixtures then show the logs."""
    report = yield
    if report.failed:
        item.stash[FAILED] = True
    return report


@pytest.fixture(scope="session", autouse=True)
def _tools() -> None:
    """Fail here, with what to do, where something that all these tests need is missing."""
    netns.require()
    qemu.version()
    image.build()
    peer.fetch()
    overlay.fetch()


class Traffic:
    """Open connections of a guest: per family a stream each way and idle ones; from inside and from outside."""

    def __init__(
        self,
        world: World,
        *,
        families: Sequence[str] = FAMILIES,
        idle: int = 3,
        inbound: bool = False,
        rate: int = RATE,
    ) -> None:
        self.agent = world.guest.agent
        self.peer = world.peer
        self.streams: list[int] = []  # jobs of the guest's
        self.from_outside: list[int] = []  # jobs of the peer's
        self.echoes: list[tuple[int, int]] = []  # job, connections
        self.echoes_from_outside: list[tuple[int, int]] = []
        for number, family in enumerate(families):
            server = world.net.server.address(family == "IPv6")
            self.streams.append(self.agent.get(server, self.peer.port, 11 + number, rate=rate))
            self.streams.append(self.agent.put(server, self.peer.port, 21 + number, rate=rate))
            if idle:
                self.echoes.append((self.agent.echo(server, self.peer.port, idle), idle))
        if inbound:
            self.agent.listen(INBOUND)
            for number, family in enumerate(families):
                guest = HOST6 if family == "IPv6" else HOST4
                self.from_outside.append(self.peer.put(guest, INBOUND, 31 + number, rate=rate // 4))
                self.echoes_from_outside.append((self.peer.echo(guest, INBOUND, 1), 1))
        self.flowing()

    def flowing(self, more: int = 200_000, timeout: float = 30.0) -> None:
        """See that each stream carries ``more`` bytes from now on, and that the idle connections answer."""
        jobs = [*self.streams, *self.from_outside]
        goals = {job: (found.bytes if (found := self.peer.find(job)) else 0) + more for job in jobs}
        deadline = time.monotonic() + timeout
        for job, goal in goals.items():
            seen = self.peer.reached(job, goal, max(0.1, deadline - time.monotonic()))
            assert seen.state == "running", f"job {job} ended: {seen}"
        for job, count in self.echoes:
            answers = self.agent.check(job, timeout)
            assert (answers.alive, answers.failed) == (count, 0), f"job {job}: {answers}"
        for job, count in self.echoes_from_outside:
            assert self.peer.check(job, timeout) == count, f"idle connections from outside, job {job}"

    def finish(self, timeout: float = 60.0) -> None:
        """End the streams in good order: every byte has to have come, on both sides' account."""
        self.flowing(timeout=timeout)
        for job in self.streams:
            seen = self.peer.find(job)
            assert seen is not None
            if seen.kind == "send":
                self.peer.stop(job)
            else:
                self.agent.stop(job)
        for job in self.from_outside:
            self.peer.stop(job)
        for job in self.streams:
            at_guest, at_peer = self.agent.wait(job, timeout), self.peer.wait(job, timeout)
            assert at_guest.ok, f"job {job}: {at_guest}"
            assert at_peer.state == "ok", f"job {job}: {at_peer}"
            assert (at_guest.bytes, at_guest.crc) == (at_peer.bytes, at_peer.crc)
            assert at_guest.bytes > 0
        for job in self.from_outside:
            at_peer = self.peer.wait(job, timeout)
            assert at_peer.state == "ok", f"job {job}: {at_peer}"

    def all_reset(self, timeout: float = 10.0) -> None:
        """See that every connection has ended with an error within ``timeout``, and none hangs."""
        deadline = time.monotonic() + timeout
        for job in self.streams:
            at_guest = self.agent.wait(job, max(0.1, deadline - time.monotonic()))
            assert not at_guest.ok, f"job {job}: {at_guest}"
        for job, count in self.echoes:
            # A reset may have come before the question, or comes as its answer.
            answers = self.agent.check(job, max(0.1, deadline - time.monotonic()))
            assert (answers.alive, answers.failed) == (0, count), f"job {job}: {answers}"


def stream_netdev(path: str) -> list[str]:
    """QEMU's words for a net device whose frames go over a socket, without vhost-user."""
    return ["-netdev", f"stream,id=n0,server=off,addr.type=unix,addr.path={path}"]


class World:
    """The two hosts, the server, and one guest that is ``here``, behind ``source``."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.backends: list[Backend] = []
        self._cleanup = contextlib.ExitStack()
        self.net = self._cleanup.enter_context(Network())
        self.peer = self._cleanup.enter_context(Peer(self.net.server))
        self.here = "a"

    def backend(
        self,
        host: str,
        kind: str = "godwit",
        *,
        helper: str | None = "own",
        arguments: Sequence[str] = (),
        stream: bool = False,
    ) -> Backend:
        """Start a back-end on a host. Both kinds forward ``INBOUND`` to the guest."""
        arguments = ["-t", str(INBOUND), *arguments]
        backend = Backend(self.net.hosts[host], self.folder, kind, helper=helper, arguments=arguments, stream=stream)
        self._cleanup.callback(backend.close)
        self.backends.append(backend)
        return backend

    def boot(
        self,
        kind: str = "godwit",
        *,
        helper: str | None = "own",
        arguments: Sequence[str] = (),
        stream: bool = False,
    ) -> QemuGuest:
        """Boot the guest on host a, up to where its network is configured; with ``stream``, one that cannot move."""
        self.source = self.backend("a", kind, helper=helper, arguments=arguments, stream=stream)
        netdev = stream_netdev(self.source.socket) if stream else self.source.socket
        self.guest = self._cleanup.enter_context(QemuGuest(netdev))
        self.guest.wait_network()
        return self.guest

    def target(
        self, kind: str = "godwit", *, helper: str | None = "own", arguments: Sequence[str] = ()
    ) -> tuple[Backend, str]:
        """Return a back-end on the host where the guest is not, and that host's name.

        One that is still there from an attempt that failed has to take the next one.
        """
        there = self.net.other(self.here)
        standby = self.backends[-1]
        if standby is self.source or not standby.running:
            standby = self.backend(there, kind, helper=helper, arguments=arguments)
        standby.ensure_helper()
        return standby, there

    def attempt(self, target: Backend, *, paused: bool = False) -> Attempt:
        """Begin a migration, up to pre-switchover."""
        self.source.ensure_helper()
        attempt = self.guest.attempt(target.socket, paused=paused)
        attempt.begin()
        return attempt

    def moved(self, target: Backend, there: str) -> None:
        """After a migration: switch the network, end the source."""
        self.net.switch(there)
        self.guest.retire()
        # It would stay for its late packets, which the switch has turned away already.
        self.source.close(timeout=0.3)
        self.source, self.here = target, there

    def move(
        self,
        kind: str = "godwit",
        *,
        delay: float = 0.0,
        cut: bool = False,
        helper: str | None = "own",
        arguments: Sequence[str] = (),
    ) -> Report:
        """Migrate to a new back-end on the other host; the network switches ``delay`` seconds after that.

        ``cut`` disconnects the source before it saves its state: passt loses what
        arrives between that and the switch.
        """
        target, there = self.target(kind, helper=helper, arguments=arguments)
        attempt = self.attempt(target)
        if cut:
            self.net.switch(None)
        attempt.go_on()
        report = attempt.finish()
        time.sleep(delay)
        self.moved(target, there)
        return report

    def close(self, show: bool) -> None:
        """End everything; ``show`` the logs."""
        if show:
            for backend in self.backends:
                sys.stderr.write(f"--- {backend.name}\n{backend.messages()[-8000:]}\n")
            if hasattr(self, "guest"):
                for log in sorted(Path(self.guest.folder).iterdir()):
                    if log.suffix in (".log", ".console"):
                        sys.stderr.write(f"--- {log.name}\n{log.read_text(errors='replace')[-4000:]}\n")
        self._cleanup.close()


@pytest.fixture
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    """Give a test hosts, a server, and a guest once it calls ``boot``."""
    made = World(tmp_path)
    yield made
    made.close(show=request.node.stash.get(FAILED, False))
