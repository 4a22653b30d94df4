# SPDX-License-Identifier: GPL-2.0-or-later
"""The native stream: what version 2 can carry comes through it the same, and a broken one leaves nothing behind."""

from __future__ import annotations

import io
import tracemalloc
import zlib
from ipaddress import IPv4Address, IPv6Address, IPv6Network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from godwit.dataplane.state import Datagram, FlowState, Ping, SocketState, UdpPeer, UdpPort
from godwit.migration import (
    AbortedError,
    BadRecordError,
    Direction,
    Faults,
    Migration,
    MigrationError,
    Outcome,
    UnknownEntryError,
    VersionRefusedError,
)
from godwit.migration.entries import HEAD
from godwit.migration.inspect import inspect
from godwit.net.config import Withdrawn, packed16
from godwit.net.native import FLOW, MAX_PEERS, NATIVE, UDP_PEER, UDP_PORT, WAITING, Waiting
from godwit.net.records import EVENT_ACCEPTED, EVENT_ESTABLISHED, OBSERVED, SOCKET, V4_MAPPED
from godwit.net.state import BATCH, NEVER_SEEN, FlowMover
from godwit.net.told import LEASE4, MAX_TOLD, PREFIX6, ROUTER6, SERVER, TOLD, Told
from godwit.net.versions import versions

from .streams import CONTENTS, FROZEN, save
from .test_state import NAMES, Mover, load, loaded


def what_moves(state: FlowState) -> FlowState:
    """Without what is passt's own business."""
    return state._replace(retries=0, sndbuf=0, flags=0, seq_dup_ack_approx=0)


@pytest.fixture(params=NAMES)
def source(request: pytest.FixtureRequest) -> Mover:
    mover = loaded(request.param)
    mover.told = {"IPv4": "10.9.0.2/24", "search list": "example.org\texample.net"}
    return mover


def test_all_comes_through(source: Mover) -> None:
    data, saved = save(source)
    assert saved
    target, outcome, transfer = load(data)
    assert outcome
    assert (outcome.version, outcome.size) == (NATIVE, len(data))
    assert target.states == list(map(what_moves, source.states))
    assert target.sockets == source.sockets
    assert target.seen == source.seen
    assert target.compared == source.told
    assert target.calls == []
    assert transfer.commit() == []
    assert target.calls == ["commit"]
    assert save_again(target, source) == data


def save_again(target: Mover, source: Mover) -> bytes:
    target.told = source.told
    return save(target)[0]


def test_a_flow_that_cannot_move_is_that_flows_loss() -> None:
    source = loaded("queues-v4")
    source.sockets[0] = None
    data, saved = save(source)
    assert saved
    target, outcome, _ = load(data)
    assert outcome
    assert target.lost == {0: "the source could not save it"}
    assert target.sockets[1] == source.sockets[1]
    source = loaded("queues-v4")
    dumped = source.sockets[1]
    assert dumped is not None
    source.sockets[1] = (dumped[0]._replace(snd_ws=15), *dumped[1:])
    source.states[0] = source.states[0]._replace(events=0)
    target, outcome, _ = load(save(source)[0])
    assert outcome
    assert [why for _, why in source.given_up] == [
        "events must have bit 0x04, or be 2: established, or opened by the initiator",
        "snd_ws 15 must be from 0 to 14",
    ]
    assert target.states == [what_moves(source.states[1])]
    assert target.lost == {0: "snd_ws 15 must be from 0 to 14"}


def test_a_reason_is_short_and_one_line() -> None:
    why = b"\x1b[2J\n\xff" + b"y" * 1017
    target, outcome, _ = load(with_check(A_FLOW + HEAD.pack(5, 1, 4 + len(why)) + bytes(4) + why))
    assert outcome
    assert target.lost == {0: f"?[2J?\ufffd{'y' * 94}... (1023 characters)"}


def test_many_flows_come_in_batches() -> None:
    source = loaded("idle-v4")
    source.states *= BATCH * 2 + 5
    source.sockets = dict.fromkeys(range(len(source.states)), source.sockets[0])
    data, _ = save(source)
    target, outcome, _ = load(data)
    assert outcome
    assert target.batches == [BATCH, BATCH, 5]
    assert target.sockets == source.sockets


