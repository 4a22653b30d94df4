# SPDX-License-Identifier: GPL-2.0-or-later
"""UDP: one socket for each port of the guest's, shared by all its peers (RFC 4787)."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t

from godwit.dataplane.packet cimport Packet
from godwit.dataplane.plane cimport Flow, Plane

# What tells UDP ports of the same number apart in the flow table, in `our_port`.
cdef enum PortClass:
    PORT_OWN = 0            # opened when the guest first sent from it
    PORT_LOOPBACK           # the same, for what the host's loopback is to get
    PORT_FORWARDED          # on every address: what the guest sends from this port leaves through it
    PORT_FORWARDED_AT       # on one address or interface

cdef void udp_from_guest(Plane *p, Packet *k) noexcept nogil
# Hand the datagrams over that wait in p.udp_out; they still refer to the guest's buffers.
cdef void udp_flush(Plane *p) noexcept nogil
# Set up a socket's options for UDP either way; `forwarded`: tell where each datagram was sent to.
cdef void udp_prepare(int fd, bint v6, bint v4, bint forwarded) noexcept nogil
# A forwarded port, without its socket. It was there before any limit was set, and counts for none. NULL: the flow table
# is full.
cdef Flow *udp_new_forward(Plane *p, const uint8_t *guest_addr, uint16_t guest_port, int port_class) noexcept nogil
# Have what comes to a socket go to a port of the guest's, or of another address behind its MAC address (16 zeros: its
# own). 0, or an error; -ENFILE: the flow table is full.
cdef int udp_forward(Plane *p, int fd, const uint8_t *guest_addr, uint16_t guest_port) noexcept nogil

# Whether there may be one more UDP flow or ping of the guest's, `with_socket` of its own; of those that were idle for
# longest one is closed for it, if need be. 0, or the reason to drop the frame plus 1. No flow's address holds after it.
cdef int udp_room(Plane *p, bint with_socket) noexcept nogil

# The flow of a datagram (or of an error about one) between a port and a peer
# of the host's side; NULL: there is none.
cdef Flow *udp_peer(Plane *p, Flow *port, const uint8_t *remote, uint16_t remote_port) noexcept nogil
# A new one, with these flags and that of its family. NULL: as many are there as there may be.
cdef Flow *udp_add_peer(Plane *p, Flow *port, const uint8_t *guest_addr, const uint8_t *our_addr,
                        const uint8_t *remote, uint16_t remote_port, uint32_t flags) noexcept nogil
# Whether one is remembered that others begin; what comes is delivered all the same. The guest shall always find a place
# for its own: in the table, and within what it may have.
cdef bint udp_remembers_others(Plane *p) noexcept nogil
# Whether the guest has used the flow of late: what comes from the peer is for the address that it did so from.
cdef bint udp_is_held(Plane *p, Flow *f) noexcept nogil
# The flow was used: it lives for so much longer.
cdef void udp_used(Plane *p, Flow *f) noexcept nogil
