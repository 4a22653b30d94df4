# SPDX-License-Identifier: GPL-2.0-or-later
"""Shared by the tests of the laboratory."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable

import pytest

import godwit


def _closed_ancestor(path: str) -> str | None:
    """Return the topmost directory on the way to ``path`` that not all may pass."""
    parts = path.split("/")
    for depth in range(2, len(parts) + 1):
        ancestor = "/".join(parts[:depth])
        if not os.stat(ancestor).st_mode & 0o001:
            return ancestor
    return None


def _run_as_nobody(program: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run ``program`` as uid 65534 with no capabilities.

    In a mount namespace of its own, where the interpreter and this package can
    be reached by everyone, wherever they are installed, and where /dev/net/tun
    is open to all, as most distributions have it.
    """
    needed = {
        os.path.realpath(p) for p in (sys.base_prefix, sys.prefix, os.path.dirname(os.path.dirname(godwit.__file__)))
    }
    quoted = shlex.quote
    with tempfile.TemporaryDirectory() as scratch:
        script = ["set -e", f"mount -t tmpfs -o mode=755 none {scratch}"]
        kept = []
        for number, path in enumerate(sorted(needed)):
            if _closed_ancestor(path) is not None:
                kept.append((path, f"{scratch}/{number}"))
                script.append(f"mkdir {scratch}/{number}")
                script.append(f"mount --rbind {quoted(path)} {scratch}/{number}")
        closed = {a for path, _ in kept if (a := _closed_ancestor(path)) is not None}
        script += [f"mount -t tmpfs -o mode=755 none {quoted(a)}" for a in sorted(closed)]
        for path, place in kept:
            script.append(f"mkdir -p {quoted(path)}")
            script.append(f"mount --rbind {place} {quoted(path)}")
        script += [
            f"mknod -m 666 {scratch}/tun c 10 200",
            f"mount --bind {scratch}/tun /dev/net/tun",
            "cd /",
            "exec setpriv --reuid=65534 --regid=65534 --clear-groups --inh-caps=-all"
            f" {quoted(sys.executable)} -c {quoted(program)}",
        ]
        return subprocess.run(
            ["unshare", "--mount", "sh", "-c", "\n".join(script)],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env={"PATH": os.environ["PATH"]},
        )


@pytest.fixture(scope="session")
def run_as_nobody() -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Run a Python program as a user without any rights: ``run_as_nobody(program)``."""
    return _run_as_nobody
