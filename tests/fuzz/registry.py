# SPDX-License-Identifier: GPL-2.0-or-later
"""All targets, by name: what ``make fuzz`` runs, and the test suite with what was kept."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Final, NamedTuple

from . import arrivals, card, frames, peers, rings, services, streams, targets, vhost_user, words

#: Another input, made from one, or from two where the second is not empty; with a generator for what is random.
Mutate = Callable[[Random, bytes, bytes], bytes]

CORPUS: Final = Path(__file__).resolve().parent / "corpus"
WORK: Final = CORPUS.parent.parent.parent / "build" / "fuzz"
TESTS: Final = CORPUS.parent.parent
MADE: Final = 20  # streams to begin with, besides those that are kept
MEASURED: Final = 8  # one in so many has its memory measured, which takes time


class Target(NamedTuple):
    """What is fuzzed."""

    run: Callable[[bytes], bool]  # raises where something does not hold; whether something came of the input
    seeds: Callable[[], Iterable[bytes]]  # inputs to begin with
    mutate: Mutate | None = None  # beside libFuzzer's own
    python: bool = True  # the code in question is Python, or of both kinds; else it is but the compiled modules
    longest: int = 4096  # bytes of an input


def _read(name: str, data: bytes) -> bool:
    return targets.run(name, data, memory=zlib.crc32(data) % MEASURED == 0)


def _streams(name: str) -> Iterator[bytes]:
    rng = Random(name)
    found = [path.read_bytes() for kind in ("golden", "native") for path in sorted((TESTS / kind).glob("*.bin"))]
    found += [streams.Stream.made(rng, rng.choice((2, streams.NATIVE))).repaired() for _ in range(MADE)]
    for number, data in enumerate(found):
        yield streams.in_file(rng, data) if name == "inspect" and number % 2 else data


TARGETS: Final[dict[str, Target]] = {
    **{
        name: Target(
            functools.partial(_read, name),
            functools.partial(_streams, name),
            streams.mutated_file if name == "inspect" else streams.mutated,
        )
        for name in targets.TARGETS
    },
    "arrivals": Target(arrivals.run, arrivals.seeds, streams.mutated, longest=8192),
    "card": Target(card.run, card.seeds, python=False, longest=8192),
    "frames": Target(frames.run, frames.seeds, python=False, longest=8192),
    "rings": Target(rings.run, rings.seeds, python=False, longest=1024),
    "vhost_user": Target(vhost_user.run, vhost_user.seeds, longest=1024),
    **{
        name: Target(functools.partial(services.run, name), functools.partial(services.seeds, name), longest=2048)
        for name in services.KINDS
    },
    **{name: Target(kind, functools.partial(peers.seeds, name), longest=8192) for name, kind in peers.KINDS.items()},
    **{name: Target(kind, functools.partial(words.seeds, name), longest=2048) for name, kind in words.KINDS.items()},
}


def kept(name: str) -> list[bytes]:
    """The inputs of a target that are in the repository."""
    return [path.read_bytes() for path in sorted((CORPUS / name).glob("*"))]
