# SPDX-License-Identifier: GPL-2.0-or-later
"""The back-end's end of the repair protocol.

``RepairListener`` is the socket on which a helper connects. It has no thread:
helpers that wait are taken whenever a client is asked for, and by
``accept_ready``, which an event loop may call when ``fileno()`` is readable, to
have it logged when a helper comes. Both may happen at once in different
threads. Of each that comes ``on_come`` is told, for ``try_out``: one that will
refuse is better known before it is needed.

``RepairClient`` is one helper. Its calls block, up to a few seconds if the
helper hangs, and belong into a worker thread.
"""

from __future__ import annotations

import array
import contextlib
import errno
import logging
import os
import select
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final, Self

from godwit.confine import procfs
from godwit.repair._modes import count_in_mode
from godwit.repair.protocol import (
    GUARD_NAME,
    MAX_SOCKETS,
    MessageError,
    Repair,
    RepairError,
    decode,
    encode,
    send_request,
)

log = logging.getLogger(__name__)

#: Seconds that a helper may take for one message. It takes well below a millisecond.
TIMEOUT: Final = 5.0

# Helpers that came and went between two calls wait here as closed connections.
_BACKLOG: Final = 64
_ASK_AGAIN: Final = 0.05
_PEERCRED: Final = struct.Struct("3i")  # struct ucred, unix(7)


# While waiting for a helper: an event loop that watches the socket too may have accepted it first.
_LOOK_EVERY: Final = 0.1


class RepairClient:
    """A connected helper, until it fails or is closed. May be shared by threads."""

    def __init__(self, sock: socket.socket, timeout: float = TIMEOUT, *, guards: bool = False) -> None:
        self._sock = sock
        #: It keeps back resets until it is asked to end a repair mode.
        self.guards = guards
        self._sock.settimeout(timeout)
        self._timeout = timeout
        self._lock = threading.Lock()
        self._closed = False
        self._retired = False
        #: It was asked for something and has not answered in time. It may do that yet.
        self.hung = False
        #: `RepairListener.try_out` has looked at it.
        self.tried = False
        pid, uid = peer_of(sock)
        #: For the log: process id and user.
        self.peer = f"pid {pid}, uid {uid}"

    def fileno(self) -> int:
        """The connection."""
        return self._sock.fileno()

    @property
    def alive(self) -> bool:
        """The helper has neither failed nor gone. Something sent without a request counts as failed."""
        if self._closed:
            return False
        if not self._lock.acquire(blocking=False):
            return True  # busy: the request under way will find out
        try:
            if self._sock.fileno() >= 0:
                waiting = select.poll()
                waiting.register(self._sock, select.POLLIN)
                if not waiting.poll(0):
                    return True
        finally:
            self._lock.release()
        self.close()
        return False

    def set_mode(self, fds: Sequence[int], mode: Repair) -> None:
        """Set TCP_REPAIR on each of the sockets; any number of them.

        ``RepairError`` if the helper refuses, is gone, or does not answer in
        time; the connection is closed then. The error says how far it got.
        """
        try:
            with self._lock:
                self._set_all(fds, mode)
        finally:
            if self._retired:
                self.close()

    def _set_all(self, fds: Sequence[int], mode: Repair) -> None:
        done, size = 0, MAX_SOCKETS
        while done < len(fds):
            batch = fds[done : done + size]
            try:
                self._set_mode(batch, mode)
                taken = _in_mode(batch, mode)
                if not taken:
                    raise RepairError(f"the repair helper says that it has done {mode.name}, and has not")
            except RepairError as error:
                self._closed = True
                self._sock.close()
                raise RepairError(
                    f"{error} (sockets {done + 1} to {done + len(batch)} of {len(fds)})", done, len(batch)
                ) from error.__cause__
            done += taken
            # passt-repair gives each message no more room than the one before it needed, overlooks the
            # descriptors that do not fit, and says all is well (docs/platform/tcp-repair.md).
            if taken < len(batch):
                size = taken

    def _set_mode(self, fds: Sequence[int], mode: Repair) -> None:
        if self._closed:
            raise RepairError("the repair helper is gone")
        try:
            send_request(self._sock, mode, fds)
            answer = self._sock.recv(1)
        except TimeoutError:
            self.hung = True
            raise RepairError(f"the repair helper has not answered for {self._timeout:g} s") from None
        except OSError as error:
            raise RepairError(f"the repair helper is gone: {error.strerror}") from error
        if not answer:
            raise RepairError(f"the repair helper has closed the connection on {len(fds)} sockets: see its messages")
        if answer != encode(mode):
            try:
                what = decode(answer).name
            except MessageError as error:
                what = str(error)
            raise RepairError(f"the repair helper has answered {mode.name} wrongly: {what}")

    def retire(self) -> None:
        """Let the helper go, but only after the call of ``set_mode`` that may be under way."""
        self._retired = True
        if self._lock.acquire(blocking=False):
            try:
                self._closed = True
                self._sock.close()
            finally:
                self._lock.release()

    def close(self) -> None:
        """Let the helper go, which ends it. A call of ``set_mode`` under way fails. May be repeated."""
        self._closed = True
        if not self._lock.acquire(blocking=False):
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for the answer
            self._lock.acquire()
        try:
            self._sock.close()
        finally:
            self._lock.release()


