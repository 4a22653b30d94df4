# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest behind a stream socket: frames with their lengths, in pieces, too many, and wrong ones."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import random
import resource
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from scapy.layers.inet import UDP
from scapy.packet import Packet

from godwit.dataplane import Engine, StreamCard

from .driver import (
    ACK,
    FIN,
    MRG_RXBUF,
    TIMEOUT,
    V4,
    V6,
    VERSION_1,
    Conn,
    Family,
    Frame,
    Guest,
    Server,
    address,
    open_pair,
    other_frame,
    pattern,
    read_exactly,
    wait_until,
)

LENGTH = struct.Struct("!I")


def framed(frame: Packet | bytes) -> bytes:
    """A frame as it goes over the socket."""
    data = bytes(frame)
    return LENGTH.pack(len(data)) + data


class StreamGuest(Guest):
    """The same guest as behind rings, at the other end of a stream socket: without offloads of any kind."""

    def __init__(self, *, mtu: int = 1500, engine: Engine | None = None) -> None:
        self.features = VERSION_1 | MRG_RXBUF
        self.backlog: list[Frame] = []
        self._ports = itertools.count(random.randrange(10000, 50000))
        self.engine = Engine(max_flows=1024) if engine is None else engine
        self.configure(mtu=mtu)
        if engine is None:
            self.engine.start()
        self.plug()

    def plug(self) -> None:
        """Connect, once more if need be."""
        self.sock, self._theirs = socket.socketpair()
        self._received = b""
        self.card = StreamCard(self._theirs.fileno())
        self.engine.plug(self.card)

    def unplug(self) -> None:
        """Take the engine away from the socket."""
        self.engine.detach()
        self.sock.close()
        self._theirs.close()

    def close(self) -> None:
        self.engine.close()
        self.engine.close_flows()
        self.unplug()

    def send(self, frame: Packet | bytes, **_: object) -> None:
        self.sock.sendall(framed(frame))

    def look(self, match: Callable[[Frame], bool], timeout: float) -> Frame | None:
        deadline = time.monotonic() + timeout
        while True:
            for i, frame in enumerate(self.backlog):
                if match(frame):
                    return self.backlog.pop(i)
            left = max(deadline - time.monotonic(), 0)
            if not select.select([self.sock], [], [], left)[0]:
                return None
            self._received += self.sock.recv(1 << 18)
            self.backlog += self.split()

    def split(self) -> list[Frame]:
        """The whole frames of what was received, each checked: lengths, checksums, no offloads."""
        frames = []
        at = 0
        while len(self._received) - at >= 4:
            (size,) = LENGTH.unpack_from(self._received, at)
            assert 14 <= size <= 14 + 65535
            if len(self._received) - at < 4 + size:
                break
            header = struct.pack("<BBHHHHH", 0, 0, 0, 0, 0, 0, 1)
            frames.append(Frame(header + self._received[at + 4 : at + 4 + size], self.features, 1))
            at += 4 + size
        self._received = self._received[at:]
        return frames

    def ended(self, timeout: float = TIMEOUT) -> bool:
        """Whether the card comes to its end."""
        return bool(select.select([self.card.fileno()], [], [], timeout)[0])

    def pings(self, family: Family = V4) -> bool:
        """Whether it is on the network. By UDP, which needs no privilege."""
        with socket.socket(family.af, socket.SOCK_DGRAM) as host:
            host.bind((family.loopback, 0))
            host.settimeout(TIMEOUT)
            self.send(self.udp(family, self.port(), host.getsockname()[1], b"ping"))
            data, where = host.recvfrom(100)
            host.sendto(b"pong", where)
            answer = self.receive(lambda f: UDP in f.ether)
        return data == b"ping" and answer.payload == b"pong"


@pytest.fixture
def guest() -> Iterator[StreamGuest]:
    with StreamGuest() as it:
        yield it


def test_frames_go_both_ways(guest: StreamGuest, family: Family) -> None:
    assert guest.pings(family)


def test_many_in_one_piece(guest: StreamGuest, family: Family) -> None:
    with socket.socket(family.af, socket.SOCK_DGRAM) as host:
        host.bind((family.loopback, 0))
        host.settimeout(TIMEOUT)
        port = guest.port()
        datagrams = [guest.udp(family, port, host.getsockname()[1], b"%d" % i) for i in range(100)]
        guest.sock.sendall(b"".join(map(framed, datagrams)))
        assert [host.recv(100) for _ in datagrams] == [b"%d" % i for i in range(100)]


