# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest in memory: its RAM, both virtqueues and its network stack, by hand.

The engine under test sees the same as with a real guest: memory behind
descriptors, rings, eventfds. What is on the other side of it are ordinary
sockets of the test: the gateway's address, as the guest knows it, stands for
the loopback address of the host.

Every frame that comes out is checked here, whatever the test is about: the
lengths that its headers state, the checksums (complete, or left to the guest
just as the virtio header says), and that it only comes if it was negotiated.
"""

from __future__ import annotations

import collections
import fcntl
import itertools
import mmap
import os
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoReply, ICMPv6EchoRequest, IPv6, IPv6ExtHdrFragment
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from godwit.dataplane import Engine

from ..fuzz.wire import ones_sum

RX, TX = 0, 1
TIMEOUT = 10.0  # seconds; nothing that is waited for takes long, except on a machine that is busy

# Feature bits: virtio 1.3, 5.1.3 and 6; the vhost-user specification.
CSUM, GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, HOST_TSO4, HOST_TSO6 = (1 << n for n in (0, 1, 7, 8, 11, 12))
GUEST_USO4, GUEST_USO6, HOST_USO = (1 << n for n in (54, 55, 56))
MRG_RXBUF, LOG_ALL, EVENT_IDX, PROTOCOL_FEATURES, VERSION_1 = (1 << n for n in (15, 26, 29, 30, 32))
FULL = (
    CSUM | GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | HOST_TSO4 | HOST_TSO6
    | MRG_RXBUF | EVENT_IDX | PROTOCOL_FEATURES | VERSION_1
)  # fmt: skip
PLAIN = MRG_RXBUF | PROTOCOL_FEATURES | VERSION_1  # what passt offers

F_NEXT, F_WRITE, F_INDIRECT = 1, 2, 4  # virtio 1.3, 2.7.5
NEEDS_CSUM = 1
GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4 = 0, 1, 4, 5

FIN, SYN, RST, PSH, ACK = 0x01, 0x02, 0x04, 0x08, 0x10

PAGE = 4096
USER_BASE = 0x7F00_0000_0000  # where the front-end says that it has guest address 0
OUR_MAC = "02:00:00:00:00:01"
GUEST_MAC = "02:00:00:00:00:02"


class Family(NamedTuple):
    """The same test in IPv4 and in IPv6."""

    name: str
    af: socket.AddressFamily
    guest: str
    gateway: str
    loopback: str

    @property
    def v6(self) -> bool:
        return self.af == socket.AF_INET6

    @property
    def ip_size(self) -> int:
        return 40 if self.v6 else 20


V4 = Family("v4", socket.AF_INET, "192.0.2.10", "192.0.2.1", "127.0.0.1")
V6 = Family("v6", socket.AF_INET6, "2001:db8::10", "2001:db8::1", "::1")


def address(text: str) -> bytes:
    """16 bytes, IPv4 as v4-mapped."""
    if ":" in text:
        return socket.inet_pton(socket.AF_INET6, text)
    return bytes(10) + b"\xff\xff" + socket.inet_pton(socket.AF_INET, text)


def pattern(size: int, seed: int = 1) -> bytes:
    """Bytes in which every misplaced one shows."""
    return random.Random(seed).randbytes(size)


def other_frame(size: int) -> bytes:
    """A frame of neither IP, such as the control thread sends."""
    return bytes.fromhex((GUEST_MAC + OUR_MAC).replace(":", "")) + b"\x08\x06" + pattern(size - 14)


def wait_until(what: Callable[[], object], timeout: float = TIMEOUT) -> None:
    """Wait for something that nothing tells of."""
    deadline = time.monotonic() + timeout
    while not what():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.001)


class Part(NamedTuple):
    """One descriptor of a chain."""

    addr: int
    size: int
    write: bool


class Piece(NamedTuple):
    """A region of the guest's memory: guest address, size, offset in the file."""

    addr: int
    size: int
    offset: int


