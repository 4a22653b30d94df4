# SPDX-License-Identifier: GPL-2.0-or-later
"""The host is short of something.

What that means for a flow is decided where it happens. Here it is noted for the
control thread, which has a log: once for each kind of shortage, until control
wants to hear of it again (`Engine.watch_shortages`).
"""

from libc.stdint cimport uint32_t, uint64_t

from godwit.dataplane.plane cimport (
    SHORT_DESCRIPTORS,
    SHORT_MEMORY,
    SHORT_PLACES,
    SHORT_PORTS,
    Plane,
)
from godwit.dataplane.sys cimport EADDRNOTAVAIL, EMFILE, ENFILE, ENOBUFS, ENOMEM, write

SHORTAGES = {
    SHORT_DESCRIPTORS: "descriptors",
    SHORT_MEMORY: "memory",
    SHORT_PORTS: "ports",
    SHORT_PLACES: "places",
}


cdef bint shortage(Plane *p, int why) noexcept nogil:
    if why == EMFILE or why == ENFILE:
        shortage_of(p, SHORT_DESCRIPTORS)
    elif why == ENOMEM or why == ENOBUFS:
        shortage_of(p, SHORT_MEMORY)
    elif why == EADDRNOTAVAIL:
        shortage_of(p, SHORT_PORTS)
    else:
        return False
    return True


cdef void shortage_of(Plane *p, int what) noexcept nogil:
    cdef uint64_t one = 1
    if p.short_told & <uint32_t>what:
        return
    p.short_told |= <uint32_t>what
    p.short_of |= <uint32_t>what
    write(p.rare_event, &one, 8)
