# SPDX-License-Identifier: GPL-2.0-or-later
"""Sockets that are frozen, saved and restored, with real peers in other network namespaces.

The behaviour of the kernel that godwit relies on, and the test here that shows
it, are listed in ``docs/platform/``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import random
import select
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from godwit.dataplane import Engine, FlowState, Side, SocketState, handover, moving, sockstate
from godwit.lab.netns import Host, Network
from godwit.net import native
from godwit.net.records import SOCKET

from .arrivals import arrive

TCP_REPAIR = 19  # linux/tcp.h
SO_PEEK_OFF = 42
OFF_NO_WP, OFF, ON = -1, 0, 1
IP_MINTTL, IPV6_MINHOPCOUNT = 21, 73  # linux/in.h, linux/in6.h

# Of a flow's events (docs/stream.md): established; and FIN from the guest, FIN to the host.
FLOW_ESTABLISHED, FLOW_CLOSED = 0x04, 0x04 | 0x20 | 0x10

# Of tcpi_options (docs/stream-v2.md): `seq_snd` is the number of the first byte, although there is a FIN of ours.
FIRST_BYTE = 0x80

# Of TCP_INFO (the kernel's tcp_states.h).
ESTABLISHED, FIN_WAIT1, FIN_WAIT2, TIME_WAIT, CLOSE, CLOSE_WAIT, LAST_ACK, CLOSING = 1, 4, 5, 6, 7, 8, 9, 11

_ports = itertools.count(5000)


def address(text: str) -> bytes:
    """16 bytes, IPv4 as v4-mapped."""
    if ":" in text:
        return socket.inet_pton(socket.AF_INET6, text)
    return bytes(10) + b"\xff\xff" + socket.inet_pton(socket.AF_INET, text)


def repair(sock: socket.socket, mode: int) -> None:
    """What the repair helper does."""
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, mode)


def tcp_state(sock: socket.socket) -> int:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[0]


def options(sock: socket.socket) -> tuple[int, ...]:
    """What was negotiated, and the size of segments that follows: of struct tcp_info."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 20)
    return struct.unpack_from("=5xBBx8xI", info)


def unacknowledged(sock: socket.socket) -> int:
    """Bytes written that the other end has not acknowledged (SIOCOUTQ, a FIN counted)."""
    return int(struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0])


def until_state(sock: socket.socket, *states: int) -> None:
    deadline = time.monotonic() + 10
    while tcp_state(sock) not in states:
        assert time.monotonic() < deadline, f"in state {tcp_state(sock)}, not one of {states}"
        time.sleep(0.005)


def receive(sock: socket.socket, size: int, timeout: float = 60.0, *, less: bool = False) -> bytes:
    """Exactly ``size`` bytes, whatever else there is; fewer only at the end, or if ``less`` is enough by then."""
    data = bytearray()
    deadline = time.monotonic() + timeout
    while len(data) < size:
        if not select.select([sock], [], [], max(0, deadline - time.monotonic()))[0]:
            assert less, f"{len(data)} of {size} bytes"
            break
        piece = sock.recv(size - len(data))
        if not piece:
            break
        data += piece
    return bytes(data)


def fill(sock: socket.socket) -> bytes:
    """Write to a socket until it takes no more for a while; what it took."""
    data = bytearray()
    while select.select([], [sock], [], 0.3)[1]:
        piece = os.urandom(65536)
        with contextlib.suppress(BlockingIOError):
            data += piece[: sock.send(piece)]
    return bytes(data)


class Sender(threading.Thread):
    """Writes all of ``data``, in a thread, when ``after`` has come back."""

    def __init__(self, sock: socket.socket, data: bytes, *, after: Callable[[], None] = lambda: None) -> None:
        super().__init__(daemon=True)
        self.sock = sock
        self.data = data
        self.after = after
        self.start()

    def run(self) -> None:
        self.after()
        view = memoryview(self.data)
        while view:
            if not select.select([], [self.sock], [], 10)[1]:
                return
            try:
                view = view[self.sock.send(view) :]
            except BlockingIOError:
                continue
            except OSError:
                return


class Sniffer:
    """The TCP segments that pass a host's interface, from now on."""

    def __init__(self, host: Host) -> None:
        with host.enter():
            self.sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))  # ETH_P_ALL
            self.sock.bind((host.interface, 0))
        self.sock.setblocking(False)

    def sent_from(self, port: int) -> list[int]:
        """The payload sizes of what left the interface from a port."""
        sizes: list[int] = []
        while True:
            try:
                frame, (_, _, kind, _, _) = self.sock.recvfrom(65536)
            except BlockingIOError:
                return sizes
            at = 54 if frame[12:14] == b"\x86\xdd" else 34
            protocol = frame[20] if at == 54 else frame[23]
            if kind == 4 and protocol == socket.IPPROTO_TCP and struct.unpack_from("!H", frame, at)[0] == port:
                sizes.append(len(frame) - at - (frame[at + 12] >> 4) * 4)


