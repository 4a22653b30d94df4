# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's memory and rings as the control thread sees them: what a front-end, or a card of ours, says of them."""

import os

from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from godwit.dataplane._base cimport EngineBase, check
from godwit.dataplane.card cimport StreamCard
from godwit.dataplane.flow cimport WATCH_CARD, WATCH_KICK, watch_data
from godwit.dataplane.memory cimport (
    memory_add,
    memory_clear,
    memory_clear_log,
    memory_gone,
    memory_remove,
    memory_set_log,
)
from godwit.dataplane.sys cimport (
    EPOLLET,
    EPOLLIN,
    EPOLLOUT,
    EPOLLRDHUP,
    EPOLL_CTL_ADD,
    EPOLL_CTL_DEL,
    close,
    epoll_ctl,
    epoll_event,
    errno,
    store32_release,
    write,
)
from godwit.dataplane.virtqueue cimport (
    MAX_QUEUE_SIZE,
    NO_MEMORY,
    QUEUES,
    RX,
    TX,
    Queue,
    queue_map,
    queue_notify_on,
    queue_seen,
)

cdef enum:
    # virtio 1.2, 5.1.3 and 6
    F_GUEST_CSUM = 1
    F_GUEST_TSO4 = 7
    F_GUEST_TSO6 = 8
    F_MRG_RXBUF = 15
    F_LOG_ALL = 26
    F_EVENT_IDX = 29
    F_PROTOCOL_FEATURES = 30
    F_VERSION_1 = 32
    F_GUEST_USO4 = 54
    F_GUEST_USO6 = 55
    F_HOST_USO = 56
    VRING_F_LOG = 1     # vhost_vring_addr.flags

# By Fault, from BAD_INDEX = -1 on.
FAULTS = (
    "its available index is ahead by more entries than the ring has",
    "a chain names a descriptor that there is none of, or runs in a circle",
    "a descriptor names memory that the guest does not have",
    "a buffer to be read is in the ring of those to be written, or the other way round",
    "an indirect table is within another, has others behind it, or is of no whole number of descriptors",
    "a chain has more descriptors than are taken",
    "a receive buffer has no room for the header of a frame",
    "the front-end has cut off the file that the guest's memory or its dirty log is in, or there are no pages for it",
)
assert len(FAULTS) == -NO_MEMORY


cdef object replace(int *kept, fd):
    """Keep another descriptor that is written to, or none (None), in place of the one that is there, and close that.

    Whatever it is, a write to it must not stop us. It is closed where that cannot be (O_PATH).
    """
    if fd is not None:
        try:
            os.set_blocking(fd, False)
        except OSError:
            os.close(fd)
            raise
    if kept[0] >= 0:
        close(kept[0])
    kept[0] = -1 if fd is None else fd


