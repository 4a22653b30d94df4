# SPDX-License-Identifier: GPL-2.0-or-later
"""What the tests with virtual machines need: QEMU, a guest image, passt, and libvirt.

``python -m godwit.lab.setup_vm`` (``make vm-tools``) sees that all are there.
passt, and libvirt with the QEMU that belongs to it, are fetched into the cache
(`peer`, `overlay`) and not installed. Where the system's QEMU is missing or too
old, root on Debian gets it installed: from the release itself if that has it new
enough, else from its backports, whose suite is added to apt's sources with the
URI that the system uses already.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

from godwit.lab import debian, image, overlay, peer, qemu
from godwit.lab.errors import LabError, UnavailableError

PACKAGE = "qemu-system-x86"
_BACKPORTS = "/etc/apt/sources.list.d/godwit-backports.sources"


def _say(text: str) -> None:
    sys.stderr.write(f"vm-tools: {text}\n")


def _install(*arguments: str) -> None:
    _say(f"apt-get install {' '.join(arguments)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    debian.run(
        ["apt-get", "-qq", "-y", *debian.RETRIES, "--no-install-recommends", "install", *arguments], env=environment
    )


def _candidate(*arguments: str) -> tuple[int, ...]:
    """Return the version of QEMU that apt would install, () for none."""
    shown = subprocess.run(
        ["apt-get", "-s", "--no-install-recommends", "install", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "LC_ALL": "C"},
        check=False,
    ).stdout
    match = re.search(rf"^Inst {PACKAGE} (?:\[\S+\] )?\((?:\d+:)?(\d+)\.(\d+)", shown, re.MULTILINE)
    return tuple(map(int, match.groups())) if match else ()


def install_qemu() -> None:
    """Install QEMU, new enough; :class:`UnavailableError` where that cannot be done."""
    if os.getuid() != 0:
        raise UnavailableError(f"{PACKAGE} {'.'.join(map(str, qemu.MINIMUM))} or later has to be installed, by root")
    source = debian.archive("")
    debian.run(["apt-get", "-qq", *debian.RETRIES, "update"])
    if _candidate(PACKAGE) >= qemu.MINIMUM:
        _install(PACKAGE)
        return
    suite = f"{debian.release().get('VERSION_CODENAME', '')}-backports"
    known = any(suite in found.suites for found in debian.configured_sources())
    if not known:
        _say(f"adding the suite {suite} in {_BACKPORTS}")
        with open(_BACKPORTS, "w") as file:
            file.write("# Written by godwit's `make vm-tools`, for a newer QEMU.\n")
            file.write(debian.Source(source.uri, (suite,), ("main",), source.options).stanza())
        debian.run(["apt-get", "-qq", *debian.RETRIES, "update"])
    found = _candidate("-t", suite, PACKAGE)
    if found < qemu.MINIMUM:
        raise UnavailableError(f"{suite} has no {PACKAGE} from {'.'.join(map(str, qemu.MINIMUM))} on, but {found}")
    _install("-t", suite, PACKAGE)


def main() -> int:
    """Install and fetch what is missing."""
    try:
        try:
            qemu.version()
        except UnavailableError as error:
            _say(str(error).partition(":")[0])
            install_qemu()
            qemu.version()
        image.build()
        peer.fetch()
        overlay.fetch()
    except LabError as error:
        _say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