class Saved(NamedTuple):
    """A connection as it is in a stream."""

    record: bytes  # of its flow, in the native layout
    state: SocketState
    sndq: bytes
    rcvq: bytes

    def changed(self, **fields: int) -> Saved:
        """With other values in the state."""
        return self._replace(state=self.state._replace(**fields))

    def socket(self) -> bytes:
        """The record of the socket with its queues."""
        return SOCKET.pack(self.state) + self.sndq + self.rcvq


class Source:
    """A connection that is to move, as the one flow of a data plane. The test has its socket as well."""

    def __init__(self, sock: socket.socket, *, closed: bool = False) -> None:
        self.engine = Engine(16)
        self.flow = arrive(self.engine, flow_between(sock.getsockname(), sock.getpeername(), closed), sock).flow(0)

    def freeze(self) -> None:
        frozen, failed = moving.freeze(self.engine)
        assert (list(frozen), failed) == ([self.flow], [])

    def dump(self) -> Saved:
        return dumped(self.engine, self.flow)


class Target:
    """A connection that has come, as the one flow of a data plane."""

    def __init__(self, host: Host, record: bytes) -> None:
        self.engine = Engine(16)
        self.arrivals = moving.Arrivals(self.engine, 0, 1 << 30)
        with host.enter():
            assert self.arrivals.prepare(record, True) == []
        [self.number] = self.numbers = self.arrivals.with_socket(0)
        [fd] = self.arrivals.sockets(self.numbers)
        self.flow = self.arrivals.flow(self.number)
        self.sock = socket.socket(fileno=os.dup(fd))
        self.sock.setblocking(False)

    def enter_repair(self) -> None:
        repair(self.sock, ON)
        self.arrivals.enter_repair([self.number])

    def restore(self, saved: Saved) -> None:
        """``OSError``: the kernel refused; its text says where."""
        for _, _, _, error, step in self.arrivals.restore(0, saved.socket()):
            raise OSError(error, step)

    def carried(self) -> tuple[bytes, bytes]:
        """What found no room in the kernel: of the receive queue, and of what is to be sent."""
        with self.engine.parked():
            [(_, _, to_guest, to_sock)] = handover.tcp(self.engine)
        return to_guest, to_sock

    def commit(self) -> None:
        """What a target does then. Where there was no room for all, the data plane runs, and sends the rest."""
        assert self.arrivals.complete(self.numbers) == []
        repair(self.sock, OFF)
        assert self.arrivals.finish(self.numbers) == []
        if self.carried()[1]:
            self.engine.start()

    def until_sent(self) -> None:
        """Until there was room for all. From here on the socket is the test's alone."""
        deadline = time.monotonic() + 60
        while self.carried()[1]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        self.engine.close()

    def close(self) -> None:
        self.engine.close()
        self.arrivals.lose(self.number)  # its end is gone, too
        self.sock.close()


def flow_between(local: tuple[Any, ...], remote: tuple[Any, ...], closed: bool = False) -> FlowState:
    """A flow whose socket has these ends, which the guest has ``closed``. To the guest it is the same."""
    ours = Side(address(local[0]), address(remote[0]), local[1], remote[1])
    guest = Side(ours.end_addr, ours.our_addr, ours.end_port, ours.our_port)
    events = FLOW_CLOSED if closed else FLOW_ESTABLISHED
    return FlowState((2, 1), (guest, ours), 0, 7, 7, events, 1460, 0, 0, 0, 1000, 1000, 1, 1, 1, 1, 1)


def dumped(engine: Engine, flow: int) -> Saved:
    """What a source writes of a flow. ``OSError``: of this one it cannot."""
    at, data, error = moving.dump(engine, [flow], 0, 1)
    if error:
        assert (at, data) == (0, b"")
        raise OSError(error, "reading a socket's state")
    assert at == 1
    state = SocketState._make(SOCKET.unpack(data[: SOCKET.size]))
    middle = SOCKET.size + state.sndq
    return Saved(moving.flow_records(engine, [flow], True), state, data[SOCKET.size : middle], data[middle:])


