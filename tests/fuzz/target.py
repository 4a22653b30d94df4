# SPDX-License-Identifier: GPL-2.0-or-later
"""What a target is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from random import Random
from typing import NamedTuple

#: Another input, made from one, or from two where the second is not empty; with a generator for what is random.
Mutate = Callable[[Random, bytes, bytes], bytes]


class Target(NamedTuple):
    """What is fuzzed."""

    run: Callable[[bytes], bool]  # raises where something does not hold; whether something came of the input
    seeds: Callable[[], Iterable[bytes]]  # inputs to begin with
    longest: int  # bytes of an input
    mutate: Mutate | None = None  # beside libFuzzer's own
