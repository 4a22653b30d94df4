# SPDX-License-Identifier: GPL-2.0-or-later
"""What holds for the whole suite."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

import godwit

# How long an example takes depends on what else the machine does.
settings.register_profile("no deadline", settings(), deadline=None)
settings.load_profile("no deadline")


def pytest_configure() -> None:
    """A run on the sanitized build is one: not on the build that is installed."""
    where = Path(godwit.__file__).resolve()
    if os.environ.get("GODWIT_SANITIZE") == "1" and "sanitize" not in where.parts:
        raise pytest.UsageError(f"GODWIT_SANITIZE is set, but godwit is {where}: run make asan")


def pytest_report_header() -> str:
    """Name the build in the head of the report."""
    return f"godwit: {Path(godwit.__file__).resolve().parent}"