class Connections:
    """Makes connections between host ``a`` and the server, and moves them to host ``b``."""

    def __init__(self, net: Network) -> None:
        self.net = net
        self._open: list[socket.socket] = []
        self._targets: list[Target] = []

    def keep(self, sock: socket.socket) -> socket.socket:
        sock.setblocking(False)
        self._open.append(sock)
        return sock

    def close(self) -> None:
        for target in self._targets:
            target.close()
        for sock in self._open:
            sock.close()

    def sniff(self, host: Host) -> Sniffer:
        sniffer = Sniffer(host)
        self.keep(sniffer.sock)
        return sniffer

    def open(self, v6: bool) -> tuple[socket.socket, socket.socket]:
        """A connection: its end on host a, its end on the server."""
        where = (self.net.server.address(v6), next(_ports))
        with self.net.server.enter():
            listener = socket.create_server(where, family=socket.AF_INET6 if v6 else socket.AF_INET)
        with listener, self.net.a.enter():
            ours = socket.socket(listener.family, socket.SOCK_STREAM)
            ours.connect(where)
            peer, _ = listener.accept()
        return self.keep(ours), self.keep(peer)

    def save(self, sock: socket.socket, *, closed: bool = False) -> Saved:
        """What a source does. ``closed``: the guest has closed, and its FIN has gone to the socket."""
        source = Source(sock, closed=closed)
        source.freeze()
        repair(sock, ON)
        return source.dump()

    def create(self, host: Host, saved: Saved) -> Target:
        """A socket, frozen from the start, that is to be restored."""
        self._targets.append(Target(host, saved.record))
        self._targets[-1].enter_repair()
        return self._targets[-1]

    def load(self, host: Host, saved: Saved) -> Target:
        """What a target does before the commit."""
        target = self.create(host, saved)
        target.restore(saved)
        return target

    def move(self, sock: socket.socket) -> Target:
        """A whole migration to host b; the source's socket stays open."""
        saved = self.save(sock)
        moved = self.load(self.net.b, saved)
        assert moved.carried() == (b"", b"")
        self.net.switch("b")
        moved.commit()
        return moved


@pytest.fixture(scope="session")
def network() -> Iterator[Network]:
    with Network() as net:
        yield net


@pytest.fixture
def connections(network: Network) -> Iterator[Connections]:
    network.switch("a")
    made = Connections(network)
    yield made
    made.close()


V4_AND_V6 = pytest.mark.parametrize("v6", [False, True], ids=["IPv4", "IPv6"])

AS_NOBODY = """
import os, sys
from godwit.dataplane import Engine, moving, sockstate
word, fd, v6, record = sys.argv[1], int(sys.argv[2]), bool(int(sys.argv[3])), bytes.fromhex(sys.argv[4])
engine = Engine(16)
moving.Arrivals(engine, 0, 0).prepare(record, True)
os.dup2(fd, engine.flow_socket(0)[0])
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
assert os.stat("/proc/self").st_uid == 65534
if word == "freeze":
    assert moving.freeze(engine)[1] == []
else:
    sockstate.thaw(fd, v6)
"""


def as_nobody(word: str, sock: socket.socket, v6: bool) -> None:
    """``moving.freeze`` or ``sockstate.thaw``, without any privilege."""
    record = native.FLOW.encode(flow_between(sock.getsockname(), sock.getpeername()))
    subprocess.run(
        [sys.executable, "-c", AS_NOBODY, word, str(sock.fileno()), str(int(v6)), record.hex()],
        pass_fds=[sock.fileno()],
        check=True,
        timeout=60,
    )


def freeze(sock: socket.socket, v6: bool) -> None:
    """Have an end acknowledge nothing, until ``sockstate.thaw``."""
    if v6:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_MINHOPCOUNT, 255)
    else:
        sock.setsockopt(socket.IPPROTO_IP, IP_MINTTL, 255)


# ---- the TTL freeze


@V4_AND_V6
def test_a_frozen_socket_takes_and_acknowledges_nothing(connections: Connections, v6: bool) -> None:
    ours, peer = connections.open(v6)
    peer.send(b"before")
    assert receive(ours, 6) == b"before"
    as_nobody("freeze", ours, v6)
    sniffer = connections.sniff(connections.net.a)
    data = random.randbytes(80000)
    sender = Sender(peer, data)
    time.sleep(0.5)
    assert sniffer.sent_from(ours.getsockname()[1]) == [], "a frozen socket has said something"
    with pytest.raises(BlockingIOError):
        ours.recv(1)
    assert unacknowledged(peer) > 10000, "it has acknowledged something"
    as_nobody("thaw", ours, v6)
    assert receive(ours, len(data)) == data
    sender.join()


