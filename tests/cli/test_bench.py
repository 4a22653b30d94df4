# SPDX-License-Identifier: GPL-2.0-or-later
"""``godwit bench``: what it measures, how it shows it, and its exit status."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from godwit.cli import bench
from godwit.lab.bench import Results
from godwit.lab.errors import LabError, UnavailableError


def test_a_short_run(tmp_path: Path) -> None:
    """Without passt, which would have to be fetched."""
    words = ["--of", "godwit,ideal,none", "--rounds", "1", "--seconds", "0.1"]
    words += ["--json", str(tmp_path / "values"), "--svg", str(tmp_path / "chart")]
    cases = ["up-1400-paced", "down-1400-paced", "forward-1400-paced", "flood", "latency-64-together"]
    for case in cases:
        words += ["--case", case]
    done = subprocess.run(
        [sys.executable, "-m", "godwit.cli.main", "bench", "udp", *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for text in ("up, 1400 B", "down, 1400 B", "delivered/s", "p50 us", "no back-end"):
        assert text in done.stdout
    assert done.stderr == ""
    results = Results.loads((tmp_path / "values").read_text())
    assert results.rounds == 1
    assert results.about["command"] == shlex.join(["godwit", "bench", "udp", *words])
    assert set(results.values) == set(cases)
    for case in cases[:3]:
        delivered = results.values[case]["delivered/s"]
        assert set(delivered) == {"godwit", "none"} | ({"ideal"} if case != "forward-1400-paced" else set())
        assert all(values[0] > 100 for values in delivered.values()), delivered
        for kind in ("godwit", "none"):
            for count in ("reordered", "damaged"):
                assert results.values[case][count][kind] == [0]
            assert len(results.values[case]["dropped by receiver"][kind]) == 1
        assert results.values[case]["CPU us"]["godwit"][0] > 0
    flood = results.values["flood"]
    for kind, (lost,) in flood["lost of the flood %"].items():
        assert (kind in flood.get("lost of the slow %", {})) == (lost > 0)
    assert (tmp_path / "chart").read_text().startswith("<svg")


def results() -> Results:
    made = Results(["godwit", "passt"], 5, 1.0, titles={"up-1400": "up"})
    for rate in (1000.0, 3000.0, 1500.0, 2500.0, 2000.0):
        made.add("up-1400", "godwit", {"delivered/s": rate, "reordered": 0, "CPU us": 3})
        made.add("up-1400", "passt", {"delivered/s": rate / 2, "reordered": 0, "CPU us": 5})
    return made


def test_medians_and_ratios() -> None:
    made = results()
    summary = made.summary("up-1400", "delivered/s", "godwit")
    assert summary is not None
    assert (summary.median, summary.least, summary.most) == (2000, 1000, 3000)
    assert (summary.lower, summary.upper) == (1500, 2500)
    assert made.ratio("up-1400", "delivered/s") == 2
    assert made.ratio("up-1400", "reordered") is None
    assert made.summary("up-1400", "delivered/s", "none") is None


def test_what_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    made = results()
    monkeypatch.setattr(bench, "run", lambda *args, **options: made)
    assert bench.main(["udp", "--of", "godwit,passt"]) == 0
    shown = capsys.readouterr().out
    assert "2,000 (1,000..3,000)" in shown
    assert "1,000 (500..1,500)" in shown
    assert "2.00" in shown
    assert "delivered/s ↑" in shown
    assert "target missed: up: CPU us is to be at most 0.5 × passt" in shown
    assert "missed: up: delivered/s" not in shown
    made.failures.append("up-1400, passt: nothing arrives")
    assert bench.main(["udp", "--of", "godwit,passt"]) == bench.INCOMPLETE
    assert "failed: up-1400, passt: nothing arrives" in capsys.readouterr().out
    made.values.clear()
    assert bench.main(["udp", "--of", "godwit,passt"]) == 1
    assert "nothing could be measured" in capsys.readouterr().err


def test_files_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there stays until something was measured, and is replaced at once."""
    path, chart = tmp_path / "values", tmp_path / "chart"
    path.write_text("an earlier run")
    before = path.open()  # of the file, whatever its name comes to stand for
    made = results()

    def run(*args: Any, keep: Callable[[Results], None], **options: Any) -> Results:
        there = sorted(tmp_path.iterdir())
        keep(Results(["godwit"], 1, 1.0))
        assert sorted(tmp_path.iterdir()) == there
        assert before.read() == "an earlier run"
        keep(made)
        return made

    monkeypatch.setattr(bench, "run", run)
    assert bench.main(["udp", "--json", str(path), "--svg", str(chart)]) == 0
    assert Results.loads(path.read_text()) == made
    assert chart.read_text().startswith("<svg")
    with before:
        before.seek(0)
        assert before.read() == "an earlier run"
        before.seek(0)
        assert bench.main(["udp", "--json", "/dev/null"]) == 0
    assert Path("/dev/null").is_char_device()
    assert sorted(tmp_path.iterdir()) == [chart, path]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (LabError("the moon fell down"), 1, "godwit bench: the moon fell down"),
        (UnavailableError("no tun"), 2, "godwit bench: cannot run here: no tun"),
        (KeyboardInterrupt(), 130, "godwit bench: interrupted"),
    ],
)
def test_status_of_failures(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    message: str,
) -> None:
    def fail(*args: Any, **options: Any) -> Results:
        raise error

    monkeypatch.setattr(bench, "run", fail)
    assert bench.main(["udp"]) == status
    assert capsys.readouterr().err.strip() == message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["udp", "--rounds", "0"], "--rounds is at least 1"),
        (["udp", "--seconds", "0"], "--seconds more than 0"),
        (["udp", "--case", "sideways"], "no such case: sideways"),
        (["udp", "--of", "godwit,slirp"], "'slirp' is none of godwit, passt, ideal, none"),
        (["--backend", "other=prog {socket} {port}"], "{port} is none of {socket}, {ports}, {mtu}"),
        (["--backend", "other=prog -f"], "the command line of other has no {socket}"),
        (["--backend", "prog {socket}"], "is not NAME=COMMAND LINE"),
        (["--backend", "other= "], "no command line for other"),
        (["--backend", "other='{socket}"], "No closing quotation"),
        (["--backend", "passt=prog {socket}"], "passt is one of the bench's own"),
        (["--backend", "a=one {socket}", "--backend", "a=two {socket}"], "two have the same name"),
        (["udp", "--svg", "/nowhere/chart"], "cannot write /nowhere/chart: No such file or directory"),
        (["rest", "--of", "ideal"], "none of these cases can be measured with ideal"),
        (["move", "--backend", "old=prog {socket}"], "none of these cases can be measured with old"),
        (["icmp"], "no such group: icmp; there are tcp, udp, move, rest, qemu"),
    ],
)
def test_impossible_wishes(words: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.main(words)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--list"]) == 0
    names = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert "up-1400" in names
    assert len(names) == len(set(names))  # no case has another one's name
    assert names == [case.name for cases in bench.GROUPS.values() for case in cases]
