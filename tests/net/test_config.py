# SPDX-License-Identifier: GPL-2.0-or-later
"""What the guest gets, from what the host has and what the options say."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

import pytest

from godwit.net.config import (
    NetConfig,
    NetConfigError,
    NetOptions,
    Rewrite,
    choose,
    link_local,
    packed16,
    parse_mac,
    parse_prefix_len,
)
from godwit.net.netlink import (
    IFA_F_DEPRECATED,
    IFA_F_SECONDARY,
    IFA_F_TENTATIVE,
    IFF_LOOPBACK,
    IFF_UP,
    RT_SCOPE_LINK,
    RT_SCOPE_UNIVERSE,
    Address,
    DefaultRoute,
    HostNetwork,
    Link,
)
from godwit.net.resolv import Resolv, parse_resolv

LO = Link(1, "lo", 65536, IFF_UP | IFF_LOOPBACK)
ETH0 = Link(2, "eth0", 1500, IFF_UP)
ETH1 = Link(3, "eth1", 9000, IFF_UP)
DOWN = Link(4, "eth2", 1500, 0)


def address(link: Link, text: str, flags: int = 0, scope: int = RT_SCOPE_UNIVERSE) -> Address:
    host, _, length = text.partition("/")
    return Address(link.index, ip_address(host), int(length), scope, flags)


def route(
    link: Link, gateway: str | None, metric: int = 0, source: str | None = None, version: int = 4
) -> DefaultRoute:
    via = ip_address(gateway) if gateway else None
    return DefaultRoute(
        via.version if via else version, link.index, via, ip_address(source) if source else None, metric
    )


USUAL = HostNetwork(
    (LO, ETH0, ETH1),
    (
        address(ETH0, "192.0.2.7/24"),
        address(ETH0, "2001:db8:1::7/64"),
        address(ETH0, "fe80::7/64", scope=RT_SCOPE_LINK),
        address(ETH1, "10.0.0.7/8"),
    ),
    (route(ETH0, "192.0.2.1"), route(ETH0, "fe80::1")),
)


def take(host: HostNetwork = USUAL, resolv: str = "", **options: Any) -> NetConfig:
    return choose(NetOptions(**options), host, parse_resolv(resolv))


def shown(rows: list[Rewrite]) -> list[tuple[str, int, str, int]]:
    def text(raw: bytes) -> str:
        found = IPv6Address(raw)
        return str(found.ipv4_mapped or found)

    return [(text(row.guest), row.port, text(row.host), row.scope) for row in rows]


def test_the_host_as_it_is() -> None:
    config = take(resolv="nameserver 192.0.2.53\nnameserver 2001:db8::53\nsearch example.org\n")
    assert (config.interface4, config.interface6, config.interface, config.scope6) == ("eth0", "eth0", "eth0", 2)
    assert (str(config.addr4), config.prefix_len4, str(config.gateway4)) == ("192.0.2.7", 24, "192.0.2.1")
    assert (str(config.addr6), config.prefix_len6, str(config.gateway6)) == ("2001:db8:1::7", 64, "fe80::1")
    assert str(config.our_link_local) == "fe80::1"
    assert config.mtu == 1500
    assert config.our_mac.hex(":") == "9a:55:9a:55:9a:55"
    assert config.guest_mac is None
    assert (config.dns4, config.dns6) == ([IPv4Address("192.0.2.53")], [IPv6Address("2001:db8::53")])
    assert config.search == ["example.org"]
    assert (config.hostname, config.fqdn, config.warnings) == ("", "", [])
    assert str(config.network4) == "192.0.2.0/24"
    assert str(config.prefix6) == "2001:db8:1::/64"


def test_the_lowest_metric_wins() -> None:
    # As read_network sorts them.
    host = HostNetwork(USUAL.links, USUAL.addresses, (route(ETH1, "10.0.0.1", 100), route(ETH0, "192.0.2.1", 600)))
    config = take(host, ipv6=False)
    assert (config.interface4, str(config.gateway4), config.mtu) == ("eth1", "10.0.0.1", 9000)


def test_a_default_route_without_an_address_is_passed_over() -> None:
    host = HostNetwork(USUAL.links, USUAL.addresses, (route(DOWN, "10.9.0.1"), *USUAL.routes))
    assert take(host).interface4 == "eth0"


def test_the_two_versions_may_take_different_interfaces() -> None:
    host = HostNetwork(
        (LO, ETH0, ETH1),
        (address(ETH0, "192.0.2.7/24"), address(ETH1, "2001:db8::7/64")),
        (route(ETH0, "192.0.2.1"), route(ETH1, "2001:db8::1")),
    )
    config = take(host)
    assert (config.interface4, config.interface6, config.interface, config.scope6) == ("eth0", "eth1", "eth0", 3)
    assert config.mtu == 1500


@pytest.mark.parametrize(
    ("addresses", "source", "expected"),
    [
        (["192.0.2.7/24", "192.0.2.8/24"], None, "192.0.2.7"),
        (["192.0.2.7/24", "192.0.2.8/24"], "192.0.2.8", "192.0.2.8"),
        (["198.51.100.7/24", "192.0.2.8/24"], None, "192.0.2.8"),  # the one beside the gateway
        (["198.51.100.7/32"], None, "198.51.100.7"),
    ],
)
def test_which_address(addresses: list[str], source: str | None, expected: str) -> None:
    host = HostNetwork((ETH0,), tuple(address(ETH0, one) for one in addresses), (route(ETH0, "192.0.2.1", 0, source),))
    assert str(take(host).addr4) == expected


def test_lasting_addresses_come_first() -> None:
    host = HostNetwork(
        (ETH0,),
        (
            address(ETH0, "2001:db8::1:1/64", IFA_F_TENTATIVE),
            address(ETH0, "2001:db8::2/64", IFA_F_DEPRECATED),
            address(ETH0, "2001:db8::3/64", IFA_F_SECONDARY),  # temporary
            address(ETH0, "2001:db8::4/64"),
        ),
        (route(ETH0, "fe80::1"),),
    )
    assert str(take(host).addr6) == "2001:db8::4"
    assert str(take(HostNetwork(host.links, host.addresses[:3], host.routes)).addr6) == "2001:db8::3"
    assert str(take(HostNetwork(host.links, host.addresses[:2], host.routes)).addr6) == "2001:db8::2"
    assert take(HostNetwork(host.links, host.addresses[:1], host.routes)).addr6 is None


def test_a_router_that_is_not_link_local_gets_an_address_that_is() -> None:
    host = HostNetwork((ETH0,), (address(ETH0, "2001:db8::7/64"),), (route(ETH0, "2001:db8::1"),))
    config = take(host)
    assert str(config.gateway6) == "2001:db8::1"
    assert str(config.our_link_local) == "fe80::9855:9aff:fe55:9a55"


def test_a_point_to_point_link() -> None:
    host = HostNetwork(
        (ETH0,),
        (address(ETH0, "192.0.2.7/32"), address(ETH0, "2001:db8::7/128")),
        (route(ETH0, None), route(ETH0, None, version=6)),
    )
    config = take(host)
    assert (str(config.addr4), config.prefix_len4, str(config.gateway4)) == ("192.0.2.7", 32, "169.254.2.2")
    assert config.gateway6 == config.our_link_local == IPv6Address("fe80::9855:9aff:fe55:9a55")
    assert config.warnings == []


def test_without_a_default_route_the_only_interface() -> None:
    host = HostNetwork(
        (LO, ETH0, DOWN),
        (address(LO, "127.0.0.1/8"), address(ETH0, "192.0.2.7/24"), address(DOWN, "10.0.0.1/8")),
    )
    config = take(host)
    assert (config.interface4, str(config.addr4), str(config.gateway4)) == ("eth0", "192.0.2.7", "169.254.2.2")
    assert config.addr6 is None
    assert config.local6
    assert config.warnings == []
    assert config.notes == [
        "the guest gets link-local IPv6 only, since the host has no IPv6 address that others can reach"
    ]


def test_without_a_default_route_and_several_interfaces() -> None:
    config = take(HostNetwork(USUAL.links, USUAL.addresses))
    assert (config.local4, str(config.addr4)) == (True, "169.254.2.1")
    assert config.interface6 == "eth0"
    [warning] = config.warnings
    assert "(eth0, eth1); choose one with --interface" in warning
    assert str(take(HostNetwork(USUAL.links, USUAL.addresses), interface="eth1").addr4) == "10.0.0.7"


def test_a_host_with_nothing() -> None:
    """The guest's link is a network of its own, over which it reaches the host."""
    config = take(HostNetwork((LO,), (address(LO, "127.0.0.1/8"),)), "nameserver ::1\nnameserver 2001:db8::53\n")
    assert (str(config.network4), str(config.addr4), str(config.gateway4)) == (
        "169.254.0.0/16",
        "169.254.2.1",
        "169.254.2.2",
    )
    assert (config.addr6, config.prefix6, config.gateway6) == (None, None, link_local(config.our_mac))
    assert (config.interface, config.scope4, config.scope6) == ("", 0, 0)
    assert (config.local4, config.local6, config.has_ipv6) == (True, True, True)
    assert shown(config.rewrites())[2:] == [
        ("169.254.2.2", 0, "127.0.0.1", 0),
        ("fe80::9855:9aff:fe55:9a55", 0, "::1", 0),
    ]
    assert config.dns6 == [config.our_link_local]  # of what it could not reach it is not told
    assert (config.notes, config.warnings) == (
        [
            "the guest gets link-local IPv4 only, since the host has no IPv4 address that others can reach",
            "the guest gets link-local IPv6 only, since the host has no IPv6 address that others can reach",
        ],
        [],
    )
    assert config.lease4 == (30, 52, 60)


