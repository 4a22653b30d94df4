# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# SPDX-License-Identifier: GPL-2.0-or-later
"""The loop of the ideal back-end (``ideal``), between the two rings and what ``_far`` has to say.

While a ring is being changed, the thread is not there: each change ends it and
lets it begin anew (`Loop._parked`). That is slow, and happens a dozen times.
"""

from contextlib import contextmanager
import os
import threading

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from godwit.dataplane.memory cimport Memory, memory_add, memory_clear
from godwit.dataplane.sys cimport (
    EPOLLET,
    EPOLLIN,
    EPOLL_CLOEXEC,
    EPOLL_CTL_ADD,
    PR_SET_NAME,
    close,
    epoll_create1,
    epoll_ctl,
    epoll_event,
    epoll_wait,
    errno,
    iovec,
    load32_acquire,
    prctl,
    store32_release,
)
from godwit.dataplane.virtqueue cimport (
    MAX_CHAIN,
    NO_ROOM,
    QUEUES,
    RX,
    TX,
    Queue,
    queue_active,
    queue_break,
    queue_chain,
    queue_map,
    queue_notify_off,
    queue_notify_on,
    queue_pending,
    queue_publish,
    queue_seen,
    queue_used,
)
from godwit.lab._far cimport AT_NUM_BUFFERS, FAR_HEADERS, Far, Source, far_due, far_hear, far_say

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef enum:
    YIELDS = 50         # of the processor to others, before the thread sleeps
    BATCH = 64          # frames before the guest is shown that they were taken
    MOST = 1 << 20      # bytes of a frame

cdef enum Outcome:
    DONE = 0
    NOTHING = 1         # no frame is there
    NO_BUFFERS = 2      # one is there, but too little room
    BROKEN = 3


cdef uint64_t copy(iovec *to, int to_count, iovec *origin, int count, uint64_t most) noexcept nogil:
    """Copy up to `most` bytes from one list of pieces into another; how many there were."""
    cdef int i = 0, j = 0
    cdef size_t at = 0, there = 0, part
    cdef uint64_t done = 0
    while i < count and j < to_count and done < most:
        part = origin[i].iov_len - at
        if part > to[j].iov_len - there:
            part = to[j].iov_len - there
        if part > most - done:
            part = most - done
        memcpy(<uint8_t *>to[j].iov_base + there, <uint8_t *>origin[i].iov_base + at, part)
        done += part
        at += part
        there += part
        if at == origin[i].iov_len:
            at = 0
            i += 1
        if there == to[j].iov_len:
            there = 0
            j += 1
    return done


