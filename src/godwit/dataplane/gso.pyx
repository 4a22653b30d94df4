# SPDX-License-Identifier: GPL-2.0-or-later

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from godwit.dataplane.checksum cimport fold, sum_bytes
from godwit.dataplane.sys cimport be32, put16, put32

cdef enum:
    # virtio 1.3, 5.1.6
    NEEDS_CSUM = 1
    GSO_TCPV4 = 1
    GSO_TCPV6 = 4
    ETH_HLEN = 14
    IPV4_HLEN = 20
    IPV6_HLEN = 40
    TCP_HLEN = 20
    TCP_CHECKSUM = 16       # its place in the header
    TCP_FIN = 0x01
    TCP_PSH = 0x08
    TCP_CWR = 0x80


cdef inline uint32_t little16(const uint8_t *p) noexcept nogil:
    return p[0] | <uint32_t>p[1] << 8


cdef inline uint32_t length_word(uint32_t n) noexcept nogil:
    """A length as a word of a sum, which is in memory order."""
    return ((n & 0xFF) << 8) | ((n >> 8) & 0xFF)


cdef bint gso_wanted(const uint8_t *vnet) noexcept nogil:
    return vnet[1] != 0


cdef bint gso_read(Gso *g, const uint8_t *vnet, uint32_t size) noexcept nogil:
    cdef uint16_t field
    cdef const uint8_t *tcp
    if not vnet[0] & NEEDS_CSUM or (vnet[1] != GSO_TCPV4 and vnet[1] != GSO_TCPV6):
        return False
    g.frame = vnet + VNET_SIZE
    g.v6 = vnet[1] == GSO_TCPV6
    g.size = little16(vnet + 4)
    g.l4 = little16(vnet + 6)
    if g.size < GSO_LEAST or g.l4 < <uint32_t>(ETH_HLEN + (IPV6_HLEN if g.v6 else IPV4_HLEN)):
        return False
    if g.l4 + TCP_HLEN > size or little16(vnet + 8) != TCP_CHECKSUM:
        return False
    tcp = g.frame + g.l4
    g.head = g.l4 + ((tcp[12] >> 4) << 2)
    if g.head < g.l4 + TCP_HLEN or g.head > GSO_HEADERS or g.head >= size:
        return False
    g.payload = size - g.head
    if g.payload + g.head - g.l4 > 0xFFFF:
        return False
    g.count = (g.payload + g.size - 1) // g.size
    # The field holds the sum of the pseudo-header, with the length of the whole.
    memcpy(&field, tcp + TCP_CHECKSUM, 2)
    g.pseudo = <uint32_t>field + (0xFFFF - length_word(size - g.l4))
    return True


cdef uint32_t gso_headers(const Gso *g, uint32_t index, uint8_t *out) noexcept nogil:
    cdef uint32_t at = index * g.size
    cdef uint32_t payload = g.payload - at if index + 1 == g.count else g.size
    cdef uint8_t *ip = out + ETH_HLEN
    cdef uint8_t *tcp = out + g.l4
    cdef uint64_t s
    cdef uint16_t value
    memcpy(out, g.frame, g.head)
    if g.v6:
        put16(ip + 4, <uint16_t>(g.head - ETH_HLEN - IPV6_HLEN + payload))
    else:
        # The identification stays as it is: no fragment is ever made of these (RFC 6864).
        put16(ip + 2, <uint16_t>(g.head - ETH_HLEN + payload))
        memset(ip + 10, 0, 2)
        value = ~fold(sum_bytes(ip, g.l4 - ETH_HLEN, 0))
        memcpy(ip + 10, &value, 2)
    put32(tcp + 4, be32(tcp + 4) + at)
    if index:
        tcp[13] &= ~TCP_CWR
    if index + 1 < g.count:
        tcp[13] &= ~(TCP_FIN | TCP_PSH)
    memset(tcp + TCP_CHECKSUM, 0, 2)
    s = sum_bytes(tcp, g.head - g.l4, <uint64_t>g.pseudo + length_word(g.head - g.l4 + payload))
    value = ~fold(sum_bytes(g.frame + g.head + at, payload, s))
    memcpy(tcp + TCP_CHECKSUM, &value, 2)
    return payload


cdef bint checksum_fill(uint8_t *vnet, uint32_t size) noexcept nogil:
    cdef uint32_t start, field
    cdef uint8_t *frame = vnet + VNET_SIZE
    cdef uint16_t value
    if not vnet[0] & NEEDS_CSUM:
        return True
    start = little16(vnet + 6)
    field = start + little16(vnet + 8)
    if field + 2 > size:
        return False
    # The field holds the sum of the pseudo-header and is part of what is summed (5.1.6.2).
    value = ~fold(sum_bytes(frame + start, size - start, 0))
    if value == 0:
        value = 0xFFFF  # RFC 768: zero says that there is none; to all others the two are the same
    memcpy(frame + field, &value, 2)
    return True
