# SPDX-License-Identifier: GPL-2.0-or-later
"""Hosts on the bridge: addresses, the switch, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from godwit.lab.errors import CommandError, LabError
from godwit.lab.netns import Host, Namespace, Network, missing, wait_until

RunAsNobody = Callable[[str], subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network() as net:
        yield net


def reaches(host: Host, address: str) -> bool:
    return host.run("ping", "-c1", "-W1", address, check=False).returncode == 0


def udp_answers(net: Network, name: str, ipv6: bool) -> bool:
    """Send a datagram from the host to the server and one back."""
    family = socket.AF_INET6 if ipv6 else socket.AF_INET
    with net.server.enter():
        server = socket.socket(family, socket.SOCK_DGRAM)
    with net.hosts[name].enter():
        client = socket.socket(family, socket.SOCK_DGRAM)
    with server, client:
        server.bind((net.server.address(ipv6), 0))
        server.settimeout(0.5)
        client.settimeout(0.5)
        client.sendto(b"hello", (net.server.address(ipv6), server.getsockname()[1]))
        try:
            data, peer = server.recvfrom(100)
            assert peer[0] == net.hosts[name].address(ipv6)
            server.sendto(data + b"!", peer)
            return client.recv(100) == b"hello!"
        except TimeoutError:
            return False


def test_a_link_that_is_up_late_does_not_connect_its_host() -> None:
    """The kernel has the bridge use a port when it notices that its link is up, after whatever was asked before."""
    with Network() as net:
        net.b.ip("link set eth0 down")
        late = threading.Timer(0.3, net.b.ip, ["link set eth0 up"])
        late.start()
        net.switch("a")
        late.join()
        wait_until(lambda: "state UP" in net.bridge.run("ip", "link", "show", "p-b").stdout, "the link to be up")
        assert udp_answers(net, "a", False)
        assert not udp_answers(net, "b", False)
        net.switch("b")
        wait_until(lambda: udp_answers(net, "b", False), "b, which has just asked for the server in vain, to ask again")


@pytest.mark.parametrize("ipv6", [False, True])
def test_switch_moves_the_address(network: Network, ipv6: bool) -> None:
    network.switch("a")
    assert udp_answers(network, "a", ipv6)
    assert not udp_answers(network, "b", ipv6)
    network.switch("b")
    assert udp_answers(network, "b", ipv6)
    assert not udp_answers(network, "a", ipv6)
    network.switch(None)
    assert not udp_answers(network, "a", ipv6)
    assert not udp_answers(network, "b", ipv6)


def test_switch_takes_no_time(network: Network) -> None:
    network.switch("a")
    assert udp_answers(network, "a", False)  # the server's neighbour entry is there
    started = time.monotonic()
    network.switch("b")
    assert time.monotonic() - started < 0.5
    assert udp_answers(network, "b", False)


def test_commands_are_found_in_sbin(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Debian has bridge(8), and the PATH of an ordinary user does not lead."""
    monkeypatch.setenv("PATH", "/usr/local/bin:/usr/bin:/bin")
    assert missing() is None
    assert os.environ["PATH"] == "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
    network.switch("b")
    network.switch("a")
    monkeypatch.setenv("PATH", "/sbin:/bin:/usr/sbin")
    assert missing() is None
    assert os.environ["PATH"] == "/sbin:/bin:/usr/sbin"


def test_both_hosts_are_one_address(network: Network) -> None:
    for command in ("ip -br addr show eth0", "ip route", "ip -6 route", "ip -br link"):
        a = network.a.run(*command.split()).stdout
        b = network.b.run(*command.split()).stdout
        # The peer's index behind the name differs, nothing else does.
        assert [line.split()[1:] for line in a.splitlines()] == [line.split()[1:] for line in b.splitlines()]
    assert network.a.addr4 in network.a.run("ip", "-br", "addr").stdout


def test_unknown_host(network: Network) -> None:
    with pytest.raises(LabError, match="no such host"):
        network.switch("c")


def test_failed_command_says_where(network: Network) -> None:
    with pytest.raises(CommandError, match=r"server: ip link show nothing: exit status 1"):
        network.server.run("ip", "link", "show", "nothing")


def test_ping_sockets_are_allowed(network: Network) -> None:
    with network.a.enter():
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP).close()
        with open("/proc/sys/net/ipv4/ping_group_range") as file:
            low, high = map(int, file.read().split())
    assert low == 0
    assert high >= 0


def test_enter_comes_back() -> None:
    before = os.stat("/proc/thread-self/ns/net").st_ino
    with Namespace("x") as space:
        assert os.stat("/proc/thread-self/ns/net").st_ino == before
        with contextlib.suppress(ZeroDivisionError), space.enter():
            assert os.stat("/proc/thread-self/ns/net").st_ino == space.inode
            raise ZeroDivisionError
        assert os.stat("/proc/thread-self/ns/net").st_ino == before


def test_close_ends_grandchildren() -> None:
    with Namespace("x") as space:
        process = space.popen(["sh", "-c", "sleep 1000 & echo $!; wait"], stdout=subprocess.PIPE)
        assert process.stdout is not None
        grandchild = int(process.stdout.readline())
        assert os.stat(f"/proc/{grandchild}/ns/net").st_ino == space.inode
        process.stdout.close()
    assert process.returncode is not None
    assert gone(grandchild)
    with pytest.raises(LabError, match="closed"):
        space.run("true")


def gone(pid: int) -> bool:
    """True when the process has ended, be it a zombie still (nobody may reap here)."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.01)
    return False


PROGRAM = """
import os, subprocess, sys, time
from godwit.lab.netns import Network
net = Network()
child = net.a.popen(["sleep", "1000"])
print(child.pid, flush=True)
{end}
"""


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("raise SystemExit(3)", 3),
        ("1 / 0", 1),
        ("os._exit(4)", 4),
        ("os.kill(os.getpid(), 9)", -signal.SIGKILL),
    ],
)
def test_nothing_left_after_a_crash(end: str, status: int) -> None:
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(end=end)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        timeout=30,
        check=False,
    )
    assert process.returncode == status
    assert gone(int(process.stdout))


def test_in_an_unprivileged_user_namespace(run_as_nobody: RunAsNobody) -> None:
    """The re-exec: a process without rights becomes root of its own namespaces."""
    program = """
import os
from godwit.lab.netns import Network, enter_user_namespace, missing
assert os.environ.get("GODWIT_LAB_USERNS") or (os.getuid() == 65534 and missing())
enter_user_namespace()
assert missing() is None
with Network() as net:
    net.switch("b")
    print(net.b.run("ip", "-br", "addr", "show", "eth0").stdout)
"""
    done = run_as_nobody(program)
    assert done.returncode == 0, done.stderr
    assert "192.0.2.10/24" in done.stdout


def test_wait_until_names_what_it_waited_for() -> None:
    with pytest.raises(LabError, match=re.escape("waited 0.05 s for the moon")):
        wait_until(lambda: False, "the moon", timeout=0.05)
    wait_until(lambda: True, "nothing")
