# SPDX-License-Identifier: GPL-2.0-or-later
"""Of what the fuzzer has found, keep small inputs that reach all of it: ``make fuzz-keep``.

They come into ``tests/fuzz/corpus``, in place of those that were kept so before;
the test suite runs them. An input that broke something is kept by hand, with a
name that says what, and stays. libFuzzer itself chooses (``-merge=1``): by the
ways through the compiled code as through Python.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .campaign import ROOT, command, environment
from .registry import BY_NAME, CORPUS, WORK

FOUND = "found-"  # how the name of an input begins that was found
MOST = 100_000  # bytes of a target's; beyond that the largest go


def least(folders: Sequence[Path], name: str) -> list[bytes]:
    """As few small inputs as reach what all in those folders do, the smallest first."""
    with tempfile.TemporaryDirectory() as into:
        asked = command(name, "-merge=1", into, *map(str, folders))
        subprocess.run(asked, cwd=ROOT, env=environment(), check=True, capture_output=True)
        kept = [path.read_bytes() for path in Path(into).iterdir()]
    return sorted(kept, key=lambda data: (len(data), data))


def within(inputs: Sequence[bytes], most: int) -> list[bytes]:
    """Those of them, in order, that are no more than so many bytes in all."""
    kept: list[bytes] = []
    for data in inputs:
        most -= len(data)
        if most < 0:
            break
        kept.append(data)
    return kept


def keep(name: str) -> str:
    """Exchange the inputs of one target. What there is now."""
    folder = CORPUS / name
    folder.mkdir(parents=True, exist_ok=True)
    (WORK / name).mkdir(parents=True, exist_ok=True)
    named = {path.read_bytes() for path in folder.iterdir() if not path.name.startswith(FOUND)}
    found = least([folder, WORK / name], name)
    kept = [data for data in within(found, MOST) if data not in named]
    for path in folder.glob(f"{FOUND}*"):
        path.unlink()
    for data in kept:
        (folder / f"{FOUND}{hashlib.sha1(data, usedforsecurity=False).hexdigest()[:12]}").write_bytes(data)
    size = sum(path.stat().st_size for path in folder.iterdir())
    return f"{name}: {len(found)} reach all, {len(kept)} kept, {len(named)} by name, {size} bytes"


def main() -> None:
    """All targets, or those that are named."""
    for known in CORPUS.iterdir():
        if known.name not in BY_NAME:
            shutil.rmtree(known)
    for name in sys.argv[1:] or BY_NAME:
        sys.stdout.write(f"{keep(name)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
