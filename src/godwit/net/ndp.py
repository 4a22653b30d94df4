# SPDX-License-Identifier: GPL-2.0-or-later
"""Neighbour discovery for the guest (RFC 4861, RFC 8106): router and neighbour advertisements.

As with ARP, every address but the guest's own is at godwit's MAC address. A
neighbour solicitation from the unspecified address is duplicate address
detection (RFC 4862, section 5.4) and never answered: the guest may have any
address but the router's.

A guest makes up its address in the prefix itself (SLAAC) and tells nobody but
in passing. One that is met when it has been running for long, and that only
serves, is asked: see `questions`.

What the guest was told and does not hold any more (``NetConfig.withdrawn``) is
taken back in each advertisement, for as long as the guest may believe in it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from ipaddress import IPv6Address, IPv6Network

from godwit.net.config import MIN_MTU, NetConfig, link_local
from godwit.net.dns import MAX_SERVERS, encode_names
from godwit.net.packet import (
    ETH_IPV6,
    PROTO_ICMPV6,
    Ethernet,
    MalformedError,
    Packet6,
    Reader,
    build_ethernet,
    build_icmp6,
    multicast_mac,
    parse_ethernet,
    parse_ip6,
)

ALL_NODES = IPv6Address("ff02::1")

ROUTER_SOLICITATION = 133
ROUTER_ADVERTISEMENT = 134
NEIGHBOUR_SOLICITATION = 135
NEIGHBOUR_ADVERTISEMENT = 136
ECHO_REQUEST = 128

OPTION_SOURCE_LINK = 1
OPTION_TARGET_LINK = 2
OPTION_PREFIX = 3
OPTION_MTU = 5
OPTION_RDNSS = 25
OPTION_DNSSL = 31

RA_MANAGED = 0x80
RA_OTHER = 0x40
PREFIX_ON_LINK = 0x80
PREFIX_AUTONOMOUS = 0x40
NA_ROUTER = 0x80
NA_SOLICITED = 0x40
NA_OVERRIDE = 0x20

ROUTER_LIFETIME = 65535  # seconds; the most RFC 8319 allows
INFINITE = 0xFFFFFFFF
# How often an unsolicited advertisement keeps the guest's route alive, in
# seconds: three chances per lifetime, and practically never a wake-up.
ADVERTISE_INTERVAL = ROUTER_LIFETIME // 3
# An advertisement stays below the smallest MTU, with all that is withdrawn.
MAX_DNSSL = 480  # bytes of names
MAX_OLD_PREFIXES = 3
MAX_OLD_DNSSL = 240
MAX_OLD_RDNSS = 4
# Of a prefix that is withdrawn: the least that a host accepts for addresses
# that were valid for longer (RFC 4862, section 5.5.3, e).
WITHDRAWN_VALID = 7200
# An advertisement of a change may be lost: it is sent three times (RFC 4861,
# section 6.2.4: MAX_INITIAL_RTR_ADVERTISEMENTS, and MAX_INITIAL_RTR_ADVERT_INTERVAL).
CHANGE_REPEATS = 2
CHANGE_INTERVAL = 16.0  # seconds


def respond(config: NetConfig, ethernet: Ethernet, packet: Packet6) -> bytes | None:
    """The advertisement that answers a solicitation, or None."""
    if not config.ndp:
        return None
    reader = Reader(packet.payload)
    kind, code = reader.pull_u8(), reader.pull_u8()
    reader.pull(2)
    if packet.hop_limit != 255 or code != 0:  # section 6.1.1 and 7.1.1
        return None
    if kind == ROUTER_SOLICITATION:
        reader.pull(4)
        _check_options(reader, ROUTER_SOLICITATION, packet.source)
        if not config.ra:
            return None
        if packet.source.is_unspecified:
            return unsolicited_advertisement(config)
        return _router_advertisement(config, ethernet.source, packet.source)
    if kind == NEIGHBOUR_SOLICITATION:
        reader.pull(4)
        target = reader.pull_ip6()
        _check_options(reader, NEIGHBOUR_SOLICITATION, packet.source)
        return _neighbour_advertisement(config, ethernet, packet, target)
    return None


def unsolicited_advertisement(config: NetConfig) -> bytes:
    """A router advertisement to all nodes."""
    return _router_advertisement(config, multicast_mac(ALL_NODES), ALL_NODES)


def farewell(config: NetConfig, router: IPv6Address) -> bytes:
    """To all nodes: this router is none any more (RFC 4861, section 6.2.5), and what it told does not hold.

    It goes by another address now, or IPv6 is off.
    """
    message = struct.pack("!BBHBBHII", ROUTER_ADVERTISEMENT, 0, 0, 64, 0, 0, 0, 0)
    message += bytes([OPTION_SOURCE_LINK, 1]) + config.our_mac + _taken_back(config)
    packet = build_icmp6(router, ALL_NODES, message)
    return build_ethernet(multicast_mac(ALL_NODES), config.our_mac, ETH_IPV6, packet)


def questions(config: NetConfig, seen: IPv6Address, seen_link_local: IPv6Address) -> list[bytes]:
    """Echo requests to all nodes (RFC 4443, section 4.1), whose answers show the addresses that the guest has.

    A host answers from the address that it would use for who asks (RFC 6724):
    one of the prefix, if a router of that prefix asks. ``seen`` and
    ``seen_link_local`` are those that it is known to use, or unspecified; what
    they tell is not asked for.
    """
    frames = []
    if config.ndp and config.prefix6 is not None and seen not in config.prefix6:
        own = link_local(config.our_mac).packed[8:]  # nobody else on this link has it
        frames.append(_question(config, IPv6Address(config.prefix6.network_address.packed[:8] + own)))
    if config.ndp and config.has_ipv6 and seen_link_local.is_unspecified:
        frames.append(_question(config, config.our_link_local))
    return frames


def is_about_addresses(frame: bytes) -> bool:
    """Whether the guest may soon have other addresses: it looks for a router, or for others with an address of its own.

    What it asks about its neighbours, us among them, is not: an answer to a
    question has it do so, and would be followed by the next question for ever.
    """
    try:
        ethernet = parse_ethernet(frame)
        if ethernet.kind != ETH_IPV6:
            return False
        packet = parse_ip6(ethernet.payload)
        if packet.protocol != PROTO_ICMPV6:
            return False
        kind = Reader(packet.payload).pull_u8()
    except MalformedError:
        return False
    return kind == ROUTER_SOLICITATION or (kind == NEIGHBOUR_SOLICITATION and packet.source.is_unspecified)


def _question(config: NetConfig, source: IPv6Address) -> bytes:
    packet = build_icmp6(source, ALL_NODES, struct.pack("!BBHHH", ECHO_REQUEST, 0, 0, 0, 0))
    return build_ethernet(multicast_mac(ALL_NODES), config.our_mac, ETH_IPV6, packet)


def _check_options(reader: Reader, kind: int, source: IPv6Address) -> None:
    """Sections 6.1.1 and 7.1.1: no option of length zero, no source link-layer address without a source."""
    while reader.left:
        option, length = reader.pull_u8(), reader.pull_u8()
        if length == 0:
            raise MalformedError("NDP option of length zero")
        reader.pull(length * 8 - 2)
        if option == OPTION_SOURCE_LINK and source.is_unspecified:
            raise MalformedError(f"ICMPv6 {kind} with a link-layer address but no source")


def _neighbour_advertisement(
    config: NetConfig, ethernet: Ethernet, packet: Packet6, target: IPv6Address
) -> bytes | None:
    if target.is_multicast or target.is_unspecified or target in (config.addr6, packet.source):
        return None
    is_router = target in (config.our_link_local, config.gateway6)
    dest, flags = packet.source, NA_SOLICITED | NA_OVERRIDE
    dest_mac = ethernet.source
    if packet.source.is_unspecified:
        if not is_router or not packet.dest.is_multicast:  # section 7.1.1
            return None
        # The guest wants the router's address for itself: section 7.2.4 has
        # the defence go to all nodes, unsolicited.
        dest, dest_mac, flags = ALL_NODES, multicast_mac(ALL_NODES), NA_OVERRIDE
    if is_router or target.is_link_local:
        # Link-local targets are routers here: the guest may have come from a
        # host whose router had another address, and an advertisement without
        # this flag would have it drop that route at once (section 7.2.5).
        flags |= NA_ROUTER
    message = struct.pack("!BBHI", NEIGHBOUR_ADVERTISEMENT, 0, 0, flags << 24) + target.packed
    message += bytes([OPTION_TARGET_LINK, 1]) + config.our_mac
    return build_ethernet(dest_mac, config.our_mac, ETH_IPV6, build_icmp6(target, dest, message))


def _router_advertisement(config: NetConfig, dest_mac: bytes, dest: IPv6Address) -> bytes:
    flags, lifetime = 0, ROUTER_LIFETIME
    if config.dhcpv6:
        flags = RA_OTHER if config.local6 else RA_MANAGED | RA_OTHER
    if config.local6:
        # There is nothing that we could route to for a guest that has a
        # link-local address alone (RFC 4007, section 9).
        lifetime = 0
    message = struct.pack("!BBHBBHII", ROUTER_ADVERTISEMENT, 0, 0, 64, flags, lifetime, 0, 0)
    message += bytes([OPTION_SOURCE_LINK, 1]) + config.our_mac
    if config.prefix6 is not None:
        message += _prefix(config.prefix6, INFINITE, INFINITE)
    if config.mtu:
        message += struct.pack("!BBHI", OPTION_MTU, 1, 0, max(config.mtu, MIN_MTU))
    message += _servers(config.dns6[:MAX_SERVERS], ROUTER_LIFETIME)
    message += _search(config.search, MAX_DNSSL, ROUTER_LIFETIME)
    message += _taken_back(config)
    packet = build_icmp6(config.our_link_local, dest, message)
    return build_ethernet(dest_mac, config.our_mac, ETH_IPV6, packet)


def _taken_back(config: NetConfig) -> bytes:
    """The options that say what does not hold any more."""
    gone = config.withdrawn
    message = b"".join(_prefix(prefix, WITHDRAWN_VALID, 0) for prefix in gone.prefixes6[:MAX_OLD_PREFIXES])
    message += _servers(gone.dns6[:MAX_OLD_RDNSS], 0)  # RFC 8106, section 5.1: not to be used any more
    return message + _search(gone.search, MAX_OLD_DNSSL, 0)


def _prefix(prefix: IPv6Network, valid: int, preferred: int) -> bytes:
    bits = PREFIX_ON_LINK | PREFIX_AUTONOMOUS
    head = struct.pack("!BBBBIII", OPTION_PREFIX, 4, prefix.prefixlen, bits, valid, preferred, 0)
    return head + prefix.network_address.packed


def _servers(servers: Sequence[IPv6Address], lifetime: int) -> bytes:
    if not servers:
        return b""
    head = struct.pack("!BBHI", OPTION_RDNSS, 1 + 2 * len(servers), 0, lifetime)
    return head + b"".join(server.packed for server in servers)


def _search(names: Sequence[str], limit: int, lifetime: int) -> bytes:
    encoded = encode_names(names, limit)
    if not encoded:
        return b""
    encoded += bytes(-len(encoded) % 8)
    return struct.pack("!BBHI", OPTION_DNSSL, 1 + len(encoded) // 8, 0, lifetime) + encoded
