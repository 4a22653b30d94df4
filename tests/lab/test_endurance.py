# SPDX-License-Identifier: GPL-2.0-or-later
"""A short run of what `make endurance` does for long; and that it notices what it is to notice."""

from __future__ import annotations

import os

from godwit.lab.endurance import run
from godwit.lab.size import MORE_DESCRIPTORS, MORE_MEMORY, Size, growth


def test_a_few_moves_under_load() -> None:
    report = run(6, warm=2, rest=0.0)
    # Without a rest, sockets of what has moved away are there still; and the sanitizers keep what was freed.
    excused = ("descriptors", "has grown") if os.environ.get("GODWIT_SANITIZE") else ("descriptors",)
    assert not [failure for failure in report.failures if not any(word in failure for word in excused)], report
    assert report.moves == 6
    assert report.bytes > 1_000_000
    assert report.opened
    assert report.answered
    assert [len(sizes) for sizes in report.sizes.values()] == [2, 2]


def test_growth_is_noticed() -> None:
    small = Size(10_000_000, 20)
    assert growth({"a": [small, Size(small.memory + MORE_MEMORY, small.descriptors + MORE_DESCRIPTORS)]}) == []
    assert len(growth({"a": [small, Size(small.memory + MORE_MEMORY + 1, 20)]})) == 1
    assert len(growth({"a": [small, small], "b": [small, Size(0, 20 + MORE_DESCRIPTORS + 1)]})) == 1
