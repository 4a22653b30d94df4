# SPDX-License-Identifier: GPL-2.0-or-later
"""The ideal back-end: a network device that has its network in itself, and does next to nothing.

What a guest reaches behind it is what guest and front-end can do, and no
back-end could do better there. To whomever the guest talks:

* On port 9 (*discard*, RFC 863) all that it sends over TCP is acknowledged, and
  thrown away unread; what it sends over UDP is thrown away.
* On TCP port 19 (*chargen*, RFC 864) it is sent as much as its window takes.
  Only headers are written.
* Every other frame comes back, with source and destination swapped: so the guest
  talks to itself, its own stack has both ends, and each byte passes the front-end
  twice, out and in, and is copied once from ring to ring.

::

    python -m godwit.lab.ideal SOCKET

It serves one front-end after the other, until it is ended. It answers no ARP
and no neighbour discovery: the guest has to know the addressee's MAC, whatever
that be. The services over TCP need a guest that takes segments of 64 KiB without
checksums; another's frames come back from these ports, too.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys

from godwit.lab._ideal import Loop
from godwit.lab.attachment import OFFLOADS
from godwit.vhost_user import BaseDevice, DeviceError, Feature, MemoryRegion, ProtocolFeature, VringAddr, serve

DISCARD, CHARGEN = 9, 19  # ports
SERVICES = Feature.VIRTIO_NET_F_GUEST_CSUM | Feature.VIRTIO_NET_F_GUEST_TSO4 | Feature.VIRTIO_NET_F_GUEST_TSO6


class Mirror(BaseDevice):
    """A network device that is its own network."""

    features = (
        OFFLOADS
        | Feature.VIRTIO_F_VERSION_1
        | Feature.VIRTIO_NET_F_MRG_RXBUF
        | Feature.VIRTIO_F_EVENT_IDX
        | Feature.VIRTIO_F_INDIRECT_DESC
        | Feature.VHOST_USER_F_PROTOCOL_FEATURES
    )
    protocol_features = ProtocolFeature.REPLY_ACK | ProtocolFeature.NET_MTU

    def __init__(self) -> None:
        self._loop = Loop()

    async def set_features(self, features: int) -> None:
        """Use these."""
        self._loop.set_features(
            event_idx=bool(features & Feature.VIRTIO_F_EVENT_IDX), services=features & SERVICES == SERVICES
        )

    async def set_mem_table(self, regions: list[MemoryRegion]) -> None:
        """Map these instead of what there was."""
        try:
            self._loop.set_memory(
                (region.guest_addr, region.size, region.user_addr, region.mmap_offset, region.fd) for region in regions
            )
        except OSError as error:
            raise DeviceError(str(error)) from error

    async def set_vring_num(self, index: int, num: int) -> None:
        """The ring's size."""
        self._loop.set_num(index, num)

    async def set_vring_addr(self, index: int, addr: VringAddr) -> None:
        """Where the ring lies."""
        try:
            self._loop.set_addr(index, addr.descriptor, addr.used, addr.available)
        except OSError as error:
            raise DeviceError(str(error)) from error

    async def set_vring_base(self, index: int, base: int) -> None:
        """Where to begin."""
        self._loop.set_base(index, base)

    async def get_vring_base(self, index: int) -> int:
        """Stop the ring."""
        return self._loop.stop_ring(index)

    async def set_vring_kick(self, index: int, fd: int | None) -> None:
        """Start the ring."""
        if fd is None:
            raise DeviceError("a descriptor for kicks is needed")
        try:
            self._loop.start_ring(index, fd)
        except ValueError as error:
            raise DeviceError(str(error)) from error

    async def set_vring_call(self, index: int, fd: int | None) -> None:
        """How to notify the guest."""
        self._loop.set_call(index, fd)

    async def set_vring_err(self, index: int, fd: int | None) -> None:
        """How to tell of a broken ring."""
        self._loop.set_err(index, fd)

    async def set_vring_enable(self, index: int, enabled: bool) -> None:
        """Serve the ring, or not."""
        self._loop.enable(index, enabled)

    async def disconnected(self) -> None:
        """Let go of all."""
        self._loop.detach()


async def _serve(listening: socket.socket) -> None:
    while True:
        sock, _ = await asyncio.get_running_loop().sock_accept(listening)
        await serve(sock, Mirror())


def main(arguments: list[str] | None = None) -> int:
    """Serve front-ends at a socket."""
    words = sys.argv[1:] if arguments is None else arguments
    if len(words) != 1:
        sys.stderr.write("usage: python -m godwit.lab.ideal SOCKET\n")
        return 2
    with socket.socket(socket.AF_UNIX) as listening:
        listening.setblocking(False)
        listening.bind(words[0])
        listening.listen(1)
        try:
            asyncio.run(_serve(listening))
        except KeyboardInterrupt:
            return 130
        finally:
            os.unlink(words[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
