# SPDX-License-Identifier: GPL-2.0-or-later
"""Device states kept in files, for debugging (``--record``): what was saved here, and what was loaded.

They hold what was in the connections' queues, so nobody else may read them. The
guest stands still while its state is moved, and no file is a reason to have it
wait, or to fail: a thread of its own writes, and what it is behind with is in
memory. Where that becomes too much, or writing fails, the recording is given up
and its file removed, so that each that stays is whole. (One that a process has
not finished when it is killed is not; the inspector says so.)
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
from collections import deque

from godwit.daemon import signals

log = logging.getLogger(__name__)

MOST_BEHIND = 64 << 20  # bytes that wait to be written

_write = os.write


def refusal(path: str) -> str | None:
    """Why this process, as the user that it is, can make no file whose name begins with ``path``; None if it can."""
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        return f"there is no directory {folder}"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"user {os.geteuid()} may make no files in {folder}"
    return None


class Recording:
    """One state: ``PATH.N.saved`` or ``PATH.N.loaded``, with the next N that is free.

    ``write`` and ``close`` never wait. A process that ends waits for what was closed.
    """

    def __init__(self, path: str, kind: str) -> None:
        self.path = path
        self._parts: deque[bytes] = deque()
        self._behind = 0  # bytes in there, and in the writer's hand
        self._change = threading.Condition()
        self._ended = False  # there is no more to come
        self._failed = False
        self._writer: threading.Thread | None = None
        try:
            fd = self._create(path, kind)
        except OSError as error:
            self._give_up(f"cannot write {self.path}: {error.strerror}")
            return
        self._writer = threading.Thread(target=self._write_all, args=(fd,), name="record")
        with signals.blocked():
            self._writer.start()

    def _create(self, path: str, kind: str) -> int:
        for number in itertools.count(1):
            self.path = f"{path}.{number}.{kind}"
            with contextlib.suppress(FileExistsError):
                return os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        raise AssertionError("numbers do not end")

    def write(self, data: bytes) -> None:
        """Append."""
        with self._change:
            if self._ended or self._failed:
                return
            if self._behind + len(data) > MOST_BEHIND:
                self._give_up(f"{self.path} takes too long: {self._behind >> 20} MiB wait to be written")
                return
            self._parts.append(data)
            self._behind += len(data)
            self._change.notify()

    def close(self) -> None:
        """There is no more. May be repeated."""
        with self._change:
            self._ended = True
            self._change.notify()

    def wait(self, timeout: float) -> bool:
        """After ``close``, wait for the file to be whole, or gone; False if it takes more than so many seconds."""
        if self._writer is None:
            return True
        self._writer.join(timeout)
        return not self._writer.is_alive()

    def _give_up(self, why: str) -> None:
        with self._change:
            if not self._failed:
                log.error("the device state is not recorded: %s", why)
            self._failed = True
            self._parts.clear()
            self._change.notify()

    # ---- the thread

    def _write_all(self, fd: int) -> None:
        try:
            while (data := self._next()) is not None:
                view = memoryview(data)
                while view:
                    view = view[_write(fd, view) :]
                with self._change:
                    self._behind -= len(data)
        except OSError as error:
            self._give_up(f"cannot write {self.path}: {error.strerror}")
        finally:
            os.close(fd)
            if self._failed:
                with contextlib.suppress(OSError):
                    os.unlink(self.path)

    def _next(self) -> bytes | None:
        """What is to be written next, once there is something; None for nothing more."""
        with self._change:
            self._change.wait_for(lambda: self._parts or self._ended or self._failed)
            return self._parts.popleft() if self._parts else None