def begun(events: int, pif: tuple[int, int]) -> Mover:
    """Two flows, of which the second is in its handshake."""
    mover = loaded("idle-v4")
    first = mover.states[0]
    sides = first.sides if first.pif == pif else first.sides[::-1]
    mover.states = [first, first._replace(events=events, pif=pif, sides=(sides[0], sides[1]))]
    mover.sockets[1] = mover.sockets[0]
    return mover


@pytest.mark.parametrize(("events", "pif"), [(1, (1, 2)), (2, (2, 1))])
def test_handshakes_come_through(events: int, pif: tuple[int, int]) -> None:
    source = begun(events, pif)
    target, outcome, _ = load(save(source)[0])
    assert outcome
    assert target.states == [what_moves(state) for state in source.states]
    assert target.sockets == source.sockets
    assert target.unanswered == set()


@pytest.mark.parametrize(("events", "pif"), [(1, (1, 2)), (2, (2, 1))])
def test_handshakes_in_version_2(events: int, pif: tuple[int, int]) -> None:
    """Who has called from outside is told; the guest calls again."""
    source = begun(events, pif)
    transfer: Migration[FlowMover] = Migration(versions(), source)
    file = io.BytesIO()
    transfer.request(file, Direction.SOURCE, 2)
    assert transfer.run()
    target, outcome, _ = load(file.getvalue())
    assert outcome
    called = [source.states[1]._replace(events=EVENT_ESTABLISHED)] if events == EVENT_ACCEPTED else []
    assert target.states == [source.states[0], *called]
    assert target.sockets == {0: source.sockets[0]} | dict.fromkeys(range(1, 1 + len(called)))


@pytest.mark.parametrize(("events", "pif"), [(1, (2, 1)), (2, (1, 2)), (3, (2, 1)), (0x22, (2, 1)), (0, (2, 1))])
def test_what_is_no_handshake_does_not_move(events: int, pif: tuple[int, int]) -> None:
    source = begun(events, pif)
    target, outcome, _ = load(save(source)[0])
    assert outcome
    assert target.states == [what_moves(source.states[0])]
    [(flow, why)] = source.given_up
    assert flow == 1
    assert why.startswith("events must have bit 0x04, or be")


def test_an_attempt_has_no_socket() -> None:
    source = begun(2, (2, 1))
    source.unanswered = {1}
    target, outcome, _ = load(save(source)[0])
    assert outcome
    assert target.unanswered == {1}
    assert target.sockets.keys() == {0}


@pytest.mark.parametrize(("events", "pif"), [(1, (1, 2)), (4, (2, 1))])
def test_an_attempt_is_the_guests_own(events: int, pif: tuple[int, int]) -> None:
    source = begun(2 if pif[0] == 2 else 1, pif)
    source.unanswered = {1}
    data = save(source)[0]
    written = FLOW.flatten(source.states[1])
    other = (*written[:9], events, *written[10:])
    target, outcome, transfer = load(with_check(data[16:-12].replace(FLOW.pack(written), FLOW.pack(other))))
    assert "TCP attempt: flow is 1, which the guest has not opened, or which is established" in str(outcome.error)
    transfer.close()
    assert target.states == []


def test_what_flows_have_carried_comes_through() -> None:
    source = loaded("idle-v4")
    source.states = [source.states[0]._replace(bytes_from_guest=1 << 40, bytes_to_guest=3, idle=7000)]
    target, _, _ = load(save(source)[0])
    assert target.states == [what_moves(source.states[0])]


A_PING = Ping(V4_MAPPED + b"\x0a\x09\x00\x02", V4_MAPPED + b"\xc0\x00\x02\x02", 77, 1234, 5)


