# SPDX-License-Identifier: GPL-2.0-or-later
"""The system calls that the running daemon may make.

``make syscalls`` runs tests with the daemon traced, and compares. OBSERVED is what it finds; the rest is what another C
library, kernel, architecture or Python does in place of those.
"""

from __future__ import annotations

import errno
import fcntl
import termios
from typing import Final

from godwit.confine.seccomp import NOT_TO_BE_RUN, Call, Only

#: What the tests have it do.
OBSERVED: Final = (
    # the data plane
    "accept4",
    "close",
    "connect",
    "epoll_ctl",
    "epoll_wait",
    "getsockname",
    "getsockopt",
    "listen",
    "bind",
    "read",
    "recvfrom",
    "recvmmsg",
    "recvmsg",
    "sendmmsg",
    "sendmsg",
    "sendto",
    "setsockopt",
    "shutdown",
    "write",
    # memory and threads
    "brk",
    "clock_gettime",  # of a thread's processor time; of others where the kernel maps no such function into the process
    "clock_nanosleep",
    "exit",
    "futex",
    "getpid",
    "gettid",
    "getrusage",
    "madvise",
    "mremap",
    "munmap",
    "rseq",
    "sched_yield",
    "sched_getaffinity",
    "sysinfo",
    "set_robust_list",
    # files and pipes
    "dup",
    "dup2",
    "epoll_create1",
    "eventfd2",
    "fstat",
    "fstatfs",
    "getcwd",
    "ftruncate",
    "getdents64",
    "getpeername",
    "lseek",
    "memfd_create",
    "newfstatat",
    "openat",
    "pipe2",
    "poll",
    "pread64",
    "pwrite64",
    "readlink",
    "unlink",
    "writev",
    # signals and the end
    "exit_group",
    "getrandom",
    "getegid",
    "geteuid",
    "getgid",
    "getuid",
    "close_range",
    "restart_syscall",
    "rt_sigaction",
    "rt_sigprocmask",
    "rt_sigreturn",
    "setitimer",
    "setsid",
    "sigaltstack",
    "uname",
)

#: What others do in place of those: by another C library, on another architecture, or once a kernel has it.
ALTERNATIVES: Final = (
    "accept",
    "clock_getres",
    "chmod",  # of sockets whose paths or group are others than those of the process that was taken over
    "chown",
    "fchmod",
    "fchmodat",
    "fchownat",
    "lchown",
    "dup3",
    "epoll_pwait",
    "epoll_pwait2",
    "futex_wake",
    "futex_wait",
    "futex_waitv",
    "getcpu",
    "gettimeofday",
    "nanosleep",
    "open",
    "pidfd_open",  # of who takes over, where the socket does not say it (before Linux 6.5)
    "ppoll",
    "readlinkat",
    "readv",
    "stat",
    "statx",
    "time",
    "unlinkat",
)

_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK = 1, 2, 10, 16
_TYPES: Final = (1, 2, 3, 5)  # SOCK_STREAM, SOCK_DGRAM, SOCK_RAW of netlink, SOCK_SEQPACKET of UNIX
_TYPE: Final = 0xF  # the rest of it are flags
_PROTOCOLS: Final = (0, 1, 58)  # IPPROTO_ICMP, IPPROTO_ICMPV6
#: Lengths of queues, and the number of an interface that an option names.
_OF_SOCKETS: Final = (termios.FIONREAD, termios.TIOCOUTQ, 0x894B, 0x8933)  # SIOCOUTQNSD, SIOCGIFINDEX
#: Python asks each file that it opens whether it is a terminal; a sanitizer that reports something, its output.
_OF_FILES: Final = (termios.FIONBIO, termios.FIOCLEX, termios.TCGETS)
_OF_DESCRIPTORS: Final = (
    *(fcntl.F_DUPFD, fcntl.F_DUPFD_CLOEXEC, fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_GETFL, fcntl.F_SETFL),
    *(fcntl.F_ADD_SEALS, fcntl.F_GET_SEALS, fcntl.F_SETPIPE_SZ, fcntl.F_GETPIPE_SZ),
)
_CLONE_NEW: Final = 0x7E020080  # all kinds of namespaces
_WORD: Final = 0xFFFFFFFF

#: Of these, no more than what is said here.
CONDITIONAL: Final = (
    # Of netlink, NETLINK_ROUTE; of IP, TCP and UDP (0 as well), and ICMP. 0 is DCCP, too, with the type of that.
    Call(
        "socket",
        (
            Only(0, _WORD, (_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK)),
            Only(1, _TYPE, _TYPES),
            Only(2, _WORD, _PROTOCOLS),
        ),
    ),
    Call("socketpair", (Only(0, _WORD, (_AF_UNIX,)),)),
    *NOT_TO_BE_RUN,
    # Threads, and one that keeps sockets in silence: `Linger.leave_keeper`.
    Call("clone", (Only(0, _CLONE_NEW, (0,)),)),
    Call("ioctl", (Only(1, _WORD, (*_OF_SOCKETS, *_OF_FILES)),), error=errno.ENOTTY),
    Call("fcntl", (Only(1, _WORD, _OF_DESCRIPTORS),)),  # nobody is sent a signal when a descriptor becomes readable
    Call("prlimit64", (Only(0, _WORD, (0,)),)),  # of itself
    Call("prctl", (Only(0, _WORD, (15,)),)),  # PR_SET_NAME: newer Pythons name their threads
)

#: What is answered as by a kernel that does not have it: the C library then makes the call whose arguments can be seen.
MISSING: Final = ("clone3",)

PLAIN: Final = OBSERVED + ALTERNATIVES
