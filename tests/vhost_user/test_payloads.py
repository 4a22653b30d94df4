# SPDX-License-Identifier: GPL-2.0-or-later
"""One table of payloads through the codec both ways, and both sides of each edge."""

from __future__ import annotations

import struct

import pytest

from godwit.vhost_user import TABLE, Direction, MemoryRegion, ProtocolError, Request, VringAddr
from godwit.vhost_user.messages import ROWS
from godwit.vhost_user.payloads import (
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
    decode,
)

TOP = (1 << 64) - 1


def q(*values: int) -> bytes:
    return struct.pack(f"={len(values)}Q", *values)


def i(*values: int) -> bytes:
    return struct.pack(f"={len(values)}I", *values)


def table(count: int, slots: int) -> bytes:
    regions = b"".join(q(n << 20, 4096, n << 30, n) for n in range(count))
    return i(count, 0) + regions + bytes(32 * (slots - count))


def regions(count: int) -> tuple[MemoryRegion, ...]:
    return tuple(MemoryRegion(n << 20, 4096, n << 30, n) for n in range(count))


BOTH_WAYS: list[tuple[bytes, Payload]] = [
    (b"", Empty()),
    (b"", LogReply()),
    (q(0), U64(0)),
    (q(TOP), U64(TOP)),
    (bytes.fromhex("525400123456") + bytes(2), Mac(bytes.fromhex("525400123456"))),
    (q(68), Mtu(68)),
    (q(65535), Mtu(65535)),
    (i(0, 0), VringState(0, 0)),
    (i(0xFFFFFFFF, 0xFFFFFFFF), VringState(0xFFFFFFFF, 0xFFFFFFFF)),
    (i(1, 0), VringIndex(1)),
    (i(1, 0), VringEnable(1, False)),
    (i(1, 1), VringEnable(1, True)),
    (q(0), VringFd(0, nofd=False)),
    (q(0x1FF), VringFd(255, nofd=True)),
    (i(1, 1) + q(16, 4, 2, 1), VringAddress(1, VringAddr(1, 16, 4, 2, 1))),
    (i(0, 0) + q(TOP - 15, TOP - 3, TOP - 1, TOP), VringAddress(0, VringAddr(0, TOP - 15, TOP - 3, TOP - 1, TOP))),
    *((table(n, n), MemoryTable(regions(n))) for n in range(9)),
    (bytes(8) + q(TOP, 1, TOP, TOP), SingleRegion(MemoryRegion(TOP, 1, TOP, TOP))),
    (bytes(8) + q(0, TOP, 0, 0), SingleRegion(MemoryRegion(0, TOP, 0, 0))),
    (q(1, TOP), Log(1, TOP)),
    (q(TOP, 0), Log(TOP, 0)),
    (i(0, 0), StateTransfer(Direction.SAVE, 0)),
    (i(1, 0xFFFFFFFF), StateTransfer(Direction.LOAD, 0xFFFFFFFF)),
    (q(0x100), StateReply(0, nofd=True)),
    (q(0x1FF), StateReply(255, nofd=True)),
    (q(0), StateReply(0, nofd=False)),
]

ONLY_READ: list[tuple[bytes, Payload]] = [
    (bytes(6) + b"\xff\xff", Mac(bytes(6))),
    (i(1, 7), VringIndex(1)),
    (q(5), LogReply()),
    (table(3, 8), MemoryTable(regions(3))),
    (table(0, 8), MemoryTable(())),
    (i(1, 99) + table(1, 1)[8:], MemoryTable(regions(1))),
    (b"\xff" * 8 + q(0, 1, 0, 0), SingleRegion(MemoryRegion(0, 1, 0, 0))),
]

MALFORMED: list[tuple[type[Payload], bytes]] = [
    (Mtu, q(67)),
    (Mtu, q(65536)),
    (VringEnable, i(0, 2)),
    (VringFd, q(0x200)),
    (VringFd, q(1 << 63)),
    (VringAddress, i(0, 2) + q(0, 0, 0, 0)),
    (VringAddress, i(0, 0) + q(8, 0, 0, 0)),
    (VringAddress, i(0, 0) + q(0, 2, 0, 0)),
    (VringAddress, i(0, 0) + q(0, 0, 1, 0)),
    (MemoryTable, i(1, 0)),
    (MemoryTable, i(9, 0) + bytes(32 * 8)),
    (MemoryTable, table(2, 3)),
    (MemoryTable, i(3, 0) + table(2, 2)[8:]),
    (MemoryTable, i(1, 0) + q(0, 0, 0, 0)),
    (MemoryTable, i(1, 0) + q(TOP, 2, 0, 0)),
    (SingleRegion, bytes(8) + q(0, 0, 0, 0)),
    (SingleRegion, bytes(8) + q(TOP, 2, 0, 0)),
    (SingleRegion, bytes(8) + q(0, 2, TOP, 0)),
    (SingleRegion, bytes(8) + q(0, 2, 0, TOP)),
    (Log, q(0, 0)),
    (Log, q(2, TOP)),
    (StateTransfer, i(2, 0)),
    (StateReply, q(0x200)),
]


@pytest.mark.parametrize(("data", "payload"), BOTH_WAYS, ids=str)
def test_both_ways(data: bytes, payload: Payload) -> None:
    assert type(payload).parse(data) == payload
    assert payload.pack() == data
    assert len(data) in payload.sizes


@pytest.mark.parametrize(("data", "payload"), ONLY_READ, ids=str)
def test_what_is_ignored_does_not_matter(data: bytes, payload: Payload) -> None:
    assert type(payload).parse(data) == payload
    assert len(data) in payload.sizes


@pytest.mark.parametrize(("kind", "data"), MALFORMED)
def test_malformed(kind: type[Payload], data: bytes) -> None:
    with pytest.raises(ValueError):
        kind.parse(data)


@pytest.mark.parametrize("kind", sorted({row.payload for row in ROWS}, key=str))
def test_each_wrong_size_is_refused(kind: type[Payload]) -> None:
    for size in range(300):
        if size not in kind.sizes:
            with pytest.raises(ProtocolError, match=f"has a payload of {size} bytes"):
                decode(kind, bytes(size), (), (0, 0))


def test_what_cannot_be_sent_cannot_be_made() -> None:
    for make in (
        lambda: U64(-1),
        lambda: U64(1 << 64),
        lambda: Mac(bytes(5)),
        lambda: Mtu(67),
        lambda: VringState(1 << 32, 0),
        lambda: VringState(0, -1),
        lambda: VringIndex(-1),
        lambda: VringEnable(1 << 32, True),
        lambda: VringFd(256, nofd=True),
        lambda: VringAddress(0, VringAddr(0, 1 << 64, 0, 0)),
        lambda: VringAddress(0, VringAddr(0, 0, 0, 0, -1)),
        lambda: MemoryTable(regions(9)),
        lambda: SingleRegion(MemoryRegion(0, 1 << 64, 0, 0)),
        lambda: Log(1 << 64, 0),
        lambda: StateTransfer(Direction.SAVE, -1),
        lambda: StateReply(256, nofd=True),
    ):
        with pytest.raises(ValueError):
            make()


def test_every_number_of_the_specification_has_a_row() -> None:
    assert sorted(TABLE) == list(range(1, 46))
    assert len(ROWS) == len(TABLE) == len(Request)
