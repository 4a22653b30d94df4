# SPDX-License-Identifier: GPL-2.0-or-later
"""Sound streams come through, and others load whole or leave nothing: in few and always the same examples.

``make fuzz`` looks further.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from godwit.net.native import NATIVE

from .devices import filled
from .streams import Stream, mutated, mutated_file
from .targets import load, run, save

Test = TypeVar("Test", bound=Callable[..., None])
VERSIONS = {"version2": 2, "native": NATIVE}


def examples(count: int) -> Callable[[Test], Test]:
    """The same in every run; without an end to the time that one may take on a busy machine."""

    def decorate(test: Test) -> Test:
        quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
        return settings(max_examples=count, derandomize=True, database=None, suppress_health_check=quiet)(test)

    return decorate


randoms = st.integers(0, (1 << 64) - 1).map(Random)


@pytest.mark.parametrize("number", VERSIONS.values(), ids=list(VERSIONS))
@examples(100)
@given(rng=randoms)
def test_what_is_saved_is_loaded_the_same_and_saved_again_in_the_same_bytes(number: int, rng: Random) -> None:
    source = filled(rng, number)
    data = save(source, number)
    target, error, transfer = load(data)
    assert error is None
    loaded = target.device
    assert loaded.states == source.states
    assert {flow: loaded.sockets[flow] for flow in source.sockets} == source.sockets
    assert (loaded.seen, loaded.ports) == (source.seen, source.ports)
    assert (loaded.compared or {}) == source.told
    loaded.told = source.told
    assert save(loaded, number) == data
    transfer.close()


@pytest.mark.parametrize("target", VERSIONS)
@examples(60)
@given(rng=randoms)
def test_what_the_declarations_allow_is_taken(target: str, rng: Random) -> None:
    """Any kind of entry, in any sound order, those included that this file does not know."""
    assert run(target, Stream.made(rng, VERSIONS[target]).repaired())


@pytest.mark.parametrize("target", VERSIONS)
@examples(150)
@given(rng=randoms)
def test_what_was_changed_on_the_way_loads_whole_or_leaves_nothing(target: str, rng: Random) -> None:
    """With the counts and the check value made right again, so that the reader gets past them."""
    data, other = (Stream.made(rng, VERSIONS[target]).repaired() for _ in range(2))
    run(target, mutated(rng, data, other), memory=False)


@examples(100)
@given(rng=randoms)
def test_the_inspector_shows_any_file(rng: Random) -> None:
    number = rng.choice(list(VERSIONS.values()))
    data, other = (Stream.made(rng, number).repaired() for _ in range(2))
    run("inspect", mutated_file(rng, data, other), memory=False)