def test_in_two_pieces_at_each_byte(guest: StreamGuest) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
        host.bind((V4.loopback, 0))
        host.settimeout(TIMEOUT)
        port = guest.port()
        two = b"".join(framed(guest.udp(V4, port, host.getsockname()[1], text)) for text in (b"one", b"two"))
        for at in range(1, len(two)):
            guest.sock.sendall(two[:at])
            guest.barrier()
            guest.sock.sendall(two[at:])
            assert [host.recv(100), host.recv(100)] == [b"one", b"two"], at


def test_byte_by_byte(guest: StreamGuest) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
        host.bind((V4.loopback, 0))
        host.settimeout(TIMEOUT)
        for byte in framed(guest.udp(V4, guest.port(), host.getsockname()[1], b"slowly")):
            guest.sock.sendall(bytes([byte]))
            guest.barrier()
        assert host.recv(100) == b"slowly"


def test_frames_for_the_control_thread(guest: StreamGuest) -> None:
    """ARP, DHCP and their like go up whole, and answers come down."""
    frame = other_frame(60)
    guest.send(frame)
    wait_until(lambda: select.select([guest.engine.rare_fileno()], [], [], 0)[0])
    assert guest.engine.take_rare() == [frame]
    answer = other_frame(342)
    assert guest.engine.inject(answer)
    assert guest.receive().raw == answer


@contextlib.contextmanager
def sending(host: socket.socket, data: bytes) -> Iterator[None]:
    """Send, and close this way, while something else is done."""

    def work() -> None:
        host.sendall(data)
        host.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        thread.join()


@pytest.mark.parametrize("mss", [64, 536, 1460, 8960])
def test_a_stream_to_the_guest(guest: StreamGuest, family: Family, mss: int) -> None:
    """The data plane hands over 64 KiB at a time; what comes are segments, complete."""
    data = pattern(500 * mss + 7)
    guest.configure(mtu=9000)
    conn, host = open_pair(guest, family, mss=mss)
    got = b""
    frames = ends = 0
    with host, sending(host, data):
        while len(got) < len(data):
            frame = conn.next(ACK)
            frames += 1
            assert len(frame.payload) <= mss
            if frame.tcp.seq == conn.ack:  # or sent again, on a machine that is slow
                got += frame.payload
                conn.ack = (conn.ack + len(frame.payload)) & 0xFFFFFFFF
                ends += frame.has(FIN)
            if not guest.backlog or frames % 64 == 0:
                conn.acknowledge()
        assert got == data
        if not ends:
            conn.read_fin()
    assert guest.card.counters["frames_to_guest"] > 2 * guest.engine.counters()["frames_to_guest"]


def test_frames_of_64_kib(family: Family) -> None:
    with StreamGuest(mtu=65520) as guest:
        conn, host = open_pair(guest, family, mss=65460 if family.v6 else 65480)
        data = pattern(3_000_000)
        got = b""
        longest = 0
        # Each way, many times the size of the area that frames go through.
        with host:
            for i in range(0, len(data), 60_000):
                piece = data[i : i + 60_000]
                conn.push(piece)
                assert read_exactly(host, len(piece)) == piece
                conn.wait_acked()
            with sending(host, data):
                while len(got) < len(data):
                    frame = conn.next(ACK)
                    longest = max(longest, len(frame.payload))
                    if frame.tcp.seq == conn.ack:
                        got += frame.payload
                        conn.ack = (conn.ack + len(frame.payload)) & 0xFFFFFFFF
                    conn.acknowledge()
        assert got == data
        assert longest > 32768


def test_datagrams_of_all_sizes(family: Family) -> None:
    """As large as frames can be, and as many at once as the receive ring has buffers, and more."""
    with StreamGuest(mtu=65520) as guest, socket.socket(family.af, socket.SOCK_DGRAM) as host:
        host.bind((family.loopback, 0))
        host.settimeout(TIMEOUT)
        port = guest.port()
        for size in (0, 1, 1472, 8180, 8192, 16384, 30000, 60000, 65000):
            payload = pattern(size)
            guest.send(guest.udp(family, port, host.getsockname()[1], payload))
            data, where = host.recvfrom(65536)
            assert data == payload
            host.sendto(payload, where)
            assert guest.receive(lambda f: UDP in f.ether).payload == payload
        for burst in range(10):
            for i in range(100):
                host.sendto(b"%d.%d" % (burst, i), where)
            for i in range(100):
                assert guest.receive(lambda f: UDP in f.ether).payload == b"%d.%d" % (burst, i)


