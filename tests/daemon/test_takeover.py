# SPDX-License-Identifier: GPL-2.0-or-later
"""The conversation of a hand-over, over a real socket: what it relies on of the kernel, what it does not believe."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator

import pytest

from godwit.daemon.takeover import BATCH, MAGIC, Channel, Successor, TakeoverError, Word
from godwit.net.handover import Handed


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


def channel(sock: socket.socket, seconds: float = 5.0) -> Channel:
    return Channel(sock, time.monotonic() + seconds)


def test_what_was_said_before_the_decision_counts(pair: tuple[socket.socket, socket.socket]) -> None:
    """Also if who said it is gone; and nothing can be said after it."""
    ours, theirs = pair
    channel(theirs).send(Word.RUNNING)
    theirs.close()
    assert channel(ours).decide()


def test_what_is_said_after_the_decision_is_refused(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    assert not channel(ours).decide()
    with pytest.raises(TakeoverError, match="has gone: Broken pipe"):
        channel(theirs).send(Word.RUNNING)
    assert not channel(ours).decide()


def test_another_word_decides_nothing(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    channel(theirs).send(Word.READY)
    assert not channel(ours).decide()


def test_words_and_what_is_none(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    fds = [os.open(os.devnull, os.O_RDONLY) for _ in range(BATCH)]
    before = len(os.listdir("/proc/self/fd"))
    try:
        channel(theirs).send(Word.DESCRIPTORS, 7, "text", fds)
        message = channel(ours).expect(Word.DESCRIPTORS)
        assert (message.number, message.text, len(message.fds)) == (7, "text", BATCH)
        assert not any(os.get_inheritable(fd) for fd in message.fds)
        for fd in message.fds:
            os.close(fd)
        socket.send_fds(theirs, [b"nonsense"], fds[:3])
        with pytest.raises(TakeoverError, match="is no godwit"):
            channel(ours).receive()
        socket.send_fds(theirs, [MAGIC + bytes(8)], fds[:3])
        with pytest.raises(TakeoverError, match="has said 0, and HELLO was expected"):
            channel(ours).expect(Word.HELLO)
        theirs.send(MAGIC + bytes(100_000))
        with pytest.raises(TakeoverError, match="is no godwit"):
            channel(ours).receive()
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        for fd in fds:
            os.close(fd)
    channel(theirs).send(Word.FAILED, text="no\x1b[2Jroom")
    with pytest.raises(TakeoverError, match=r"^no\?\[2Jroom$"):
        channel(ours).expect(Word.READY)
    with pytest.raises(TakeoverError, match="has not answered in time"):
        channel(ours, 0.05).receive()
    theirs.close()
    with pytest.raises(TakeoverError, match="has gone"):
        channel(ours).receive()


def test_nobody_takes_what_is_given(pair: tuple[socket.socket, socket.socket]) -> None:
    """No descriptor is left behind, and the time is kept."""
    ours, theirs = pair
    successor = Successor(ours)
    assert successor.allowed
    before = len(os.listdir("/proc/self/fd"))
    began = time.monotonic()
    with pytest.raises(TakeoverError, match="in time"):
        successor.give(Handed(listeners=[0, 1]), began - 1.8)
    assert time.monotonic() - began < 1.5
    assert successor.has_descriptors
    assert len(os.listdir("/proc/self/fd")) == before
    theirs.close()
    successor.close()