def test_a_host_with_nothing_and_one_version() -> None:
    config = take(HostNetwork((LO,)), ipv6=False)
    assert (config.local4, config.local6, config.has_ipv6) == (True, False, False)
    config = take(HostNetwork((LO,)), ipv4=False, gateway6=IPv6Address("2001:db8::1"))
    assert (config.addr4, config.local4, config.local6) == (None, False, True)
    assert config.map_host6 == config.gateway6 == config.our_link_local  # the only one that is on the guest's link


def test_an_interface_by_name() -> None:
    config = take(interface="eth1")
    assert (config.interface4, str(config.addr4), config.addr6) == ("eth1", "10.0.0.7", None)
    assert (config.local6, config.scope4, config.scope6) == (True, 3, 3)
    assert config.notes == ["the guest gets link-local IPv6 only, since eth1 has no IPv6 address that others can reach"]


def test_interfaces_for_what_leaves_the_host() -> None:
    """The addresses are taken from there too, unless --interface says otherwise."""
    both = (*USUAL.addresses, address(ETH1, "2001:db8:9::7/64"))
    host = HostNetwork(USUAL.links, both, (*USUAL.routes, route(ETH1, "10.0.0.1", 9)))
    config = take(host, outbound_if4="eth1", outbound4=IPv4Address("10.0.0.8"))
    assert (config.interface4, str(config.addr4), str(config.gateway4)) == ("eth1", "10.0.0.7", "10.0.0.1")
    assert (config.outbound_if4, str(config.outbound4), config.scope4) == ("eth1", "10.0.0.8", 3)
    assert (config.interface6, config.outbound_if6, config.outbound6, config.scope6) == ("eth0", "", None, 2)
    config = take(host, outbound_if6="eth1")
    assert (config.interface4, config.interface6, str(config.addr6)) == ("eth0", "eth1", "2001:db8:9::7")
    config = take(host, interface="eth0", outbound_if4="eth1", outbound_if6="eth1")
    assert (config.interface4, config.interface6) == ("eth0", "eth0")
    assert (config.scope4, config.scope6, config.outbound_if6) == (3, 3, "eth1")


