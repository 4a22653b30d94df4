# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests that set up their network with real programs get the host's, and follow it.

The clients are those that distributions use: busybox's udhcpc, ISC's dhclient,
systemd-networkd, and the kernel for router advertisements.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from godwit.lab.backend import Backend
from godwit.lab.clients import GuestSystem, addresses, mtu, routers, with_resolv_conf
from godwit.lab.guest import EmbeddedGuest
from godwit.lab.netns import GATEWAY4, GATEWAY6, HOST4, HOST6, SERVER4, Namespace, Network, wait_until

from .watching import status

MTU = 1400
DNS4, DNS6 = "192.0.2.53", "2001:db8::53"
SLAAC = "2001:db8::5054:ff:fe67:6477/64"  # of the guest's MAC address (RFC 4291, appendix A)
PORT = 7777


class Lab:
    """A host, a back-end that sees its resolv.conf, and a guest with nothing set up."""

    def __init__(self, folder: Path, *arguments: str, online: bool = True) -> None:
        folder.chmod(0o755)
        self.folder = folder
        self.resolv = folder / "resolv.conf"
        self.resolv.write_text(f"nameserver {DNS4}\nnameserver {DNS6}\nsearch example.org lab.example.net\n")
        self.network = Network(mtu=MTU)
        self.host = self.network.a
        if not online:
            self.offline()
        wrapper = with_resolv_conf(str(self.resolv))
        self.backend = Backend(self.host, str(folder), helper=None, arguments=arguments, wrapper=wrapper)
        self.guest = EmbeddedGuest()
        self.guest.space.sysctl("net/ipv6/conf/eth0/accept_ra", "1")
        self.guest.connect(self.backend.socket)
        home = folder / "guest"
        home.mkdir()
        self.system = GuestSystem(self.guest.space, str(home))
        self._servers: list[socket.socket] = []

    def up(self) -> None:
        """The guest's interface, which has the kernel look for routers."""
        self.guest.space.ip("link set eth0 up")

    def offline(self) -> None:
        """Take the host's addresses, and its routes with them."""
        self.host.ip("addr flush dev eth0 scope global", "route del default via fe80::1 dev eth0")

    def online(self) -> None:
        """Give the host its addresses and routes back."""
        self.host.ip(
            f"addr add {HOST4}/24 dev eth0",
            f"addr add {HOST6}/64 dev eth0 nodad",
            f"route add default via {GATEWAY4}",
            f"route add default via {GATEWAY6} dev eth0",
        )

    def expect(self, what: str, condition: Callable[[], bool], timeout: float = 15.0) -> None:
        """Wait; say what client and back-end have said if in vain."""
        try:
            wait_until(condition, what, timeout, 0.05)
        except BaseException as error:
            pytest.fail(
                f"{error}\nguest: {addresses(self.guest.space)} {routers(self.guest.space)}"
                f"\n{self.system.output()}\n{self.backend.messages()}"
            )

    def has(self, *expected: str, router: str | None = None) -> None:
        """Wait until the guest has these addresses and no others (deprecated ones aside), and this router."""
        self.expect(
            f"the addresses {expected}",
            lambda: (
                addresses(self.guest.space, deprecated=False) == set(expected)
                and (router is None or router in routers(self.guest.space))
            ),
        )

    def seen(self, what: str, address: str) -> None:
        """Wait until the back-end knows that the guest has this address."""
        self.expect(
            f"{address} to be known",
            lambda: status(self.backend)["guest"]["seen"][what] == address,
        )

    def serve(self, address: str, space: Namespace | None = None) -> None:
        """Have a server that closes each connection, on the network's server or in another namespace."""
        with (space or self.network.server).enter():
            server = socket.create_server((address, PORT))
        self._servers.append(server)
        server.settimeout(0.2)

        def accept() -> None:
            while server.fileno() >= 0:
                try:
                    server.accept()[0].close()
                except TimeoutError:
                    continue
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()

    def reaches(self, address: str) -> bool:
        """Whether the guest can connect there."""
        with self.guest.space.enter(), socket.socket() as sock:
            sock.settimeout(3)
            return sock.connect_ex((address, PORT)) == 0

    def close(self) -> None:
        for server in self._servers:
            server.close()
        self.guest.close()
        self.backend.close()
        self.network.close()


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path, "--hostname", "vm1", "--fqdn", "vm1.example.org")
    yield made
    made.close()


