# SPDX-License-Identifier: GPL-2.0-or-later
"""TCP towards the guest: segments, windows, and what is in flight."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from godwit.dataplane.packet cimport Packet
from godwit.dataplane.plane cimport FF_FOUND, FF_HELD, Flow, Plane
from godwit.dataplane.sys cimport EINVAL, EPERM, write

cdef enum:
    TCP_FIN = 0x01
    TCP_SYN = 0x02
    TCP_RST = 0x04
    TCP_PSH = 0x08
    TCP_ACK = 0x10
    TCP_HLEN = 20

cdef inline uint32_t in_flight(Flow *f) noexcept nogil:
    return f.seq_to_guest - f.seq_ack_from_guest

cdef inline bint hold_in_repair(Plane *p, Flow *f, int error) noexcept nogil:
    """Whether a socket's error says that it is in repair mode; the flow is held then, until control resumes it.

    Nobody sets that mode on a flow that runs, but for a helper that hung and
    acts late (godwit.daemon.rescue). The connection is whole.
    """
    cdef uint64_t one = 1
    if error != EINVAL and error != EPERM:
        return False
    f.flags |= FF_HELD | FF_FOUND
    p.found = True
    write(p.rare_event, &one, 8)
    return True

cdef uint16_t own_mss(Plane *p, bint v6) noexcept nogil
# A segment without payload. False: no receive buffer, nothing was sent.
cdef bint send_flags(Plane *p, Flow *f, uint32_t seq, uint8_t flags) noexcept nogil
# The reset that answers a segment of no connection; `t` is its TCP header.
cdef void send_reset_for(Plane *p, Packet *k, const uint8_t *t) noexcept nogil
# With the window as it is now. False: no receive buffer, nothing was sent, and nothing is granted.
cdef bint send_window(Plane *p, Flow *f, uint32_t seq, uint8_t flags) noexcept nogil
cdef void arm_retransmit(Plane *p, Flow *f) noexcept nogil
# 0, or a negative error number: the connection is broken.
cdef int send_data(Plane *p, Flow *f) noexcept nogil
# Take from the socket's queue what the guest has acknowledged.
cdef void discard(Plane *p, Flow *f) noexcept nogil
cdef void rewind(Plane *p, Flow *f) noexcept nogil
