# SPDX-License-Identifier: GPL-2.0-or-later
"""An input once more, on the fuzzer's build: ``python -m tests.fuzz.again TARGET INPUT...``."""

from __future__ import annotations

import subprocess
import sys

from .campaign import ROOT, command, environment

if __name__ == "__main__":
    sys.exit(subprocess.run(command(*sys.argv[1:]), cwd=ROOT, env=environment(), check=False).returncode)
