# SPDX-License-Identifier: GPL-2.0-or-later
"""Flows of a source that goes on, whose repair mode only a helper can end.

A flow is *held* when the guest goes on here and its socket is in repair mode
still, since the helper is gone: nothing moves on it until another helper comes,
and after a while without one it is reset. A flow is *doubtful* when a helper
was asked to set its repair mode and has not answered: it goes on, and is looked
at for a while, since a helper that hung may act on what it was sent when it
wakes up; then it is held.

Flows are named by index and generation here: they may end meanwhile, and their
index is another's then.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from godwit.dataplane import Engine
from godwit.repair import in_repair

log = logging.getLogger(__name__)

#: Seconds that a held flow waits for a helper, and that a doubtful one is looked at.
PATIENCE = 60.0

_LOOK_EVERY = 1.0


class Helpers(Protocol):
    """What is asked of the listener for helpers."""

    def wait(self, timeout: float) -> object | None:
        """Wait for a helper, up to ``timeout`` seconds; None if none came."""


class Rescue:
    """See the module. Methods may be called from any thread; ``lock`` is held by who moves flows.

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
        self._held: dict[int, int] = {}  # generation by index
        self._doubtful: dict[int, int] = {}

    def holds(self, flow: int) -> bool:
        """Whether the flow is held."""
        return flow in self._held

    def hold(self, flows: Sequence[int]) -> None:
        """Hold flows until a helper comes. The data plane is parked."""
        if not flows:
            return
        for flow in flows:
            self._engine.hold_flow(flow)
        self._held.update(self._named(flows))
        log.error("%d connections stand still until a repair helper connects again", len(flows))
        self._schedule(0, self._free)

    def watch(self, flows: Sequence[int]) -> None:
        """Look at flows that are not in repair mode and may come to be. The data plane is parked."""
        if not flows:
            return
        self._doubtful.update(self._named(flows))
        until = time.monotonic() + PATIENCE
        self._schedule(_LOOK_EVERY, lambda: self._look(until))

    def forget(self) -> None:
        """The guest is gone, and all flows with it."""
        with self._lock:
            self._held.clear()
            self._doubtful.clear()

    def _named(self, flows: Iterable[int]) -> dict[int, int]:
        generations = {flow: self._engine.flow_generation(flow) for flow in flows}
        return {flow: generation for flow, generation in generations.items() if generation is not None}

    def _living(self, flows: dict[int, int]) -> list[int]:
        return [flow for flow, generation in flows.items() if self._engine.flow_generation(flow) == generation]

    def _in_repair(self, flows: Iterable[int]) -> list[int]:
        sockets = {flow: self._engine.flow_socket(flow)[0] for flow in flows}
        # One that was reset has no socket, while the guest has no room to hear of it.
        return [flow for flow, fd in sockets.items() if fd >= 0 and in_repair(fd)]

    def _free(self) -> None:
        """In a thread of its own: wait for a helper that ends the repair mode of what is held."""
        deadline = time.monotonic() + PATIENCE
        helped = True
        while helped and self._held:
            helped = self._repair is not None and self._repair.wait(deadline - time.monotonic()) is not None
            with self._lock:
                # Held flows stay as they are while the lock is held, so the others need not stand still for this.
                if helped:
                    self._leave_repair(self._living(self._held))
                with self._engine.parked():
                    self._let_go(give_up=not helped)

    def _let_go(self, *, give_up: bool) -> None:
        """Resume what is out of repair mode; reset the rest if its time is over."""
        flows = self._living(self._held)
        left = self._in_repair(flows)
        going = [flow for flow in flows if flow not in left]
        self._held = {} if give_up else self._named(left)
        self._resume(going)
        if going:
            log.info("%d connections go on", len(going))
        if give_up and left:
            for flow in left:
                self._engine.reset_flow(flow)
            log.error("%d connections were reset: no repair helper came for them", len(left))

    def _look(self, until: float) -> None:
        """See whether a doubtful flow has been set into repair mode after all."""
        with self._lock, self._engine.parked():
            flows = self._living(self._doubtful)
            late = self._in_repair(flows)
            self._doubtful = self._named(flow for flow in flows if flow not in late)
            self.hold(late)
        if self._doubtful and time.monotonic() < until:
            self._schedule(_LOOK_EVERY, lambda: self._look(until))
