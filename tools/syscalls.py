# SPDX-License-Identifier: GPL-2.0-or-later
"""Compare the daemon's list of system calls with what it does: ``make syscalls``.

Runs tests, and has every daemon in them traced (strace(1)) from when it has given up all else. Says which calls are not
in `godwit.daemon.syscalls`, and which are there as OBSERVED and were not made. Arguments are those of pytest.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from godwit.confine import _kernel
from godwit.daemon import syscalls
from godwit.lab.say import say

ROOT = Path(__file__).resolve().parent.parent
LOCKED = "seccomp(SECCOMP_SET_MODE_FILTER"
LINE = re.compile(r"^(\d+) +(?:<\.\.\. )?(\w+)(?: resumed>|\()(.*)$")
# The first argument of interest, as strace shows it, of calls that are allowed under a condition.
SHOWN = {"socket": r"(\w+)", "socketpair": r"(\w+)", "ioctl": r"\d+(?:<[^>]*>)?, (\w+)", "clone": r".*?flags=([\w|]+)"}
EXECUTABLE = "PROT_EXEC"
CHECKED = ("mmap", "mprotect")


def look(folder: Path) -> tuple[Counter[str], Counter[str]]:
    """What was called, how often; and the arguments that the filter looks at."""
    calls: Counter[str] = Counter()
    arguments: Counter[str] = Counter()
    for path in folder.iterdir():
        locked = False
        others: set[str] = set()  # who was there before: the process that launched it, which waits
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                found = LINE.match(line)
                if found is None:
                    continue
                pid, name, rest = found.groups()
                if LOCKED in line:
                    locked = True
                    others.discard(pid)
                elif not locked:
                    others.add(pid)
                elif pid not in others:
                    calls[name] += 1
                    if name in CHECKED and EXECUTABLE in rest:
                        arguments[f"{name} {EXECUTABLE}"] += 1
                    if name in SHOWN and (shown := re.match(SHOWN[name], rest)):
                        arguments[f"{name} {shown[1]}"] += 1
    return calls, arguments


IOCTLS = {"FIONREAD", "TIOCOUTQ", "SIOCOUTQNSD", "SIOCGIFINDEX", "FIONBIO", "FIOCLEX", "TCGETS"}
FAMILIES = {"AF_UNIX", "AF_INET", "AF_INET6", "AF_NETLINK"}


def _is_allowed(call: str, argument: str) -> bool:
    """Whether an argument is one that the filter lets through."""
    if call in CHECKED:
        return argument != EXECUTABLE
    if call == "clone":
        return "CLONE_NEW" not in argument
    return argument in (IOCTLS if call == "ioctl" else FAMILIES)


def main(words: list[str]) -> int:
    """Run the tests, and compare; returns the exit status."""
    with tempfile.TemporaryDirectory(prefix="godwit-calls-", dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o777)
        env = dict(os.environ, GODWIT_TRACE_CALLS=name, PYTHONPATH=str(ROOT / "tools" / "tracing"))
        status = subprocess.run([sys.executable, "-m", "pytest", *words], cwd=ROOT, env=env, check=False).returncode
        daemons = len(list(folder.iterdir()))
        calls, arguments = look(folder)
    if not calls:
        say(f"no daemon was traced to where its calls are filtered ({daemons} were started)")
        return 1
    # And the one with which a process ends itself: `godwit.confine.seccomp.program` adds it.
    allowed = {*syscalls.PLAIN, *syscalls.MISSING, *(call.name for call in syscalls.CONDITIONAL), "tgkill"}
    say(f"{daemons} daemons, {sum(calls.values())} system calls, {len(calls)} different ones; pytest: status {status}")
    for what, counts in (("call", calls), ("argument", arguments)):
        say(f"by {what}: " + ", ".join(f"{name} {count}" for name, count in counts.most_common()))
    beyond = sorted(set(calls) - allowed)
    beyond += sorted(name for name in arguments if not _is_allowed(*name.split()))
    unseen = sorted(set(syscalls.OBSERVED) - set(calls))
    unknown = sorted({*syscalls.OBSERVED, *(call.name for call in syscalls.CONDITIONAL)} - set(_kernel.calls()))
    say(f"not in the list: {', '.join(beyond) or 'none'}")
    say(f"in the list as observed, and not seen: {', '.join(unseen) or 'none'}")
    if unknown:
        say(f"no system calls here: {', '.join(unknown)}")
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
