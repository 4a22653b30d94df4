# SPDX-License-Identifier: GPL-2.0-or-later
"""The TCP bench: do its senders, receivers and clients count right, and does each case measure each kind?"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from godwit.lab import tcp_bench
from godwit.lab._tcp import Answerer, Echo, Receiver, Sender, ask, visit
from godwit.lab.backend import IDEAL, Kind, Program
from godwit.lab.bench import NONE, PORT_COUNT, Bed, Case, Working
from godwit.lab.errors import LabError
from godwit.lab.netns import Namespace, wait_until

Pairs = tuple[list[socket.socket], list[socket.socket]]

SECONDS = 0.05
KINDS: tuple[Kind, ...] = ("godwit", IDEAL, NONE)  # passt, which would have to be fetched, is measured in tests/vm
CASES = {case.name: case for case in tcp_bench.CASES}
WAITS = {"ms until steady", "longest standstill ms"}  # which may be 0
STREAMS = {"Gbit/s from the beginning"} | WAITS
ALONE = [
    "stream-up-1-1500-together",
    "stream-down-4-1500-together",
    "rr-together",
    "rr-16",
    "crr-together",
    "crr-forward-together",
]


@contextlib.contextmanager
def pairs(count: int) -> Iterator[Pairs]:
    """Connections over the loopback."""
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        ones, others = [], []
        for _ in range(count):
            ones.append(stack.enter_context(socket.create_connection(listening.getsockname())))
            others.append(stack.enter_context(listening.accept()[0]))
        yield ones, others


def fds(socks: list[socket.socket]) -> list[int]:
    return [sock.fileno() for sock in socks]


@contextlib.contextmanager
def peer(work: object) -> Iterator[tuple[str, list[int]]]:
    """A listener whose connections are given to a function, one after the other."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    sock, _ = listening.accept()
                    with sock, contextlib.suppress(OSError):
                        assert callable(work)
                        work(sock)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield "127.0.0.1", [listening.getsockname()[1]]
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


# --- streams ------------------------------------------------------------------------


def test_what_is_sent_is_counted() -> None:
    with pairs(3) as (ones, others):
        sender, receiver = Sender(fds(ones)), Receiver(fds(others))
        sending, receiving = Working(sender.run), Working(receiver.run)
        wait_until(lambda: all(receiver.bytes), "something to arrive over each", 10.0)
        under_way = receiver.bytes
        sender.stop()
        sending.result()
        for one in ones:
            one.close()
        receiving.result()
    assert receiver.bytes == sender.bytes
    assert all(early <= late for early, late in zip(under_way, receiver.bytes, strict=True))


def test_the_end_of_a_stream_is_not_the_end_of_the_others() -> None:
    with pairs(2) as (ones, others):
        receiver = Receiver(fds(others))
        receiving = Working(receiver.run)
        ones[0].sendall(b"short")
        ones[0].close()
        for _ in range(10):
            time.sleep(0.005)
            ones[1].sendall(bytes(1000))
        ones[1].close()
        receiving.result()
        assert receiver.bytes == [5, 10_000]


def test_a_stream_that_stands_still_is_a_failure() -> None:
    """Though the other one goes on."""
    with pairs(2) as (ones, others):
        sender, receiver = Sender(fds(ones[:1])), Receiver(fds(others), patience=100)
        sending = Working(sender.run)
        try:
            with pytest.raises(TimeoutError, match="stream 1 stood still for 100 ms"):
                receiver.run()
        finally:
            sender.stop()
            sending.result()


def test_a_stream_that_is_reset_is_a_failure() -> None:
    with pairs(1) as (ones, others):
        ones[0].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        ones[0].close()
        with pytest.raises(ConnectionResetError):
            Receiver(fds(others)).run()
        with pytest.raises(BrokenPipeError):
            Sender(fds(others)).run()


@pytest.mark.parametrize(("shares", "index"), [([5, 5, 5, 5], 1.0), ([7, 0, 0, 0], 0.25), ([1, 3], 0.8)])
def test_fairness(shares: list[int], index: float) -> None:
    assert tcp_bench.fairness(shares) == pytest.approx(index)


