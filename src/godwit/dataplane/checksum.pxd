# SPDX-License-Identifier: GPL-2.0-or-later
"""The Internet checksum (RFC 1071)."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from godwit.dataplane.sys cimport iovec

# Sums are kept unfolded in 64 bits, in network byte order; `odd` says that an
# odd number of bytes was summed before.
cdef uint64_t sum_bytes(const uint8_t *p, size_t n, uint64_t s) noexcept nogil
cdef uint64_t sum_iov(const iovec *iov, int count, size_t skip, size_t n, uint64_t s) noexcept nogil
cdef uint64_t sum_pseudo(const uint8_t *saddr, const uint8_t *daddr, bint v6, uint8_t proto, uint32_t n) noexcept nogil

cdef inline uint16_t fold(uint64_t s) noexcept nogil:
    s = (s & 0xFFFFFFFFU) + (s >> 32)
    s = (s & 0xFFFFFFFFU) + (s >> 32)
    s = (s & 0xFFFF) + (s >> 16)
    s = (s & 0xFFFF) + (s >> 16)
    return <uint16_t>s
