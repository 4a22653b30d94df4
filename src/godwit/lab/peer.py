# SPDX-License-Identifier: GPL-2.0-or-later
"""The other program: passt, as Debian packages it today.

Guests move between godwit and passt, and tests show it with the real one. The
release that this system runs mostly has one from before migration, so the
newest package is unpacked into the cache beside the C library that it was
built with, and runs through that library's own loader::

    passt = fetch()
    subprocess.Popen(passt.command("-f", "--vhost-user", "-s", "/tmp/guest.sock"))
    subprocess.Popen(passt.repair_command("/tmp/guest.sock.repair"))

By hand: ``python -m godwit.lab.peer`` prints both command lines, and fetches
first where the cache is empty; ``--refresh`` fetches anew.

passt started by root makes its sockets as root, then changes to ``nobody`` (or
to whom ``--runas`` names, but not back to root): ports below 1024 and files
that only root may write are out of its reach.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
from dataclasses import dataclass

from godwit.lab import debian
from godwit.lab.errors import LabError

SUITE = "sid"
# What passt's packages need besides their own: nothing but the C library.
_LIBRARIES = ("libc6",)


@dataclass(frozen=True)
class Passt:
    """An unpacked passt. ``root`` is where its packages' files lie, ``version`` the package's."""

    root: str
    version: str

    def _loader(self) -> list[str]:
        lib = os.path.join(self.root, "usr/lib", f"{platform.machine()}-linux-gnu")
        loaders = [name for name in os.listdir(lib) if name.startswith("ld-linux")]
        if not loaders:
            raise LabError(f"no dynamic loader in {lib}: remove {self.root} to have it fetched again")
        return [os.path.join(lib, loaders[0]), "--library-path", lib]

    def _binary(self, name: str) -> str:
        return os.path.join(self.root, "usr/bin", name)

    def command(self, *args: str) -> list[str]:
        """Return the words that run ``passt`` with ``args``."""
        # The plain one looks for the better one beside itself, which it cannot find through the loader.
        binary = self._binary("passt.avx2")
        if not (_has_avx2() and os.path.exists(binary)):
            binary = self._binary("passt")
        return [*self._loader(), binary, *args]

    def repair_command(self, *args: str) -> list[str]:
        """Return the words that run ``passt-repair`` with ``args`` (a socket, or a directory)."""
        return [*self._loader(), self._binary("passt-repair"), *args]


def _has_avx2() -> bool:
    with open("/proc/cpuinfo") as file:
        return any(line.startswith("flags") and "avx2" in line.split() for line in file)


def fetch(*, refresh: bool = False) -> Passt:
    """Return the passt in the cache, fetched first if there is none or ``refresh`` asks for it.

    Raises :class:`UnavailableError` where it cannot be had (no Debian, no network).
    """
    return _passt(
        debian.unpacked(
            "passt",
            SUITE,
            ["passt"],
            more=lambda _: _LIBRARIES,
            check=lambda found: debian.run(_passt(found).command("--version")),
            refresh=refresh,
        )
    )


def _passt(found: debian.Unpacked) -> Passt:
    return Passt(found.root, found.versions["passt"])


def main() -> int:
    """Fetch, and print how to run both programs."""
    try:
        passt = fetch(refresh="--refresh" in sys.argv[1:])
    except LabError as error:
        sys.stderr.write(f"godwit.lab.peer: {error}\n")
        return 1
    sys.stdout.write(f"# passt {passt.version}\n{shlex.join(passt.command())}\n{shlex.join(passt.repair_command())}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
