# SPDX-License-Identifier: GPL-2.0-or-later
"""Flows of a guest that runs, whose sockets are in repair mode: only a helper can end that.

How they come to be: the helper was lost after it had set that mode for a
migration, and the guest goes on here; or a helper that hung acts late, on what
it was sent long ago, and the data plane finds sockets in repair mode. They are
*held*: nothing moves on them, nothing is lost, and the rest of the guest's flows
go on. The next helper frees them; after a while without one they are reset.

Flows are named by index and generation here: they may end meanwhile, and their
index is another's then.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple, Protocol

from godwit.dataplane import Engine
from godwit.repair import in_repair

log = logging.getLogger(__name__)

#: Seconds that a held flow waits for a helper.
PATIENCE = 60.0


class Helpers(Protocol):
    """What is asked of the listener for helpers."""

    def wait(self, timeout: float) -> object | None:
        """Wait for a helper, up to ``timeout`` seconds; None if none came, or none can come any more."""


class _Held(NamedTuple):
    generation: int
    deadline: float


class Rescue:
    """See the module. ``lock`` is the one under which flows are moved; every method is called with it held.

    ``leave_repair`` has the helper end the repair mode of flows as well as it
    can, ``resume`` lets them go on, with the data plane parked.
    ``schedule`` runs a function in another thread after some seconds.
    """

    def __init__(
        self,
        engine: Engine,
        repair: Helpers | None,
        lock: threading.RLock,
        *,
        leave_repair: Callable[[Sequence[int]], object],
        resume: Callable[[Iterable[int]], None],
        schedule: Callable[[float, Callable[[], None]], None],
    ) -> None:
        self._engine = engine
        self._repair = repair
        self._lock = lock
        self._leave_repair = leave_repair
        self._resume = resume
        self._schedule = schedule
        self._held: dict[int, _Held] = {}
        self._waiting = False

    def hold(self, flows: Collection[int]) -> None:
        """Hold flows until a helper comes. The data plane is parked."""
        if not flows:
            return
        deadline = time.monotonic() + PATIENCE
        for flow in flows:
            generation = self._engine.flow_generation(flow)
            if generation is not None:
                self._engine.hold_flow(flow)
                self._held[flow] = _Held(generation, deadline)
        log.error("%d connections stand still until a repair helper connects again", len(flows))
        if not self._waiting:
            self._waiting = True
            self._schedule(0, self._wait)

    def held(self) -> set[int]:
        """The flows that are held."""
        return set(self._living())

    def release(self, flows: Iterable[int]) -> None:
        """Others see to these flows now: they move."""
        for flow in flows:
            self._held.pop(flow, None)

    def _living(self) -> dict[int, int]:
        """The held flows that are still there, with their sockets."""
        flows = [flow for flow, held in self._held.items() if self._engine.flow_generation(flow) == held.generation]
        sockets = {flow: self._engine.flow_socket(flow)[0] for flow in flows}
        # One that was reset has none, while the guest has no room to hear of it.
        return {flow: fd for flow, fd in sockets.items() if fd >= 0}

    def _wait(self) -> None:
        """In a thread of its own: wait for helpers that end the repair mode of what is held."""
        helped = False
        while True:
            with self._lock:
                if helped:
                    # Held flows stay as they are while the lock is held: the others need not stand still for this.
                    self._leave_repair(list(self._living()))
                with self._engine.parked():
                    self._let_go()
                if not self._held:
                    self._waiting = False
                    return
                until = min(held.deadline for held in self._held.values())
            left = until - time.monotonic()
            helped = self._repair is not None and self._repair.wait(left) is not None
            if not helped and time.monotonic() < until:
                self._despair()  # no helper can come any more

    def _let_go(self) -> None:
        """Resume what is out of repair mode; reset what has waited long enough."""
        living = self._living()
        free = {flow for flow, fd in living.items() if not in_repair(fd)}
        self._resume(free)
        now = time.monotonic()
        late = [flow for flow in living if flow not in free and self._held[flow].deadline <= now]
        for flow in late:
            self._engine.reset_flow(flow)
        gone = free.union(late)
        self._held = {flow: self._held[flow] for flow in living if flow not in gone}
        if free:
            log.info("%d connections go on", len(free))
        if late:
            log.error("%d connections were reset: no repair helper came for them", len(late))

    def _despair(self) -> None:
        with self._lock:
            self._held = {flow: held._replace(deadline=0.0) for flow, held in self._held.items()}