def test_pings_come_through() -> None:
    source = loaded("empty")
    source.echoes = [A_PING._replace(seq=number) for number in range(MAX_PEERS + 5)]
    bad = [A_PING._replace(our_addr=bytes(16)), A_PING._replace(our_addr=b"\xfe\x80" + bytes(13) + b"\1")]
    source.echoes[7:7] = bad
    target, outcome, _ = load(save(source)[0])
    assert outcome
    assert target.echoes == [echo for echo in source.echoes if echo not in bad]


def test_sockets_find_their_flow_by_its_number() -> None:
    source = loaded("idle-v4")
    dumped = source.sockets[0]
    assert dumped is not None
    count = BATCH + 7
    source.states *= count
    source.sockets = {number: (dumped[0]._replace(seq_snd=number), *dumped[1:]) for number in range(count)}
    source.sockets[BATCH + 2] = source.sockets[3] = None
    target, outcome, _ = load(save(source)[0])
    assert outcome
    assert target.lost.keys() == {3, BATCH + 2}
    restored = {number: dumped[0].seq_snd for number, dumped in target.sockets.items() if dumped is not None}
    assert restored == {number: number for number in range(count) if source.sockets[number]}


def test_a_broken_stream_leaves_nothing(source: Mover) -> None:
    data, _ = save(source)
    places = range(len(data)) if len(data) < 2000 else [*range(700), *range(700, len(data), len(data) // 300)]
    for at in places:
        if 8 <= at < 12:
            continue  # a higher version that says that ours will do
        for broken in (data[:at], data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]):
            target, outcome, transfer = load(broken)
            assert not outcome, at
            transfer.close()
            assert target.states == []
            assert target.sockets == {}
            assert target.seen == NEVER_SEEN
            assert "commit" not in target.calls


A_SOCKET = SocketState(0, 0, 0, 0, 0, 1000, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0)


def socket_of(number: int) -> bytes:
    """The entry of one."""
    return HEAD.pack(4, 1, 6 + SOCKET.size) + number.to_bytes(4, "big") + SOCKET.sized(A_SOCKET)


A_FLOW = HEAD.pack(3, 1, 6 + FLOW.size) + FLOW.sized_many([FLOW.flatten(loaded("idle-v4").states[0])])
A_LOSS = HEAD.pack(5, 1, 4) + bytes(4)
AN_OBSERVED = HEAD.pack(2, 1, 2 + OBSERVED.size) + OBSERVED.sized(NEVER_SEEN)


def with_check(body: bytes) -> bytes:
    """A whole stream of these entries."""
    header = versions()[-1].header(0xB1BB1D1B0BB1D1B0).pack()
    return header + body + HEAD.pack(0, 1, 4) + zlib.crc32(body).to_bytes(4, "big")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (HEAD.pack(4, 1, 4) + bytes(4), "TCP socket: length is 2, and 0 bytes of it are left"),
        (
            HEAD.pack(4, 1, 6 + SOCKET.size) + bytes(4) + SOCKET.sized(A_SOCKET),
            "TCP socket: flow is 0, must be below 0, the number of flows so far",
        ),
        (HEAD.pack(5, 1, 4) + bytes(4), "lost TCP flow: flow is 0, must be below 0, the number of flows so far"),
        (A_FLOW + 2 * A_LOSS, "lost TCP flow: flow is 0, which has come before (at offset 172)"),
        (A_FLOW + A_LOSS + socket_of(0), "TCP socket: flow is 0, which has come before (at offset 172)"),
        (A_FLOW + socket_of(0) + A_LOSS, "lost TCP flow: flow is 0, which has come before (at offset 226)"),
        (A_FLOW + socket_of(0) * 2, "TCP socket: flow is 0, which has come before (at offset 226)"),
        (socket_of(0) + A_FLOW, "TCP socket: flow is 0, must be below 0, the number of flows so far (at offset 24)"),
        (A_FLOW + socket_of(1) + A_FLOW, "TCP socket: flow is 1, must be below 1, the number of flows so far"),
        (HEAD.pack(1, 0, 0) * 2, "configuration: entry is 2, must be the only one (at offset 32)"),
        (AN_OBSERVED * 2, "observed addresses: entry is 2, must be the only one (at offset 76)"),
        (
            HEAD.pack(3, 1, 6) + FLOW.size.to_bytes(2, "big") + b"\xff\xff\xff\xff",
            "count is 4294967295, must be at most",
        ),
        (HEAD.pack(2, 1, 2) + b"\0\x05", "observed addresses: size is 5, must be one of [42], or more"),
        (HEAD.pack(2, 1, 2) + b"\x10\1", "observed addresses: size is 4097, must be one of [42], or more, up to 4096"),
        (HEAD.pack(1, 0, 65537) + bytes(65537), "length is 65537, must be at most 65536"),
        (HEAD.pack(77, 1, 0), "is of type 77, which must be understood and is not known here"),
    ],
)
def test_what_cannot_be_is_named(body: bytes, message: str) -> None:
    target, outcome, _ = load(with_check(body))
    assert message in str(outcome.error)
    assert target.sockets == {}
    assert inspected(with_check(body)) == (
        "None" if isinstance(outcome.error, UnknownEntryError) else str(outcome.error)
    )


