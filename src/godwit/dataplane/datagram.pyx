# SPDX-License-Identifier: GPL-2.0-or-later

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from godwit.dataplane.checksum cimport fold, sum_bytes, sum_pseudo
from godwit.dataplane.plane cimport DROP_MALFORMED, DROP_RING_FULL, ETH_HLEN, HEADERS, Plane, RxBuf, drop
from godwit.dataplane.sys cimport IPPROTO_ICMP, IPPROTO_UDP, put16, put32
from godwit.dataplane.to_guest cimport (
    IPV4_HLEN,
    IPV6_HLEN,
    VNET_F_NEEDS_CSUM,
    VNET_GSO_UDP_L4,
    put_headers,
    rx_finish,
    rx_reserve,
    rx_view,
)
from godwit.dataplane.virtqueue cimport RX, queue_active

cdef enum:
    L4_HLEN = 8
    FRAGMENT_HLEN = 8       # of IPv6 (RFC 8200, 4.5)
    IPV6_FRAGMENT = 44
    IPV4_MORE = 0x2000
    SMALL = 2048 + HEADERS  # bytes that a ring of a guest's is expected to have room for, sooner or later


cdef void put_tos(uint8_t *ip, bint v6, uint8_t tos) noexcept nogil:
    """Set the traffic class of an IP header that is complete otherwise."""
    cdef uint16_t value
    if v6:
        ip[0] = 0x60 | tos >> 4
        ip[1] = <uint8_t>(tos << 4)
        return
    ip[1] = tos
    memset(ip + 10, 0, 2)
    value = ~fold(sum_bytes(ip, IPV4_HLEN, 0))
    memcpy(ip + 10, &value, 2)


cdef void put_l4(Plane *p, uint8_t *h, Datagram *d, uint32_t l4, bint complete) noexcept nogil:
    """The header above IP, with its checksum: left to the guest where it takes that, and it need not be complete."""
    cdef uint64_t s = 0
    cdef uint16_t value
    memset(d.header + d.field, 0, 2)
    if d.proto != IPPROTO_ICMP:
        s = sum_pseudo(d.saddr, d.daddr, d.v6, d.proto, L4_HLEN + d.size)
    if d.proto == IPPROTO_UDP and p.guest_csum and not complete:
        value = fold(s)
        h[0] |= VNET_F_NEEDS_CSUM
        h[6] = (l4 - p.vnet_size) & 0xFF    # csum_start and csum_offset, little-endian
        h[7] = (l4 - p.vnet_size) >> 8
        h[8] = d.field
        h[9] = 0
    else:
        s = sum_bytes(d.header, L4_HLEN, s)
        value = ~fold(sum_bytes(d.payload, d.size, s))
        if value == 0 and d.proto == IPPROTO_UDP:
            value = 0xFFFF  # RFC 768: zero says that there is none
    memcpy(d.header + d.field, &value, 2)
    memcpy(h + l4, d.header, L4_HLEN)


cdef void copy_out(Plane *p, uint32_t head, const uint8_t *data, uint32_t size) noexcept nogil:
    """Payload into the buffers that are picked, behind `head` bytes of headers."""
    cdef int i, n = rx_view(p, head, size)
    for i in range(n):
        memcpy(p.rx.view[i].iov_base, data, p.rx.view[i].iov_len)
        data += p.rx.view[i].iov_len


cdef int no_room(Plane *p, uint32_t size, bint wait) noexcept nogil:
    """The ring has less than the `size` bytes that are needed: drop the frame, or wait for more.

    Wait for what the guest gives without our doing: for some such buffer, or
    for so many as are half of those that it has once given. No driver keeps
    back more than half of its buffers while it waits for frames.
    """
    cdef RxBuf *rx = &p.rx
    if p.mergeable and rx.chains == rx.pending:     # else there are more, and they do not help
        if size <= SMALL or <uint64_t>size * rx.chains <= <uint64_t>rx.capacity * (p.queues[RX].most >> 1):
            wait = True
    if wait or rx.capacity == 0:
        return RING_SHORT
    drop(p, DROP_RING_FULL)
    return DROPPED


