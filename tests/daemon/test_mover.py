# SPDX-License-Identifier: GPL-2.0-or-later
"""What the mover makes of single flows, on an engine with real sockets, without rings."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from godwit.daemon import datagrams, mover
from godwit.daemon.linger import Linger
from godwit.daemon.losses import NOT_SAVED, report
from godwit.daemon.mover import Mover
from godwit.dataplane import Engine, FlowState, Observed, Ping, Side, SocketState, UdpPeer, UdpPort, handover
from godwit.net.native import DATAGRAM_COST, FLOW
from godwit.net.records import (
    SOCKET,
    TCP_CLOSE_WAIT,
    TCP_ESTABLISHED,
    TCP_FIN_WAIT1,
    TCP_FIN_WAIT2,
    TCP_LAST_ACK,
)
from godwit.net.state import NEVER_SEEN, sound_sockets
from godwit.repair import Repair, RepairError, RepairListener, in_repair

from ..dataplane.arrivals import add_flow, arrive
from ..repair.conftest import FakeHelper, obey

V4 = bytes(10) + b"\xff\xff"
GUEST = V4 + bytes((192, 0, 2, 10))
TCP_REPAIR = 19


class Rig:
    """An engine with flows to a server, and a mover with a helper of its own."""

    def __init__(self, folder: object) -> None:
        self.engine = Engine(16)
        self.listener = RepairListener(f"{folder}/r")
        self.soon: list[Callable[[], None]] = []
        self.mover = Mover(self.engine, self.listener, 0, self.schedule)
        self.mover.helper_expected = True
        self.server = socket.create_server(("127.0.0.1", 0))
        self.peers: list[socket.socket] = []

    def schedule(self, delay: float, work: Callable[[], None]) -> None:
        """Nothing later; what is to be done soon is left to the test."""
        if not delay:
            self.soon.append(work)

    def set_mode(self, fds: Sequence[int], mode: Repair) -> None:
        for fd in fds:
            sock = socket.socket(fileno=fd)
            sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, mode)
            sock.detach()

    def add(self, events: int = 0x04) -> int:
        ours = socket.create_connection(self.server.getsockname())
        self.peers.append(self.server.accept()[0])
        (address, port), own = self.server.getsockname(), ours.getsockname()[1]
        remote = V4 + socket.inet_aton(address)
        sides = (Side(remote, GUEST, port, own), Side(remote, remote, own, port))
        state = FlowState((2, 1), sides, 0, 7, 8, events, 1460, 0, 0, 0, 1000, 1000, 1, 1, 1, 1, 1)
        return add_flow(self.engine, state, ours)

    def record(self, flow: int) -> bytes:
        return self.mover.flow_records([flow], native=True)

    def dump(self, *flows: int) -> list[bytes | str]:
        return list(self.mover.dump(flows))

    def prepare(self, states: Sequence[FlowState]) -> list[int]:
        """Flows that come, and their indices."""
        before = len(self.came())
        self.mover.prepare(b"".join(map(FLOW.encode, states)), native=True)
        return self.came()[before:]

    def came(self) -> list[int]:
        return [] if self.mover._arrivals is None else self.mover._arrivals.flows()

    def close(self) -> None:
        self.engine.close()
        self.listener.close()
        for sock in (*self.peers, self.server):
            sock.close()


@pytest.fixture
def rig(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    made = Rig(tmp_path)
    monkeypatch.setattr(made.mover, "_set_mode", made.set_mode)  # in place of a helper's process
    made.mover._local_moves = True
    yield made
    made.close()


def is_reset(sock: socket.socket) -> bool:
    sock.settimeout(5.0)
    try:
        return sock.recv(1) != b"" and False
    except ConnectionResetError:
        return True


def test_what_is_not_in_the_stream_is_no_flow_that_moved(rig: Rig) -> None:
    moved, left = rig.add(), rig.add()
    rig.mover.freeze()
    [both] = rig.dump(moved, left)
    assert len(both) == 2 * SOCKET.size
    rig.mover.give_up(left, "of no reason")
    fds, ports = rig.mover.leave()
    assert ports == []
    assert len(fds) == 1
    with socket.socket(fileno=fds[0]) as kept:
        assert kept.getpeername() == rig.peers[0].getsockname()
        rig.mover.close_flows()
        assert is_reset(rig.peers[1])
    rig.peers[0].setblocking(False)
    with pytest.raises(BlockingIOError):
        rig.peers[0].recv(1)


def test_a_flow_with_the_host_itself_does_not_move(rig: Rig) -> None:
    rig.mover._local_moves = False
    flow = rig.add()
    rig.mover.freeze()
    assert rig.dump(flow) == [NOT_SAVED]
    assert rig.mover.leave() == ([], [])
    rig.mover.close_flows()
    assert is_reset(rig.peers[0])


@pytest.mark.parametrize(
    ("address", "found"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("128.0.0.1", False), ("::1", True), ("::2", False)],
)
def test_loopback(rig: Rig, address: str, found: bool) -> None:
    packed = socket.inet_pton(socket.AF_INET6, address) if ":" in address else V4 + socket.inet_aton(address)
    side = Side(packed, packed, 4000, 5000)
    state = FlowState((2, 1), (side, side), 0, 7, 8, 0x04, 1460, 0, 0, 0, 1000, 1000, 1, 1, 1, 1, 1)
    assert rig.engine.flow_is_local(arrive(rig.engine, state).flow(0)) == found


def test_a_thaw_that_fails_leaves_nothing_parked(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.engine.start()
    rig.add()
    rig.mover.freeze()

    def fail() -> None:
        raise OSError("the roof fell in")

    monkeypatch.setattr(rig.mover, "thaw_listeners", fail)
    with pytest.raises(OSError, match="roof"):
        rig.mover.thaw()
    with pytest.raises(ValueError, match="without park"):
        rig.engine.unpark()


def fails(*_arguments: object) -> None:
    raise RuntimeError("the roof fell in")


@pytest.mark.parametrize("what", ["_resume", "thaw_listeners"])
def test_a_thaw_that_fails_in_its_midst_leaves_no_connection_hanging(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    rig.engine.start()
    rig.add()
    rig.mover.freeze()
    with monkeypatch.context() as patch:
        patch.setattr(rig.mover, what, fails)
        with pytest.raises(RuntimeError, match="roof"):
            rig.mover.thaw()
    rig.mover.give_up_all()  # as the device does then; there is nothing left to do
    assert is_reset(rig.peers[0])
    assert rig.mover.settled


def test_a_commit_that_fails_in_its_midst_leaves_no_connection_hanging(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.engine.start()
    flow = rig.add()
    rig.mover.freeze()
    state = rig.record(flow)
    [dumped] = rig.dump(flow)
    assert isinstance(dumped, bytes)
    [fd], _ = rig.mover.leave()
    socket.socket(fileno=fd).close()  # in repair mode this says nothing
    rig.mover.prepare(state, native=True)
    rig.mover.restore(0, dumped)
    with monkeypatch.context() as patch:
        patch.setattr(rig.mover, "_finish", fails)
        with pytest.raises(RuntimeError, match="roof"):
            rig.mover.commit()
    rig.mover.give_up_all()
    assert is_reset(rig.peers[0])
    assert rig.mover.settled


@pytest.mark.parametrize("fails_at", [0, 1, 2])
@pytest.mark.parametrize("done", [0, 1])
def test_a_helper_that_is_lost_in_the_midst_of_a_commit(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails_at: int, done: int
) -> None:
    """What is out of repair mode goes on; the rest is lost, for want of a helper or for what was wrong before."""
    caplog.set_level("INFO")
    monkeypatch.setattr(mover, "BATCH", 2)
    odd = 4  # it cannot be completed, as will be seen: its socket is not in repair mode any more
    came = leave_and_load(rig, 6, odd, tcpi_state=TCP_FIN_WAIT2)
    rig.set_mode([rig.engine.flow_socket(came[odd])[0]], Repair.OFF_NO_WP)
    asked = 0

    def set_mode(fds: Sequence[int], mode: Repair) -> None:
        nonlocal asked
        asked += 1
        fails = asked > fails_at
        rig.set_mode(fds[:done] if fails else fds, mode)
        if fails:
            raise RepairError("out of order", done)

    monkeypatch.setattr(rig.mover, "_set_mode", set_mode)
    rig.mover.commit()
    batches = [0, 1], [2, 3], [5]
    living = [*itertools.chain(*batches[:fails_at]), *batches[fails_at][:done]]
    assert f"{len(living)} connections go on here, {6 - len(living)} were lost" in caplog.text
    assert ("completing its socket" in caplog.text) == (fails_at > 0)
    for number, (flow, peer) in enumerate(zip(came, rig.peers, strict=True)):
        fd = rig.engine.flow_socket(flow)[0] if rig.engine.flow_generation(flow) is not None else -1
        assert (fd >= 0) == (number in living)
        if fd >= 0:
            peer.send(b"x")
            with socket.socket(fileno=os.dup(fd)) as ours:
                ours.settimeout(5.0)
                assert ours.recv(2, socket.MSG_PEEK) == b"x"


@pytest.mark.parametrize("moment", ["before", "after"])
def test_who_is_reset_by_its_peer_in_the_midst_of_a_commit_is_not_lost(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, moment: str
) -> None:
    """Before or after its socket leaves repair mode: it ends as any other that is reset."""
    caplog.set_level("INFO")
    came = leave_and_load(rig, 2, 1, b"not sent yet")
    resetting = rig.peers[1]
    resetting.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def set_mode(fds: Sequence[int], mode: Repair) -> None:
        if moment == "before":
            resetting.close()
        rig.set_mode(fds, mode)
        if moment == "after":
            resetting.close()

    monkeypatch.setattr(rig.mover, "_set_mode", set_mode)
    rig.mover.commit()
    assert "1 connections go on here, 0 were lost" in caplog.text
    assert "1 connections were reset by their peers meanwhile" in caplog.text
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert rig.mover.went == (1, 0)
    assert rig.engine.flow_socket(came[0])[0] >= 0
    assert rig.engine.flow_generation(came[1]) is None or rig.engine.flow_socket(came[1])[0] < 0


@pytest.mark.parametrize("bad", [0, 1, 2, 4])
def test_of_a_batch_that_two_threads_fill_the_right_one_is_lost(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, bad: int
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(mover, "BATCH", 4)
    came = leave_and_load(rig, 5, bad, rcv_wnd=1 << 31)  # beyond what any window can be
    rig.mover.commit()
    assert "4 connections go on here, 1 were lost" in caplog.text
    assert f"port {rig.peers[bad].getpeername()[1]} to " in caplog.text
    assert "filling the connection" in caplog.text
    assert [rig.engine.flow_socket(flow)[0] >= 0 for flow in came] == [number != bad for number in range(5)]


def test_a_flow_that_was_reset_is_in_the_stream_as_lost(rig: Rig) -> None:
    """The guest, whose ring has no room, is to hear of it where it goes."""
    flow = rig.add()
    with rig.engine.parked():
        rig.engine.reset_flow(flow)
    rig.mover.freeze()
    assert list(rig.mover.flows()) == [flow]
    assert rig.engine.flow_state(flow).sides[1].our_port != 0
    assert rig.dump(flow) == [NOT_SAVED]
    rig.mover.thaw()


@pytest.mark.parametrize(
    ("kernel", "guest_closed", "written"),
    [
        (TCP_ESTABLISHED, False, TCP_ESTABLISHED),
        (TCP_ESTABLISHED, True, TCP_FIN_WAIT1),
        (TCP_CLOSE_WAIT, False, TCP_CLOSE_WAIT),
        (TCP_CLOSE_WAIT, True, TCP_LAST_ACK),
    ],
)
def test_the_state_of_a_flow_that_carries_bytes(rig: Rig, kernel: int, guest_closed: bool, written: int) -> None:
    """A FIN that waits behind them counts, and so does the peer's."""
    flow = rig.add(0x04 | 0x20 | 0x10 if guest_closed else 0x04)
    rig.peers[0].send(b"queued")
    if kernel == TCP_CLOSE_WAIT:
        rig.peers[0].shutdown(socket.SHUT_WR)
    [(live, _, _, _)] = handover.tcp(rig.engine)
    handover.add_tcp(rig.engine, live, rig.engine.release_flow(flow), b"before, ", b"carried")
    [flow] = rig.engine.tcp_flows()
    rig.mover.freeze()
    [dumped] = rig.dump(flow)
    assert isinstance(dumped, bytes)
    state = SocketState._make(SOCKET.unpack(dumped[: SOCKET.size]))
    assert state.tcpi_state == written
    assert (state.sndq, state.notsent, state.rcvq) == (7, 7, 14)
    assert dumped[SOCKET.size :] == b"carriedbefore, queued"
    assert bool(state.tcpi_options & 0x80) == guest_closed  # the number is that of the first byte


