# SPDX-License-Identifier: GPL-2.0-or-later
"""The window that a guest is given, on a path on which a send buffer grows only if somebody sees to it."""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
from collections.abc import Iterator

import pytest

from godwit.lab.netns import wait_until

from .world import FAMILY, SERVER, World

SND_WND = 228  # tcpi_snd_wnd's place in TCP_INFO, linux/tcp.h


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World() as made:
        yield made


def window(sock: socket.socket) -> int:
    """What the other side has said that it takes."""
    return int(struct.unpack_from("=I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, SND_WND + 4), SND_WND)[0])


def unacknowledged(sock: socket.socket) -> int:
    return int(struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0])


@pytest.mark.parametrize("version", [4, 6])
def test_it_grows_although_the_buffer_is_never_full(world: World, version: int) -> None:
    """Each time all that the window allows, of which the peer has everything before the guest sends more."""
    with world.server.enter():
        listening = socket.create_server((SERVER[version], 0), family=FAMILY[version])
    with listening, world.guest.enter():
        sending = socket.create_connection(listening.getsockname()[:2], 5)
        receiving, _ = listening.accept()
    with sending, receiving:
        receiving.settimeout(5)
        first = window(sending)
        assert first < 200_000
        for _ in range(50):
            if window(sending) >= 300_000:
                break
            piece = bytes(window(sending) * 9 // 10)
            sending.sendall(piece)
            left = len(piece)
            while left:
                left -= len(receiving.recv(left))
            wait_until(lambda: not unacknowledged(sending), "the guest's bytes to be acknowledged", 5.0)
        else:
            pytest.fail(f"{window(sending)} bytes, after {first} at first")
