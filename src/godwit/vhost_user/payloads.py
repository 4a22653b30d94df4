# SPDX-License-Identifier: GPL-2.0-or-later
"""The payloads of vhost-user messages.

Each type knows its sizes on the wire, validates its own syntax and nothing
else, and can be parsed and packed. Constructing one with values that its
wire form cannot carry raises ``ValueError``, so that a front-end cannot send
what a back-end would not parse. Layouts: the vhost-user specification, section
"Payload"; all numbers in the byte order of the machine.

``arguments`` turns a payload and the descriptors of its message into what the
device's method takes; ``descriptors`` is how many descriptors the payload says
belong to it, or None where it says nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import ClassVar, NamedTuple, Protocol, Self

from godwit.vhost_user.errors import ProtocolError

MAX_TABLE_REGIONS = 8  # SET_MEM_TABLE; section "Multiple Memory regions description"
NOFD = 1 << 8  # "bit 8 is the invalid FD flag", in ring descriptors and in the device-state reply

_U64 = struct.Struct("=Q")
_STATE = struct.Struct("=II")
_ADDRESS = struct.Struct("=IIQQQQ")
_TABLE = struct.Struct("=II")
_REGION = struct.Struct("=QQQQ")
_PAIR = struct.Struct("=QQ")


class MemoryRegion(NamedTuple):
    """A piece of the guest's memory that the front-end shares.

    ``guest_addr`` (guest-physical) and ``user_addr`` (the front-end's own
    address, in which ring addresses are given) both name its first byte;
    ``size`` in bytes; the region starts ``mmap_offset`` bytes into ``fd``,
    which is -1 where a region is only named, as in its removal.
    """

    guest_addr: int
    size: int
    user_addr: int
    mmap_offset: int
    fd: int = -1


class VringFlag(IntFlag):
    """Flags of SET_VRING_ADDR (``VHOST_VRING_F_*``)."""

    LOG = 1 << 0


class VringAddr(NamedTuple):
    """Where a ring's three parts are, in the front-end's user addresses.

    ``log`` is the guest-physical address under which writes to the used ring
    are logged while ``flags`` has ``VringFlag.LOG``.
    """

    flags: int
    descriptor: int
    used: int
    available: int
    log: int = 0


class Direction(IntEnum):
    """Which way the device's state goes, in SET_DEVICE_STATE_FD."""

    SAVE = 0
    LOAD = 1


class Phase(IntEnum):
    """When the device's state goes, in SET_DEVICE_STATE_FD."""

    STOPPED = 0


class Payload(Protocol):
    """What all payload types have in common."""

    sizes: ClassVar[tuple[int, ...]]

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read a payload of one of ``sizes``; ``ValueError`` if it breaks its syntax."""

    def pack(self) -> bytes:
        """The bytes that ``parse`` reads."""

    @property
    def descriptors(self) -> int | None:
        """How many descriptors come with this payload, if it says so."""

    def arguments(self, fds: Sequence[int]) -> tuple[object, ...]:
        """The arguments of the device's method."""


def _check(name: str, value: int, bits: int) -> None:
    if not 0 <= value < 1 << bits:
        raise ValueError(f"{name} {value} does not fit in {bits} bits")


@dataclass(slots=True)
class Empty:
    """No payload; the descriptors are the arguments."""

    sizes: ClassVar[tuple[int, ...]] = (0,)
    descriptors: ClassVar[int | None] = None

    @classmethod
    def parse(cls, data: bytes) -> Self:
        return cls()

    def pack(self) -> bytes:
        return b""

    def arguments(self, fds: Sequence[int]) -> tuple[object, ...]:
        return tuple(fds)


@dataclass(slots=True)
class LogReply:
    """The reply to SET_LOG_BASE: empty, though some back-ends send a u64 that means nothing."""

    sizes: ClassVar[tuple[int, ...]] = (0, 8)
    descriptors: ClassVar[int | None] = None

    @classmethod
    def parse(cls, data: bytes) -> Self:
        return cls()

    def pack(self) -> bytes:
        return b""

    def arguments(self, fds: Sequence[int]) -> tuple[object, ...]:
        return ()


@dataclass(slots=True)
class U64:
    """A number of 64 bits."""

    value: int

    sizes: ClassVar[tuple[int, ...]] = (8,)
    descriptors: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        _check("value", self.value, 64)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        return cls(*_U64.unpack(data))

    def pack(self) -> bytes:
        return _U64.pack(self.value)

    def arguments(self, fds: Sequence[int]) -> tuple[object, ...]:
        return (self.value,)


@dataclass(slots=True)
class Mac:
    """An Ethernet address of 6 bytes in the first bytes of a u64, the rest ignored."""

    mac: bytes

    sizes: ClassVar[tuple[int, ...]] = (8,)
    descriptors: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        if len(self.mac) != 6:
            raise ValueError(f"an Ethernet address of {len(self.mac)} bytes")

    @classmethod
    def parse(cls, data: bytes) -> Self:
        return cls(data[:6])

    def pack(self) -> bytes:
        return self.mac + bytes(2)

    def arguments(self, fds: Sequence[int]) -> tuple[object, ...]:
        return (self.mac,)