def inspected(data: bytes) -> str:
    """The error that the inspector gives; or none."""
    try:
        for _ in inspect(io.BytesIO(data), versions()):
            pass
    except MigrationError as error:
        return str(error)
    return "None"


def test_the_inspector_says_what_a_target_would_say(source: Mover) -> None:
    data, _ = save(source)
    for at in range(min(len(data), 600)):
        for broken in (data[:at], data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]):
            error = load(broken)[1].error
            assert inspected(broken) == str(error) or isinstance(error, UnknownEntryError)  # it shows those


def socket_entry(state: SocketState) -> bytes:
    return HEAD.pack(4, 1, 6 + SOCKET.size) + bytes(4) + SOCKET.sized(state)


def test_what_is_odd_and_no_reason_to_refuse() -> None:
    """A connection that ended, an address that nobody has, a line that is none of ours."""
    observed = OBSERVED.sized(NEVER_SEEN._replace(mac=b"\1" * 6, addr4=b"\xe0\0\0\1"))
    text = b"IPv4\t10.9.0.2/24\nno tab\n\nMTU\t1500\tor so"
    body = HEAD.pack(1, 0, len(text)) + text + HEAD.pack(2, 1, len(observed)) + observed
    body += A_FLOW + socket_entry(A_SOCKET._replace(tcpi_state=7))
    target, outcome, _ = load(with_check(body))
    assert outcome
    assert target.compared == {"IPv4": "10.9.0.2/24", "MTU": "1500\tor so"}
    assert target.seen == NEVER_SEEN
    assert target.lost == {0: "it ended meanwhile"}


def test_more_flows_than_there_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("godwit.net.native.MAX_FLOWS", 2)
    assert load(with_check(A_FLOW * 2))[1]
    target, outcome, _ = load(with_check(A_FLOW * 3))
    assert "TCP flows: count is 3, must be at most 2 in all" in str(outcome.error)
    assert target.batches == [1, 1]


def test_flows_whose_addresses_cannot_be() -> None:
    flat = FLOW.flatten(loaded("idle-v4").states[0])
    six = b"\x20\x01" + bytes(13) + b"\1"
    for index, value, message in (
        (2, six, "guest_end_addr is"),
        (6, six, "host_end_addr is"),
        (5, bytes(16), "host_our_addr is"),
        (1, b"\xff" + bytes(15), "guest_our_addr is"),
        (9, 0x83, "events is 131, must have bit 0x04"),
    ):
        flows = FLOW.sized_many([(*flat[:index], value, *flat[index + 1 :])])
        target, outcome, _ = load(with_check(HEAD.pack(3, 1, len(flows)) + flows))
        assert f"TCP flow 0: {message}" in str(outcome.error)
        assert target.batches == []


def test_what_the_source_cannot_say_whole() -> None:
    """A socket of which the kernel has said what cannot be, and a text that is too long."""
    source = loaded("queues-v4")
    dumped = source.sockets[1]
    assert dumped is not None
    source.sockets[1] = (dumped[0]._replace(mss=0), dumped[1], dumped[2])
    source.told = {"IPv4": "x" * 70000}
    target, outcome, _ = load(save(source)[0])
    assert outcome
    assert [flow for flow, _ in source.given_up] == [1]
    assert target.lost.keys() == {1}
    assert target.sockets[0] == source.sockets[0]
    assert target.compared == {"IPv4": "x" * (65536 - len("IPv4\t"))}


