# SPDX-License-Identifier: GPL-2.0-or-later
"""What the control thread does to the engine: stop it, take flows out of it, live with few descriptors."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from godwit.dataplane import Engine, FlowState, Side, moving
from godwit.net import native

from .arrivals import add_flow as add_flow_with
from .driver import Guest, other_frame

V4 = bytes(10) + b"\xff\xff"
LOOPBACK = V4 + bytes((127, 0, 0, 1))


def flow_to(port: int, own: int) -> FlowState:
    """An established flow of a guest's with a host socket from ``own`` to ``port`` of the loopback."""
    guest = Side(LOOPBACK, V4 + bytes((192, 0, 2, 10)), port, own)
    return FlowState(
        (2, 1), (guest, Side(LOOPBACK, LOOPBACK, own, port)), 0, 7, 8, 0x04, 1460, 0, 0, 0, 1000, 1000, 1, 1, 1, 1, 1
    )


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine(64)
    made.configure(our_mac=bytes((2, 0, 0, 0, 0, 1)), addr4=V4 + bytes((192, 0, 2, 10)))
    yield made
    made.close()


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        sock.settimeout(5.0)
        yield sock


def add_flow(engine: Engine, server: socket.socket) -> tuple[int, socket.socket]:
    """A flow in the engine, and the peer of its socket."""
    ours = socket.create_connection(server.getsockname())
    peer, _ = server.accept()
    peer.settimeout(5.0)
    own = ours.getsockname()[1]
    with engine.parked():
        flow = add_flow_with(engine, flow_to(server.getsockname()[1], own), ours, goes_on=True)
    return flow, peer


def is_reset(sock: socket.socket) -> bool:
    try:
        return bool(sock.recv(1)) and False
    except ConnectionResetError:
        return True


# ---- the thread


def test_closing_while_others_park() -> None:
    """No thread waits for ever, and what parked before the end may unpark after it."""
    for _ in range(50):
        engine = Engine(16)
        engine.start()
        stop = threading.Event()

        def work(engine: Engine = engine, stop: threading.Event = stop) -> None:
            while not stop.is_set():
                with engine.parked():
                    pass

        threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        engine.park()
        time.sleep(0.001)
        engine.close()
        engine.unpark()
        time.sleep(0.001)
        stop.set()
        for thread in threads:
            thread.join(10.0)
            assert not thread.is_alive()


def test_unpark_without_park(engine: Engine) -> None:
    with pytest.raises(ValueError, match="without park"):
        engine.unpark()


# ---- flows that leave


def test_released_socket_lives_on_and_tells_the_engine_nothing(engine: Engine, server: socket.socket) -> None:
    engine.start()
    flow, peer = add_flow(engine, server)
    with peer:
        with engine.parked():
            generation = engine.flow_generation(flow)
            assert generation is not None
            fd = engine.release_flow(flow)
            assert engine.flow_generation(flow) is None
        with socket.socket(fileno=fd) as ours:
            ours.setblocking(True)
            other, another = add_flow(engine, server)
            with another:
                assert other == flow  # its place is another's now, and that one has another name
                assert engine.flow_generation(other) == generation + 1
                peer.sendall(b"late")
                assert ours.recv(4) == b"late"
                assert engine.counters()["flows"] == 1
                ours.sendall(b"alive")
                assert peer.recv(5) == b"alive"


def test_a_flow_whose_socket_is_dropped_is_reset_for_the_peer(engine: Engine, server: socket.socket) -> None:
    flow, peer = add_flow(engine, server)
    with peer:
        engine.drop_flow_socket(flow)
        assert is_reset(peer)


def test_closing_all_flows_refuses_those_that_wait_to_be_accepted(engine: Engine, server: socket.socket) -> None:
    """They asked for a guest that is gone, and are not for the next one."""
    engine.listen(os.dup(server.fileno()), 80)
    waiting = [socket.create_connection(server.getsockname(), 5.0) for _ in range(3)]
    engine.close_flows()
    for sock in waiting:
        with sock:
            assert is_reset(sock)


