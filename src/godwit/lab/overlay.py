# SPDX-License-Identifier: GPL-2.0-or-later
"""A newer QEMU, and libvirt: programs of another Debian suite, with nothing installed.

The packages, and all that they depend on, are unpacked into the cache. What is
started through :meth:`Overlay.command` runs in a mount namespace of its own, in
which their files lie over this system's ``/usr``. It sees a machine on which
they are installed, down to the C library; everything else (files, sockets,
devices, other programs with their own libraries) is this machine's::

    newer = fetch()
    subprocess.run(newer.command("qemu-system-x86_64", "--version"))
    subprocess.run(newer.command("virsh", "--version", user=True))

Root can, and so can an ordinary user in a user namespace of his own, where
overlay file systems may be mounted since Linux 5.11. By hand:
``python -m godwit.lab.overlay`` prints the versions, and fetches first where the
cache is empty; ``--refresh`` fetches anew.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from godwit.lab import debian, netns
from godwit.lab.errors import LabError

SUITE = "sid"
QEMU = "qemu-system-x86"
LIBVIRT = "libvirt-daemon"
PACKAGES = (QEMU, LIBVIRT, "libvirt-daemon-driver-qemu", "libvirt-clients")
# The first with -netdev passt, and the first that has passt serve <interface type='vhostuser'>.
_MINIMUM = {QEMU: (10, 1), LIBVIRT: (11, 1)}

# Whom an ordinary user's programs run as: known to every Debian, and not the one who cannot be told from nobody.
USER = "daemon"

# $1: the packages' files, $2: a folder to lay over /etc, or empty, $3: the user, or empty for whoever calls; then
# the command. The last is a user namespace of one user, which takes what is left of root's capabilities away but
# lets the command read what the lab may read, its Python above all, wherever that is.
_START = """\
mount -t overlay overlay -o "lowerdir=$1/usr:/usr" /usr || exit
[ -z "$2" ] || mount -t overlay overlay -o "lowerdir=$2:/etc" /etc || exit
user=$3
shift 3
[ -z "$user" ] || set -- unshare --user --map-user="$user" --map-group="$user" -- "$@"
exec "$@"
"""


@dataclass(frozen=True)
class Overlay:
    """Unpacked packages. ``root`` has their files, ``versions`` the packages' versions."""

    root: str
    versions: dict[str, str]

    def command(self, *args: str, user: bool = False, etc: str = "") -> list[str]:
        """Return the words that run a command among the newer programs; its process is the one that is started.

        With ``user`` it runs as an ordinary user, :data:`USER`, without any
        capability; the user's files are those of whoever calls. ``etc`` is a
        folder whose files it finds in ``/etc``.
        """
        where = ["unshare", "--mount", "--propagation", "private", "--"]
        return [*where, "sh", "-c", _START, "sh", self.root, etc, USER if user else "", *args]


def _version(package: str) -> tuple[int, ...]:
    """Return the upstream part of a Debian package's version, its first two numbers."""
    match = re.match(r"(?:\d+:)?(\d+)\.(\d+)", package)
    return tuple(map(int, match.groups())) if match else ()


def _check(found: debian.Unpacked) -> None:
    for package, minimum in _MINIMUM.items():
        if _version(found.versions[package]) < minimum:
            raise LabError(f"{package} is only {found.versions[package]} in {SUITE}")
    if netns.missing() is not None:
        return  # fetched by an ordinary user, to be run in a user namespace
    overlay = Overlay(found.root, found.versions)
    debian.run(overlay.command("qemu-system-x86_64", "--version"))
    debian.run(overlay.command("virsh", "--version", user=True))


def fetch(*, refresh: bool = False) -> Overlay:
    """Return the programs in the cache, fetched first if there are none or ``refresh`` asks for it.

    Raises :class:`UnavailableError` where they cannot be had (no Debian, no
    network), or cannot be run (no overlay file system, not root).
    """

    def closure(apt: debian.Apt) -> Sequence[str]:
        return apt.closure(PACKAGES)

    found = debian.unpacked("overlay", SUITE, PACKAGES, more=closure, check=_check, refresh=refresh)
    return Overlay(os.path.abspath(found.root), found.versions)


def main() -> int:
    """Fetch, and print the versions."""
    try:
        overlay = fetch(refresh="--refresh" in sys.argv[1:])
    except LabError as error:
        sys.stderr.write(f"godwit.lab.overlay: {error}\n")
        return 1
    for package, version in overlay.versions.items():
        sys.stdout.write(f"{package} {version}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
