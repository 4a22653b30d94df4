# SPDX-License-Identifier: GPL-2.0-or-later
"""The coverage-guided fuzzer: ``python -m tests.fuzz.drive TARGET [OPTION | INPUT]...``; ``make fuzz`` runs it.

Options are libFuzzer's; inputs are run once each, instead of a search. An input
that breaks what `targets` states ends the run and lies in ``build/fuzz``. So do
all inputs that have reached something new.
"""

from __future__ import annotations

import logging
import sys
import zlib
from pathlib import Path
from random import Random
from typing import Final

import atheris

# What is to be covered is instrumented as it is imported, all of it here.
with atheris.instrument_imports(
    include=["godwit.cli.inspect", "godwit.migration", "godwit.net.native", "godwit.net.records", "godwit.net.state"]
):
    from . import streams, targets

TESTS: Final = Path(__file__).resolve().parent.parent
WORK: Final = TESTS.parent / "build" / "fuzz"
LONGEST: Final = 4096  # bytes of an input
MADE: Final = 20  # inputs to begin with, besides those that are kept
MEASURED: Final = 8  # one in so many has its memory measured, which takes time


def begin(target: str) -> list[Path]:
    """The folders of the inputs: the one that grows, with something to begin with, and the one that is kept."""
    folder = WORK / target
    folder.mkdir(parents=True, exist_ok=True)
    rng = Random(target)
    found = [path.read_bytes() for name in ("golden", "native") for path in sorted((TESTS / name).glob("*.bin"))]
    found = [data for data in found if len(data) <= LONGEST]
    for _ in range(MADE):
        found.append(streams.Stream.made(rng, rng.choice((2, streams.NATIVE))).repaired())
    for number, data in enumerate(found):
        made = streams.in_file(rng, data) if target == "inspect" and number % 2 else data
        (folder / f"seed-{number}").write_bytes(made[:LONGEST])
    return [folder, *(path for path in [TESTS / "fuzz" / "corpus" / target] if path.is_dir())]


def main() -> None:
    """Fuzz until the time is up or something breaks."""
    target, options = sys.argv[1], sys.argv[2:]
    mutate = streams.mutated_file if target == "inspect" else streams.mutated

    def one(data: bytes) -> None:
        targets.run(target, data, memory=zlib.crc32(data) % MEASURED == 0)

    def mutated(data: bytes, most: int, seed: int) -> bytes:
        rng = Random(seed)
        return (mutate(rng, data) if rng.randrange(8) else atheris.Mutate(data, most))[:most]

    def crossed(data: bytes, other: bytes, most: int, seed: int) -> bytes:
        return mutate(Random(seed), data, other)[:most]

    logging.lastResort = None
    searching = all(option.startswith("-") for option in options)
    atheris.Setup(
        [
            sys.argv[0],
            f"-max_len={LONGEST}",
            "-timeout=20",
            "-rss_limit_mb=1024",
            f"-artifact_prefix={WORK}/{target}-",
            *options,
            *(map(str, begin(target)) if searching else ()),
        ],
        one,
        custom_mutator=mutated,
        custom_crossover=crossed,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
