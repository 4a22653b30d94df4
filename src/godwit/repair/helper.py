# SPDX-License-Identifier: GPL-2.0-or-later
"""The repair helper: ``godwit repair SOCKET|DIRECTORY``.

Runs with CAP_NET_ADMIN beside a back-end that has no privilege, godwit or
passt, and sets TCP_REPAIR on the sockets that it is sent, for as long as the
back-end keeps the connection. It takes TCP sockets and nothing else, from
processes of the user that the back-end's socket belongs to (or of another that
is named), and root's. It keeps no other capability, and once it is connected it
can open nothing and make few system calls (`godwit.confine`).

A back-end that root has started may have become another user after it made its
socket, as passt does. So where the socket is root's, who sends is not looked at.

A socket in repair mode gets a second lock: a filter that drops all that
arrives. For godwit, which freezes its sockets by itself, it matters only with
a peer on the same link that sends with a TTL of 255. passt does not freeze;
with the filter no data is acknowledged there either after it was saved. The
filter goes when the repair mode does. The kernel's rules for filters and for
TCP_REPAIR need the same capability.

With ``--guard`` it keeps back resets meanwhile (`godwit.repair.guard`): from
when it has connected to the first request that ends a repair mode, by when
the connections are there again or are given up; to the end of the connection;
or for a limited time.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import select
import socket
import stat
import time
from collections.abc import Collection, Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from godwit.confine import _kernel, landlock, seccomp
from godwit.confine.capabilities import CAP_DAC_OVERRIDE, CAP_NET_ADMIN, has, keep_only
from godwit.repair._modes import drop_all, first_not_tcp, set_mode
from godwit.repair.guard import Guard, GuardError
from godwit.repair.protocol import (
    GUARD_NAME,
    MessageError,
    Repair,
    Senders,
    close_all,
    encode,
    receive_request,
    tell_senders,
)

log = logging.getLogger(__name__)

#: Seconds for which resets are kept back, at most.
GUARD_SECONDS: Final = 300.0

#: What the sockets of back-ends are called, in a directory that is watched.
SUFFIX: Final = ".repair"

_IN_ATTRIB: Final = 0x004
_IN_MOVED_TO: Final = 0x080
_IN_CREATE: Final = 0x100
_IN_DELETE_SELF: Final = 0x400
_IN_ONLYDIR: Final = 0x1000000

# A back-end binds its socket, which is what is noticed, and listens a moment later.
_LISTENS_WITHIN: Final = 2.0
_ASK_EVERY: Final = 0.02


# All that is left to do when it is connected, and what Python and the C library do with it.
_CALLS: Final = (
    *("recvmsg", "sendto", "getsockopt", "setsockopt", "getsockname", "close", "poll", "ppoll", "fstat"),
    *("newfstatat", "statx"),  # what fstat() is in newer C libraries
    *("write", "futex", "brk", "munmap", "mremap", "madvise", "getpid", "gettid", "clock_gettime", "getrandom"),
    *("rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "restart_syscall", "exit", "exit_group"),
)
# Who prints a traceback looks for the source.
_MISSING: Final = ("open", "openat", "stat", "readlink", "getcwd", "ioctl", "lseek", "read")


class HelperError(Exception):
    """The helper cannot go on; one line for the user."""


def run(
    path: str,
    guarded: Sequence[IPv4Address | IPv6Address] = (),
    seconds: float = GUARD_SECONDS,
    uid: int | None = None,
) -> int:
    """Serve the back-end that listens on ``path``, or the first one to appear in the directory ``path``.

    ``guarded`` are addresses from which resets are kept back, for ``seconds``
    at most. ``uid``: the user whose processes may ask, besides root's; the one
    that the socket belongs to if None. Returns the exit status: 0 when the
    back-end has closed the connection, 1 on an error, which is in the log.
    """
    try:
        if not has(CAP_NET_ADMIN):
            raise HelperError(
                "TCP_REPAIR needs the capability CAP_NET_ADMIN in the user namespace of the back-end's network: "
                "run this as root, or give it that capability"
            )
        program = drop_all()  # first: it may need more than what is kept
        # Until the connection is made: the socket may be another user's.
        keep_only({CAP_NET_ADMIN, CAP_DAC_OVERRIDE})
        name = GUARD_NAME + b"%d" % os.getpid() if guarded else b""
        sock, where = _connect(path, name)
        with sock, contextlib.ExitStack() as stack:
            keep_only({CAP_NET_ADMIN})
            log.info("serving %s", where)
            guard = stack.enter_context(contextlib.closing(Guard(guarded))) if guarded else None
            if guard is not None:
                log.info("keeping back resets from %s for %g s at most", ", ".join(map(str, guard.addresses)), seconds)
            _confine()
            serve(sock, guard, seconds, program, _Senders(where, uid))
    except (HelperError, GuardError) as error:
        log.error("%s", error)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


class _Senders:
    """Whose requests are carried out; None for anybody's."""

    def __init__(self, path: str, uid: int | None) -> None:
        self._path, self._given, self._owner = path, uid, 0
        self._look()

    def _look(self) -> None:
        with contextlib.suppress(OSError):  # removed, or out of reach by now
            self._owner = os.stat(self._path, follow_symlinks=False).st_uid

    def __call__(self) -> Collection[int] | None:
        if self._given is not None:
            return {self._given, 0}
        if self._owner == 0:
            self._look()  # a daemon hands its socket over after it has begun to listen, and before it asks for anything
        return {self._owner, 0} if self._owner else None


