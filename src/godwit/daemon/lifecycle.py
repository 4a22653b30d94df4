# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon's life cycle: to the background, sockets, PID file, user.

Readiness, as those who start the daemon rely on it (libvirt, QEMU): the
process that was launched exits with 0 only when the sockets listen and the
PID file is complete. If the start fails it exits with another status, and
stderr says why. So the launched process forks at once, waits on a pipe, and
exits with the status that its child writes there; a child that dies without a
word counts as failed.

Order of a start: `background`, log and PID file opened, `raise_descriptor_limit`,
sockets bound, `godwit.daemon.sandbox` (with `User.assume`), the first thread, PID
written, `Readiness.declare`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import grp
import logging
import os
import pwd
import resource
import signal
import socket
import stat
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from godwit.daemon.errors import SocketInUseError, StartError, reason

log = logging.getLogger(__name__)

BACKLOG = 4
PASST_SOCKETS = [f"/tmp/passt_{number}.socket" for number in range(1, 65)]  # passt's defaults, in passt's order


class Readiness:
    """Tells the launched process that the daemon is ready; in the foreground, nobody asks."""

    def __init__(self, pipe: int | None = None) -> None:
        self._pipe = pipe
        # Now: the file system is another one then.
        self._null = -1 if pipe is None else os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)

    def declare(self) -> None:
        """Let go of the terminal, then let the launched process exit with 0.

        In this order: who started us may wait for the end of our stderr.
        """
        if self._pipe is None:
            return
        for descriptor in (0, 1, 2):
            os.dup2(self._null, descriptor)
        if self._null > 2:
            os.close(self._null)
        os.write(self._pipe, b"\0")
        os.close(self._pipe)
        self._pipe = None


def _close_inherited(keep: Iterable[int]) -> None:
    """Close every descriptor above 2 but those in ``keep``.

    A pipe inherited from a launcher would keep its reader waiting for as long
    as the daemon lives.
    """
    low = 3
    for descriptor in sorted(fd for fd in keep if fd > 2):
        os.closerange(low, descriptor)
        low = descriptor + 1
    os.closerange(low, os.sysconf("SC_OPEN_MAX"))


def background(keep: Iterable[int] = (), pid_file: str | None = None) -> Readiness:
    """Go on in a child process, in a session of its own; returns there only.

    The launched process ends here, as the module says. ``keep``: inherited
    descriptors that stay open. ``pid_file``: that of the child; if it has to be
    made, none is left where the start fails.
    """
    kept = list(keep)
    made = pid_file is not None and not os.path.lexists(pid_file)
    ours, childs = os.pipe()
    child = os.fork()
    if child:
        os.close(childs)
        for descriptor in kept:
            os.close(descriptor)
        status = _await(ours, child)
        if status and made and pid_file is not None:
            # The child removes it, unless it has become another user by then, who may not.
            with contextlib.suppress(OSError):
                if os.path.getsize(pid_file) == 0:
                    os.unlink(pid_file)
        os._exit(status)
    _close_inherited([*kept, childs])
    os.setsid()
    os.set_inheritable(childs, False)
    return Readiness(childs)


def _await(pipe: int, child: int) -> int:
    """The launched process's exit status: 0 once the child declares itself ready."""
    # Stopped while it waits, it stops what it started.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: os.kill(child, received))
    if os.read(pipe, 1) == b"\0":
        return 0
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        os.write(2, f"godwit: the daemon was ended by signal {-code} before it was ready\n".encode())
    return code if code > 0 else 1


# Places, 8 bytes each: twice as many would hardly ever be used.
_TABLE = 32768


def raise_descriptor_limit() -> None:
    """Allow as many descriptors as may be had: each flow has a socket. Best while there is one thread."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # Let the kernel's table of them be large from the beginning (it never shrinks). It would double again and again as
    # connections are loaded, and in a process of several threads each time takes an RCU grace period, 10 ms.
    highest = _TABLE if hard == resource.RLIM_INFINITY else min(hard, _TABLE)
    with contextlib.suppress(OSError), open(os.devnull) as file:
        os.close(fcntl.fcntl(file.fileno(), fcntl.F_DUPFD_CLOEXEC, highest - 1))


# --- Sockets


_PROBE = b"\0godwit-looks-whether-you-live."


def _is_live(path: str) -> bool:
    """Whether some process listens on a socket's path.

    The connection says nothing and is closed at once; ours ignores such a one
    (`godwit.daemon.main`), and knows it by its name (`is_probe`).
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a full backlog would block: live, too
        probe.bind(_PROBE + os.urandom(8).hex().encode())
        return probe.connect_ex(path) not in (errno.ECONNREFUSED, errno.ENOENT)


