# SPDX-License-Identifier: GPL-2.0-or-later

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcpy

from godwit.dataplane.memory cimport Memory, log_write, translate, translate_user
from godwit.dataplane.sys cimport (
    EINVAL,
    fence,
    iovec,
    load16,
    load16_acquire,
    load64,
    store16,
    store16_release,
    write,
)

cdef enum:
    # virtio 1.2, 2.7.5, 2.7.6, 2.7.8
    DESC_SIZE = 16
    DESC_F_NEXT = 1
    DESC_F_WRITE = 2
    DESC_F_INDIRECT = 4
    AVAIL_F_NO_INTERRUPT = 1
    USED_F_NO_NOTIFY = 1
    USED_ELEM = 8

cdef struct Desc:
    uint64_t addr
    uint32_t size
    uint16_t flags
    uint16_t next


cdef int queue_pending(Queue *q) noexcept nogil:
    cdef uint16_t n = load16_acquire(q.avail + 2) - q.last_avail
    if n > q.num:
        return BAD_INDEX
    return n


cdef inline void read_desc(Desc *d, const uint8_t *at) noexcept nogil:
    """Each word once: a compiler may read plain memory as often as it likes, and the guest writes it meanwhile."""
    cdef uint64_t words[2]
    words[0] = load64(at)
    words[1] = load64(at + 8)
    memcpy(d, words, DESC_SIZE)


cdef int queue_chain(Queue *q, Memory *m, int ahead, bint writable, iovec *iov,
                     uint64_t *guest_addr, int room, uint16_t *head, uint64_t *total) noexcept nogil:
    cdef Desc d
    cdef uint8_t *table = q.desc
    cdef uint8_t indirect[MAX_CHAIN * DESC_SIZE]
    cdef uint32_t size = q.num, i, steps = 0
    cdef uint64_t got, addr
    cdef uint32_t left
    cdef uint8_t *p
    cdef int n = 0
    head[0] = load16(q.avail + 4 + 2 * (<uint16_t>(q.last_avail + ahead) & (q.num - 1)))
    i = head[0]
    total[0] = 0
    while True:
        # A chain is no longer than its table; a longer one is a loop. Nor is it longer than we take: of descriptors
        # that lead nowhere, of no length, each ring could hold a chain that takes its whole length to read.
        if i >= size or steps >= size:
            return BAD_CHAIN
        if steps > MAX_CHAIN:
            return NO_ROOM
        steps += 1
        read_desc(&d, table + i * DESC_SIZE)
        if d.flags & DESC_F_INDIRECT:
            # 2.7.5.3.1: not nested, not chained, a whole number of entries.
            if table != q.desc or d.flags & DESC_F_NEXT or d.size % DESC_SIZE or d.size == 0:
                return BAD_TABLE
            if d.size > MAX_CHAIN * DESC_SIZE:
                return NO_ROOM
            # Copied: a table may straddle regions, and must not change under us.
            left = 0
            while left < d.size:
                p = translate(m, d.addr + left, d.size - left, &got)
                if p == NULL:
                    return BAD_ADDRESS
                memcpy(indirect + left, p, got)
                left += <uint32_t>got
            size = d.size // DESC_SIZE
            table = indirect
            i = 0
            steps = 0
            continue
        if (d.flags & DESC_F_WRITE != 0) != writable:
            return BAD_DIRECTION
        addr = d.addr
        left = d.size
        while left:
            if n >= room:
                return NO_ROOM
            p = translate(m, addr, left, &got)
            if p == NULL:
                return BAD_ADDRESS
            iov[n].iov_base = p
            iov[n].iov_len = got
            guest_addr[n] = addr
            n += 1
            addr += got
            left -= <uint32_t>got
        total[0] += d.size
        if not d.flags & DESC_F_NEXT:
            return n
        i = d.next


cdef void queue_used(Queue *q, uint16_t head, uint32_t written) noexcept nogil:
    cdef uint32_t elem[2]
    elem[0] = head
    elem[1] = written
    memcpy(q.used + 4 + USED_ELEM * (q.used_idx & (q.num - 1)), elem, USED_ELEM)
    q.used_idx += 1


cdef void queue_publish(Queue *q, Memory *m) noexcept nogil:
    """Show the guest the used entries added, and interrupt it if it wants that."""
    cdef uint16_t old = q.published, i, event
    cdef uint64_t one = 1
    cdef bint wanted
    if q.used_idx == old:
        return
    store16_release(q.used + 2, q.used_idx)
    q.published = q.used_idx
    if q.log_used:
        i = old
        while i != q.used_idx:
            log_write(m, q.log_addr + 4 + USED_ELEM * (i & (q.num - 1)), USED_ELEM)
            i += 1
        log_write(m, q.log_addr, 4)
    fence()
    if q.event_idx:
        # 2.7.7.2: interrupt if used_event was passed by this update.
        event = load16(q.avail + 4 + 2 * q.num)
        wanted = <uint16_t>(q.used_idx - event - 1) < <uint16_t>(q.used_idx - old)
    else:
        wanted = not load16(q.avail) & AVAIL_F_NO_INTERRUPT
    if wanted and q.call >= 0:
        write(q.call, &one, 8)


cdef void queue_notify_off(Queue *q, Memory *m) noexcept nogil:
    # With the event index there is nothing to do: a kick comes when
    # avail_event is passed, and it stays behind until it is set anew.
    if not q.event_idx:
        store16(q.used, USED_F_NO_NOTIFY)
        if q.log_used:
            log_write(m, q.log_addr, 2)


cdef bint queue_notify_on(Queue *q, Memory *m, uint16_t seen) noexcept nogil:
    if q.event_idx:
        # Not last_avail: entries may wait that are too few for what is wanted.
        store16(q.used + 4 + USED_ELEM * q.num, seen)
        if q.log_used:
            log_write(m, q.log_addr + 4 + USED_ELEM * q.num, 2)
    else:
        store16(q.used, 0)
        if q.log_used:
            log_write(m, q.log_addr, 2)
    fence()
    return queue_seen(q) != seen


cdef int queue_map(Queue *q, Memory *m) noexcept nogil:
    """Find the ring in guest memory; 0, or -EINVAL with the queue left unmapped."""
    cdef uint64_t ignored
    q.desc = q.avail = q.used = NULL
    if not q.addr_set or q.num == 0:
        return -EINVAL
    # With the event index each ring ends in two more bytes.
    q.avail = translate_user(m, q.user_avail, 6 + 2 * <uint64_t>q.num, &ignored)
    q.used = translate_user(m, q.user_used, 6 + USED_ELEM * <uint64_t>q.num, &ignored)
    if q.avail == NULL or q.used == NULL:
        q.avail = q.used = NULL
        return -EINVAL
    q.desc = translate_user(m, q.user_desc, DESC_SIZE * <uint64_t>q.num, &ignored)
    # 2.7, alignments: 16, 2, 4. Of where they are here: a region may begin at any byte of its file.
    if q.desc == NULL or <uintptr_t>q.desc & 15 or <uintptr_t>q.avail & 1 or <uintptr_t>q.used & 3:
        q.desc = q.avail = q.used = NULL
        return -EINVAL
    return 0


cdef void queue_break(Queue *q, int fault) noexcept nogil:
    """Stop using a ring in which the guest broke a rule, and say so to the front-end."""
    cdef uint64_t one = 1
    q.broken = True
    q.fault = fault
    q.told = False
    if q.err >= 0:
        write(q.err, &one, 8)