@V4_AND_V6
def test_a_frozen_socket_survives_a_reset_and_does_not_see_a_fin(connections: Connections, v6: bool) -> None:
    ours, peer = connections.open(v6)
    Source(ours).freeze()
    peer.shutdown(socket.SHUT_WR)
    time.sleep(0.1)
    assert tcp_state(ours) == ESTABLISHED
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()
    time.sleep(0.1)
    assert tcp_state(ours) == ESTABLISHED


@V4_AND_V6
def test_a_frozen_listener_answers_no_syn(connections: Connections, v6: bool) -> None:
    host, server = connections.net.a, connections.net.server
    where = (host.address(v6), next(_ports))
    with host.enter():
        listener = socket.create_server(where, family=socket.AF_INET6 if v6 else socket.AF_INET)
    connections.keep(listener)
    sockstate.freeze_listener(listener.fileno())
    with server.enter():
        client = connections.keep(socket.socket(listener.family))
    assert client.connect_ex(where) == errno.EINPROGRESS
    assert not select.select([], [client], [], 0.5)[1]
    sockstate.thaw_listener(listener.fileno())
    assert select.select([], [client], [], 5)[1], "the SYN was not sent again"
    assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0


# ---- a connection that is no more


@V4_AND_V6
@pytest.mark.parametrize("listens", [False, True])
def test_a_knock_has_the_peer_of_a_lost_connection_reset(connections: Connections, v6: bool, listens: bool) -> None:
    """Nothing else comes of it, also where the peer's port takes connections."""
    ours, peer = connections.open(v6)
    local, remote = ours.getsockname(), ours.getpeername()
    if listens:
        with connections.net.server.enter():
            listener = socket.create_server(remote[:2], family=ours.family)
        connections.keep(listener)
    repair(ours, ON)
    ours.close()  # in repair mode this says nothing
    time.sleep(0.05)
    assert tcp_state(peer) == ESTABLISHED
    with connections.net.a.enter():
        sockstate.knock(address(local[0]), local[1], address(remote[0]), remote[1], 0)
    until_state(peer, CLOSE)
    with pytest.raises(ConnectionResetError):
        peer.recv(1)
    if listens:
        assert not select.select([listener], [], [], 0.3)[0]


@V4_AND_V6
def test_a_knock_from_where_something_is_does_nothing(connections: Connections, v6: bool) -> None:
    ours, peer = connections.open(v6)
    local, remote = ours.getsockname(), ours.getpeername()
    with connections.net.a.enter():
        nobodys = "2001:db8:ffff::1" if v6 else "203.0.113.1"
        for own in (local, (nobodys, 4000)):
            with pytest.raises(OSError):
                sockstate.knock(address(own[0]), own[1], address(remote[0]), remote[1], 0)
    ours.send(b"alive")
    assert receive(peer, 5) == b"alive"


# ---- source


@V4_AND_V6
@pytest.mark.parametrize("mode", [OFF, OFF_NO_WP])
def test_a_source_goes_on_after_a_dump(connections: Connections, v6: bool, mode: int) -> None:
    """The roll-back: nothing lost, nothing changed, while the peer sends all the time."""
    ours, peer = connections.open(v6)
    down = random.randbytes(3_000_000)
    senders = [Sender(peer, down)]
    up = fill(ours)  # as much as the queues take while nobody reads
    written = len(up)
    up += random.randbytes(2_000_000)
    got = receive(ours, 100_000)
    source = Source(ours)
    source.freeze()
    repair(ours, ON)
    first = source.dump()
    time.sleep(0.3)
    second = source.dump()
    assert (second.sndq, second.rcvq) == (first.sndq, first.rcvq), "a dump changed the queues"
    # A retransmission, which repair mode does not keep back, may have announced a window anew.
    assert second.state._replace(timestamp=0, rcv_wnd=0, rcv_wup=0) == first.state._replace(
        timestamp=0, rcv_wnd=0, rcv_wup=0
    )
    assert down.startswith(got + first.rcvq)
    sockstate.thaw(ours.fileno(), v6)
    repair(ours, mode)
    sockstate.thaw(ours.fileno(), v6)
    senders.append(Sender(ours, up[written:]))
    # Both at once: neither end stops reading.
    result: list[bytes] = []
    reader = threading.Thread(target=lambda: result.append(receive(peer, len(up))))
    reader.start()
    assert got + receive(ours, len(down) - len(got)) == down
    reader.join()
    assert result == [up]


