# SPDX-License-Identifier: GPL-2.0-or-later
"""What the requests of a vhost-user front-end mean for a transfer.

Theory of operation. No request says *the migration has failed* or *it is done*;
a device reads that off what the front-end does next, and every device in the
same way. A guest that is started after a save goes on here: roll-back. One
that is started after a load has arrived: commit. A front-end that hangs up
after a save has taken the guest away; after a load, nobody will come: discard.
Whatever runs still is cancelled and waited for before.

The methods are called by the device's, one at a time. Stages run in a thread,
one at a time too, and a method that is cancelled leaves them to their end: the
next one waits for it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from typing import BinaryIO, Final, Generic

from godwit.migration.errors import StateError
from godwit.migration.lifecycle import Direction, State
from godwit.migration.migration import Migration
from godwit.migration.version import Context

log = logging.getLogger(__name__)

_GONE_OUT: Final = (State.SAVED, State.LINGERING)


class Transfers(Generic[Context]):
    """The transfers of one device, at most one at a time, for a device under asyncio."""

    def __init__(self) -> None:
        self._current: Migration[Context] | None = None
        self._work: asyncio.Future[object] | None = None

    @property
    def current(self) -> Migration[Context] | None:
        """The transfer that has begun and not ended: the guest stands still because of it."""
        return self._current

    @property
    def state(self) -> State | None:
        """Where that transfer is."""
        return None if self._current is None else self._current.state

    @property
    def loaded(self) -> bool:
        """A load has arrived whose guest is not let run yet: what announces it then, has it run."""
        return self.state is State.LOADED

    async def begin(
        self,
        transfer: Migration[Context],
        file: int | BinaryIO,
        direction: Direction,
        version: int | None = None,
        *,
        done: Callable[[], None] = lambda: None,
    ) -> None:
        """SET_DEVICE_STATE_FD: start to save or load, and return; the arguments are those of ``Migration.request``.

        A transfer that is there still is ended before: a save is rolled back, a
        load discarded. ``done`` is called once: when ``run`` has returned, in its
        thread, or when it will never run. A descriptor is the transfer's whatever happens.

        :raises ValueError: this device does not write that version.
        """
        try:
            await self.end("the front-end has turned to something else")
        except BaseException:
            if isinstance(file, int):
                os.close(file)
            done()
            raise
        try:
            transfer.request(file, direction, version)
        except (ValueError, StateError):
            done()
            raise
        self._current = transfer

        def run() -> object:
            try:
                return transfer.run()
            finally:
                done()

        self._work = asyncio.ensure_future(asyncio.to_thread(run))

    async def check(self) -> bool:
        """CHECK_DEVICE_STATE: wait for ``run`` to end; whether all went well. A good save lingers from here on.

        :raises StateError: there is no transfer.
        """
        transfer, work = self._current, self._work
        if transfer is None or work is None:
            raise StateError("no state was transferred")
        await asyncio.shield(work)
        if transfer.state is State.SAVED:
            await self._do(transfer.linger)
        return bool(transfer.outcome)

    async def guest_runs(self) -> State | None:
        """SET_VRING_KICK: the guest runs, here. Rolls back a save, commits a load.

        Gives the state in which the transfer has ended: ``ROLLED_BACK`` (a save,
        also one that had failed), ``COMMITTED``, ``DISCARDED`` (a load that had
        failed, or had not ended); None without a transfer.
        """
        transfer = self._current
        if transfer is None:
            return None
        await self.settle("the guest runs")
        if transfer.state in _GONE_OUT:
            log.info("the guest goes on here: roll-back")
            await self._do(transfer.rollback)
        elif transfer.state is State.LOADED:
            await self._do(transfer.commit)
        elif transfer.state is State.ROLLED_BACK:
            log.info("the guest goes on here: its state was not saved")
        return self._close()

    async def guest_is_announced(self) -> State | None:
        """SEND_RARP: after a load, the guest runs here. At any other time it says nothing of a transfer.

        A front-end may be told to announce its guest at any time, also one whose guest has moved away.
        """
        return await self.guest_runs() if self.loaded else None

    async def settle(self, why: str) -> State | None:
        """Have what runs of the transfer come to its end: a save or load is cancelled, the rest is waited for.

        Gives the state that it is in then.
        """
        if self._current is not None and self._work is not None and not self._work.done():
            self._current.cancel(why)
            await asyncio.wait([self._work])
        return self.state

    async def hung_up(self) -> State | None:
        """The front-end is gone (``disconnected``). A save stays saved: the guest has moved; a load is discarded.

        Gives the state in which the transfer has ended, ``SAVED`` or
        ``LINGERING`` where the guest has moved away; None without a transfer.
        """
        transfer = self._current
        if transfer is None:
            return None
        await self.settle("the front-end has hung up")
        if transfer.state is State.LOADED:
            await self._do(transfer.discard)
        return self._close()

    async def end(self, why: str) -> State | None:
        """End a transfer for any other reason; the device is as it was before it. Gives the state that it ended in."""
        transfer = self._current
        if transfer is None:
            return None
        await self.settle(why)
        if transfer.state in _GONE_OUT:
            await self._do(transfer.rollback)
        elif transfer.state is State.LOADED:
            await self._do(transfer.discard)
        return self._close()

    async def _do(self, work: Callable[[], object]) -> None:
        """Do something in a thread, where it goes on if we are cancelled meanwhile."""
        self._work = asyncio.ensure_future(asyncio.to_thread(work))
        await asyncio.shield(self._work)

    def _close(self) -> State:
        transfer = self._current
        assert transfer is not None  # checked by the callers
        ended = transfer.state
        transfer.close()
        self._current = self._work = None
        return ended
