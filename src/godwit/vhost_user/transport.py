# SPDX-License-Identifier: GPL-2.0-or-later
"""Bytes and descriptors over a UNIX stream socket; works on blocking and non-blocking sockets."""

from __future__ import annotations

import array
import socket
from collections import deque
from collections.abc import Iterable

from godwit.vhost_user.errors import ProtocolError
from godwit.vhost_user.frames import MAX_FDS, Outgoing, close_fds

_FD_SIZE = array.array("i").itemsize
_ANCILLARY = socket.CMSG_SPACE(MAX_FDS * _FD_SIZE)


def receive(sock: socket.socket, wanted: int) -> tuple[bytes, list[int]]:
    """Read up to ``wanted`` bytes and the descriptors that came with them, which are the caller's.

    No bytes mean the end of the stream. Raises ``ProtocolError`` (fatal, all
    descriptors closed) where the kernel cut descriptors off: there were more
    than ``MAX_FDS``, or this process may not open as many.
    """
    data, ancillary, flags, _address = sock.recvmsg(wanted, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % _FD_SIZE])
    if flags & socket.MSG_CTRUNC:
        close_fds(fds)
        raise ProtocolError(f"descriptors were cut off; {len(fds)} arrived", fatal=True)
    return data, list(fds)


class Sender:
    """Sends messages one after the other, however little the socket takes at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._queue: deque[Outgoing] = deque()

    @property
    def pending(self) -> bool:
        """Something is still to be sent."""
        return bool(self._queue)

    def put(self, messages: Iterable[Outgoing]) -> None:
        """Queue messages; owned descriptors are the sender's from now on."""
        self._queue.extend(messages)

    def send(self) -> None:
        """Send what is queued; ``BlockingIOError`` or ``TimeoutError`` where the socket takes no more now.

        Call again to go on where it stopped. Any other ``OSError``: the peer is gone.
        """
        while self._queue:
            message = self._queue[0]
            if message.fds:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", message.fds))]
                sent = self._sock.sendmsg([message.data], rights, socket.MSG_NOSIGNAL)
                if message.owned:
                    close_fds(message.fds)
            else:
                sent = self._sock.send(message.data, socket.MSG_NOSIGNAL)
            if sent == len(message.data):
                self._queue.popleft()
            else:
                self._queue[0] = Outgoing(message.data[sent:])

    def close(self) -> None:
        """Drop what is queued and close the descriptors that are the sender's."""
        while self._queue:
            message = self._queue.popleft()
            if message.owned:
                close_fds(message.fds)