@V4_AND_V6
@pytest.mark.parametrize("when", [0.01, 0.3], ids=["early", "late"])
def test_what_was_not_sent_at_a_dump_is_not_sent_after_it(connections: Connections, v6: bool, when: float) -> None:
    """What a device was too busy for, it asks for as soon as it can; and what is last is said twice, or more is."""
    ours, peer = connections.open(v6)
    host = connections.net.a
    host.run("tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", "4mbit", "burst", "5k", "latency", "1s")
    try:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 400_000)
        written = ours.send(bytes(400_000))
        time.sleep(when)
        source = Source(ours)
        source.freeze()
        repair(ours, ON)
        saved = source.dump()
        assert saved.state.notsent > 0
        came = len(receive(peer, written, 1.0, less=True))
        assert came <= written - saved.state.notsent
        again = source.dump()
        assert (again.state.seq_snd, again.sndq) == (saved.state.seq_snd, saved.sndq)
    finally:
        host.run("tc", "qdisc", "del", "dev", "eth0", "root")
    # And if the migration is called off, all of it comes.
    sockstate.thaw(ours.fileno(), v6)
    repair(ours, OFF)
    assert len(receive(peer, written - came)) == written - came


@V4_AND_V6
def test_repair_mode_alone_does_not_keep_data_out(connections: Connections, v6: bool) -> None:
    """The reason for the freeze."""
    ours, peer = connections.open(v6)
    source = Source(ours)
    repair(ours, ON)
    before = source.dump()
    peer.send(b"x" * 10_000)
    time.sleep(0.2)
    assert unacknowledged(peer) == 0
    after = source.dump()
    assert (len(before.rcvq), after.rcvq) == (0, b"x" * 10_000)


def test_a_dump_does_not_depend_on_the_peek_offset(connections: Connections) -> None:
    ours, peer = connections.open(False)
    ours.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)
    peer.send(b"0123456789")
    assert select.select([ours], [], [], 5)[0]
    assert ours.recv(4, socket.MSG_PEEK) == b"0123"
    assert connections.save(ours).rcvq == b"0123456789"


@pytest.mark.parametrize(("sent", "held", "arrived"), list(itertools.product((b"", b"s"), (b"", b"h"), (b"", b"a"))))
def test_a_dump_finds_every_byte(connections: Connections, sent: bytes, held: bytes, arrived: bytes) -> None:
    """Of a connection that says it is idle the kernel is not asked for the lengths of its queues."""
    ours, peer = connections.open(False)
    peer.send(arrived)
    assert bool(select.select([ours], [], [], 5 if arrived else 0)[0]) == bool(arrived)
    freeze(peer, False)  # nothing is acknowledged from here on
    ours.send(sent)
    ours.send(held, socket.MSG_MORE)  # which the kernel keeps back for a while
    saved = connections.save(ours)
    assert (saved.sndq, saved.rcvq) == (sent + held, arrived)


def test_a_connection_with_an_urgent_byte_cannot_move(connections: Connections) -> None:
    ours, peer = connections.open(False)
    peer.send(b"abc")
    peer.send(b"!", socket.MSG_OOB)
    peer.send(b"def")
    time.sleep(0.1)
    with pytest.raises(OSError, match="reading a socket's state") as caught:
        connections.save(ours)
    assert caught.value.errno == errno.EINVAL


def test_only_connections_can_be_dumped(connections: Connections) -> None:
    target = connections.create(connections.net.a, made_up(connections))
    with pytest.raises(OSError, match="reading a socket's state") as caught:
        dumped(target.engine, target.flow)
    assert caught.value.errno == errno.EINVAL


def test_a_dump_needs_repair_mode(connections: Connections) -> None:
    ours, _ = connections.open(False)
    with pytest.raises(OSError, match="reading a socket's state") as caught:
        Source(ours).dump()
    assert caught.value.errno == errno.EPERM


# ---- there and back


@V4_AND_V6
@pytest.mark.parametrize("late", [0.0, 0.7])
def test_full_queues_move(connections: Connections, v6: bool, late: float) -> None:
    """Neither end reads until the connection has moved; the network switches at once, or ``late``."""
    net = connections.net
    ours, peer = connections.open(v6)
    up, down = fill(ours), fill(peer)
    saved = connections.save(ours)
    assert saved.state.sndq == len(saved.sndq) > 10_000
    assert saved.state.rcvq == len(saved.rcvq) > 10_000
    moved = connections.load(net.b, saved)
    assert moved.carried() == (b"", b"")
    if not late:
        net.switch("b")
    moved.commit()
    assert options(moved.sock) == options(ours)
    time.sleep(late)
    net.switch("b")
    more = random.randbytes(200_000)
    result: list[bytes] = []
    reader = threading.Thread(target=lambda: result.append(receive(peer, len(up) + len(more))))
    reader.start()
    Sender(moved.sock, more, after=moved.until_sent)
    Sender(peer, more)
    assert receive(moved.sock, len(down) + len(more)) == down + more
    reader.join()
    assert result == [up + more]