cdef class RingEngine(EngineBase):
    """A data plane with a guest's memory and its two virtqueues."""

    def set_features(self, uint64_t features):
        """The virtio and vhost features that the driver has taken."""
        cdef int i
        with self.parked():
            self.p.features = features
            self.p.mergeable = features >> F_MRG_RXBUF & 1
            self.p.vnet_size = 12 if features & (1ULL << F_VERSION_1 | 1ULL << F_MRG_RXBUF) else 10
            self.p.guest_csum = features >> F_GUEST_CSUM & 1
            self.p.guest_tso4 = features >> F_GUEST_TSO4 & 1
            self.p.guest_tso6 = features >> F_GUEST_TSO6 & 1
            self.p.guest_uso4 = features >> F_GUEST_USO4 & 1
            self.p.guest_uso6 = features >> F_GUEST_USO6 & 1
            self.p.host_uso = features >> F_HOST_USO & 1
            self.p.mem.log_all = features >> F_LOG_ALL & 1
            for i in range(QUEUES):
                self.p.queues[i].event_idx = features >> F_EVENT_IDX & 1
                if not features >> F_PROTOCOL_FEATURES & 1:
                    self.p.queues[i].enabled = True

    # ---- memory

    def set_memory(self, regions):
        """Replace all regions: (guest address, size, user address, offset, descriptor) each."""
        regions = list(regions)
        kept = 0
        with self.parked():
            memory_clear(&self.p.mem)
            try:
                for guest_addr, size, user_addr, offset, fd in regions:
                    check(memory_add(&self.p.mem, guest_addr, size, user_addr, offset, fd),
                          f"memory region at {guest_addr:#x}, {size:#x} bytes")
                    kept += 1
            except BaseException:
                memory_clear(&self.p.mem)
                for region in regions[kept:]:
                    os.close(region[4])
                raise
            finally:
                self._remap()

    def add_region(self, uint64_t guest_addr, uint64_t size, uint64_t user_addr, uint64_t offset, int fd):
        """Add one region."""
        with self.parked():
            rc = memory_add(&self.p.mem, guest_addr, size, user_addr, offset, fd)
            if rc != 0:
                os.close(fd)
            check(rc, f"memory region at {guest_addr:#x}, {size:#x} bytes")
            self._remap()

    def remove_region(self, uint64_t guest_addr, uint64_t size, uint64_t user_addr):
        """Remove one region; rings that lay in it stop."""
        with self.parked():
            check(memory_remove(&self.p.mem, guest_addr, size, user_addr),
                  f"no memory region at {guest_addr:#x}, {size:#x} bytes")
            self._remap()

    cdef _remap(self):
        """Find the rings again after the memory changed."""
        cdef int i
        for i in range(QUEUES):
            if self.p.queues[i].addr_set:
                queue_map(&self.p.queues[i], &self.p.mem)

    def set_log(self, int fd, uint64_t size, uint64_t offset):
        """Map the dirty log: one bit for each page, ``size`` bytes."""
        try:
            with self.parked():
                check(memory_set_log(&self.p.mem, fd, size, offset), f"dirty log of {size} bytes")
        finally:
            os.close(fd)

    # ---- rings

    cdef Queue *queue(self, int index) except NULL:
        if not 0 <= index < QUEUES:
            raise ValueError(f"no ring {index}")
        return &self.p.queues[index]

    def ring_num(self, int index, uint32_t num):
        """The ring's size: a power of two."""
        cdef Queue *q = self.queue(index)
        if num == 0 or num > MAX_QUEUE_SIZE or num & (num - 1):
            raise ValueError(f"ring {index}: a size of {num} is not a power of two up to {MAX_QUEUE_SIZE}")
        with self.parked():
            q.num = num
            if q.addr_set:
                queue_map(q, &self.p.mem)

    def ring_addr(self, int index, uint32_t flags, uint64_t desc, uint64_t used, uint64_t avail, uint64_t log):
        """Where the ring lies, in the front-end's address space; ``log`` is guest-physical."""
        cdef Queue *q = self.queue(index)
        with self.parked():
            q.user_desc = desc
            q.user_used = used
            q.user_avail = avail
            q.log_addr = log
            q.log_used = flags & VRING_F_LOG
            q.addr_set = True
            check(queue_map(q, &self.p.mem), f"ring {index} does not lie in the memory that was shared")

    def ring_base(self, int index, uint16_t base):
        """The next available entry to take."""
        cdef Queue *q = self.queue(index)
        with self.parked():
            q.last_avail = base

    def ring_kick(self, int index, fd):
        """Start the ring; ``fd`` tells of new entries."""
        cdef Queue *q = self.queue(index)
        cdef epoll_event ev
        if fd is None:
            raise ValueError(f"ring {index}: polling is not supported, a kick descriptor is needed")
        with self.parked():
            self._unwatch_kick(q)
            q.kick = fd
            # Edge-triggered: every write to an eventfd is an edge, so it is never read.
            ev.events = EPOLLIN | EPOLLET
            ev.data.u64 = watch_data(WATCH_KICK, 0, index)
            check(-errno if epoll_ctl(self.p.epfd, EPOLL_CTL_ADD, q.kick, &ev) != 0 else 0,
                  f"ring {index}: the kick descriptor")
            if q.used == NULL:
                raise ValueError(f"ring {index} was started before its address was set")
            if memory_gone(&self.p.mem):
                raise ValueError(f"ring {index} was started, but {FAULTS[-NO_MEMORY - 1]}")
            q.used_idx = q.published = (<uint16_t *>(q.used + 2))[0]
            q.broken = q.kicked = False
            q.most = 0
            q.started = True

    cdef _unwatch_kick(self, Queue *q):
        if q.kick >= 0:
            epoll_ctl(self.p.epfd, EPOLL_CTL_DEL, q.kick, NULL)
            close(q.kick)
            q.kick = -1

    def ring_call(self, int index, fd):
        """How the guest is interrupted; None: it polls."""
        cdef Queue *q = self.queue(index)
        cdef uint64_t one = 1
        with self.parked():
            replace(&q.call, fd)
            # QEMU starts a ring first and sets this after: what was used in
            # between went to the descriptor of before, which nobody reads. An
            # interrupt too many does no harm.
            if q.call >= 0 and q.started:
                write(q.call, &one, 8)

    def ring_err(self, int index, fd):
        """How the front-end is told that the ring is broken."""
        cdef Queue *q = self.queue(index)
        with self.parked():
            replace(&q.err, fd)

    def ring_enable(self, int index, bint enabled):
        """Enable or disable the ring (it runs when it is started too)."""
        cdef Queue *q = self.queue(index)
        with self.parked():
            q.enabled = enabled

    def ring_stop(self, int index):
        """Stop the ring. Returns the next available entry to take."""
        cdef Queue *q = self.queue(index)
        with self.parked():
            # Who takes the ring over may not know that it can say "no kicks" (--busy-poll leaves it at that).
            if index == TX and q.used != NULL and not q.broken:
                queue_notify_on(q, &self.p.mem, q.last_avail)
            q.started = False
            self._unwatch_kick(q)
            return q.last_avail

    def rings(self):
        """For each ring: (started, enabled, broken, next available entry, used index)."""
        return [(bool(self.p.queues[i].started), bool(self.p.queues[i].enabled), bool(self.p.queues[i].broken),
                 self.p.queues[i].last_avail, self.p.queues[i].used_idx) for i in range(QUEUES)]

    def take_faults(self):
        """For each ring that is broken: (index, which rule was broken, in words). Each is told once."""
        cdef int i
        found = []
        if not self.p.faults:
            return found
        with self.parked():
            self.p.faults = False
            for i in range(QUEUES):
                if self.p.queues[i].broken and self.p.queues[i].fault:
                    found.append((i, FAULTS[-self.p.queues[i].fault - 1]))
                    self.p.queues[i].fault = 0
        return found

    def sees_nothing(self):
        """Whether the guest says that it has put buffers into its receive ring, and there is none, ever.

        So it is when its memory is a private copy of what we were given.
        """
        cdef Queue *q = &self.p.queues[RX]
        with self.parked():
            return bool(q.started and q.kicked and q.last_avail == 0 and q.avail != NULL and queue_seen(q) == 0)

    def plug(self, StreamCard card not None):
        """Serve the guest behind a card of ours: with its memory and rings, until detach() or plug()."""
        cdef epoll_event ev
        with self.parked():
            self.detach()
            self.set_features(card.FEATURES)
            regions = []
            try:
                for region in card.regions():
                    regions.append((*region, os.dup(card.memory)))
            except OSError:
                for region in regions:
                    os.close(region[4])
                raise
            self.set_memory(regions)
            for index, ring in enumerate(card.rings()):
                self.ring_num(index, ring.num)
                self.ring_base(index, 0)
                self.ring_addr(index, 0, ring.descriptor, ring.used, ring.available, 0)
                self.ring_enable(index, True)
                # Nobody kicks: the card is looked at in each turn.
                self.ring_kick(index, os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            ev.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET
            ev.data.u64 = watch_data(WATCH_CARD, 0, 0)
            check(-errno if epoll_ctl(self.p.epfd, EPOLL_CTL_ADD, card.c.fd, &ev) != 0 else 0, "stream socket")
            self.card = card
            self.p.card = &card.c

    def detach(self):
        """The front-end is gone: rings, memory and log with it. Flows stay."""
        cdef int i
        cdef Queue *q
        with self.parked():
            if self.p.card != NULL:
                epoll_ctl(self.p.epfd, EPOLL_CTL_DEL, self.p.card.fd, NULL)
                self.p.card = NULL
                self.card = None
            for i in range(QUEUES):
                q = &self.p.queues[i]
                self._unwatch_kick(q)
                for fd in (q.call, q.err):
                    if fd >= 0:
                        close(fd)
                memset(q, 0, sizeof(Queue))
                q.kick = q.call = q.err = -1
            memory_clear(&self.p.mem)
            memory_clear_log(&self.p.mem)
            self.p.mem.log_all = False
            self.p.features = 0
            self.p.config.guest_mac_known = False
            # Who comes next may be another guest, or the same and be asked again.
            memset(self.p.seen4, 0, 16)
            memset(self.p.seen6, 0, 16)
            memset(self.p.seen6_ll, 0, 16)
            # Nor is what was to be said to the last one, or what it has asked, the next one's.
            store32_release(&self.p.down.tail, self.p.down.head)
            store32_release(&self.p.up.tail, self.p.up.head)
