# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon from its start to its end: who is served, and how it ends when connections have moved away."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import cast

import pytest

from godwit.daemon import lifecycle, main
from godwit.daemon.device import NetDevice
from godwit.daemon.house import House
from godwit.daemon.options import Options
from godwit.net.config import NetConfig
from godwit.vhost_user import BaseDevice, FrontendClient


class Device(BaseDevice):
    """Has connections that moved away, for ``seconds`` after its front-end has gone."""

    seconds = 0.0
    closed_at = 0.0

    def __init__(self, *_: object) -> None:
        self._ends = 0.0

    def open(self) -> None:
        """Nothing to open."""

    def start(self) -> None:
        """Nothing to start."""

    def own(self, user: lifecycle.User) -> None:
        """Nothing to hand over."""

    def follow(self, config: NetConfig) -> None:
        """Nothing to tell."""

    async def close(self) -> None:
        """Note when that was."""
        type(self).closed_at = time.monotonic()

    async def disconnected(self) -> None:
        """The front-end has gone."""
        self._ends = time.monotonic() + self.seconds

    def guest_comes(self) -> None:
        pass

    @property
    def lingering(self) -> float:
        """As the network device has it."""
        return max(0.0, self._ends - time.monotonic())


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Device]]:
    monkeypatch.setattr(main, "NetDevice", Device)
    # It would be that of all the tests. `test_sandbox` has it, with processes of their own.
    monkeypatch.setattr("godwit.daemon.sandbox.Sandbox.enter", lambda *_: None)
    monkeypatch.setattr(lifecycle, "raise_descriptor_limit", lambda: None)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield Device
    signal.pthread_sigmask(
        signal.SIG_SETMASK, mask
    )  # a daemon that is through hears nothing any more, and this is none
    Device.seconds = 0.0


def test_a_front_end_waits_for_a_descriptor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(main, "_ACCEPT_AGAIN", 0.01)
    path = str(tmp_path / "s")

    refused = 0

    class Scarce(socket.socket):
        def accept(self) -> tuple[socket.socket, object]:
            nonlocal refused
            if not refused:
                refused += 1
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return super().accept()

    async def run() -> None:
        device = cast(NetDevice, Device())
        options = Options(one_off=True)
        async with AsyncExitStack() as names:
            house = House(options, None, names)
            with Scarce(fileno=lifecycle.listen(path).detach()) as listener, socket.socket(socket.AF_UNIX) as front_end:
                listener.setblocking(False)
                house.listener = listener
                front_end.connect(path)
                front_end.sendall(b"x")
                front_end.shutdown(socket.SHUT_WR)
                await asyncio.wait_for(main._sessions(house, device, options), 10)

    asyncio.run(run())
    assert refused == 1


def _options(folder: Path) -> Options:
    return Options(
        socket=str(folder / "s"),
        pid=str(folder / "pid"),
        log_file=str(folder / "log"),
        runas=f"{os.getuid()}:{os.getgid()}",
        foreground=True,
        one_off=True,
    )


def _front_end(options: Options, after: list[object], *signals: int) -> threading.Thread:
    """Connects, leaves, and notes what is there when only the log should be, then signals."""
    assert options.socket is not None
    path = Path(options.socket)

    def live() -> None:
        while True:
            try:
                client = FrontendClient.connect(path)
                break
            except (FileNotFoundError, ConnectionRefusedError):
                time.sleep(0.01)  # not bound yet, or bound and not listening
        with client:
            client.get_features()
        until = time.monotonic() + 10
        while (names := [one.name for one in path.parent.iterdir()]) != ["log"] and time.monotonic() < until:
            time.sleep(0.01)
        after.append(names)
        # Another daemon can have the path meanwhile.
        with lifecycle.listen(str(path)):
            pass
        after.append(time.monotonic())
        for number in signals:
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=live)
    thread.start()
    return thread


def test_it_stays_silent_but_lets_go_of_its_names(tmp_path: Path, device: type[Device]) -> None:
    device.seconds = 3.0
    after: list[object] = []
    began = time.monotonic()
    thread = _front_end(_options(tmp_path), after)
    assert main.run(_options(tmp_path)) == 0
    thread.join()
    assert after[0] == ["log"]
    assert device.closed_at - began >= 3.0
    assert isinstance(after[1], float)
    assert device.closed_at > after[1]
    assert "stays silent" in (tmp_path / "log").read_text()


def test_a_signal_ends_the_wait(tmp_path: Path, device: type[Device]) -> None:
    device.seconds = 60.0
    thread = _front_end(_options(tmp_path), [], signal.SIGTERM)
    began = time.monotonic()
    assert main.run(_options(tmp_path)) == 0
    thread.join()
    assert time.monotonic() - began < 30


def test_without_such_connections_it_ends_at_once(tmp_path: Path, device: type[Device]) -> None:
    options = _options(tmp_path)
    thread = _front_end(options, [])
    assert main.run(options) == 0
    thread.join()
    assert "stays silent" not in (tmp_path / "log").read_text()
