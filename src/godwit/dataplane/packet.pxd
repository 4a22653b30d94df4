# SPDX-License-Identifier: GPL-2.0-or-later
"""A frame from the guest, taken apart."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t

from godwit.dataplane.plane cimport HEADERS
from godwit.dataplane.sys cimport iovec

cdef struct Packet:
    uint8_t header[HEADERS]     # the frame's first bytes, copied: the guest cannot change them under us
    uint32_t size               # of the frame, without the vnet header
    bint v6
    uint8_t proto
    uint32_t l4                 # offset in the frame of what is above IP
    uint32_t l4_size            # its size as IP says, at most what is there
    uint8_t saddr[16]
    uint8_t daddr[16]
    uint8_t ttl                 # hop limit
    uint8_t tos                 # traffic class
    bint dont_fragment          # of IPv4, and what was never a fragment of IPv6
    bint fragment               # one, with the next three:
    bint more                   # others follow
    uint32_t offset             # in what was above IP, bytes
    uint32_t ident
    uint16_t gso                # not 0: a UDP frame to be cut up into datagrams of so many bytes
    # after the header of TCP, UDP or ICMP
    uint32_t payload            # offset in the frame
    uint32_t payload_size
    # the frame in guest memory
    iovec *iov
    int count
    uint32_t skip               # bytes of iov before the frame: the vnet header

# The `size` bytes of payload after `skip` of them, appended to out (room for
# `room`). Returns the elements added, or -1 if there is no room.
cdef int packet_payload(Packet *k, uint32_t skip, uint32_t size, iovec *out, int room) noexcept nogil