def is_probe(address: object) -> bool:
    """Whether a connection that was accepted from ``address`` only looks whether somebody listens."""
    return isinstance(address, bytes) and address.startswith(_PROBE)


def listen(
    path: str, kind: socket.SocketKind = socket.SOCK_STREAM, mode: int | None = None, group: int | None = None
) -> socket.socket:
    """Listen on ``path``; a socket that a dead process left there is taken over.

    ``mode``: who may connect, from the start (Linux makes the file with the mode of the socket).
    ``group``: it may, too. What was made is removed if it cannot be given to it.
    Raises `SocketInUseError` if the process is alive, `StartError` for all else.
    """
    made = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK)
    try:
        if mode is not None:
            os.fchmod(made.fileno(), mode)
        try:
            made.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise StartError(f"{path} exists and is no socket: remove it, or name another path") from None
            if _is_live(path):
                raise SocketInUseError(
                    f"{path} is in use: another process listens there; stop it, or name another path"
                ) from None
            os.unlink(path)
            made.bind(path)
        if group is not None:
            _make_over(path, group)  # nobody has connected: it does not listen yet
        made.listen(BACKLOG)
    except OSError as error:
        made.close()
        raise StartError(f"cannot listen on {path}: {reason(error, path)}") from error
    except StartError:
        made.close()
        raise
    return made


def _make_over(path: str, group: int) -> None:
    """``open_to_group``, or there is no such socket."""
    try:
        open_to_group(path, group)
    except OSError as error:
        os.unlink(path)
        if error.errno == errno.EPERM:
            raise StartError(
                f"{path} cannot be made over to group {group} (--ctl-group): user {os.geteuid()} is not in it"
            ) from error
        raise


def open_to_group(path: str, group: int) -> None:
    """Let a group use a socket of ours."""
    os.chown(path, -1, group, follow_symlinks=False)
    os.chmod(path, 0o660)


def listen_on_first(paths: Iterable[str]) -> tuple[socket.socket, str]:
    """Listen on the first of several paths that no living process has."""
    for path in paths:
        try:
            return listen(path), path
        except SocketInUseError:
            continue
    raise StartError("all default socket paths are in use: name one with --socket")


def inherited(descriptor: int) -> None:
    """Look at ``--fd`` before anything is opened: what is opened gets the lowest free number, perhaps this one.

    Raises `StartError` if it is no socket.
    """
    try:
        is_socket = stat.S_ISSOCK(os.fstat(descriptor).st_mode)
    except OSError as error:
        raise StartError(f"--fd {descriptor} is no socket: {error.strerror}") from error
    if not is_socket:
        raise StartError(f"--fd {descriptor} is no socket: {os.strerror(errno.ENOTSOCK)}")


def connected(descriptor: int) -> socket.socket:
    """The connected UNIX stream socket that was inherited as ``descriptor``.

    Raises `StartError` if it is anything else.
    """
    try:
        made = socket.socket(fileno=descriptor)
    except OSError as error:
        raise StartError(f"--fd {descriptor} is no socket: {error.strerror}") from error
    kind = (made.family, made.type & ~(socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC))
    if kind != (socket.AF_UNIX, socket.SOCK_STREAM):
        made.detach()
        raise StartError(f"--fd {descriptor} is no UNIX stream socket")
    try:
        made.getpeername()
    except OSError as error:
        made.detach()
        raise StartError(f"--fd {descriptor} is not connected: pass one end of a pair, or use --socket") from error
    if descriptor <= 2:  # where the null device will be: `Readiness.declare`
        standard, made = made, socket.socket(fileno=fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3))
        standard.detach()
    made.setblocking(False)
    made.set_inheritable(False)
    return made


class Leavings:
    """Removes files of ours as well as may be: the user we run as may not own their folders."""

    def __init__(self) -> None:
        self._stay: list[str] = []
        self._why = ""

    def remove(self, path: str) -> None:
        """Remove one, or remember that it stays."""
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._stay.append(path)
            self._why = str(error.strerror)

    def say(self) -> None:
        """Have it in the log which stay, in one line."""
        if self._stay:
            log.info("left for the next start, not to be removed (%s): %s", self._why, ", ".join(self._stay))


