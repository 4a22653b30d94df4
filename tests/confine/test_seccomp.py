# SPDX-License-Identifier: GPL-2.0-or-later
"""System calls that are allowed, those that are allowed with some arguments, and all others."""

from __future__ import annotations

import re
import signal

import pytest

from godwit.confine import _kernel
from godwit.daemon.syscalls import CONDITIONAL, PLAIN

from .conftest import Run

# The daemon's own list, and what a test may add to it.
BEGIN = """
    import os, socket, threading
    from godwit.confine import _kernel, capabilities, seccomp
    from godwit.daemon.syscalls import CONDITIONAL, MISSING, PLAIN
    import ctypes, fcntl, mmap, resource
    libc = ctypes.CDLL(None, use_errno=True)
    capabilities.keep_only(())
    seccomp.restrict(seccomp.program(PLAIN, CONDITIONAL, MISSING), 2, b"told: ")
"""


def test_what_is_allowed_goes_on(run: Run) -> None:
    # Some of these the kernel may refuse this user.
    made = "[libc.socket(*words) for words in ((2, 1, 0), (10, 2, 0), (1, 1, 0), (2, 2, 1), (10, 2, 58), (16, 3, 0))]"
    done = run(f"{BEGIN}    print(os.getpid() > 0, len({made}))")
    assert (done.returncode, done.stdout, done.stderr) == (0, "True 6\n", "")


FORBIDDEN = {
    "chroot": "os.chroot('/')",
    "execve": "os.execv('/bin/true', ['true'])",
    "kill": "os.kill(1, 0)",
    "ptrace": "libc.ptrace(0, 0, 0, 0)",
    "unshare": "libc.unshare(0x10000000)",
    "mount": "libc.mount(b'none', b'/', b'tmpfs', 0, None)",
    "io_uring_setup": "libc.syscall(425, 1, None)",
    "bpf": "libc.syscall(_kernel.calls()['bpf'], 0, None, 0)",
    "process_vm_readv": "libc.process_vm_readv(1, None, 0, None, 0, 0)",
    "socket": "socket.socket(17, socket.SOCK_RAW)",  # AF_PACKET
    "mmap": "mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC)",
    "clone": "libc.syscall(_kernel.calls()['clone'], 0x10000000 | 17, None)",  # CLONE_NEWUSER
    "fcntl": "fcntl.fcntl(0, fcntl.F_SETOWN, 1)",  # and F_SETSIG: a signal to others
    "prlimit64": "resource.prlimit(1, resource.RLIMIT_CPU, (1, 1))",
    "tgkill": "libc.syscall(_kernel.calls()['tgkill'], 1, 1, 0)",
    "prctl": "libc.prctl(4, 1, 0, 0, 0)",  # PR_SET_DUMPABLE
}


SOCKETS = (
    "socket.AF_NETLINK, socket.SOCK_RAW, 6",  # NETLINK_XFRM
    "socket.AF_NETLINK, socket.SOCK_RAW, 12",  # NETLINK_NETFILTER
    "socket.AF_INET, socket.SOCK_STREAM, 132",  # SCTP
    "socket.AF_INET, socket.SOCK_STREAM, 262",  # MPTCP
    "socket.AF_INET, 6, 0",  # DCCP
    "socket.AF_VSOCK, socket.SOCK_STREAM, 0",
)


@pytest.mark.parametrize(
    ("name", "what"), [*FORBIDDEN.items(), *(("socket", f"socket.socket({words})") for words in SOCKETS)]
)
def test_anything_else_ends_the_process_and_says_what_it_was(run: Run, name: str, what: str) -> None:
    done = run(f"{BEGIN}    {what}\n    print('went on')")
    assert done.returncode == -signal.SIGSYS
    number = _kernel.calls()[name]
    told = rf"told: system call {name} \({number}(: \d+, \d+, \d+)?\) is not among those that this process needs"
    assert re.fullmatch(f"{told}: it ends\n", done.stderr)
    assert done.stdout == ""


def test_what_terminals_and_others_are_asked_is_answered(run: Run) -> None:
    """A C library asks each new file in its own way whether it is a terminal."""
    text = """
    try:
        fcntl.ioctl(0, 0x5412, b"x")  # TIOCSTI
    except OSError as error:
        print(error.errno)
"""
    assert run(BEGIN + text).stdout == "25\n"


def test_what_is_newer_than_this_is_missing(run: Run) -> None:
    text = """
    print(libc.syscall(max(_kernel.calls().values()) + 1), ctypes.get_errno())
"""
    assert run(BEGIN + text).stdout == "-1 38\n"


def test_in_any_thread(run: Run) -> None:
    text = """
    thread = threading.Thread(target=lambda: os.chroot("/"))
    thread.start()
    thread.join()
    print("went on")
"""
    done = run(BEGIN + text)
    assert done.returncode == -signal.SIGSYS
    assert "system call chroot (" in done.stderr


def test_the_calls_of_another_architecture(run: Run) -> None:
    """A number of x32's: not one of those that are listed."""
    done = run(f"{BEGIN}    libc.syscall(0x40000000 + _kernel.calls()['getpid'])\n    print('went on')")
    assert done.returncode == -signal.SIGSYS
    assert (done.stdout, done.stderr) == ("", "")  # ended by the kernel itself


def test_what_is_answered_as_missing(run: Run) -> None:
    """The C library then falls back on a call whose arguments can be seen."""
    text = """
    assert libc.syscall(_kernel.calls()["clone3"], None, 0) == -1
    print(ctypes.get_errno())
    thread = threading.Thread(target=print, args=("a thread",))
    thread.start()
    thread.join()
"""
    done = run(BEGIN + text)
    assert (done.returncode, done.stdout) == (0, "38\na thread\n"), done.stderr


def test_threads_can_still_be_ended(run: Run) -> None:
    """At the end of the process Python ends them by pthread_exit(), which loads a library where it is not there yet."""
    text = """
    import time
    threading.Thread(target=lambda: time.sleep(0.2), daemon=True).start()
    ended = threading.Thread(target=lambda: libc.pthread_exit(None))
    ended.start()
    time.sleep(0.1)
    os._exit(7)
"""
    assert run(BEGIN + text).returncode == 7


def test_what_is_listed_is_there() -> None:
    """On every architecture, but for what only the first of them have."""
    numbers = _kernel.calls()
    assert [call.name for call in CONDITIONAL if call.name not in numbers] == []
    old = {"dup2", "epoll_wait", "open", "poll", "readlink", "stat", "time", "unlink", "chmod", "chown", "lchown"}
    new = {"futex_wait", "futex_wake"}  # Linux 6.7
    assert [name for name in PLAIN if name not in numbers and name not in old | new] == []
    assert {"newfstatat", "ppoll", "epoll_pwait", "unlinkat", "lseek", "mmap"} <= numbers.keys()


def test_names_are_those_of_the_kernel() -> None:
    numbers = _kernel.calls()
    assert len(numbers) > 300
    assert len(set(numbers.values())) == len(numbers)
    if _kernel.ARCH == 0xC000003E:  # x86-64
        assert (numbers["read"], numbers["ptrace"], numbers["seccomp"]) == (0, 101, 317)
