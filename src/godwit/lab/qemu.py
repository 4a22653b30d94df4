# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU guests behind a vhost-user back-end, and their live migration.

A guest is one machine that moves between QEMU processes::

    with QemuGuest(backend.socket) as guest:        # boots
        guest.wait_network()
        job = guest.agent.get("192.0.2.2", 5001, seed=1, length=10_000_000)
        report = guest.migrate(other.socket)        # now behind the other back-end
        assert guest.agent.wait(job).ok

The source's QEMU stays, stopped, until :meth:`QemuGuest.retire` (which
``migrate`` calls at its end, unless told not to): its back-end lingers as long.
A migration in steps is an :class:`Attempt`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import platform
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from godwit.lab import image
from godwit.lab.agent import Agent
from godwit.lab.errors import LabError, UnavailableError
from godwit.lab.migration import MigrationError
from godwit.lab.qmp import QMP, QMPError, migration, named

PROGRAM = "qemu-system-x86_64"
# The first one that hands a back-end's state over ("device state").
MINIMUM = (10, 0)
MAC = "02:67:6f:64:77:99"
HOW_TO_INSTALL = "run `make vm-tools` (as root, on Debian), or install QEMU 10 or later yourself"

_numbers = itertools.count()


@functools.cache
def version() -> tuple[int, ...]:
    """Return QEMU's version; :class:`UnavailableError` if there is none, or it is too old."""
    if platform.machine() != "x86_64":
        raise UnavailableError(f"QEMU guests are for x86_64 here, and this machine is {platform.machine()}")
    path = shutil.which(PROGRAM)
    if path is None:
        raise UnavailableError(f"{PROGRAM} is not installed: {HOW_TO_INSTALL}")
    shown = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"version (\d+)\.(\d+)\.(\d+)", shown)
    found = tuple(int(part) for part in match.groups()) if match else ()
    if found < MINIMUM:
        raise UnavailableError(
            f"{PROGRAM} is version {'.'.join(map(str, found))} and {'.'.join(map(str, MINIMUM))} is needed:"
            f" {HOW_TO_INSTALL}"
        )
    return found


@dataclass(frozen=True)
class Machine:
    """What stays the same of a guest over its migrations.

    ``memory`` is in MiB. ``ip`` is ``dhcp``, or ``ADDR/LEN,GATEWAY``; ``ip6`` is
    ``auto``, or the same; None for neither.
    """

    memory: int = 256
    mac: str = MAC
    ip: str | None = "dhcp"
    ip6: str | None = "auto"

    def arguments(self, boot: image.Image, backend: str | Sequence[str]) -> list[str]:
        """Return QEMU's words for this machine behind ``backend``.

        That is the path where a vhost-user back-end listens, or the words that make
        the net device ``n0`` some other way.
        """
        if isinstance(backend, str):
            backend = ["-chardev", f"socket,id=c0,path={backend}", "-netdev", "vhost-user,id=n0,chardev=c0"]
        append = "console=ttyS0 quiet panic=-1"
        append += f" godwit.ip={self.ip}" if self.ip else ""
        append += f" godwit.ip6={self.ip6}" if self.ip6 else ""
        return [
            *("-nodefaults", "-no-user-config", "-display", "none"),
            *("-M", "q35,accel=tcg", "-cpu", "max", "-smp", "1", "-m", f"{self.memory}M"),
            *("-object", f"memory-backend-memfd,id=m0,size={self.memory}M,share=on", "-numa", "node,memdev=m0"),
            *("-kernel", boot.kernel, "-initrd", boot.initrd, "-append", append),
            *backend,
            *("-device", f"virtio-net-pci,netdev=n0,mac={self.mac},romfile="),
        ]


