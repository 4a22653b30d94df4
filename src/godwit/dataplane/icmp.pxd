# SPDX-License-Identifier: GPL-2.0-or-later
"""ICMP and ICMPv6: echo through ping sockets, and errors either way."""

from libc.stdint cimport uint8_t, uint16_t

from godwit.dataplane.packet cimport Packet
from godwit.dataplane.plane cimport Flow, Plane
from godwit.dataplane.sys cimport iovec

cdef enum:
    PING_TIMEOUT = 60000    # ms; RFC 5508, 3.2

cdef void ping_from_guest(Plane *p, Packet *k) noexcept nogil
# The guest's echoes with that identifier to what it calls `our`; its socket
# connected, with the host's identifier `host_ident`, or 0: any. NULL: not to be had.
cdef Flow *ping_open(Plane *p, const uint8_t *guest, uint16_t ident, const uint8_t *our,
                     uint16_t host_ident) noexcept nogil
cdef void ping_from_sock(Plane *p, Flow *f) noexcept nogil
# What a socket's error queue has (of a UDP port or a ping) goes to the guest.
# `sending`: whose datagram the kernel has just refused; or NULL. Returns whether
# one was of the kernel's own: a datagram that is beyond the MTU.
cdef bint errors_from_sock(Plane *p, Flow *f, Flow *sending) noexcept nogil
# The kernel refused a datagram of the guest's, or its SYN, with this error number.
cdef void unreachable_to_guest(Plane *p, Flow *f, int why, const iovec *iov, int count) noexcept nogil
# The guest says that it cannot take a datagram.
cdef void error_from_guest(Plane *p, Packet *k) noexcept nogil
