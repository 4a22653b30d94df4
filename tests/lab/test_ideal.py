# SPDX-License-Identifier: GPL-2.0-or-later
"""The ideal back-end: what a guest sends comes back, whole, whatever its frames are like, or meets a service."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator

import pytest

from godwit.lab.backend import IDEAL, Backend
from godwit.lab.errors import CommandError
from godwit.lab.guest import EmbeddedGuest
from godwit.lab.ideal import CHARGEN, DISCARD
from godwit.lab.netns import SERVER4, SERVER6, SERVER_MAC, Namespace
from godwit.vhost_user import Feature

DATA = os.urandom(1 << 20) * 4


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One back-end for all guests, one after the other."""
    with Namespace("host") as host, Backend(host, str(tmp_path_factory.mktemp("ideal")), IDEAL) as backend:
        yield backend.socket


def introduce(guest: EmbeddedGuest, address: str) -> None:
    """Bring the guest up; it knows the MAC of the other end."""
    guest.configure()
    guest.space.ip(f"neigh replace {address} lladdr {SERVER_MAC} dev eth0 nud permanent")


def talk_to_itself(guest: EmbeddedGuest, address: str) -> tuple[bytes, str]:
    """Have a guest send to a server of its own; return what that received, and who it says has sent it."""
    introduce(guest, address)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with guest.space.enter(), socket.create_server(("", 0), family=family) as server:
        client = socket.create_connection((address, server.getsockname()[1]), 5.0)
        server.settimeout(5.0)
        accepted, peer = server.accept()
    with client, accepted:

        def send() -> None:
            client.sendall(DATA)
            client.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        accepted.settimeout(20.0)
        received = bytearray()
        while data := accepted.recv(1 << 20):
            received += data
        sender.join()
    guest.check()
    assert not guest.backend_gone
    return bytes(received), peer[0]


@pytest.mark.parametrize("address", [SERVER4, SERVER6])
@pytest.mark.parametrize("layout", ["single", "chain", "indirect"])
@pytest.mark.parametrize("mtu", [1500, 65520])
def test_a_guest_hears_itself(path: str, mtu: int, layout: str, address: str) -> None:
    with EmbeddedGuest(mtu=mtu, tx_layout=layout, tx_chunk=1000, queue_size=1024) as guest:
        guest.connect(path)
        assert talk_to_itself(guest, address) == (DATA, address)
        if mtu == 1500:
            assert guest.counters["from_guest_gso"] > 0
            assert guest.counters["to_guest_gso"] > 0


def call(guest: EmbeddedGuest, address: str, port: int, buffer: int = 0) -> socket.socket:
    """Have a guest connect."""
    with guest.space.enter():
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    if buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    sock.settimeout(5.0)
    try:
        sock.connect((address, port))
    except OSError:
        sock.close()
        raise
    return sock


def hear_out(sock: socket.socket, least: int) -> int:
    """Take so much, hang up one way, and take what still comes; how much it was in all."""
    received = 0
    buffer = bytearray(1 << 20)
    while received < least:
        received += sock.recv_into(buffer)
    sock.shutdown(socket.SHUT_WR)
    while size := sock.recv_into(buffer):
        received += size
    return received


@pytest.mark.parametrize("address", [SERVER4, SERVER6])
@pytest.mark.parametrize("mtu", [1500, 65520])
def test_services_over_tcp(path: str, mtu: int, address: str) -> None:
    """Several connections to each, one after the other: ends are acknowledged, both ways."""
    with EmbeddedGuest(mtu=mtu) as guest:
        guest.connect(path)
        introduce(guest, address)
        with contextlib.ExitStack() as stack:
            sinks = [stack.enter_context(call(guest, address, DISCARD)) for _ in range(3)]
            sources = [stack.enter_context(call(guest, address, CHARGEN)) for _ in range(3)]
            for sock in sinks:
                sock.sendall(DATA)
            for sock in sinks:
                sock.shutdown(socket.SHUT_WR)
                assert sock.recv(1) == b""
            for sock in sources:
                assert hear_out(sock, len(DATA)) >= len(DATA)
        assert guest.run("ss", "-Htn", "state", "connected", "exclude", "time-wait").stdout == ""
        guest.check()


def test_what_the_guest_loses_is_sent_again(path: str) -> None:
    """Each 1000th frame is lost in the guest, first the 20th; what came after it says so."""
    with EmbeddedGuest() as guest:
        guest.connect(path)
        introduce(guest, SERVER4)
        rules = "table ip t { chain c { type filter hook input priority 0; tcp sport 19 jump d; }; chain d {"
        rules += " numgen inc mod 1000 == 20 counter drop; }; }"
        guest.run("nft", "-f", "-", stdin=rules)
        with call(guest, SERVER4, CHARGEN, buffer=8 << 20) as sock:
            assert hear_out(sock, 16 << 20) >= 16 << 20
        assert "packets 0 " not in guest.run("nft", "list", "ruleset").stdout


def test_datagrams_are_thrown_away(path: str) -> None:
    with EmbeddedGuest() as guest:
        guest.connect(path)
        introduce(guest, SERVER4)
        with guest.space.enter():
            sock, hearing = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
        with sock, hearing:
            hearing.bind(("", DISCARD + 1))
            hearing.settimeout(5.0)
            for number in range(10):
                for port in (DISCARD, DISCARD + 1):
                    sock.sendto(b"%d" % number, (SERVER4, port))
            assert [hearing.recv(10) for _ in range(10)] == [b"%d" % number for number in range(10)]
        assert guest.counters["from_guest_frames"] - guest.counters["to_guest_frames"] >= 10


def test_without_offloads_and_event_index(path: str) -> None:
    """The receiving end has to check each sum that the sending end made: they are still right."""
    features = Feature.VIRTIO_F_VERSION_1 | Feature.VIRTIO_NET_F_MRG_RXBUF
    with EmbeddedGuest(features=features) as guest:
        guest.connect(path)
        assert talk_to_itself(guest, SERVER4) == (DATA, SERVER4)
        assert guest.counters["from_guest_gso"] == 0
        with pytest.raises(ConnectionRefusedError):
            call(guest, SERVER4, DISCARD)  # no service for such a guest: it meets itself, where nobody listens


def test_nobody_is_asked_for_addresses(path: str) -> None:
    """Frames for more than one addressee go nowhere: a guest that heard its own ARP request would see a double."""
    with EmbeddedGuest() as guest:
        guest.connect(path)
        guest.configure()
        with pytest.raises(CommandError, match=r"100% packet loss"):
            guest.run("ping", "-c1", "-W1", SERVER4)
        assert guest.counters["from_guest_frames"] > 0
        assert guest.counters["to_guest_frames"] == 0


def test_rings_stop_and_go_on(path: str) -> None:
    """As after GET_VRING_BASE, which loses nothing."""
    with EmbeddedGuest() as guest:
        guest.connect(path)
        assert talk_to_itself(guest, SERVER4)[0] == DATA
        guest.pause()
        attachment = guest.attachment
        assert attachment is not None
        bases = attachment.suspend()
        assert bases == [guest.mover.used_index(queue) for queue in (0, 1)]
        guest.move_to(attachment, bases)
        assert talk_to_itself(guest, SERVER4)[0] == DATA
