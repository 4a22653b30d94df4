# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest floods, and has connections beside that: do they go on, and is the back-end there for its front-end?

``python -m godwit.lab.hostile`` (as root, or where there are user namespaces). For each kind of flood, a
program inside the guest sends ``--rate`` frames a second (0: as fast as it can), while a download, an upload and a
client that asks and is answered go on in the same guest. Said is how fast these were, how long an answer took, and how
long DHCP and a request of the front-end's took, which go to the control thread; before the first flood the same
without any.

The flood and its neighbours share the guest's card, whose queue is a TAP device's: what it cannot hold it drops,
whoever's it is, and no back-end can give that back. So the rate is to be one that the machine can do; how much was
dropped is said, and where anything was, nothing else is held against the back-end but that it breaks.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

from godwit.lab.errors import LabError
from godwit.lab.guest import EmbeddedGuest
from godwit.lab.netns import HOST4, SERVER4, Namespace, enter_user_namespace
from godwit.lab.say import say
from godwit.lab.scenario import Load, Scenario
from godwit.lab.size import Size

RATE = 5_000_000  # bytes per second of either stream
RATE_OF_FRAMES = 5_000  # that any machine can do, with others at work on it
ASKED = 5301  # port of the server's that answers
PATIENCE = 5.0  # seconds that anybody may be kept waiting
BATCH = 2000  # frames that are made beforehand, again and again with other numbers
ETHERNET = bytes.fromhex("020000000001")
DHCP_DISCOVER = 1


# ---- floods: each yields frames without their Ethernet header, behind the EtherType


def _ip4(rng: random.Random, protocol: int, payload: bytes, *, total: int = 0, fragment: int = 0) -> bytes:
    """From the guest, to somebody far away whom nobody has ever met."""
    head = struct.pack("!BBHHHBB", 0x45, 0, total or 20 + len(payload), rng.getrandbits(16), fragment, 64, protocol)
    to = bytes((10, *rng.randbytes(3)))
    return b"\x08\x00" + head + b"\0\0" + socket.inet_aton(HOST4) + to + payload


def _syn(rng: random.Random) -> bytes:
    return _ip4(rng, 6, struct.pack("!HHIIBBHHH", rng.randrange(1024, 65536), 80, 1, 0, 0x50, 2, 1000, 0, 0))


def _udp(rng: random.Random, port: int) -> bytes:
    return _ip4(rng, 17, struct.pack("!HHHH", port, rng.randrange(1, 65536), 12, 0) + b"data")


def _udp_port(rng: random.Random) -> bytes:
    return _udp(rng, rng.randrange(1024, 65536))


def _ping(rng: random.Random) -> bytes:
    head = struct.pack("!BBHHH", 8, 0, 0, rng.getrandbits(16), 1)
    return _ip4(rng, 1, head + bytes(40))


def _fragment(rng: random.Random) -> bytes:
    return _ip4(rng, 17, rng.randbytes(64), fragment=0x2000 | rng.randrange(1000))


def _junk(rng: random.Random) -> bytes:
    kind = rng.randrange(4)
    if kind == 0:
        return rng.randbytes(rng.randrange(2, 200))
    if kind == 1:
        return b"\x08\x00" + rng.randbytes(rng.randrange(60))
    if kind == 2:
        return _ip4(rng, rng.choice((1, 6, 17, 47)), rng.randbytes(40), total=rng.randrange(65536))
    return b"\x86\xdd\x60" + rng.randbytes(rng.randrange(100))


def _arp(rng: random.Random) -> bytes:
    asked = bytes((192, 0, 2, rng.randrange(20, 250)))
    return (
        b"\x08\x06" + struct.pack("!HHBBH", 1, 0x800, 6, 4, 1) + bytes(6) + socket.inet_aton(HOST4) + bytes(6) + asked
    )


