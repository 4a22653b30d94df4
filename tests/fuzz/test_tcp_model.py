# SPDX-License-Identifier: GPL-2.0-or-later
"""Random games, the same in every run; `test_corpus` has those that were kept. The long search is ``make fuzz``."""

from __future__ import annotations

import functools
import gc
import random
from collections import Counter
from collections.abc import Iterator

import pytest

from . import tcp_model
from .tcp_rig import mostly


@pytest.fixture(scope="module", autouse=True)
def rig() -> Iterator[None]:
    yield
    tcp_model.close()
    gc.collect()  # what counts descriptors later is not to see these go


def test_random_games() -> None:
    rng = random.Random(9293)
    done: Counter[str] = Counter()
    for _ in range(60):
        data = tcp_model.made(rng)
        game = mostly(functools.partial(tcp_model.played, data))
        assert game is not None
        done.update(action.name for action in tcp_model.actions(data))
        for link in game.links:
            done.update(link.counts)
    # All of it was there.
    assert min(done[name] for name in (*tcp_model.ACTIONS, "retransmissions")) > 1, done
