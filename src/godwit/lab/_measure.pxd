# cython: language_level=3
# SPDX-License-Identifier: GPL-2.0-or-later
"""What the bench's senders and receivers share: the clock, and words that two threads see."""

from libc.stdint cimport uint64_t
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

cdef extern from *:
    """
    static inline int flag_load(const int *p)
    { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
    static inline void flag_store(int *p, int v)
    { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
    static inline uint64_t count_load(const uint64_t *p)
    { return __atomic_load_n(p, __ATOMIC_RELAXED); }
    static inline void count_add(uint64_t *p, uint64_t more)
    { __atomic_store_n(p, *p + more, __ATOMIC_RELAXED); }  /* one thread writes */
    """
    int flag_load(const int *p) nogil
    void flag_store(int *p, int v) nogil
    uint64_t count_load(const uint64_t *p) nogil
    void count_add(uint64_t *p, uint64_t more) nogil


cdef inline uint64_t monotonic() noexcept nogil:
    """Nanoseconds."""
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <uint64_t>t.tv_sec * 1000000000U + <uint64_t>t.tv_nsec
