#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""What it costs that somebody asks how things stand: the daemon's processor time, and the guest's time.

    .venv/bin/python tools/control_cost.py [CONNECTIONS]

A guest with so many connections (8000), a download and an upload, and one connection over which it is asked and
answers, over and over: while nobody asks the daemon anything, and while lists of all flows are read, one after another;
five rounds of each, one after the other. Then a data plane with as many flows as there may be.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator

from godwit.cli import ctl
from godwit.dataplane import Engine, handover, listing
from godwit.dataplane.live import LiveFlag, LivePeer, LivePort
from godwit.lab.crowd import Crowd
from godwit.lab.guest import EmbeddedGuest
from godwit.lab.scenario import Load, Scenario

ROUNDS = 5
SECONDS = 1.5
PORT = 5998
RATE = 60_000_000  # bytes per second of each stream
MOST = 131071
HUNG = 20


def show(what: str, value: str) -> None:
    """A line."""
    sys.stdout.write(f"{what:58} {value}\n")


def percentile(values: list[float], share: float) -> float:
    """The value below which that share of them is."""
    return sorted(values)[int(len(values) * share)]


def cpu_seconds(pid: int) -> float:
    """What a process has used of the processors."""
    with open(f"/proc/{pid}/stat") as file:
        words = file.read().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> int:
    """Its memory, in kB."""
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))


@contextlib.contextmanager
def connection(scenario: Scenario) -> Iterator[tuple[socket.socket, socket.socket]]:
    """One of the guest's, and its other end."""
    assert isinstance(scenario.guest, EmbeddedGuest)
    with scenario.network.server.enter():
        listening = socket.create_server((scenario.server_address, PORT))
    with scenario.guest.space.enter():
        ours = socket.create_connection((scenario.server_address, PORT))
    with listening, ours, listening.accept()[0] as peer:
        for sock in (ours, peer):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield ours, peer


@contextlib.contextmanager
def lists(path: str, pauses: list[float]) -> Iterator[None]:
    """Somebody reads all flows, again and again."""
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            for line in ctl.ask(path, "flows"):
                last = line
            pauses.append(float(last.rpartition(b" ")[2].rstrip(b"}")))

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def measure(load: Load, ends: tuple[socket.socket, socket.socket]) -> tuple[float, list[float]]:
    """Gbit/s of both streams, and how long each answer took, in seconds."""
    ours, peer = ends
    began = time.monotonic()
    before = load.progress()
    took = []
    while time.monotonic() < began + SECONDS:
        asked = time.perf_counter()
        for sender, receiver in ((peer, ours), (ours, peer)):
            sender.sendall(b"?")
            receiver.recv(1)
        took.append(time.perf_counter() - asked)
    carried = sum(
        now.bytes - was.bytes
        for was, now in zip(before.values(), load.progress().values(), strict=True)
        if was is not None and now is not None
    )
    return carried * 8 / (time.monotonic() - began) / 1e9, took


def a_guest(count: int) -> None:
    """What a guest with so many connections notices, and what its daemon does."""
    with Scenario() as scenario, contextlib.ExitStack() as held:
        assert isinstance(scenario.guest, EmbeddedGuest)
        pid, path = scenario.backends["a"].pid, f"{scenario.backends['a'].socket}.ctl"
        crowd = Crowd(scenario.guest.space, scenario.network.server, scenario.server_address)
        held.enter_context(crowd).open(count, tickers=0)
        for request in ("status", "metrics", "flows"):
            times = 10 if request == "flows" else 200
            before = cpu_seconds(pid)
            for _ in range(times):
                for _line in ctl.ask(path, request):
                    pass
            show(f"{request}: the daemon's processor time", f"{(cpu_seconds(pid) - before) / times * 1000:.2f} ms")
        load = scenario.start_load(idle=1, rate=RATE)
        ends = held.enter_context(connection(scenario))
        pauses: list[float] = []
        rates: dict[str, list[float]] = {"nobody asks": [], "flows are listed": []}
        answers: dict[str, list[float]] = {"nobody asks": [], "flows are listed": []}
        for _ in range(ROUNDS):
            for how in rates:
                with lists(path, pauses) if how == "flows are listed" else contextlib.nullcontext():
                    rate, took = measure(load, ends)
                rates[how].append(rate)
                answers[how] += took
        for how, took in answers.items():
            shown = ", ".join(f"{percentile(took, share) * 1e6:.0f}" for share in (0.5, 0.99, 0.999))
            show(f"{how}: median of the streams", f"{statistics.median(rates[how]):.2f} Gbit/s")
            show(f"{how}: an answer of the guest's, p50, p99, p99.9", f"{shown} us")
        show("lists read", str(len(pauses)))
        show("the longest pause in one: median", f"{statistics.median(pauses) * 1e6:.0f} us")
        before_hung = resident(pid)
        for _ in range(HUNG):
            sock = held.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(path)
            sock.sendall(b"flows\n")
        time.sleep(2.0)
        show(f"{HUNG} who asked for all flows and do not read: more memory", f"{resident(pid) - before_hung} kB")
        asked = time.perf_counter()
        ctl.document(path, "status")
        show("status, beside them", f"{(time.perf_counter() - asked) * 1000:.1f} ms")


def a_full_table() -> None:
    """How long the data plane's thread takes for its errands, with as many flows as there may be."""
    engine = Engine()
    ours = bytes(10) + b"\xff\xff\x0a\0\0\2"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port = handover.add_port(engine, LivePort(0, 0, ours, 5000, 0, 0), sock.detach(), [])
    for number in range(MOST):
        address = bytes(10) + b"\xff\xff\x0b" + number.to_bytes(3, "big")
        peer = LivePeer(LiveFlag.FROM_GUEST, ours, address, address, bytes(16), 7, 7, 0, 600_000, 0)
        handover.add_peer(engine, port, peer)
    engine.start()
    took = []
    place: int | None = 0
    while place is not None:
        _, place, seconds = listing.part(engine, place)
        took.append(seconds)
    engine.close()
    show(f"{MOST} flows: parts", str(len(took)))
    shown = ", ".join(f"{percentile(took, share) * 1e6:.1f}" for share in (0.5, 0.99, 0.9999))
    show("one part: p50, p99, longest", f"{shown} us")
    show("all of them", f"{sum(took) * 1000:.1f} ms")


def main() -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("connections", nargs="?", type=int, default=8000, help="of the guest's (8000)")
    count = parser.parse_args().connections
    show("load of the machine (1 minute), processors", f"{os.getloadavg()[0]:.1f}, {os.cpu_count()}")
    show("connections", str(count))
    a_guest(count)
    a_full_table()
    return 0


if __name__ == "__main__":
    sys.exit(main())