FLOODS: dict[str, Callable[[random.Random], bytes]] = {
    "syn": _syn,
    "udp": lambda rng: _udp(rng, 5000),
    "udp-ports": _udp_port,
    "ping": _ping,
    "fragments": _fragment,
    "junk": _junk,
    "arp": _arp,
}


def flood(kind: str, mac: bytes, seconds: float, rate: float) -> None:
    """Send frames of that kind from ``eth0`` for so long, ``rate`` in a second; 0: as fast as it goes."""
    rng = random.Random(0)
    make = FLOODS[kind]
    frames = [(ETHERNET + mac + make(rng)).ljust(14, b"\0") for _ in range(BATCH)]
    sent = 0
    began = time.monotonic()
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind(("eth0", 0))
        while (now := time.monotonic()) < began + seconds:
            if rate and sent > rate * (now - began):
                time.sleep(0.001)
                continue
            # Some of them anew each time: a million others are to be had.
            for _ in range(20):
                frames[sent % BATCH] = (ETHERNET + mac + make(rng)).ljust(14, b"\0")
                sock.send(frames[sent % BATCH])
                sent += 1
            for _ in range(0 if kind in ("syn", "udp", "udp-ports", "ping") else 20):
                sock.send(frames[sent % BATCH])
                sent += 1


# ---- neighbours


@dataclass
class Waits:
    """How long answers took, in seconds."""

    taken: list[float] = field(default_factory=list)
    unanswered: int = 0

    def at(self, share: float) -> float:
        """The wait that so many of them did not exceed."""
        return sorted(self.taken)[min(len(self.taken) - 1, int(share * len(self.taken)))] if self.taken else PATIENCE


class _Loop:
    """A thread that does something again and again until it is ended, and notes how long it took each time."""

    def __init__(self, what: Callable[[], bool], pause: float) -> None:
        self.waits = Waits()
        self._what = what
        self._pause = pause
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.is_set():
            began = time.monotonic()
            if self._what():
                self.waits.taken.append(time.monotonic() - began)
            else:
                self.waits.unanswered += 1
            self._over.wait(self._pause)

    def end(self) -> Waits:
        self._over.set()
        self._thread.join()
        return self.waits


@contextlib.contextmanager
def _asker(guest: Namespace, server: Namespace) -> Iterator[Callable[[], bool]]:
    """A connection from the guest to a server that gives back what it gets: something to ask it with."""
    with server.enter():
        listener = socket.create_server((SERVER4, ASKED))

    def serve() -> None:
        with contextlib.suppress(OSError):
            peer, _ = listener.accept()
            with peer:
                while data := peer.recv(4096):
                    peer.sendall(data)

    thread = threading.Thread(target=serve)
    thread.start()
    with guest.enter():
        sock = socket.socket()
    sock.settimeout(PATIENCE)
    sock.connect((SERVER4, ASKED))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask() -> bool:
        sock.sendall(b"?")
        try:
            return bool(sock.recv(1))
        except TimeoutError:
            return False

    try:
        yield ask
    finally:
        sock.close()
        listener.close()
        thread.join()


@contextlib.contextmanager
def _dhcp(guest: EmbeddedGuest) -> Iterator[Callable[[], bool]]:
    """To ask for an address, as a guest does at its start."""
    mac = bytes.fromhex(guest.mac.replace(":", ""))
    with guest.space.enter():
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x800))
        sock.bind(("eth0", 0x800))
    sock.settimeout(PATIENCE)
    numbers = itertools.count(1)

    def ask() -> bool:
        xid = struct.pack("!I", next(numbers))
        message = struct.pack("!BBBB4sHH", 1, 1, 6, 0, xid, 0, 0x8000) + bytes(16) + mac + bytes(202)
        message += bytes((99, 130, 83, 99, 53, 1, DHCP_DISCOVER, 255))
        datagram = struct.pack("!HHHH", 68, 67, 8 + len(message), 0) + message
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(datagram), 0, 0, 64, 17, 0) + bytes(4) + b"\xff" * 4
        sock.send(b"\xff" * 6 + mac + b"\x08\x00" + head + datagram)
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            try:
                frame = sock.recv(2048)
            except TimeoutError:
                return False
            if frame[23] == 17 and frame[34:38] == b"\0\x43\0\x44" and frame[46:50] == xid:
                return True
        return False

    with sock:
        yield ask


