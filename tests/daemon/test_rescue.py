# SPDX-License-Identifier: GPL-2.0-or-later
"""Flows that stand still for want of a helper: who may end that, and whose they are."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import pytest

from godwit.daemon import rescue
from godwit.daemon.rescue import Rescue
from godwit.dataplane import Engine, FlowState, Side
from godwit.lab.netns import wait_until
from godwit.repair import in_repair

from ..dataplane.arrivals import add_flow

V4 = bytes(10) + b"\xff\xff"
LOOPBACK = V4 + bytes((127, 0, 0, 1))
TCP_REPAIR = 19


class Repair:
    """Stands in for the listener: says when a helper is there."""

    def __init__(self) -> None:
        self.there = threading.Event()
        self.asked = threading.Event()

    def wait(self, timeout: float) -> object:
        self.asked.set()
        return self if self.there.wait(timeout) else None


class Rig:
    """An engine with flows, and a rescue whose threads are the test's."""

    def __init__(self) -> None:
        self.engine = Engine(16)
        self.repair = Repair()
        self.threads: list[threading.Thread] = []
        self.resumed: list[int] = []
        self.peers: list[socket.socket] = []
        self.server = socket.create_server(("127.0.0.1", 0))
        self.obeys = True
        self.lock = threading.RLock()
        self.rescue = Rescue(
            self.engine,
            self.repair,
            self.lock,
            leave_repair=self.leave_repair,
            resume=self.resume,
            schedule=self.schedule,
        )

    def schedule(self, delay: float, work: Callable[[], None]) -> None:
        self.threads.append(threading.Timer(delay, work))
        self.threads[-1].start()

    def leave_repair(self, flows: Sequence[int]) -> None:
        if self.obeys:
            self.set_repair(flows, 0)
        else:
            self.repair.there.clear()

    def resume(self, flows: Iterable[int]) -> None:
        self.resumed += flows

    def set_repair(self, flows: Iterable[int], mode: int) -> None:
        for flow in flows:
            sock = socket.socket(fileno=self.engine.flow_socket(flow)[0])
            sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, mode)
            sock.detach()

    def in_repair(self, flow: int) -> bool:
        return in_repair(self.engine.flow_socket(flow)[0])

    def hold(self, flows: Sequence[int]) -> None:
        self.set_repair(flows, 1)
        with self.lock, self.engine.parked():
            self.rescue.hold(flows)

    def add(self) -> int:
        ours = socket.create_connection(self.server.getsockname())
        peer, _ = self.server.accept()
        peer.settimeout(5.0)
        self.peers.append(peer)
        port, own = self.server.getsockname()[1], ours.getsockname()[1]
        sides = (Side(LOOPBACK, V4 + bytes((192, 0, 2, 10)), port, own), Side(LOOPBACK, LOOPBACK, own, port))
        state = FlowState((2, 1), sides, 0, 7, 8, 0x04, 1460, 0, 0, 0, 1000, 1000, 1, 1, 1, 1, 1)
        return add_flow(self.engine, state, ours)

    def join(self) -> None:
        while self.threads:
            self.threads.pop().join(10.0)

    def close(self) -> None:
        self.repair.there.set()
        self.join()
        self.engine.close()
        for sock in (*self.peers, self.server):
            sock.close()


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setattr(rescue, "PATIENCE", 0.5)
    made = Rig()
    yield made
    made.close()


def alive(rig: Rig, flow: int) -> bool:
    """Whether it has its socket still: without a ring the guest cannot be told of a reset."""
    return rig.engine.flow_socket(flow)[0] >= 0


def test_a_helper_that_comes_frees_what_is_held(rig: Rig) -> None:
    flows = [rig.add(), rig.add()]
    rig.hold(flows)
    rig.repair.there.set()
    rig.join()
    assert rig.resumed == flows


def test_without_a_helper_they_are_reset(rig: Rig) -> None:
    flow, other = rig.add(), rig.add()
    rig.hold([flow])
    rig.join()
    assert rig.resumed == []
    assert not alive(rig, flow)
    assert alive(rig, other)


def test_when_no_helper_can_come_any_more_they_are_reset_at_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rescue, "PATIENCE", 60.0)
    monkeypatch.setattr(rig.repair, "wait", lambda timeout: None)
    flow = rig.add()
    started = time.monotonic()
    rig.hold([flow])
    rig.join()
    assert time.monotonic() - started < 5
    assert not alive(rig, flow)


def test_a_helper_that_fails_leaves_them_to_the_next(rig: Rig) -> None:
    flow = rig.add()
    rig.obeys = False
    rig.repair.there.set()
    rig.hold([flow])
    while rig.repair.there.is_set():
        time.sleep(0.001)
    rig.obeys = True
    rig.repair.there.set()
    rig.join()
    assert rig.resumed == [flow]


def test_each_waits_for_its_own_time(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rescue, "PATIENCE", 1.5)
    first, second = rig.add(), rig.add()
    rig.hold([first])
    time.sleep(1.0)
    rig.hold([second])
    wait_until(lambda: not alive(rig, first), "the first to be given up")
    assert alive(rig, second)
    rig.join()
    assert not alive(rig, second)


def test_a_flow_that_others_see_to_is_left_to_them(rig: Rig) -> None:
    """It moves, in repair mode still: to end that would have the kernel acknowledge what nobody saves."""
    flow = rig.add()
    rig.hold([flow])
    with rig.lock:
        rig.rescue.release([flow])
    rig.repair.there.set()
    rig.join()
    assert rig.resumed == []
    assert rig.in_repair(flow)


def test_the_flow_in_the_place_of_a_held_one_is_left_alone(rig: Rig) -> None:
    """Of the next guest, say, and in repair mode for a migration."""
    flow = rig.add()
    rig.hold([flow])
    assert rig.repair.asked.wait(5.0)
    rig.engine.close_flows()
    assert rig.add() == flow
    rig.set_repair([flow], 1)
    rig.repair.there.set()
    rig.join()
    assert rig.resumed == []
    assert rig.in_repair(flow)
    assert alive(rig, flow)


def test_a_held_flow_that_was_reset_needs_no_rescue(rig: Rig) -> None:
    flow = rig.add()
    rig.hold([flow])
    with rig.engine.parked():
        rig.engine.reset_flow(flow)
    rig.repair.there.set()
    rig.join()
    assert rig.resumed == []
