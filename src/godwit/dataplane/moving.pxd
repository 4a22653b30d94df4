# SPDX-License-Identifier: GPL-2.0-or-later
"""TCP flows as they leave the table."""

from godwit.dataplane.layouts cimport Moved
from godwit.dataplane.plane cimport Flow, Plane

cdef void moved_out(Plane *p, Flow *f, Moved *m) noexcept nogil
