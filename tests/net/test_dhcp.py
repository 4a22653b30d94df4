# SPDX-License-Identifier: GPL-2.0-or-later
"""DHCP against scapy: requests made by it, replies read by it."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address
from typing import Any

import pytest
from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether

from godwit.net.config import NetConfig, Withdrawn
from godwit.net.responder import Responder

GUEST = "52:54:00:12:34:56"
OURS = "9a:55:9a:55:9a:55"
CHADDR = bytes.fromhex("525400123456")
ANYWHERE = "255.255.255.255"


def request(options: list[Any], *, source: str = "0.0.0.0", dest: str = ANYWHERE, **fields: Any) -> bytes:
    bootp = BOOTP(**{"chaddr": CHADDR, "xid": 0x1234ABCD, **fields})
    packet = Ether(src=GUEST, dst="ff:ff:ff:ff:ff:ff") / IP(src=source, dst=dest) / UDP(sport=68, dport=67) / bootp
    return bytes(packet / DHCP(options=[*options, "end"])) if options else bytes(packet)


def read(frames: list[bytes]) -> tuple[Any, dict[Any, Any]]:
    """The one reply, whole, and its options; checksums and fixed fields are looked at here."""
    [frame] = frames
    reply = Ether(frame)
    assert reply.src == OURS
    again = Ether(frame)
    del again[IP].chksum
    del again[UDP].chksum
    again = Ether(bytes(again))
    assert (again[IP].chksum, again[UDP].chksum) == (reply[IP].chksum, reply[UDP].chksum)
    assert (reply[UDP].sport, reply[UDP].dport) == (67, 68)
    assert reply[IP].src == "192.0.2.1"
    bootp = reply[BOOTP]
    assert (bootp.op, bootp.htype, bootp.hlen, bootp.xid) == (2, 1, 6, 0x1234ABCD)
    assert bootp.chaddr[:6] == CHADDR
    assert (bootp.siaddr, bootp.sname.strip(b"\0"), bootp.file.strip(b"\0")) == ("0.0.0.0", b"", b"")  # no boot server
    assert len(bytes(reply[UDP].payload)) >= 300
    options: dict[Any, Any] = {}
    for option in reply[DHCP].options:
        if isinstance(option, tuple):
            name, *values = option
            assert name not in options, f"option {name} twice"
            options[name] = values[0] if len(values) == 1 else values
    return reply, options


def kind(options: dict[Any, Any]) -> int:
    return int(options["message-type"])


def test_discover_gives_an_offer_with_everything(responder: Responder) -> None:
    reply, options = read(responder.respond(request([("message-type", "discover")])))
    assert (reply.dst, reply[IP].dst) == (GUEST, "192.0.2.7")
    assert (reply[BOOTP].yiaddr, reply[BOOTP].ciaddr, reply[BOOTP].giaddr) == ("192.0.2.7", "0.0.0.0", "0.0.0.0")
    assert kind(options) == 2
    assert options["server_id"] == "192.0.2.1"
    assert (options["renewal_time"], options["rebinding_time"], options["lease_time"]) == (300, 3150, 3600)
    assert options["subnet_mask"] == "255.255.255.0"
    assert options["router"] == "192.0.2.1"
    assert options["interface-mtu"] == 1500
    assert options["name_server"] == ["192.0.2.53", "198.51.100.53"]
    assert options["domain"] == b"example.org"
    assert options[119] == b"\x07example\x03org\0\x03lab\x07example\x03net\0"
    assert not {"hostname", "client_FQDN", 81, 80, "rapid_commit", 121, "classless_static_routes"} & set(options)


def test_request_is_acknowledged(responder: Responder) -> None:
    asked = [("message-type", "request"), ("server_id", "192.0.2.1"), ("requested_addr", "192.0.2.7")]
    reply, options = read(responder.respond(request(asked)))
    assert kind(options) == 5
    assert reply[BOOTP].yiaddr == "192.0.2.7"
    assert options["lease_time"] == 3600


def test_a_server_identifier_of_another_host_does_not_matter(responder: Responder) -> None:
    asked = [("message-type", "request"), ("server_id", "10.9.9.9"), ("requested_addr", "192.0.2.7")]
    assert kind(read(responder.respond(request(asked)))[1]) == 5


def test_renewal_goes_to_the_guest_at_its_address(responder: Responder) -> None:
    frame = request([("message-type", "request")], source="192.0.2.7", dest="192.0.2.1", ciaddr="192.0.2.7")
    reply, options = read(responder.respond(frame))
    assert kind(options) == 5
    assert (reply.dst, reply[IP].dst) == (GUEST, "192.0.2.7")
    assert reply[BOOTP].ciaddr == "192.0.2.7"


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ([("requested_addr", "192.0.2.8")], {}),
        ([("requested_addr", "10.0.0.1")], {"flags": 0x8000}),
        ([], {"ciaddr": "10.0.0.1"}),
    ],
)
def test_another_address_is_refused(responder: Responder, options: list[Any], fields: dict[str, Any]) -> None:
    reply, got = read(responder.respond(request([("message-type", "request"), *options], **fields)))
    assert kind(got) == 6
    assert (reply.dst, reply[IP].dst) == ("ff:ff:ff:ff:ff:ff", ANYWHERE)
    assert (reply[BOOTP].yiaddr, reply[BOOTP].ciaddr) == ("0.0.0.0", "0.0.0.0")
    assert set(got) == {"message-type", "server_id"}


def test_a_refusal_comes_from_the_server_that_the_client_knows(config: NetConfig) -> None:
    """A client may take it from no other (busybox's does not)."""
    known = ((IPv4Address("10.0.0.7"), IPv4Address("10.0.0.1")),)
    responder = Responder(replace(config, withdrawn=Withdrawn(servers4=known)))
    renewal = {"source": "10.0.0.7", "ciaddr": "10.0.0.7"}
    for dest, server in (("10.0.0.1", "10.0.0.1"), ("10.9.9.9", "10.9.9.9"), (ANYWHERE, "10.0.0.1")):
        _, got = read(responder.respond(request([("message-type", "request")], dest=dest, **renewal)))
        assert (kind(got), got["server_id"]) == (6, server)
    _, got = read(responder.respond(request([("message-type", "request"), ("requested_addr", "10.0.0.8")])))
    assert (kind(got), got["server_id"]) == (6, "192.0.2.1")


def test_a_link_local_address_is_given_for_a_short_time(config: NetConfig) -> None:
    responder = Responder(replace(config, local4=True))
    _, options = read(responder.respond(request([("message-type", "discover")])))
    assert (options["renewal_time"], options["rebinding_time"], options["lease_time"]) == (30, 52, 60)


@pytest.mark.parametrize(
    ("message", "answer"),
    [
        ([("message-type", "discover")], 2),
        ([("message-type", "discover"), (80, b"")], 5),
        ([("message-type", "request"), ("requested_addr", "192.0.2.7")], 5),
        ([("message-type", "request"), ("requested_addr", "192.0.2.8")], 6),
        ([("message-type", "inform")], 5),
    ],
)
def test_a_client_is_told_what_it_calls_itself(responder: Responder, message: list[Any], answer: int) -> None:
    """RFC 6842, section 3: so that one knows the answers that are its own."""
    name = b"\xff" + bytes(range(18))
    _, options = read(responder.respond(request([*message, ("client_id", name)])))
    assert kind(options) == answer
    assert options["client_id"] == name
    _, options = read(responder.respond(request(message)))
    assert "client_id" not in options


def test_a_request_about_nothing_gets_no_answer(responder: Responder) -> None:
    assert responder.respond(request([("message-type", "request")])) == []


def test_the_broadcast_flag(responder: Responder) -> None:
    reply, _ = read(responder.respond(request([("message-type", "discover")], flags=0x8000)))
    assert (reply.dst, reply[IP].dst) == ("ff:ff:ff:ff:ff:ff", ANYWHERE)
    assert reply[BOOTP].flags == 0x8000
    assert reply[BOOTP].yiaddr == "192.0.2.7"


def test_rapid_commit(responder: Responder) -> None:
    _, options = read(responder.respond(request([("message-type", "discover"), (80, b"")])))
    assert kind(options) == 5
    assert options.get("rapid_commit", options.get(80)) in (b"", [], None)
    assert {"rapid_commit", 80} & set(options)


def test_inform(responder: Responder) -> None:
    frame = request([("message-type", "inform")], ciaddr="192.0.2.7")
    reply, options = read(responder.respond(frame))
    assert kind(options) == 5
    assert (reply[BOOTP].yiaddr, reply[BOOTP].ciaddr) == ("0.0.0.0", "192.0.2.7")
    assert "lease_time" not in options
    assert options["name_server"] == ["192.0.2.53", "198.51.100.53"]


@pytest.mark.parametrize("what", ["release", "decline", "offer", "ack", "nak", 0, 9, 255])
def test_nothing_to_answer(responder: Responder, what: str | int) -> None:
    assert responder.respond(request([("message-type", what)])) == []


def test_inform_without_an_address_is_answered_to_all(responder: Responder) -> None:
    """There is no other place: yiaddr is none in such an answer."""
    reply, _ = read(responder.respond(request([("message-type", "inform")])))
    assert (reply.dst, reply[IP].dst) == ("ff:ff:ff:ff:ff:ff", ANYWHERE)
    assert (reply[BOOTP].yiaddr, reply[BOOTP].ciaddr) == ("0.0.0.0", "0.0.0.0")


def test_plain_bootp(responder: Responder) -> None:
    reply, options = read(responder.respond(request([])))
    assert reply[BOOTP].yiaddr == "192.0.2.7"
    assert "message-type" not in options
    assert "lease_time" not in options
    assert options["router"] == "192.0.2.1"


def test_hostname(config: NetConfig) -> None:
    responder = Responder(replace(config, hostname="vm1"))
    assert read(responder.respond(request([("message-type", "discover")])))[1]["hostname"] == b"vm1"


@pytest.mark.parametrize(
    ("client", "expected"),
    [
        (b"\x00\0\0vm", b"\x08\xff\xff" + b"vm1.example.org"),
        (b"\x01\0\0vm", b"\x0a\xff\xff" + b"vm1.example.org"),
        (b"\x05\0\0\x02vm", b"\x0e\xff\xff" + b"\x03vm1\x07example\x03org\0"),
        (b"", b"\x0c\xff\xff" + b"\x03vm1\x07example\x03org\0"),
    ],
)
def test_fqdn_in_the_clients_encoding(config: NetConfig, client: bytes, expected: bytes) -> None:
    responder = Responder(replace(config, fqdn="vm1.example.org"))
    _, options = read(responder.respond(request([("message-type", "discover"), (81, client)])))
    got = options.get("client_FQDN", options.get(81))
    assert got == expected


@pytest.mark.parametrize(("parameters", "sent"), [([1, 3, 81], True), ([1, 3], False)])
def test_fqdn_only_for_who_knows_it(config: NetConfig, parameters: list[int], sent: bool) -> None:
    responder = Responder(replace(config, fqdn="vm1.example.org"))
    frame = request([("message-type", "discover"), ("param_req_list", parameters)])
    assert bool({"client_FQDN", 81} & set(read(responder.respond(frame))[1])) is sent


def test_a_router_outside_the_subnet(config: NetConfig) -> None:
    responder = Responder(replace(config, prefix_len4=32))
    _, options = read(responder.respond(request([("message-type", "discover")])))
    assert options["subnet_mask"] == "255.255.255.255"
    routes = options.get("classless_static_routes", options.get(121))
    assert routes in (
        ["192.0.2.1/32:0.0.0.0", "0.0.0.0/0:192.0.2.1"],
        [b"\x20\xc0\x00\x02\x01\0\0\0\0\0\xc0\x00\x02\x01"],
        b"\x20\xc0\x00\x02\x01\0\0\0\0\0\xc0\x00\x02\x01",
    )


def test_no_mtu_no_dns_no_search(config: NetConfig) -> None:
    responder = Responder(replace(config, mtu=0, dns4=[], search=[]))
    _, options = read(responder.respond(request([("message-type", "discover")])))
    assert not {"interface-mtu", "name_server", "domain", 119} & set(options)


def test_options_given_in_parts_and_overloaded_are_joined(responder: Responder) -> None:
    # Option 50 in two halves (RFC 3396), the message type in the file field (option 52).
    frame = request([(52, b"\x01"), (50, b"\xc0\x00"), (50, b"\x02\x07")], file=b"\x35\x01\x03\xff" + bytes(124))
    assert kind(read(responder.respond(frame))[1]) == 5


@pytest.mark.parametrize("declared", [None, 0, 576, 900, 1500, 65535])
def test_the_answer_fits_what_the_client_takes(config: NetConfig, declared: int | None) -> None:
    names = [f"a-rather-long-domain-{number}.example.org" for number in range(60)]
    responder = Responder(replace(config, search=names, dns4=[IPv4Address(0x0A000000 + n) for n in range(1, 60)]))
    size = [("max_dhcp_size", declared)] if declared is not None else []
    [frame] = responder.respond(request([("message-type", "discover"), *size]))
    limit = min(max(declared or 576, 576), 1500)
    assert len(frame) - 14 <= limit
    options = [option for option in Ether(frame)[DHCP].options if isinstance(option, tuple)]
    assert {"message-type", "router", "subnet_mask", "name_server"} <= {option[0] for option in options}
    search = b"".join(option[1] for option in options if option[0] == 119)
    # As many whole names as fit: one more would be some 40 bytes.
    assert len(frame) - 14 > limit - 45 or search == b""
    assert search.endswith(b"\x03org\0") or limit == 576
    assert bytes(frame).rstrip(b"\0").endswith(b"\xff")


def test_many_name_servers_leave_room_for_the_rest(config: NetConfig) -> None:
    servers = [IPv4Address("192.0.2.100") + at for at in range(70)]
    responder = Responder(replace(config, dns4=servers, hostname="vm1"))
    _, options = read(responder.respond(request([("message-type", "discover")])))
    assert options["name_server"] == [str(one) for one in servers[:8]]
    assert (options["hostname"], options["domain"]) == (b"vm1", b"example.org")


@pytest.mark.parametrize("size", range(900, 940))
def test_a_search_list_in_parts_fits_to_the_byte(config: NetConfig, size: int) -> None:
    """Each 255 bytes have a head of two."""
    responder = Responder(replace(config, search=[f"{at:03}" for at in range(200)]))
    [frame] = responder.respond(request([("message-type", "discover"), ("max_dhcp_size", size)]))
    assert size - 7 < Ether(frame)[IP].len <= size


def test_a_long_search_list_comes_in_parts(config: NetConfig) -> None:
    names = [f"domain-{number}.example.org" for number in range(30)]
    responder = Responder(replace(config, search=names))
    [frame] = responder.respond(request([("message-type", "discover"), ("max_dhcp_size", 1500)]))
    parts = [option[1] for option in Ether(frame)[DHCP].options if option[0] == 119]
    assert [len(part) for part in parts][:-1] == [255] * (len(parts) - 1)
    assert len(parts) == 3
    wire = b"".join(bytes([len(label)]) + label.encode() for name in names for label in [*name.split("."), ""])
    assert b"".join(parts) == wire


@pytest.mark.parametrize(
    "fields",
    [{"op": 2}, {"htype": 6}, {"hlen": 16}, {"giaddr": "192.0.2.200"}, {"chaddr": b"\xff" * 6}],
)
def test_not_for_us(responder: Responder, fields: dict[str, Any]) -> None:
    assert responder.respond(request([("message-type", "discover")], **fields)) == []


def test_another_cookie(responder: Responder) -> None:
    frame = request([("message-type", "discover")])
    assert responder.respond(frame.replace(b"\x63\x82\x53\x63", b"\x63\x82\x53\x64")) == []


@pytest.mark.parametrize("change", [{"dhcp": False}, {"addr4": None, "gateway4": None}])
def test_switched_off(config: NetConfig, change: dict[str, Any]) -> None:
    assert Responder(replace(config, **change)).respond(request([("message-type", "discover")])) == []


def test_partial_checksums_are_no_reason_to_drop(responder: Responder) -> None:
    packet = Ether(request([("message-type", "discover")]))
    packet[UDP].chksum = 0x1234
    assert kind(read(responder.respond(bytes(packet)))[1]) == 2


def test_fragments_are_dropped(responder: Responder) -> None:
    packet = Ether(request([("message-type", "discover")]))
    packet[IP].flags = "MF"
    del packet[IP].chksum
    assert responder.respond(bytes(packet)) == []


def test_ip_options_and_padding_are_passed_over(responder: Responder) -> None:
    packet = Ether(request([("message-type", "discover")]))
    packet[IP].options = b"\x94\x04\0\0"  # router alert
    packet[IP].ihl = 6
    del packet[IP].chksum
    del packet[IP].len
    assert kind(read(responder.respond(bytes(packet) + bytes(30)))[1]) == 2
