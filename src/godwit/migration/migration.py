# SPDX-License-Identifier: GPL-2.0-or-later
"""One transfer of a device's state, from the pipe to its end.

    transfer = Migration(versions, device)
    transfer.request(fd, Direction.SOURCE, version=2)
    outcome = transfer.run()            # blocking: in a thread of its own
    ...
    transfer.linger() or transfer.rollback()
    transfer.close()

What may be called when is in ``godwit.migration.lifecycle``. ``run`` and the
methods that end a transfer block for as long as the device's stages do. They
are called from one thread at a time; ``cancel``, ``state`` and ``outcome`` may
be used from any thread at any time.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, Generic

from godwit.migration.errors import MigrationError, StageError, StateError, TrailingDataError, version_name
from godwit.migration.faults import Faults
from godwit.migration.header import MAGIC, Header
from godwit.migration.lifecycle import Direction, Event, LifeCycle, State
from godwit.migration.stream import Cancel, Reader, Writer
from godwit.migration.version import Context, Stage, Version, negotiate

log = logging.getLogger(__name__)


@dataclass
class Outcome:
    """How ``run`` ended. True when all stages were done and the stream was whole.

    ``version`` is 0 until one is agreed upon; ``size`` counts bytes of the
    stream; ``durations`` are seconds by stage. ``undo_errors`` are the
    callbacks that failed while a failed run was undone.
    """

    direction: Direction
    error: MigrationError | None = None
    version: int = 0
    size: int = 0
    durations: dict[str, float] = field(default_factory=dict)
    undo_errors: list[StageError] = field(default_factory=list)

    def __bool__(self) -> bool:
        return self.error is None


class Migration(Generic[Context]):
    """The life cycle of one transfer in one direction.

    ``versions`` are all that the device knows, ``context`` is the device as
    its stages see it, ``magic`` begins its streams. ``timeout``, in seconds,
    bounds each wait for the pipe (None: no bound; a pipe whose other end died
    ends the wait anyway). ``copy`` is given the stream's bytes, for debugging.
    """

    def __init__(
        self,
        versions: Sequence[Version[Context]],
        context: Context,
        *,
        magic: int = MAGIC,
        timeout: float | None = None,
        faults: Faults | None = None,
        copy: Callable[[bytes], None] | None = None,
    ) -> None:
        self._copy = copy
        self._versions = tuple(versions)
        if len({version.id for version in self._versions}) != len(self._versions):
            raise ValueError("two versions of one id")
        self._context = context
        self._magic = magic
        self._timeout = timeout
        self._faults = faults
        self._life = LifeCycle()
        self._cancel = Cancel()
        self._file: int | BinaryIO | None = None
        self._stream: Reader | Writer | None = None
        self._version: Version[Context] | None = None
        self._entered: list[Stage[Context]] = []
        self._outcome: Outcome | None = None
        self.direction: Direction | None = None

    @property
    def state(self) -> State:
        """Where the transfer is."""
        return self._life.state

    @property
    def outcome(self) -> Outcome | None:
        """The result of ``run``; set before the pipe is closed, None until then."""
        return self._outcome

    def request(self, file: int | BinaryIO, direction: Direction, version: int | None = None) -> None:
        """Take the pipe (or a binary file) for a transfer in ``direction``.

        A descriptor is ours from here on, whatever happens, and is closed when
        the transfer is over; a file object stays the caller's. ``version`` is
        what a source writes, by default the newest that it knows.

        :raises ValueError: this device does not write that version.
        :raises StateError: there was a request already.
        """
        try:
            chosen = self._writable(version) if direction is Direction.SOURCE else None
            self._life.move(Event.REQUEST)
        except (ValueError, StateError):
            if isinstance(file, int):
                os.close(file)
            raise
        self._file = file
        self._version = chosen
        self.direction = direction

    def run(self) -> Outcome:
        """Save or load, as requested; block until done. After a failure all is undone on return.

        The outcome is known before the pipe is closed, since the front-end
        asks for it the moment it sees the end. Any failure is in the outcome;
        only what is no ``Exception`` (an interrupt) is raised, after undoing.
        """
        if self.direction is None:
            raise StateError("run: nothing was requested")
        saving = self.direction is Direction.SOURCE
        self._life.move(Event.SAVE if saving else Event.LOAD)
        outcome = Outcome(self.direction)
        try:
            if saving:
                self._save(outcome)
            else:
                self._load(outcome)
        except MigrationError as error:
            self._fail(outcome, error)
        except BaseException as error:
            self._fail(outcome, StageError("transfer", "run", error))
            self._outcome = outcome
            self.cut()
            raise
        else:
            self._life.move(Event.DONE)
        self._outcome = outcome
        self.cut()
        log.log(logging.INFO if outcome else logging.ERROR, "%s", describe(outcome))
        return outcome

    def cancel(self, reason: str = "") -> None:
        """Stop ``run`` soon, from any thread: it fails with ``AbortedError``. Otherwise of no effect."""
        self._cancel.set(reason)

    def rollback(self) -> list[StageError]:
        """Source, after a save: let the device go on. Gives the callbacks that failed."""
        self._life.move(Event.ROLL_BACK)
        errors = self._undo()
        self._life.move(Event.DONE)
        return errors

    def linger(self) -> list[StageError]:
        """Source, after a save: be silent until ``rollback`` or ``close``. Gives the callbacks that failed."""
        self._life.move(Event.LINGER)
        return self._call("linger", self._entered)

    def commit(self) -> list[StageError]:
        """Target, after a load: let the device live. Gives the callbacks that failed."""
        self._life.move(Event.COMMIT)
        errors = self._call("commit", self._entered)
        self._life.move(Event.DONE)
        return errors

    def discard(self) -> list[StageError]:
        """Target, after a load: drop what was loaded. Gives the callbacks that failed."""
        self._life.move(Event.DISCARD)
        errors = self._undo()
        self._life.move(Event.DONE)
        return errors

    def close(self) -> None:
        """End the transfer. A load that nobody committed is discarded; a save stays saved.

        :raises StateError: ``run`` is still running: ``cancel`` it and wait first.
        """
        if self.state is State.CLOSED:
            return
        if self.state is State.LOADED:
            self.discard()
        self._life.move(Event.CLOSE)
        self.cut()
        self._cancel.close()

    def cut(self) -> None:
        """Close the pipe now; what was not written yet is not written any more."""
        file, self._file = self._file, None
        if self._stream is not None:
            self._stream.detach()
        if isinstance(file, int):
            os.close(file)

    def _writable(self, wanted: int | None) -> Version[Context]:
        living = {version.id: version for version in self._versions if not version.withdrawn}
        if not living:
            raise ValueError("this device has no version to write")
        version = living.get(max(living) if wanted is None else wanted)
        if version is None:
            known = ", ".join(version_name(known) for known in sorted(living))
            raise ValueError(f"version {wanted} cannot be written; known are {known}")
        return version

    def _open(self) -> int | BinaryIO:
        if self._file is None:
            raise StateError("run: the pipe is closed")
        return self._file

    def _save(self, outcome: Outcome) -> None:
        version = self._version
        if version is None:
            raise StateError("run: no version was chosen")
        outcome.version = version.id
        self._stream = writer = Writer(self._open(), timeout=self._timeout, cancel=self._cancel, copy=self._copy)
        self._at("source:header", "header", "source")
        writer.push_bytes(version.header(self._magic).pack())
        for stage in version.stages:
            started = time.monotonic()
            self._enter(stage, writer, "source")
            if stage.source is not None:
                self._guard(stage.name, "source", stage.source, self._context, writer)
            writer.flush()
            self._at(f"source:{stage.name}:after", stage.name, "source")
            outcome.durations[stage.name] = time.monotonic() - started
            outcome.size = writer.offset
        writer.flush()
        self._at("source:end", "end of stream", "source")
        writer.check_cancelled()
        outcome.size = writer.offset

    def _load(self, outcome: Outcome) -> None:
        self._stream = reader = Reader(self._open(), timeout=self._timeout, cancel=self._cancel, copy=self._copy)
        self._at("target:header", "header", "target")
        header = Header.parse(reader.pull_bytes(Header.size()), self._magic)
        version = negotiate(header, self._versions)
        self._version = version
        outcome.version = version.id
        for stage in version.stages:
            started = time.monotonic()
            self._enter(stage, reader, "target")
            if stage.target is not None:
                self._guard(stage.name, "target", stage.target, self._context, reader)
            self._at(f"target:{stage.name}:after", stage.name, "target")
            outcome.durations[stage.name] = time.monotonic() - started
            outcome.size = reader.offset
        reader.stage = "end of stream"
        self._at("target:end", "end of stream", "target")
        if not reader.at_end():
            raise TrailingDataError(reader.offset)
        reader.check_cancelled()

    def _enter(self, stage: Stage[Context], stream: Reader | Writer, side: str) -> None:
        """Note that the stage was entered, before it can do anything."""
        stream.stage = stage.name
        stream.check_cancelled()
        self._entered.append(stage)
        self._at(f"{side}:{stage.name}", stage.name, side)

    def _at(self, point: str, stage: str, callback: str) -> None:
        if self._faults is not None:
            self._guard(stage, callback, self._faults.at, point, self)

    @staticmethod
    def _guard(stage: str, callback: str, call: Callable[..., None], *arguments: object) -> None:
        """Call; an error that is not about the stream is the stage's failure."""
        try:
            call(*arguments)
        except MigrationError:
            raise
        except Exception as error:
            raise StageError(stage, callback, error) from error

    def _fail(self, outcome: Outcome, error: MigrationError) -> None:
        outcome.error = error
        self._life.move(Event.FAIL)
        outcome.undo_errors = self._undo()
        self._life.move(Event.DONE)

    def _undo(self) -> list[StageError]:
        """Undo every stage that was entered, last one first."""
        callback = "rollback" if self.direction is Direction.SOURCE else "discard"
        errors = self._call(callback, reversed(self._entered))
        self._entered.clear()
        return errors

    def _call(self, callback: str, stages: Iterable[Stage[Context]]) -> list[StageError]:
        """Run one callback of every stage, whatever each of them does."""
        errors: list[StageError] = []
        for stage in stages:
            call: Callable[[Context], None] | None = getattr(stage, callback)
            if call is None:
                continue
            try:
                if self._faults is not None:
                    self._faults.at(f"{callback}:{stage.name}", self)
                call(self._context)
            except Exception as error:
                failure = StageError(stage.name, callback, error)
                log.error("%s", failure, exc_info=error)
                errors.append(failure)
        return errors


def describe(outcome: Outcome) -> str:
    """One line about a transfer, for the log."""
    what = "saved" if outcome.direction is Direction.SOURCE else "loaded"
    if outcome.error is not None:
        return f"device state not {what}: {outcome.error}"
    seconds = sum(outcome.durations.values())
    return (
        f"device state {what}: version {version_name(outcome.version)}, {outcome.size} bytes in {seconds * 1000:.1f} ms"
    )