def test_what_a_source_says_is_short_and_one_line_in_the_log(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """Of the configuration and of the reasons of losses; and many reasons take no time at the commit."""
    mover = Mover(rig.engine, rig.listener, 0, rig.schedule, lambda: {"IPv4": "10.9.0.2/24", "MTU": "1500"})
    mover.compare({"IPv4": "10.9.0.2/24", "MTU": "1500", "what": "ever"})
    assert caplog.text == ""
    mover.compare({"IPv4": "\x1b[2J\u202e\n" + "x" * 65000})
    assert len(caplog.messages) == 1
    assert caplog.messages[0].isprintable()
    assert "IPv4 10.9.0.2/24 (was ?[2J??xxx" in caplog.messages[0]
    assert len(caplog.messages[0]) < 1200
    caplog.clear()
    state = rig.engine.flow_state(rig.add())
    lost = [("often", state)] * 3 + [(f"reason {number}", state) for number in range(100_000)]
    report(lost)
    assert caplog.messages[0].startswith("3 lost, 127.0.0.1 port ")
    assert caplog.messages[0].endswith(" and so on: often")
    assert len(caplog.messages) == 21
    assert caplog.messages[-1] == "99981 lost for 99981 other reasons"


@pytest.mark.parametrize("end", ["commit", "discard"])
def test_what_was_prepared_is_of_one_transfer(rig: Rig, end: str) -> None:
    """Sockets name their flow by its place in it."""
    states = []
    for _ in range(3):
        flow = rig.add()
        states.append(rig.engine.flow_state(flow))
        rig.engine.forget_flow(flow)
    for _ in range(2):
        rig.prepare(states[:1])
        rig.prepare(states[1:])
        assert rig.mover._arrivals is not None
        assert len(rig.mover._arrivals) == 3
        getattr(rig.mover, end)()
        assert rig.mover._arrivals is None


def test_a_discard_that_fails_leaves_nothing_behind(rig: Rig) -> None:
    """Each step is tried, whatever the others do."""
    rig.engine.start()
    states = []
    for _ in range(3):
        flow = rig.add()
        states.append(rig.engine.flow_state(flow))
        rig.engine.forget_flow(flow)
    flows = rig.prepare(states)
    rig.mover.add_udp_port(UdpPort(0, GUEST, 5000, V4 + bytes(4), 45678, 0))
    assert len(rig.engine.udp_ports()) == 1
    rig.engine.forget_flow(flows[1])
    with pytest.raises(ValueError, match=f"no TCP flow {flows[1]}"):
        rig.mover.discard()
    assert rig.engine.udp_ports() == []
    assert rig.engine.tcp_flows() == []
    assert rig.came() == []
    with pytest.raises(ValueError, match="without park"):
        rig.engine.unpark()
    rig.mover.add_udp_port(UdpPort(0, GUEST, 5000, V4 + bytes(4), 45678, 0))
    rig.mover.discard()


def test_of_udp_ports_that_do_not_move_there_is_one_line(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    peer = UdpPeer(GUEST, V4 + bytes((198, 51, 100, 1)), V4 + bytes((198, 51, 100, 1)), bytes(16), 9, 1, 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("", 0))
        port = taken.getsockname()[1]
        for number in range(1, 101):
            rig.mover.add_udp_port(UdpPort(2, bytes(16), number, bytes(16), number, 0))
        for number in range(3):
            rig.mover.add_udp_port(UdpPort(0, GUEST, 5000 + number, V4 + bytes(4), port, 0))
            rig.mover.add_udp_peers(100 + number, [peer])
        assert "UDP" not in caplog.text
        rig.mover.commit()
    assert [line for line in caplog.messages if "UDP" in line] == [
        "100 UDP ports do not move, 1 and so on: it is not forwarded here",
        f"3 UDP ports leave from elsewhere than before, 5000 and so on: it was 0.0.0.0 port {port}",
    ]


def test_attempts_that_come_take_no_more_descriptors_than_there_are(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """The guest's own would be refused just so."""
    port = rig.server.getsockname()[1]
    outside, here = V4 + bytes((10, 9, 9, 9)), V4 + bytes((127, 0, 0, 1))
    rig.engine.configure(our_mac=b"\x02" + bytes(5), addr4=GUEST, maps=[(outside, 0, here, 0)])
    rig.engine.limit_flows(2)
    states = [
        FlowState(
            (2, 1),
            (Side(outside, GUEST, port, 2000 + number), Side(here, here, 41000 + number, port)),
            *(0, 7, 8, 0x02, 1460, 0, 0, 0, 1000, 0, 1, 1, 1, 1, 1),
        )
        for number in range(8)
    ]
    rig.prepare(states)
    for number in range(len(states)):
        rig.mover.open_anew(number)
    rig.mover.commit()
    flows = rig.engine.tcp_flows(handshakes=True)
    assert sum(rig.engine.flow_socket(flow)[0] >= 0 for flow in flows) == 2
    assert "there are too few descriptors for it" in caplog.text


def test_a_port_behind_a_ping_comes_back_from_who_lingers(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """A guest without TCP: the pings are the first that comes, and the load begins with them."""

    async def run() -> None:
        ours = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        ours.bind(("", 0))
        port = ours.getsockname()[1]
        lingering = Linger([ours.detach()], lambda: None)
        await lingering.listen()
        remote = V4 + bytes((198, 51, 100, 1))

        def load() -> None:
            rig.mover.add_ping(Ping(GUEST, remote, 7, 8, 9))
            rig.mover.add_udp_port(UdpPort(0, GUEST, 5000, V4 + bytes(4), port, 0))
            rig.mover.add_udp_peers(0, [UdpPeer(GUEST, remote, remote, bytes(16), 9, 1, 1)])

        await asyncio.to_thread(load)
        assert [rig.engine.udp_port_state(one).local_port for one in rig.engine.udp_ports()] == [port]
        rig.mover.commit()
        lingering.close()

    asyncio.run(run())
    assert "leave from elsewhere" not in caplog.text


def test_what_a_socket_has_no_room_for_counts_as_what_is_to_be_sent(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream cannot have the target keep more than its share, on either way."""
    flow = rig.add()
    rig.mover.freeze()
    [dumped] = rig.dump(flow)
    assert isinstance(dumped, bytes)
    state = rig.record(flow)
    for fd in rig.mover.leave().connections:
        socket.socket(fileno=fd).close()
    large = bytes(60 << 20)
    filled = SOCKET.encode(SocketState._make(SOCKET.unpack(dumped))._replace(rcvq=len(large))) + large
    for share, lost in ((1.0, ""), (1e-9, "all queues together are too large for this host")):
        monkeypatch.setattr(mover, "QUEUES_SHARE", share)
        rig.mover.prepare(state, native=True)
        rig.mover.restore(0, filled)
        assert rig.mover._lost.get(0, "") == lost
        rig.mover.discard()


def test_what_a_source_has_seen_is_forgotten_with_the_rest(rig: Rig) -> None:
    before = rig.engine.observed()
    seen = Observed(GUEST, bytes(16), bytes((192, 0, 2, 11)), bytes((2, 0, 0, 0, 0, 1)))
    rig.mover.set_observed(seen)
    assert rig.engine.observed() == seen
    rig.mover.set_observed(NEVER_SEEN)
    assert rig.engine.observed() == before
    rig.mover.set_observed(seen)
    rig.mover.commit()
    other = seen._replace(addr4=bytes((192, 0, 2, 12)))
    rig.mover.set_observed(other)
    rig.mover.discard()
    rig.mover.set_observed(NEVER_SEEN)
    assert rig.engine.observed() == seen


@pytest.mark.parametrize("moves", [True, False])
def test_datagrams_beyond_the_limit_are_lost_only_with_the_guest(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, moves: bool
) -> None:
    monkeypatch.setattr(datagrams, "MAX_WAITING", 131072 + 2 * (20000 + DATAGRAM_COST))
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ours,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer,
    ):
        ours.bind(("127.0.0.1", 0))
        where = ours.getsockname()
        port = rig.engine.import_udp_port(UdpPort(0, GUEST, 5000, V4 + bytes(4), where[1], 0), ours.detach())
        rig.mover.freeze()
        for number in range(8):
            peer.sendto(b"%d" % number * 20000, where)
        for _ in range(2):  # the second finds those of the first, and no room for more
            [(_, _, found)] = rig.mover.udp()
            assert [one.data[:1] for one in found] == [b"0", b"1", b"2"]
        if moves:
            [fd] = rig.mover.leave().ports
            socket.socket(fileno=fd).close()
            assert caplog.messages == ["more datagrams waited than can move: those left at 1 UDP ports are lost"]
            return
        rig.mover.thaw()
        assert caplog.messages == []
        with rig.engine.parked():
            taken, all_taken = rig.engine.take_datagrams(port, 1 << 20, 0)
            assert [one.data[:1] for one in taken] == [b"%d" % number for number in range(3, 8)]
            assert all_taken
            assert [one.data[:1] for one in rig.engine.udp_waiting(port)] == [b"%d" % number for number in range(8)]


def leave_and_load(rig: Rig, count: int = 1, odd: int | None = None, unsent: bytes = b"", **values: int) -> list[int]:
    """Flows go, and come again, up to the commit; the socket of one with other values. Returns their indices."""
    flows = [rig.add() for _ in range(count)]
    rig.mover.freeze()
    records = b"".join(map(rig.record, flows))
    [dumped] = rig.dump(*flows)
    assert isinstance(dumped, bytes)
    for fd in rig.mover.leave().connections:
        socket.socket(fileno=fd).close()
    rig.mover.prepare(records, native=True)
    if odd is not None:
        begin, end = odd * SOCKET.size, (odd + 1) * SOCKET.size  # nothing is queued
        state = SocketState._make(SOCKET.unpack(dumped[begin:end]))
        values |= {"sndq": len(unsent), "notsent": len(unsent)}
        dumped = dumped[:begin] + SOCKET.encode(state._replace(**values)) + unsent + dumped[end:]
    rig.mover.restore(0, dumped)
    return rig.came()


@pytest.mark.parametrize("when", ["prepare", "commit"])
def test_without_another_thread_it_is_done_in_this_one(rig: Rig, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    rig.engine.start()
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "repair":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(rig.mover, "_local_moves", True)
    if when == "prepare":
        monkeypatch.setattr(threading.Thread, "start", refuse)
    [flow] = leave_and_load(rig)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    rig.mover.commit()
    assert rig.mover.settled
    rig.peers[0].sendall(b"here")
    sock = socket.socket(fileno=rig.engine.flow_socket(flow)[0])
    try:
        sock.settimeout(5)
        assert sock.recv(4, socket.MSG_PEEK) == b"here"
    finally:
        sock.detach()


@pytest.mark.parametrize("obeyed", [2, 3])
def test_a_helper_that_goes_away_in_the_second_batch_of_a_commit(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, obeyed: int
) -> None:
    """Messages of two sockets, two to a batch. What was answered goes on; all else is reset, and called lost."""
    caplog.set_level("INFO")
    rig.engine.start()
    monkeypatch.setattr(mover, "BATCH", 4)
    monkeypatch.setattr("godwit.repair.client.MAX_SOCKETS", 2)
    monkeypatch.delattr(rig.mover, "_set_mode")  # the helper is one that speaks the protocol
    messages: list[int] = []

    def act(number: int, mode: Repair, fds: list[int]) -> bytes | None:
        if mode == Repair.ON:
            return obey(number, mode, fds)
        messages.append(len(fds))
        if len(messages) <= obeyed:
            return obey(number, mode, fds)
        obey(number, mode, fds[:1])
        return None

    with contextlib.closing(FakeHelper(rig.listener.path, act)):
        flows = leave_and_load(rig, 10)
        rig.mover.commit()
    assert messages == [2] * (obeyed + 1)
    assert rig.mover.settled
    for knock in rig.soon:
        knock()
    going, lost = 2 * obeyed, 10 - 2 * obeyed
    assert f"{going} connections go on here, {lost} were lost" in caplog.messages
    assert f"{lost} lost, 127.0.0.1 port " in caplog.text
    assert [rig.engine.flow_socket(flow)[0] >= 0 for flow in flows] == [True] * going + [False] * lost
    with rig.engine.parked():
        assert not handover.is_held(rig.engine)
    for peer in rig.peers[going:]:
        assert is_reset(peer)
    for number, peer in enumerate(rig.peers[:going]):
        peer.sendall(b"%d" % number)
        with socket.socket(fileno=os.dup(rig.engine.flow_socket(flows[number])[0])) as sock:
            assert not in_repair(sock.fileno())
            sock.settimeout(5)
            assert sock.recv(4, socket.MSG_PEEK) == b"%d" % number
            sock.send(b"back")
            peer.settimeout(5)
            assert peer.recv(4) == b"back"


def test_an_accident_beside_a_load_leaves_nothing_behind(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rig.engine.start()

    def fail(_fds: Sequence[int], _mode: Repair) -> None:
        raise MemoryError

    flow = rig.add()
    state = rig.engine.flow_state(flow)
    rig.engine.forget_flow(flow)
    monkeypatch.setattr(rig.mover, "_set_mode", fail)
    [came] = rig.prepare([state])
    rig.mover.discard()
    assert rig.engine.flow_generation(came) is None
    assert rig.engine.tcp_flows(handshakes=True) == []
    assert rig.mover.settled
    assert "setting repair mode has failed" in caplog.text


def test_of_many_flows_those_that_cannot_move_stay_alone(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sockets are looked at 256 at a time: each keeps its own bytes."""
    count, bad = 600, {0, 1, 254, 255, 256, 300, 511, 512, 599}
    engine = Engine(1024)
    rig.mover = Mover(engine, rig.listener, 0, rig.schedule)
    rig.mover.helper_expected = True
    monkeypatch.setattr(rig.mover, "_set_mode", rig.set_mode)
    monkeypatch.setattr(rig.mover, "_local_moves", True)
    rig.engine.close()
    rig.engine = engine
    engine.start()
    flows = [rig.add() for _ in range(count)]
    for number, peer in enumerate(rig.peers):
        if number in bad:
            peer.send(b"x", socket.MSG_OOB)  # urgent bytes do not move
        else:
            peer.send(b"%d" % number)
    rig.mover.freeze()
    records = rig.mover.flow_records(flows, native=True)
    parts = list(sound_sockets(rig.mover, flows))
    refused = [sum(n for n, _ in parts[:at]) for at, (_, part) in enumerate(parts) if isinstance(part, str)]
    assert set(refused) == bad
    for fd in rig.mover.leave()[0]:
        socket.socket(fileno=fd).close()
    rig.mover.prepare(records, native=True)
    at = 0
    for n, part in parts:
        if isinstance(part, str):
            rig.mover.mark_lost(at, part)
        else:
            rig.mover.restore(at, part)
        at += n
    came = rig.came()  # but for those that are here still
    rig.mover.commit()
    for number, flow in zip([number for number in range(count) if number not in bad], came, strict=True):
        sock = socket.socket(fileno=engine.flow_socket(flow)[0])
        try:
            assert sock.recv(16, socket.MSG_PEEK) == b"%d" % number
        finally:
            sock.detach()
