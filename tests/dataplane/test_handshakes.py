# SPDX-License-Identifier: GPL-2.0-or-later
"""Connections in their handshake go from one data plane to another; the sockets are handed over as they are."""

from __future__ import annotations

import contextlib
import itertools
import operator
import socket
import threading
from array import array
from collections.abc import Iterable

from godwit.dataplane import FlowState, Ping, Side, SocketState, moving
from godwit.lab.netns import Namespace
from godwit.net.native import FLOW
from godwit.net.records import SOCKET, TCP_ESTABLISHED

from .arrivals import arrive
from .driver import (
    ACK,
    RST,
    RX,
    SYN,
    TX,
    V4,
    Conn,
    Family,
    Guest,
    Server,
    address,
    is_echo_reply,
    pattern,
    read_exactly,
)
from .test_tcp_data import Stream

ACCEPTED, SYN_FROM_GUEST, ESTABLISHED = 0x01, 0x02, 0x04
TCP_REPAIR, ON, OFF_NO_WP = 19, 1, -1


def take_over(source: Guest, flow: int, target: Guest, state: FlowState) -> int:
    """Go on with that state and the socket of a flow in another data plane. Both are parked."""
    with socket.socket(fileno=source.engine.release_flow(flow)) as sock:
        came = arrive(target.engine, state, sock)
    there = came.flow(0)
    assert target.engine.flow_state(there)._replace(idle=0) == state._replace(idle=0)
    assert came.finish(array("I", [0])) == []
    return there


def open_anew(source: Guest, flow: int, target: Guest) -> None:
    """As a call that nobody has answered is: without its socket."""
    came = arrive(target.engine, source.engine.flow_state(flow))
    came.lose(0)
    target.engine.open_flow(came.flow(0))


def move(source: Guest, target: Guest) -> int:
    """The one flow that there is, with its socket, to another data plane."""
    source.engine.park()
    target.engine.park()
    [flow] = source.engine.tcp_flows(handshakes=True)
    there = take_over(source, flow, target, source.engine.flow_state(flow))
    source.engine.unpark()
    target.engine.unpark()
    return there


def test_a_call_that_the_guest_has_not_heard_answered(family: Family) -> None:
    with Guest(rx=()) as source, Guest() as target, contextlib.closing(Server(family)) as server:
        conn = Conn(source, family, server.port)
        conn.send(SYN, options=conn.options())
        with server.accept() as peer:
            source.barrier()
            [flow] = source.engine.tcp_flows(handshakes=True)
            assert source.engine.tcp_flows() == []
            assert source.engine.flow_state(flow).events == SYN_FROM_GUEST
            peer.sendall(b"hello")
            move(source, target)
            conn.guest = target
            answer = conn.next(SYN | ACK)
            conn.take_options(answer)
            conn.seq += 1
            conn.ack = (answer.tcp.seq + 1) & 0xFFFFFFFF
            conn.send(ACK)
            assert conn.read(5) == b"hello"
            conn.push(b"there")
            assert read_exactly(peer, 5) == b"there"


def test_a_call_whose_answer_is_acknowledged_only_here(family: Family) -> None:
    """The guest's ACK is the first thing that the target sees: its number is right, whatever else is due."""
    with Guest() as source, Guest(rx=()) as target, contextlib.closing(Server(family)) as server:
        conn = Conn(source, family, server.port)
        conn.send(SYN, options=conn.options())
        answer = conn.next(SYN | ACK)
        conn.take_options(answer)
        with server.accept() as peer:
            there = move(source, target)
            conn.guest = target
            conn.seq += 1
            conn.ack = (answer.tcp.seq + 1) & 0xFFFFFFFF
            conn.send(ACK)
            conn.push(b"there")
            assert read_exactly(peer, 5) == b"there"
            assert target.engine.tcp_flows() == [there]


def test_a_call_from_outside(family: Family) -> None:
    """What the kernel has accepted becomes a flow when it is asked for, and moves before the guest has heard of it."""
    with Guest(rx=()) as source, Guest() as target, contextlib.closing(Server(family)) as server:
        source.engine.park()
        source.engine.listen(server.sock.detach(), 80)
        with socket.create_connection((family.loopback, server.port), 5.0) as client:
            assert source.engine.tcp_flows(handshakes=True) == []
            source.engine.accept_waiting()
            [flow] = source.engine.tcp_flows(handshakes=True)
            assert source.engine.flow_state(flow).events == ACCEPTED
            source.engine.unpark()
            client.sendall(b"hello")
            move(source, target)
            conn = Conn.accept(target, family, 80)
            assert conn.read(5) == b"hello"
            conn.push(b"there")
            assert read_exactly(client, 5) == b"there"


