# SPDX-License-Identifier: GPL-2.0-or-later
"""The DHCP server for one guest (RFC 2131, RFC 2132): one address, the host's, and no state.

What is asked for by the guest and fits the configuration is acknowledged, a
request for any other address is refused so that the guest starts anew at once.
That is also how a guest hears of a change on the host: at its next renewal,
for which it is told an early time (T1), long before its lease ends.
Whose server identifier a request carries is not looked at: there is no other
server on the link, and the guest may come from a host with another one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum
from ipaddress import IPv4Address
from typing import NamedTuple

from godwit.net.config import NetConfig
from godwit.net.dns import MAX_SERVERS, encode_name, encode_names
from godwit.net.packet import (
    BROADCAST,
    DHCP_CLIENT_PORT,
    DHCP_SERVER_PORT,
    ETH_IPV4,
    IP4_HEADER,
    UDP_HEADER,
    Datagram,
    MalformedError,
    Packet4,
    Reader,
    build_ethernet,
    build_udp4,
)

COOKIE = bytes((99, 130, 83, 99))  # RFC 2131, section 3
BOOTREQUEST = 1
BOOTREPLY = 2
FLAG_BROADCAST = 0x8000
LIMITED_BROADCAST = IPv4Address("255.255.255.255")
UNSPECIFIED = IPv4Address("0.0.0.0")
DEFAULT_SIZE = 576  # an IP datagram that any client takes (RFC 2131, section 2)
FIXED = 236  # bytes of a message before the cookie
MIN_MESSAGE = 300  # RFC 1542, section 2.1


class Kind(IntEnum):
    """Option 53 (RFC 2132, section 9.6)."""

    DISCOVER = 1
    OFFER = 2
    REQUEST = 3
    DECLINE = 4
    ACK = 5
    NAK = 6
    RELEASE = 7
    INFORM = 8


class Option(IntEnum):
    """Option codes (RFC 2132 where nothing else is said)."""

    PAD = 0
    MASK = 1
    ROUTER = 3
    DNS = 6
    HOSTNAME = 12
    DOMAIN = 15
    MTU = 26
    REQUESTED = 50
    LEASE = 51
    OVERLOAD = 52
    KIND = 53
    SERVER = 54
    PARAMETERS = 55
    MAX_SIZE = 57
    RENEWAL = 58
    REBINDING = 59
    CLIENT_ID = 61
    RAPID_COMMIT = 80  # RFC 4039
    FQDN = 81  # RFC 4702
    SEARCH = 119  # RFC 3397
    ROUTES = 121  # RFC 3442
    END = 255


# RFC 4702, section 2.1: the server's flags; S stays 0, nothing is updated.
FQDN_S, FQDN_O, FQDN_E, FQDN_N = 1, 2, 4, 8


class Message(NamedTuple):
    """A request. ``kind`` is None for plain BOOTP; an option given in parts is joined (RFC 3396)."""

    xid: bytes
    flags: int
    ciaddr: IPv4Address
    chaddr: bytes
    kind: int | None
    options: dict[int, bytes]


def parse(data: bytes) -> Message:
    """The payload of a datagram to port 67. Raises MalformedError."""
    reader = Reader(data)
    op, htype, hlen, _hops = reader.pull(4)
    xid = reader.pull(4)
    reader.pull(2)
    flags = reader.pull_u16()
    ciaddr = reader.pull_ip4()
    reader.pull(8)
    giaddr = reader.pull_ip4()
    chaddr = reader.pull(16)
    sname, file = reader.pull(64), reader.pull(128)
    if op != BOOTREQUEST or htype != 1 or hlen != 6:
        raise MalformedError("no BOOTREQUEST over Ethernet")
    if giaddr != UNSPECIFIED:
        raise MalformedError("a relayed request")  # the guest's link ends here
    options: dict[int, bytes] = {}
    if reader.left:
        if reader.pull(4) != COOKIE:
            raise MalformedError("no DHCP cookie")
        _pull_options(reader, options)
        overload = options.get(Option.OVERLOAD, b"\0")
        if overload[:1] in (b"\x01", b"\x03"):
            _pull_options(Reader(file), options)
        if overload[:1] in (b"\x02", b"\x03"):
            _pull_options(Reader(sname), options)
    kind = options.get(Option.KIND)
    if kind is not None and len(kind) != 1:
        raise MalformedError("DHCP message type of a wrong length")
    return Message(xid, flags, ciaddr, chaddr[:6], kind[0] if kind else None, options)


def _pull_options(reader: Reader, options: dict[int, bytes]) -> None:
    while reader.left:
        code = reader.pull_u8()
        if code == Option.END:
            return
        if code != Option.PAD:
            options[code] = options.get(code, b"") + reader.pull(reader.pull_u8())


def respond(config: NetConfig, packet: Packet4, datagram: Datagram) -> bytes | None:
    """The frame that answers a request, or None. ``config.addr4`` is set. Raises MalformedError."""
    request = parse(datagram.payload)
    if config.addr4 is None or config.gateway4 is None or request.chaddr[0] & 1:
        return None
    match request.kind:
        case None:
            return _reply(config, request, None)
        case Kind.DISCOVER:
            rapid = Option.RAPID_COMMIT in request.options
            return _reply(config, request, Kind.ACK if rapid else Kind.OFFER)
        case Kind.REQUEST:
            wanted = _wanted(request)
            if wanted is None:
                return None
            if wanted == config.addr4:
                return _reply(config, request, Kind.ACK)
            return _refuse(config, request, _known_server(config, packet.dest, wanted))
        case Kind.INFORM:
            return _reply(config, request, Kind.ACK)
        case _:
            return None


def _wanted(request: Message) -> IPv4Address | None:
    """The address a REQUEST is about: option 50, or ciaddr when it renews (RFC 2131, section 4.3.2)."""
    option = request.options.get(Option.REQUESTED)
    if option is not None and len(option) == 4:
        return IPv4Address(option)
    return request.ciaddr if request.ciaddr != UNSPECIFIED else None


def _reply(config: NetConfig, request: Message, kind: Kind | None) -> bytes:
    assert config.addr4 is not None
    assert config.gateway4 is not None
    informs = request.kind == Kind.INFORM
    yiaddr = UNSPECIFIED if informs else config.addr4
    room = _room(config, request)
    options = _fill(_options(config, request, kind), room)
    left = room - len(options)
    names = encode_names(config.search, left - 2 * -(-left // 257))  # two bytes of head for each 255
    if names:
        options += _encode(Option.SEARCH, names)
    options += bytes([Option.END])
    if request.ciaddr != UNSPECIFIED:  # section 4.1: a client with an address gets it there
        dest, dest_mac = request.ciaddr, request.chaddr
    elif request.flags & FLAG_BROADCAST or informs:
        dest, dest_mac = LIMITED_BROADCAST, BROADCAST
    else:
        dest, dest_mac = yiaddr, request.chaddr
    return _frame(config, request, yiaddr, options, dest, dest_mac)


def _known_server(config: NetConfig, dest: IPv4Address, wanted: IPv4Address) -> IPv4Address:
    """The server as the client knows it: a client may take a refusal from no other.

    It gave the address that is asked for, here or on another host.
    """
    assert config.gateway4 is not None
    if dest != LIMITED_BROADCAST:
        return dest
    return dict(config.withdrawn.servers4).get(wanted, config.gateway4)


def _refuse(config: NetConfig, request: Message, server: IPv4Address) -> bytes:
    """A NAK is always broadcast: the client's address is what is wrong (section 4.1)."""
    options = [(Option.KIND, bytes([Kind.NAK])), (Option.SERVER, server.packed), *_client_id(request)]
    encoded = _fill(iter(options), _room(config, request)) + bytes([Option.END])
    return _frame(config, request, UNSPECIFIED, encoded, LIMITED_BROADCAST, BROADCAST)


