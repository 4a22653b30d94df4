# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's network is watched, and the guest's follows it.

Two things say that it is time to look: netlink events (`NetEvents`), and
resolv.conf being another file than it was (its device, inode, size and times).
That file is looked at after each event, a few more times since whoever changes
a route often writes it a little later, and before the guest is answered.

What is read becomes a configuration (`choose`, `settle`), and if that is
another than the present one, ``follow`` is called with it. What the command
line says stays as it is, since the same options go into each decision.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import replace

from godwit.net.change import LET_GO_SECONDS, WITHDRAWN_SECONDS, describe, settle
from godwit.net.config import NetConfig, NetConfigError, NetOptions, Withdrawn, choose
from godwit.net.netevents import NetEvents
from godwit.net.netlink import HostNetwork, read_network
from godwit.net.resolv import PATH, Resolv, read_resolv

log = logging.getLogger(__name__)

SETTLES = 0.2  # seconds; changes come in groups
AT_MOST_EVERY = 1.0  # seconds, where they come without end
GLANCES = (1.0, 5.0, 20.0)  # seconds after a change
REMEMBERED = 64  # texts for the log that are not said again
AGAIN = 10.0  # seconds after a look that has failed: what was lacking makes no event when it is there again

Stamp = tuple[int, ...]


class HostWatch:
    """One guest's host. ``read`` first, then ``start``; all but ``read`` in the event loop's thread.

    Made in the network namespace that is watched; needs no privilege, then or later.
    """

    def __init__(self, options: NetOptions, resolv_path: str = PATH) -> None:
        self._options = options
        self._path = resolv_path
        self._config = NetConfig()
        self._network = HostNetwork()
        self._resolv = Resolv()
        self._stamp: Stamp = ()
        self._said: dict[str, None] = {}  # in that order
        self._follow: Callable[[NetConfig], None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._reading: asyncio.Task[None] | None = None
        self._read_at = -AT_MOST_EVERY
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._events: NetEvents | None = None
        try:
            self._events = NetEvents()
        except OSError as error:
            log.warning("changes of the host's network will not reach the guest: %s", error)

    def read(self) -> NetConfig:
        """Read the host and decide for the first time. Blocks. Raises as `godwit.net.config.read_host` does."""
        self._take(*self._look())
        self._config = choose(self._options, self._network, self._resolv)
        self._say(self._config)
        return self._config

    def start(self, follow: Callable[[NetConfig], None]) -> None:
        """Watch from now on; ``follow`` is called with each configuration that is another."""
        self._loop = asyncio.get_running_loop()
        self._follow = follow
        self._listen()  # to what has come since the first look, too

    def close(self) -> None:
        """Watch no more. May be repeated."""
        for timer in self._timers.values():
            timer.cancel()
        if self._reading is not None:
            self._reading.cancel()
        if self._events is not None:
            if self._loop is not None:
                self._loop.remove_reader(self._events)
            self._events.close()
            self._events = None

    def glance(self) -> None:
        """Look whether resolv.conf is another file, and take what it says if so. Costs one stat(2)."""
        if self._follow is None or self._stamp_now() in ((), self._stamp):
            return  # unchanged, or gone for a moment
        try:
            self._resolv, self._stamp = self._look_resolv()
        except OSError:
            self._later("glance again", AGAIN, self.glance)
            return
        self._decide()

    # ---- looking

    def _stamp_now(self) -> Stamp:
        try:
            found = os.stat(self._path)
        except OSError:
            return ()
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def _look_resolv(self) -> tuple[Resolv, Stamp]:
        stamp = self._stamp_now()  # before the reading: what changes meanwhile shows
        return read_resolv(self._path), stamp

    def _look(self) -> tuple[HostNetwork, Resolv, Stamp]:
        return read_network(), *self._look_resolv()

    def _take(self, network: HostNetwork, resolv: Resolv, stamp: Stamp) -> None:
        self._network, self._resolv, self._stamp = network, resolv, stamp

    # ---- when

    def _listen(self) -> None:
        if self._events is not None and self._loop is not None:
            self._loop.add_reader(self._events, self._heard)

    def _heard(self) -> None:
        """Something has come. What it is can wait: a storm of events shall cost a look now and then, no more."""
        assert self._loop is not None  # since start()
        assert self._events is not None  # or nothing would be watched
        self._loop.remove_reader(self._events)
        self._later("look", max(SETTLES, self._read_at + AT_MOST_EVERY - self._loop.time()), self._due)

    def _due(self) -> None:
        assert self._events is not None  # or nothing would be watched
        try:
            matters = self._events.drain()
        except OSError as error:
            log.warning("changes of the host's network will not reach the guest any more: %s", error)
            self.close()
            return
        if matters:
            self._reading = asyncio.ensure_future(self._read_again())
        else:
            self._listen()

    def _later(self, name: str, delay: float, work: Callable[[], None]) -> None:
        """Do it then, and not when it was to be done before."""
        assert self._loop is not None  # since start()

        def due() -> None:
            del self._timers[name]
            work()

        if name in self._timers:
            self._timers[name].cancel()
        self._timers[name] = self._loop.call_later(delay, due)

    async def _read_again(self) -> None:
        assert self._loop is not None  # since start()
        try:
            self._take(*await asyncio.to_thread(self._look))
            self._decide()
        except Exception as error:  # the guest has what it had, and the next look may find it better
            self._later("again", AGAIN, self._look_again)
            self._warn(f"the host's network cannot be read: {error}")
            log.debug("where that came from:", exc_info=True)
        self._reading = None
        self._read_at = self._loop.time()
        for delay in GLANCES:
            self._later(f"glance {delay}", delay, self.glance)
        self._listen()  # to what has come meanwhile, too

    def _look_again(self) -> None:
        if self._reading is None and self._loop is not None and self._events is not None:
            self._loop.remove_reader(self._events)
            self._reading = asyncio.ensure_future(self._read_again())

    # ---- what

    def _decide(self, *, let_go: bool = False) -> None:
        old = self._config
        try:
            new = choose(self._options, self._network, self._resolv, old)
        except NetConfigError as error:
            self._warn(f"{error}; the guest keeps what it has")
            return
        config = settle(old, new, let_go=let_go)
        kept = (config.addr4, config.addr6) != (new.addr4, new.addr6)
        if kept and not let_go and "let go" not in self._timers:
            self._later("let go", LET_GO_SECONDS, lambda: self._decide(let_go=True))
        elif not kept and "let go" in self._timers:
            self._timers.pop("let go").cancel()
        if config == old:
            self._config = config  # where what the guest is not told is another
            return
        log.info("the host's network has changed, the guest's follows: %s", describe(old, config) or "nothing it sees")
        self._say(new)
        self._deliver(config)
        self._later("forget", WITHDRAWN_SECONDS, self._forget)

    def _forget(self) -> None:
        """Nobody believes any more in what was withdrawn."""
        self._deliver(replace(self._config, withdrawn=Withdrawn()))

    def _deliver(self, config: NetConfig) -> None:
        assert self._follow is not None  # since start()
        self._config = config
        self._follow(config)

    def _say(self, config: NetConfig) -> None:
        for text in config.warnings:
            self._warn(text)
        for text in config.notes:
            self._once(logging.INFO, text)

    def _warn(self, text: str) -> None:
        self._once(logging.WARNING, text)

    def _once(self, level: int, text: str) -> None:
        """Not again, as long as it is remembered."""
        if text in self._said:
            return
        self._said[text] = None
        if len(self._said) > REMEMBERED:
            del self._said[next(iter(self._said))]
        log.log(level, "%s", text)
