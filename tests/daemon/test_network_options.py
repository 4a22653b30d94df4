# SPDX-License-Identifier: GPL-2.0-or-later
"""What an option changes of what the guest is told, from the command line to the answer."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import Any

import pytest
from scapy.layers import dhcp6
from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import (
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6ND_RS,
    ICMPv6NDOptDNSSL,
    ICMPv6NDOptMTU,
    ICMPv6NDOptRDNSS,
    IPv6,
)
from scapy.layers.l2 import ARP, Ether

from godwit.daemon.options import Dialect, parse
from godwit.net.config import choose
from godwit.net.netlink import IFF_UP, RT_SCOPE_UNIVERSE, Address, DefaultRoute, HostNetwork, Link
from godwit.net.resolv import parse_resolv
from godwit.net.responder import Responder

HOST = HostNetwork(
    (Link(2, "eth0", 1500, IFF_UP),),
    (
        Address(2, IPv4Address("192.0.2.7"), 24, RT_SCOPE_UNIVERSE, 0),
        Address(2, IPv6Address("2001:db8:1::7"), 64, RT_SCOPE_UNIVERSE, 0),
    ),
    (
        DefaultRoute(4, 2, IPv4Address("192.0.2.1"), None, 0),
        DefaultRoute(6, 2, IPv6Address("fe80::1"), None, 0),
    ),
)
RESOLV = parse_resolv("nameserver 192.0.2.53\nnameserver 2001:db8:53::1\nsearch example.org\n")
GUEST, LL = "52:54:00:12:34:56", "fe80::5054:ff:fe12:3456"
ETHER = Ether(src=GUEST, dst="ff:ff:ff:ff:ff:ff")


def told(*arguments: str) -> dict[str, Any]:
    """What the guest learns, protocol by protocol; a protocol that does not answer is not in it."""
    options = parse(["--socket", "/tmp/none.sock", *arguments], Dialect.GODWIT)
    responder = Responder(choose(options.net, HOST, RESOLV))
    found: dict[str, Any] = {}

    def ask(packet: Any) -> Any:
        frames = responder.respond(bytes(packet))
        return Ether(frames[0]) if frames else None

    asked = [("message-type", "discover"), ("param_req_list", [1, 3, 6, 12, 15, 26, 81, 119]), "end"]
    head = ETHER / IP(src="0.0.0.0", dst="255.255.255.255") / UDP(sport=68, dport=67)
    offer = ask(head / BOOTP(chaddr=bytes.fromhex("525400123456")) / DHCP(options=asked))
    if offer is not None:
        pairs = [one for one in offer[DHCP].options if isinstance(one, tuple)]
        found["dhcp"] = {"address": offer[BOOTP].yiaddr, **{str(one[0]): one[1] for one in pairs}}
    solicit = ETHER / IPv6(src=LL, dst="ff02::1:2") / UDP(sport=546, dport=547) / dhcp6.DHCP6_Solicit(trid=1)
    solicit /= dhcp6.DHCP6OptClientId(duid=dhcp6.DUID_LL(lladdr=GUEST)) / dhcp6.DHCP6OptIA_NA(iaid=1)
    reply = ask(solicit / dhcp6.DHCP6OptOptReq(reqopts=[23, 24, 39]))
    if reply is not None:
        found["dhcpv6"] = {
            "address": reply[dhcp6.DHCP6OptIA_NA].ianaopts[0].addr,
            "dns": reply[dhcp6.DHCP6OptDNSServers].dnsservers if dhcp6.DHCP6OptDNSServers in reply else None,
            "search": reply[dhcp6.DHCP6OptDNSDomains].dnsdomains if dhcp6.DHCP6OptDNSDomains in reply else None,
            "fqdn": reply[dhcp6.DHCP6OptClientFQDN].fqdn if dhcp6.DHCP6OptClientFQDN in reply else None,
        }
    ra = ask(ETHER / IPv6(src=LL, dst="ff02::2", hlim=255) / ICMPv6ND_RS())
    if ra is not None:
        found["ra"] = {
            "managed": ra[ICMPv6ND_RA].M,
            "dns": ra[ICMPv6NDOptRDNSS].dns if ICMPv6NDOptRDNSS in ra else None,
            "search": ra[ICMPv6NDOptDNSSL].searchlist if ICMPv6NDOptDNSSL in ra else None,
            "mtu": ra[ICMPv6NDOptMTU].mtu if ICMPv6NDOptMTU in ra else None,
        }
    na = ask(ETHER / IPv6(src=LL, dst="ff02::1:ff00:1", hlim=255) / ICMPv6ND_NS(tgt="fe80::1"))
    if na is not None:
        found["ndp"] = {"at": na[ICMPv6ND_NA].payload.lladdr}
    arp = ask(ETHER / ARP(hwsrc=GUEST, psrc="192.0.2.7", pdst="192.0.2.1"))
    if arp is not None:
        found["arp"] = {"at": arp[ARP].hwsrc}
    return found


def differences(*arguments: str) -> dict[str, Any]:
    """What is another with these options; None for what is not there any more."""
    before, after = told(), told(*arguments)
    found: dict[str, Any] = {}
    for name, values in before.items():
        if name not in after:
            found[name] = None
            continue
        for key in {**values, **after[name]}:
            if values.get(key) != after[name].get(key):
                found[f"{name} {key}"] = after[name].get(key)
    return found


def test_the_usual() -> None:
    found = told()
    assert set(found) == {"dhcp", "dhcpv6", "ra", "ndp", "arp"}
    assert found["dhcp"]["address"] == "192.0.2.7"
    assert found["dhcp"]["119"] == b"\x07example\x03org\0"
    assert found["dhcpv6"] == {
        "address": "2001:db8:1::7",
        "dns": ["2001:db8:53::1"],
        "search": ["example.org."],
        "fqdn": None,
    }
    assert found["ra"] == {"managed": 1, "dns": ["2001:db8:53::1"], "search": ["example.org."], "mtu": 1500}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--no-dhcp"], {"dhcp": None}),
        (["--no-dhcpv6"], {"dhcpv6": None, "ra managed": 0}),
        (["--no-ra"], {"ra": None}),
        (["--no-ndp"], {"ra": None, "ndp": None}),
        (["-4"], {"dhcpv6": None, "ra": None, "ndp": None}),
        (["-6"], {"dhcp": None, "arp": None}),
        (["--hostname", "vm1"], {"dhcp hostname": b"vm1"}),
        (
            ["--fqdn", "vm1.example.org"],
            {"dhcp client_FQDN": b"\x0c\xff\xff\x03vm1\x07example\x03org\0", "dhcpv6 fqdn": b"vm1.example.org."},
        ),
        (["--no-dhcp-dns"], {"dhcp name_server": None, "dhcpv6 dns": None, "ra dns": None}),
        (
            ["--no-dhcp-search"],
            {"dhcp domain": None, "dhcp 119": None, "dhcpv6 search": None, "ra search": None},
        ),
        (["--dns", "192.0.2.99"], {"dhcp name_server": "192.0.2.99", "dhcpv6 dns": None, "ra dns": None}),
        (["--mtu", "1400"], {"dhcp interface-mtu": 1400, "ra mtu": 1400}),
        (["--mtu", "0"], {"dhcp interface-mtu": None, "ra mtu": None}),
        (["--mac-addr", "02:00:00:00:00:01"], {"ndp at": "02:00:00:00:00:01", "arp at": "02:00:00:00:00:01"}),
        (
            ["--address", "192.0.2.77", "--netmask", "16"],
            {"dhcp address": "192.0.2.77", "dhcp subnet_mask": "255.255.0.0"},
        ),
        (["--address", "2001:db8:1::99"], {"dhcpv6 address": "2001:db8:1::99"}),
        (["--gateway", "192.0.2.254"], {"dhcp router": "192.0.2.254", "dhcp server_id": "192.0.2.254"}),
    ],
)
def test_options(arguments: list[str], expected: dict[str, Any]) -> None:
    assert differences(*arguments) == expected
