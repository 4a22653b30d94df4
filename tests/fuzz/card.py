# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames over a stream socket, and what is none: the target ``card``.

As `frames`, with the guest at the other end of a socket: frames after their
lengths, in pieces, and lengths that nobody sends. What holds: all frames that
come out are well-formed, without offloads, and within the MTU; a length that
cannot be ends the session, and nothing else does but that and a hang-up; and
the engine has taken each frame that was sent.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Final

from godwit.dataplane import StreamCard

from . import frames, wire
from .devices import require
from .frames import FEATURES, FRAME, NUM, Link, link, nothing_left
from .nowhere import inside
from .script import Script, Writer
from .target import Target

LENGTHS_THAT_ARE_WRONG: Final = (0, StreamCard.MAX_FRAME + 1, 0xFFFFFFFF)
WRONG, HANG_UP = 1, 2  # in place of a number of descriptors, which there are none of here


class Run(frames.Run):
    """One session."""

    def __init__(self, link: Link, script: Script) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.ours.setblocking(False)
        self.theirs.setblocking(False)
        self.came = b""
        self.wrong = self.hung_up = False
        super().__init__(link, script)

    def _begin(self) -> None:
        self._configure()
        self.card = StreamCard(self.theirs.fileno())
        self.engine.plug(self.card)

    def all(self) -> bool:
        """The whole script."""
        before = self.engine.counters()["frames_from_guest"]
        for _ in range(frames.STEPS):
            if not self.script or self.wrong or self.hung_up:
                break
            self._one()
            self._settle()
        for _ in range(4):
            self._settle()
        failure = self.card.failure
        require((failure is not None) == (self.wrong and self.out >= 0), f"the session has ended: {failure}")
        came = self.engine.counters()["frames_from_guest"] - before
        require(came == self.out, f"{came} frames of {self.out} came")
        return self.sent > 0

    def _send(self, data: bytes, cut: int) -> None:
        """A frame; ``cut``: in two pieces, or no frame at all."""
        frame = data[self.vnet :]
        if cut in (WRONG, HANG_UP) or not frame:
            with contextlib.suppress(OSError):
                if cut == HANG_UP:
                    self.hung_up = True
                    self.ours.shutdown(socket.SHUT_WR)
                else:
                    self.wrong = True
                    length = LENGTHS_THAT_ARE_WRONG[len(frame) % 3]
                    self.ours.send(length.to_bytes(4, "big") + frame)
            return
        whole = len(frame).to_bytes(4, "big") + frame
        with contextlib.suppress(BlockingIOError):
            for part in (whole[:cut], whole[cut:]) if cut else (whole,):
                self.ours.send(part)
                self.engine.step()
            self.out += 1

    def _look(self) -> bool:
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            while data := self.ours.recv(1 << 20):
                self.came += data
        before = self.sent
        while len(self.came) >= 4:
            size = int.from_bytes(self.came[:4], "big")
            require(0 < size <= StreamCard.MAX_FRAME, f"a frame of {size} bytes")
            if len(self.came) < 4 + size:
                break
            seen = wire.check(self.came[4 : 4 + size], self.link.config.our_mac, self.mtu)
            self.came = self.came[4 + size :]
            self.sent += 1
            if seen.proto == wire.TCP:
                self._note(seen)
        return self.sent > before

    def close(self) -> None:
        """The other side is gone."""
        self.engine.detach()
        del self.card  # and its memory with it
        self.ours.close()
        self.theirs.close()


def run(data: bytes) -> bool:
    """The target. Whether the guest was sent something."""
    with inside():
        there = link()
    with inside(), nothing_left():
        one = Run(there, Script(data))
        try:
            return one.all()
        finally:
            one.close()
            there.clean()
            there.ram.attach(there.engine, FEATURES[0], NUM)


def seeds() -> Iterator[bytes]:
    """Those of frames, and sessions that end in each way."""
    yield from frames.seeds()
    for cut in (0, WRONG, HANG_UP, 30):
        yield Writer().put("BBH", 0, FRAME | frames.SPLIT, 60).bytes(bytes(60)).put("B", cut).data


TARGETS: Final = {"card": Target(run, seeds, 8192)}
