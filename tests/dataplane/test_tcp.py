# SPDX-License-Identifier: GPL-2.0-or-later
"""TCP as the guest sees it: opening, closing, and what breaks a connection."""

from __future__ import annotations

import contextlib
import select
import socket
import struct

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.packet import Raw

from .driver import (
    ACK,
    FIN,
    PLAIN,
    PSH,
    RST,
    SYN,
    TIMEOUT,
    V4,
    V6,
    Conn,
    Family,
    Guest,
    Server,
    open_pair,
    pattern,
    read_exactly,
    wait_until,
)

# What waits for a timer does so in one family: timers know of none.
once = pytest.mark.parametrize("family", [V6], ids=["v6"])


def reset(sock: socket.socket) -> None:
    """Close with a reset (socket(7), SO_LINGER)."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def is_reset(sock: socket.socket) -> bool:
    """Whether the peer of the host's socket has reset it."""
    try:
        return sock.recv(1) != b"" and False
    except ConnectionResetError:
        return True


def is_turned_away(family: Family, port: int) -> bool:
    """Whether a connection to the host's port is reset at once, be it that early that connect() says so."""
    try:
        with socket.create_connection((family.loopback, port), TIMEOUT) as sock:
            return is_reset(sock)
    except ConnectionResetError:
        return True


def flows(guest: Guest) -> int:
    count = guest.engine.counters()["flows"]
    assert isinstance(count, int)
    return count


# ---- opening


@pytest.mark.parametrize("scale", [7, 0, None])
def test_handshake(guest: Guest, family: Family, scale: int | None) -> None:
    conn, sock = open_pair(guest, family, scale=scale)
    with sock:
        assert conn.peer_mss == 1500 - 20 - family.ip_size
        assert conn.peer_scale == (0 if scale is None else 8)
        conn.push(b"hello")
        assert read_exactly(sock, 5) == b"hello"
        sock.sendall(b"goodbye")
        assert conn.read(7) == b"goodbye"


@pytest.mark.parametrize(
    ("asked", "given"),
    [(1000, 1000), (1003, 1000), (0, 64), (1, 64), (65535, 1440), (None, 536)],
)
def test_segment_size_is_what_the_guest_asked_for(asked: int | None, given: int, family: Family) -> None:
    """Without TSO every segment is one packet; bounds guard against 0 and above what the MTU holds."""
    if family.v6:
        given = {1440: 1440, 536: 1220}.get(given, given)
    elif given == 1440:
        given = 1460
    with Guest(PLAIN) as guest:
        server = Server(family)
        conn = Conn(guest, family, server.port, scale=None, mss=asked).connect()
        with server.accept() as sock:
            server.close()
            sock.sendall(pattern(5000))
            assert len(conn.until(lambda f: bool(f.payload)).payload) == given


def test_refused_connection_is_reset(guest: Guest, family: Family) -> None:
    server = Server(family)
    server.close()
    conn = Conn(guest, family, server.port)
    conn.send(SYN, options=conn.options())
    answer = conn.next(RST | ACK)
    assert answer.tcp.ack == (conn.seq + 1) & 0xFFFFFFFF
    wait_until(lambda: flows(guest) == 0)


@pytest.mark.parametrize("where", ["127.0.0.2", "0.0.0.0", "::1", "::", "::ffff:127.0.0.1", "::ffff:0.0.0.0"])
def test_loopback_of_the_host_is_out_of_reach(guest: Guest, where: str) -> None:
    """Neither by its name nor by the names that the kernel takes for it: the unspecified address, and v4-mapped.

    The latter is an address that no frame has, so there is nobody to answer to.
    """
    family = V6 if ":" in where else V4
    mapped = where.startswith("::ffff:")
    reason = "source" if mapped else "unreachable"
    with socket.socket(socket.AF_INET6) as listener:
        listener.bind(("::", 0))
        listener.listen(1)
        conn = Conn(guest, family, listener.getsockname()[1])
        frame = conn.build(SYN, options=conn.options())
        (frame[IPv6] if family.v6 else frame[IP]).dst = where
        guest.send(frame)
        assert guest.drops(reason) == 1
        assert flows(guest) == 0
        answer = guest.look(lambda f: f.has(RST | ACK), 0.05 if mapped else TIMEOUT)
        assert (answer is None) == mapped
        listener.settimeout(0.05)
        with pytest.raises(TimeoutError):
            listener.accept()


