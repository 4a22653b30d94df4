# SPDX-License-Identifier: GPL-2.0-or-later
"""The back-end's end, with helpers that answer, refuse, vanish, hang and lie."""

from __future__ import annotations

import errno
import os
import resource
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from godwit.repair.client import RepairListener
from godwit.repair.protocol import GUARD_NAME, MAX_SOCKETS, Repair, RepairError

from .conftest import FakeHelper, obey, repair_mode

Helpers = Callable[..., FakeHelper]
Connections = Callable[[int], list[socket.socket]]


@pytest.fixture
def _many_descriptors() -> Iterator[None]:
    """Two ends of each connection, and the copies that a helper in this process gets."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, before[1]), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def numbers(sockets: list[socket.socket]) -> list[int]:
    return [sock.fileno() for sock in sockets]


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- what it is for


def test_sockets_enter_and_leave_repair_mode(
    listener: RepairListener, helpers: Helpers, connections: Connections
) -> None:
    helper = helpers()
    sockets = connections(3)
    listener.set_mode(numbers(sockets), Repair.ON)
    assert [repair_mode(sock) for sock in sockets] == [1, 1, 1]
    listener.set_mode(numbers(sockets[1:]), Repair.OFF)
    assert [repair_mode(sock) for sock in sockets] == [1, 0, 0]
    listener.set_mode(numbers(sockets[:1]), Repair.OFF_NO_WP)
    assert [repair_mode(sock) for sock in sockets] == [0, 0, 0]
    assert helper.requests == [(Repair.ON, 3), (Repair.OFF, 2), (Repair.OFF_NO_WP, 1)]


@pytest.mark.usefixtures("_many_descriptors")
@pytest.mark.parametrize(
    ("count", "sizes"),
    [
        (0, []),
        (1, [1]),
        (MAX_SOCKETS, [MAX_SOCKETS]),
        (MAX_SOCKETS + 1, [MAX_SOCKETS, 1]),
        (1000, [253, 253, 253, 241]),
    ],
)
def test_many_sockets_go_in_batches(
    listener: RepairListener, helpers: Helpers, connections: Connections, count: int, sizes: list[int]
) -> None:
    helper = helpers()
    sockets = connections(count)
    listener.set_mode(numbers(sockets), Repair.ON)
    assert helper.requests == [(Repair.ON, size) for size in sizes]
    assert all(repair_mode(sock) == 1 for sock in sockets)


@pytest.mark.usefixtures("_many_descriptors")
def test_a_helper_that_overlooks_sockets_gets_them_again(
    listener: RepairListener, helpers: Helpers, connections: Connections
) -> None:
    helper = helpers(lambda number, mode, fds: obey(number, mode, fds[:100]))
    sockets = connections(250)
    listener.set_mode(numbers(sockets), Repair.ON)
    assert all(repair_mode(sock) == 1 for sock in sockets)
    assert helper.requests == [(Repair.ON, 250), (Repair.ON, 100), (Repair.ON, 50)]


# --- what goes wrong


def test_without_a_helper(listener: RepairListener, connections: Connections) -> None:
    with pytest.raises(RepairError, match="no repair helper is connected") as caught:
        listener.set_mode(numbers(connections(2)), Repair.ON)
    assert (caught.value.done, caught.value.uncertain) == (0, 0)
    assert not listener.connected()
    assert not listener.ever_connected


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "has closed the connection"),
        (b"\x00", "has answered ON wrongly: OFF"),
        (b"\xff", "has answered ON wrongly: OFF_NO_WP"),
        (b"\x07", "has answered ON wrongly: 7 is no value of TCP_REPAIR"),
        (b"\x01", "says that it has done ON, and has not"),
    ],
)
def test_a_helper_that_fails_is_let_go(
    listener: RepairListener, helpers: Helpers, connections: Connections, answer: bytes | None, message: str
) -> None:
    helper = helpers(lambda *_: answer)
    with pytest.raises(RepairError, match=message) as caught:
        listener.set_mode(numbers(connections(2)), Repair.ON)
    assert (caught.value.done, caught.value.uncertain) == (0, 2)
    assert "sockets 1 to 2 of 2" in str(caught.value)
    assert helper.ended.wait(10)
    assert not listener.connected()
    assert listener.ever_connected


def test_a_helper_that_hangs_is_let_go(listener: RepairListener, helpers: Helpers, connections: Connections) -> None:
    awake = threading.Event()

    def hang(*_: object) -> None:
        awake.wait(30)

    helpers(hang)
    started = time.monotonic()
    try:
        with pytest.raises(RepairError, match="has not answered for 1 s") as caught:
            listener.set_mode(numbers(connections(1)), Repair.ON)
    finally:
        awake.set()
    assert 0.9 < time.monotonic() - started < 5
    assert (caught.value.done, caught.value.uncertain) == (0, 1)
    assert not listener.connected()


@pytest.mark.usefixtures("_many_descriptors")
def test_the_batch_that_failed_is_named(listener: RepairListener, helpers: Helpers, connections: Connections) -> None:
    helpers(lambda number, mode, fds: obey(number, mode, fds) if number == 1 else None)
    sockets = connections(600)
    with pytest.raises(RepairError, match=r"\(sockets 254 to 506 of 600\)") as caught:
        listener.set_mode(numbers(sockets), Repair.ON)
    assert (caught.value.done, caught.value.uncertain) == (253, 253)
    assert [repair_mode(sock) for sock in sockets] == [1] * 253 + [0] * 347


def test_a_helper_that_died_is_noticed(listener: RepairListener, helpers: Helpers, connections: Connections) -> None:
    helper = helpers()
    assert listener.wait(10)
    assert listener.connected()
    helper.close()
    eventually(lambda: not listener.connected())
    assert listener.ever_connected
    with pytest.raises(RepairError, match="no repair helper is connected"):
        listener.set_mode(numbers(connections(1)), Repair.ON)


def test_a_helper_that_came_and_died_unseen_counts(listener: RepairListener, helpers: Helpers) -> None:
    helpers().close()
    assert not listener.connected()
    assert listener.ever_connected


def test_after_a_failure_the_next_helper_serves(
    listener: RepairListener, helpers: Helpers, connections: Connections
) -> None:
    sockets = connections(1)
    helpers(lambda *_: None)
    with pytest.raises(RepairError):
        listener.set_mode(numbers(sockets), Repair.ON)
    helpers()
    assert listener.wait(10)
    listener.set_mode(numbers(sockets), Repair.ON)
    assert repair_mode(sockets[0]) == 1


def test_the_helper_that_came_last_serves(listener: RepairListener, helpers: Helpers, connections: Connections) -> None:
    first = helpers()
    assert listener.wait(10)
    second = helpers()
    third = helpers()
    listener.set_mode(numbers(connections(1)), Repair.ON)
    assert (first.requests, second.requests, third.requests) == ([], [], [(Repair.ON, 1)])
    assert first.ended.wait(10)
    assert second.ended.wait(10)
    assert not third.ended.is_set()


def test_a_helper_that_comes_during_a_request_does_not_disturb_it(
    listener: RepairListener, helpers: Helpers, connections: Connections
) -> None:
    def another() -> bool:
        listener.accept_ready()  # as the event loop does
        return newest() is not before

    def slowly(number: int, mode: Repair, fds: list[int]) -> bytes | None:
        helpers()
        eventually(another)
        return obey(number, mode, fds)

    def newest() -> object:
        return listener._client

    first = helpers(slowly)
    client = listener.wait(10)
    assert client is not None
    before = newest()
    sockets = connections(1)
    client.set_mode(numbers(sockets), Repair.ON)  # not the listener's, which would ask the next one
    assert repair_mode(sockets[0]) == 1
    assert first.ended.wait(10)  # let go when its work was done
    listener.set_mode(numbers(sockets), Repair.OFF)
    assert repair_mode(sockets[0]) == 0
    assert first.requests == [(Repair.ON, 1)]


@pytest.mark.usefixtures("_many_descriptors")
def test_what_a_helper_leaves_undone_the_next_one_does(
    listener: RepairListener, helpers: Helpers, connections: Connections
) -> None:
    def die_with_an_heir(number: int, mode: Repair, fds: list[int]) -> bytes | None:
        if number == 1:
            return obey(number, mode, fds)
        obey(number, mode, fds[:10])
        heirs.append(helpers())
        return None

    heirs: list[FakeHelper] = []
    helpers(die_with_an_heir)
    sockets = connections(600)
    listener.set_mode(numbers(sockets), Repair.ON)
    assert all(repair_mode(sock) == 1 for sock in sockets)
    assert heirs[0].requests == [(Repair.ON, 253), (Repair.ON, 94)]


@pytest.mark.usefixtures("_many_descriptors")
def test_when_all_helpers_fail_the_error_covers_what_each_may_have_done(
    listener: RepairListener, helpers: Helpers, connections: Connections
) -> None:
    def fail_with_an_heir(number: int, mode: Repair, fds: list[int]) -> bytes | None:
        if number == 1:
            return obey(number, mode, fds)
        helpers(lambda number, mode, fds: obey(number, mode, fds[:50]) if number == 1 else None)
        return None

    helpers(fail_with_an_heir)
    with pytest.raises(RepairError) as caught:
        listener.set_mode(numbers(connections(600)), Repair.ON)
    assert (caught.value.done, caught.value.uncertain) == (303, 203)


# --- waiting


def test_a_helper_that_has_come_is_tried(
    listener: RepairListener, helpers: Helpers, net_admin: None, caplog: pytest.LogCaptureFixture
) -> None:
    """On a socket of nobody's, and only once: so one that refuses is noticed before it is needed."""
    came: list[None] = []
    listener.on_come = lambda: came.append(None)
    helper = helpers()
    listener.accept_ready()
    assert (len(came), listener.untried) == (1, True)
    for _ in range(2):
        listener.try_out()
    # As many as a message can have: passt-repair takes no more in later ones.
    assert helper.requests == [(Repair.ON, MAX_SOCKETS)]
    assert (listener.untried, listener.connected(), listener.refused, listener.asked) == (False, True, "", 0)
    assert not [record for record in caplog.records if record.levelname != "INFO"]


