# SPDX-License-Identifier: GPL-2.0-or-later
"""What the guest is told about its network, and how its addresses map to the host's.

The guest gets the host's own addresses. Towards it godwit is the router: the
host's gateway, with a MAC address of godwit's. The gateway's address also
leads to the host's loopback (``map_gw``), and where the host's resolver is
reached only there, or at the address so taken, name service traffic is mapped
on its own.

Where the host has no address of one of the versions, the guest's link is a
network of its own for that version: link-local addresses, over which it
reaches the host. (docs/network.md)

The three steps are apart so that each can be tested and repeated when the
host's network changes: ``read_network`` and ``read_resolv`` look at the host,
``choose`` decides, ``read_host`` is all of it. What becomes of a change is in
``change.py``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import NamedTuple, TypeVar

from godwit.net.netlink import (
    IFA_F_DADFAILED,
    IFA_F_DEPRECATED,
    IFA_F_SECONDARY,
    IFA_F_TENTATIVE,
    RT_SCOPE_LINK,
    RT_SCOPE_UNIVERSE,
    Address,
    DefaultRoute,
    HostNetwork,
    Link,
    read_network,
)
from godwit.net.resolv import PATH as RESOLV_PATH
from godwit.net.resolv import Resolv, is_domain, read_resolv

# The router's MAC address as guests behind passt know it. The same on every
# host, so that a guest's neighbour cache stays right when it migrates.
OUR_MAC = bytes.fromhex("9a559a559a55")

# Where the host's default route has no gateway (a point-to-point link) or
# there is none, the guest's router is here: link-local, as in passt's local mode.
FALLBACK_GATEWAY4 = IPv4Address("169.254.2.2")
# The guest's address where the host has none (RFC 3927), as in passt's local mode.
LOCAL_ADDRESS4 = IPv4Address("169.254.2.1")
LOCAL_PREFIX_LEN4 = 16
FALLBACK_LINK_LOCAL = IPv6Address("fe80::1")

MAX_MTU = 65520  # an Ethernet payload whose length fits 16 bits with its header, rounded down
MIN_MTU = 1280  # RFC 8200, section 5
MIN_MTU4 = 68  # RFC 791, 3.2
LEASE_SECONDS = 3600  # outlives a guest that is paused for a while
RENEW_SECONDS = 300  # a renewal tells the guest of a change on the host
LOCAL_LEASE_SECONDS = 60  # of a link-local address, renewed after half of it: a real one may come any time
DNS_PORTS = (53, 853)

IPAddress = IPv4Address | IPv6Address
A = TypeVar("A", IPv4Address, IPv6Address)


class NetConfigError(ValueError):
    """An option, or the host's network, that cannot be; the text says what to do about it."""


class Rewrite(NamedTuple):
    """A destination of the guest's that is another one on the host.

    ``guest`` and ``host`` are 16 bytes, IPv4 as v4-mapped. ``port`` 0 means
    every port and protocol; else TCP and UDP to that port. Of several rows
    the first that matches counts. ``scope`` is the interface for a
    link-local ``host``, or 0. Traffic that comes to the guest from ``host``
    is shown to it as coming from ``guest``.
    """

    guest: bytes
    port: int
    host: bytes
    scope: int