def test_udhcpc_and_a_slaac_kernel(lab: Lab) -> None:
    lab.up()
    lab.system.start_udhcpc()
    lab.has(f"{HOST4}/24", SLAAC, router=GATEWAY4)
    lab.expect("both routers", lambda: routers(lab.guest.space) == {GATEWAY4, GATEWAY6})
    lab.expect("name servers", lambda: lab.system.resolv_conf() == {"domain": ["example.org"], "nameserver": [DNS4]})
    assert mtu(lab.guest.space) == MTU
    lab.serve(SERVER4)
    assert lab.reaches(SERVER4)


def test_dhclient(lab: Lab) -> None:
    lab.up()
    lab.system.start_dhclient(4)
    lab.has(f"{HOST4}/24", SLAAC, router=GATEWAY4)
    lab.expect("the name", lambda: lab.system.hostname() == "vm1")
    lab.expect("name servers", lambda: "nameserver" in lab.system.resolv_conf())
    assert lab.system.resolv_conf() == {
        "domain": ["example.org"],
        "search": ["example.org.", "lab.example.net."],
        "nameserver": [DNS4],
    }
    assert mtu(lab.guest.space) == MTU


def test_dhclient_for_ipv6(lab: Lab) -> None:
    lab.up()
    lab.has(SLAAC)
    lab.system.start_dhclient(6)
    lab.has(f"{HOST6}/128", SLAAC, router=GATEWAY6)
    lab.expect("name servers", lambda: "nameserver" in lab.system.resolv_conf())
    assert lab.system.resolv_conf() == {"search": ["example.org.", "lab.example.net."], "nameserver": [DNS6]}


def test_networkd(lab: Lab) -> None:
    """DHCP, DHCPv6 and router advertisements at once."""
    lab.system.start_networkd()
    lab.has(f"{HOST4}/24", f"{HOST6}/128", SLAAC)
    lab.expect("both routers", lambda: routers(lab.guest.space) == {GATEWAY4, GATEWAY6})
    lab.expect("the end of the set-up", lambda: lab.system.networkd().get("ADMIN_STATE") == ["configured"])
    lab.expect("name servers", lambda: set(lab.system.networkd()["DNS"]) == {DNS4, DNS6})
    assert set(lab.system.networkd()["DOMAINS"]) == {"example.org", "lab.example.net"}
    assert mtu(lab.guest.space) == MTU


def test_addresses_pass_duplicate_address_detection(lab: Lab) -> None:
    """With it on, no address stays tentative or fails, although every other one is answered for."""
    for key, value in (("accept_dad", "1"), ("dad_transmits", "1")):
        lab.guest.space.sysctl(f"net/ipv6/conf/eth0/{key}", value)
    lab.up()
    lab.has(SLAAC, router=GATEWAY6)
    assert addresses(lab.guest.space, scope="link") == {"fe80::5054:ff:fe67:6477/64"}
    lab.guest.space.ip(f"addr add {HOST6}/128 dev eth0")
    lab.has(f"{HOST6}/128", SLAAC)


def test_a_slaac_kernel_follows_the_host(lab: Lab) -> None:
    lab.up()
    lab.has(SLAAC, router=GATEWAY6)
    lab.host.ip(
        "addr add 2001:db8:5::10/64 dev eth0 nodad",
        f"addr del {HOST6}/64 dev eth0",
        "route replace default via fe80::77 dev eth0",
    )
    new = SLAAC.replace("2001:db8::", "2001:db8:5:0:")
    lab.has(new, router="fe80::77")
    assert routers(lab.guest.space) == {"fe80::77"}  # the old one has said farewell
    assert addresses(lab.guest.space, deprecated=True) == {SLAAC}
    assert lab.backend.messages().count("the host's network has changed") == 1


