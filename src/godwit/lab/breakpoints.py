# SPDX-License-Identifier: GPL-2.0-or-later
"""A godwit that stops at every point of a migration, and goes on as it is told: for tests of what fails there.

The points are those of ``godwit.migration.faults``. ``python -m
godwit.lab.breakpoints SOCKET`` takes the options of ``godwit serve``, says each
point over the socket, and waits for an answer; here is who answers::

    with Breakpoints(folder) as points, Scenario(breakpoints=points.path) as scenario:
        points.at("target:header", lambda: "fail")

Nothing of it is in the daemon: that is only given another ``Migration``.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from godwit.daemon import device
from godwit.daemon.main import run
from godwit.daemon.options import Dialect, parse
from godwit.lab.closing import Closing
from godwit.migration import Faults, Migration
from godwit.migration.faults import Cuttable

GO_ON = "go on"


class Breakpoints(Closing):
    """Answers daemons. ``passed`` are the points that were passed, ``reached`` those where something was to happen."""

    def __init__(self, folder: str) -> None:
        self.path = os.path.join(folder, "breakpoints.sock")
        self.passed: list[str] = []
        self.reached: list[str] = []
        self._actions: dict[str, Callable[[], str]] = {}
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(self.path)
        self._listening.listen()
        self._connections: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def at(self, point: str, action: Callable[[], str]) -> None:
        """At this point, once, do something; what it returns is ``GO_ON`` or one of ``Faults.ACTIONS``."""
        self._actions[point] = action

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                self._connections.append(connection)
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection, connection.makefile("rw") as lines:
            for line in lines:
                point = line.rstrip("\n")
                self.passed.append(point)
                action = self._actions.pop(point, None)
                answer = GO_ON
                if action is not None:
                    self.reached.append(point)
                    answer = action()
                lines.write(f"{answer}\n")
                lines.flush()

    def close(self) -> None:
        """Answer nobody any more; daemons go on by themselves. May be repeated."""
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Asking(Faults):
    """What happens at a point is asked for."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__()
        self._lines = connection.makefile("rw")

    def at(self, point: str, transfer: Cuttable) -> None:
        """Say it, wait for an answer, and act on it."""
        answer = ""
        with contextlib.suppress(OSError):
            self._lines.write(f"{point}\n")
            self._lines.flush()
            answer = self._lines.readline().rstrip("\n")
        action = self.ACTIONS.get(answer)
        if action is not None:
            action(point, transfer)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the daemon."""
    path, *words = sys.argv[1:] if arguments is None else arguments
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)  # now: as whom it becomes, it may not
    faults = _Asking(connection)

    def asking(*given: Any, **named: Any) -> Migration[Any]:
        return Migration(*given, faults=faults, **named)

    vars(device)["Migration"] = asking
    return run(parse(words, Dialect.GODWIT))


if __name__ == "__main__":
    sys.exit(main())
