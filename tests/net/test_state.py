# SPDX-License-Identifier: GPL-2.0-or-later
"""The stages of version 2: golden streams, broken streams, and what becomes of single flows."""

from __future__ import annotations

import io
import os
import struct
import threading
import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from godwit.dataplane.state import Datagram, FlowState, Observed, Ping, Side, SocketState, UdpPeer, UdpPort
from godwit.migration import (
    BadRecordError,
    Direction,
    Faults,
    Header,
    Migration,
    MigrationError,
    Outcome,
    StageError,
    State,
    TrailingDataError,
    TruncatedError,
    VersionRefusedError,
)
from godwit.net.config import Withdrawn
from godwit.net.native import FLOW as NATIVE_FLOW
from godwit.net.records import (
    FLOW,
    MAX_FLOWS,
    MAX_QUEUE,
    OBSERVED,
    SIDE,
    SOCKET,
    STATE_LOST,
    STATES_ENDED,
    V4_MAPPED,
)
from godwit.net.state import BATCH, NEVER_SEEN, FlowMover
from godwit.net.versions import versions

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
NAMES = ["empty", "idle-v4", "idle-v6", "queues-v4", "half-closed-v4", "half-closed-v6"]

# Where things are in a stream with one flow and empty queues.
COUNT = 16 + 42
FLOWS = COUNT + 4
SOCKETS = FLOWS + 112

Dumped = tuple[SocketState, bytes, bytes]
NOT_SAVED = "the source could not save it"


def golden(name: str) -> bytes:
    return (GOLDEN / f"{name}.bin").read_bytes()


class Mover:
    """A device that keeps its flows in a list."""

    def __init__(self) -> None:
        self.seen = NEVER_SEEN
        self.states: list[FlowState] = []
        self.sockets: dict[int, Dumped | None] = {}
        self.calls: list[str] = []
        self.batches: list[int] = []
        self.given_up: list[tuple[int, str]] = []
        self.told: dict[str, str] = {}
        self.compared: dict[str, str] | None = None
        self.told_guest = Withdrawn()
        self.lost: dict[int, str] = {}
        self.ports: list[tuple[UdpPort, list[UdpPeer], list[Datagram]]] = []
        self.unanswered: set[int] = set()
        self.echoes: list[Ping] = []

    def observed(self) -> Observed:
        return self.seen

    def set_observed(self, observed: Observed) -> None:
        self.seen = observed

    def freeze(self) -> None:
        self.calls.append("freeze")

    def thaw(self) -> None:
        self.calls.append("thaw")

    def flows(self) -> Sequence[int]:
        return range(len(self.states))

    def is_connecting(self, flow: int) -> bool:
        return flow in self.unanswered

    def open_anew(self, number: int) -> None:
        self.unanswered.add(number)

    def pings(self) -> Sequence[Ping]:
        return self.echoes

    def add_ping(self, ping: Ping) -> None:
        self.echoes.append(ping)

    def flow_records(self, flows: Sequence[int], *, native: bool) -> bytes:
        record = NATIVE_FLOW if native else FLOW
        return b"".join(record.pack(record.flatten(self.states[flow])) for flow in flows)

    def dump(self, flows: Sequence[int]) -> Iterator[bytes | str]:
        for flow in flows:
            dumped = self.dump_one(flow)
            yield NOT_SAVED if dumped is None else SOCKET.pack(dumped[0]) + dumped[1] + dumped[2]

    def dump_one(self, flow: int) -> Dumped | None:
        return self.sockets[flow]

    def give_up(self, flow: int, why: str) -> None:
        self.given_up.append((flow, why))

    def configuration(self) -> dict[str, str]:
        return self.told

    def compare(self, configuration: Mapping[str, str]) -> None:
        self.compared = dict(configuration)

    def guest_told(self) -> Withdrawn:
        return self.told_guest

    def set_told(self, told: Withdrawn) -> None:
        self.told_guest = told

    def udp(self) -> Iterator[tuple[UdpPort, Sequence[UdpPeer], Sequence[Datagram]]]:
        yield from self.ports

    def add_udp_port(self, port: UdpPort) -> None:
        self.ports.append((port, [], []))

    def add_udp_peers(self, number: int, peers: Sequence[UdpPeer]) -> None:
        self.ports[number][1].extend(peers)

    def add_datagrams(self, number: int, datagrams: Sequence[Datagram]) -> None:
        self.ports[number][2].extend(datagrams)

    def prepare(self, records: bytes, *, native: bool) -> None:
        record = NATIVE_FLOW if native else FLOW
        self.prepare_all([record.build(flat) for flat in record.unpack_many(records)])

    def prepare_all(self, flows: Sequence[FlowState]) -> None:
        self.states += flows
        self.batches.append(len(flows))

    def restore(self, first: int, sockets: bytes) -> None:
        at = 0
        while at < len(sockets):
            state = SocketState._make(SOCKET.unpack(sockets[at : at + SOCKET.size]))
            at += SOCKET.size
            if state.tcpi_state == STATE_LOST or state.tcpi_state in STATES_ENDED:
                self.mark_lost(first, "it ended meanwhile" if state.tcpi_state else "")
            else:
                self.restore_one(first, state, sockets[at:][: state.sndq], sockets[at + state.sndq :][: state.rcvq])
            if state.tcpi_state != STATE_LOST:
                at += state.sndq + state.rcvq
            first += 1

    def restore_one(self, number: int, socket: SocketState, sndq: bytes, rcvq: bytes) -> None:
        self.sockets[number] = (socket, sndq, rcvq)

    def mark_lost(self, number: int, why: str = "") -> None:
        self.sockets[number] = None
        self.lost[number] = why

    def commit(self) -> None:
        self.calls.append("commit")

    def discard(self) -> None:
        self.calls.append("discard")
        self.states.clear()
        self.sockets.clear()
        self.ports.clear()
        self.unanswered.clear()
        self.echoes.clear()

    def linger(self) -> None:
        self.calls.append("linger")


