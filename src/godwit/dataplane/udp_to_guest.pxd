# SPDX-License-Identifier: GPL-2.0-or-later
"""UDP from the host's sockets to the guest."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from godwit.dataplane.plane cimport Flow, Plane
from godwit.dataplane.sys cimport msghdr

# A message that came with a flow when it moved, or was taken from its socket
# to be moved; `size` bytes follow.
cdef struct Carried:
    uint8_t remote_addr[16]
    uint8_t local_addr[16]
    uint32_t scope          # of a link-local sender; 0: where the guest's network is
    uint32_t segment        # as in Seen
    uint32_t size
    uint16_t remote_port
    uint8_t tos

# What control messages said about a message.
cdef struct Seen:
    uint8_t tos
    uint32_t segment        # bytes; 0: it is one datagram
    uint8_t local_addr[16]  # where it was sent to; unspecified: not said

cdef void look_at_control(msghdr *m, Seen *seen) noexcept nogil

# What waits at a port's socket goes to the guest.
cdef void udp_from_sock(Plane *p, Flow *port) noexcept nogil
# Move what waits in a port's socket to the end of what the port carries, up to
# `most` bytes, of which each datagram takes `cost` besides its data. True: the
# socket is empty; else the rest stays there, also where there is no memory.
cdef bint udp_take_waiting(Flow *port, uint64_t most, uint32_t cost) noexcept nogil
# Forget what waits at a forwarded port's socket: it was for a guest that is gone.
cdef void udp_drain(Plane *p, Flow *port) noexcept nogil
# Memory for what is taken in; 0 or a negative error number.
cdef int udp_init(Plane *p) noexcept nogil
cdef void udp_free(Plane *p) noexcept nogil