def test_a_link_that_is_down_for_a_moment_costs_nothing(lab: Lab) -> None:
    lab.up()
    lab.system.start_udhcpc()
    lab.has(f"{HOST4}/24", SLAAC, router=GATEWAY4)
    lab.host.ip("link set eth0 down", "addr flush dev eth0 scope global", "link set eth0 up")
    time.sleep(1)  # the back-end looks after 0.2 s
    os.kill(_pid(lab), signal.SIGUSR1)
    lab.expect("a renewal", lambda: lab.system.output().count(f"lease of {HOST4} obtained") == 2)
    lab.has(f"{HOST4}/24", SLAAC, router=GATEWAY4)
    lab.online()
    lab.serve(SERVER4)
    lab.expect("the server", lambda: lab.reaches(SERVER4))
    assert "the host's network has changed" not in lab.backend.messages()


def _pid(lab: Lab) -> int:
    """The client that was started last."""
    assert lab.system.last is not None
    return lab.system.last.pid


def _move_ipv4(lab: Lab) -> None:
    """Another network: address, router, all."""
    lab.network.server.ip("addr add 198.51.100.1/24 dev eth0")
    lab.host.ip(
        "addr flush dev eth0 scope global",
        "addr add 198.51.100.10/24 dev eth0",
        "route add default via 198.51.100.1",
    )


def test_udhcpc_follows_the_host(lab: Lab) -> None:
    lab.up()
    lab.system.start_udhcpc()
    lab.has(f"{HOST4}/24", SLAAC, router=GATEWAY4)
    _move_ipv4(lab)
    lab.expect("the host's change", lambda: "IPv4 198.51.100.10/24 (was" in lab.backend.messages())
    lab.serve(SERVER4)
    lab.expect("the server, still as the guest was", lambda: lab.reaches(SERVER4))
    os.kill(_pid(lab), signal.SIGUSR1)  # as when half of the lease is over
    lab.expect("another address", lambda: "198.51.100.10/24" in addresses(lab.guest.space))
    lab.expect("another router", lambda: "198.51.100.1" in routers(lab.guest.space))
    assert lab.reaches(SERVER4)


def test_dhclient_follows_the_host(lab: Lab) -> None:
    """It renews by itself, when it was told to."""
    lab.up()
    lab.system.start_dhclient(4, "supersede dhcp-renewal-time 3;")
    lab.has(f"{HOST4}/24", SLAAC, router=GATEWAY4)
    _move_ipv4(lab)
    lab.expect("another address", lambda: "198.51.100.10/24" in addresses(lab.guest.space), 30)
    lab.expect("another router", lambda: "198.51.100.1" in routers(lab.guest.space))
    assert f"{HOST4}/24" not in addresses(lab.guest.space)


def test_dhclient_for_ipv6_follows_the_host(lab: Lab) -> None:
    lab.up()
    lab.has(SLAAC)
    client = lab.system.start_dhclient(6)
    lab.has(f"{HOST6}/128", SLAAC)
    lab.host.ip("addr add 2001:db8:5::10/64 dev eth0 nodad", f"addr del {HOST6}/64 dev eth0")
    lab.expect("the host's change", lambda: "IPv6 2001:db8:5::10/64 (was" in lab.backend.messages())
    client.kill()
    client.wait()
    lab.system.start_dhclient(6)  # it asks whether its address is still right
    lab.expect("another address", lambda: "2001:db8:5::10/128" in addresses(lab.guest.space))
    assert "NotOnLink" in lab.system.output()


