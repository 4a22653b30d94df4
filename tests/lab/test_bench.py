# SPDX-License-Identifier: GPL-2.0-or-later
"""The bench's parts: back-ends by their command line, and how a run goes through its cases."""

from __future__ import annotations

import re
import shlex
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from godwit.lab.backend import Backend, Kind, Program
from godwit.lab.bench import Bed, Case, run
from godwit.lab.errors import LabError
from godwit.lab.netns import Namespace
from godwit.lab.udp_bench import stream

GODWIT = f"{sysconfig.get_path('scripts')}/godwit serve -f --vhost-user -s {{socket}} -u {{ports}} -m {{mtu}}"


def test_a_back_end_by_its_command_line() -> None:
    """Another godwit, behind the same front-end; a forwarded port shows that its words were filled in."""
    other = Program.parse(f"other={GODWIT}")
    with Bed(1500, [other]) as bed:
        side = bed.sides[other]
        assert stream(side, up=True, size=100, seconds=0.05, rate=1000.0).received > 0
        assert stream(side, up=False, size=100, seconds=0.05, rate=1000.0, forwarded=True).received > 0
        assert side.cpu() > 0
        side.check()
        limits = Path(f"/proc/{side._pid}/limits").read_text()
        assert re.search(r"^Max open files +20000 +20000 ", limits, re.MULTILINE)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import sys; sys.exit('the moon is full')", "moody0-host ended with 1: the moon is full"),
        ("pass", "moody0-host ended with 0"),  # as a program does that goes into the background
        ("import time; time.sleep(60)", r"moody0-host to listen at /.*/moody0-host\.sock"),
    ],
)
def test_a_command_line_that_gives_no_back_end(
    program: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("godwit.lab.backend._numbers", iter([0]))
    moody = Program.parse(f"moody={sys.executable} -c {shlex.quote(program)} {{socket}}")
    with Namespace("host") as host, pytest.raises(LabError, match=message):
        Backend(host, str(tmp_path), moody, patience=2.0)


def test_a_run_measures_in_turns_and_shares_beds() -> None:
    """Every second round goes the other way. After a failure all is made anew; a kind that fails on that, too, is left
    out in the end, and the reasons are kept. What has failed at times is made up for."""
    made: list[tuple[int, list[str]]] = []
    measured: list[tuple[str, str]] = []

    @contextmanager
    def bed(mtu: int, kinds: Sequence[Kind]) -> Iterator[SimpleNamespace]:
        made.append((mtu, list(map(str, kinds))))
        if mtu == 9000:
            raise LabError("no such place")
        yield SimpleNamespace(sides={kind: SimpleNamespace(name=str(kind), check=lambda: None) for kind in kinds})

    def case(name: str, mtu: int, without: str = "") -> Case:
        def measure(side: SimpleNamespace, seconds: float) -> dict[str, float]:
            measured.append((name, side.name))
            if (name, side.name) == ("three", "b"):
                raise LabError("out of order")
            if (name, side.name) == ("four", "c") and measured.count((name, "c")) < 3:
                raise LabError("not in the mood")
            return {"m": seconds}

        return Case(name, name, mtu, measure, bed, frozenset(without.split()))

    b = Program("b", ("b",))
    cases = [
        case("none", 9000),
        case("one", 1500),
        case("two", 4000, "c"),
        case("three", 1500, "a"),
        case("four", 3000),
    ]
    kept: list[int] = []
    results = run(
        cases,
        ["a", b, "c"],
        rounds=4,
        seconds=0.5,
        step=lambda text: None,
        keep=lambda results: kept.append(len(results.values)),
    )
    assert made == [
        (9000, ["a", "b", "c"]),
        *[(1500, ["a", "b", "c"])] * 5,
        (4000, ["a", "b"]),
        *[(3000, ["a", "b", "c"])] * 3,
    ]
    assert measured == [
        *(("one", kind) for kind in "abccbaabccba"),
        *(("three", kind) for kind in "bccbbccbb"),  # its first failure may be what "one" has left
        *(("two", kind) for kind in "abbaabba"),
        *(("four", kind) for kind in "abccbaabccbacc"),
    ]
    assert results.values["one"]["m"] == {kind: [0.5] * 4 for kind in "abc"}
    assert results.values["three"]["m"] == {"c": [0.5] * 4}
    assert results.values["four"]["m"] == {kind: [0.5] * 4 for kind in "abc"}
    assert results.failures == [
        "none: no such place",
        *["three, b: out of order"] * 5,
        *["four, c: not in the mood"] * 2,
    ]
    assert kept == [1, 2, 3, 4]
    assert results.about["backends"] == {"b": "b"}
    assert set(results.load) == {"one", "two", "three", "four"}
    assert set(results.titles) == {"none", *results.load}