def load(data: bytes, mover: Mover | None = None) -> tuple[Mover, Outcome, Migration[FlowMover]]:
    mover = mover or Mover()
    transfer: Migration[FlowMover] = Migration(versions(), mover)
    transfer.request(io.BytesIO(data), Direction.TARGET)
    return mover, transfer.run(), transfer


def save(mover: Mover, faults: Faults | None = None) -> tuple[bytes, Outcome, Migration[FlowMover]]:
    transfer: Migration[FlowMover] = Migration(versions(), mover, faults=faults)
    file = io.BytesIO()
    transfer.request(file, Direction.SOURCE, 2)
    outcome = transfer.run()
    return file.getvalue(), outcome, transfer


def loaded(name: str) -> Mover:
    mover, outcome, _ = load(golden(name))
    assert outcome
    return mover


def patched(data: bytes, offset: int, new: bytes) -> bytes:
    return data[:offset] + new + data[offset + len(new) :]


def mapped(address: str) -> bytes:
    return V4_MAPPED + bytes(int(part) for part in address.split("."))


# Golden streams


@pytest.mark.parametrize("name", NAMES)
def test_golden_comes_back_the_same(name: str) -> None:
    data = golden(name)
    mover, outcome, transfer = load(data)
    assert outcome.error is None
    assert (outcome.version, outcome.size) == (2, len(data))
    assert transfer.commit() == []
    again, saved, _ = save(mover)
    assert saved
    assert again == data


def test_golden_folder_is_all_tested() -> None:
    assert sorted(path.stem for path in GOLDEN.glob("*.bin")) == sorted(NAMES)


def test_golden_observed() -> None:
    assert loaded("empty").seen == Observed(
        bytes.fromhex("fd09000000000000 0000000000000002"),
        bytes.fromhex("fe80000000000000 505400fffe123456"),
        bytes((10, 9, 0, 2)),
        bytes.fromhex("525400123456"),
    )


