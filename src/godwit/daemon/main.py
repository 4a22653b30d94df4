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
import logging
import signal
import socket
import sys
from collections.abc import Coroutine
from contextlib import AsyncExitStack, closing

from godwit import __version__
from godwit.daemon import lifecycle
from godwit.daemon.device import NetDevice
from godwit.daemon.errors import DaemonError, StartError, reason
from godwit.daemon.hostwatch import HostWatch
from godwit.daemon.lifecycle import Readiness
from godwit.daemon.log import Log
from godwit.daemon.options import Dialect, Options
from godwit.daemon.stream import serve_stream
from godwit.net.change import facts
from godwit.net.config import NetConfigError
from godwit.net.forward import ForwardError
from godwit.repair.client import RepairListener
from godwit.vhost_user.aio import serve

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
            readiness = lifecycle.background([] if options.fd is None else [options.fd])
        log = Log(options)
    except StartError as error:
        print(f"{options.dialect.value}: {error}", file=sys.stderr)  # noqa: T201  # there is no log to write it to
        return 1
    try:
        asyncio.run(_run(options, readiness, log))
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


async def _run(options: Options, readiness: Readiness, log: Log) -> None:
    user = lifecycle.user(options.runas)
    lifecycle.raise_descriptor_limit()
    # What others find us by goes before the device does, and before it lingers:
    # the next daemon may need the same paths at once.
    async with AsyncExitStack() as stack, AsyncExitStack() as names:
        pid = lifecycle.PidFile(options.pid) if options.pid else None
        if pid is not None:
            names.callback(pid.close)

        listener: socket.socket | None = None
        connection: socket.socket | None = None
        path = options.socket
        if options.fd is not None:
            connection = lifecycle.connected(options.fd)
            stack.callback(connection.close)
        else:
            if path is None:
                listener, path = lifecycle.listen_on_first(lifecycle.PASST_SOCKETS)
            else:
                listener = lifecycle.listen(path)
            names.callback(listener.close)
            names.callback(lifecycle.remove, path)  # before that: once it is closed, the next daemon may make it anew

        repair_path = _repair_path(options, path)
        repair = None if repair_path is None else _listen_for_helper(repair_path)
        if repair is not None:
            names.callback(repair.close)
            names.callback(asyncio.get_running_loop().remove_reader, repair)  # the device watches it

        watch = HostWatch(options.net)
        config = await asyncio.to_thread(watch.read)
        device = NetDevice(config, options, repair, watch.glance)
        stack.push_async_callback(device.close)
        await device.start()
        stack.callback(watch.close)

        if user is not None:
            for owned in (path if listener is not None else None, repair_path):
                if owned is not None:
                    user.own(owned)
            device.own(user)
            user.assume()
        watch.start(device.follow)
        if options.icmp and (why := lifecycle.no_ping()) is not None:
            logger.warning("%s", why)
        if pid is not None:
            pid.write()

        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)

        where = path if connection is None else f"descriptor {options.fd}"
        logger.info("godwit %s is ready on %s, repair helper on %s", __version__, where, repair_path or "no socket")
        logger.info("the guest is told: %s", ", ".join(f"{name} {value}" for name, value in facts(config).items()))
        if options.socket is None and listener is not None and not (options.foreground or options.quiet):
            print(f"{options.dialect.value}: listens on {path}", file=sys.stderr)  # noqa: T201  # the log may be nowhere
        log.ready()
        readiness.declare()

        await _until(stop, _sessions(listener, connection, device, options))
        stopped = stop.is_set()
        logger.info("ends: %s", "stopped by a signal" if stopped else "the front-end has disconnected")
        await names.aclose()
        if device.lingering:
            # Closed now, the connections that moved away would be reset by the next packet that still comes here.
            # Stopped before that, it leaves a process behind that does nothing else.
            logger.info("connections have moved away: stays silent for %.0f s more, or until stopped", device.lingering)
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


def _listen_for_helper(path: str) -> RepairListener:
    try:
        return RepairListener(path)
    except OSError as error:
        raise StartError(f"cannot listen on {path}: {reason(error, path)}") from error


def _repair_path(options: Options, path: str | None) -> str | None:
    """Where the repair helper connects; None for nowhere."""
    if options.stream:
        for option, given in (("--repair-path", options.repair_path), ("--migrate-exit", options.migrate_exit)):
            if given:
                logger.warning("%s has no effect in stream mode: nothing migrates in it", option)
        return None
    if options.repair_path is not None:
        return options.repair_path or None
    return f"{path}.repair" if path is not None else None


async def _sessions(
    listener: socket.socket | None, connection: socket.socket | None, device: NetDevice, options: Options
) -> None:
    """Serve front-ends, one after the other; returns after the first with ``--one-off`` or ``--fd``.

    With ``--migrate-exit`` it returns after one whose guest has moved away.
    """
    if connection is not None:
        await _session(connection, device, options)
        return
    assert listener is not None  # one of the two is there
    with closing(_Door(listener)) as door:
        while True:
            with await door.next() as accepted:
                first = None if options.stream else await _first_byte(accepted)
                if first == b"":
                    continue
                door.watch()
                if first == _FRAME:
                    logger.error(
                        "this front-end sends Ethernet frames, and vhost-user is what is spoken here: %s",
                        "leave out --vhost-user" if options.dialect is Dialect.PASST else "start with --stream",
                    )
                else:
                    await _session(accepted, device, options)
            if options.one_off or (options.migrate_exit and device.moved_away):
                return


class _Door:
    """Where front-ends come in, one after the other, and who only looks whether somebody is there goes out again."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._waiting: socket.socket | None = None

    async def next(self) -> socket.socket:
        """Whoever waits, or comes next."""
        self._loop.remove_reader(self._listener)
        if self._waiting is not None:
            accepted, self._waiting = self._waiting, None
            self._loop.remove_reader(accepted)
            return accepted
        while True:
            try:
                accepted, address = await self._loop.sock_accept(self._listener)
            except OSError as error:
                # Mostly for want of descriptors, which come back: the front-end waits in the backlog.
                logger.warning("a front-end cannot be accepted yet: %s", error.strerror)
                await asyncio.sleep(_ACCEPT_AGAIN)
                continue
            if not lifecycle.is_probe(address):
                return accepted
            accepted.close()

    def watch(self) -> None:
        """While one is served, log it once if another comes and has something to say."""
        self._loop.add_reader(self._listener, self._another)

    def _another(self) -> None:
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
        self._waiting = accepted
        self._loop.remove_reader(self._listener)
        self._loop.add_reader(accepted, self._speaks, accepted)

    def _speaks(self, accepted: socket.socket) -> None:
        self._loop.remove_reader(accepted)
        if _peek(accepted):
            logger.warning("another front-end has connected, and waits: one is served at a time")
            return
        accepted.close()  # it only looked
        self._waiting = None
        self.watch()

    def close(self) -> None:
        """Let nobody in any more, and send away who waits."""
        self._loop.remove_reader(self._listener)
        if self._waiting is not None:
            self._loop.remove_reader(self._waiting)
            self._waiting.close()


async def _session(connection: socket.socket, device: NetDevice, options: Options) -> None:
    """One front-end, to its end. Its errors end the session, never the process."""
    logger.info("a front-end has connected")
    device.guest_comes()
    if await (serve_stream if options.stream else serve)(connection, device) is None:
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
