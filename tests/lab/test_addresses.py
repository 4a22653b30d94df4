# SPDX-License-Identifier: GPL-2.0-or-later
"""Moves to a host that has other addresses: what goes on, what is reset, and what the guest is told."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from godwit.lab.clients import GuestSystem, addresses, routers
from godwit.lab.guest import EmbeddedGuest
from godwit.lab.netns import GATEWAY4, GATEWAY6, HOST4, HOST6, SERVER4, SERVER6, Host, wait_until
from godwit.lab.scenario import PORT, Scenario

from .moves import IDLE, RATE, begin, datagrams, saved, suspended, works_on

NATIVE = ["--migrate-version", "native"]
PROMPT = 1.0  # seconds from the commit to the guest's error
OWN = {4: HOST4, 6: HOST6}
OTHER = {4: "192.0.2.20", 6: "2001:db8:9::20"}  # host b's
ROUTER = {4: SERVER4, 6: "fe80::77"}
LENGTH = {4: 24, 6: 64}
SERVER = {4: SERVER4, 6: SERVER6}
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
SLAAC = "2001:db8::5054:ff:fe67:6477/64"  # of the guest's MAC address (RFC 4291, appendix A)
SLAAC_THERE = SLAAC.replace("2001:db8::", "2001:db8:9:0:")


def add(host: Host, version: int) -> None:
    """Give a host the address that all have at first."""
    host.ip(f"addr add {OWN[version]}/{LENGTH[version]} dev eth0" + (" nodad" if version == 6 else ""))


def remove(host: Host, version: int) -> None:
    host.ip(f"addr del {OWN[version]}/{LENGTH[version]} dev eth0")


def renumber(scenario: Scenario, *versions: int, keep: bool = False, arguments: Sequence[str] = ()) -> None:
    """Give host b addresses and routers of its own, and a back-end that has seen no others.

    ``keep``: the host has the first addresses, too. ``arguments`` are more options for the back-end.
    """
    host = scenario.network.b
    scenario.backends["b"].close()
    host.ip("neigh flush dev eth0 nud permanent")
    for version in versions:
        remove(host, version)
        host.ip(
            f"addr add {OTHER[version]}/{LENGTH[version]} dev eth0" + (" nodad" if version == 6 else ""),
            f"route replace default via {ROUTER[version]} dev eth0",
        )
        if keep:
            host.ip(
                f"addr add {OWN[version]}/{32 if version == 4 else 128} dev eth0"
                + (" preferred_lft 0 nodad" if version == 6 else "")
            )
    server = scenario.network.server
    server.ip("route replace 2001:db8:9::/64 dev eth0", "addr replace fe80::77/64 dev eth0 nodad")
    scenario.start_backend("b", *arguments)
    told = [f"IPv{one} {OTHER[one]}/{LENGTH[one]}" for one in versions]
    wait_until(lambda: all(one in scenario.backends["b"].messages() for one in told), "what the guest is told")


@contextlib.contextmanager
def connections(
    scenario: Scenario, versions: Sequence[int]
) -> Iterator[dict[int, tuple[socket.socket, socket.socket]]]:
    """Connections of the guest's, one of each IP version: its end, and the server's."""
    assert isinstance(scenario.guest, EmbeddedGuest)
    made = {}
    with contextlib.ExitStack() as stack:
        for version in versions:
            with scenario.network.server.enter():
                listening = stack.enter_context(socket.create_server((SERVER[version], 0), family=FAMILY[version]))
            with scenario.guest.space.enter():
                ours = stack.enter_context(socket.create_connection(listening.getsockname()[:2], 10.0))
            theirs = stack.enter_context(listening.accept()[0])
            theirs.settimeout(20.0)
            made[version] = ours, theirs
        yield made


def talk(ours: socket.socket, theirs: socket.socket) -> None:
    """Both ways, unharmed."""
    for here, there in ((ours, theirs), (theirs, ours)):
        data = os.urandom(200_000)
        sending = threading.Thread(target=here.sendall, args=(data,))
        sending.start()
        came = b""
        while len(came) < len(data):
            piece = there.recv(65536)
            assert piece
            came += piece
        sending.join()
        assert came == data


def reset_within(sock: socket.socket, since: float, limit: float) -> float:
    """How long after ``since`` the socket was told of a reset."""
    sock.settimeout(limit + 5)
    with pytest.raises(ConnectionResetError):
        sock.recv(1)
    took = time.monotonic() - since
    assert took < limit
    return took


def connects_anew(scenario: Scenario, version: int, source: str = "") -> str:
    """Open another connection from the guest; the address that the server sees."""
    assert isinstance(scenario.guest, EmbeddedGuest)
    with contextlib.ExitStack() as stack:
        with scenario.network.server.enter():
            listening = stack.enter_context(socket.create_server((SERVER[version], 0), family=FAMILY[version]))
        with scenario.guest.space.enter():
            bound = (source, 0) if source else None
            stack.enter_context(
                socket.create_connection(listening.getsockname()[:2], 10.0, source_address=bound),
            )
        accepted, seen = listening.accept()
        accepted.close()
        return str(seen[0])


# ---- TCP


@pytest.mark.parametrize("version", ["2", "native"])
def test_an_address_that_the_target_has_besides_its_own(version: str) -> None:
    with Scenario(godwit_arguments=["--migrate-version", version]) as scenario:
        renumber(scenario, 4, 6, keep=True)
        with connections(scenario, (4, 6)) as made:
            load = scenario.start_load(idle=IDLE, rate=RATE)
            scenario.move()
            for both in made.values():
                talk(*both)
            works_on(scenario, load)
            for one in (4, 6):
                assert connects_anew(scenario, one) == OTHER[one]


@pytest.mark.parametrize("version", ["2", "native"])
def test_an_address_that_the_target_has_not(version: str) -> None:
    """The guest is told at once, and who looks into the log what to do. New connections work at once."""
    with Scenario(godwit_arguments=["--migrate-version", version]) as scenario:
        renumber(scenario, 4, 6)
        with connections(scenario, (4, 6)) as made:
            attempt = saved(scenario)
            scenario.network.switch("b")
            attempt.switch_over()
            committed = time.monotonic()
            for ours, _ in made.values():
                reset_within(ours, committed, PROMPT)
            for one in (4, 6):
                assert connects_anew(scenario, one) == OTHER[one]
            attempt.finish()
        said = scenario.backends["b"].messages()
        assert "0 connections go on here, 2 were lost" in said
        for one in (4, 6):
            assert re.search(
                rf"1 lost, {OWN[one]} port .*: this host does not have the address {OWN[one]}: let it", said
            )
        wait_until(
            lambda: (
                "2 peers of lost connections will learn it only when they next send: this host does not have"
                in scenario.backends["b"].messages()
            ),
            "the peers to be spoken of",
        )


def test_some_addresses_are_there_and_some_are_not() -> None:
    with Scenario(godwit_arguments=NATIVE) as scenario:
        renumber(scenario, 6)
        with connections(scenario, (4, 6)) as made:
            attempt = saved(scenario)
            scenario.network.switch("b")
            attempt.switch_over()
            reset_within(made[6][0], time.monotonic(), PROMPT)
            talk(*made[4])
            attempt.finish()
        assert "1 connections go on here, 1 were lost" in scenario.backends["b"].messages()


class Prober:
    """Somebody on the network who sends segments for a connection all the time, and listens for resets."""

    def __init__(self, scenario: Scenario, version: int, source: int, port: int) -> None:
        self._version = version
        server = scenario.network.server
        raw = socket.SOCK_RAW
        with server.enter():
            self._sending = socket.socket(FAMILY[version], raw, socket.IPPROTO_TCP)
            self._hearing = socket.socket(FAMILY[version], raw, socket.IPPROTO_TCP)
        if version == 6:
            self._sending.setsockopt(socket.IPPROTO_IPV6, 7, 16)  # IPV6_CHECKSUM, where in the segment
        self._sending.bind((SERVER[version], 0))
        self._segment = self._checked(struct.pack("!HHIIBBHHH", source, port, 1, 1, 5 << 4, 0x10, 1000, 0, 0))
        self._port = source.to_bytes(2, "big")
        self._stop = threading.Event()
        self.resets = 0
        self._threads = [threading.Thread(target=work) for work in (self._send, self._hear)]
        for thread in self._threads:
            thread.start()

    def _checked(self, segment: bytes) -> bytes:
        if self._version == 6:
            return segment
        ends = socket.inet_aton(SERVER4) + socket.inet_aton(HOST4)
        whole = ends + struct.pack("!BBH", 0, 6, len(segment)) + segment
        total = sum(struct.unpack(f"!{len(whole) // 2}H", whole))
        while total >> 16:
            total = (total & 0xFFFF) + (total >> 16)
        return segment[:16] + struct.pack("!H", ~total & 0xFFFF) + segment[18:]

    def _send(self) -> None:
        while not self._stop.wait(0.0005):
            with contextlib.suppress(OSError):
                self._sending.sendto(self._segment, (OWN[self._version], 0))

    def _hear(self) -> None:
        while not self._stop.is_set():
            if select.select([self._hearing], [], [], 0.05)[0]:
                data, source = self._hearing.recvfrom(2048)
                tcp = data[(data[0] & 15) * 4 :] if self._version == 4 else data
                if source[0] == OWN[self._version] and tcp[2:4] == self._port and tcp[13] & 4:
                    self.resets += 1

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._sending.close()
        self._hearing.close()


@pytest.mark.parametrize("version", [4, 6])
def test_an_address_that_comes_later(version: int) -> None:
    """With --freebind connections wait for it, and nobody who knocks meanwhile or then is answered with a reset."""
    with Scenario(godwit_arguments=[*NATIVE, "--freebind"], ipv6=version == 6) as scenario:
        renumber(scenario, 4, 6)
        with connections(scenario, (version,)) as made:
            ours, theirs = made[version]
            load = scenario.start_load(idle=IDLE, rate=RATE)
            attempt = suspended(scenario)
            theirs.sendall(b"while nobody has it")
            attempt.transfer()
            scenario.network.switch("b")
            attempt.switch_over()
            attempt.finish()
            target = scenario.backends["b"]
            wait_until(
                lambda: f"wait for their address to come to this host: {OWN[version]}" in target.messages(),
                "the connections to wait",
            )
            prober = Prober(scenario, version, theirs.getsockname()[1], theirs.getpeername()[1])
            try:
                time.sleep(0.5)
                ours.settimeout(0.1)
                with pytest.raises(TimeoutError):
                    ours.recv(100)
                add(scenario.network.b, version)
                ours.settimeout(10)
                assert ours.recv(100) == b"while nobody has it"
                talk(ours, theirs)
                works_on(scenario, load)
                assert prober.resets == 0
            finally:
                prober.close()
        said = target.messages()
        assert f"{IDLE + 3} connections go on here, 0 were lost" in said


def test_a_helper_that_hangs_when_the_address_comes_costs_only_who_waits() -> None:
    with Scenario(godwit_arguments=[*NATIVE, "--freebind"]) as scenario:
        renumber(scenario, 6)
        with connections(scenario, (4, 6)) as made:
            attempt = saved(scenario)
            scenario.network.switch("b")
            attempt.switch_over()
            attempt.finish()
            target = scenario.backends["b"]
            wait_until(lambda: "wait for their address to come to this host" in target.messages(), "one to wait")
            target.stop_helper()
            try:
                began = time.monotonic()
                add(scenario.network.b, 6)
                while time.monotonic() < began + 2.0:
                    sent = time.monotonic()
                    talk(*made[4])
                    assert time.monotonic() - sent < 2.0
                reset_within(made[6][0], began, 15.0)
            finally:
                target.resume_helper()
            talk(*made[4])
        assert "0 connections go on here, 1 were lost" in target.messages()


@pytest.mark.parametrize("version", [4, 6])
def test_the_prober_hears_resets(version: int) -> None:
    """Who has the address, and not the connection, answers: what the test before says nobody does."""
    with Scenario() as scenario, connections(scenario, (version,)):
        prober = Prober(scenario, version, 9, 4711)
        try:
            wait_until(lambda: prober.resets > 10, "resets")
        finally:
            prober.close()


def test_a_port_that_is_forwarded_waits_too() -> None:
    """Connections from outside, to a port that the target listens on as well: others still reach that."""
    arguments = [*NATIVE, "--freebind", "--tcp-ports", str(PORT)]
    with Scenario(godwit_arguments=arguments) as scenario, contextlib.ExitStack() as stack:
        assert isinstance(scenario.guest, EmbeddedGuest)
        renumber(scenario, 4)
        with scenario.guest.space.enter():
            listening = stack.enter_context(socket.create_server(("", PORT)))
        with scenario.network.server.enter():
            theirs = stack.enter_context(socket.create_connection((HOST4, PORT), 10))
        ours = stack.enter_context(listening.accept()[0])
        ours.settimeout(10)
        attempt = saved(scenario)
        scenario.network.switch("b")
        attempt.switch_over()
        attempt.finish()
        wait_until(lambda: "wait for their address" in scenario.backends["b"].messages(), "the connection to wait")
        with scenario.network.server.enter():
            another = stack.enter_context(socket.create_connection((OTHER[4], PORT), 10))
        accepted = stack.enter_context(listening.accept()[0])
        talk(another, accepted)
        prober = Prober(scenario, 4, theirs.getsockname()[1], PORT)
        try:
            add(scenario.network.b, 4)
            talk(ours, theirs)
            assert prober.resets == 0
        finally:
            prober.close()
        with scenario.network.server.enter():
            stack.enter_context(socket.create_connection((HOST4, PORT), 10))
        listening.settimeout(10)
        listening.accept()[0].close()


@pytest.mark.parametrize("version", ["2", "native"])
def test_a_guest_that_moves_on_before_its_address_has_come(version: str) -> None:
    """What waits goes along, and nobody has seen anything of it in between."""
    with Scenario(godwit_arguments=["--migrate-version", version, "--freebind"]) as scenario:
        renumber(scenario, 4)
        with connections(scenario, (4,)) as made:
            ours, theirs = made[4]
            ours.sendall(b"on the way")
            ours.setblocking(False)
            attempt = suspended(scenario)
            theirs.sendall(b"and back")
            attempt.transfer()
            scenario.network.switch("b")
            attempt.switch_over()
            attempt.finish()
            wait_until(lambda: "wait for their address" in scenario.backends["b"].messages(), "it to wait")
            back = scenario.guest
            assert isinstance(back, EmbeddedGuest)
            second = back.migration(scenario.backends["a"].socket)
            second.run(lambda: scenario.network.switch("a"))
            second.finish()
            ours.settimeout(10)
            assert theirs.recv(100) == b"on the way"
            assert ours.recv(100) == b"and back"
            talk(ours, theirs)


def test_a_source_that_goes_on_has_waited_for_nothing() -> None:
    """A load that nobody commits: the target keeps no port, and the source goes on."""
    with Scenario(godwit_arguments=[*NATIVE, "--freebind"]) as scenario:
        renumber(scenario, 4)
        load = scenario.start_load(idle=IDLE, rate=RATE)
        attempt = saved(scenario)
        kept = scenario.network.b.run("ss", "-Htln", "src", OWN[4]).stdout
        assert OWN[4] in kept
        attempt.cancel()
        works_on(scenario, load)
        wait_until(lambda: not scenario.network.b.run("ss", "-Htln", "src", OWN[4]).stdout, "the ports to be let go")


# ---- UDP


@pytest.mark.parametrize("version", [4, 6])
def test_a_udp_port_leaves_from_the_address_of_the_host(version: int) -> None:
    """Its number stays; the peer sees who it is now, and its answers come."""
    with (
        Scenario(godwit_arguments=NATIVE, ipv6=version == 6) as scenario,
        datagrams(scenario, ipv6=version == 6) as sockets,
    ):
        renumber(scenario, 4, 6)
        sockets.asking.sendto(b"before", (SERVER[version], PORT))
        _, before = sockets.server.recvfrom(100)
        attempt = begin(scenario)
        attempt.run(lambda: scenario.network.switch("b"))
        attempt.finish()
        sockets.asking.sendto(b"after", (SERVER[version], PORT))
        data, after = sockets.server.recvfrom(100)
        assert (data, before[0], after[0], after[1]) == (b"after", OWN[version], OTHER[version], before[1])
        sockets.server.sendto(b"answer", after)
        assert sockets.asking.recv(100) == b"answer"


@pytest.mark.parametrize("version", [4, 6])
def test_a_forwarded_udp_port_answers_from_the_address_of_the_host(version: int) -> None:
    """To whom it had spoken from another."""
    arguments = [*NATIVE, "--udp-ports", str(PORT)]
    with (
        Scenario(godwit_arguments=arguments, ipv6=version == 6) as scenario,
        datagrams(scenario, ipv6=version == 6) as sockets,
    ):
        renumber(scenario, 4, 6)
        sockets.client.sendto(b"question", (OWN[version], PORT))
        _, client = sockets.service.recvfrom(100)
        sockets.service.sendto(b"answer", client)
        assert sockets.client.recvfrom(100)[1][0] == OWN[version]
        moved(scenario)
        sockets.service.sendto(b"another", client)
        data, source = sockets.client.recvfrom(100)
        assert (data, source[:2]) == (b"another", (OTHER[version], PORT))


@pytest.mark.parametrize("freebind", [False, True])
@pytest.mark.parametrize("version", [4, 6])
def test_a_udp_port_of_one_address(version: int, freebind: bool) -> None:
    """With --freebind it keeps the address, which it has to itself when it comes; else that is said."""
    with Scenario(
        godwit_arguments=[*NATIVE, "--outbound", OWN[version], *(["--freebind"] if freebind else [])],
        ipv6=version == 6,
    ) as scenario:
        renumber(scenario, 4, 6, arguments=[] if freebind else ["--outbound", OTHER[version]])
        with datagrams(scenario, ipv6=version == 6) as sockets:
            sockets.asking.sendto(b"before", (SERVER[version], PORT))
            _, before = sockets.server.recvfrom(100)
            attempt = begin(scenario)
            attempt.run(lambda: scenario.network.switch("b"))
            attempt.finish()
            if freebind:
                add(scenario.network.b, version)
            expected = OWN[version] if freebind else OTHER[version]

            def comes_from() -> str:
                sockets.asking.sendto(b"after", (SERVER[version], PORT))
                sockets.server.settimeout(0.2)
                with contextlib.suppress(TimeoutError):
                    data, after = sockets.server.recvfrom(100)
                    assert (data, after[1]) == (b"after", before[1])
                    return str(after[0])
                return ""

            wait_until(lambda: comes_from() == expected, f"a datagram from {expected}")
        said = "leave from elsewhere than before" in scenario.backends["b"].messages()
        assert said is not freebind


# ---- what the guest is told


def unconfigured(path: str) -> EmbeddedGuest:
    """A guest that finds out what its network is."""
    guest = EmbeddedGuest()
    try:
        guest.space.sysctl("net/ipv6/conf/eth0/accept_ra", "1")
        guest.connect(path)
        guest.space.ip("link set eth0 up")
        wait_until(lambda: SLAAC in addresses(guest.space), "the guest to have an address")
    except BaseException:
        guest.close()
        raise
    return guest


def moved(scenario: Scenario) -> EmbeddedGuest:
    """Move the guest to host b; returns it."""
    assert isinstance(scenario.guest, EmbeddedGuest)
    attempt = begin(scenario)
    attempt.run(lambda: scenario.network.switch("b"))
    attempt.finish()
    return scenario.guest


def test_the_guest_has_the_network_of_the_target() -> None:
    """A new prefix and a new router, those of the source are taken back; and with a connection from the new address."""
    with Scenario(godwit_arguments=NATIVE, make_guest=unconfigured) as scenario:
        renumber(scenario, 4, 6)
        guest = moved(scenario)
        wait_until(lambda: addresses(guest.space, deprecated=False) == {SLAAC_THERE}, "the new address alone")
        assert addresses(guest.space, deprecated=True) == {SLAAC}
        wait_until(lambda: routers(guest.space) == {ROUTER[6]}, "the new router alone")
        assert connects_anew(scenario, 6, SLAAC_THERE.partition("/")[0]) == OTHER[6]


def test_of_version_2_the_target_does_not_know_what_the_guest_was_told() -> None:
    with Scenario(make_guest=unconfigured) as scenario:
        renumber(scenario, 4, 6)
        guest = moved(scenario)
        wait_until(lambda: addresses(guest.space, deprecated=False) == {SLAAC, SLAAC_THERE}, "the new address")
        assert routers(guest.space) == {GATEWAY6, ROUTER[6]}
        assert connects_anew(scenario, 6) == OTHER[6]


def test_a_target_without_ipv6_takes_it_back() -> None:
    with Scenario(godwit_arguments=NATIVE, make_guest=unconfigured) as scenario:
        scenario.backends["b"].close()
        scenario.start_backend("b", "--ipv4-only")
        guest = moved(scenario)
        wait_until(lambda: addresses(guest.space, deprecated=True) == {SLAAC}, "the address to be deprecated")
        wait_until(lambda: not routers(guest.space), "the router to be gone")


def test_there_and_back_again() -> None:
    """What holds again is not taken back any more."""
    with Scenario(godwit_arguments=NATIVE, make_guest=unconfigured) as scenario:
        renumber(scenario, 4, 6)
        guest = moved(scenario)
        wait_until(lambda: addresses(guest.space, deprecated=True) == {SLAAC}, "the old address to be deprecated")
        back = guest.migration(scenario.backends["a"].socket)
        back.run(lambda: scenario.network.switch("a"))
        back.finish()
        wait_until(lambda: addresses(guest.space, deprecated=False) == {SLAAC}, "the first address alone")
        assert addresses(guest.space, deprecated=True) == {SLAAC_THERE}
        wait_until(lambda: routers(guest.space) == {GATEWAY6}, "the first router alone")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Where a guest's programs have their files."""
    tmp_path.chmod(0o755)
    folder = tmp_path / "guest"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("version", ["2", "native"])
