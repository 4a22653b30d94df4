# SPDX-License-Identifier: GPL-2.0-or-later
"""A migration of the embedded guest, as QEMU does one, in steps.

Each step is a method, so that a test can fail, wait or look between any two:

1. ``connect_target``: the connect sequence with the target.
2. ``log_on``: the source logs dirty pages; the guest runs on.
3. ``suspend``: the guest stops, GET_VRING_BASE on the source. QEMU's
   "pre-switchover" is the time after it.
4. ``transfer``: the source saves, the target loads, both are checked. The
   stream goes through here and is kept. (``save`` and ``load`` by themselves.)
5. ``switch_over``: SEND_RARP, the rings start on the target, the guest runs.
6. ``finish``: hang up on the source.

``cancel``, between any two of them before ``finish``, brings the guest back to
the source in the way that QEMU does. ``run`` takes all steps but the last, and
cancels if one of them fails.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from godwit.lab.errors import LabError
from godwit.vhost_user import Direction, VhostUserError

if TYPE_CHECKING:
    from godwit.lab.attachment import Attachment
    from godwit.lab.guest import EmbeddedGuest

BLOCK = 1 << 18


class MigrationError(LabError):
    """A migration failed in ``step``; the guest is where it was, unless the message says otherwise."""

    def __init__(self, step: str, message: str) -> None:
        self.step = step
        super().__init__(f"migration failed in {step}: {message}")


@dataclass
class Record:
    """What happened in a migration; times in seconds."""

    stream: bytes = b""
    bases: list[int] = field(default_factory=list)
    dirty: set[int] = field(default_factory=set)  # numbers of pages
    save_seconds: float = 0.0  # from SET_DEVICE_STATE_FD to the end of the source's stream
    load_seconds: float = 0.0  # from there to the target's answer to CHECK_DEVICE_STATE
    downtime: float = 0.0  # the guest stood still


class Migration:
    """One migration of ``guest`` from its back-end to the one at ``path``."""

    def __init__(self, guest: EmbeddedGuest, path: str) -> None:
        if guest.attachment is None:
            raise LabError("the guest has no back-end to migrate from")
        self.guest = guest
        self.path = path
        self.record = Record()
        self.source = guest.attachment
        self.target: Attachment | None = None
        self._log_is_on = False
        self._stopped_at: float | None = None
        self._done = False

    def run(self, before_run: Callable[[], None] | None = None) -> Record:
        """Take all steps but ``finish``; ``before_run`` is called when the load has been checked."""
        step = "none"
        try:
            for step in ("connect_target", "log_on", "suspend", "transfer"):
                getattr(self, step)()
            if before_run is not None:
                step = "before_run"
                before_run()
            step = "switch_over"
            self.switch_over()
        except (LabError, VhostUserError, OSError) as error:
            try:
                self.cancel()
            except (LabError, VhostUserError, OSError) as worse:
                raise MigrationError(step, f"{error}; and the source did not take the guest back: {worse}") from error
            if isinstance(error, MigrationError):
                raise
            raise MigrationError(step, str(error)) from error
        return self.record

    def connect_target(self) -> None:
        """Connect to the target, which must offer what the guest has in use."""
        self.target = self.guest.attach(self.path)
        lacking = self.source.features & ~self.target.features
        if lacking:
            raise LabError(f"the target does not offer features that the guest uses: {lacking:#x}")
        self.target.features = self.source.features
        if self.source.has_state != self.target.has_state:
            raise LabError("only one of the two back-ends has a state to migrate (DEVICE_STATE)")

    def log_on(self) -> None:
        """Begin to log dirty pages on the source."""
        self._log = self.source.log_on()
        self._log_is_on = True

    def suspend(self) -> None:
        """Stop the guest and the source's rings."""
        self.guest.pause()
        self._stopped_at = time.monotonic()
        self.record.bases = self.source.suspend()

    def transfer(self, *, cut: int | None = None) -> None:
        """Move the state from the source to the target.

        ``cut``: close the target's pipe after so many bytes, as a broken stream
        would; the source's is read to its end all the same.
        """
        target = self._target()
        if not self.source.has_state:
            return
        started = time.monotonic()
        reading = self.source.state_pipe(Direction.SAVE)
        try:
            try:
                writing = target.state_pipe(Direction.LOAD)
            except BaseException:
                os.close(reading)
                reading = -1
                self.source.check()
                raise
            broken = self._pump(reading, writing, cut)
        finally:
            if reading >= 0:
                os.close(reading)
        ended = time.monotonic()
        self.record.save_seconds = ended - started
        if not self.source.check():
            raise MigrationError("transfer", "the source failed to save its state")
        good = target.check()
        self.record.load_seconds = time.monotonic() - ended
        if not good:
            raise MigrationError("transfer", "the target refused the state")
        if broken is not None:
            raise MigrationError("transfer", f"the target stopped reading: {broken}")

    def _pump(self, reading: int, writing: int, cut: int | None) -> OSError | None:
        """Copy the stream, keep it, and close ``writing``; return why the target stopped reading."""
        broken: OSError | None = None
        chunks: list[bytes] = []
        passed = 0
        try:
            while True:
                self._wait(reading, select.POLLIN, "the source to save its state")
                chunk = os.read(reading, BLOCK)
                if not chunk:
                    break
                chunks.append(chunk)
                if cut is not None:
                    chunk = chunk[: max(0, cut - passed)]
                if broken is None:
                    try:
                        self._feed(writing, chunk)
                    except BrokenPipeError as error:
                        broken = error
                    passed += len(chunk)
        finally:
            os.close(writing)
            self.record.stream = b"".join(chunks)
        return broken

    def _feed(self, writing: int, data: bytes) -> None:
        """Write all of this into the target's pipe, in pieces as large as there is room for."""
        os.set_blocking(writing, False)
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(writing, view) :]
            except BlockingIOError:
                self._wait(writing, select.POLLOUT, "the target to take its state")

    def _wait(self, fd: int, events: int, what: str) -> None:
        poll = select.poll()
        poll.register(fd, events)
        timeout = self.guest.timeout
        if not poll.poll(timeout * 1000):
            raise LabError(f"waited {timeout:g} s for {what}")

    def save(self) -> bytes:
        """Have the source save its state, check it, and return it (part of ``transfer``)."""
        reading = self.source.state_pipe(Direction.SAVE)
        chunks = []
        try:
            while True:
                self._wait(reading, select.POLLIN, "the source to save its state")
                chunk = os.read(reading, BLOCK)
                if not chunk:
                    break
                chunks.append(chunk)
        finally:
            os.close(reading)
        self.record.stream = b"".join(chunks)
        if not self.source.check():
            raise MigrationError("save", "the source failed to save its state")
        return self.record.stream

    def load(self, stream: bytes) -> bool:
        """Have the target load this state; whether it found it good (part of ``transfer``)."""
        target = self._target()
        writing = target.state_pipe(Direction.LOAD)
        try:
            self._feed(writing, stream)
        except BrokenPipeError:
            pass  # its answer says why
        finally:
            os.close(writing)
        return target.check()

    def switch_over(self) -> None:
        """Let the guest run on the target."""
        target = self._target()
        target.enable()
        target.announce(bytes.fromhex(self.guest.mac.replace(":", "")))
        self.guest.move_to(target, self.record.bases)
        if self._stopped_at is not None:
            self.record.downtime = time.monotonic() - self._stopped_at

    def finish(self) -> None:
        """Hang up on the source, which has lingered so far."""
        if self._log_is_on:
            self.record.dirty = self._log.pages()
        self.source.close()
        self._done = True

    def cancel(self) -> None:
        """Bring the guest back to the source, from wherever this got to.

        The target is hung up on. After ``switch_over``, too: as when libvirt's
        last step fails and the source is told to go on, though a guest that has
        run on the target has a state that the source does not know of.
        """
        if self._done:
            raise LabError("the migration is over: there is nothing to cancel")
        self._done = True
        if self.target is not None:
            if self.guest.attachment is self.target:
                self.guest.pause()
                self.guest.mover.detach()
            self.target.close()
        if self._stopped_at is not None:
            self.source.enable()
            self.guest.move_to(self.source, self.record.bases)
            self.record.downtime = time.monotonic() - self._stopped_at
        if self._log_is_on:
            self.record.dirty = self._log.pages()
            self.source.log_off()

    def _target(self) -> Attachment:
        if self.target is None:
            raise LabError("the target is not connected yet")
        return self.target
