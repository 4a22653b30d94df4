# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's interfaces, addresses and default routes, read once through netlink (netlink(7), rtnetlink(7)).

What is read is plain data; what becomes of it is decided in ``config.py``.
A host may have a million routes, of which two matter: they are told apart by
one byte, before anything is decoded.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple

IPAddress = IPv4Address | IPv6Address

# linux/netlink.h
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST = 0x1
NLM_F_DUMP_INTR = 0x10
NLM_F_DUMP = 0x300
NLA_TYPE_MASK = 0x3FFF
SOL_NETLINK = 270
NETLINK_GET_STRICT_CHK = 12

# linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h, linux/if.h
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
IFLA_IFNAME, IFLA_MTU = 3, 4
IFA_ADDRESS, IFA_LOCAL, IFA_FLAGS = 1, 2, 8
RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_PREFSRC, RTA_MULTIPATH, RTA_TABLE = 4, 5, 6, 7, 9, 15
RT_TABLE_MAIN = 254
RTN_UNICAST = 1
RT_SCOPE_UNIVERSE = 0
RT_SCOPE_LINK = 253
RTNH_F_DEAD = 0x01
RTNH_F_LINKDOWN = 0x10
IFA_F_SECONDARY = 0x01  # IPv4; the same bit is IFA_F_TEMPORARY for IPv6
IFA_F_DADFAILED = 0x08
IFA_F_DEPRECATED = 0x20
IFA_F_TENTATIVE = 0x40
IFF_UP = 0x1
IFF_LOOPBACK = 0x8

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")  # struct rtattr: length, type
_LINK = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, index, flags, change
_ADDRESS = struct.Struct("=BBBBI")  # struct ifaddrmsg: family, prefix length, flags, scope, index
_ROUTE = struct.Struct("=8BI")  # struct rtmsg: family, lengths of destination and source, TOS, table, ..., type, flags
_HOP = struct.Struct("=HBBi")  # struct rtnexthop: length, flags, hops, index
_BUFFER = 1 << 16  # the kernel fills half of that at most
_SECONDS = 10.0  # the kernel answers at once, or never will
_ROUNDS = 4  # how often a dump is begun anew because something changed under it
_NOTHING_THERE = (errno.ENOENT, errno.EOPNOTSUPP, errno.EAFNOSUPPORT)


@dataclass(slots=True)
class Link:
    """One interface: its index, name, MTU in bytes and flags (IFF_*)."""

    index: int
    name: str
    mtu: int
    flags: int

    @property
    def usable(self) -> bool:
        """Up, and no loopback."""
        return bool(self.flags & IFF_UP) and not self.flags & IFF_LOOPBACK


@dataclass(slots=True)
class Address:
    """One address of one interface; ``flags`` are IFA_F_*, ``scope`` is RT_SCOPE_*."""

    index: int
    address: IPAddress
    prefix_len: int
    scope: int
    flags: int


@dataclass(slots=True)
class DefaultRoute:
    """One default route of the main table; ``metric`` orders them, lowest first."""

    version: int
    index: int
    gateway: IPAddress | None
    source: IPAddress | None
    metric: int


@dataclass(slots=True)
class HostNetwork:
    """What the host's network looked like at one moment."""

    links: tuple[Link, ...] = ()
    addresses: tuple[Address, ...] = ()
    routes: tuple[DefaultRoute, ...] = ()
    names: dict[int, Link] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.names = {link.index: link for link in self.links}


class Message(NamedTuple):
    """One netlink message: its type and flags, its sequence number, and what follows the header."""

    kind: int
    flags: int
    sequence: int
    payload: bytes


class MalformedNetlinkError(OSError):
    """What came from netlink is not as netlink(7) says."""

    def __init__(self, what: str) -> None:
        super().__init__(errno.EBADMSG, f"netlink: {what}")


def parse_messages(data: bytes) -> Iterator[Message]:
    """The messages in what one recv(2) gave. Raises MalformedNetlinkError."""
    at = 0
    while at < len(data):
        if len(data) - at < _HEADER.size:
            raise MalformedNetlinkError("a header is cut")
        length, kind, flags, sequence, _port = _HEADER.unpack_from(data, at)
        if not _HEADER.size <= length <= len(data) - at:
            raise MalformedNetlinkError(f"a message of {length} bytes, where {len(data) - at} are left")
        yield Message(kind, flags, sequence, data[at + _HEADER.size : at + length])
        at += (length + 3) & ~3


def is_default_route(route: bytes) -> bool:
    """Whether this ``rtmsg`` is of a route to everywhere (or to nowhere): its destination has length 0."""
    return route[1:2] in (b"\0", b"")  # one that is cut is for the decoder to complain about


def read_network() -> HostNetwork:
    """Read the network namespace of the calling thread. Raises OSError where netlink is refused."""
    try:
        with _Dumper() as dumper:
            links = [_link(one) for one in dumper.dump(RTM_GETLINK, RTM_NEWLINK, _LINK.pack(0, 0, 0, 0, 0))]
            addresses = [_address(one) for one in dumper.dump(RTM_GETADDR, RTM_NEWADDR, _ADDRESS.pack(0, 0, 0, 0, 0))]
            routes: list[DefaultRoute] = []
            for family in (socket.AF_INET, socket.AF_INET6):
                for one in dumper.routes(family):
                    routes += _default_route(one, family)
    except (struct.error, ValueError) as error:
        raise MalformedNetlinkError(f"reading the host's network: {error}") from error
    routes.sort(key=lambda route: route.metric)
    return HostNetwork(tuple(links), tuple(found for found in addresses if found is not None), tuple(routes))


