# SPDX-License-Identifier: GPL-2.0-or-later
"""A session with a front-end that speaks no vhost-user: frames over the socket itself.

The stream mode of QEMU's socket (``-netdev stream``), which is passt's default.
The data plane needs rings in shared memory, as a guest shares them; here they
are those of a network card of ours, which has the socket in place of its cable
(`godwit.dataplane.StreamCard`).

There is no migration in this mode: it has no message that would ask for a
state, and none that would say where it goes. That needs vhost-user.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Protocol

from godwit.dataplane import StreamCard
from godwit.vhost_user import DeviceError
from godwit.vhost_user.aio import disconnect
from godwit.vhost_user.device import Device

log = logging.getLogger(__name__)


class Pluggable(Device, Protocol):
    """A device as `serve_stream` sees it."""

    async def plug(self, card: StreamCard) -> None:
        """Serve the guest behind this card until ``disconnected``."""


async def serve_stream(connection: socket.socket, device: Pluggable) -> str | None:
    """Run one session with the front-end at the other end of a connected UNIX stream socket.

    Returns when it is over: None if the front-end hung up between two frames,
    otherwise what ended it, which is also logged. Never raises but for
    cancellation. The last that is called of the device is ``disconnected``, also
    after cancellation, and that to its end. The socket is closed.
    """
    with connection:
        try:
            failure = await _session(connection, device)
        except (OSError, DeviceError) as error:
            failure = f"it could not begin: {error}"  # for want of descriptors or memory
        finally:
            await disconnect(device)
    if failure is not None:
        log.error("the session is over: %s", failure)
    return failure


async def _session(connection: socket.socket, device: Pluggable) -> str | None:
    card = StreamCard(connection.fileno())
    await device.plug(card)
    await _end(card)
    log.debug("what went over the socket: %s", card.counters)
    return card.failure


async def _end(card: StreamCard) -> None:
    """Wait until the card has come to its end."""
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    loop.add_reader(card.fileno(), over.set)
    try:
        await over.wait()
    finally:
        loop.remove_reader(card.fileno())
