# SPDX-License-Identifier: GPL-2.0-or-later
"""Everything put together: hosts, back-ends, a guest, and traffic while it moves.

Two hosts that are one address have a back-end with its repair helper each; a
guest, embedded or a QEMU machine, is behind the one on host ``a``; a server on
the network is the other end of its connections::

    with Scenario() as scenario:
        load = scenario.start_load()
        scenario.move()
        scenario.move()
        assert all(outcome.ok for outcome in load.finish())
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from godwit.lab.agent import Agent, Result
from godwit.lab.backend import Backend
from godwit.lab.closing import Closing
from godwit.lab.errors import LabError
from godwit.lab.guest import EmbeddedGuest
from godwit.lab.netns import Network, wait_until
from godwit.lab.qemu import QemuGuest
from godwit.lab.traffic import Traffic, served
from godwit.vhost_user import VhostUserError

PORT = 5001


class Downtime(Protocol):
    """What is said of a migration, whoever did it."""

    @property
    def downtime(self) -> float:
        """How long the guest stood still, in seconds."""


class Guest(Protocol):
    """What a scenario asks of a guest."""

    @property
    def agent(self) -> Agent:
        """Its traffic agent."""

    def migrate(self, backend: str, *, retire: bool = True, before_run: Callable[[], None] | None = None) -> Downtime:
        """Move to behind the back-end at ``backend``; leave the old one at once if ``retire``.

        ``before_run`` is called while the guest stands still.
        """

    def retire(self) -> None:
        """Leave the back-end that it came from, which lingers until then."""

    def close(self) -> None:
        """End it."""


@dataclass(frozen=True)
class Move:
    """One migration. ``blackout``: the longest silence on a stream that the server saw, in seconds."""

    source: str
    target: str
    downtime: float
    state_bytes: int | None  # None where QEMU keeps them to itself
    blackout: dict[str, float]


@dataclass(frozen=True)
class Outcome:
    """How a connection (or a number of idle ones) ended, at both of its ends."""

    name: str
    sent: int
    sent_crc: int
    received: int
    received_crc: int
    error: str

    @property
    def ok(self) -> bool:
        """Whether every byte arrived unchanged, or every idle connection is alive."""
        return not self.error


class Load:
    """A download, an upload, and idle connections that are asked for an echo now and then.

    ``progress`` may be called from another thread than the rest.
    """

    def __init__(self, server: Traffic, agent: Agent, addr: str, *, idle: int, rate: int) -> None:
        self._server = server
        self._agent = agent
        self._lock = threading.Lock()
        self.idle = idle
        self._echo = agent.echo(addr, PORT, idle)
        self._jobs = {
            "download": agent.get(addr, PORT, 1, 0, rate),
            "upload": agent.put(addr, PORT, 2, 0, rate),
        }
        wait_until(lambda: all(r is not None and r.bytes for r in self.progress().values()), "both streams to flow")

    def progress(self) -> dict[str, Result | None]:
        """Return how the streams stand, as the server sees them."""
        with self._lock:
            return {name: self._server.known(served(job)) for name, job in self._jobs.items()}

    def check_idle(self, timeout: float = 10.0) -> str:
        """Use the idle connections; return what is wrong, or nothing."""
        echoes = self._agent.check(self._echo, timeout)
        if echoes.alive == self.idle:
            return ""
        return f"{echoes.alive} of {self.idle} alive, {echoes.failed} broken, {echoes.silent} silent"

    def rewind(self) -> None:
        """Measure the longest silences afresh."""
        with self._lock:
            for job in self._jobs.values():
                self._server.rewind(served(job))

    def gaps(self) -> dict[str, float]:
        """Return the longest silence of each stream since the last ``rewind``, as the server saw it."""
        return {name: result.gap for name, result in self.progress().items() if result is not None}

    def wait_alive(self, timeout: float = 30.0) -> None:
        """Wait until both streams have moved on from where they are; :class:`LabError` if not."""
        before = self.progress()

        def moved() -> bool:
            now = self.progress()
            for name, result in now.items():
                if result is None or result.state != "running":
                    raise LabError(f"the {name} has ended: {result}")
            return all(
                result is not None and was is not None and result.bytes > was.bytes
                for result, was in zip(now.values(), before.values(), strict=True)
            )

        wait_until(moved, "both streams to go on", timeout, 0.02)

    def give_up(self, guest: Agent, timeout: float, *, gone: bool = False) -> Iterator[tuple[int, bool]]:
        """Close the streams, which may have ended; for each, the bytes that came, all right, and whether it had.

        Whoever sends, or is on a host, has been told or gets on; who only receives in the ``guest`` cannot be told.
        ``gone``: the guest is no more, nor is its agent.

        :raises LabError: an end has neither ended nor gets on, or a byte is wrong.
        """
        down, up = self._jobs["download"], self._jobs["upload"]
        for name, sender, receiver in (
            ("download", (self._server, served(down)), (self._agent, down)),
            ("upload", (self._agent, up), (self._server, served(up))),
        ):
            there = [end for end in (sender, receiver) if not (gone and end[0] is guest)]
            ended = [_ends_or_goes_on(*end, name, timeout) for end in there if end[0] is not guest or end is sender]
            last = receiver[0].status(receiver[1]) if receiver in there else None
            if last is not None and last.wrong_at is not None:
                raise LabError(f"{name}: byte {last.wrong_at} is wrong")
            for agent, job in there:
                agent.drop(job)
            yield 0 if last is None else last.bytes, any(ended)
        if not (gone and self._agent is guest):
            self._agent.drop(self._echo)

    def finish(self, timeout: float = 60.0) -> list[Outcome]:
        """End the streams, and compare both ends of everything."""
        down, up = self._jobs["download"], self._jobs["upload"]
        outcomes = []
        with self._lock:
            # A stream that has failed cannot be stopped: that is what is found out next.
            with contextlib.suppress(LabError):
                self._server.stop(served(down))
            with contextlib.suppress(LabError):
                self._agent.stop(up)
            here = {job: _ended(self._agent, job, timeout) for job in (down, up)}
            there = {job: _ended(self._server, served(job), timeout) for job in (down, up)}
        for name, job, sender, receiver in (("download", down, there, here), ("upload", up, here, there)):
            outcomes.append(_compare(name, sender[job], receiver[job]))
        outcomes.append(Outcome(f"idle ({self.idle})", 0, 0, 0, 0, self.check_idle()))
        return outcomes


def _ends_or_goes_on(agent: Agent, job: int, name: str, timeout: float) -> bool:
    """Wait until a stream's end has ended (true) or has got on (false)."""
    before, now = agent.status(job), None

    def either() -> bool:
        nonlocal now
        now = agent.status(job)
        return now.state != "running" or now.bytes > before.bytes

    wait_until(either, f"an end of the {name} to be told or to go on", timeout, 0.02)
    return now is not None and now.state != "running"


