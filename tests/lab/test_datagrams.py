# SPDX-License-Identifier: GPL-2.0-or-later
"""UDP and ICMP between a guest and the world: both ways, errors, path MTU, fragments, multicast."""

from __future__ import annotations

import contextlib
import errno
import re
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address

import pytest

from godwit.lab.netns import GATEWAY4, GATEWAY6, Namespace, wait_until

from .world import FAR, FAR_MTU, HOST, NOWHERE, OTHER, SERVER, TIMEOUT, World, run, silent, udp

FORWARDED = 7001
MAPPED, MAPPED_TO = 7002, 7003
MTU = 1500
HEADERS = {4: 28, 6: 48}  # of a UDP datagram, in bytes
LARGEST = {4: 65507, 6: 65487}
GATEWAY = {4: GATEWAY4, 6: f"{GATEWAY6}%eth0"}

# linux/in.h, linux/in6.h, linux/errqueue.h: what Python's socket module does not have
LEVEL = {4: socket.IPPROTO_IP, 6: socket.IPPROTO_IPV6}
TTL = {4: 2, 6: 16}  # IP_TTL, IPV6_UNICAST_HOPS
RECVTTL = {4: 12, 6: 51}  # IP_RECVTTL, IPV6_RECVHOPLIMIT
GOTTTL = {4: 2, 6: 52}  # IP_TTL, IPV6_HOPLIMIT
RECVERR = {4: 11, 6: 25}
MTU_DISCOVER = {4: 10, 6: 23}
PATH_MTU = {4: 14, 6: 24}
PMTUDISC_DONT, PMTUDISC_DO = 0, 2
ORIGIN_ICMP = {4: 2, 6: 3}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World("--tcp-ports", "none", "--udp-ports", f"{FORWARDED},{MAPPED}:{MAPPED_TO}") as made:
        yield made


@pytest.fixture(params=[4, 6], ids=["v4", "v6"])
def version(request: pytest.FixtureRequest) -> int:
    found: int = request.param
    return found