cdef class Loop:
    """Two rings, and the thread that serves them while both are started and enabled."""

    cdef:
        Memory _memory
        Queue _queues[2]
        int _epoll
        uint32_t _end           # the thread is to end
        object _wake            # eventfd: for it to see that
        object _thread
        iovec _in[MAX_CHAIN]
        iovec _out[MAX_CHAIN]
        uint64_t _guest_addr[MAX_CHAIN]     # which nobody needs here
        # buffers found for a frame
        int _pieces
        int _chains
        uint16_t _heads[MAX_CHAIN]
        uint32_t _sizes[MAX_CHAIN]
        Far _far
        bint _services
        uint64_t _frames

    def __cinit__(self):
        cdef int i
        self._epoll = -1
        for i in range(QUEUES):
            self._queues[i].kick = self._queues[i].call = self._queues[i].err = -1

    def __init__(self):
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def __dealloc__(self):
        if self._wake is not None:
            close(self._wake)

    @property
    def frames(self):
        """Frames given to the guest so far."""
        return self._frames

    # --- what the front-end says; descriptors are this object's from then on

    @contextmanager
    def _parked(self):
        if self._thread is not None:
            store32_release(&self._end, 1)
            os.eventfd_write(self._wake, 1)
            self._thread.join()
            os.eventfd_read(self._wake)
            self._end = 0
            self._thread = None
        try:
            yield
        finally:
            if queue_active(&self._queues[RX]) and queue_active(&self._queues[TX]):
                self._thread = threading.Thread(target=self._run, name="ideal", daemon=True)
                self._thread.start()

    cdef Queue *_queue(self, int index) except NULL:
        if not 0 <= index < QUEUES:
            raise ValueError(f"no ring {index}")
        return &self._queues[index]

    def set_features(self, *, bint event_idx, bint services):
        """``event_idx``: VIRTIO_F_EVENT_IDX; ``services``: the guest takes segments of 64 KiB without a checksum."""
        cdef int i
        with self._parked():
            for i in range(QUEUES):
                self._queues[i].event_idx = event_idx
            self._services = services

    def set_memory(self, regions):
        """Map these (guest address, size, front-end's address, offset, descriptor); :class:`OSError` if one cannot be.

        Rings that were mapped are no more.
        """
        cdef int i, rc = 0
        with self._parked():
            for i in range(QUEUES):
                self._queues[i].desc = NULL
            memory_clear(&self._memory)
            for guest_addr, size, user_addr, offset, fd in regions:
                if rc == 0:
                    rc = memory_add(&self._memory, guest_addr, size, user_addr, offset, fd)
                if rc != 0:
                    os.close(fd)
            if rc != 0:
                raise OSError(-rc, f"guest memory: {os.strerror(-rc)}")

    def set_num(self, int index, int num):
        """The ring's size, a power of two."""
        cdef Queue *queue = self._queue(index)
        with self._parked():
            queue.num = num

    def set_addr(self, int index, uint64_t desc, uint64_t used, uint64_t avail):
        """Where the ring lies, in the front-end's address space; :class:`OSError` if not in memory that is shared."""
        cdef Queue *queue = self._queue(index)
        cdef int rc
        with self._parked():
            queue.user_desc, queue.user_used, queue.user_avail = desc, used, avail
            queue.addr_set = True
            rc = queue_map(queue, &self._memory)
            if rc != 0:
                raise OSError(-rc, f"ring {index}: {os.strerror(-rc)}")

    def set_base(self, int index, uint16_t base):
        """The next available entry to take."""
        cdef Queue *queue = self._queue(index)
        with self._parked():
            queue.last_avail = base

    def start_ring(self, int index, int kick):
        """SET_VRING_KICK: the ring runs."""
        cdef Queue *queue = self._queue(index)
        with self._parked():
            self._replace(&queue.kick, kick)
            if queue.desc == NULL:
                raise ValueError(f"ring {index} was started before it had an address")
            queue.used_idx = queue.published = (<uint16_t *>(queue.used + 2))[0]
            queue.broken = False
            queue.started = True

    def set_call(self, int index, fd):
        """By what the guest is notified, or None."""
        cdef Queue *queue = self._queue(index)
        with self._parked():
            self._replace(&queue.call, -1 if fd is None else fd)

    def set_err(self, int index, fd):
        """By what the front-end is told of a broken ring, or None."""
        cdef Queue *queue = self._queue(index)
        with self._parked():
            self._replace(&queue.err, -1 if fd is None else fd)

    def enable(self, int index, bint enabled):
        """SET_VRING_ENABLE."""
        cdef Queue *queue = self._queue(index)
        with self._parked():
            queue.enabled = enabled

    def stop_ring(self, int index):
        """GET_VRING_BASE: the ring stops; return its next available entry."""
        cdef Queue *queue = self._queue(index)
        with self._parked():
            queue.started = False
        return queue.last_avail

    def detach(self):
        """Let go of everything that came from the front-end."""
        cdef int i
        with self._parked():
            for i in range(QUEUES):
                self._queues[i].started = self._queues[i].enabled = self._queues[i].addr_set = False
                self._queues[i].desc = NULL
                self._replace(&self._queues[i].kick, -1)
                self._replace(&self._queues[i].call, -1)
                self._replace(&self._queues[i].err, -1)
            memory_clear(&self._memory)

    cdef void _replace(self, int *place, int fd) noexcept:
        if place[0] >= 0:
            close(place[0])
        place[0] = fd

    # --- the thread

    def _run(self):
        cdef int fd
        cdef epoll_event event
        self._epoll = epoll_create1(EPOLL_CLOEXEC)
        if self._epoll < 0:
            raise OSError(errno, "epoll_create1")
        try:
            # Edge-triggered: every write to an eventfd is an edge, so none is read.
            event.events = EPOLLIN | <uint32_t>EPOLLET
            event.data.u64 = 0
            for fd in (self._wake, self._queues[RX].kick, self._queues[TX].kick):
                if epoll_ctl(self._epoll, EPOLL_CTL_ADD, fd, &event) < 0:
                    raise OSError(errno, "epoll_ctl")
            with nogil:
                prctl(PR_SET_NAME, b"ideal")
                self._loop()
        finally:
            close(self._epoll)

    cdef void _loop(self) noexcept nogil:
        cdef Queue *rx = &self._queues[RX]
        cdef Queue *tx = &self._queues[TX]
        cdef epoll_event events[4]
        cdef uint16_t rx_seen, tx_seen
        cdef Outcome heard, said
        cdef int i, idle = 0
        while not load32_acquire(&self._end):
            rx_seen, tx_seen = queue_seen(rx), queue_seen(tx)
            heard = said = DONE
            for i in range(BATCH):
                if heard == DONE:
                    heard = self._hear(rx, tx)
            queue_publish(tx, &self._memory)
            for i in range(BATCH):
                if said == DONE:
                    said = self._say(rx)
            if heard == DONE or said == DONE:
                idle = 0
                continue
            if idle < YIELDS:
                # A kick is work for the front-end, so it is asked for only when nothing comes for a while.
                idle += 1
                sched_yield()
                continue
            if heard == NOTHING and queue_notify_on(tx, &self._memory, tx_seen):
                continue
            if (heard == NO_BUFFERS or said == NO_BUFFERS) and queue_notify_on(rx, &self._memory, rx_seen):
                continue
            epoll_wait(self._epoll, events, 4, -1)
            idle = 0
            queue_notify_off(rx, &self._memory)
            queue_notify_off(tx, &self._memory)

    cdef Outcome _hear(self, Queue *rx, Queue *tx) noexcept nogil:
        """Take the next frame, and give the guest the answer."""
        cdef uint8_t headers[FAR_HEADERS]
        cdef iovec start
        cdef uint64_t size, looked
        cdef uint32_t answer
        cdef uint16_t head
        cdef int count = -1, given, pending = queue_pending(tx)
        cdef Outcome outcome = DONE
        if pending == 0:
            return NOTHING
        if pending > 0 and not tx.broken:
            count = queue_chain(tx, &self._memory, 0, False, self._in, self._guest_addr, MAX_CHAIN, &head, &size)
        if count < 0 or size > MOST:
            queue_break(tx, count if count < 0 else NO_ROOM)
            return BROKEN
        # Answered or not, the state of the far end is that of one that has heard it. So there has to be
        # room before; that for the frame itself is enough for any answer.
        outcome = self._reserve(rx, size + FAR_HEADERS)
        if outcome != DONE:
            return outcome
        start.iov_base, start.iov_len = headers, FAR_HEADERS
        looked = copy(&start, 1, self._in, count, FAR_HEADERS)
        given = far_hear(&self._far, headers, <uint32_t>looked, <uint32_t>size, self._services, &answer)
        if given > 0:
            if answer > looked:
                copy(self._out, self._pieces, self._in, count, answer)
            self._give(rx, headers, given, answer)
        tx.last_avail += 1
        queue_used(tx, head, 0)
        return DONE

    cdef Outcome _say(self, Queue *rx) noexcept nogil:
        """Give the guest the next segment of a source."""
        cdef uint8_t headers[FAR_HEADERS]
        cdef uint32_t payload, size
        cdef Source *source = far_due(&self._far, &payload)
        cdef Outcome outcome
        if source == NULL:
            return NOTHING
        outcome = self._reserve(rx, FAR_HEADERS + payload)
        if outcome == DONE:
            size = far_say(source, payload, headers)
            self._give(rx, headers, size, size + payload)
        return outcome

    cdef Outcome _reserve(self, Queue *rx, uint64_t size) noexcept nogil:
        """Find the guest's next buffers, as many as hold so much; they are not taken yet."""
        cdef int n, pending = queue_pending(rx)
        cdef uint64_t part, room = 0
        self._pieces = self._chains = 0
        while room < size:
            if self._chains == pending:
                return NO_BUFFERS
            n = -1
            # Chains may have no bytes, and so no pieces.
            if pending > 0 and not rx.broken and self._chains < MAX_CHAIN:
                n = queue_chain(rx, &self._memory, self._chains, True, self._out + self._pieces, self._guest_addr,
                                MAX_CHAIN - self._pieces, &self._heads[self._chains], &part)
            if n < 0:
                queue_break(rx, n)
                return BROKEN
            self._sizes[self._chains] = <uint32_t>part
            room += part
            self._pieces += n
            self._chains += 1
        return DONE

    cdef void _give(self, Queue *rx, uint8_t *headers, uint32_t known, uint32_t size) noexcept nogil:
        """Give the guest a frame of `size` bytes in the buffers found, the first `known` of which are `headers`."""
        cdef iovec start
        cdef uint32_t part, left = size
        cdef int chains = 0
        while left:
            part = self._sizes[chains] if self._sizes[chains] < left else left
            queue_used(rx, self._heads[chains], part)
            left -= part
            chains += 1
        put_num_buffers(headers, chains)
        start.iov_base, start.iov_len = headers, known
        copy(self._out, self._pieces, &start, 1, known)
        rx.last_avail += chains
        queue_publish(rx, &self._memory)
        self._frames += 1


cdef inline void put_num_buffers(uint8_t *headers, int chains) noexcept nogil:
    headers[AT_NUM_BUFFERS] = chains & 0xFF
    headers[AT_NUM_BUFFERS + 1] = chains >> 8