def test_what_the_guest_has_is_taken_again() -> None:
    """The kernel lists the newest IPv6 address first."""
    two = (address(ETH0, "2001:db8:1::8/64"), *USUAL.addresses)
    host = HostNetwork(USUAL.links, two, (route(ETH0, "fe80::2"), *USUAL.routes))
    assert (str(take(host).addr6), str(take(host).gateway6)) == ("2001:db8:1::8", "fe80::2")
    config = choose(NetOptions(), host, Resolv(), take())
    assert (str(config.addr6), str(config.gateway6)) == ("2001:db8:1::7", "fe80::1")
    better = HostNetwork(USUAL.links, two, (route(ETH0, "fe80::2", source="2001:db8:1::8"),))
    assert str(choose(NetOptions(), better, Resolv(), take()).addr6) == "2001:db8:1::8"


def test_one_version_alone() -> None:
    config = take(ipv6=False)
    assert (config.addr6, config.dns6, config.warnings) == (None, [], [])
    config = take(ipv4=False, resolv="nameserver 192.0.2.53\n")
    assert (config.addr4, config.gateway4, config.dns4, config.warnings) == (None, None, [], [])


def test_addresses_given() -> None:
    config = take(
        address4=IPv4Address("172.16.0.5"),
        address6=IPv6Address("2001:db8:7::5"),
        gateway4=IPv4Address("172.16.0.1"),
        gateway6=IPv6Address("fe80::99"),
        prefix_len4=20,
    )
    assert (str(config.network4), str(config.gateway4)) == ("172.16.0.0/20", "172.16.0.1")
    assert (str(config.addr6), str(config.gateway6), str(config.our_link_local)) == (
        "2001:db8:7::5",
        "fe80::99",
        "fe80::99",
    )
    assert take(prefix_len4=28).prefix_len4 == 28


