# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon in stream mode: passt's default, with frames over the socket itself."""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import ICMPv6ND_RA, ICMPv6ND_RS, IPv6
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet

from .test_serve import STAY, Place, eventually, gone, said

PASST = (sys.executable, "-m", "godwit.cli.passt")
NETWORK = ("-a", "192.0.2.10/24", "-g", "192.0.2.1", "-a", "2001:db8::10", "-g", "fe80::1", "-D", "192.0.2.53")
MAC = "52:54:00:12:34:56"


class FrontEnd:
    """QEMU's end of the socket."""

    def __init__(self, connected: socket.socket) -> None:
        self.sock = connected
        self.sock.settimeout(10)

    @classmethod
    def connect(cls, path: Path) -> FrontEnd:
        made = socket.socket(socket.AF_UNIX)
        made.connect(str(path))
        return cls(made)

    def send(self, frame: Packet) -> None:
        data = bytes(frame)
        self.sock.sendall(struct.pack("!I", len(data)) + data)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            got = self.sock.recv(size - len(data))
            assert got, "it has hung up"
            data += got
        return data

    def receive(self, match: Callable[[Any], bool]) -> Any:
        """The next frame that matches; others are passed over."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            (size,) = struct.unpack("!I", self._exactly(4))
            frame = Ether(self._exactly(size))
            if match(frame):
                return frame
        raise AssertionError("no such frame within 10 s")

    def is_served(self) -> None:
        """The gateway answers."""
        self.send(Ether(src=MAC, dst="ff:ff:ff:ff:ff:ff") / ARP(hwsrc=MAC, psrc="192.0.2.10", pdst="192.0.2.1"))
        assert self.receive(lambda f: ARP in f and f[ARP].op == 2)[ARP].psrc == "192.0.2.1"

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> FrontEnd:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    made.close()


def start(place: Place, *args: str, **more: Any) -> subprocess.Popen[str]:
    return place.start("--stream", *NETWORK, *args, **more)


def test_what_a_guest_asks_for_first(place: Place) -> None:
    """ARP, DHCP, and a router: the largest MTU, since each frame goes through the socket by itself."""
    start(place)
    with FrontEnd.connect(place.socket) as front_end:
        front_end.is_served()
        ask = Ether(src=MAC, dst="ff:ff:ff:ff:ff:ff") / IP(src="0.0.0.0", dst="255.255.255.255")
        discover = DHCP(options=[("message-type", "discover"), "end"])
        front_end.send(ask / UDP(sport=68, dport=67) / BOOTP(chaddr=bytes.fromhex(MAC.replace(":", ""))) / discover)
        offer = front_end.receive(lambda f: DHCP in f)
        assert offer[BOOTP].yiaddr == "192.0.2.10"
        options = {option[0]: option[1] for option in offer[DHCP].options if isinstance(option, tuple)}
        assert (options["router"], options["name_server"]) == ("192.0.2.1", "192.0.2.53")
        assert options["interface-mtu"] == 65520
        solicit = Ether(src=MAC, dst="33:33:00:00:00:02") / IPv6(src="fe80::2", dst="ff02::2", hlim=255)
        front_end.send(solicit / ICMPv6ND_RS())
        assert ICMPv6ND_RA in front_end.receive(lambda f: ICMPv6ND_RA in f)


def test_passt_without_options_as_libvirt_starts_it(place: Place) -> None:
    launched = place.launch(*NETWORK, "--one-off", command=PASST)
    assert (launched.returncode, launched.stdout, launched.stderr) == (0, "", "")
    daemon = place.daemon()
    assert not place.repair.exists()
    with FrontEnd.connect(place.socket) as front_end:
        front_end.is_served()
        assert not gone(daemon)
    eventually(lambda: gone(daemon), "the daemon's end")
    assert not place.socket.exists()
    assert not place.pid.exists()


def test_one_off_ends_with_a_front_end_that_never_said_a_word(place: Place) -> None:
    """So it is where a guest is ended before it has set up its network."""
    process = start(place, "--one-off")
    with FrontEnd.connect(place.socket):
        time.sleep(0.2)
        assert process.poll() is None
    assert process.wait(10) == 0


def test_one_off_does_not_end_by_a_look_whether_it_lives(place: Place) -> None:
    process = start(place, "--one-off")
    launched = place.launch("--stream", *NETWORK)
    assert launched.returncode == 1
    assert f"{place.socket} is in use: another process listens there" in launched.stderr
    with FrontEnd.connect(place.socket) as front_end:
        front_end.is_served()
    assert process.wait(10) == 0


def test_otherwise_it_serves_the_next_one(place: Place) -> None:
    process = start(place)
    for _ in range(3):
        with FrontEnd.connect(place.socket) as front_end:
            front_end.is_served()
    assert process.poll() is None


def test_a_second_front_end_waits_for_the_first(place: Place) -> None:
    process = start(place)
    with FrontEnd.connect(place.socket) as first, FrontEnd.connect(place.socket) as second:
        first.is_served()
        first.close()
        second.is_served()
    assert process.poll() is None


def test_that_another_waits_is_logged_once_it_sends(place: Place) -> None:
    process = start(place)
    with FrontEnd.connect(place.socket) as first:
        first.is_served()
        with FrontEnd.connect(place.socket):
            first.is_served()
        with FrontEnd.connect(place.socket) as second:
            second.send(Ether(src=MAC, dst="ff:ff:ff:ff:ff:ff") / ARP(psrc="192.0.2.10", pdst="192.0.2.1"))
            for _ in range(3):
                first.is_served()
            first.close()
            second.is_served()
    logged = said(process)
    assert len([line for line in logged if "another front-end has connected, and waits" in line]) == 1
    assert logged.count("a front-end has connected") == 2


def test_a_silent_front_end_is_nothing_to_warn_of(place: Place) -> None:
    process = start(place)
    with FrontEnd.connect(place.socket) as front_end:
        time.sleep(5.5)
        front_end.is_served()
    assert not [line for line in said(process) if "said nothing" in line]


def test_a_signal_ends_it_while_a_front_end_is_served(place: Place) -> None:
    process = start(place)
    with FrontEnd.connect(place.socket) as front_end:
        front_end.is_served()
        process.terminate()
        assert process.wait(10) == 0
    assert not place.socket.exists()


@pytest.mark.parametrize("size", [0, 1 << 20])
def test_a_length_that_cannot_be_ends_the_session_with_one_line(place: Place, size: int) -> None:
    process = start(place)
    with FrontEnd.connect(place.socket) as front_end:
        front_end.is_served()
        front_end.sock.sendall(struct.pack("!I", size) * 100)
        with pytest.raises((ConnectionResetError, AssertionError)):
            front_end.receive(lambda _: False)
    with FrontEnd.connect(place.socket) as front_end:
        front_end.is_served()
    logged = said(process)
    assert [line for line in logged if "announced" in line] == [
        f"the session is over: a frame of {size} bytes was announced, and 1 to 69632 is what there can be"
    ]
    assert not [line for line in logged if "Traceback" in line]


def test_the_peers_of_a_guest_that_is_gone_are_reset(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    start(place, "-t", f"127.0.0.1/{port}")
    with FrontEnd.connect(place.socket) as front_end:
        front_end.is_served()
        peer = socket.create_connection(("127.0.0.1", port), 10)
        front_end.receive(lambda f: IP in f and f[IP].proto == 6)  # the guest is asked
    with peer, pytest.raises(ConnectionResetError):
        peer.recv(1)


def test_a_connected_descriptor_as_qemu_does_it(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    pid = tmp_path / "pid"
    with theirs:
        fd = theirs.fileno()
        launched = subprocess.run(
            [*PASST, "--quiet", "--pid", str(pid), "--fd", str(fd), *NETWORK, *STAY],
            capture_output=True,
            text=True,
            pass_fds=(fd,),
            timeout=60,
            check=False,
        )
    assert (launched.returncode, launched.stdout, launched.stderr) == (0, "", "")
    daemon = int(pid.read_text())
    with FrontEnd(ours) as front_end:
        front_end.is_served()
        assert not gone(daemon)
    eventually(lambda: gone(daemon), "the daemon's end")


def test_there_is_no_repair_socket(place: Place) -> None:
    process = start(place, "--repair-path", str(place.repair))
    assert not place.repair.exists()
    process.terminate()
    assert process.wait(10) == 0


VHOST_USER = "the session is over: this is a vhost-user front-end: start with --vhost-user, without --stream"


def to_the_end(sock: socket.socket) -> None:
    """Read until the daemon has closed the connection; before that it may have asked who is there."""
    with contextlib.suppress(ConnectionResetError):  # closed with our bytes unread
        while sock.recv(4096):
            pass


@pytest.mark.parametrize("flags", [1, 9])
def test_a_vhost_user_front_end_is_told_apart(place: Place, flags: int) -> None:
    """Its first request would be a length in network byte order, and no such one can be."""
    process = start(place)
    with FrontEnd.connect(place.socket) as front_end:
        front_end.sock.sendall(struct.pack("<III", 1, flags, 0))  # GET_FEATURES
        to_the_end(front_end.sock)
    assert VHOST_USER in said(process)


@pytest.mark.parametrize("header", [(1, 2, 0), (0, 1, 0), (512, 1, 0), (1, 1 | 1 << 8, 0)])
def test_other_nonsense_is_not_taken_for_vhost_user(place: Place, header: tuple[int, int, int]) -> None:
    process = start(place)
    with FrontEnd.connect(place.socket) as front_end:
        front_end.sock.sendall(struct.pack("<III", *header))
        to_the_end(front_end.sock)
    logged = said(process)
    assert any("was announced" in line for line in logged)
    assert VHOST_USER not in logged


def test_a_front_end_that_speaks_vhost_user_is_told_apart_and_fills_no_log(place: Place) -> None:
    """QEMU connects again and again."""
    process = start(place)
    for _ in range(300):
        with FrontEnd.connect(place.socket) as front_end:
            front_end.sock.sendall(struct.pack("<III", 1, 1, 0))  # GET_FEATURES
            to_the_end(front_end.sock)
    logged = said(process)
    hints = [line for line in logged if VHOST_USER in line]
    assert len(hints) == 20
    assert hints[-1].endswith("(no more like that for a minute)")
    assert len(logged) < 50