@pytest.mark.parametrize("direction", list(Direction))
def test_a_cancellation_is_heeded_between_entries(direction: Direction) -> None:
    class Cancelling(Mover):
        def dump_one(self, flow: int) -> tuple[SocketState, bytes, bytes] | None:
            self.calls.append("socket")
            transfer.cancel("enough")
            return super().dump_one(flow)

        def restore(self, *arguments: Any) -> None:
            self.calls.append("sockets")
            transfer.cancel("enough")

    source = loaded("idle-v4")
    source.states *= 5
    source.sockets = dict.fromkeys(range(5), source.sockets[0])
    file = io.BytesIO(save(source)[0] if direction is Direction.TARGET else b"")
    mover = Cancelling()
    if direction is Direction.SOURCE:
        mover.states, mover.sockets = source.states, source.sockets
    transfer: Migration[FlowMover] = Migration(versions(), mover)
    transfer.request(file, direction, NATIVE if direction is Direction.SOURCE else None)
    assert isinstance(transfer.run().error, AbortedError)
    assert mover.calls.count("socket" if direction is Direction.SOURCE else "sockets") == 1


def test_a_queue_of_many_pieces_is_shown_by_its_check_value() -> None:
    queue = bytes(range(256)) * 3000
    data = socket_entry(A_SOCKET._replace(sndq=len(queue)))
    entry = HEAD.pack(4, 1, len(data) - HEAD.size + len(queue)) + data[HEAD.size :] + queue
    items = {item.name: item.values for item in inspect(io.BytesIO(with_check(A_FLOW + entry)), versions())}
    assert items["TCP socket"]["sndq bytes"] == len(queue)
    assert items["TCP socket"]["sndq crc32"] == f"{zlib.crc32(queue):08x}"


def test_of_a_queue_that_is_cut_the_inspector_says_what_a_target_would_say() -> None:
    """However many pieces of it are there."""
    data = socket_entry(A_SOCKET._replace(sndq=5 << 20))
    entry = HEAD.pack(4, 1, len(data) - HEAD.size + (5 << 20)) + data[HEAD.size :]
    whole = with_check(A_FLOW)[:-12] + entry
    for size in (0, 100, 300_000, 3 << 20):
        broken = whole + bytes(size)
        message = f"state: stream ended at offset {len(broken)}: wanted {5 << 20} bytes, got {size}"
        assert str(load(broken)[1].error) == message
        assert inspected(broken) == message


@pytest.mark.parametrize("size", [4096, 4097])
def test_many_records_of_a_later_version_take_little_memory(size: int, tmp_path: Path) -> None:
    """At most 16 MiB of them lie in memory, and their copy. Longer ones are refused before any is read."""
    record = UDP_PEER.encode(UdpPeer(V4, V4, V4, NOBODY, 7, 1, 1)).ljust(size, b"\0")
    payload = (0).to_bytes(4, "big") + size.to_bytes(2, "big") + (4096).to_bytes(4, "big") + record * 4096
    port = UDP_PORT.sized(UdpPort(0, V4, 5000, V4, 40000, 0))
    path = tmp_path / "state"
    path.write_bytes(with_check(HEAD.pack(6, 0, len(port)) + port + HEAD.pack(7, 0, len(payload)) + payload))
    del payload
    target = Mover()
    transfer: Migration[FlowMover] = Migration(versions(), target)
    with path.open("rb") as file:
        transfer.request(file, Direction.TARGET)
        tracemalloc.start()
        try:
            outcome = transfer.run()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert bool(outcome) == (size <= 4096)
    assert len(target.ports) == (size <= 4096)
    assert peak < 48 << 20


