# SPDX-License-Identifier: GPL-2.0-or-later
"""Answers to the rare frames of the guest: ARP, DHCP, NDP, DHCPv6.

The data plane sends such frames up whole (Ethernet header first, no virtio
header) and carries the answers down. Nothing here keeps time or state besides
the guest's MAC address, which is learned: each answer follows from the frame
and the configuration. A frame that cannot be understood gets no answer;
whatever the guest sends, nothing is raised.
"""

from __future__ import annotations

from godwit.net import arp, dhcp, dhcpv6, ndp
from godwit.net.config import NetConfig
from godwit.net.packet import (
    DHCP_SERVER_PORT,
    DHCPV6_SERVER_PORT,
    ETH_ARP,
    ETH_IPV4,
    ETH_IPV6,
    PROTO_ICMPV6,
    PROTO_UDP,
    Ethernet,
    MalformedError,
    parse_ethernet,
    parse_ip4,
    parse_ip6,
    parse_udp,
)

# Bytes of an answer: what the data plane takes of rare frames (RARE_FRAME, plane.pxd), and more than any guest needs.
# One that asks for more (all the addresses that it ever had, say) gets none.
MAX_ANSWER = 2048


class Responder:
    """The answering side of the guest's link. ``config`` may be replaced at any time."""

    def __init__(self, config: NetConfig) -> None:
        self.config = config

    def respond(self, frame: bytes) -> list[bytes]:
        """The frames for the guest that answer ``frame``; most often one or none. Never raises for its content."""
        try:
            ethernet = parse_ethernet(frame)
            if ethernet.source[0] & 1 or not any(ethernet.source):
                return []
            self.config.guest_mac = ethernet.source
            return [answer for answer in self._answer(ethernet) if len(answer) <= MAX_ANSWER]
        except MalformedError:
            return []

    def announce(self) -> list[bytes]:
        """Unsolicited frames that bring the guest up to date after a migration or a change of the configuration.

        The farewell of each router that is none any more; an ARP announcement
        of the router, in case it had another MAC address where the guest comes
        from; and a router advertisement to all nodes, so that route, prefix,
        MTU and name servers are the present ones.
        """
        frames = [ndp.farewell(self.config, router) for router in self.config.withdrawn.routers6]
        if self.config.gateway4 is not None:
            frames.append(arp.announcement(self.config, self.config.gateway4))
        if self.config.advertises:
            frames.append(ndp.unsolicited_advertisement(self.config))
        return frames

    def change(self, config: NetConfig) -> list[bytes]:
        """Answer from ``config`` from now on. The frames that tell the guest, which ``announce`` repeats."""
        self.config = config
        return self.announce()

    def _answer(self, ethernet: Ethernet) -> list[bytes]:
        config = self.config
        answer: bytes | None = None
        if ethernet.kind == ETH_ARP:
            answer = arp.respond(config, ethernet)
        elif ethernet.kind == ETH_IPV4:
            packet4 = parse_ip4(ethernet.payload)
            if packet4.protocol == PROTO_UDP and config.dhcp and config.addr4 is not None:
                datagram = parse_udp(packet4.payload)
                if datagram.dest_port == DHCP_SERVER_PORT:
                    answer = dhcp.respond(config, packet4, datagram)
        elif ethernet.kind == ETH_IPV6 and config.has_ipv6:
            packet6 = parse_ip6(ethernet.payload)
            if packet6.protocol == PROTO_ICMPV6:
                answer = ndp.respond(config, ethernet, packet6)
            elif packet6.protocol == PROTO_UDP and config.dhcpv6:
                datagram = parse_udp(packet6.payload)
                if datagram.dest_port == DHCPV6_SERVER_PORT:
                    answer = dhcpv6.respond(config, ethernet, packet6, datagram)
        return [] if answer is None else [answer]
