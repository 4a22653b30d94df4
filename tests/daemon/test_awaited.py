# SPDX-License-Identifier: GPL-2.0-or-later
"""Connections that wait for their address: for how long, and what is left behind. See tests/lab/test_addresses.py."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import pytest

from godwit.daemon import awaited
from godwit.daemon.awaited import Awaited, Waiting, is_here
from godwit.dataplane import Engine, FlowState, Side, SocketState
from godwit.net.records import V4_MAPPED

from ..dataplane.arrivals import arrive

NOBODYS = V4_MAPPED + bytes((203, 0, 113, 77))
NOBODYS6 = bytes.fromhex("20010db8000000000000000000000077")
GUEST = V4_MAPPED + bytes((10, 0, 0, 2))
PEER = V4_MAPPED + bytes((10, 0, 0, 3))
PEER6 = bytes.fromhex("20010db8000000000000000000000003")
PORT = 47011
LISTEN = "0A"  # proc(5), /proc/net/tcp


def flow(address: bytes, port: int) -> FlowState:
    peer = PEER if address.startswith(V4_MAPPED) else PEER6
    guest, host = Side(PEER, GUEST, 80, port), Side(address, peer, port, 80)
    return FlowState((2, 1), (guest, host), 0, 0, 0, 0x06, 1400, 0, 0, 0, 1000, 1000, 1, 1, 1, 1, 1)


class Rig:
    """An engine with flows that wait, and threads that are the test's."""

    def __init__(self) -> None:
        self.engine = Engine(16)
        self.threads: list[threading.Timer] = []
        self.came: list[int] = []
        self.late: list[int] = []
        self.may = True
        self.awaited = Awaited(
            self.engine,
            threading.RLock(),
            arrive=self.arrive,
            may=lambda: self.may,
            shared=lambda _port: contextlib.nullcontext(False),
            schedule=self.schedule,
        )

    def schedule(self, delay: float, work: Callable[[], None]) -> None:
        thread = threading.Timer(delay, work)
        thread.start()  # before close() can find it: what has not begun cannot be joined
        self.threads.append(thread)

    def arrive(self, came: Mapping[int, Waiting], late: Mapping[int, Waiting]) -> None:
        self.came += came
        self.late += late

    def wait(self, *addresses: bytes) -> list[int]:
        """Have a flow wait for each of them."""
        flows: dict[int, Waiting] = {}
        with self.engine.parked():
            for number, address in enumerate(addresses):
                state = flow(address, PORT + number)
                came = arrive(self.engine, state)
                came.free_socket(0)  # it gets another one when the address is here
                index = came.flow(0)
                self.awaited.keep(address, PORT + number)
                flows[index] = Waiting(state, state.sides[1], SocketState(*([0] * 16)), b"", b"")
            self.awaited.wait(flows)
        return list(flows)

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def close(self) -> None:
        self.awaited.forget()
        while self.threads:
            self.threads.pop().join()
        self.engine.close()


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setattr(awaited, "LOOK_EVERY", 0.01)
    made = Rig()
    yield made
    made.close()


def listening() -> int:
    """How many sockets listen at the addresses that nobody has."""
    found = 0
    for name in ("tcp", "tcp6"):
        with open(f"/proc/self/net/{name}") as table:
            for _, local, _, state, *_ in map(str.split, table):
                found += state == LISTEN and int(local.rpartition(":")[2], 16) in range(PORT, PORT + 4)
    return found


def test_which_addresses_are_here() -> None:
    assert is_here(V4_MAPPED + bytes((127, 0, 0, 1)), 0)
    assert not is_here(NOBODYS, 0)
    assert not is_here(NOBODYS6, 0)


def test_patience_ends(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flow is handed back as late, once, and the port is nobody's any more."""
    monkeypatch.setattr(awaited, "PATIENCE", 1.0)
    began = time.monotonic()
    waiting = rig.wait(NOBODYS, NOBODYS6)
    assert listening() == 2
    rig.until(lambda: rig.late == waiting)
    assert time.monotonic() - began >= 1.0
    rig.until(lambda: not listening())
    assert rig.came == []
    assert rig.awaited.get(waiting[0]) is None


def test_one_that_is_here_comes_and_the_other_waits_on(rig: Rig) -> None:
    waiting = rig.wait(NOBODYS, V4_MAPPED + bytes((127, 0, 0, 1)))
    rig.until(lambda: rig.came == waiting[1:])
    rig.until(lambda: listening() == 1)
    assert rig.awaited.get(waiting[0]) is not None
    assert rig.late == []


def test_nothing_comes_while_a_migration_is_under_way(rig: Rig) -> None:
    rig.may = False
    waiting = rig.wait(V4_MAPPED + bytes((127, 0, 0, 1)))
    rig.until(lambda: len(rig.threads) > 5)  # it has looked that often
    assert rig.came == []
    assert rig.awaited.get(waiting[0]) is not None
    rig.may = True
    rig.until(lambda: rig.came == waiting)


def test_a_flow_that_has_ended_meanwhile_is_not_seen_to(rig: Rig) -> None:
    rig.may = False
    first, second = rig.wait(V4_MAPPED + bytes((127, 0, 0, 1)), V4_MAPPED + bytes((127, 0, 0, 2)))
    with rig.engine.parked():
        rig.engine.forget_flow(first)
    rig.may = True
    rig.until(lambda: rig.came == [second])
    rig.until(lambda: not listening())


def test_a_port_that_another_program_has_cannot_be_kept(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.3", PORT)):
        rig.awaited.keep(V4_MAPPED + bytes((127, 0, 0, 3)), PORT)
    assert f"127.0.0.3 port {PORT} cannot be kept: Address already in use" in caplog.text


def test_the_clock_goes_on_while_a_connection_waits() -> None:
    ends = flow(NOBODYS, 4000)
    state = SocketState(0, 0, 0, 0, 0, 1000, 0xFFFFFFF0, 0, 0, 0, 0, 0, 0, 0, 1, 2)
    waiting = Waiting(ends, ends.sides[1], state, b"", b"", since=time.monotonic() - 5)
    assert 4900 <= waiting.on_time().timestamp <= 10000
    assert waiting.on_time().timestamp % 2 == 0  # in milliseconds still
    fine = Waiting(ends, ends.sides[1], state._replace(timestamp=1), b"", b"", since=time.monotonic() - 5)
    assert 4_900_000 <= fine.on_time().timestamp <= 10_000_000
    assert fine.on_time().timestamp % 2 == 1
    none = Waiting(ends, ends.sides[1], state._replace(timestamp=0), b"", b"", since=time.monotonic() - 5)
    assert none.on_time().timestamp == 0
