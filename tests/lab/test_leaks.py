# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether the daemon keeps memory is found out, kind of event by kind of event; a few of them here, for a moment."""

from __future__ import annotations

import os
import socket

import pytest

from godwit.lab.leaks import KINDS, PAGES, Kept, measure
from godwit.lab.size import Size, lean
from godwit.lab.soak_events import Cost, Event, Stage


def test_a_migration_that_is_cancelled_leaves_nothing() -> None:
    cancelled = next(kind for kind in KINDS if kind.name == "migration cancelled")
    kept = measure(cancelled, 30, idle=20, rest=0.1)
    assert [one.events for one in kept] == [15, 15]
    if not os.environ.get("GODWIT_SANITIZE"):  # the sanitizers keep what was freed
        assert not [one for one in kept if one.is_leak], kept


def remembered(stage: Stage) -> str:
    """What the daemon rightly has for minutes: datagrams from many ports, each a flow of 224 bytes."""
    with stage.guest.space.enter():
        for _ in range(600):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.sendto(b"?", (stage.network.server.addr4, 9))
    return ""


def test_what_stays_is_found() -> None:
    kept = measure(Event("datagrams that nobody answers", Cost.NOTHING, 1, remembered), 10, idle=1, rest=0.5)
    assert [one.is_leak for one in kept] == [True, False], kept


def test_a_leak_is_more_than_what_comes_and_goes() -> None:
    small = Size(20 << 20, 20)
    assert not Kept("it", small, Size(small.memory + PAGES, 20), 1).is_leak
    assert Kept("it", small, Size(small.memory + PAGES + 1, 20), 1).is_leak
    assert not Kept("it", small, Size(small.memory + 2 * PAGES, 20), 1000).is_leak
    assert Kept("it", small, small, 10).each == 0


def test_programs_are_lean_for_the_length_of_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    with lean():
        assert "tcache_count=0" in os.environ["GLIBC_TUNABLES"]
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.check=0"
    monkeypatch.delenv("GLIBC_TUNABLES")
    with lean():
        pass
    assert "GLIBC_TUNABLES" not in os.environ
