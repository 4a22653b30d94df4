# SPDX-License-Identifier: GPL-2.0-or-later
"""The SPEC of port forwards, and the sockets opened for it."""

from __future__ import annotations

import os
import re
import resource
import socket
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from godwit.dataplane.sockstate import ephemeral_ports
from godwit.net.forward import (
    Forward,
    ForwardError,
    Forwards,
    Listener,
    Place,
    open_listeners,
    parse_forwards,
    share,
)

IPAddress = IPv4Address | IPv6Address

EPHEMERAL = (32768, 60999)
V4 = ip_address("192.0.2.1")
V6 = ip_address("2001:db8::1")
INNER = ip_address("10.0.2.15")


def parse(*specs: str) -> list[Forward]:
    return list(parse_forwards(specs, ephemeral=EPHEMERAL).ranges)


def weak(first: int, last: int, place: Place | None = None, to: IPAddress | None = None) -> Forward:
    return Forward(first, last, first, place or Place(), to, True)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("none", []),
        ("22", [Forward(22, 22, 22)]),
        ("1", [Forward(1, 1, 1)]),
        ("65535", [Forward(65535, 65535, 65535)]),
        ("22:2222", [Forward(22, 22, 2222)]),
        ("22,80", [Forward(22, 22, 22), Forward(80, 80, 80)]),
        ("22-80", [Forward(22, 80, 22)]),
        ("22-80:32-90", [Forward(22, 80, 32)]),
        ("192.0.2.1/22", [Forward(22, 22, 22, Place(V4))]),
        ("192.0.2.1%eth0/22", [Forward(22, 22, 22, Place(V4, "eth0"))]),
        ("%eth0/22,23:24", [Forward(22, 22, 22, Place(None, "eth0")), Forward(23, 23, 24, Place(None, "eth0"))]),
        ("2001:db8::1/22", [Forward(22, 22, 22, Place(V6))]),
        ("[2001:db8::1]/22", [Forward(22, 22, 22, Place(V6))]),
        ("[2001:db8::1]%eth0/22", [Forward(22, 22, 22, Place(V6, "eth0"))]),
        ("1:2:3:4:5:6:7:8/22", [Forward(22, 22, 22, Place(ip_address("1:2:3:4:5:6:7:8")))]),
        ("::1/22", [Forward(22, 22, 22, Place(ip_address("::1")))]),
        ("2000-5000,~3000-3010", [Forward(2000, 2999, 2000), Forward(3011, 5000, 3011)]),
        ("2000-5000:12000-15000,~2000,~5000", [Forward(2001, 4999, 12001)]),
        ("20-30,~25,~24-26,~10-20", [Forward(21, 23, 21), Forward(27, 30, 27)]),
        ("40000", [Forward(40000, 40000, 40000)]),  # ephemeral ports can be named
        ("all", [weak(1, 32767), weak(61000, 65535)]),
        ("192.0.2.1/all", [weak(1, 32767, Place(V4)), weak(61000, 65535, Place(V4))]),
        ("%eth0/all", [weak(1, 32767, Place(None, "eth0")), weak(61000, 65535, Place(None, "eth0"))]),
        ("~20000-20010", [weak(1, 19999), weak(20011, 32767), weak(61000, 65535)]),
        ("all,~20000-20010", [weak(1, 19999), weak(20011, 32767), weak(61000, 65535)]),
        ("~22,~1-10,~61000-65535", [weak(11, 21), weak(23, 32767)]),
        ("80:10.0.2.15/8080", [Forward(80, 80, 8080, Place(), INNER)]),
        ("80-81,90:10.0.2.15/8080", [Forward(80, 81, 80), Forward(90, 90, 8080, Place(), INNER)]),
        ("192.0.2.1/80-81:10.0.2.15/90-91", [Forward(80, 81, 90, Place(V4), INNER)]),
        ("80:[2001:db8::1]/8080", [Forward(80, 80, 8080, Place(), V6)]),
        ("2001:db8::1%br-lan.7/80:[2001:db8::1]/8080", [Forward(80, 80, 8080, Place(V6, "br-lan.7"), V6)]),
        ("80:10.0.2.15", [Forward(80, 80, 80, Place(), INNER)]),
        ("80-82:10.0.2.15,90", [Forward(80, 82, 80, Place(), INNER), Forward(90, 90, 90)]),
        ("80:2001:db8::1", [Forward(80, 80, 80, Place(), V6)]),
        ("80:[2001:db8::1]", [Forward(80, 80, 80, Place(), V6)]),
        ("80:[fe80::1]/81", [Forward(80, 80, 81, Place(), ip_address("fe80::1"))]),
        ("80:2001:db8::1/81", [Forward(81, 81, 81, Place(ip_address("80:2001:db8::1")))]),  # for passt, too
        ("80:0.0.0.0", [Forward(80, 80, 80)]),
        ("127.0.0.6/80:[::]/81", [Forward(80, 80, 81, Place(ip_address("127.0.0.6")))]),
        ("all:10.0.2.15", [weak(1, 32767, to=INNER), weak(61000, 65535, to=INNER)]),
        ("127.0.0.6/all:10.0.2.15,~1-65000", [weak(65001, 65535, Place(ip_address("127.0.0.6")), INNER)]),
        ("all,22:2222,~1-65000", [weak(65001, 65535)]),
        ("~1-65000,all,22", [weak(65001, 65535)]),
        ("70-80:2070-2080,~70-79,all", [Forward(80, 80, 2080), weak(1, 69), weak(80, 32767), weak(61000, 65535)]),
        ("/22", [Forward(22, 22, 22)]),
    ],
)
def test_good(spec: str, expected: list[Forward]) -> None:
    assert parse(spec) == expected


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("", "a port is missing"),
        (",", "a port is missing"),
        ("22,", "a port is missing"),
        ("22,,23", "a port is missing"),
        ("~", "a port is missing"),
        ("22:", "a port is missing"),
        (":22", "a port is missing"),
        ("0", "port 0 is out of range"),
        ("65536", "port 65536 is out of range"),
        ("1-65536", "port 65536 is out of range"),
        ("22:0", "port 0 is out of range"),
        ("123456", "'123456' is not a port"),
        ("ssh", "'ssh' is not a port"),
        ("22 ", "'22 ' is not a port"),
        ("-22", "'-22' is not a port"),
        ("22-", "'22-' is not a port"),
        ("+22", "'+22' is not a port"),
        ("\u0662", "is not a port"),
        ("30-20", "the range 30-20 ends before it begins"),
        ("22-80:32-91", "22-80 and 32-91 differ in length: 59 and 60 ports"),
        ("22-80:32", "22-80 and 32 differ in length: 59 and 1 ports"),
        ("22,22", "port 22 is forwarded twice"),
        ("20-30,25:80", "port 25 is forwarded twice"),
        ("~22:23", "the excluded 22 cannot have a target"),
        ("22,~22", "leave nothing to forward"),
        ("~1-65535", "leave nothing to forward"),
        ("127.0.0.1:2222:22", "the host's address stands before a slash: 127.0.0.1/2222:22"),
        ("[::1]:2222:22", "the host's address stands before a slash: [::1]/2222:22"),
        ("127.0.0.1:80", "the host's address stands before a slash: 127.0.0.1/80"),
        ("3022-3030/3025", "the guest's ports stand behind a colon: 2222:22"),
        ("22/tcp", "before a slash stands an address of the host"),
        ("auto", "is not for a guest"),
        ("22,auto", "is not for a guest"),
        ("192.0.2.1/none", "'none' stands alone"),
        ("22,none", "'none' stands alone"),
        ("~all", "'all' is not a port"),
        ("all:80", "'80' is not an IP address"),
        ("all:10.0.2.15/80", "'10.0.2.15/80' is not an IP address"),
        ("192.0.2.1/80:2001:db8::1", "192.0.2.1 and 2001:db8::1 are of different IP versions"),
        ("[2001:db8::1]/80:10.0.2.15/80", "2001:db8::1 and 10.0.2.15 are of different IP versions"),
        ("80:224.0.0.1/80", "224.0.0.1 is a multicast address"),
        ("80:[fe80::1%eth0]/80", "names an interface"),
        ("%/22", "'' is not the name of an interface"),
        ("%0123456789abcdef/22", "'0123456789abcdef' is not the name of an interface"),
        ("192.0.2.256/22", "'192.0.2.256' is not an IP address"),
        ("localhost/22", "'localhost' is not an IP address"),
        ("224.0.0.1/22", "224.0.0.1 is a multicast address"),
        ("192.0.2.1/", "a port is missing"),
        ("80:10.0.2.300/80", "'10.0.2.300' is not an IP address"),
        ("[::1/22", "'[::1' is not an IP address"),
    ],
)
def test_bad(spec: str, reason: str) -> None:
    with pytest.raises(ForwardError, match=re.escape(reason)) as caught:
        parse(spec)
    assert repr(spec) in str(caught.value)


