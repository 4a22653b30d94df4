# SPDX-License-Identifier: GPL-2.0-or-later
"""What the parts of the engine share."""

from libc.stdint cimport uint8_t, uint16_t

from godwit.dataplane.plane cimport Plane

cdef class EngineBase:
    cdef Plane *p
    cdef object thread
    cdef object lock
    cdef int parks
    cdef _note_target(self, bytes addr)

# Raise OSError for a negative error number.
cdef object check(int rc, str what)
# `value` must be of just this size; ValueError.
cdef object copy_bytes(uint8_t *out, bytes value, int size, str what)
# Datagrams as a flow carries them, one behind the other.
cdef bytes carried_from(datagrams)