def _confine() -> None:
    """Give up files and system calls. What the system does not allow to give up is in the log."""
    _kernel.load_for_reports()
    try:
        landlock.restrict({})
    except OSError as error:
        log.warning("the system does not allow to give up files (Landlock): %s", error.strerror)
    try:
        seccomp.restrict(seccomp.program(_CALLS, seccomp.NOT_TO_BE_RUN, _MISSING), 2, b"godwit repair: ")
    except OSError as error:
        log.warning("the system does not allow to give up system calls (seccomp): %s", error.strerror)


def serve(
    sock: socket.socket,
    guard: Guard | None = None,
    seconds: float = GUARD_SECONDS,
    program: int | None = None,
    senders: Senders | None = None,
) -> None:
    """Do what a back-end asks until it closes the connection.

    ``program`` is the filter that sockets in repair mode get (`_modes.drop_all`).
    ``guard`` is closed with the first request that ends a repair mode, or after
    ``seconds``. ``senders`` gives whose requests are carried out; None: anybody's.

    :raises HelperError: a request that is none, or one that failed. What was
        done is not undone; closing the connection is the answer.
    """
    until = time.monotonic() + seconds
    while True:
        if guard is not None and not _readable(sock, until):
            guard.close()
            guard = None
            log.warning("resets are kept back no longer: no connection has come within %g s", seconds)
        try:
            request = receive_request(sock, senders)
        except (MessageError, OSError) as error:
            raise HelperError(f"bad request: {error}") from error
        if request is None:
            return
        mode, fds = request
        try:
            if (odd := first_not_tcp(fds)) >= 0:
                raise HelperError(_why_not(fds[odd], odd))
            done, number = set_mode(fds, mode, program)
            if number:
                raise HelperError(_why(mode, done, number))
        finally:
            close_all(fds)
        log.debug("TCP_REPAIR %s on %d sockets", mode.name, len(fds))
        if guard is not None and mode != Repair.ON:
            guard.close()
            guard = None
            log.info("resets are kept back no longer")
        try:
            sock.sendall(encode(mode), socket.MSG_NOSIGNAL)
        except OSError as error:
            raise HelperError(f"the back-end takes no answer: {error.strerror}") from error


def _readable(sock: socket.socket, until: float) -> bool:
    """Wait until something has come, or that time of the monotonic clock."""
    waiting = select.poll()
    waiting.register(sock, select.POLLIN)
    return bool(waiting.poll(max(0.0, until - time.monotonic()) * 1000))


def _why_not(fd: int, number: int) -> str:
    """Why one of the descriptors of a request is not looked at."""
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        return f"descriptor {number} of the request is no socket"
    return f"socket {number} of the request is not TCP"


def _why(mode: Repair, number: int, error: int) -> str:
    """Why one of the sockets of a request could not be set."""
    why = os.strerror(error)
    if error == errno.EPERM:
        why = "not permitted (a listening socket, or one of a network in another user namespace)"
    return f"TCP_REPAIR {mode.name} on socket {number} of the request: {why}"


def _new_socket(name: bytes) -> socket.socket:
    """One by which the back-end sees this name, an abstract one, or none."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    tell_senders(sock)  # from the first message on, which may come as soon as it is connected
    if name:
        sock.bind(name)
    return sock


def _connect(path: str, name: bytes) -> tuple[socket.socket, str]:
    """A connection to the back-end, and where it listens."""
    if os.path.isdir(path):
        return _wait_in(path, name)
    if not path.endswith(SUFFIX) and os.path.exists(path + SUFFIX):
        # Connected to, the front-end's socket would keep the guest waiting, and never send a thing.
        raise HelperError(f"{path} is not the repair socket: did you mean {path}{SUFFIX}?")
    sock = _new_socket(name)
    try:
        sock.connect(path)
    except OSError as error:
        sock.close()
        raise HelperError(
            f"cannot connect to {path}: {error.strerror or error} (the back-end must run already, "
            "or give the directory in which its socket will be)"
        ) from error
    return sock, path


def _wait_in(directory: str, name: bytes) -> tuple[socket.socket, str]:
    """Wait until a back-end listens on a socket in a directory, and connect to it."""
    watch = _inotify(directory)
    try:
        log.info("waiting for a socket *%s in %s", SUFFIX, directory)
        asking = select.poll()
        asking.register(watch, select.POLLIN)
        patience = time.monotonic() + _LISTENS_WITHIN
        while True:
            there, connected = _try_all(directory, name)
            if connected is not None:
                return connected
            ask_again = there and time.monotonic() < patience
            if asking.poll(_ASK_EVERY * 1000 if ask_again else None):
                os.read(watch, 65536)
                patience = time.monotonic() + _LISTENS_WITHIN
    finally:
        os.close(watch)


def _try_all(directory: str, own_name: bytes) -> tuple[bool, tuple[socket.socket, str] | None]:
    """Whether there are sockets in a directory, and a connection to the first that listens, with its path."""
    try:
        names = sorted(name for name in os.listdir(directory) if name.endswith(SUFFIX))
    except OSError as error:
        raise HelperError(f"cannot read {directory}: {error.strerror}") from error
    for name in names:
        sock, path = _new_socket(own_name), os.path.join(directory, name)
        try:
            sock.connect(path)
        except OSError:
            sock.close()
        else:
            return True, (sock, path)
    return bool(names), None


def _inotify(directory: str) -> int:
    """A descriptor that is readable when something happens in a directory (inotify(7))."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.inotify_init1(os.O_CLOEXEC)
    if fd >= 0:
        events = _IN_CREATE | _IN_MOVED_TO | _IN_ATTRIB | _IN_DELETE_SELF | _IN_ONLYDIR
        if libc.inotify_add_watch(fd, os.fsencode(directory), events) >= 0:
            return fd
    why = os.strerror(ctypes.get_errno())
    if fd >= 0:
        os.close(fd)
    raise HelperError(f"cannot watch {directory}: {why}")
