# SPDX-License-Identifier: GPL-2.0-or-later
"""A datagram for the guest, of any protocol whose header is of 8 bytes (UDP, ICMP): whole or in fragments."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t

from godwit.dataplane.plane cimport Plane

cdef struct Datagram:
    bint v6
    uint8_t tos
    uint8_t proto
    uint8_t field               # offset of the checksum in the header
    const uint8_t *saddr
    const uint8_t *daddr
    uint8_t header[8]           # above IP; its checksum is filled in
    const uint8_t *payload
    uint32_t size               # of the payload
    uint32_t done               # bytes above IP that went in fragments; begins as 0, the caller keeps it
    uint32_t ident              # of the fragments; kept as well
    uint16_t gso                # not 0: UDP datagrams of this size (the last may be shorter), as one frame

cdef enum Delivery:
    DELIVERED
    DROPPED                     # and counted
    RING_SHORT                  # call again when there is room

# Whether so many bytes of payload go unfragmented, by the guest's MTU; only `v6` of the datagram counts.
cdef bint fits_mtu(Plane *p, Datagram *d, uint32_t size) noexcept nogil
cdef int datagram_to_guest(Plane *p, Datagram *d) noexcept nogil
