# SPDX-License-Identifier: GPL-2.0-or-later
"""Reading the host's network from a real network namespace, made for each test and gone with its process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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
    for tool in ("ip", "unshare"):
        if shutil.which(tool) is None:
            pytest.fail(f"{tool} is missing: apt-get install iproute2 util-linux")
    (tmp_path / "resolv.conf").write_text(resolv)
    arguments = [sys.executable, "-c", READ, str(tmp_path / "resolv.conf"), interface]
    unshare = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--net"]
    done = subprocess.run(
        [*unshare, "sh", "-ec", setup + '\nexec "$@"', "sh", *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


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


def test_pyroute2_is_loaded_only_to_read() -> None:
    code = """
import sys
import godwit.net.config, godwit.net.responder, godwit.net.forward
print("pyroute2" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "False\n"
