# SPDX-License-Identifier: GPL-2.0-or-later
"""Two hosts with a data plane each, one guest, and a server: what `tcp_model` plays on.

Segments are made and taken apart here without scapy, since there are many. Each that comes out is checked for what
holds of any: lengths, checksums (or the virtio header's word on them), only what was negotiated.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple, TypeVar

from godwit.daemon.mover import Mover
from godwit.dataplane import Engine
from godwit.lab.errors import LabError
from godwit.lab.netns import SERVER4, SERVER6, Host, Network
from godwit.migration import Direction, Migration
from godwit.net.native import NATIVE
from godwit.net.state import FlowMover
from godwit.net.versions import versions
from godwit.repair import Repair

from ..dataplane.driver import (
    FULL,
    GSO_TCPV4,
    GSO_TCPV6,
    GUEST_CSUM,
    GUEST_MAC,
    GUEST_TSO4,
    GUEST_TSO6,
    NEEDS_CSUM,
    OUR_MAC,
    RX,
    TX,
    V4,
    V6,
    Guest,
    Part,
)

__all__ = ["FULL", "NATIVE", "BreachError", "Machine", "Rig", "Segment", "segment"]

MASK: Final = 0xFFFFFFFF
VNET: Final = 12  # bytes of the virtio header
TCP_REPAIR: Final = 19  # linux/tcp.h
SLOTS: Final = 4  # connections at a time, each with a listening socket of its own on the server
FORWARDED: Final = (7000, 80)  # a port of the host's, and where it leads in the guest
RECEIVE: Final = 128  # receive buffers
BUFFER: Final = 2048  # bytes of each
_ETHER: Final = bytes.fromhex((OUR_MAC + GUEST_MAC).replace(":", ""))
_PEER: Final = {False: socket.inet_aton(SERVER4), True: socket.inet_pton(socket.AF_INET6, SERVER6)}
_GUEST: Final = {False: socket.inet_aton(V4.guest), True: socket.inet_pton(socket.AF_INET6, V6.guest)}


Result = TypeVar("Result")


class BreachError(AssertionError):
    """What no TCP may do was done."""


def require(holds: object, what: str) -> None:
    """It holds, or the data plane is wrong."""
    if not holds:
        raise BreachError(what)


def mostly(play: Callable[[], Result]) -> Result:
    """What comes of a game that may break a rule once in three: the kernel's own timers go by the real clock."""
    try:
        return play()
    except BreachError:
        play()
        return play()


# ---- segments


class Segment(NamedTuple):
    """One that came out. ``size`` is the most payload that the guest gets in one piece of it."""

    sport: int
    dport: int
    seq: int
    ack: int
    flags: int
    window: int
    options: dict[int, bytes]
    payload: bytes
    size: int


def _sum(data: bytes) -> int:
    """RFC 1071, not yet complemented: 0xFFFF where a checksum is in it and right."""
    total = int.from_bytes(data if len(data) % 2 == 0 else data + b"\0", "big")
    return (total - 1) % 0xFFFF + 1 if total else 0


