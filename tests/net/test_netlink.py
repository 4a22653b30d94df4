# SPDX-License-Identifier: GPL-2.0-or-later
"""Reading the host's network from a real network namespace, made for each test and gone with its process."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from godwit.net.netlink import (
    NLMSG_DONE,
    NLMSG_ERROR,
    RTM_NEWLINK,
    RTM_NEWROUTE,
    HostNetwork,
    MalformedNetlinkError,
    parse_messages,
    read_network,
)

READ = """
import json, sys
from godwit.net.config import NetOptions, NetConfigError, read_host
try:
    config = read_host(NetOptions(interface=sys.argv[2] or None), resolv_path=sys.argv[1])
except NetConfigError as error:
    print(json.dumps({"error": str(error)}))
else:
    names = ["interface4", "interface6", "mtu", "addr4", "prefix_len4", "gateway4", "addr6", "prefix_len6", "gateway6",
             "our_link_local", "dns4", "dns6", "search", "warnings", "notes", "scope4", "scope6"]
    print(json.dumps({name: getattr(config, name) for name in names}, default=str))
"""

LINK = """
ip link set lo up
ip link add eth0 index 11 mtu 1400 type veth peer name peer0
ip link set eth0 up; ip link set peer0 up
"""


def read(tmp_path: Path, setup: str, interface: str = "", resolv: str = "") -> dict[str, Any]:
    """Run ``setup`` in a new network namespace and read it there, in a process of its own."""
    (tmp_path / "resolv.conf").write_text(resolv)
    found: dict[str, Any] = json.loads(run(setup, sys.executable, "-c", READ, str(tmp_path / "resolv.conf"), interface))
    return found


def run(setup: str, *command: str) -> str:
    """What ``command`` writes, in a new network namespace after ``setup``."""
    for tool in ("ip", "unshare"):
        if shutil.which(tool) is None:
            pytest.fail(f"{tool} is missing: apt-get install iproute2 util-linux")
    unshare = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--net"]
    done = subprocess.run(
        [*unshare, "sh", "-ec", setup + '\nexec "$@"', "sh", *command], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_usual_host(tmp_path: Path) -> None:
    setup = (
        LINK
        + """
    ip addr add 192.0.2.7/24 dev eth0
    ip addr add 192.0.2.8/24 dev eth0
    ip -6 addr add 2001:db8:1::7/64 dev eth0 nodad
    ip route add default via 192.0.2.1
    ip route add 198.51.100.0/24 via 192.0.2.254
    ip -6 route add default via fe80::1 dev eth0
    """
    )
    config = read(tmp_path, setup, resolv="nameserver 127.0.0.53\nnameserver fe80::1%eth0\nsearch example.org\n")
    assert config == {
        "interface4": "eth0",
        "interface6": "eth0",
        "mtu": 1400,
        "addr4": "192.0.2.7",
        "prefix_len4": 24,
        "gateway4": "192.0.2.1",
        "addr6": "2001:db8:1::7",
        "prefix_len6": 64,
        "gateway6": "fe80::1",
        "our_link_local": "fe80::1",
        "dns4": ["192.0.2.1"],
        "dns6": ["fe80::1"],
        "search": ["example.org"],
        "warnings": [],
        "notes": [],
        "scope4": 11,
        "scope6": 11,
    }


def test_metrics_other_tables_and_unreachable_routes(tmp_path: Path) -> None:
    setup = (
        LINK
        + """
    ip link add eth1 type veth peer name peer1
    ip link set eth1 up; ip link set peer1 up
    ip addr add 192.0.2.7/24 dev eth0
    ip addr add 10.0.0.7/24 dev eth1
    ip route add default via 192.0.2.1 metric 600
    ip route add default via 10.0.0.1 metric 100
    ip route add unreachable default metric 1
    ip route add default via 192.0.2.9 table 100
    """
    )
    config = read(tmp_path, setup)
    assert (config["interface4"], config["addr4"], config["gateway4"]) == ("eth1", "10.0.0.7", "10.0.0.1")
    config = read(tmp_path, setup, interface="eth0")
    assert (config["interface4"], config["addr4"], config["gateway4"]) == ("eth0", "192.0.2.7", "192.0.2.1")


def test_multipath_and_the_source_of_a_route(tmp_path: Path) -> None:
    setup = (
        LINK
        + """
    ip addr add 192.0.2.7/24 dev eth0
    ip addr add 192.0.2.8/24 dev eth0
    ip route add default src 192.0.2.8 nexthop via 192.0.2.3 dev eth0 nexthop via 192.0.2.4 dev eth0
    """
    )
    config = read(tmp_path, setup)
    assert (config["addr4"], config["gateway4"]) == ("192.0.2.8", "192.0.2.3")


def test_a_point_to_point_address(tmp_path: Path) -> None:
    setup = (
        LINK
        + """
    ip addr add 192.0.2.7 peer 192.0.2.1 dev eth0
    ip route add default dev eth0
    """
    )
    config = read(tmp_path, setup)
    assert (config["addr4"], config["prefix_len4"], config["gateway4"]) == ("192.0.2.7", 32, "169.254.2.2")


def test_an_ipv4_route_over_an_ipv6_hop(tmp_path: Path) -> None:
    setup = (
        LINK
        + """
    ip addr add 192.0.2.7/32 dev eth0
    ip route add default via inet6 fe80::1 dev eth0
    """
    )
    config = read(tmp_path, setup)
    assert (config["addr4"], config["prefix_len4"], config["gateway4"]) == ("192.0.2.7", 32, "169.254.2.2")


def test_no_default_route(tmp_path: Path) -> None:
    config = read(tmp_path, LINK + "ip addr add 192.0.2.7/24 dev eth0")
    assert (config["interface4"], config["addr4"], config["gateway4"]) == ("eth0", "192.0.2.7", "169.254.2.2")
    assert config["notes"] == [
        "the guest gets link-local IPv6 only, since the host has no IPv6 address that others can reach"
    ]


def test_nothing_but_loopback(tmp_path: Path) -> None:
    config = read(tmp_path, "ip link set lo up", resolv="nameserver 192.0.2.53\n")
    assert (config["addr4"], config["addr6"], config["dns4"]) == ("169.254.2.1", None, ["192.0.2.53"])
    assert (len(config["notes"]), config["warnings"]) == (2, [])


def test_an_interface_that_does_not_exist(tmp_path: Path) -> None:
    assert read(tmp_path, LINK, interface="wan7") == {
        "error": "there is no interface 'wan7' (--interface); there are: lo, peer0, eth0"
    }


def test_many_routes_cost_little(tmp_path: Path) -> None:
    """A router's table: of each of these routes one byte is looked at."""
    routes = tmp_path / "routes"
    with routes.open("w") as out:
        for number in range(15_000):
            out.write(f"route add 10.{number >> 8}.{number & 255}.0/24 via 192.0.2.1\n")
            out.write(f"route add 2001:db8:{number:x}::/48 via fe80::1 dev eth0\n")
    setup = (
        LINK
        + f"""
    ip addr add 192.0.2.7/24 dev eth0
    ip -6 addr add 2001:db8:1::7/64 dev eth0 nodad
    ip -batch {routes}
    ip route add default via 192.0.2.1 metric 5
    ip -6 route add default via fe80::1 dev eth0
    """
    )
    cost, count = json.loads(run(setup, sys.executable, "-c", COST))
    assert count == 2
    assert cost < 0.3, cost  # seconds; some 20 ms. Decoded, they would be 2 s.


