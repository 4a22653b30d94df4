# SPDX-License-Identifier: GPL-2.0-or-later
"""Migrations that fail, at every point and at every message, and where the connections are afterwards.

A *fault* is a point of a migration and what happens there: to a stage of either
side's transfer (``godwit.migration.faults``), or to a message between front-end
and back-end. Afterwards the guest's connections work, all of them, on exactly
one side, or all are reset at once, where the process that had them was killed.
None hangs. ``run`` puts one into a migration under load and finds out.
"""

from __future__ import annotations

import contextlib
import enum
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from godwit.lab.breakpoints import GO_ON, Breakpoints
from godwit.lab.errors import LabError
from godwit.lab.guest import EmbeddedGuest
from godwit.lab.migration import Migration
from godwit.lab.netns import wait_until
from godwit.lab.scenario import PORT, Load, Scenario
from godwit.migration import Version
from godwit.net.state import FlowMover
from godwit.net.versions import versions
from godwit.vhost_user import FrontendClient, VhostUserError

IDLE = 4
RATE = 2_000_000  # bytes per second of each stream
STALL = 2.0  # seconds
LIMIT = 12.0  # seconds after which what does not move hangs
SHORT = 3.0  # the same, where one is known to
DIALECTS = {"2": 2, "native": 0x80000001}
FAILURES = (LabError, VhostUserError, OSError)


class Where(enum.Enum):
    """Where the connections are afterwards."""

    SOURCE = "on at the source"
    TARGET = "on at the target"
    RESET = "reset"
    SOME = "on at the target, or reset"
    HANG = "hang"


class What(enum.Enum):
    """What happens at a point."""

    ERROR = "error"
    CUT = "stream cut"
    KILLED = "process killed"
    STALL = "stall of 2 s"
    HELPER_KILLED = "helper killed"
    HELPER_HANGS = "helper hangs"
    HANG_UP = "front-end hangs up"


@dataclass(frozen=True)
class Fault:
    """One: a point, and what happens there. ``side`` (``source`` or ``target``): whose back-end it happens to."""

    dialect: str
    side: str
    point: str
    what: What

    def __str__(self) -> str:
        return f"version {self.dialect}: {self.what.value} at {self.point} ({self.side})"


@dataclass(frozen=True)
class Result:
    """What came of it. ``reached``: whether the migration came to the point."""

    fault: Fault
    where: Where
    reached: bool
    note: str = ""

    @property
    def wrong(self) -> str:
        """What is wrong with it, or nothing."""
        if not self.reached:
            return f"{self.fault}: it was not reached"
        wanted = expected(self.fault)
        if self.where in wanted:
            return ""
        named = " or ".join(where.value for where in wanted)
        return f"{self.fault}: {self.where.value} ({self.note or 'no error'}); is to be: {named}"


def points(dialect: str) -> Iterator[tuple[str, str]]:
    """Each point of a transfer in a dialect, on its side; those behind a stage are left out: the next is the same."""
    version: Version[FlowMover] = next(v for v in versions() if v.id == DIALECTS[dialect])
    for side in ("source", "target"):
        yield side, f"{side}:header"
        for stage in version.stages:
            yield side, f"{side}:{stage.name}"
        yield side, f"{side}:end"
    for callback, side in (("rollback", "source"), ("linger", "source"), ("discard", "target"), ("commit", "target")):
        for stage in version.stages:
            if getattr(stage, callback) is not None:
                yield side, f"{callback}:{stage.name}"


def stage_faults() -> Iterator[Fault]:
    """All that can happen in a stage."""
    for dialect in DIALECTS:
        for side, point in points(dialect):
            for what in What:
                in_stream = point.startswith(("source:", "target:"))
                if what is What.HANG_UP or (what is What.CUT and not in_stream):
                    continue
                yield Fault(dialect, side, point, what)


#: The front-end's messages of a migration, in their order: on which side, and the method that sends it.
MESSAGES = (
    ("source", "SET_LOG_BASE", "set_log_base"),
    ("source", "SET_FEATURES", "set_features"),
    ("source", "SET_VRING_ADDR", "set_vring_addr"),
    ("source", "GET_VRING_BASE", "get_vring_base"),
    ("source", "SET_DEVICE_STATE_FD", "set_device_state_fd"),
    ("target", "SET_DEVICE_STATE_FD", "set_device_state_fd"),
    ("source", "CHECK_DEVICE_STATE", "check_device_state"),
    ("target", "CHECK_DEVICE_STATE", "check_device_state"),
    ("target", "SET_VRING_ENABLE", "set_vring_enable"),
    ("target", "SEND_RARP", "send_rarp"),
    ("target", "SET_FEATURES", "set_features"),
    ("target", "SET_MEM_TABLE", "set_mem_table"),
    ("target", "SET_VRING_NUM", "set_vring_num"),
    ("target", "SET_VRING_BASE", "set_vring_base"),
    ("target", "SET_VRING_ADDR", "set_vring_addr"),
    ("target", "SET_VRING_KICK", "set_vring_kick"),
    ("target", "SET_VRING_CALL", "set_vring_call"),
)