def test_v4_mapped_source_is_refused(guest: Guest) -> None:
    server = Server(V4)
    conn = Conn(guest, V6, server.port)
    frame = conn.build(SYN, options=conn.options())
    frame[IPv6].src = "::ffff:192.0.2.10"
    guest.send(frame)
    assert guest.drops("source") == 1
    server.close()


def test_segment_without_connection_is_reset(guest: Guest, family: Family) -> None:
    """RFC 9293, 3.10.7.1."""
    conn = Conn(guest, family, 9)
    conn.send(ACK, b"data", seq=1000, ack=777)
    answer = conn.next(RST)
    assert answer.tcp.seq == 777
    assert not answer.has(ACK)
    conn.send(FIN | SYN, b"data", seq=1000)
    answer = conn.next(RST | ACK)
    assert (answer.tcp.seq, answer.tcp.ack) == (0, 1006)
    conn.send(RST, seq=1000)
    assert conn.quiet()
    assert guest.drops("no_flow") == 2


def test_table_full(family: Family) -> None:
    with Guest(max_flows=4) as guest:
        server = Server(family)
        conns = [Conn(guest, family, server.port).connect() for _ in range(4)]
        socks = [server.accept() for _ in conns]
        late = Conn(guest, family, server.port)
        late.send(SYN, options=late.options())
        late.next(RST | ACK)
        assert guest.drops("table_full") == 1
        socks.pop().close()
        conns[-1].read_fin()
        conns[-1].push(b"", FIN | ACK)
        wait_until(lambda: flows(guest) == 3)
        conns[-1] = Conn(guest, family, server.port).connect()
        socks.append(server.accept())
        # A place is one for UDP as much as for TCP.
        guest.send(guest.udp(family, 5000, 5000, b"x"))
        assert guest.drops("table_full") == 2
        for conn, sock in zip(conns[:3], socks, strict=False):
            conn.push(b"still here")
            assert read_exactly(sock, 10) == b"still here"
        for sock in socks:
            sock.close()
        server.close()


def test_syn_again(guest: Guest, family: Family) -> None:
    """The guest repeats its SYN, since it has not seen the answer."""
    server = Server(family)
    conn = Conn(guest, family, server.port)
    conn.send(SYN, options=conn.options())
    first = conn.next(SYN | ACK)
    conn.send(SYN, options=conn.options())
    second = conn.next(SYN | ACK)
    assert (first.tcp.seq, first.tcp.ack) == (second.tcp.seq, second.tcp.ack)
    conn.seq += 1
    conn.ack = first.tcp.seq + 1
    conn.send(ACK)
    with server.accept() as sock:
        conn.push(b"one")
        assert read_exactly(sock, 3) == b"one"
    server.close()


def test_syn_of_another_connection_before_the_first_was_established(guest: Guest, family: Family) -> None:
    server = Server(family)
    conn = Conn(guest, family, server.port)
    conn.send(SYN, options=conn.options())
    conn.next(SYN | ACK)
    conn.seq = (conn.seq + 100000) & 0xFFFFFFFF
    conn.connect()
    with server.accept() as first, server.accept() as second:
        assert is_reset(first)
        conn.push(b"one")
        assert read_exactly(second, 3) == b"one"
    server.close()


@once
def test_answer_is_repeated_until_the_guest_acknowledges_it(guest: Guest, family: Family) -> None:
    server = Server(family)
    conn = Conn(guest, family, server.port)
    conn.send(SYN, options=conn.options())
    first = conn.next(SYN | ACK)
    second = conn.next(SYN | ACK)  # a second later
    assert first.tcp.seq == second.tcp.seq
    server.close()


def test_wrong_acknowledgement_of_the_answer_is_reset(guest: Guest, family: Family) -> None:
    server = Server(family)
    conn = Conn(guest, family, server.port)
    conn.send(SYN, options=conn.options())
    answer = conn.next(SYN | ACK)
    conn.send(ACK, seq=conn.seq + 1, ack=answer.tcp.seq + 2)
    assert conn.next(RST).tcp.seq == (answer.tcp.seq + 2) & 0xFFFFFFFF
    server.close()


def test_syn_on_an_established_connection(guest: Guest, family: Family) -> None:
    """RFC 5961, 4.2: an acknowledgement, whatever its number."""
    conn, sock = open_pair(guest, family)
    with sock:
        for seq in (conn.seq, conn.seq - 1, conn.seq + 1000000):
            conn.send(SYN, seq=seq)
            answer = conn.next(ACK)
            assert not answer.has(SYN)
            assert answer.tcp.ack == conn.seq
        conn.push(b"one")
        assert read_exactly(sock, 3) == b"one"


