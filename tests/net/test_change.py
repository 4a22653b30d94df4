# SPDX-License-Identifier: GPL-2.0-or-later
"""What a guest has next when its host's network changes."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, IPv6Network
from typing import Any

import pytest

from godwit.dataplane import Engine
from godwit.net.change import describe, differences, facts, facts_elsewhere, settle
from godwit.net.config import NetConfig, NetOptions, choose, packed16
from godwit.net.netlink import (
    IFF_LOOPBACK,
    IFF_UP,
    RT_SCOPE_UNIVERSE,
    Address,
    DefaultRoute,
    HostNetwork,
    Link,
)
from godwit.net.resolv import parse_resolv

LO = Link(1, "lo", 65536, IFF_UP | IFF_LOOPBACK)
ETH0 = Link(2, "eth0", 1500, IFF_UP)
WLAN0 = Link(3, "wlan0", 1492, IFF_UP)

A4 = Address(2, IPv4Address("192.0.2.7"), 24, RT_SCOPE_UNIVERSE, 0)
A6 = Address(2, IPv6Address("2001:db8:1::7"), 64, RT_SCOPE_UNIVERSE, 0)
B4 = Address(3, IPv4Address("198.51.100.7"), 24, RT_SCOPE_UNIVERSE, 0)
B6 = Address(3, IPv6Address("2001:db8:2::7"), 64, RT_SCOPE_UNIVERSE, 0)
RA4 = DefaultRoute(4, 2, IPv4Address("192.0.2.1"), None, 0)
RA6 = DefaultRoute(6, 2, IPv6Address("fe80::1"), None, 0)
RB4 = DefaultRoute(4, 3, IPv4Address("198.51.100.1"), None, 0)
RB6 = DefaultRoute(6, 3, IPv6Address("fe80::2"), None, 0)

WIRED = HostNetwork((LO, ETH0), (A4, A6), (RA4, RA6))
WIRELESS = HostNetwork((LO, WLAN0), (B4, B6), (RB4, RB6))
NOTHING = HostNetwork((LO, ETH0))
RESOLV = "nameserver 192.0.2.1\nnameserver 2001:db8:53::1\nsearch example.org\n"
OTHER = "nameserver 198.51.100.53\nsearch example.net\n"


def take(host: HostNetwork = WIRED, resolv: str = RESOLV, old: NetConfig | None = None, **options: Any) -> NetConfig:
    return choose(NetOptions(**options), host, parse_resolv(resolv), old)


def follow(
    host: HostNetwork, resolv: str = RESOLV, old: NetConfig | None = None, *, let_go: bool = False, **options: Any
) -> NetConfig:
    before = old or take(**options)
    return settle(before, take(host, resolv, before, **options), let_go=let_go)


def test_nothing_new() -> None:
    old = take()
    old.guest_mac = b"\x52\0\0\0\0\1"
    new = follow(WIRED, old=old)
    assert new == old
    assert new is not old
    assert (new.guest_mac, describe(old, new)) == (old.guest_mac, "")


def test_an_interface_is_one_hosts_own() -> None:
    """Here a change of it is told; between two hosts its name says nothing."""
    old = take()
    new = replace(old, interface4="eth7", interface6="eth7")
    assert describe(old, new) == "interface eth7 (was eth0)"
    assert differences(facts_elsewhere(old), facts_elsewhere(new)) == ""
    assert differences(facts_elsewhere(old), facts_elsewhere(replace(new, mtu=1400))) == "MTU 1400 (was 1500)"


def test_a_version_that_is_switched_off_is_none() -> None:
    """Not link-local, which is what a guest has whose host has no address."""
    told = facts(take(ipv4=False))
    assert (told["IPv4"], told["IPv4 router"], told["IPv6"]) == ("none", "none", "2001:db8:1::7/64")
    told = facts(take(ipv6=False))
    assert (told["IPv4"], told["IPv6"], told["IPv6 router"]) == ("192.0.2.7/24", "none", "none")


def test_another_network() -> None:
    old = take()
    new = follow(WIRELESS, OTHER, old)
    assert (str(new.addr4), str(new.gateway4), str(new.addr6), str(new.our_link_local)) == (
        "198.51.100.7",
        "198.51.100.1",
        "2001:db8:2::7",
        "fe80::2",
    )
    assert describe(old, new) == (
        "IPv4 198.51.100.7/24 (was 192.0.2.7/24), IPv4 router 198.51.100.1 (was 192.0.2.1),"
        " IPv6 2001:db8:2::7/64 (was 2001:db8:1::7/64), IPv6 router fe80::2 (was fe80::1), MTU 1492 (was 1500),"
        " name servers 198.51.100.53 (was 192.0.2.1 2001:db8:53::1), search list example.net (was example.org),"
        " interface wlan0 (was eth0)"
    )
    gone = new.withdrawn
    assert gone.prefixes6 == (IPv6Network("2001:db8:1::/64"),)
    assert gone.dns6 == (IPv6Address("2001:db8:53::1"),)
    assert gone.dns4 == (IPv4Address("192.0.2.1"),)
    assert gone.search == ("example.org",)
    assert gone.servers4 == ((IPv4Address("192.0.2.7"), IPv4Address("192.0.2.1")),)


def test_an_old_name_server_leads_to_the_new_one() -> None:
    new = follow(WIRELESS, OTHER)
    rows = {(row.guest, row.port): row.host for row in new.rewrites()}
    old4, new4 = packed16(IPv4Address("192.0.2.1")), packed16(IPv4Address("198.51.100.53"))
    assert (rows[old4, 53], rows[old4, 853]) == (new4, new4)
    assert (old4, 0) not in rows  # what the old router's address was otherwise is over
    assert all(guest != packed16(IPv6Address("2001:db8:53::1")) for guest, _ in rows)  # there is no new one


def test_there_and_back() -> None:
    """What the guest has again is not withdrawn any more."""
    first = take()
    away = follow(WIRELESS, OTHER, first)
    back = follow(WIRED, RESOLV, away)
    assert back == first
    assert back.withdrawn.prefixes6 == (IPv6Network("2001:db8:2::/64"),)
    assert back.withdrawn.search == ("example.net",)
    assert back.withdrawn.dns4 == (IPv4Address("198.51.100.53"),)
    assert back.withdrawn.dns6 == ()
    assert dict(back.withdrawn.servers4) == {IPv4Address("198.51.100.7"): IPv4Address("198.51.100.1")}


def test_no_more_is_withdrawn_than_can_be_told() -> None:
    config = take()
    options: dict[str, Any] = {
        "map_host4": IPv4Address("10.0.0.1"),
        "map_host6": IPv6Address("fd00::1"),
        "map_guest4": IPv4Address("10.0.0.2"),
        "map_guest6": IPv6Address("fd00::2"),
        "dns_forward4": IPv4Address("10.0.0.3"),
        "dns_forward6": IPv6Address("fd00::3"),
    }
    for number in range(8):
        address = Address(2, IPv6Address(f"2001:db8:{number + 10}::7"), 64, RT_SCOPE_UNIVERSE, 0)
        resolv = f"nameserver 198.51.100.{number + 1}\nnameserver 2001:db8:53::{number + 1}\n"
        host = HostNetwork((LO, ETH0), (A4, address), (RA4, RA6))
        config = settle(config, choose(NetOptions(**options), host, parse_resolv(resolv), config))
    assert [str(one) for one in config.withdrawn.prefixes6] == [
        "2001:db8:16::/64",
        "2001:db8:15::/64",
        "2001:db8:14::/64",
    ]
    assert len(config.rewrites()) == 20
    Engine().configure(
        our_mac=config.our_mac, maps=[(row.guest, row.port, row.host, row.scope) for row in config.rewrites()]
    )


@pytest.mark.parametrize("resolv", [RESOLV, ""])
@pytest.mark.parametrize("let_go", [False, True])
def test_a_host_that_has_lost_everything(resolv: str, let_go: bool) -> None:
    """Nothing is known that would be better, however long it takes."""
    old = take()
    new = follow(NOTHING, resolv, old, let_go=let_go)
    assert new == old
    assert new.withdrawn == old.withdrawn


def test_a_host_that_has_lost_its_routes() -> None:
    old = take()
    assert follow(HostNetwork(WIRED.links, WIRED.addresses), old=old) == old


@pytest.mark.parametrize(("gone", "resolv"), [(RA4, "nameserver 192.0.2.1\n"), (RA6, "nameserver fe80::1%eth0\n")])
def test_a_resolver_at_a_router_whose_route_is_lost(gone: DefaultRoute, resolv: str) -> None:
    """The router's address leads to the host's loopback, name service there to the resolver: still."""
    old = take(resolv=resolv)
    routes = tuple(one for one in WIRED.routes if one != gone)
    new = follow(HostNetwork(WIRED.links, WIRED.addresses, routes), resolv, old)
    assert new == old
    assert new.rewrites() == old.rewrites()


@pytest.mark.parametrize("let_go", [False, True])
def test_what_is_left_is_no_way_out(let_go: bool) -> None:
    """A bridge of containers, say: the only interface with an address while the network is away."""
    bridge = Link(5, "docker0", 1400, IFF_UP)
    inside = Address(5, IPv4Address("172.17.0.1"), 16, RT_SCOPE_UNIVERSE, 0)
    old = take()
    host = HostNetwork((LO, ETH0, bridge), (inside,))
    assert str(take(host).addr4) == "172.17.0.1"
    assert follow(host, old=old, let_go=let_go) == old
    # With a way out for the other version the guest gets what there is.
    online6 = HostNetwork((LO, ETH0, bridge), (A6, inside), (RA6,))
    assert follow(online6, old=old) == old
    assert str(follow(online6, old=old, let_go=True).addr4) == "172.17.0.1"
    # Started with it alone, the guest follows it.
    other = HostNetwork((LO, bridge), (replace(inside, address=IPv4Address("172.18.0.1")),))
    assert str(follow(other, old=take(host)).addr4) == "172.18.0.1"


@pytest.mark.parametrize("let_go", [False, True])
def test_what_is_left_is_no_way_out_for_ipv6_either(let_go: bool) -> None:
    bridge = Link(5, "docker0", 1400, IFF_UP)
    inside = Address(5, IPv6Address("fd00::1"), 64, RT_SCOPE_UNIVERSE, 0)
    old = take()
    host = HostNetwork((LO, ETH0, bridge), (inside,))
    assert str(take(host).addr6) == "fd00::1"
    assert follow(host, old=old, let_go=let_go) == old
    online4 = HostNetwork((LO, ETH0, bridge), (A4, inside), (RA4,))
    assert follow(online4, old=old) == old
    assert str(follow(online4, old=old, let_go=True).addr6) == "fd00::1"


def test_another_address_without_a_route() -> None:
    """On the same interface: that is where the host is now."""
    new = follow(HostNetwork((LO, ETH0), (replace(A4, address=IPv4Address("192.0.2.99")), A6), (RA6,)))
    assert (str(new.addr4), str(new.gateway4)) == ("192.0.2.99", "169.254.2.2")


def test_a_version_that_was_lost_is_kept_for_a_while() -> None:
    old = take()
    only4 = HostNetwork((LO, ETH0), (A4,), (RA4,))
    assert follow(only4, old=old) == old
    new = follow(only4, old=old, let_go=True)
    assert (new.addr6, new.local6, new.addr4) == (None, True, old.addr4)
    assert new.withdrawn.prefixes6 == (IPv6Network("2001:db8:1::/64"),)
    assert new.withdrawn.dns6 == (IPv6Address("2001:db8:53::1"),)
    only6 = HostNetwork((LO, ETH0), (A6,), (RA6,))
    assert follow(only6, old=old) == old
    new = follow(only6, old=old, let_go=True)
    assert (str(new.addr4), new.local4, new.addr6) == ("169.254.2.1", True, old.addr6)


def test_from_nothing() -> None:
    old = take(NOTHING, "")
    new = follow(WIRED, RESOLV, old)
    assert replace(new) == take()
    assert describe(old, new).startswith("IPv4 192.0.2.7/24 (was 169.254.2.1/16), IPv4 router")
    assert "IPv6 2001:db8:1::7/64 (was link-local)" in describe(old, new)
    assert new.withdrawn.prefixes6 == ()
    # A client takes a refusal from the server that it knows.
    assert dict(new.withdrawn.servers4) == {IPv4Address("169.254.2.1"): IPv4Address("169.254.2.2")}


def test_what_the_command_line_says_stays() -> None:
    options: dict[str, Any] = {
        "address4": IPv4Address("10.0.0.5"),
        "gateway4": IPv4Address("10.0.0.1"),
        "dns": (IPv4Address("10.0.0.53"),),
        "search": ("own.example",),
        "mtu": 1280,
    }
    old = take(**options)
    new = follow(WIRELESS, OTHER, old, **options)
    for name in ("addr4", "prefix_len4", "gateway4", "dns4", "dns6", "search", "mtu"):
        assert getattr(new, name) == getattr(old, name), name
    assert (new.interface4, str(new.addr6)) == ("wlan0", "2001:db8:2::7")
    assert new.withdrawn.dns4 == new.withdrawn.servers4 == ()


@pytest.mark.parametrize("mtu", [0, 1400, 1500])
def test_a_given_mtu_stays(mtu: int) -> None:
    old = take(mtu=mtu)
    for host in (WIRELESS, NOTHING, HostNetwork((LO, WLAN0), (B4,), (RB4,))):
        assert follow(host, old=old, mtu=mtu).mtu == mtu
    # Not given, it is the smaller one of what is kept and what is new.
    assert follow(HostNetwork((LO, WLAN0), (B4,), (RB4,))).mtu == 1492


def test_another_interface_of_the_same_address() -> None:
    """A link that was made anew: nothing for the guest, but link-local destinations go there."""
    link = Link(9, "eth0", 1500, IFF_UP)
    host = HostNetwork(
        (LO, link),
        (replace(A4, index=9), replace(A6, index=9)),
        (replace(RA4, index=9), replace(RA6, index=9)),
    )
    old = take()
    new = follow(host, old=old)
    assert (new.scope4, new.scope6) == (9, 9)
    assert new != old
    assert describe(old, new) == ""
