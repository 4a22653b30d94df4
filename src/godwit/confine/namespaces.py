# SPDX-License-Identifier: GPL-2.0-or-later
"""Namespaces (namespaces(7)): of the file system nothing is left but a few directories, IPC and host name are its own.

The new root is an empty tmpfs, read-only in the end, with these directories at their old paths. The old root goes away
with all that is mounted in it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping
from typing import Final

from godwit.confine import _kernel
from godwit.confine.capabilities import CAP_SYS_ADMIN, has

_NEW_NS: Final = 0x00020000
_NEW_UTS: Final = 0x04000000
_NEW_IPC: Final = 0x08000000
_NEW_USER: Final = 0x10000000

_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_PRIVATE = 2, 4, 8, 0x4000, 1 << 18
_READ_ONLY, _NO_SUID, _NO_DEV, _NO_EXEC = 1, 2, 4, 8  # MOUNT_ATTR_*
_MNT_DETACH: Final = 2
# Where the new root is mounted first; any directory does.
_SOMEWHERE: Final = ("/tmp", "/run", "/usr")
#: What users look like that a user namespace does not have; the kernel's default.
OVERFLOW: Final = 65534

#: This process is in a user namespace of its own.
in_user_namespace = False
_SIZE: Final = b"size=64k,nr_inodes=1k,mode=755"


def enter() -> None:
    """Go into new mount, IPC and UTS namespaces; without the privilege that takes, into a new user namespace first.

    That one has this user and this group and no other: all others look like the overflow user
    (/proc/sys/kernel/overflowuid). The process has all capabilities there, which are none elsewhere. OSError where the
    system does not allow it, or for the overflow user; nothing has changed then.
    """
    global in_user_namespace
    flags = _NEW_NS | _NEW_IPC | _NEW_UTS
    uid_map = gid_map = b""
    if not has(CAP_SYS_ADMIN):
        if os.geteuid() == OVERFLOW:
            raise OSError(errno.EUSERS, f"in a user namespace user {OVERFLOW} could not be told from all others")
        flags |= _NEW_USER
        uid_map, gid_map = (b"%d %d 1" % (own, own) for own in (os.geteuid(), os.getegid()))
    # Some systems let a process in and then have it do nothing there, not even be its own user (AppArmor, in Ubuntu).
    _kernel.try_namespaces(flags, uid_map, gid_map, os.fsencode(_somewhere()))
    _kernel.unshare(flags)
    if not uid_map:
        return
    in_user_namespace = True
    for name, text in (("setgroups", b"deny"), ("uid_map", uid_map), ("gid_map", gid_map)):
        fd = os.open(f"/proc/self/{name}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text)
        finally:
            os.close(fd)


def leave_root(directories: Mapping[str, bool], links: Iterable[tuple[str, str]] = ()) -> None:
    """Leave the file system but for some directories; True for those that may be written to.

    ``links``: symbolic links, path and target, for paths that lead into these directories by one. What does not exist
    is passed over. After `enter`. OSError where the system does not allow it.
    """
    _kernel.mount(b"none", b"/", b"", _MS_REC | _MS_PRIVATE)
    kept = [path for path in _outermost(directories) if os.path.isdir(path)]
    if "/" in kept:
        raise OSError(errno.EBUSY, "a socket or a file of it lies in /: give it a directory of its own")
    trees: dict[str, int] = {}
    try:
        for path in kept:
            trees[path] = tree = _kernel.open_tree(os.fsencode(path))
            writable = any(may and _is_below(one, path) for one, may in directories.items())
            _kernel.set_mount_attributes(
                tree, _NO_SUID | _NO_DEV | _NO_EXEC | (0 if writable else _READ_ONLY), recursive=True
            )
        root = _somewhere()
        _kernel.mount(b"none", os.fsencode(root), b"tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, _SIZE)
        os.chdir(root)
        try:
            _furnish(trees, links)
            _kernel.pivot_root(b".", b".")
        except OSError:
            os.chdir("/")
            _kernel.umount(os.fsencode(root), _MNT_DETACH)
            raise
    finally:
        for tree in trees.values():
            os.close(tree)
    _kernel.umount(b".", _MNT_DETACH)
    os.chdir("/")
    fd = os.open("/", os.O_PATH | os.O_CLOEXEC)
    try:
        _kernel.set_mount_attributes(fd, _READ_ONLY, recursive=False)
    finally:
        os.close(fd)


def _somewhere() -> str:
    return next(path for path in _SOMEWHERE if os.path.isdir(path))


def _furnish(trees: Mapping[str, int], links: Iterable[tuple[str, str]]) -> None:
    """Attach these at their paths, below the current directory."""
    for path, tree in trees.items():
        os.makedirs(path[1:], exist_ok=True)
        _kernel.move_mount(tree, os.fsencode(path[1:]))
    for path, target in links:
        if not os.path.lexists(path[1:]):
            os.makedirs(os.path.dirname(path[1:]), exist_ok=True)
            os.symlink(target, path[1:])


def _outermost(directories: Iterable[str]) -> list[str]:
    """Of these, the ones that are not below another. Their paths have no symbolic links."""
    found: list[str] = []
    for path in sorted(directories):
        if not any(_is_below(path, one) for one in found):
            found.append(path)
    return found


def _is_below(path: str, other: str) -> bool:
    return path == other or path.startswith(other.rstrip("/") + "/")
