#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Put a fault into every point of a migration, and write what came of it: ``tools/faults.py``, about 25 minutes.

Writes ``docs/faults.md``, or the page that ``--page`` names. Ends with status 1 if
the connections were anywhere else afterwards than ``godwit.lab.fault_matrix`` declares.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from docs import DOCS, replace
from outcomes import say, table

from godwit.lab.errors import LabError
from godwit.lab.fault_matrix import DIALECTS, Fault, Result, What, Where, message_faults, run, stage_faults
from godwit.lab.netns import enter_user_namespace


def cell(results: Sequence[Result], fault: Fault) -> str:
    """What came of it."""
    for result in results:
        if result.fault == fault:
            return result.where.value + (" **wrong**" if result.wrong else "")
    return "-"


def stages(results: Sequence[Result]) -> str:
    """A table for each dialect."""
    whats = [what for what in What if what is not What.HANG_UP]
    said = []
    for dialect in DIALECTS:
        places = dict.fromkeys((f.side, f.point) for f in stage_faults() if f.dialect == dialect)
        lines = [
            [f"`{point}`", side, *(cell(results, Fault(dialect, side, point, what)) for what in whats)]
            for side, point in places
        ]
        name = f"version {dialect}" if dialect.isdigit() else dialect
        said.append(f"### {name.capitalize()}\n\n{table(['point', 'at', *(w.value for w in whats)], lines)}\n")
    return "\n".join(said)


def messages(results: Sequence[Result]) -> str:
    """One table."""
    columns = [(when, what) for what in (What.KILLED, What.HANG_UP) for when in ("before", "after")]
    names = dict.fromkeys((f.side, f.point.partition(" ")[2]) for f in message_faults())
    lines = [
        [f"`{name}`", side, *(cell(results, Fault("2", side, f"{when} {name}", what)) for when, what in columns)]
        for side, name in names
    ]
    head = ["message", "to", *(f"{what.value} {when}" for when, what in columns)]
    count = len({result.fault for result in results})
    wrong = sum(bool(result.wrong) for result in results)
    return f"{table(head, lines)}\n\n{count} faults in all; after {wrong} of them it was otherwise than is declared."


def known(path: Path | None) -> dict[Fault, Result]:
    """What an earlier run has left."""
    found = {}
    if path is not None and path.exists():
        for line in path.read_text().splitlines():
            dialect, side, point, what, where, reached, note = json.loads(line)
            fault = Fault(dialect, side, point, What(what))
            found[fault] = Result(fault, Where(where), reached, note)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, default=DOCS / "faults.md", help="what to write to (%(default)s)")
    parser.add_argument(
        "--only", action="append", default=[], metavar="TEXT", help="of the faults, those with this text"
    )
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="keep results there; what is there is not run again"
    )
    options = parser.parse_args()
    enter_user_namespace()
    every = [*stage_faults(), *message_faults()]
    results = known(options.results)
    failed = []
    began = time.monotonic()
    for fault in every:
        if not all(text in str(fault) for text in options.only) or fault in results:
            continue
        try:
            result = run(fault)
        except (LabError, OSError) as error:
            failed.append(f"{fault}: {error}")
            say(f"{time.monotonic() - began:6.0f} s  {failed[-1]}")
            continue
        results[fault] = result
        say(f"{time.monotonic() - began:6.0f} s  {fault}: {result.where.value}{'  WRONG' * bool(result.wrong)}")
        if options.results is not None:
            kept = [fault.dialect, fault.side, fault.point, fault.what.value]
            with options.results.open("a") as file:
                file.write(json.dumps([*kept, result.where.value, result.reached, result.note]) + "\n")
    there = list(results.values())
    failed += [result.wrong for result in there if result.wrong]
    if all(fault in results for fault in every):
        parts = {"stages": lambda: stages(there), "messages": lambda: messages(there)}
        options.page.write_text(replace(options.page.name, options.page.read_text(), parts))
    for line in failed:
        say(line)
    say(f"{len(failed)} wrong")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