def test_a_stream_from_the_guest(guest: StreamGuest, family: Family) -> None:
    conn, host = open_pair(guest, family)
    with host:
        data = pattern(1_000_000)
        for i in range(0, len(data), 14600):
            segments = []
            for j in range(i, min(i + 14600, len(data)), 1460):
                segments.append(conn.build(ACK, data[j : j + 1460]))
                conn.seq = (conn.seq + len(data[j : j + 1460])) & 0xFFFFFFFF
            guest.sock.sendall(b"".join(map(framed, segments)))
            assert read_exactly(host, len(data[i : i + 14600])) == data[i : i + 14600]
            conn.wait_acked()


def test_a_guest_that_does_not_read(guest: StreamGuest, family: Family) -> None:
    """Nothing is dropped, and the other way stays open."""
    # More than socket and receive ring hold, in streams that are each less than a socket's queue.
    guest.configure(mtu=9000)
    pairs = [open_pair(guest, family, window=0xFFFF, scale=10, mss=8900) for _ in range(40)]
    data = pattern(100_000)
    for _, host in pairs:
        host.sendall(data)
    wait_until(lambda: guest.card.counters["full"] > 0)
    with socket.socket(family.af, socket.SOCK_DGRAM) as other:
        other.bind((family.loopback, 0))
        other.settimeout(TIMEOUT)
        for i in range(1000):
            guest.send(guest.udp(family, 5000, other.getsockname()[1], b"%d" % i))
            assert other.recv(100) == b"%d" % i
    assert guest.engine.counters()["bytes_to_guest"] < len(pairs) * len(data)
    assert guest.engine.counters()["drops"]["ring_full"] == 0
    # Now it reads, all of it.
    for conn, host in pairs:
        assert conn.read(len(data), ack=False) == data
        conn.acknowledge()
        host.close()
    assert guest.engine.counters()["drops"]["ring_full"] == 0


