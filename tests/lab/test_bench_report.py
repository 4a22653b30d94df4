# SPDX-License-Identifier: GPL-2.0-or-later
"""What is made of the bench's results: files, targets, tables, the chart."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from godwit.lab import bench_report
from godwit.lab.bench import Results, better
from godwit.lab.bench_chart import svg
from godwit.lab.bench_targets import TARGETS, Target, Verdict

SVG = "{http://www.w3.org/2000/svg}"


def made() -> Results:
    """Transactions of two kinds, and a memory."""
    results = Results(
        ["godwit", "passt"],
        5,
        1.0,
        {
            "date": "today",
            "godwit": "1",
            "passt": "2",
            "backends": {},
            "kernel": "6",
            "congestion control": "reno",
            "python": "3",
            "processor": "P",
            "processors": 2,
            "memory": "2097152 kB",
        },
        groups={"tcp": ["rr-together"], "rest": ["memory"]},
        titles={"rr-together": "transactions <1 B>", "memory": "memory"},
        load={"rr-together": 1.0},
    )
    for cpu in (10.0, 11.0, 11.0, 11.0, 12.0):
        results.add("rr-together", "godwit", {"CPU us": cpu, "p50 us": 50.0, "transactions/s": 20_000.0})
        results.add("rr-together", "passt", {"CPU us": 4 * cpu, "p50 us": 50.0, "transactions/s": 10_000.0})
        results.add("memory", "godwit", {"PSS MB": 40.0})
    return results


def test_a_file_holds_all_of_it() -> None:
    results = made()
    assert Results.loads(results.dumps()) == results
    results.add("rr-together", "godwit", {"CPU us": 1 / 3})
    again = Results.loads(results.dumps())
    assert again.values["rr-together"]["CPU us"]["godwit"] == [10.0, 11.0, 11.0, 11.0, 12.0, 0.333333]


@pytest.mark.parametrize("text", ["{}", "[]", '{"format": 0}', '{"format": 1, "kinds": []}', "nonsense"])
def test_what_is_no_result(text: str) -> None:
    with pytest.raises(ValueError):
        Results.loads(text)


@pytest.mark.parametrize(
    ("target", "reached", "verdict"),
    [
        (Target("rr-together", "CPU us", 0.25), 0.25, Verdict.MET),
        (Target("rr-together", "CPU us", 0.24), 0.25, Verdict.MISSED),
        (Target("rr-together", "transactions/s", 2.0, least=True), 2.0, Verdict.MET),
        (Target("rr-together", "transactions/s", 2.1, least=True), 2.0, Verdict.MISSED),
        (Target("memory", "PSS MB", 40, than=None), 40, Verdict.MET),
        (Target("memory", "PSS MB", 39, than=None), 40, Verdict.MISSED),
        (Target("memory", "PSS MB", 40), None, Verdict.UNMEASURED),  # the peer was not measured
        (Target("rr-together", "p50 us", 5.0, than="metric:CPU us"), 50 / 11, Verdict.MET),
        (Target("rr-together", "p50 us", 1.0, than="case:crr"), None, Verdict.UNMEASURED),
        (Target("crr", "p50 us", 1.0), None, Verdict.UNMEASURED),
    ],
)
def test_targets(target: Target, reached: float | None, verdict: Verdict) -> None:
    results = made()
    assert target.reached(results) == reached
    assert target.verdict(results) is verdict


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ([1, 1, 1, 1], [1] * 5, Verdict.UNDECIDED),  # a round of ours has failed
        ([1] * 5, [1] * 4, Verdict.UNDECIDED),
        ([0.4] * 5, [1] * 5, Verdict.MET),
        ([0.4, 0.4, 0.4, 0.4, 9], [1] * 5, Verdict.MET),  # one straggler
        ([0.6, 0.6, 0.6, 0.6, 0.1], [1] * 5, Verdict.MISSED),
        ([0.1, 0.3, 0.4, 0.6, 0.7], [1] * 5, Verdict.UNDECIDED),
        ([0.1, 0.2, 0.4, 8, 9], [1, 2, 4, 80, 90], Verdict.MET),  # spread, but always a tenth
        ([1, 1, 1, 1, 1], [3, 3, 3, 0, 0], Verdict.UNDECIDED),
        ([0] * 5, [0] * 5, Verdict.MET),
        ([1] * 5, [0] * 5, Verdict.MISSED),
    ],
)
def test_verdicts(ours: list[float], theirs: list[float], verdict: Verdict) -> None:
    """Of half as much."""
    results = Results(["godwit", "passt"], 5, 1.0)
    results.values["rr-together"] = {"CPU us": {"godwit": ours, "passt": theirs}}
    assert Target("rr-together", "CPU us", 0.5).verdict(results) is verdict


def test_few_rounds_decide_nothing() -> None:
    results = Results(["godwit", "passt"], 4, 1.0)
    results.values["rr-together"] = {"CPU us": {"godwit": [1.0] * 4, "passt": [9.0] * 4}}
    target = Target("rr-together", "CPU us", 0.5)
    assert target.verdict(results) is Verdict.UNDECIDED
    results.rounds = 5
    assert bench_report.cell(results, "rr-together", "CPU us", "godwit") == "1, 4 of 5"


def test_nothing_is_as_good_as_nothing() -> None:
    """There is no ratio to 0, but one can be compared with it."""
    results = made()
    results.values["rr-together"]["lost %"] = {kind: [0.0] * 5 for kind in ("godwit", "passt")}
    target = Target("rr-together", "lost %", 1.0)
    assert (target.reached(results), target.verdict(results)) == (None, Verdict.MET)


def test_bounds_are_on_the_better_side() -> None:
    """The least of what more is better of, the most of what less is better of."""
    assert [target for target in TARGETS if better(target.metric) != (1 if target.least else -1)] == []


def test_tables() -> None:
    results = made()
    assert bench_report.cases(results, "tcp").splitlines() == [
        "| case | metric | godwit | passt | godwit : passt | middle half |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        "| transactions <1 B> | CPU us ↓ | 11 (10..12) | 44 (40..48) | 0.25 | 0 % |",
        "|  | p50 us ↓ | 50 | 50 | 1.00 | 0 % |",
        "|  | transactions/s ↑ | 20,000 | 10,000 | 2.00 | 0 % |",
    ]
    assert bench_report.cases(results, "udp") == "Not measured."
    rows = bench_report.targets(results).splitlines()
    assert "|  | CPU us ↓ | 11 (10..12) | 44 (40..48) | at most 0.5 × passt | 0.25 | met |" in rows
    assert "| tcp: transactions <1 B> | p50 us ↓ | 50 | 50 | at most 0.8 × passt | 1.00 | **missed** |" in rows
    assert "| memory | PSS MB ↓ | 40 | - | at most 45 | 40 | met |" in [row.replace("rest: ", "") for row in rows]
    assert rows[0] == f"Of {len(TARGETS)} targets: 2 met, 1 missed, {len(TARGETS) - 3} not measured."
    assert len(rows) == 4 + len(TARGETS)
    assert "machine: 2 × P, 2 GiB of memory" in bench_report.about(results)
    assert "congestion control: reno" in bench_report.about(results)


def test_how_far_from_the_limits() -> None:
    """Rates, latencies and processor time, where there is a limit."""
    results = made()
    results.add("rr-together", "ideal", {"CPU us": 5.5, "transactions/s": 40_000.0})
    results.add("rr-together", "none", {"p50 us": 10.0})
    assert bench_report.limits(results).splitlines()[2:] == [
        "| tcp: transactions <1 B> | transactions/s | 20,000 | 40,000, 1 of 5 | 50 % | - |  |",
        "|  | p50 us | 50 | - |  | 10, 1 of 5 | 500 % |",
        "|  | CPU us | 11 (10..12) | 5.5, 1 of 5 | 200 % | - |  |",
    ]


def test_the_chart() -> None:
    """A bar that is longer to the right is better; what it says is there in words, too."""
    chart = ElementTree.fromstring(svg(made()))
    texts = [each.text for each in chart.iter(f"{SVG}text")]
    assert texts[2 + 8 :] == [  # behind the headings and the scale
        "tcp: transactions <1 B>: p50 us",
        "1.00 × ✗ missed",
        "tcp: transactions <1 B>: CPU us",
        "0.25 × ✓ met",
    ]
    bars = [each for each in chart.iter(f"{SVG}rect") if each.get("height") != chart.get("height")]
    assert [each.get("class") for each in bars] == ["missed", "met"]
    widths = [float(each.get("width", "")) for each in bars]
    (ticks,) = [
        [float(each.get("x1", "")) for each in chart.iter(f"{SVG}line") if each.get("class") in ("grid", "one")]
    ]
    assert float(bars[1].get("x", "")) == ticks[2]  # begins at 1
    assert float(bars[1].get("x", "")) + widths[1] == pytest.approx(ticks[4], abs=0.2)  # and ends at 4: a quarter
    summary = chart.find(f"{SVG}desc")
    assert summary is not None
    assert "CPU us: 0.25 times passt's, target at most 0.5, met" in (summary.text or "")
