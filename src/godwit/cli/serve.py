# SPDX-License-Identifier: GPL-2.0-or-later
"""``godwit serve``: the daemon.

It is started once for each guest, and whoever starts the guest waits for it. So its modules are imported in
here, and nothing looks for garbage among what they make: it stays.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence


def start(argv: Sequence[str] | None, command: str) -> int:
    """Read the options in the dialect of ``command`` and run the daemon; returns the exit status."""
    gc.disable()
    try:
        # asyncio does without: the daemon speaks no TLS, and OpenSSL takes 9 ms of its start and 4 of its 17 MB.
        sys.modules.setdefault("ssl", None)  # type: ignore[arg-type]  # None: the import fails
        from godwit.daemon.errors import OptionError
        from godwit.daemon.options import Dialect, parse

        dialect = Dialect(command)
        try:
            options = parse(sys.argv[1:] if argv is None else argv, dialect)
        except OptionError as error:
            print(f"{dialect.value}: {error}", file=sys.stderr)
            return 1 if dialect is Dialect.PASST else 2  # 1 is passt's own status for it
        # Only now: --help and a wrong option need none of it.
        from godwit.daemon.main import run

        gc.freeze()  # nor later: a look through all of it takes some ten milliseconds, perhaps of a guest's that moves
    finally:
        gc.enable()
    return run(options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return start(argv, "godwit serve")