def halting(sock: socket.socket, at_first: float, later: float) -> None:
    """Send a byte, and others after a while, with a halt before each; until the other end is shut."""
    with contextlib.suppress(OSError):
        sock.sendall(b".")
        time.sleep(at_first)
        while True:
            sock.sendall(b".")
            time.sleep(later)


@contextlib.contextmanager
def arriving(*halts: tuple[float, float]) -> Iterator[tuple[Receiver, Working]]:
    """The receiver of streams that halt for so long: after the first byte, and after each other one."""
    with pairs(len(halts)) as (ones, others):
        receiver = Receiver(fds(others))
        receiving = Working(receiver.run)
        sending = [Working(functools.partial(halting, one, *halt)) for one, halt in zip(ones, halts, strict=True)]
        try:
            yield receiver, receiving
        finally:
            receiver.stop()
            receiving.result()
            for sock in (*ones, *others):
                sock.shutdown(socket.SHUT_RDWR)
            for each in sending:
                each.result()


RUNS = 0.0, 0.001


def test_what_is_measured_begins_when_all_streams_run() -> None:
    began = time.monotonic()
    with arriving(RUNS, (0.5, 0.001)) as (receiver, receiving):
        steady = tcp_bench._until_steady(receiver, receiving, began + 30)
    assert steady - began > 0.5 - tcp_bench.SLICE


def test_the_longest_standstill() -> None:
    """It is one of all the streams, and not longer than it was."""
    with arriving((0.5, 0.001)) as (receiver, _):
        assert 0.2 < tcp_bench._longest_standstill(receiver, 0.7) <= 0.7
    with arriving(RUNS, (0.5, 0.001)) as (receiver, _):
        assert tcp_bench._longest_standstill(receiver, 0.4) < 0.35


def test_streams_that_do_not_run() -> None:
    """One that halts again and again is told of; so is one that ends, by its own error."""
    halt = 4 * tcp_bench.SLICE
    with arriving(RUNS, (halt, halt)) as (receiver, receiving), pytest.raises(LabError, match="no steady rate"):
        tcp_bench._until_steady(receiver, receiving, time.monotonic() + 0.5)
    with pairs(1) as (_, others):
        receiver = Receiver(fds(others), patience=50)
        with pytest.raises(TimeoutError, match="stream 0 stood still"):
            tcp_bench._until_steady(receiver, Working(receiver.run), time.monotonic() + 30)


# --- transactions -----------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 16])
def test_questions_and_answers(count: int) -> None:
    with pairs(count) as (ones, others):
        echo = Echo(fds(others))
        echoing = Working(echo.run)
        began = time.monotonic_ns()
        times = ask(fds(ones), seconds=0.2)
        took = time.monotonic_ns() - began
        echo.stop()
        echoing.result()
    assert len(times) == sum(echo.bytes)
    assert all(asked > 1 for asked in echo.bytes)
    # Over each connection one is always under way, and never two.
    assert took * count / 10 < sum(times) <= took * count


def test_a_wrong_answer() -> None:
    with pairs(1) as (ones, others):

        def answer() -> None:
            byte = others[0].recv(1)
            others[0].send(bytes([byte[0] ^ 1]))

        answering = Working(answer)
        with pytest.raises(OSError, match="Bad message"):
            ask(fds(ones), seconds=1)
        answering.result()


def test_an_answer_too_many() -> None:
    with pairs(1) as (ones, others):

        def answer() -> None:
            others[0].send(others[0].recv(1) * 2)

        answering = Working(answer)
        with pytest.raises(OSError, match="Bad message"):
            ask(fds(ones), seconds=1)
        answering.result()


def test_no_answer() -> None:
    with pairs(2) as (ones, _), pytest.raises(TimeoutError):
        ask(fds(ones), seconds=0.01, patience=20)


def test_a_connection_that_ends() -> None:
    with pairs(1) as (ones, others):
        others[0].shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionResetError):
            ask(fds(ones), seconds=1)


# --- connections ----------------------------------------------------------------------------


