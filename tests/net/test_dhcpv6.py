# SPDX-License-Identifier: GPL-2.0-or-later
"""DHCPv6 against scapy: requests made by it, replies read by it."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv6Address
from typing import Any

import pytest
from scapy.layers import dhcp6
from scapy.layers.inet import UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from godwit.net.config import NetConfig
from godwit.net.responder import Responder

GUEST = "52:54:00:12:34:56"
GUEST_LL = "fe80::5054:ff:fe12:3456"
OURS = "9a:55:9a:55:9a:55"
CLIENT_DUID = dhcp6.DUID_LL(lladdr=GUEST)
SERVER_DUID = dhcp6.DUID_LL(lladdr=OURS)
OTHER_DUID = dhcp6.DUID_LL(lladdr="02:00:00:00:00:99")
ADDRESS = "2001:db8:1::7"


def client(duid: Any = CLIENT_DUID) -> Any:
    return dhcp6.DHCP6OptClientId(duid=duid)


def server(duid: Any = SERVER_DUID) -> Any:
    return dhcp6.DHCP6OptServerId(duid=duid)


def ia(*addresses: str, iaid: int = 7) -> Any:
    inner = [dhcp6.DHCP6OptIAAddress(addr=address, preflft=60, validlft=120) for address in addresses]
    return dhcp6.DHCP6OptIA_NA(iaid=iaid, ianaopts=inner)


def frame(kind: Any, *options: Any, dest: str = "ff02::1:2") -> bytes:
    packet = Ether(src=GUEST, dst="33:33:00:01:00:02") / IPv6(src=GUEST_LL, dst=dest)
    packet /= UDP(sport=546, dport=547) / kind(trid=0xABCDEF)
    for option in options:
        packet /= option
    return bytes(packet)


def read(frames: list[bytes], kind: Any) -> Any:
    [answer] = frames
    reply = Ether(answer)
    assert (reply.src, reply.dst, reply[IPv6].src, reply[IPv6].dst) == (OURS, GUEST, "fe80::1", GUEST_LL)
    assert (reply[UDP].sport, reply[UDP].dport) == (547, 546)
    again = Ether(answer)
    del again[UDP].chksum
    assert Ether(bytes(again))[UDP].chksum == reply[UDP].chksum
    message = reply[kind]
    assert message.trid == 0xABCDEF
    assert bytes(message[dhcp6.DHCP6OptServerId].duid) == bytes(SERVER_DUID)
    return message


def leases(message: Any) -> list[tuple[str, int, int]]:
    return [(one.addr, one.preflft, one.validlft) for one in message[dhcp6.DHCP6OptIA_NA].ianaopts]


def test_solicit_is_advertised_with_everything(responder: Responder) -> None:
    message = read(responder.respond(frame(dhcp6.DHCP6_Solicit, client(), ia())), dhcp6.DHCP6_Advertise)
    assert bytes(message[dhcp6.DHCP6OptClientId].duid) == bytes(CLIENT_DUID)
    association = message[dhcp6.DHCP6OptIA_NA]
    assert (association.iaid, association.T1, association.T2) == (7, 300, 2880)
    assert leases(message) == [(ADDRESS, 3600, 7200)]
    assert message[dhcp6.DHCP6OptDNSServers].dnsservers == ["2001:db8:53::1", "2001:db8:53::2"]
    assert message[dhcp6.DHCP6OptDNSDomains].dnsdomains == ["example.org.", "lab.example.net."]
    assert dhcp6.DHCP6OptRapidCommit not in message
    assert dhcp6.DHCP6OptClientFQDN not in message


def test_rapid_commit(responder: Responder) -> None:
    asked = frame(dhcp6.DHCP6_Solicit, client(), dhcp6.DHCP6OptRapidCommit(), ia())
    message = read(responder.respond(asked), dhcp6.DHCP6_Reply)
    assert dhcp6.DHCP6OptRapidCommit in message
    assert leases(message) == [(ADDRESS, 3600, 7200)]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (dhcp6.DHCP6_Request, (client(), server(), ia(ADDRESS))),
        (dhcp6.DHCP6_Renew, (client(), server(), ia(ADDRESS))),
        (dhcp6.DHCP6_Rebind, (client(), ia(ADDRESS))),
    ],
)
def test_the_address_is_given(responder: Responder, kind: Any, options: tuple[Any, ...]) -> None:
    message = read(responder.respond(frame(kind, *options)), dhcp6.DHCP6_Reply)
    assert leases(message) == [(ADDRESS, 3600, 7200)]


def test_an_address_of_another_host_ends(responder: Responder) -> None:
    asked = frame(dhcp6.DHCP6_Rebind, client(), ia("2001:db8:9::9", ADDRESS))
    message = read(responder.respond(asked), dhcp6.DHCP6_Reply)
    assert leases(message) == [(ADDRESS, 3600, 7200), ("2001:db8:9::9", 0, 0)]


def test_no_more_associations_than_a_guest_can_have(responder: Responder) -> None:
    asked = frame(dhcp6.DHCP6_Solicit, client(), *(ia(iaid=at) for at in range(20)))
    message = read(responder.respond(asked), dhcp6.DHCP6_Advertise)
    given = []
    while dhcp6.DHCP6OptIA_NA in message:
        message = message[dhcp6.DHCP6OptIA_NA]
        given.append(message.iaid)
        message = message.payload
    assert given == list(range(8))


def test_several_associations(responder: Responder) -> None:
    asked = frame(dhcp6.DHCP6_Solicit, client(), ia(iaid=1), ia(iaid=2))
    message = read(responder.respond(asked), dhcp6.DHCP6_Advertise)
    first = message[dhcp6.DHCP6OptIA_NA]
    assert (first.iaid, first.payload[dhcp6.DHCP6OptIA_NA].iaid) == (1, 2)


@pytest.mark.parametrize(("address", "status"), [(ADDRESS, 0), ("2001:db8:9::9", 4)])
def test_confirm(responder: Responder, address: str, status: int) -> None:
    message = read(responder.respond(frame(dhcp6.DHCP6_Confirm, client(), ia(address))), dhcp6.DHCP6_Reply)
    assert message[dhcp6.DHCP6OptStatusCode].statuscode == status


@pytest.mark.parametrize("other", [(ADDRESS, "2001:db8:9::9"), ("2001:db8:9::9", ADDRESS)])
def test_one_address_that_is_wrong_is_enough(responder: Responder, other: tuple[str, str]) -> None:
    """Section 18.3.3: success is for a client all of whose addresses are right."""
    for associations in ((ia(*other),), (ia(other[0]), ia(other[1], iaid=8))):
        asked = frame(dhcp6.DHCP6_Confirm, client(), *associations)
        message = read(responder.respond(asked), dhcp6.DHCP6_Reply)
        assert message[dhcp6.DHCP6OptStatusCode].statuscode == 4


@pytest.mark.parametrize("kind", [dhcp6.DHCP6_Release, dhcp6.DHCP6_Decline])
def test_release_and_decline(responder: Responder, kind: Any) -> None:
    message = read(responder.respond(frame(kind, client(), server(), ia(ADDRESS))), dhcp6.DHCP6_Reply)
    assert message[dhcp6.DHCP6OptStatusCode].statuscode == 0
    assert dhcp6.DHCP6OptIA_NA not in message


@pytest.mark.parametrize("options", [(), (client(),), (client(), server())])
def test_information_request(responder: Responder, options: tuple[Any, ...]) -> None:
    message = read(responder.respond(frame(dhcp6.DHCP6_InfoRequest, *options)), dhcp6.DHCP6_Reply)
    assert message[dhcp6.DHCP6OptDNSServers].dnsservers[0] == "2001:db8:53::1"
    assert (dhcp6.DHCP6OptClientId in message) is bool(options)
    assert dhcp6.DHCP6OptIA_NA not in message


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (dhcp6.DHCP6_Solicit, (ia(),)),
        (dhcp6.DHCP6_Solicit, (client(), server(), ia())),
        (dhcp6.DHCP6_Request, (client(), ia())),
        (dhcp6.DHCP6_Request, (client(), server(OTHER_DUID), ia())),
        (dhcp6.DHCP6_Renew, (server(), ia())),
        (dhcp6.DHCP6_Renew, (client(), server(OTHER_DUID), ia())),
        (dhcp6.DHCP6_Rebind, (client(), server(), ia())),
        (dhcp6.DHCP6_Confirm, (client(), ia())),
        (dhcp6.DHCP6_InfoRequest, (client(), ia())),
        (dhcp6.DHCP6_InfoRequest, (client(), server(OTHER_DUID))),
        (dhcp6.DHCP6_Reply, (client(), server(), ia())),
        (dhcp6.DHCP6_Advertise, (client(), server(), ia())),
        (dhcp6.DHCP6_Reconf, (client(), server())),
    ],
)
def test_what_the_standard_discards(responder: Responder, kind: Any, options: tuple[Any, ...]) -> None:
    assert responder.respond(frame(kind, *options)) == []


@pytest.mark.parametrize("dest", ["fe80::1", "2001:db8:77::547", "ff02::1"])
def test_what_is_for_somebody_else_is_not_answered(responder: Responder, dest: str) -> None:
    """A server somewhere is another one, and it is not our name that its clients would get."""
    assert responder.respond(frame(dhcp6.DHCP6_Solicit, client(), ia(), dest=dest)) == []
    assert responder.respond(frame(dhcp6.DHCP6_Request, client(), server(), ia(), dest=dest)) == []


@pytest.mark.parametrize(
    ("option", "flags"),
    [
        (dhcp6.DHCP6OptClientFQDN(flags=0, fqdn="vm"), 4),
        (dhcp6.DHCP6OptClientFQDN(flags=1, fqdn="vm"), 6),
        (dhcp6.DHCP6OptOptReq(reqopts=[23, 39]), 4),
    ],
)
def test_fqdn(config: NetConfig, option: Any, flags: int) -> None:
    responder = Responder(replace(config, fqdn="vm1.example.org"))
    message = read(responder.respond(frame(dhcp6.DHCP6_Solicit, client(), ia(), option)), dhcp6.DHCP6_Advertise)
    name = message[dhcp6.DHCP6OptClientFQDN]
    assert (name.fqdn, name.flags) == (b"vm1.example.org.", flags)


def test_many_name_servers_fit_the_smallest_mtu(config: NetConfig) -> None:
    servers = [IPv6Address("2001:db8:53::") + at for at in range(100)]
    [answer] = Responder(replace(config, dns6=servers)).respond(frame(dhcp6.DHCP6_Solicit, client(), ia()))
    told = read([answer], dhcp6.DHCP6_Advertise)[dhcp6.DHCP6OptDNSServers].dnsservers
    assert told == [str(one) for one in servers[:8]]
    assert len(answer) <= 14 + 1280


def test_fqdn_only_for_who_knows_it(config: NetConfig) -> None:
    responder = Responder(replace(config, fqdn="vm1.example.org"))
    asked = frame(dhcp6.DHCP6_Solicit, client(), ia(), dhcp6.DHCP6OptOptReq(reqopts=[23, 24]))
    assert dhcp6.DHCP6OptClientFQDN not in read(responder.respond(asked), dhcp6.DHCP6_Advertise)


def test_no_address_yet(config: NetConfig) -> None:
    """On a host without IPv6: what there is besides addresses, and an end to those of before."""
    responder = Responder(replace(config, addr6=None, local6=True, dns6=[]))
    message = read(responder.respond(frame(dhcp6.DHCP6_Solicit, client(), ia())), dhcp6.DHCP6_Advertise)
    [status] = message[dhcp6.DHCP6OptIA_NA].ianaopts
    assert (type(status), status.statuscode) == (dhcp6.DHCP6OptStatusCode, 2)
    assert message[dhcp6.DHCP6OptDNSDomains].dnsdomains == ["example.org.", "lab.example.net."]
    message = read(responder.respond(frame(dhcp6.DHCP6_Renew, client(), server(), ia(ADDRESS))), dhcp6.DHCP6_Reply)
    assert leases(message) == [(ADDRESS, 0, 0)]
    message = read(responder.respond(frame(dhcp6.DHCP6_Confirm, client(), ia(ADDRESS))), dhcp6.DHCP6_Reply)
    assert message[dhcp6.DHCP6OptStatusCode].statuscode == 4


@pytest.mark.parametrize("change", [{"dhcpv6": False}, {"addr6": None}])
def test_switched_off(config: NetConfig, change: dict[str, Any]) -> None:
    assert Responder(replace(config, **change)).respond(frame(dhcp6.DHCP6_Solicit, client(), ia())) == []


@pytest.mark.parametrize("mtu", [1280, 1500, 65520, 0])
def test_no_answer_is_larger_than_a_packet(config: NetConfig, mtu: int) -> None:
    """Of many associations with many addresses each, those that fit are answered, whole; and what else there is."""
    config = replace(config, mtu=mtu, search=[f"{'name' * 10}{number}.example.org" for number in range(30)])
    many = [ia(*(f"2001:db8:9::{number:x}" for number in range(16)), iaid=iaid) for iaid in range(3)]
    [answer] = Responder(config).respond(frame(dhcp6.DHCP6_Solicit, client(), *many))
    assert len(answer) - 14 <= min(mtu or 1500, 1500)
    given = read([answer], dhcp6.DHCP6_Advertise)[dhcp6.DHCP6OptIA_NA]
    assert len(given.ianaopts) == 17


@pytest.mark.parametrize(("size", "answers"), [(2, 0), (3, 1), (130, 1), (131, 0), (1800, 0)])
def test_a_client_that_calls_itself_by_no_duid(responder: Responder, size: int, answers: int) -> None:
    raw = dhcp6.DHCP6OptUnknown(optcode=1, data=bytes(size))
    assert len(responder.respond(frame(dhcp6.DHCP6_Solicit, raw, ia()))) == answers
