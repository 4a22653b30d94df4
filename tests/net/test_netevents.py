# SPDX-License-Identifier: GPL-2.0-or-later
"""Netlink events, from a network namespace of their own, as an ordinary user."""

from __future__ import annotations

import os
import struct
import subprocess
import sys

import pytest

from godwit.net.netevents import any_matters
from godwit.net.netlink import RTM_DELROUTE, RTM_NEWADDR, RTM_NEWLINK, RTM_NEWROUTE

# Opens the socket as a user with no rights at all, while commands come from root: its own user id
# is changed in a child, whose sockets are in the same namespace.
HEAR = """
import os, subprocess, select, sys, time
from godwit.net.netevents import NetEvents
os.setgroups([]) if os.geteuid() == 0 and sys.argv[1] == "root" else None
commands = sys.stdin.read().splitlines()
for what in ("accept_dad", "router_solicitations"):  # nothing of its own accord, later
    with open(f"/proc/sys/net/ipv6/conf/default/{what}", "w") as file:
        file.write("0")
ours, theirs = os.pipe(), os.pipe()
if os.fork() == 0:
    if sys.argv[1] == "root":
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
    with NetEvents() as events:
        os.write(theirs[1], b"r")
        for command in commands:
            os.read(ours[0], 1)
            if command == "settle":  # a link that has come up is told of once more, within a second, by a timer
                time.sleep(1.5)
                events.drain()
                os.write(theirs[1], b".")
                continue
            readable = bool(select.select([events], [], [], 0.2)[0])
            time.sleep(0.1 if readable else 0)  # the kernel tells of an IPv6 address in two steps
            os.write(theirs[1], b"y" if events.drain() else b"n" if readable else b"-")
    os._exit(0)
os.read(theirs[0], 1)
for command in commands:
    if command != "settle":
        subprocess.run(["ip", *command.split()], check=True)
    os.write(ours[1], b"g")
    sys.stdout.write(os.read(theirs[0], 1).decode())
os.wait()
"""


def hear(*commands: str) -> str:
    """What each ip(8) command is taken for: y, n (heard and passed over), or - (nothing heard)."""
    root = os.geteuid() == 0
    unshare = ["unshare", "--net"] if root else ["unshare", "--user", "--map-root-user", "--net"]
    done = subprocess.run(
        [*unshare, sys.executable, "-c", HEAR, "root" if root else "user"],
        input="\n".join(commands),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_heard() -> None:
    heard = hear(
        "link add dummy0 type veth peer name dummy1",
        "link set dummy0 up",
        "link set dummy1 up",
        "settle",
        "addr add 192.0.2.7/24 dev dummy0",
        "route add 198.51.100.0/24 via 192.0.2.1",
        "route add default via 192.0.2.1",
        "neigh add 192.0.2.9 lladdr 02:00:00:00:00:01 dev dummy0",
        "route del 198.51.100.0/24 via 192.0.2.1",
        "-6 addr add 2001:db8::7/64 dev dummy0 nodad",
        "-6 route add default via fe80::1 dev dummy0",
        "-6 route del default via fe80::1 dev dummy0",
        "link set dummy0 mtu 1400",
        "addr del 192.0.2.7/24 dev dummy0",
    )
    assert heard == "yyy.yny-nyyyyy"


def test_more_than_can_be_heard() -> None:
    """Of what did not fit the socket's buffer nobody knows whether it matters: it may."""
    code = """
import socket, subprocess
from godwit.net.netevents import NetEvents
with NetEvents() as events:
    events._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    commands = [f"route add 198.51.{at}.0/24 dev lo" for at in range(100)]  # of which none matters
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    events.drain()
    assert not events.drain()
    subprocess.run(["ip", "-batch", "-"], input="\\n".join(commands), text=True, check=True)
    print(events.drain(), events.drain())
"""
    root = os.geteuid() == 0
    unshare = ["unshare", "--net"] if root else ["unshare", "--user", "--map-root-user", "--net"]
    done = subprocess.run(
        [*unshare, sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    assert done.stdout == "True False\n"


def message(kind: int, body: bytes) -> bytes:
    whole = struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body
    return whole + bytes(-len(whole) % 4)


@pytest.mark.parametrize(
    ("data", "matters"),
    [
        (b"", False),
        (b"short", True),
        (message(RTM_NEWLINK, b""), True),
        (message(RTM_NEWADDR, bytes(8)), True),
        (message(RTM_NEWROUTE, bytes([2, 0]) + bytes(10)), True),
        (message(RTM_NEWROUTE, bytes([2, 24]) + bytes(10)), False),
        (message(RTM_NEWROUTE, bytes([2, 24, 0]) + bytes(10)) + message(RTM_DELROUTE, bytes([10, 0])), True),
        (message(RTM_NEWROUTE, b""), True),
        (message(28, bytes(12)), False),
        (struct.pack("=IHHII", 0, 24, 0, 0, 0), True),  # a length that would never end
        (struct.pack("=IHHII", 1 << 31, 28, 0, 0, 0), True),
    ],
)
def test_messages(data: bytes, matters: bool) -> None:
    assert any_matters(data) is matters