cdef int in_fragments(Plane *p, Datagram *d, uint8_t *h, uint32_t l4) noexcept nogil:
    """`h` has the headers up to `l4`, for the datagram as a whole."""
    cdef uint32_t ip = p.vnet_size + ETH_HLEN
    cdef uint32_t total = L4_HLEN + d.size
    cdef uint32_t head = l4 + (FRAGMENT_HLEN if d.v6 else 0)
    # Every fragment but the last is a multiple of 8 bytes (RFC 791, 3.2).
    cdef uint32_t each = (p.config.mtu - (head - ip)) & ~7U
    cdef uint32_t at, part, capacity
    cdef uint16_t value, more
    if d.done == 0:
        put_l4(p, h, d, l4, True)
        d.ident = p.fragment_ident
        p.fragment_ident += 1
    while d.done < total:
        at = d.done
        part = each if total - at > each else total - at
        capacity = rx_reserve(p, head + part)
        if capacity < head + part:
            return no_room(p, head + part, False)
        more = 1 if at + part < total else 0
        if d.v6:
            put16(h + ip + 4, <uint16_t>(FRAGMENT_HLEN + part))
            h[ip + 6] = IPV6_FRAGMENT
            h[l4] = d.proto
            h[l4 + 1] = 0
            put16(h + l4 + 2, <uint16_t>(at | more))
            put32(h + l4 + 4, d.ident)
        else:
            put16(h + ip + 2, <uint16_t>(IPV4_HLEN + part))
            put16(h + ip + 4, <uint16_t>d.ident)
            put16(h + ip + 6, <uint16_t>(at >> 3 | (IPV4_MORE if more else 0)))
            memset(h + ip + 10, 0, 2)
            value = ~fold(sum_bytes(h + ip, IPV4_HLEN, 0))
            memcpy(h + ip + 10, &value, 2)
        if at == 0:
            memcpy(h + head, d.header, L4_HLEN)
            copy_out(p, head + L4_HLEN, d.payload, part - L4_HLEN)
            rx_finish(p, h, head + L4_HLEN, head + part)
        else:
            copy_out(p, head, d.payload + at - L4_HLEN, part)
            rx_finish(p, h, head, head + part)
        d.done += part
    return DELIVERED


cdef bint fits_mtu(Plane *p, Datagram *d, uint32_t size) noexcept nogil:
    return p.config.mtu == 0 or (IPV6_HLEN if d.v6 else IPV4_HLEN) + L4_HLEN + size <= p.config.mtu


cdef int datagram_to_guest(Plane *p, Datagram *d) noexcept nogil:
    cdef uint8_t h[HEADERS]
    cdef uint32_t ip = p.vnet_size + ETH_HLEN
    cdef uint32_t l4 = ip + (IPV6_HLEN if d.v6 else IPV4_HLEN)
    cdef uint32_t head = l4 + L4_HLEN
    cdef uint32_t capacity
    if not queue_active(&p.queues[RX]):
        return RING_SHORT
    # IPv4 counts its own header (RFC 791, 3.1), IPv6 what follows it (RFC 8200, 3).
    if L4_HLEN + d.size + (0 if d.v6 else IPV4_HLEN) > 65535:
        drop(p, DROP_MALFORMED)
        return DROPPED
    put_headers(p, h, d.v6, d.saddr, d.daddr, d.proto, L4_HLEN + d.size)
    if d.tos:
        put_tos(h + ip, d.v6, d.tos)
    if d.gso == 0 and not fits_mtu(p, d, d.size):
        return in_fragments(p, d, h, l4)
    capacity = rx_reserve(p, head + d.size)
    if capacity < head + d.size:
        # What can be cut up waits to be; and without mergeable buffers there is never more than the one.
        return no_room(p, head + d.size, d.gso != 0)
    copy_out(p, head, d.payload, d.size)
    put_l4(p, h, d, l4, False)
    if d.gso:
        h[1] = VNET_GSO_UDP_L4
        h[2] = head - p.vnet_size       # hdr_len and gso_size, little-endian
        h[3] = 0
        h[4] = d.gso & 0xFF
        h[5] = d.gso >> 8
    rx_finish(p, h, head, head + d.size)
    return DELIVERED