def test_golden_values() -> None:
    mover = loaded("idle-v4")
    guest, remote = mapped("10.9.0.2"), mapped("10.9.0.1")
    assert mover.states == [
        FlowState(
            pif=(2, 1),
            sides=(Side(remote, guest, 9003, 49194), Side(guest, remote, 36512, 9003)),
            retries=0,
            ws_from_tap=5,
            ws_to_tap=8,
            events=0x04,
            tap_mss=65480,
            sndbuf=0x10E00,
            flags=0,
            seq_dup_ack_approx=0,
            wnd_from_tap=0x7FF,
            wnd_to_tap=0x100,
            seq_to_tap=0x7B43C35B,
            seq_ack_from_tap=0x7B43C35B,
            seq_from_tap=0xA7069544,
            seq_ack_to_tap=0xA7069544,
            seq_init_from_tap=0xA706953C,
        )
    ]
    socket, sndq, rcvq = mover.sockets[0] or (None, b"", b"")
    assert socket == SocketState(
        seq_snd=0xFD3DE16A,
        seq_rcv=0xE3923EE5,
        sndq=0,
        notsent=0,
        rcvq=0,
        mss=1460,
        timestamp=0x25714068,
        snd_wl1=0xE3923EDE,
        snd_wnd=0x10000,
        max_window=0x10000,
        rcv_wnd=0x10000,
        rcv_wup=0xE3923EE5,
        snd_ws=11,
        rcv_ws=11,
        tcpi_state=1,
        tcpi_options=7,
    )
    assert sndq == rcvq == b""


def test_golden_queues_and_states() -> None:
    mover = loaded("queues-v4")
    sockets = [socket for socket in mover.sockets.values() if socket is not None]
    assert [state.sides[0].our_port for state in mover.states] == [9002, 9004]
    assert [(len(sndq), len(rcvq)) for _, sndq, rcvq in sockets] == [
        (state.sndq, state.rcvq) for state, _, _ in sockets
    ]
    assert len(sockets[0][2]) == 70264
    assert sockets[0][2].startswith(b"0000000\n00000000000\n")
    assert sockets[1][1]
    for name in ("half-closed-v4", "half-closed-v6"):
        assert [s[0].tcpi_state for s in loaded(name).sockets.values() if s] == [8, 5]


def test_declared_sizes() -> None:
    assert (OBSERVED.size, SIDE.size, FLOW.size, SOCKET.size) == (42, 36, 112, 52)
    assert [leaf.offset for leaf in FLOW.leaves[:4]] == [0, 1, 2, 18]
    assert [FLOW.leaves[FLOW.index(name)].offset for name in ("retries", "tap_mss", "flags", "seq_init_from_tap")] == [
        74,
        78,
        86,
        108,
    ]
    assert SOCKET.leaves[SOCKET.index("tcpi_state")].offset == 50


# Broken streams


def assert_refused(data: bytes, kind: type[MigrationError], text: str = "") -> MigrationError:
    """Refused as it should be; nothing left; and the same device takes the next good one."""
    mover, outcome, transfer = load(data)
    assert type(outcome.error) is kind, outcome.error
    assert text in str(outcome.error)
    assert transfer.state is State.DISCARDED
    assert mover.states == []
    assert mover.seen == NEVER_SEEN
    assert "commit" not in mover.calls
    assert load(golden("idle-v6"), mover)[1]
    assert len(mover.states) == 1
    return outcome.error


@pytest.mark.parametrize("name", ["empty", "idle-v4", "half-closed-v6"])
def test_truncated_at_every_byte(name: str) -> None:
    data = golden(name)
    for size in range(len(data)):
        error = assert_refused(data[:size], TruncatedError)
        assert isinstance(error, TruncatedError)
        assert error.offset + error.got == size