def test_connection_from_outside(guest: Guest, family: Family) -> None:
    server = Server(family)
    guest.engine.listen(server.sock.detach(), 80)
    with socket.create_connection((family.loopback, server.port), TIMEOUT) as sock:
        conn = Conn.accept(guest, family, 80)
        conn.push(b"banner")
        assert read_exactly(sock, 6) == b"banner"
        sock.sendall(b"request")
        assert conn.read(7) == b"request"


def test_connection_from_outside_that_the_guest_refuses(guest: Guest, family: Family) -> None:
    server = Server(family)
    guest.engine.listen(server.sock.detach(), 80)
    with socket.create_connection((family.loopback, server.port), TIMEOUT) as sock:
        syn = guest.receive(lambda f: f.has(SYN))
        conn = Conn(guest, family, syn.tcp.sport)
        conn.own = 80
        conn.send(RST | ACK, seq=0, ack=syn.tcp.seq + 5)  # of another connection: nothing happens
        assert flows(guest) == 1
        conn.send(RST | ACK, seq=0, ack=syn.tcp.seq + 1)
        assert is_reset(sock)
        assert flows(guest) == 0


@once
def test_connection_from_outside_that_the_guest_does_not_answer(guest: Guest, family: Family) -> None:
    server = Server(family)
    guest.engine.listen(server.sock.detach(), 80)
    with socket.create_connection((family.loopback, server.port), TIMEOUT) as sock:
        first = guest.receive(lambda f: f.has(SYN))
        second = guest.receive(lambda f: f.has(SYN))
        assert first.tcp.seq == second.tcp.seq
        conn = Conn(guest, family, first.tcp.sport)
        conn.own = 80
        conn.send(SYN | ACK, ack=first.tcp.seq + 1, options=conn.options())
        conn.seq += 1
        conn.ack = first.tcp.seq + 1
        conn.next(ACK)
        sock.sendall(b"request")
        assert conn.read(7) == b"request"


@pytest.mark.parametrize("seen", [False, True], ids=["never", "any_more"])
def test_connection_from_outside_to_a_guest_without_an_address(guest: Guest, family: Family, seen: bool) -> None:
    """There is nobody to ask: the peer hears of it at once."""
    if seen:
        guest.send(guest.udp(family, 5000, 5000, b"x"))
        guest.receive(lambda frame: TCP not in frame.ether)  # that is refused
    guest.configure(**{"addr6" if family.v6 else "addr4": None})
    server = Server(family)
    guest.engine.listen(server.sock.detach(), 80)
    assert is_turned_away(family, server.port)
    assert guest.drops("unreachable") == 1
    assert guest.look(lambda _: True, 0.05) is None


def test_connection_from_outside_beyond_the_table(family: Family) -> None:
    with Guest(max_flows=1) as guest:
        server = Server(family)
        guest.engine.listen(server.sock.detach(), 80)
        with socket.create_connection((family.loopback, server.port), TIMEOUT) as taken:
            conn = Conn.accept(guest, family, 80)
            assert is_turned_away(family, server.port)
            assert guest.drops("table_full") == 1
            conn.push(b"still here")
            assert read_exactly(taken, 10) == b"still here"


# ---- closing


def test_guest_closes_first(guest: Guest, family: Family) -> None:
    conn, sock = open_pair(guest, family)
    with sock:
        conn.push(b"last words", FIN | ACK)
        conn.wait_acked()
        assert read_exactly(sock, 10) == b"last words"
        assert sock.recv(1) == b""
        data = pattern(50000)
        sock.sendall(data)  # half-closed: this way it goes on
        assert conn.read(len(data)) == data
        sock.close()
        conn.read_fin()
        wait_until(lambda: flows(guest) == 0)


def test_peer_closes_first(guest: Guest, family: Family) -> None:
    conn, sock = open_pair(guest, family)
    with sock:
        sock.sendall(b"last words")
        sock.shutdown(socket.SHUT_WR)
        assert conn.read(10) == b"last words"
        conn.read_fin()
        data = pattern(50000)
        for at in range(0, len(data), 1000):
            conn.push(data[at : at + 1000])
        assert read_exactly(sock, len(data)) == data
        conn.push(b"", FIN | ACK)
        assert sock.recv(1) == b""
        conn.wait_acked()
        wait_until(lambda: flows(guest) == 0)


