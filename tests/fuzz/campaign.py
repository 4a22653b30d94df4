# SPDX-License-Identifier: GPL-2.0-or-later
"""``make fuzz``: each target for its share of the time, as many at once as there are processors, and what came of it.

The targets run on a build of their own, by clang, with AddressSanitizer,
UndefinedBehaviorSanitizer and what tells libFuzzer which way the code goes, in
the compiled modules as in Python. The status is 1 if anything was found.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, NamedTuple

from .registry import BY_NAME, WORK

ROOT: Final = Path(__file__).resolve().parent.parent.parent
BUILD: Final = ROOT / "build" / "libfuzzer" / "lib"
RUNS: Final = WORK / "runs.jsonl"
SPARE: Final = 300  # seconds beyond its share, after which a target is ended: it hangs
TAIL: Final = 60  # lines of a target's output that are shown where it found something


class Result(NamedTuple):
    """What became of a target."""

    name: str
    executions: int
    each_second: int
    edges: tuple[int, int]  # at the beginning, with what was kept, and at the end
    features: int
    corpus: str
    found: list[str]  # the inputs that broke something, or what else went wrong
    tail: str

    @property
    def row(self) -> str:
        """A line of the table."""
        edges = f"{self.edges[0]} -> {self.edges[1]}"
        return (
            f"{self.name:12} {self.executions:12} {self.each_second:8} {edges:>16} {self.features:9} "
            f"{self.corpus:>14} {len(self.found):9}"
        )

    @property
    def seconds(self) -> int:
        """For which it ran, about."""
        return self.executions // max(1, self.each_second)


HEAD: Final = f"{'target':12} {'executions':>12} {'/s':>8} {'edges':>16} {'features':>9} {'corpus':>14} {'findings':>9}"


def environment() -> dict[str, str]:
    """For a process that has the sanitizers' library, with libFuzzer in it, before all others."""
    import atheris

    options = "detect_leaks=0:quarantine_size_mb=16:allocator_may_return_null=1:handle_abort=1"
    return os.environ | {
        "LD_PRELOAD": str(Path(atheris.path()) / "asan_with_fuzzer.so"),
        "ASAN_OPTIONS": options,
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # Python's objects come from its own allocator: twice as fast. make asan runs what was kept without that.
        "PYTHONMALLOC": "pymalloc",
        "PYTHONPATH": os.pathsep.join([str(BUILD), str(ROOT)]),
    }


def command(name: str, *options: str) -> list[str]:
    """That drives a target."""
    return [sys.executable, "-m", "tests.fuzz.drive", name, *options]


def fuzz(name: str, seconds: int) -> Result:
    """Run a target for so long."""
    WORK.mkdir(parents=True, exist_ok=True)
    before = set(WORK.glob(f"{name}-*"))
    log = WORK / f"{name}.log"
    # What takes long where other loads share the processors is no finding; what hangs is, after SPARE.
    limits = (f"-max_total_time={seconds}", f"-report_slow_units={SPARE}")
    asked = command(name, *limits, "-print_final_stats=1", "-verbosity=1")
    with log.open("w") as out:
        try:
            status = subprocess.run(
                asked, cwd=ROOT, env=environment(), stdout=out, stderr=out, timeout=seconds + SPARE, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            status = -1
    text = log.read_text(errors="replace")
    found = [str(path.relative_to(ROOT)) for path in sorted(set(WORK.glob(f"{name}-*")) - before)]
    if status and not found:
        found = [f"status {status}"]
    done = result(name, text, found)
    remember(done)
    return done


def result(name: str, text: str, found: list[str]) -> Result:
    """From what libFuzzer has said."""
    states = re.findall(r"cov: (\d+) ft: (\d+) corp: (\S+)", text)
    first = re.search(r"INITED cov: (\d+)", text)
    numbers = dict(re.findall(r"stat::(\w+): +(\d+)", text))
    last = states[-1] if states else ("0", "0", "0")
    return Result(
        name,
        int(numbers.get("number_of_executed_units", 0)),
        int(numbers.get("average_exec_per_sec", 0)),
        (int(first[1]) if first else 0, int(last[0])),
        int(last[1]),
        last[2],
        found,
        "\n".join(text.splitlines()[-TAIL:]),
    )


def remember(done: Result) -> None:
    """Add it to those of before: a line of JSON each."""
    with RUNS.open("a") as file:
        file.write(json.dumps(done._replace(tail="")._asdict() | {"seconds": done.seconds}) + "\n")


def totals() -> str:
    """What all runs since the last ``make clean`` come to."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in RUNS.read_text().splitlines():
        run = json.loads(line)
        found.setdefault(run["name"], []).append(run)
    lines = [f"{'target':12} {'runs':>6} {'hours':>7} {'executions':>12} {'edges':>8} {'findings':>9}"]
    for name, runs in found.items():
        hours = sum(run["seconds"] for run in runs) / 3600
        executions, findings = sum(run["executions"] for run in runs), sum(len(run["found"]) for run in runs)
        edges = max(run["edges"][1] for run in runs)
        lines.append(f"{name:12} {len(runs):6} {hours:7.2f} {executions:12} {edges:8} {findings:9}")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run all of them, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--time", type=int, default=60, help="seconds in all")
    parser.add_argument("--totals", action="store_true", help="what all runs have come to, instead")
    parser.add_argument("targets", nargs="*")
    asked = parser.parse_args(argv)
    if asked.totals:
        sys.stdout.write(totals())
        return 0
    chosen = asked.targets or list(BY_NAME)
    if unknown := [name for name in chosen if name not in BY_NAME]:
        parser.error(f"no such target: {', '.join(unknown)}; there are {', '.join(BY_NAME)}")
    jobs = min(len(os.sched_getaffinity(0)), len(chosen))
    share = max(1, asked.time * jobs // len(chosen))
    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(lambda name: fuzz(name, share), chosen))
    for each in results:
        if each.found:
            sys.stdout.write(f"\n=== {each.name}: {', '.join(each.found)}\n{each.tail}\n")
    sys.stdout.write(f"\n{share} seconds each, {jobs} at a time\n{HEAD}\n")
    sys.stdout.writelines(f"{each.row}\n" for each in results)
    return 1 if any(each.found for each in results) else 0


if __name__ == "__main__":
    sys.exit(main())
