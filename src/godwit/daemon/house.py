# SPDX-License-Identifier: GPL-2.0-or-later
"""What others find the daemon by: its sockets and paths, and who is served. And how all that goes to another process.

``House`` has it. `godwit.daemon.takeover` has the conversation with the other process; here is what is said.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack

from godwit import __version__
from godwit.confine import namespaces
from godwit.daemon import lifecycle
from godwit.daemon.callers import Callers
from godwit.daemon.control import Control
from godwit.daemon.device import NetDevice
from godwit.daemon.errors import StartError, reason
from godwit.daemon.lifecycle import PidFile, User
from godwit.daemon.options import SUN_PATH_MAX, Options
from godwit.daemon.report import Report
from godwit.daemon.sandbox import Layer
from godwit.daemon.stats import ProcessStats, Sessions
from godwit.daemon.takeover import ENDING, GREETING, Predecessor, Successor, TakeoverError
from godwit.net.forward import ForwardError
from godwit.net.handover import CONTROL, FRONT_END, PID_FILE, REPAIR, TAKEOVER, Handed, Name
from godwit.repair.client import RepairListener
from godwit.vhost_user import SavedSession, Server, VhostUserError

logger = logging.getLogger(__name__)


class House:
    """The sockets and paths of a daemon. ``names`` closes and removes them, unless another process has them then."""

    def __init__(self, options: Options, pid: PidFile | None, names: AsyncExitStack) -> None:
        self._options = options
        self._pid = pid
        self._names = names
        self.path: str | None = options.socket
        self.listener: socket.socket | None = None  # for front-ends
        self.connection: socket.socket | None = None  # of one that is about to be served
        self.waiting: socket.socket | None = None  # of one that comes after it, or has said nothing yet
        self.server: Server | None = None  # of the one that is
        self.repair: RepairListener | None = None
        self.takeover: socket.socket | None = None
        self.takeover_path: str | None = None
        self._takers: Callers | None = None
        self.control: Control | None = None
        self._leavings = lifecycle.Leavings()
        self._own_pid()
        self._ctl_group = None if options.ctl_group is None else lifecycle.group(options.ctl_group, "--ctl-group")
        self.device: NetDevice | None = None
        self.sessions = Sessions()
        self.process = ProcessStats()
        self.no_ping = False  # the kernel does not let this process send any
        self.sandbox: Sequence[Layer] = ()
        self.successor = ""  # the version of who goes on with the guest
        self._bequeathed: set[str] = set()  # paths that are another process's now
        self._asked: set[asyncio.Task[None]] = set()
        self._giving = False

    # ---- a start of its own

    def open(self) -> None:
        """Listen, or take the connection that was inherited."""
        options = self._options
        if options.fd is not None:
            self.connection = lifecycle.connected(options.fd)
        else:
            if self.path is None:
                self.listener, self.path = lifecycle.listen_on_first(lifecycle.PASST_SOCKETS)
            else:
                self.listener = lifecycle.listen(self.path)
            self._own_listener()
        self._open_repair()
        self._open_takeover()
        self._open_control()

    def _open_repair(self) -> None:
        path = self._beside(self._options.repair_path, "repair")
        if path is not None:
            self.repair = _listen_for_helper(path)
            self._own_repair()

    def _open_takeover(self) -> None:
        path = self._beside(self._options.takeover_path, "takeover")
        if path is not None:
            self.takeover, self.takeover_path = lifecycle.listen(path, socket.SOCK_SEQPACKET, 0o600), path
            self._own_takeover()

    def _open_control(self) -> None:
        path = self._control_path()
        if path is None:
            return
        try:
            self.control = Control(lifecycle.listen(path, mode=0o600, group=self._ctl_group), path)
        except StartError as error:
            if self._options.takeover is None and (self._options.ctl_path or self._ctl_group is not None):
                raise
            # Nobody has asked for it, and the guest shall not be without a network for want of it.
            logger.warning("nobody can ask how things stand (--ctl-path): %s", error)
            return
        self._own_control()

    def _control_path(self) -> str | None:
        given = self._options.ctl_path
        if given is not None or self.path is None:
            return given or None
        path = f"{self.path}.ctl"
        if len(os.fsencode(path)) > SUN_PATH_MAX:
            logger.warning("nobody can ask how things stand: %s is too long for a socket (--ctl-path)", path)
            return None
        return path

    def _own_pid(self) -> None:
        self._names.callback(self._leavings.say)  # when all is removed: the last first
        if self._pid is not None:
            self._names.callback(self._pid.close, self._leavings.remove)

    def _own_listener(self) -> None:
        assert self.listener is not None  # it was opened
        assert self.path is not None  # with it
        self._names.callback(self.listener.close)
        # Before that: once closed, the next daemon may make it anew.
        self._names.callback(self._leavings.remove, self.path)

    def _own_repair(self) -> None:
        assert self.repair is not None  # it was opened
        self._names.callback(self.repair.close, self._leavings.remove)
        self._names.callback(asyncio.get_running_loop().remove_reader, self.repair)  # the device watches it

    def _own_takeover(self) -> None:
        assert self.takeover is not None  # it was opened
        assert self.takeover_path is not None  # with it
        self._names.callback(self.takeover.close)
        self._names.callback(self._leavings.remove, self.takeover_path)
        self._names.callback(self._hear_nobody)

    def _hear_nobody(self) -> None:
        if self._takers is not None:
            self._takers.stop()

    def _own_control(self) -> None:
        assert self.control is not None  # it was opened
        self._names.callback(self.control.close)
        self._names.callback(self._leavings.remove, self.control.path)

    def _beside(self, given: str | None, what: str) -> str | None:
        """The path of another socket: as given, or beside that for front-ends; None for none."""
        if self._options.stream:
            if given:
                logger.warning("--%s-path has no effect in stream mode: nothing of it can go elsewhere", what)
            return None
        if given is not None:
            return given or None
        if self.path is None:
            return None
        path = f"{self.path}.{what}"
        if what == "takeover" and len(os.fsencode(path)) > SUN_PATH_MAX:
            logger.warning("nobody can take over: %s is too long for a socket, name another (--takeover-path)", path)
            return None
        return path

    @property
    def where(self) -> str:
        """Where front-ends come in, for people."""
        if self.listener is not None:
            return str(self.path)
        return "the connection that was taken over" if self._options.fd is None else f"descriptor {self._options.fd}"

    def paths(self) -> list[str]:
        """Those of the sockets that were made here."""
        repair = None if self.repair is None else self.repair.path
        front = None if self.listener is None else self.path
        control = None if self.control is None else self.control.path
        return [path for path in (front, repair, self.takeover_path, control) if path is not None]

    def give_to(self, user: User) -> None:
        """Hand the sockets that were made over to the user that we are about to be."""
        for path in self.paths():
            user.own(path)
        if self.control is not None and self._ctl_group is not None:
            # Its mode is as it was made with: to set it would follow a link.
            os.chown(self.control.path, -1, self._ctl_group, follow_symlinks=False)

    def close(self) -> None:
        """Close the connections that nobody has served."""
        for sock in (self.connection, self.waiting):
            if sock is not None:
                sock.close()

    # ---- to another process

    def watch(self, done: Callable[[], None]) -> None:
        """Let another process take over, from now on; ``done`` is called when one has. And answer whoever asks."""
        assert self.device is not None  # which this is about
        if self.control is not None:
            self.control.serve(Report(self, self.device, self._options).answer)
        if self.takeover is not None:
            come = functools.partial(self._is_asked, done=done)
            self._takers = Callers(self.takeover, come, "whoever wants to take over cannot be heard yet")
            self._takers.watch()

    def _is_asked(self, sock: socket.socket, done: Callable[[], None]) -> None:
        task = asyncio.ensure_future(self._answer(sock, done))
        self._asked.add(task)
        task.add_done_callback(self._asked.discard)

    async def _answer(self, sock: socket.socket, done: Callable[[], None]) -> None:
        successor = Successor(sock)
        try:
            # It is heard in any case: who closes a connection on what was not read takes its own last word back.
            await _readable(sock, GREETING)
            successor.greet()
            if not successor.allowed:
                raise TakeoverError(f"this is for the user of the running process: uid {successor.uid} is another")
            if self._giving or self.successor:
                raise TakeoverError("another process is taking over right now")
            self._giving = True
            try:
                await self._give(successor)
            finally:
                self._giving = False
        except TakeoverError as error:
            logger.warning("nobody takes over: %s (pid %d)", error, successor.pid)
            await _see_off(successor, str(error))
        except Exception:
            logger.exception("a process that wants to take over (pid %d) cannot be served", successor.pid)
            await _see_off(successor, "there was an unexpected error: see the log of the running process")
        else:
            done()
        finally:
            successor.close()

    async def _give(self, successor: Successor) -> None:
        """Raises `TakeoverError` if it has not come about; all goes on then."""
        assert self.device is not None  # since watch()
        self._check(self.device)
        server, saved = self.server, None
        if server is not None:
            try:
                saved = await asyncio.wait_for(server.suspend(), GREETING)
            except (TimeoutError, VhostUserError) as error:
                server.resume()
                raise TakeoverError(f"the front-end is in the midst of something: {error}") from error
        try:
            if server is not None and saved is None:
                raise TakeoverError("the front-end has just hung up")
            self._check(self.device)
            # All in one go, and nothing else of this thread's happens meanwhile: what is handed over stays as it was.
            self._hand_over(successor, saved)
        except BaseException:
            if server is not None:
                server.resume()
            raise
        if server is not None:
            server.leave()

    def _check(self, device: NetDevice) -> None:
        why = device.why_not()
        if why:
            raise TakeoverError(why)

    def _hand_over(self, successor: Successor, saved: SavedSession | None) -> None:
        assert self.device is not None  # since watch()
        try:
            handed = self.device.hand_over()
        except ValueError as error:
            raise TakeoverError(str(error)) from error
        since = handed.process.parked_at / 1e9
        try:
            handed.session = saved
            handed.counters |= self.sessions.to_hand_over(self.server)
            self._add_names(handed)
            self._bequeathed = successor.give(handed, since)
        except BaseException as error:
            self.device.take_back()
            logger.info("the guest goes on here after %.1f ms", (time.monotonic() - since) * 1000)
            if isinstance(error, OSError):
                raise TakeoverError(str(error)) from error
            raise
        still = (time.monotonic() - since) * 1000
        self.device.let_go()
        if self.control is not None:
            self.control.stop()
        self.successor = successor.version
        logger.info(
            "handed over to godwit %s (pid %d): %s; the guest stood still for %.1f ms",
            successor.version,
            successor.pid,
            handed.summary(),
            still,
        )

    def _add_names(self, handed: Handed) -> None:
        if self.listener is not None and self.path is not None:
            handed.names.append(Name(FRONT_END, self.path, self.listener.fileno()))
        if self.repair is not None:
            fd, handed.helper = self.repair.descriptors()
            handed.names.append(Name(REPAIR, self.repair.path, fd))
        if self.takeover is not None and self.takeover_path is not None:
            handed.names.append(Name(TAKEOVER, self.takeover_path, self.takeover.fileno()))
        if self.control is not None:
            handed.names.append(Name(CONTROL, self.control.path, self.control.sock.fileno()))
        if self._pid is not None:
            handed.names.append(Name(PID_FILE, self._pid.path, -1))
        if self.server is not None:
            handed.connection = self.server.fileno()
        if self.waiting is not None:
            handed.waiting = self.waiting.fileno()

    def bequeath(self) -> None:
        """Leave what is another process's as it is, and remove the rest. The sockets end with this process."""
        self._names.pop_all()
        for path in self.paths():
            if path not in self._bequeathed:
                self._leavings.remove(path)
        if self._pid is not None and self._pid.path not in self._bequeathed:
            self._pid.close(self._leavings.remove)
        self._leavings.say()

    # ---- from another process

    def inherit(self, handed: Handed) -> None:
        """Take the sockets that were handed over, where this process is to be found at the same paths.

        Whatever is new is opened. Raises `StartError` if it cannot be.
        """
        there = {name.what: name for name in handed.names}
        front = there.get(FRONT_END)
        same = self.path is None or (front is not None and self.path == front.path)
        if front is not None and same:
            self.path, self.listener = front.path, socket.socket(fileno=front.fd)
        elif self.path is not None:
            self.listener = lifecycle.listen(self.path)
            self._own_listener()

        def stays(name: Name | None, given: str | None, what: str) -> bool:
            """Whether the path stays what it was: so it is, too, where nothing is said."""
            return name is not None and ((given is None and same) or self._beside(given, what) == name.path)

        repair = there.get(REPAIR)
        if repair is not None and stays(repair, self._options.repair_path, "repair"):
            self.repair = RepairListener.adopt(repair.path, repair.fd, handed.helper)
        else:
            self._open_repair()
        takeover = there.get(TAKEOVER)
        if takeover is not None and stays(takeover, self._options.takeover_path, "takeover"):
            self.takeover, self.takeover_path = socket.socket(fileno=takeover.fd), takeover.path
        else:
            self._open_takeover()
        control = there.get(CONTROL)
        path = self._control_path()
        if control is not None and ((self._options.ctl_path is None and same) or path == control.path):
            self.control = Control(socket.socket(fileno=control.fd), control.path)
        else:
            self._open_control()
        self.sessions.take_over(handed.counters)
        if handed.connection >= 0:
            self.connection = socket.socket(fileno=handed.connection)
        if handed.waiting >= 0:
            self.waiting = socket.socket(fileno=handed.waiting)

    def own(self) -> None:
        """What was handed over is this process's: it closes and removes it in the end."""
        self._names.pop_all()
        self._own_pid()
        if self.listener is not None:
            self._own_listener()
        if self.repair is not None:
            self._own_repair()
        if self.takeover is not None:
            self._own_takeover()
        if self.control is not None:
            self._own_control()
            self._let_group_ask(self.control.path)

    def _let_group_ask(self, path: str) -> None:
        """Of a socket that another process has made: it may be a group's that it was not told."""
        if self._ctl_group is None:
            return
        try:
            there = os.lstat(path)
            unknown = namespaces.in_user_namespace and there.st_gid == namespaces.OVERFLOW
            if there.st_mode & 0o777 != 0o660 or (there.st_gid != self._ctl_group and not unknown):
                lifecycle.open_to_group(path, self._ctl_group)
        except OSError as error:
            logger.warning("--ctl-group: %s stays as it was: %s", path, error.strerror)


