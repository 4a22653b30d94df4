# SPDX-License-Identifier: GPL-2.0-or-later
"""A godwit outlives the files that it was started from: an upgrade puts others in their place."""

from __future__ import annotations

import re

import pytest

from godwit.lab.backend import Backend
from godwit.lab.scenario import Scenario

from .moves import connection, works_on


def imported(backend: Backend) -> list[str]:
    """The modules of godwit's that were imported, by the processes that write into a back-end's log, in order."""
    return re.findall(r"^import time: .*\| +(godwit\S*)$", backend.messages(), re.MULTILINE)


def test_what_moves_and_hands_over_is_loaded_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")  # each import is a line on stderr, which is the log
    with Scenario() as scenario:
        monkeypatch.delenv("PYTHONPROFILEIMPORTTIME")  # not of a process that is started from here on
        backends = scenario.backends
        before = {name: imported(backend) for name, backend in backends.items()}
        for names in before.values():
            assert "godwit.daemon.device" in names
            assert "godwit.repair.helper" in names  # the helpers have started: what comes from now on is the daemons'
        load = scenario.start_load(idle=2, rate=1_000_000)
        with connection(scenario) as (ours, peer):
            scenario.move()
            ours.sendall(b"moved")
            assert peer.recv(5) == b"moved"
            backends["b"].hand_over()
            ours.sendall(b"handed over")
            assert peer.recv(11) == b"handed over"
        works_on(scenario, load)
        assert "handed over to godwit" in backends["b"].messages()
        assert {name: imported(backend) for name, backend in backends.items()} == before
