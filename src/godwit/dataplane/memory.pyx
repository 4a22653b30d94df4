# SPDX-License-Identifier: GPL-2.0-or-later

from libc.stdint cimport uint8_t, uint64_t

from godwit.dataplane.sys cimport (
    EINVAL,
    MAP_FAILED,
    MAP_NORESERVE,
    MAP_SHARED,
    PROT_READ,
    PROT_WRITE,
    close,
    errno,
    fstat,
    mmap,
    munmap,
    off_t,
    or8,
    stat_t,
)


cdef uint8_t *translate(Memory *m, uint64_t addr, uint64_t want, uint64_t *got) noexcept nogil:
    cdef int i
    cdef uint64_t offset, left
    for i in range(m.count):
        # Unsigned: an address below the region wraps to a huge offset.
        offset = addr - m.regions[i].guest_addr
        if offset < m.regions[i].size:
            left = m.regions[i].size - offset
            got[0] = want if want < left else left
            return m.regions[i].base + offset
    return NULL


cdef uint8_t *translate_user(Memory *m, uint64_t addr, uint64_t want, uint64_t *guest_addr) noexcept nogil:
    cdef int i
    cdef uint64_t offset
    for i in range(m.count):
        offset = addr - m.regions[i].user_addr
        if offset < m.regions[i].size and want <= m.regions[i].size - offset:
            guest_addr[0] = m.regions[i].guest_addr + offset
            return m.regions[i].base + offset
    return NULL


cdef void log_write(Memory *m, uint64_t addr, uint64_t size) noexcept nogil:
    cdef uint64_t page, last
    if m.log == NULL or size == 0:
        return
    page = addr >> LOG_PAGE_SHIFT
    last = (addr + size - 1) >> LOG_PAGE_SHIFT
    while page <= last:
        if page >> 3 >= m.log_size:
            return
        # The front-end reads and clears the bitmap meanwhile: atomically.
        or8(m.log + (page >> 3), <uint8_t>(1 << (page & 7)))
        page += 1


cdef int map_file(int fd, uint64_t size, uint64_t offset, void **mapping, size_t *mapping_size) noexcept nogil:
    """Map `size` bytes from `offset` of fd; 0, or a negative error number."""
    cdef stat_t st
    cdef uint64_t whole = size + offset
    if size == 0 or whole < size or whole > (<uint64_t>1 << 62):
        return -EINVAL
    if fstat(fd, &st) != 0:
        return -errno
    # A file that is too short would give SIGBUS at the first touch.
    if <uint64_t>st.st_size < whole:
        return -EINVAL
    # From offset 0, since a mapping of huge pages takes no other start.
    mapping[0] = mmap(NULL, whole, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, <off_t>0)
    if mapping[0] == MAP_FAILED:
        mapping[0] = NULL
        return -errno
    mapping_size[0] = whole
    return 0


cdef int memory_add(Memory *m, uint64_t guest_addr, uint64_t size, uint64_t user_addr,
                    uint64_t offset, int fd) noexcept nogil:
    cdef Region *r
    cdef int i, rc
    if m.count >= MAX_REGIONS:
        return -EINVAL
    if guest_addr + size < guest_addr or user_addr + size < user_addr:
        return -EINVAL
    for i in range(m.count):
        r = &m.regions[i]
        if guest_addr < r.guest_addr + r.size and r.guest_addr < guest_addr + size:
            return -EINVAL
        if user_addr < r.user_addr + r.size and r.user_addr < user_addr + size:
            return -EINVAL
    r = &m.regions[m.count]
    rc = map_file(fd, size, offset, &r.mapping, &r.mapping_size)
    if rc != 0:
        return rc
    r.base = <uint8_t *>r.mapping + offset
    r.guest_addr = guest_addr
    r.user_addr = user_addr
    r.size = size
    r.fd = fd
    m.count += 1
    return 0


cdef void unmap(Region *r) noexcept nogil:
    munmap(r.mapping, r.mapping_size)
    close(r.fd)


cdef int memory_remove(Memory *m, uint64_t guest_addr, uint64_t size, uint64_t user_addr) noexcept nogil:
    cdef int i
    cdef Region *r
    for i in range(m.count):
        r = &m.regions[i]
        if r.guest_addr == guest_addr and r.size == size and r.user_addr == user_addr:
            unmap(r)
            m.count -= 1
            m.regions[i] = m.regions[m.count]
            return 0
    return -EINVAL


cdef void memory_clear(Memory *m) noexcept nogil:
    cdef int i
    for i in range(m.count):
        unmap(&m.regions[i])
    m.count = 0


cdef int memory_set_log(Memory *m, int fd, uint64_t size, uint64_t offset) noexcept nogil:
    cdef void *mapping
    cdef size_t mapping_size
    cdef int rc = map_file(fd, size, offset, &mapping, &mapping_size)
    if rc != 0:
        return rc
    memory_clear_log(m)
    m.log_mapping = mapping
    m.log_mapping_size = mapping_size
    m.log = <uint8_t *>mapping + offset
    m.log_size = size
    return 0


cdef void memory_clear_log(Memory *m) noexcept nogil:
    if m.log_mapping != NULL:
        munmap(m.log_mapping, m.log_mapping_size)
    m.log_mapping = NULL
    m.log = NULL
    m.log_size = 0