def test_several_specs_add_up_and_the_strict_ones_come_first() -> None:
    assert parse("all", "22:2222", "%eth0/23") == [
        Forward(22, 22, 2222),
        Forward(23, 23, 23, Place(None, "eth0")),
        weak(1, 32767),
        weak(61000, 65535),
    ]
    with pytest.raises(ForwardError, match="port 22 is forwarded twice"):
        parse("22", "20-30")
    with pytest.raises(ForwardError, match="'none' takes back nothing"):
        parse("22", "none")
    assert parse("none", "22") == [Forward(22, 22, 22)]


@pytest.mark.parametrize(
    ("first", "second", "twice"),
    [
        ("22", "22", True),
        ("22", "192.0.2.1/22", True),
        ("0.0.0.0/22", "192.0.2.1/22", True),
        ("22", "%eth0/22", True),
        ("192.0.2.1/22", "%eth0/22", True),
        ("22", "22:10.0.2.15", True),
        ("192.0.2.1/22", "192.0.2.2/22", False),
        ("192.0.2.1%eth0/22", "192.0.2.1%eth1/22", False),
        ("0.0.0.0/22", "::/22", False),
        ("22:10.0.2.15", "22:2001:db8::1", False),
        ("22", "all", False),
        ("all", "all", False),
    ],
)
def test_the_host_cannot_listen_twice_on_a_port(first: str, second: str, twice: bool) -> None:
    if not twice:
        assert len(parse(first, second)) > 1
        return
    with pytest.raises(ForwardError, match="port 22 is forwarded twice"):
        parse(first, second)


