# SPDX-License-Identifier: GPL-2.0-or-later
"""Datagrams that the guest sends in fragments, put together (RFC 791, RFC 8200, 4.5)."""

from godwit.dataplane.packet cimport Packet
from godwit.dataplane.plane cimport Plane

# A fragment. True: it was the last that was missing, and the packet is now the
# whole. Its payload stays where it is until the next call.
cdef bint fragment_in(Plane *p, Packet *k) noexcept nogil
cdef int reassembly_init(Plane *p) noexcept nogil
cdef void reassembly_free(Plane *p) noexcept nogil