def test_odd_orders_that_are_sound() -> None:
    """Flows of a later entry behind the sockets of the ones before; and no flows are no batch."""
    none = HEAD.pack(3, 1, 6) + FLOW.size.to_bytes(2, "big") + bytes(4)
    body = A_FLOW + socket_of(0) + none + A_FLOW + socket_of(1) + AN_OBSERVED + HEAD.pack(1, 0, 3) + b"a\tb"
    target, outcome, _ = load(with_check(body))
    assert outcome
    assert sorted(target.sockets) == [0, 1]
    assert (target.batches, target.compared) == ([1, 1], {"a": "b"})
    items = list(inspect(io.BytesIO(with_check(body)), versions()))
    assert [item.name for item in items][3:6] == ["TCP flows", "TCP flows", "TCP socket"]
    assert items[3].values == {}
    assert load(with_check(b""))[1]


def test_a_newer_native_that_we_can_read_is_read() -> None:
    """Entries that may be skipped, fields behind ours, and a version that says that ours will do."""
    source = loaded("idle-v4")
    data, _ = save(source)
    body = data[16:-12]
    extra = HEAD.pack(900, 0, 5) + b"extra"
    header = versions()[-1].header(0xB1BB1D1B0BB1D1B0)._replace(version=NATIVE + 1).pack()
    body = extra + body + extra
    newer = header + body + HEAD.pack(0, 1, 4) + zlib.crc32(body).to_bytes(4, "big")
    target, outcome, _ = load(newer)
    assert outcome
    assert target.sockets == source.sockets
    header = versions()[-1].header(0xB1BB1D1B0BB1D1B0)._replace(version=NATIVE + 1, compat_version=NATIVE + 1).pack()
    _, outcome, _ = load(header + newer[16:])
    assert isinstance(outcome.error, VersionRefusedError)
    assert "device state version 0x80000002" in str(outcome.error)
    assert "knows 2, 0x80000001: have the source write one of these" in str(outcome.error)


def run(data: io.BytesIO, mover: Mover, direction: Direction, faults: Faults) -> tuple[Outcome, Migration[FlowMover]]:
    transfer: Migration[FlowMover] = Migration(versions(), mover, faults=faults)
    transfer.request(data, direction, NATIVE if direction is Direction.SOURCE else None)
    return transfer.run(), transfer


def test_a_fault_at_any_point_undoes_all(source: Mover) -> None:
    passed = Faults()
    file = io.BytesIO()
    assert run(file, loaded_again(source), Direction.SOURCE, passed)[0]
    good = file.getvalue()
    assert run(io.BytesIO(good), Mover(), Direction.TARGET, passed)[0]
    assert "target:state:after" in passed.passed
    for point in passed.passed:
        faults = Faults.parse(f"{point}=fail")
        target = point.startswith("target")
        mover = Mover() if target else loaded_again(source)
        file = io.BytesIO(good if target else b"")
        outcome, transfer = run(file, mover, Direction.TARGET if target else Direction.SOURCE, faults)
        assert not outcome, point
        transfer.close()
        if target:
            assert (mover.states, mover.sockets, mover.seen) == ([], {}, NEVER_SEEN), point
            assert "commit" not in mover.calls
        elif point != "source:header":
            assert mover.calls[-1] == "thaw", point
    for point in ("commit:state", "discard:state"):
        mover = Mover()
        transfer = run(io.BytesIO(good), mover, Direction.TARGET, Faults.parse(f"{point}=fail"))[1]
        assert len(transfer.commit() if "commit" in point else transfer.discard()) == 1


def loaded_again(source: Mover) -> Mover:
    """Another device with the same in it."""
    mover = Mover()
    mover.states, mover.sockets, mover.seen = list(source.states), dict(source.sockets), source.seen
    return mover


def frozen() -> list[Path]:
    return sorted(FROZEN.glob("*.bin"))


def test_streams_of_each_version_are_kept() -> None:
    """The present one has each content; one that was released is never written anew, and so may have fewer."""
    versions_kept = {path.stem.partition("-")[0] for path in frozen()}
    assert versions_kept == {f"{version.id:#x}" for version in versions() if version.id >= NATIVE}
    assert {f"{NATIVE:#x}-{name}.bin" for name in CONTENTS} <= {path.name for path in frozen()}


