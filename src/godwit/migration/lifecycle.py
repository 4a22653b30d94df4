# SPDX-License-Identifier: GPL-2.0-or-later
"""The life cycle of one transfer.

Theory of operation. A transfer goes one way and begins when the front-end
hands over a pipe. The source *saves*: its stages run in order and leave the
device frozen. A good save proves nothing yet, since the guest may still be
resumed here for as long as the front-end is connected; so the source *lingers*
and can *roll back* until it is closed. The target *loads*: its stages run and
leave the device invisible. It becomes visible by the *commit*, when the guest
is let run, or is dropped by a *discard*. A save or load that fails has undone
itself when it is over.

Nothing but ``LifeCycle.move`` changes a state, and it logs every change.
"""

from __future__ import annotations

import enum
import logging
import threading
from typing import Final

from godwit.migration.errors import StateError

log = logging.getLogger(__name__)


class Direction(enum.Enum):
    """Which side of the transfer we are."""

    SOURCE = "source"
    TARGET = "target"


class State(enum.Enum):
    """Where a transfer is. The text says what may be done there, and what holds."""

    NEW = "no pipe yet; `request` is next"
    REQUESTED = "pipe and direction are known; nothing has been touched; `run` is next"
    SAVING = "the stages of the source run; `cancel` from another thread stops them"
    SAVED = "all is written and the pipe is closed; the device is frozen, here and whole; may linger or roll back"
    LINGERING = "as saved, and silent to the network; may still roll back while the front-end is connected"
    ROLLING_BACK = "the rollbacks of the stages that were entered run, last one first"
    ROLLED_BACK = "the device runs on as if nothing had been asked"
    LOADING = "the stages of the target run; `cancel` from another thread stops them"
    LOADED = "all was read up to the end of the pipe; nothing is visible outside; commit or discard is next"
    COMMITTING = "the commits run, first stage first"
    COMMITTED = "the device lives here"
    DISCARDING = "the discards of the stages that were entered run, last one first"
    DISCARDED = "nothing of the stream is left; the next transfer may come"
    CLOSED = "the end; the pipe is closed"


class Event(enum.Enum):
    """What moves a transfer from state to state."""

    REQUEST = "request"
    SAVE = "run (source)"
    LOAD = "run (target)"
    DONE = "done"
    FAIL = "failed"
    LINGER = "linger"
    ROLL_BACK = "rollback"
    COMMIT = "commit"
    DISCARD = "discard"
    CLOSE = "close"


TABLE: Final[dict[tuple[State, Event], State]] = {
    (State.NEW, Event.REQUEST): State.REQUESTED,
    (State.NEW, Event.CLOSE): State.CLOSED,
    (State.REQUESTED, Event.SAVE): State.SAVING,
    (State.REQUESTED, Event.LOAD): State.LOADING,
    (State.REQUESTED, Event.CLOSE): State.CLOSED,
    (State.SAVING, Event.DONE): State.SAVED,
    (State.SAVING, Event.FAIL): State.ROLLING_BACK,
    (State.SAVED, Event.LINGER): State.LINGERING,
    (State.SAVED, Event.ROLL_BACK): State.ROLLING_BACK,
    (State.SAVED, Event.CLOSE): State.CLOSED,
    (State.LINGERING, Event.ROLL_BACK): State.ROLLING_BACK,
    (State.LINGERING, Event.CLOSE): State.CLOSED,
    (State.ROLLING_BACK, Event.DONE): State.ROLLED_BACK,
    (State.ROLLED_BACK, Event.CLOSE): State.CLOSED,
    (State.LOADING, Event.DONE): State.LOADED,
    (State.LOADING, Event.FAIL): State.DISCARDING,
    (State.LOADED, Event.COMMIT): State.COMMITTING,
    (State.LOADED, Event.DISCARD): State.DISCARDING,
    (State.COMMITTING, Event.DONE): State.COMMITTED,
    (State.COMMITTED, Event.CLOSE): State.CLOSED,
    (State.DISCARDING, Event.DONE): State.DISCARDED,
    (State.DISCARDED, Event.CLOSE): State.CLOSED,
}


class LifeCycle:
    """The state of one transfer. Any thread may read it; moving is atomic."""

    def __init__(self) -> None:
        self._state = State.NEW
        self._lock = threading.Lock()

    @property
    def state(self) -> State:
        """The state now."""
        return self._state

    def may(self, event: Event) -> bool:
        """Whether ``event`` is legal now."""
        return (self._state, event) in TABLE

    def move(self, event: Event) -> None:
        """Enter the state that ``event`` leads to.

        :raises StateError: the table has no such move.
        """
        with self._lock:
            before = self._state
            after = TABLE.get((before, event))
            if after is None:
                raise StateError(f"{event.value}: not possible while {before.name} ({before.value})")
            self._state = after
        log.debug("transfer: %s -> %s (%s)", before.name, after.name, event.value)
