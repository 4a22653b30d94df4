# SPDX-License-Identifier: GPL-2.0-or-later
"""TCP between the guest's segments and a host socket (RFC 9293)."""

from libc.stdint cimport uint32_t

from godwit.dataplane.packet cimport Packet
from godwit.dataplane.plane cimport Flow, Plane

cdef void tcp_from_guest(Plane *p, Packet *k) noexcept nogil
cdef void tcp_send_pending(Plane *p) noexcept nogil
cdef void tcp_from_sock(Plane *p, Flow *f, uint32_t events) noexcept nogil
cdef void tcp_settle(Plane *p, Flow *f) noexcept nogil
cdef void tcp_timer(Plane *p, Flow *f) noexcept nogil
# Reset both sides; the guest's as soon as its ring has room.
cdef void tcp_reset(Plane *p, Flow *f) noexcept nogil
# Note the socket's own address and port in the flow.
cdef void tcp_local_end(Flow *f) noexcept nogil
# Close the socket and reset the peer; the guest hears nothing.
cdef void tcp_drop_socket(Flow *f) noexcept nogil
cdef void tcp_abort(Plane *p, Flow *f) noexcept nogil
cdef void tcp_resume(Plane *p, Flow *f) noexcept nogil
cdef void tcp_hurry(Flow *f, bint on) noexcept nogil