def test_a_call_that_is_made_anew(family: Family) -> None:
    with Guest(rx=()) as source, Guest() as target, contextlib.closing(Server(family)) as server:
        conn = Conn(source, family, server.port)
        conn.send(SYN, options=conn.options())
        with server.accept() as first:
            source.engine.park()
            target.engine.park()
            [flow] = source.engine.tcp_flows(handshakes=True)
            assert not source.engine.flow_is_connecting(flow)
            open_anew(source, flow, target)
            target.engine.unpark()
            source.engine.unpark()
            conn.guest = target
            answer = conn.next(SYN | ACK)
            assert answer.tcp.ack == (conn.seq + 1) & 0xFFFFFFFF
            conn.take_options(answer)
            conn.seq += 1
            conn.ack = (answer.tcp.seq + 1) & 0xFFFFFFFF
            conn.send(ACK)
            with server.accept() as peer:
                assert peer.getpeername() != first.getpeername()
                conn.push(b"there")
                assert read_exactly(peer, 5) == b"there"


def test_a_call_that_is_made_anew_and_refused(family: Family) -> None:
    with Guest(rx=()) as source, Guest() as target, contextlib.closing(Server(family)) as server:
        conn = Conn(source, family, server.port)
        conn.send(SYN, options=conn.options())
        with server.accept():
            source.engine.park()
            target.engine.park()
            [flow] = source.engine.tcp_flows(handshakes=True)
            server.close()
            open_anew(source, flow, target)
            target.engine.unpark()
            source.engine.unpark()
            conn.guest = target
            answer = conn.next(RST | ACK)
            assert answer.tcp.ack == (conn.seq + 1) & 0xFFFFFFFF
            assert target.engine.tcp_flows(handshakes=True) == []


def test_a_call_under_way_is_known_as_such(family: Family) -> None:
    """A socket that listens for one at most, and has one: the next SYN is not answered."""
    with contextlib.ExitStack() as stack:
        guest = stack.enter_context(Guest())
        server = stack.enter_context(contextlib.closing(Server(family, backlog=0)))
        with socket.create_connection((family.loopback, server.port), 5.0):
            conn = Conn(guest, family, server.port)
            conn.send(SYN, options=conn.options())
            guest.barrier()
            [flow] = guest.engine.tcp_flows(handshakes=True)
            assert guest.engine.flow_is_connecting(flow)
            with server.accept():
                conn.next(SYN | ACK, timeout=10.0)
            assert not guest.engine.flow_is_connecting(flow)


def test_echoes(family: Family) -> None:
    """Those of the guest's to this host itself stay; what came is there once, and can be taken away again."""
    with Namespace("echo") as space, contextlib.ExitStack() as stack:
        space.ip("link set lo up")
        space.sysctl("net/ipv4/ping_group_range", "0 2147483647")
        with space.enter():
            source, target = stack.enter_context(Guest()), stack.enter_context(Guest())
        source.send(source.echo(family, 77, 1, b"question"))
        source.receive(is_echo_reply)
        source.engine.park()
        assert source.engine.pings() == []
        ping = Ping(address(family.guest), address(family.gateway), 77, 4242, 9)
        target.engine.park()
        with space.enter():
            index = target.engine.import_ping(ping)
            assert index is not None
            assert target.engine.import_ping(ping) is None
            target.engine.forget_pings([index])
            index = target.engine.import_ping(ping._replace(guest_ident=79))
            assert index is not None
        target.engine.unpark()
        source.engine.unpark()
        target.send(target.echo(family, 79, 10, b"question"))
        assert target.receive(is_echo_reply).payload.endswith(b"question")


def test_an_idle_connection_has_nothing_to_say(family: Family) -> None:
    with Guest() as source, Guest() as target, contextlib.closing(Server(family)) as server:
        conn = Conn(source, family, server.port).connect()
        with server.accept() as peer:
            conn.push(b"hello")
            assert read_exactly(peer, 5) == b"hello"
            conn.wait_acked()
            move(source, target)
            conn.guest = target
            target.barrier()
            assert target.collect() == []
            peer.sendall(b"here")
            assert conn.read(4) == b"here"
            conn.push(b"there")
            assert read_exactly(peer, 5) == b"there"
            conn.wait_acked()