@pytest.mark.parametrize("size", [0, StreamCard.MAX_FRAME + 1, 0x80000000, 0xFFFFFFFF])
def test_a_length_that_cannot_be(guest: StreamGuest, size: int) -> None:
    """It ends the session, after the frames before it, and says what it was."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
        host.bind((V4.loopback, 0))
        host.settimeout(TIMEOUT)
        last = framed(guest.udp(V4, guest.port(), host.getsockname()[1], b"the last"))
        guest.sock.sendall(last + LENGTH.pack(size) + last)
        assert guest.ended()
        assert guest.card.failure == f"a frame of {size} bytes was announced, and 1 to 69632 is what there can be"
        assert host.recv(100) == b"the last"
        host.settimeout(0.05)
        with pytest.raises(TimeoutError):
            host.recv(100)
    guest.unplug()
    guest.plug()
    assert guest.pings()


def test_frames_that_are_none(guest: StreamGuest) -> None:
    """Too short, too long, nonsense: dropped, each for its reason, and the next one is served."""
    for size in range(1, 14):
        guest.send(bytes(size))
    guest.send(bytes(guest.ip(V4))[:14] + bytes(StreamCard.MAX_FRAME - 14))
    for seed in range(50):
        guest.send(bytes([2]) + pattern(random.Random(seed).randrange(14, 1500), seed))
    assert guest.pings()
    assert guest.drops("short") >= 13
    assert guest.drops("malformed") >= 1
    assert not guest.ended(0)


def test_nonsense_ends_the_session_and_nothing_else(guest: StreamGuest) -> None:
    for seed in range(50):
        try:
            guest.sock.sendall(pattern(3000, seed))
            guest.sock.shutdown(socket.SHUT_WR)
        except BrokenPipeError:
            pass
        assert guest.ended()
        guest.unplug()
        guest.plug()
    assert guest.pings()


@pytest.mark.parametrize("seed", range(3))
def test_frames_with_wrong_bytes_cut_anywhere(guest: StreamGuest, seed: int) -> None:
    """Whatever frames hold and wherever they are cut, the session goes on, and so does the next frame."""
    chance = random.Random(seed)
    server = Server(V4)
    wire = b""
    for _ in range(600):
        family = chance.choice((V4, V6))
        frame = bytearray(
            bytes(
                chance.choice(
                    (
                        guest.udp(family, 5000, 9, pattern(chance.randrange(1500))),
                        guest.echo(family, 7, 1, b"x"),
                        Conn(guest, family, server.port).build(chance.randrange(64), pattern(chance.randrange(100))),
                    )
                )
            )
        )
        for _ in range(chance.randrange(4)):
            frame[chance.randrange(12, len(frame))] = chance.randrange(256)
        wire += framed(bytes(frame[: chance.randrange(1, len(frame) + 1)]))
    server.close()
    guest.sock.setblocking(False)
    at = 0
    while at < len(wire):
        try:
            at += guest.sock.send(wire[at : at + chance.choice((1, 7, 100, 5000))])
        except BlockingIOError:
            time.sleep(0.001)
        try:
            guest.sock.recv(1 << 18)
        except BlockingIOError:
            pass
    guest.barrier()
    guest.sock.setblocking(True)
    assert not guest.ended(0)
    # What comes now may be the rest of a frame: another session.
    guest.unplug()
    guest.plug()
    guest.configure()
    assert guest.pings()


@pytest.mark.parametrize("given", [0, 1, 3, 4, 20])
def test_it_hangs_up(guest: StreamGuest, given: int) -> None:
    guest.pings()
    guest.sock.sendall(framed(bytes(60))[:given])
    guest.sock.close()
    assert guest.ended()
    assert guest.card.failure == (None if given == 0 else "it was closed in the middle of a frame")
    guest.unplug()
    guest.plug()
    assert guest.pings()


def test_it_hangs_up_with_something_left_to_read(guest: StreamGuest) -> None:
    guest.send(guest.udp(V4, 5000, 9, b"x"))
    guest.engine.inject(other_frame(100))
    assert select.select([guest.sock], [], [], TIMEOUT)[0]
    guest.sock.close()
    assert guest.ended()
    assert guest.card.failure is None


def test_flows_outlive_the_card(guest: StreamGuest, family: Family) -> None:
    """What becomes of them is for the daemon to say, not for the data plane."""
    conn, host = open_pair(guest, family)
    with host:
        guest.unplug()
        host.sendall(b"meanwhile")
        guest.plug()
        conn.push(b"once more")
        assert read_exactly(host, 9) == b"once more"
        assert conn.read(9) == b"meanwhile"


def descriptors() -> int:
    gc.collect()  # what earlier tests have left is not to be closed amid this one
    return len(os.listdir("/proc/self/fd"))


def test_no_descriptors_for_the_card(guest: StreamGuest) -> None:
    """However few there are: none is lost, and the next card finds all as before."""
    guest.unplug()
    guest.sock, theirs = socket.socketpair()
    card = StreamCard(theirs.fileno())
    before = descriptors()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    with theirs, guest.sock:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 10, hard))
        try:
            with contextlib.suppress(OSError):
                while True:
                    taken.append(os.dup(0))
            for _ in range(7):  # regions of memory, which keep theirs, and what the rings are kicked by
                with pytest.raises(OSError, match="Too many open files"):
                    guest.engine.plug(card)
                guest.engine.detach()
                os.close(taken.pop())
            guest.engine.plug(card)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            guest.engine.detach()
            for fd in taken:
                os.close(fd)
        assert descriptors() == before
    guest.plug()
    assert guest.pings()


def test_connections_from_outside(guest: StreamGuest) -> None:
    listening = socket.create_server((V4.loopback, 0))
    port = listening.getsockname()[1]
    guest.engine.listen(listening.detach(), 80)
    guest.configure(maps=[(address(V4.gateway), 0, address(V4.loopback), 0)])
    guest.pings()  # so that the guest's address is known
    with socket.create_connection((V4.loopback, port), TIMEOUT) as client:
        conn = Conn.accept(guest, V4, 80)
        client.sendall(b"hello")
        assert conn.read(5) == b"hello"


def test_servers_in_ipv6_and_ipv4_at_a_time(guest: StreamGuest) -> None:
    pairs = [open_pair(guest, family) for family in (V4, V6) for _ in range(5)]
    for number, (conn, host) in enumerate(pairs):
        host.sendall(b"%d" % number * 100)
        conn.push(b"%d" % number * 50)
    for number, (conn, host) in enumerate(pairs):
        assert conn.read(100) == b"%d" % number * 100
        assert read_exactly(host, 50) == b"%d" % number * 50
        host.close()
