# SPDX-License-Identifier: GPL-2.0-or-later

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcmp, memcpy, memset

from godwit.dataplane.plane cimport (
    AGES,
    FF_AGED,
    FF_ANSWERED,
    FF_ANY_PEER,
    FF_FORWARD,
    FF_HEARD,
    FF_RING_WAIT,
    FF_SHARED,
    FF_TOUCHED,
    FF_TWO_WAY,
    FLOW_DEAD,
    FLOW_FREE,
    FLOW_PING,
    FLOW_TCP,
    FLOW_UDP,
    FLOW_UDP_PORT,
    HALF_OPEN,
    NONE,
    ONE_WAY,
    TWO_WAY,
    Carry,
    Flow,
    FlowKind,
    Plane,
)
from godwit.dataplane.sys cimport (
    ENOMEM,
    EPOLL_CTL_ADD,
    EPOLLET,
    EPOLLIN,
    EPOLLOUT,
    EPOLLPRI,
    EPOLLRDHUP,
    MAP_ANONYMOUS,
    MAP_FAILED,
    MAP_NORESERVE,
    MAP_PRIVATE,
    PROT_READ,
    PROT_WRITE,
    close,
    epoll_ctl,
    epoll_event,
    errno,
    getrandom,
    iovec,
    mmap,
    munmap,
)

cdef extern from *:
    """
    #include <stdint.h>
    static inline uint64_t gw_fold_multiply(uint64_t a, uint64_t b)
    { unsigned __int128 r = (unsigned __int128)a * b; return (uint64_t)r ^ (uint64_t)(r >> 64); }
    """
    uint64_t fold_multiply "gw_fold_multiply"(uint64_t a, uint64_t b) nogil

cdef enum:
    # A flow goes to the young end of its list once in so many ms (a power of two), however often it is used.
    AGE_STEP = 64

cdef struct Key:
    uint8_t guest_addr[16]
    uint8_t our_addr[16]
    uint16_t guest_port
    uint16_t our_port
    uint32_t kind


cdef uint64_t keyed_hash(const uint64_t *secret, const void *data, size_t n) noexcept nogil:
    """A hash of n bytes (a multiple of 8) under a random key of two words."""
    cdef uint64_t h = secret[0], w
    cdef const uint8_t *at = <const uint8_t *>data
    while n >= 8:
        memcpy(&w, at, 8)
        h = fold_multiply(h ^ w, secret[1] | 1)
        at += 8
        n -= 8
    return fold_multiply(h, secret[0] | 1)


cdef uint32_t bucket(Plane *p, int kind, const uint8_t *guest_addr, uint16_t guest_port,
                     const uint8_t *our_addr, uint16_t our_port) noexcept nogil:
    cdef Key key
    memcpy(key.guest_addr, guest_addr, 16)
    memcpy(key.our_addr, our_addr, 16)
    key.guest_port = guest_port
    key.our_port = our_port
    key.kind = kind
    return <uint32_t>keyed_hash(p.table_key, &key, sizeof(Key)) & p.bucket_mask


