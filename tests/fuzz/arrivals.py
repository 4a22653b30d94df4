# SPDX-License-Identifier: GPL-2.0-or-later
"""Device states into the daemon's own mover, with sockets of the kernel's: the target ``arrivals``.

What holds: a load that is refused or dropped leaves no descriptor and no flow;
until the guest runs nobody in the network hears of it; and what a guest has
after any load can be saved, and closed.
"""

from __future__ import annotations

import io
import socket
import tempfile
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from random import Random
from typing import Final

from godwit.daemon.mover import Mover
from godwit.dataplane import Engine
from godwit.migration import Direction, Migration, StageError, State
from godwit.net.state import FlowMover
from godwit.net.versions import versions
from godwit.repair import RepairListener

from .devices import require
from .nowhere import inside, nowhere
from .streams import NATIVE, mutated
from .target import Target
from .targets import load
from .test_mover import PLACES, Rig, stream

NETWORK: Final = "arrivals"  # where nothing else is heard
MADE: Final = 40  # streams to begin with


class Still(Rig):
    """A mover whose engine has no thread, and that is its own repair helper."""

    def __init__(self) -> None:
        self.space = nowhere(NETWORK)
        self.engine = Engine(PLACES)
        self.folder = tempfile.TemporaryDirectory()
        self.listener = RepairListener(f"{self.folder.name}/r")
        self.mover = Mover(self.engine, self.listener, 0, self.schedule)
        self.mover._set_mode = self.set_mode  # type: ignore[method-assign]
        self.helped = self.restored = 0
        self.help = 1 << 30
        self.wire = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, socket.htons(3))

    def run(self, data: bytes) -> bool:
        """An execution. Whether it could be loaded."""
        before = self.content()
        self.heard()
        transfer: Migration[FlowMover] = Migration(versions(), self.mover)
        transfer.request(io.BytesIO(data), Direction.TARGET)
        outcome = transfer.run()
        if isinstance(outcome.error, StageError):
            raise outcome.error
        require(outcome.undo_errors == [], "what came could not be taken back")
        require(self.heard() == [], "the network heard of it")
        loaded = transfer.state is State.LOADED
        if loaded and zlib.crc32(data) & 1:
            self._goes_on(transfer)
        transfer.close()
        self.mover.close_flows()
        self.engine.step()
        self.heard()
        require(self.content() == before, f"something is left: {self.content()}, before {before}")
        return loaded

    def _goes_on(self, transfer: Migration[FlowMover]) -> None:
        require(transfer.commit() == [], "the commit failed")
        self.engine.step()
        for number in (2, NATIVE):
            again: Migration[FlowMover] = Migration(versions(), self.mover)
            again.request(file := io.BytesIO(), Direction.SOURCE, number)
            require(again.run().error is None, "it cannot be saved")
            _, error, other = load(file.getvalue())
            require(error is None, f"what was saved does not load: {error}")
            other.close()
            again.rollback()
            again.close()


still: Callable[[], Still] = cache(Still)


def run(data: bytes) -> bool:
    """The target. Whether the state could be loaded."""
    with inside(NETWORK):
        return still().run(data)


def seeds() -> Iterator[bytes]:
    """States with flows whose ends the kernel has."""
    for number in range(MADE):
        yield stream(Random(f"seed {number}"), (2, NATIVE)[number % 2])


TARGETS: Final = {"arrivals": Target(run, seeds, 8192, mutated)}
