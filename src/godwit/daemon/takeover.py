# SPDX-License-Identifier: GPL-2.0-or-later
"""Who goes on with a guest: the old process or the new one, and never both, and never none.

Theory of operation. The new process connects to the old one's socket (a SOCK_SEQPACKET one: each message is whole, and
its descriptors belong to it)::

    new                               old
    HELLO (what it is)           ->
                                 <-   REFUSED (why): the end
                                      brings the guest's network to a stop
                                 <-   STATE (how many descriptors), with a memory file: `godwit.net.handover`
                                 <-   DESCRIPTORS, at most 250 at a time
    GOT, for each of these       ->
    loads all, touches nothing
    READY (the paths it keeps)   ->   or FAILED (why): the old one goes on
                                 <-   GO: from here on the old one does nothing but wait
    RUNNING                      ->
    goes on                           lets go of everything, and ends

The switch is one moment: RUNNING is in the old one's queue. Before it, the new one has touched no ring and no socket,
and after it the old one touches none. If the old one has waited long enough it first shuts its end for receiving: from
then on the kernel refuses what the new one sends, which ends it. Then it looks into its queue a last time, and what is
there decides. A new process that hangs meanwhile has its own alarm to end it (`end_within`), since it holds duplicates
of the guest's sockets. The old one, which may signal nobody (`godwit.daemon.sandbox`), says in the log if it stays.
"""

from __future__ import annotations

import array
import fcntl
import logging
import os
import signal
import socket
import struct
import time
from collections.abc import Sequence
from enum import IntEnum
from typing import Final, NamedTuple

from godwit import __version__
from godwit.confine import namespaces
from godwit.daemon.errors import StartError
from godwit.migration.errors import MigrationError
from godwit.migration.layout import printable
from godwit.net.handover import Handed, read, write
from godwit.repair.client import peer_of

log = logging.getLogger(__name__)

#: Of what is said, for both sides to know that they understand each other.
PROTOCOL: Final = 1
MAGIC: Final = b"godwitTO"
#: Seconds that the guest's network stands still at most, for a hand-over that then does not come about; and for each
#: descriptor, of which there may be tens of thousands.
PATIENCE: Final = 2.0
PATIENCE_EACH: Final = 0.0001
#: Seconds for the first word, and for the old one to come to a stop between two requests of the front-end's.
GREETING: Final = 5.0
#: Until the alarm of a new one that hangs, beyond the time in which it could have gone on; and until it is missed.
ENDING: Final = 1.0
BATCH: Final = 250  # descriptors in one message; the kernel takes 253 (unix(7))
MAX_DESCRIPTORS: Final = 1 << 20
MAX_STREAM: Final = 1 << 30  # bytes
MAX_TEXT: Final = 16384
SHOWN: Final = 300

_HEAD: Final = struct.Struct("=8sHHI")
_FD_SIZE: Final = array.array("i").itemsize
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_SO_PEERPIDFD: Final = 77  # Linux 6.5


def end_within(seconds: float) -> None:
    """Have the kernel end this process then, wherever it hangs; 0 calls that off."""
    signal.setitimer(signal.ITIMER_REAL, seconds)


def patience(descriptors: int) -> float:
    """How long to wait, in seconds, where so many are handed over."""
    return PATIENCE + descriptors * PATIENCE_EACH


class Word(IntEnum):
    """What is said."""

    HELLO = 1
    REFUSED = 2
    STATE = 3
    DESCRIPTORS = 4
    GOT = 5
    READY = 6
    FAILED = 7
    GO = 8
    RUNNING = 9


class TakeoverError(StartError):
    """No hand-over: who had the guest goes on with it."""


class Message(NamedTuple):
    """One word, a number and a text with it, and descriptors, which are whoever's who has this."""

    word: int
    protocol: int
    number: int
    text: str
    fds: Sequence[int]