cdef void *reserve(size_t n) noexcept nogil:
    """Zeroed memory that costs nothing until it is touched; NULL if there is none."""
    cdef void *at = mmap(NULL, n, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    return NULL if at == MAP_FAILED else at


cdef int flows_init(Plane *p, uint32_t max_flows) noexcept nogil:
    cdef uint32_t buckets = 1024
    cdef int i
    while buckets < max_flows:
        buckets <<= 1
    if (getrandom(p.hash_key, sizeof(p.hash_key), 0) != sizeof(p.hash_key)
            or getrandom(p.table_key, sizeof(p.table_key), 0) != sizeof(p.table_key)):
        return -errno
    p.flows = <Flow *>reserve(max_flows * sizeof(Flow))
    p.buckets = <uint32_t *>reserve(buckets * sizeof(uint32_t))
    p.remotes = <uint32_t *>reserve(buckets * sizeof(uint32_t))
    p.heap = <uint32_t *>reserve(max_flows * sizeof(uint32_t))
    p.max_flows = max_flows
    p.bucket_mask = buckets - 1
    if p.flows == NULL or p.buckets == NULL or p.remotes == NULL or p.heap == NULL:
        flows_free(p)
        return -ENOMEM
    p.free_head = p.touched = p.ring_wait = p.ring_wait_tail = NONE
    for i in range(AGES):
        p.oldest[i] = p.youngest[i] = NONE
    return 0


cdef void flows_free(Plane *p) noexcept nogil:
    cdef uint32_t i
    if p.flows != NULL:
        for i in range(p.used_flows):
            if p.flows[i].kind != FLOW_FREE and p.flows[i].sock >= 0:
                close(p.flows[i].sock)
            carry_free(p.flows[i].carry_to_guest)
            carry_free(p.flows[i].carry_to_sock)
        munmap(p.flows, p.max_flows * sizeof(Flow))
    if p.buckets != NULL:
        munmap(p.buckets, (p.bucket_mask + 1) * sizeof(uint32_t))
    if p.remotes != NULL:
        munmap(p.remotes, (p.bucket_mask + 1) * sizeof(uint32_t))
    if p.heap != NULL:
        munmap(p.heap, p.max_flows * sizeof(uint32_t))
    p.flows = NULL
    p.buckets = NULL
    p.remotes = NULL
    p.heap = NULL


cdef Flow *flow_find(Plane *p, int kind, const uint8_t *guest_addr, uint16_t guest_port,
                     const uint8_t *our_addr, uint16_t our_port) noexcept nogil:
    # Buckets hold an index + 1: fresh memory is all zero.
    cdef uint32_t i = p.buckets[bucket(p, kind, guest_addr, guest_port, our_addr, our_port)]
    cdef Flow *f
    while i:
        f = &p.flows[i - 1]
        if (f.kind == kind and f.guest_port == guest_port and f.our_port == our_port
                and memcmp(f.our_addr, our_addr, 16) == 0
                and memcmp(f.guest_addr, guest_addr, 16) == 0):
            return f
        i = f.hash_next
    return NULL


cdef uint32_t *remote_bucket(Plane *p, uint32_t port, const uint8_t *remote, uint16_t remote_port) noexcept nogil:
    cdef uint8_t nobody[16]
    memset(nobody, 0, 16)
    return &p.remotes[bucket(p, <int>port, remote, remote_port, nobody, 0)]


cdef Flow *peer_find(Plane *p, uint32_t port, const uint8_t *remote, uint16_t remote_port) noexcept nogil:
    cdef uint32_t i = remote_bucket(p, port, remote, remote_port)[0]
    cdef Flow *f
    while i:
        f = &p.flows[i - 1]
        if f.port == port and f.remote_port == remote_port and memcmp(f.remote_addr, remote, 16) == 0:
            return f
        i = f.remote_next
    return NULL


cdef void peer_in(Plane *p, Flow *f) noexcept nogil:
    cdef uint32_t *at = remote_bucket(p, f.port, f.remote_addr, f.remote_port)
    cdef Flow *other = peer_find(p, f.port, f.remote_addr, f.remote_port)
    if other != NULL:
        other.flags |= FF_SHARED
        f.flags |= FF_SHARED
    f.remote_next = at[0]
    at[0] = flow_index(p, f) + 1


cdef void peer_out(Plane *p, Flow *f) noexcept nogil:
    cdef uint32_t own = flow_index(p, f) + 1
    cdef uint32_t *at = remote_bucket(p, f.port, f.remote_addr, f.remote_port)
    while at[0] != own:
        at = &p.flows[at[0] - 1].remote_next
    at[0] = f.remote_next


cdef Flow *within(Plane *p, uint32_t limit, FlowKind kind, const uint8_t *guest_addr, uint16_t guest_port,
                  const uint8_t *our_addr, uint16_t our_port) noexcept nogil:
    cdef uint32_t i, b, generation
    cdef Flow *f
    if kind != FLOW_UDP and p.open_sockets >= limit:
        return NULL
    # A guest that asks the whole world by UDP shall still have connections.
    if (kind == FLOW_UDP_PORT or kind == FLOW_PING) and p.open_ports >= (limit >> 1) + 1:
        return NULL
    if p.free_head != NONE:
        i = p.free_head
        p.free_head = p.flows[i].hash_next
    elif p.used_flows < p.max_flows:
        i = p.used_flows
        p.used_flows += 1
    else:
        return NULL
    f = &p.flows[i]
    generation = f.generation
    memset(f, 0, sizeof(Flow))
    f.generation = generation
    f.kind = kind
    f.sock = -1
    f.touched_next = f.wait_next = f.wait_prev = f.heap_pos = f.older = f.younger = NONE
    f.last_active = p.now
    memcpy(f.guest_addr, guest_addr, 16)
    memcpy(f.our_addr, our_addr, 16)
    f.guest_port = guest_port
    f.our_port = our_port
    b = bucket(p, kind, guest_addr, guest_port, our_addr, our_port)
    f.hash_next = p.buckets[b]
    p.buckets[b] = i + 1
    count(p, f, 1)
    p.counters.opened[<int>kind] += 1
    return f


cdef Flow *flow_new(Plane *p, FlowKind kind, const uint8_t *guest_addr, uint16_t guest_port,
                    const uint8_t *our_addr, uint16_t our_port) noexcept nogil:
    return within(p, p.flow_limit, kind, guest_addr, guest_port, our_addr, our_port)


cdef Flow *flow_new_beyond(Plane *p, FlowKind kind, const uint8_t *guest_addr, uint16_t guest_port,
                           const uint8_t *our_addr, uint16_t our_port) noexcept nogil:
    return within(p, 0xFFFFFFFF, kind, guest_addr, guest_port, our_addr, our_port)


cdef void count(Plane *p, Flow *f, int change) noexcept nogil:
    if f.kind != FLOW_UDP_PORT:
        p.open_flows += change
    if f.kind == FLOW_PING:
        p.open_pings += change
    if f.kind == FLOW_UDP:
        p.open_peers += change
    elif not f.flags & FF_FORWARD:
        p.open_sockets += change
        if f.kind != FLOW_TCP:
            p.open_ports += change


cdef int flow_watch(Plane *p, Flow *f) noexcept nogil:
    """Have the loop told of what happens to the flow's socket.

    Edge-triggered: bytes stay in the kernel's queue until the guest has
    acknowledged them, so a level would be high nearly always.
    """
    cdef epoll_event ev
    ev.events = EPOLLIN | EPOLLOUT | EPOLLPRI | EPOLLRDHUP | EPOLLET
    if f.kind != FLOW_TCP:
        ev.events = EPOLLIN | EPOLLET
    ev.data.u64 = watch_data(WATCH_FLOW, f.generation, flow_index(p, f))
    return -errno if epoll_ctl(p.epfd, EPOLL_CTL_ADD, f.sock, &ev) != 0 else 0


cdef void flow_close(Plane *p, Flow *f) noexcept nogil:
    cdef uint32_t i = flow_index(p, f)
    cdef uint32_t *at
    cdef Flow *port
    if f.kind == FLOW_DEAD or f.kind == FLOW_FREE:
        return
    at = &p.buckets[bucket(p, f.kind, f.guest_addr, f.guest_port, f.our_addr, f.our_port)]
    while at[0] != i + 1:
        at = &p.flows[at[0] - 1].hash_next
    at[0] = f.hash_next
    if f.sock >= 0:
        close(f.sock)
        f.sock = -1
    carry_free(f.carry_to_guest)
    carry_free(f.carry_to_sock)
    f.carry_to_guest = f.carry_to_sock = NULL
    flow_unwait(p, f)
    age_out(p, f)
    if f.heap_pos != NONE:
        heap_remove(p, f)
    if p.send.flow == i:
        p.send.flow = NONE
        p.send.count = 0
        p.send.bytes = 0
    if p.udp_out.port == i:
        p.udp_out.port = NONE
        p.udp_out.count = p.udp_out.iovs = 0
    count(p, f, -1)
    if f.flags & FF_ANY_PEER and f.local_port:
        p.many_from[f.local_port] -= 1
    if f.kind == FLOW_UDP:
        peer_out(p, f)
        port = &p.flows[f.port]
        port.peers -= 1
        if port.peers == 0 and not port.flags & FF_FORWARD:
            flow_close(p, port)
    f.kind = FLOW_DEAD
    if not f.flags & FF_TOUCHED:
        flow_release(p, f)


cdef Carry *carry_new(const uint8_t *data, uint32_t size) noexcept nogil:
    cdef Carry *c = <Carry *>malloc(sizeof(Carry))
    if c == NULL:
        return NULL
    c.data = NULL
    if size:
        c.data = <uint8_t *>malloc(size)
        if c.data == NULL:
            free(c)
            return NULL
        memcpy(c.data, data, size)
    c.size = size
    c.at = 0
    return c


cdef bint carry_append(Carry **c, const iovec *iov, int count, uint32_t skip, uint32_t size) noexcept nogil:
    cdef uint8_t *grown
    cdef int i
    cdef size_t part
    if c[0] == NULL:
        c[0] = carry_new(NULL, 0)
        if c[0] == NULL:
            return False
    grown = <uint8_t *>realloc(c[0].data, <size_t>c[0].size + size)
    if grown == NULL:
        if c[0].size == 0:
            carry_free(c[0])
            c[0] = NULL
        return False
    c[0].data = grown
    for i in range(count):
        part = iov[i].iov_len
        if skip >= part:
            skip -= <uint32_t>part
            continue
        part -= skip
        memcpy(c[0].data + c[0].size, <const uint8_t *>iov[i].iov_base + skip, part)
        c[0].size += <uint32_t>part
        skip = 0
    return True


cdef void carry_free(Carry *c) noexcept nogil:
    if c != NULL:
        free(c.data)
        free(c)


cdef bytes carry_bytes(Carry *c):
    return b"" if c == NULL else c.data[c.at:c.size]


cdef Carry *carry_take(Carry *c, uint32_t n) noexcept nogil:
    c.at += n
    if c.at < c.size:
        return c
    carry_free(c)
    return NULL


cdef void flow_release(Plane *p, Flow *f) noexcept nogil:
    """Give a dead flow's slot back, once it is in no list."""
    f.kind = FLOW_FREE
    f.generation += 1
    f.hash_next = p.free_head
    p.free_head = flow_index(p, f)


cdef void flow_touch(Plane *p, Flow *f) noexcept nogil:
    if not f.flags & FF_TOUCHED:
        f.flags |= FF_TOUCHED
        f.touched_next = p.touched
        p.touched = flow_index(p, f)


cdef void flow_wait_ring(Plane *p, Flow *f) noexcept nogil:
    """Queue the flow for receive buffers; first come, first served."""
    cdef uint32_t i = flow_index(p, f)
    if f.flags & FF_RING_WAIT:
        return
    f.flags |= FF_RING_WAIT
    f.wait_next = NONE
    f.wait_prev = p.ring_wait_tail
    if p.ring_wait_tail != NONE:
        p.flows[p.ring_wait_tail].wait_next = i
    else:
        p.ring_wait = i
    p.ring_wait_tail = i


cdef void flow_unwait(Plane *p, Flow *f) noexcept nogil:
    if not f.flags & FF_RING_WAIT:
        return
    f.flags &= ~FF_RING_WAIT
    if f.wait_prev != NONE:
        p.flows[f.wait_prev].wait_next = f.wait_next
    else:
        p.ring_wait = f.wait_next
    if f.wait_next != NONE:
        p.flows[f.wait_next].wait_prev = f.wait_prev
    else:
        p.ring_wait_tail = f.wait_prev


# Lists by age.

cdef int age_of(Flow *f) noexcept nogil:
    if f.kind == FLOW_TCP:
        return HALF_OPEN
    return TWO_WAY if f.flags & FF_TWO_WAY else ONE_WAY


cdef void age_in(Plane *p, Flow *f) noexcept nogil:
    cdef uint32_t i = flow_index(p, f)
    cdef int age
    if f.flags & FF_AGED:
        return
    if f.kind != FLOW_TCP and f.flags & FF_ANSWERED and f.flags & FF_HEARD:
        f.flags |= FF_TWO_WAY
    age = age_of(f)
    f.flags |= FF_AGED
    f.younger = NONE
    f.older = p.youngest[age]
    if f.older != NONE:
        p.flows[f.older].younger = i
    else:
        p.oldest[age] = i
    p.youngest[age] = i
    p.aged[age] += 1


cdef void age_out(Plane *p, Flow *f) noexcept nogil:
    cdef int age = age_of(f)
    if not f.flags & FF_AGED:
        return
    f.flags &= ~FF_AGED
    if f.older != NONE:
        p.flows[f.older].younger = f.younger
    else:
        p.oldest[age] = f.younger
    if f.younger != NONE:
        p.flows[f.younger].older = f.older
    else:
        p.youngest[age] = f.older
    p.aged[age] -= 1


cdef void flow_used(Plane *p, Flow *f, uint64_t timeout) noexcept nogil:
    cdef uint64_t until = p.now + timeout
    cdef bint both = f.flags & FF_ANSWERED and f.flags & FF_HEARD
    if until // AGE_STEP != f.deadline // AGE_STEP or (both and not f.flags & FF_TWO_WAY):
        age_out(p, f)
        age_in(p, f)
    flow_deadline(p, f, until)


# Timers: a binary heap of flow indices, ordered by the deadline that each had
# when it was last moved ("due"). A deadline that moved later since is found
# out when it comes up, and the flow sinks; so acknowledgements, which push a
# deadline all the time, do not touch the heap.

cdef inline uint64_t due(Plane *p, uint32_t pos) noexcept nogil:
    return p.flows[p.heap[pos]].last_due


cdef inline void heap_put(Plane *p, uint32_t pos, uint32_t i) noexcept nogil:
    p.heap[pos] = i
    p.flows[i].heap_pos = pos


cdef void heap_up(Plane *p, uint32_t pos) noexcept nogil:
    cdef uint32_t i = p.heap[pos], parent
    while pos:
        parent = (pos - 1) >> 1
        if due(p, parent) <= p.flows[i].last_due:
            break
        heap_put(p, pos, p.heap[parent])
        pos = parent
    heap_put(p, pos, i)


cdef void heap_down(Plane *p, uint32_t pos) noexcept nogil:
    cdef uint32_t i = p.heap[pos], child
    while True:
        child = 2 * pos + 1
        if child >= p.heap_size:
            break
        if child + 1 < p.heap_size and due(p, child + 1) < due(p, child):
            child += 1
        if p.flows[i].last_due <= due(p, child):
            break
        heap_put(p, pos, p.heap[child])
        pos = child
    heap_put(p, pos, i)


cdef void heap_remove(Plane *p, Flow *f) noexcept nogil:
    cdef uint32_t pos = f.heap_pos, moved
    f.heap_pos = NONE
    p.heap_size -= 1
    if pos == p.heap_size:
        return
    moved = p.heap[p.heap_size]
    heap_put(p, pos, moved)
    heap_up(p, pos)
    heap_down(p, p.flows[moved].heap_pos)


cdef void flow_deadline(Plane *p, Flow *f, uint64_t when) noexcept nogil:
    """Set the time (ms) at which the flow wants attention; 0: never."""
    f.deadline = when
    if when == 0:
        return
    if f.heap_pos == NONE:
        f.last_due = when
        heap_put(p, p.heap_size, flow_index(p, f))
        p.heap_size += 1
        heap_up(p, f.heap_pos)
    elif when < f.last_due:
        f.last_due = when
        heap_up(p, f.heap_pos)


cdef Flow *flow_due(Plane *p) noexcept nogil:
    """A flow whose deadline has passed, its deadline cleared; NULL if none."""
    cdef Flow *f
    while p.heap_size and due(p, 0) <= p.now:
        f = &p.flows[p.heap[0]]
        if f.deadline > p.now:
            f.last_due = f.deadline
            heap_down(p, 0)
            continue
        heap_remove(p, f)
        if f.deadline:
            f.deadline = 0
            return f
    return NULL


cdef int timeout_ms(Plane *p) noexcept nogil:
    """How long the loop may sleep: milliseconds, -1 for ever."""
    cdef uint64_t left
    if p.heap_size == 0:
        return -1
    if due(p, 0) <= p.now:
        return 0
    left = due(p, 0) - p.now
    return <int>left if left < 0x7FFFFFFF else 0x7FFFFFFF
