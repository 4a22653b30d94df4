# SPDX-License-Identifier: GPL-2.0-or-later
"""What a back-end knows about its session, and the only place where that changes.

Theory of operation: the front-end announces itself (SET_OWNER), negotiates
features, shares memory, describes each ring and starts it (SET_VRING_KICK). A
ring is *set up* once it has a size and addresses, *started* by SET_VRING_KICK
and stopped by GET_VRING_BASE. While no ring is started the device is
*suspended*; only then does its state migrate, in a *transfer* that begins with
SET_DEVICE_STATE_FD and ends with CHECK_DEVICE_STATE, or is given up when a
ring starts. Whether a ring is enabled matters to the device only.

``check`` says whether a request is legal now; ``apply`` takes note of one that
the device has carried out. In each state:

    new        features, queues and memory slots may be asked and negotiated
    owned      everything else, ring requests for rings that exist
    set up     SET_VRING_KICK
    started    no new size, base or features of the ring (other than LOG_ALL)
    suspended  SET_PROTOCOL_FEATURES, SET_DEVICE_STATE_FD
    transfer   CHECK_DEVICE_STATE
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from godwit.vhost_user.errors import ProtocolError
from godwit.vhost_user.features import Feature, ProtocolFeature
from godwit.vhost_user.messages import Request, Row, When
from godwit.vhost_user.payloads import (
    U64,
    MemoryRegion,
    MemoryTable,
    Payload,
    Phase,
    SingleRegion,
    StateTransfer,
    VringAddress,
    VringEnable,
    VringFd,
    VringIndex,
    VringState,
)

log = logging.getLogger(__name__)

MAX_RING_SIZE = 32768  # virtio 1.3, section 2.7


@dataclass(slots=True)
class Ring:
    """One vring."""

    has_num: bool = False
    has_addr: bool = False
    started: bool = False


class SavedSession(NamedTuple):
    """A session between two requests, for another process to go on with (``BackendSession.save``).

    ``rings`` has for each ring whether it has a size, whether it has addresses, and whether it is started;
    ``regions`` are without descriptors. ``unread`` are the bytes of a message that has come in part, and ``fds`` the
    descriptors that came with them.
    """

    features: int
    protocol_features: int
    owned: bool
    rings: tuple[tuple[bool, bool, bool], ...]
    regions: tuple[MemoryRegion, ...]
    unread: bytes = b""
    fds: tuple[int, ...] = ()


class SessionState:
    """The state of one back-end session. Read what you like; only ``apply`` and ``restore`` change it."""

    def __init__(self, features: int, protocol_features: int, queues: int, max_mem_slots: int) -> None:
        # Plain numbers: the complement of an IntFlag may have the bits that the class knows, and no others.
        self.offered = int(features)
        self.protocol_offered = int(protocol_features)
        self.max_mem_slots = max_mem_slots
        self.features = 0
        self.protocol = 0
        self.owned = False
        self.rings = [Ring() for _ in range(queues)]
        self.regions: list[MemoryRegion] = []
        self.transfer = False

    @property
    def suspended(self) -> bool:
        """No ring is started."""
        return not any(ring.started for ring in self.rings)

    @property
    def reply_ack(self) -> bool:
        """REPLY_ACK is negotiated."""
        return bool(self.protocol & ProtocolFeature.REPLY_ACK)

    def save(self) -> SavedSession:
        """All of it, with nothing unread. There is no transfer."""
        rings = tuple((ring.has_num, ring.has_addr, ring.started) for ring in self.rings)
        regions = tuple(region._replace(fd=-1) for region in self.regions)
        return SavedSession(self.features, self.protocol, self.owned, rings, regions)

    def restore(self, saved: SavedSession) -> None:
        """Be what another process's was. Raise ``ProtocolError`` if this back-end could not have come to be so."""
        for what, used, offered in (
            ("features", saved.features, self.offered),
            ("protocol features", saved.protocol_features, self.protocol_offered),
        ):
            if used & ~offered:
                raise ProtocolError(f"the session uses {what} {used & ~offered:#x}, which are not offered here")
        if len(saved.rings) != len(self.rings):
            raise ProtocolError(f"the session has {len(saved.rings)} rings, and there are {len(self.rings)} here")
        if len(saved.regions) > self.max_mem_slots:
            raise ProtocolError(f"the session has {len(saved.regions)} memory regions: {self.max_mem_slots} at most")
        for number, region in enumerate(saved.regions):
            _check_overlap(region, saved.regions[:number])
        self.features, self.protocol, self.owned = saved.features, saved.protocol_features, saved.owned
        self.rings = [Ring(*ring) for ring in saved.rings]
        self.regions = list(saved.regions)

    def check(self, row: Row, payload: Payload) -> None:
        """Raise ``ProtocolError`` if the request is not legal now."""
        if row.feature & ~self.offered:
            raise ProtocolError(f"needs {row.feature.name}, which was not offered")
        if row.protocol & ~self.protocol:
            raise ProtocolError(f"needs protocol feature {row.protocol.name}, which was not negotiated")
        if When.OWNED in row.when and not self.owned:
            raise ProtocolError("came before SET_OWNER")
        if When.RING_EXISTS in row.when:
            self._check_ring(row, _index(payload))
        if When.SUSPENDED in row.when and not self.suspended:
            raise ProtocolError("came while a ring is started")
        if When.TRANSFER in row.when and not self.transfer:
            raise ProtocolError("came without a transfer to check")
        check = _CHECKS.get(row.request)
        if check is not None:
            check(self, payload)

    def _check_ring(self, row: Row, index: int) -> None:
        if index >= len(self.rings):
            raise ProtocolError(f"names ring {index}, but there are {len(self.rings)}")
        ring = self.rings[index]
        if When.RING_STOPPED in row.when and ring.started:
            raise ProtocolError(f"came while ring {index} is started")
        if When.RING_SET_UP in row.when and not (ring.has_num and ring.has_addr):
            raise ProtocolError(f"came before ring {index} has a size and addresses")

    def apply(self, row: Row, payload: Payload) -> None:
        """Take note of a request that has been carried out."""
        change = _CHANGES.get(row.request)
        if change is not None:
            change(self, payload)
            if not row.handler:  # what is a device's to do is logged by who has it done
                log.debug("%s %s", row.name, payload)

    def _check_features(self, payload: Payload) -> None:
        assert isinstance(payload, U64)
        unknown = payload.value & ~self.offered
        if unknown:
            raise ProtocolError(f"asks for features {unknown:#x}, which were not offered")
        changed = (payload.value ^ self.features) & ~int(Feature.VHOST_F_LOG_ALL)
        if changed and not self.suspended:
            raise ProtocolError(f"changes features {changed:#x} while a ring is started")

    def _check_protocol_features(self, payload: Payload) -> None:
        assert isinstance(payload, U64)
        unknown = payload.value & ~self.protocol_offered
        if unknown:
            raise ProtocolError(f"asks for protocol features {unknown:#x}, which were not offered")

    def _check_num(self, payload: Payload) -> None:
        assert isinstance(payload, VringState)
        num = payload.num
        packed = self.features & Feature.VIRTIO_F_RING_PACKED
        if not 0 < num <= MAX_RING_SIZE or (num & (num - 1) and not packed):
            raise ProtocolError(f"gives ring {payload.index} {num} entries")

    def _check_base(self, payload: Payload) -> None:
        assert isinstance(payload, VringState)
        if payload.num > 0xFFFF and not self.features & Feature.VIRTIO_F_RING_PACKED:
            raise ProtocolError(f"sets the base of ring {payload.index} to {payload.num:#x}, more than 16 bits")

    def _check_table(self, payload: Payload) -> None:
        assert isinstance(payload, MemoryTable)
        if len(payload.regions) > self.max_mem_slots:
            raise ProtocolError(f"has {len(payload.regions)} memory regions, more than {self.max_mem_slots}")
        for number, region in enumerate(payload.regions):
            _check_overlap(region, payload.regions[:number])

    def _check_add(self, payload: Payload) -> None:
        assert isinstance(payload, SingleRegion)
        if len(self.regions) >= self.max_mem_slots:
            raise ProtocolError(f"would make more than {self.max_mem_slots} memory regions")
        _check_overlap(payload.region, self.regions)

    def _check_remove(self, payload: Payload) -> None:
        assert isinstance(payload, SingleRegion)
        self._find_region(payload.region)

    def _check_transfer(self, payload: Payload) -> None:
        assert isinstance(payload, StateTransfer)
        if payload.phase != Phase.STOPPED:
            raise ProtocolError(f"asks for a transfer in the unknown phase {payload.phase}")

    def _find_region(self, region: MemoryRegion) -> int:
        # "identified by its guest address, user address and size. The mmap offset is ignored."
        for number, known in enumerate(self.regions):
            if known[:3] == region[:3]:
                return number
        raise ProtocolError(f"names a memory region at {region.guest_addr:#x} that is not there")

    def _set_features(self, payload: Payload) -> None:
        assert isinstance(payload, U64)
        self.features = payload.value

    def _set_owner(self, payload: Payload) -> None:
        self.owned = True

    def _set_table(self, payload: Payload) -> None:
        assert isinstance(payload, MemoryTable)
        self.regions = list(payload.regions)

    def _set_num(self, payload: Payload) -> None:
        self.rings[_index(payload)].has_num = True

    def _set_addr(self, payload: Payload) -> None:
        self.rings[_index(payload)].has_addr = True

    def _start(self, payload: Payload) -> None:
        self.rings[_index(payload)].started = True
        self.transfer = False

    def _stop(self, payload: Payload) -> None:
        self.rings[_index(payload)].started = False

    def _set_protocol_features(self, payload: Payload) -> None:
        assert isinstance(payload, U64)
        self.protocol = payload.value

    def _add_region(self, payload: Payload) -> None:
        assert isinstance(payload, SingleRegion)
        self.regions.append(payload.region)

    def _remove_region(self, payload: Payload) -> None:
        assert isinstance(payload, SingleRegion)
        del self.regions[self._find_region(payload.region)]

    def _begin_transfer(self, payload: Payload) -> None:
        self.transfer = True

    def _end_transfer(self, payload: Payload) -> None:
        self.transfer = False


