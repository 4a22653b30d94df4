# SPDX-License-Identifier: GPL-2.0-or-later
"""Who connects to a listening socket of the daemon's, also where the host has no descriptor for them just now."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

from godwit.daemon import lifecycle

log = logging.getLogger(__name__)

_AGAIN = 1.0  # seconds


class Callers:
    """Calls ``come`` with each connection to ``listener``, but for those that only look whether somebody lives.

    When one cannot be accepted, mostly for want of descriptors, the log says ``unheard``, and who connects waits for a
    second: the socket would be readable all the time.
    """

    def __init__(self, listener: socket.socket, come: Callable[[socket.socket], None], unheard: str) -> None:
        self._listener = listener
        self._come = come
        self._unheard = unheard
        self._loop = asyncio.get_running_loop()
        self._again: asyncio.TimerHandle | None = None

    def watch(self) -> None:
        """From now on."""
        self._loop.add_reader(self._listener, self._accept)

    def stop(self) -> None:
        """Let nobody in any more. Those who wait are another process's. May be repeated."""
        if self._again is not None:
            self._again.cancel()
            self._again = None
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener)

    def _accept(self) -> None:
        try:
            sock, address = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            log.warning("%s: %s", self._unheard, error.strerror)
            self._loop.remove_reader(self._listener)
            self._again = self._loop.call_later(_AGAIN, self.watch)
            return
        if lifecycle.is_probe(address):
            sock.close()
        else:
            self._come(sock)
