# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames from a guest, and what hosts do meanwhile: the target ``frames``.

The engine, its sockets and the kernel are real; the network has the loopback
and an interface that leads nowhere. All of it goes in one thread, a step at a
time. What holds: each chain comes back, in order; each frame for the guest is
well-formed, and no larger than its MTU; nothing is written but receive buffers
and used rings; the ring does not break; no more frames are dropped for what
they are than there were; and when the guest is gone, so are its descriptors.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable, Iterator
from functools import cache
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Final

from godwit.dataplane import Engine
from godwit.net.config import NetConfig, packed16
from godwit.net.responder import Responder

from . import wire
from .devices import require
from .nowhere import inside
from .ram import AVAIL, BASE, DESC, F_NEXT, F_WRITE, FREE, RX, SIZE, TX, Ram
from .script import Script, Writer
from .target import Target

NUM: Final = 64  # entries of each ring
PARTS: Final = 3  # descriptors of a frame from the guest, at most
BUFFER: Final = 2048  # bytes of a receive buffer, its canary included
BUFFERS: Final = 32
ROOM: Final = BUFFER - 16
DESCRIPTORS: Final = b"".join(
    struct.pack("<QIHH", BASE + FREE + BUFFER * number, ROOM, F_WRITE, 0) for number in range(BUFFERS)
)
OUT: Final = FREE + BUFFER * BUFFERS  # where frames from the guest lie
STEPS: Final = 24  # of an execution, at most
MAX_FLOWS: Final = 32
PORT: Final = 80  # where the host answers, TCP and UDP
FORWARDED: Final = 8080  # of the host's, which leads to the guest's PORT

GUEST_MAC: Final = bytes.fromhex("020000000002")
ADDR4, GATEWAY4 = IPv4Address("192.0.2.10"), IPv4Address("192.0.2.1")
ADDR6, GATEWAY6 = IPv6Address("2001:db8::10"), IPv6Address("2001:db8::1")
LOOPBACK: Final = {4: "127.0.0.1", 6: "::1"}
FAMILIES: Final = {4: socket.AF_INET, 6: socket.AF_INET6}

CSUM, GUEST_CSUM, TSO, EVENT_IDX, MRG, MODERN = 1 << 0, 1 << 1, 3 << 7 | 3 << 11, 1 << 29, 1 << 15, 1 << 32
USO: Final = 7 << 54
OFFLOADS: Final = CSUM | GUEST_CSUM | TSO | USO
BASIC: Final = 1 << 30 | MODERN
FEATURES: Final = (BASIC | MRG, BASIC | MRG | EVENT_IDX | OFFLOADS, BASIC | EVENT_IDX | OFFLOADS, 1 << 30)
MTUS: Final = (1500, 1280, 576, 0)

# What is done; the rest of the byte are flags.
FRAME, HOST_SEND, HOST_END, HOST_OPENS, PASS_TIME, NOTHING = range(6)
KINDS: Final = 8  # those beyond are frames, too
LENGTHS, FOLLOWS, SPLIT, OFFLOAD = 0x10, 0x20, 0x40, 0x80  # flags of a frame
OF_FRAMES: Final = ("short", "malformed", "fragment", "protocol", "source")

#: (version, port of the guest's, port of the peer's)
Ends = tuple[int, int, int]


