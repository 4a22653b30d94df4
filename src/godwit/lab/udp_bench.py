# SPDX-License-Identifier: GPL-2.0-or-later
"""UDP cases of the bench: throughput, loss, order and latency.

*Up* is from the guest to the server, *down* to the guest; *down* as answers, on
a flow that the guest began, or *forwarded*, to a port of the host. Senders and
receivers (``_udp``) are threads of this process with sockets in the namespaces,
so that a back-end's processor time is its own.

Metrics: ``sent/s`` by the program, ``delivered/s`` to the receiving program
(from its first datagram to its last), ``lost %`` of those sent, ``lost by
back-end %`` of those that the guest's card sent (the card's queue drops what is
too much for any back-end), ``CPU us`` of the back-end for each delivered,
``reordered``, ``duplicates``, ``damaged`` and ``dropped by receiver`` as counts, which
should be 0.

Behind the ideal back-end datagrams go up to its discard port: there ``delivered/s``
is what the guest's card has sent.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import statistics
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from godwit.lab._udp import Echo, Receiver, ask, send_numbered
from godwit.lab.backend import IDEAL
from godwit.lab.bench import Case, Side, Working
from godwit.lab.errors import LabError
from godwit.lab.ideal import DISCARD
from godwit.lab.netns import Namespace
from godwit.lab.placement import PLACEMENTS, measured

ANY = "0.0.0.0"

SO_RCVBUFFORCE = 33  # asm-generic/socket.h
SO_MEMINFO = 55
SK_MEMINFO_DROPS = 8  # linux/sock_diag.h

RECEIVE_BUFFER = 64 << 20  # the receiver shall not be what loses

LADDER_START = 20_000
LADDER_STEP = 1.3
LADDER_LOSS = 0.01


def _socket(space: Namespace, addr: str, port: int = 0) -> socket.socket:
    with space.enter():
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        sock.bind((addr, port))
        with contextlib.suppress(PermissionError):
            sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
    except BaseException:
        sock.close()
        raise
    return sock


def _dropped(sock: socket.socket) -> int:
    """Datagrams that a socket's full queue dropped."""
    info = sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 36)
    dropped: int = struct.unpack("=9I", info)[SK_MEMINFO_DROPS]
    return dropped


