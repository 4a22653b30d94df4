# SPDX-License-Identifier: GPL-2.0-or-later

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from godwit.dataplane.sys cimport iovec


cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>
    /* 64 bytes at a time, their 32-bit halves added up in lanes of 64 bits: the checksum of
       a full segment is most of what a frame costs besides the copies of its payload. */
    typedef uint64_t gw_lanes __attribute__((vector_size(16)));
    static uint64_t gw_sum_blocks(const uint8_t *p, size_t blocks)
    {
        const gw_lanes low = {0xffffffffu, 0xffffffffu};
        gw_lanes v[4], a = {0, 0}, b = {0, 0}, c = {0, 0}, d = {0, 0};
        for (; blocks; blocks--, p += sizeof(v)) {
            memcpy(v, p, sizeof(v));
            a += (v[0] & low) + (v[0] >> 32);
            b += (v[1] & low) + (v[1] >> 32);
            c += (v[2] & low) + (v[2] >> 32);
            d += (v[3] & low) + (v[3] >> 32);
        }
        a += b + c + d;
        return a[0] + a[1];
    }
    """
    uint64_t sum_blocks "gw_sum_blocks"(const uint8_t *p, size_t blocks) nogil


cdef uint64_t sum_bytes(const uint8_t *p, size_t n, uint64_t s) noexcept nogil:
    """Add n bytes, which start at an even offset of what is summed.

    The sum is of words in memory order, which RFC 1071 (2.B) allows: the
    folded result is in network byte order when stored as it is.
    """
    cdef uint32_t w
    cdef uint16_t h = 0
    if n >= 64:
        s += sum_blocks(p, n // 64)
        p += n & ~<size_t>63
        n &= 63
    while n >= 4:
        memcpy(&w, p, 4)
        s += w
        p += 4
        n -= 4
    if n >= 2:
        memcpy(&h, p, 2)
        s += h
        p += 2
        n -= 2
    if n:
        s += p[0]
    return s


cdef uint64_t sum_iov(const iovec *iov, int count, size_t skip, size_t n, uint64_t s) noexcept nogil:
    """Add n bytes of an iovec, after the first `skip`."""
    cdef int i
    cdef size_t take
    cdef const uint8_t *p
    cdef bint odd = False
    cdef uint64_t part
    for i in range(count):
        if skip >= iov[i].iov_len:
            skip -= iov[i].iov_len
            continue
        if n == 0:
            break
        p = <const uint8_t *>iov[i].iov_base + skip
        take = iov[i].iov_len - skip
        skip = 0
        if take > n:
            take = n
        part = fold(sum_bytes(p, take, 0))
        if odd:
            part = ((part & 0xFF) << 8) | (part >> 8)
        s += part
        odd ^= take & 1
        n -= take
    return s


cdef uint64_t sum_pseudo(const uint8_t *saddr, const uint8_t *daddr, bint v6, uint8_t proto, uint32_t n) noexcept nogil:
    """The pseudo-header of TCP, UDP (RFC 9293, 3.1) and ICMPv6 (RFC 8200, 8.1).

    Addresses are 16 bytes, IPv4 as v4-mapped.
    """
    cdef uint64_t s
    cdef int skip = 0 if v6 else 12
    s = sum_bytes(saddr + skip, 16 - skip, 0)
    s = sum_bytes(daddr + skip, 16 - skip, s)
    # In memory order, as sum_bytes adds them.
    s += <uint64_t>proto << 8
    s += ((n & 0xFF) << 8) | ((n >> 8) & 0xFF)
    s += (((n >> 16) & 0xFF) << 8) | ((n >> 24) & 0xFF)
    return s
