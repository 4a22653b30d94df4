# SPDX-License-Identifier: GPL-2.0-or-later
"""Clocks that jump: the system's by days, two hosts whose time since boot has nothing in common, a process that stood
still."""

from __future__ import annotations

import os
import re
import struct
import time
from pathlib import Path

import godwit
from godwit.lab.backend import Backend
from godwit.lab.netns import wait_until
from godwit.lab.scenario import Scenario

from .moves import IDLE, RATE, works_on
from .shim import CLOCK, Shim
from .test_rush import arp
from .watching import sent_again
from .world import SERVER, World, connect, mute, tcp

DAY = 86400
FOREVER = 300_000_000  # seconds, almost ten years


def test_the_systems_clock_jumps(tmp_path: Path) -> None:
    """A day forth, two back: only the stamps of a capture know of it."""
    shim, capture = Shim(tmp_path, CLOCK), tmp_path / "pcap"
    with (
        World("--pcap", str(capture), wrapper=shim.wrapper) as world,
        tcp(world.server, 4, SERVER[4], 5001) as listening,
        connect(world.guest, SERVER[4], 5001) as ours,
        listening.accept()[0] as peer,
    ):
        for days in (1, -1):
            shim.put(0, days * DAY)
            for one, other in ((ours, peer), (peer, ours)):
                one.sendall(b"what time is it?")
                assert other.recv(100) == b"what time is it?"
            with connect(world.guest, SERVER[4], 5001), listening.accept()[0]:
                assert arp(world.guest) < 1.5
            seen = stamps(capture, world)
            assert abs(seen[-1] - seen[0] - days * DAY) < 100, (days, seen[0], seen[-1])
        assert "Traceback" not in world.messages()


def test_what_is_acknowledged_while_the_process_stands_still_is_not_sent_again() -> None:
    """When the process goes on it is time to send it again; what the guest has said meanwhile comes first."""
    with (
        World() as world,
        tcp(world.server, 4, SERVER[4], 5001) as listening,
        connect(world.guest, SERVER[4], 5001) as ours,
        listening.accept()[0] as peer,
    ):
        with mute(world.guest):
            peer.sendall(b"a question")
            assert ours.recv(100) == b"a question"
            wait_until(lambda: sent_again(world.backend) == 1, "the question to be sent again")
            world.backend.stop()  # once more in two seconds
        ours.sendall(b"an answer")
        time.sleep(2.5)
        world.backend.resume()
        assert peer.recv(100) == b"an answer"
        assert sent_again(world.backend) == 1


def stamps(capture: Path, world: World) -> list[int]:
    """When each frame of a capture was seen, in seconds."""
    arp(world.guest)
    data = capture.read_bytes()
    found, at = [], 24
    while at + 16 <= len(data):
        seconds, _, size, _ = struct.unpack_from("<IIII", data, at)
        found.append(seconds)
        at += 16 + size
    return found


def test_who_asks_for_the_time_of_day() -> None:
    """Stamps of a capture, of log lines (which are Python's own affair), and when it was that the process began and
    that a guest moved, as the control socket tells; nobody else of what runs."""
    root = Path(godwit.__file__).parent
    asked = re.compile(r"CLOCK_REALTIME|CLOCK_BOOTTIME|\btime\.time\b|\bdatetime\b|getmtime")
    found = {
        str(path.relative_to(root))
        for path in sorted(root.rglob("*.py*"))
        if path.suffix in (".py", ".pyx") and "lab" not in path.parts and asked.search(path.read_text())
    }
    assert found == {"daemon/moves.py", "daemon/stats.py", "dataplane/pcap.pyx"}


def test_hosts_whose_clocks_have_nothing_in_common() -> None:
    """One has been up for ten years, the other not for long: there and back."""
    with Scenario() as scenario:
        old = scenario.backends["b"]
        old.close()
        with Backend(
            scenario.network.b,
            os.path.dirname(old.socket),
            arguments=["--runas", "0"] if os.getuid() else [],
            wrapper=["unshare", "--time", "--monotonic", str(FOREVER), "--boottime", str(FOREVER), "--"],
        ) as scenario.backends["b"]:
            pid = scenario.backends["b"].pid
            assert os.readlink(f"/proc/{pid}/ns/time") != os.readlink("/proc/self/ns/time")
            load = scenario.start_load(idle=IDLE, rate=RATE)
            for _ in range(2):
                scenario.move()
            works_on(scenario, load)
