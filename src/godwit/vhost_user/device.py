# SPDX-License-Identifier: GPL-2.0-or-later
"""What the author of a vhost-user device writes.

A device is any object with the attributes and methods of ``Device``;
``BaseDevice`` has defaults for all of them. ``godwit.vhost_user.serve`` calls
the methods one at a time, in the order of the front-end's messages, each after
the one before has returned. Arguments are checked before: ring indices are
below ``queues``, ring sizes are legal, memory regions do not overlap, features
are among those offered.

Descriptors: from the moment a method is called, a descriptor it was handed
belongs to the device, also if the method raises. A descriptor that a method
returns belongs to the caller, who sends it and closes its copy.

Failure: a method that cannot do its work raises ``DeviceError`` and leaves the
device as it was; the front-end is told where the request has a reply, and the
session ends where it has none. Any other exception is a fault of the device:
it is logged with its traceback and then treated in the same way.
"""

from __future__ import annotations

import os
from typing import Protocol

from godwit.vhost_user.features import Feature, ProtocolFeature
from godwit.vhost_user.payloads import Direction, MemoryRegion, VringAddr


class Device(Protocol):
    """A vhost-user device, as ``serve`` sees it."""

    @property
    def features(self) -> int:
        """Virtio and vhost features offered (``Feature``)."""

    @property
    def protocol_features(self) -> int:
        """Protocol features offered (``ProtocolFeature``)."""

    @property
    def queues(self) -> int:
        """How many vrings there are; a network device without extra queues has 2."""

    @property
    def queue_num(self) -> int:
        """The answer to GET_QUEUE_NUM: front-ends take it as queue *pairs* for a network device."""

    @property
    def max_mem_slots(self) -> int:
        """How many memory regions the device can hold."""

    async def set_features(self, features: int) -> None:
        """SET_FEATURES: use these, from now on. May change LOG_ALL while rings run."""

    async def set_mem_table(self, regions: list[MemoryRegion]) -> None:
        """SET_MEM_TABLE: these regions replace all there were. The device owns their fds."""

    async def add_mem_region(self, region: MemoryRegion) -> None:
        """ADD_MEM_REG: one region more. The device owns its fd."""

    async def remove_mem_region(self, region: MemoryRegion) -> None:
        """REM_MEM_REG: one region less, the one with these addresses and size; its ``fd`` is -1."""

    async def set_log(self, fd: int, size: int, offset: int) -> None:
        """SET_LOG_BASE: the dirty log is ``size`` bytes at ``offset`` of ``fd``, a bit per 4 KiB page."""

    async def set_log_fd(self, fd: int) -> None:
        """SET_LOG_FD: an eventfd to signal when the log has changed (optional to do so)."""

    async def set_vring_num(self, index: int, num: int) -> None:
        """SET_VRING_NUM: entries of a stopped ring, 1 to 32768."""

    async def set_vring_addr(self, index: int, addr: VringAddr) -> None:
        """SET_VRING_ADDR. On a running ring, too, to switch its logging."""

    async def set_vring_base(self, index: int, base: int) -> None:
        """SET_VRING_BASE: the next available entry to take from a stopped ring."""

    async def get_vring_base(self, index: int) -> int:
        """GET_VRING_BASE: stop the ring and say which available entry comes next."""

    async def set_vring_kick(self, index: int, fd: int | None) -> None:
        """SET_VRING_KICK: start the ring; its eventfd, or None where it is to be polled."""

    async def set_vring_call(self, index: int, fd: int | None) -> None:
        """SET_VRING_CALL: the eventfd that tells the driver of used buffers, None for none."""

    async def set_vring_err(self, index: int, fd: int | None) -> None:
        """SET_VRING_ERR: the eventfd that tells the front-end of a broken ring, None for none."""

    async def set_vring_enable(self, index: int, enabled: bool) -> None:
        """SET_VRING_ENABLE: whether the ring's buffers go to and come from the world."""

    async def send_rarp(self, mac: bytes) -> None:
        """SEND_RARP: announce the guest's address (6 bytes) on the network."""

    async def set_mtu(self, mtu: int) -> None:
        """NET_SET_MTU: the MTU in bytes, 68 to 65535."""

    async def set_device_state_fd(self, direction: Direction, phase: int, fd: int) -> int | None:
        """SET_DEVICE_STATE_FD: write the state to ``fd`` (save) or read it from there to EOF (load).

        May return at once and go on in the background. Returns a descriptor
        for the front-end to use in place of its own, or None (the usual).
        """

    async def check_device_state(self) -> bool:
        """CHECK_DEVICE_STATE: wait for the transfer to end; True if all went well.

        Cancelled if the front-end goes away meanwhile.
        """

    async def reset_owner(self) -> None:
        """RESET_OWNER: disable all rings."""

    async def disconnected(self) -> None:
        """The session is over, for whatever reason; always the last call. Descriptors are still the device's."""


class BaseDevice:
    """A device that agrees to everything and does nothing.

    The defaults close what descriptors they get. Override what the device
    does; whoever overrides a method with descriptors owns them.
    """

    features: int = Feature.VIRTIO_F_VERSION_1 | Feature.VHOST_F_LOG_ALL | Feature.VHOST_USER_F_PROTOCOL_FEATURES
    protocol_features: int = (
        ProtocolFeature.LOG_SHMFD
        | ProtocolFeature.REPLY_ACK
        | ProtocolFeature.DEVICE_STATE
        | ProtocolFeature.CONFIGURE_MEM_SLOTS
    )
    queues: int = 2
    queue_num: int = 1
    max_mem_slots: int = 8

    async def set_features(self, features: int) -> None:
        """Agree."""

    async def set_mem_table(self, regions: list[MemoryRegion]) -> None:
        """Close the regions' descriptors."""
        for region in regions:
            os.close(region.fd)

    async def add_mem_region(self, region: MemoryRegion) -> None:
        """Close the region's descriptor."""
        os.close(region.fd)

    async def remove_mem_region(self, region: MemoryRegion) -> None:
        """Agree."""

    async def set_log(self, fd: int, size: int, offset: int) -> None:
        """Close the descriptor."""
        os.close(fd)

    async def set_log_fd(self, fd: int) -> None:
        """Close the descriptor."""
        os.close(fd)

    async def set_vring_num(self, index: int, num: int) -> None:
        """Agree."""

    async def set_vring_addr(self, index: int, addr: VringAddr) -> None:
        """Agree."""

    async def set_vring_base(self, index: int, base: int) -> None:
        """Agree."""

    async def get_vring_base(self, index: int) -> int:
        """Answer 0."""
        return 0

    async def set_vring_kick(self, index: int, fd: int | None) -> None:
        """Close the descriptor."""
        _close(fd)

    async def set_vring_call(self, index: int, fd: int | None) -> None:
        """Close the descriptor."""
        _close(fd)

    async def set_vring_err(self, index: int, fd: int | None) -> None:
        """Close the descriptor."""
        _close(fd)

    async def set_vring_enable(self, index: int, enabled: bool) -> None:
        """Agree."""

    async def send_rarp(self, mac: bytes) -> None:
        """Agree."""

    async def set_mtu(self, mtu: int) -> None:
        """Agree."""

    async def set_device_state_fd(self, direction: Direction, phase: int, fd: int) -> int | None:
        """Transfer an empty state: closing the descriptor is all there is to it."""
        os.close(fd)
        return None

    async def check_device_state(self) -> bool:
        """Answer that all went well."""
        return True

    async def reset_owner(self) -> None:
        """Agree."""

    async def disconnected(self) -> None:
        """Nothing to clean up."""


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)