def _frame(
    config: NetConfig, request: Message, yiaddr: IPv4Address, options: bytes, dest: IPv4Address, dest_mac: bytes
) -> bytes:
    assert config.gateway4 is not None
    ciaddr = request.ciaddr if yiaddr != UNSPECIFIED or request.kind == Kind.INFORM else UNSPECIFIED
    message = struct.pack("!BBBB4sHH", BOOTREPLY, 1, 6, 0, request.xid, 0, request.flags)
    # No siaddr: there is nothing to boot from here, and a refusal must have none (RFC 2131, section 4.3.1, table 3).
    message += ciaddr.packed + yiaddr.packed + bytes(4) + bytes(4)
    message += request.chaddr + bytes(10) + bytes(64 + 128) + COOKIE + options
    message += bytes(max(0, MIN_MESSAGE - len(message)))
    packet = build_udp4(config.gateway4, DHCP_SERVER_PORT, dest, DHCP_CLIENT_PORT, message)
    return build_ethernet(dest_mac, config.our_mac, ETH_IPV4, packet)


def _options(config: NetConfig, request: Message, kind: Kind | None) -> Iterator[tuple[int, bytes]]:
    """The options of an answer, the ones that matter most first."""
    assert config.gateway4 is not None
    network = config.network4
    assert network is not None
    asked = request.options.get(Option.PARAMETERS, b"")
    if kind is not None:
        yield Option.KIND, bytes([kind])
        yield Option.SERVER, config.gateway4.packed
        if request.kind != Kind.INFORM:
            renewal, rebinding, lease = config.lease4
            yield Option.LEASE, lease.to_bytes(4, "big")
            yield Option.RENEWAL, renewal.to_bytes(4, "big")
            yield Option.REBINDING, rebinding.to_bytes(4, "big")
    if request.kind == Kind.DISCOVER and kind == Kind.ACK:
        yield Option.RAPID_COMMIT, b""
    yield from _client_id(request)
    yield Option.MASK, network.netmask.packed
    if config.gateway4 not in network:
        # The router first, on the link, then everything else through it. A
        # client that knows this option disregards the next (RFC 3442).
        router = config.gateway4.packed
        yield Option.ROUTES, b"\x20" + router + UNSPECIFIED.packed + b"\0" + router
    yield Option.ROUTER, config.gateway4.packed
    if config.mtu:
        yield Option.MTU, config.mtu.to_bytes(2, "big")
    if config.dns4:
        yield Option.DNS, b"".join(server.packed for server in config.dns4[:MAX_SERVERS])
    if config.hostname:
        yield Option.HOSTNAME, config.hostname.encode("ascii")
    client = request.options.get(Option.FQDN)
    if config.fqdn and (client is not None or Option.FQDN in asked):
        yield Option.FQDN, _fqdn(config.fqdn, client)
    if config.search:
        yield Option.DOMAIN, config.search[0].encode("ascii")


