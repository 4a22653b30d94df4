# SPDX-License-Identifier: GPL-2.0-or-later
"""The host is short of something: a line in the log, once a minute at most for each kind, however often it happens."""

from __future__ import annotations

import asyncio
import logging

from godwit.dataplane import Engine

log = logging.getLogger(__name__)

QUIET = 60.0  # seconds

_SAID = {
    "descriptors": "there are no descriptors left for connections (ulimit -n, fs.file-max)",
    "memory": "the kernel has no memory for sockets (net.ipv4.tcp_mem, net.ipv4.udp_mem, the control group's)",
    "ports": "there is no local port, or no address, to connect from (net.ipv4.ip_local_port_range, ip address)",
    "places": "there are as many connections as there may be",
}
_MEANS = "new ones are turned away until there are some again, and those that are there go on"


class Shortages:
    """`look` is to be called whenever the engine's rare event fires."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._timer: asyncio.TimerHandle | None = None

    def look(self) -> None:
        """Say what the host is short of, if it is news."""
        for name in self._engine.take_shortages():
            log.warning("%s: %s", _SAID[name], _MEANS)
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(QUIET, self._listen)

    def _listen(self) -> None:
        self._timer = None
        self._engine.watch_shortages()

    def close(self) -> None:
        """Nothing is said any more."""
        if self._timer is not None:
            self._timer.cancel()
