# SPDX-License-Identifier: GPL-2.0-or-later
"""What a back-end at rest costs, and how many connections it holds."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Iterator

import pytest

from godwit.lab import bench, rest_bench
from godwit.lab.crowd import RefusedError
from godwit.lab.errors import LabError
from godwit.lab.move_bench import MOVING
from godwit.lab.rest_bench import CASES, Memory, RestBed, RestSide, idle, limit, limit_move, memory, start, switches

MIB = 1 << 20

CHILD = """
import mmap, os, sys, time
def wait():
    print("here", flush=True)
    sys.stdin.readline()
wait()
guest = os.memfd_create("godwit-guest")
os.ftruncate(guest, 20 << 20)
theirs = mmap.mmap(guest, 20 << 20)
for at in range(0, 20 << 20, 4096):
    theirs[at] = 1
wait()
own = mmap.mmap(-1, 20 << 20)
for at in range(0, 20 << 20, 4096):
    own[at] = 1
wait()
for _ in range(100):
    time.sleep(0.0001)
wait()
"""


def test_what_is_read_from_proc() -> None:
    """A process's own memory counts, its guest's does not; and its switches are told."""
    with subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        sizes, turns = [], []
        for _ in range(4):
            assert child.stdout.readline() == b"here\n"
            sizes.append(Memory.of(child.pid))
            turns.append(switches(child.pid))
            child.stdin.write(b"\n")
            child.stdin.flush()
        assert sizes[1].own - sizes[0].own < MIB
        assert 20 * MIB <= sizes[2].own - sizes[1].own < 21 * MIB
        # What is shared with other programs is less or more whenever one of them ends or starts.
        assert 10 * MIB < sizes[2].pss - sizes[1].pss < 30 * MIB
        assert abs(sizes[1].pss - sizes[0].pss) < 10 * MIB
        assert turns[3] - turns[2] >= 100


@pytest.fixture(scope="module")
def side() -> Iterator[RestSide]:
    with RestBed(1500, ["godwit"]) as bed:
        yield bed.sides["godwit"]


def test_start(side: RestSide) -> None:
    found = start(side, 0.01)
    assert 1 < found["start ms"] < 10_000
    assert 1 < found["start CPU ms"] < 5_000


def test_memory_and_wake_ups(side: RestSide, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest_bench, "SETTLING", 0.1)
    found = memory(side, 1.0, counts=(1000, 2000))
    assert 5 < found["PSS MB"] < found["RSS MB"] < 200
    assert 100 < found["bytes/flow of 1000"] < 10_000  # a flow's state is of that size
    assert found["bytes/flow beyond 1000"] == pytest.approx(
        2 * found["bytes/flow of 2000"] - found["bytes/flow of 1000"], abs=0.01
    )
    # Nothing that goes on wakes it up; something that it has still to do may.
    found = idle(side, 0.1, count=20)
    assert found["wake-ups/s"] < 100
    assert found["CPU us/s"] < 100_000


def test_the_limit_of_descriptors(side: RestSide) -> None:
    """What is beyond is refused at once, the rest moves."""
    found = limit(side, 1.0, descriptors=400)
    assert 200 < found["flows"] < 400
    assert found["refused at once"] == 1
    moved = limit_move(side, 1.0, descriptors=400)
    assert moved["alive after a move"] == found["flows"]


@pytest.mark.parametrize(
    ("status", "seconds", "at_once"),
    [(errno.ECONNREFUSED, 0.1, True), (errno.ECONNREFUSED, 1.1, False), (errno.ETIMEDOUT, 0.1, False)],
)
def test_what_is_at_once(status: int, seconds: float, at_once: bool) -> None:
    assert RefusedError(10, 1, status, seconds).at_once is at_once


def test_too_few_descriptors_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "DESCRIPTORS", 1 << 40)
    with pytest.raises(LabError, match=r"descriptors are needed for each process, \d+ are allowed"):
        RestBed(1500, ["godwit"])


def test_what_cannot_be_measured_is_left_out() -> None:
    assert all(case.takes(kind) for case in CASES for kind in MOVING)
    assert not any(case.takes(kind) for case in CASES for kind in ("none", "ideal"))