def _listen_for_helper(path: str) -> RepairListener:
    try:
        return RepairListener(path)
    except OSError as error:
        raise StartError(f"cannot listen on {path}: {reason(error, path)}") from error


async def _see_off(successor: Successor, why: str) -> None:
    """The guest goes on here: see that nobody else has its sockets."""
    successor.refuse(why)
    if not successor.has_descriptors or successor.pidfd < 0:
        return
    try:
        await _readable(successor.pidfd, 2 * ENDING)  # it has ended
    except TakeoverError:
        logger.warning(
            "the process that was to go on (pid %d) has the guest's sockets too, and has not ended: end it",
            successor.pid,
        )


async def _readable(sock: socket.socket | int, seconds: float) -> None:
    """Wait until something has come. Raises `TakeoverError` if nothing does."""
    loop = asyncio.get_running_loop()
    come = asyncio.Event()
    loop.add_reader(sock, come.set)
    try:
        async with asyncio.timeout(seconds):
            await come.wait()
    except TimeoutError:
        raise TakeoverError(f"it has said nothing for {seconds:g} s") from None
    finally:
        loop.remove_reader(sock)


def take_over(
    house: House,
    before: Predecessor,
    pid: PidFile | None,
    make_device: Callable[[RepairListener | None], NetDevice],
) -> NetDevice:
    """Go on with the guest of another process. Blocks, for as long as the guest's network stands still.

    Until it is this process's, nothing of the guest's is touched; raises `StartError` if it does not come to be.
    """
    try:
        handed = before.take()
        try:
            house.inherit(handed)
            device = make_device(house.repair)
            device.prepare(handed)
            if handed.session is not None and house.connection is not None:
                house.server = Server(house.connection, device, handed.session)
        except (StartError, ForwardError, VhostUserError, ValueError, OSError) as error:
            before.fail(str(error))
            raise StartError(f"cannot take over: {error}") from error
        before.run([*house.paths(), *([] if pid is None else [pid.path])])
    except TakeoverError as error:
        before.fail(str(error))
        raise StartError(f"cannot take over: {error}") from error
    finally:
        before.close()
    still = device.take_over(handed)
    house.connection = None  # the server's
    house.own()
    logger.info(
        "godwit %s has taken over from godwit %s (pid %d): %s; the guest stood still for %.1f ms",
        __version__,
        before.version,
        handed.process.pid,
        handed.summary(),
        still * 1000,
    )
    return device