def _client_id(request: Message) -> Iterator[tuple[int, bytes]]:
    """What the client calls itself, unaltered, in every answer (RFC 6842, section 3)."""
    identifier = request.options.get(Option.CLIENT_ID)
    if identifier and request.kind is not None:
        yield Option.CLIENT_ID, identifier


def _fqdn(name: str, client: bytes | None) -> bytes:
    """Option 81 (RFC 4702, sections 2 and 4): no updates are made, in the encoding that the client used."""
    asked = client[0] if client else FQDN_E
    flags = FQDN_N | (FQDN_O if asked & FQDN_S else 0) | asked & FQDN_E
    encoded = encode_name(name) if asked & FQDN_E else name.encode("ascii")
    return bytes([flags, 255, 255]) + encoded


def _room(config: NetConfig, request: Message) -> int:
    """Bytes for options, less the end mark: what the client takes, within the MTU."""
    size = DEFAULT_SIZE
    option = request.options.get(Option.MAX_SIZE)
    if option is not None and len(option) == 2:
        size = max(DEFAULT_SIZE, min(int.from_bytes(option, "big"), config.mtu or 1500, 1500))
    return size - IP4_HEADER - UDP_HEADER - FIXED - len(COOKIE) - 1


def _fill(options: Iterator[tuple[int, bytes]], room: int) -> bytes:
    """The options that fit, each whole or not at all."""
    encoded = b""
    for code, value in options:
        more = _encode(code, value)
        if len(encoded) + len(more) <= room:
            encoded += more
    return encoded


def _encode(code: int, value: bytes) -> bytes:
    """An option; a long one in parts (RFC 3396)."""
    parts = [value[at : at + 255] for at in range(0, len(value), 255)] or [b""]
    return b"".join(bytes([code, len(part)]) + part for part in parts)
