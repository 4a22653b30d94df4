# SPDX-License-Identifier: GPL-2.0-or-later
"""What a QEMU guest boots: a Debian kernel, busybox, and the traffic agent.

Built from packages of this system's own release, once, and kept in the cache::

    image = build()          # image.kernel, image.initrd: paths

The initramfs holds busybox, the modules of a virtio network card and of the power
button, the scripts and the agent of ``guest_agent/``; there is no disk. By hand:
``python -m godwit.lab.image`` builds it and prints the two paths.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import os
import re
import shutil
import stat
import sys
import tempfile
from dataclasses import dataclass

from godwit.lab import debian
from godwit.lab.errors import LabError, UnavailableError

_SOURCES = os.path.join(os.path.dirname(__file__), "guest_agent")
# The last two are the power button, for a shutdown that is asked for from outside.
_MODULES = ("virtio_pci", "virtio_net", "button", "evdev")
_FORMAT = 2  # counts changes of what this module builds from the same parts


@dataclass(frozen=True)
class Image:
    """Paths of the kernel and the initramfs."""

    kernel: str
    initrd: str


def build(*, refresh: bool = False) -> Image:
    """Return the image, built first if the cache has none of these sources.

    Raises :class:`UnavailableError` where a part cannot be had.
    """
    digest = hashlib.sha256(str(_FORMAT).encode())
    for name in sorted(os.listdir(_SOURCES)):
        with open(os.path.join(_SOURCES, name), "rb") as file:
            digest.update(file.read())
    cache = debian.cache_dir()
    folder = os.path.join(cache, f"guest-{digest.hexdigest()[:12]}")
    image = Image(os.path.join(folder, "vmlinuz"), os.path.join(folder, "initrd.gz"))
    if refresh or not os.path.exists(image.initrd):
        with debian.cache_lock("guest"):
            if refresh or not os.path.exists(image.initrd):
                _build_into(folder, _parts(refresh))
    return image


# --- the parts, from packages -----------------------------------------------


def _parts(refresh: bool) -> str:
    """Return the folder with the unpacked kernel and busybox, fetched first if it is not there."""
    folder = os.path.join(debian.cache_dir(), "guest-parts")
    about = os.path.join(folder, "about.json")
    if not refresh and os.path.exists(about):
        return folder
    work = tempfile.mkdtemp(prefix="guest-parts.", dir=debian.cache_dir())
    try:
        new = os.path.join(work, "new")
        package = _kernel_package()
        try:
            debian.system_download([package, "busybox-static"], new)
        except UnavailableError:
            raise
        except LabError as error:
            raise UnavailableError(
                f"the parts of the guest image could not be fetched (`make vm-tools` does it): {error}"
            ) from error
        with open(os.path.join(new, "about.json"), "w") as file:
            json.dump({"kernel": package}, file)
        debian.replace_tree(new, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _kernel_package() -> str:
    """Return the name of the package that the meta package of the cloud kernel stands for."""
    architecture = debian.run(["dpkg", "--print-architecture"]).strip()
    meta = f"linux-image-cloud-{architecture}"
    for refreshed in (False, True):
        shown = debian.run(["apt-cache", "depends", "--important", meta]) if _known(meta) else ""
        for line in shown.splitlines():
            if match := re.search(r"Depends: (linux-image-\d\S*)", line):
                return match[1]
        if not refreshed and os.getuid() == 0:
            debian.run(["apt-get", "-qq", "update"])
    raise UnavailableError(f"apt knows no package {meta}, which the guest's kernel comes from (apt-get update?)")


def _known(package: str) -> bool:
    return bool(debian.run(["apt-cache", "pkgnames", package]).strip())


# --- the initramfs ----------------------------------------------------------


class _Archive:
    """A cpio archive in the "newc" format, as the kernel's documentation of initramfs has it."""

    def __init__(self) -> None:
        self._out = io.BytesIO()
        self._inode = 0

    def add(self, path: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        """Add a member; ``mode`` is with its type, ``device`` the numbers of a device node."""
        self._inode += 1
        name = path.encode() + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        # inode, mode, uid, gid, links, mtime, size, device of the file (2), device number (2), name size, check
        numbers = (self._inode, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(name), 0)
        self._out.write(b"070701" + b"".join(b"%08X" % number for number in numbers))
        self._pad_after(name)
        self._pad_after(data)

    def _pad_after(self, data: bytes) -> None:
        self._out.write(data)
        self._out.write(b"\0" * (-self._out.tell() % 4))

    def close(self) -> bytes:
        """Return the whole archive."""
        self.add("TRAILER!!!", 0)
        return self._out.getvalue()


def _modules(parts: str) -> list[tuple[str, bytes]]:
    """Return name and content of the modules, each after those it depends on."""
    files = {}
    for folder, _, names in os.walk(os.path.join(parts, "lib/modules")):
        for name in names:
            if match := re.fullmatch(r"(.+)\.ko(\.xz)?", name):
                files[match[1].replace("-", "_")] = os.path.join(folder, name)
    if not files:
        raise LabError("the kernel's package has no modules")
    ordered: dict[str, bytes] = {}

    def load(name: str) -> None:
        if name in ordered or name not in files:  # one that is no file is built in
            return
        with open(files[name], "rb") as file:
            data = file.read()
        if files[name].endswith(".xz"):
            data = lzma.decompress(data)
        found = re.search(rb"\0depends=([^\0]*)\0", data)
        for needed in (found[1].decode() if found else "").split(","):
            load(needed.replace("-", "_"))
        ordered[name] = data

    for name in _MODULES:
        load(name)
    return list(ordered.items())


def _build_into(folder: str, parts: str) -> None:
    work = tempfile.mkdtemp(prefix="guest.", dir=debian.cache_dir())
    try:
        new = os.path.join(work, "new")
        os.mkdir(new)
        agent = os.path.join(work, "agent")
        debian.run(
            [os.environ.get("CC", "cc"), "-O2", "-Wall", "-static", "-o", agent, os.path.join(_SOURCES, "agent.c")]
        )
        archive = _Archive()
        for name in ("bin", "dev", "etc", "etc/acpi", "etc/acpi/PWRF", "modules", "proc", "run", "sys", "tmp"):
            archive.add(name, stat.S_IFDIR | 0o755)
        archive.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
        files = {
            "init": os.path.join(_SOURCES, "init.sh"),
            "etc/udhcpc.sh": os.path.join(_SOURCES, "udhcpc.sh"),
            "etc/acpi/PWRF/00000080": os.path.join(_SOURCES, "poweroff.sh"),
            "bin/agent": agent,
            "bin/busybox": _first_existing(parts, "bin/busybox", "usr/bin/busybox"),
        }
        for name, path in files.items():
            with open(path, "rb") as file:
                archive.add(name, stat.S_IFREG | 0o755, file.read())
        modules = _modules(parts)
        for name, data in modules:
            archive.add(f"modules/{name}.ko", stat.S_IFREG | 0o644, data)
        order = "".join(f"{name}.ko\n" for name, _ in modules)
        archive.add("modules/order", stat.S_IFREG | 0o644, order.encode())
        boot = os.path.join(parts, "boot")
        kernels = sorted(name for name in os.listdir(boot) if name.startswith("vmlinuz-"))
        if not kernels:
            raise LabError("the kernel's package has no kernel")
        shutil.copy(os.path.join(boot, kernels[-1]), os.path.join(new, "vmlinuz"))
        # Little to gain from more: unpacking takes the guest longer than reading.
        with open(os.path.join(new, "initrd.gz"), "wb") as out:
            out.write(gzip.compress(archive.close(), 6, mtime=0))
        debian.replace_tree(new, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _first_existing(root: str, *names: str) -> str:
    for name in names:
        path = os.path.join(root, name)
        if os.path.exists(path):
            return path
    raise LabError(f"none of {', '.join(names)} is in the package")


def main() -> int:
    """Build the image, and print where it is."""
    try:
        image = build(refresh="--refresh" in sys.argv[1:])
    except LabError as error:
        sys.stderr.write(f"godwit.lab.image: {error}\n")
        return 1
    sys.stdout.write(f"{image.kernel}\n{image.initrd}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
