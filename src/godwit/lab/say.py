# SPDX-License-Identifier: GPL-2.0-or-later
"""To whoever has started a program of the laboratory's, and waits for what it says."""

from __future__ import annotations

import sys


def say(text: object) -> None:
    """Print a line at once, into a pipe as well."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