class Memory:
    """The guest's RAM: one file, mapped here and there."""

    def __init__(self, regions: Sequence[Piece], *, sealed: bool = True) -> None:
        self.regions = list(regions)
        self.file_size = max(r.offset + r.size for r in regions)
        self.fd = os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, self.file_size)
        if sealed:
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        self.map = mmap.mmap(self.fd, self.file_size)
        self._bytes = memoryview(self.map)
        self._words = self._bytes.cast("H")  # one store for each element, never half of one
        self._next = regions[0].addr + PAGE

    def close(self) -> None:
        self._words.release()
        self._bytes.release()
        self.map.close()
        os.close(self.fd)

    def offset(self, addr: int) -> int:
        for r in self.regions:
            if r.addr <= addr < r.addr + r.size:
                return r.offset + addr - r.addr
        raise AssertionError(f"{addr:#x} is not in the guest's memory")

    def take(self, size: int, align: int = 16) -> int:
        """Guest memory that nobody else uses; in the first region, for there the rings are too."""
        at = -(-self._next // align) * align
        self._next = at + size
        assert self._next <= self.regions[0].addr + self.regions[0].size
        return at

    def spans(self, addr: int, size: int) -> Iterator[tuple[int, int]]:
        """(offset, size) of each piece: a buffer may straddle regions."""
        while size:
            r = next(r for r in self.regions if r.addr <= addr < r.addr + r.size)
            n = min(size, r.addr + r.size - addr)
            yield r.offset + addr - r.addr, n
            addr += n
            size -= n

    def write(self, addr: int, data: bytes) -> None:
        at = 0
        for offset, n in self.spans(addr, len(data)):
            self.map[offset : offset + n] = data[at : at + n]
            at += n

    def read(self, addr: int, size: int) -> bytes:
        return b"".join(self.map[offset : offset + n] for offset, n in self.spans(addr, size))

    def store16(self, addr: int, value: int) -> None:
        self._words[self.offset(addr) // 2] = value & 0xFFFF

    def load16(self, addr: int) -> int:
        return self._words[self.offset(addr) // 2]

    def table(self) -> list[tuple[int, int, int, int, int]]:
        """What Engine.set_memory() takes."""
        return [(r.addr, r.size, USER_BASE + r.addr, r.offset, os.dup(self.fd)) for r in self.regions]


class Ring:
    """The driver's side of a split virtqueue."""

    def __init__(self, memory: Memory, num: int, *, event_idx: bool) -> None:
        self.memory = memory
        self.num = num
        self.event_idx = event_idx
        self.desc = memory.take(16 * num, PAGE)
        self.avail = memory.take(6 + 2 * num, PAGE)
        self.used = memory.take(6 + 8 * num, PAGE)
        self.kick_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.err_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.free: collections.deque[int] = collections.deque(range(num))
        self.chains: dict[int, list[int]] = {}
        self.avail_idx = 0
        self.last_used = 0
        self.kicks = 0
        self._fence = threading.Lock()

    def close(self) -> None:
        for fd in (self.kick_fd, self.call_fd, self.err_fd):
            os.close(fd)

    def start_at(self, index: int) -> None:
        """Both indices, as if so many entries had been through the ring already."""
        self.avail_idx = self.last_used = index
        self.memory.store16(self.avail + 2, index)
        self.memory.store16(self.used + 2, index)

    def set_desc(self, i: int, addr: int, size: int, flags: int, following: int = 0) -> None:
        self.memory.write(self.desc + 16 * i, struct.pack("<QIHH", addr, size, flags, following))

    def add(self, parts: Sequence[Part], *, indirect: bool = False, table: int | None = None) -> int:
        """Put a chain into the ring, without telling. Returns its head."""
        if indirect:
            if table is None:
                table = self.memory.take(16 * len(parts))
            for i, part in enumerate(parts):
                flags = (F_WRITE if part.write else 0) | (F_NEXT if i + 1 < len(parts) else 0)
                self.memory.write(table + 16 * i, struct.pack("<QIHH", part.addr, part.size, flags, i + 1))
            taken = [self.free.popleft()]
            self.set_desc(taken[0], table, 16 * len(parts), F_INDIRECT)
        else:
            taken = [self.free.popleft() for _ in parts]
            for i, part in enumerate(parts):
                last = i + 1 == len(parts)
                flags = (F_WRITE if part.write else 0) | (0 if last else F_NEXT)
                self.set_desc(taken[i], part.addr, part.size, flags, 0 if last else taken[i + 1])
        self.chains[taken[0]] = taken
        self.push(taken[0])
        return taken[0]

    def push(self, head: int) -> None:
        self.memory.store16(self.avail + 4 + 2 * (self.avail_idx % self.num), head)
        self.avail_idx = (self.avail_idx + 1) & 0xFFFF

    def publish(self, count: int, *, force: bool = False) -> bool:
        """Show `count` added entries, and kick if the device wants that. Whether it was kicked."""
        old = (self.avail_idx - count) & 0xFFFF
        self.memory.store16(self.avail + 2, self.avail_idx)
        with self._fence:  # a full barrier: the index is out before the wish is read
            pass
        due = self.kick_due(old)
        if due or force:
            self.kick()
        return due

    def kick_due(self, old: int) -> bool:
        """Whether the device wants a kick for what was added since the index `old`."""
        if self.event_idx:
            event = self.memory.load16(self.used + 4 + 8 * self.num)
            return (self.avail_idx - event - 1) & 0xFFFF < (self.avail_idx - old) & 0xFFFF
        return not self.memory.load16(self.used) & 1

    def kick(self) -> None:
        self.kicks += 1
        os.eventfd_write(self.kick_fd, 1)

    def reap(self) -> list[tuple[int, int]]:
        """The (head, written) of every chain that came back; its descriptors are free again."""
        found = []
        index = self.memory.load16(self.used + 2)
        with self._fence:
            pass
        while self.last_used != index:
            at = self.used + 4 + 8 * (self.last_used % self.num)
            head, written = struct.unpack("<II", self.memory.read(at, 8))
            self.last_used = (self.last_used + 1) & 0xFFFF
            self.free.extend(self.chains.pop(head, ()))
            found.append((head, written))
        return found

    def arm(self) -> bool:
        """Ask for an interrupt at the next used entry. False: one is there already."""
        if self.event_idx:
            self.memory.store16(self.avail + 4 + 2 * self.num, self.last_used)
        else:
            self.memory.store16(self.avail, 0)
        with self._fence:
            pass
        return self.memory.load16(self.used + 2) == self.last_used

    def disarm(self) -> None:
        """Ask for no interrupt."""
        if self.event_idx:
            self.memory.store16(self.avail + 4 + 2 * self.num, (self.last_used - 1) & 0xFFFF)
        else:
            self.memory.store16(self.avail, 1)

    def called(self) -> int:
        """How often the device has interrupted since the last question."""
        try:
            return os.eventfd_read(self.call_fd)
        except BlockingIOError:
            return 0

    def wait(self, timeout: float = TIMEOUT) -> bool:
        """Wait for an interrupt as a driver does: nothing but the interrupt wakes it."""
        if not self.arm():
            return True
        readable, _, _ = select.select([self.call_fd], [], [], max(timeout, 0))
        self.called()
        return bool(readable)

    def broken(self, timeout: float = TIMEOUT) -> bool:
        """Whether the device has said that this ring is broken."""
        readable, _, _ = select.select([self.err_fd], [], [], timeout)
        return bool(readable)


class Fragment(NamedTuple):
    """Of a datagram: where it belongs, in bytes, and whether others follow."""

    ident: int
    offset: int
    more: bool
    proto: int
    data: bytes


class Frame:
    """A frame that came out, taken apart; the constructor checks it."""

    def __init__(self, raw: bytes, features: int, buffers: int) -> None:
        self.header_size = 12 if features & (VERSION_1 | MRG_RXBUF) else 10
        assert len(raw) >= self.header_size
        self.flags, self.gso, self.hdr_len, self.gso_size, self.csum_start, self.csum_offset = struct.unpack_from(
            "<BBHHHH", raw
        )
        self.buffers = buffers
        if self.header_size == 12:
            assert struct.unpack_from("<H", raw, 10)[0] == buffers
        self.raw = raw[self.header_size :]
        self.ether: Any = Ether(self.raw)
        self.payload = b""
        self.fragment: Fragment | None = None
        if self.raw[12:14] in (b"\x08\x00", b"\x86\xdd"):
            self._check(features)

    def _check(self, features: int) -> None:
        e = self.ether
        assert e.src == OUR_MAC
        ip = e[IP] if IP in e else e[IPv6]
        raw = self.raw[14:]
        if IP in e:
            assert ip.len == len(raw)
            assert ones_sum(raw[:20]) == 0xFFFF
            pseudo, proto, size = raw[12:20], ip.proto, 20
        else:
            assert ip.plen == len(raw) - 40
            pseudo, proto, size = raw[8:40], ip.nh, 40
        above = raw[size:]
        if IP in e and (ip.frag or ip.flags.MF):
            assert not ip.flags.DF
            self.fragment = Fragment(ip.id, ip.frag * 8, bool(ip.flags.MF), proto, above)
        elif proto == 44:
            inner = e[IPv6ExtHdrFragment]
            self.fragment = Fragment(inner.id, inner.offset * 8, bool(inner.m), inner.nh, above[8:])
        if self.fragment is not None:
            assert self.flags == self.gso == 0
            assert not self.fragment.more or len(self.fragment.data) % 8 == 0
            return
        where = {6: 16, 17: 6, 58: 2, 1: 2}[proto]
        pseudo += struct.pack("!IHBB", len(above), 0, 0, proto)
        if proto == 1:
            assert self.flags == 0
            assert ones_sum(above) == 0xFFFF
        elif self.flags:
            assert self.flags == NEEDS_CSUM
            assert features & GUEST_CSUM
            assert (self.csum_start, self.csum_offset) == (14 + size, where)
            assert struct.unpack_from("!H", above, where)[0] == ones_sum(pseudo)
        else:
            assert ones_sum(pseudo + above) == 0xFFFF
        if TCP in e:
            self.payload = above[e[TCP].dataofs * 4 :]
        elif UDP in e:
            assert e[UDP].len == len(above)
            self.payload = above[8:]
        else:
            self.payload = above[8:]
        if self.gso:
            if UDP in e:
                assert self.gso == GSO_UDP_L4
                assert features & (GUEST_USO4 if size == 20 else GUEST_USO6)
                assert self.hdr_len == 14 + size + 8
            else:
                assert self.gso == (GSO_TCPV4 if size == 20 else GSO_TCPV6)
                assert features & (GUEST_TSO4 if size == 20 else GUEST_TSO6)
                assert self.hdr_len == 14 + size + 20
            assert len(self.payload) > self.gso_size > 0
        elif TCP in e:
            assert self.gso_size == 0

    @property
    def tcp(self) -> Any:
        return self.ether[TCP]

    def has(self, flags: int) -> bool:
        return TCP in self.ether and int(self.tcp.flags) & flags == flags

    def __repr__(self) -> str:
        return f"<{self.ether.summary()} {len(self.payload)} bytes>"


class Guest:
    """An engine and the guest on it.

    ``rx`` are the sizes of the receive buffers, each a tuple of the parts that
    its chain has; they are handed out again as soon as they come back, as long
    as ``refill`` is set. ``num`` is the size of both rings. Memory that is not
    ``sealed`` can be cut off; who touches it here then is at an end.
    """

    def __init__(
        self,
        features: int = FULL,
        *,
        num: int = 256,
        rx: Iterable[tuple[int, ...]] = ((2048,),) * 128,
        max_flows: int = 1024,
        mtu: int = 1500,
        regions: Sequence[Piece] = (Piece(0, 64 << 20, 0),),
        start_index: int = 0,
        log: bool = False,
        engine: Engine | None = None,
        sealed: bool = True,
    ) -> None:
        self.features = features
        self.memory = Memory(regions, sealed=sealed)
        self.rings = [Ring(self.memory, num, event_idx=bool(features & EVENT_IDX)) for _ in (RX, TX)]
        self.rx, self.tx = self.rings
        self.refill = True
        self.backlog: list[Frame] = []
        self.rx_buffers: dict[int, list[Part]] = {}
        self.tx_place = self.memory.take(1 << 20, PAGE)
        self._ports = itertools.count(random.randrange(10000, 50000))
        self.engine = Engine(max_flows=max_flows) if engine is None else engine
        self.log = log
        self.configure(mtu=mtu)
        if engine is None:
            self.engine.start()
        self.attach(start_index)
        for sizes in rx:
            self.post(sizes)

    def configure(self, **changes: Any) -> None:
        usual = {
            "our_mac": bytes.fromhex(OUR_MAC.replace(":", "")),
            "addr4": address(V4.guest),
            "addr6": address(V6.guest),
            "maps": [(address(f.gateway), 0, address(f.loopback), 0) for f in (V4, V6)],
        }
        self.engine.configure(**usual | changes)

    def attach(self, start_index: int = 0) -> None:
        """Everything that a front-end tells the back-end."""
        self.engine.set_features(self.features)
        self.engine.set_memory(self.memory.table())
        for index, ring in enumerate(self.rings):
            ring.start_at(start_index)
            self.start_ring(index, start_index)

    def start_ring(self, index: int, base: int) -> None:
        ring = self.rings[index]
        self.engine.ring_num(index, ring.num)
        self.engine.ring_base(index, base)
        self.set_addr(index)
        self.engine.ring_call(index, os.dup(ring.call_fd))
        self.engine.ring_err(index, os.dup(ring.err_fd))
        self.engine.ring_kick(index, os.dup(ring.kick_fd))
        self.engine.ring_enable(index, True)

    def set_addr(self, index: int) -> None:
        ring = self.rings[index]
        flags = 1 if self.log else 0
        self.engine.ring_addr(
            index, flags, USER_BASE + ring.desc, USER_BASE + ring.used, USER_BASE + ring.avail, ring.used
        )

    def close(self) -> None:
        self.engine.close()
        self.engine.close_flows()
        self.engine.detach()
        for ring in self.rings:
            ring.close()
        self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def drops(self, reason: str) -> int:
        return int(self.engine.counters()["drops"][reason])

    def port(self) -> int:
        return next(self._ports)

    # ---- frames to the engine

    @property
    def vnet(self) -> bytes:
        """The header of a frame of which nothing is left to do."""
        return bytes(12 if self.features & (VERSION_1 | MRG_RXBUF) else 10)

    def layout(self, data: bytes, sizes: Sequence[int]) -> list[Part]:
        """Put data into guest memory in parts of these sizes; what is left over is one more."""
        parts: list[Part] = []
        at = 0
        place = self.tx_place
        for size in [*sizes, len(data)]:
            size = min(size, len(data) - at)
            if size <= 0:
                continue
            self.memory.write(place, data[at : at + size])
            parts.append(Part(place, size, write=False))
            place += size + 3  # never one directly behind the other, at any alignment
            at += size
        return parts

    def send_parts(self, parts: Sequence[Part], *, indirect: bool = False, wait: bool = True) -> None:
        """Give the engine a chain and, with ``wait``, see it come back."""
        head = self.tx.add(parts, indirect=indirect)
        self.tx.publish(1)
        if wait:
            self.reap_tx(head)

    def reap_tx(self, head: int) -> None:
        deadline = time.monotonic() + TIMEOUT
        while True:
            for got, written in self.tx.reap():
                assert written == 0
                if got == head:
                    return
            assert self.tx.wait(deadline - time.monotonic()), "the chain did not come back"

    def send(self, frame: Packet | bytes, *, sizes: Sequence[int] = (), indirect: bool = False) -> None:
        """Send a frame; ``sizes`` are those of its descriptors, the virtio header included."""
        self.send_parts(self.layout(self.vnet + bytes(frame), sizes), indirect=indirect)

    def send_all(self, frames: Sequence[Packet | bytes]) -> None:
        """Send frames as one batch."""
        place = self.tx_place
        heads = []
        for frame in frames:
            data = self.vnet + bytes(frame)
            self.memory.write(place, data)
            heads.append(self.tx.add([Part(place, len(data), write=False)]))
            place += len(data)
        self.tx.publish(len(heads))
        self.reap_tx(heads[-1])

    # ---- frames from it

    def post(self, sizes: tuple[int, ...], *, publish: bool = True) -> None:
        """Hand out one receive buffer."""
        self.hand_out([Part(self.memory.take(size, 1), size, write=True) for size in sizes], publish=publish)

    def hand_out(self, parts: list[Part], *, publish: bool = True) -> None:
        self.rx_buffers[self.rx.add(parts)] = parts
        if publish:
            self.rx.publish(1)

    def collect(self) -> list[Frame]:
        """The frames that are there now."""
        frames = []
        buffers = self.rx.reap()
        while buffers:
            head, written = buffers.pop(0)
            raw, count = self._buffer(head, written), 1
            if len(self.vnet) == 12:
                count = struct.unpack_from("<H", raw, 10)[0]
                assert 1 <= count <= len(buffers) + 1
                assert count == 1 or self.features & MRG_RXBUF
                for _ in range(count - 1):
                    raw += self._buffer(*buffers.pop(0))
            frames.append(Frame(raw, self.features, count))
        return frames

    def _buffer(self, head: int, written: int) -> bytes:
        parts = self.rx_buffers.pop(head)
        assert 0 < written <= sum(part.size for part in parts)
        data = b"".join(self.memory.read(part.addr, part.size) for part in parts)[:written]
        if self.refill:
            self.hand_out(parts)
        return data

    def receive(self, match: Callable[[Frame], bool] = lambda _: True, timeout: float = TIMEOUT) -> Frame:
        """The next frame that matches; the others stay for who asks for them."""
        frame = self.look(match, timeout)
        assert frame is not None, f"no such frame came; there were {self.backlog}"
        return frame

    def look(self, match: Callable[[Frame], bool], timeout: float) -> Frame | None:
        deadline = time.monotonic() + timeout
        while True:
            for i, frame in enumerate(self.backlog):
                if match(frame):
                    return self.backlog.pop(i)
            got = self.collect()
            if got:
                self.backlog += got
                continue
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            self.rx.wait(left)

    def barrier(self) -> None:
        """Come back when the engine has done all that it was given before."""
        for _ in range(2):  # a turn that parks has settled what came before it
            self.engine.park()
            self.engine.unpark()

    # ---- what a guest sends

    def ip(self, family: Family, **fields: Any) -> Any:
        ether = Ether(src=GUEST_MAC, dst=OUR_MAC)
        if family.v6:
            return ether / IPv6(**{"src": family.guest, "dst": family.gateway} | fields)
        return ether / IP(**{"src": family.guest, "dst": family.gateway} | fields)

    def udp(self, family: Family, sport: int, dport: int, payload: bytes, **fields: Any) -> Any:
        return self.ip(family, **fields) / UDP(sport=sport, dport=dport) / Raw(payload)

    def echo(self, family: Family, ident: int, seq: int, payload: bytes, **fields: Any) -> Any:
        message = ICMPv6EchoRequest if family.v6 else ICMP
        return self.ip(family, **fields) / message(id=ident, seq=seq) / Raw(payload)


def is_echo_reply(frame: Frame) -> bool:
    return ICMPv6EchoReply in frame.ether or (ICMP in frame.ether and frame.ether[ICMP].type == 0)


class Conn:
    """The guest's end of one TCP connection, every segment by hand."""

    def __init__(
        self,
        guest: Guest,
        family: Family,
        port: int,
        *,
        window: int = 0xFFFF,
        scale: int | None = 7,
        mss: int | None = 1460,
    ) -> None:
        self.guest = guest
        self.family = family
        self.port = port
        self.own = guest.port()
        self.mss = mss
        self.scale = scale  # of the windows that we say
        self.peer_scale = 0
        self.window = window  # the field, as it is
        self.seq = random.getrandbits(32)
        self.ack = 0
        self.peer_window = 0
        self.peer_acked = self.seq
        self.early: dict[int, bytes] = {}

    def mine(self, frame: Frame) -> bool:
        return TCP in frame.ether and frame.tcp.dport == self.own and frame.tcp.sport == self.port

    def options(self) -> list[tuple[str, Any]]:
        found: list[tuple[str, Any]] = [] if self.mss is None else [("MSS", self.mss)]
        if self.scale is not None:
            found += [("NOP", None), ("WScale", self.scale)]
        return found

    def build(
        self,
        flags: int,
        payload: bytes = b"",
        *,
        seq: int | None = None,
        ack: int | None = None,
        window: int | None = None,
        options: list[tuple[str, Any]] | None = None,
    ) -> Any:
        segment = TCP(
            sport=self.own,
            dport=self.port,
            flags=flags,
            seq=(self.seq if seq is None else seq) & 0xFFFFFFFF,
            ack=(self.ack if ack is None else ack) & 0xFFFFFFFF if flags & ACK else 0,
            window=self.window if window is None else window,
            options=options or [],
        )
        frame = self.guest.ip(self.family) / segment
        return frame / Raw(payload) if payload else frame

    def send(self, flags: int, payload: bytes = b"", *, sizes: Sequence[int] = (), **fields: Any) -> None:
        """Send a segment as it is said; the connection's own numbers stay."""
        self.guest.send(self.build(flags, payload, **fields), sizes=sizes)

    def push(self, payload: bytes, flags: int = ACK | PSH, **fields: Any) -> None:
        """Send data, and count it as sent."""
        self.send(flags, payload, **fields)
        self.seq = (self.seq + len(payload) + (1 if flags & FIN else 0)) & 0xFFFFFFFF

    def next(self, flags: int = 0, timeout: float = TIMEOUT) -> Frame:
        """The next segment of this connection; it must have these flags."""
        frame = self.guest.receive(self.mine, timeout)
        assert frame.has(flags), frame
        self.note(frame)
        return frame

    def until(self, match: Callable[[Frame], bool], timeout: float = TIMEOUT) -> Frame:
        """The next segment that matches, those before it looked at and left."""
        deadline = time.monotonic() + timeout
        while True:
            frame = self.next(timeout=deadline - time.monotonic())
            if match(frame):
                return frame

    def quiet(self, seconds: float = 0.05) -> bool:
        """Whether nothing comes for a while."""
        return self.guest.look(self.mine, seconds) is None

    def note(self, frame: Frame) -> None:
        if frame.has(ACK):
            self.peer_acked = frame.tcp.ack
            self.peer_window = frame.tcp.window << (0 if frame.has(SYN) else self.peer_scale)

    def take_options(self, frame: Frame) -> None:
        options = dict(frame.tcp.options)
        self.peer_mss = options["MSS"]
        self.peer_scale = options.get("WScale", 0)
        assert ("WScale" in options) == (self.scale is not None)

    def connect(self) -> Self:
        """Open the connection from the guest."""
        self.send(SYN, options=self.options())
        answer = self.next(SYN | ACK)
        self.take_options(answer)
        self.seq = (self.seq + 1) & 0xFFFFFFFF
        assert answer.tcp.ack == self.seq
        self.ack = (answer.tcp.seq + 1) & 0xFFFFFFFF
        self.send(ACK)
        return self

    @classmethod
    def accept(cls, guest: Guest, family: Family, own: int, **fields: Any) -> Self:
        """Take a connection from outside to the guest's port ``own``."""
        syn = guest.receive(lambda f: f.has(SYN) and not f.has(ACK) and f.tcp.dport == own)
        conn = cls(guest, family, syn.tcp.sport, **fields)
        conn.own = own
        conn.ack = (syn.tcp.seq + 1) & 0xFFFFFFFF
        options = conn.options()
        assert "WScale" in dict(syn.tcp.options)
        conn.send(SYN | ACK, options=options)
        conn.seq = conn.peer_acked = (conn.seq + 1) & 0xFFFFFFFF
        conn.peer_scale = dict(syn.tcp.options)["WScale"] if conn.scale is not None else 0
        first = conn.next(ACK)
        assert first.tcp.ack == conn.seq
        return conn

    def acknowledge(self, **fields: Any) -> None:
        self.send(ACK, **fields)

    def read(self, size: int, *, ack: bool = True) -> bytes:
        """Exactly `size` bytes in order; what is not in order waits its turn."""
        data = b""
        while len(data) < size:
            frame = self.next(ACK)
            assert not frame.has(RST), frame
            offset = (frame.tcp.seq - self.ack) & 0xFFFFFFFF
            if frame.payload and offset == 0:
                data += frame.payload
                self.ack = (self.ack + len(frame.payload)) & 0xFFFFFFFF
                if ack:
                    self.acknowledge()
        assert len(data) == size
        return data

    def read_fin(self) -> None:
        """The end of what comes, acknowledged."""
        frame = self.until(lambda f: f.has(FIN))
        assert (frame.tcp.seq + len(frame.payload)) & 0xFFFFFFFF == self.ack
        self.ack = (self.ack + 1) & 0xFFFFFFFF
        self.acknowledge()

    def wait_acked(self) -> None:
        """Until all that was pushed is acknowledged."""
        if self.peer_acked != self.seq:
            self.until(lambda f: f.has(ACK) and f.tcp.ack == self.seq)


class Server:
    """A listening socket of the host's."""

    def __init__(self, family: Family, *, rcvbuf: int = 0, backlog: int = 16) -> None:
        self.sock = socket.socket(family.af, socket.SOCK_STREAM)
        if rcvbuf:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
        self.sock.bind((family.loopback, 0))
        self.sock.listen(backlog)
        self.sock.settimeout(TIMEOUT)
        self.port: int = self.sock.getsockname()[1]

    def accept(self) -> socket.socket:
        sock, _ = self.sock.accept()
        sock.settimeout(TIMEOUT)
        return sock

    def close(self) -> None:
        self.sock.close()


def open_pair(guest: Guest, family: Family, **fields: Any) -> tuple[Conn, socket.socket]:
    """A connection from the guest, and the host's end of it."""
    server = Server(family)
    try:
        conn = Conn(guest, family, server.port, **fields).connect()
        return conn, server.accept()
    finally:
        server.close()


def read_exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        got = sock.recv(size - len(data))
        assert got, f"the end after {len(data)} of {size} bytes"
        data += got
    return data