def peer_of(sock: socket.socket) -> tuple[int, int]:
    """Process id and user of the other end of a UNIX socket."""
    pid, uid, _ = _PEERCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size))
    return pid, uid


def in_repair(fd: int) -> bool:
    """Whether a TCP socket is in repair mode. Reading that needs no capability; ``OSError`` if it is no such socket."""
    return count_in_mode(array.array("i", (fd,)), True) == 1


def _in_mode(fds: Sequence[int], mode: Repair) -> int:
    """How many sockets, from the first, are in the mode."""
    try:
        return count_in_mode(array.array("i", fds), mode == Repair.ON)
    except OSError as error:
        raise RepairError(f"reading TCP_REPAIR of a socket: {error.strerror}") from error


class RepairListener:
    """The socket on which helpers connect; the one that came last serves.

    Only this user may connect (mode 0600), and root. A socket left behind by a
    process that is gone is replaced; ``OSError`` (EADDRINUSE) if somebody
    listens on ``path``, or if it is no socket.
    """

    def __init__(self, path: str, timeout: float = TIMEOUT) -> None:
        self.path = path
        self._timeout = timeout
        self._lock = threading.Lock()
        self._client: RepairClient | None = None
        #: When a helper has last not answered (time.monotonic()). It may do yet what it was asked.
        self.hung_at: float | None = None
        #: Called when a helper has come, in the thread that took it.
        self.on_come: Callable[[], None] | None = None
        #: A helper has connected, at some time.
        self.ever_connected = False
        #: Of the last one that has come: that it does not do what it is asked, for people; empty otherwise.
        self.refused = ""
        #: How often a helper was asked, for how many sockets in all, and how often in vain.
        self.asked = self.sockets = self.failed = 0
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._sock.setblocking(False)
            # Linux makes the file with the mode of the socket: it is never open to others, not for a moment.
            os.fchmod(self._sock.fileno(), 0o600)
            _bind(self._sock, path)
            self._sock.listen(_BACKLOG)
            made = os.stat(path, follow_symlinks=False)
        except BaseException:
            self._sock.close()
            raise
        self._made = made.st_dev, made.st_ino

    @classmethod
    def adopt(cls, path: str, fd: int, client: int = -1, timeout: float = TIMEOUT) -> Self:
        """What another process has listened with, and its helper's connection (-1: none): this one's from now on."""
        made = cls.__new__(cls)
        made.path = path
        made._timeout = timeout
        made._lock = threading.Lock()
        made._sock = socket.socket(fileno=fd)
        made._client = None
        if client >= 0:
            helper = socket.socket(fileno=client)
            # A guard that has been ended already is asked in vain, once.
            made._client = RepairClient(helper, timeout, guards=_guards(_name_of(helper)))
            made._client.tried = True
        made.hung_at = None
        made.on_come = None
        made.ever_connected = client >= 0
        made.refused = ""
        made.asked = made.sockets = made.failed = 0
        try:
            there = os.stat(path, follow_symlinks=False)
            made._made = there.st_dev, there.st_ino
        except OSError:
            made._made = 0, 0  # nobody finds it there: nothing to remove
        return made

    def descriptors(self) -> tuple[int, int]:
        """Those of the socket and of the helper's connection (-1: no helper is there); they stay the listener's."""
        with self._lock:
            client = self._client
            return self._sock.fileno(), -1 if client is None or not client.alive else client.fileno()

    def fileno(self) -> int:
        """The listening socket, for an event loop to watch."""
        return self._sock.fileno()

    def accept_ready(self) -> None:
        """Take the helpers that wait. Does not block."""
        with self._lock:
            while True:
                try:
                    sock, name = self._sock.accept()
                except OSError as error:
                    if error.errno == errno.ECONNABORTED:
                        continue
                    if error.errno not in (errno.EAGAIN, errno.EBADF):
                        log.warning("cannot accept a repair helper on %s: %s", self.path, error.strerror)
                    return
                former, self._client = self._client, RepairClient(sock, self._timeout, guards=_guards(name))
                self.ever_connected = True
                self.refused = ""
                if former is not None:
                    former.retire()
                log.info("repair helper connected (%s)", self._client.peer)
                if _guards(name) and not _is_near(name):
                    log.warning(
                        "the repair helper keeps back resets of another network than this one: "
                        "start it in the network namespace of this process"
                    )
                if self.on_come is not None:
                    self.on_come()

    @property
    def client(self) -> RepairClient | None:
        """The helper, if one is there and alive. Does not block."""
        self.accept_ready()
        with self._lock:
            if self._client is not None and not self._client.alive:
                log.warning("repair helper has gone (%s)", self._client.peer)
                self._client = None
            return self._client

    def connected(self) -> bool:
        """A helper is there and alive. Does not block."""
        return self.client is not None

    @property
    def untried(self) -> bool:
        """A helper has come and is not, or just being, tried."""
        with self._lock:
            return self._client is not None and not self._client.tried

    def try_out(self) -> None:
        """Ask a helper that has come for something that matters to nobody, once. Blocks as ``set_mode`` does.

        It may be one of another user's, or lack the capability for this network.
        What is wrong is logged, and stays in ``refused``.
        """
        with self._lock:
            client = self._client
            if client is None or client.tried:
                return
        try:
            if client.alive:
                with contextlib.suppress(OSError):  # no descriptor for it: then it is asked when there is need of it
                    self._try(client)
        finally:
            client.tried = True

    def _try(self, client: RepairClient) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as nobodys:
            try:
                # passt-repair has room in later messages for as many as the first had, and no more. It is not the end
                # of a repair mode, which would end a guard.
                client.set_mode([nobodys.fileno()] * MAX_SOCKETS, Repair.ON)
                return
            except RepairError as error:
                log.debug("%s", error)
        with self._lock:
            if self._client is not client or self._sock.fileno() < 0:
                return  # let go for another one, or for good
            self._client = None
            self.refused = f"the repair helper ({client.peer}) has refused when it came"
        log.error(
            "the repair helper (%s) does not do what it is asked, connections cannot move with it: %s",
            client.peer,
            "it has not answered, start another one"
            if client.hung
            else f"see its own messages. If it was started with --user, let that be {os.geteuid()}, or leave it out",
        )

    def set_mode(self, fds: Sequence[int], mode: Repair) -> None:
        """``RepairClient.set_mode`` of the helper that is there; ``RepairError`` if none is.

        What a helper has failed to do is asked of the next one, if there is one already.
        """
        client = self.client
        if client is None:
            raise RepairError(self.refused or "no repair helper is connected")
        self.asked += 1
        self.sockets += len(fds)
        done = doubtful = 0  # of the sockets: all before `done` are in the mode, those up to `doubtful` may be
        while client is not None:
            try:
                client.set_mode(fds[done:], mode)
                client.guards &= mode == Repair.ON
                return
            except RepairError as error:
                failure = error
                self.failed += 1
                if client.hung:
                    self.hung_at = time.monotonic()
                done += error.done
                doubtful = max(doubtful, done + error.uncertain)
                log.warning("%s", error)
            client = self.client
        raise RepairError(str(failure), done, doubtful - done) from failure.__cause__

    def end_guard(self) -> None:
        """Have a helper that keeps back resets let them go. Others are not asked. Blocks as ``set_mode`` does."""
        client = self.client
        if client is None or not client.guards:
            return
        client.guards = False
        # A message has a socket at least: this one is nobody's, and in no repair mode.
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as nobodys:
            try:
                client.set_mode([nobodys.fileno()], Repair.OFF)
            except RepairError as error:
                log.warning("the guard of the repair helper: %s", error)

    def wait(self, timeout: float) -> RepairClient | None:
        """Wait for a helper, up to ``timeout`` seconds; None if none came."""
        deadline = time.monotonic() + timeout
        while (client := self.client) is None:
            left = deadline - time.monotonic()
            waiting = select.poll()
            with self._lock:
                if left <= 0 or self._sock.fileno() < 0:
                    return None
                waiting.register(self._sock, select.POLLIN)
            if waiting.poll(min(left, _LOOK_EVERY) * 1000) and self.client is None:
                # No descriptor left for it, or closing: ask again, but not at once.
                time.sleep(_ASK_AGAIN)
        return client

    def close(self, remove: Callable[[str], None] = os.unlink) -> None:
        """Let the helper go and ``remove`` the socket, if it is still this one. May be repeated."""
        with self._lock:
            if self._sock.fileno() < 0:
                return
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for a helper
            self._sock.close()
            if self._client is not None:
                self._client.close()
                self._client = None
        with contextlib.suppress(OSError):  # it has gone, or is in a folder that is another user's
            there = os.stat(self.path, follow_symlinks=False)
            if (there.st_dev, there.st_ino) == self._made:
                remove(self.path)


def _guards(name: object) -> bool:
    """Whether a helper of that name keeps back resets."""
    return isinstance(name, bytes) and name.startswith(GUARD_NAME)


def _name_of(helper: socket.socket) -> object:
    """The name of the other end; None if it has gone."""
    try:
        return helper.getpeername()
    except OSError:
        return None


def _is_near(name: bytes) -> bool:
    """Whether a socket of this abstract name is in our network namespace, as far as that can be seen."""
    try:
        return name.replace(b"\0", b"@") in procfs.unix_sockets()
    except OSError:
        return True


def _bind(sock: socket.socket, path: str) -> None:
    """Bind to a path, taking it from a process that is gone."""
    try:
        sock.bind(path)
        return
    except OSError as error:
        if error.errno != errno.EADDRINUSE or not stat.S_ISSOCK(os.stat(path, follow_symlinks=False).st_mode):
            raise
        in_use = error
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except OSError:
            raise in_use from None
        else:
            raise in_use
    sock.bind(path)
