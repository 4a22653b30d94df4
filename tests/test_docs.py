# SPDX-License-Identifier: GPL-2.0-or-later
"""The documentation agrees with the code: generated parts are current, examples run."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOL = runpy.run_path(str(ROOT / "tools" / "docs.py"))
EXAMPLE = re.compile(r"<!-- example -->\n```python\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("page", sorted(TOOL["PARTS"]))
def test_generated_parts_are_current(page: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    assert TOOL["renew"](page, text) == text, "run tools/docs.py"


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


def test_error_table_is_complete() -> None:
    from godwit.migration import errors

    kinds = {name for name, value in vars(errors).items() if isinstance(value, type) and name.endswith("Error")}
    page = (ROOT / "docs" / "migration.md").read_text()
    assert {name for name in kinds - {"MigrationError"} if f"`{name}`" not in page} == set()