def test_target_and_count() -> None:
    forwards = parse_forwards(["22:2222", "100-200:300-400"])
    assert (forwards.target(22), forwards.target(150), forwards.target(23)) == (2222, 350, None)
    assert forwards.ports == 102
    assert forwards
    assert not Forwards()
    assert str(Forwards()) == "none"
    lo = Forward(1, 2, 1, Place(None, "lo"), IPv4Address("10.0.0.1"))
    here = Forward(10, 20, 110, Place(IPv6Address("::1"), "eth0"))
    some = Forwards((Forward(22, 22, 22), Forward(3333, 3333, 22), here, lo))
    assert str(some) == "22,3333:22,::1%eth0/10-20:110-120,%lo/1-2 to 10.0.0.1"


def test_all_is_a_few_ranges_whatever_is_excluded() -> None:
    assert len(parse("all")) == 2


def test_the_ephemeral_range_is_the_hosts() -> None:
    first, last = ephemeral_ports()
    assert 0 < first < last <= 65535
    assert parse_forwards("all").ranges[0].last == first - 1


@given(st.text(alphabet="0123456789,-:~/%[].allnoe ", max_size=30))
def test_any_text_parses_or_says_why(text: str) -> None:
    try:
        forwards = parse_forwards(text, ephemeral=EPHEMERAL)
    except ForwardError:
        return
    for one in forwards.ranges:
        assert 1 <= one.first <= one.last <= 65535
        assert 1 <= one.to_first <= one.to_first + one.last - one.first <= 65535


