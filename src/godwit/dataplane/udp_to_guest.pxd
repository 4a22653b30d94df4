# SPDX-License-Identifier: GPL-2.0-or-later
"""UDP from the host's sockets to the guest."""

from godwit.dataplane.plane cimport Flow, Plane

# What waits at a port's socket goes to the guest.
cdef void udp_from_sock(Plane *p, Flow *port) noexcept nogil
# Forget what waits at a forwarded port's socket: it was for a guest that is gone.
cdef void udp_drain(Plane *p, Flow *port) noexcept nogil
# Memory for what is taken in; 0 or a negative error number.
cdef int udp_init(Plane *p) noexcept nogil
cdef void udp_free(Plane *p) noexcept nogil