@pytest.mark.parametrize("path", frozen(), ids=lambda path: path.stem)
def test_streams_of_before_are_read(path: Path) -> None:
    """What stands there was in this one."""
    source = CONTENTS[path.stem.partition("-")[2]]()
    target, outcome, _ = load(path.read_bytes())
    assert outcome
    assert target.states == list(map(what_moves, source.states))
    assert target.sockets == {flow: dumped for flow, dumped in source.sockets.items() if flow not in source.unanswered}
    assert target.lost.keys() == {flow for flow, dumped in source.sockets.items() if dumped is None}
    assert target.unanswered == source.unanswered
    assert target.ports == source.ports
    assert target.echoes == source.echoes
    assert target.told_guest == source.told_guest
    assert target.seen == source.seen
    assert target.compared == source.told


@settings(max_examples=300)
@given(
    st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 4, 5, 6, 12]), st.sampled_from([0, 1]), st.binary(max_size=200)), max_size=6
    )
)
def test_entries_of_nonsense_end_in_an_error_or_in_nothing(entries: list[tuple[int, int, bytes]]) -> None:
    body = b"".join(HEAD.pack(kind, flags, len(data)) + data for kind, flags, data in entries)
    target, outcome, transfer = load(with_check(body))
    if not outcome:
        assert target.states == []
        assert target.sockets == {}
    transfer.close()
    assert target.sockets == {}
    assert SOCKET.size == 52


V4, V6 = bytes(10) + b"\xff\xff" + bytes((10, 9, 0, 2)), bytes.fromhex("fd09000000000000 0000000000000002")
NOBODY = bytes(16)


def test_udp_comes_through() -> None:
    source = loaded("empty")
    peers = [UdpPeer(V4, V4, V4, NOBODY, port, 1, 1) for port in range(1, 5001)]
    source.ports = [
        (
            UdpPort(0, V4, 5000, V4, 40000, 0),
            peers,
            [Datagram(V4, NOBODY, 53, b"answer"), Datagram(V4, NOBODY, 53, b"")],
        ),
        (UdpPort(2, NOBODY, 53, NOBODY, 53, 1), [], [Datagram(V6, V6, 9, bytes(65000))]),
        (UdpPort(0, V6, 5001, V6, 40000, 0), [UdpPeer(V6, V6, V6, V6, 1, 0, 0)], []),
        (UdpPort(0, V6, 5002, V6, 40000, 0), [], [Datagram(V6, V6, 1 + n, b"%d" % n) for n in range(9000)]),
        (UdpPort(0, V6, 5003, V6, 40000, 0), [], [Datagram(V6, V6, 1 + n, bytes([n]) * 65000) for n in range(40)]),
    ]
    data, saved = save(source)
    assert saved
    target, outcome, transfer = load(data)
    assert outcome
    assert target.ports == source.ports
    transfer.discard()
    assert target.ports == []


def test_udp_that_is_not_sound_is_left_out() -> None:
    source = loaded("empty")
    good = UdpPeer(V4, V4, V4, NOBODY, 7, 1, 1)
    source.ports = [
        (UdpPort(1, V4, 5000, V4, 40000, 0), [good], []),
        (UdpPort(0, V4, 5000, V4, 40000, 0), [good._replace(our_addr=V6), good], [Datagram(V4, NOBODY, 0, b"x")]),
    ]
    target, outcome, _ = load(save(source)[0])
    assert outcome
    assert target.ports == [(UdpPort(0, V4, 5000, V4, 40000, 0), [good], [])]


@pytest.mark.parametrize("kind", [7, 8])
def test_a_udp_port_that_did_not_come(kind: int) -> None:
    records = UDP_PEER.sized_many([]) if kind == 7 else WAITING.sized_many([])
    payload = (1).to_bytes(4, "big") + records
    _, outcome, _ = load(with_check(HEAD.pack(kind, 0, len(payload)) + payload))
    assert "port is 1, must be below 0, the number of ports so far" in str(outcome.error)