def test_short_connections() -> None:
    """The ports take turns, and it is the server's side that goes through TIME_WAIT."""
    with contextlib.ExitStack() as stack:
        space = stack.enter_context(Namespace("alone"))
        stack.enter_context(space.enter())
        listening = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        ports = [sock.getsockname()[1] for sock in listening]
        answerer = Answerer(fds(listening))
        answering = Working(answerer.run)
        began = time.monotonic_ns()
        times = visit("127.0.0.1", ports, seconds=0.2)
        took = time.monotonic_ns() - began
        answerer.stop()
        answering.result()
        waiting = space.run("ss", "-Htn", "state", "time-wait").stdout.split("\n")[:-1]
    assert sum(answerer.bytes) == len(times) > 2
    assert answerer.bytes[0] - answerer.bytes[1] in (0, 1)
    assert took / 10 < sum(times) <= took
    local = [int(line.split()[2].rpartition(":")[2]) for line in waiting]
    assert len(times) / 2 < len(local) <= len(times)  # one whose ports are used again is one no longer (tcp_tw_reuse)
    assert set(local) == set(ports)


@pytest.mark.parametrize(
    ("work", "error"),
    [
        (lambda sock: sock.send(bytes([sock.recv(1)[0] ^ 1])), "Bad message"),
        (lambda sock: sock.send(sock.recv(1) + b"."), "Bad message"),
        (lambda sock: sock.recv(1), "reset"),
    ],
    ids=["wrong byte", "one too many", "none"],
)
def test_a_connection_that_goes_wrong(work: object, error: str) -> None:
    with peer(work) as (addr, ports), pytest.raises(OSError, match=error):
        visit(addr, ports, seconds=1, patience=10_000)


def test_a_connection_without_end() -> None:
    """What stands still is a failure after the patience, and not before."""
    began = time.monotonic()
    with (
        peer(lambda sock: sock.send(sock.recv(1)) and sock.recv(1)) as (addr, ports),
        pytest.raises(TimeoutError, match="connection 1"),
    ):
        visit(addr, ports, seconds=1, patience=100)
    assert time.monotonic() - began > 0.09  # by the kernel's ticks


def test_a_connection_that_nobody_takes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    with pytest.raises(ConnectionRefusedError, match="connection 1"):
        visit("127.0.0.1", [port], seconds=1)


# --- the cases ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    with Bed(1500, KINDS) as made:
        yield made


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in ALONE for kind in KINDS if kind not in CASES[name].without]
)
def test_a_case(name: str, kind: str, bed: Bed) -> None:
    case, side = CASES[name], bed.sides[kind]
    assert case.mtu == 1500
    values = case.measure(side, SECONDS)
    side.check()
    check(case, kind, values)


@pytest.mark.parametrize("name", ["rr-apart", "stream-down-4-1500-split", "stream-up-1-1500-split"])
def test_on_two_processors(name: str, bed: Bed) -> None:
    case, side = CASES[name], bed.sides["godwit"]
    if len(os.sched_getaffinity(0)) > 1:
        check(case, "godwit", case.measure(side, SECONDS))
    else:
        with pytest.raises(LabError, match="there is one processor only"):
            case.measure(side, SECONDS)


