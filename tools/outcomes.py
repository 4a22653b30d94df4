#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Migrate in all ways that there are, and write what came of it: ``tools/outcomes.py``, about 20 minutes.

Writes ``docs/outcomes.md``, or the page that ``--page`` names. Ends with status 1
if a connection came to another end than ``godwit.lab.outcomes`` declares.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from docs import DOCS, replace

from godwit.lab.errors import LabError
from godwit.lab.netns import enter_user_namespace
from godwit.lab.outcomes import PAIRINGS, SWITCHES, Case, Row, cases, expected, run
from godwit.lab.say import say
from godwit.lab.tcp_states import STATES, Outcome


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def pairings(rows: Sequence[Row]) -> list[str]:
    """What there was, in the order of the declaration."""
    return list(dict.fromkeys(row.case.pairing for row in rows))


class Notes:
    """Footnotes, numbered as they come."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        """The mark of a footnote."""
        if not text:
            return ""
        if text not in self.texts:
            self.texts.append(text)
        return f" ({self.texts.index(text) + 1})"

    def __str__(self) -> str:
        return "\n".join(f"{number}. {text}" for number, text in enumerate(self.texts, 1))


def cell(rows: Sequence[Row], notes: Notes) -> str:
    """What came of a state in all cases of a pairing and a switch."""
    counts = {outcome: sum(row.end.outcome is outcome for row in rows) for outcome in Outcome}
    there = [outcome for outcome in Outcome if counts[outcome]]
    said = ", ".join(o.value if len(there) == 1 else f"{o.value} {counts[o]}" for o in there)
    best = all(row.end.outcome is row.state.good for row in rows)
    wrong = " **wrong**" if any(row.wrong for row in rows) else ""
    whys = dict.fromkeys(expected(row.state, row.case)[1] for row in rows)
    return said + wrong + ("" if best else "".join(notes.mark(why) for why in whys))


def outcomes(rows: Sequence[Row]) -> str:
    """A table for each pairing."""
    notes = Notes()
    said = []
    for pairing in pairings(rows):
        lines = []
        for state in STATES:
            cells = []
            for switch in SWITCHES:
                here = [r for r in rows if (r.case.pairing, r.state, r.case.switch) == (pairing, state, switch)]
                cells.append(cell(here, notes) if here else "-")
            lines.append([state.name, *cells])
        said.append(f"### From {pairing}\n\n{table(['connection', *SWITCHES.values()], lines)}\n")
    return "\n".join([*said, str(notes)])


def figures(rows: Sequence[Row]) -> str:
    """How many, what was lost, and for how long streams stood still."""
    migrations = len({row.case for row in rows})
    lost = sum(row.end.lost for row in rows)
    wrong = sum(bool(row.wrong) for row in rows)
    lines = []
    for pairing in pairings(rows):
        cells = []
        for switch in SWITCHES:
            gaps = [
                row.end.seconds * 1000
                for row in rows
                if (row.case.pairing, row.case.switch) == (pairing, switch)
                and row.end.outcome is Outcome.LIVES
                and row.end.seconds is not None
            ]
            cells.append(f"{statistics.median(gaps):.0f}, {max(gaps):.0f} of {len(gaps)}" if gaps else "-")
        lines.append([pairing, *cells])
    return (
        f"{migrations} migrations, {len(rows)} connections; {lost} bytes lost of those that were not reset or lost as a"
        f" whole; {wrong} came to another end than is declared.\n\n"
        "The longest silence of a stream, as its receiver saw it, in milliseconds: median, longest, of how many.\n\n"
        + table(["from", *SWITCHES.values()], lines)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, default=DOCS / "outcomes.md", help="what to write to (%(default)s)")
    parser.add_argument(
        "--only", action="append", default=[], metavar="TEXT", help="of the cases, those with this text"
    )
    options = parser.parse_args()
    picked = [case for case in cases() if all(text in str(case) for text in options.only)]
    if not picked:
        parser.error("no such case: one is " + str(Case(*PAIRINGS[0], "passt", True, 0.2)))
    enter_user_namespace()
    rows: list[Row] = []
    wrong: list[str] = []
    began = time.monotonic()
    for case in picked:
        say(f"{time.monotonic() - began:6.0f} s  {case}")
        try:
            came = run(case)
        except LabError as error:
            wrong.append(f"{case}: {error}")
        else:
            rows += came
            wrong += [row.wrong for row in came if row.wrong]
        for line in wrong[-len(STATES) * 2 :]:
            if line.startswith(str(case)):
                say(f"          {line}")
    if len(picked) == len(list(cases())):
        text = options.page.read_text()
        options.page.write_text(
            replace(options.page.name, text, {"figures": lambda: figures(rows), "outcomes": lambda: outcomes(rows)})
        )
    else:
        say(f"{figures(rows)}\n\n{outcomes(rows)}")
    say(f"{len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
