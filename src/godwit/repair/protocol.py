# SPDX-License-Identifier: GPL-2.0-or-later
"""What goes over the socket between a back-end and its repair helper.

The back-end listens, the helper connects. Then, as often as needed: the
back-end sends one byte, the value for TCP_REPAIR as a signed integer, and with
it from 1 to 253 sockets as SCM_RIGHTS; the helper sets that value on each of
them and answers with the same byte. Anything else, or the end of the stream,
says that it failed, for some or for all of the sockets. There are no other
messages, and only one is under way at a time. (What else there is to say of a
helper of ours, its name says.)
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Callable, Collection, Iterable, Sequence
from enum import IntEnum
from typing import Final

#: Descriptors in one message, at most: SCM_MAX_FD of the kernel (unix(7)).
MAX_SOCKETS: Final = 253
#: How the abstract name (unix(7)) begins of a helper that keeps back resets until its first request that ends repair
#: mode (`godwit.repair.guard`). Others have no name.
GUARD_NAME: Final = b"\0godwit-repair-guard-"
#: linux/tcp.h; the socket module has it not.
TCP_REPAIR: Final = 19

_INT: Final = array.array("i").itemsize
_CREDENTIALS: Final = struct.Struct("=iII")  # struct ucred: process, user, group
_ANCILLARY: Final = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(MAX_SOCKETS * _INT)
_PASSCRED: Final = 16  # SO_PASSCRED
_SCM_CREDENTIALS: Final = 2


#: Gives the users whose messages are taken, None for all; it is asked when one has come.
Senders = Callable[[], Collection[int] | None]


class Repair(IntEnum):
    """The values of TCP_REPAIR (tcp(7))."""

    #: Repair mode off, in silence.
    OFF_NO_WP = -1
    #: Repair mode off; an established connection sends a window probe, which the peer answers.
    OFF = 0
    #: Repair mode on.
    ON = 1


class RepairError(Exception):
    """The helper did not do what it was asked.

    Of the sockets, counted from the first, ``done`` are known to be in the new
    mode; the next ``uncertain`` are in either mode, and a helper that hung may
    change them yet; the others are as they were. Reading TCP_REPAIR says what is.
    """

    def __init__(self, message: str, done: int = 0, uncertain: int = 0) -> None:
        super().__init__(message)
        self.done = done
        self.uncertain = uncertain


class MessageError(Exception):
    """What came from the other side is no message of this protocol."""


def encode(mode: Repair) -> bytes:
    """The byte that stands for ``mode``, in the request and in the answer."""
    return mode.to_bytes(1, "little", signed=True)


def decode(data: bytes) -> Repair:
    """The mode that a byte stands for; ``MessageError`` if none."""
    if len(data) != 1:
        raise MessageError(f"{len(data)} bytes where one was due")
    value = int.from_bytes(data, "little", signed=True)
    try:
        return Repair(value)
    except ValueError:
        raise MessageError(f"{value} is no value of TCP_REPAIR") from None


def send_request(sock: socket.socket, mode: Repair, fds: Sequence[int]) -> None:
    """Send one message; at most ``MAX_SOCKETS`` sockets."""
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
    sock.sendmsg([encode(mode)], [rights], socket.MSG_NOSIGNAL)


def tell_senders(sock: socket.socket) -> None:
    """Have the kernel say with each message which user's process has sent it, for `receive_request` (unix(7))."""
    sock.setsockopt(socket.SOL_SOCKET, _PASSCRED, 1)


def receive_request(sock: socket.socket, senders: Senders | None = None) -> tuple[Repair, array.array[int]] | None:
    """Take one message; the descriptors are the caller's. None at the end of the stream.

    ``senders``: who may send it, after `tell_senders`; None for anybody.

    ``MessageError``, with every descriptor closed, for anything but a known
    mode and at least one descriptor from one of these users.
    """
    data, ancillary, flags, _ = sock.recvmsg(1, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    sender = -1
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % _INT])
        elif level == socket.SOL_SOCKET and kind == _SCM_CREDENTIALS:
            _, sender, _ = _CREDENTIALS.unpack(content)
    try:
        if not data and not fds:
            return None
        if flags & socket.MSG_CTRUNC:
            raise MessageError(f"descriptors were cut off, {len(fds)} arrived")
        uids = None if senders is None else senders()
        if uids is not None and sender not in uids:
            raise MessageError(f"it is of user {sender}, and not of {' or '.join(map(str, sorted(uids)))}")
        mode = decode(data)
        if not fds:
            raise MessageError("a request without a socket")
    except MessageError:
        close_all(fds)
        raise
    return mode, fds


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors."""
    for fd in fds:
        os.close(fd)