@V4_AND_V6
def test_a_peer_that_sends_all_the_time(connections: Connections, v6: bool) -> None:
    """What reaches the source after the dump is acknowledged by nobody, and comes again."""
    net = connections.net
    ours, peer = connections.open(v6)
    data = random.randbytes(8_000_000)
    Sender(peer, data)
    got = receive(ours, 1_000_000)
    moved = connections.load(net.b, connections.save(ours))
    time.sleep(0.3)
    net.switch("b")
    moved.commit()
    assert got + receive(moved.sock, len(data) - len(got)) == data


@V4_AND_V6
def test_a_restored_socket_is_silent_until_the_commit(connections: Connections, v6: bool) -> None:
    net = connections.net
    ours, peer = connections.open(v6)
    net.switch(None)
    up, down = random.randbytes(20_000), random.randbytes(20_000)
    ours.send(up)
    peer.send(down)
    saved = connections.save(ours)
    assert 0 < saved.state.notsent < len(up), "to be of use some bytes are on the way and some are not"
    port = ours.getsockname()[1]
    sniffer = connections.sniff(net.b)
    moved = connections.load(net.b, saved)
    net.switch("b")
    # Longer than until the first retransmission, there and here: repair mode keeps none back.
    time.sleep(1.2)
    assert sniffer.sent_from(port) == []
    assert tcp_state(moved.sock) == ESTABLISHED
    moved.commit()
    assert 0 in sniffer.sent_from(port), "no window probe"
    assert receive(peer, len(up)) == up
    assert receive(moved.sock, len(down)) == down


def test_a_restored_socket_that_is_closed_in_repair_mode_says_nothing(connections: Connections) -> None:
    net = connections.net
    ours, peer = connections.open(False)
    ours.send(b"x" * 1000)
    saved = connections.save(ours)
    net.switch("b")
    sniffer = connections.sniff(net.b)
    port = ours.getsockname()[1]
    connections.load(net.b, saved).close()
    time.sleep(0.2)
    assert sniffer.sent_from(port) == []
    assert tcp_state(peer) == ESTABLISHED


# ---- half-closed connections. X is what goes up, Y what comes down.

X, Y = b"X" * 3000, b"Y" * 5000
Made = tuple[bytes, bytes]  # what the peer, and what our side, has still to read


def established(ours: socket.socket, peer: socket.socket, v6: bool) -> Made:
    ours.send(X)
    peer.send(Y)
    return X, Y


def close_wait(ours: socket.socket, peer: socket.socket, v6: bool) -> Made:
    peer.send(Y)
    peer.shutdown(socket.SHUT_WR)
    until_state(ours, CLOSE_WAIT)
    ours.send(X)
    return X, Y


def close_wait_read(ours: socket.socket, peer: socket.socket, v6: bool) -> Made:
    peer.shutdown(socket.SHUT_WR)
    until_state(ours, CLOSE_WAIT)
    assert ours.recv(1) == b""
    return b"", b""


def fin_wait2(ours: socket.socket, peer: socket.socket, v6: bool) -> Made:
    ours.send(X)
    ours.shutdown(socket.SHUT_WR)
    until_state(ours, FIN_WAIT2)
    peer.send(Y)
    return X, Y


# The peer is frozen: it acknowledges no more, and takes our FIN when it thaws.


def fin_wait1(ours: socket.socket, peer: socket.socket, v6: bool) -> Made:
    freeze(peer, v6)
    ours.send(X)
    ours.shutdown(socket.SHUT_WR)
    return X, b""


def fin_wait1_bare(ours: socket.socket, peer: socket.socket, v6: bool) -> Made:
    freeze(peer, v6)
    ours.shutdown(socket.SHUT_WR)
    return b"", b""


def fin_wait1_unsent(ours: socket.socket, peer: socket.socket, v6: bool) -> Made:
    data = fill(ours)
    ours.shutdown(socket.SHUT_WR)
    return data, b""


def last_ack(ours: socket.socket, peer: socket.socket, v6: bool) -> Made:
    close_wait(ours, peer, v6)
    freeze(peer, v6)
    ours.shutdown(socket.SHUT_WR)
    return X, Y


def closing(ours: socket.socket, peer: socket.socket, v6: bool) -> Made:
    fin_wait1(ours, peer, v6)
    peer.send(Y)
    peer.shutdown(socket.SHUT_WR)
    until_state(ours, CLOSING)
    return X, Y


