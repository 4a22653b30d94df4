# SPDX-License-Identifier: GPL-2.0-or-later
"""What the fuzzer has kept, once more; and how it chooses."""

from __future__ import annotations

import pytest

from .keep import CORPUS, Step, least, steps
from .targets import TARGETS, run
from .worst import WORST


@pytest.mark.parametrize("target", TARGETS)
def test_what_was_kept_is_read_within_limits(target: str) -> None:
    """Loads whole or leaves nothing, as `targets` says; of either there is something."""
    ends = {run(target, path.read_bytes()) for path in sorted((CORPUS / target).iterdir())}
    assert ends == {True, False}


@pytest.mark.parametrize("kind", WORST)
@pytest.mark.parametrize("target", ["native", "inspect"])
def test_many_small_entries_are_read_within_limits(target: str, kind: str) -> None:
    assert run(target, WORST[kind](300))


def test_the_corpus_is_small_and_of_known_targets() -> None:
    assert sorted(path.name for path in CORPUS.iterdir()) == sorted(TARGETS)
    assert sum(path.stat().st_size for path in CORPUS.glob("*/*")) < 200_000


def test_the_least_that_goes_all_steps() -> None:
    reached = {b"a": {1}, b"bb": {1, 2}, b"cc": {2}, b"d" * 5000: {1, 2, 3}, b"e": set[int]()}

    def reach(data: bytes) -> set[Step]:
        return {("", 0, 0, line) for line in reached[data]}

    assert least(reached, reach) == [b"bb", b"d" * 5000]


def test_of_a_run_the_steps_within_the_package_are_known() -> None:
    found = steps(lambda: run("native", b""))
    assert any(name.endswith("migration.py") for name, *_ in found)
    assert not any("/tests/" in name for name, *_ in found)
