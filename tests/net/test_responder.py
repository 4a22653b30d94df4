# SPDX-License-Identifier: GPL-2.0-or-later
"""Whatever the guest sends: an answer or none, never an exception."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scapy.layers import dhcp6
from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6ND_NS, ICMPv6ND_RS, ICMPv6NDOptSrcLLAddr, IPv6
from scapy.layers.l2 import ARP, Ether

from godwit.net.config import NetConfig, NetOptions, choose
from godwit.net.netlink import HostNetwork
from godwit.net.resolv import Resolv
from godwit.net.responder import Responder

GUEST = "52:54:00:12:34:56"
LL = "fe80::5054:ff:fe12:3456"

ETHER = Ether(src=GUEST, dst="ff:ff:ff:ff:ff:ff")
DHCP6 = ETHER / IPv6(src=LL, dst="ff02::1:2") / UDP(sport=546, dport=547)
GOOD: dict[str, bytes] = {
    "arp": bytes(ETHER / ARP(hwsrc=GUEST, psrc="192.0.2.7", pdst="192.0.2.1")),
    "dhcp": bytes(
        ETHER
        / IP(src="0.0.0.0", dst="255.255.255.255")
        / UDP(sport=68, dport=67)
        / BOOTP(chaddr=bytes.fromhex("525400123456"))
        / DHCP(options=[("message-type", "discover"), ("param_req_list", [1, 3, 6]), (81, b"\x05\0\0\x02vm"), "end"])
    ),
    "rs": bytes(ETHER / IPv6(src=LL, dst="ff02::2", hlim=255) / ICMPv6ND_RS() / ICMPv6NDOptSrcLLAddr(lladdr=GUEST)),
    "ns": bytes(
        ETHER
        / IPv6(src=LL, dst="ff02::1:ff00:1", hlim=255)
        / ICMPv6ND_NS(tgt="fe80::1")
        / ICMPv6NDOptSrcLLAddr(lladdr=GUEST)
    ),
    "dhcpv6": bytes(
        DHCP6
        / dhcp6.DHCP6_Solicit(trid=1)
        / dhcp6.DHCP6OptClientId(duid=dhcp6.DUID_LL(lladdr=GUEST))
        / dhcp6.DHCP6OptIA_NA(iaid=1, ianaopts=[dhcp6.DHCP6OptIAAddress(addr="2001:db8::1")])
    ),
}


# The least that each of them can be answered for, without any option that may be missing.
SHORTEST = {"dhcp": 236, "rs": 8, "ns": 24, "dhcpv6": 4}


def test_the_good_ones_are_answered(responder: Responder) -> None:
    for name, frame in GOOD.items():
        assert len(responder.respond(frame)) == 1, name


@pytest.mark.parametrize("name", GOOD)
def test_truncated_at_every_byte(responder: Responder, name: str) -> None:
    frame = GOOD[name]
    # Ethernet may pad, so what counts is the length that IP states: a frame
    # that ends before it is never answered. ARP is 28 bytes long.
    for length in range(len(frame)):
        assert responder.respond(frame[:length]) == [], length
    assert len(responder.respond(frame + bytes(64))) == 1


@pytest.mark.parametrize("name", ["dhcp", "rs", "ns", "dhcpv6"])
def test_truncated_at_every_byte_with_lengths_that_agree(responder: Responder, name: str) -> None:
    """Cut inside the message, with IP and UDP telling the length that is left."""
    whole = Ether(GOOD[name])
    ip = whole[IPv6] if IPv6 in whole else whole[IP]
    message = bytes(whole[UDP].payload if UDP in whole else ip.payload)
    head = ip.copy()
    head.remove_payload()
    for field in ("len", "plen", "chksum"):
        head.fields.pop(field, None)
    for length in range(len(message)):
        body = (
            UDP(sport=whole[UDP].sport, dport=whole[UDP].dport) / message[:length] if UDP in whole else message[:length]
        )
        # An option cut away whole leaves a message that is still good.
        answers = responder.respond(bytes(ETHER / head / body))
        assert len(answers) <= (1 if length >= SHORTEST[name] else 0), length


@given(frame=st.binary(max_size=400))
def test_random_bytes(frame: bytes) -> None:
    responder = make_responder()
    assert all(isinstance(one, bytes) for one in responder.respond(frame))


@given(
    name=st.sampled_from(sorted(GOOD)),
    changes=st.lists(st.tuples(st.integers(12, 400), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 60),
    tail=st.binary(max_size=40),
)
@example(name="dhcp", changes=[(14, 0x4F)], cut=0, tail=b"")
@example(name="ns", changes=[(79, 0)], cut=0, tail=b"")
def test_mutated_frames(name: str, changes: list[tuple[int, int]], cut: int, tail: bytes) -> None:
    """Never raises, never answers with more than one frame, and what it answers comes from our address."""
    responder = make_responder()
    frame = bytearray(GOOD[name])
    for at, value in changes:
        frame[at % len(frame)] = value
    sent = bytes(frame[: len(frame) - cut]) + tail
    answers = responder.respond(sent)
    assert len(answers) <= 1
    for answer in answers:
        assert answer[6:12] == responder.config.our_mac
        assert len(answer) <= 1514


@given(options=st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=255)), max_size=12))
@example(options=[(53, b"")])
@example(options=[(53, b"\x01\x01")])
@example(options=[(53, b"\x03"), (50, b"\x01")])
@example(options=[(53, b"\x01"), (57, b"\x01"), (52, b"\x03"), (81, b""), (55, b"")])
def test_absurd_dhcp_options(options: list[tuple[int, bytes]]) -> None:
    encoded = b"".join(bytes([code, len(value)]) + value for code, value in options)
    base = Ether(GOOD["dhcp"])
    message = bytes(base[BOOTP])[:240] + encoded
    packet = ETHER / IP(src="0.0.0.0", dst="255.255.255.255") / UDP(sport=68, dport=67) / message
    assert len(make_responder().respond(bytes(packet))) <= 1


@given(kind=st.integers(0, 255), options=st.lists(st.tuples(st.integers(0, 60), st.binary(max_size=60)), max_size=12))
@example(kind=1, options=[(1, b""), (3, b""), (3, b"\0" * 11)])
@example(kind=1, options=[(1, b"x"), (3, b"\0" * 12 + b"\0\x05\0\x01x")])
def test_absurd_dhcpv6_options(kind: int, options: list[tuple[int, bytes]]) -> None:
    encoded = b"".join(code.to_bytes(2, "big") + len(value).to_bytes(2, "big") + value for code, value in options)
    answers = make_responder().respond(bytes(DHCP6 / (bytes([kind, 0, 0, 1]) + encoded)))
    assert len(answers) <= 1


@pytest.mark.parametrize("associations", [1, 3])
def test_an_answer_is_no_longer_than_can_be_sent(associations: int) -> None:
    """Who has many addresses is told of each that it has it no more, which takes more than to ask: of what fits."""

    def option(code: int, value: bytes) -> bytes:
        return code.to_bytes(2, "big") + len(value).to_bytes(2, "big") + value

    addresses = b"".join(option(5, IPv6Address(f"2001:db8:1::{n:x}").packed + bytes(8)) for n in range(16))
    asked = b"\1xyz" + option(1, bytes(100)) + option(3, bytes(12) + addresses) * associations
    responder = make_responder()
    responder.config = replace(responder.config, search=["a" * 60 + ".example.org"] * 8)
    answers = responder.respond(bytes(DHCP6 / asked))
    assert [len(answer) <= 2048 for answer in answers] == [True]


def make_responder() -> Responder:
    """For hypothesis, which takes no fixture that is made anew for each test."""
    options: dict[str, Any] = {"search": ("example.org",), "fqdn": "vm.example.org", "hostname": "vm"}
    addresses = NetOptions(
        address4=IPv4Address("192.0.2.7"),
        prefix_len4=24,
        gateway4=IPv4Address("192.0.2.1"),
        address6=IPv6Address("2001:db8:1::7"),
        gateway6=IPv6Address("fe80::1"),
        **options,
    )
    return Responder(choose(addresses, HostNetwork(), Resolv()))


def test_the_guests_mac_address_is_learned(config: NetConfig) -> None:
    responder = Responder(replace(config, guest_mac=None))
    assert responder.config.guest_mac is None
    responder.respond(GOOD["arp"][:6])
    assert responder.config.guest_mac is None
    responder.respond(GOOD["arp"])
    assert responder.config.guest_mac == bytes.fromhex("525400123456")


@pytest.mark.parametrize("source", [bytes(6), b"\xff" * 6, b"\x01\x00\x5e\x00\x00\x01"])
def test_no_station_has_such_an_address(config: NetConfig, source: bytes) -> None:
    responder = Responder(config)
    assert responder.respond(GOOD["arp"][:6] + source + GOOD["arp"][12:]) == []
    assert config.guest_mac is None


def test_what_is_no_rare_frame_gets_no_answer(responder: Responder) -> None:
    for frame in (
        ETHER / IP(src="192.0.2.7", dst="198.51.100.1") / TCP(),
        ETHER / IP(src="192.0.2.7", dst="198.51.100.1") / UDP(sport=68, dport=53),
        ETHER / IPv6(src=LL, dst="2001:db8::1") / UDP(sport=546, dport=53),
        Ether(src=GUEST, dst="ff:ff:ff:ff:ff:ff", type=0x88CC) / bytes(60),
    ):
        assert responder.respond(bytes(frame)) == []