def segment(
    v6: bool, sport: int, dport: int, seq: int, ack: int, flags: int, window: int, payload: bytes, options: bytes = b""
) -> bytes:
    """A frame of the guest's. ``options`` are padded."""
    options += bytes(-len(options) % 4)
    urgent = len(payload) if flags & 0x20 else 0
    head = struct.pack(
        "!HHIIBBHHH", sport, dport, seq & MASK, ack & MASK, (5 + len(options) // 4) << 4, flags, window, 0, urgent
    )
    size = len(head) + len(options) + len(payload)
    tcp = head + options + payload
    pseudo = _GUEST[v6] + _PEER[v6] + struct.pack("!IHBB", size, 0, 0, 6)
    tcp = tcp[:16] + struct.pack("!H", 0xFFFF - _sum(pseudo + tcp)) + tcp[18:]
    if v6:
        return _ETHER + b"\x86\xdd" + struct.pack("!IHBB", 6 << 28, size, 6, 64) + _GUEST[v6] + _PEER[v6] + tcp
    ip = struct.pack("!BBHIBBH4s4s", 0x45, 0, 20 + size, 0, 64, 6, 0, _GUEST[v6], _PEER[v6])
    return _ETHER + b"\x08\x00" + ip[:10] + struct.pack("!H", 0xFFFF - _sum(ip)) + ip[12:] + tcp


def _options(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    at = 0
    while at < len(data) and data[at]:
        if data[at] == 1:
            at += 1
            continue
        size = data[at + 1] if at + 1 < len(data) else 0
        require(2 <= size <= len(data) - at, "an option that is no option")
        found[data[at]] = data[at + 2 : at + size]
        at += size
    return found


def taken_apart(raw: bytes, features: int, buffers: int) -> Segment | None:
    """A frame that came out; None if it is of another protocol."""
    require(len(raw) >= VNET + 14, "a frame without headers")
    flags, gso, hdr_len, gso_size, start, offset, count = struct.unpack_from("<BBHHHHH", raw)
    require(count == buffers, f"{count} buffers are said of a frame in {buffers}")
    frame = raw[VNET:]
    if frame[12:14] == b"\x08\x00" and frame[23] == 6:
        v6, ip = False, 20
        require(struct.unpack_from("!H", frame, 16)[0] == len(frame) - 14, "a length that is not the packet's")
        require(_sum(frame[14:34]) == 0xFFFF, "the IP checksum")
        ends = frame[26:34]
    elif frame[12:14] == b"\x86\xdd" and frame[20] == 6:
        v6, ip = True, 40
        require(struct.unpack_from("!H", frame, 18)[0] == len(frame) - 54, "a length that is not the packet's")
        ends = frame[22:54]
    else:
        return None
    require(ends == _PEER[v6] + _GUEST[v6], "addresses of somebody else")
    tcp = frame[14 + ip :]
    pseudo = _sum(ends + struct.pack("!IHBB", len(tcp), 0, 0, 6))
    sport, dport, seq, ack, offset_words, tcp_flags, window, checksum, _ = struct.unpack_from("!HHIIBBHHH", tcp)
    if flags:
        require(flags == NEEDS_CSUM and features & GUEST_CSUM, "a checksum left to a guest that does not take that")
        require((start, offset) == (14 + ip, 16), "a checksum that is elsewhere")
        require(checksum == pseudo, "the sum of the pseudo header")
    else:
        require(_sum(ends + struct.pack("!IHBB", len(tcp), 0, 0, 6) + tcp) == 0xFFFF, "the TCP checksum")
    head = (offset_words >> 4) * 4
    require(20 <= head <= len(tcp), "a TCP header that is too long")
    payload = tcp[head:]
    size = len(payload)
    if gso:
        require(gso == (GSO_TCPV6 if v6 else GSO_TCPV4), "segmentation of another protocol")
        require(features & (GUEST_TSO6 if v6 else GUEST_TSO4), "segmentation that was not negotiated")
        require(hdr_len == 14 + ip + head and 0 < gso_size < size, "segmentation without sense")
        size = gso_size
    return Segment(sport, dport, seq, ack, tcp_flags, window, _options(tcp[20:head]), payload, size)


# ---- the guest and its hosts


class PlayedGuest(Guest):
    """The guest, with frames taken apart the quick way, and buffers that it may keep."""

    kept: list[list[Part]]  # receive buffers that came back
    taken: int  # how many did the last time

    def _buffer(self, head: int, written: int) -> bytes:
        parts = self.rx_buffers[head]
        refill, self.refill = self.refill, False
        data = super()._buffer(head, written)
        self.refill = refill
        if refill:
            self.hand_out(parts)
        else:
            self.kept.append(parts)
        return data

    def segments(self) -> list[Segment]:
        """What has come."""
        found = []
        buffers = self.rx.reap()
        self.taken = len(buffers)
        at = 0
        while at < len(buffers):
            raw = self._buffer(*buffers[at])
            count = struct.unpack_from("<H", raw, 10)[0]
            require(1 <= count <= len(buffers) - at, "a frame in buffers that are not there")
            raw += b"".join(self._buffer(*buffer) for buffer in buffers[at + 1 : at + count])
            at += count
            seen = taken_apart(raw, self.features, count)
            if seen is not None:
                found.append(seen)
        return found

    @property
    def buffers(self) -> int:
        """Receive buffers that the data plane has."""
        return len(self.rx_buffers)


class PlayedMover(Mover):
    """The daemon's, with this process as the repair helper."""

    def _set_mode(self, fds: Sequence[int], mode: Repair) -> None:
        for fd in fds:
            sock = socket.socket(fileno=fd)
            try:
                sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, mode)
            finally:
                sock.detach()


class Machine:
    """A host and its data plane."""

    def __init__(self, space: Host) -> None:
        self.space = space
        self.ahead = 0  # ms that its clock was moved
        with space.enter():
            self.engine = Engine(64)
            self.engine.start()
            self.mover = PlayedMover(self.engine, None, 0, lambda _delay, _work: None)
            for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
                listener = socket.socket(family, socket.SOCK_STREAM)
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                listener.bind((address, FORWARDED[0]))
                listener.listen(16)
                self.engine.listen(listener.detach(), FORWARDED[1])
        self.mover.helper_expected = True

    def flows(self) -> list[str]:
        """Those that there are, and those that end: the guest's port, events, flags, what is in flight."""
        return [
            f"{flow['guest'][1]} {flow['events']:#x} {flow['flags']:#x} {flow['in_flight']}"
            for flow in self.engine.flows()
            if flow["kind"] == "tcp"
        ]

    def close(self) -> None:
        """End it."""
        self.engine.close()


class Rig:
    """Everything that outlives a sequence."""

    def __init__(self) -> None:
        self.cleanup = contextlib.ExitStack()
        self.network = self.cleanup.enter_context(Network())
        for host in (self.network.a, self.network.b, self.network.server):
            for name, value in (("ip_local_port_range", "1024 65000"), ("tcp_tw_reuse", "1")):
                host.sysctl(f"net/ipv4/{name}", value)
            # The kernel's own clock cannot be moved: what is lost on the way comes again soon.
            host.ip(
                "route change 192.0.2.0/24 dev eth0 rto_min 5ms quickack 1",
                "route add 2001:db8::/64 dev eth0 metric 10 rto_min 5ms quickack 1",
            )
        self.machines = [Machine(self.network.a), Machine(self.network.b)]
        for machine in self.machines:
            self.cleanup.callback(machine.close)
        self.listeners = {v6: [self._listener(v6) for _ in range(SLOTS)] for v6 in (False, True)}
        self.here, self.there = self.machines
        self._switch(self.here)
        self.guest = PlayedGuest(FULL, rx=((BUFFER,),) * RECEIVE, engine=self.here.engine)
        self.guest.kept = []
        self.features = FULL
        self.mtu = 1500
        self._prepare(self.there)
        self.ports = 0
        for _ in range(2):  # from then on both have all the descriptors that they will ever have
            self.move(NATIVE, abort=False, early=True, between=lambda: None)

    def _listener(self, v6: bool) -> socket.socket:
        with self.network.server.enter():
            sock = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_STREAM)
            sock.bind((self.network.server.address(v6), 0))
            sock.listen(64)
        sock.setblocking(False)
        self.cleanup.callback(sock.close)
        return sock

    def _prepare(self, machine: Machine) -> None:
        """What is said before there is a ring."""
        machine.engine.set_features(self.features)
        machine.engine.set_memory(self.guest.memory.table())
        here, self.guest.engine = self.guest.engine, machine.engine
        self.guest.configure(mtu=self.mtu)
        self.guest.engine = here

    def begin(self, features: int, mtu: int) -> None:
        """The same guest with another device, before the first connection."""
        if (features, mtu) == (self.features, self.mtu):
            return
        bases = self.stop_rings()
        self.features = self.guest.features = features
        self.mtu = mtu
        for machine in self.machines:
            machine.engine.set_features(features)
            self.guest.engine = machine.engine
            self.guest.configure(mtu=mtu)
        self.guest.engine = self.here.engine
        self.guest.rx.event_idx = self.guest.tx.event_idx = bool(features & 1 << 29)
        for ring in self.guest.rings:
            ring.arm()
        self.start_rings(bases)

    def port(self) -> int:
        """One of the guest's that was not used for long."""
        self.ports = (self.ports + 1) % 40000
        return 20000 + self.ports

    def connect(self, v6: bool) -> socket.socket:
        """A call from the server to the guest; nothing waits for an answer."""
        with self.network.server.enter():
            sock = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_STREAM)
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            sock.connect((self.network.a.address(v6), FORWARDED[0]))
        return sock

    def stop_rings(self) -> list[int]:
        """The guest stands still. Returns where the rings are."""
        return [self.here.engine.ring_stop(index) for index in (RX, TX)]

    def start_rings(self, bases: Sequence[int]) -> None:
        """It runs."""
        for index, base in enumerate(bases):
            self.guest.start_ring(index, base)

    # ---- time

    def now(self) -> float:
        """The clock of the data plane that the guest is on, ms."""
        return time.monotonic() * 1000 + self.here.ahead

    def advance(self, ms: int) -> None:
        """Have time pass."""
        for machine in self.machines:
            machine.engine.advance(ms)
            machine.ahead += ms

    def barrier(self) -> None:
        """Come back when the data plane has done what there is."""
        self.guest.barrier()

    # ---- moving

    def move(self, number: int, *, abort: bool, early: bool, between: Callable[[], None]) -> None:
        """The guest to the other host, by a stream of that version; or back to where it was, ``between`` for the peers.

        ``early``: the network leads to the target before the guest runs there.
        """
        bases = self.stop_rings()
        source, target = self.here, self.there
        save: Migration[FlowMover] = Migration(versions(), source.mover)
        save.request(stream := io.BytesIO(), Direction.SOURCE, number)
        outcome = save.run()
        if outcome.error is not None:
            raise outcome.error
        between()
        load: Migration[FlowMover] = Migration(versions(), target.mover)
        load.request(io.BytesIO(stream.getvalue()), Direction.TARGET)
        with target.space.enter():
            outcome = load.run()
        if outcome.error is not None:
            raise outcome.error
        if abort:
            load.close()
            target.mover.thaw_listeners()
            require(save.rollback() == [], "a rollback that fails")
            save.close()
            source.mover.thaw_listeners()
            self.start_rings(bases)
            return
        if early:
            self._switch(target)
        self.here, self.there = target, source
        self.guest.engine = target.engine
        self.start_rings(bases)
        require(load.commit() == [], "a commit that fails")
        load.close()
        target.mover.thaw_listeners()
        if not early:
            self._switch(target)
        save.close()
        left = source.mover.leave()
        source.mover.close_flows()
        for fd in (*left.connections, *left.ports):
            os.close(fd)

    def _switch(self, to: Machine) -> None:
        """The network leads there; a port may still be coming up on a machine that is busy."""
        deadline = time.monotonic() + 5
        while True:
            try:
                self.network.switch("a" if to.space is self.network.a else "b")
            except LabError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
            else:
                return

    def descriptors(self) -> int:
        """How many this process has."""
        return len(os.listdir("/proc/self/fd"))

    def close(self) -> None:
        """Take it all down."""
        self.guest.close()
        self.cleanup.close()


@contextlib.contextmanager
def rig() -> Iterator[Rig]:
    """One, for as long as a block takes."""
    made = Rig()
    try:
        yield made
    finally:
        made.close()