def test_both_close_at_once(guest: Guest, family: Family) -> None:
    conn, sock = open_pair(guest, family)
    with sock:
        sock.shutdown(socket.SHUT_WR)
        fin = conn.next(FIN)
        conn.push(b"", FIN | ACK)  # which does not acknowledge theirs
        conn.wait_acked()
        assert sock.recv(1) == b""
        assert flows(guest) == 1
        conn.ack = fin.tcp.seq + 1
        conn.acknowledge()
        wait_until(lambda: flows(guest) == 0)


@once
def test_fin_is_repeated_until_it_is_acknowledged(guest: Guest, family: Family) -> None:
    conn, sock = open_pair(guest, family)
    with sock:
        sock.sendall(b"abc")
        sock.shutdown(socket.SHUT_WR)
        assert conn.read(3, ack=False) == b"abc"
        first = conn.until(lambda f: f.has(FIN))
        conn.acknowledge(ack=first.tcp.seq)  # of the data, not of the FIN
        second = conn.until(lambda f: f.has(FIN))
        assert (second.tcp.seq + len(second.payload)) & 0xFFFFFFFF == (first.tcp.seq + len(first.payload)) & 0xFFFFFFFF
        conn.ack = second.tcp.seq + len(second.payload) + 1
        conn.acknowledge()
        conn.push(b"", FIN | ACK)
        wait_until(lambda: flows(guest) == 0)


def test_fin_of_the_guest_repeated(guest: Guest, family: Family) -> None:
    conn, sock = open_pair(guest, family)
    with sock:
        conn.push(b"abc", FIN | ACK)
        conn.wait_acked()
        conn.send(FIN | ACK, b"abc", seq=conn.seq - 4)
        assert conn.next(ACK).tcp.ack == conn.seq
        conn.send(FIN | ACK, seq=conn.seq - 1)
        assert conn.next(ACK).tcp.ack == conn.seq
        conn.send(ACK, b"more", seq=conn.seq)  # what comes after a FIN is not data
        assert conn.next(ACK).tcp.ack == conn.seq
        assert read_exactly(sock, 3) == b"abc"
        assert sock.recv(1) == b""


def test_fin_behind_a_gap_waits_for_what_is_missing(guest: Guest, family: Family) -> None:
    conn, sock = open_pair(guest, family)
    with sock:
        conn.send(FIN | ACK, b"def", seq=conn.seq + 3)
        assert conn.next(ACK).tcp.ack == conn.seq
        conn.push(b"abcdef", FIN | ACK)
        conn.wait_acked()
        assert read_exactly(sock, 6) == b"abcdef"
        assert sock.recv(1) == b""


# ---- resets


def test_reset_from_the_peer(guest: Guest, family: Family) -> None:
    conn, sock = open_pair(guest, family)
    reset(sock)
    answer = conn.next(RST | ACK)
    assert answer.tcp.seq == conn.ack
    assert answer.tcp.ack == conn.seq
    assert flows(guest) == 0
    assert guest.engine.counters()["flows_reset"] == 1


def test_reset_from_the_peer_has_the_number_that_the_guest_expects(guest: Guest, family: Family) -> None:
    conn, sock = open_pair(guest, family)
    sock.sendall(b"data")
    assert conn.read(4, ack=False) == b"data"
    reset(sock)
    assert conn.until(lambda f: f.has(RST)).tcp.seq == conn.ack


def test_reset_from_the_guest(guest: Guest, family: Family) -> None:
    conn, sock = open_pair(guest, family)
    with sock:
        conn.send(RST)
        assert is_reset(sock)
        assert flows(guest) == 0
        assert conn.quiet()


def test_reset_from_the_guest_right_behind_data(guest: Guest, family: Family) -> None:
    """In one batch: the number that counts is that behind the data."""
    conn, sock = open_pair(guest, family)
    with sock:
        guest.send_all([conn.build(ACK | PSH, b"abc"), conn.build(RST, seq=conn.seq + 3)])
        wait_until(lambda: flows(guest) == 0)
        with contextlib.suppress(ConnectionResetError):
            while sock.recv(100):
                pass


