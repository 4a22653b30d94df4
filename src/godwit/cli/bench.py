# SPDX-License-Identifier: GPL-2.0-or-later
"""``godwit bench``: godwit, passt and any other back-end measured beside each other."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from types import FrameType

from rich.console import Console
from rich.table import Table
from rich.text import Text

from godwit.lab import bench_chart, move_bench, qemu_bench, rest_bench, tcp_bench, udp_bench
from godwit.lab import bench_report as report
from godwit.lab.backend import Kind, Program
from godwit.lab.bench import KINDS, Case, Results, better, run
from godwit.lab.bench_targets import TARGETS, Verdict
from godwit.lab.errors import LabError, UnavailableError
from godwit.lab.netns import enter_user_namespace, missing_tun

INCOMPLETE = 3  # exit status: some of it could not be measured

GROUPS: dict[str, Sequence[Case]] = {
    "tcp": tcp_bench.CASES,
    "udp": udp_bench.CASES,
    "move": move_bench.CASES,
    "rest": rest_bench.CASES,
    "qemu": qemu_bench.CASES,
}


def _program(text: str) -> Program:
    try:
        program = Program.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if program.name in KINDS:
        raise argparse.ArgumentTypeError(f"{program.name} is one of the bench's own; take another name")
    return program


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="godwit bench",
        description="Measure back-ends beside each other, behind the same front-end, one after the other in each"
        " round. Medians are given, with the least and the most in brackets, and the first back-end's ratio to each"
        " of the others.",
        epilog="In COMMAND LINE, {socket} stands for the path to listen at, {ports} for ports of the host that are to"
        " be forwarded to the guest (first-last), {mtu} for the guest's MTU. It has to stay in the foreground."
        " Guests are moved between two of godwit or of passt only. The exit status is 3 if some of what was asked for"
        " could not be measured, 1 if nothing could, 2 if it cannot run here.",
    )
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"what to measure: {', '.join(GROUPS)} (all)")
    parser.add_argument("--list", action="store_true", help="show the groups and their cases, and measure nothing")
    parser.add_argument("--case", action="append", metavar="NAME", help="only this case; may be repeated")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="measure each so often (%(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=0.5, metavar="S", help="for about so long each time (%(default)s)"
    )
    parser.add_argument(
        "--of",
        type=lambda text: list(dict.fromkeys(text.split(","))),
        metavar="KIND,...",
        help=f"what to compare (default: {','.join(map(str, KINDS))} and each --backend; ideal is a back-end"
        " that gives each frame back, none the host itself in the guest's place)",
    )
    parser.add_argument(
        "--backend",
        action="append",
        default=[],
        type=_program,
        metavar="NAME=COMMAND LINE",
        help="a vhost-user back-end to compare with, as a kind of this name; may be repeated",
    )
    parser.add_argument("--json", metavar="FILE", help="write every value to this file, after each case")
    parser.add_argument("--svg", metavar="FILE", help="draw godwit's ratios to passt into this file")
    return parser


def _chosen_cases(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Case]:
    for group in options.groups:
        if group not in GROUPS:
            parser.error(f"no such group: {group}; there are {', '.join(GROUPS)}")
    cases = [case for group in GROUPS if group in (options.groups or GROUPS) for case in GROUPS[group]]
    if options.case:
        unknown = set(options.case) - {case.name for case in cases}
        if unknown:
            parser.error(f"no such case: {', '.join(sorted(unknown))}; --list shows those that there are")
        cases = [case for case in cases if case.name in options.case]
    return cases


def _chosen_kinds(parser: argparse.ArgumentParser, options: argparse.Namespace, cases: Sequence[Case]) -> list[Kind]:
    known: dict[str, Kind] = {str(kind): kind for kind in (*KINDS, *options.backend)}
    if len(known) != len(KINDS) + len(options.backend):
        parser.error("argument --backend: two have the same name")
    for name in options.of or known:
        if name not in known:
            parser.error(f"argument --of: {name!r} is none of {', '.join(known)}")
    for name in options.of or map(str, options.backend):
        if not any(case.takes(known[name]) for case in cases):
            parser.error(f"none of these cases can be measured with {name}")
    return [known[name] for name in options.of or known]


def _table(results: Results) -> Table:
    first, *others = results.kinds
    table = Table(title=f"medians of {results.rounds} (least..most); the way that is better: ↑ ↓")
    table.add_column("case")
    table.add_column("")
    for kind in results.kinds:
        table.add_column(report.heading(kind), justify="right")
    for kind in others:
        table.add_column(f"{first} : {kind}", justify="right")
    for name, title in report.titles(results).items():
        for metric in results.values[name]:
            cells = [report.cell(results, name, metric, kind) for kind in results.kinds]
            ratios = [_ratio(results.ratio(name, metric, first, kind), metric) for kind in others]
            table.add_row(title, report.metric(metric), *cells, *ratios)
            title = ""
        table.add_section()
    return table


def _ratio(value: float | None, metric: str) -> Text:
    """A ratio, in the colour of what it means."""
    way = 0 if value is None else better(metric) * ((value > 1) - (value < 1))
    return Text(report.ratio(value), style={1: "green", -1: "red", 0: ""}[way])


def _targets(results: Results) -> Iterator[str]:
    """Targets that are missed."""
    for target in TARGETS:
        if target.verdict(results) is Verdict.MISSED:
            yield f"{report.label(results, target.case)}: {target.metric} is to be {target.words}"


def _end(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.rounds < 1 or options.seconds <= 0:
        parser.error("--rounds is at least 1, --seconds more than 0")
    cases = _chosen_cases(parser, options)
    kinds = _chosen_kinds(parser, options, cases)
    if options.list:
        for group, members in GROUPS.items():
            for case in members:
                if case in cases:
                    print(f"{group:5} {case.name:20} {case.title}")
        return 0
    for option in ("json", "svg"):
        if (path := getattr(options, option)) is not None:
            try:
                _write(path, None)  # before anything is measured in vain
            except OSError as error:
                parser.error(f"argument --{option}: cannot write {path}: {error.strerror}")
    options.command = shlex.join(["godwit", "bench", *(sys.argv[1:] if argv is None else argv)])
    signal.signal(signal.SIGTERM, _end)  # what has been started is ended on the way out
    console = Console()
    if not console.is_terminal:
        console = Console(width=180)
    try:
        enter_user_namespace()
        if (reason := missing_tun()) is not None:
            raise UnavailableError(reason)
        return _run(options, cases, kinds, console)
    except UnavailableError as error:
        print(f"godwit bench: cannot run here: {error}", file=sys.stderr)
        return 2
    except LabError as error:
        print(f"godwit bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("godwit bench: interrupted", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace, cases: Sequence[Case], kinds: Sequence[Kind], console: Console) -> int:
    began = time.monotonic()

    def step(text: str) -> None:
        console.print(f"[dim]{time.monotonic() - began:7.1f} s[/dim]  {text}", highlight=False)

    def keep(results: Results) -> None:
        results.about["command"] = options.command
        results.groups = {group: [case.name for case in members] for group, members in GROUPS.items()}
        if results.values:
            for path, make in ((options.json, Results.dumps), (options.svg, bench_chart.svg)):
                if path is not None:
                    _write(path, make(results))

    results = run(cases, kinds, rounds=options.rounds, seconds=options.seconds, step=step, keep=keep)
    if results.values:
        console.print(_table(results))
    if results.load:
        console.print(
            f"The machine's load average was {min(results.load.values()):.1f} to {max(results.load.values()):.1f}"
            " before the cases; what else runs shows in the spread.",
            highlight=False,
        )
    for missed in _targets(results):
        console.print(f"[yellow]target missed:[/yellow] {missed}", highlight=False)
    for failure in results.failures:
        console.print(f"[red]failed:[/red] {failure}", highlight=False)
    if not results.values:
        raise LabError("nothing could be measured")
    return INCOMPLETE if results.failures else 0


def _write(path: str, text: str | None) -> None:
    """Write a file that appears as a whole, or stays as it was; with no text, only see whether that can be."""
    path = os.path.realpath(path)
    special = os.path.exists(path) and not os.path.isfile(path)  # a pipe, a terminal
    aside = path if special else f"{path}.new"
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text or "")
    if text is None and not special:
        os.unlink(aside)
    elif not special:
        os.replace(aside, path)
