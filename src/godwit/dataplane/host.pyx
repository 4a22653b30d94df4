# SPDX-License-Identifier: GPL-2.0-or-later

from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memcmp, memcpy, memset

from godwit.dataplane.plane cimport AddrMap, Plane
from godwit.dataplane.sys cimport (
    AF_INET,
    AF_INET6,
    IP_BIND_ADDRESS_NO_PORT,
    IPPROTO_IP,
    SO_BINDTODEVICE,
    SOL_SOCKET,
    be16,
    bind,
    put16,
    setsockopt,
    sockaddr,
    sockaddr_in,
    sockaddr_in6,
    sockaddr_storage,
    socklen_t,
)

cdef enum:
    IF_NAME = 16    # an interface's name with its zero byte (linux/if.h)


cdef void map_v4(uint8_t *out, const uint8_t *four) noexcept nogil:
    memset(out, 0, 10)
    out[10] = out[11] = 0xFF
    memcpy(out + 12, four, 4)


cdef bint is_loopback(const uint8_t *addr) noexcept nogil:
    cdef int i
    if is_v4(addr):
        return addr[12] == 127
    for i in range(15):
        if addr[i]:
            return False
    return addr[15] == 1


cdef bint is_unspecified(const uint8_t *addr) noexcept nogil:
    """"This network" (RFC 791, 3.2: 0.0.0.0/8), or "::"."""
    cdef int i
    if is_v4(addr):
        return addr[12] == 0
    for i in range(16):
        if addr[i]:
            return False
    return True


cdef bint to_host(Plane *p, const uint8_t *guest, uint16_t port, uint8_t *host) noexcept nogil:
    cdef int i
    cdef AddrMap *m
    for i in range(p.config.map_count):
        m = &p.config.maps[i]
        if (m.port == 0 or m.port == port) and memcmp(m.guest, guest, 16) == 0:
            memcpy(host, m.host, 16)
            return True
    memcpy(host, guest, 16)
    # The host's loopback is the host's alone, unless it was mapped; and to
    # connect to the unspecified address is to connect to the loopback.
    return not is_loopback(guest) and not is_unspecified(guest)


cdef bint to_guest_name(Plane *p, const uint8_t *host, uint16_t port, uint8_t *guest) noexcept nogil:
    cdef int i
    cdef AddrMap *m
    cdef bint v4 = is_v4(host)
    cdef bint local
    for i in range(p.config.map_count):
        m = &p.config.maps[i]
        if (m.port == 0 or m.port == port) and memcmp(m.host, host, 16) == 0:
            memcpy(guest, m.guest, 16)
            return True
    # Another loopback address, or the address that the guest has too: the
    # guest would take such a source for itself. It is the host all the same.
    cdef const uint8_t *own = p.config.addr6
    if v4:
        own = p.config.addr4
    local = is_loopback(host) or memcmp(host, own, 16) == 0
    if not local:
        memcpy(guest, host, 16)
        return True
    for i in range(p.config.map_count):
        m = &p.config.maps[i]
        if m.port == 0 and is_v4(m.guest) == v4 and is_loopback(m.host):
            memcpy(guest, m.guest, 16)
            return True
    return False


cdef const uint8_t *guest_side(Plane *p, const uint8_t *remote) noexcept nogil:
    """The guest's address for a peer: as it was last seen to use it, else as it was told.

    The unspecified address where it has none, or not that family (any more).
    """
    if is_v4(remote):
        if p.seen4[10] and p.config.has_v4:
            return p.seen4
        return p.config.addr4
    if not p.config.has_v6:
        return p.config.addr6
    if is_link_local6(remote):
        return p.seen6_ll
    if p.seen6[0]:
        return p.seen6
    return p.config.addr6


cdef socklen_t put_sockaddr(Plane *p, sockaddr *out, const uint8_t *addr, uint16_t port) noexcept nogil:
    cdef sockaddr_in *a4
    cdef sockaddr_in6 *a6
    cdef int i
    if is_v4(addr):
        a4 = <sockaddr_in *>out
        memset(a4, 0, sizeof(sockaddr_in))
        a4.sin_family = AF_INET
        put16(&a4.sin_port, port)
        memcpy(&a4.sin_addr, addr + 12, 4)
        return sizeof(sockaddr_in)
    a6 = <sockaddr_in6 *>out
    memset(a6, 0, sizeof(sockaddr_in6))
    a6.sin6_family = AF_INET6
    put16(&a6.sin6_port, port)
    memcpy(&a6.sin6_addr, addr, 16)
    if is_link_local6(addr):
        a6.sin6_scope_id = p.config.ifindex
        for i in range(p.config.map_count):
            if p.config.maps[i].scope and memcmp(p.config.maps[i].host, addr, 16) == 0:
                a6.sin6_scope_id = p.config.maps[i].scope
    return sizeof(sockaddr_in6)


cdef socklen_t put_sockaddr6(sockaddr *out, const uint8_t *addr, uint16_t port, uint32_t scope) noexcept nogil:
    cdef sockaddr_in6 *a6 = <sockaddr_in6 *>out
    memset(a6, 0, sizeof(sockaddr_in6))
    a6.sin6_family = AF_INET6
    put16(&a6.sin6_port, port)
    memcpy(&a6.sin6_addr, addr, 16)
    a6.sin6_scope_id = scope
    return sizeof(sockaddr_in6)


cdef int bind_outbound(Plane *p, int fd, bint v4, uint16_t port) noexcept nogil:
    cdef sockaddr_storage addr
    cdef const uint8_t *source = p.config.outbound6
    cdef const uint8_t *device = p.config.outbound_if6
    cdef socklen_t n
    cdef int one = 1
    cdef uint8_t any4[16]
    if v4:
        source = p.config.outbound4
        device = p.config.outbound_if4
    if device[0] and setsockopt(fd, SOL_SOCKET, SO_BINDTODEVICE, device, IF_NAME) != 0:
        return -1
    if is_unspecified(source):
        if port == 0:
            return 0
        if v4:
            memset(any4, 0, sizeof(any4))
            any4[10] = any4[11] = 0xFF
            source = any4
    if port == 0:
        # It is chosen when the peer is known: else each could be used once, whoever the peers are.
        setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof(one))
    n = put_sockaddr(p, <sockaddr *>&addr, source, port)
    return bind(fd, <sockaddr *>&addr, n)


cdef void get_sockaddr(const sockaddr *at, uint8_t *addr, uint16_t *port) noexcept nogil:
    cdef const sockaddr_in *a4
    cdef const sockaddr_in6 *a6
    if at.sa_family == AF_INET:
        a4 = <const sockaddr_in *>at
        map_v4(addr, <const uint8_t *>&a4.sin_addr)
        port[0] = be16(&a4.sin_port)
    else:
        a6 = <const sockaddr_in6 *>at
        memcpy(addr, &a6.sin6_addr, 16)
        port[0] = be16(&a6.sin6_port)