# ---- few descriptors


def test_what_the_last_guest_asked_is_not_answered_to_the_next(guest: Guest) -> None:
    guest.send(other_frame(60))
    with guest.engine.parked():  # nothing of what is said to it now can be on its way
        assert guest.engine.inject(other_frame(100))
        guest.engine.detach()
        guest.attach(guest.rx.avail_idx)
        for _ in range(8):
            guest.post((2048,))
    guest.barrier()
    assert guest.collect() == []
    assert guest.engine.take_rare() == []


def test_flows_are_limited(engine: Engine) -> None:
    engine.limit_flows(2)
    came = moving.Arrivals(engine, 0, 0)

    def is_full(own: int) -> bool:
        """Whether there is no descriptor for one more. It is in the table all the same: it has to be, to be reset."""
        number = len(came)
        trouble = came.prepare(native.FLOW.encode(flow_to(80, own)), True)
        assert trouble in ([], [(number, errno.EMFILE)])
        assert came.flow(number) >= 0
        assert came.has_place(number) == (engine.flow_socket(came.flow(number))[0] >= 0) == (not trouble)
        return bool(trouble)

    assert [is_full(own) for own in (1000, 1001, 1002)] == [False, False, True]
    engine.forget_flow(came.flow(0))
    assert is_full(1003)  # the one beyond the limit counts as well
    for number in (1, 2):
        engine.forget_flow(came.flow(number))
    assert not is_full(1004)


def test_without_a_descriptor_connections_from_outside_are_refused(engine: Engine, server: socket.socket) -> None:
    """At once, rather than left to wait, and without the processor's time for it."""
    engine.listen(os.dup(server.fileno()), 80)
    engine.start()
    with contextlib.suppress(ConnectionResetError):
        socket.create_connection(server.getsockname(), 5.0).close()  # the first one has the spare descriptor made
    clients = [socket.socket() for _ in range(5)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as stack:
        for sock in clients:
            stack.enter_context(sock)
            sock.settimeout(5.0)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 10, hard))
        try:
            with contextlib.suppress(OSError):
                while True:
                    stack.callback(os.close, os.dup(0))
            waiting = []
            for sock in clients:
                with contextlib.suppress(ConnectionResetError):  # so early that connect() says so
                    sock.connect(server.getsockname())
                    waiting.append(sock)
            for sock in waiting:
                assert is_reset(sock)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert engine.counters()["drops"]["no_socket"] >= 5


def test_the_first_frame_after_a_quiet_time_is_told(guest: Guest) -> None:
    engine = guest.engine
    engine.watch_activity()
    engine.take_rare()
    assert not engine.was_active()
    assert not select.select([engine.rare_fileno()], [], [], 0.05)[0]
    dropped = other_frame(60)[:12] + b"\x88\xb5"  # of a protocol that nobody knows, and a frame all the same
    guest.send(dropped)
    assert select.select([engine.rare_fileno()], [], [], 5)[0]
    engine.take_rare()
    assert engine.was_active()
    guest.send(dropped)
    assert not select.select([engine.rare_fileno()], [], [], 0.05)[0]  # told once


@pytest.mark.parametrize("name", ["ring_call", "ring_err"])
def test_a_descriptor_that_is_but_a_name_is_refused_and_closed(guest: Guest, name: str) -> None:
    """O_PATH: nothing can be written to it, nor can it be told not to block."""
    fd = os.open("/", os.O_PATH | os.O_CLOEXEC)
    with pytest.raises(OSError, match="Bad file descriptor"):
        getattr(guest.engine, name)(0, fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_step_is_for_an_engine_without_a_thread(guest: Guest) -> None:
    """Two threads in one plane would be one too many."""
    with pytest.raises(RuntimeError, match="thread of its own"):
        guest.engine.step()
    guest.engine.close()
    assert guest.engine.inject(other_frame(60))
    before = guest.engine.counters()["frames_to_guest"]
    guest.engine.step()
    assert guest.engine.counters()["frames_to_guest"] == before + 1
