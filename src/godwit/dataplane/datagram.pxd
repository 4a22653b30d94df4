# SPDX-License-Identifier: GPL-2.0-or-later
"""UDP and ping: a connected datagram socket for each flow that the guest starts."""

from libc.stdint cimport uint32_t

from godwit.dataplane.packet cimport Packet
from godwit.dataplane.plane cimport Flow, Plane

cdef void udp_from_guest(Plane *p, Packet *k) noexcept nogil
cdef void ping_from_guest(Plane *p, Packet *k) noexcept nogil
# Datagrams (of either kind) that wait in the socket go to the guest.
cdef void datagram_from_sock(Plane *p, Flow *f) noexcept nogil
cdef void datagram_timer(Plane *p, Flow *f) noexcept nogil
