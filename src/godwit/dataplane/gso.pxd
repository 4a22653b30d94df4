# SPDX-License-Identifier: GPL-2.0-or-later
"""Offloads undone: a frame from the receive ring as one who knows no virtio header takes it.

The data plane leaves checksums and segmentation to the guest's driver (virtio
1.3, 5.1.6.4). Where that driver is ours and the guest is behind a stream
socket, both are done here.
"""

from libc.stdint cimport uint8_t, uint32_t

cdef enum:
    VNET_SIZE = 12          # struct virtio_net_hdr_v1
    GSO_HEADERS = 160       # room for the headers of a segment: Ethernet 14, IPv6 40 or IPv4 60, TCP 60
    GSO_LEAST = 64          # bytes of a segment; the data plane makes none that are smaller

# A frame of TCP that is to be sent in segments.
cdef struct Gso:
    const uint8_t *frame    # Ethernet header first
    uint32_t head           # bytes of headers
    uint32_t l4             # where TCP begins
    uint32_t size           # payload of a segment, but for the last
    uint32_t payload        # of all
    uint32_t count          # segments
    bint v6
    uint32_t pseudo         # sum of the pseudo-header without its length

# Whether the frame after the virtio header is to be segmented.
cdef bint gso_wanted(const uint8_t *vnet) noexcept nogil
# Read a frame of `size` bytes after its virtio header. False: they contradict each other.
cdef bint gso_read(Gso *g, const uint8_t *vnet, uint32_t size) noexcept nogil
# Write the headers of segment `index`, g.head bytes. Returns the size of its payload,
# which is at g.frame + g.head + index * g.size.
cdef uint32_t gso_headers(const Gso *g, uint32_t index, uint8_t *out) noexcept nogil
# Fill in the checksum that is due by the virtio header, if any. False: it lies outside of the frame.
cdef bint checksum_fill(uint8_t *vnet, uint32_t size) noexcept nogil