def test_truncated_in_the_queues() -> None:
    data = golden("queues-v4")
    for size in range(len(data) - 1, 350, -17_011):
        assert_refused(data[:size], TruncatedError, "transfer flows")


@pytest.mark.parametrize("name", NAMES)
def test_trailing_bytes(name: str) -> None:
    assert_refused(golden(name) + b"\0", TrailingDataError)


def test_versions_out_of_range() -> None:
    rest = golden("empty")[16:]
    assert_refused(
        Header(7, 5).pack() + rest,
        VersionRefusedError,
        "device state version 7, compatible down to 5; this target knows 2",
    )
    assert_refused(Header(1, 1).pack() + rest, VersionRefusedError, "version 1 was withdrawn: it has the MSS")
    assert load(Header(3, 2).pack() + rest)[1]
    assert load(Header(2, 1).pack() + rest)[1].version == 2


V6_GUEST = bytes.fromhex("fd09000000000000 0000000000000002")
FLOW_CASES: list[tuple[str, int, bytes, str]] = [
    ("pif of one side", 0, b"\2\2", "pif[1] is 2"),
    ("pif of no side", 0, b"\0\3", "pif[1] is 3"),
    ("spliced", 0, b"\3\1", "pif[1] is 1"),
    ("family", 18, V6_GUEST, "side[0].end_addr is"),
    ("family of the host side", 38, V6_GUEST, "side[1].end_addr is"),
    ("no address", 2, mapped("0.0.0.0"), "side[0].our_addr is"),
    ("multicast", 54, mapped("224.0.0.1"), "side[1].end_addr is"),
    ("broadcast", 38, mapped("255.255.255.255"), "side[1].our_addr is"),
    ("port 0 of the guest", 36, b"\0\0", "side[0].end_port is 0"),
    ("port 0 of the host", 70, b"\0\0", "side[1].our_port is 0"),
    ("ws_from_tap", 75, b"\x0f", "ws_from_tap is 15, must be from 0 to 14"),
    ("ws_to_tap", 76, b"\xff", "ws_to_tap is 255"),
    ("not established", 77, b"\x03", "events is 3"),
    ("tap_mss 0", 78, bytes(4), "tap_mss is 0"),
    ("tap_mss odd", 78, b"\0\0\5\xb5", "tap_mss is 1461, must be a multiple of 4 from 4 to 65532"),
    ("tap_mss huge", 78, b"\0\1\0\0", "tap_mss is 65536"),
    ("sndbuf", 82, b"\1\0\0\0", "sndbuf is 16777216"),
]


@pytest.mark.parametrize(("offset", "new", "text"), [c[1:] for c in FLOW_CASES], ids=[c[0] for c in FLOW_CASES])
def test_bad_flow(offset: int, new: bytes, text: str) -> None:
    error = assert_refused(patched(golden("idle-v4"), FLOWS + offset, new), BadRecordError, f"flow 0: {text}")
    assert isinstance(error, BadRecordError)
    assert FLOWS + offset <= error.offset < FLOWS + offset + len(new) + 16
    assert str(error).endswith(f"(at offset {error.offset})")


def test_bad_flow_is_named_by_its_number() -> None:
    data = patched(golden("half-closed-v4"), FLOWS + 112 + 75, b"\x0f")
    error = assert_refused(data, BadRecordError, "transfer flows: flow 1: ws_from_tap is 15")
    assert isinstance(error, BadRecordError)
    assert error.offset == FLOWS + 112 + 75


@pytest.mark.parametrize("address", [bytes(16), bytes.fromhex("ff02") + bytes(13) + b"\1"])
@pytest.mark.parametrize("place", [2, 18, 38, 54])
def test_bad_address_v6(address: bytes, place: int) -> None:
    assert_refused(
        patched(golden("idle-v6"), FLOWS + place, address), BadRecordError, "must be the address of one host"
    )