def _ended(agent: Agent, job: int, timeout: float) -> Result:
    try:
        return agent.wait(job, timeout)
    except LabError as error:
        with contextlib.suppress(LabError):
            now = agent.status(job)
            return Result("failed", now.bytes, now.crc, now.wrong_at, now.gap, f"it hangs: {error}")
        return Result("failed", 0, 0, None, 0.0, str(error))


def _compare(name: str, sender: Result, receiver: Result) -> Outcome:
    errors = []
    if receiver.wrong_at is not None:
        errors.append(f"byte {receiver.wrong_at} is wrong")
    if sender.bytes != receiver.bytes or sender.crc != receiver.crc:
        errors.append("the ends differ")
    errors += [f"{who}: {end.error}" for who, end in (("sender", sender), ("receiver", receiver)) if not end.ok]
    return Outcome(name, sender.bytes, sender.crc, receiver.bytes, receiver.crc, "; ".join(errors))


class Scenario(Closing):
    """See the module.

    ``backends``: the program on host ``a`` and the one on ``b`` (``godwit`` or
    ``passt``); ``helpers``: whose repair helper each of them has (``own``, the
    other program's name, or None). ``arguments``: more options for either program,
    ``godwit_arguments`` for ``godwit serve``. ``descriptors``: how many each back-end may have open;
    may be changed for the next one. ``breakpoints``, ``levels``: see :class:`Backend`.
    ``make_guest`` makes another guest than an
    embedded one, from the socket of its back-end. ``step`` is told what is done.
    ``folder`` has the back-ends' sockets and logs.
    """

    def __init__(
        self,
        *,
        backends: tuple[str, str] = ("godwit", "godwit"),
        helpers: tuple[str | None, str | None] = ("own", "own"),
        arguments: Sequence[str] = (),
        godwit_arguments: Sequence[str] = (),
        descriptors: int | None = None,
        breakpoints: str | None = None,
        levels: bool = False,
        make_guest: Callable[[str], Guest] | None = None,
        mtu: int = 1500,
        ipv6: bool = False,
        step: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.ipv6 = ipv6
        self.where = "a"
        self.load: Load | None = None
        self._step = step
        self._kinds = dict(zip("ab", backends, strict=True))
        self._helpers = dict(zip("ab", helpers, strict=True))
        if not _nobody_exists():
            godwit_arguments = ["--runas", "0", *godwit_arguments]
        self._arguments = {"godwit": (*arguments, *godwit_arguments), "passt": tuple(arguments)}
        self.descriptors = descriptors
        self._breakpoints = breakpoints
        self._levels = levels
        self._mtu = mtu
        self._cleanup = contextlib.ExitStack()
        self.backends: dict[str, Backend] = {}
        try:
            self.folder = self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="godwit-lab."))
            os.chmod(self.folder, 0o755)  # back-ends drop root, and look for their sockets still
            step("building the network: host a, host b (the same address), server")
            self.network = self._cleanup.enter_context(Network(mtu=mtu))
            self.server = self._cleanup.enter_context(Traffic(self.network.server))
            self.server.listen(PORT)
            for name in ("a", "b"):
                step(f"starting {self._kinds[name]} on host {name}")
                self.start_backend(name)
            step("starting the guest behind host a's")
            try:
                self.guest = (make_guest or self._embedded)(self.backends["a"].socket)
            except (LabError, VhostUserError, OSError) as error:
                raise LabError(f"{error}\n{self.messages()}") from error
            self._cleanup.callback(self.guest.close)
        except BaseException:
            self.close()
            raise

    def _embedded(self, socket: str) -> EmbeddedGuest:
        guest = EmbeddedGuest(mtu=self._mtu)
        try:
            guest.connect(socket)
            guest.configure()
        except BaseException:
            guest.close()
            raise
        return guest

    def start_backend(self, name: str, *arguments: str) -> Backend:
        """Start the back-end of a host, again if it has run before; ``arguments``: more options for it."""
        backend = Backend(
            self.network.hosts[name],
            self.folder,
            self._kinds[name],
            helper=self._helpers[name],
            arguments=(*self._arguments[self._kinds[name]], *arguments),
            descriptors=self.descriptors,
            breakpoints=self._breakpoints,
            levels=self._levels,
        )
        # A godwit that has let connections go lingers for their sake: not for nobody's.
        self._cleanup.callback(backend.close, 0.5)
        self.backends[name] = backend
        return backend

    @property
    def server_address(self) -> str:
        """The server's address on the network."""
        return self.network.server.address(self.ipv6)

    def start_load(self, *, idle: int = 1, rate: int = 0) -> Load:
        """Open the connections; ``rate`` in bytes per second for each stream, 0 for as fast as it goes."""
        self._step(f"opening a download, an upload and {idle} idle to {self.server_address}")
        self.load = Load(self.server, self.guest.agent, self.server_address, idle=idle, rate=rate)
        return self.load

    def move(self, *, switch_delay: float | None = None) -> Move:
        """Migrate to the other host, and switch the network ``switch_delay`` seconds after that.

        None: while the guest stands still; negative: so long before the migration begins.
        The back-end that was left lingers until the network has been switched. A passt is cut off before it saves,
        since it acknowledges what arrives after that, and nobody has it then,
        and ended when it has been left.
        Returns when all streams go on.
        """
        source, target = self.where, self.network.other(self.where)
        if not self.backends[target].running:
            self.start_backend(target)
        for backend in self.backends.values():
            backend.ensure_helper()
        if self.load is not None:
            self.load.rewind()
        self._step(f"migrating from host {source} to host {target}")
        if switch_delay is not None and switch_delay < 0:
            self._switch(target)
            time.sleep(-switch_delay)
        elif self._kinds[source] == "passt":
            self.network.switch(None)
        try:
            report = self.guest.migrate(
                self.backends[target].socket,
                retire=False,
                before_run=(lambda: self._switch(target)) if switch_delay is None else None,
            )
        except (LabError, VhostUserError, OSError) as error:
            if self.network.connected != source:
                self._switch(source)
            raise LabError(f"{error}\n{self.messages()}") from error
        self.where = target
        self._step(f"the guest runs on host {target}")
        if switch_delay is not None and switch_delay >= 0:
            time.sleep(switch_delay)
            self._switch(target)
        self.guest.retire()
        if self._kinds[source] == "passt":
            self.backends[source].close()  # one that has let connections go does not take them back
        blackout: dict[str, float] = {}
        if self.load is not None:
            self.load.wait_alive()
            blackout = self.load.gaps()
        stream = getattr(report, "stream", None)
        return Move(source, target, report.downtime, None if stream is None else len(stream), blackout)

    def messages(self) -> str:
        """Return what both back-ends have said of late."""
        said = []
        for name, backend in self.backends.items():
            lines = backend.messages().splitlines()[-20:]
            said += [f"{backend.name} on host {name}:", *(f"  {line}" for line in lines)]
        return "\n".join(said)

    def _switch(self, to: str) -> None:
        self.network.switch(to)
        self._step(f"the network leads to host {to}")

    def close(self) -> None:
        """Take it all down. May be repeated."""
        self._cleanup.close()


def _nobody_exists() -> bool:
    """Whether this user namespace has the user that a back-end started by root becomes."""
    with open("/proc/self/uid_map") as ranges:
        for line in ranges:
            first, _, count = map(int, line.split())
            if first <= 65534 < first + count:
                return True
    return False


def qemu_guest(socket: str) -> Guest:
    """Boot a QEMU guest behind the back-end at ``socket`` and wait until it has its addresses."""
    guest = QemuGuest(socket)
    try:
        guest.wait_network()
    except BaseException:
        guest.close()
        raise
    return guest