def test_another_resolv_conf(lab: Lab) -> None:
    """It is looked at when the guest asks; until then the old name server's address leads to the new one."""
    lab.up()
    lab.system.start_udhcpc()
    lab.has(f"{HOST4}/24", SLAAC)
    lab.expect("a name server", lambda: lab.system.resolv_conf().get("nameserver") == [DNS4])
    lab.resolv.write_text(f"nameserver {SERVER4}\n")
    with lab.network.server.enter():
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with lab.guest.space.enter():
        guest = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with server, guest:
        server.bind((SERVER4, 53))
        for sock in (server, guest):
            sock.settimeout(10)
        guest.sendto(b"question", (DNS4, 53))
        _, source = server.recvfrom(64)
        server.sendto(b"answer", source)
        assert guest.recvfrom(64) == (b"answer", (DNS4, 53))
    os.kill(_pid(lab), signal.SIGUSR1)
    lab.expect("another name server", lambda: lab.system.resolv_conf().get("nameserver") == [SERVER4])
    assert f"name servers {SERVER4} (was {DNS4} {DNS6})" in lab.backend.messages()


@pytest.mark.parametrize("client", ["udhcpc", "dhclient"])
def test_a_start_with_nothing(tmp_path: Path, client: str) -> None:
    """The guest reaches its host; once the host has a network the guest has it too."""
    lab = Lab(tmp_path, "--map-host-loopback", "169.254.2.2", online=False)
    try:
        lab.up()
        if client == "udhcpc":
            lab.system.start_udhcpc()
        else:
            lab.system.start_dhclient(4, "supersede dhcp-renewal-time 3;")
        lab.has("169.254.2.1/16", router="169.254.2.2")
        assert routers(lab.guest.space) == {"169.254.2.2"}
        lab.serve("127.0.0.1", lab.host)
        lab.expect("the host", lambda: lab.reaches("169.254.2.2"))
        lab.online()
        lab.expect("IPv6, unasked", lambda: SLAAC in addresses(lab.guest.space))
        if client == "udhcpc":
            os.kill(_pid(lab), signal.SIGUSR1)  # it would renew after half a minute
        lab.expect("IPv4, by renewal", lambda: f"{HOST4}/24" in addresses(lab.guest.space))
        lab.expect("both routers", lambda: routers(lab.guest.space) == {GATEWAY4, GATEWAY6})
        lab.serve(SERVER4)
        assert lab.reaches(SERVER4)
    finally:
        lab.close()


def test_networkd_follows_the_host(lab: Lab) -> None:
    """It takes router advertisements itself, name servers with them."""
    network = lab.system.start_networkd()
    lab.has(f"{HOST4}/24", f"{HOST6}/128", SLAAC)
    lab.expect("name servers", lambda: set(lab.system.networkd().get("DNS", ())) == {DNS4, DNS6})
    lab.resolv.write_text("nameserver 192.0.2.54\nnameserver 2001:db8::54\nsearch example.com\n")
    lab.host.ip(
        "addr add 2001:db8:5::10/64 dev eth0 nodad",
        f"addr del {HOST6}/64 dev eth0",
        "route replace default via fe80::77 dev eth0",
    )
    new = SLAAC.replace("2001:db8::", "2001:db8:5:0:")
    lab.expect("another prefix", lambda: new in addresses(lab.guest.space, deprecated=False))
    lab.expect("the end of the old one", lambda: SLAAC in addresses(lab.guest.space, deprecated=True))
    lab.expect("another router", lambda: routers(lab.guest.space) == {GATEWAY4, "fe80::77"})
    lab.expect("another name server", lambda: "2001:db8::54" in lab.system.networkd()["DNS"])
    lab.expect("another search list", lambda: "example.com" in lab.system.networkd()["DOMAINS"])
    assert network.poll() is None