def test_udhcpc_has_the_targets_address_when_it_renews(home: Path, version: str) -> None:
    """A renewal names the server that it knows, and goes to that one: version 2 does as well."""
    with Scenario(godwit_arguments=["--migrate-version", version], make_guest=unconfigured) as scenario:
        assert isinstance(scenario.guest, EmbeddedGuest)
        space = scenario.guest.space
        system = GuestSystem(space, str(home))
        client = system.start_udhcpc()
        wait_until(lambda: routers(space) == {GATEWAY4, GATEWAY6}, "a lease")
        renumber(scenario, 4)
        guest = moved(scenario)
        assert connects_anew(scenario, 4, HOST4) == OTHER[4]  # it is online until then
        os.kill(client.pid, signal.SIGUSR1)
        wait_until(lambda: f"{OTHER[4]}/24" in addresses(guest.space), "the address of the target")
        wait_until(lambda: ROUTER[4] in routers(guest.space), "its router")
        assert f"{HOST4}/24" not in addresses(guest.space)
        assert connects_anew(scenario, 4) == OTHER[4]


def test_networkd_forgets_name_servers_of_elsewhere(home: Path) -> None:
    """They and the search list are of the target alone; over IPv6 at once, without being asked."""
    there = ["--dns", "2001:db8::a", "--search", "a.example"]
    here = ["--dns", "2001:db8::b", "--search", "b.example"]
    arguments = [*NATIVE, "--no-dhcp", "--no-dhcpv6"]
    with Scenario(godwit_arguments=arguments, make_guest=unconfigured) as scenario:
        scenario.backends["a"].close()
        scenario.start_backend("a", *there)
        guest = scenario.guest
        assert isinstance(guest, EmbeddedGuest)
        guest.connect(scenario.backends["a"].socket)
        system = GuestSystem(guest.space, str(home))
        system.start_networkd()
        wait_until(lambda: system.networkd().get("DNS") == ["2001:db8::a"], "the first name server", 20)
        renumber(scenario, 6, arguments=here)
        moved(scenario)
        wait_until(lambda: system.networkd().get("DNS") == ["2001:db8::b"], "the second one alone", 20)
        wait_until(lambda: system.networkd().get("DOMAINS") == ["b.example"], "its domain alone", 20)