# --- The PID file


class PidFile:
    """Opened while we still may, written when all is ready.

    Until then it is left as it is: it may be that of a process which lives, and
    because of which this start fails.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StartError(f"cannot write the PID file {path}: {reason(error, path)}") from error

    def write(self) -> None:
        """Write the process id."""
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, b"%d\n" % os.getpid(), 0)

    @property
    def path(self) -> str:
        """Where it is."""
        return self._path

    def close(self, remove: Callable[[str], None] = os.unlink) -> None:
        """``remove`` the file, unless another process's id is in it; where that is not allowed, it is left empty."""
        ours = os.pread(self._fd, 32, 0) in (b"", b"%d\n" % os.getpid())
        if ours:
            os.ftruncate(self._fd, 0)
        os.close(self._fd)
        if ours:
            remove(self._path)


# --- The user


class User(NamedTuple):
    """Whom to run as."""

    uid: int
    gid: int

    def own(self, path: str) -> None:
        """Hand a socket or file over, so that the user can go on using it.

        It itself: whoever may write to its folder may have put a link in its place, to what is root's.
        """
        os.chown(path, self.uid, self.gid, follow_symlinks=False)

    def assume(self) -> None:
        """Become this user for good: all ids and groups, no way back."""
        if (os.getuid(), os.getgid()) == (self.uid, self.gid):
            return
        try:
            if os.geteuid() == 0:
                os.setgroups([])
            os.setresgid(self.gid, self.gid, self.gid)
            os.setresuid(self.uid, self.uid, self.uid)
        except OSError as error:
            raise StartError(
                f"--runas: cannot run as user {self.uid}, group {self.gid}: {error.strerror};"
                " only root may choose, others leave it out"
            ) from error


def no_ping() -> str | None:
    """What keeps this process from sending pings, and what to do about it; None if it may.

    The kernel's own default lets nobody (ip-sysctl, ping_group_range); it asks
    for the group when a socket is made, so this is for after `User.assume`.
    The setting holds for IPv6 as well.
    """
    try:
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP).close()
    except PermissionError:
        return (  # by its number: names are in a file that is not in reach any more
            f"the guest's pings get no answer: net.ipv4.ping_group_range leaves out group {os.getegid()};"
            f" sysctl -w net.ipv4.ping_group_range='0 2147483647' lets all in, --no-icmp does without"
        )
    except OSError:
        pass  # a kernel without IPv4: nothing that a setting would change
    return None


_MOST: Final = 0xFFFFFFFE  # one more is, to chown(2) and setresuid(2), whoever it was before


def _number(text: str, option: str) -> int | None:
    """Of a user or a group, if it is named by that. Raises `StartError` for one that nobody can have."""
    if not text.isascii() or not text.isdigit():
        return None
    if int(text) > _MOST:
        raise StartError(f"{option}: {text} is out of range: users and groups are 0 to {_MOST}")
    return int(text)


def _user(name: str, number: int | None) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(name) if number is None else pwd.getpwuid(number)
    except KeyError:
        return None


def group(name: str, option: str) -> int:
    """The number of a group that an option names, by its name or number. Raises `StartError` if there is none."""
    if (number := _number(name, option)) is not None:
        return number
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise StartError(f"{option}: no such group: {name} (a number does without)") from None


def user(spec: str | None) -> User | None:
    """Whom ``--runas`` means (``USER`` or ``USER:GROUP``, names or numbers).

    Without it root becomes nobody and everyone else stays as they are: None.
    Raises `StartError` for names that do not exist, and numbers that cannot.
    """
    if spec is None:
        if os.geteuid() != 0:
            return None
        spec = "nobody"
    name, colon, of = spec.partition(":")
    number = _number(name, "--runas")
    entry = _user(name, number)
    uid = entry.pw_uid if entry else number
    if uid is None:
        raise StartError(f"--runas: no such user: {name} (a number does without)")
    wanted = User(uid, group(of, "--runas") if colon else entry.pw_gid if entry else uid)
    if os.geteuid() != 0 and (wanted.uid, wanted.gid) != (os.geteuid(), os.getegid()):
        raise StartError(f"--runas {spec}: only root can become another user; leave it out, or start as root")
    return wanted
