# SPDX-License-Identifier: GPL-2.0-or-later

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from godwit.dataplane.sys cimport (
    BUS_ADRERR,
    EINVAL,
    ENOMEM,
    MAP_ANONYMOUS,
    MAP_FAILED,
    MAP_FIXED,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    PROT_READ,
    PROT_WRITE,
    SA_NODEFER,
    SA_SIGINFO,
    SIGBUS,
    close,
    errno,
    fstat,
    load32_acquire,
    load64_acquire,
    mmap,
    munmap,
    off_t,
    or8,
    sigaction,
    sigaction_t,
    siginfo_t,
    stat_t,
    store32_release,
    store64_release,
)

cdef enum:
    MAPPINGS = 256      # of all engines of a process: a daemon has one

cdef struct Mapping:
    uint64_t at             # 0: none
    uint64_t size           # bytes
    uint32_t gone

# What is mapped of files that others may cut off at any time; a touch beyond their end is a SIGBUS then, in whichever
# thread. Written by who maps, read by the signal's handler.
cdef Mapping mappings[MAPPINGS]
cdef uint32_t losses = 0
cdef bint watched = False
cdef sigaction_t before_us


cdef void on_bus_error(int number, siginfo_t *info, void *context) noexcept nogil:
    """Put memory of our own where a file has ended, so that the touch goes on: ``memory_gone`` tells of it.

    All of the mapping: of huge pages no part can be replaced.
    """
    cdef int i
    cdef uint64_t at
    cdef uint64_t touched = <uint64_t>info.si_addr
    # A page that the hardware has lost (BUS_MCEERR_AR) is nobody's doing: who starts us anew has the guest go on.
    if info.si_code == BUS_ADRERR:
        for i in range(MAPPINGS):
            at = load64_acquire(&mappings[i].at)
            if at == 0 or touched - at >= mappings[i].size:
                continue
            if mmap(<void *>at, mappings[i].size, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED:
                break
            store32_release(&mappings[i].gone, 1)
            store32_release(&losses, losses + 1)
            return
    # Not of ours: the touch comes again, and ends the process as it would have.
    sigaction(SIGBUS, &before_us, NULL)


cdef int watch() noexcept nogil:
    """Install the handler, once; 0, or a negative error number."""
    global watched
    cdef sigaction_t action
    if watched:
        return 0
    memset(&action, 0, sizeof(action))
    action.sa_sigaction = on_bus_error
    action.sa_flags = SA_SIGINFO | SA_NODEFER
    if sigaction(SIGBUS, &action, &before_us) != 0:
        return -errno
    watched = True
    return 0


cdef Mapping *mapping_of(const void *at) noexcept nogil:
    cdef int i
    for i in range(MAPPINGS):
        if mappings[i].at == <uint64_t>at:
            return &mappings[i]
    return NULL


cdef bint lost(const void *at) noexcept nogil:
    cdef Mapping *one = mapping_of(at) if at != NULL else NULL
    return one != NULL and load32_acquire(&one.gone) != 0


cdef bint memory_gone(Memory *m) noexcept nogil:
    cdef uint32_t now = load32_acquire(&losses)
    cdef int i
    if now != m.losses:
        m.losses = now
        m.gone = lost(m.log_mapping)
        for i in range(m.count):
            m.gone |= lost(m.regions[i].mapping)
    return m.gone


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
    cdef Mapping *one
    cdef int rc
    cdef uint64_t whole = size + offset
    if size == 0 or whole < size or whole > (<uint64_t>1 << 62):
        return -EINVAL
    if fstat(fd, &st) != 0:
        return -errno
    # A file that is too short would give SIGBUS at the first touch.
    if <uint64_t>st.st_size < whole:
        return -EINVAL
    rc = watch()
    if rc != 0:
        return rc
    one = mapping_of(NULL)
    if one == NULL:
        return -ENOMEM
    # From offset 0, since a mapping of huge pages takes no other start.
    mapping[0] = mmap(NULL, whole, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, <off_t>0)
    if mapping[0] == MAP_FAILED:
        mapping[0] = NULL
        return -errno
    mapping_size[0] = whole
    one.size = whole
    one.gone = 0
    store64_release(&one.at, <uint64_t>mapping[0])
    return 0


cdef void unmap_file(void *mapping, size_t mapping_size) noexcept nogil:
    cdef Mapping *one = mapping_of(mapping)
    store64_release(&one.at, 0)
    munmap(mapping, mapping_size)


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
    unmap_file(r.mapping, r.mapping_size)
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
            m.losses = 0    # what is left is looked at anew
            return 0
    return -EINVAL


cdef void memory_clear(Memory *m) noexcept nogil:
    cdef int i
    for i in range(m.count):
        unmap(&m.regions[i])
    m.count = 0
    m.losses = 0


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
        unmap_file(m.log_mapping, m.log_mapping_size)
    m.log_mapping = NULL
    m.losses = 0
    m.log = NULL
    m.log_size = 0
