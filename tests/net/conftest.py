# SPDX-License-Identifier: GPL-2.0-or-later
"""The network that the tests of godwit.net answer for."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest

from godwit.net.config import NetConfig
from godwit.net.responder import Responder

GUEST_MAC = "52:54:00:12:34:56"


@pytest.fixture
def config() -> NetConfig:
    return NetConfig(
        interface4="eth0",
        interface6="eth0",
        scope6=2,
        mtu=1500,
        addr4=IPv4Address("192.0.2.7"),
        prefix_len4=24,
        gateway4=IPv4Address("192.0.2.1"),
        addr6=IPv6Address("2001:db8:1::7"),
        prefix_len6=64,
        gateway6=IPv6Address("fe80::1"),
        our_link_local=IPv6Address("fe80::1"),
        dns4=[IPv4Address("192.0.2.53"), IPv4Address("198.51.100.53")],
        dns6=[IPv6Address("2001:db8:53::1"), IPv6Address("2001:db8:53::2")],
        search=["example.org", "lab.example.net"],
    )


@pytest.fixture
def responder(config: NetConfig) -> Responder:
    return Responder(config)
