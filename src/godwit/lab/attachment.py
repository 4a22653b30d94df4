# SPDX-License-Identifier: GPL-2.0-or-later
"""One back-end behind the embedded guest, and what QEMU would say to it.

The sequences of requests are QEMU's (10 and 11, virtio-net with vhost-user), in
its order, since it is what back-ends will meet. States of an ``Attachment``:

* connected: features exchanged, eventfds handed over; no ring runs.
* running: rings run. ``start`` enters it, also after ``suspend``.
* suspended: GET_VRING_BASE has stopped all rings; the state can be saved.
* closed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from godwit.lab.errors import LabError
from godwit.lab.memory import RX, TX, DirtyLog, GuestMemory
from godwit.vhost_user import Direction, Feature, FrontendClient, ProtocolFeature

QUEUES = (RX, TX)

OFFLOADS = (
    Feature.VIRTIO_NET_F_CSUM
    | Feature.VIRTIO_NET_F_HOST_TSO4
    | Feature.VIRTIO_NET_F_HOST_TSO6
    | Feature.VIRTIO_NET_F_HOST_ECN
    | Feature.VIRTIO_NET_F_HOST_USO
    | Feature.VIRTIO_NET_F_GUEST_CSUM
    | Feature.VIRTIO_NET_F_GUEST_TSO4
    | Feature.VIRTIO_NET_F_GUEST_TSO6
    | Feature.VIRTIO_NET_F_GUEST_ECN
    | Feature.VIRTIO_NET_F_GUEST_USO4
    | Feature.VIRTIO_NET_F_GUEST_USO6
)

# What this driver can do. MRG_RXBUF is not optional: buffers are smaller than frames.
DRIVER_FEATURES = (
    OFFLOADS
    | Feature.VIRTIO_F_VERSION_1
    | Feature.VIRTIO_NET_F_MRG_RXBUF
    | Feature.VIRTIO_F_EVENT_IDX
    | Feature.VIRTIO_F_INDIRECT_DESC
)
REQUIRED = Feature.VIRTIO_F_VERSION_1 | Feature.VIRTIO_NET_F_MRG_RXBUF

PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.RARP
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.NET_MTU
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.DEVICE_STATE
)

KICK_RX, CALL_RX, KICK_TX, CALL_TX = range(4)


class Attachment:
    """A connection to the back-end that listens at ``path``.

    Raises what :class:`godwit.vhost_user.FrontendClient` raises, and
    :class:`LabError` for a back-end that lacks what is needed.
    """

    def __init__(
        self,
        path: str,
        memory: GuestMemory,
        *,
        num: int,
        driver_features: int,
        acks: bool = True,
        timeout: float = 10.0,
    ) -> None:
        self.path = path
        self._memory = memory
        self._num = num
        self._log: DirtyLog | None = None
        self.features = 0
        self._cleanup = contextlib.ExitStack()
        self.client = self._cleanup.enter_context(FrontendClient.connect(path, timeout=timeout, acks=acks))
        try:
            self._connect(driver_features)
        except BaseException:
            self.close()
            raise

    def _connect(self, driver_features: int) -> None:
        client = self.client
        self.offered = client.get_features()
        self.protocol_features = 0
        if self.offered & Feature.VHOST_USER_F_PROTOCOL_FEATURES:
            self.protocol_features = client.get_protocol_features() & PROTOCOL_FEATURES
            client.set_protocol_features(self.protocol_features)
            if self.protocol_features & ProtocolFeature.MQ:
                client.get_queue_num()
        client.set_owner()
        client.get_features()
        if self.offered & REQUIRED != REQUIRED:
            raise LabError(f"the back-end at {self.path} offers {self.offered:#x}: VERSION_1 and MRG_RXBUF are needed")
        self.features = self.offered & driver_features
        self.events = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(4)]
        self.errors = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in QUEUES]
        for fd in (*self.events, *self.errors):
            self._cleanup.callback(os.close, fd)
        for queue in QUEUES:
            client.set_vring_call(queue, self.call(queue))
            client.set_vring_err(queue, self.errors[queue])
        self.enable()

    def kick(self, queue: int) -> int:
        """Return the eventfd by which the driver notifies the back-end."""
        return self.events[2 * queue]

    def call(self, queue: int) -> int:
        """Return the eventfd by which the back-end notifies the driver."""
        return self.events[2 * queue + 1]

    def enable(self) -> None:
        """SET_VRING_ENABLE 1 for all rings; QEMU says so more than once."""
        if self.offered & Feature.VHOST_USER_F_PROTOCOL_FEATURES:
            for queue in QUEUES:
                self.client.set_vring_enable(queue, True)

    def _set_features(self) -> None:
        features = self.features | (self.offered & Feature.VHOST_USER_F_PROTOCOL_FEATURES)
        if self._log is not None:
            features |= Feature.VHOST_F_LOG_ALL
        self.client.set_features(features)

    def start(self, bases: Sequence[int]) -> None:
        """Start all rings, each from its entry of ``bases``."""
        self._set_features()
        self.client.set_mem_table(self._memory.regions())
        for queue in QUEUES:
            self.client.set_vring_num(queue, self._num)
            self.client.set_vring_base(queue, bases[queue])
            self.client.set_vring_addr(queue, self._memory.vring_addr(queue, log=self._log is not None))
            self.client.set_vring_kick(queue, self.kick(queue))
            self.client.set_vring_call(queue, self.call(queue))

    def suspend(self) -> list[int]:
        """Stop all rings; return the bases to start them from again, here or elsewhere."""
        return [self.client.get_vring_base(queue) for queue in QUEUES]

    def log_on(self) -> DirtyLog:
        """Have the back-end log the pages that it writes."""
        if not self.offered & Feature.VHOST_F_LOG_ALL or not self.protocol_features & ProtocolFeature.LOG_SHMFD:
            raise LabError(f"the back-end at {self.path} cannot log dirty pages, so its guest cannot migrate")
        self._log = DirtyLog(self._memory)
        self._cleanup.callback(self._log.close)
        self.client.set_log_base(self._log.fd, self._log.size)
        self._switch_log()
        return self._log

    def log_off(self) -> None:
        """Have it stop logging."""
        self._log = None
        self._switch_log()

    def _switch_log(self) -> None:
        self._set_features()
        for queue in QUEUES:
            self.client.set_vring_addr(queue, self._memory.vring_addr(queue, log=self._log is not None))

    @property
    def has_state(self) -> bool:
        """Whether the back-end can save and load its own state."""
        return bool(self.protocol_features & ProtocolFeature.DEVICE_STATE)

    def state_pipe(self, direction: Direction) -> int:
        """Begin to save or load; return our end of the pipe, the caller's to close."""
        reading, writing = os.pipe2(os.O_CLOEXEC)
        ours, theirs = (reading, writing) if direction is Direction.SAVE else (writing, reading)
        try:
            instead = self.client.set_device_state_fd(direction, theirs)
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        if instead is not None:
            os.close(ours)
            return instead
        return ours

    def check(self) -> bool:
        """CHECK_DEVICE_STATE: whether the transfer went well."""
        return self.client.check_device_state()

    def announce(self, mac: bytes) -> None:
        """SEND_RARP, where the back-end knows it."""
        if self.protocol_features & ProtocolFeature.RARP:
            self.client.send_rarp(mac)

    def set_mtu(self, mtu: int) -> None:
        """NET_SET_MTU, where the back-end knows it."""
        if self.protocol_features & ProtocolFeature.NET_MTU:
            self.client.net_set_mtu(mtu)

    def ring_errors(self) -> list[int]:
        """Return the queues for which the back-end has reported a broken ring."""
        broken = []
        for queue in QUEUES:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.errors[queue])
                broken.append(queue)
        return broken

    def close(self) -> None:
        """Hang up. May be repeated."""
        self._cleanup.close()
