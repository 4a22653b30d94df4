# SPDX-License-Identifier: GPL-2.0-or-later
"""The DHCPv6 server for one guest (RFC 8415): one address, the host's, and no state.

Non-temporary addresses (IA_NA), DNS servers and search list (RFC 3646), the
client's name (RFC 4704), rapid commit. Prefixes and temporary addresses are
not given.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from enum import IntEnum
from ipaddress import IPv6Address
from typing import NamedTuple

from godwit.net.config import MIN_MTU, RENEW_SECONDS, NetConfig
from godwit.net.dns import MAX_SERVERS, encode_name, encode_names
from godwit.net.packet import (
    DHCPV6_CLIENT_PORT,
    DHCPV6_SERVER_PORT,
    ETH_IPV6,
    IP6_HEADER,
    UDP_HEADER,
    Datagram,
    Ethernet,
    Packet6,
    Reader,
    build_ethernet,
    build_udp6,
)

SERVERS = IPv6Address("ff02::1:2")  # All_DHCP_Relay_Agents_and_Servers (section 7.1)
MAX_IAS = 8  # answered in one message; a guest has one
MAX_IA_ADDRESSES = 16  # looked at in one IA_NA
DUID_LENGTHS = range(3, 131)  # bytes of an identifier, its type included (section 11.1)
MESSAGE = 4  # bytes of an answer before its options
MAX_PACKET = 1500  # bytes of an answer, if the MTU lets it
FQDN_S, FQDN_O, FQDN_N = 1, 2, 4  # RFC 4704, section 4.1


class Kind(IntEnum):
    """Message types (section 7.3)."""

    SOLICIT = 1
    ADVERTISE = 2
    REQUEST = 3
    CONFIRM = 4
    RENEW = 5
    REBIND = 6
    REPLY = 7
    RELEASE = 8
    DECLINE = 9
    INFORMATION_REQUEST = 11


class Option(IntEnum):
    """Option codes (section 21 where nothing else is said)."""

    CLIENT_ID = 1
    SERVER_ID = 2
    IA_NA = 3
    IA_ADDRESS = 5
    ORO = 6
    STATUS = 13
    RAPID_COMMIT = 14
    DNS = 23  # RFC 3646
    SEARCH = 24  # RFC 3646
    REFRESH = 32
    FQDN = 39  # RFC 4704


class Status(IntEnum):
    """Status codes (section 21.13)."""

    SUCCESS = 0
    NO_ADDRESSES = 2
    NOT_ON_LINK = 4


class Association(NamedTuple):
    """An IA_NA of a request: its identity and the addresses in it."""

    iaid: bytes
    addresses: list[IPv6Address]


class Message(NamedTuple):
    """A request. Of options that come more than once, other than IA_NA, the first counts."""

    kind: int
    transaction: bytes
    options: dict[int, bytes]
    associations: list[Association]


def parse(data: bytes) -> Message:
    """The payload of a datagram to port 547. Raises MalformedError."""
    reader = Reader(data)
    kind, transaction = reader.pull_u8(), reader.pull(3)
    options: dict[int, bytes] = {}
    associations: list[Association] = []
    for code, value in _pull_options(reader):
        if code == Option.IA_NA:
            associations.append(_association(value))
        else:
            options.setdefault(code, value)
    return Message(kind, transaction, options, associations[:MAX_IAS])


def _pull_options(reader: Reader) -> Iterator[tuple[int, bytes]]:
    while reader.left:
        code, length = reader.pull_u16(), reader.pull_u16()
        yield code, reader.pull(length)


def _association(value: bytes) -> Association:
    reader = Reader(value)
    iaid = reader.pull(4)
    reader.pull(8)
    addresses = [Reader(inner).pull_ip6() for code, inner in _pull_options(reader) if code == Option.IA_ADDRESS]
    return Association(iaid, addresses[:MAX_IA_ADDRESSES])


def server_duid(config: NetConfig) -> bytes:
    """Our identifier, made from the MAC address (DUID-LL, section 11.4): the same on every host."""
    return struct.pack("!HH", 3, 1) + config.our_mac


def respond(config: NetConfig, ethernet: Ethernet, packet: Packet6, datagram: Datagram) -> bytes | None:
    """The frame that answers a request, or None. Raises MalformedError.

    Nobody was told to send to us alone, and what goes to somebody else is not ours (section 16).
    """
    if packet.dest != SERVERS:
        return None
    request = parse(datagram.payload)
    options = _answer(config, request)
    if options is None or packet.source.is_unspecified or packet.source.is_multicast:
        return None
    kind = Kind.REPLY
    if request.kind == Kind.SOLICIT and Option.RAPID_COMMIT not in request.options:
        kind = Kind.ADVERTISE
    message = bytes([kind]) + request.transaction + options
    answer = build_udp6(config.our_link_local, DHCPV6_SERVER_PORT, packet.source, DHCPV6_CLIENT_PORT, message)
    return build_ethernet(ethernet.source, config.our_mac, ETH_IPV6, answer)


def _answer(config: NetConfig, request: Message) -> bytes | None:
    """The options of the answer, or None where there is none (section 16 and 18.3)."""
    client = request.options.get(Option.CLIENT_ID)
    server = request.options.get(Option.SERVER_ID)
    kind = request.kind
    for_us = server == server_duid(config)
    if kind in (Kind.REQUEST, Kind.RENEW, Kind.RELEASE, Kind.DECLINE):
        valid = client is not None and for_us
    elif kind in (Kind.SOLICIT, Kind.CONFIRM, Kind.REBIND):
        valid = client is not None and server is None
    elif kind == Kind.INFORMATION_REQUEST:
        valid = (server is None or for_us) and not request.associations
    else:
        valid = False
    if not valid or not config.has_ipv6 or (client is not None and len(client) not in DUID_LENGTHS):
        return None
    answer = _option(Option.SERVER_ID, server_duid(config))
    if client is not None:
        answer = _option(Option.CLIENT_ID, client) + answer
    room = max(min(config.mtu or MAX_PACKET, MAX_PACKET), MIN_MTU) - IP6_HEADER - UDP_HEADER - MESSAGE
    match kind:
        case Kind.CONFIRM:
            wanted = [address for one in request.associations for address in one.addresses]
            if not wanted:
                return None
            fine = all(address == config.addr6 for address in wanted)
            return answer + _status(Status.SUCCESS if fine else Status.NOT_ON_LINK)
        case Kind.RELEASE | Kind.DECLINE:
            return answer + _status(Status.SUCCESS)
        case Kind.INFORMATION_REQUEST:
            answer += _option(Option.REFRESH, struct.pack("!I", max(600, config.lease_seconds)))
        case _:
            if kind == Kind.SOLICIT and Option.RAPID_COMMIT in request.options:
                answer += _option(Option.RAPID_COMMIT, b"")
            answer = _fill(answer, (_give(config, one) for one in request.associations), room)
    return _fill(answer, _parameters(config, request), room)


def _fill(answer: bytes, options: Iterable[bytes], room: int) -> bytes:
    """And the options that fit, each whole or not at all: a guest may ask for more than one packet can hold."""
    for option in options:
        if len(answer) + len(option) <= room:
            answer += option
    return answer


def _give(config: NetConfig, association: Association) -> bytes:
    """An IA_NA with our address; others that the guest holds end now (section 18.3.4).

    There may be no address, with one on the host to come.
    """
    lease = config.lease_seconds
    inner = b""
    if config.addr6 is not None:
        inner = _address(config.addr6, lease, 2 * lease)
    for address in association.addresses:
        if address != config.addr6:
            inner += _address(address, 0, 0)
    if not inner:
        inner += _status(Status.NO_ADDRESSES)
    times = struct.pack("!II", min(RENEW_SECONDS, lease // 2), lease * 4 // 5)
    return _option(Option.IA_NA, association.iaid + times + inner)


def _address(address: IPv6Address, preferred: int, valid: int) -> bytes:
    return _option(Option.IA_ADDRESS, address.packed + struct.pack("!II", preferred, valid))


def _parameters(config: NetConfig, request: Message) -> Iterator[bytes]:
    if config.dns6:
        yield _option(Option.DNS, b"".join(server.packed for server in config.dns6[:MAX_SERVERS]))
    names = encode_names(config.search, 600)
    if names:
        yield _option(Option.SEARCH, names)
    client = request.options.get(Option.FQDN)
    asked = request.options.get(Option.ORO, b"")
    in_oro = struct.pack("!H", Option.FQDN) in [asked[at : at + 2] for at in range(0, len(asked), 2)]
    if config.fqdn and (client is not None or in_oro):
        flags = FQDN_N | (FQDN_O if client and client[0] & FQDN_S else 0)
        yield _option(Option.FQDN, bytes([flags]) + encode_name(config.fqdn))


def _status(code: Status) -> bytes:
    return _option(Option.STATUS, struct.pack("!H", code))


def _option(code: int, value: bytes) -> bytes:
    return struct.pack("!HH", code, len(value)) + value
