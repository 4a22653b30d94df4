# SPDX-License-Identifier: GPL-2.0-or-later
"""ARP against scapy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from scapy.layers.l2 import ARP, Ether

from godwit.net.config import NetConfig
from godwit.net.responder import Responder

GUEST = "52:54:00:12:34:56"
OURS = "9a:55:9a:55:9a:55"


def ask(responder: Responder, target: str, sender: str = "192.0.2.7", **fields: Any) -> list[bytes]:
    values: dict[str, Any] = {"op": 1, "hwsrc": GUEST, "psrc": sender, "pdst": target, **fields}
    arp = ARP(**values)
    return responder.respond(bytes(Ether(src=GUEST, dst="ff:ff:ff:ff:ff:ff") / arp))


@pytest.mark.parametrize("target", ["192.0.2.1", "192.0.2.99", "192.0.2.255", "203.0.113.5"])
def test_every_other_address_is_ours(responder: Responder, target: str) -> None:
    [frame] = ask(responder, target)
    reply = Ether(frame)
    assert (reply.src, reply.dst, reply.type) == (OURS, GUEST, 0x0806)
    arp = reply[ARP]
    assert (arp.hwtype, arp.ptype, arp.hwlen, arp.plen, arp.op) == (1, 0x0800, 6, 4, 2)
    assert (arp.hwsrc, arp.psrc, arp.hwdst, arp.pdst) == (OURS, target, GUEST, "192.0.2.7")


@pytest.mark.parametrize(
    ("target", "sender"),
    [
        ("192.0.2.7", "0.0.0.0"),  # a probe of the address it was given
        ("192.0.2.7", "192.0.2.7"),  # its announcement
        ("192.0.2.7", "192.0.2.9"),  # a second address asks for the first
        ("192.0.2.9", "192.0.2.9"),  # an announcement of an address it gave itself
        ("192.0.2.9", "0.0.0.0"),  # a probe of one
        ("0.0.0.0", "192.0.2.7"),
    ],
)
def test_the_guest_may_have_its_addresses(responder: Responder, target: str, sender: str) -> None:
    assert ask(responder, target, sender) == []


def test_a_probe_of_the_router_is_answered(responder: Responder) -> None:
    [frame] = ask(responder, "192.0.2.1", "0.0.0.0")
    assert Ether(frame)[ARP].psrc == "192.0.2.1"


@pytest.mark.parametrize("fields", [{"op": 2}, {"op": 3}, {"hwtype": 6}, {"ptype": 0x86DD}, {"hwlen": 8}, {"plen": 16}])
def test_other_operations_and_kinds(responder: Responder, fields: dict[str, Any]) -> None:
    assert ask(responder, "192.0.2.1", **fields) == []


def test_nothing_without_ipv4(config: NetConfig) -> None:
    assert ask(Responder(replace(config, addr4=None, gateway4=None)), "192.0.2.1") == []


def test_the_mac_address_can_be_chosen(config: NetConfig) -> None:
    [frame] = ask(Responder(replace(config, our_mac=bytes.fromhex("020000000001"))), "192.0.2.1")
    assert Ether(frame).src == Ether(frame)[ARP].hwsrc == "02:00:00:00:00:01"


def test_announcement(config: NetConfig) -> None:
    frame = Responder(config).announce()[0]
    sent = Ether(frame)
    assert (sent.src, sent.dst) == (OURS, "ff:ff:ff:ff:ff:ff")
    arp = sent[ARP]
    assert (arp.op, arp.hwsrc, arp.psrc, arp.pdst) == (1, OURS, "192.0.2.1", "192.0.2.1")
    assert Responder(replace(config, addr4=None, gateway4=None, addr6=None)).announce() == []
