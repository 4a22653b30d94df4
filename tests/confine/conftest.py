# SPDX-License-Identifier: GPL-2.0-or-later
"""What is given up is given up for good: all of it happens in processes of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from textwrap import dedent

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run() -> Run:
    """Run Python text in a process of its own, with a prefix to the command line if need be."""

    def run(text: str, *prefix: str) -> subprocess.CompletedProcess[str]:
        command = [*prefix, sys.executable, "-c", dedent(text)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    return run
