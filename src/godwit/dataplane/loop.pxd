# SPDX-License-Identifier: GPL-2.0-or-later
"""The data plane's thread: one loop over kicks, sockets and timers."""

from libc.stdint cimport uint64_t

from godwit.dataplane.plane cimport Plane

# Runs until p.stop_wanted; 0, or a negative error number.
cdef int loop_run(Plane *p) noexcept nogil
# What the loop does after control has changed something, and one turn without waiting; in place of the thread. Negative:
# an error number.
cdef int loop_step(Plane *p) noexcept nogil
cdef void loop_wake(Plane *p) noexcept nogil
# Nanoseconds, of clock_gettime(2); and of CLOCK_MONOTONIC.
cdef uint64_t read_clock(int clock) noexcept nogil
cdef uint64_t clock_ns() noexcept nogil
cdef uint64_t clock_ms(Plane *p) noexcept nogil
