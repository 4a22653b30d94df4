# SPDX-License-Identifier: GPL-2.0-or-later
"""TCP flows as they leave the table and come into it."""

from godwit.dataplane.layouts cimport Moved
from godwit.dataplane.plane cimport Flow, Plane

cdef void moved_out(Plane *p, Flow *f, Moved *m) noexcept nogil
# A new flow, held, without a socket; -EEXIST: it is there already, -ENFILE: the table is full.
cdef int moved_in(Plane *p, const Moved *m, Flow **made) noexcept nogil