class _Dumper:
    """A socket through which the kernel is asked for whole tables."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._sequence = 0
        try:
            self._socket.settimeout(_SECONDS)
            self._socket.bind((0, 0))
            self._socket.connect((0, 0))  # nobody else's messages
            try:
                self._socket.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)
            except OSError:
                pass  # before Linux 4.20: all tables come, and are left out here
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> _Dumper:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def routes(self, family: int) -> list[bytes]:
        """The default routes of the main table, and perhaps some of others."""
        asked = _ROUTE.pack(family, 0, 0, 0, RT_TABLE_MAIN, 0, 0, 0, 0)
        try:
            return self.dump(RTM_GETROUTE, RTM_NEWROUTE, asked, defaults=True)
        except OSError as error:
            if error.errno in _NOTHING_THERE:
                return []  # a table that nobody has put anything into, or no such protocol here
            raise

    def dump(self, ask: int, wanted: int, payload: bytes, *, defaults: bool = False) -> list[bytes]:
        """What the messages of a table carry; of routes those to everywhere."""
        for _ in range(_ROUNDS):
            found, consistent = self._dump(ask, wanted, payload, defaults)
            if consistent:
                break
        return found  # where it changes without end: as it was a moment ago, and there will be another event

    def _dump(self, ask: int, wanted: int, payload: bytes, defaults: bool) -> tuple[list[bytes], bool]:
        self._sequence += 1
        flags = NLM_F_REQUEST | NLM_F_DUMP
        self._socket.send(_HEADER.pack(_HEADER.size + len(payload), ask, flags, self._sequence, 0) + payload)
        found: list[bytes] = []
        consistent = True
        while True:
            for message in parse_messages(self._socket.recv(_BUFFER)):
                if message.sequence != self._sequence:
                    continue
                consistent = consistent and not message.flags & NLM_F_DUMP_INTR
                if message.kind in (NLMSG_ERROR, NLMSG_DONE):
                    _check_status(message.payload)
                    return found, consistent
                if message.kind == wanted and (not defaults or is_default_route(message.payload)):
                    found.append(message.payload)


def _check_status(payload: bytes) -> None:
    """Of NLMSG_ERROR and NLMSG_DONE: an error number, negative, or 0."""
    (status,) = struct.unpack_from("=i", payload)
    if status:
        raise OSError(-status, f"reading the host's network: {os.strerror(-status)}")


def _attributes(data: bytes, at: int) -> dict[int, bytes]:
    """The attributes from there to the end, by their types (RFC 3549, section 2.3.3; RTA_ALIGN is 4)."""
    found = {}
    while at < len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if not _ATTRIBUTE.size <= length <= len(data) - at:
            raise MalformedNetlinkError(f"an attribute of {length} bytes, where {len(data) - at} are left")
        found[kind & NLA_TYPE_MASK] = data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3
    return found


def _number(attributes: dict[int, bytes], kind: int) -> int:
    """An attribute of 32 bits; 0 where it is not there."""
    return int(struct.unpack("=I", attributes[kind])[0]) if kind in attributes else 0


def _link(message: bytes) -> Link:
    _family, _type, index, flags, _change = _LINK.unpack_from(message)
    attributes = _attributes(message, _LINK.size)
    name = os.fsdecode(attributes.get(IFLA_IFNAME, b"").rstrip(b"\0"))
    return Link(index, name, _number(attributes, IFLA_MTU), flags)


def _address(message: bytes) -> Address | None:
    family, prefix_len, flags, scope, index = _ADDRESS.unpack_from(message)
    attributes = _attributes(message, _ADDRESS.size)
    # On a point-to-point link IFA_ADDRESS is the peer's, IFA_LOCAL ours.
    packed = attributes.get(IFA_LOCAL) or attributes.get(IFA_ADDRESS)
    if packed is None or family not in (socket.AF_INET, socket.AF_INET6):
        return None
    return Address(index, ip_address(packed), prefix_len, scope, _number(attributes, IFA_FLAGS) or flags)


def _default_route(message: bytes, family: int) -> list[DefaultRoute]:
    """The hops of a route to everywhere; nothing if it is of another table, or leads nowhere."""
    of, _to, _from, _tos, table, _protocol, _scope, kind, flags = _ROUTE.unpack_from(message)
    attributes = _attributes(message, _ROUTE.size)
    if of != family or kind != RTN_UNICAST or (_number(attributes, RTA_TABLE) or table) != RT_TABLE_MAIN:
        return []
    source = attributes.get(RTA_PREFSRC)
    found = []
    for index, state, hop in _hops(attributes, flags):
        if not index or state & (RTNH_F_DEAD | RTNH_F_LINKDOWN):
            continue
        # A gateway of the other protocol (RTA_VIA, RFC 5549) is none to the guest, which needs one of this.
        gateway = hop.get(RTA_GATEWAY)
        found.append(
            DefaultRoute(
                4 if family == socket.AF_INET else 6,
                index,
                ip_address(gateway) if gateway else None,
                ip_address(source) if source else None,
                _number(attributes, RTA_PRIORITY),
            )
        )
    return found


def _hops(attributes: dict[int, bytes], flags: int) -> Iterator[tuple[int, int, dict[int, bytes]]]:
    """Interface, flags and attributes of the one hop that a route has, or of each of several."""
    several = attributes.get(RTA_MULTIPATH)
    if several is None:
        yield _number(attributes, RTA_OIF), flags, attributes
        return
    at = 0
    while at < len(several):
        length, state, _weight, index = _HOP.unpack_from(several, at)
        if not _HOP.size <= length <= len(several) - at:
            raise MalformedNetlinkError(f"a hop of {length} bytes, where {len(several) - at} are left")
        yield index, state, _attributes(several[at : at + length], _HOP.size)
        at += (length + 3) & ~3
