# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames to the guest: receive buffers, headers, and the small frames whole."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t

from godwit.dataplane.plane cimport Plane
from godwit.dataplane.sys cimport iovec

cdef enum:
    # virtio 1.2, 5.1.6
    VNET_F_NEEDS_CSUM = 1
    VNET_GSO_NONE = 0
    VNET_GSO_TCPV4 = 1
    VNET_GSO_TCPV6 = 4
    VNET_GSO_UDP_L4 = 5     # virtio 1.3
    IPV4_HLEN = 20
    IPV6_HLEN = 40
    # the longest headers that we write: vnet 12, Ethernet 14, IPv6 40, TCP 20 + 40 of options
    MAX_HEADERS = 128

# Pick receive buffers for `want` bytes, the vnet header included, into p.rx.
# Returns their capacity: less than wanted if the ring runs short, 0 if empty.
cdef uint32_t rx_reserve(Plane *p, uint32_t want) noexcept nogil
# And for one frame more, behind those. False: there is no room for all of it, and nothing is picked.
cdef bint rx_reserve_another(Plane *p, uint32_t want) noexcept nogil
# Add to p.rx.view the buffers of the frame picked last after `skip` bytes, `limit` bytes at most. Returns its count.
cdef int rx_view(Plane *p, uint32_t skip, uint32_t limit) noexcept nogil
# Write the headers of the next frame and hand `total` bytes (headers and payload) to the guest. Of several
# frames each but the last to be finished must be as large as it was wanted.
cdef void rx_finish(Plane *p, uint8_t *headers, uint32_t size, uint32_t total) noexcept nogil

# vnet, Ethernet and IP headers for `payload` bytes above IP. Returns their size.
cdef uint32_t put_headers(Plane *p, uint8_t *h, bint v6, const uint8_t *saddr,
                          const uint8_t *daddr, uint8_t proto, uint32_t payload) noexcept nogil
# The checksum of what is above IP: left to the guest where it takes that, else made here.
cdef void put_checksum(Plane *p, uint8_t *h, uint32_t l4, uint32_t field, uint32_t size, uint32_t payload,
                       bint v6, const uint8_t *saddr, const uint8_t *daddr, uint8_t proto) noexcept nogil
# A whole Ethernet frame, copied. False: no room in the ring.
cdef bint frame_to_guest(Plane *p, const uint8_t *frame, uint32_t size) noexcept nogil