@pytest.mark.parametrize(("text", "length"), [("10.1.1.1", 8), ("172.16.0.5", 16), ("192.0.2.9", 24)])
def test_an_address_given_without_its_mask(text: str, length: int) -> None:
    assert take(address4=IPv4Address(text)).prefix_len4 == length


def test_addresses_given_on_a_host_with_nothing() -> None:
    config = take(HostNetwork((LO,)), address4=IPv4Address("192.0.2.9"), address6=IPv6Address("2001:db8::9"))
    assert (str(config.addr4), str(config.addr6), config.warnings) == ("192.0.2.9", "2001:db8::9", [])
    assert (str(config.gateway4), str(config.gateway6)) == ("169.254.2.2", "fe80::9855:9aff:fe55:9a55")
    assert config.mtu == 65520


@pytest.mark.parametrize(("given", "expected"), [(None, 1500), (0, 0), (1280, 1280), (65520, 65520)])
def test_mtu(given: int | None, expected: int) -> None:
    assert take(mtu=given).mtu == expected


def test_a_host_mtu_below_what_ipv6_needs() -> None:
    small = Link(2, "eth0", 1000, IFF_UP)
    config = take(HostNetwork((small,), USUAL.addresses, USUAL.routes))
    assert config.mtu == 1000
    assert "below what IPv6 needs" in config.warnings[0]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"interface": "eth9"}, "there is no interface 'eth9' (--interface); there are: lo, eth0, eth1"),
        ({"outbound_if4": "eth9"}, "there is no interface 'eth9' (--outbound-if4); there are: lo, eth0, eth1"),
        ({"outbound_if6": "eth9"}, "there is no interface 'eth9' (--outbound-if6)"),
        ({"ipv4": False, "ipv6": False}, "both IPv4 and IPv6 are switched off"),
        ({"mtu": 67}, "MTU 67 is out of range"),
        ({"mtu": 65521}, "MTU 65521 is out of range"),
        ({"mtu": -1}, "MTU -1 is out of range"),
        ({"prefix_len4": 33}, "prefix length 33 is out of range"),
        ({"prefix_len4": 0}, "prefix length 0 is out of range"),
        ({"prefix_len6": 129}, "prefix length 129 is out of range"),
        ({"mac": b"\x01\0\0\0\0\0"}, "--mac-addr: 01:00:00:00:00:00 is not the address of a single station"),
        ({"mac": bytes(6)}, "--mac-addr: 00:00:00:00:00:00 is not the address of a single station"),
        ({"address4": IPv4Address("127.0.0.1")}, "127.0.0.1 cannot be an address"),
        ({"gateway4": IPv4Address("224.0.0.1")}, "224.0.0.1 cannot be an address"),
        ({"address6": IPv6Address("::")}, ":: cannot be an address"),
        ({"map_host4": IPv4Address("127.0.0.1")}, "--map-host-loopback: 127.0.0.1 cannot be"),
        ({"map_guest6": IPv6Address("ff02::1")}, "--map-guest-addr: ff02::1 cannot be"),
        ({"dns_forward4": IPv4Address("0.0.0.0")}, "--dns-forward: 0.0.0.0 cannot be"),
        ({"dns_host4": IPv4Address("224.0.0.1")}, "--dns-host: 224.0.0.1 cannot be"),
        ({"outbound6": IPv6Address("::1")}, "--outbound: ::1 cannot be"),
        ({"hostname": "a b"}, "--hostname: 'a b' is no name"),
        ({"fqdn": "a..c"}, "--fqdn: 'a..c' is no name"),
        ({"search": ("x" * 64,)}, "--search: 'xxxx"),
        ({"address4": IPv4Address("10.0.0.1"), "gateway4": IPv4Address("10.0.0.1")}, "are both 10.0.0.1"),
        ({"address6": IPv6Address("fe80::1")}, "--address: fe80::1 is link-local"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(NetConfigError) as caught:
        take(**options)
    assert reason in str(caught.value)


def test_the_gateway_leads_to_the_hosts_loopback() -> None:
    assert shown(take().rewrites()) == [("192.0.2.1", 0, "127.0.0.1", 0), ("fe80::1", 0, "::1", 0)]
    assert take(map_gw=False).rewrites() == []
    config = take(map_gw=False, map_host4=IPv4Address("192.0.2.200"), map_guest6=IPv6Address("2001:db8:1::99"))
    assert shown(config.rewrites()) == [
        ("192.0.2.200", 0, "127.0.0.1", 0),
        ("2001:db8:1::99", 0, "2001:db8:1::7", 0),
    ]


def test_a_resolver_on_the_loopback_is_told_as_the_gateway() -> None:
    config = take(resolv="nameserver 127.0.0.53\nnameserver 192.0.2.53\nnameserver ::1\n")
    assert [str(one) for one in config.dns4] == ["192.0.2.1", "192.0.2.53"]
    assert [str(one) for one in config.dns6] == ["fe80::1"]
    assert shown(config.rewrites()) == [
        ("192.0.2.1", 53, "127.0.0.53", 0),
        ("192.0.2.1", 853, "127.0.0.53", 0),
        ("fe80::1", 53, "::1", 0),
        ("fe80::1", 853, "::1", 0),
        ("192.0.2.1", 0, "127.0.0.1", 0),
        ("fe80::1", 0, "::1", 0),
    ]


def test_a_gateway_that_is_the_resolver_stays_reachable() -> None:
    """Its address leads to the host's loopback, so its name service is mapped to it again."""
    config = take(resolv="nameserver 192.0.2.1\nnameserver fe80::1%eth0\n")
    assert [str(one) for one in config.dns4 + config.dns6] == ["192.0.2.1", "fe80::1"]
    assert ("192.0.2.1", 53, "192.0.2.1", 0) in shown(config.rewrites())
    assert ("fe80::1", 53, "fe80::1", 2) in shown(config.rewrites())
    assert take(resolv="nameserver 192.0.2.1\n", map_gw=False).rewrites() == []


def test_a_resolver_on_the_loopback_that_cannot_be_reached() -> None:
    config = take(resolv="nameserver 127.0.0.53\n", map_gw=False)
    assert config.dns4 == []
    assert "127.0.0.53 is on the host's loopback" in config.warnings[0]
    assert take(resolv="nameserver 127.0.0.53\nnameserver 192.0.2.53\n", map_gw=False).warnings == []


def test_dns_forward() -> None:
    config = take(resolv="nameserver 127.0.0.53\n", map_gw=False, dns_forward4=IPv4Address("192.0.2.254"))
    assert [str(one) for one in config.dns4] == ["192.0.2.254"]
    assert shown(config.rewrites())[0] == ("192.0.2.254", 53, "127.0.0.53", 0)
    config = take(dns_forward4=IPv4Address("192.0.2.254"), dns_host4=IPv4Address("198.51.100.1"))
    assert shown(config.rewrites())[0] == ("192.0.2.254", 53, "198.51.100.1", 0)


def test_dns_given_or_none() -> None:
    resolv = "nameserver 192.0.2.53\nsearch example.org\n"
    config = take(resolv=resolv, dns=(IPv6Address("2001:db8::1"), IPv4Address("10.0.0.53")), search=("a.example.",))
    assert [str(one) for one in config.dns4 + config.dns6] == ["10.0.0.53", "2001:db8::1"]
    assert config.search == ["a.example"]
    config = take(resolv=resolv, dns=(), search=())
    assert (config.dns4, config.dns6, config.search) == ([], [], [])
    config = take(resolv=resolv, tell_dns=False, tell_search=False)
    assert (config.dns4, config.dns6, config.search) == ([], [], [])


def test_switches_are_carried_over() -> None:
    config = take(dhcp=False, dhcpv6=False, ndp=False, hostname="vm", fqdn="vm.example", mac=b"\x02\0\0\0\0\1")
    assert (config.dhcp, config.dhcpv6, config.ndp, config.ra) == (False, False, False, False)
    assert (config.hostname, config.fqdn, config.our_mac) == ("vm", "vm.example", b"\x02\0\0\0\0\1")
    assert take(ra=False).ndp is True


@pytest.mark.parametrize(
    ("text", "expected"), [("24", 24), ("255.255.255.0", 24), ("255.255.255.255", 32), ("64", 64), ("128.0.0.0", 1)]
)
def test_parse_prefix_len(text: str, expected: int) -> None:
    assert parse_prefix_len(text) == expected


@pytest.mark.parametrize("text", ["", "-1", "+24", "0x18", "255.0.255.0", "0.0.0.255", "24/", "\u0662", "1000"])
def test_parse_prefix_len_refuses(text: str) -> None:
    with pytest.raises(NetConfigError):
        parse_prefix_len(text)


def test_parse_mac() -> None:
    assert parse_mac("52:54:00:12:34:aB") == parse_mac("52-54-00-12-34-AB") == bytes.fromhex("5254001234ab")
    for text in (
        "",
        "52:54:00:12:34",
        "52:54:00:12:34:56:78",
        "525400123456",
        "5g:54:00:12:34:56",
        "52:54:00:12:34:56\n",
    ):
        with pytest.raises(NetConfigError):
            parse_mac(text)


def test_helpers() -> None:
    assert str(link_local(bytes.fromhex("525400123456"))) == "fe80::5054:ff:fe12:3456"
    assert packed16(IPv4Address("192.0.2.1")) == IPv6Address("::ffff:192.0.2.1").packed
    assert packed16(IPv6Address("::1")) == IPv6Address("::1").packed


def test_an_outbound_address_that_the_host_does_not_have_is_told_of() -> None:
    missing = IPv4Address("203.0.113.9")
    assert take(outbound4=missing).warnings == [
        "--outbound: this host does not have the address 203.0.113.9; until it does nothing leaves from there"
    ]
    assert take(outbound4=IPv4Address("192.0.2.7")).warnings == []