def test_reset_in_the_window_is_asked_about(guest: Guest, family: Family) -> None:
    """RFC 5961, 3.2."""
    conn, sock = open_pair(guest, family)
    with sock:
        conn.send(RST, seq=conn.seq + 1)
        challenge = conn.next(ACK)
        assert (challenge.tcp.seq, challenge.tcp.ack) == (conn.ack, conn.seq)
        for seq in (conn.seq - 1, conn.seq + 0x7000_0000, conn.seq - 0x7000_0000):
            conn.send(RST, seq=seq)
        assert conn.quiet()
        conn.push(b"one")
        assert read_exactly(sock, 3) == b"one"


def test_reset_from_the_guest_during_the_handshake(guest: Guest, family: Family) -> None:
    server = Server(family)
    conn = Conn(guest, family, server.port)
    conn.send(SYN, options=conn.options())
    conn.next(SYN | ACK)
    conn.send(RST, seq=conn.seq + 1)
    with server.accept() as sock:
        assert is_reset(sock)
    assert flows(guest) == 0
    server.close()


# ---- segments that are not the next


def test_gap(guest: Guest, family: Family) -> None:
    conn, sock = open_pair(guest, family)
    with sock:
        conn.send(ACK, b"def", seq=conn.seq + 3)
        assert conn.next(ACK).tcp.ack == conn.seq
        assert guest.drops("window") == 1
        conn.push(b"abc")
        conn.wait_acked()
        conn.push(b"def")
        assert read_exactly(sock, 6) == b"abcdef"


def test_old_and_overlapping_segments(guest: Guest, family: Family) -> None:
    conn, sock = open_pair(guest, family)
    with sock:
        start = conn.seq
        conn.push(b"abcdef")
        conn.wait_acked()
        for seq, data in ((start, b"abcdef"), (start, b"abc"), (start + 3, b"def")):
            conn.send(ACK, data, seq=seq)
            assert conn.next(ACK).tcp.ack == conn.seq
        conn.send(ACK, b"defghi", seq=start + 3)
        assert conn.next(ACK).tcp.ack == (start + 9) & 0xFFFFFFFF
        conn.send(ACK, b"abcdefghijkl", seq=start)
        assert conn.next(ACK).tcp.ack == (start + 12) & 0xFFFFFFFF
        assert read_exactly(sock, 12) == b"abcdefghijkl"


def test_one_batch_of_everything(guest: Guest, family: Family) -> None:
    """Payload of consecutive segments is gathered: a gap, an overlap, another flow and a FIN in between."""
    one, sock1 = open_pair(guest, family)
    two, sock2 = open_pair(guest, family)
    with sock1, sock2:
        guest.send_all(
            [
                one.build(ACK, b"abc"),
                one.build(ACK, b"def", seq=one.seq + 3),
                one.build(ACK, b"jkl", seq=one.seq + 9),
                two.build(ACK, b"123"),
                one.build(ACK, b"efghi", seq=one.seq + 4),
                two.build(ACK, b"123"),
                two.build(ACK | FIN, b"456", seq=two.seq + 3),
                one.build(ACK | FIN, b"jklm", seq=one.seq + 9),
                one.build(ACK, b"nop", seq=one.seq + 13),
            ]
        )
        one.seq += 14
        two.seq += 7
        one.wait_acked()
        two.wait_acked()
        assert read_exactly(sock1, 13) == b"abcdefghijklm"
        assert sock1.recv(1) == b""
        assert read_exactly(sock2, 6) == b"123456"
        assert sock2.recv(1) == b""


def test_acknowledgement_of_what_was_never_sent(guest: Guest, family: Family) -> None:
    """RFC 9293, 3.10.7.4: answered, and not believed."""
    conn, sock = open_pair(guest, family)
    with sock:
        conn.acknowledge(ack=conn.ack + 1)
        answer = conn.next(ACK)
        assert (answer.tcp.seq, answer.tcp.ack) == (conn.ack, conn.seq)
        conn.acknowledge(ack=conn.ack + 0x7FFF_0000)
        conn.next(ACK)
        conn.acknowledge(ack=conn.ack - 1)  # old: nothing
        data = pattern(20000)
        sock.sendall(data)
        assert conn.read(len(data)) == data


def test_nothing_that_is_old_or_beyond_the_window_is_believed(guest: Guest, family: Family) -> None:
    """RFC 9293, 3.10.7.4: such a segment is answered, whatever it acknowledges."""
    conn, sock = open_pair(guest, family)
    with sock:
        sock.sendall(b"data")
        start = conn.ack
        assert conn.read(4, ack=False) == b"data"
        for seq in (conn.seq - 1, conn.seq - 0x7000_0000, conn.seq + 0x0200_0000, conn.seq + 0x7000_0000):
            conn.acknowledge(seq=seq, window=0)
            answer = conn.next(ACK)
            assert (answer.tcp.seq, answer.tcp.ack) == (conn.ack, conn.seq)
        guest.engine.advance(1000)
        conn.ack = start
        assert conn.read(4) == b"data"


