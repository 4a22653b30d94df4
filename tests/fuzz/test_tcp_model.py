# SPDX-License-Identifier: GPL-2.0-or-later
"""The games that were kept, and some random ones, the same in every run. The long search is ``make fuzz``."""

from __future__ import annotations

import gc
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import tcp_model
from .registry import CORPUS
from .tcp_rig import BreachError

KEPT = sorted((CORPUS / "tcp").glob("*"))


@pytest.fixture(scope="module", autouse=True)
def rig() -> Iterator[None]:
    yield
    tcp_model.close()
    gc.collect()  # what counts descriptors later is not to see these go


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.name)
def test_kept(path: Path) -> None:
    """Each has found something once."""
    tcp_model.run(path.read_bytes())


def played(data: bytes) -> tcp_model.Game:
    """One that fails is played again: the kernel's own timers go by the real clock, whatever else the machine does."""
    try:
        game = tcp_model.played(data)
    except BreachError:
        game = tcp_model.played(data)
    assert game is not None
    return game


def test_random_games() -> None:
    rng = random.Random(9293)
    done: Counter[str] = Counter()
    for _ in range(60):
        data = tcp_model.made(rng)
        game = played(data)
        done.update(action.name for action in tcp_model.actions(data))
        for link in game.links:
            done.update(link.counts)
    # All of it was there.
    assert min(done[name] for name in (*tcp_model.ACTIONS, "retransmissions")) > 1, done
