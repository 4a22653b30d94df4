# SPDX-License-Identifier: GPL-2.0-or-later
"""A front-end that makes a file shorter which it has shared: a touch of what is missing is a SIGBUS.

Here the front-end is the same process, so it must not look at that memory either.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from .driver import F_WRITE, FULL, LOG_ALL, RX, TX, V4, Guest, Piece, open_pair, other_frame
from .test_hostile import faults, put

MIB = 1 << 20
HIGH = 1 << 32
REGIONS = (Piece(0, 4 * MIB, 0), Piece(HIGH, MIB, 4 * MIB))
FRAME = other_frame(60)
WORDS = "the front-end has cut off the file"


def is_broken(guest: Guest) -> None:
    """Both rings are, and it is told."""
    told = faults(guest)
    while len(told) < 2:
        told += faults(guest)
    assert [index for index, _ in told] == [RX, TX]
    assert all(WORDS in words for _, words in told)
    assert all(ring.broken() for ring in guest.rings)
    assert [broken for _, _, broken, _, _ in guest.engine.rings()] == [True, True]


def gets_on(guest: Guest) -> None:
    conn, sock = open_pair(guest, V4)
    with sock:
        conn.push(b"all is well")
        assert sock.recv(100) == b"all is well"


def goes_on(guest: Guest) -> None:
    """With other memory all is well."""
    for index in (RX, TX):
        guest.engine.ring_stop(index)
    with Guest(engine=guest.engine) as anew:
        gets_on(anew)


@pytest.mark.parametrize("index", [RX, TX], ids=["rx", "tx"])
def test_buffers_that_are_gone(index: int) -> None:
    with Guest(regions=REGIONS, rx=(), sealed=False) as guest:
        os.ftruncate(guest.memory.fd, 4 * MIB)
        put(guest, index, [(HIGH, 2048, F_WRITE if index == RX else 0, 0)])
        if index == RX:
            guest.engine.inject(FRAME)
        is_broken(guest)
        goes_on(guest)


def test_rings_that_are_gone() -> None:
    with Guest(sealed=False) as guest:
        guest.barrier()
        os.ftruncate(guest.memory.fd, 0)
        guest.tx.kick()
        is_broken(guest)
        goes_on(guest)


@pytest.fixture
def cut() -> Iterator[Guest]:
    """One whose second region is gone, and whose transmit ring was broken by that and stopped."""
    with Guest(regions=REGIONS, rx=(), sealed=False) as guest:
        os.ftruncate(guest.memory.fd, 4 * MIB)
        put(guest, TX, [(HIGH, 100, 0, 0)])
        is_broken(guest)
        guest.engine.ring_stop(TX)
        yield guest


def test_a_ring_is_not_started_in_memory_that_is_gone(cut: Guest) -> None:
    with pytest.raises(ValueError, match=WORDS):
        cut.engine.ring_kick(TX, os.dup(cut.tx.kick_fd))


def test_a_region_that_is_gone_and_taken_away(cut: Guest) -> None:
    """What was lost with it is not held against the others."""
    cut.engine.remove_region(*[row[:3] for row in cut.memory.table()][1])
    cut.engine.ring_kick(TX, os.dup(cut.tx.kick_fd))
    cut.barrier()
    assert cut.engine.rings()[TX][:3] == (True, True, False)


def test_a_log_that_is_gone() -> None:
    with Guest(FULL | LOG_ALL, log=True) as guest:
        fd = os.memfd_create("log", os.MFD_CLOEXEC)
        os.ftruncate(fd, MIB)
        guest.engine.set_log(os.dup(fd), MIB, 0)
        os.ftruncate(fd, 0)
        os.close(fd)
        guest.engine.inject(FRAME)
        is_broken(guest)


def test_other_engines_go_on() -> None:
    with Guest(sealed=False) as guest, Guest() as other:
        os.ftruncate(guest.memory.fd, 0)
        guest.tx.kick()
        is_broken(guest)
        gets_on(other)
        assert [broken for _, _, broken, _, _ in other.engine.rings()] == [False, False]


ANOTHER = """
import mmap, os
from tests.dataplane.driver import Guest
with Guest() as guest:
    fd = os.memfd_create("not the guest's")
    os.ftruncate(fd, 4096)
    at = mmap.mmap(fd, 4096)
    os.ftruncate(fd, 0)
    print("begins", flush=True)
    at[0]
"""


def test_other_memory_ends_the_process() -> None:
    env = os.environ | {"ASAN_OPTIONS": f"{os.environ.get('ASAN_OPTIONS', '')}:handle_sigbus=0"}
    done = subprocess.run(
        [sys.executable, "-c", ANOTHER], capture_output=True, text=True, timeout=60, check=False, env=env
    )
    assert done.stdout == "begins\n"
    assert done.returncode == -signal.SIGBUS