class Channel:
    """One end of the conversation. ``deadline`` (CLOCK_MONOTONIC, seconds) is for all waits until it is set anew."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock = sock
        self.deadline = deadline

    def send(self, word: Word, number: int = 0, text: str = "", fds: Sequence[int] = ()) -> None:
        """Say something. Descriptors stay the caller's. Raises `TakeoverError` if nobody is there, or takes it."""
        data = _HEAD.pack(MAGIC, word, PROTOCOL, number) + text.encode()[:MAX_TEXT]
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self._wait_time()
        try:
            self._sock.sendmsg([data], rights, socket.MSG_NOSIGNAL)
        except TimeoutError:
            raise TakeoverError("the other side does not listen") from None
        except OSError as error:
            raise TakeoverError(f"the other side has gone: {error.strerror}") from error

    def receive(self) -> Message:
        """What the other side says next. Raises `TakeoverError` if it says nothing, or what is no word."""
        self._wait_time()
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(
                _HEAD.size + MAX_TEXT, socket.CMSG_SPACE(BATCH * _FD_SIZE), socket.MSG_CMSG_CLOEXEC
            )
        except TimeoutError:
            raise TakeoverError("the other side has not answered in time") from None
        except OSError as error:
            raise TakeoverError(f"the other side has gone: {error.strerror}") from error
        return _parsed(data, ancillary, flags)

    def expect(self, *words: Word) -> Message:
        """What the other side says next, which must be one of these. Raises `TakeoverError` with the reason if it is
        REFUSED or FAILED."""
        message = self.receive()
        if message.word in words:
            return message
        _close(message.fds)
        if message.word in (Word.REFUSED, Word.FAILED):
            raise TakeoverError(printable(message.text, SHOWN))
        raise TakeoverError(f"the other side has said {message.word}, and {words[0].name} was expected")

    def decide(self) -> bool:
        """Whether RUNNING has come. From here on the other side can say it no more."""
        self._sock.shutdown(socket.SHUT_RD)
        self._sock.setblocking(False)
        try:
            return _parsed(*self._sock.recvmsg(_HEAD.size + MAX_TEXT)[:3]).word == Word.RUNNING
        except (OSError, TakeoverError):
            return False

    def _wait_time(self) -> None:
        self._sock.settimeout(max(0.001, self.deadline - time.monotonic()))


def _parsed(data: bytes, ancillary: Sequence[tuple[int, int, bytes]], flags: int) -> Message:
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % _FD_SIZE])
    why = ""
    if not data:
        why = "the other side has gone"
    elif flags & socket.MSG_CTRUNC:
        why = "there are too few descriptors for what the guest has: raise the limit (ulimit -Hn)"
    elif flags & socket.MSG_TRUNC or len(data) < _HEAD.size or not data.startswith(MAGIC):
        why = "the other side is no godwit"
    if why:
        _close(fds)
        raise TakeoverError(why)
    _, word, protocol, number = _HEAD.unpack_from(data)
    return Message(word, protocol, number, data[_HEAD.size :].decode(errors="replace"), list(fds))


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


# ---- the old one


