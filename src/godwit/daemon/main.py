# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon put together: a device, a socket for its front-end, a life cycle.

One front-end at a time: while one is served, another waits, and the log says so when
it has sent something, once. A connection that closes without a word is no front-end: another
start looked whether somebody listens (`godwit.daemon.lifecycle.listen`), and
does not end a ``--one-off`` daemon. In stream mode a front-end may well say nothing for long, as
long as its guest does: there only such a look by one of us is told from it, by its name.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections.abc import Coroutine
from contextlib import AsyncExitStack, closing

from godwit import __version__
from godwit.daemon import lifecycle, signals
from godwit.daemon.device import NetDevice
from godwit.daemon.errors import DaemonError, StartError
from godwit.daemon.hostwatch import HostWatch
from godwit.daemon.house import House, take_over
from godwit.daemon.lifecycle import Readiness
from godwit.daemon.log import Log
from godwit.daemon.options import Dialect, Options
from godwit.daemon.sandbox import Sandbox
from godwit.daemon.stream import serve_stream
from godwit.daemon.takeover import Predecessor
from godwit.net.change import facts
from godwit.net.config import NetConfigError
from godwit.net.forward import ForwardError
from godwit.vhost_user.aio import Server

logger = logging.getLogger(__name__)

_ACCEPT_AGAIN = 1.0  # seconds
# A frame's length comes first, most significant byte first, and is well below 2^24. A vhost-user message begins
# with the least significant byte of a request's number, and no request has one of 0.
_FRAME = b"\0"
_SPEAKS_WITHIN = 5.0  # seconds; a front-end speaks at once


def run(options: Options) -> int:
    """Run the daemon to its end; returns the exit status.

    In the background this returns in the daemon only: the launched process
    exits inside. Errors are written to the log, and until the daemon is ready
    to stderr.
    """
    logging.raiseExceptions = False  # a log that is lost is no reason to print tracebacks (`godwit.daemon.log`)
    readiness = Readiness()
    try:
        if options.fd is not None:
            lifecycle.inherited(options.fd)
        if not options.foreground:
            readiness = lifecycle.background([] if options.fd is None else [options.fd], options.pid)
        log = Log(options)
    except StartError as error:
        print(f"{options.dialect.value}: {error}", file=sys.stderr)  # noqa: T201  # there is no log to write it to
        return 1
    try:
        asyncio.run(_run_to_the_end(options, readiness, log))
    except (DaemonError, NetConfigError, ForwardError) as error:
        logger.error("%s", error)
        return 1
    except OSError as error:
        # The system's own words, with what they are about where it says so.
        logger.error("%s", error)
        logger.debug("where that came from:", exc_info=True)
        return 1
    finally:
        log.close()
    return 0


async def _run_to_the_end(options: Options, readiness: Readiness, log: Log) -> None:
    try:
        await _run(options, readiness, log)
    finally:
        # What is left is the interpreter's own end. It has no handlers, and a signal would spoil the exit status.
        signals.block()


