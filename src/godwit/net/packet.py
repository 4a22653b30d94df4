# SPDX-License-Identifier: GPL-2.0-or-later
"""Ethernet, IP, UDP and ICMPv6 as far as the rare frames need them, and the cursor they are read with.

Pure Python: a handful of frames per hour go through here. What is read comes
from the guest and is hostile; every read goes through ``Reader``, which knows
the end. Checksums of transport headers are not verified: the frames come out
of shared memory, and a guest that negotiated checksum offload leaves them
partial. Answers carry full checksums.
"""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

ETH_IPV4 = 0x0800
ETH_ARP = 0x0806
ETH_IPV6 = 0x86DD
BROADCAST = b"\xff" * 6
PROTO_UDP = 17
PROTO_ICMPV6 = 58
DHCP_SERVER_PORT = 67
DHCP_CLIENT_PORT = 68
DHCPV6_CLIENT_PORT = 546
DHCPV6_SERVER_PORT = 547
IP4_HEADER = 20
IP6_HEADER = 40
UDP_HEADER = 8


class MalformedError(ValueError):
    """The frame ends too early or contradicts itself; it is dropped."""


class Reader:
    """A bounded cursor over bytes; each ``pull`` past the end raises MalformedError."""

    __slots__ = ("_at", "_data")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes not yet pulled."""
        return len(self._data) - self._at

    def pull(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        if count > self.left:
            raise MalformedError(f"{count} bytes wanted, {self.left} left")
        start = self._at
        self._at += count
        return self._data[start : self._at]

    def pull_u8(self) -> int:
        return self.pull(1)[0]

    def pull_u16(self) -> int:
        return int.from_bytes(self.pull(2), "big")

    def pull_u32(self) -> int:
        return int.from_bytes(self.pull(4), "big")

    def pull_ip4(self) -> IPv4Address:
        return IPv4Address(self.pull(4))

    def pull_ip6(self) -> IPv6Address:
        return IPv6Address(self.pull(16))

    def rest(self) -> bytes:
        """All that is left."""
        return self.pull(self.left)


class Ethernet(NamedTuple):
    """A frame; ``kind`` is the EtherType."""

    dest: bytes
    source: bytes
    kind: int
    payload: bytes


class Packet4(NamedTuple):
    """An unfragmented IPv4 packet, without its options."""

    source: IPv4Address
    dest: IPv4Address
    protocol: int
    payload: bytes


class Packet6(NamedTuple):
    """An IPv6 packet without extension headers."""

    source: IPv6Address
    dest: IPv6Address
    protocol: int
    hop_limit: int
    payload: bytes


class Datagram(NamedTuple):
    """A UDP datagram."""

    source_port: int
    dest_port: int
    payload: bytes


def parse_ethernet(frame: bytes) -> Ethernet:
    reader = Reader(frame)
    return Ethernet(reader.pull(6), reader.pull(6), reader.pull_u16(), reader.rest())


def parse_ip4(data: bytes) -> Packet4:
    """RFC 791, section 3.1. A fragment is MalformedError: nobody fragments what is answered here."""
    reader = Reader(data)
    first = reader.pull_u8()
    header = (first & 0x0F) * 4
    reader.pull(1)
    total = reader.pull_u16()
    reader.pull(2)
    fragment = reader.pull_u16()
    reader.pull(1)
    protocol = reader.pull_u8()
    reader.pull(2)
    source, dest = reader.pull_ip4(), reader.pull_ip4()
    if first >> 4 != 4 or header < IP4_HEADER or total < header or fragment & 0x3FFF:
        raise MalformedError("no whole IPv4 packet")
    reader.pull(header - IP4_HEADER)
    return Packet4(source, dest, protocol, reader.pull(total - header))


def parse_ip6(data: bytes) -> Packet6:
    """RFC 8200, section 3. Extension headers stay in the payload, as what ``protocol`` says."""
    reader = Reader(data)
    if reader.pull_u32() >> 28 != 6:
        raise MalformedError("no IPv6 packet")
    length = reader.pull_u16()
    protocol, hop_limit = reader.pull_u8(), reader.pull_u8()
    source, dest = reader.pull_ip6(), reader.pull_ip6()
    return Packet6(source, dest, protocol, hop_limit, reader.pull(length))


def parse_udp(data: bytes) -> Datagram:
    """RFC 768."""
    reader = Reader(data)
    source_port, dest_port, length = reader.pull_u16(), reader.pull_u16(), reader.pull_u16()
    reader.pull(2)
    if length < UDP_HEADER:
        raise MalformedError("UDP length below its header")
    return Datagram(source_port, dest_port, reader.pull(length - UDP_HEADER))


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def build_ethernet(dest: bytes, source: bytes, kind: int, payload: bytes) -> bytes:
    return dest + source + kind.to_bytes(2, "big") + payload


def build_udp4(source: IPv4Address, source_port: int, dest: IPv4Address, dest_port: int, payload: bytes) -> bytes:
    """An IPv4 packet with one UDP datagram."""
    length = UDP_HEADER + len(payload)
    header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, IP4_HEADER + length, 0, 0, 64, PROTO_UDP, 0, *_packed(source, dest))
    header = header[:10] + checksum(header).to_bytes(2, "big") + header[12:]
    pseudo = source.packed + dest.packed + struct.pack("!BBH", 0, PROTO_UDP, length)
    return header + _udp(pseudo, source_port, dest_port, payload)


def build_udp6(source: IPv6Address, source_port: int, dest: IPv6Address, dest_port: int, payload: bytes) -> bytes:
    """An IPv6 packet with one UDP datagram."""
    udp = _udp(_pseudo6(source, dest, PROTO_UDP, UDP_HEADER + len(payload)), source_port, dest_port, payload)
    return _ip6(source, dest, PROTO_UDP, 64, udp)


def build_icmp6(source: IPv6Address, dest: IPv6Address, message: bytes) -> bytes:
    """An IPv6 packet with an ICMPv6 message, whose checksum (bytes 2 and 3) is filled in; hop limit 255."""
    pseudo = _pseudo6(source, dest, PROTO_ICMPV6, len(message))
    total = checksum(pseudo + message[:2] + b"\0\0" + message[4:])
    return _ip6(source, dest, PROTO_ICMPV6, 255, message[:2] + total.to_bytes(2, "big") + message[4:])


def multicast_mac(group: IPv6Address) -> bytes:
    """The Ethernet address of an IPv6 group (RFC 2464, section 7)."""
    return b"\x33\x33" + group.packed[12:]


def _packed(source: IPv4Address, dest: IPv4Address) -> tuple[bytes, bytes]:
    return source.packed, dest.packed


def _udp(pseudo: bytes, source_port: int, dest_port: int, payload: bytes) -> bytes:
    length = UDP_HEADER + len(payload)
    ports = struct.pack("!HHH", source_port, dest_port, length)
    total = checksum(pseudo + ports + b"\0\0" + payload) or 0xFFFF  # 0 would mean "none" (RFC 768)
    return ports + total.to_bytes(2, "big") + payload


def _pseudo6(source: IPv6Address, dest: IPv6Address, protocol: int, length: int) -> bytes:
    return source.packed + dest.packed + struct.pack("!II", length, protocol)


def _ip6(source: IPv6Address, dest: IPv6Address, protocol: int, hop_limit: int, payload: bytes) -> bytes:
    return struct.pack("!IHBB", 6 << 28, len(payload), protocol, hop_limit) + source.packed + dest.packed + payload
