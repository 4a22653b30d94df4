# SPDX-License-Identifier: GPL-2.0-or-later
"""``godwit-passt``: the daemon with passt's command line as it stands.

For libvirt, QEMU and KubeVirt, which look for a program ``passt``: a symbolic
link with that name to this command is enough. Where defaults differ from
``godwit serve`` is in `godwit.daemon.options.Dialect`'s uses.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from godwit.cli.serve import start


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return start(argv, "godwit-passt")


if __name__ == "__main__":
    sys.exit(main())