def test_a_guest_that_moves_is_told_of_its_new_host(lab: Lab) -> None:
    """And a change while it stands still waits until it runs."""
    lab.up()
    lab.has(SLAAC, router=GATEWAY6)
    target = lab.network.b
    with Backend(target, str(lab.folder), helper=None, arguments=["--no-dhcp"]) as backend:

        def change() -> None:
            target.ip("addr add 2001:db8:7::10/64 dev eth0 nodad", f"addr del {HOST6}/64 dev eth0")
            wait_until(lambda: "IPv6 2001:db8:7::10/64 (was" in backend.messages(), "the target's change")
            time.sleep(0.5)
            assert addresses(lab.guest.space) == {SLAAC}

        lab.guest.migrate(backend.socket, before_run=change)
        new = SLAAC.replace("2001:db8::", "2001:db8:7:0:")
        lab.expect("the target's prefix", lambda: new in addresses(lab.guest.space, deprecated=False))
        lab.expect("the end of the old one", lambda: SLAAC in addresses(lab.guest.space, deprecated=True))
        lab.guest.disconnect()


def test_a_guest_that_was_to_move_hears_of_its_host_when_it_stays(lab: Lab) -> None:
    """What changes while it stands still waits until it runs, here too: after a roll-back."""
    lab.up()
    lab.has(SLAAC, router=GATEWAY6)
    with Backend(lab.network.b, str(lab.folder), helper=None) as target:
        attempt = lab.guest.migration(target.socket)
        for step in ("connect_target", "log_on", "suspend", "transfer"):
            getattr(attempt, step)()
        lab.host.ip("addr add 2001:db8:7::10/64 dev eth0 nodad", f"addr del {HOST6}/64 dev eth0")
        lab.expect("the change", lambda: "IPv6 2001:db8:7::10/64 (was" in lab.backend.messages())
        time.sleep(0.5)
        assert addresses(lab.guest.space) == {SLAAC}
        attempt.cancel()
        new = SLAAC.replace("2001:db8::", "2001:db8:7:0:")
        lab.has(new, router=GATEWAY6)
        lab.expect("the end of the old one", lambda: SLAAC in addresses(lab.guest.space, deprecated=True))


class Serving:
    """A guest that answers at its own address when asked, and sends nothing else."""

    def __init__(self, lab: Lab, address: str) -> None:
        self._lab = lab
        with lab.guest.space.enter():
            self._server = socket.create_server((address, PORT), family=socket.AF_INET6)
            self._datagrams = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
            self._datagrams.bind((address, PORT))
        for sock in (self._server, self._datagrams):
            sock.settimeout(5)

    def asked(self, address: str, kind: socket.SocketKind) -> None:
        """The server in the network asks at the host's ``address`` and is answered."""
        with self._lab.network.server.enter(), socket.socket(socket.AF_INET6, kind) as client:
            client.settimeout(5)
            client.connect(socket.getaddrinfo(address, PORT)[0][4])  # with its scope
            client.send(b"question")
            if kind == socket.SOCK_DGRAM:
                question, peer = self._datagrams.recvfrom(100)
                self._datagrams.sendto(b"answer", peer)
            else:
                served, _ = self._server.accept()
                with served:
                    served.settimeout(5)
                    question = served.recv(100)
                    served.send(b"answer")
            assert (question, client.recv(100)) == (b"question", b"answer")

    def close(self) -> None:
        self._server.close()
        self._datagrams.close()


KINDS = pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["tcp", "udp"])
FORWARDS = ("-t", str(PORT), "-u", str(PORT))


@KINDS
def test_a_guest_that_only_serves_outlives_its_back_end(tmp_path: Path, kind: socket.SocketKind) -> None:
    """The new back-end learns the address that the guest has made itself, by asking."""
    with contextlib.closing(Lab(tmp_path, *FORWARDS)) as lab:
        lab.up()
        lab.has(SLAAC, router=GATEWAY6)
        with contextlib.closing(Serving(lab, SLAAC.partition("/")[0])) as serving:
            lab.backend.close()
            lab.backend = Backend(lab.host, str(lab.folder), helper=None, arguments=FORWARDS)
            lab.guest.reconnect(lab.backend.socket)
            lab.seen("ipv6", SLAAC.partition("/")[0])
            serving.asked(HOST6, kind)


