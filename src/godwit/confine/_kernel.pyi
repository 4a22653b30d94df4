# SPDX-License-Identifier: GPL-2.0-or-later
"""System calls that Python does not have, each as it is. All raise OSError where the kernel refuses."""

#: Of this build (linux/audit.h); 0 where system calls are not filtered.
ARCH: int

def calls() -> dict[str, int]:
    """The numbers of all system calls that the C library's headers knew when this was built, by name."""

def prctl(option: int, a: int = 0, b: int = 0) -> None:
    """prctl(2)."""

def get_capabilities() -> tuple[int, int]:
    """The permitted and the effective set of this thread, a bit for each capability (capget(2))."""

def set_capabilities(both: int) -> None:
    """Make both sets these, and the inheritable one empty (capset(2))."""

def try_namespaces(flags: int, uid_map: bytes, gid_map: bytes, somewhere: bytes) -> None:
    """Whether this process could go into these namespaces, and change its root there to a file system of its own.

    A child tries. The maps are those of the user namespace, as in /proc/self/uid_map and gid_map; empty for none.
    ``somewhere`` is a directory for the new root to be mounted at first.
    """

def unshare(flags: int) -> None:
    """unshare(2)."""

def mount(source: bytes, target: bytes, kind: bytes, flags: int, data: bytes = b"") -> None:
    """mount(2)."""

def umount(target: bytes, flags: int) -> None:
    """umount2(2)."""

def open_tree(path: bytes) -> int:
    """A copy of the mounts at a path and below, not attached anywhere (open_tree(2), Linux 5.2)."""

def move_mount(fd: int, path: bytes) -> None:
    """Attach what `open_tree` gave (move_mount(2), Linux 5.2)."""

def set_mount_attributes(fd: int, attributes: int, recursive: bool) -> None:
    """Add attributes to what is mounted at a descriptor (mount_setattr(2), Linux 5.12)."""

def pivot_root(to: bytes, old: bytes) -> None:
    """pivot_root(2)."""

def landlock_abi() -> int:
    """The version of Landlock's interface (landlock(7))."""

def landlock_create(attributes: bytes) -> int:
    """A set of rules: a ``struct landlock_ruleset_attr`` (landlock_create_ruleset(2))."""

def landlock_add(ruleset: int, access: int, fd: int) -> None:
    """Allow this below a directory, or of a file (landlock_add_rule(2))."""

def landlock_restrict(ruleset: int) -> None:
    """Have the rules hold for this thread and those that it starts (landlock_restrict_self(2))."""

def catch_violations(log: int, before: bytes) -> None:
    """A system call that the filter traps ends the process, and before that a line goes to the descriptor ``log``.

    The line begins with ``before`` and has the call's name. The process dies of SIGSYS.
    """

def load_for_reports() -> None:
    """On a build with the sanitizers: load now what their reports take, while there are files to read. Else nothing."""

def filter_calls(instructions: bytes) -> None:
    """Have a filter (``struct sock_filter`` for ``struct seccomp_data``) decide on each system call (seccomp(2))."""

def load_for_thread_ends() -> None:
    """Load now what the C library loads when a thread is ended (pthread_exit(3)): later nothing can be loaded."""
