# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m tests.daemon.launch HOW ARGUMENTS``: ``godwit serve`` in circumstances that are not those of the tests.

``user``: as user 107 without capabilities, from the beginning. ``container``: the same where what takes a capability
is refused, as by the seccomp profiles of container engines. ``old``: where there are neither Landlock nor namespaces,
as on an old kernel. ``violation``: it makes a system call that it should not once it is ready. ``overflow``: it writes
one byte more than it has, then.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import os
import struct
import sys
from collections.abc import Callable, Iterable
from unittest import mock

from godwit.cli import serve
from godwit.confine import _kernel, capabilities, seccomp
from godwit.daemon.house import House

UID = 107
OF_CONTAINERS = (
    *("unshare", "setns", "mount", "umount2", "pivot_root", "open_tree", "move_mount", "mount_setattr", "fsopen"),
    *("bpf", "keyctl", "add_key", "ptrace", "perf_event_open", "userfaultfd", "io_uring_setup", "clone3"),
)
OF_OLD_KERNELS = ("landlock_create_ruleset", "open_tree", "mount_setattr", "unshare")
PR_SET_DUMPABLE = 4


def overflow() -> None:
    """Of memory that is not on the stack, and of the kind that the sanitizers see."""
    buffer = ctypes.create_string_buffer(100)
    ctypes.memset(buffer, 0, len(buffer) + 1)


MISDEEDS: dict[str, Callable[[], None]] = {"violation": lambda: os.chroot("/"), "overflow": overflow}


def refuse(names: Iterable[str], number: int) -> None:
    """Have the kernel refuse these with an error number, and allow all else."""
    made = seccomp.program((), (), names)
    # What the daemon answers as missing, and what it traps.
    missing, trapped = struct.pack("=I", seccomp._ERROR | errno.ENOSYS), struct.pack("=I", seccomp._TRAP)
    changed = made.replace(missing, struct.pack("=I", seccomp._ERROR | number))
    _kernel.filter_calls(changed.replace(trapped, struct.pack("=I", seccomp._ALLOW)))


def main(how: str, *arguments: str) -> int:
    """Run the daemon to its end."""
    # All that it imports in its start: as another user it may not find its interpreter's files.
    importlib.import_module("godwit.daemon.main")
    if how not in MISDEEDS:
        os.setgroups([])
        os.setresgid(UID, UID, UID)
        os.setresuid(UID, UID, UID)
        _kernel.prctl(PR_SET_DUMPABLE, 1)
        capabilities.keep_only(())
    if how == "container":
        refuse(OF_CONTAINERS, errno.EPERM)
    if how == "old":
        refuse(OF_OLD_KERNELS, errno.ENOSYS)
    if how in MISDEEDS:
        watch = House.watch

        def misbehave(house: House, done: Callable[[], None]) -> None:
            watch(house, done)
            MISDEEDS[how]()

        mock.patch.object(House, "watch", misbehave).start()
    return serve.main(arguments)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