class NetOptions(NamedTuple):
    """What the command line overrides. None: taken from the host. An empty ``dns`` or ``search``: none."""

    interface: str | None = None
    outbound4: IPv4Address | None = None  # the source of what the guest sends, where it leaves the host
    outbound6: IPv6Address | None = None
    outbound_if4: str | None = None  # the interface through which it leaves
    outbound_if6: str | None = None
    address4: IPv4Address | None = None
    prefix_len4: int | None = None
    address6: IPv6Address | None = None
    prefix_len6: int | None = None
    gateway4: IPv4Address | None = None
    gateway6: IPv6Address | None = None
    mtu: int | None = None  # 0: no MTU is told to the guest
    mac: bytes | None = None  # ours
    ipv4: bool = True
    ipv6: bool = True
    dns: tuple[IPAddress, ...] | None = None
    search: tuple[str, ...] | None = None
    hostname: str = ""
    fqdn: str = ""
    dhcp: bool = True
    dhcpv6: bool = True
    ndp: bool = True
    ra: bool = True
    tell_dns: bool = True  # DNS servers in DHCP, DHCPv6 and RA
    tell_search: bool = True
    map_gw: bool = True
    map_host4: IPv4Address | None = None
    map_host6: IPv6Address | None = None
    map_guest4: IPv4Address | None = None
    map_guest6: IPv6Address | None = None
    dns_forward4: IPv4Address | None = None
    dns_forward6: IPv6Address | None = None
    dns_host4: IPv4Address | None = None
    dns_host6: IPv6Address | None = None


class Withdrawn(NamedTuple):
    """What the guest was told and does not hold any more, as long as it may still believe in it.

    ``servers4``: addresses of the guest's, each with the router and DHCP server that gave it. ``routers6`` are the
    routers' link-local addresses.
    """

    routers6: tuple[IPv6Address, ...] = ()
    prefixes6: tuple[IPv6Network, ...] = ()
    dns6: tuple[IPv6Address, ...] = ()
    search: tuple[str, ...] = ()
    dns4: tuple[IPv4Address, ...] = ()
    servers4: tuple[tuple[IPv4Address, IPv4Address], ...] = ()


