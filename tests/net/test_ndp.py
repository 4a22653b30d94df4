# SPDX-License-Identifier: GPL-2.0-or-later
"""Neighbour discovery against scapy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv6Address, IPv6Network
from typing import Any

import pytest
from scapy.layers.inet import UDP
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6ND_RS,
    ICMPv6NDOptDNSSL,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptMTU,
    ICMPv6NDOptPrefixInfo,
    ICMPv6NDOptRDNSS,
    ICMPv6NDOptSrcLLAddr,
    IPv6,
)
from scapy.layers.l2 import ARP, Ether

from godwit.net.change import settle, take_back, told
from godwit.net.config import NetConfig, Withdrawn
from godwit.net.ndp import is_about_addresses, questions
from godwit.net.responder import Responder

GUEST = "52:54:00:12:34:56"
GUEST_LL = "fe80::5054:ff:fe12:3456"
OURS = "9a:55:9a:55:9a:55"
GUEST_GLOBAL = "2001:db8:1::7"


def layers(packet: Any) -> Iterator[Any]:
    while packet:
        yield packet
        packet = packet.payload


def solicit_router(source: str = GUEST_LL, **fields: Any) -> bytes:
    packet = Ether(src=GUEST, dst="33:33:00:00:00:02") / IPv6(src=source, dst="ff02::2", hlim=255, **fields)
    packet /= ICMPv6ND_RS()
    return bytes(packet / ICMPv6NDOptSrcLLAddr(lladdr=GUEST)) if source != "::" else bytes(packet)


def solicit(target: str, source: str = GUEST_LL, dest: str | None = None, **fields: Any) -> bytes:
    group = IPv6Address(int(IPv6Address("ff02::1:ff00:0")) | int(IPv6Address(target)) & 0xFFFFFF)
    packet = Ether(src=GUEST, dst="33:33:ff:00:00:01")
    packet /= IPv6(src=source, dst=dest or str(group), **{"hlim": 255, **fields})
    packet /= ICMPv6ND_NS(tgt=target)
    return bytes(packet / ICMPv6NDOptSrcLLAddr(lladdr=GUEST)) if source != "::" else bytes(packet)


def read(frames: list[bytes]) -> Any:
    [frame] = frames
    reply = Ether(frame)
    assert reply.src == OURS
    assert reply[IPv6].hlim == 255
    again = Ether(frame)
    del again[IPv6].payload.cksum
    assert Ether(bytes(again))[IPv6].payload.cksum == reply[IPv6].payload.cksum
    assert reply[IPv6].plen == len(frame) - 54
    return reply


def test_router_advertisement(responder: Responder) -> None:
    reply = read(responder.respond(solicit_router()))
    assert (reply.dst, reply[IPv6].dst, reply[IPv6].src) == (GUEST, GUEST_LL, "fe80::1")
    ra = reply[ICMPv6ND_RA]
    assert (ra.code, ra.chlim, ra.M, ra.O, ra.routerlifetime) == (0, 64, 1, 1, 65535)
    assert reply[ICMPv6NDOptSrcLLAddr].lladdr == OURS
    prefix = reply[ICMPv6NDOptPrefixInfo]
    assert (prefix.prefix, prefix.prefixlen, prefix.L, prefix.A) == ("2001:db8:1::", 64, 1, 1)
    assert (prefix.validlifetime, prefix.preferredlifetime) == (0xFFFFFFFF, 0xFFFFFFFF)
    assert reply[ICMPv6NDOptMTU].mtu == 1500
    assert reply[ICMPv6NDOptRDNSS].dns == ["2001:db8:53::1", "2001:db8:53::2"]
    assert reply[ICMPv6NDOptDNSSL].searchlist == ["example.org.", "lab.example.net."]


def test_a_guest_without_an_address_is_answered_to_all(responder: Responder) -> None:
    reply = read(responder.respond(solicit_router("::")))
    assert (reply.dst, reply[IPv6].dst) == ("33:33:00:00:00:01", "ff02::1")
    assert ICMPv6ND_RA in reply


def test_the_prefix_is_64_bits_whatever_the_hosts(config: NetConfig) -> None:
    for length in (48, 64, 128):
        reply = read(Responder(replace(config, prefix_len6=length)).respond(solicit_router()))
        prefix = reply[ICMPv6NDOptPrefixInfo]
        assert (prefix.prefix, prefix.prefixlen) == ("2001:db8:1::", 64)


def test_what_is_not_known_is_not_told(config: NetConfig) -> None:
    bare = replace(config, mtu=0, dns6=[], search=[], dhcpv6=False)
    reply = read(Responder(bare).respond(solicit_router()))
    assert (reply[ICMPv6ND_RA].M, reply[ICMPv6ND_RA].O) == (0, 0)
    for option in (ICMPv6NDOptMTU, ICMPv6NDOptRDNSS, ICMPv6NDOptDNSSL):
        assert option not in reply


def test_the_mtu_is_at_least_what_ipv6_needs(config: NetConfig) -> None:
    assert read(Responder(replace(config, mtu=900)).respond(solicit_router()))[ICMPv6NDOptMTU].mtu == 1280


def test_long_lists_are_cut_to_an_advertisement_that_fits(config: NetConfig) -> None:
    many = replace(
        config,
        dns6=[IPv6Address(f"2001:db8::{n}") for n in range(1, 100)],
        search=[f"domain-{n}.example.org" for n in range(200)],
    )
    [frame] = Responder(many).respond(solicit_router())
    assert len(frame) - 14 <= 1280
    reply = read([frame])
    assert reply[ICMPv6NDOptRDNSS].dns == [f"2001:db8::{n}" for n in range(1, 9)]
    assert reply[ICMPv6NDOptDNSSL].searchlist[:2] == ["domain-0.example.org.", "domain-1.example.org."]


@pytest.mark.parametrize("target", ["fe80::1", "2001:db8:1::99", "2001:db8:1::1", "fe80::aaaa", "2001:db8:ffff::1"])
def test_every_other_address_is_ours(responder: Responder, target: str) -> None:
    reply = read(responder.respond(solicit(target)))
    assert (reply.dst, reply[IPv6].dst, reply[IPv6].src) == (GUEST, GUEST_LL, target)
    advertisement = reply[ICMPv6ND_NA]
    router = int(target.startswith("fe80"))
    assert (advertisement.tgt, advertisement.R, advertisement.S, advertisement.O) == (target, router, 1, 1)
    assert reply[ICMPv6NDOptDstLLAddr].lladdr == OURS


def test_reachability_is_confirmed_to_a_unicast_probe(responder: Responder) -> None:
    reply = read(responder.respond(solicit("fe80::1", GUEST_GLOBAL, "fe80::1")))
    assert reply[IPv6].dst == GUEST_GLOBAL


@pytest.mark.parametrize(
    ("target", "source"),
    [
        (GUEST_GLOBAL, "::"),  # duplicate address detection of what DHCPv6 gave it
        (GUEST_LL, "::"),  # of its link-local address
        ("2001:db8:1::5054:ff:fe12:3456", "::"),  # of what it made of the prefix
        (GUEST_GLOBAL, GUEST_LL),
        ("2001:db8:1::50", "2001:db8:1::50"),
        ("ff02::1", GUEST_LL),
        ("::", GUEST_LL),
    ],
)
def test_the_guest_may_have_its_addresses(responder: Responder, target: str, source: str) -> None:
    assert responder.respond(solicit(target, source)) == []


def test_the_routers_address_is_defended(responder: Responder) -> None:
    reply = read(responder.respond(solicit("fe80::1", "::")))
    assert (reply.dst, reply[IPv6].dst) == ("33:33:00:00:00:01", "ff02::1")
    advertisement = reply[ICMPv6ND_NA]
    assert (advertisement.tgt, advertisement.R, advertisement.S, advertisement.O) == ("fe80::1", 1, 0, 1)


def test_a_claim_to_the_routers_address_goes_to_its_group_or_is_none(responder: Responder) -> None:
    """RFC 4861, section 7.1.1: without a source nothing else is valid."""
    assert responder.respond(solicit("fe80::1", "::", "fe80::1")) == []


@pytest.mark.parametrize("frame", [solicit_router(), solicit("fe80::1")])
def test_a_packet_that_was_routed_is_dropped(responder: Responder, frame: bytes) -> None:
    packet = Ether(frame)
    packet[IPv6].hlim = 254
    assert responder.respond(bytes(packet)) == []


@pytest.mark.parametrize("frame", [solicit_router(), solicit("fe80::1")])
def test_a_code_that_is_not_known_is_dropped(responder: Responder, frame: bytes) -> None:
    """RFC 4861, sections 6.1.1 and 7.1.1."""
    packet = Ether(frame)
    packet[IPv6].payload.code = 1
    assert responder.respond(bytes(packet)) == []


def test_options_of_length_zero_and_link_layer_address_without_source(responder: Responder) -> None:
    frame = bytes(Ether(solicit("fe80::1", "::")) / b"")
    with_option = Ether(src=GUEST, dst="33:33:ff:00:00:01") / IPv6(src="::", dst="ff02::1:ff00:1", hlim=255)
    with_option /= ICMPv6ND_NS(tgt="fe80::1")
    assert responder.respond(frame) != []
    assert responder.respond(bytes(with_option / ICMPv6NDOptSrcLLAddr(lladdr=GUEST))) == []
    zero = Ether(src=GUEST, dst="33:33:ff:00:00:01") / IPv6(src=GUEST_LL, dst="ff02::1:ff00:1", hlim=255)
    zero /= ICMPv6ND_NS(tgt="fe80::1")
    assert responder.respond(bytes(zero / (b"\x01\x00" + bytes(6)))) == []


@pytest.mark.parametrize(
    ("change", "advertises", "answers"),
    [({"ra": False}, False, True), ({"ndp": False}, False, False), ({"addr6": None}, False, False)],
)
def test_switched_off(config: NetConfig, change: dict[str, Any], advertises: bool, answers: bool) -> None:
    responder = Responder(replace(config, **change))
    assert bool(responder.respond(solicit_router())) is advertises
    assert bool(responder.respond(solicit("fe80::1"))) is answers
    assert any(ICMPv6ND_RA in Ether(one) for one in responder.announce()) is advertises


def test_what_is_withdrawn_is_taken_back(config: NetConfig) -> None:
    """RFC 4862, 5.5.3 e: of an old prefix two hours stay, and none of them preferred. RFC 8106: lifetime 0."""
    gone = Withdrawn(
        prefixes6=tuple(IPv6Network(f"2001:db8:{number}::/64") for number in (8, 9)),
        dns6=(IPv6Address("2001:db8:8::53"),),
        search=("old.example",),
    )
    for ra in (solicit_router(), None):
        responder = Responder(replace(config, withdrawn=gone))
        reply = read(responder.respond(ra) if ra else responder.announce()[1:])
        options = list(layers(reply))
        assert [
            (one.prefix, one.validlifetime, one.preferredlifetime, one.L, one.A)
            for one in options
            if isinstance(one, ICMPv6NDOptPrefixInfo)
        ] == [
            ("2001:db8:1::", 0xFFFFFFFF, 0xFFFFFFFF, 1, 1),
            ("2001:db8:8::", 7200, 0, 1, 1),
            ("2001:db8:9::", 7200, 0, 1, 1),
        ]
        assert [(one.dns, one.lifetime) for one in options if isinstance(one, ICMPv6NDOptRDNSS)] == [
            (["2001:db8:53::1", "2001:db8:53::2"], 65535),
            (["2001:db8:8::53"], 0),
        ]
        assert [(one.searchlist, one.lifetime) for one in options if isinstance(one, ICMPv6NDOptDNSSL)] == [
            (["example.org.", "lab.example.net."], 65535),
            (["old.example."], 0),
        ]


def test_another_router(config: NetConfig) -> None:
    """The old one says farewell, to all nodes (RFC 4861, 6.2.5)."""
    responder = Responder(config)

    def change(**changes: Any) -> list[bytes]:
        return responder.change(settle(responder.config, replace(responder.config, **changes)))

    frames = change(our_link_local=IPv6Address("fe80::2"))
    reply = read(frames[:1])
    assert (reply[IPv6].src, reply[IPv6].dst, reply[ICMPv6ND_RA].routerlifetime) == ("fe80::1", "ff02::1", 0)
    assert ICMPv6NDOptPrefixInfo not in reply
    assert read(frames[2:])[IPv6].src == "fe80::2"
    assert len(change()) == 3  # it may have been missed
    frames = change(our_link_local=IPv6Address("fe80::3"), ra=False)
    assert [Ether(frame)[IPv6].src for frame in frames[:-1]] == ["fe80::2", "fe80::1"]
    frames = change(our_link_local=IPv6Address("fe80::4"), ra=True)
    assert [Ether(frame)[IPv6].src for frame in (*frames[:-2], frames[-1])] == ["fe80::2", "fe80::1", "fe80::4"]


def test_what_the_guest_was_told_elsewhere(config: NetConfig) -> None:
    """The router there says farewell, and what it has told is taken back, also where no router speaks any more."""
    there = replace(
        config,
        our_link_local=IPv6Address("fe80::77"),
        addr6=IPv6Address("2001:db8:77::7"),
        dns6=[IPv6Address("2001:db8:77::53")],
        search=["there.example"],
    )
    everything: tuple[dict[str, Any], ...] = ({}, {"addr6": None})
    for changes in everything:
        here = take_back(replace(config, **changes), told(there))
        frames = [frame for frame in Responder(here).announce() if ARP not in Ether(frame)]
        assert len(frames) == 2 - len(changes)
        for frame in frames:
            reply = read([frame])
            assert ("2001:db8:77::", 7200, 0) in [
                (one.prefix, one.validlifetime, one.preferredlifetime)
                for one in layers(reply)
                if isinstance(one, ICMPv6NDOptPrefixInfo)
            ]
            assert (["2001:db8:77::53"], 0) in [
                (one.dns, one.lifetime) for one in layers(reply) if isinstance(one, ICMPv6NDOptRDNSS)
            ]
            assert (["there.example."], 0) in [
                (one.searchlist, one.lifetime) for one in layers(reply) if isinstance(one, ICMPv6NDOptDNSSL)
            ]
        assert read(frames[:1])[IPv6].src == "fe80::77"


@pytest.mark.parametrize(("dhcpv6", "other"), [(True, 1), (False, 0)])
def test_a_host_with_no_ipv6_address(config: NetConfig, dhcpv6: bool, other: int) -> None:
    """A router of nothing, whose address the guest can still reach."""
    responder = Responder(replace(config, addr6=None, local6=True, dns6=[], dhcpv6=dhcpv6))
    reply = read(responder.respond(solicit_router()))
    ra = reply[ICMPv6ND_RA]
    assert (ra.routerlifetime, ra.M, ra.O) == (0, 0, other)
    assert ICMPv6NDOptPrefixInfo not in reply
    assert ICMPv6ND_NA in read(responder.respond(solicit("fe80::1")))


def test_announcement(responder: Responder) -> None:
    reply = read(responder.announce()[1:])
    assert (reply.dst, reply[IPv6].dst, reply[IPv6].src) == ("33:33:00:00:00:01", "ff02::1", "fe80::1")
    assert reply[ICMPv6NDOptPrefixInfo].prefix == "2001:db8:1::"


@pytest.mark.parametrize(
    ("seen", "seen_link_local", "sources"),
    [
        ("::", "::", ["2001:db8:1:0:9855:9aff:fe55:9a55", "fe80::1"]),
        ("2001:db8:5::7", GUEST_LL, ["2001:db8:1:0:9855:9aff:fe55:9a55"]),
        (GUEST_GLOBAL, "::", ["fe80::1"]),
        (GUEST_GLOBAL, GUEST_LL, []),
    ],
)
def test_questions(config: NetConfig, seen: str, seen_link_local: str, sources: list[str]) -> None:
    """Whoever answers them needs somebody to answer to; that is we, whatever the address."""
    frames = questions(config, IPv6Address(seen), IPv6Address(seen_link_local))
    assert [Ether(frame)[IPv6].src for frame in frames] == sources
    for frame in frames:
        asked = read([frame])
        assert (asked.dst, asked[IPv6].dst, asked[ICMPv6EchoRequest].code) == ("33:33:00:00:00:01", "ff02::1", 0)
        answer = read(Responder(config).respond(solicit(asked[IPv6].src)))
        assert answer[ICMPv6ND_NA].tgt == asked[IPv6].src


def test_no_questions(config: NetConfig) -> None:
    nobody = IPv6Address("::")
    assert questions(replace(config, addr6=None), nobody, nobody) == []
    assert questions(replace(config, ndp=False), nobody, nobody) == []  # it has nobody to answer to


def test_what_the_guest_asks_about_itself(config: NetConfig) -> None:
    """Nothing of what a question has it send is among that."""
    assert is_about_addresses(solicit_router())
    assert is_about_addresses(solicit_router("::"))
    assert is_about_addresses(solicit(GUEST_GLOBAL, "::"))
    [asked] = questions(config, IPv6Address(GUEST_GLOBAL), IPv6Address("::"))
    assert not is_about_addresses(solicit(Ether(asked)[IPv6].src))
    assert not is_about_addresses(solicit(Ether(asked)[IPv6].src, dest=Ether(asked)[IPv6].src))
    assert not is_about_addresses(bytes(Ether(src=GUEST, dst=OURS) / ARP(psrc="192.0.2.7", pdst="192.0.2.1")))
    assert not is_about_addresses(bytes(Ether(src=GUEST, dst=OURS) / IPv6(src=GUEST_LL) / UDP(dport=547)))
    whole = solicit_router("::")
    for size in range(55):  # up to the message's kind
        assert not is_about_addresses(whole[:size])