@pytest.fixture
def listeners() -> Iterator[list[Listener]]:
    found: list[Listener] = []
    yield found
    for one in found:
        os.close(one.fd)


def free_port(family: socket.AddressFamily = socket.AF_INET6, kind: socket.SocketKind = socket.SOCK_STREAM) -> int:
    with socket.socket(family, kind) as sock:
        sock.bind(("", 0))
        port: int = sock.getsockname()[1]
        return port


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_one_socket_takes_both_families(listeners: list[Listener]) -> None:
    port = free_port()
    listeners += open_listeners(parse_forwards(f"{port}:80"))
    [one] = listeners
    assert (one.port, one.to_port, one.to_address) == (port, 80, None)
    assert not os.get_blocking(one.fd)
    assert not os.get_inheritable(one.fd)
    for address in ("127.0.0.1", "::1"):
        socket.create_connection((address, port), timeout=5).close()


@pytest.mark.parametrize(
    ("ipv4", "ipv6", "good", "bad"), [(True, False, "127.0.0.1", "::1"), (False, True, "::1", "127.0.0.1")]
)
def test_one_family_alone(listeners: list[Listener], ipv4: bool, ipv6: bool, good: str, bad: str) -> None:
    port = free_port()
    listeners += open_listeners(parse_forwards(str(port)), ipv4=ipv4, ipv6=ipv6)
    socket.create_connection((good, port), timeout=5).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((bad, port), timeout=5)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_an_address_and_an_interface(listeners: list[Listener], address: str) -> None:
    port = free_port()
    listeners += open_listeners(parse_forwards(f"{address}%lo/{port}-{port}"))
    socket.create_connection((address, port), timeout=5).close()
    with socket.socket(fileno=os.dup(listeners[0].fd)) as sock:
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0") == b"lo"


@pytest.mark.parametrize(("address", "good", "bad"), [("10.0.2.15", "127.0.0.1", "::1"), (V6, "::1", "127.0.0.1")])
def test_a_targets_ip_version_is_listened_for(listeners: list[Listener], address: str, good: str, bad: str) -> None:
    port = free_port()
    listeners += open_listeners(parse_forwards(f"{port}:[{address}]/80"))
    assert listeners[0].to_address == ip_address(address)
    socket.create_connection((good, port), timeout=5).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((bad, port), timeout=5)


@pytest.mark.parametrize("address", ["192.0.2.199", "2001:db8::199"])
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_freebind_listens_on_an_address_that_may_come(
    listeners: list[Listener], address: str, kind: socket.SocketKind
) -> None:
    forwards = parse_forwards(f"{address}/4444")
    with pytest.raises(ForwardError, match="--freebind listens all the same"):
        open_listeners(forwards, kind=kind)
    listeners += open_listeners(forwards, kind=kind, freebind=True)
    with socket.socket(fileno=os.dup(listeners[0].fd)) as sock:
        assert sock.getsockname()[:2] == (address, 4444)


def test_udp_is_bound(listeners: list[Listener]) -> None:
    port = free_port(kind=socket.SOCK_DGRAM)
    listeners += open_listeners(parse_forwards(f"127.0.0.1/{port}"), kind=socket.SOCK_DGRAM)
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
        socket.socket(fileno=os.dup(listeners[0].fd)) as receiver,
    ):
        sender.sendto(b"hello", ("127.0.0.1", port))
        assert receiver.recv(10) == b"hello"


def test_a_port_taken_is_an_error_that_leaves_nothing_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        before = descriptors()
        with pytest.raises(ForwardError, match=rf"cannot listen on 127.0.0.1 port {port}: .*another program has it"):
            open_listeners(parse_forwards(f"127.0.0.1/{free_port()},{port}"))
        assert descriptors() == before


