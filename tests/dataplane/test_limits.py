# SPDX-License-Identifier: GPL-2.0-or-later
"""What a guest can make grow has its limits: connections that nobody answers, UDP flows, pings, all flows.

At a limit something gives way to what is new, and nothing that is in use suffers. All of it in a network whose
router does not exist: who is called behind it does not answer.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from scapy.layers.inet import TCP, UDP

from godwit.dataplane import Ping, UdpPeer, UdpPort, moving
from godwit.lab.netns import Namespace
from godwit.net import native

from .driver import (
    RST,
    SYN,
    TIMEOUT,
    V4,
    Conn,
    Family,
    Guest,
    Server,
    address,
    is_echo_reply,
    open_pair,
    read_exactly,
    wait_until,
)
from .test_datagram import Peer, is_udp
from .test_engine import flow_to
from .test_tcp import is_turned_away

TABLE = 1024
HALF_OPEN = 8
NOWHERE = {"v4": "203.0.113.{}", "v6": "2001:db8:a::{}"}


@pytest.fixture(autouse=True)
def nobody_answers() -> Iterator[None]:
    with Namespace("limits") as space, space.enter():
        space.ip("link add d0 type veth peer name d1", "link set d0 up", "link set d1 up")
        space.ip("addr add 198.51.100.1/24 dev d0", "addr add 2001:db8:9::1/64 dev d0 nodad")
        for router in ("198.51.100.2", "2001:db8:9::2"):
            space.ip(f"neigh add {router} lladdr 02:00:00:00:00:99 dev d0 nud permanent")
        space.ip("route add 203.0.113.0/24 via 198.51.100.2", "route add 2001:db8:a::/64 via 2001:db8:9::2")
        yield


@contextlib.contextmanager
def limited(*, flows: int = TABLE, udp_flows: int = TABLE // 2, half_open: int = HALF_OPEN) -> Iterator[Guest]:
    with Guest() as guest:
        guest.engine.set_limits(flows, udp_flows, half_open)
        yield guest


def nowhere(family: Family, n: int) -> str:
    return NOWHERE[family.name].format(n + 10)


def call(guest: Guest, family: Family, n: int) -> Any:
    """A SYN to somebody who does not answer."""
    return guest.ip(family, dst=nowhere(family, n)) / TCP(sport=2000, dport=80, flags="S", seq=n)


def call_nowhere(guest: Guest, family: Family, n: int) -> None:
    guest.send(call(guest, family, n))


def counter(guest: Guest, name: str) -> int:
    return int(guest.engine.counters()[name])


def descriptors() -> int:
    gc.collect()  # what earlier tests have left is not to be closed amid this one
    return len(os.listdir("/proc/self/fd"))


# ---- connections that nobody answers


def test_connections_that_nobody_answers_make_room(family: Family) -> None:
    """The oldest is given up, in silence: neither what is established suffers, nor what is answered."""
    with limited() as guest:
        conn, sock = open_pair(guest, family)
        server = Server(family)
        before = descriptors()
        for n in range(100):
            call_nowhere(guest, family, n)
            guest.engine.advance(150)
        assert guest.drops("limit_half_open") == 100 - HALF_OPEN
        assert counter(guest, "flows") == 1 + HALF_OPEN
        assert descriptors() - before == HALF_OPEN
        guest.barrier()
        assert guest.collect() == []
        with sock, server.sock:
            conn.push(b"still here")
            assert read_exactly(sock, 10) == b"still here"
            sock.sendall(b"and so am I")
            assert conn.read(11) == b"and so am I"
            guest.engine.advance(1000)
            Conn(guest, family, server.port).connect()
            # Nor is anyone lost who was given up: the guest asks once more, as it does.
            assert counter(guest, "flows") == 2 + HALF_OPEN - 1
            call_nowhere(guest, family, 0)
            assert counter(guest, "flows") == 2 + HALF_OPEN


def test_each_has_its_time_to_answer(family: Family) -> None:
    """As many are waited for at a time as may be; who comes too soon asks again, as whoever is given up does."""
    with limited() as guest:
        guest.send_all([call(guest, family, n) for n in range(30)])  # at one time
        assert guest.drops("limit_half_open") == 30 - HALF_OPEN
        ports = [flow["our"] for flow in guest.engine.flows()]
        assert {name for name, _ in ports} == {address(nowhere(family, n)) for n in range(HALF_OPEN)}
        guest.engine.advance(1000)
        call_nowhere(guest, family, 30)
        assert [flow["our"] for flow in guest.engine.flows()] != ports
        assert counter(guest, "flows") == HALF_OPEN
        guest.barrier()
        assert guest.collect() == []


def test_a_connection_that_is_answered_counts_no_more(family: Family) -> None:
    with limited(half_open=1) as guest:
        pairs = [open_pair(guest, family) for _ in range(5)]
        refused = Conn(guest, family, 9)
        refused.send(SYN, options=refused.options())
        refused.next(RST)
        for conn, sock in pairs:
            with sock:
                conn.push(b"x")
                assert read_exactly(sock, 1) == b"x"
        assert guest.drops("limit_half_open") == 0


def test_a_quarter_of_the_descriptors_is_for_those_that_nobody_answers(family: Family) -> None:
    with limited(half_open=1000) as guest:
        guest.engine.limit_flows(40)
        for n in range(30):
            call_nowhere(guest, family, n)
        assert counter(guest, "flows") == 11


# ---- datagrams


def test_datagrams_to_the_whole_world(family: Family) -> None:
    """What the guest has an exchange with stays, its port as well; what only went out makes room. All are sent."""
    with limited(udp_flows=8) as guest, Peer(family) as friend, Peer(family) as server:
        guest.send(guest.udp(family, 5000, friend.port, b"hello"))
        assert friend.read() == b"hello"
        friend.write(b"hello yourself")
        assert guest.receive(is_udp).payload == b"hello yourself"
        port = friend.guest
        before = descriptors()
        for n in range(100):
            guest.send(guest.udp(family, 6000 + n, server.port, b"%d" % n))
            assert server.read() == b"%d" % n
        assert counter(guest, "flows") == 8
        assert counter(guest, "flows_recycled") == 93
        assert descriptors() - before == 7
        friend.write(b"are you there")
        assert guest.receive(is_udp).payload == b"are you there"
        guest.send(guest.udp(family, 5000, friend.port, b"yes"))
        assert friend.read() == b"yes"
        assert friend.guest == port
        assert guest.drops("limit_udp") == guest.drops("table_full") == 0


def test_what_makes_room_is_what_was_used_least_of_late(family: Family) -> None:
    with limited(udp_flows=4) as guest, Peer(family) as peer:
        ports: dict[int, int] = {}

        def send(own: int) -> None:
            guest.engine.advance(100)
            guest.send(guest.udp(family, own, peer.port, b"%d" % own))
            assert peer.read() == b"%d" % own
            assert ports.setdefault(own, peer.guest[1]) == peer.guest[1]

        for own in (5000, 5001, 5002, 5003, 5000, 5001, 5004, 5005, 5000, 5001):
            send(own)
        assert counter(guest, "flows_recycled") == 2


def test_many_datagrams_in_one_batch(family: Family) -> None:
    """Those that wait to be sent are sent before their flow makes room."""
    with limited(udp_flows=3) as guest, contextlib.ExitStack() as stack:
        peers = [stack.enter_context(Peer(family)) for _ in range(40)]
        guest.send_all([guest.udp(family, 5000 + n % 2, peer.port, b"%d" % n) for n, peer in enumerate(peers)])
        for n, peer in enumerate(peers):
            assert peer.read() == b"%d" % n
        assert counter(guest, "flows") == 3


def test_an_exchange_makes_room_when_it_has_been_silent(family: Family) -> None:
    with limited(udp_flows=2) as guest, Peer(family) as peer:

        def ask(own: int) -> None:
            guest.send(guest.udp(family, own, peer.port, b"?"))
            peer.read()
            peer.write(b"!")
            assert guest.receive(is_udp).payload == b"!"

        ask(5000)
        ask(5001)
        guest.send(guest.udp(family, 5002, peer.port, b"one too many"))
        assert guest.drops("limit_udp") == 1
        guest.engine.advance(29_000)
        ask(5000)
        guest.engine.advance(2_000)
        ask(5002)
        assert counter(guest, "flows_recycled") == 1
        peer.write(b"to the last")
        assert guest.receive(is_udp).ether[UDP].dport == 5002


def test_one_port_with_many_peers_is_not_closed_for_another(family: Family) -> None:
    """Each of its flows is older; none of them would free a socket."""
    with limited(udp_flows=64) as guest, Peer(family) as peer:
        guest.engine.limit_flows(4)  # three of them for UDP
        for n in range(20):
            guest.send(guest.udp(family, 5000, 1000 + n, b"x"))
        for own in (6000, 6001, 6002, 6003):
            guest.send(guest.udp(family, own, peer.port, b"%d" % own))
            assert peer.read() == b"%d" % own
        assert counter(guest, "flows") == 22
        assert counter(guest, "flows_recycled") == 2


def test_one_port_with_very_many_peers_does_not_keep_others_from_making_room(family: Family) -> None:
    """More than are looked at for one datagram: then for the next, which the guest sends again, one goes on behind."""
    with limited() as guest, Peer(family) as peer:
        guest.engine.limit_flows(4)  # three of them for UDP
        for n in range(200):
            guest.send(guest.udp(family, 5000, 1000 + n, b"x"))
        for own in (6000, 6001):
            guest.send(guest.udp(family, own, peer.port, b"%d" % own))
            assert peer.read() == b"%d" % own
        for _ in range(5):
            guest.send(guest.udp(family, 6002, peer.port, b"6002"))
        assert peer.read() == b"6002"
        assert 0 < guest.drops("limit_udp") < 5
        assert counter(guest, "flows") == 202
        assert counter(guest, "flows_recycled") == 1


def test_the_host_keeps_ports_for_its_own_datagrams() -> None:
    """Of those that the kernel chooses from the guest has half at most, whatever else it may have."""
    with open("/proc/sys/net/ipv4/ip_local_port_range", "w") as limits:
        limits.write("50000 50019")
    with limited() as guest, Peer(V4) as peer, contextlib.ExitStack() as stack:
        for n in range(40):
            guest.send(guest.udp(V4, 5000 + n, peer.port, b"x"))
            assert peer.read() == b"x"
        assert counter(guest, "flows") == 10
        for _ in range(9):
            stack.enter_context(Peer(V4))


def test_pings_to_the_whole_world(family: Family) -> None:
    with limited(udp_flows=4) as guest:
        guest.send(guest.echo(family, 1, 1, b"hello"))
        guest.receive(is_echo_reply)
        before = descriptors()
        for n in range(30):
            guest.send(guest.echo(family, 2, 1, b"?", dst=nowhere(family, n)))
        assert counter(guest, "flows") == 4
        assert descriptors() - before == 3
        guest.send(guest.echo(family, 1, 2, b"hello"))
        guest.receive(is_echo_reply)
        assert counter(guest, "flows_recycled") == 27


def test_flows_that_end_together(family: Family) -> None:
    with limited() as guest, Peer(family) as peer:
        conn, sock = open_pair(guest, family)
        for n in range(300):
            guest.send(guest.udp(family, 5000 + n, peer.port, b"x"))
        guest.engine.advance(200_000)
        wait_until(lambda: counter(guest, "flows") == 1)
        with sock:
            conn.push(b"x")
            assert read_exactly(sock, 1) == b"x"


# ---- all of them


def test_connections_beyond_the_limit_are_refused(family: Family) -> None:
    """At once, on either side: it may last, and waiting would be for nothing."""
    with limited(flows=3) as guest:
        listening = Server(family)
        guest.engine.listen(listening.sock.detach(), 80)
        pairs = [open_pair(guest, family) for _ in range(3)]
        server = Server(family)
        late = Conn(guest, family, server.port)
        late.send(SYN, options=late.options())
        late.next(RST)
        server.close()
        assert is_turned_away(family, listening.port)
        assert guest.drops("table_full") == 2
        guest.send(guest.udp(family, 5000, 5000, b"x"))
        assert guest.drops("table_full") == 3
        for conn, sock in pairs:
            with sock:
                conn.push(b"x")
                assert read_exactly(sock, 1) == b"x"


def test_who_calls_leaves_the_guest_room_for_its_own(family: Family) -> None:
    with limited(flows=32) as guest, contextlib.ExitStack() as stack:
        listening = Server(family, backlog=64)
        guest.engine.listen(listening.sock.detach(), 80)
        for _ in range(30):
            stack.enter_context(socket.create_connection((family.loopback, listening.port), TIMEOUT))
        wait_until(lambda: counter(guest, "flows") == 30)
        assert is_turned_away(family, listening.port)
        for _ in range(2):
            stack.enter_context(open_pair(guest, family)[1])
        late = Conn(guest, family, listening.port)
        late.send(SYN, options=late.options())
        late.next(RST)


def test_who_sends_to_a_forwarded_port_leaves_the_guest_room_for_its_own(family: Family) -> None:
    """What strangers send is delivered, all of it, and remembered only as far as the limits allow."""
    with limited(flows=40, udp_flows=10) as guest, contextlib.ExitStack() as stack, Peer(family) as server:
        sock = socket.socket(family.af, socket.SOCK_DGRAM)
        sock.bind((family.loopback, 0))
        port = sock.getsockname()[1]
        guest.engine.listen(sock.detach(), 5353)
        for n in range(60):
            stranger = stack.enter_context(Peer(family))
            stranger.sock.sendto(b"%d" % n, (family.loopback, port))
            assert guest.receive(is_udp).payload == b"%d" % n
        assert counter(guest, "flows") == 5
        for own in range(6000, 6005):
            guest.send(guest.udp(family, own, server.port, b"%d" % own))
            assert server.read() == b"%d" % own
        assert counter(guest, "flows_recycled") == 0
        for _ in range(30):
            stack.enter_context(open_pair(guest, family)[1])
        assert counter(guest, "flows") == 40
        assert guest.drops("table_full") == guest.drops("limit_udp") == 0


def test_a_guest_that_moves_in_keeps_what_it_has() -> None:
    """Where it comes from the limits may be wider; here it opens nothing more until it is below them."""
    with limited(flows=4, udp_flows=2, half_open=1) as guest:
        came = moving.Arrivals(guest.engine, 0, 0)
        with guest.engine.parked():
            for own in range(1000, 1010):
                assert came.prepare(native.FLOW.encode(flow_to(80, own)), True) == []
            own4, peer4 = address(V4.guest), address("203.0.113.77")
            for n in range(6):
                sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                sock.bind(("0.0.0.0", 0))
                port = guest.engine.import_udp_port(
                    UdpPort(0, own4, 5000 + n, bytes(12) + bytes(4), sock.getsockname()[1], 0), sock.detach()
                )
                assert guest.engine.import_udp_peer(port, UdpPeer(own4, peer4, peer4, bytes(16), 53, 1, 1))
            for n in range(3):
                assert guest.engine.import_ping(Ping(own4, peer4, n, 0, 1)) is not None
        assert counter(guest, "flows") == 10 + 6 + 3
        # Of what came each counts as in use.
        guest.send(guest.udp(V4, 6000, 5000, b"x"))
        assert guest.drops("limit_udp") == 1
        late = Conn(guest, V4, 80)
        late.send(SYN, options=late.options())
        late.next(RST)
        assert guest.drops("table_full") == 1