async def _run(options: Options, readiness: Readiness, log: Log) -> None:
    user = lifecycle.user(options.runas)
    lifecycle.raise_descriptor_limit()
    # What others find us by goes before the device does, and before it lingers:
    # the next daemon may need the same paths at once.
    async with AsyncExitStack() as stack, AsyncExitStack() as names:
        pid = lifecycle.PidFile(options.pid) if options.pid else None
        house = House(options, pid, names)
        watch = HostWatch(options.net)
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        sandbox = Sandbox(options)
        if options.takeover is None:
            signals.take(loop, stop.set)  # from here on there is something that would stay
            house.open()
            stack.callback(house.close)
            config = watch.read()
            device = NetDevice(config, options, house.repair, watch.glance)
            stack.push_async_callback(device.close)
            device.open()

            def own(user: lifecycle.User) -> None:
                house.give_to(user)
                device.own(user)

            sandbox.sockets(house.paths())
            sandbox.enter(user, own, log.last_words())
            device.start()
        else:
            config = watch.read()
            before = Predecessor(options.takeover)
            # Where it is the other one's sockets are, if nothing is said.
            named = (
                options.takeover,
                options.socket,
                options.repair_path,
                options.takeover_path,
                options.ctl_path,
            )
            sandbox.sockets(path for path in named if path)
            sandbox.enter(user, lambda user: None, log.last_words())
            device = take_over(house, before, pid, lambda repair: NetDevice(config, options, repair, watch.glance))
            if unseen := [path for path in house.paths() if not os.path.lexists(path)]:
                logger.warning(
                    "out of reach, and left when this process ends, unless the start names them: %s", ", ".join(unseen)
                )
            stack.callback(house.close)
            stack.push_async_callback(device.close)
            signals.take(loop, stop.set)  # ended before that, it would have left the guest to the one that goes on
        house.device = device
        house.sandbox = sandbox.layers
        stack.callback(watch.close)
        watch.start(device.follow)
        if options.icmp and (why := lifecycle.no_ping()) is not None:
            logger.warning("%s", why)
            house.no_ping = True
        if pid is not None:
            pid.write()

        logger.info(
            "godwit %s is ready on %s, repair helper on %s, takeover on %s, control on %s",
            __version__,
            house.where,
            house.repair.path if house.repair is not None else "no socket",
            house.takeover_path or "no socket",
            house.control.path if house.control is not None else "no socket",
        )
        logger.info("the guest is told: %s", ", ".join(f"{name} {value}" for name, value in facts(config).items()))
        if options.socket is None and house.listener is not None and not (options.foreground or options.quiet):
            print(f"{options.dialect.value}: listens on {house.path}", file=sys.stderr)  # noqa: T201  # the log may be nowhere
        log.ready()
        readiness.declare()
        house.watch(stop.set)

        await _until(stop, _sessions(house, device, options))
        if house.successor:
            logger.info("ends: another godwit goes on with the guest")
            house.bequeath()
        else:
            stopped = stop.is_set()
            logger.info("ends: %s", "stopped by a signal" if stopped else "the front-end has disconnected")
            await names.aclose()
            if device.lingering:
                # Closed now, the connections that moved away would be reset by the next packet that still comes here.
                # Stopped before that, it leaves a process behind that does nothing else.
                logger.info(
                    "connections have moved away: stays silent for %.0f s more, or until stopped", device.lingering
                )
                if stopped:
                    stop.clear()  # the next signal is another one
                await _until(stop, asyncio.sleep(device.lingering))


async def _until(stop: asyncio.Event, work: Coroutine[object, object, None]) -> None:
    """Do some work to its end, or until told to stop."""
    tasks = [asyncio.create_task(work), asyncio.create_task(stop.wait())]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    for task in done:
        task.result()


async def _sessions(house: House, device: NetDevice, options: Options) -> None:
    """Serve front-ends, one after the other; returns after the first with ``--one-off`` or ``--fd``.

    With ``--migrate-exit`` it returns after one whose guest has moved away.
    """
    with closing(_Door(house)) as door:
        while True:
            if house.server is None and house.connection is None:
                house.connection = await _next_front_end(door, house, options)
                if house.connection is None:
                    continue
            with house.connection or contextlib.nullcontext():
                if house.listener is not None:
                    door.watch()
                await _session(house, device, options)
            if house.listener is None or house.successor or options.one_off:
                return
            if options.migrate_exit and device.moved_away:
                return


async def _next_front_end(door: _Door, house: House, options: Options) -> socket.socket | None:
    """Who connects next, and has something to say that a session can be made of; None if that was nobody."""
    house.waiting = accepted = await door.next()
    first = None if options.stream else await _first_byte(accepted)
    house.waiting = None
    if first not in (b"", _FRAME):
        return accepted
    if first:
        logger.error(
            "this front-end sends Ethernet frames, and vhost-user is what is spoken here: %s",
            "leave out --vhost-user" if options.dialect is Dialect.PASST else "start with --stream",
        )
    accepted.close()
    return None


