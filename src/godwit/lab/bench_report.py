# SPDX-License-Identifier: GPL-2.0-or-later
"""Results of the bench to be read: cells and tables, the latter in Markdown for ``docs/performance.md``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from godwit.lab.bench import NONE, Results, Summary, better
from godwit.lab.bench_targets import OURS, PEER, TARGETS, Target, Verdict

_WORDS = {verdict: f"**{verdict.value}**" if verdict is Verdict.MISSED else verdict.value for verdict in Verdict}
ARROWS = {1: " ↑", -1: " ↓", 0: ""}  # the way that is better


def number(value: float) -> str:
    """A value with the digits that mean something."""
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def cell(results: Results, case: str, metric: str, kind: str) -> str:
    """A median, with the least and the most, and of how many rounds where it is not all."""
    summary = results.summary(case, metric, kind)
    if summary is None:
        return "-"
    text = number(summary.median)
    if summary.least != summary.most:
        text += f" ({number(summary.least)}..{number(summary.most)})"
    return text if summary.count == results.rounds else f"{text}, {summary.count} of {results.rounds}"


def ratio(value: float | None) -> str:
    """A ratio, empty where there is none."""
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def heading(kind: str) -> str:
    """What a kind is called above a column."""
    return "no back-end" if kind == NONE else kind


def metric(name: str) -> str:
    """A metric's name, and which way is better."""
    return f"{name}{ARROWS[better(name)]}"


def titles(results: Results) -> dict[str, str]:
    """Titles of the cases that were measured, by name."""
    return {name: title for name, title in results.titles.items() if name in results.values}


def label(results: Results, case: str) -> str:
    """What a case is called among those of other groups."""
    title = results.titles.get(case, case)
    group = next((group for group, names in results.groups.items() if case in names), None)
    return title if group is None or title.lower().startswith(group) else f"{group}: {title}"


LIMITED = ("Gbit/s", "delivered/s", "transactions/s", "connections/s", "p50 us", "CPU s/GiB", "CPU us")


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]], right: int) -> str:
    """A table; from column ``right`` on, cells are figures."""
    rule = ["---"] * right + ["---:"] * (len(head) - right)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def about(results: Results) -> str:
    """What was measured on what, and by which command."""
    found = results.about
    lines = {
        "measured": f"{found['date']}: {results.rounds} rounds of {results.seconds:g} s",
        "command": f"`{found['command']}`" if found.get("command") else None,
        "godwit": found["godwit"],
        "passt": found["passt"],
        **{name: f"`{line}`" for name, line in found["backends"].items()},
        "machine": f"{found['processors']} × {found['processor']}, {_gigabytes(found['memory'])} of memory",
        "kernel": f"Linux {found['kernel']}",
        "congestion control": found.get("congestion control"),
        "Python": found["python"],
        "load average before a case": f"{min(results.load.values()):.1f} to {max(results.load.values()):.1f}"
        if results.load
        else None,
    }
    return "\n".join(f"- {name}: {text}" for name, text in lines.items() if text)


def _gigabytes(text: str | None) -> str:
    return f"{int(text.split()[0]) / (1 << 20):.0f} GiB" if text else "?"


def _spread(summary: Summary | None) -> str:
    """The middle half's width, in per cent of the median."""
    if summary is None or not summary.median:
        return "-"
    return f"{(summary.upper - summary.lower) / summary.median * 100:.0f} %"


def cases(results: Results, group: str | None = None) -> str:
    """Every metric of every case, of one group if it is named."""
    members = titles(results)
    if group is not None:
        members = {name: title for name, title in members.items() if name in results.groups.get(group, ())}
    kinds = [
        kind
        for kind in results.kinds
        if any(kind in values for name in members for values in results.values[name].values())
    ]
    if not kinds:
        return "Not measured."
    first, *others = kinds
    head = ["case", "metric", *map(heading, kinds), *(f"{first} : {heading(kind)}" for kind in others), "middle half"]
    rows = []
    for name, title in members.items():
        for each in results.values[name]:
            rows.append(
                [
                    title,
                    metric(each),
                    *(cell(results, name, each, kind) for kind in kinds),
                    *(ratio(results.ratio(name, each, first, kind)) for kind in others),
                    _spread(results.summary(name, each, first)),
                ]
            )
            title = ""
    return _markdown(head, rows, 2)


def targets(results: Results) -> str:
    """How many targets are met, and for every one what was reached."""
    counts = Counter(target.verdict(results) for target in TARGETS)
    head = ["case", "metric", OURS, PEER, "target", "reached", ""]
    rows = []
    before = ""
    for target in TARGETS:
        title = label(results, target.case)
        rows.append(
            [
                "" if title == before else title,
                metric(target.metric),
                cell(results, target.case, target.metric, OURS),
                cell(results, target.case, target.metric, PEER),
                target.words,
                ratio(target.reached(results)) if target.than else _reached(target, results),
                _WORDS[target.verdict(results)],
            ]
        )
        before = title
    total = ", ".join(f"{counts[verdict]} {verdict.value}" for verdict in Verdict if counts[verdict])
    return f"Of {len(TARGETS)} targets: {total}.\n\n{_markdown(head, rows, 2)}"


def _reached(target: Target, results: Results) -> str:
    value = target.reached(results)
    return "" if value is None else number(value)


def failures(results: Results) -> str:
    """What could not be measured."""
    if not results.failures:
        return "Nothing failed."
    times = Counter(" ".join(failure.split()) for failure in results.failures)
    return "\n".join(f"- {failure}{f', {count} times' if count > 1 else ''}" for failure, count in times.items())


def comparable(results: Results) -> list[tuple[Target, float]]:
    """Targets that compare with the peer, and were measured with both, each with its ratio."""
    found = [(target, target.reached(results)) for target in TARGETS if target.than == PEER]
    return [(target, value) for target, value in found if value]


def limits(results: Results) -> str:
    """How far the first kind is from the ideal back-end, and from none: rates, latencies, processor time."""
    first = results.kinds[0]
    rows = []
    for name in titles(results):
        title = label(results, name)
        for each in LIMITED:
            if each not in results.values[name]:
                continue
            kinds = ("ideal", NONE)
            if not any(results.ratio(name, each, first, kind) for kind in kinds):
                continue
            row = [title, each, cell(results, name, each, first)]
            title = ""
            for kind in kinds:
                row += [cell(results, name, each, kind), _percent(results.ratio(name, each, first, kind))]
            rows.append(row)
    if not rows:
        return "Not measured."
    return _markdown(["case", "metric", first, "ideal", "of it", "no back-end", "of it"], rows, 2)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value * 100:.0f} %"
