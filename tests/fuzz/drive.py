# SPDX-License-Identifier: GPL-2.0-or-later
"""The coverage-guided fuzzer: ``python -m tests.fuzz.drive TARGET [OPTION | INPUT | DIRECTORY]...``.

`tests.fuzz.campaign` runs it, on the build that it needs. Options are
libFuzzer's. Inputs are run once each, instead of a search; directories are
searched from, instead of those that there are. An input that breaks what its
target states ends the run and lies in ``build/fuzz``. So do all inputs that
have reached something new.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from random import Random

import atheris

from . import nowhere, registry
from .target import Target


def load(name: str) -> Target:
    """A target; the Python that it is about is instrumented as it is imported. The compiled modules are already."""
    if not (packages := registry.BY_NAME[name].packages):
        return registry.target(name)
    with atheris.instrument_imports(include=packages):
        return registry.target(name)


def begin(name: str, target: Target) -> list[Path]:
    """The folders of the inputs: the one that grows, with something to begin with, and the one that is kept."""
    folder = registry.WORK / name
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(target.seeds()):
        if len(data) <= target.longest:
            (folder / f"seed-{number}").write_bytes(data)
    return [folder, *(path for path in [registry.CORPUS / name] if path.is_dir())]


def main() -> None:
    """Fuzz until the time is up or something breaks."""
    name, options = sys.argv[1], sys.argv[2:]
    target = load(name)
    mutate = target.mutate

    def mutated(data: bytes, most: int, seed: int) -> bytes:
        assert mutate is not None
        rng = Random(seed)
        return (mutate(rng, data, b"") if rng.randrange(8) else atheris.Mutate(data, most))[:most]

    def crossed(data: bytes, other: bytes, most: int, seed: int) -> bytes:
        assert mutate is not None
        return mutate(Random(seed), data, other)[:most]

    logging.disable(logging.CRITICAL)
    searching = all(option.startswith("-") and not option.startswith("-merge") for option in options)
    arguments = [
        f"{sys.executable} -m {__spec__.name} {name}",  # as libFuzzer has a shell run it, to merge
        f"-max_len={target.longest}",
        "-timeout=30",
        "-rss_limit_mb=2048",
        "-print_funcs=0",  # the names are asked of a program, whose pipes would be descriptors left behind
        f"-artifact_prefix={registry.WORK}/{name}-",
        *options,
        *(map(str, begin(name, target)) if searching else ()),
    ]
    own = {} if mutate is None else {"custom_mutator": mutated, "custom_crossover": crossed}
    atheris.Setup(arguments, lambda data: target.run(data) and None, **own)
    with nowhere.inside():
        atheris.Fuzz()


if __name__ == "__main__":
    main()
