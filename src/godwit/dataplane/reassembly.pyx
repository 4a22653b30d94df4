# SPDX-License-Identifier: GPL-2.0-or-later
"""Datagrams that the guest sends in fragments, put together (RFC 791, 3.2; RFC 8200, 4.5).

A few at a time: a guest sends the fragments of a datagram one after the other.
Where there are more, the oldest that is not complete is given up. Nothing is
timed: what has been incomplete for too long is only not continued. Fragments
that overlap make the whole invalid (RFC 5722), the same once more does not.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from godwit.dataplane.packet cimport Packet, packet_payload
from godwit.dataplane.plane cimport (
    DROP_FRAGMENT,
    DROP_MALFORMED,
    HEADERS,
    PARTIAL_SIZE,
    PARTIALS,
    Partial,
    Plane,
    drop,
)
from godwit.dataplane.sys cimport (
    ENOMEM,
    MAP_ANONYMOUS,
    MAP_FAILED,
    MAP_NORESERVE,
    MAP_PRIVATE,
    PROT_READ,
    PROT_WRITE,
    iovec,
    mmap,
    munmap,
)
from godwit.dataplane.virtqueue cimport MAX_CHAIN

cdef enum:
    TIMEOUT = 60000     # ms; RFC 8200, 4.5
    MOST = 65535        # bytes of a datagram above IP


cdef int reassembly_init(Plane *p) noexcept nogil:
    cdef int i
    cdef uint8_t *data = <uint8_t *>mmap(NULL, PARTIALS * PARTIAL_SIZE, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if data == MAP_FAILED:
        return -ENOMEM
    for i in range(PARTIALS):
        p.fragments.partials[i].data = data + i * PARTIAL_SIZE
    return 0


cdef void reassembly_free(Plane *p) noexcept nogil:
    if p.fragments.partials[0].data != NULL:
        munmap(p.fragments.partials[0].data, PARTIALS * PARTIAL_SIZE)
        p.fragments.partials[0].data = NULL


cdef bint belongs(Plane *p, Partial *part, Packet *k) noexcept nogil:
    return (part.used and part.v6 == k.v6 and part.proto == k.proto and part.ident == k.ident
            and p.now - part.since < TIMEOUT
            and memcmp(part.saddr, k.saddr, 16) == 0 and memcmp(part.daddr, k.daddr, 16) == 0)


cdef Partial *partial_for(Plane *p, Packet *k) noexcept nogil:
    """What the fragment belongs to; a new one, in the place of the oldest, if nothing of it has come."""
    cdef Partial *part
    cdef Partial *chosen = NULL
    cdef int i
    for i in range(PARTIALS):
        part = &p.fragments.partials[i]
        if belongs(p, part, k):
            return part
        if chosen == NULL or (chosen.used and (not part.used or part.since < chosen.since)):
            chosen = part
    if chosen.used:
        drop(p, DROP_FRAGMENT)
    chosen.used = True
    chosen.v6 = k.v6
    chosen.proto = k.proto
    chosen.ident = k.ident
    memcpy(chosen.saddr, k.saddr, 16)
    memcpy(chosen.daddr, k.daddr, 16)
    chosen.since = p.now
    chosen.size = chosen.have = chosen.end = chosen.header_size = 0
    memset(chosen.map, 0, sizeof(chosen.map))
    return chosen


cdef int note(Partial *part, uint32_t first, uint32_t count) noexcept nogil:
    """Mark units of 8 bytes as come. How many of them were there before."""
    cdef uint32_t i, before = 0
    cdef uint64_t bit
    for i in range(first, first + count):
        bit = <uint64_t>1 << (i & 63)
        if part.map[i >> 6] & bit:
            before += 1
        part.map[i >> 6] |= bit
    return before


cdef bint give_up(Plane *p, Partial *part, int reason) noexcept nogil:
    part.used = False
    drop(p, reason)
    return False


cdef bint fragment_in(Plane *p, Packet *k) noexcept nogil:
    cdef Partial *part
    cdef iovec *iov = p.rx.view     # free while a frame from the guest is worked on
    cdef uint32_t at, units, seen
    cdef int i, n
    if k.l4_size == 0 or (k.more and k.l4_size & 7) or k.offset + k.l4_size > MOST:
        drop(p, DROP_MALFORMED)
        return False
    part = partial_for(p, k)
    if not k.more:
        if part.size and part.size != k.offset + k.l4_size:
            return give_up(p, part, DROP_FRAGMENT)
        part.size = k.offset + k.l4_size
    if part.end < k.offset + k.l4_size:
        part.end = k.offset + k.l4_size
    if part.size and part.end > part.size:
        return give_up(p, part, DROP_FRAGMENT)
    units = (k.l4_size + 7) >> 3
    seen = note(part, k.offset >> 3, units)
    if seen == units:
        return False            # once more the same
    if seen:
        return give_up(p, part, DROP_FRAGMENT)
    k.payload = k.l4
    n = packet_payload(k, 0, k.l4_size, iov, MAX_CHAIN)
    if n < 0:
        return give_up(p, part, DROP_MALFORMED)
    at = k.offset
    for i in range(n):
        memcpy(part.data + at, iov[i].iov_base, iov[i].iov_len)
        at += <uint32_t>iov[i].iov_len
    part.have += k.l4_size
    if k.offset == 0:
        part.header_size = k.l4
        memcpy(part.header, k.header, k.l4)
    if part.size == 0 or part.have < part.size:
        return False
    # All is there, the first fragment as well.
    part.used = False
    k.iov = p.fragments.iov
    k.iov[0].iov_base = part.header
    k.iov[0].iov_len = part.header_size
    k.iov[1].iov_base = part.data
    k.iov[1].iov_len = part.size
    k.count = 2
    k.skip = 0
    k.size = part.header_size + part.size
    k.l4 = part.header_size
    k.l4_size = part.size
    k.dont_fragment = k.fragment = False
    k.payload = k.payload_size = 0
    k.gso = 0
    memcpy(k.header, part.header, part.header_size)
    n = HEADERS - part.header_size
    memcpy(k.header + part.header_size, part.data, part.size if part.size < <uint32_t>n else n)
    return True
