# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a measurement runs: are all threads where they are to be, and afterwards where they were?"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from godwit.lab.bench import Working
from godwit.lab.errors import LabError
from godwit.lab.placement import APART, SPLIT, TOGETHER, at, placed

PROCESSORS = sorted(os.sched_getaffinity(0))

TWO_THREADS = """
import threading
threading.Thread(target=input).start()
print(flush=True)
"""


@pytest.fixture
def backend() -> Iterator[int]:
    """A process with two threads."""
    with subprocess.Popen(
        [sys.executable, "-c", TWO_THREADS], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.kill()


@pytest.fixture(autouse=True)
def _another_thread() -> Iterator[None]:
    """Of this process."""
    over = threading.Event()
    waiting = Working(over.wait)
    yield
    over.set()
    waiting.result()


def places(pid: int) -> list[set[int]]:
    return [os.sched_getaffinity(int(thread)) for thread in os.listdir(f"/proc/{pid}/task")]


@pytest.mark.parametrize("placement", [TOGETHER, APART, SPLIT])
def test_all_threads(placement: str, backend: int) -> None:
    """Those of one that begins meanwhile, too."""
    if placement != TOGETHER and len(PROCESSORS) < 2:
        with pytest.raises(LabError, match="one processor only"), placed(backend, placement):
            pass
        return
    before = places(backend)
    assert len(before) == 2
    with placed(backend, placement) as host:
        ours, theirs = places(os.getpid()), places(backend)
        assert Working(lambda: os.sched_getaffinity(0)).result() == {PROCESSORS[0]}
        at_the_host = Working(lambda: at(host, lambda: os.sched_getaffinity(0))).result()
    assert len(ours) > 1
    assert all(place == {PROCESSORS[0]} for place in ours)
    assert theirs == [{PROCESSORS[placement != TOGETHER]}] * 2
    assert at_the_host == {PROCESSORS[placement == SPLIT]}
    assert places(backend) == before
    assert all(place == set(PROCESSORS) for place in places(os.getpid()))


def test_one_processor_is_not_enough() -> None:
    os.sched_setaffinity(0, {PROCESSORS[0]})
    try:
        with pytest.raises(LabError, match="one processor only"), placed(None, "apart"):
            pass
        with placed(None, "together"):
            pass
    finally:
        os.sched_setaffinity(0, PROCESSORS)


def test_a_back_end_that_ends(backend: int) -> None:
    """This process is where it was nevertheless."""
    with placed(backend, "together"):
        os.kill(backend, signal.SIGKILL)
        os.waitid(os.P_PID, backend, os.WEXITED)
    assert os.sched_getaffinity(0) == set(PROCESSORS)