def message_faults() -> Iterator[Fault]:
    """All that can happen at a message: before it is sent, or when it has been answered."""
    for side, name, _ in MESSAGES:
        for when in ("before", "after"):
            for what in (What.KILLED, What.HANG_UP):
                yield Fault("2", side, f"{when} {name}", what)


def expected(fault: Fault) -> tuple[Where, ...]:
    """Where the connections may be afterwards."""
    if fault.point.startswith(("before ", "after ")):
        return _expected_at_message(fault)
    return _expected_in_stage(fault)


def _expected_in_stage(fault: Fault) -> tuple[Where, ...]:
    part, _, stage = fault.point.partition(":")
    called_off = part in ("rollback", "discard")
    good = Where.SOURCE if called_off else Where.TARGET
    match fault.what:
        case What.KILLED:
            return (Where.RESET if fault.side == "source" else Where.SOURCE,)
        case What.CUT if fault.point == "source:end":
            return (Where.TARGET,)  # all has been written
        case What.ERROR | What.CUT if part in ("source", "target"):
            return (Where.SOURCE,)
        case What.ERROR if part in ("rollback", "commit"):
            return (Where.RESET,)  # nothing leads there but an error of our own
        case What.HELPER_KILLED | What.HELPER_HANGS if part in ("target", "commit"):
            return (Where.RESET,)
        case What.HELPER_KILLED | What.HELPER_HANGS if part == "source":
            if stage in ("header", "observed addresses", "prepare flows"):
                return (Where.SOURCE,)
            # It works beside the stage that follows: whether it is through by then hangs on how busy the host is.
            beside = stage in ("transfer flows", "state")
            return (Where.TARGET, Where.SOURCE) if beside else (Where.TARGET,)
    return (good,)


def _expected_at_message(fault: Fault) -> tuple[Where, ...]:
    when, _, name = fault.point.partition(" ")
    if fault.side == "target":
        # From the start of the first ring on the guest runs there.
        runs = name == "SET_VRING_CALL" or (name == "SET_VRING_KICK" and when == "after")
        return (Where.RESET if runs else Where.SOURCE,)
    if name == "CHECK_DEVICE_STATE" and when == "after":
        # What comes late at the source's host is answered with a reset, if nobody has the sockets any more.
        return (Where.TARGET, Where.SOME) if fault.what is What.KILLED else (Where.TARGET,)
    return (Where.RESET,)


def run(fault: Fault) -> Result:
    """Put it into a migration under load."""
    options = [] if fault.dialect == "2" else ["--migrate-version", fault.dialect]
    with (
        tempfile.TemporaryDirectory(prefix="godwit-lab.") as folder,
        Breakpoints(folder) as breakpoints,
        Scenario(godwit_arguments=options, breakpoints=breakpoints.path) as scenario,
    ):
        load = scenario.start_load(idle=IDLE, rate=RATE)
        attempt = _Attempt(scenario, fault, breakpoints)
        attempt.run()
        where, note = _find_out(scenario, load, attempt)
        return Result(fault, where, attempt.reached, note)