SOCKET_CASES: list[tuple[str, int, bytes, str]] = [
    ("sndq", 8, struct.pack(">I", MAX_QUEUE + 1), f"sndq is {MAX_QUEUE + 1}, must be from 0 to {MAX_QUEUE}"),
    ("rcvq", 16, b"\xff\xff\xff\xff", "rcvq is 4294967295"),
    ("notsent", 12, b"\0\0\0\1", "notsent is 1, must be at most sndq, 0"),
    ("mss 0", 20, bytes(4), "mss is 0"),
    ("mss huge", 20, b"\0\1\0\0", "mss is 65536"),
    ("snd_ws", 48, b"\x0f", "snd_ws is 15"),
    ("rcv_ws", 49, b"\x0f", "rcv_ws is 15"),
    *((f"state {state}", 50, bytes((state,)), f"tcpi_state is {state}") for state in (2, 3, 10, 12, 13, 200, 255)),
]


@pytest.mark.parametrize(("offset", "new", "text"), [c[1:] for c in SOCKET_CASES], ids=[c[0] for c in SOCKET_CASES])
def test_bad_socket(offset: int, new: bytes, text: str) -> None:
    error = assert_refused(
        patched(golden("idle-v4"), SOCKETS + offset, new), BadRecordError, f"socket of flow 0: {text}"
    )
    assert isinstance(error, BadRecordError)
    assert error.offset == SOCKETS + offset


@pytest.mark.parametrize("state", [1, 4, 5, 8, 9, 11])
def test_states_that_can_be_restored(state: int) -> None:
    mover, outcome, _ = load(patched(golden("idle-v4"), SOCKETS + 50, bytes((state,))))
    assert outcome
    socket = mover.sockets[0]
    assert socket is not None
    assert socket[0].tcpi_state == state


@pytest.mark.parametrize("count", [MAX_FLOWS + 1, 0xFFFFFFFF])
def test_impossible_count(count: int) -> None:
    data = patched(golden("empty"), COUNT, struct.pack(">I", count))
    assert_refused(data, BadRecordError, f"transfer flows: flows: count is {count}, must be at most {MAX_FLOWS}")


def test_announced_memory_is_not_taken() -> None:
    """A stream of 300 bytes that announces 14 MB of flows, or 128 MiB of queues, costs neither."""
    idle = golden("idle-v4")
    queues = struct.pack(">III", MAX_QUEUE, 0, MAX_QUEUE)
    tracemalloc.start()
    try:
        assert_refused(patched(idle, COUNT, struct.pack(">I", MAX_FLOWS)), TruncatedError)
        assert_refused(patched(idle, SOCKETS + 8, queues) + bytes(100), TruncatedError)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


FIELDS = st.tuples(st.integers(0, 225), st.binary(min_size=1, max_size=8))


@settings(max_examples=300)
@given(st.lists(FIELDS, min_size=1, max_size=4), st.integers(0, 400))
def test_any_damage(damage: list[tuple[int, bytes]], cut: int) -> None:
    """A damaged stream is refused with a declared error and leaves nothing, or loads and can be written again."""
    data = golden("idle-v4")
    for offset, new in damage:
        data = patched(data, offset, new)
    mover, outcome, transfer = load(data[:cut])
    if outcome.error is None:
        assert transfer.state is State.LOADED
        assert save(mover)[1]
    else:
        assert not isinstance(outcome.error, StageError)
        assert outcome.undo_errors == []
        assert mover.states == []


@settings(max_examples=200)
@given(st.binary(max_size=600))
def test_any_bytes(data: bytes) -> None:
    """Any bytes behind a good header: a declared error, or a load."""
    _, outcome, _ = load(Header(2, 2).pack() + data)
    assert not isinstance(outcome.error, StageError)


# Single flows