def test_in_all_a_port_taken_is_passed_over(listeners: list[Listener]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        near = Forward(
            max(1, port - 2), min(65535, port + 2), max(1, port - 2), Place(ip_address("127.0.0.1")), None, True
        )
        listeners += open_listeners(Forwards((near,)))
        assert port not in [one.port for one in listeners]
        assert listeners
        only = near._replace(first=port, last=port, to_first=port)
        with pytest.raises(ForwardError, match="not one can be listened on"):
            open_listeners(Forwards((only,)))


@pytest.mark.parametrize(
    ("spec", "advice"),
    [
        ("192.0.2.199/4444", "does not have this address"),
        ("fe80::1/4444", "a link-local address needs its interface"),
        ("%nosuchif0/4444", "there is no such interface"),
    ],
)
def test_the_reason_says_what_to_do(spec: str, advice: str) -> None:
    with pytest.raises(ForwardError, match=advice):
        open_listeners(parse_forwards(spec))


def test_too_many_ports_for_the_limit_of_open_files() -> None:
    before, before_fds = resource.getrlimit(resource.RLIMIT_NOFILE), descriptors()
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        with pytest.raises(
            ForwardError, match=r"each of the 300 ports .* takes one, and the limit \(ulimit -n\) is 256"
        ):
            open_listeners(parse_forwards("127.0.0.9/50000-50299", ephemeral=EPHEMERAL))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert descriptors() == before_fds


def test_of_all_ports_so_many_are_opened_as_may_be() -> None:
    """The lowest; those that must be opened are, whatever the number."""
    before = descriptors()
    forwards = parse_forwards(["127.0.0.1/all", "127.0.0.2/50000-50009"], ephemeral=(20000, 60999))
    found = open_listeners(forwards, most=110)
    ports = [one.port for one in found]
    assert (len(found), ports[:10]) == (110, list(range(50000, 50010)))
    assert ports[10:] == sorted(ports[10:])
    low = [one.first for one in forwards.ranges if one.weak]
    assert low[0] <= ports[10] < ports[-1] < 20000
    assert found.left_out + ports[-1] == 19999 + 65536 - 61000
    assert descriptors() == before + 110
    found.close()
    found.close()
    assert descriptors() == before
    with pytest.raises(ForwardError, match="port 50000"), socket.create_server(("127.0.0.2", 50000)):
        open_listeners(forwards, most=1)
    assert descriptors() == before


def test_all_ports_do_with_the_descriptors_that_there_are() -> None:
    before, before_fds = resource.getrlimit(resource.RLIMIT_NOFILE), descriptors()
    limit = before_fds + 250  # other tests have left some
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        found = open_listeners(parse_forwards("127.0.0.1/all", ephemeral=EPHEMERAL))
        assert 200 < len(found) <= limit
        assert found.left_out > 30000
        found.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert descriptors() == before_fds


@pytest.mark.parametrize(
    ("tcp", "udp", "expected"), [("all", "all", 500), ("all", "none", 1000), ("none", "all", 500), ("all", "1-9", 991)]
)
def test_two_protocols_share_the_descriptors(tcp: str, udp: str, expected: int) -> None:
    assert share(parse_forwards(tcp), parse_forwards(udp), 1000) == expected


def test_an_address_of_a_family_that_is_off() -> None:
    with pytest.raises(ForwardError, match=r"port 4444: IPv4 is off, and 127\.0\.0\.1 needs it"):
        open_listeners(parse_forwards("127.0.0.1/4444"), ipv4=False)
    with pytest.raises(ForwardError, match="port 4444: IPv6 is off, and 2001:db8::1 needs it"):
        open_listeners(parse_forwards("4444:2001:db8::1"), ipv6=False)


def test_a_restart_does_not_meet_its_own_old_connections(listeners: list[Listener]) -> None:
    port = free_port()
    listeners += open_listeners(parse_forwards(str(port)))
    client = socket.create_connection(("127.0.0.1", port), timeout=5)
    with socket.socket(fileno=os.dup(listeners[0].fd)) as server:
        server.setblocking(True)
        accepted, _ = server.accept()
    accepted.close()  # our side first: it is the one in TIME_WAIT
    client.recv(1)
    client.close()
    os.close(listeners[0].fd)
    listeners[:] = open_listeners(parse_forwards(str(port)))
    assert listeners
