# SPDX-License-Identifier: GPL-2.0-or-later
"""Libraries that stand between a back-end and the C library (LD_PRELOAD), for what no ordinary user can bring about."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path


class Shim:
    """A library made of ``source``, and the numbers that it looks at: 64 bits each, in a file that ``$SHIM`` names."""

    def __init__(self, folder: Path, source: str) -> None:
        (folder / "shim.c").write_text(_BEGIN + source)
        self._library, self._numbers = folder / "shim.so", folder / "numbers"
        plain = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "PYTHONMALLOC")}
        words = ["cc", "-O1", "-fPIC", "-shared", "-o", str(self._library), str(folder / "shim.c"), "-ldl"]
        subprocess.run(words, check=True, env=plain)
        self._numbers.write_bytes(bytes(4096))

    @property
    def wrapper(self) -> list[str]:
        """The words before a command that put the library under it."""
        preload = ":".join(filter(None, [os.environ.get("LD_PRELOAD"), str(self._library)]))
        return ["env", f"LD_PRELOAD={preload}", f"SHIM={self._numbers}"]

    def put(self, index: int, value: int) -> None:
        """Set a number."""
        with open(self._numbers, "r+b") as file:
            file.seek(8 * index)
            file.write(struct.pack("q", value))

    def get(self, index: int) -> int:
        """Look at one."""
        (value,) = struct.unpack_from("q", self._numbers.read_bytes(), 8 * index)
        return int(value)

    @contextlib.contextmanager
    def holding(self, index: int, value: int) -> Iterator[None]:
        """Have a number be ``value``, for a while; 0 otherwise."""
        self.put(index, value)
        try:
            yield
        finally:
            self.put(index, 0)


_BEGIN = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <netinet/in.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile int64_t *numbers;

__attribute__((constructor)) static void begin(void)
{
    int fd = open(getenv("SHIM"), O_RDWR | O_CLOEXEC);
    void *at = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (fd < 0 || at == MAP_FAILED)
        abort();
    numbers = at;
}

#define REAL(name) ((typeof(&name))dlsym(RTLD_NEXT, #name))
"""

# Number 0: seconds that CLOCK_REALTIME is ahead.
CLOCK = """
int clock_gettime(clockid_t clock, struct timespec *now)
{
    /* By its number: a sanitizer asks for the time before it can bear dlsym(). */
    int rc = syscall(SYS_clock_gettime, clock, now);
    if (rc == 0 && clock == CLOCK_REALTIME && numbers)
        now->tv_sec += numbers[0];
    return rc;
}

time_t time(time_t *out)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out)
        *out = now.tv_sec;
    return now.tv_sec;
}

int gettimeofday(struct timeval *restrict out, void *restrict zone)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    out->tv_sec = now.tv_sec;
    out->tv_usec = now.tv_nsec / 1000;
    return 0;
}
"""

# How many nanoseconds a look at what waits in a socket of TCP takes longer, without any work; and how many there were.
SLOW = """
ssize_t recvmsg(int fd, struct msghdr *message, int flags)
{
    int protocol = 0;
    socklen_t size = sizeof(protocol);
    if (flags & MSG_PEEK && numbers && !getsockopt(fd, SOL_SOCKET, SO_PROTOCOL, &protocol, &size)
        && protocol == IPPROTO_TCP) {
        struct timespec pause = {0, numbers[0]};
        numbers[1]++;
        clock_nanosleep(CLOCK_MONOTONIC, 0, &pause, NULL);
    }
    return REAL(recvmsg)(fd, message, flags);
}
"""

# The error number with which each call fails, 0: not at all; and how often it has, as many places further on.
CALLS = ("socket", "connect", "accept4", "epoll_ctl", "sendmsg", "sendmmsg", "recvmsg", "send")
COUNT = len(CALLS)

# Of sockets of IP alone: control has others, on which all else hangs.
FAULTS = """
enum { SOCKET, CONNECT, ACCEPT4, EPOLL_CTL, SENDMSG, SENDMMSG, RECVMSG, SEND, CALLS };

static int fails(int call, int fd)
{
    int family = 0;
    socklen_t size = sizeof(family);
    if (!numbers || !numbers[call])
        return 0;
    if (fd >= 0 && (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &family, &size) || (family != AF_INET && family != AF_INET6)))
        return 0;
    __atomic_add_fetch(&numbers[CALLS + call], 1, __ATOMIC_RELAXED);
    errno = (int)numbers[call];
    return 1;
}

int socket(int family, int kind, int protocol)
{
    if ((family == AF_INET || family == AF_INET6) && fails(SOCKET, -1))
        return -1;
    return REAL(socket)(family, kind, protocol);
}

int connect(int fd, const struct sockaddr *addr, socklen_t size)
{
    return addr->sa_family != AF_UNSPEC && fails(CONNECT, fd) ? -1 : REAL(connect)(fd, addr, size);
}

int accept4(int fd, struct sockaddr *addr, socklen_t *size, int flags)
{
    return fails(ACCEPT4, fd) ? -1 : REAL(accept4)(fd, addr, size, flags);
}

int epoll_ctl(int epoll, int what, int fd, struct epoll_event *event)
{
    return what == EPOLL_CTL_ADD && fails(EPOLL_CTL, fd) ? -1 : REAL(epoll_ctl)(epoll, what, fd, event);
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags)
{
    return fails(SENDMSG, fd) ? -1 : REAL(sendmsg)(fd, message, flags);
}

int sendmmsg(int fd, struct mmsghdr *messages, unsigned count, int flags)
{
    return fails(SENDMMSG, fd) ? -1 : REAL(sendmmsg)(fd, messages, count, flags);
}

ssize_t send(int fd, const void *data, size_t size, int flags)
{
    return fails(SEND, fd) ? -1 : REAL(send)(fd, data, size, flags);
}

ssize_t recvmsg(int fd, struct msghdr *message, int flags)
{
    return fails(RECVMSG, fd) ? -1 : REAL(recvmsg)(fd, message, flags);
}
"""