COST = """
import json, time
from godwit.net.netlink import read_network
began = time.process_time(); network = read_network(); cost = time.process_time() - began
print(json.dumps([cost, len(network.routes)]))
"""


def message(kind: int, payload: bytes, flags: int = 2, sequence: int = 1) -> bytes:
    data = struct.pack("=IHHII", 16 + len(payload), kind, flags, sequence, 0) + payload
    return data + bytes(-len(data) % 4)


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def route(*attributes: bytes, family: int = socket.AF_INET, to: int = 0, table: int = 254, kind: int = 1) -> bytes:
    head = struct.pack("=8BI", family, to, 0, 0, table, 0, 0, kind, 0)
    return message(RTM_NEWROUTE, head + b"".join(attributes))


DONE = message(NLMSG_DONE, bytes(4))
OIF = attribute(4, struct.pack("=I", 11))
GATEWAY = attribute(5, bytes([192, 0, 2, 1]))


class Kernel:
    """In place of the kernel: each request is answered by what is next in ``answers``."""

    def __init__(self, answers: Sequence[bytes]) -> None:
        self.answers = list(answers)
        self.asked: list[int] = []

    def __call__(self, *_: object) -> Kernel:
        return self

    def send(self, request: bytes) -> None:
        kind, _flags, sequence = struct.unpack_from("=HHI", request, 4)
        self.asked.append(kind)
        if self.answers:  # each of its messages is of this request
            self.answers[0] = b"".join(
                struct.pack("=IHHII", 16 + len(one.payload), one.kind, one.flags, sequence + one.sequence - 1, 0)
                + one.payload
                + bytes(-len(one.payload) % 4)
                for one in parse_messages(self.answers[0])
            )

    def recv(self, _size: int) -> bytes:
        return self.answers.pop(0)

    def nothing(self, *_: object) -> None:
        pass

    settimeout = bind = connect = setsockopt = close = nothing


