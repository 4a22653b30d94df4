# SPDX-License-Identifier: GPL-2.0-or-later
"""The quick way in and out of streams (``dataplane.layouts``, ``moving``), which agrees with the declarations."""

from __future__ import annotations

import struct
from random import Random
from typing import Any

import pytest

from godwit.dataplane import Engine, FlowState, SocketState, layouts, moving
from godwit.migration import Record, UnsoundError
from godwit.net import native
from godwit.net.records import FLOW, LOST, SOCKET, V4_MAPPED

from ..fuzz.streams import sound_flow, sound_socket

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


@pytest.mark.parametrize("record", [FLOW, native.FLOW])
def test_flows_are_written_as_declared(record: Record[FlowState]) -> None:
    rng = Random(3)
    engine = Engine(256)
    try:
        flows: list[int] = []
        there: list[FlowState] = []
        while len(flows) < 100:
            state = sound_flow(rng, record)
            try:
                flows.append(engine.import_flow(state))
            except ValueError:
                continue  # two between the same ends
            there.append(engine.flow_state(flows[-1])._replace(idle=0))
        written = moving.flow_records(engine, flows, record is native.FLOW)
        read = [record.build(flat)._replace(idle=0) for flat in record.unpack_many(written)]
        if record is FLOW:  # which has no place for these
            there = [state._replace(bytes_from_guest=0, bytes_to_guest=0) for state in there]
        else:
            there = [state._replace(retries=0) for state in there]
        assert read == there
    finally:
        engine.close()


@pytest.mark.parametrize("record", [FLOW, native.FLOW])
def test_flows_that_come_are_what_they_were(record: Record[FlowState]) -> None:
    """In the table as if their declared values had been put there one by one."""
    rng = Random(4)
    one, many = Engine(64), Engine(64)
    try:
        states = [sound_flow(rng, record)._replace(idle=0) for _ in range(30)]
        expected = []
        for state in states:
            try:
                expected.append(one.flow_state(one.import_flow(state))._replace(idle=0))
            except ValueError:
                pass  # two between the same ends
        arrivals = moving.Arrivals(many, 0, 0)
        trouble = arrivals.prepare(b"".join(map(record.encode, states)), record is native.FLOW)
        assert len(trouble) == len(states) - len(expected)
        assert [many.flow_state(flow)._replace(idle=0) for flow in arrivals.flows()] == expected
        assert len(arrivals) == len(states)
    finally:
        one.close()
        many.close()


def test_a_flow_that_was_not_checked_is_not_taken() -> None:
    engine = Engine(16)
    try:
        arrivals = moving.Arrivals(engine, 0, 0)
        with pytest.raises(ValueError, match="not checked"):
            arrivals.prepare(bytes(112), False)
        with pytest.raises(ValueError, match="no sockets"):
            arrivals.restore(0, bytes(51))
        with pytest.raises(ValueError, match="flow 0 has not come"):
            arrivals.restore(0, LOST)
    finally:
        engine.close()


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