def content(size: int) -> bytes:
    """Bytes that tell where they belong."""
    return b"".join(struct.pack("!I", number) for number in range(size // 4 + 1))[:size]


# --- from the guest ---------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 1400, 1472, 1473, 8192, "largest"])
def test_datagrams_up_and_their_answers(world: World, version: int, size: int | str) -> None:
    """Each arrives whole and once, in fragments where it must, and so does the answer."""
    data = content(LARGEST[version] if size == "largest" else int(size))
    with udp(world.server, version, SERVER[version], 6001) as server, udp(world.guest, version) as guest:
        guest.sendto(data, (SERVER[version], 6001))
        came, peer = server.recvfrom(65536)
        assert came == data
        assert peer[0] == HOST[version]
        server.sendto(came[::-1], peer)
        back, source = guest.recvfrom(65536)
        assert back == data[::-1]
        assert source[:2] == (SERVER[version], 6001)
        assert silent(server)
        assert silent(guest)


def test_order_is_kept(world: World, version: int) -> None:
    numbers = [struct.pack("!I", number) for number in range(500)]
    with udp(world.server, version, SERVER[version], 6002) as server, udp(world.guest, version) as guest:
        for part in range(0, len(numbers), 50):
            for number in numbers[part : part + 50]:
                guest.sendto(number, (SERVER[version], 6002))
            came = [server.recvfrom(64) for _ in range(50)]
            assert [data for data, _ in came] == numbers[part : part + 50]
            for data, peer in came:
                server.sendto(data, peer)
            assert [guest.recv(64) for _ in range(50)] == numbers[part : part + 50]


def test_one_socket_of_the_guests_and_many_servers(world: World, version: int) -> None:
    """Whoever answers is told from the others."""
    with contextlib.ExitStack() as stack:
        guest = stack.enter_context(udp(world.guest, version))
        servers = [stack.enter_context(udp(world.server, version, SERVER[version])) for _ in range(30)]
        for number, server in enumerate(servers):
            guest.sendto(f"{number}".encode(), server.getsockname()[:2])
        for server in reversed(servers):
            data, peer = server.recvfrom(64)
            server.sendto(b"answer " + data, peer)
        answers = {data: source[:2] for data, source in (guest.recvfrom(64) for _ in servers)}
        assert answers == {f"answer {n}".encode(): s.getsockname()[:2] for n, s in enumerate(servers)}


@pytest.mark.parametrize("hops", [7, 64, 255])
def test_hop_limit_is_passed_on(world: World, version: int, hops: int) -> None:
    with udp(world.server, version, SERVER[version], 6003) as server, udp(world.guest, version) as guest:
        server.setsockopt(LEVEL[version], RECVTTL[version], 1)
        guest.setsockopt(LEVEL[version], TTL[version], hops)
        for _ in range(2):  # as a new flow and as one that is there
            guest.sendto(b"?", (SERVER[version], 6003))
            _, extra, _, _ = server.recvmsg(64, 256)
            got = [struct.unpack("i", data)[0] for level, kind, data in extra if kind == GOTTTL[version]]
            assert got == [hops]


def test_hop_limit_that_changes(world: World, version: int) -> None:
    """Traceroute's way: one flow, another hop limit each time."""
    with udp(world.server, version, SERVER[version], 6004) as server, udp(world.guest, version) as guest:
        server.setsockopt(LEVEL[version], RECVTTL[version], 1)
        for hops in (3, 64, 4, 255):
            guest.setsockopt(LEVEL[version], TTL[version], hops)
            guest.sendto(b"?", (SERVER[version], 6004))
            _, extra, _, _ = server.recvmsg(64, 256)
            assert [struct.unpack("i", data)[0] for _, kind, data in extra if kind == GOTTTL[version]] == [hops]


# --- errors -----------------------------------------------------------------------


@dataclass(frozen=True)
class Icmp:
    """An ICMP error as a socket of the guest's is told of it (ip(7), IP_RECVERR)."""

    errno: int
    type: int
    code: int
    info: int
    offender: str


PORT_UNREACHABLE = {4: (errno.ECONNREFUSED, 3, 3), 6: (errno.ECONNREFUSED, 1, 4)}
NET_UNREACHABLE = {4: (errno.ENETUNREACH, 3, 0), 6: (errno.ENETUNREACH, 1, 0)}
TIME_EXCEEDED = {4: (errno.EHOSTUNREACH, 11, 0), 6: (errno.EHOSTUNREACH, 3, 0)}
TOO_BIG = {4: (errno.EMSGSIZE, 3, 4), 6: (errno.EMSGSIZE, 2, 0)}


def asking(space: Namespace, version: int) -> socket.socket:
    """A UDP socket that is told of errors."""
    sock = udp(space, version)
    sock.setsockopt(LEVEL[version], RECVERR[version], 1)
    return sock


def error(sock: socket.socket, version: int) -> tuple[Icmp, bytes]:
    """Wait for an ICMP error; with the payload that it quotes."""
    found: list[tuple[Icmp, bytes]] = []

    def came() -> bool:
        try:
            data, extra, _, _ = sock.recvmsg(65536, 512, socket.MSG_ERRQUEUE)
        except BlockingIOError:
            return False
        for level, kind, raw in extra:
            if (level, kind) == (LEVEL[version], RECVERR[version]):
                number, origin, icmp_type, code, info = struct.unpack_from("=IBBBxI", raw)
                if origin != ORIGIN_ICMP[version]:
                    continue  # the guest's own kernel has refused something
                where = raw[16:]
                address = ip_address(where[4:8] if version == 4 else where[8:24])
                found.append((Icmp(number, icmp_type, code, info, str(address)), data))
        return bool(found)

    sock.settimeout(0)
    wait_until(came, "an ICMP error", TIMEOUT)
    sock.settimeout(TIMEOUT)
    return found[0]


@pytest.mark.parametrize("where", [SERVER, FAR], ids=["near", "far"])
def test_port_unreachable(world: World, version: int, where: dict[int, str]) -> None:
    with asking(world.guest, version) as guest:
        guest.sendto(b"anybody?", (where[version], 9))
        icmp, quoted = error(guest, version)
        assert icmp == Icmp(*PORT_UNREACHABLE[version], 0, where[version])
        assert quoted == b"anybody?"


def test_port_unreachable_each_time(world: World, version: int) -> None:
    """A flow that had an error goes on, and is told of the next one."""
    with asking(world.guest, version) as guest:
        for number in range(5):
            question = f"anybody {number}?".encode()
            guest.sendto(question, (SERVER[version], 6010))
            assert error(guest, version) == (Icmp(*PORT_UNREACHABLE[version], 0, SERVER[version]), question)
        with udp(world.server, version, SERVER[version], 6010) as server:
            guest.sendto(b"now?", (SERVER[version], 6010))
            data, peer = server.recvfrom(64)
            assert data == b"now?"
            server.sendto(b"now", peer)
            assert guest.recv(64) == b"now"


def test_net_unreachable(world: World, version: int) -> None:
    with asking(world.guest, version) as guest:
        guest.sendto(b"anybody?", (NOWHERE[version], 6000))
        icmp, quoted = error(guest, version)
        assert icmp == Icmp(*NET_UNREACHABLE[version], 0, SERVER[version])
        assert quoted == b"anybody?"


def test_time_exceeded(world: World, version: int) -> None:
    with asking(world.guest, version) as guest:
        guest.setsockopt(LEVEL[version], TTL[version], 1)
        guest.sendto(b"how far?", (FAR[version], 33434))
        icmp, quoted = error(guest, version)
        assert icmp == Icmp(*TIME_EXCEEDED[version], 0, SERVER[version])
        assert quoted == b"how far?"


@pytest.mark.parametrize("mode", ["-U", "-I"], ids=["udp", "icmp"])
def test_traceroute(world: World, version: int, mode: str) -> None:
    words = ["traceroute", f"-{version}", mode, "-n", "-q", "2", "-w", "1", "-m", "4", FAR[version]]
    if mode == "-U":
        words.remove("-U")  # which would be UDP to one port; without it, a port for each
    _, *lines = run(world.guest, *words, timeout=15).stdout.splitlines()
    shown = [re.sub(r" +[0-9.]+ ms", " ms", line).split() for line in lines]
    assert shown == [["1", SERVER[version], "ms", "ms"], ["2", FAR[version], "ms", "ms"]]


def test_tracepath(world: World, version: int) -> None:
    """Hops and path MTU, found by errors alone."""
    said = run(world.guest, "tracepath", f"-{version}", "-n", "-m", "4", FAR[version], timeout=15).stdout
    hops = dict(re.findall(r"^ ?(\d+):\s+([0-9a-f.:]+)\s", said, re.MULTILINE))
    assert hops == {"1": SERVER[version], "2": FAR[version]}, said
    assert f"Resume: pmtu {FAR_MTU} hops 2" in said


# --- path MTU ---------------------------------------------------------------------


def forget_paths(space: Namespace) -> None:
    """Drop what the kernel has learned of path MTUs."""
    for version in (4, 6):
        space.run("ip", f"-{version}", "route", "flush", "cache")


@pytest.fixture
def fresh(world: World) -> World:
    """With no path MTU known, in the guest or on the host."""
    for space in (world.guest, world.host):
        forget_paths(space)
    return world


def test_narrow_path_is_learned(fresh: World, version: int) -> None:
    size = MTU - HEADERS[version]
    with asking(fresh.guest, version) as guest:
        guest.connect((FAR[version], 6000))
        guest.setsockopt(LEVEL[version], MTU_DISCOVER[version], PMTUDISC_DO)
        assert guest.getsockopt(LEVEL[version], PATH_MTU[version]) == MTU
        guest.send(content(size))
        icmp, quoted = error(guest, version)
        assert icmp == Icmp(*TOO_BIG[version], FAR_MTU, SERVER[version])
        assert content(size).startswith(quoted)
        assert guest.getsockopt(LEVEL[version], PATH_MTU[version]) == FAR_MTU
        with pytest.raises(OSError) as caught:
            guest.send(content(size))
        assert caught.value.errno == errno.EMSGSIZE
        with udp(fresh.far, version, FAR[version], 6000) as far:
            guest.send(content(FAR_MTU - HEADERS[version]))
            assert far.recv(65536) == content(FAR_MTU - HEADERS[version])


def test_known_narrow_path_is_told_to_the_next_socket(fresh: World, version: int) -> None:
    """Where the host knows the path's MTU already, no router says it again: the host does."""
    size = MTU - HEADERS[version]
    for _ in range(2):
        forget_paths(fresh.guest)
        with asking(fresh.guest, version) as guest:
            guest.connect((FAR[version], 6000))
            guest.setsockopt(LEVEL[version], MTU_DISCOVER[version], PMTUDISC_DO)
            guest.send(content(size))
            icmp, _ = error(guest, version)
            assert (icmp.errno, icmp.type, icmp.code, icmp.info) == (*TOO_BIG[version], FAR_MTU)
            assert guest.getsockopt(LEVEL[version], PATH_MTU[version]) == FAR_MTU


def test_narrow_path_is_crossed_in_fragments(fresh: World) -> None:
    """IPv4 without DF."""
    with udp(fresh.far, 4, FAR[4], 6000) as far, udp(fresh.guest, 4) as guest:
        guest.setsockopt(LEVEL[4], MTU_DISCOVER[4], PMTUDISC_DONT)
        for _ in range(2):
            guest.sendto(content(1472), (FAR[4], 6000))
            assert far.recv(65536) == content(1472)


@pytest.mark.parametrize("size", [1472, 8192])
def test_large_datagrams_from_afar(world: World, version: int, size: int) -> None:
    """To a forwarded port, across the narrow link."""
    with udp(world.far, version, FAR[version], 6005) as far, udp(world.guest, version, "", FORWARDED) as guest:
        far.sendto(content(size), (HOST[version], FORWARDED))
        data, peer = guest.recvfrom(65536)
        assert data == content(size)
        assert peer[:2] == (FAR[version], 6005)


def test_ping_learns_the_narrow_path(fresh: World, version: int) -> None:
    size = MTU - HEADERS[version]
    said = run(
        fresh.guest,
        "ping",
        f"-{version}",
        "-n",
        "-M",
        "do",
        "-c",
        "1",
        "-W",
        "2",
        "-s",
        str(size),
        FAR[version],
        check=False,
    ).stdout
    reason = f"Frag needed and DF set (mtu = {FAR_MTU})" if version == 4 else f"Packet too big: mtu={FAR_MTU}"
    assert re.search(rf"From {re.escape(SERVER[version])}:? icmp_seq=1 {re.escape(reason)}", said), said


# --- to the guest -----------------------------------------------------------------


@pytest.mark.parametrize(("port", "to"), [(FORWARDED, FORWARDED), (MAPPED, MAPPED_TO)], ids=["same", "mapped"])
@pytest.mark.parametrize("where", ["near", "far"])
def test_inbound_first(world: World, version: int, where: str, port: int, to: int) -> None:
    """To a forwarded port with nothing sent from there before; the guest sees who asks."""
    space, addr = (world.server, SERVER[version]) if where == "near" else (world.far, FAR[version])
    with udp(space, version, addr, 6006) as peer, udp(world.guest, version, "", to) as guest:
        for number in range(3):
            peer.sendto(f"question {number}".encode(), (HOST[version], port))
            data, source = guest.recvfrom(64)
            assert data == f"question {number}".encode()
            assert source[:2] == (addr, 6006)
            guest.sendto(f"answer {number}".encode(), source)
            data, source = peer.recvfrom(64)
            assert data == f"answer {number}".encode()
            assert source[:2] == (HOST[version], port)


@pytest.mark.parametrize("size", [0, 1472, 8192, "largest"])
def test_sizes_inwards(world: World, version: int, size: int | str) -> None:
    data = content(LARGEST[version] if size == "largest" else int(size))
    with (
        udp(world.server, version, SERVER[version]) as peer,
        udp(world.guest, version, "", FORWARDED) as guest,
    ):
        peer.sendto(data, (HOST[version], FORWARDED))
        came, source = guest.recvfrom(65536)
        assert came == data
        guest.sendto(came[::-1], source)
        assert peer.recv(65536) == data[::-1]
        assert silent(guest)
        assert silent(peer)


def test_many_peers_on_one_port(world: World) -> None:
    """Of both families, all at once; each gets its own answers, in order."""
    with contextlib.ExitStack() as stack:
        peers = [
            (version, stack.enter_context(udp(world.server, version, SERVER[version])))
            for version in (4, 6)
            for _ in range(100)
        ]
        guest = stack.enter_context(udp(world.guest, 6, "", FORWARDED))  # dual-stack
        guest.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        rounds = 3

        def answer() -> None:
            for _ in range(rounds * len(peers)):
                data, source = guest.recvfrom(64)
                guest.sendto(b"answer to " + data, source)

        answering = threading.Thread(target=answer)
        answering.start()
        try:
            for number in range(rounds):
                for index, (version, peer) in enumerate(peers):
                    peer.sendto(f"{index}.{number}".encode(), (HOST[version], FORWARDED))
                for index, (version, peer) in enumerate(peers):
                    data, source = peer.recvfrom(64)
                    assert data == f"answer to {index}.{number}".encode()
                    assert source[:2] == (HOST[version], FORWARDED)
        finally:
            answering.join()


def test_the_address_that_was_asked_answers(world: World, version: int) -> None:
    """A host with two addresses: an answer from the other one would be nobody's."""
    with (
        udp(world.server, version, SERVER[version]) as first,
        udp(world.server, version, SERVER[version]) as second,
        udp(world.guest, version, "", FORWARDED) as guest,
    ):
        first.connect((OTHER[version], FORWARDED))
        second.connect((HOST[version], FORWARDED))
        for _ in range(2):
            for peer in (first, second):
                peer.send(b"?")
                _, source = guest.recvfrom(64)
                assert source[:2] == peer.getsockname()[:2]
                guest.sendto(b"!", source)
                assert peer.recv(64) == b"!"  # a connected socket takes it from there alone


def test_nobody_listens_in_the_guest(world: World, version: int) -> None:
    """The guest's own "port unreachable" ends nothing: who comes to listen later is reached."""
    with udp(world.server, version, SERVER[version], 6007) as peer:
        for _ in range(3):
            peer.sendto(b"anybody?", (HOST[version], FORWARDED))
            assert silent(peer)
        with udp(world.guest, version, "", FORWARDED) as guest:
            peer.sendto(b"now?", (HOST[version], FORWARDED))
            data, source = guest.recvfrom(64)
            assert (data, source[:2]) == (b"now?", (SERVER[version], 6007))
            guest.sendto(b"now", source)
            assert peer.recv(64) == b"now"


def test_the_guest_has_gone_before_the_answer(world: World, version: int) -> None:
    """The same for a flow that the guest began."""
    with udp(world.server, version, SERVER[version], 6008) as server:
        with udp(world.guest, version, "", 6009) as guest:
            guest.sendto(b"?", (SERVER[version], 6008))
            _, peer = server.recvfrom(64)
        server.sendto(b"late", peer)
        with udp(world.guest, version, "", 6009) as guest:
            guest.sendto(b"again?", (SERVER[version], 6008))
            data, peer = server.recvfrom(64)
            assert data == b"again?"
            server.sendto(b"yes", peer)
            assert guest.recv(64) in (b"late", b"yes")


# --- to many ----------------------------------------------------------------------


def join(sock: socket.socket, version: int, group: str, space: Namespace) -> None:
    """Receive what is sent to a group on the interface eth0."""
    if version == 4:
        sock.setsockopt(
            socket.IPPROTO_IP,
            socket.IP_ADD_MEMBERSHIP,
            socket.inet_aton(group) + socket.inet_aton(SERVER[4]),
        )
    else:
        with space.enter():
            index = socket.if_nametoindex("eth0")
        sock.setsockopt(
            socket.IPPROTO_IPV6,
            socket.IPV6_JOIN_GROUP,
            socket.inet_pton(socket.AF_INET6, group) + struct.pack("=I", index),
        )


@pytest.mark.parametrize(
    ("version", "group"),
    [(4, "239.1.2.3"), (4, "224.0.0.251"), (6, "ff05::1234"), (6, "ff02::fb")],
)
def test_multicast_from_the_guest(world: World, version: int, group: str) -> None:
    """A member gets it, and its answer, from its own address, comes back."""
    with udp(world.server, version, "", 5353) as member, udp(world.guest, version, "", 5354) as guest:
        join(member, version, group, world.server)
        with world.guest.enter():
            scope = socket.if_nametoindex("eth0")
        guest.sendto(b"who is there?", (group, 5353) if version == 4 else (group, 5353, 0, scope))
        data, source = member.recvfrom(64)
        assert data == b"who is there?"
        if not group.startswith("ff02"):
            assert source[0] == HOST[version]
        member.sendto(b"I am", source)
        data, source = guest.recvfrom(64)
        assert data == b"I am"
        if not group.startswith("ff02"):
            assert source[:2] == (SERVER[version], 5353)


def test_multicast_answers_of_several(world: World) -> None:
    """Each member's answer comes from that member."""
    group = "239.1.2.4"
    with (
        udp(world.server, 4, "", 5355) as first,
        udp(world.server, 4, GATEWAY4, 5356) as second,
        udp(world.guest, 4) as guest,
    ):
        join(first, 4, group, world.server)
        guest.sendto(b"?", (group, 5355))
        _, source = first.recvfrom(64)
        first.sendto(b"first", source)
        second.sendto(b"second", source)
        answers = dict(guest.recvfrom(64) for _ in range(2))
        assert answers == {b"first": (SERVER[4], 5355), b"second": (GATEWAY4, 5356)}


@pytest.mark.parametrize("address", ["255.255.255.255", "192.0.2.255"], ids=["limited", "subnet"])
def test_broadcast_from_the_guest(world: World, address: str) -> None:
    with udp(world.server, 4, "", 5357) as server, udp(world.guest, 4) as guest:
        guest.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        guest.sendto(b"who is there?", (address, 5357))
        data, source = server.recvfrom(64)
        assert data == b"who is there?"
        assert source[0] == HOST[4]
        server.sendto(b"I am", source)
        assert guest.recvfrom(64) == (b"I am", (SERVER[4], 5357))


# --- ping -------------------------------------------------------------------------


def ping(space: Namespace, version: int, address: str, *words: str) -> str:
    return run(space, "ping", f"-{version}", "-n", "-W", "2", "-i", "0.05", *words, address, check=False).stdout


@pytest.mark.parametrize("size", [0, 8, 56, 1452, 1472, 8000, 65000])
def test_ping_sizes(world: World, version: int, size: int) -> None:
    """ping compares what comes back with what it sent."""
    # One more than is looked at: without a time in its data ping does not wait for the last.
    said = ping(world.guest, version, SERVER[version], "-c", "4", "-s", str(size))
    came = re.findall(rf"^{size + 8} bytes from {re.escape(SERVER[version])}: icmp_seq=(\d)", said, re.MULTILINE)
    assert came[:3] == ["1", "2", "3"], said
    assert "wrong data byte" not in said


@pytest.mark.parametrize("where", [GATEWAY, FAR], ids=["gateway", "far"])
def test_ping_further(world: World, version: int, where: dict[int, str]) -> None:
    said = ping(world.guest, version, where[version], "-c", "3")
    assert "3 packets transmitted, 3 received, 0% packet loss" in said, said


def test_two_pings_at_once(world: World, version: int) -> None:
    """Each is told its own answers."""
    said: dict[int, str] = {}

    def of_size(size: int) -> None:
        said[size] = ping(world.guest, version, SERVER[version], "-c", "10", "-s", str(size))

    threads = [threading.Thread(target=of_size, args=(size,)) for size in (100, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for size in (100, 200):
        assert "10 packets transmitted, 10 received, 0% packet loss" in said[size]
        assert said[size].count(f"{size + 8} bytes from ") == 10


def test_ping_hop_limit(world: World, version: int) -> None:
    said = ping(world.guest, version, FAR[version], "-c", "1", "-t", "1")
    reason = "Time to live exceeded" if version == 4 else "Time exceeded: Hop limit"
    assert re.search(rf"From {re.escape(SERVER[version])}:? icmp_seq=1 {reason}", said), said
    assert "1 received" in ping(world.guest, version, FAR[version], "-c", "1", "-t", "2")


def test_ping_unreachable(world: World, version: int) -> None:
    said = ping(world.guest, version, NOWHERE[version], "-c", "1")
    reason = "Destination Net Unreachable" if version == 4 else "Destination unreachable: No route"
    assert re.search(rf"From {re.escape(SERVER[version])}:? icmp_seq=1 {reason}", said), said
