# SPDX-License-Identifier: GPL-2.0-or-later
"""The quick way in and out of streams (``dataplane.layouts``, ``moving``), which agrees with the declarations."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from godwit.dataplane import Engine, FlowState, Side, SocketState, layouts, moving
from godwit.migration import Record, UnsoundError
from godwit.net import native
from godwit.net.records import FLOW, LOST, SOCKET, V4_MAPPED

from ..dataplane.arrivals import arrive
from ..fuzz.streams import sound_flow, sound_socket

GOLDEN = Path(__file__).resolve().parent.parent / "golden"

ADDRESSES = [
    bytes(16),
    V4_MAPPED + bytes(4),
    V4_MAPPED + b"\0\0\0\1",
    V4_MAPPED + b"\xdf\xff\xff\xff",
    V4_MAPPED + b"\xe0\0\0\0",
    b"\xff" + bytes(15),
    b"\xfe\x80" + bytes(14),
    bytes(15) + b"\1",
]


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine(256)
    yield made
    made.close()


def is_sound(record: Record[Any], data: bytes) -> bool:
    try:
        record.check(record.unpack(data))
    except UnsoundError:
        return False
    return True


def edges(record: Record[Any], leaf: int) -> list[Any]:
    """Values of a field around all that is said of it."""
    kind = record.leaves[leaf]
    if kind.code == "16s":
        return ADDRESSES
    most = (1 << 8 * kind.size) - 1
    near = {
        0,
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        8,
        9,
        11,
        12,
        14,
        15,
        64 << 20,
        (64 << 20) + 1,
        (1 << 24) - 1,
        1 << 24,
        65535,
        65536,
        most,
    }
    return sorted(value for value in near if value <= most)


@pytest.mark.parametrize("record", [FLOW, native.FLOW])
def test_flows_are_sound_where_the_declaration_says_so(record: Record[FlowState]) -> None:
    """Each field at its edges, in sound flows of either family."""
    rng = Random(1)
    sound = unsound = 0
    for _ in range(20):
        flat = record.flatten(sound_flow(rng, record))
        for leaf in range(len(record.leaves)):
            for value in edges(record, leaf):
                data = record.pack((*flat[:leaf], value, *flat[leaf + 1 :]))
                quick = not layouts.odd_flows(data, record is native.FLOW)
                assert quick == is_sound(record, data), (record.leaves[leaf].name, value)
                sound, unsound = sound + quick, unsound + (not quick)
    assert min(sound, unsound) > 500


def test_sockets_are_sound_where_the_declaration_says_so() -> None:
    rng = Random(2)
    sound = unsound = 0
    for _ in range(20):
        flat = tuple(sound_socket(rng))
        for leaf in range(len(SOCKET.leaves)):
            for value in edges(SOCKET, leaf):
                data = SOCKET.pack((*flat[:leaf], value, *flat[leaf + 1 :]))
                if data[50] == 0:
                    continue  # lost, and nothing else of it means anything
                length = struct.unpack_from(">I", data, 8)[0] + struct.unpack_from(">I", data, 16)[0]
                good = is_sound(SOCKET, data)
                if length < 1 << 20:
                    data += bytes(length)
                quick = layouts.sound_sockets(data, 0, 1)[0] == 1
                assert quick == (good and length < 1 << 20), (SOCKET.leaves[leaf].name, value)
                sound, unsound = sound + quick, unsound + (not quick)
    assert min(sound, unsound) > 300


def test_flows_of_passts_come_and_go_byte_for_byte(engine: Engine) -> None:
    """Records as they lie in the golden streams, whose values are read here with nothing but the tables of the page."""
    for name, count in (("idle-v4", 1), ("idle-v6", 1), ("queues-v4", 2), ("half-closed-v4", 2), ("half-closed-v6", 2)):
        data = (GOLDEN / f"{name}.bin").read_bytes()
        assert data[58:62] == struct.pack(">I", count)
        records = data[62 : 62 + 112 * count]
        arrivals = moving.Arrivals(engine, 0, 0)
        assert arrivals.prepare(records, False) == []
        assert [seen(engine.flow_state(flow)) for flow in arrivals.flows()] == [
            passts(records[at : at + 112]) for at in range(0, len(records), 112)
        ]
        # But for attempts, the buffer and passt's own flags, which godwit has no use for, and writes as zeros.
        cleared = bytearray(records)
        for at in range(0, len(records), 112):
            cleared[at + 74] = 0
            cleared[at + 82 : at + 88] = bytes(6)
        assert moving.flow_records(engine, arrivals.flows(), False) == cleared
        for flow in arrivals.flows():
            engine.forget_flow(flow)


def passts(record: bytes) -> FlowState:
    """One flow of docs/stream-v2.md."""
    numbers = struct.unpack(">74x4BII2BHH5I", record)
    sides = [
        Side(record[at : at + 16], record[at + 16 : at + 32], *struct.unpack("=HH", record[at + 32 : at + 36]))
        for at in (2, 38)
    ]
    return seen(FlowState((record[0], record[1]), (sides[0], sides[1]), *numbers))


def seen(state: FlowState) -> FlowState:
    """What of a flow is the same after it has come in a stream."""
    events = state.events & ~0x03 if state.events & 0x04 else state.events  # how it was opened, `pif` says
    # And its largest segment is one that a frame of the guest's can hold, in whole words.
    four = state.sides[state.pif.index(2)].end_addr.startswith(bytes(10) + b"\xff\xff")
    mss = min(max(state.tap_mss, 64), (65535 - (40 if four else 60)) & 0xFFFC)
    return state._replace(events=events, tap_mss=mss, retries=0, sndbuf=0, flags=0, seq_dup_ack_approx=0, idle=0)


def test_a_native_flow_comes_and_goes_byte_for_byte(engine: Engine) -> None:
    """As the table of docs/stream.md has it, with another value in each field."""
    our, guest = (bytes.fromhex(f"fd09{n:028x}") for n in (1, 2))
    local, peer = (V4_MAPPED + bytes((10, 9, 0, n)) for n in (3, 4))
    record = struct.pack(
        ">B16s16sHH16s16sHHBBBHHHIIIIIQQI",
        *(2, our, guest, 80, 40_000, local, peer, 50_000, 8080, 0x04, 5, 8, 1460, 0x7FF, 0x100),
        *(0xFFFFFFF1, 0xFFFFFFE2, 0x7FFFFFF3, 0x7FFFFFE4, 0x7FFFFF05, 1 << 40, 1 << 41, 0),
    )
    assert len(record) == 122
    arrivals = moving.Arrivals(engine, 0, 0)
    assert arrivals.prepare(record, True) == []
    state = engine.flow_state(arrivals.flow(0))
    assert state._replace(idle=0) == FlowState(
        pif=(2, 1),
        sides=(Side(our, guest, 80, 40_000), Side(local, peer, 50_000, 8080)),
        retries=0,
        ws_from_tap=5,
        ws_to_tap=8,
        events=0x04,
        tap_mss=1460,
        sndbuf=0,
        flags=0,
        seq_dup_ack_approx=0,
        wnd_from_tap=0x7FF,
        wnd_to_tap=0x100,
        seq_to_tap=0xFFFFFFF1,
        seq_ack_from_tap=0xFFFFFFE2,
        seq_from_tap=0x7FFFFFF3,
        seq_ack_to_tap=0x7FFFFFE4,
        seq_init_from_tap=0x7FFFFF05,
        bytes_from_guest=1 << 40,
        bytes_to_guest=1 << 41,
    )
    written = moving.flow_records(engine, arrivals.flows(), True)
    assert written[:118] == record[:118]  # behind that is for how long it was idle


@pytest.mark.parametrize("record", [FLOW, native.FLOW])
def test_flows_come_and_go_as_declared(engine: Engine, record: Record[FlowState]) -> None:
    """Any values; what is in the table afterwards, and what is written, is what was declared of the bytes."""
    rng = Random(3)
    is_native = record is native.FLOW
    states: dict[Side, FlowState] = {}  # no two between the same ends
    for _ in range(150):
        state = sound_flow(rng, record)
        guest = state.sides[state.pif.index(2)]
        states.setdefault(guest, state)
    arrivals = moving.Arrivals(engine, 0, 0)
    assert arrivals.prepare(b"".join(map(record.encode, states.values())), is_native) == []
    expected = [seen(state) for state in states.values()]
    assert len(expected) > 100
    assert [seen(engine.flow_state(flow)) for flow in arrivals.flows()] == expected
    written = moving.flow_records(engine, arrivals.flows(), is_native)
    assert [record.build(flat)._replace(idle=0) for flat in record.unpack_many(written)] == expected


@pytest.mark.parametrize("is_native", [False, True])
def test_a_second_flow_between_the_same_ends_has_no_place(engine: Engine, is_native: bool) -> None:
    record = native.FLOW if is_native else FLOW
    state = sound_flow(Random(4), record)
    arrivals = moving.Arrivals(engine, 0, 0)
    other = state._replace(seq_to_tap=state.seq_to_tap ^ 1)
    trouble = arrivals.prepare(b"".join(map(record.encode, (state, other))), is_native)
    assert trouble == [(1, errno.EEXIST)]
    assert len(arrivals) == 2
    [flow] = arrivals.flows()
    assert [arrivals.flow(0), arrivals.flow(1)] == [flow, -1]
    assert engine.flow_state(flow).seq_to_tap == state.seq_to_tap


def test_how_long_a_flow_was_idle_comes_along(engine: Engine) -> None:
    state = sound_flow(Random(6), native.FLOW)._replace(idle=1000)
    flow = arrive(engine, state).flow(0)
    assert 1000 <= engine.flow_state(flow).idle < 60_000


def test_a_flow_that_was_not_checked_is_not_taken(engine: Engine) -> None:
    arrivals = moving.Arrivals(engine, 0, 0)
    with pytest.raises(ValueError, match="not checked"):
        arrivals.prepare(bytes(112), False)
    with pytest.raises(ValueError, match="no sockets"):
        arrivals.restore(0, bytes(51))
    with pytest.raises(ValueError, match="flow 0 has not come"):
        arrivals.restore(0, LOST)


def test_entries_are_sockets_and_the_other_way_round() -> None:
    rng = Random(5)
    parts = []
    for _ in range(50):
        state = sound_socket(rng)
        parts.append(SOCKET.encode(state) + rng.randbytes(state.sndq) + rng.randbytes(state.rcvq))
    whole = b"".join(parts)
    entries = layouts.entries(whole, 4, 1, 7)
    assert entries == b"".join(
        struct.pack(">HHIIH", 4, 1, 6 + len(part), 7 + number, 52) + part for number, part in enumerate(parts)
    )
    assert layouts.sockets_of(b"before" + entries, 6, 4) == (6 + len(entries), 7, 50, whole)
    assert layouts.sockets_of(entries[:-1], 0, 4) == (
        len(entries) - len(parts[-1]) - 14,
        7,
        49,
        whole[: -len(parts[-1])],
    )
    assert layouts.sockets_of(entries, 0, 5) == (0, 0, 0, b"")
    second = 14 + len(parts[0])
    changed = {
        "another type": (second, b"\0\5"),
        "another length": (second + 4, struct.pack(">I", 7 + len(parts[1]))),
        "not the next one": (second + 8, struct.pack(">I", 9)),
        "a record that has grown": (second + 12, struct.pack(">H", 60)),
        "a socket that is not sound": (second + 14 + 48, b"\xff"),
        "one that is lost": (second + 14 + 50, b"\0"),
    }
    for at, new in changed.values():
        data = entries[:at] + new + entries[at + len(new) :]
        assert layouts.sockets_of(data, 0, 4) == (second, 7, 1, parts[0])
    with pytest.raises(ValueError, match="no sockets"):
        layouts.entries(whole + LOST, 4, 1, 0)


def test_sockets_are_counted_as_far_as_they_are_whole() -> None:
    state = SocketState(1, 1, 3, 0, 2, 1460, 0, 1, 1, 1, 1, 1, 7, 7, 1, 0)
    one = SOCKET.encode(state) + b"abcde"
    data = one + LOST + one
    assert layouts.sound_sockets(data, 0, 9) == (3, len(data))
    assert layouts.sound_sockets(data, 0, 2) == (2, len(one) + 52)
    assert layouts.sound_sockets(data, len(one), 9) == (2, len(data))
    assert layouts.sound_sockets(data[:-1], 0, 9) == (2, len(one) + 52)
    assert layouts.sound_sockets(data, len(data), 9) == (0, len(data))