@pytest.mark.parametrize("answer", [None, b"\x02"], ids=["closes", "answers wrongly"])
def test_a_helper_that_refuses_is_noticed_when_it_comes(
    listener: RepairListener,
    helpers: Helpers,
    connections: Connections,
    caplog: pytest.LogCaptureFixture,
    answer: bytes | None,
) -> None:
    helpers(lambda *_: answer)
    listener.accept_ready()
    listener.try_out()
    assert listener.refused
    assert not listener.connected()
    said = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(said) == 1
    assert "connections cannot move with it" in said[0]
    assert f"started with --user, let that be {os.geteuid()}," in said[0]
    with pytest.raises(RepairError, match="has refused"):
        listener.set_mode([connections(1)[0].fileno()], Repair.ON)
    helpers()
    listener.accept_ready()
    listener.try_out()
    assert (listener.connected(), listener.refused) == (True, "")


def test_a_helper_that_goes_before_it_is_tried_has_not_refused(listener: RepairListener, helpers: Helpers) -> None:
    helpers()
    listener.accept_ready()
    helpers()
    listener.accept_ready()
    listener.try_out()
    assert (listener.connected(), listener.refused) == (True, "")
    listener.close()
    listener.try_out()
    assert listener.refused == ""


def test_wait_ends_when_a_helper_comes(listener: RepairListener, helpers: Helpers) -> None:
    late = threading.Timer(0.3, helpers)
    started = time.monotonic()
    late.start()
    try:
        assert listener.wait(20)
    finally:
        late.join()
    assert 0.2 < time.monotonic() - started < 5


