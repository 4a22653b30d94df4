# SPDX-License-Identifier: GPL-2.0-or-later
"""What other processes on the host say: the targets ``handover``, ``takeover`` and ``repair``.

What holds: what cannot be is refused with the error that is declared for it;
what is taken reads the same when it is written again; no descriptor is left.
"""

from __future__ import annotations

import array
import functools
import os
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Final

from godwit.daemon.takeover import MAGIC, PROTOCOL, Channel, TakeoverError, Word
from godwit.migration import Header, MigrationError
from godwit.migration.entries import HEAD, REQUIRED
from godwit.net import handover
from godwit.repair.protocol import MessageError, Repair, close_all, encode, receive_request

from ..net.test_handover import whole
from .devices import require
from .script import Script, Writer
from .target import Target

LONGEST: Final = 8192  # bytes of an input
STEPS: Final = 8
MESSAGES: Final = 3  # descriptors with one, at most
HEADER: Final = Header(handover.VERSION, handover.VERSION, handover.MAGIC).pack()
END: Final = HEAD.size + 4


def open_fds() -> list[str]:
    """The descriptors of this process."""
    return os.listdir("/proc/self/fd")


def hand_over(data: bytes) -> bool:
    """Entries; the header and the check value are put to them."""
    fds = range(100, 130)
    stream = HEADER + data + HEAD.pack(0, REQUIRED, 4) + zlib.crc32(data).to_bytes(4, "big")
    try:
        handed, left = handover.read(stream, fds)
    except MigrationError:
        return False
    require(set(left) <= set(fds), "a descriptor that did not come")
    again, named = handover.write(handed)
    require(set(named) <= set(fds) - set(left), "a descriptor that is named, and was left")
    require(handover.read(again, named) == (handed, []), "it reads another way when it is written again")
    require(handover.write(handover.read(again, named)[0])[0] == again, "it is written another way")
    return True


def _send(sock: socket.socket, data: bytes, count: int) -> None:
    """Bytes with so many descriptors."""
    fds = [os.eventfd(0, os.EFD_CLOEXEC) for _ in range(count)]
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    try:
        sock.sendmsg([data], rights)
    finally:
        close_all(fds)


def repair(data: bytes) -> bool:
    """Requests to the helper."""
    script = Script(data)
    before = open_fds()
    came = False
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for _ in range(STEPS):
            if not script:
                break
            _send(ours, script.take(1 + script.u8() % 2) or b"\0", script.u8() % (MESSAGES + 1))
        ours.shutdown(socket.SHUT_WR)
        try:
            while (found := receive_request(theirs)) is not None:
                mode, fds = found
                require(mode in Repair and len(fds) > 0, "a request for nothing")
                close_all(fds)
                came = True
        except MessageError:
            pass
    require(open_fds() == before, "a descriptor is left")
    return came


def take_over(data: bytes) -> bool:
    """What the other one of two godwits says."""
    script = Script(data)
    before = open_fds()
    came = False
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        channel = Channel(theirs, time.monotonic() + 5)
        while script:
            count = script.u8() % (MESSAGES + 1)
            message = script.take(script.u8())
            if not message:
                break
            _send(ours, message, count)
            try:
                found = channel.expect(*list(Word)[::2])
            except TakeoverError as error:
                require("\n" not in str(error), "an error of several lines")
                continue
            require(len(found.fds) == count, "a descriptor that did not come")
            close_all(found.fds)
            came = True
    require(open_fds() == before, "a descriptor is left")
    return came


KINDS: Final[dict[str, Callable[[bytes], bool]]] = {
    "handover": hand_over,
    "repair": repair,
    "takeover": take_over,
}


def seeds(name: str) -> Iterator[bytes]:
    """Of one target."""
    if name == "handover":
        handed = whole()
        handed.ports = [
            (port, fd, [one._replace(data=one.data[:100]) for one in come]) for port, fd, come in handed.ports
        ]
        body = handover.write(handed)[0][len(HEADER) : -END]
        yield body
        at = 0
        while at < len(body):  # and without each of its entries
            size = HEAD.size + HEAD.unpack_from(body, at)[2]
            yield body[:at] + body[at + size :]
            at += size
    elif name == "repair":
        for mode in Repair:
            yield Writer().put("BBB", 0, encode(mode)[0], 1).put("BBB", 0, encode(mode)[0], 3).data
        yield Writer().put("BBB", 0, 9, 1).put("BBB", 0, 0, 0).data
    else:
        for word in Word:
            text = MAGIC + Writer().data
            message = text + b"".join(value.to_bytes(4, "little") for value in (word, PROTOCOL, 7)) + b"why"
            yield Writer().put("BB", 2, len(message)).bytes(message).data


TARGETS: Final = {name: Target(kind, functools.partial(seeds, name), LONGEST) for name, kind in KINDS.items()}
