# SPDX-License-Identifier: GPL-2.0-or-later
"""Told to end, killed, started again, stopped and let go on: in every state that a back-end can be in."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from godwit.lab.backend import Backend
from godwit.lab.errors import LabError
from godwit.lab.guest import EmbeddedGuest
from godwit.lab.migration import Migration
from godwit.lab.netns import wait_until
from godwit.lab.scenario import Scenario
from godwit.vhost_user import Direction, FrontendClient, VhostUserError

from .moves import IDLE, OWN_PORT, RATE, connection, receive_all, suspended

SECONDS = 12.0  # for the end: what waits for a helper waits for 5 s, twice at most


@pytest.fixture
def place() -> Iterator[Scenario]:
    """Back-ends that may remove their own files, as those of an ordinary user may."""
    with Scenario() as made:
        os.chmod(os.path.dirname(made.backends["a"].socket), 0o777)
        yield made


class States:
    """Each brings a back-end into a state, and returns it; what that takes is undone by ``stack``."""

    def __init__(self, scenario: Scenario, stack: contextlib.ExitStack) -> None:
        assert isinstance(scenario.guest, EmbeddedGuest)
        self.scenario = scenario
        self.guest = scenario.guest
        self.stack = stack

    def without_a_front_end(self) -> Backend:
        return self.scenario.backends["b"]

    def silent_front_end(self) -> Backend:
        self._connect()
        return self.scenario.backends["b"]

    def half_a_message(self) -> Backend:
        self._connect().sendall(struct.pack("<II", 1, 1))
        return self.scenario.backends["b"]

    def in_the_handshake(self) -> Backend:
        client = self.stack.enter_context(FrontendClient.connect(self.scenario.backends["b"].socket))
        client.get_features()
        return self.scenario.backends["b"]

    def another_one_waits(self) -> Backend:
        self.scenario.start_load(idle=IDLE, rate=RATE)
        path = self.scenario.backends["a"].socket
        other = self.stack.enter_context(socket.socket(socket.AF_UNIX))
        other.connect(path)
        other.sendall(struct.pack("<III", 1, 1, 0))
        return self.scenario.backends["a"]

    def with_traffic(self) -> Backend:
        self.scenario.start_load(idle=IDLE, rate=RATE)
        return self.scenario.backends["a"]

    def in_a_save_that_nobody_reads(self) -> Backend:
        self._full()
        attempt = self._suspended()
        reading = attempt.source.state_pipe(Direction.SAVE)
        self.stack.callback(os.close, reading)
        return self.scenario.backends["a"]

    def in_a_save_whose_helper_hangs(self) -> Backend:
        self.scenario.start_load(idle=IDLE, rate=RATE)
        attempt = self._suspended()
        self._hang("a")
        self.stack.callback(os.close, attempt.source.state_pipe(Direction.SAVE))
        time.sleep(0.1)
        return self.scenario.backends["a"]

    def in_a_load_that_stops(self) -> Backend:
        self._full()
        attempt = self._suspended()
        stream = attempt.save()
        assert attempt.target is not None
        writing = attempt.target.state_pipe(Direction.LOAD)
        self.stack.callback(os.close, writing)
        os.set_blocking(writing, False)
        os.write(writing, stream[: len(stream) // 2])
        return self.scenario.backends["b"]

    def loaded(self) -> Backend:
        self._saved()
        return self.scenario.backends["b"]

    def saved(self) -> Backend:
        self._saved()
        return self.scenario.backends["a"]

    def in_a_commit_whose_helper_hangs(self) -> Backend:
        attempt = self._saved()
        self._hang("b")
        self.stack.callback(attempt.source.close)  # nobody's, once the guest is on the target
        attempt.switch_over()
        return self.scenario.backends["b"]

    def in_a_roll_back_whose_helper_hangs(self) -> Backend:
        attempt = self._saved()
        self._hang("a")
        with contextlib.suppress(LabError, VhostUserError, OSError):
            attempt.cancel()
        return self.scenario.backends["a"]

    def with_connections_that_wait_for_a_helper(self) -> Backend:
        attempt = self._saved()
        self.scenario.backends["a"].kill_helper()
        attempt.cancel()
        wait_until(lambda: "stand still" in self.scenario.backends["a"].messages(), "the connections to be held")
        return self.scenario.backends["a"]

    def lingering(self) -> Backend:
        attempt = self._saved()
        attempt.switch_over()
        attempt.finish()
        self.scenario.network.switch("b")
        wait_until(lambda: "have moved away" in self.scenario.backends["a"].messages(), "the source to linger")
        return self.scenario.backends["a"]

    def _saved(self) -> Migration:
        self.scenario.start_load(idle=IDLE, rate=RATE)
        attempt = self._suspended()
        attempt.transfer()
        return attempt

    def _suspended(self) -> Migration:
        attempt = suspended(self.scenario)
        assert attempt.target is not None
        self.stack.callback(attempt.target.close)
        return attempt

    def _full(self) -> None:
        """More state than a pipe holds: the guest does not read, and its kernel takes next to nothing."""
        for number in range(12):
            _, peer = self.stack.enter_context(connection(self.scenario, guest_room=2304, port=OWN_PORT + number))
            peer.settimeout(0.1)
            with contextlib.suppress(TimeoutError):
                while True:
                    peer.send(bytes(65536))

    def _connect(self) -> socket.socket:
        sock = self.stack.enter_context(socket.socket(socket.AF_UNIX))
        sock.connect(self.scenario.backends["b"].socket)
        return sock

    def _hang(self, name: str) -> None:
        backend = self.scenario.backends[name]
        backend.stop_helper()
        hung = backend.leave_helper()
        self.stack.callback(hung.wait)
        self.stack.callback(hung.kill)


STATES = [name for name in vars(States) if not name.startswith("_")]
# Those whose end waits for a helper's answer, 5 s each: of these one is enough for each day.
SLOW = {"in_a_save_whose_helper_hangs", "in_a_roll_back_whose_helper_hangs"}
# Those in which connections have moved away: the first signal has it stay for their sake, for ten seconds at most.
LINGERS = {"saved", "lingering"}


def told_to_end(
    place: Scenario, state: str, number: signal.Signals = signal.SIGTERM, *, patient: bool = False
) -> float:
    """Tell a back-end to end in that state, see that it does in good order, and return how many seconds it took.

    With ``patient``, see also that who is left to keep the sockets of moved connections ends in its time.
    """
    with contextlib.ExitStack() as stack:
        backend: Backend = getattr(States(place, stack), state)()
        began = time.monotonic()
        os.kill(backend.pid, number)
        if state in LINGERS:
            wait_until(lambda: "stays silent for" in backend.messages(), "the first signal to be heard", SECONDS)
            os.kill(backend.pid, number)
        status = backend.wait(SECONDS)
        took = time.monotonic() - began
        assert status == 0, backend.messages()
        assert "Traceback" not in backend.messages(), backend.messages()
        for path in (backend.socket, f"{backend.socket}.repair", f"{backend.socket}.takeover"):
            assert not os.path.exists(path), path
        left = [pid for pid in backend.space.processes("godwit") if "serve" in command_line(pid)]
        if state in LINGERS:
            assert len(left) == 1, left  # which keeps the sockets
            if patient:
                wait_until(lambda: not os.path.exists(f"/proc/{left[0]}"), "the keeper to end", 12.0)
        else:
            assert left == [], left
        return took


def command_line(pid: int) -> list[str]:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline") as file:
        return file.read().split("\0")
    return []


@pytest.mark.parametrize("state", [state for state in STATES if state not in SLOW | {"saved"}])
def test_told_to_end(place: Scenario, state: str) -> None:
    """Within seconds, with status 0, and nothing stays: no socket, no process but one that keeps moved connections."""
    told_to_end(place, state)


def test_interrupted(place: Scenario) -> None:
    assert told_to_end(place, "with_traffic", signal.SIGINT) < SECONDS


def told_during_a_takeover(place: Scenario, who: str, delay: float) -> str:
    """Tell one of the two to end, so long after the new one was started; the guest is with the other, or with none.

    Returns with whom.
    """
    assert isinstance(place.guest, EmbeddedGuest)
    old = place.start_backend("a")
    os.chmod(os.path.dirname(old.socket), 0o777)
    place.guest.connect(old.socket)
    with connection(place) as (ours, peer):
        new = old.successor()
        try:
            time.sleep(delay)
            told = old.pid if who == "old" else new.pid
            os.kill(told, signal.SIGTERM)
            # Before it has handlers, the new one ends like any other program.
            ended = old.wait(SECONDS) if who == "old" else new.wait(SECONDS)
            assert ended == 0 or (who == "new" and ended in (1, -signal.SIGTERM)), old.messages()
            if who == "new":  # it may have got the guest just before, and the old one be about to say so
                with contextlib.suppress(subprocess.TimeoutExpired):
                    old.wait(1.0)
            handed_over = "ends: another godwit goes on with the guest" in old.messages()
            assert "Traceback" not in old.messages(), old.messages()
            if handed_over:
                assert old.wait(SECONDS) == 0
            elif who == "old":
                assert new.wait(SECONDS) == 1  # there is nobody to take over from any more
            if handed_over == (who == "new"):
                return "nobody"
            ours.sendall(b"is anybody there?")
            assert peer.recv(100) == b"is anybody there?"
            return "the new one" if handed_over else "the old one"
        finally:
            for process in (new.pid, old.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGTERM)
            new.wait(SECONDS)


@pytest.mark.parametrize("who", ["old", "new"])
def test_told_to_end_during_a_takeover(place: Scenario, who: str) -> None:
    for delay in (0.05, 0.3):
        told_during_a_takeover(place, who, delay)


# ---- killed


def test_killed(place: Scenario) -> None:
    """Nobody takes it for an end that the other side has said: peers are reset at once, the guest when it next speaks.

    But what the guest has said to its end goes. With a new back-end all is as for a guest that has just come.
    """
    assert isinstance(place.guest, EmbeddedGuest)
    data = random.randbytes(50_000)
    with (
        connection(place) as (ours, peer),
        connection(place, server_room=20_000, port=OWN_PORT + 1) as (whole, receiver),
    ):
        ours.sendall(b"to be continued")
        assert peer.recv(100) == b"to be continued"
        whole.sendall(data)
        whole.shutdown(socket.SHUT_WR)
        space = place.guest.space
        wait_until(lambda: "FIN-WAIT-2" in space.run("ss", "-Htn").stdout, "the host's socket to have all of it")
        place.backends["a"].kill()
        with pytest.raises(ConnectionResetError):
            peer.recv(1)
        assert receive_all(receiver) == data
        began = time.monotonic()
        new = place.start_backend("a")
        place.guest.reconnect(new.socket)
        assert time.monotonic() - began < 10.0
        ours.sendall(b"is anybody there?")
        with pytest.raises(ConnectionResetError):
            ours.recv(1)
        with connection(place, port=OWN_PORT + 2) as (fresh, there):
            fresh.sendall(b"a new beginning")
            assert there.recv(100) == b"a new beginning"


def main() -> None:
    """Tell a back-end to end in every state, and say how long each took."""
    for state in STATES:
        for number in (signal.SIGTERM, signal.SIGINT):
            with Scenario() as place:
                os.chmod(os.path.dirname(place.backends["a"].socket), 0o777)
                sys.stdout.write(f"{state}, {number.name}: {told_to_end(place, state, number, patient=True):.2f} s\n")
                sys.stdout.flush()

    with Scenario() as place:
        for delay in [0.02 * number for number in range(40)]:
            for who in ("old", "new"):
                sys.stdout.write(
                    f"{who} told {delay:.2f} s on: the guest is with {told_during_a_takeover(place, who, delay)}\n"
                )
                sys.stdout.flush()


if __name__ == "__main__":
    main()