def test_keep_alive_from_the_guest(guest: Guest, family: Family) -> None:
    conn, sock = open_pair(guest, family)
    with sock:
        for payload in (b"", b"x"):
            conn.send(ACK, payload, seq=conn.seq - 1)
            answer = conn.next(ACK)
            assert (answer.tcp.seq, answer.tcp.ack) == (conn.ack, conn.seq)
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.recv(1)


def test_segment_without_acknowledgement_is_malformed(guest: Guest, family: Family) -> None:
    conn, sock = open_pair(guest, family)
    with sock:
        conn.send(PSH, b"abc")
        assert guest.drops("malformed") == 1
        assert conn.quiet()


def test_sequence_numbers_wrap(guest: Guest, family: Family) -> None:
    server = Server(family)
    conn = Conn(guest, family, server.port)
    conn.seq = 0xFFFFFFFF - 2000
    conn.connect()
    data = pattern(10000)
    with server.accept() as sock:
        for at in range(0, len(data), 1000):
            conn.push(data[at : at + 1000])
        assert read_exactly(sock, len(data)) == data
        conn.wait_acked()
        assert conn.seq < 10000
    server.close()


def test_urgent_data_is_ordinary_data(guest: Guest, family: Family) -> None:
    """The kernel's urgent mark neither takes a byte out of the stream nor stops it."""
    conn, sock = open_pair(guest, family)
    with sock:
        guest.engine.park()  # so that all of it is there at the first look
        sock.sendall(b"abc")
        sock.send(b"d", socket.MSG_OOB)
        sock.sendall(b"efg")
        guest.engine.unpark()
        assert conn.read(7, ack=False) == b"abcdefg"
        sock.sendall(b"hi")  # peeked behind a mark that is still in the queue
        assert conn.read(2) == b"hi"
        sock.send(b"j", socket.MSG_OOB)
        sock.sendall(b"kl")
        assert conn.read(3) == b"jkl"


@once
def test_urgent_data_is_sent_again(guest: Guest, family: Family) -> None:
    conn, sock = open_pair(guest, family)
    with sock:
        sock.sendall(b"abc")
        sock.send(b"d", socket.MSG_OOB)
        sock.sendall(b"efg")
        start = conn.ack
        assert conn.read(7, ack=False) == b"abcdefg"
        conn.ack = start
        assert conn.read(7) == b"abcdefg"  # after a second
        sock.close()
        conn.read_fin()


def test_header_split_anywhere(guest: Guest, family: Family) -> None:
    """The descriptors of a chain have nothing to do with the headers in it."""
    conn, sock = open_pair(guest, family)
    with sock:
        data = pattern(101)
        whole = 12 + 14 + family.ip_size + 20 + len(data)
        for sizes in ([1] * whole, [12], [12, 14, family.ip_size, 20], [13, 13], [whole - 1], [5, 100, 7]):
            conn.push(data, sizes=sizes)
            assert read_exactly(sock, len(data)) == data


def test_options_that_make_no_sense(guest: Guest, family: Family) -> None:
    """Lengths of 0, past the end, and of the wrong size: what can be read counts, the rest does not."""
    server = Server(family)
    for raw in (b"\x02\x00\x05\xb4", b"\x02\x28\x05\xb4", b"\x02\x03\x05\x01", b"\x03\x03\xff\x01", b"\x03"):
        conn = Conn(guest, family, server.port, scale=None)
        padded = raw.ljust(-(-len(raw) // 4) * 4, b"\0")
        words = 5 + len(padded) // 4
        segment = TCP(sport=conn.own, dport=conn.port, flags=SYN, seq=conn.seq, dataofs=words)
        guest.send(guest.ip(family) / segment / Raw(padded))
        answer = conn.next(SYN | ACK)
        conn.ack = answer.tcp.seq + 1
        conn.seq += 1
        conn.acknowledge()
        with server.accept() as sock:
            sock.sendall(b"data")
            assert conn.until(lambda f: bool(f.payload)).payload == b"data"
            readable, _, _ = select.select([sock], [], [], 0)
            assert not readable
    server.close()