def reads(monkeypatch: pytest.MonkeyPatch, *answers: bytes) -> HostNetwork:
    """What is made of these answers about links, addresses, and IPv4 and IPv6 routes."""
    kernel = Kernel(answers)
    monkeypatch.setattr(socket, "socket", kernel)
    try:
        return read_network()
    finally:
        monkeypatch.undo()


def test_a_dump_that_was_disturbed_is_begun_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    link = struct.pack("=BxHiII", 0, 1, 11, 1, 0)
    old, new = link + attribute(3, b"old\0"), link + attribute(3, b"new\0")
    disturbed = message(RTM_NEWLINK, old, flags=0x12) + DONE
    network = reads(monkeypatch, disturbed, message(RTM_NEWLINK, new) + DONE, DONE, DONE, DONE)
    assert [one.name for one in network.links] == ["new"]
    network = reads(monkeypatch, disturbed, disturbed, disturbed, disturbed, DONE, DONE, DONE)
    assert [one.name for one in network.links] == ["old"]  # there is no end to it


def test_what_is_of_another_request_or_kind_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    late = message(RTM_NEWLINK, b"", sequence=7)
    strange = message(99, b"")
    network = reads(monkeypatch, late + strange + DONE, DONE, route(OIF, GATEWAY) + DONE, DONE)
    assert network.links == ()
    assert [(one.version, one.index, str(one.gateway)) for one in network.routes] == [(4, 11, "192.0.2.1")]


def test_no_table_and_no_protocol_are_no_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    refusals = [
        message(NLMSG_ERROR, struct.pack("=i", -number) + bytes(16)) for number in (errno.ENOENT, errno.EOPNOTSUPP)
    ]
    assert reads(monkeypatch, DONE, DONE, *refusals).routes == ()
    with pytest.raises(PermissionError, match="reading the host's network: Operation not permitted"):
        reads(monkeypatch, message(NLMSG_ERROR, struct.pack("=i", -errno.EPERM)))


@pytest.mark.parametrize(
    "answer",
    [
        message(RTM_NEWROUTE, bytes([2])),
        message(RTM_NEWROUTE, bytes([2, 0, 0])),
        route(struct.pack("=HH", 3, 4)),
        route(struct.pack("=HH", 9, 4) + bytes(4)),
        route(b"\4\0\1"),
        route(attribute(4, b"\1\2")),
        route(OIF, attribute(5, b"\1\2\3")),
        route(attribute(9, struct.pack("=HBBi", 7, 0, 0, 1))),
        route(attribute(9, struct.pack("=HBBi", 9, 0, 0, 1))),
        route(attribute(9, b"\1")),
        message(NLMSG_DONE, b"\0"),
    ],
)
def test_what_is_malformed_is_refused(monkeypatch: pytest.MonkeyPatch, answer: bytes) -> None:
    with pytest.raises(MalformedNetlinkError, match="netlink: "):
        reads(monkeypatch, DONE, DONE, answer + DONE, DONE)


@pytest.mark.parametrize(
    "data", [bytes(15), struct.pack("=IHHII", 15, 3, 0, 1, 0), struct.pack("=IHHII", 17, 3, 0, 1, 0)]
)
def test_messages_that_are_none(data: bytes) -> None:
    with pytest.raises(MalformedNetlinkError, match="netlink: "):
        list(parse_messages(DONE + data))