class Qemu:
    """One QEMU process.

    With ``incoming`` it waits for a guest, which is let run when it has come
    unless ``paused``; without, it boots one. ``folder`` gets the guest's console
    (``*.console``) and QEMU's own messages (``*.log``). ``launcher`` are words
    before QEMU's own that run it elsewhere; without, it is the system's.
    """

    def __init__(
        self,
        machine: Machine,
        backend: str | Sequence[str],
        folder: str,
        *,
        incoming: bool = False,
        paused: bool = False,
        launcher: Sequence[str] = (),
    ) -> None:
        if not launcher:
            version()
        self.name = f"qemu{next(_numbers)}"
        self.incoming = os.path.join(folder, f"{self.name}.migration")
        self.log = os.path.join(folder, f"{self.name}.log")
        self.console = os.path.join(folder, f"{self.name}.console")
        qmp, qmp_theirs = socket.socketpair()
        self.line, line_theirs = socket.socketpair()
        words = [
            *launcher,
            PROGRAM,
            *machine.arguments(image.build(), backend),
            *("-chardev", f"socket,id=qmp,fd={qmp_theirs.fileno()}", "-mon", "chardev=qmp,mode=control"),
            *("-chardev", f"file,id=console,path={self.console}", "-device", "isa-serial,chardev=console,index=0"),
            *("-chardev", f"socket,id=agent,fd={line_theirs.fileno()}", "-device", "isa-serial,chardev=agent,index=1"),
            *(["-incoming", "defer"] if incoming else []),
            *(["-S"] if paused else []),
        ]
        with open(self.log, "wb") as log, qmp_theirs, line_theirs:
            self.process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[qmp_theirs.fileno(), line_theirs.fileno()],
            )
        try:
            self.qmp = QMP(qmp)
            # Only the events tell what happens without being asked again and again.
            self._capabilities(events=True)
            if incoming:
                self.qmp.command("migrate-incoming", uri=f"unix:{self.incoming}")
        except LabError as error:
            qmp.close()
            self.kill()
            raise LabError(f"{self.name} did not start: {error}; it says: {self.messages()}") from error

    def _capabilities(self, **states: bool) -> None:
        self.qmp.command(
            "migrate-set-capabilities",
            capabilities=[{"capability": name.replace("_", "-"), "state": state} for name, state in states.items()],
        )

    def send(self, uri: str, *, pause: bool) -> None:
        """Begin to migrate to ``uri``; with ``pause``, stop before the switch-over (``pre-switchover``)."""
        self._capabilities(return_path=True, pause_before_switchover=pause)
        self.qmp.events.clear()
        self.qmp.command("migrate", uri=uri)

    def status(self) -> str:
        """Return the run state: ``running``, ``paused``, ``postmigrate``, ``inmigrate``..."""
        return str(self.qmp.command("query-status")["status"])

    def messages(self) -> str:
        """Return what QEMU has said of itself."""
        with open(self.log, errors="replace") as file:
            return file.read().strip()

    def ending(self) -> str:
        """Return how it stands with QEMU and its guest, for a message: status, last words of both."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1.0)  # where its sockets have closed already
        with open(self.console, errors="replace") as file:
            console = file.read()[-1000:]
        return (
            f"QEMU's exit status is {self.process.poll()}, it says: {self.messages()}; the guest's console: {console}"
        )

    def quit(self, timeout: float = 10.0) -> None:
        """End QEMU in an orderly way; a QEMU that does not is killed."""
        with contextlib.suppress(LabError):
            self.qmp.command("quit")
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            pass
        self.kill()

    def kill(self) -> None:
        """Kill QEMU, if it still runs, and let go of its sockets. May be repeated."""
        self.process.kill()
        self.process.wait()
        self.line.close()
        if hasattr(self, "qmp"):
            self.qmp.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.incoming)


@dataclass(frozen=True)
class Report:
    """What QEMU says of a migration that is complete.

    ``downtime`` is how long the guest stood still, ``total`` how long it all
    took, in seconds; ``info`` is the whole answer of ``query-migrate``.
    """

    downtime: float
    total: float
    info: dict[str, Any]


class Attempt:
    """One migration, step by step.

    ``pre_switchover`` comes when the guest has been stopped and the source's
    back-end suspended, with nothing saved yet. From there: ``go_on``, ``cancel``,
    or whatever a test wants to break; then ``finish``.
    """

    def __init__(self, guest: QemuGuest, backend: str, *, paused: bool = False) -> None:
        self.guest = guest
        self.source = guest.qemu
        self.target = Qemu(guest.machine, backend, guest.folder, incoming=True, paused=paused)

    def begin(self, timeout: float = 60.0) -> None:
        """Send the guest's memory and come to ``pre_switchover``."""
        self.source.send(f"unix:{self.target.incoming}", pause=True)
        event = self.source.qmp.wait(
            migration("pre-switchover", "failed", "cancelled"), "the state pre-switchover", timeout
        )
        if event["data"]["status"] != "pre-switchover":
            raise self._error("pre-switchover")

    def go_on(self) -> None:
        """Go on from ``pre_switchover``: the back-end's state is saved now."""
        self.source.qmp.command("migrate-continue", state="pre-switchover")

    def go_on_if_it_can(self) -> None:
        """The same after the target is gone, which QEMU may or may not have noticed."""
        with contextlib.suppress(QMPError):
            self.go_on()

    def cancel(self, timeout: float = 30.0) -> None:
        """Call it off, and wait until the guest runs on at the source."""
        self.source.qmp.command("migrate_cancel")
        self.source.qmp.wait(migration("cancelled", "failed"), "the cancellation", timeout)
        self.resumed(timeout)

    def ended(self, timeout: float = 60.0) -> bool:
        """Wait until the source's QEMU calls the migration complete (true) or failed (false)."""
        event = self.source.qmp.wait(migration("completed", "failed", "cancelled"), "the migration's end", timeout)
        return bool(event["data"]["status"] == "completed")

    def resumed(self, timeout: float = 30.0) -> None:
        """Wait until the guest runs on at the source after a failure, and drop the target."""
        if self.source.status() != "running":
            self.source.qmp.wait(named("RESUME"), "the guest to run on at the source", timeout)
        self.target.kill()

    def failed(self, timeout: float = 60.0) -> None:
        """Wait until the migration has failed and the guest runs on at the source; drop the target.

        Raises :class:`LabError` if it does not fail.
        """
        if self.ended(timeout):
            raise LabError("the migration was to fail, and QEMU calls it completed")
        self.resumed(timeout)

    def loaded(self, timeout: float = 60.0) -> None:
        """Wait until the target has loaded the guest, which waits to be let run."""
        self.target.qmp.wait(migration("completed"), "the guest's arrival", timeout)
        if not self.paused_at_target():
            raise LabError(f"the guest at the target is {self.target.status()}, and was to wait")

    def back(self, timeout: float = 30.0) -> None:
        """Call it off after ``completed``: end the target, and let the guest run on at the source."""
        self.target.kill()
        self.source.qmp.command("cont")
        self.resumed(timeout)

    def finish(self, timeout: float = 60.0) -> Report:
        """Wait until the guest runs at the target; the guest object then stands for that one.

        Raises :class:`MigrationError` if the migration fails instead: the guest
        then runs on at the source, and the target is gone.
        """
        self._completed(timeout)
        return self.arrived(timeout)

    def finish_load(self, timeout: float = 60.0) -> None:
        """The same for a target that is ``paused``: wait until the guest only has to be let run there."""
        self._completed(timeout)
        self.loaded(timeout)

    def _completed(self, timeout: float) -> None:
        if not self.ended(timeout):
            error = self._error("the switch-over")
            self.resumed(timeout)
            raise error

    def arrived(self, timeout: float = 60.0) -> Report:
        """The same when the source's QEMU has said ``completed`` already."""
        target = self.target
        if target.status() == "inmigrate":
            target.qmp.wait(migration("completed"), "the guest's arrival", timeout)
        if not self.paused_at_target() and target.status() != "running":
            target.qmp.wait(named("RESUME"), "the guest to run at the target", timeout)
        info = self.source.qmp.command("query-migrate")
        self.guest.moved(target)
        return Report(info.get("downtime", 0) / 1000, info.get("total-time", 0) / 1000, info)

    def paused_at_target(self) -> bool:
        """Whether the guest has come but waits for ``cont`` (``paused`` was asked for)."""
        return self.target.status() in ("paused", "prelaunch", "finish-migrate")

    def _error(self, step: str) -> MigrationError:
        info = self.source.qmp.command("query-migrate")
        said = [info.get("error-desc", ""), self.target.messages()]
        return MigrationError(step, "; ".join(filter(None, said)) or "QEMU does not say why")