@contextlib.contextmanager
def _pair(side: Side, forwarded: bool) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A guest's and a server's socket that know each other; the path between them has been used."""
    with contextlib.ExitStack() as stack:
        port = side.port if forwarded else 0
        guest = stack.enter_context(_socket(side.space, side.addr, port))
        server = stack.enter_context(_socket(side.server, ANY))
        first, second = (server, guest) if forwarded else (guest, server)
        first.connect((side.addr, port) if forwarded else (side.server_addr, server.getsockname()[1]))
        second.settimeout(1.0)
        for _ in range(5):
            # The first may be lost while addresses are being resolved.
            first.send(b"hello")
            with contextlib.suppress(TimeoutError):
                _, peer = second.recvfrom(64)
                break
        else:
            raise LabError("nothing arrives")
        second.connect(peer)
        second.settimeout(0.05)
        with contextlib.suppress(TimeoutError):
            while second.recv(64):
                pass
        for sock in (guest, server):
            sock.setblocking(True)
        yield guest, server


@dataclass(frozen=True)
class Run:
    """How one stream of datagrams fared."""

    sent: int
    seconds: float  # of sending
    received: int
    delivery_seconds: float
    cpu: float
    frames: int  # of the guest's card, outwards
    reordered: int
    duplicates: int
    damaged: int
    dropped: int  # by the receiving socket, for want of room

    @property
    def loss(self) -> float:
        """The part of what was sent that did not arrive, duplicates apart."""
        return 1 - (self.received - self.duplicates) / self.sent

    @property
    def delivered(self) -> float:
        """Datagrams a second."""
        return self.received / self.delivery_seconds if self.delivery_seconds else 0.0


def stream(
    side: Side,
    *,
    up: bool,
    size: int,
    seconds: float,
    rate: float = 0.0,
    forwarded: bool = False,
    joined: bool = False,
) -> Run:
    """Send numbered datagrams one way and count what arrives."""
    with _pair(side, forwarded) as (guest, server):
        source, target = (guest, server) if up else (server, guest)
        return _stream(side, source, target, size, seconds, rate, joined)


def _stream(
    side: Side,
    source: socket.socket,
    target: socket.socket,
    size: int,
    seconds: float,
    rate: float,
    joined: bool = False,
) -> Run:
    receiver = Receiver(target.fileno(), size=size)
    dropped = _dropped(target)
    frames, cpu = side.frames_from_guest(), side.cpu()
    receiving = Working(receiver.run)
    sending = Working(
        functools.partial(send_numbered, source.fileno(), size=size, seconds=seconds, rate=rate, joined=joined)
    )
    try:
        outcome = sending.result(seconds + 60)
    finally:
        receiver.stop()
        receiving.result()
    assert isinstance(outcome, tuple)
    sent, _, took = outcome
    if not sent:
        raise LabError("nothing could be sent")
    return Run(
        sent,
        took,
        receiver.received,
        receiver.seconds,
        side.cpu() - cpu,
        side.frames_from_guest() - frames,
        receiver.reordered,
        receiver.duplicates,
        receiver.damaged,
        _dropped(target) - dropped,
    )


def _throughput(
    side: Side,
    seconds: float,
    *,
    up: bool,
    size: int,
    rate: float = 0.0,
    forwarded: bool = False,
    joined: bool = False,
) -> dict[str, float]:
    if side.kind == IDEAL and up:
        return _discarded(side, seconds, size=size, rate=rate)
    run = stream(side, up=up, size=size, seconds=seconds, rate=rate, forwarded=forwarded, joined=joined)
    values = {"sent/s": run.sent / run.seconds, "delivered/s": run.delivered, "lost %": 100 * run.loss}
    if up and run.frames and size <= 1472 and not joined:
        values["lost by back-end %"] = max(0.0, 100 * (1 - (run.received - run.duplicates) / run.frames))
    if side.guest is not None and run.received:
        values["CPU us"] = run.cpu / run.received * 1e6
    return values | {
        "reordered": run.reordered,
        "duplicates": run.duplicates,
        "damaged": run.damaged,
        "dropped by receiver": run.dropped,
    }


def _discarded(side: Side, seconds: float, *, size: int, rate: float) -> dict[str, float]:
    """Send to the ideal back-end's discard port; what the guest's card has sent is what arrives."""
    with _socket(side.space, side.addr) as guest:
        guest.connect((side.server_addr, DISCARD))
        frames, cpu = side.frames_from_guest(), side.cpu()
        sent, _, took = send_numbered(guest.fileno(), size=size, seconds=seconds, rate=rate)
        delivered, cpu = side.frames_from_guest() - frames, side.cpu() - cpu
    if not delivered:
        raise LabError("nothing arrives")
    return {"sent/s": sent / took, "delivered/s": delivered / took, "CPU us": cpu / delivered * 1e6}


def _ladder(side: Side, seconds: float, *, up: bool, size: int, forwarded: bool = False) -> dict[str, float]:
    """The highest rate, each 1.3 times the one before, at which less than one in a hundred is lost."""
    best, cpu, rate, failed, slow = 0.0, 0.0, float(LADDER_START), 0, 0
    with _pair(side, forwarded) as (guest, server):
        ends = (guest, server) if up else (server, guest)
        while failed < 2 and slow < 2:
            run = _stream(side, *ends, size, seconds / 4, rate)
            if run.loss < LADDER_LOSS:
                failed = 0
                if run.sent / run.seconds > best:
                    best = run.sent / run.seconds
                    cpu = run.cpu / run.received * 1e6
                # Twice: this sender, on this machine, is no faster.
                slow = slow + 1 if run.sent / run.seconds < 0.8 * rate else 0
            else:
                failed += 1
            rate *= LADDER_STEP
    values = {"highest rate with < 1 % lost": best}
    if side.guest is not None and best:
        values["CPU us"] = cpu
    return values


def _beside_a_flood(side: Side, seconds: float, *, size: int, rate: float) -> dict[str, float]:
    """What a slow flow to the guest loses while another one is flooded: by more than goes, or it says nothing."""
    with _pair(side, False) as (guest, server), _pair(side, False) as (other_guest, other_server):
        flooding = Working(functools.partial(_stream, side, other_server, other_guest, size, seconds, 0.0))
        try:
            run = _stream(side, server, guest, size, seconds, rate)
        finally:
            flood = flooding.result(seconds + 60)
    assert isinstance(flood, Run)
    values = {"lost of the flood %": 100 * flood.loss, "reordered": float(run.reordered + flood.reordered)}
    if flood.loss > 0:
        values["lost of the slow %"] = 100 * run.loss
    return values


def _latency(side: Side, seconds: float, *, size: int) -> dict[str, float]:
    with (
        _socket(side.space, side.addr) as guest,
        _socket(side.server, ANY) as server,
    ):
        guest.connect((side.server_addr, server.getsockname()[1]))
        echo = Echo(server.fileno())
        echoing = Working(echo.run)
        try:
            ask(guest.fileno(), size=size, seconds=0.05)
            cpu = side.cpu()
            times, unanswered = ask(guest.fileno(), size=size, seconds=seconds)
            cpu = side.cpu() - cpu
        finally:
            echo.stop()
            echoing.result()
    if not times:
        raise LabError("no answer at all")
    times.sort()
    values = {
        "p50 us": statistics.median(times) / 1e3,
        "p99 us": times[int(len(times) * 0.99)] / 1e3,
        "unanswered": float(unanswered),
    }
    if side.guest is not None:
        values["CPU us"] = cpu / len(times) * 1e6
    return values


# The ideal back-end has no ports of the host. Upwards it is asked how many frames it got: as many as there were
# datagrams, unless these are fragments, or are joined in one frame. Downwards some fragments of a datagram would
# be lost in the guest's queue, and the others fill what it has for those that wait, for half a minute.
_WITHOUT_IDEAL = frozenset({IDEAL})


def _case(
    name: str,
    title: str,
    mtu: int,
    *,
    up: bool,
    size: int,
    rate: float = 0.0,
    forwarded: bool = False,
    joined: bool = False,
) -> Case:
    measure = functools.partial(_throughput, up=up, size=size, rate=rate, forwarded=forwarded, joined=joined)
    other = forwarded or joined or size > mtu
    return Case(name, title, mtu, measure, without=_WITHOUT_IDEAL if other else frozenset())


def _latencies(name: str, title: str, mtu: int, *, size: int) -> Iterator[Case]:
    for placement, where in PLACEMENTS.items():
        measure = functools.partial(measured, placement, functools.partial(_latency, size=size))
        yield Case(f"{name}-{placement}", f"{title}, {where}", mtu, measure)


CASES = (
    _case("up-1400", "up, 1400 B, unpaced", 1500, up=True, size=1400),
    _case("up-1400-joined", "up, 1400 B, unpaced, cut up by the card", 1500, up=True, size=1400, joined=True),
    _case("up-1400-paced", "up, 1400 B, 20 000/s", 1500, up=True, size=1400, rate=20_000.0),
    Case("up-1400-ladder", "up, 1400 B, rising rates", 1500, functools.partial(_ladder, up=True, size=1400)),
    _case("down-1400", "down, 1400 B, flooded", 1500, up=False, size=1400),
    _case("down-1400-paced", "down, 1400 B, 20 000/s", 1500, up=False, size=1400, rate=20_000.0),
    Case("down-1400-ladder", "down, 1400 B, rising rates", 1500, functools.partial(_ladder, up=False, size=1400)),
    _case("forward-1400", "down to a forwarded port, 1400 B, flooded", 1500, up=False, size=1400, forwarded=True),
    _case(
        "forward-1400-paced",
        "down to a forwarded port, 1400 B, 20 000/s",
        1500,
        up=False,
        size=1400,
        rate=20_000.0,
        forwarded=True,
    ),
    Case(
        "forward-1400-ladder",
        "down to a forwarded port, 1400 B, rising rates",
        1500,
        functools.partial(_ladder, up=False, size=1400, forwarded=True),
        without=_WITHOUT_IDEAL,
    ),
    Case(
        "flood",
        "down, 1000/s beside a flood, 1400 B",
        1500,
        functools.partial(_beside_a_flood, size=1400, rate=1000.0),
    ),
    _case("up-64", "up, 64 B, unpaced", 1500, up=True, size=64),
    _case("down-64", "down, 64 B, flooded", 1500, up=False, size=64),
    _case("up-8k", "up, 8 KiB in fragments, unpaced", 1500, up=True, size=8192),
    _case("up-8k-paced", "up, 8 KiB in fragments, 2 000/s", 1500, up=True, size=8192, rate=2_000.0),
    _case("down-8k", "down, 8 KiB in fragments, flooded", 1500, up=False, size=8192),
    _case("down-8k-paced", "down, 8 KiB in fragments, 2 000/s", 1500, up=False, size=8192, rate=2_000.0),
    *_latencies("latency-64", "question and answer, 64 B", 1500, size=64),
    _case("up-8k-65520", "up, 8 KiB at MTU 65520, unpaced", 65520, up=True, size=8192),
    _case("down-8k-65520", "down, 8 KiB at MTU 65520, flooded", 65520, up=False, size=8192),
    *_latencies("latency-8k-65520", "question and answer, 8 KiB at MTU 65520", 65520, size=8192),
)
