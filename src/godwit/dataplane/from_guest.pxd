# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames from the guest: taken off the transmit ring and sent their way."""

from godwit.dataplane.plane cimport Plane

cdef enum:
    TX_BATCH = 256          # frames

# Work through the transmit ring, at most one batch; p.again if more waits.
cdef void frames_from_guest(Plane *p) noexcept nogil
