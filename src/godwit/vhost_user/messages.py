# SPDX-License-Identifier: GPL-2.0-or-later
"""The requests of vhost-user, one row each.

Everything the sessions know about a request is in its row: what it carries,
what must have been negotiated, when it is legal, how it is answered and which
method of the device does it. ``docs/vhost-user.md`` is made from this table.
Source: the vhost-user specification, section "Front-end message types".
"""

from __future__ import annotations

from enum import Flag, IntEnum, auto
from typing import NamedTuple

from godwit.vhost_user.features import Feature, ProtocolFeature
from godwit.vhost_user.payloads import (
    MAX_TABLE_REGIONS,
    U64,
    Empty,
    Log,
    LogReply,
    Mac,
    MemoryTable,
    Mtu,
    Payload,
    SingleRegion,
    StateReply,
    StateTransfer,
    VringAddress,
    VringEnable,
    VringFd,
    VringIndex,
    VringState,
)


class Request(IntEnum):
    """The numbers of the front-end's requests."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43
    GET_SHMEM_CONFIG = 44
    GET_VRING_BASE_SKIP_DRAIN = 45


class When(Flag):
    """Conditions on the session under which a request is legal; see ``state.py``."""

    ALWAYS = 0
    OWNED = auto()  # SET_OWNER was received
    SUSPENDED = auto()  # no ring is started
    RING_EXISTS = auto()  # the ring named is one of the device's
    RING_STOPPED = auto()  # the ring named is not started
    RING_SET_UP = auto()  # the ring named has a size and addresses
    TRANSFER = auto()  # SET_DEVICE_STATE_FD began a transfer that was not checked yet


_NO_FEATURE = Feature(0)
_NO_PROTOCOL = ProtocolFeature(0)
_RING = When.OWNED | When.RING_EXISTS


class Row(NamedTuple):
    """A request. The defaults are those of a plain request that the back-end supports.

    ``fds``: least and most descriptors; a payload may say more exactly.
    ``feature`` must have been offered (the specification asks no more, and
    front-ends enable rings before SET_FEATURES); ``protocol`` must have been
    negotiated. ``reply`` is the type of the request's own reply; without one it
    is acknowledged with a u64 if REPLY_ACK is negotiated and the message asks
    for it. ``failure`` is the own reply that tells of a failure, if there is
    one. ``handler`` is the device's method; the session itself answers where
    it is empty.
    """

    request: Request
    payload: type[Payload] = Empty
    fds: tuple[int, int] = (0, 0)
    feature: Feature = _NO_FEATURE
    protocol: ProtocolFeature = _NO_PROTOCOL
    when: When = When.ALWAYS
    reply: type[Payload] | None = None
    failure: Payload | None = None
    handler: str = ""
    supported: bool = True

    @property
    def name(self) -> str:
        """The specification's name without ``VHOST_USER_``."""
        return self.request.name


def _unsupported(
    request: Request,
    protocol: ProtocolFeature = _NO_PROTOCOL,
    *,
    feature: Feature = _NO_FEATURE,
    reply: type[Payload] | None = None,
    failure: Payload | None = None,
) -> Row:
    """A row that is known by name only. Of the reply it counts only whether there is one."""
    return Row(request, protocol=protocol, feature=feature, reply=reply, failure=failure, supported=False)


_P = ProtocolFeature
_EXTENSIBLE = Feature.VHOST_USER_F_PROTOCOL_FEATURES