class Successor:
    """The process at the other end, which wants to go on with the guest."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.pid, self.uid = peer_of(sock)
        self.pidfd = _pidfd(sock, self.pid)
        self.channel = Channel(sock, time.monotonic() + GREETING)
        self.version = "?"
        #: It was sent duplicates of the guest's sockets.
        self.has_descriptors = False

    @property
    def allowed(self) -> bool:
        """Whether it is of this user, or of root, who is not known by name in a user namespace of one's own.

        Nobody else can connect there: the socket is this user's alone.
        """
        return self.uid in (os.geteuid(), 0) or (namespaces.in_user_namespace and self.uid == namespaces.OVERFLOW)

    def greet(self) -> None:
        """Take its first word. Raises `TakeoverError` if it is none that is understood."""
        message = self.channel.expect(Word.HELLO)
        _close(message.fds)
        if message.protocol != PROTOCOL:
            raise TakeoverError(f"it speaks protocol {message.protocol} of the hand-over, and this one {PROTOCOL}")
        self.version = printable(message.text, 40)

    def refuse(self, why: str) -> None:
        """Tell it why not, if it listens."""
        try:
            self.channel.send(Word.REFUSED, text=why)
        except TakeoverError:
            pass

    def give(self, handed: Handed, since: float) -> set[str]:
        """Hand all of it over; the guest's network stands still ``since`` then (CLOCK_MONOTONIC, seconds).

        Gives the paths that are the new one's now.

        Raises `TakeoverError` if it has not come about: the guest is this process's still, and nothing has changed.
        """
        channel = self.channel
        stream, fds = write(handed)
        channel.deadline = since + patience(len(fds))
        memory = os.memfd_create("godwit-handover", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            _write_all(memory, stream)
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)
            self.has_descriptors = True
            channel.send(Word.STATE, len(fds), __version__, [memory])
        finally:
            os.close(memory)
        for first in range(0, len(fds), BATCH):
            # One batch on its way at a time: the kernel limits how many descriptors of a user are.
            channel.send(Word.DESCRIPTORS, text="", fds=fds[first : first + BATCH])
            _close(channel.expect(Word.GOT).fds)
        ready = channel.expect(Word.READY)
        _close(ready.fds)
        channel.send(Word.GO)
        try:
            _close(channel.expect(Word.RUNNING).fds)
        except TakeoverError:
            if not channel.decide():
                raise
        return set(ready.text.split("\n")) - {""}

    def close(self) -> None:
        """Let go of it. May be repeated."""
        self._sock.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


def _pidfd(sock: socket.socket, pid: int) -> int:
    """A descriptor of the process; -1 where there is none to be had."""
    try:
        return sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:
        pass
    try:
        return os.pidfd_open(pid)
    except OSError:
        return -1


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


# ---- the new one


class Predecessor:
    """The process that has the guest. What it has handed over may be looked at; it is touched after ``run`` alone.

    This connects, as whoever we are: later we may not be allowed to. Raises `TakeoverError` if nobody is there.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel = Channel(self._sock, time.monotonic() + GREETING)
        self.version = "?"
        self._patience = PATIENCE
        try:
            self._sock.settimeout(GREETING)
            self._sock.connect(path)
        except OSError as error:
            self._sock.close()
            raise TakeoverError(
                f"cannot take over: nobody hands a guest over at {path}: {error.strerror or error}"
                " (it is the path that ends in .takeover that is wanted; in stream mode there is none)"
            ) from error

    def take(self) -> Handed:
        """Ask for the guest. Raises `TakeoverError` with the reason if it is not to be had."""
        _, uid = peer_of(self._sock)  # who has made the socket: perhaps a predecessor of its, perhaps as root
        if uid not in (os.geteuid(), 0):
            raise TakeoverError(f"another user's process (uid {uid}) is at {self._path}")
        channel = self._channel
        end_within(GREETING + PATIENCE + ENDING)
        channel.send(Word.HELLO, text=__version__)
        channel.deadline = time.monotonic() + GREETING + PATIENCE
        state = channel.expect(Word.STATE)
        self.version = printable(state.text, 40)
        if state.number > MAX_DESCRIPTORS or len(state.fds) != 1:
            raise TakeoverError("the other side has said what cannot be")
        self._patience = patience(state.number)
        channel.deadline = time.monotonic() + self._patience
        end_within(self._patience + ENDING)
        stream = _read_all(state.fds[0])
        fds: list[int] = []
        while len(fds) < state.number:
            more = channel.expect(Word.DESCRIPTORS).fds
            if not more:
                raise TakeoverError("the other side has said what cannot be")
            fds += more
            channel.send(Word.GOT)
        try:
            handed, left = read(stream, fds)
        except MigrationError as error:
            raise TakeoverError(f"what the other side has handed over cannot be used: {error}") from error
        _close(left)
        return handed

    def fail(self, why: str) -> None:
        """Say that this process cannot go on with the guest."""
        try:
            self._channel.send(Word.FAILED, text=why)
        except TakeoverError:
            pass

    def run(self, keeps: Sequence[str]) -> None:
        """All is loaded, and these paths are this process's: the guest is too, once this returns.

        Raises `TakeoverError` if the old one has kept it.
        """
        self._channel.deadline = time.monotonic() + self._patience
        self._channel.send(Word.READY, text="\n".join(keeps))
        self._channel.expect(Word.GO)
        end_within(0)  # first: once that is said, the guest has nobody else
        self._channel.send(Word.RUNNING)

    def close(self) -> None:
        """Hang up. May be repeated."""
        end_within(0)
        self._sock.close()


def _read_all(fd: int) -> bytes:
    """The whole of a file that nobody can change any more. The descriptor is closed."""
    try:
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise TakeoverError("what the other side has handed over could be changed yet")
        size = os.fstat(fd).st_size
        if size > MAX_STREAM:
            raise TakeoverError(f"what the other side has handed over is {size} bytes, more than {MAX_STREAM}")
        parts = []
        at = 0
        while at < size:
            part = os.pread(fd, size - at, at)
            if not part:
                break
            parts.append(part)
            at += len(part)
        return b"".join(parts)
    except OSError as error:
        raise TakeoverError(f"what the other side has handed over cannot be read: {error.strerror}") from error
    finally:
        os.close(fd)
