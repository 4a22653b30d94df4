# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest memory: the regions that the front-end shares, and the dirty log.

``translate`` is the only function that turns a number from the guest into a
pointer; everything else works on what it returned.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef enum:
    MAX_REGIONS = 64    # as many memory slots as QEMU's own vhost-user limit has use for
    LOG_PAGE_SHIFT = 12 # vhost-user, "Migration": one bit for each page of 4096 bytes

cdef struct Region:
    uint64_t guest_addr    # first guest-physical address
    uint64_t size          # bytes
    uint64_t user_addr     # the same place in the front-end's address space
    uint8_t *base          # and in ours
    void *mapping
    size_t mapping_size
    int fd                 # what is mapped; kept for who takes this over (handover.pyx)

cdef struct Memory:
    Region regions[MAX_REGIONS]
    int count
    uint8_t *log           # NULL while no log is mapped
    uint64_t log_size      # bytes
    void *log_mapping
    size_t log_mapping_size
    bint log_all           # VHOST_F_LOG_ALL is on: every written buffer is marked
    uint32_t losses        # of all the process's mappings, when these were last looked at; 0: they are to be
    bint gone              # one of these was lost

# A pointer to `addr` in guest-physical memory, NULL outside of it. `*got` is
# how many of the `want` bytes lie there in one piece (at least 1).
cdef uint8_t *translate(Memory *m, uint64_t addr, uint64_t want, uint64_t *got) noexcept nogil
# The same for an address of the front-end (ring addresses come as these);
# all `want` bytes must lie in one region. `*guest_addr` is what the log needs.
cdef uint8_t *translate_user(Memory *m, uint64_t addr, uint64_t want, uint64_t *guest_addr) noexcept nogil
cdef void log_write(Memory *m, uint64_t addr, uint64_t size) noexcept nogil

# Map a region. Its descriptor is the memory's from then on; if this fails it stays the caller's.
cdef int memory_add(Memory *m, uint64_t guest_addr, uint64_t size, uint64_t user_addr,
                    uint64_t offset, int fd) noexcept nogil
cdef int memory_remove(Memory *m, uint64_t guest_addr, uint64_t size, uint64_t user_addr) noexcept nogil
cdef void memory_clear(Memory *m) noexcept nogil
cdef int memory_set_log(Memory *m, int fd, uint64_t size, uint64_t offset) noexcept nogil
cdef void memory_clear_log(Memory *m) noexcept nogil
# Whether a file of these has been cut off: it reads as zeros then, and what is written to it is lost.
cdef bint memory_gone(Memory *m) noexcept nogil