ROWS: tuple[Row, ...] = (
    Row(Request.GET_FEATURES, reply=U64),
    Row(Request.SET_FEATURES, U64, handler="set_features"),
    Row(Request.SET_OWNER),
    Row(Request.RESET_OWNER, handler="reset_owner"),
    Row(
        Request.SET_MEM_TABLE,
        MemoryTable,
        fds=(0, MAX_TABLE_REGIONS),
        when=When.OWNED,
        handler="set_mem_table",
    ),
    Row(
        Request.SET_LOG_BASE,
        Log,
        fds=(1, 1),
        protocol=_P.LOG_SHMFD,
        when=When.OWNED,
        reply=LogReply,
        handler="set_log",
    ),
    Row(Request.SET_LOG_FD, fds=(1, 1), when=When.OWNED, handler="set_log_fd"),
    Row(Request.SET_VRING_NUM, VringState, when=_RING | When.RING_STOPPED, handler="set_vring_num"),
    Row(Request.SET_VRING_ADDR, VringAddress, when=_RING, handler="set_vring_addr"),
    Row(Request.SET_VRING_BASE, VringState, when=_RING | When.RING_STOPPED, handler="set_vring_base"),
    Row(Request.GET_VRING_BASE, VringIndex, when=_RING, reply=VringState, handler="get_vring_base"),
    Row(
        Request.SET_VRING_KICK,
        VringFd,
        fds=(0, 1),
        when=_RING | When.RING_SET_UP,
        handler="set_vring_kick",
    ),
    Row(Request.SET_VRING_CALL, VringFd, fds=(0, 1), when=_RING, handler="set_vring_call"),
    Row(Request.SET_VRING_ERR, VringFd, fds=(0, 1), when=_RING, handler="set_vring_err"),
    Row(Request.GET_PROTOCOL_FEATURES, feature=_EXTENSIBLE, reply=U64),
    Row(Request.SET_PROTOCOL_FEATURES, U64, feature=_EXTENSIBLE, when=When.SUSPENDED),
    Row(Request.GET_QUEUE_NUM, protocol=_P.MQ, reply=U64),
    Row(Request.SET_VRING_ENABLE, VringEnable, feature=_EXTENSIBLE, when=_RING, handler="set_vring_enable"),
    Row(Request.SEND_RARP, Mac, protocol=_P.RARP, when=When.OWNED, handler="send_rarp"),
    Row(Request.NET_SET_MTU, Mtu, protocol=_P.NET_MTU, when=When.OWNED, handler="set_mtu"),
    _unsupported(Request.SET_BACKEND_REQ_FD, _P.BACKEND_REQ),
    _unsupported(Request.IOTLB_MSG, feature=Feature.VIRTIO_F_ACCESS_PLATFORM, reply=U64, failure=U64(1)),
    _unsupported(Request.SET_VRING_ENDIAN, _P.CROSS_ENDIAN),
    _unsupported(Request.GET_CONFIG, _P.CONFIG, reply=Empty, failure=Empty()),
    _unsupported(Request.SET_CONFIG, _P.CONFIG),
    _unsupported(Request.CREATE_CRYPTO_SESSION, _P.CRYPTO_SESSION, reply=U64),
    _unsupported(Request.CLOSE_CRYPTO_SESSION, _P.CRYPTO_SESSION),
    _unsupported(Request.POSTCOPY_ADVISE, _P.PAGEFAULT, reply=Empty),
    _unsupported(Request.POSTCOPY_LISTEN, _P.PAGEFAULT),
    _unsupported(Request.POSTCOPY_END, _P.PAGEFAULT, reply=U64, failure=U64(1)),
    _unsupported(Request.GET_INFLIGHT_FD, _P.INFLIGHT_SHMFD, reply=Empty),
    _unsupported(Request.SET_INFLIGHT_FD, _P.INFLIGHT_SHMFD),
    _unsupported(Request.GPU_SET_SOCKET),
    _unsupported(Request.RESET_DEVICE, _P.RESET_DEVICE),
    _unsupported(Request.VRING_KICK, _P.INBAND_NOTIFICATIONS),
    Row(Request.GET_MAX_MEM_SLOTS, protocol=_P.CONFIGURE_MEM_SLOTS, reply=U64),
    Row(
        Request.ADD_MEM_REG,
        SingleRegion,
        fds=(1, 1),
        protocol=_P.CONFIGURE_MEM_SLOTS,
        when=When.OWNED,
        handler="add_mem_region",
    ),
    # "For compatibility with existing incorrect implementations" a descriptor is taken, and closed.
    Row(
        Request.REM_MEM_REG,
        SingleRegion,
        fds=(0, 1),
        protocol=_P.CONFIGURE_MEM_SLOTS,
        when=When.OWNED,
        handler="remove_mem_region",
    ),
    _unsupported(Request.SET_STATUS, _P.STATUS),
    _unsupported(Request.GET_STATUS, _P.STATUS, reply=U64),
    _unsupported(Request.GET_SHARED_OBJECT, _P.SHARED_OBJECT, reply=Empty, failure=Empty()),
    Row(
        Request.SET_DEVICE_STATE_FD,
        StateTransfer,
        fds=(1, 1),
        protocol=_P.DEVICE_STATE,
        when=When.OWNED | When.SUSPENDED,
        reply=StateReply,
        failure=StateReply(error=1, nofd=True),
        handler="set_device_state_fd",
    ),
    Row(
        Request.CHECK_DEVICE_STATE,
        protocol=_P.DEVICE_STATE,
        when=When.OWNED | When.TRANSFER,
        reply=U64,
        failure=U64(1),
        handler="check_device_state",
    ),
    _unsupported(Request.GET_SHMEM_CONFIG, _P.SHMEM, reply=Empty),
    _unsupported(Request.GET_VRING_BASE_SKIP_DRAIN, _P.GET_VRING_BASE_SKIP_DRAIN, reply=VringState),
)

TABLE: dict[int, Row] = {row.request: row for row in ROWS}
