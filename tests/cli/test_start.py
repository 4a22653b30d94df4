# SPDX-License-Identifier: GPL-2.0-or-later
"""What a start of the daemon loads: whoever starts a guest waits for it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

# What nothing needs that a daemon does when it starts in the foreground, and what brings much along: TLS and its
# library (`_ssl`: an import of `ssl` that fails is told, too), what syslog's handler needs, what argparse looks at a
# terminal with, and readers of formats.
NEEDLESS = {"_hashlib", "_ssl", "email", "hashlib", "hmac", "http", "importlib.metadata", "json", "logging.handlers"}
NEEDLESS |= {"pickle", "random", "secrets", "shutil", "socketserver", "tempfile", "unittest", "urllib", "uuid", "xml"}


def imported(command: str, *arguments: str) -> list[str]:
    """The modules that a command has imported when it says that it is ready, in order."""
    with subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", command, *arguments], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if " is ready on " in line:
                break
        else:
            pytest.fail("".join(line for line in said if not line.startswith("import time:")))
        process.terminate()
    return re.findall(r"^import time: .*\| +(\S+)$", "".join(said), re.MULTILINE)


@pytest.mark.parametrize(
    ("command", "arguments"), [("godwit.cli.main", ("serve",)), ("godwit.cli.passt", ("--vhost-user",))]
)
def test_a_start_loads_nothing_that_it_does_not_need(command: str, arguments: tuple[str, ...], tmp_path: Path) -> None:
    # What the interpreter's own start loads is not ours to choose: an environment may have hooks.
    bare = subprocess.run(
        [sys.executable, "-c", "import sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout.split()
    names = imported(command, *arguments, "-f", "-s", str(tmp_path / "s"))
    assert "godwit.daemon.device" in names
    assert "asyncio" in names
    assert sorted(NEEDLESS.intersection(names).difference(bare)) == []
