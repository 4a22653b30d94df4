# SPDX-License-Identifier: GPL-2.0-or-later
"""UDP from the host's sockets to the guest."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t

from godwit.dataplane.plane cimport Flow, Plane
from godwit.dataplane.sys cimport msghdr

# A datagram that came with a flow when it moved; `size` bytes follow.
cdef struct Carried:
    uint8_t remote_addr[16]
    uint8_t local_addr[16]
    uint16_t remote_port
    uint32_t size

# What control messages said about a message.
cdef struct Seen:
    uint8_t tos
    uint32_t segment        # bytes; 0: it is one datagram
    uint8_t local_addr[16]  # where it was sent to; unspecified: not said

cdef void look_at_control(msghdr *m, Seen *seen) noexcept nogil

# What waits at a port's socket goes to the guest.
cdef void udp_from_sock(Plane *p, Flow *port) noexcept nogil
# Forget what waits at a forwarded port's socket: it was for a guest that is gone.
cdef void udp_drain(Plane *p, Flow *port) noexcept nogil
# Memory for what is taken in; 0 or a negative error number.
cdef int udp_init(Plane *p) noexcept nogil
cdef void udp_free(Plane *p) noexcept nogil