@dataclass(slots=True, kw_only=True)
class NetConfig:
    """The network of one guest. An address of None: that IP version is off, unless ``local6``."""

    interface4: str = ""
    interface6: str = ""
    scope4: int = 0  # index of the interface that multicast takes; 0: the system's choice
    scope6: int = 0  # the same, and for link-local destinations
    outbound4: IPv4Address | None = None  # the source of what leaves the host
    outbound6: IPv6Address | None = None
    outbound_if4: str = ""  # the interface that it leaves through
    outbound_if6: str = ""
    mtu: int = MAX_MTU  # told to the guest; 0: nothing is told
    mtu4: int = field(default=MAX_MTU, compare=False)  # the interface's, unless one was given
    mtu6: int = field(default=MAX_MTU, compare=False)
    our_mac: bytes = OUR_MAC
    guest_mac: bytes | None = field(default=None, compare=False)  # learned from its frames

    addr4: IPv4Address | None = None
    prefix_len4: int = 32
    gateway4: IPv4Address | None = None  # the guest's router and DHCP server; set where addr4 is

    local4: bool = False  # the host has no IPv4 address, the guest a link-local one
    routed4: bool = field(default=False, compare=False)  # the host has a default route

    addr6: IPv6Address | None = None
    prefix_len6: int = 64
    gateway6: IPv6Address | None = None  # the host's gateway as it is, perhaps not link-local
    local6: bool = False  # the host has no IPv6 address, the guest but its own link-local ones
    routed6: bool = field(default=False, compare=False)
    our_link_local: IPv6Address = FALLBACK_LINK_LOCAL  # the guest's router: source of RA, NA, DHCPv6

    dns4: list[IPv4Address] = field(default_factory=list)  # as the guest is told
    dns6: list[IPv6Address] = field(default_factory=list)
    search: list[str] = field(default_factory=list)
    hostname: str = ""
    fqdn: str = ""
    lease_seconds: int = LEASE_SECONDS

    dhcp: bool = True
    dhcpv6: bool = True
    ndp: bool = True
    ra: bool = True

    map_gw: bool = True
    map_host4: IPv4Address | None = None  # leads to 127.0.0.1
    map_host6: IPv6Address | None = None  # leads to ::1
    map_guest4: IPv4Address | None = None  # leads to the host at addr4
    map_guest6: IPv6Address | None = None
    dns_match4: IPv4Address | None = None  # name service there goes to dns_host4
    dns_host4: IPv4Address | None = None
    dns_match6: IPv6Address | None = None
    dns_host6: IPv6Address | None = None

    withdrawn: Withdrawn = field(default=Withdrawn(), compare=False)
    warnings: list[str] = field(default_factory=list, compare=False)  # for the log, once
    notes: list[str] = field(default_factory=list, compare=False)  # the same, and nobody needs to act

    @property
    def interface(self) -> str:
        """The host's interface that most of the traffic takes; empty where there is none."""
        return self.interface4 or self.interface6

    @property
    def has_ipv6(self) -> bool:
        """Whether IPv6 is on."""
        return self.addr6 is not None or self.local6

    @property
    def advertises(self) -> bool:
        """Whether the guest is told of IPv6 by router advertisements."""
        return self.has_ipv6 and self.ndp and self.ra

    @property
    def lease4(self) -> tuple[int, int, int]:
        """Seconds until the guest renews its IPv4 address, until it asks any server, and until it has to give it up."""
        lease = LOCAL_LEASE_SECONDS if self.local4 else self.lease_seconds
        return min(RENEW_SECONDS, lease // 2), lease * 7 // 8, lease

    @property
    def network4(self) -> IPv4Network | None:
        """The subnet the guest is in."""
        return None if self.addr4 is None else IPv4Network((self.addr4, self.prefix_len4), strict=False)

    @property
    def prefix6(self) -> IPv6Network | None:
        """The /64 that is advertised, whatever the host's prefix length (RFC 4862 needs 64)."""
        return None if self.addr6 is None else IPv6Network((self.addr6, 64), strict=False)

    def rewrites(self) -> list[Rewrite]:
        """How destinations of the guest's map to the host's, first match first."""
        rows: list[Rewrite] = []
        for match, host in ((self.dns_match4, self.dns_host4), (self.dns_match6, self.dns_host6)):
            if match is not None and host is not None:
                rows += [self._rewrite(match, port, host) for port in DNS_PORTS]
        # A guest that has not heard yet that the host has other name servers
        # asks the old ones, which may be out of reach from where the host is now.
        for gone, host in ((self.withdrawn.dns4, self.dns_host4), (self.withdrawn.dns6, self.dns_host6)):
            for old in gone:
                if host is not None and all(row.guest != packed16(old) for row in rows):
                    rows += [self._rewrite(old, port, host) for port in DNS_PORTS]
        for match, host in (
            (self.map_host4, IPv4Address("127.0.0.1")),
            (self.map_host6, IPv6Address("::1")),
            (self.map_guest4, self.addr4),
            (self.map_guest6, self.addr6),
        ):
            if match is not None and host is not None:
                rows.append(self._rewrite(match, 0, host))
        return rows

    def _rewrite(self, guest: IPAddress, port: int, host: IPAddress) -> Rewrite:
        return Rewrite(packed16(guest), port, packed16(host), self.scope6 if host.is_link_local else 0)


def read_host(options: NetOptions | None = None, *, resolv_path: str = RESOLV_PATH) -> NetConfig:
    """Read the host's network and name servers and decide what the guest gets.

    Raises NetConfigError for options that cannot be honoured, OSError where
    netlink is refused.
    """
    options = options or NetOptions()
    return choose(options, read_network(), read_resolv(resolv_path))


def choose(options: NetOptions, host: HostNetwork, resolv: Resolv, previous: NetConfig | None = None) -> NetConfig:
    """The guest's network from the host's and the options. Raises NetConfigError.

    ``previous``: what was decided before. Where several addresses or routes are
    as good as each other, the one that the guest has is taken again: the order
    in which the kernel lists them changes with each one that is added.
    """
    check_options(options)
    for option, name in (
        ("--interface", options.interface),
        ("--outbound-if4", options.outbound_if4 if options.ipv4 else None),
        ("--outbound-if6", options.outbound_if6 if options.ipv6 else None),
    ):
        if name is not None and all(link.name != name for link in host.links):
            names = ", ".join(link.name for link in host.links) or "none"
            raise NetConfigError(f"there is no interface {name!r} ({option}); there are: {names}")
    previous = previous or NetConfig()
    config = NetConfig(
        our_mac=options.mac or OUR_MAC,
        hostname=options.hostname,
        fqdn=options.fqdn,
        dhcp=options.dhcp,
        dhcpv6=options.dhcpv6,
        ndp=options.ndp,
        ra=options.ra and options.ndp,
        map_gw=options.map_gw,
    )
    if options.ipv4:
        _choose4(config, options, host, previous)
    if options.ipv6:
        _choose6(config, options, host, previous)
    if options.mtu is not None:
        config.mtu = config.mtu4 = config.mtu6 = options.mtu
    else:
        config.mtu = min(config.mtu4, config.mtu6)
        if config.mtu < MIN_MTU and config.addr6 is not None:
            config.warnings.append(f"the host's MTU of {config.mtu} is below what IPv6 needs; IPv6 is told {MIN_MTU}")
    _choose_maps(config, options)
    _choose_dns(config, options, resolv)
    return config


def check_options(options: NetOptions) -> None:
    """Refuse what cannot be on any host. Raises NetConfigError, with the name of the daemon's option."""
    if not options.ipv4 and not options.ipv6:
        raise NetConfigError("both IPv4 and IPv6 are switched off; leave out one of --ipv4-only and --ipv6-only")
    if options.mtu is not None and options.mtu != 0 and not MIN_MTU4 <= options.mtu <= MAX_MTU:
        raise NetConfigError(f"MTU {options.mtu} is out of range; use {MIN_MTU4} to {MAX_MTU}, or 0 to tell none")
    for length, most in ((options.prefix_len4, 32), (options.prefix_len6, 128)):
        if length is not None and not 0 < length <= most:
            raise NetConfigError(f"prefix length {length} is out of range; use 1 to {most}")
    if options.mac is not None and (len(options.mac) != 6 or options.mac[0] & 1 or not any(options.mac)):
        raise NetConfigError(
            f"--mac-addr: {options.mac.hex(':')} is not the address of a single station: multicast, zero or too long"
        )
    for option, address in (
        ("--address", options.address4),
        ("--address", options.address6),
        ("--gateway", options.gateway4),
        ("--gateway", options.gateway6),
    ):
        if address is not None and (address.is_multicast or address.is_unspecified or address.is_loopback):
            raise NetConfigError(f"{option}: {address} cannot be an address on the guest's network")
    for own, gateway in ((options.address4, options.gateway4), (options.address6, options.gateway6)):
        if own is not None and own == gateway:
            raise NetConfigError(f"--address and --gateway are both {own}; they have to be two")
    if options.address6 is not None and options.address6.is_link_local:
        raise NetConfigError(f"--address: {options.address6} is link-local; the guest makes those itself, give another")
    for option, address, loopback in (
        ("--map-host-loopback", options.map_host4, False),
        ("--map-host-loopback", options.map_host6, False),
        ("--map-guest-addr", options.map_guest4, False),
        ("--map-guest-addr", options.map_guest6, False),
        ("--dns-forward", options.dns_forward4, False),
        ("--dns-forward", options.dns_forward6, False),
        ("--dns-host", options.dns_host4, True),
        ("--dns-host", options.dns_host6, True),
        ("--outbound", options.outbound4, False),
        ("--outbound", options.outbound6, False),
    ):
        if address is not None and (
            address.is_multicast or address.is_unspecified or (address.is_loopback and not loopback)
        ):
            raise NetConfigError(
                f"{option}: {address} cannot be it: neither loopback, multicast nor unspecified addresses can"
            )
    names = [
        ("--hostname", options.hostname),
        ("--fqdn", options.fqdn),
        *(("--search", name) for name in options.search or ()),
    ]
    for option, name in names:
        if name and (not is_domain(name.rstrip(".")) or " " in name):
            raise NetConfigError(
                f"{option}: {name!r} is no name of a host or domain (ASCII, no blanks, labels of 1 to 63)"
            )


def _choose4(config: NetConfig, options: NetOptions, host: HostNetwork, previous: NetConfig) -> None:
    """Set the IPv4 part."""
    link, route = _pick(4, config, options, host, previous)
    found = _best_address(4, link, route, host, previous.addr4)
    outbound = next((one for one in host.links if one.name == options.outbound_if4), link)
    config.outbound4, config.outbound_if4 = options.outbound4, options.outbound_if4 or ""
    _look_for_outbound(config, options.outbound4, host)
    config.scope4 = outbound.index if outbound is not None else 0
    if options.address4 is not None:
        config.addr4 = options.address4
        config.prefix_len4 = options.prefix_len4 or _class_prefix_len(options.address4)
    elif found is not None:
        assert isinstance(found.address, IPv4Address)
        config.addr4 = found.address
        config.prefix_len4 = options.prefix_len4 or found.prefix_len
    else:
        config.local4 = True
        config.addr4, config.prefix_len4 = LOCAL_ADDRESS4, LOCAL_PREFIX_LEN4
        config.gateway4 = options.gateway4 or FALLBACK_GATEWAY4
        return
    gateway = route.gateway if route is not None else None
    config.routed4 = route is not None
    if options.gateway4 is not None:
        config.gateway4 = options.gateway4
    else:
        config.gateway4 = gateway if isinstance(gateway, IPv4Address) else FALLBACK_GATEWAY4
    if link is None:
        return
    config.interface4 = link.name
    config.mtu4 = min(MAX_MTU, link.mtu)


def _look_for_outbound(config: NetConfig, outbound: IPAddress | None, host: HostNetwork) -> None:
    if outbound is not None and all(one.address != outbound for one in host.addresses):
        config.warnings.append(
            f"--outbound: this host does not have the address {outbound}; until it does nothing leaves from there"
        )


def _choose6(config: NetConfig, options: NetOptions, host: HostNetwork, previous: NetConfig) -> None:
    """Set the IPv6 part."""
    link, route = _pick(6, config, options, host, previous)
    found = _best_address(6, link, route, host, previous.addr6)
    outbound = next((one for one in host.links if one.name == options.outbound_if6), link)
    config.outbound6, config.outbound_if6 = options.outbound6, options.outbound_if6 or ""
    _look_for_outbound(config, options.outbound6, host)
    config.scope6 = outbound.index if outbound is not None else 0
    if options.address6 is not None:
        config.addr6 = options.address6
        config.prefix_len6 = options.prefix_len6 or 64
    elif found is not None:
        assert isinstance(found.address, IPv6Address)
        config.addr6 = found.address
        config.prefix_len6 = options.prefix_len6 or found.prefix_len
    else:
        config.local6 = True
        route = None
    gateway = route.gateway if route is not None else None
    config.routed6 = route is not None
    if options.gateway6 is not None:
        config.gateway6 = options.gateway6
    elif isinstance(gateway, IPv6Address):
        config.gateway6 = gateway
    # A router is known by its link-local address (RFC 4861, section 4.2): the
    # gateway's where it has one, else ours, made from the MAC address.
    if config.gateway6 is not None and config.gateway6.is_link_local:
        config.our_link_local = config.gateway6
    else:
        config.our_link_local = link_local(config.our_mac)
        if config.gateway6 is None or config.local6:
            config.gateway6 = config.our_link_local
    if link is None or config.local6:
        return
    config.interface6 = link.name
    config.mtu6 = min(MAX_MTU, link.mtu)


def _pick(
    version: int, config: NetConfig, options: NetOptions, host: HostNetwork, previous: NetConfig
) -> tuple[Link | None, DefaultRoute | None]:
    """The interface for one IP version, and its default route where there is one."""
    interface, gateway = (
        (previous.interface4, previous.gateway4) if version == 4 else (previous.interface6, previous.gateway6)
    )
    routes = [one for one in host.routes if one.version == version and one.index in host.names]
    routes.sort(key=lambda one: (one.metric, host.names[one.index].name != interface, one.gateway != gateway))
    own = _own_address(version, options) is not None
    name = options.interface or (options.outbound_if4 if version == 4 else options.outbound_if6)
    if name is not None:
        link = next(link for link in host.links if link.name == name)
        route = next((one for one in routes if one.index == link.index), None)
        if not own and _best_address(version, link, route, host) is None:
            config.notes.append(
                f"{_local(version)}, since {link.name} has no IPv{version} address that others can reach"
            )
        return link, route
    for route in routes:
        candidate = host.names[route.index]
        if own or _best_address(version, candidate, route, host) is not None:
            return candidate, route
    # No default route: the only interface with an address, if there is just one.
    links = [link for link in host.links if link.usable and _best_address(version, link, None, host) is not None]
    if len(links) == 1:
        return links[0], None
    if not own:
        if links:
            names = ", ".join(link.name for link in links)
            config.warnings.append(
                f"{_local(version)}: the host has no IPv{version} default route and several interfaces with"
                f" an address ({names}); choose one with --interface"
            )
        else:
            config.notes.append(f"{_local(version)}, since the host has no IPv{version} address that others can reach")
    return None, None


def _local(version: int) -> str:
    return f"the guest gets link-local IPv{version} only"


def _own_address(version: int, options: NetOptions) -> IPAddress | None:
    return options.address4 if version == 4 else options.address6


def _best_address(
    version: int,
    link: Link | None,
    route: DefaultRoute | None,
    host: HostNetwork,
    previous: IPAddress | None = None,
) -> Address | None:
    """The address the guest shares: the route's source, else one beside the gateway, else the first lasting one."""
    if link is None:
        return None
    found = [
        one
        for one in host.addresses
        if one.index == link.index
        and one.address.version == version
        and one.scope in (RT_SCOPE_UNIVERSE, RT_SCOPE_LINK)
        and not one.flags & (IFA_F_DADFAILED | IFA_F_TENTATIVE)
        and not (version == 6 and one.address.is_link_local)
    ]

    def rank(one: Address) -> tuple[bool, ...]:
        gateway = route.gateway if route is not None else None
        beside = gateway is not None and gateway in _network(one)
        preferred = route is not None and route.source == one.address
        flags = bool(one.flags & IFA_F_DEPRECATED), not beside, bool(one.flags & IFA_F_SECONDARY)
        return (not preferred, *flags, one.address != previous)

    return min(found, key=rank, default=None)


def _network(one: Address) -> IPv4Network | IPv6Network:
    if isinstance(one.address, IPv4Address):
        return IPv4Network((one.address, one.prefix_len), strict=False)
    return IPv6Network((one.address, one.prefix_len), strict=False)


def _choose_maps(config: NetConfig, options: NetOptions) -> None:
    if config.addr4 is not None:
        config.map_host4 = options.map_host4 or (config.gateway4 if options.map_gw else None)
        config.map_guest4 = options.map_guest4
    if config.has_ipv6:
        config.map_host6 = options.map_host6 or (config.gateway6 if options.map_gw else None)
        config.map_guest6 = options.map_guest6


def _choose_dns(config: NetConfig, options: NetOptions, resolv: Resolv) -> None:
    servers4 = [server for server in resolv.servers if isinstance(server, IPv4Address)]
    servers6 = [_unscoped(server) for server in resolv.servers if isinstance(server, IPv6Address)]
    unreachable: list[str] = []
    if config.addr4 is not None:
        config.dns_match4 = options.dns_forward4
        config.dns_host4 = options.dns_host4 or (servers4[0] if servers4 else None)
        config.dns4, config.dns_match4 = _told(servers4, config.map_host4, config.dns_match4, unreachable)
    if config.has_ipv6:
        config.dns_match6 = options.dns_forward6
        config.dns_host6 = options.dns_host6 or (servers6[0] if servers6 else None)
        config.dns6, config.dns_match6 = _told(servers6, config.map_host6, config.dns_match6, unreachable)
    if config.local6:  # with no address but a link-local one the guest reaches nothing else
        config.dns6 = [server for server in config.dns6 if server.is_link_local]
    config.search = list(resolv.search)
    if options.dns is not None:
        config.dns4 = [server for server in options.dns if isinstance(server, IPv4Address)]
        config.dns6 = [server for server in options.dns if isinstance(server, IPv6Address)]
    elif unreachable and not config.dns4 and not config.dns6:
        config.warnings.append(
            f"the guest gets no name server: {', '.join(unreachable)} is on the host's loopback, which is not"
            " mapped; use --dns or --dns-forward, or leave out --no-map-gw"
        )
    if options.search is not None:
        config.search = [name.rstrip(".") for name in options.search]
    if not options.tell_dns:
        config.dns4, config.dns6 = [], []
    if not options.tell_search:
        config.search = []


def _told(servers: list[A], map_host: A | None, match: A | None, unreachable: list[str]) -> tuple[list[A], A | None]:
    """The servers as the guest is told them, and the address whose name service traffic is mapped.

    A resolver on the host's loopback, or at the address that leads to the
    loopback, cannot be told as it is: the guest is told the mapped address.
    """
    told: list[A] = []
    for server in servers:
        shown: A | None = server
        if server.is_loopback or server == map_host:
            match = match or map_host
            shown = match
        if shown is None:
            unreachable.append(str(server))
        elif shown not in told:
            told.append(shown)
    return told, match


def _unscoped(address: IPv6Address) -> IPv6Address:
    """Without its scope: on the guest's link there is only one."""
    return IPv6Address(address.packed)


def _class_prefix_len(address: IPv4Address) -> int:
    """The prefix length by class, for an address given without one (RFC 791, section 2.3)."""
    first = address.packed[0]
    return 8 if first < 128 else 16 if first < 192 else 24


def link_local(mac: bytes) -> IPv6Address:
    """The link-local address of a MAC address (RFC 4291, appendix A)."""
    identifier = bytes([mac[0] ^ 0x02]) + mac[1:3] + b"\xff\xfe" + mac[3:6]
    return IPv6Address(b"\xfe\x80" + bytes(6) + identifier)


def packed16(address: IPAddress) -> bytes:
    """The address as 16 bytes, IPv4 as v4-mapped (RFC 4291, section 2.5.5.2)."""
    return address.packed if address.version == 6 else b"\0" * 10 + b"\xff\xff" + address.packed


def parse_mac(text: str) -> bytes:
    """Six bytes in hexadecimal, with colons or dashes. Raises NetConfigError."""
    if not re.fullmatch(r"[0-9A-Fa-f]{2}([:-][0-9A-Fa-f]{2}){5}", text):
        raise NetConfigError(f"{text!r} is not a MAC address such as 52:54:00:12:34:56")
    return bytes.fromhex(re.sub("[:-]", "", text))


def parse_prefix_len(text: str) -> int:
    """A prefix length (``24``) or an IPv4 netmask (``255.255.255.0``). Raises NetConfigError."""
    if text.isascii() and text.isdigit() and len(text) <= 3:
        return int(text)
    try:
        mask = int(IPv4Address(text))
    except ValueError:
        raise NetConfigError(f"{text!r} is neither a prefix length nor an IPv4 netmask") from None
    length = mask.bit_count()
    if mask != (0xFFFFFFFF << (32 - length)) & 0xFFFFFFFF:
        raise NetConfigError(f"{text} is not a netmask: its ones are not all in front")
    return length
