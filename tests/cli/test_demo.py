# SPDX-License-Identifier: GPL-2.0-or-later
"""``godwit demo``: what it shows, and its exit status."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from godwit.cli import demo
from godwit.lab.errors import LabError, UnavailableError
from godwit.lab.scenario import Move, Outcome


def test_there_and_back() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "godwit.cli.main", "demo", "--idle", "20", "--rate", "20000000"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(
        "A guest moves from host a to host b and back, with a download, an upload and 20 idle connections open."
    )
    assert "2 migrations, nothing lost." in done.stdout
    for words in ("a to b", "b to a", "download", "upload", "idle (20)", "CRC-32 received"):
        assert words in done.stdout
    assert done.stderr == ""


class FakeLoad:
    outcome = Outcome("download", 10, 1, 10, 1, "")

    def progress(self) -> dict[str, Any]:
        return {}

    def check_idle(self) -> str:
        return ""

    def finish(self) -> list[Outcome]:
        return [self.outcome]


class FakeScenario:
    """A scenario in which nothing runs."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def __enter__(self) -> FakeScenario:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def start_load(self, **options: Any) -> FakeLoad:
        return FakeLoad()

    def move(self, **options: Any) -> Move:
        return Move("a", "b", 0.01, 100, {"download": 0.1})


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[FakeScenario]], None]:
    def fake(scenario: type[FakeScenario]) -> None:
        monkeypatch.setattr(demo, "Scenario", scenario)
        monkeypatch.setattr("time.sleep", lambda seconds: None)

    return fake


def test_status_tells_of_a_loss(
    faked: Callable[[type[FakeScenario]], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    faked(FakeScenario)
    assert demo.main([]) == 0
    assert "nothing lost" in capsys.readouterr().out
    monkeypatch.setattr(FakeLoad, "outcome", Outcome("download", 10, 1, 9, 2, "the ends differ"))
    assert demo.main([]) == 1
    shown = capsys.readouterr().out
    assert "Something was lost" in shown
    assert "the ends differ" in shown


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (LabError("the moon fell down"), 1, "godwit demo: the moon fell down"),
        (UnavailableError("no tun"), 2, "godwit demo: cannot run here: no tun"),
        (KeyboardInterrupt(), 130, "godwit demo: interrupted"),
    ],
)
def test_status_of_failures(
    faked: Callable[[type[FakeScenario]], None],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    message: str,
) -> None:
    class Failing(FakeScenario):
        def move(self, **options: Any) -> Move:
            raise error

    faked(Failing)
    assert demo.main([]) == status
    assert capsys.readouterr().err.strip() == message


def test_no_tun_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "missing_tun", lambda: "/dev/net/tun is not open to this user")
    assert demo.main([]) == 2
    assert "cannot run here: /dev/net/tun is not open" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--rounds", "0"], ["--idle", "0"], ["--rate=-1"], ["--delay=-1"]])
def test_impossible_numbers(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        demo.main(words)
    assert caught.value.code == 2
    assert "at least" in capsys.readouterr().err
