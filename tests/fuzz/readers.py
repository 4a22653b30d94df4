# SPDX-License-Identifier: GPL-2.0-or-later
"""The targets ``version2``, ``native`` and ``inspect``: device states; `targets` says what holds."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Final

from . import streams, targets
from .target import Target

TESTS: Final = Path(__file__).resolve().parent.parent
LONGEST: Final = 4096
MADE: Final = 20  # streams to begin with, besides those that are kept
MEASURED: Final = 8  # one in so many has its memory measured, which takes time


def read(name: str, data: bytes) -> bool:
    """An execution. Whether the stream was sound."""
    return targets.run(name, data, memory=zlib.crc32(data) % MEASURED == 0)


def seeds(name: str) -> Iterator[bytes]:
    """Golden streams, and some that were made."""
    rng = Random(name)
    found = [path.read_bytes() for kind in ("golden", "native") for path in sorted((TESTS / kind).glob("*.bin"))]
    found += [streams.Stream.made(rng, rng.choice((2, streams.NATIVE))).repaired() for _ in range(MADE)]
    for number, data in enumerate(found):
        yield streams.in_file(rng, data) if name == "inspect" and number % 2 else data


TARGETS: Final = {
    name: Target(
        functools.partial(read, name),
        functools.partial(seeds, name),
        LONGEST,
        streams.mutated_file if name == "inspect" else streams.mutated,
    )
    for name in targets.TARGETS
}