def wait_network(agent: Agent, wanted: Sequence[str], timeout: float = 30.0) -> None:
    """Wait until a guest has set up what is wanted: ``ip4``, ``ip6``."""
    deadline = time.monotonic() + timeout
    while not all(name in agent.run("cat /run/net").split() for name in wanted):
        if time.monotonic() > deadline:
            state = agent.run("ip addr; ip route; ip -6 route; cat /run/udhcpc.log", check=False)
            raise LabError(f"the guest has no network after {timeout:g} s:\n{state}")
        time.sleep(0.1)


class QemuGuest:
    """A guest, wherever it is. Boots behind ``backend``, the path of a vhost-user socket.

    ``qemu`` is the process that it is in now, ``left`` the one that it came from
    if that is still there; ``agent`` is its traffic agent. A guest that is to
    stay may have another ``backend`` (:meth:`Machine.arguments`) and ``launcher``
    (:class:`Qemu`).
    """

    def __init__(
        self,
        backend: str | Sequence[str],
        machine: Machine | None = None,
        *,
        launcher: Sequence[str] = (),
        timeout: float = 60.0,
    ) -> None:
        self.machine = machine or Machine()
        self._cleanup = contextlib.ExitStack()
        self.folder = self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="godwit-qemu."))
        self.left: Qemu | None = None
        self._processes: list[Qemu] = []
        self._cleanup.callback(self._kill_all)
        began = time.monotonic()
        try:
            self.qemu = Qemu(self.machine, backend, self.folder, launcher=launcher)
            self._processes.append(self.qemu)
            self.agent = Agent(self.qemu.line)
            try:
                self.agent.hello(timeout)
            except LabError as error:
                raise LabError(f"the guest did not boot: {error}; {self.qemu.ending()}") from error
        except BaseException:
            self.close()
            raise
        self.boot_time = time.monotonic() - began

    def _kill_all(self) -> None:
        for qemu in self._processes:
            qemu.kill()

    def wait_network(self, timeout: float = 30.0) -> None:
        """Wait until the guest has the addresses that it was to get."""
        wanted = [name for name, value in (("ip4", self.machine.ip), ("ip6", self.machine.ip6)) if value]
        wait_network(self.agent, wanted, timeout)

    def attempt(self, backend: str, *, paused: bool = False) -> Attempt:
        """Prepare a migration to behind the back-end at ``backend``; nothing is sent yet."""
        attempt = Attempt(self, backend, paused=paused)
        self._processes.append(attempt.target)
        return attempt

    def migrate(
        self,
        backend: str,
        *,
        retire: bool = True,
        timeout: float = 60.0,
        before_run: Callable[[], None] | None = None,
    ) -> Report:
        """Move to behind the back-end at ``backend``; :class:`MigrationError` if that fails.

        ``before_run`` is called when the target has loaded everything, just before
        the guest is let run there. Earlier would be too early to switch a network:
        the target's kernel resets what it has no socket for. Unless ``retire`` is
        false, the QEMU that was left is ended at once.
        """
        attempt = self.attempt(backend, paused=before_run is not None)
        attempt.begin(timeout)
        attempt.go_on()
        if before_run is None:
            report = attempt.finish(timeout)
        else:
            attempt.finish_load(timeout)
            before_run()
            attempt.target.qmp.command("cont")
            report = attempt.arrived(timeout)
        if retire:
            self.retire()
        return report

    def moved(self, target: Qemu) -> None:
        """Take note that the guest is in ``target`` now."""
        self.retire()
        self.left, self.qemu = self.qemu, target
        self.agent.attach(target.line)

    def retire(self) -> None:
        """End the QEMU that the guest came from: its back-end sees the front-end disconnect."""
        if self.left is not None:
            self.left.quit()
            self._processes.remove(self.left)
            self.left = None

    def cont(self) -> None:
        """Let a paused guest run."""
        self.qemu.qmp.command("cont")

    def close(self) -> None:
        """End every QEMU of this guest. May be repeated."""
        self._cleanup.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
