# SPDX-License-Identifier: GPL-2.0-or-later
"""What it means that a guest is online: it has its host's configuration, and traffic passes both ways."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
import threading
from collections.abc import Callable

from godwit.lab.agent import Agent
from godwit.lab.netns import HOST4, HOST6, SERVER4, SERVER6, Host
from godwit.lab.qemu import MAC
from godwit.lab.transfer import Peer

SEARCH = "lab.example"
RESOLVER = "192.0.2.2"
ANSWER = "198.51.100.7"  # the address of every name there
RESOLV = f"search {SEARCH}\nnameserver {RESOLVER}\n"  # the host's resolv.conf
MTU = 1400  # is what the guest is to be told
LISTENS = 7000  # the guest's agent, for connections from outside

_LENGTH = 2_000_000  # bytes


def _seen(run: Callable[..., str]) -> dict[str, object]:
    """What a machine's eth0 has, in the words that iproute2 and busybox agree on."""
    return {
        "addresses": set(re.findall(r"inet (\S+)", run("ip", "-4", "addr", "show", "dev", "eth0"))),
        "networks": {
            str(ipaddress.ip_interface(address).network)
            for address in re.findall(r"inet6 (\S+) scope global", run("ip", "-6", "addr", "show", "dev", "eth0"))
        },
        "default": re.findall(r"default via (\S+) dev eth0", run("ip", "-4", "route")),
        "default of IPv6": re.findall(r"default via (\S+) dev eth0", run("ip", "-6", "route")),
        "on the link": set(re.findall(r"^(\S+/\d+) dev eth0", run("ip", "-4", "route"), re.MULTILINE)),
    }


def has_its_configuration(agent: Agent, host: Host) -> None:
    """See that a guest has exactly what its host has: by udhcpc, and by the kernel's own SLAAC."""
    seen = _seen(agent.run)
    assert seen == _seen(lambda *args: host.run(*args).stdout)
    assert f"mtu {MTU} " in agent.run("ip link show dev eth0")
    assert seen["addresses"] == {f"{HOST4}/24"}  # and not that both have nothing
    assert seen["default of IPv6"] == ["fe80::1"]
    # SLAAC takes the prefix from the host, and the rest from the guest's own MAC address.
    prefix = ipaddress.ip_network(f"{HOST6}/64", strict=False).network_address
    mac = bytes.fromhex(MAC.replace(":", ""))
    own = prefix + int.from_bytes(bytes([mac[0] ^ 2]) + mac[1:3] + b"\xff\xfe" + mac[3:])
    assert f"inet6 {own}/64" in agent.run("ip -6 addr show dev eth0 scope global")
    assert agent.run("cat /etc/resolv.conf").split() == ["search", SEARCH, "nameserver", RESOLVER]


def reaches_others(agent: Agent, peer: Peer) -> None:
    """See that a guest's connections reach a server, and come from its host's address there."""
    for server, own in ((SERVER4, HOST4), (SERVER6, HOST6)):
        for start in (agent.get, agent.put):
            job = start(server, peer.port, 1, _LENGTH)
            assert (result := agent.wait(job)).ok, result
            there = peer.wait(job)
            assert (there.state, there.bytes) == ("ok", _LENGTH)
            assert ipaddress.ip_address(there.peer.removeprefix("::ffff:")) == ipaddress.ip_address(own)


def is_reached(peer: Peer, port: int, *, families: tuple[str, ...] = (HOST4, HOST6)) -> None:
    """See that connections from outside to a port of the host reach the guest's agent, which listens."""
    for address in families:
        for start in (peer.get, peer.put):
            result = peer.wait(start(address, port, 2, _LENGTH))
            assert (result.state, result.bytes) == ("ok", _LENGTH), f"{address} port {port}: {result}"


def pings(agent: Agent) -> None:
    """See that a guest's pings are answered."""
    for server in (SERVER4, SERVER6):
        assert " 0% packet loss" in agent.run("ping", "-c2", "-i0.2", "-W5", server)


def _answer(query: bytes) -> bytes:
    """Return a name server's answer that knows one address for every name: RFC 1035, 4.1."""
    question = query[12 : query.index(b"\0", 12) + 5]
    is_for_ipv4 = question[-4:-2] == b"\0\x01"  # type A
    record = b"\xc0\x0c\0\x01\0\x01\0\0\0\x3c\0\x04" + ipaddress.ip_address(ANSWER).packed
    counts = b"\0\x01" + bytes([0, is_for_ipv4]) + bytes(4)
    return query[:2] + b"\x85\x80" + counts + question + (record if is_for_ipv4 else b"")


def resolves(agent: Agent, host: Host) -> None:
    """See that a guest's questions reach the name server that it was told of, and another over IPv6."""
    with host.enter():
        server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    ended = threading.Event()

    def serve() -> None:
        server.settimeout(0.1)
        while not ended.is_set():
            with contextlib.suppress(TimeoutError):
                query, guest = server.recvfrom(512)
                server.sendto(_answer(query), guest)

    thread = threading.Thread(target=serve, name="name server")
    with server:
        server.bind(("::", 53))
        thread.start()
        try:
            assert ANSWER in agent.run("nslookup", f"www.{SEARCH}")
            assert ANSWER in agent.run("nslookup", f"www.{SEARCH}", SERVER6)
        finally:
            ended.set()
            thread.join()


def gives_datagrams_back(host: Host, port: int) -> None:
    """See that datagrams from outside to a port of the host reach the guest's agent, which returns them."""
    for address, family in ((HOST4, socket.AF_INET), (HOST6, socket.AF_INET6)):
        with host.enter():
            sock = socket.socket(family, socket.SOCK_DGRAM)
        with sock:
            sock.settimeout(10.0)
            sock.connect((address, port))  # answers count from there alone
            for data in (b"first", bytes(1400), bytes(range(250)) * 16):
                sock.send(data)
                assert sock.recv(65535) == data


def is_refused(peer: Peer, port: int, address: str = HOST4) -> None:
    """See that nobody listens on a port of the host."""
    result = peer.wait(peer.get(address, port, 2, _LENGTH))
    assert (result.state, result.error) == ("failed", "connect: Connection refused")


def occupied(host: Host, port: int) -> socket.socket:
    """Take a TCP port of the host, on all its addresses."""
    with host.enter():
        return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