def test_lost_flow_comes_as_state_0() -> None:
    mover = loaded("half-closed-v4")
    mover.sockets[0] = None
    data, outcome, _ = save(mover)
    assert outcome
    start = FLOWS + 2 * 112
    assert data == golden("half-closed-v4")[:start] + bytes(52) + golden("half-closed-v4")[start + 52 :]
    there, outcome, _ = load(data)
    assert outcome
    assert there.sockets[0] is None
    assert there.sockets[1] == mover.sockets[1]


def test_lost_flow_means_nothing_else() -> None:
    data = patched(golden("idle-v4"), SOCKETS, b"\xff" * 50 + b"\0\xff")
    mover, outcome, _ = load(data)
    assert outcome
    assert mover.sockets == {0: None}


@pytest.mark.parametrize("state", [6, 7])
def test_ended_connection_is_lost_alone(state: int) -> None:
    """Its queues are in the stream, and the next flow is found behind them."""
    data = golden("queues-v4")
    mover, outcome, _ = load(patched(data, FLOWS + 2 * 112 + 50, bytes((state,))))
    assert outcome
    assert mover.sockets[0] is None
    assert mover.sockets[1] == loaded("queues-v4").sockets[1]


def test_unsound_dump_is_lost_alone() -> None:
    mover = loaded("half-closed-v4")
    good = mover.sockets[0]
    assert good is not None
    changes: list[Dumped] = [
        (good[0]._replace(tcpi_state=2), b"", b""),
        (good[0]._replace(snd_ws=15), b"", b""),
    ]
    for change in changes:
        mover.sockets[0] = change
        there = load(save(mover)[0])[0]
        assert there.sockets[0] is None
        assert there.sockets[1] is not None
    assert [flow for flow, _ in mover.given_up] == [0] * len(changes)
    assert [why.split()[0] for _, why in mover.given_up] == ["tcpi_state", "snd_ws"]


def test_unsound_flow_is_left_out() -> None:
    mover = loaded("half-closed-v4")
    left = mover.states[1]
    good = mover.states[0]
    for unsound in (good._replace(tap_mss=3), good._replace(ws_to_tap=15)):
        mover.states[0] = unsound
        there, outcome, _ = load(save(mover)[0])
        assert outcome
        assert there.states == [left]
        assert there.sockets[0] == mover.sockets[1]
    assert [flow for flow, _ in mover.given_up] == [0, 0]
    assert [why.split()[0] for _, why in mover.given_up] == ["tap_mss", "ws_to_tap"]


OBSERVED_CASES: list[tuple[str, Observed, Observed]] = [
    ("never", NEVER_SEEN, NEVER_SEEN),
    ("multicast", NEVER_SEEN._replace(addr4=bytes((224, 0, 0, 1))), NEVER_SEEN),
    ("group mac", NEVER_SEEN._replace(mac=b"\1" + bytes(5)), NEVER_SEEN),
    ("multicast v6", NEVER_SEEN._replace(addr6=b"\xff" * 16), NEVER_SEEN),
    ("not link-local", NEVER_SEEN._replace(addr6_ll=b"\xfe\xc0" + bytes(14)), NEVER_SEEN),
]


@pytest.mark.parametrize(("sent", "taken"), [c[1:] for c in OBSERVED_CASES], ids=[c[0] for c in OBSERVED_CASES])
def test_observed(sent: Observed, taken: Observed, caplog: pytest.LogCaptureFixture) -> None:
    mover = Mover()
    mover.seen = sent
    there, outcome, _ = load(save(mover)[0])
    assert outcome
    assert there.seen == taken
    assert any("is no host's, ignored" in record.message for record in caplog.records) == (sent != taken)


# The order of things


def test_life_of_a_source() -> None:
    mover = loaded("idle-v4")
    mover.calls.clear()
    _, _, transfer = save(mover)
    assert mover.calls == ["freeze"]
    transfer.linger()
    assert mover.calls == ["freeze", "linger"]
    transfer.rollback()
    assert mover.calls == ["freeze", "linger", "thaw"]


