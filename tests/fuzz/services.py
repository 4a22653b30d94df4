# SPDX-License-Identifier: GPL-2.0-or-later
"""What the guest asks of its network: the targets ``arp``, ``dhcp``, ``dhcpv6``, ``ndp``, and ``rare``: whole frames.

What holds: nothing is raised; there is one answer at most, well-formed, no
larger than the MTU and than what the data plane takes; and it is to whom asked,
about what was asked.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Final

from godwit.net import dhcpv6
from godwit.net.config import NetConfig
from godwit.net.packet import build_ethernet, build_icmp6, build_udp4, build_udp6
from godwit.net.responder import Responder

from . import wire
from .devices import require
from .frames import ADDR4, ADDR6, GATEWAY4, GATEWAY6, GUEST_MAC
from .script import Script, Writer
from .target import Target

TAKEN: Final = 2048  # bytes of a frame that the data plane takes
MTUS: Final = (1500, 1280, 0, 65520)
LINK_LOCAL: Final = IPv6Address("fe80::2")
UNSPECIFIED6: Final = IPv6Address("::")
SERVERS6: Final = IPv6Address("ff02::1:2")
ALL_ROUTERS: Final = IPv6Address("ff02::2")
SOLICITED: Final = IPv6Address("ff02::1:ff00:1")
COOKIE: Final = b"\x63\x82\x53\x63"
MESSAGE: Final = 236  # bytes of a DHCP message before its options


def network(how: int) -> NetConfig:
    """One of some."""
    rich = bool(how & 4)
    return NetConfig(
        mtu=MTUS[how & 3],
        addr4=None if how & 16 else ADDR4,
        prefix_len4=32 if how & 8 else 24,
        gateway4=None if how & 16 else GATEWAY4,
        addr6=None if how & 32 else ADDR6,
        local6=bool(how & 32) and not how & 64,
        dns4=[IPv4Address(f"192.0.2.{number}") for number in range(50, 62 if rich else 51)],
        dns6=[IPv6Address(f"2001:db8::{number}") for number in range(1, 13 if rich else 2)],
        search=[f"{'label' * 8}{number}.example.org" for number in range(30 if rich else 1)],
        hostname="guest",
        fqdn="guest.example.org",
    )


def asked(config: NetConfig, frame: bytes) -> tuple[wire.Seen, bytes] | None:
    """The answer to a frame, taken apart, and its destination; None: there is none."""
    answers = Responder(config).respond(frame)
    require(len(answers) <= 1, "more than one answer")
    if not answers:
        return None
    (answer,) = answers
    require(len(answer) <= TAKEN, f"an answer of {len(answer)} bytes, which the data plane does not take")
    return wire.check(answer, config.our_mac, config.mtu or 1500), answer[:6]


def options(data: bytes, head: str) -> list[tuple[int, bytes]]:
    """Options of DHCPv6: a code and a length each."""
    found = []
    size = struct.calcsize(head)
    while data:
        require(len(data) >= size, "an option without a head")
        code, length = struct.unpack_from(head, data)
        require(len(data) >= size + length, "an option that is cut")
        found.append((code, data[size : size + length]))
        data = data[size + length :]
    return found


def dhcp(script: Script) -> bool:
    """A message to port 67."""
    config, how = network(script.u8() & ~16), script.u8()
    source = IPv4Address(0) if how & 1 else ADDR4
    dest = GATEWAY4 if how & 2 else IPv4Address("255.255.255.255")
    message = script.rest()
    found = asked(config, build_ethernet(b"\xff" * 6, GUEST_MAC, wire.IPV4, build_udp4(source, 68, dest, 67, message)))
    if found is None:
        return False
    seen, mac = found
    answer = seen.above[8:]
    require(seen.proto == wire.UDP and seen.above[:4] == b"\0\x43\0\x44", "other ports")
    require(answer[:4] == b"\2\1\6\0" and answer[4:8] == message[4:8], "an answer to something else")
    require(answer[28:34] == message[28:34] and not any(answer[34:44]), "an answer for somebody else")
    require(mac in (b"\xff" * 6, message[28:34]), "an answer to somebody else")
    require(answer[16:20] in (bytes(4), ADDR4.packed), "another address")
    require(answer[MESSAGE : MESSAGE + 4] == COOKIE, "no cookie")
    told: dict[int, bytes] = {}
    at = MESSAGE + 4
    while answer[at] != 255:
        code, size = answer[at : at + 2]
        require(at + 2 + size < len(answer), "an option that is cut")
        told[code] = told.get(code, b"") + answer[at + 2 : at + 2 + size]
        at += 2 + size
    require(not any(answer[at + 1 :]), "something behind the end")
    require(53 not in told or told[53] in (b"\2", b"\5", b"\6"), "a kind that no server sends")
    require(told.get(53) != b"\6" or answer[16:20] == bytes(4), "a refusal with an address")
    return True


def ask6(script: Script, dest: IPv6Address) -> tuple[NetConfig, IPv6Address, IPv6Address]:
    """The network, and from whom to whom."""
    config, how = network(script.u8()), script.u8()
    source = (LINK_LOCAL, ADDR6, UNSPECIFIED6, IPv6Address("ff02::1"))[how & 3]
    return config, source, config.our_link_local if how & 4 else dest


def dhcp6(script: Script) -> bool:
    """A message to port 547."""
    config, source, dest = ask6(script, SERVERS6)
    message = script.rest()
    packet = build_udp6(source, 546, dest, 547, message)
    found = asked(config, build_ethernet(b"\x33\x33\0\1\0\2", GUEST_MAC, wire.IPV6, packet))
    if found is None:
        return False
    seen, mac = found
    answer = seen.above[8:]
    require(mac == GUEST_MAC and seen.pseudo[16:] == source.packed, "an answer to somebody else")
    require(answer[0] in (2, 7) and answer[1:4] == message[1:4], "an answer to something else")
    told = options(answer[4:], "!HH")
    given = options(message[4:], "!HH")
    require([value for code, value in told if code == 2] == [dhcpv6.server_duid(config)], "not from this server")
    clients = [value for code, value in given if code == 1][:1]
    require([value for code, value in told if code == 1] == clients, "another client")
    wanted = [value[:4] for code, value in given if code == 3]
    held = [value for code, value in told if code == 3]
    require(all(value[:4] in wanted for value in held), "an association that nobody asked for")
    for value in held:
        for code, inner in options(value[12:], "!HH"):
            require(code in (5, 13) and (code == 13 or len(inner) == 24), "something else in an association")
            if code == 5 and any(inner[16:]):
                require(inner[:16] == ADDR6.packed, "another address")
    return True


def ndp(script: Script) -> bool:
    """A message of ICMPv6."""
    config, source, dest = ask6(script, SOLICITED)
    message = script.rest()[:1000]
    frame = build_ethernet(b"\x33\x33\xff\0\0\1", GUEST_MAC, wire.IPV6, build_icmp6(source, dest, message))
    found = asked(config, frame)
    if found is None:
        return False
    seen, mac = found
    answer = seen.above
    require(seen.proto == wire.ICMPV6, "no ICMPv6")
    require(answer[0] == {133: 134, 135: 136}.get(message[0]) and answer[1] == 0, "an answer of another kind")
    require(mac == GUEST_MAC or mac[:2] == b"\x33\x33", "an answer to somebody else")
    require(answer[0] != 136 or answer[8:24] == message[8:24], "an answer about somebody else")
    rest = answer[16:] if answer[0] == 134 else answer[24:]
    while rest:
        require(len(rest) >= 8 and 0 < rest[1] * 8 <= len(rest), "an option of another size")
        rest = rest[rest[1] * 8 :]
    return True


def arp(script: Script) -> bool:
    """What is in a frame of ARP."""
    config, how = network(script.u8()), script.u8()
    message = script.rest()[:1000]
    found = asked(config, build_ethernet(b"\xff" * 6, bytes([how]) + GUEST_MAC[1:], wire.ARP, message))
    if found is None:
        return False
    seen, mac = found
    require(mac == bytes([how]) + GUEST_MAC[1:], "an answer to somebody else")
    require(seen.above[6:14] == b"\0\2" + config.our_mac, "no reply of ours")
    require(seen.above[14:18] == message[24:28] and seen.above[18:28] == message[8:18], "about something else")
    return True


def rare(script: Script) -> bool:
    """A whole frame, its lengths right or not."""
    config, how = network(script.u8()), script.u8()
    frame = script.take(TAKEN)
    return asked(config, wire.with_lengths(frame) if how & 1 else frame) is not None


KINDS: Final[dict[str, Callable[[Script], bool]]] = {
    "arp": arp,
    "dhcp": dhcp,
    "dhcpv6": dhcp6,
    "ndp": ndp,
    "rare": rare,
}


def run(name: str, data: bytes) -> bool:
    """One of the targets. Whether there was an answer."""
    return KINDS[name](Script(data))


# ---- to begin with


def messages() -> Iterator[tuple[str, Any]]:
    """What guests ask, with the target that it is for."""
    from scapy.layers.dhcp import BOOTP, DHCP
    from scapy.layers.dhcp6 import (
        DUID_LL,
        DHCP6_Confirm,
        DHCP6_InfoRequest,
        DHCP6_Rebind,
        DHCP6_Release,
        DHCP6_Renew,
        DHCP6_Request,
        DHCP6_Solicit,
        DHCP6OptClientFQDN,
        DHCP6OptClientId,
        DHCP6OptIA_NA,
        DHCP6OptIAAddress,
        DHCP6OptOptReq,
        DHCP6OptRapidCommit,
        DHCP6OptServerId,
    )
    from scapy.layers.inet6 import ICMPv6ND_NS, ICMPv6ND_RS, ICMPv6NDOptSrcLLAddr
    from scapy.layers.l2 import ARP

    boot: Any = BOOTP(chaddr=GUEST_MAC, xid=5)
    for options_given in (
        [("message-type", "discover")],
        [("message-type", "discover"), ("rapid_commit", b""), ("client_id", b"\1" + GUEST_MAC)],
        [("message-type", "request"), ("requested_addr", str(ADDR4))],
        [("message-type", "request"), ("requested_addr", "10.0.0.9"), ("client_id", b"c" * 200)],
        [("message-type", "inform"), ("param_req_list", [1, 3, 6, 12, 15, 26, 81, 119]), ("max_dhcp_size", 1500)],
        [("message-type", "discover"), (81, b"\5\0\0\5guest\0"), (52, b"\3")],
    ):
        yield "dhcp", boot / DHCP(options=[*options_given, "end"])
    yield "dhcp", BOOTP(chaddr=GUEST_MAC, xid=6, ciaddr=str(ADDR4), flags=0x8000)
    client = DHCP6OptClientId(duid=DUID_LL(lladdr="02:00:00:00:00:02"))
    server = DHCP6OptServerId(duid=DUID_LL(lladdr=NetConfig().our_mac.hex(":")))
    held: Any = DHCP6OptIA_NA(iaid=7, ianaopts=[DHCP6OptIAAddress(addr=str(ADDR6)), DHCP6OptIAAddress(addr="::9")])
    for message in (
        DHCP6_Solicit(trid=5) / client / DHCP6OptIA_NA(iaid=1),
        DHCP6_Solicit(trid=5) / client / held / DHCP6OptRapidCommit() / DHCP6OptOptReq(reqopts=[23, 24, 39]),
        DHCP6_Request(trid=5) / client / server / held,
        DHCP6_Renew(trid=5) / client / server / held,
        DHCP6_Rebind(trid=5) / client / held,
        DHCP6_Release(trid=5) / client / server / held,
        DHCP6_Confirm(trid=5) / client / held,
        DHCP6_InfoRequest(trid=5) / client / DHCP6OptClientFQDN(fqdn="guest", flags=1),
    ):
        yield "dhcpv6", message
    for message in (
        ICMPv6ND_NS(tgt=str(GATEWAY6)),
        ICMPv6ND_NS(tgt=str(NetConfig().our_link_local)) / ICMPv6NDOptSrcLLAddr(lladdr="02:00:00:00:00:02"),
        ICMPv6ND_RS(),
        ICMPv6ND_RS() / ICMPv6NDOptSrcLLAddr(lladdr="02:00:00:00:00:02"),
    ):
        yield "ndp", message
    for source in (str(ADDR4), "0.0.0.0"):
        yield "arp", ARP(hwsrc="02:00:00:00:00:02", psrc=source, pdst=str(GATEWAY4))


def seeds(name: str) -> Iterator[bytes]:
    """Of one target: each message in some networks, from some addresses."""
    for kind, message in messages():
        data = bytes(message)
        for first, how in ((0, 0), (4, 2), (9, 1), (2, 0), (32, 0)):
            if kind == name:
                yield Writer().put("BB", first, how).bytes(data).data
            elif name == "rare":
                yield Writer().put("BB", first, 1).bytes(whole(kind, data)).data


def whole(kind: str, data: bytes) -> bytes:
    """The frame that such a message comes in."""
    if kind == "arp":
        return build_ethernet(b"\xff" * 6, GUEST_MAC, wire.ARP, data)
    if kind == "dhcp":
        packet = build_udp4(IPv4Address(0), 68, IPv4Address("255.255.255.255"), 67, data)
        return build_ethernet(b"\xff" * 6, GUEST_MAC, wire.IPV4, packet)
    packet = (
        build_icmp6(LINK_LOCAL, ALL_ROUTERS, data)
        if kind == "ndp"
        else build_udp6(LINK_LOCAL, 546, SERVERS6, 547, data)
    )
    return build_ethernet(b"\x33\x33\0\0\0\2", GUEST_MAC, wire.IPV6, packet)


TARGETS: Final = {name: Target(functools.partial(run, name), functools.partial(seeds, name), TAKEN) for name in KINDS}
