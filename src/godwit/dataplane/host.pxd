# SPDX-License-Identifier: GPL-2.0-or-later
"""Addresses between guest and host, and sockets towards the host's network."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t

from godwit.dataplane.plane cimport Plane
from godwit.dataplane.sys cimport sockaddr, socklen_t

cdef inline bint is_v4(const uint8_t *addr) noexcept nogil:
    """Whether a 16-byte address is a v4-mapped one (RFC 4291, 2.5.5.2)."""
    cdef int i
    for i in range(10):
        if addr[i]:
            return False
    return addr[10] == 0xFF and addr[11] == 0xFF

cdef inline bint is_link_local6(const uint8_t *addr) noexcept nogil:
    return addr[0] == 0xFE and addr[1] & 0xC0 == 0x80

cdef void map_v4(uint8_t *out, const uint8_t *four) noexcept nogil
cdef bint is_loopback(const uint8_t *addr) noexcept nogil
cdef bint is_unspecified(const uint8_t *addr) noexcept nogil
# The host's name for an address that the guest uses. False: not to be reached.
cdef bint to_host(Plane *p, const uint8_t *guest, uint16_t port, uint8_t *host) noexcept nogil
# The guest's name for a peer. False: the guest has no way to name it.
cdef bint to_guest_name(Plane *p, const uint8_t *host, uint16_t port, uint8_t *guest) noexcept nogil

# The guest's address for a peer to reach: see host.pyx.
cdef const uint8_t *guest_side(Plane *p, const uint8_t *remote) noexcept nogil

cdef socklen_t put_sockaddr(Plane *p, sockaddr *out, const uint8_t *addr, uint16_t port) noexcept nogil
# The same for an IPv6 socket, whatever the address: of IPv4 as v4-mapped.
cdef socklen_t put_sockaddr6(sockaddr *out, const uint8_t *addr, uint16_t port, uint32_t scope) noexcept nogil
# Where the guest's own connections and datagrams leave from, if that was said. Not 0: errno says why not.
cdef int bind_outbound(Plane *p, int fd, bint v4, uint16_t port) noexcept nogil
cdef void get_sockaddr(const sockaddr *at, uint8_t *addr, uint16_t *port) noexcept nogil