@pytest.mark.parametrize("fault", ["source:prepare flows", "source:transfer flows", "source:end"])
def test_failing_source_thaws(fault: str) -> None:
    mover = loaded("half-closed-v4")
    mover.calls.clear()
    _, outcome, transfer = save(mover, Faults.parse(f"{fault}=fail"))
    assert not outcome
    assert mover.calls[-1] == "thaw"
    assert transfer.state is State.ROLLED_BACK
    assert save(mover)[1]


def test_freeze_that_raises_is_thawed() -> None:
    class Stuck(Mover):
        def freeze(self) -> None:
            super().freeze()
            raise OSError("the helper is gone")

    mover = Stuck()
    _, outcome, _ = save(mover)
    assert "prepare flows: source failed: the helper is gone" in str(outcome.error)
    assert mover.calls == ["freeze", "thaw"]


def test_life_of_a_target() -> None:
    mover, _, transfer = load(golden("idle-v4"))
    assert mover.calls == []
    transfer.commit()
    assert mover.calls == ["commit"]
    mover, _, transfer = load(golden("idle-v4"))
    transfer.close()
    assert mover.calls == ["discard"]
    assert mover.seen == NEVER_SEEN


def many(count: int) -> Mover:
    """Flows of different ports, each with a queue of its own."""
    mover = Mover()
    base = loaded("idle-v4")
    flow = base.states[0]
    socket = base.sockets[0]
    assert socket is not None
    guest, host = flow.sides
    for number in range(count):
        port, queue = 1024 + number % 60000, str(number).encode()
        mover.states.append(flow._replace(sides=(guest._replace(end_port=port), host._replace(our_port=port))))
        mover.sockets[number] = (socket[0]._replace(sndq=len(queue), notsent=1, rcvq=3), queue, queue[:1] * 3)
    return mover


@pytest.mark.parametrize("count", [1, BATCH - 1, BATCH, BATCH + 1, 3 * BATCH])
def test_batches(count: int) -> None:
    mover = many(count)
    there, outcome, _ = load(save(mover)[0])
    assert outcome
    assert (there.states, there.sockets) == (mover.states, mover.sockets)
    assert sum(there.batches) == count
    assert max(there.batches) <= BATCH


def test_queues_pass_one_by_one() -> None:
    """Much more than memory allowed goes through a pipe, both sides counted."""
    size, count = 1 << 20, 64

    class Large(Mover):
        def dump_one(self, flow: int) -> Dumped | None:
            dumped = super().dump_one(flow)
            assert dumped is not None
            return dumped[0]._replace(sndq=size), bytes(size), dumped[2]

        def restore_one(self, number: int, socket: SocketState, sndq: bytes, rcvq: bytes) -> None:
            assert len(sndq) == size
            super().restore_one(number, socket, b"", rcvq)

    source, target = Large(), Large()
    small = many(count)
    source.states, source.sockets = small.states, small.sockets
    tracemalloc.start()
    try:
        saved, taken = over_a_pipe(source, target)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert saved
    assert taken
    assert taken.size > size * count
    assert peak < 12 * size


def over_a_pipe(source: Mover, target: Mover) -> tuple[Outcome, Outcome]:
    read_fd, write_fd = os.pipe()
    saving: Migration[FlowMover] = Migration(versions(), source, timeout=30)
    loading: Migration[FlowMover] = Migration(versions(), target, timeout=30)
    saving.request(write_fd, Direction.SOURCE)
    loading.request(read_fd, Direction.TARGET)
    outcomes: list[Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.append(saving.run()))
    thread.start()
    taken = loading.run()
    thread.join()
    saving.close()
    loading.close()
    return outcomes[0], taken


def test_peers_over_a_pipe() -> None:
    source = many(2500)
    target = Mover()
    saved, taken = over_a_pipe(source, target)
    assert saved
    assert taken
    assert saved.size == taken.size
    assert target.calls == ["discard"]  # closed without a commit
