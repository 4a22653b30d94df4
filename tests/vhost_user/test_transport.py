# SPDX-License-Identifier: GPL-2.0-or-later
"""Descriptors through a real socket, and sending to one that is full."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator

import pytest

from godwit.vhost_user import Outgoing, ProtocolError
from godwit.vhost_user.frames import MAX_FDS, close_fds
from godwit.vhost_user.transport import Sender, receive


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    with left, right:
        yield left, right


Pair = tuple[socket.socket, socket.socket]


@pytest.mark.parametrize("count", [1, 8, MAX_FDS])
def test_descriptors(pair: Pair, count: int, fd: Callable[[], int]) -> None:
    sender = Sender(pair[0])
    file = fd()
    sender.put([Outgoing(b"abc", (file,) * count)])
    sender.send()
    assert not sender.pending
    data, fds = receive(pair[1], 2)
    assert (data, len(fds)) == (b"ab", count)
    assert not any(os.get_inheritable(received) for received in fds)
    assert receive(pair[1], 2) == (b"c", [])
    os.close(file)
    close_fds(fds)


def test_too_many_descriptors(pair: Pair, fd: Callable[[], int]) -> None:
    file = fd()
    socket.send_fds(pair[0], [b"a"], [file] * (MAX_FDS + 1))
    with pytest.raises(ProtocolError, match="cut off") as raised:
        receive(pair[1], 1)
    assert raised.value.fatal
    os.close(file)


def test_owned_descriptors_are_closed_once_sent(pair: Pair, fd: Callable[[], int]) -> None:
    sender = Sender(pair[0])
    file = fd()
    sender.put([Outgoing(b"a", (file,), owned=True)])
    sender.send()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)
    _, fds = receive(pair[1], 1)
    close_fds(fds)


def test_a_full_socket(pair: Pair, fd: Callable[[], int]) -> None:
    pair[0].setblocking(False)
    pair[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    sender = Sender(pair[0])
    data = os.urandom(1 << 20)
    sender.put([Outgoing(data, (fd(),), owned=True), Outgoing(b"end", (fd(),), owned=True)])
    with pytest.raises(BlockingIOError):
        sender.send()
    assert sender.pending
    got = b""
    number = 0
    while len(got) < len(data) + 3:
        if sender.pending:
            try:
                sender.send()
            except BlockingIOError:
                pass
        piece, fds = receive(pair[1], 65536)
        got += piece
        number += len(fds)
        close_fds(fds)
    assert got == data + b"end"
    assert number == 2


def test_what_was_not_sent_is_closed(pair: Pair, fd: Callable[[], int]) -> None:
    sender = Sender(pair[0])
    pair[1].close()
    sender.put([Outgoing(b"a", (fd(),), owned=True)])
    with pytest.raises(BrokenPipeError):
        sender.send()
    sender.close()
    assert not sender.pending