@pytest.mark.parametrize("up", [False, True], ids=["down", "up"])
def test_where_streams_run(up: bool, bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``split``, the guest's end and the front-end on one processor, back-end and server's end on another."""
    case, side = CASES[f"stream-{'up' if up else 'down'}-1-1500-split"], bed.sides["godwit"]
    first, *others = sorted(os.sched_getaffinity(0))
    if not others:
        with pytest.raises(LabError, match="there is one processor only"):
            case.measure(side, SECONDS)
        return
    found: dict[str, set[int]] = {}

    class Noting(Working):
        def run(self) -> None:
            super().run()  # and stays where it was
            found[str(len(found))] = os.sched_getaffinity(0)

    monkeypatch.setattr(tcp_bench, "Working", Noting)
    sampled = tcp_bench._sampled

    def noting(*arguments: Any) -> dict[str, float]:
        found["back-end"] = os.sched_getaffinity(side.pid or 0)
        found["front-end"] = os.sched_getaffinity(0)
        return sampled(*arguments)

    monkeypatch.setattr(tcp_bench, "_sampled", noting)
    case.measure(side, SECONDS)
    # The sender ends first.
    guest, host = ("2", "3") if up else ("3", "2")
    assert found == {"back-end": {others[0]}, host: {others[0]}, "front-end": {first}, guest: {first}}


def test_a_standstill_is_not_what_is_measured(bed: Bed) -> None:
    """The back-end is frozen while streams run: what is measured begins after that."""
    side = bed.sides["godwit"]
    assert side.guest is not None
    assert side.pid is not None
    guest, before = side.guest, side.guest.counters["to_guest_frames"]
    measuring = Working(lambda: CASES["stream-down-4-1500-together"].measure(side, 3.0))
    wait_until(lambda: guest.counters["to_guest_frames"] > before + 100, "streams", 10.0)
    time.sleep(1.0)
    os.kill(side.pid, signal.SIGSTOP)
    time.sleep(0.5)
    os.kill(side.pid, signal.SIGCONT)
    values = measuring.result()
    assert isinstance(values, dict)
    assert values["ms until steady"] > 1000


def check(case: Case, kind: object, values: dict[str, float]) -> None:
    """Each metric is there, and plausible."""
    streams = case.name.startswith("stream")
    rate = "Gbit/s" if streams else "connections/s" if case.name.startswith("crr") else "transactions/s"
    cost = {"CPU s/GiB", "CPU s/s"} if streams else {"CPU us"}
    other = STREAMS if streams else {"p50 us", "p99 us"}
    if case.name.startswith("stream-down-4"):
        other = other | {"fairness"}
    assert set(values) == {rate} | other | (cost if kind != "none" else set())
    assert all(value > 0 for metric, value in values.items() if metric not in WAITS)
    if not streams:
        assert values["p50 us"] <= values["p99 us"]


@pytest.fixture(scope="module")
def crowds() -> Iterator[tcp_bench.CrowdedBed]:
    with tcp_bench.CrowdedBed(200, 1500, ["godwit", "none"]) as made:
        yield made


def test_beside_idle_connections(crowds: tcp_bench.CrowdedBed) -> None:
    """They are there, beside a side without; and a case that is measured when one of them is not is a failure."""
    case, crowded = CASES["rr-idle-5000-together"], crowds.sides["godwit"]
    values = case.measure(crowded, 2 * SECONDS)
    without = {metric: value for metric, value in values.items() if metric.endswith(", none idle")}
    assert set(without) == {f"{metric}, none idle" for metric in ("p50 us", "p99 us", "CPU us")}
    assert all(value > 0 for value in without.values())
    check(case, "godwit", {metric: value for metric, value in values.items() if metric not in without})
    crowded.check()
    assert CASES["alive-idle-5000"].measure(crowded, SECONDS) == {"flows": 200}
    for side, count in ((crowded.side, 200), (crowded.empty, 0)):
        assert side.server.run("ss", "-Htn", "state", "established").stdout.count("\n") == count
    # Those to one port end: that is seen when it is their turn, at the latest after all.
    port = crowded.side.port + PORT_COUNT
    crowded.side.server.run("ss", "-K", "sport", "=", f":{port}")
    for _ in range(tcp_bench.IDLE_PORTS - 1):
        crowded.check()
    with pytest.raises(LabError, match="of 10 idle connections, 0 are alive"):
        crowded.check()
    with pytest.raises(LabError, match="of 10 idle connections, 0 are alive"):
        CASES["alive-idle-5000"].measure(crowded, SECONDS)


def test_idle_connections_that_do_not_open(crowds: tcp_bench.CrowdedBed) -> None:
    """One of the server's ports is taken."""
    crowded = crowds.sides["none"]
    port = crowded.side.port + PORT_COUNT + 3
    with (
        crowded.side.server.enter(),
        socket.create_server(("", port)),
        pytest.raises(LabError, match=r"of 200 idle connections, only 30 to 40 open"),
    ):
        CASES["crr-idle-5000-apart"].measure(crowded, SECONDS)
    crowded.check()


def test_stream_mode() -> None:
    """A back-end without it is a failure of its own."""
    other = Program("other", ("other", "{socket}"))
    case = CASES["stream-mode-down-1500"]
    with case.bed(1500, ["godwit", other]) as bed:
        values = case.measure(bed.sides["godwit"], SECONDS)
        bed.sides["godwit"].check()
        check(case, "godwit", values)
        with pytest.raises(LabError, match="other is started by its own command line"):
            case.measure(bed.sides[other], SECONDS)
        bed.sides[other].check()
