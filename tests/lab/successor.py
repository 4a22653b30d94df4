# SPDX-License-Identifier: GPL-2.0-or-later
"""A process that takes over as far as a step, and does then what it should not: ``successor.py PATH STEP DEED``.

``die``, ``hang``, ``sleep`` (it hangs, and has no alarm), ``garbage`` and ``refuse`` are at any of ``STEPS``;
``late`` is at the last: it goes on, too late.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time

from godwit.daemon.takeover import ENDING, PATIENCE, Channel, TakeoverError, Word, end_within

STEPS = ("connected", "greeted", "state", "descriptors", "loaded", "ready", "go")


def main(path: str, step: str, deed: str) -> None:
    """Take over as far as ``step``."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(path)
        channel = Channel(sock, time.monotonic() + 60)

        def reached(name: str) -> None:
            if name != step:
                return
            if deed == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if deed in ("hang", "sleep"):
                signal.pause()
            if deed == "garbage":
                sock.send(b"what is this? " * 20)
            else:
                channel.send(Word.FAILED, text="I would rather not")
            # It has the descriptors still; that it should wait for what the other one does is no help.
            sock.recv(1)
            sys.exit(3)

        if deed == "hang":
            end_within(PATIENCE + 2 * ENDING)
        reached("connected")
        channel.send(Word.HELLO, text="0.0.0-test")
        reached("greeted")
        state = channel.expect(Word.STATE)
        since = time.monotonic()
        reached("state")
        came = 0
        while came < state.number:
            came += len(channel.expect(Word.DESCRIPTORS).fds)
            reached("descriptors")
            channel.send(Word.GOT)
        reached("loaded")
        channel.send(Word.READY)
        reached("ready")
        channel.expect(Word.GO)
        reached("go")
        if deed == "late":
            # The old one has given up by then, and waits for this one's end, with the connection open.
            time.sleep(max(0.0, since + PATIENCE + ENDING - time.monotonic()))
            try:
                channel.send(Word.RUNNING)
            except TakeoverError:
                sys.exit(5)


if __name__ == "__main__":
    main(*sys.argv[1:])
