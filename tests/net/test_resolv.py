# SPDX-License-Identifier: GPL-2.0-or-later
"""Variants of resolv.conf."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

import pytest

from godwit.net.resolv import is_domain, parse_resolv, read_resolv


@pytest.mark.parametrize(
    ("text", "servers", "search"),
    [
        ("", [], []),
        ("nameserver 192.0.2.53\n", ["192.0.2.53"], []),
        ("nameserver 192.0.2.53", ["192.0.2.53"], []),
        ("nameserver\t 192.0.2.53  \nnameserver 2001:db8::53\n", ["192.0.2.53", "2001:db8::53"], []),
        ("nameserver fe80::1%eth0\n", ["fe80::1%eth0"], []),
        ("nameserver 192.0.2.53 # the first\n;nameserver 192.0.2.54\n# x\n", ["192.0.2.53"], []),
        ("nameserver 192.0.2.53\nnameserver 192.0.2.53\n", ["192.0.2.53"], []),
        ("nameserver bogus\nnameserver\nnameserver 300.1.1.1\nnameserver ::1\n", ["::1"], []),
        ("nameserver 0.0.0.0\nnameserver ::\n", ["127.0.0.1", "::1"], []),  # this host
        ("nameserver ::ffff:192.0.2.53\nnameserver 192.0.2.53\n", ["192.0.2.53"], []),
        ("nameserver 224.0.0.1\nnameserver ff02::fb\nnameserver 255.255.255.255\n", [], []),
        ("search example.org lab.example.net.\n", [], ["example.org", "lab.example.net"]),
        ("search a.example a.example\n", [], ["a.example"]),
        ("search one.example\nsearch two.example\n", [], ["two.example"]),
        ("domain one.example\nsearch two.example\n", [], ["two.example"]),
        ("search two.example\ndomain one.example other\n", [], ["one.example"]),
        ("search . \n", [], []),
        (f"search {'x' * 64}.example good.example a..b\n", [], ["good.example"]),
        ("search b\u00fccher.example\n", [], []),
        ("options edns0 trust-ad\nsortlist 10.0.0.0\nnonsense\n", [], []),
        ("nameserver 192.0.2.53\r\nsearch example.org\r\n", ["192.0.2.53"], ["example.org"]),
    ],
)
def test_parse(text: str, servers: list[str], search: list[str]) -> None:
    found = parse_resolv(text)
    assert list(found.servers) == [ip_address(server) for server in servers]
    assert list(found.search) == search


def test_no_file_is_an_empty_one(tmp_path: Path) -> None:
    assert read_resolv(str(tmp_path / "none")) == parse_resolv("")
    assert read_resolv(str(tmp_path)) == parse_resolv("")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_bytes(b"search \xff\xfe\nnameserver 192.0.2.1\n\x00")
    assert [str(server) for server in read_resolv(str(path)).servers] == ["192.0.2.1"]


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("a", True),
        ("x" * 63 + ".example", True),
        ("x" * 64, False),
        (".".join(["x" * 49] * 5), True),
        (".".join(["x" * 50] * 5), False),
        ("", False),
        (".a", False),
        ("a b\n", False),
    ],
)
def test_is_domain(name: str, good: bool) -> None:
    assert is_domain(name) is good
