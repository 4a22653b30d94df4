# SPDX-License-Identifier: GPL-2.0-or-later
"""Sockets for whole ranges of ports, as port forwards need them: tens of thousands, in a moment."""

from array import array

from libc.stdint cimport uint16_t, uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from godwit.dataplane.sys cimport (
    AF_INET,
    AF_INET6,
    EMFILE,
    ENFILE,
    ENOBUFS,
    ENOMEM,
    IPPROTO_IP,
    IPPROTO_IPV6,
    IPV6_FREEBIND,
    IPV6_V6ONLY,
    IP_FREEBIND,
    SOCK_CLOEXEC,
    SOCK_NONBLOCK,
    SOCK_STREAM,
    SOL_SOCKET,
    SO_BINDTODEVICE,
    SO_REUSEADDR,
    SO_TYPE,
    be16,
    bind,
    close,
    errno,
    fcntl,
    getsockname,
    getsockopt,
    listen,
    put16,
    set_option,
    setsockopt,
    sockaddr,
    sockaddr_in,
    sockaddr_in6,
    sockaddr_storage,
    socket,
    socklen_t,
)

cdef extern from "<fcntl.h>" nogil:
    enum:
        F_GETFL
        O_NONBLOCK

cdef enum:
    BACKLOG = 1024
    MAX_DEVICE = 16     # IFNAMSIZ

# What all the sockets of a range have in common.
cdef struct Place:
    int family
    int kind
    bint v6only
    bint freebind
    char device[MAX_DEVICE]
    socklen_t device_size   # 0: any
    sockaddr_storage addr
    socklen_t addr_size


cdef int prepare(Place *at, int fd) noexcept nogil:
    """Options and address of a new socket; 0, or -1 and errno."""
    # A port whose connections are in TIME_WAIT is free. Not for UDP, where it
    # would share the port with another program.
    if at.kind == SOCK_STREAM and set_option(fd, SOL_SOCKET, SO_REUSEADDR, 1) != 0:
        return -1
    if at.family == AF_INET6 and set_option(fd, IPPROTO_IPV6, IPV6_V6ONLY, at.v6only) != 0:
        return -1
    if at.freebind:
        if at.family == AF_INET6:
            if set_option(fd, IPPROTO_IPV6, IPV6_FREEBIND, 1) != 0:
                return -1
        elif set_option(fd, IPPROTO_IP, IP_FREEBIND, 1) != 0:
            return -1
    if at.device_size and setsockopt(fd, SOL_SOCKET, SO_BINDTODEVICE, at.device, at.device_size) != 0:
        return -1
    if bind(fd, <sockaddr *>&at.addr, at.addr_size) != 0:
        return -1
    return listen(fd, BACKLOG) if at.kind == SOCK_STREAM else 0


cdef int open_one(Place *at, uint16_t port) noexcept nogil:
    """The descriptor, or a negative error number."""
    cdef int fd, rc
    fd = socket(at.family, at.kind | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)
    if fd < 0:
        return -errno
    if at.family == AF_INET6:
        put16(&(<sockaddr_in6 *>&at.addr).sin6_port, port)
    else:
        put16(&(<sockaddr_in *>&at.addr).sin_port, port)
    if prepare(at, fd) != 0:
        rc = -errno
        close(fd)
        return rc
    return fd


cdef int open_range(Place *at, int first, int last, int most, int *out) noexcept nogil:
    """How many ports were tried: up to one for which the system is out of something."""
    cdef int port, fd, opened = 0
    for port in range(first, last + 1):
        if opened == most:
            return port - first
        fd = open_one(at, <uint16_t>port)
        out[port - first] = fd
        if fd >= 0:
            opened += 1
        elif fd in (-EMFILE, -ENFILE, -ENOMEM, -ENOBUFS):
            return port - first + 1
    return last + 1 - first