def test_a_guest_gets_no_datagrams_of_before_it_came(tmp_path: Path) -> None:
    with contextlib.closing(Lab(tmp_path, *FORWARDS)) as lab:
        lab.up()
        lab.has(SLAAC, router=GATEWAY6)
        lab.guest.space.ip(f"addr add {HOST6}/128 dev eth0 nodad")  # where a back-end that has seen none delivers
        with contextlib.closing(Serving(lab, HOST6)) as serving:
            lab.guest.disconnect()
            wait_until(lambda: "has disconnected" in lab.backend.messages(), "the end of the session")
            with lab.network.server.enter(), socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as early:
                early.sendto(b"early", (HOST6, PORT))
                time.sleep(0.2)
            lab.guest.connect(lab.backend.socket)
            time.sleep(0.5)
            serving.asked(HOST6, socket.SOCK_DGRAM)  # and nothing else comes first


@KINDS
def test_a_guest_that_only_serves_is_reached_without_detection(tmp_path: Path, kind: socket.SocketKind) -> None:
    """Duplicate address detection would show the address; a kernel may be told to do without."""
    with contextlib.closing(Lab(tmp_path, *FORWARDS)) as lab:
        lab.guest.space.sysctl("net/ipv6/conf/eth0/accept_dad", "0")
        lab.guest.space.sysctl("net/ipv6/conf/eth0/dad_transmits", "0")
        lab.up()
        lab.has(SLAAC, router=GATEWAY6)
        with contextlib.closing(Serving(lab, SLAAC.partition("/")[0])) as serving:
            lab.seen("ipv6", SLAAC.partition("/")[0])
            serving.asked(HOST6, kind)


@KINDS
@pytest.mark.parametrize("detection", ["1", "0"])
def test_a_guest_that_only_serves_follows_the_host(tmp_path: Path, kind: socket.SocketKind, detection: str) -> None:
    with contextlib.closing(Lab(tmp_path, *FORWARDS)) as lab:
        lab.guest.space.sysctl("net/ipv6/conf/eth0/accept_dad", detection)
        lab.up()
        lab.has(SLAAC, router=GATEWAY6)
        lab.host.ip("addr add 2001:db8:5::10/64 dev eth0 nodad", f"addr del {HOST6}/64 dev eth0")
        new = SLAAC.replace("2001:db8::", "2001:db8:5:0:")
        lab.has(new, router=GATEWAY6)
        lab.guest.space.ip(f"addr del {SLAAC} dev eth0")  # its time is over
        lab.network.server.ip("route add 2001:db8:5::/64 dev eth0")
        with contextlib.closing(Serving(lab, new.partition("/")[0])) as serving:
            lab.seen("ipv6", new.partition("/")[0])
            serving.asked("2001:db8:5::10", kind)


@KINDS
def test_a_neighbour_of_the_host_asks_by_link_local_address(tmp_path: Path, kind: socket.SocketKind) -> None:
    """The guest answers from its own link-local address, which the back-end has asked for."""
    with contextlib.closing(Lab(tmp_path, *FORWARDS)) as lab:
        lab.up()
        lab.has(SLAAC, router=GATEWAY6)
        with contextlib.closing(Serving(lab, "::")) as serving:
            lab.backend.close()
            lab.backend = Backend(lab.host, str(lab.folder), helper=None, arguments=FORWARDS)
            lab.guest.reconnect(lab.backend.socket)
            [own] = addresses(lab.guest.space, scope="link")
            lab.seen("ipv6_link_local", own.partition("/")[0])
            [host] = addresses(lab.host, scope="link")
            serving.asked(f"{host.partition('/')[0]}%eth0", kind)