def test_the_window_stays_open(family: Family) -> None:
    """What comes first behind a move has nothing to acknowledge, and a window all the same."""
    with Guest() as source, Guest() as target, contextlib.closing(Server(family)) as server:
        conn = Conn(source, family, server.port).connect()
        with server.accept() as peer:
            conn.push(b"hello")
            conn.wait_acked()
            window = conn.peer_window
            move(source, target)
            conn.guest = target
            peer.sendall(b"here")
            assert conn.read(4, ack=False) == b"here"
            assert conn.peer_window == window


def test_what_was_not_acknowledged_yet_is(family: Family) -> None:
    with Guest(rx=((2048,),)) as source, Guest() as target, contextlib.closing(Server(family)) as server:
        source.refill = False  # the one buffer is for the answer to the SYN
        conn = Conn(source, family, server.port).connect()
        with server.accept() as peer:
            conn.push(b"hello")
            assert read_exactly(peer, 5) == b"hello"
            move(source, target)
            conn.guest = target
            conn.wait_acked()


def test_a_window_that_opened_and_was_not_told_is_told(family: Family) -> None:
    """Shut when the source's rings were stopped; the peer reads on before the state is saved."""
    with Guest() as source, Guest() as target:
        server = Server(family, rcvbuf=20_000)
        conn = Conn(source, family, server.port).connect()
        with server.accept() as peer:
            server.close()
            stream = Stream(conn)
            sent = stream.pour(pattern(16 << 20), 60_000, patience=0.3)
            assert stream.room() == 0
            for index in (RX, TX):
                source.engine.ring_stop(index)
            assert len(read_exactly(peer, sent // 2)) == sent // 2
            source.barrier()
            move(source, target)
            conn.guest = target
            conn.until(lambda frame: stream.room() > 0)


def test_a_window_too_small_for_a_segment_is_looked_at_again(family: Family) -> None:
    with Guest(mtu=65520) as source, Guest(mtu=65520) as target, contextlib.closing(Server(family)) as server:
        conn = Conn(source, family, server.port).connect()
        with server.accept():
            conn.push(b"x")
            conn.wait_acked()
            source.engine.park()
            target.engine.park()
            [flow] = source.engine.tcp_flows()
            state = source.engine.flow_state(flow)
            take_over(source, flow, target, state._replace(wnd_to_tap=30_000 >> state.ws_to_tap))
            source.engine.unpark()
            target.engine.unpark()
            conn.guest = target
            conn.until(lambda _: conn.peer_window > 30_000)


def set_mode(fds: Iterable[int], mode: int) -> None:
    for fd in fds:
        sock = socket.socket(fileno=fd)
        sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, mode)
        sock.detach()


def test_calls_that_come_with_a_guest_that_runs_write_into_no_ring_that_is_changed_meanwhile() -> None:
    """The commit is at work in a thread while the front-end starts the rings, and may do anything else to them."""
    count = 100
    here, there, inside = map(address, ("127.0.0.1", "127.0.0.2", V4.guest))
    numbers = [0, 7, 8, ACCEPTED, 1460, 0, 0, 0, 1000, 0, 1, 1, 1, 1, 1]
    with Guest(num=1024, rx=((2048,),) * count) as guest, guest.engine.parked():
        states = [
            FlowState((1, 2), (Side(here, there, 80, port), Side(there, inside, port, 80)), *numbers)
            for port in range(30000, 30000 + count)
        ]
        came = moving.Arrivals(guest.engine, 0, 1 << 20)
        assert came.prepare(b"".join(map(FLOW.encode, states)), True) == []
        flows = came.with_socket(0)
        fds = came.sockets(flows)
        set_mode(fds, ON)
        came.enter_repair(flows)
        restored = SOCKET.encode(
            SocketState(1000, 2000, 0, 0, 0, 1460, 0, 2000, 65535, 65535, 65535, 2000, 7, 7, TCP_ESTABLISHED, 0)
        )
        assert came.restore(0, restored * count) == []
        assert came.complete(flows) == []
        set_mode(fds, OFF_NO_WP)
        rings = operator.methodcaller("rings")
        committing = threading.Thread(target=came.finish, args=(flows,))
        committing.start()
        while committing.is_alive():
            # One call: nothing gets the GIL meanwhile.
            assert len(set(map(tuple, map(rings, itertools.repeat(guest.engine, 2000))))) == 1
        committing.join()
        assert guest.engine.rings()[RX][4] == count
        for flow in came.flows():
            guest.engine.drop_flow_socket(flow)