WAYS: list[tuple[Callable[[socket.socket, socket.socket, bool], Made], int]] = [
    (established, ESTABLISHED),
    (close_wait, CLOSE_WAIT),
    (close_wait_read, CLOSE_WAIT),
    (fin_wait1, FIN_WAIT1),
    (fin_wait1_bare, FIN_WAIT1),
    (fin_wait1_unsent, FIN_WAIT1),
    (fin_wait2, FIN_WAIT2),
    (last_ack, LAST_ACK),
    (closing, CLOSING),
]


def as_passt(state: SocketState) -> SocketState:
    """The state in passt's words: a FIN of ours is counted in the number of the first byte."""
    if not state.tcpi_options & FIRST_BYTE:
        return state
    return state._replace(seq_snd=(state.seq_snd + 1) & 0xFFFFFFFF, tcpi_options=state.tcpi_options & ~FIRST_BYTE)


@V4_AND_V6
@pytest.mark.parametrize("by_passt", [False, True], ids=["godwit", "passt"])
@pytest.mark.parametrize(("make", "state"), WAYS, ids=[make.__name__ for make, _ in WAYS])
def test_each_state_moves_and_ends_well(
    connections: Connections,
    v6: bool,
    by_passt: bool,
    make: Callable[[socket.socket, socket.socket, bool], Made],
    state: int,
) -> None:
    net = connections.net
    ours, peer = connections.open(v6)
    for_peer, for_us = make(ours, peer, v6)
    time.sleep(0.05)
    we_closed = state in (FIN_WAIT1, FIN_WAIT2, LAST_ACK, CLOSING)
    saved = connections.save(ours, closed=we_closed)
    assert saved.state.tcpi_state == state
    if by_passt:
        saved = saved._replace(state=as_passt(saved.state))
    target = connections.load(net.b, saved)
    net.switch("b")
    sockstate.thaw(peer.fileno(), v6)
    target.commit()
    moved = target.sock

    peer_closed = state in (CLOSE_WAIT, LAST_ACK, CLOSING)
    # Up: what was under way, then more if we may, then the end.
    if not we_closed:
        moved.send(X)
        moved.shutdown(socket.SHUT_WR)
        for_peer += X
    assert receive(peer, len(for_peer) + 1) == for_peer
    target.until_sent()
    # Down: the same. That the peer has closed is not in the new socket: the state says so.
    if not peer_closed:
        peer.send(Y)
        peer.shutdown(socket.SHUT_WR)
        assert receive(moved, len(for_us) + len(Y) + 1) == for_us + Y
    else:
        assert receive(moved, len(for_us)) == for_us
    # Each end knows that the other has all.
    until_state(peer, TIME_WAIT, CLOSE)
    until_state(moved, FIN_WAIT2, TIME_WAIT, CLOSE)
    assert peer.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0


# ---- targets


def made_up(
    connections: Connections, sndq: bytes = b"", rcvq: bytes = b"", local: tuple[str, int] | None = None
) -> Saved:
    """A connection that never was, from host b to the server; all of its send queue was sent."""
    net = connections.net
    ends = local or (net.b.addr4, next(_ports)), (net.server.addr4, next(_ports))
    state = SocketState(
        seq_snd=1000,
        seq_rcv=5000,
        sndq=len(sndq),
        notsent=0,
        rcvq=len(rcvq),
        mss=1460,
        timestamp=77,
        snd_wl1=4999,
        snd_wnd=8 << 20,
        max_window=8 << 20,
        rcv_wnd=65536,
        rcv_wup=5000 + len(rcvq),
        snd_ws=10,
        rcv_ws=10,
        tcpi_state=ESTABLISHED,
        tcpi_options=7,
    )
    return Saved(native.FLOW.encode(flow_between(*ends)), state, sndq, rcvq)


def test_queues_of_megabytes_move(connections: Connections) -> None:
    """All of the send queue was sent: it cannot wait for room."""
    net = connections.net
    saved = made_up(connections, sndq=random.randbytes(1_700_000), rcvq=random.randbytes(5_000_000))
    moved = connections.load(net.b, saved)
    assert moved.carried() == (b"", b"")
    # The other end of it, which has got none of that and has sent all of this.
    other = saved._replace(
        record=native.FLOW.encode(flow_between(moved.sock.getpeername(), moved.sock.getsockname())),
        sndq=b"",
        rcvq=b"",
        state=saved.state._replace(
            seq_snd=saved.state.seq_rcv + len(saved.rcvq),
            seq_rcv=saved.state.seq_snd,
            sndq=0,
            rcvq=0,
            rcv_wnd=8 << 20,
            rcv_wup=saved.state.seq_snd,
        ),
    )
    peer = connections.load(net.server, other)
    net.switch("b")
    peer.commit()
    moved.commit()
    assert receive(moved.sock, len(saved.rcvq)) == saved.rcvq
    assert receive(peer.sock, len(saved.sndq)) == saved.sndq


