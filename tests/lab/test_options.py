# SPDX-License-Identifier: GPL-2.0-or-later
"""Options of the daemon that show only with a guest: what it captures, what it logs, how it ends."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
from pathlib import Path

from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether
from scapy.utils import PcapReader

from godwit.lab.backend import Backend
from godwit.lab.guest import EmbeddedGuest
from godwit.lab.netns import HOST4, Network, wait_until
from godwit.lab.scenario import PORT, Load, Scenario
from godwit.lab.traffic import Traffic


def test_the_guests_frames_are_captured(tmp_path: Path) -> None:
    """Opened as root, written as nobody; every byte of a connection is in it, both ways."""
    path = tmp_path / "pcap"
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="godwit-lab."))
        os.chmod(folder, 0o755)  # the back-end drops root, and looks for its socket still
        network = stack.enter_context(Network())
        server = stack.enter_context(Traffic(network.server))
        server.listen(PORT)
        backend = stack.enter_context(Backend(network.hosts["a"], folder, arguments=["--pcap", str(path)]))
        guest = EmbeddedGuest()
        stack.callback(guest.close)
        guest.connect(backend.socket)
        guest.configure()
        load = Load(server, guest.agent, network.server.address(False), idle=0, rate=4_000_000)
        time.sleep(0.3)
        outcomes = {outcome.name: outcome for outcome in load.finish()}
        assert all(outcome.ok for outcome in outcomes.values())
    seen: dict[bool, set[tuple[int, int, int]]] = {True: set(), False: set()}
    with PcapReader(str(path)) as reader:
        for frame in reader:
            assert isinstance(frame, Ether)
            if IP not in frame or TCP not in frame:
                continue
            segment = frame[TCP]
            from_guest = frame[IP].src == HOST4
            port, its = (segment.sport, segment.dport) if from_guest else (segment.dport, segment.sport)
            assert its == PORT
            seen[from_guest].add((port, segment.seq, frame[IP].len - 20 - segment.dataofs * 4))
    assert sum(size for _, _, size in seen[True]) > outcomes["upload"].sent
    assert sum(size for _, _, size in seen[False]) > outcomes["download"].sent


def test_a_capture_that_fails_is_logged_and_the_guest_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with Scenario(godwit_arguments=["--pcap", str(path)]) as scenario:
        os.close(reader)
        load = scenario.start_load(rate=1_000_000)
        said = f"the capture has ended, the guest goes on: cannot write to {path}: Broken pipe"
        wait_until(lambda: said in scenario.backends["a"].messages(), "the log to say so", 10.0)
        load.wait_alive()
        assert scenario.backends["a"].messages().count("the capture has ended") == 1
        for outcome in load.finish():
            assert outcome.ok, outcome


def test_statistics_while_something_happens() -> None:
    with Scenario(godwit_arguments=["--stats", "1"]) as scenario:
        source = scenario.backends["a"]

        def lines() -> list[str]:
            return [line for line in source.messages().splitlines() if line.startswith("statistics: ")]

        load = scenario.start_load(idle=1, rate=1_000_000)
        begin, before = time.monotonic(), len(lines())
        wait_until(lambda: len(lines()) >= before + 3, "statistics", 20.0)
        assert time.monotonic() - begin > 1.9
        found = re.fullmatch(
            r"statistics: from the guest (\d+) frames, (\S+ kB|\S+ MB) of TCP; to it (\d+) frames, (\S+) (kB|MB);"
            r" flows (\d+) opened, (\d+) reset, (\d+) open(; .*)?",
            lines()[before + 1],
        )
        assert found is not None, lines()
        assert int(found[1]) > 100
        assert int(found[3]) > 100
        assert int(found[8]) >= 3
        load.finish()
        # Before long there is nothing more to tell, but for what guests say unasked.
        time.sleep(2.5)
        before = len(lines())
        time.sleep(3)
        assert len(lines()) - before <= 1
        assert scenario.backends["b"].messages().count("statistics: ") == 0  # nothing has happened there


def test_the_end_after_a_move() -> None:
    with Scenario(godwit_arguments=["--migrate-exit", "--migrate-no-linger"]) as scenario:
        load = scenario.start_load(rate=10_000_000)
        source = scenario.backends["a"]
        scenario.move()
        wait_until(lambda: not source.running, "the source's end", 5.0)
        assert "connections have moved away; their sockets are closed, and 0 of UDP" in source.messages()
        # Nothing of it is in the way of a return.
        scenario.move()
        assert load.check_idle() == ""
        for outcome in load.finish():
            assert outcome.ok, outcome


def test_the_end_after_a_move_comes_when_late_packets_have() -> None:
    with Scenario(godwit_arguments=["--migrate-exit"]) as scenario:
        scenario.start_load(rate=10_000_000)
        source, target = scenario.backends["a"], scenario.backends["b"]
        scenario.move()
        assert source.running
        wait_until(lambda: not source.running, "the source's end", 15.0)
        assert target.running
