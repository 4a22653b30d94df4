# SPDX-License-Identifier: GPL-2.0-or-later
"""The host is short of something: control is told once, however often it happens."""

from godwit.dataplane.plane cimport Plane

# The kernel gave nothing, with this error number. True: for want of descriptors, memory or ports, which come back.
cdef bint shortage(Plane *p, int why) noexcept nogil
# These bits of plane.Shortage.
cdef void shortage_of(Plane *p, int what) noexcept nogil