def test_wait_ends_without_a_helper(listener: RepairListener) -> None:
    started = time.monotonic()
    assert not listener.wait(0.3)
    assert 0.25 < time.monotonic() - started < 5


def test_closing_ends_a_wait(listener: RepairListener) -> None:
    closing = threading.Timer(0.3, listener.close)
    closing.start()
    started = time.monotonic()
    assert not listener.wait(20)
    closing.join()
    assert time.monotonic() - started < 5


def test_closing_ends_a_request_under_way(listener: RepairListener, helpers: Helpers, connections: Connections) -> None:
    awake = threading.Event()
    busy = threading.Event()

    def hang(*_: object) -> None:
        busy.set()
        awake.wait(30)

    helpers(hang)
    failed: list[RepairError] = []

    def ask() -> None:
        try:
            listener.set_mode(numbers(connections(1)), Repair.ON)
        except RepairError as error:
            failed.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        assert busy.wait(10)
        listener.close()
        asking.join(10)
    finally:
        awake.set()
    assert len(failed) == 1
    assert "has not answered" not in str(failed[0])  # as it would be after the time limit


# --- the socket


def test_the_socket_is_for_this_user_and_goes_with_the_listener(tmp_path: Path) -> None:
    path = tmp_path / "r"
    listener = RepairListener(str(path))
    found = os.stat(path)
    assert stat.S_ISSOCK(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o600
    listener.close()
    assert not path.exists()
    listener.close()


def test_a_socket_of_the_dead_is_taken_over(tmp_path: Path) -> None:
    path = str(tmp_path / "r")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as left:
        left.bind(path)
        left.listen()
    listener = RepairListener(path)
    helper = FakeHelper(path)
    try:
        assert listener.wait(10)
    finally:
        helper.close()
        listener.close()


def test_a_socket_of_the_living_is_not(listener: RepairListener, helpers: Helpers) -> None:
    helper = helpers()
    assert listener.wait(10)
    with pytest.raises(OSError) as caught:
        RepairListener(listener.path)
    assert caught.value.errno == errno.EADDRINUSE
    assert os.path.exists(listener.path)
    assert not helper.ended.is_set()


def test_a_file_is_not_taken_for_a_socket(tmp_path: Path) -> None:
    path = tmp_path / "r"
    path.write_text("precious")
    with pytest.raises(OSError) as caught:
        RepairListener(str(path))
    assert caught.value.errno == errno.EADDRINUSE
    assert path.read_text() == "precious"


def test_a_successor_keeps_its_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "r")
    first = RepairListener(path)
    os.unlink(path)
    second = RepairListener(path)
    first.close()
    assert os.path.exists(path)
    second.close()
    assert not os.path.exists(path)


