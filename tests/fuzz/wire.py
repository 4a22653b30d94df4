# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether a frame is one that a guest may be sent: strict, and without a library, for there are thousands a second."""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from .devices import require

ETHER: Final = 14
ARP, IPV4, IPV6 = 0x0806, 0x0800, 0x86DD
ICMP, TCP, UDP, FRAGMENT, ICMPV6 = 1, 6, 17, 44, 58
NEEDS_CSUM: Final = 1
GSO: Final = {(TCP, IPV4): 1, (TCP, IPV6): 4, (UDP, IPV4): 5, (UDP, IPV6): 5}
CHECKSUM: Final = {TCP: 16, UDP: 6, ICMP: 2, ICMPV6: 2}  # where it is in the header


class Seen(NamedTuple):
    """What is above IP in a frame."""

    kind: int  # of Ethernet
    proto: int  # 0: a fragment, or no IP
    pseudo: bytes  # both addresses
    above: bytes


def ones_sum(data: bytes) -> int:
    """RFC 1071."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def check(frame: bytes, source: bytes, mtu: int = 0, vnet: bytes = bytes(10)) -> Seen:
    """Take a frame apart. ``source``: the only MAC address that it may come from; ``mtu`` 0: of any size.

    ``vnet``: the virtio header, without the number of buffers.
    """
    flags, gso, hdr_len, gso_size, start, offset = struct.unpack("<BBHHHH", vnet)
    require(len(frame) >= ETHER, "a frame without a header")
    require(frame[6:12] == source, f"a frame from {frame[6:12].hex()}")
    require(not mtu or gso or len(frame) <= ETHER + mtu, f"a frame of {len(frame)} bytes for an MTU of {mtu}")
    kind = int.from_bytes(frame[12:14], "big")
    packet = frame[ETHER:]
    if kind == ARP:
        require(len(packet) == 28 and packet[:6] == b"\0\1\x08\0\6\4" and not any(vnet), "no ARP of IPv4")
        return Seen(kind, 0, b"", packet)
    require(kind in (IPV4, IPV6), f"a frame of kind {kind:#x}")
    if kind == IPV4:
        require(len(packet) >= 20 and packet[0] == 0x45, "no IPv4 header, or one with options")
        require(int.from_bytes(packet[2:4], "big") == len(packet), "another total length")
        require(ones_sum(packet[:20]) == 0xFFFF, "a header checksum that is wrong")
        require(packet[8] > 0, "no time to live")
        head, proto, pseudo = 20, packet[9], packet[12:20]
        part = int.from_bytes(packet[6:8], "big") & 0xBFFF
        more = part & 0x2000
        require(not part or not packet[6] & 0x40, "a fragment that must not be one")
    else:
        require(len(packet) >= 40 and packet[0] >> 4 == 6, "no IPv6 header")
        require(int.from_bytes(packet[4:6], "big") == len(packet) - 40, "another payload length")
        require(packet[7] > 0, "no hop limit")
        head, proto, pseudo = 40, packet[6], packet[8:40]
        part = more = 0
        if proto == FRAGMENT:
            require(len(packet) >= 48, "no fragment header")
            head, part, more = 48, 1, packet[43] & 1
    above = packet[head:]
    if part:
        require(not more or len(above) % 8 == 0, "a fragment that ends within a unit")
        require(not any(vnet), "a fragment with an offload")
        return Seen(kind, 0, pseudo, above)
    require(proto in CHECKSUM, f"a packet of protocol {proto}")
    require((proto == ICMP) <= (kind == IPV4) and (proto == ICMPV6) <= (kind == IPV6), "the other ICMP")
    at = CHECKSUM[proto]
    require(len(above) >= {TCP: 20}.get(proto, 8), "no header above IP")
    summed = b"" if proto == ICMP else pseudo + struct.pack("!IHBB", len(above), 0, 0, proto)
    if flags:
        require(flags == NEEDS_CSUM and proto in (TCP, UDP), f"virtio flags {flags:#x}")
        require((start, offset) == (ETHER + head, at), "a checksum that the guest is to put elsewhere")
        require(above[at : at + 2] == ones_sum(summed).to_bytes(2, "big"), "a partial checksum that is wrong")
    else:
        require(ones_sum(summed + above) == 0xFFFF, "a checksum that is wrong")
    if proto == UDP:
        require(int.from_bytes(above[4:6], "big") == len(above), "another length in the UDP header")
    size = (above[12] >> 4) * 4 if proto == TCP else 8
    require(20 <= size <= len(above) if proto == TCP else True, "a TCP header of another size")
    if gso:
        require(gso == GSO.get((proto, kind)), f"a virtio offload {gso}")
        require(hdr_len == ETHER + head + size, "a virtio header length that is another")
        require(0 < gso_size < len(above) - size, "an offload of what is one segment")
        require(not mtu or head + size + gso_size <= mtu, "segments beyond the MTU")
    return Seen(kind, proto, pseudo, above)


def with_lengths(frame: bytes) -> bytes:
    """A frame whose IP and UDP headers state the lengths that there are, as far as it has such headers."""
    data = bytearray(frame)
    size = len(data) - ETHER
    kind = int.from_bytes(data[12:14], "big")
    if kind == IPV4 and size >= 20:
        head, proto = (data[14] & 0xF) * 4, data[23]
        struct.pack_into("!H", data, 16, size & 0xFFFF)
    elif kind == IPV6 and size >= 40:
        head, proto = 40, data[20]
        struct.pack_into("!H", data, 18, (size - 40) & 0xFFFF)
    else:
        return frame
    if proto == UDP and size >= head + 8:
        struct.pack_into("!H", data, ETHER + head + 4, (size - head) & 0xFFFF)
    return bytes(data)
