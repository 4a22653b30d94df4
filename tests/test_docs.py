# SPDX-License-Identifier: GPL-2.0-or-later
"""The documentation agrees with the code: generated parts are current, examples run."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from godwit.daemon.options import TABLE, Dialect, Kind, parse

ROOT = Path(__file__).resolve().parent.parent
TOOL = runpy.run_path(str(ROOT / "tools" / "docs.py"))
EXAMPLE = re.compile(r"<!-- example -->\n```python\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("page", sorted(TOOL["PARTS"]))
def test_generated_parts_are_current(page: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    assert TOOL["renew"](page, text) == text, "run tools/docs.py"


@pytest.mark.parametrize("page", sorted(TOOL["WHOLE"]))
def test_generated_pages_are_current(page: str) -> None:
    assert TOOL["WHOLE"][page]() == (ROOT / "docs" / page).read_text(), "run tools/docs.py"


def test_a_missing_part_is_noticed() -> None:
    with pytest.raises(KeyError, match=r"stream-v2\.md has no part for stages"):
        TOOL["renew"]("stream-v2.md", "")
    with pytest.raises(KeyError, match="nonsense"):
        TOOL["renew"]("stream-v2.md", "<!-- generated: nonsense -->\n<!-- end -->")


def test_examples_run() -> None:
    """The assertions in the example are its test."""
    examples = EXAMPLE.findall((ROOT / "docs" / "migration.md").read_text())
    assert len(examples) == 1
    names: dict[str, object] = {"__name__": "example"}
    exec(compile(examples[0], "docs/migration.md", "exec"), names)
    assert "arriving" in names


def test_the_readmes_command_lines_are_understood() -> None:
    text = (ROOT / "README.md").read_text().replace("\\\n", " ").replace('"$godwit"', "godwit")
    lines = re.findall(r"^ {4}.*\bgodwit serve (.*)$", text, re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        options = parse(shlex.split(line), Dialect.GODWIT)
        assert options.vhost_user or options.takeover
    specs = re.findall(r"^ {4}-t (\S+) ", text, re.MULTILINE)
    assert len(specs) == 4
    for spec in specs:
        assert parse(["--socket", "/tmp/vm.sock", "-t", spec], Dialect.GODWIT).tcp_ports


def test_the_page_of_options_agrees_with_the_parser() -> None:
    """Each row of the parser's table has one on the page, passt's or our own, with the same names and the same fate."""
    ours_and_passts = (ROOT / "docs" / "passt-options.md").read_text().partition("## Options that passt does not have")
    passts, ours = (
        {
            tuple(re.findall(r"`([^`]+)`", cells[0])): cells[1:]
            for line in part.splitlines()
            if line.startswith("| `") and (cells := [cell.strip() for cell in line.strip("|").split(" | ")])
        }
        for part in ours_and_passts[::2]
    )
    printing = {("-h", "--help"), ("--version",), ("--print-capabilities",)}  # these end the process in argparse
    assert {frozenset(row.names) for row in TABLE} | set(map(frozenset, printing)) == {
        frozenset(names) for names in (*passts, *ours)
    }
    assert len(passts) + len(ours) == len(TABLE) + len(printing)
    kinds = {frozenset(row.names): row.kind for row in TABLE}
    for names, (verdict, note) in passts.items():
        assert verdict in ("same", "different", "not applicable"), names
        kind = kinds.get(frozenset(names))
        assert (kind is Kind.PASTA) == (verdict == "not applicable"), names
        assert (kind is Kind.NOTHING) == note.startswith("without effect"), names
        assert (kind is Kind.REFUSED) == note.startswith("refused"), names
        assert note or verdict == "same", names


def test_the_vhost_user_examples_talk_to_each_other(tmp_path: Path) -> None:
    """The back-end's as a program, as a reader would run it; the second time over the socket that the first left."""
    path = str(tmp_path / "example.sock")
    text = (ROOT / "docs" / "vhost-user.md").read_text().replace("/tmp/example.sock", path)
    back_end, front_end = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "example.py").write_text(back_end)
    for _ in range(2):
        with subprocess.Popen([sys.executable, tmp_path / "example.py"], stderr=subprocess.PIPE, text=True) as process:
            names: dict[str, object] = {"__name__": "example"}
            end = time.monotonic() + 30
            while True:
                try:
                    exec(compile(front_end, "docs/vhost-user.md", "exec"), names)
                    break
                except (FileNotFoundError, ConnectionRefusedError):
                    assert time.monotonic() < end
                    time.sleep(0.05)  # not there yet, or the first one's
            _, said = process.communicate(timeout=30)
        assert (process.returncode, said) == (0, "")
        assert "backend" in names


def test_error_table_is_complete() -> None:
    from godwit.migration import errors

    kinds = {name for name, value in vars(errors).items() if isinstance(value, type) and name.endswith("Error")}
    page = (ROOT / "docs" / "migration.md").read_text()
    assert {name for name in kinds - {"MigrationError"} if f"`{name}`" not in page} == set()