def test_a_queue_beyond_all_limits_is_refused_or_left_out(connections: Connections) -> None:
    saved = made_up(connections, sndq=bytes(64 << 20)).changed(snd_wnd=65 << 20, max_window=65 << 20)
    moved = connections.load(connections.net.b, saved)
    assert moved.arrivals.complete(moved.numbers) == [(moved.number, errno.ENOBUFS)]
    saved = made_up(connections, rcvq=random.randbytes(64 << 20))
    moved = connections.load(connections.net.b, saved)
    left_out, _ = moved.carried()
    assert 0 < len(left_out) < len(saved.rcvq)
    assert dumped(moved.engine, moved.flow).rcvq == saved.rcvq  # should it move on before the guest has read that
    repair(moved.sock, OFF_NO_WP)
    assert left_out + receive(moved.sock, len(saved.rcvq) - len(left_out)) == saved.rcvq


def test_the_port_of_a_moved_connection_can_be_listened_on(connections: Connections) -> None:
    """As a port forward is, there and, after a roll-back, here: before, and again after a restart."""
    net = connections.net
    ours, peer = connections.open(False)
    host, port = ours.getsockname()

    def listener() -> socket.socket:
        return socket.create_server((host, port))

    with net.b.enter(), listener():
        moved = connections.move(ours)
    with net.b.enter(), listener():
        moved.sock.send(b"!")
        assert receive(peer, 1) == b"!"
    repair(ours, OFF_NO_WP)
    sockstate.thaw(ours.fileno(), False)
    with net.a.enter(), listener():
        pass


def test_two_connections_to_one_port(connections: Connections) -> None:
    net = connections.net
    local = (net.b.addr4, next(_ports))
    for _ in range(2):
        saved = made_up(connections, local=local)
        moved = connections.load(net.b, saved)
        repair(moved.sock, OFF_NO_WP)
        assert moved.sock.getsockname() == local
    with pytest.raises(OSError, match="connecting in repair mode") as caught:
        connections.load(net.b, saved)
    assert caught.value.errno == errno.EADDRNOTAVAIL


def test_the_address_must_be_this_hosts(connections: Connections) -> None:
    saved = made_up(connections, local=("192.0.2.99", 999))
    with pytest.raises(OSError, match="binding") as caught:
        connections.load(connections.net.b, saved)
    assert caught.value.errno == errno.EADDRNOTAVAIL


@pytest.mark.parametrize(
    "fields",
    [
        {"snd_wnd": 1 << 20, "max_window": 1 << 10},
        {"rcv_wup": 5001},
        {"rcv_wnd": 0xFFFFFFFF},
        {"snd_wl1": 5000 + 65536 + 1},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_a_state_that_cannot_be_is_refused(connections: Connections, fields: dict[str, int]) -> None:
    saved = made_up(connections).changed(**fields)
    with pytest.raises(OSError, match="filling the connection") as caught:
        connections.load(connections.net.b, saved)
    assert caught.value.errno in (errno.EINVAL, errno.EFBIG)


def test_what_is_not_sound_never_comes_to_the_kernel(connections: Connections) -> None:
    target = connections.create(connections.net.b, made_up(connections))
    for fields in ({"rcvq": 1}, {"sndq": 1}, {"notsent": 1}, {"snd_ws": 15}, {"rcv_ws": 15}):
        with pytest.raises(ValueError, match="no sockets with their queues"):
            target.restore(made_up(connections).changed(**fields))
    assert target.arrivals.not_restored() == [target.number]
    assert tcp_state(target.sock) == CLOSE


def test_restore_needs_repair_mode(connections: Connections) -> None:
    saved = made_up(connections)
    target = connections.create(connections.net.b, saved)
    repair(target.sock, OFF_NO_WP)  # which the data plane does not know
    with pytest.raises(OSError, match="TCP_TIMESTAMP") as caught:
        target.restore(saved)
    assert caught.value.errno == errno.EPERM


def test_what_no_helper_has_set_is_not_restored(connections: Connections) -> None:
    saved = made_up(connections)
    with contextlib.closing(Target(connections.net.b, saved.record)) as target:
        target.restore(saved)
        assert target.arrivals.not_restored() == [target.number]
        assert tcp_state(target.sock) == CLOSE
