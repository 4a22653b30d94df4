# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's interfaces, addresses and default routes, read once through netlink.

What is read is plain data; what becomes of it is decided in ``config.py``.
pyroute2 is imported when the reading starts and not before: the import costs
about 0.1 s and 13 MB, and most of godwit's commands never read a route.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

IPAddress = IPv4Address | IPv6Address

# linux/rtnetlink.h, linux/if_addr.h, linux/if.h
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


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
class Address:
    """One address of one interface; ``flags`` are IFA_F_*, ``scope`` is RT_SCOPE_*."""

    index: int
    address: IPAddress
    prefix_len: int
    scope: int
    flags: int


@dataclass(frozen=True, slots=True)
class DefaultRoute:
    """One default route of the main table; ``metric`` orders them, lowest first."""

    version: int
    index: int
    gateway: IPAddress | None
    source: IPAddress | None
    metric: int


@dataclass(frozen=True, slots=True)
class HostNetwork:
    """What the host's network looked like at one moment."""

    links: tuple[Link, ...] = ()
    addresses: tuple[Address, ...] = ()
    routes: tuple[DefaultRoute, ...] = ()
    names: dict[int, Link] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", {link.index: link for link in self.links})


def read_network() -> HostNetwork:
    """Read the network namespace of the calling thread. Raises OSError where netlink is refused."""
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with IPRoute() as netlink:
            links = [_link(message) for message in netlink.get_links()]
            addresses = [_address(message) for message in netlink.get_addr()]
            routes: list[DefaultRoute] = []
            for family in (socket.AF_INET, socket.AF_INET6):
                for message in netlink.get_routes(family=family, table=RT_TABLE_MAIN):
                    routes += _default_route(message)
    except NetlinkError as error:
        raise OSError(error.code, f"reading the host's network: {error}") from error
    routes.sort(key=lambda route: route.metric)
    return HostNetwork(tuple(links), tuple(found for found in addresses if found is not None), tuple(routes))


def _link(message: Any) -> Link:
    return Link(message["index"], message.get("ifname"), message.get("mtu"), message["flags"])


def _address(message: Any) -> Address | None:
    # On a point-to-point link IFA_ADDRESS is the peer's, IFA_LOCAL ours.
    text = message.get("local") or message.get("address")
    if text is None or message["family"] not in (socket.AF_INET, socket.AF_INET6):
        return None
    flags = message.get("flags") or 0
    return Address(message["index"], ip_address(text), message["prefixlen"], message["scope"], flags)


def _default_route(message: Any) -> list[DefaultRoute]:
    """The hops of a route to everywhere, or nothing."""
    if message["dst_len"] != 0 or message["type"] != RTN_UNICAST:
        return []
    if (message.get("table") or message["table"]) != RT_TABLE_MAIN:
        return []
    version = 4 if message["family"] == socket.AF_INET else 6
    source = message.get("prefsrc")
    metric = message.get("priority") or 0
    found = []
    for hop in message.get("multipath") or [message]:
        index = hop.get("oif") or 0
        if not index or hop["flags"] & (RTNH_F_DEAD | RTNH_F_LINKDOWN):
            continue
        gateway = hop.get("gateway") or (hop.get("via") or {}).get("addr")
        if gateway is not None and ip_address(gateway).version != version:
            gateway = None  # RFC 5549: an IPv4 route over an IPv6 hop; the guest needs an IPv4 one
        found.append(
            DefaultRoute(
                version,
                index,
                ip_address(gateway) if gateway else None,
                ip_address(source) if source else None,
                metric,
            )
        )
    return found
