# SPDX-License-Identifier: GPL-2.0-or-later
"""Every message of ours, taken apart by scapy and put together by it again: byte for byte the same.

Lengths and checksums are scapy's own the second time. What the fields mean is
looked at in the tests of each protocol; here it is that nothing of a message is
left over, hidden or ambiguous, whatever the configuration.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, IPv6Network
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
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
    ICMPv6NDOptPrefixInfo,
    ICMPv6NDOptRDNSS,
    ICMPv6NDOptSrcLLAddr,
    IPv6,
)
from scapy.layers.l2 import ARP, Ether
from scapy.packet import NoPayload, Packet, Padding, Raw

from godwit.net.change import take_back, told
from godwit.net.config import NetConfig, Withdrawn
from godwit.net.responder import Responder

GUEST = "52:54:00:12:34:56"
LL = "fe80::5054:ff:fe12:3456"
CHADDR = bytes.fromhex("525400123456")
OURS = dhcp6.DUID_LL(lladdr="9a:55:9a:55:9a:55")
COMPUTED = {"chksum", "cksum", "len", "plen", "ihl", "dataofs", "optlen", "duidlen"}


def layers(packet: Packet) -> Iterator[Packet]:
    """Each layer, and the packets inside of its lists of options."""
    layer = packet
    while layer and not isinstance(layer, NoPayload):
        yield layer
        for value in layer.fields.values():
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, Packet):
                    yield from layers(one)
        layer = layer.payload


def again(frame: bytes) -> bytes:
    """What scapy makes of what it has read, with its own lengths and checksums."""
    packet = Ether(frame)
    for layer in layers(packet):
        assert not isinstance(layer, Raw | Padding), f"not understood: {layer!r} in {packet!r}"
        layer.raw_packet_cache = None
        for name in COMPUTED & set(layer.fields):
            del layer.fields[name]
    return bytes(packet)


def check(frames: list[bytes]) -> Any:
    """The one answer, as scapy reads it."""
    [frame] = frames
    assert again(frame) == frame
    return Ether(frame)


def arp(**fields: Any) -> bytes:
    values = {"op": 1, "hwsrc": GUEST, "psrc": "192.0.2.7", "pdst": "192.0.2.1", **fields}
    return bytes(Ether(src=GUEST, dst="ff:ff:ff:ff:ff:ff") / ARP(**values))


def dhcp(kind: str | None, *options: Any, **fields: Any) -> bytes:
    packet = Ether(src=GUEST, dst="ff:ff:ff:ff:ff:ff") / IP(src="0.0.0.0", dst="255.255.255.255")
    packet /= UDP(sport=68, dport=67) / BOOTP(**{"chaddr": CHADDR, "xid": 0x1234ABCD, **fields})
    if kind is not None:
        packet /= DHCP(options=[("message-type", kind), *options, "end"])
    return bytes(packet)


def dhcpv6(kind: Any, *options: Any) -> bytes:
    packet = Ether(src=GUEST, dst="33:33:00:01:00:02") / IPv6(src=LL, dst="ff02::1:2")
    packet /= UDP(sport=546, dport=547) / kind(trid=0xABCDEF)
    packet /= dhcp6.DHCP6OptClientId(duid=dhcp6.DUID_LL(lladdr=GUEST))
    for option in options:
        packet /= option
    return bytes(packet)


def ia(*addresses: str) -> Any:
    return dhcp6.DHCP6OptIA_NA(iaid=7, ianaopts=[dhcp6.DHCP6OptIAAddress(addr=one) for one in addresses])


def ndp(message: Any, source: str = LL, dest: str = "ff02::2") -> bytes:
    packet = Ether(src=GUEST, dst="33:33:00:00:00:02") / IPv6(src=source, dst=dest, hlim=255) / message
    return bytes(packet / ICMPv6NDOptSrcLLAddr(lladdr=GUEST) if source != "::" else packet)


SERVER = dhcp6.DHCP6OptServerId(duid=OURS)
HOST = "2001:db8:1::7"

# Every kind of message that the guest sends, and the layer that the answer must have.
REQUESTS: dict[str, tuple[bytes, Any]] = {
    "arp": (arp(), ARP),
    "arp probe": (arp(psrc="0.0.0.0"), ARP),
    "bootp": (dhcp(None), BOOTP),
    "discover": (dhcp("discover", ("max_dhcp_size", 1500)), DHCP),
    "discover broadcast": (dhcp("discover", flags=0x8000), DHCP),
    "discover rapid": (dhcp("discover", (80, b""), ("param_req_list", [1, 3, 6, 12, 15, 26, 81, 119, 121])), DHCP),
    "discover fqdn": (dhcp("discover", (81, b"\x05\0\0\x02vm")), DHCP),
    "request": (dhcp("request", ("requested_addr", "192.0.2.7"), ("server_id", "192.0.2.1")), DHCP),
    "request refused": (dhcp("request", ("requested_addr", "192.0.2.8")), DHCP),
    "renewal": (dhcp("request", ciaddr="192.0.2.7"), DHCP),
    "inform": (dhcp("inform", ciaddr="192.0.2.7"), DHCP),
    "solicit": (dhcpv6(dhcp6.DHCP6_Solicit, ia()), dhcp6.DHCP6_Advertise),
    "solicit rapid": (dhcpv6(dhcp6.DHCP6_Solicit, dhcp6.DHCP6OptRapidCommit(), ia()), dhcp6.DHCP6_Reply),
    "solicit two": (dhcpv6(dhcp6.DHCP6_Solicit, ia(), ia(HOST)), dhcp6.DHCP6_Advertise),
    "solicit fqdn": (
        dhcpv6(dhcp6.DHCP6_Solicit, ia(), dhcp6.DHCP6OptClientFQDN(flags=1, fqdn="vm")),
        dhcp6.DHCP6_Advertise,
    ),
    "request6": (dhcpv6(dhcp6.DHCP6_Request, SERVER, ia(HOST)), dhcp6.DHCP6_Reply),
    "renew": (dhcpv6(dhcp6.DHCP6_Renew, SERVER, ia(HOST, "2001:db8:9::9")), dhcp6.DHCP6_Reply),
    "rebind": (dhcpv6(dhcp6.DHCP6_Rebind, ia("2001:db8:9::9")), dhcp6.DHCP6_Reply),
    "confirm": (dhcpv6(dhcp6.DHCP6_Confirm, ia(HOST)), dhcp6.DHCP6_Reply),
    "confirm refused": (dhcpv6(dhcp6.DHCP6_Confirm, ia("2001:db8:9::9")), dhcp6.DHCP6_Reply),
    "release": (dhcpv6(dhcp6.DHCP6_Release, SERVER, ia(HOST)), dhcp6.DHCP6_Reply),
    "decline": (dhcpv6(dhcp6.DHCP6_Decline, SERVER, ia(HOST)), dhcp6.DHCP6_Reply),
    "information": (dhcpv6(dhcp6.DHCP6_InfoRequest), dhcp6.DHCP6_Reply),
    "rs": (ndp(ICMPv6ND_RS()), ICMPv6ND_RA),
    "rs no source": (ndp(ICMPv6ND_RS(), "::"), ICMPv6ND_RA),
    "ns": (ndp(ICMPv6ND_NS(tgt="fe80::1"), LL, "ff02::1:ff00:1"), ICMPv6ND_NA),
    "ns other": (ndp(ICMPv6ND_NS(tgt="2001:db8:1::99"), LL, "ff02::1:ff00:99"), ICMPv6ND_NA),
    "ns unicast": (ndp(ICMPv6ND_NS(tgt="fe80::1"), HOST, "fe80::1"), ICMPv6ND_NA),
    "ns defended": (ndp(ICMPv6ND_NS(tgt="fe80::1"), "::", "ff02::1:ff00:1"), ICMPv6ND_NA),
}

FULL: dict[str, Any] = {"hostname": "vm1", "fqdn": "vm1.example.org"}
CONFIGS: dict[str, dict[str, Any]] = {
    "usual": {},
    "names": FULL,
    "bare": {"mtu": 0, "dns4": [], "dns6": [], "search": []},
    "router elsewhere": {"prefix_len4": 32, **FULL},
    "withdrawn": {
        "withdrawn": Withdrawn(
            prefixes6=(IPv6Network("2001:db8:8::/64"), IPv6Network("2001:db8:9::/64")),
            dns6=(IPv6Address("2001:db8:8::53"),),
            search=("old.example", "older.example"),
            servers4=((IPv4Address("192.0.2.8"), IPv4Address("192.0.2.254")),),
        )
    },
    "local": {
        "addr4": IPv4Address("169.254.2.1"),
        "gateway4": IPv4Address("169.254.2.2"),
        "prefix_len4": 16,
        "local4": True,
        "addr6": None,
        "local6": True,
        "dns6": [],
    },
}


# An ARP probe of the usual router is none of the local one's.
CASES = [(request, name) for request in REQUESTS for name in CONFIGS if (request, name) != ("arp probe", "local")]


@pytest.mark.parametrize(("request_name", "name"), CASES)
def test_answers(config: NetConfig, request_name: str, name: str) -> None:
    frame, layer = REQUESTS[request_name]
    reply = check(Responder(replace(config, **CONFIGS[name])).respond(frame))
    assert layer in reply
    assert reply.src == "9a:55:9a:55:9a:55"


def test_the_oracle_sees_what_is_wrong(config: NetConfig) -> None:
    """Lengths and checksums that are wrong, and bytes that belong to nothing."""

    def sound(frame: bytes) -> bool:
        try:
            return again(frame) == frame
        except AssertionError:
            return False

    [offer] = Responder(config).respond(REQUESTS["discover"][0])
    [advertisement] = Responder(config).respond(REQUESTS["rs"][0])
    for frame, at in ((offer, 17), (offer, 25), (offer, 39), (offer, 41), (advertisement, 19), (advertisement, 57)):
        wrong = bytearray(frame)
        wrong[at] ^= 1
        assert not sound(bytes(wrong)), at
    assert sound(offer)
    assert not sound(offer + b"x")


@pytest.mark.parametrize("name", CONFIGS)
def test_announcements(config: NetConfig, name: str) -> None:
    before = replace(config, our_link_local=IPv6Address("fe80::9"))
    frames = Responder(before).change(take_back(replace(config, **CONFIGS[name]), told(before)))
    kinds = [next(kind for kind in (ARP, ICMPv6ND_RA) if kind in check([frame])) for frame in frames]
    assert kinds == [ICMPv6ND_RA, ARP, ICMPv6ND_RA]


LABEL = st.from_regex(r"[a-z][a-z0-9-]{0,20}", fullmatch=True)
NAME = st.lists(LABEL, min_size=1, max_size=4).map(".".join)
V4 = st.integers(0x01000000, 0x7EFFFFFF).map(IPv4Address)
V6 = st.integers(0x2001 << 112, (0x3FFF << 112)).map(IPv6Address)
NETWORKS = st.fixed_dictionaries(
    {
        "addr4": V4,
        "gateway4": V4,
        "prefix_len4": st.integers(1, 32),
        "addr6": V6,
        "prefix_len6": st.integers(1, 128),
        "our_link_local": st.integers(1, (1 << 64) - 1).map(lambda low: IPv6Address((0xFE80 << 112) + low)),
        "mtu": st.sampled_from([0, 68, 576, 1280, 1500, 65520]),
        "dns4": st.lists(V4, max_size=12),
        "dns6": st.lists(V6, max_size=12),
        "search": st.lists(NAME, max_size=12),
        "hostname": st.one_of(st.just(""), LABEL),
        "fqdn": st.one_of(st.just(""), NAME),
        "lease_seconds": st.integers(2, (1 << 31) - 1),
        "dhcpv6": st.booleans(),
        "withdrawn": st.builds(
            Withdrawn,
            prefixes6=st.lists(V6.map(lambda one: IPv6Network((one, 64), strict=False)), max_size=5).map(tuple),
            dns6=st.lists(V6, max_size=6).map(tuple),
            search=st.lists(NAME, max_size=6).map(tuple),
            routers6=st.just(()),
            dns4=st.just(()),
            servers4=st.just(()),
        ),
    }
)


@settings(max_examples=60)
@given(values=NETWORKS)
def test_any_network(values: dict[str, Any]) -> None:
    """What scapy reads is what the configuration says, and no advertisement is too large for the least MTU."""
    config = NetConfig(gateway6=values["our_link_local"], **values)
    responder = Responder(config)
    offer = check(responder.respond(REQUESTS["discover"][0]))
    options = {option[0]: option[1:] for option in offer[DHCP].options if isinstance(option, tuple)}
    assert offer[BOOTP].yiaddr == str(config.addr4)
    assert options["subnet_mask"] == (str(config.network4.netmask) if config.network4 else "",)
    assert options["router"] == (str(config.gateway4),)
    assert options.get("name_server", ()) == tuple(str(one) for one in config.dns4[:8])
    assert options.get("interface-mtu", (0,)) == (config.mtu,)
    assert options.get("hostname", (b"",)) == (config.hostname.encode(),)

    for frame in responder.announce()[1:]:
        reply = check([frame])
        assert reply[IPv6].src == str(config.our_link_local)
        assert len(bytes(reply[IPv6])) <= 1280
        found = list(layers(reply[ICMPv6ND_RA]))
        prefixes = [(one.prefix, one.preferredlifetime) for one in found if isinstance(one, ICMPv6NDOptPrefixInfo)]
        assert prefixes[0] == (str(config.prefix6.network_address) if config.prefix6 else "", 0xFFFFFFFF)
        assert all(lifetime == 0 for _, lifetime in prefixes[1:])
        servers = [one for one in found if isinstance(one, ICMPv6NDOptRDNSS)]
        assert [one.dns for one in servers if one.lifetime] == (
            [[str(one) for one in config.dns6[:8]]] if config.dns6 else []
        )
        mtus = [one.mtu for one in found if isinstance(one, ICMPv6NDOptMTU)]
        assert mtus == ([max(config.mtu, 1280)] if config.mtu else [])
        names = [one.searchlist for one in found if isinstance(one, ICMPv6NDOptDNSSL) and one.lifetime]
        assert names == ([[f"{name}." for name in config.search]] if config.search else []) or len(config.search) > 5

    if config.dhcpv6:
        message = check(responder.respond(REQUESTS["solicit fqdn"][0]))[dhcp6.DHCP6_Advertise]
        [lease] = message[dhcp6.DHCP6OptIA_NA].ianaopts
        assert lease.addr == str(config.addr6)
        told = message[dhcp6.DHCP6OptDNSServers].dnsservers if dhcp6.DHCP6OptDNSServers in message else []
        assert told == [str(one) for one in config.dns6[:8]]
        fqdn = message[dhcp6.DHCP6OptClientFQDN].fqdn if dhcp6.DHCP6OptClientFQDN in message else b"."
        assert fqdn.rstrip(b".") == config.fqdn.encode()