# --- one that keeps back resets


def test_a_guard_is_ended_once(listener: RepairListener, helpers: Helpers) -> None:
    """By a request as any other."""
    helper = helpers(name=GUARD_NAME + b"test-once")
    listener.end_guard()
    listener.end_guard()
    assert helper.requests == [(Repair.OFF, 1)]


@pytest.mark.parametrize("name", [b"", b"\0another"])
def test_other_helpers_are_not_asked(listener: RepairListener, helpers: Helpers, name: bytes) -> None:
    """Nor if there is none at all."""
    listener.end_guard()
    helper = helpers(name=name)
    listener.end_guard()
    assert helper.requests == []


def test_connections_that_are_back_have_ended_the_guard(
    listener: RepairListener, helpers: Helpers, connections: Connections
) -> None:
    helper = helpers(name=GUARD_NAME + b"test-back")
    sockets = numbers(connections(1))
    listener.set_mode(sockets, Repair.ON)
    listener.set_mode(sockets, Repair.OFF)
    listener.end_guard()
    assert helper.requests == [(Repair.ON, 1), (Repair.OFF, 1)]


def test_a_guard_that_does_not_end_is_reported(
    listener: RepairListener, helpers: Helpers, caplog: pytest.LogCaptureFixture
) -> None:
    helpers(lambda _number, _mode, _fds: None, name=GUARD_NAME + b"test-bad")
    listener.end_guard()
    assert "the guard of the repair helper: the repair helper has closed the connection" in caplog.text


def test_a_guard_is_known_to_who_goes_on_with_the_connection(listener: RepairListener, helpers: Helpers) -> None:
    helper = helpers(name=GUARD_NAME + b"test-adopted")
    assert listener.wait(20)
    other = RepairListener.adopt(listener.path, *map(os.dup, listener.descriptors()))
    try:
        other.end_guard()
        assert helper.requests == [(Repair.OFF, 1)]
    finally:
        other.close()


def test_a_connection_whose_helper_has_gone_is_adopted_all_the_same(listener: RepairListener, helpers: Helpers) -> None:
    helper = helpers(name=GUARD_NAME + b"test-gone")
    assert listener.wait(20)
    fds = [os.dup(fd) for fd in listener.descriptors()]
    helper.close()
    other = RepairListener.adopt(listener.path, *fds)
    other.end_guard()
    assert helper.requests == []
    other.close()
