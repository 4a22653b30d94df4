# SPDX-License-Identifier: GPL-2.0-or-later
"""``godwit bench``: godwit and passt measured beside each other."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType

from rich.console import Console
from rich.table import Table

from godwit.lab import udp_bench
from godwit.lab.bench import KINDS, Case, Results, Summary, run
from godwit.lab.errors import LabError, UnavailableError
from godwit.lab.netns import enter_user_namespace, missing_tun

BENCHES: dict[str, Sequence[Case]] = {"udp": udp_bench.CASES}


def _kinds(text: str) -> list[str]:
    kinds = text.split(",")
    for kind in kinds:
        if kind not in KINDS:
            raise argparse.ArgumentTypeError(f"{kind!r} is none of {', '.join(KINDS)}")
    return list(dict.fromkeys(kinds))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="godwit bench",
        description="Measure back-ends beside each other, behind the same front-end, one after the other in each"
        " round; medians are given, with the least and the most in brackets.",
        epilog="\n".join(
            ["cases:", *(f"  {bench}  {case.name:20} {case.title}" for bench in BENCHES for case in BENCHES[bench])]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bench", choices=BENCHES, help="what to measure")
    parser.add_argument("--case", action="append", metavar="NAME", help="only this case; may be repeated")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="measure each so often (%(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=1.0, metavar="S", help="for about so long each time (%(default)s)"
    )
    parser.add_argument(
        "--of",
        type=_kinds,
        default=list(KINDS),
        metavar="KIND,...",
        help=f"what to compare (default: {','.join(KINDS)}; none is the host in the guest's place)",
    )
    parser.add_argument("--json", metavar="FILE", help="write every value to this file")
    return parser


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def _cell(summary: Summary | None) -> str:
    if summary is None:
        return "-"
    if summary.least == summary.most:
        return _number(summary.median)
    return f"{_number(summary.median)} ({_number(summary.least)}..{_number(summary.most)})"


def _table(cases: Sequence[Case], results: Results) -> Table:
    compared = {"godwit", "passt"} <= set(results.kinds)
    table = Table(title=f"medians of {results.rounds} (least..most)")
    table.add_column("case")
    table.add_column("")
    for kind in results.kinds:
        table.add_column("no back-end" if kind == "none" else kind, justify="right")
    if compared:
        table.add_column("godwit : passt", justify="right")
    for case in cases:
        title = case.title
        for metric in results.values.get(case.name, {}):
            row = [title, metric, *(_cell(results.summary(case.name, metric, kind)) for kind in results.kinds)]
            if compared:
                ratio = results.ratio(case.name, metric)
                row.append("" if ratio is None else f"{ratio:.2f}")
            table.add_row(*row)
            title = ""
        table.add_section()
    return table


def _end(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.rounds < 1 or options.seconds <= 0:
        parser.error("--rounds is at least 1, --seconds more than 0")
    cases = list(BENCHES[options.bench])
    if options.case:
        unknown = set(options.case) - {case.name for case in cases}
        if unknown:
            parser.error(
                f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(case.name for case in cases)}"
            )
        cases = [case for case in cases if case.name in options.case]
    if options.json:
        try:
            with open(options.json, "a", encoding="utf-8"):
                pass  # before anything is measured in vain
        except OSError as error:
            parser.error(f"argument --json: cannot write {options.json}: {error.strerror}")
    signal.signal(signal.SIGTERM, _end)  # what has been started is ended on the way out
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    try:
        enter_user_namespace()
        if (reason := missing_tun()) is not None:
            raise UnavailableError(reason)
        return _run(options, cases, console)
    except UnavailableError as error:
        print(f"godwit bench: cannot run here: {error}", file=sys.stderr)
        return 2
    except LabError as error:
        print(f"godwit bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("godwit bench: interrupted", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace, cases: Sequence[Case], console: Console) -> int:
    began = time.monotonic()

    def step(text: str) -> None:
        console.print(f"[dim]{time.monotonic() - began:7.1f} s[/dim]  {text}", highlight=False)

    results = run(cases, options.of, rounds=options.rounds, seconds=options.seconds, step=step)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(results.as_json(), file, indent=1)
            file.write("\n")
    console.print(_table(cases, results))
    if results.load:
        console.print(
            f"The machine's load average was {min(results.load):.1f} to {max(results.load):.1f} before the cases;"
            " what else runs shows in the spread.",
            highlight=False,
        )
    for failure in results.failures:
        console.print(f"[red]failed:[/red] {failure}", highlight=False)
    return 1 if results.failures else 0
