# SPDX-License-Identifier: GPL-2.0-or-later
"""ARP (RFC 826): every address but the guest's own is at godwit's MAC address."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address

from godwit.net.config import NetConfig
from godwit.net.packet import BROADCAST, ETH_ARP, ETH_IPV4, Ethernet, MalformedError, Reader, build_ethernet

REQUEST = 1
REPLY = 2
HARDWARE_ETHERNET = 1


def respond(config: NetConfig, ethernet: Ethernet) -> bytes | None:
    """The reply to a request, or None.

    There is no reply about the guest's own address, to an announcement
    (sender and target are the same), and to a probe (sender 0.0.0.0, RFC 5227,
    section 2.1.1) of anything but the router: a guest that wants an address
    may have it. Nor with IPv4 off.
    """
    if config.addr4 is None:
        return None
    reader = Reader(ethernet.payload)
    kinds = reader.pull_u16(), reader.pull_u16(), reader.pull_u8(), reader.pull_u8()
    operation = reader.pull_u16()
    sender_mac, sender = reader.pull(6), reader.pull_ip4()
    reader.pull(6)
    target = reader.pull_ip4()
    if kinds != (HARDWARE_ETHERNET, ETH_IPV4, 6, 4) or operation != REQUEST:
        raise MalformedError("no ARP request for IPv4 over Ethernet")
    if target in (config.addr4, sender) or target.is_unspecified:
        return None
    if sender.is_unspecified and target != config.gateway4:
        return None
    return _frame(config, ethernet.source, REPLY, target, sender_mac, sender)


def announcement(config: NetConfig, address: IPv4Address) -> bytes:
    """To everyone: ``address`` is at our MAC address (RFC 5227, section 2.3)."""
    return _frame(config, BROADCAST, REQUEST, address, bytes(6), address)


def _frame(
    config: NetConfig, dest: bytes, operation: int, sender: IPv4Address, target_mac: bytes, target: IPv4Address
) -> bytes:
    body = struct.pack("!HHBBH", HARDWARE_ETHERNET, ETH_IPV4, 6, 4, operation)
    body += config.our_mac + sender.packed + target_mac + target.packed
    return build_ethernet(dest, config.our_mac, ETH_ARP, body)
