# SPDX-License-Identifier: GPL-2.0-or-later
"""A session in stream mode, with a device that does nothing: how it begins and how it ends."""

from __future__ import annotations

import asyncio
import socket

import pytest

from godwit.daemon.stream import serve_stream
from godwit.dataplane import Engine, StreamCard
from godwit.vhost_user import BaseDevice, DeviceError


class Device(BaseDevice):
    """Plugs a card into a data plane, or refuses to."""

    def __init__(self, refusal: Exception | None = None) -> None:
        self.refusal = refusal
        self.engine = Engine(16)
        self.calls: list[str] = []

    async def plug(self, card: StreamCard) -> None:
        """Begin."""
        self.calls.append("plug")
        if self.refusal is not None:
            raise self.refusal
        self.engine.plug(card)
        self.engine.start()

    async def disconnected(self) -> None:
        """End."""
        await asyncio.sleep(0.01)
        self.engine.close()
        self.engine.detach()
        self.calls.append("disconnected")


def test_the_front_end_hangs_up() -> None:
    ours, theirs = socket.socketpair()
    device = Device()
    ours.close()
    assert asyncio.run(serve_stream(theirs, device)) is None
    assert device.calls == ["plug", "disconnected"]
    assert theirs.fileno() < 0


def test_it_is_cancelled() -> None:
    ours, theirs = socket.socketpair()
    device = Device()

    async def run() -> None:
        session = asyncio.create_task(serve_stream(theirs, device))
        await asyncio.sleep(0.05)
        session.cancel()
        with pytest.raises(asyncio.CancelledError):
            await session

    with ours:
        asyncio.run(run())
        assert device.calls == ["plug", "disconnected"]
        assert ours.recv(1) == b""


@pytest.mark.parametrize("refusal", [OSError(24, "Too many open files"), DeviceError("no ring lies there")])
def test_it_cannot_begin(refusal: Exception, caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = socket.socketpair()
    device = Device(refusal)
    with ours:
        assert asyncio.run(serve_stream(theirs, device)) == f"it could not begin: {refusal}"
    assert device.calls == ["plug", "disconnected"]
    assert [record.getMessage() for record in caplog.records] == [f"the session is over: it could not begin: {refusal}"]