class _Door:
    """Where front-ends come in, one after the other, and who only looks whether somebody is there goes out again."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._loop = asyncio.get_running_loop()

    @property
    def _listener(self) -> socket.socket:
        assert self._house.listener is not None  # or nobody would come
        return self._house.listener

    async def next(self) -> socket.socket:
        """Whoever waits, or comes next."""
        self._loop.remove_reader(self._listener)
        if self._house.waiting is not None:
            accepted, self._house.waiting = self._house.waiting, None
            self._loop.remove_reader(accepted)
            return accepted
        while True:
            await self._come()
            try:
                accepted, address = self._listener.accept()
            except BlockingIOError:
                continue
            except OSError as error:
                # Mostly for want of descriptors, which come back: the front-end waits in the backlog.
                logger.warning("a front-end cannot be accepted yet: %s", error.strerror)
                await asyncio.sleep(_ACCEPT_AGAIN)
                continue
            if not lifecycle.is_probe(address):
                accepted.setblocking(False)
                return accepted
            accepted.close()

    async def _come(self) -> None:
        """Somebody has connected, and is this process's to accept."""
        come = asyncio.Event()
        self._loop.add_reader(self._listener, come.set)
        try:
            await come.wait()
        finally:
            self._loop.remove_reader(self._listener)
        if self._house.successor:
            await asyncio.Event().wait()  # the end of this process is near

    def watch(self) -> None:
        """While one is served, log it once if another comes and has something to say."""
        if self._house.waiting is not None:
            return
        self._loop.add_reader(self._listener, self._another)

    def _another(self) -> None:
        if self._house.successor:
            return
        try:
            accepted, address = self._listener.accept()
        except BlockingIOError:
            return
        except OSError:
            self._loop.remove_reader(self._listener)  # `next` will say why
            return
        if lifecycle.is_probe(address):
            accepted.close()
            return
        accepted.setblocking(False)
        self._house.waiting = accepted
        self._loop.remove_reader(self._listener)
        self._loop.add_reader(accepted, self._speaks, accepted)

    def _speaks(self, accepted: socket.socket) -> None:
        self._loop.remove_reader(accepted)
        if _peek(accepted):
            logger.warning("another front-end has connected, and waits: one is served at a time")
            return
        accepted.close()  # it only looked
        self._house.waiting = None
        self.watch()

    def close(self) -> None:
        """Let nobody in any more, and send away who waits."""
        if self._house.listener is None:
            return
        self._loop.remove_reader(self._listener)
        if self._house.waiting is not None:
            self._loop.remove_reader(self._house.waiting)
            self._house.waiting.close()


async def _session(house: House, device: NetDevice, options: Options) -> None:
    """One front-end, to its end. Its errors end the session, never the process."""
    connection, house.connection = house.connection, None
    if connection is not None:
        logger.info("a front-end has connected")
        device.guest_comes()
        if not options.stream:
            house.server = Server(connection, device)
    error: Exception | str | None
    house.sessions.began(anew=connection is not None)
    if house.server is not None:
        error = await house.server.run()
        server, house.server = house.server, None
        house.sessions.over(server, error)
    else:
        assert connection is not None  # one of the two is there
        error = await serve_stream(connection, device)
        house.sessions.over(None, error)
    if error is None and not house.successor:
        logger.info("the front-end has disconnected")


def _peek(connection: socket.socket) -> bytes:
    """The first byte that waits, which stays there; none if the other end has closed."""
    try:
        return connection.recv(1, socket.MSG_PEEK)
    except OSError:
        return b""


async def _first_byte(connection: socket.socket) -> bytes:
    """Wait for a connection's first byte, and leave it there; empty if it closes instead."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(connection, readable.set)
    silent = loop.call_later(
        _SPEAKS_WITHIN,
        logger.warning,
        "somebody has connected and said nothing for %g s: no front-end is served until it does, or hangs up",
        _SPEAKS_WITHIN,
    )
    try:
        await readable.wait()
    finally:
        silent.cancel()
        loop.remove_reader(connection)
    return _peek(connection)