def open_ports(int family, int kind, bytes address, uint32_t scope, bytes device, bint v6only, bint freebind,
               int first, int last, int most):
    """Open a socket for each port from ``first`` to ``last``, and at most ``most``; SOCK_STREAM ones listen.

    ``address`` is 4 or 16 bytes, as the family has them, ``scope`` the interface
    of a link-local one, ``device`` the name of the interface that the sockets are
    bound to, or empty. Returns an array: for each port that was tried its
    descriptor, or its negative error number. It ends early when ``most`` sockets
    are open, and at a port for which no descriptor or no memory was to be had.
    """
    cdef Place at
    cdef sockaddr_in *a4
    cdef sockaddr_in6 *a6
    cdef int tried
    cdef int *out
    if not 0 < first <= last <= 65535:
        raise ValueError(f"no range of ports: {first} to {last}")
    if len(device) >= MAX_DEVICE:
        raise ValueError(f"the name of an interface is too long: {device!r}")
    memset(&at, 0, sizeof(at))
    at.family = family
    at.kind = kind
    at.v6only = v6only
    at.freebind = freebind
    memcpy(at.device, <const char *>device, len(device))
    at.device_size = len(device) + 1 if device else 0
    if len(address) != (16 if family == AF_INET6 else 4):
        raise ValueError(f"{len(address)} bytes are no address of this family")
    if family == AF_INET6:
        a6 = <sockaddr_in6 *>&at.addr
        a6.sin6_family = family
        memcpy(&a6.sin6_addr, <const char *>address, 16)
        a6.sin6_scope_id = scope
        at.addr_size = sizeof(sockaddr_in6)
    else:
        a4 = <sockaddr_in *>&at.addr
        a4.sin_family = family
        memcpy(&a4.sin_addr, <const char *>address, 4)
        at.addr_size = sizeof(sockaddr_in)
    out = <int *>malloc((last - first + 1) * sizeof(int))
    if out == NULL:
        raise MemoryError
    try:
        with nogil:
            tried = open_range(&at, first, last, most, out)
        return array("i", (<char *>out)[:tried * sizeof(int)])
    finally:
        free(out)


def sockets(fds):
    """For each descriptor (kind, family, whether IPv6 alone, address, its scope, port, name of its device).

    As they are bound; the address has 4 or 16 bytes. Tens of thousands, in a
    moment. Raises OSError for what is no socket, ValueError for one that is not
    of IP, or blocks.
    """
    cdef sockaddr_storage addr
    cdef sockaddr_in6 *a6 = <sockaddr_in6 *>&addr
    cdef sockaddr_in *a4 = <sockaddr_in *>&addr
    cdef socklen_t n
    cdef int kind, only, flags
    cdef char device[MAX_DEVICE]
    found = []
    for fd in fds:
        n = sizeof(addr)
        if getsockname(fd, <sockaddr *>&addr, &n) != 0:
            raise OSError(errno, "socket")
        n = sizeof(kind)
        if getsockopt(fd, SOL_SOCKET, SO_TYPE, &kind, &n) != 0:
            raise OSError(errno, "socket")
        flags = fcntl(fd, F_GETFL)
        if addr.ss_family not in (AF_INET, AF_INET6) or flags < 0 or not flags & O_NONBLOCK:
            raise ValueError(f"a socket of the family {addr.ss_family} and the kind {kind}, or one that blocks")
        n = MAX_DEVICE
        if getsockopt(fd, SOL_SOCKET, SO_BINDTODEVICE, device, &n) != 0 or n == 0:
            n = 1
        only = 0
        name = device[:n - 1] if n > 1 else b""
        if addr.ss_family == AF_INET6:
            n = sizeof(only)
            getsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &only, &n)
            found.append((kind, AF_INET6, bool(only), (<char *>&a6.sin6_addr)[:16], a6.sin6_scope_id,
                          be16(<unsigned char *>&a6.sin6_port), name))
        else:
            found.append((kind, AF_INET, False, (<char *>&a4.sin_addr)[:4], 0,
                          be16(<unsigned char *>&a4.sin_port), name))
    return found
