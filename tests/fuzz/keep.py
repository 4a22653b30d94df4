# SPDX-License-Identifier: GPL-2.0-or-later
"""Of what the fuzzer has found, keep a small input for each step of the code that one reaches: ``make fuzz-keep``.

They come into ``tests/fuzz/corpus``, beside those that are there, where the test
suite runs them. An input that broke something is kept by hand, with a name that says what.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any, Final

import godwit

from . import targets

PACKAGE: Final = str(Path(godwit.__file__).parent)
CORPUS: Final = Path(__file__).resolve().parent / "corpus"
WORK: Final = CORPUS.parent.parent.parent / "build" / "fuzz"

#: From one line of a function to another.
Step = tuple[str, int, int, int]


def steps(run: Callable[[], object]) -> set[Step]:
    """Those that ``run`` goes, within the package."""
    found: set[Step] = set()

    def enter(frame: FrameType, event: str, _argument: Any) -> Callable[..., Any] | None:
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE):
            return None
        last = 0

        def go(frame: FrameType, event: str, _argument: Any) -> Callable[..., Any]:
            nonlocal last
            now = -1 if event == "return" else frame.f_lineno
            found.add((code.co_filename, code.co_firstlineno, last, now))
            last = now
            return go

        return go

    sys.settrace(enter)
    try:
        run()
    finally:
        sys.settrace(None)
    return found


def least(inputs: Iterable[bytes], reach: Callable[[bytes], set[Step]]) -> list[bytes]:
    """As few small inputs as reach what all do; not the fewest that there could be."""
    reached = {data: reach(data) for data in sorted(set(inputs), key=lambda data: (len(data), data))}
    kept: list[bytes] = []
    known: set[Step] = set()
    # Those that go most new steps for their size come first.
    while reached:
        best = max(reached, key=lambda data: len(reached[data] - known) / (len(data) + 100))
        new = reached.pop(best) - known
        if not new:
            break
        known |= new
        kept.append(best)
    return kept


def _steps_of(run: Callable[[bytes], object], data: bytes) -> set[Step]:
    return steps(lambda: run(data))


def main() -> None:
    """Exchange the corpus of each target for the least of it and of what was found."""
    logging.disable(logging.CRITICAL)
    for target, run in targets.TARGETS.items():
        folder = CORPUS / target
        folder.mkdir(parents=True, exist_ok=True)
        old = {path: path.read_bytes() for path in folder.iterdir()}
        named = {data for path, data in old.items() if not path.stem.startswith("found-")}
        found = [path.read_bytes() for path in (WORK / target).glob("*")]
        kept = least([*old.values(), *found], functools.partial(_steps_of, run))
        for path, data in old.items():
            if data not in named:
                path.unlink()
        for data in kept:
            if data not in named:
                (folder / f"found-{hashlib.sha1(data, usedforsecurity=False).hexdigest()[:12]}").write_bytes(data)
        size = sum(path.stat().st_size for path in folder.iterdir())
        sys.stdout.write(f"{target}: {len(found)} found, {len(kept)} kept, {size} bytes\n")


if __name__ == "__main__":
    main()