def test_no_more_datagrams_than_a_target_has_room_for() -> None:
    """The source leaves the rest out, and the target believes nobody who says more."""
    source = loaded("empty")
    large = Datagram(V4, NOBODY, 53, bytes(65000))
    source.ports = [(UdpPort(0, V4, 5000, V4, 40000, 0), [], [large] * 1100)]
    data, _ = save(source)
    target, outcome, _ = load(data)
    assert outcome
    assert len(target.ports[0][2]) == (64 << 20) // 65256
    extra = (0).to_bytes(4, "big") + WAITING.sized_many([Waiting(V4, NOBODY, 53, 65000)]) + bytes(65000)
    _, outcome, _ = load(with_check(data[16:-12] + HEAD.pack(8, 0, len(extra)) + extra))
    assert "must be at most 67108864 in all" in str(outcome.error)


EVERYTHING = Withdrawn(
    routers6=(IPv6Address("fe80::1"), IPv6Address("fe80::2")),
    prefixes6=(IPv6Network("2001:db8:1::/64"), IPv6Network("2001:db8:2::/48")),
    dns6=(IPv6Address("2001:db8::53"),),
    search=("example.org", "lab.example.net"),
    dns4=(IPv4Address("192.0.2.53"), IPv4Address("192.0.2.54")),
    servers4=((IPv4Address("192.0.2.7"), IPv4Address("192.0.2.1")),),
)


def test_what_the_guest_was_told_comes_through() -> None:
    source = loaded("empty")
    source.told_guest = EVERYTHING
    data, _ = save(source)
    target, outcome, _ = load(data)
    assert outcome
    assert target.told_guest == EVERYTHING
    shown = [item.values for item in inspect(io.BytesIO(data), versions()) if item.name == "what the guest was told"]
    assert "fe80::2" in [one["address"] for one in shown if "address" in one]


def told_entry(*things: Told, names: bytes = b"") -> bytes:
    body = TOLD.sized_many([tuple(one) for one in things]) + names
    return HEAD.pack(12, 0, len(body)) + body


ROUTER = packed16(IPv6Address("fe80::1"))
PREFIX = packed16(IPv6Address("2001:db8:1::"))
HERE4 = packed16(IPv4Address("192.0.2.1"))


@pytest.mark.parametrize(
    "wrong",
    [
        Told(5, ROUTER),
        Told(ROUTER6, PREFIX),
        Told(ROUTER6, HERE4),
        Told(PREFIX6, HERE4, 32),
        Told(PREFIX6, PREFIX, 0),
        Told(PREFIX6, PREFIX, 32),
        Told(PREFIX6, PREFIX, 129),
        Told(SERVER, bytes(16)),
        Told(LEASE4, ROUTER, 0, HERE4),
        Told(LEASE4, HERE4),
        Told(LEASE4, HERE4, 0, ROUTER),
    ],
)
def test_what_nobody_can_have_been_told(wrong: Told) -> None:
    good = (Told(ROUTER6, ROUTER), Told(PREFIX6, PREFIX, 64), Told(SERVER, HERE4), Told(LEASE4, HERE4, 0, HERE4))
    assert load(with_check(told_entry(*good)))[1]
    target, outcome, _ = load(with_check(told_entry(*good, wrong)))
    assert isinstance(outcome.error, BadRecordError)
    assert target.told_guest == Withdrawn()


def test_no_more_is_told_than_there_is_room_for() -> None:
    source = loaded("empty")
    servers = tuple(IPv6Address((0x20010DB8 << 96) + number) for number in range(MAX_TOLD + 9))
    source.told_guest = Withdrawn(dns6=servers, search=("no..name", "x" * 64 + ".org", "example.org"))
    target, outcome, _ = load(save(source)[0])
    assert outcome
    assert target.told_guest == Withdrawn(dns6=servers[:MAX_TOLD], search=("example.org",))
    entry = told_entry(*(Told(SERVER, ROUTER) for _ in range(MAX_TOLD + 1)))
    assert isinstance(load(with_check(entry))[1].error, BadRecordError)
    assert isinstance(load(with_check(told_entry() * 2))[1].error, BadRecordError)
