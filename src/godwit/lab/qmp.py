# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's machine protocol, as one synchronous connection."""

from __future__ import annotations

import json
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from godwit.lab.errors import LabError


class QMPError(LabError):
    """QEMU refused a command, or did not answer."""


class QMP:
    """A connection to one QEMU's monitor.

    Commands block until their answer. Events that come meanwhile wait in
    ``events``, in order, until :meth:`wait` takes them out.
    """

    def __init__(self, sock: socket.socket, timeout: float = 30.0) -> None:
        """Greet the QEMU at the other end of ``sock``, which has ``timeout`` seconds to do so."""
        self._sock = sock
        self._buffer = b""
        self._timeout = timeout
        self.events: deque[dict[str, Any]] = deque()
        greeting = self._read(time.monotonic() + timeout)
        if "QMP" not in greeting:
            raise QMPError(f"not a QEMU monitor: {greeting}")
        self.command("qmp_capabilities")

    def _read(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0:
                raise QMPError("QEMU's monitor is silent")
            self._sock.settimeout(left)
            try:
                data = self._sock.recv(65536)
            except TimeoutError as error:
                raise QMPError("QEMU's monitor is silent") from error
            except OSError as error:
                raise QMPError(f"QEMU's monitor is gone: {error}") from error
            if not data:
                raise QMPError("QEMU has ended")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def command(self, name: str, /, **arguments: Any) -> Any:
        """Run a command and return what it returns. An underscore in a name stands for a dash.

        Raises :class:`QMPError` if QEMU refuses it, is gone or does not answer.
        """
        request: dict[str, Any] = {"execute": name}
        if arguments:
            request["arguments"] = {key.replace("_", "-"): value for key, value in arguments.items()}
        try:
            self._sock.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise QMPError(f"{name}: QEMU's monitor is gone: {error}") from error
        deadline = time.monotonic() + self._timeout
        while True:
            message = self._read(deadline)
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                raise QMPError(f"{name}: {message['error'].get('desc', message['error'])}")
            else:
                return message.get("return")

    def wait(self, wanted: Callable[[dict[str, Any]], bool], what: str, timeout: float = 30.0) -> dict[str, Any]:
        """Wait for the first event that is ``wanted``, and take it out; the others stay.

        Raises :class:`QMPError` naming ``what`` when ``timeout`` seconds bring none.
        """
        deadline = time.monotonic() + timeout
        seen = 0
        while True:
            for index in range(seen, len(self.events)):
                if wanted(self.events[index]):
                    event = self.events[index]
                    del self.events[index]
                    return event
            seen = len(self.events)
            try:
                message = self._read(deadline)
            except QMPError as error:
                raise QMPError(f"waiting for {what}: {error}") from error
            if "event" in message:
                self.events.append(message)

    def close(self) -> None:
        """Hang up."""
        self._sock.close()


def named(*names: str) -> Callable[[dict[str, Any]], bool]:
    """Return a filter for :meth:`QMP.wait`: events with one of these names."""
    return lambda event: event["event"] in names


def migration(*states: str) -> Callable[[dict[str, Any]], bool]:
    """Return a filter for :meth:`QMP.wait`: the migration has come to one of these states."""
    return lambda event: event["event"] == "MIGRATION" and event["data"]["status"] in states