# ---- what it comes to


@dataclass
class Row:
    """One flood, and how its neighbours fared. Rates in bytes per second, times in seconds."""

    flood: str
    frames: float  # per second, that the guest's card has sent
    dropped: int  # by it
    download: float
    upload: float
    gap: float  # the longest silence of either stream
    asked: int
    p50: float
    p99: float
    longest: float
    dhcp: float  # the longest
    dhcp_unanswered: int
    front_end: float  # the longest
    descriptors: int
    memory: int  # bytes
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.flood:>10}: {self.frames:9,.0f} frames/s ({self.dropped} dropped by the guest);"
            f" down {self.download / 1e6:5.2f} MB/s, up {self.upload / 1e6:5.2f} MB/s,"
            f" silent for {1000 * self.gap:.0f} ms at most; answers: median"
            f" {1000 * self.p50:.2f} ms, p99 {1000 * self.p99:.1f} ms, {1000 * self.longest:.0f} ms at most of"
            f" {self.asked}; DHCP {1000 * self.dhcp:.0f} ms at most ({self.dhcp_unanswered} unanswered),"
            f" front-end {1000 * self.front_end:.0f} ms; {self.descriptors} descriptors,"
            f" {self.memory / 1048576:.1f} MiB" + "".join(f"; FAILED: {one}" for one in self.failures)
        )


class Stage:
    """The guest with its neighbours, and a back-end."""

    def __init__(self, scenario: Scenario) -> None:
        guest = scenario.guest
        assert isinstance(guest, EmbeddedGuest)  # no other was asked for
        self.guest = guest
        self.scenario = scenario
        self.load: Load = scenario.start_load(idle=10, rate=RATE)

    def _bytes(self) -> dict[str, int]:
        return {name: 0 if one is None else one.bytes for name, one in self.load.progress().items()}

    def flood(self, kind: str, seconds: float, rate: float) -> Row:
        """One of FLOODS, or "none", for so long."""
        space, backend = self.guest.space, self.scenario.backends["a"]
        attachment = self.guest.attachment
        assert attachment is not None
        with (
            _asker(space, self.scenario.network.server) as ask,
            _dhcp(self.guest) as ask_dhcp,
            contextlib.ExitStack() as stack,
        ):
            process = None
            if kind != "none":
                process = space.popen(
                    [sys.executable, "-m", "godwit.lab.hostile", "--as", kind, self.guest.mac, f"{seconds}", f"{rate}"],
                    stdout=subprocess.DEVNULL,
                )
                stack.callback(process.wait)
                stack.callback(process.send_signal, signal.SIGKILL)
                time.sleep(1.0)  # it is there, and its flows with it
            self.load.rewind()
            before, began = self._bytes(), time.monotonic()
            frames_before = _card(space)
            loops = [_Loop(ask, 0.002), _Loop(ask_dhcp, 0.5)]
            messages = Waits()
            until = began + seconds - 2.0
            while time.monotonic() < until:
                asked = time.monotonic()
                attachment.enable()  # the data plane stops for it, and it is acknowledged
                messages.taken.append(time.monotonic() - asked)
                time.sleep(0.5)
            answers, offers = (loop.end() for loop in loops)
            took = time.monotonic() - began
            sent, dropped = (now - then for now, then in zip(_card(space), frames_before, strict=True))
            size = Size.of(backend.pid)
            after = self._bytes()
        row = Row(
            flood=kind,
            frames=sent / took,
            dropped=dropped,
            download=(after["download"] - before["download"]) / took,
            upload=(after["upload"] - before["upload"]) / took,
            gap=max(self.load.gaps().values()),
            asked=len(answers.taken),
            p50=statistics.median(answers.taken) if answers.taken else PATIENCE,
            p99=answers.at(0.99),
            longest=max(answers.taken, default=PATIENCE),
            dhcp=max(offers.taken, default=PATIENCE),
            dhcp_unanswered=offers.unanswered,
            front_end=max(messages.taken),
            descriptors=size.descriptors,
            memory=size.memory,
        )
        row.failures = self._failures(row, answers)
        return row

    def _failures(self, row: Row, answers: Waits) -> list[str]:
        found = []
        if row.dropped == 0 and answers.unanswered:
            found.append(f"{answers.unanswered} questions went without an answer for {PATIENCE:g} s")
        if row.front_end > 1.0:
            found.append("the front-end was kept waiting for more than a second")
        if row.dropped == 0 and (row.gap > PATIENCE or not row.download or not row.upload):
            found.append("a stream stood still")
        if why := self.load.check_idle(60.0):
            found.append(f"idle connections: {why}")
        with contextlib.suppress(LabError):
            self.guest.check()
            return found
        return [*found, "the back-end has given up a ring"]


