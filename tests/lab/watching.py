# SPDX-License-Identifier: GPL-2.0-or-later
"""What a process costs and what it has, as /proc says it; and what a back-end has counted."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Iterator
from typing import Any

from godwit.cli import ctl
from godwit.lab.backend import Backend
from godwit.lab.counters import Counters

from .world import PLAIN

_TICK = os.sysconf("SC_CLK_TCK")
_DROPPED = re.compile(r"statistics: .*dropped (.*)")


def cpu_seconds(pid: int) -> float:
    """The processor time that a process has had, all its threads."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def cpu_share(pid: int, seconds: float) -> float:
    """The part of one processor that a process takes, measured for so long."""
    before, began = cpu_seconds(pid), time.monotonic()
    time.sleep(seconds)
    return (cpu_seconds(pid) - before) / (time.monotonic() - began)


def descriptors(pid: int) -> int:
    """How many descriptors a process has."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident(pid: int) -> int:
    """The memory that a process has, in bytes."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def limited(pid: int, most: int | None = None) -> Iterator[None]:
    """Let a running process have so many descriptors, for a while; None: no more than it has."""
    if most is None:
        numbers = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
        most = next(number for number in range(len(numbers) + 1) if number not in numbers)
    before, _ = _limits(pid)
    _set_limit(pid, most)
    try:
        yield
    finally:
        _set_limit(pid, before)


def _limits(pid: int) -> tuple[int, int]:
    with open(f"/proc/{pid}/limits") as file:
        words = next(line for line in file if line.startswith("Max open files")).split()
    return int(words[3]), int(words[4])


def _set_limit(pid: int, most: int) -> None:
    """As the user that the process runs as: root need not have CAP_SYS_RESOURCE."""
    user, group = _id(pid, "Uid"), _id(pid, "Gid")
    become = [] if user == os.getuid() else ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups"]
    subprocess.run([*PLAIN, *become, "prlimit", f"--pid={pid}", f"--nofile={most}:"], check=True, timeout=10)


def _id(pid: int, name: str) -> int:
    with open(f"/proc/{pid}/status") as file:
        return int(next(line for line in file if line.startswith(f"{name}:")).split()[1])


def status(backend: Backend) -> dict[str, Any]:
    """What a back-end says of itself."""
    return ctl.document(f"{backend.socket}.ctl", "status")


def sent_again(backend: Backend) -> int:
    """How often a back-end has sent its guest something again."""
    return int(Counters.of(backend).counters["godwit_retransmissions_total()"])


def dropped(messages: str) -> dict[str, int]:
    """What a back-end with ``--stats`` says that it has dropped, all lines together, by reason."""
    found: dict[str, int] = {}
    for line in _DROPPED.findall(messages):
        for count, reason in re.findall(r"(\d+) \((\w+)\)", line):
            found[reason] = found.get(reason, 0) + int(count)
    return found
