# SPDX-License-Identifier: GPL-2.0-or-later
"""``godwit serve``: the daemon."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from godwit.daemon.errors import OptionError
from godwit.daemon.options import Dialect, parse


def start(argv: Sequence[str] | None, dialect: Dialect) -> int:
    """Read the options in a dialect and run the daemon; returns the exit status."""
    try:
        options = parse(sys.argv[1:] if argv is None else argv, dialect)
    except OptionError as error:
        print(f"{dialect.value}: {error}", file=sys.stderr)
        return 1 if dialect is Dialect.PASST else 2  # 1 is passt's own status for it
    # Only now: --help and a wrong option need none of it.
    from godwit.daemon.main import run

    return run(options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return start(argv, Dialect.GODWIT)