def _card(space: Namespace) -> tuple[int, int]:
    """Frames that the guest's card has sent, and those that it had no room for."""
    lines = space.run("cat", "/proc/self/net/dev").stdout.splitlines()
    numbers = next(line.split() for line in lines if line.strip().startswith("eth0:"))
    return int(numbers[10]), int(numbers[12])


def run(
    kinds: Sequence[str], seconds: float, rate: float = RATE_OF_FRAMES, *, arguments: Sequence[str] = ()
) -> Iterator[Row]:
    """Flood after flood, ``seconds`` each. ``arguments`` are for ``godwit serve``.

    :raises LabError: a connection has ended.
    """
    with Scenario(helpers=(None, None), godwit_arguments=arguments) as scenario:
        stage = Stage(scenario)
        for kind in kinds:
            yield stage.flood(kind, seconds, rate)
        for outcome in stage.load.finish():
            if not outcome.ok:
                raise LabError(f"{outcome}")
        if not scenario.backends["a"].running:
            raise LabError(f"the back-end has ended: {scenario.backends['a'].messages()}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(prog="python -m godwit.lab.hostile", description=__doc__)
    parser.add_argument("--floods", default=",".join(FLOODS), metavar="NAMES", help="which, of %(default)s")
    parser.add_argument("--seconds", type=float, default=15.0, metavar="N", help="of each (%(default)g)")
    parser.add_argument(
        "--rate", type=float, default=RATE_OF_FRAMES, metavar="N", help="frames a second (%(default)g; 0: no limit)"
    )
    parser.add_argument("--json", action="store_true", help="a line of JSON for each")
    parser.add_argument("--as", nargs=4, metavar=("FLOOD", "MAC", "SECONDS", "RATE"), help=argparse.SUPPRESS)
    parser.add_argument("argument", nargs="*", help="more options for godwit serve")
    options = parser.parse_args(arguments)
    if inside := getattr(options, "as"):
        flood(inside[0], bytes.fromhex(inside[1].replace(":", "")), float(inside[2]), float(inside[3]))
        return 0
    kinds = ["none", *options.floods.split(",")]
    if unknown := set(kinds) - {"none", *FLOODS}:
        parser.error(f"no such flood: {', '.join(sorted(unknown))}")

    failed = False
    try:
        enter_user_namespace()
        say(f"load of the machine: {os.getloadavg()[0]:.1f}")
        for row in run(kinds, options.seconds, options.rate, arguments=options.argument):
            say(json.dumps(asdict(row)) if options.json else row)
            failed = failed or bool(row.failures)
    except LabError as error:
        say(f"FAILED: {error}")
        return 1
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
