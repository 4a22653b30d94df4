# SPDX-License-Identifier: GPL-2.0-or-later
"""The ``godwit`` command: finds commands, and loads no more than it needs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from godwit.cli import main as godwit_main
from godwit.cli import passt


def test_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        godwit_main.main(["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for name in godwit_main.COMMANDS:
        assert f"\n  {name} " in printed


def test_a_wrong_command_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        godwit_main.main(["no-such-command"])
    assert caught.value.code == 2
    assert "usage: godwit" in capsys.readouterr().err


def test_without_a_command_they_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        godwit_main.main([])
    assert caught.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    for name in godwit_main.COMMANDS:
        assert f"\n  {name} " in said.err
    assert said.err.endswith("\ngodwit: a command is needed\n")


@pytest.mark.parametrize("command", sorted(godwit_main.COMMANDS))
def test_each_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        godwit_main.main([command, "--help"])
    assert caught.value.code == 0
    assert f"usage: godwit {command}" in capsys.readouterr().out


def test_a_bad_option_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert godwit_main.main(["serve", "--socket", "/tmp/s", "--mtu", "7"]) == 2
    assert capsys.readouterr().err == (
        "godwit serve: argument -m/--mtu: '7' is no MTU: a number from 68 to 65520, or 0 to announce none\n"
    )
    assert passt.main(["--socket", "/tmp/s", "--mtu", "7"]) == 1
    assert capsys.readouterr().err.startswith("godwit-passt: argument -m/--mtu: '7' is no MTU")


def test_the_daemon_loads_nothing_of_the_laboratory() -> None:
    code = """
import sys
from godwit.cli import main, serve
import godwit.daemon.main
print(*sys.modules)
"""
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    ).stdout.split()
    assert "godwit.daemon.device" in loaded
    assert not [name for name in loaded if name.split(".")[0] in ("rich", "scapy", "hypothesis", "pytest")]
    assert not [name for name in loaded if name.startswith("godwit.lab")]
