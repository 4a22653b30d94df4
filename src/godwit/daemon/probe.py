# SPDX-License-Identifier: GPL-2.0-or-later
"""Where is the guest? It is asked, until its addresses are known.

What comes to a forwarded port over IPv6 goes to the address that the guest
uses. It made that up itself, most often, and shows it whenever it sends. But a
guest that only serves may have done so long ago, before this back-end was
started in the place of another.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

# Seconds between the questions. After an advertisement a host waits up to a second, and for one more
# for somebody who has the address (RFC 4861, section 10; RFC 4862, section 5.4.2).
PAUSES = (0.0, 1.0, 2.0, 7.0)


class AddressProbe:
    """Asks one guest. ``ask`` puts the questions that are open and returns whether there were any."""

    def __init__(self, ask: Callable[[], bool]) -> None:
        self._ask = ask
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """The guest has just come, or been told of another network: ask from now on."""
        self.stop()
        self._wait(0)

    def go_on(self) -> None:
        """The guest has sent something that changes its network, maybe: ask a little later, if need be."""
        if self._timer is None:
            self._wait(1)

    def stop(self) -> None:
        """Ask no more. May be repeated."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait(self, number: int) -> None:
        if number < len(PAUSES):
            self._timer = asyncio.get_running_loop().call_later(PAUSES[number], self._due, number)

    def _due(self, number: int) -> None:
        self._timer = None
        if self._ask():
            self._wait(number + 1)