@dataclass(slots=True)
class Mtu:
    """An MTU in bytes: 68 to 65535 (virtio 1.3, section 5.1.4)."""

    mtu: int

    sizes: ClassVar[tuple[int, ...]] = (8,)
    descriptors: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        if not 68 <= self.mtu <= 65535:
            raise ValueError(f"MTU {self.mtu} is not between 68 and 65535")

    @classmethod
    def parse(cls, data: bytes) -> Self:
        return cls(*_U64.unpack(data))

    def pack(self) -> bytes:
        return _U64.pack(self.mtu)

    def arguments(self, fds: Sequence[int]) -> tuple[object, ...]:
        return (self.mtu,)


@dataclass(slots=True)
class VringState:
    """A ring's index and a number of 32 bits that belongs to it."""

    index: int
    num: int

    sizes: ClassVar[tuple[int, ...]] = (8,)
    descriptors: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        _check("ring index", self.index, 32)
        _check("number", self.num, 32)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        return cls(*_STATE.unpack(data))

    def pack(self) -> bytes:
        return _STATE.pack(self.index, self.num)

    def arguments(self, fds: Sequence[int]) -> tuple[object, ...]:
        return (self.index, self.num)


@dataclass(slots=True)
class VringIndex:
    """A ring's index; the number that follows is reserved and ignored."""

    index: int

    sizes: ClassVar[tuple[int, ...]] = (8,)
    descriptors: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        _check("ring index", self.index, 32)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        return cls(_STATE.unpack(data)[0])

    def pack(self) -> bytes:
        return _STATE.pack(self.index, 0)

    def arguments(self, fds: Sequence[int]) -> tuple[object, ...]:
        return (self.index,)


@dataclass(slots=True)
class VringEnable:
    """A ring's index, and 1 to enable the ring or 0 to disable it."""

    index: int
    enabled: bool

    sizes: ClassVar[tuple[int, ...]] = (8,)
    descriptors: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        _check("ring index", self.index, 32)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        index, enabled = _STATE.unpack(data)
        if enabled > 1:
            raise ValueError(f"{enabled} is neither 1 (enable) nor 0 (disable)")
        return cls(index, bool(enabled))

    def pack(self) -> bytes:
        return _STATE.pack(self.index, self.enabled)

    def arguments(self, fds: Sequence[int]) -> tuple[object, ...]:
        return (self.index, self.enabled)


@dataclass(slots=True)
class VringFd:
    """A u64: a ring's index in bits 0 to 7, bit 8 set where no descriptor comes along."""

    index: int
    nofd: bool

    sizes: ClassVar[tuple[int, ...]] = (8,)

    def __post_init__(self) -> None:
        _check("ring index", self.index, 8)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        (value,) = _U64.unpack(data)
        if value & ~0x1FF:
            raise ValueError(f"reserved bits are set in {value:#x}")
        return cls(value & 0xFF, bool(value & NOFD))

    def pack(self) -> bytes:
        return _U64.pack(self.index | (NOFD if self.nofd else 0))

    @property
    def descriptors(self) -> int | None:
        return 0 if self.nofd else 1

    def arguments(self, fds: Sequence[int]) -> tuple[object, ...]:
        return (self.index, fds[0] if fds else None)


@dataclass(slots=True)
class VringAddress:
    """A ring's index and addresses, aligned as split rings are (virtio 1.3, section 2.7)."""

    index: int
    addr: VringAddr

    sizes: ClassVar[tuple[int, ...]] = (40,)
    descriptors: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        _check("ring index", self.index, 32)
        addr = self.addr
        if addr.flags & ~int(VringFlag.LOG):
            raise ValueError(f"unknown flags {addr.flags:#x}")
        for name, value, alignment in (
            ("descriptor table", addr.descriptor, 16),
            ("used ring", addr.used, 4),
            ("available ring", addr.available, 2),
        ):
            _check(f"address of the {name}", value, 64)
            if value % alignment:
                raise ValueError(f"{name} at {value:#x}, which is no multiple of {alignment}")
        _check("log address", addr.log, 64)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        index, *addr = _ADDRESS.unpack(data)
        return cls(index, VringAddr(*addr))

    def pack(self) -> bytes:
        return _ADDRESS.pack(self.index, *self.addr)

    def arguments(self, fds: Sequence[int]) -> tuple[object, ...]:
        return (self.index, self.addr)


def _check_region(region: MemoryRegion) -> None:
    if region.size <= 0:
        raise ValueError(f"a memory region of {region.size} bytes")
    _check("size", region.size, 64)
    for name, start in (
        ("guest address", region.guest_addr),
        ("user address", region.user_addr),
        ("mmap offset", region.mmap_offset),
    ):
        _check(name, start, 64)
        if start + region.size > 1 << 64:
            raise ValueError(f"memory region at {name} {start:#x} with {region.size:#x} bytes wraps around")


def _pack_region(region: MemoryRegion) -> bytes:
    return _REGION.pack(region.guest_addr, region.size, region.user_addr, region.mmap_offset)


