# SPDX-License-Identifier: GPL-2.0-or-later
# cython: boundscheck=False, wraparound=False
"""TCP_REPAIR on many sockets at once: the guest stands still meanwhile. See the .pyi."""

import os

from libc.stdint cimport uint32_t

cdef extern from "<errno.h>" nogil:
    int errno

cdef extern from *:
    """
    #include <sys/socket.h>
    #include <sys/syscall.h>
    #include <netinet/in.h>
    #include <linux/bpf.h>
    #include <linux/filter.h>
    #include <linux/tcp.h>
    #include <unistd.h>
    #ifndef SO_ATTACH_BPF
    #define SO_ATTACH_BPF 50
    #endif
    static const struct bpf_insn gw_nothing[] = {
        { .code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = BPF_REG_0, .imm = 0 },
        { .code = BPF_JMP | BPF_EXIT },
    };
    static long gw_load_drop_all(void)
    {
        union bpf_attr attr = { .prog_type = BPF_PROG_TYPE_SOCKET_FILTER, .insn_cnt = 2,
                                .insns = (uintptr_t)gw_nothing, .license = (uintptr_t)"GPL" };
        return syscall(__NR_bpf, BPF_PROG_LOAD, &attr, sizeof(attr));
    }
    static const struct sock_filter gw_return[] = { { BPF_RET | BPF_K, 0, 0, 0 } };
    static const struct sock_fprog gw_classic = { 1, (struct sock_filter *)gw_return };
    """
    ctypedef uint32_t socklen_t
    cdef struct sock_fprog:
        pass
    enum:
        SOL_SOCKET
        SO_DOMAIN
        SO_PROTOCOL
        SO_TYPE
        SOCK_STREAM
        AF_INET
        AF_INET6
        SO_ATTACH_FILTER
        SO_ATTACH_BPF
        SO_DETACH_FILTER
        IPPROTO_TCP
        TCP_REPAIR
        ENOENT
    const sock_fprog gw_classic
    long gw_load_drop_all() nogil
    int getsockopt(int fd, int level, int option, void *value, socklen_t *n) nogil
    int setsockopt(int fd, int level, int option, const void *value, socklen_t n) nogil


def drop_all():
    """A program that drops all that arrives, for all sockets."""
    cdef long fd = gw_load_drop_all()
    return None if fd < 0 else fd


cdef int set_one(int fd, int mode, int program) noexcept nogil:
    cdef int error, back = -1   # TCP_REPAIR_OFF_NO_WP, linux/tcp.h
    if mode != 1:
        # First: the answer to the window probe of OFF is wanted. Another helper may have set the mode, without a filter.
        if setsockopt(fd, SOL_SOCKET, SO_DETACH_FILTER, &mode, sizeof(mode)) != 0 and errno != ENOENT:
            return errno
    if setsockopt(fd, IPPROTO_TCP, TCP_REPAIR, &mode, sizeof(mode)) != 0:
        return errno
    if mode != 1:
        return 0
    if program >= 0:
        error = 0 if setsockopt(fd, SOL_SOCKET, SO_ATTACH_BPF, &program, sizeof(program)) == 0 else errno
    else:
        error = 0 if setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &gw_classic, sizeof(gw_classic)) == 0 else errno
    if error != 0:
        setsockopt(fd, IPPROTO_TCP, TCP_REPAIR, &back, sizeof(back))
    return error


def first_not_tcp(const int[::1] fds):
    """The place of the first that is no TCP socket; -1 for none."""
    cdef Py_ssize_t i, odd = -1
    cdef int family
    with nogil:
        for i in range(fds.shape[0]):
            family = of_socket(fds[i], SO_DOMAIN)
            if (of_socket(fds[i], SO_PROTOCOL) != IPPROTO_TCP or of_socket(fds[i], SO_TYPE) != SOCK_STREAM
                    or (family != AF_INET and family != AF_INET6)):
                odd = i
                break
    return odd


cdef int of_socket(int fd, int option) noexcept nogil:
    cdef int value = -1
    cdef socklen_t n = sizeof(value)
    return value if getsockopt(fd, SOL_SOCKET, option, &value, &n) == 0 else -1


def set_mode(const int[::1] fds, int mode, program):
    """Set the mode of each, with or without that filter."""
    cdef int filter = -1 if program is None else program
    cdef Py_ssize_t i = 0
    cdef int error = 0
    with nogil:
        while i < fds.shape[0]:
            error = set_one(fds[i], mode, filter)
            if error != 0:
                break
            i += 1
    return i, error


def count_in_mode(const int[::1] fds, bint on):
    """How many sockets, from the first, are in repair mode, or out of it."""
    cdef Py_ssize_t i = 0
    cdef int found = 0
    cdef socklen_t n
    with nogil:
        while i < fds.shape[0]:
            n = sizeof(found)
            if getsockopt(fds[i], IPPROTO_TCP, TCP_REPAIR, &found, &n) != 0:
                found = -errno
                break
            if (found != 0) != on:
                break
            i += 1
    if found < 0:
        raise OSError(-found, os.strerror(-found))
    return i