class _Attempt:
    """A migration with a fault in it, and what the front-ends do about it."""

    def __init__(self, scenario: Scenario, fault: Fault, breakpoints: Breakpoints) -> None:
        assert isinstance(scenario.guest, EmbeddedGuest)
        self.scenario = scenario
        self.guest = scenario.guest
        self.fault = fault
        self.backend = scenario.backends["a" if fault.side == "source" else "b"]
        self.reached = False
        self.here = "a"
        self.said = ""
        self._runs_at_target = False
        self._migration: Migration = self.guest.migration(scenario.backends["b"].socket)
        self._hook: tuple[str, str] | None = None
        if fault.point.startswith(("before ", "after ")):
            self._arm_message()
        else:
            breakpoints.at(fault.point, self._happen)

    def _happen(self) -> str:
        self.reached = True
        match self.fault.what:
            case What.ERROR:
                return "fail"
            case What.CUT:
                return "cut"
            case What.KILLED:
                self.backend.kill()
            case What.STALL:
                time.sleep(STALL)
            case What.HELPER_KILLED:
                self.backend.kill_helper()
            case What.HELPER_HANGS:
                self.backend.stop_helper()
            case What.HANG_UP:
                attachment = self._migration.source if self.fault.side == "source" else self._migration.target
                assert attachment is not None
                if self.guest.attachment is attachment:
                    self.guest.pause()
                    self.guest.mover.detach()
                attachment.close()
        return GO_ON

    def _arm_message(self) -> None:
        when, _, name = self.fault.point.partition(" ")
        method = next(m for side, n, m in MESSAGES if (side, n) == (self.fault.side, name))
        self._hook = (when, method)
        if self.fault.side == "source":
            self._hook_into(self._migration.source.client)

    def _watch(self, client: FrontendClient) -> None:
        """Note when the guest runs at the target: when the first ring has been started."""
        kick = client.set_vring_kick

        def watched(index: int, fd: int | None) -> None:
            kick(index, fd)
            self._runs_at_target = True

        vars(client)["set_vring_kick"] = watched

    def _hook_into(self, client: FrontendClient) -> None:
        assert self._hook is not None
        when, method = self._hook
        send: Callable[..., object] = getattr(client, method)

        def hooked(*given: object, **named: object) -> object:
            if self.reached:
                return send(*given, **named)
            if when == "before":
                self._happen()
                return send(*given, **named)
            answer = send(*given, **named)
            self._happen()
            return answer

        vars(client)[method] = hooked

    def run(self) -> None:
        """Go through it; where a step fails the guest goes back, as QEMU has it."""
        try:
            self._migration.connect_target()
            assert self._migration.target is not None
            self._watch(self._migration.target.client)
            if self._hook is not None and self.fault.side == "target":
                self._hook_into(self._migration.target.client)
            for step in ("log_on", "suspend", "transfer"):
                getattr(self._migration, step)()
            if self.fault.point.startswith(("rollback:", "discard:")):
                raise LabError("called off")
            self._migration.switch_over()
            self.here = "b"
            self.scenario.network.switch("b")
            with contextlib.suppress(ValueError):  # the log of a source that has been hung up on
                self._migration.finish()
        except FAILURES as error:
            self.said = f"{error}"
            self._go_back()

    def _go_back(self) -> None:
        if self._runs_at_target:
            self._start_again("b")
            return
        try:
            self._migration.cancel()
        except FAILURES as error:
            self.said += f"; {error}"
            self._start_again("a")
        else:
            if self.fault.side == "source" and self.fault.what in (What.KILLED, What.HANG_UP):
                self._start_again("a")  # though nothing of it was noticed

    def _start_again(self, name: str) -> None:
        """The connections are gone; the guest is given a back-end again, as QEMU's reconnect has it."""
        backend = self.scenario.backends[name]
        if self.fault.what is What.KILLED:
            wait_until(lambda: not backend.running, "the back-end to be gone")
            backend.close()
            backend = self.scenario.start_backend(name)
        self.guest.reconnect(backend.socket)
        self.here = name
        self.scenario.network.switch(name)


def _find_out(scenario: Scenario, load: Load, attempt: _Attempt) -> tuple[Where, str]:
    """Use everything: where it is, if it is anywhere."""
    for backend in scenario.backends.values():
        if backend.running and attempt.fault.what in (What.HELPER_KILLED, What.HELPER_HANGS):
            backend.kill_helper()  # as whoever looks after it would
            backend.start_helper()
    said = [attempt.said] if attempt.said else []
    with contextlib.suppress(LabError):  # it is found out one by one
        load.wait_alive(LIMIT)
    # Where a process is gone, nobody in the guest who only listens can be told.
    crash = attempt.fault.what in (What.KILLED, What.HANG_UP)
    idle = load.check_idle(LIMIT)
    ends = load.finish(SHORT if crash else LIMIT)[:2]
    hangs = "sender: it hangs" if crash else "it hangs"
    broken = [end for end in ends if not end.ok]
    said += [f"idle: {idle}"] if idle else []
    said += [f"{end.name}: {end.error}" for end in broken]
    if any(hangs in end.error for end in broken) or (idle and not idle.endswith(" 0 silent")):
        return Where.HANG, "; ".join(said)
    if not _new_works(scenario):
        return Where.HANG, "; ".join([*said, "new connections do not work"])
    on = Where.TARGET if attempt.here == "b" else Where.SOURCE
    if not broken and not idle:
        return on, "; ".join(said)
    if len(broken) == len(ends) and idle.startswith("0 of"):
        return Where.RESET, "; ".join(said)
    return (Where.SOME if on is Where.TARGET else Where.HANG), "; ".join(said)


def _new_works(scenario: Scenario) -> bool:
    """Whether the guest can open a connection."""
    with contextlib.suppress(LabError):
        agent = scenario.guest.agent
        return agent.check(agent.echo(scenario.server_address, PORT, 1, LIMIT), LIMIT).alive == 1
    return False