class Host:
    """The sockets that are at the other end."""

    def __init__(self) -> None:
        self.listening = {version: self._bound(version, socket.SOCK_STREAM, PORT) for version in FAMILIES}
        self.udp = {version: self._bound(version, socket.SOCK_DGRAM, PORT) for version in FAMILIES}
        for sock in self.listening.values():
            sock.listen(64)
        self.open: list[socket.socket] = []
        self.peers: list[tuple[int, Any]] = []

    @staticmethod
    def _bound(version: int, kind: socket.SocketKind, port: int) -> socket.socket:
        sock = socket.socket(FAMILIES[version], kind)
        if version == 6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((LOOPBACK[version], port))
        sock.setblocking(False)
        return sock

    def look(self) -> None:
        """Take what has come."""
        for version, sock in self.listening.items():
            with contextlib.suppress(OSError):
                while True:
                    found, _ = sock.accept()
                    found.setblocking(False)
                    self.open.append(found)
            with contextlib.suppress(OSError):
                while True:
                    self.peers.append((version, self.udp[version].recvfrom(65536)[1]))

    def send(self, which: int, size: int) -> None:
        """Have something for the guest, on a connection or as a datagram."""
        self.look()
        with contextlib.suppress(OSError):
            if self.peers and (which & 1 or not self.open):
                version, name = self.peers[which % len(self.peers)]
                self.udp[version].sendto(bytes(size), name)
            elif self.open:
                sock = self.open[which % len(self.open)]
                sock.send(bytes(size))
                sock.recv(1 << 16)

    def end(self, how: int) -> None:
        """End a connection, by FIN or by RST."""
        self.look()
        if not self.open:
            return
        sock = self.open[how // 4 % len(self.open)]
        with contextlib.suppress(OSError):
            if how & 1:
                sock.shutdown(socket.SHUT_WR)
            else:
                self._abort(sock)
                self.open.remove(sock)

    def connect(self, how: int) -> None:
        """Come to the forwarded port."""
        version = 6 if how & 1 else 4
        sock = socket.socket(FAMILIES[version], socket.SOCK_DGRAM if how & 2 else socket.SOCK_STREAM)
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.connect((LOOPBACK[version], FORWARDED))
        if how & 2:
            with contextlib.suppress(OSError):
                sock.send(bytes(how))
        self.open.append(sock)

    @staticmethod
    def _abort(sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()

    def reset(self) -> None:
        """As at the beginning."""
        self.look()
        for sock in self.open:
            self._abort(sock)
        self.open.clear()
        self.peers.clear()


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """Whatever is opened within is closed again."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    more = set(os.listdir("/proc/self/fd")) - before
    # What was listed is gone by now: the descriptor of the list itself.
    names = [os.readlink(f"/proc/self/fd/{fd}") for fd in more if os.path.exists(f"/proc/self/fd/{fd}")]
    require(not names, f"descriptors are left: {names}")


class Link:
    """The engine, the guest's memory, and both ends."""

    def __init__(self) -> None:
        with inside():
            self.host = Host()
            self.engine = Engine(max_flows=MAX_FLOWS)
            for version in FAMILIES:
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                    sock = Host._bound(version, kind, FORWARDED)
                    if kind == socket.SOCK_STREAM:
                        sock.listen(16)
                    self.engine.listen(sock.detach(), PORT)
        self.config = NetConfig(
            addr4=ADDR4,
            prefix_len4=24,
            gateway4=GATEWAY4,
            addr6=ADDR6,
            dns4=[IPv4Address("192.0.2.1")],
            dns6=[GATEWAY6],
            search=["example.org"],
            hostname="guest",
            fqdn="guest.example.org",
        )
        self.responder = Responder(self.config)
        self.ram = Ram()
        self.ram.attach(self.engine, FEATURES[0], NUM)
        self.unseen = self.engine.observed()

    def run(self, data: bytes) -> bool:
        """An execution. Whether the guest was sent something."""
        with inside(), nothing_left():
            try:
                return Run(self, Script(data)).all()
            finally:
                self.clean()

    def clean(self) -> None:
        """As if no guest had been there."""
        self.engine.close_flows()
        self.host.reset()
        self.engine.accept_waiting()
        self.engine.close_flows()
        self.engine.step()
        self.engine.take_rare()
        self.engine.forget_observed(self.unseen)


class Run:
    """One execution."""

    def __init__(self, link: Link, script: Script) -> None:
        self.link, self.engine, self.ram, self.host = link, link.engine, link.ram, link.host
        self.script = script
        first = script.u8()
        self.features = FEATURES[first & 3]
        self.vnet = 12 if self.features & (MODERN | MRG) else 10
        self.mtu = MTUS[first >> 2 & 3]
        self.out = self.back = self.sent = 0  # chains made; chains back; frames for the guest
        self.given = self.taken = 0  # receive buffers
        self.heads: list[int] = []
        self.next: dict[Ends, tuple[int, int]] = {}  # of a connection: the peer's next number, and ours
        self._begin()

    def _begin(self) -> None:
        for ring in (RX, TX):
            self.engine.ring_stop(ring)
        self.ram.wipe()
        self.engine.set_features(self.features)
        self._configure()
        for ring in (RX, TX):
            self.ram.start(self.engine, ring, 0)
        self.ram.write(DESC[RX], DESCRIPTORS)
        self.ram.write(AVAIL[RX] + 4, struct.pack(f"<{BUFFERS}H", *range(BUFFERS)))
        self.ram.store16(AVAIL[RX] + 2, BUFFERS)
        self.given = BUFFERS

    def _configure(self) -> None:
        config = self.link.config
        config.mtu = self.mtu
        self.engine.configure(
            our_mac=config.our_mac,
            addr4=packed16(ADDR4),
            addr6=packed16(ADDR6),
            our4=packed16(GATEWAY4),
            our_ll=packed16(config.our_link_local),
            mtu=self.mtu,
            maps=[
                (packed16(gateway), 0, socket.inet_pton(FAMILIES[6], host), 0)
                for gateway, host in ((GATEWAY4, "::ffff:127.0.0.1"), (GATEWAY6, "::1"))
            ],
        )

    def all(self) -> bool:
        """The whole script."""
        before = self.engine.counters()
        for _ in range(STEPS):
            if not self.script:
                break
            self._one()
            self._settle()
        after = self.engine.counters()
        require(after["frames_from_guest"] - before["frames_from_guest"] == self.out, "frames that were not counted")
        bad = sum(after["drops"][name] - before["drops"][name] for name in OF_FRAMES)
        require(bad <= self.out, "more frames are bad than there were")
        require(after["flows"] <= MAX_FLOWS, "more flows than there may be")
        buffers = [(FREE + BUFFER * number, FREE + BUFFER * number + ROOM) for number in range(BUFFERS)]
        self.ram.check(buffers)
        return self.sent > 0

    def _one(self) -> None:
        script = self.script
        what = script.u8()
        kind = what % KINDS
        if kind == HOST_SEND:
            self.host.send(script.u8(), script.u16() % 20000)
        elif kind == HOST_END:
            self.host.end(what // KINDS)
        elif kind == HOST_OPENS:
            self.host.connect(what // KINDS)
        elif kind == PASS_TIME:
            self.engine.advance(script.u16())
        elif kind != NOTHING:
            frame = script.take(script.u16() % 1600)
            if what & LENGTHS:
                frame = wire.with_lengths(frame)
            if what & FOLLOWS:
                frame = self._following(frame)
            vnet = script.take(10) if what & OFFLOAD else b""
            self._send(vnet.ljust(self.vnet, b"\0") + frame, script.u8() if what & SPLIT else 0)

    def _send(self, data: bytes, cut: int) -> None:
        """Have the engine given a frame, in as many as three pieces."""
        slot = self.out % (NUM // PARTS)
        at = OUT + slot * BUFFER
        require(at + len(data) <= SIZE, "no room for that frame")
        self.ram.write(at, data)
        ends = sorted({min(cut, len(data)), min(cut * 2, len(data)), len(data)} - {0}) or [0]
        start = 0
        for number, end in enumerate(ends):
            flags = 0 if end == ends[-1] else F_NEXT
            desc = slot * PARTS + number
            self.ram.set_desc(TX, desc, BASE + at + start, end - start, flags, desc + 1)
            start = end
        self.heads.append(slot * PARTS)
        self.ram.push(TX, self.out, slot * PARTS)
        self.out += 1
        self.ram.kick(TX)

    def _give(self, number: int) -> None:
        self.ram.push(RX, self.given, number)
        self.given += 1

    def _settle(self) -> None:
        """Let the engine work, and look at what it has done."""
        for _ in range(4):
            self.engine.step()
            for frame in self.engine.take_rare():
                for answer in self.link.responder.respond(frame):
                    self.engine.inject(answer)
            if not self._look():
                return
            self.ram.kick(RX)

    def _look(self) -> bool:
        """Whether there was something for the guest."""
        back = self.ram.used(TX, self.back)
        require(back == [(head, 0) for head in self.heads[: len(back)]], "chains that come back in another order")
        del self.heads[: len(back)]
        self.back += len(back)
        require(not self.heads, "a chain that did not come back")
        require(not self.ram.broken(TX) and not self.ram.broken(RX), "a ring that broke")
        buffers = self.ram.used(RX, self.taken)
        self.taken += len(buffers)
        at = 0
        while at < len(buffers):
            at += self._frame(buffers, at)
        for number, _ in buffers:
            self._give(number)
        return bool(buffers)

    def _frame(self, buffers: list[tuple[int, int]], at: int) -> int:
        """Look at the frame that begins there. In how many buffers it is."""
        whole = self._buffer(*buffers[at])
        count = 1
        if self.vnet == 12:
            count = int.from_bytes(whole[10:12], "little")
            require(1 <= count <= len(buffers) - at, f"a frame in {count} buffers")
            require(count == 1 or bool(self.features & MRG), "buffers that are merged unasked")
            whole += b"".join(self._buffer(*each) for each in buffers[at + 1 : at + count])
        require(len(whole) > self.vnet, "a frame of nothing")
        self._check_offload(whole[0], whole[1])
        seen = wire.check(whole[self.vnet :], self.link.config.our_mac, self.mtu, whole[:10])
        self.sent += 1
        if seen.proto == wire.TCP:
            self._note(seen)
        return count

    def _check_offload(self, flags: int, gso: int) -> None:
        """Only what was agreed on."""
        agreed = self.features & OFFLOADS
        require(bool(agreed) or not (flags or gso), "an offload that the guest does not know")

    def _buffer(self, head: int, written: int) -> bytes:
        require(head < BUFFERS and 0 < written <= ROOM, f"{written} bytes in buffer {head}")
        at = FREE + BUFFER * head
        return self.ram.map[at : at + written]

    # ---- for connections to get somewhere

    def _note(self, seen: wire.Seen) -> None:
        """What the peer of a connection has got to."""
        peer, own, seq, ack = struct.unpack_from("!HHII", seen.above)
        flags, size = seen.above[13], len(seen.above) - (seen.above[12] >> 4) * 4
        version = 4 if seen.kind == wire.IPV4 else 6
        self.next[version, own, peer] = ((seq + size + (flags & 1) + (flags >> 1 & 1)) & 0xFFFFFFFF, ack)

    def _following(self, frame: bytes) -> bytes:
        """A segment whose numbers continue its connection, give or take what they are."""
        kind = frame[12:14]
        at = {b"\x08\x00": 34, b"\x86\xdd": 54}.get(kind, 0)
        if not at or len(frame) < at + 12:
            return frame
        own, peer, seq, ack = struct.unpack_from("!HHII", frame, at)
        known = self.next.get((4 if at == 34 else 6, own, peer))
        if known is None:
            return frame
        new = ((known[1] + seq) & 0xFFFFFFFF, (known[0] + ack) & 0xFFFFFFFF)
        return frame[: at + 4] + struct.pack("!II", *new) + frame[at + 12 :]


link: Callable[[], Link] = cache(Link)


def run(data: bytes) -> bool:
    """The target. Whether the guest was sent something."""
    return link().run(data)


# ---- to begin with


def _put_frame(writer: Writer, frame: bytes, flags: int = LENGTHS | FOLLOWS) -> None:
    writer.put("BH", FRAME | flags, len(frame)).bytes(frame)
    if flags & OFFLOAD:
        writer.bytes(bytes(10))
    if flags & SPLIT:
        writer.put("B", 20)


def seeds() -> Iterator[bytes]:
    """Scripts in which something comes of it: a connection each way, datagrams, pings, questions, fragments."""
    from scapy.layers.dhcp import BOOTP, DHCP
    from scapy.layers.dhcp6 import DUID_LL, DHCP6_Solicit, DHCP6OptClientId, DHCP6OptIA_NA
    from scapy.layers.inet import ICMP, IP, TCP, UDP, IPerror, UDPerror
    from scapy.layers.inet6 import (
        ICMPv6DestUnreach,
        ICMPv6EchoRequest,
        ICMPv6ND_NS,
        ICMPv6ND_RS,
        IPerror6,
        IPv6,
        IPv6ExtHdrFragment,
    )
    from scapy.layers.l2 import ARP, Ether
    from scapy.packet import Raw

    ether = Ether(src="02:00:00:00:00:02", dst="02:00:00:00:00:01")
    four: Any = ether / IP(src=str(ADDR4), dst=str(GATEWAY4))
    six: Any = ether / IPv6(src=str(ADDR6), dst=str(GATEWAY6))
    away4: Any = ether / IP(src=str(ADDR4), dst="203.0.113.7")
    away6: Any = ether / IPv6(src=str(ADDR6), dst="2001:db8:ffff::7")
    options = [("MSS", 1460), ("NOP", None), ("WScale", 7)]
    for variant in (0, 1, 2, 3, 5, 10):
        for ip in (four, six):
            opened = Writer().put("B", variant)
            _put_frame(opened, bytes(ip / TCP(sport=1000, dport=PORT, flags="S", options=options)))
            own: Any = {"sport": 1000, "dport": PORT, "window": 65535}
            _put_frame(opened, bytes(ip / TCP(flags="A", **own)))
            _put_frame(opened, bytes(ip / TCP(flags="PA", **own) / Raw(b"data" * 20)), LENGTHS | FOLLOWS | SPLIT)
            opened.put("BBH", HOST_SEND, 0, 9000)
            _put_frame(opened, bytes(ip / TCP(flags="A", **own)))
            yield opened.data
            closed = Writer().bytes(opened.data).put("B", HOST_END | 8)
            _put_frame(closed, bytes(ip / TCP(flags="FA", **own)))
            _put_frame(closed, bytes(ip / TCP(flags="A", seq=1, **own)))
            yield closed.put("BH", PASS_TIME, 3000).data
            yield Writer().bytes(opened.data).put("BH", PASS_TIME, 800).put("BB", HOST_END, NOTHING).data
            came = Writer().put("BB", variant, HOST_OPENS | (0 if ip is four else 8))
            yield came.data
    for variant in (0, 1, 6):
        mixed = Writer().put("B", variant)
        for ip in (four, six, away4, away6):
            _put_frame(mixed, bytes(ip / UDP(sport=2000, dport=PORT) / Raw(b"datagram" * 9)))
            mixed.put("BBH", HOST_SEND, 1, 4000)
            _put_frame(mixed, bytes(ip / TCP(sport=3000, dport=9, flags="S")))
        mixed.put("BB", HOST_OPENS | 16, HOST_OPENS | 24)
        yield mixed.data
        small = Writer().put("B", variant)
        for frame in (
            four / ICMP(id=7, seq=1) / Raw(b"ping" * 10),
            six / ICMPv6EchoRequest(id=7, seq=1, data=b"ping" * 10),
            ether / ARP(psrc=str(ADDR4), pdst=str(GATEWAY4)),
            ether / IPv6(src="fe80::2", dst="ff02::1:ff00:1") / ICMPv6ND_NS(tgt=str(GATEWAY6)),
            ether / IPv6(src="fe80::2", dst="ff02::2") / ICMPv6ND_RS(),
            ether
            / IP(src="0.0.0.0", dst="255.255.255.255")
            / UDP(sport=68, dport=67)
            / BOOTP(chaddr=GUEST_MAC, xid=5)
            / DHCP(options=[("message-type", "discover"), "end"]),
            ether
            / IPv6(src="fe80::2", dst="ff02::1:2")
            / UDP(sport=546, dport=547)
            / DHCP6_Solicit(trid=5)
            / DHCP6OptClientId(duid=DUID_LL(lladdr="02:00:00:00:00:02"))
            / DHCP6OptIA_NA(iaid=1),
        ):
            _put_frame(small, bytes(frame))
        yield small.data
        pieces = Writer().put("B", variant)
        datagram = bytes(UDP(sport=2000, dport=PORT, len=1608, chksum=0)) + bytes(1600)
        for start in (0, 800):
            more = start == 0
            part = datagram[start : start + 800] if more else datagram[start:]
            here: Any = ether / IP(src=str(ADDR4), dst=str(GATEWAY4), id=3, proto=17, frag=start // 8, flags=int(more))
            _put_frame(pieces, bytes(here / Raw(part)), 0)
            there: Any = six / IPv6ExtHdrFragment(nh=17, offset=start // 8, m=int(more), id=3)
            _put_frame(pieces, bytes(there / Raw(part)), 0)
        yield pieces.put("BBH", HOST_SEND, 1, 3000).put("BBH", HOST_SEND, 3, 5000).data
        errors = Writer().put("B", variant)
        told4: Any = (
            ICMP(type=3, code=3) / IPerror(src=str(GATEWAY4), dst=str(ADDR4)) / UDPerror(sport=PORT, dport=2000)
        )
        told6: Any = (
            ICMPv6DestUnreach(code=4) / IPerror6(src=str(GATEWAY6), dst=str(ADDR6)) / UDPerror(sport=PORT, dport=2000)
        )
        _put_frame(errors, bytes(four / UDP(sport=2000, dport=PORT) / Raw(b"x")))
        _put_frame(errors, bytes(four / told4))
        _put_frame(errors, bytes(six / UDP(sport=2000, dport=PORT) / Raw(b"x")))
        _put_frame(errors, bytes(six / told6))
        _put_frame(errors, bytes(four / UDP(sport=2000, dport=99) / Raw(b"x")))
        yield errors.put("B", NOTHING).data
        large = bytes(four / UDP(sport=2000, dport=PORT) / Raw(bytes(1400)))
        cut = Writer().put("B", 1).put("BH", FRAME | LENGTHS | OFFLOAD, len(large)).bytes(large)
        yield cut.put("BBHHHH", 1, 5, 42, 500, 34, 6).data


TARGETS: Final = {"frames": Target(run, seeds, 8192)}