@dataclass(slots=True)
class MemoryTable:
    """Up to 8 memory regions, each with a descriptor.

    Front-ends send as many as there are; the specification's structure always
    has room for 8, so that form is taken too.
    """

    regions: tuple[MemoryRegion, ...]

    sizes: ClassVar[tuple[int, ...]] = tuple(_TABLE.size + n * _REGION.size for n in range(MAX_TABLE_REGIONS + 1))

    def __post_init__(self) -> None:
        if len(self.regions) > MAX_TABLE_REGIONS:
            raise ValueError(f"{len(self.regions)} memory regions, more than {MAX_TABLE_REGIONS}")
        for region in self.regions:
            _check_region(region)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        count, _padding = _TABLE.unpack_from(data)
        if count > MAX_TABLE_REGIONS or len(data) not in (cls.sizes[count], cls.sizes[-1]):
            raise ValueError(f"{count} memory regions in {len(data)} bytes")
        return cls(
            tuple(MemoryRegion(*_REGION.unpack_from(data, cls.sizes[n])) for n in range(count)),
        )

    def pack(self) -> bytes:
        return _TABLE.pack(len(self.regions), 0) + b"".join(map(_pack_region, self.regions))

    @property
    def descriptors(self) -> int | None:
        return len(self.regions)

    def arguments(self, fds: Sequence[int]) -> tuple[object, ...]:
        return ([region._replace(fd=fd) for region, fd in zip(self.regions, fds, strict=True)],)


@dataclass(slots=True)
class SingleRegion:
    """One memory region behind 8 bytes of padding."""

    region: MemoryRegion

    sizes: ClassVar[tuple[int, ...]] = (8 + _REGION.size,)
    descriptors: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        _check_region(self.region)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        return cls(MemoryRegion(*_REGION.unpack_from(data, 8)))

    def pack(self) -> bytes:
        return bytes(8) + _pack_region(self.region)

    def arguments(self, fds: Sequence[int]) -> tuple[object, ...]:
        return (self.region._replace(fd=fds[0] if fds else -1),)


@dataclass(slots=True)
class Log:
    """Where the dirty log is: ``size`` bytes at ``offset`` of the descriptor."""

    size: int
    offset: int

    sizes: ClassVar[tuple[int, ...]] = (16,)
    descriptors: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        if self.size <= 0:
            raise ValueError(f"a log of {self.size} bytes")
        _check("log size", self.size, 64)
        _check("log offset", self.offset, 64)
        if self.offset + self.size > 1 << 64:
            raise ValueError(f"log at {self.offset:#x} with {self.size:#x} bytes wraps around")

    @classmethod
    def parse(cls, data: bytes) -> Self:
        return cls(*_PAIR.unpack(data))

    def pack(self) -> bytes:
        return _PAIR.pack(self.size, self.offset)

    def arguments(self, fds: Sequence[int]) -> tuple[object, ...]:
        return (*fds, self.size, self.offset)


@dataclass(slots=True)
class StateTransfer:
    """Which way the device's state goes, and in which phase of a migration."""

    direction: Direction
    phase: int

    sizes: ClassVar[tuple[int, ...]] = (8,)
    descriptors: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        _check("phase", self.phase, 32)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        direction, phase = _STATE.unpack(data)
        return cls(Direction(direction), phase)

    def pack(self) -> bytes:
        return _STATE.pack(self.direction, self.phase)

    def arguments(self, fds: Sequence[int]) -> tuple[object, ...]:
        return (self.direction, self.phase, *fds)


@dataclass(slots=True)
class StateReply:
    """The reply to SET_DEVICE_STATE_FD: a u64 with an error in bits 0 to 7, and ``NOFD``."""

    error: int
    nofd: bool

    sizes: ClassVar[tuple[int, ...]] = (8,)

    def __post_init__(self) -> None:
        _check("error", self.error, 8)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        (value,) = _U64.unpack(data)
        if value & ~0x1FF:
            raise ValueError(f"reserved bits are set in {value:#x}")
        return cls(value & 0xFF, bool(value & NOFD))

    def pack(self) -> bytes:
        return _U64.pack(self.error | (NOFD if self.nofd else 0))

    @property
    def descriptors(self) -> int | None:
        # Back-ends that fail leave bit 8 out at times; with an error there never is a descriptor.
        return 0 if self.nofd or self.error else 1

    def arguments(self, fds: Sequence[int]) -> tuple[object, ...]:
        return (self.error, *fds)


def decode(kind: type[Payload], data: bytes, fds: Sequence[int], fds_allowed: tuple[int, int]) -> Payload:
    """Check sizes and descriptors of a message and parse its payload; ``ProtocolError`` if they are wrong."""
    if len(data) not in kind.sizes:
        raise ProtocolError(f"has a payload of {len(data)} bytes")
    least, most = fds_allowed
    if not least <= len(fds) <= most:
        raise ProtocolError(f"came with {len(fds)} descriptors")
    try:
        payload = kind.parse(data)
    except ValueError as error:
        raise ProtocolError(f"is malformed: {error}") from error
    if payload.descriptors not in (None, len(fds)):
        raise ProtocolError(f"came with {len(fds)} descriptors instead of {payload.descriptors}")
    return payload