_Step = Callable[[SessionState, Payload], None]

# What a request must satisfy beyond its row.
_CHECKS: dict[Request, _Step] = {
    Request.SET_FEATURES: SessionState._check_features,
    Request.SET_PROTOCOL_FEATURES: SessionState._check_protocol_features,
    Request.SET_MEM_TABLE: SessionState._check_table,
    Request.ADD_MEM_REG: SessionState._check_add,
    Request.REM_MEM_REG: SessionState._check_remove,
    Request.SET_VRING_NUM: SessionState._check_num,
    Request.SET_VRING_BASE: SessionState._check_base,
    Request.SET_DEVICE_STATE_FD: SessionState._check_transfer,
}

# What a request that was carried out changes.
_CHANGES: dict[Request, _Step] = {
    Request.SET_FEATURES: SessionState._set_features,
    Request.SET_PROTOCOL_FEATURES: SessionState._set_protocol_features,
    Request.SET_OWNER: SessionState._set_owner,
    Request.SET_MEM_TABLE: SessionState._set_table,
    Request.ADD_MEM_REG: SessionState._add_region,
    Request.REM_MEM_REG: SessionState._remove_region,
    Request.SET_VRING_NUM: SessionState._set_num,
    Request.SET_VRING_ADDR: SessionState._set_addr,
    Request.SET_VRING_KICK: SessionState._start,
    Request.GET_VRING_BASE: SessionState._stop,
    Request.SET_DEVICE_STATE_FD: SessionState._begin_transfer,
    Request.CHECK_DEVICE_STATE: SessionState._end_transfer,
}


def _index(payload: Payload) -> int:
    assert isinstance(payload, VringState | VringIndex | VringEnable | VringFd | VringAddress)
    return payload.index


def _check_overlap(region: MemoryRegion, others: list[MemoryRegion] | tuple[MemoryRegion, ...]) -> None:
    # "Violating any of these is a bug in the front-end."
    for other in others:
        for name, start, against in (
            ("guest", region.guest_addr, other.guest_addr),
            ("user", region.user_addr, other.user_addr),
        ):
            if start < against + other.size and against < start + region.size:
                raise ProtocolError(
                    f"has memory regions that overlap at {name} addresses {start:#x} and {against:#x}",
                )
