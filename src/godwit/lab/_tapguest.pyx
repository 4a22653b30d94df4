# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames between a TAP device and two virtqueues: the driver's side of both rings.

The embedded guest's network card. A frame from the TAP device is read straight
into a buffer of the transmit ring; what the back-end puts into the receive ring
is written to the TAP device straight from there. Both carry the same header, so
nothing is parsed, with one exception (`_vouched`).

One thread runs `Mover._run` without the GIL. Everything else may only touch the
rings while it is parked: `pause` returns when it is, `resume` lets it go on.

The mover is also a witness: a used ring that no correct back-end could write
ends it, and `Mover.failure` says why.

Descriptor layouts of the transmit ring, for back-ends to be tried with all:
one descriptor per frame (chunk 0), or the header in one and the frame in pieces
of `chunk` bytes after it, chained in the ring or in an indirect table.
"""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

import os
import threading

from godwit.dataplane.driver cimport (
    VRING_DESC_F_INDIRECT,
    VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
    Ring,
    ring_init,
    ring_listen,
    ring_put,
    ring_quiet,
    ring_show,
    ring_signal,
    ring_used,
    ring_wants_kick,
    vring_desc,
    vring_used_elem,
)
from godwit.dataplane.sys cimport POLLIN, poll, pollfd
from godwit.lab._measure cimport flag_load, flag_store

cdef extern from "<sys/uio.h>" nogil:
    cdef struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t writev(int fd, const iovec *vec, int count)

cdef extern from "<unistd.h>" nogil:
    ssize_t read(int fd, void *buf, size_t n)

cdef extern from "<sys/prctl.h>" nogil:
    int prctl(int option, ...)
    enum:
        PR_SET_NAME

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        int fd
    cdef struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_ctl(int epfd, int op, int fd, epoll_event *event)
    int epoll_wait(int epfd, epoll_event *events, int count, int timeout)
    enum:
        EPOLLIN
        EPOLL_CLOEXEC
        EPOLL_CTL_ADD
        EPOLL_CTL_MOD
        EPOLL_CTL_DEL

cdef extern from "<linux/virtio_net.h>" nogil:
    cdef struct virtio_net_hdr_v1:
        uint8_t flags
        uint8_t gso_type
        uint16_t hdr_len
        uint16_t gso_size
        uint16_t csum_start
        uint16_t csum_offset
        uint16_t num_buffers
    enum:
        VIRTIO_NET_HDR_F_NEEDS_CSUM
        VIRTIO_NET_HDR_F_DATA_VALID
        VIRTIO_NET_HDR_GSO_NONE

cdef extern from *:
    """
    #define GODWIT_HEADER ((size_t)12)
    #define GODWIT_IOV 1024            /* UIO_MAXIOV */
    _Static_assert(sizeof(struct virtio_net_hdr_v1) == GODWIT_HEADER, "header of virtio 1.x");
    """
    const size_t GODWIT_HEADER
    const int GODWIT_IOV

cdef enum:
    BATCH = 64        # frames one way before the other way has its turn

cdef enum Order:
    RUN = 0
    PARK = 1
    END = 2

cdef enum Failure:
    FINE = 0
    RX_JUMP = 1
    RX_ID = 2
    RX_LENGTH = 3
    RX_COUNT = 4
    RX_HEADER = 5
    TX_JUMP = 6
    TX_ID = 7
    TAP_GONE = 8

_FAILURES = {
    RX_JUMP: "receive ring: the used index ran ahead of the buffers given",
    RX_ID: "receive ring: a used entry names a buffer that the back-end did not have",
    RX_LENGTH: "receive ring: a used length is larger than its buffer, or too small for a frame",
    RX_COUNT: "receive ring: num_buffers is 0, or more than were used with the frame's first",
    RX_HEADER: "receive ring: a header with an offload that was not negotiated",
    TX_JUMP: "transmit ring: the used index ran ahead of the frames given",
    TX_ID: "transmit ring: a used entry names a frame that the back-end did not have",
    TAP_GONE: "the TAP device failed",
}

cdef inline void drain(int fd) noexcept nogil:
    cdef uint64_t count
    read(fd, &count, sizeof(count))


cdef inline void await_token(int fd) noexcept nogil:
    cdef uint64_t count
    while read(fd, &count, sizeof(count)) < 0 and errno == EINTR:
        pass


cdef class Mover:
    """See the module. Addresses are of this process, ``gpa`` the guest's view of them.

    ``tx_layout``: 0 one descriptor per frame, 1 chains, 2 indirect tables.
    """

    cdef:
        Ring _rx
        Ring _tx
        int _tap
        int _epoll
        int _control              # eventfd: an order is there to be read
        int _parked               # eventfd, blocking: the order has been followed
        int _resumed              # eventfd, blocking: go on
        int _order
        int _failure
        int _tap_errno
        object _thread
        bint _event_idx
        bint _guest_csum
        bint _guest_tso
        bint _tap_watched
        # buffers of the receive ring
        uint8_t *_rx_buffers
        uint64_t _rx_gpa
        uint32_t _rx_size
        uint8_t *_rx_lent         # per buffer: the back-end has it
        # frames of the transmit ring
        uint8_t *_tx_frames
        uint64_t _tx_gpa
        uint32_t _tx_size
        vring_desc *_tx_tables
        uint64_t _tx_tables_gpa
        uint32_t _tx_chunk
        uint32_t _tx_pieces       # descriptors set aside for each frame
        int _tx_layout
        uint32_t _tx_slots
        uint32_t _tx_free
        uint16_t *_tx_stack       # free slots
        uint8_t *_tx_lent         # per slot: the back-end has it
        iovec _iov[1024]
        # counters
        uint64_t _tx_frame_count
        uint64_t _tx_bytes
        uint64_t _tx_kicks
        uint64_t _tx_stalls
        uint64_t _tx_gso
        uint64_t _rx_frame_count
        uint64_t _rx_bytes
        uint64_t _rx_kicks
        uint64_t _rx_gso
        uint64_t _rx_vouched
        uint64_t _rx_refused
        uint64_t _waits

    def __cinit__(self):
        self._epoll = -1
        self._control = self._parked = self._resumed = -1
        self._rx.kick = self._rx.call = self._tx.kick = self._tx.call = -1

    def __init__(self, int tap, *, uint32_t num,
                 rx_ring, uintptr_t rx_buffers, uint64_t rx_gpa, uint32_t rx_size,
                 tx_ring, uintptr_t tx_frames, uint64_t tx_gpa, uint32_t tx_size,
                 uintptr_t tx_tables, uint64_t tx_tables_gpa, uint32_t tx_chunk, int tx_layout):
        if self._epoll >= 0:
            raise RuntimeError("a mover is made once")
        if num < 2 or num > 32768 or num & (num - 1):
            raise ValueError("the ring's size must be a power of two")
        if tx_layout and not tx_chunk:
            raise ValueError("a layout in pieces needs their size")
        self._tap = tap
        self._rx_buffers = <uint8_t *>rx_buffers
        self._rx_gpa = rx_gpa
        self._rx_size = rx_size
        self._tx_frames = <uint8_t *>tx_frames
        self._tx_gpa = tx_gpa
        self._tx_size = tx_size
        self._tx_tables = <vring_desc *>tx_tables
        self._tx_tables_gpa = tx_tables_gpa
        self._tx_layout = tx_layout
        self._tx_chunk = tx_chunk
        self._tx_pieces = 1 + (tx_size + tx_chunk - 1) // tx_chunk if tx_layout else 1
        self._tx_slots = num // self._tx_pieces if tx_layout == 1 else num
        if self._tx_slots == 0:
            raise ValueError("the ring is too small for frames in so many pieces")
        self._rx_lent = <uint8_t *>calloc(num, 1)
        self._tx_lent = <uint8_t *>calloc(num, 1)
        self._tx_stack = <uint16_t *>calloc(num, sizeof(uint16_t))
        if self._rx_lent is NULL or self._tx_lent is NULL or self._tx_stack is NULL:
            raise MemoryError
        self._rx.num = self._tx.num = num
        self._control = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._parked = os.eventfd(0, os.EFD_CLOEXEC)
        self._resumed = os.eventfd(0, os.EFD_CLOEXEC)
        self._epoll = epoll_create1(EPOLL_CLOEXEC)
        if self._epoll < 0:
            raise OSError(errno, "epoll_create1")
        self._watch(EPOLL_CTL_ADD, self._control, EPOLLIN)
        self._watch(EPOLL_CTL_ADD, tap, EPOLLIN)
        self._tap_watched = True
        self._order = PARK
        self.reset(rx_ring, tx_ring)

    def __dealloc__(self):
        # Descriptors were opened through os; closing them must not fail loudly here.
        for fd in (self._epoll, self._control, self._parked, self._resumed):
            if fd >= 0:
                try:
                    os.close(fd)
                except OSError:
                    pass
        free(self._rx_lent)
        free(self._tx_lent)
        free(self._tx_stack)

    cdef int _watch(self, int op, int fd, uint32_t events) noexcept nogil:
        cdef epoll_event event
        event.events = events
        event.data.fd = fd
        return epoll_ctl(self._epoll, op, fd, &event)

    def reset(self, rx_ring, tx_ring):
        """Start both rings afresh, as a driver does that binds to its device.

        ``rx_ring`` and ``tx_ring`` are (descriptors, available, used), addresses
        of this process. Only while parked.
        """
        cdef uint32_t i, num = self._rx.num
        cdef vring_desc *desc
        self._require_parked()
        ring_init(&self._rx, rx_ring[0], rx_ring[1], rx_ring[2], num)
        ring_init(&self._tx, tx_ring[0], tx_ring[1], tx_ring[2], num)
        memset(self._tx_lent, 0, num)
        for i in range(num):
            desc = &self._rx.desc[i]
            desc.addr = self._rx_gpa + <uint64_t>i * self._rx_size
            desc.len = self._rx_size
            desc.flags = VRING_DESC_F_WRITE
            self._rx_lent[i] = 1
            ring_put(&self._rx, i)
            ring_show(&self._rx)
        self._tx_free = self._tx_slots
        for i in range(self._tx_slots):
            self._tx_stack[i] = self._tx_slots - 1 - i
        self._failure = FINE

    def attach(self, *, int rx_kick, int rx_call, int tx_kick, int tx_call,
               bint event_idx, bint guest_csum, bint guest_tso):
        """Use these eventfds (calls non-blocking) and features from now on. Only while parked."""
        self._require_parked()
        self.detach()
        self._event_idx = event_idx
        self._guest_csum = guest_csum
        self._guest_tso = guest_tso
        self._rx.kick, self._rx.call = rx_kick, rx_call
        self._tx.kick, self._tx.call = tx_kick, tx_call
        if (self._watch(EPOLL_CTL_ADD, rx_call, EPOLLIN) < 0
                or self._watch(EPOLL_CTL_ADD, tx_call, EPOLLIN) < 0):
            raise OSError(errno, "epoll_ctl")

    def detach(self):
        """Forget the eventfds, before they are closed. Only while parked."""
        self._require_parked()
        for fd in (self._rx.call, self._tx.call):
            if fd >= 0:
                self._watch(EPOLL_CTL_DEL, fd, 0)
        self._rx.kick = self._rx.call = self._tx.kick = self._tx.call = -1

    def _require_parked(self):
        if self._order != PARK:
            raise RuntimeError("the mover is not parked")

    def used_index(self, int queue):
        """Return the used index as the back-end last wrote it: 0 the receive ring, 1 transmit."""
        return ring_used(&self._rx if queue == 0 else &self._tx)

    def available_index(self, int queue):
        """Return the available index: 0 the receive ring, 1 transmit."""
        return (self._rx if queue == 0 else self._tx).made

    @property
    def failure(self):
        """What the back-end did that none may do, or None."""
        if self._failure == FINE:
            return None
        text = _FAILURES[self._failure]
        if self._failure == TAP_GONE:
            text += ": " + os.strerror(self._tap_errno)
        return text

    @property
    def counters(self):
        """Numbers since the start, by name."""
        return {
            "from_guest_frames": self._tx_frame_count,
            "from_guest_bytes": self._tx_bytes,
            "from_guest_gso": self._tx_gso,
            "from_guest_kicks": self._tx_kicks,
            "from_guest_stalls": self._tx_stalls,
            "to_guest_frames": self._rx_frame_count,
            "to_guest_bytes": self._rx_bytes,
            "to_guest_gso": self._rx_gso,
            "to_guest_vouched": self._rx_vouched,
            "to_guest_refused": self._rx_refused,
            "to_guest_kicks": self._rx_kicks,
            "waits": self._waits,
        }

    # --- orders, from other threads -------------------------------------

    def pause(self):
        """Return when the thread is parked. No effect when it is, or has ended."""
        if self._order != RUN:
            return
        flag_store(&self._order, PARK)
        ring_signal(self._control)
        with nogil:
            await_token(self._parked)

    def resume(self):
        """Let the thread go on, from `pause` or from its start."""
        if self._order != PARK or self._thread is None:
            return
        flag_store(&self._order, RUN)
        ring_signal(self._resumed)

    def start(self):
        """Start the thread, parked."""
        if self._thread is not None:
            raise RuntimeError("a mover is started once")
        self._thread = threading.Thread(target=self._run, name="tapguest", daemon=True)
        self._thread.start()

    def end(self):
        """End the thread, for good, parked or not."""
        cdef int before = self._order
        if self._thread is None:
            return
        flag_store(&self._order, END)
        ring_signal(self._control)
        if before == PARK:
            ring_signal(self._resumed)
        self._thread.join()
        self._order = PARK

    def _run(self):
        with nogil:
            prctl(PR_SET_NAME, b"tapguest")
            while True:
                await_token(self._resumed)
                drain(self._control)
                if self._failure == FINE:
                    self._failure = self._loop()
                while flag_load(&self._order) == RUN:
                    self._sleep()        # failed: follow orders, but touch no ring any more
                if flag_load(&self._order) == END:
                    break
                ring_signal(self._parked)

    # --- the loop ---------------------------------------------------------

    cdef void _sleep(self) noexcept nogil:
        cdef pollfd control
        control.fd = self._control
        control.events = POLLIN
        poll(&control, 1, -1)
        drain(self._control)

    cdef int _loop(self) noexcept nogil:
        cdef epoll_event events[4]
        cdef int failure, count, i, taken, given
        cdef bint stalled
        if self._rx.kick < 0:
            # Parked is what one is without a back-end; never spin here.
            while flag_load(&self._order) == RUN:
                self._sleep()
            return FINE
        # What was made available meanwhile may have gone unnoticed.
        ring_signal(self._rx.kick)
        ring_signal(self._tx.kick)
        while flag_load(&self._order) == RUN:
            failure = self._reclaim()
            if failure != FINE:
                return failure
            taken = self._from_tap()
            if taken < 0:
                return -taken
            given = self._to_tap()
            if given < 0:
                return -given
            if taken or given:
                continue
            stalled = self._tx_free == 0
            if not ring_listen(&self._rx, self._event_idx):
                ring_quiet(&self._rx, self._event_idx)
                continue
            if stalled:
                self._tx_stalls += 1
                if not ring_listen(&self._tx, self._event_idx):
                    ring_quiet(&self._tx, self._event_idx)
                    continue
            if self._tap_watched == stalled:
                self._watch(EPOLL_CTL_MOD, self._tap, 0 if stalled else EPOLLIN)
                self._tap_watched = not stalled
            self._waits += 1
            count = epoll_wait(self._epoll, events, 4, -1)
            for i in range(count):
                if events[i].data.fd == self._rx.call or events[i].data.fd == self._tx.call:
                    drain(events[i].data.fd)
            ring_quiet(&self._rx, self._event_idx)
            ring_quiet(&self._tx, self._event_idx)
        return FINE

    cdef int _reclaim(self) noexcept nogil:
        """Take back the frames that the back-end is done with."""
        cdef uint16_t used = ring_used(&self._tx)
        cdef uint32_t slot, head
        if <uint16_t>(used - self._tx.seen) > self._tx_slots - self._tx_free:
            return TX_JUMP
        while self._tx.seen != used:
            head = self._tx.elems[self._tx.seen & (self._tx.num - 1)].id
            slot = head
            if self._tx_layout == 1:
                slot = head // self._tx_pieces
                if head % self._tx_pieces:
                    return TX_ID
            if slot >= self._tx_slots or not self._tx_lent[slot]:
                return TX_ID
            self._tx_lent[slot] = 0
            self._tx_stack[self._tx_free] = slot
            self._tx_free += 1
            self._tx.seen += 1
        return FINE

    cdef int _from_tap(self) noexcept nogil:
        """Put frames from the TAP device into the transmit ring; how many, or minus a failure."""
        cdef int done = 0
        cdef ssize_t size
        cdef uint32_t slot
        cdef uint8_t *frame
        cdef virtio_net_hdr_v1 *header
        cdef uint16_t before
        while done < BATCH and self._tx_free > 0:
            slot = self._tx_stack[self._tx_free - 1]
            frame = self._tx_frames + <uint64_t>slot * self._tx_size
            size = read(self._tap, frame, self._tx_size)
            if size < 0:
                if errno == EAGAIN or errno == EINTR:
                    break
                self._tap_errno = errno
                return -TAP_GONE
            if size < <ssize_t>(GODWIT_HEADER + 14):
                continue
            self._tx_free -= 1
            header = <virtio_net_hdr_v1 *>frame
            # The kernel says of frames it forwards that they are valid; a driver never may.
            header.flags &= VIRTIO_NET_HDR_F_NEEDS_CSUM
            header.num_buffers = 0
            before = self._tx.made
            self._tx_lent[slot] = 1
            ring_put(&self._tx, self._describe(slot, <uint32_t>size))
            ring_show(&self._tx)
            if ring_wants_kick(&self._tx, before, self._event_idx):
                self._tx_kicks += 1
                ring_signal(self._tx.kick)
            self._tx_frame_count += 1
            self._tx_bytes += size - GODWIT_HEADER
            self._tx_gso += header.gso_type != VIRTIO_NET_HDR_GSO_NONE
            done += 1
        return done

    cdef uint16_t _describe(self, uint32_t slot, uint32_t size) noexcept nogil:
        """Write the descriptors of a frame and return the chain's head."""
        cdef uint64_t gpa = self._tx_gpa + <uint64_t>slot * self._tx_size
        cdef uint32_t first = 0, count = 0, at = 0, piece = GODWIT_HEADER
        cdef vring_desc *desc = self._tx.desc
        if self._tx_layout == 0:
            desc[slot].addr = gpa
            desc[slot].len = size
            desc[slot].flags = 0
            return slot
        if self._tx_layout == 1:
            first = slot * self._tx_pieces
            desc += first
        else:
            desc = self._tx_tables + <uint64_t>slot * self._tx_pieces
        while at < size:
            if piece > size - at:
                piece = size - at
            desc[count].addr = gpa + at
            desc[count].len = piece
            desc[count].flags = VRING_DESC_F_NEXT
            desc[count].next = first + count + 1
            at += piece
            piece = self._tx_chunk
            count += 1
        desc[count - 1].flags = 0
        if self._tx_layout == 1:
            return first
        desc = &self._tx.desc[slot]
        desc.addr = self._tx_tables_gpa + <uint64_t>slot * self._tx_pieces * sizeof(vring_desc)
        desc.len = count * sizeof(vring_desc)
        desc.flags = VRING_DESC_F_INDIRECT
        return slot

    cdef int _to_tap(self) noexcept nogil:
        """Write frames from the receive ring to the TAP device; how many, or minus a failure."""
        cdef int done = 0
        cdef uint16_t used, before
        cdef uint32_t count, i, idx, size, there
        cdef uint64_t total
        cdef vring_used_elem *elem
        cdef virtio_net_hdr_v1 *header
        cdef ssize_t written
        while done < BATCH:
            used = ring_used(&self._rx)
            there = <uint16_t>(used - self._rx.seen)
            if there == 0:
                break
            if there > self._rx.num:
                return -RX_JUMP
            count = 1
            total = 0
            i = 0
            header = NULL
            while i < count:
                elem = &self._rx.elems[<uint16_t>(self._rx.seen + i) & (self._rx.num - 1)]
                idx = elem.id
                size = elem.len
                if idx >= self._rx.num or not self._rx_lent[idx]:
                    return -RX_ID
                if size > self._rx_size or size == 0:
                    return -RX_LENGTH
                self._rx_lent[idx] = 0
                self._iov[i].iov_base = self._rx_buffers + <uint64_t>idx * self._rx_size
                self._iov[i].iov_len = size
                if i == 0:
                    if size < GODWIT_HEADER:
                        return -RX_LENGTH
                    header = <virtio_net_hdr_v1 *>self._iov[0].iov_base
                    count = header.num_buffers
                    if count == 0 or count > there or count > <uint32_t>GODWIT_IOV:
                        return -RX_COUNT
                total += size
                i += 1
            if total < GODWIT_HEADER + 14:
                return -RX_LENGTH
            if header.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM and not self._guest_csum:
                return -RX_HEADER
            if header.gso_type != VIRTIO_NET_HDR_GSO_NONE:
                if not self._guest_tso:
                    return -RX_HEADER
                self._rx_gso += 1
            if (header.flags & VIRTIO_NET_HDR_F_DATA_VALID
                    and not header.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM):
                self._vouched(header, <uint32_t>self._iov[0].iov_len)
            written = writev(self._tap, self._iov, count)
            if written < 0:
                self._rx_refused += 1
                self._tap_errno = errno
            self._rx_frame_count += 1
            self._rx_bytes += total - GODWIT_HEADER
            before = self._rx.made
            for i in range(count):
                idx = self._rx.elems[<uint16_t>(self._rx.seen + i) & (self._rx.num - 1)].id
                self._rx_lent[idx] = 1
                ring_put(&self._rx, idx)
                ring_show(&self._rx)
            self._rx.seen += count
            if ring_wants_kick(&self._rx, before, self._event_idx):
                self._rx_kicks += 1
                ring_signal(self._rx.kick)
            done += 1
        return done

    cdef void _vouched(self, virtio_net_hdr_v1 *header, uint32_t size) noexcept nogil:
        """Pass on that the back-end vouches for a checksum (DATA_VALID).

        A Linux guest takes its word, and back-ends rely on that: they leave the
        field blank. The TAP device knows no such flag, but takes a packet whose
        checksum is still to be filled in, and delivers it unchecked.
        """
        cdef uint8_t *frame = <uint8_t *>header + GODWIT_HEADER
        cdef uint32_t start, left = size - GODWIT_HEADER
        cdef uint8_t proto
        if left < 14 + 20:
            return
        if frame[12] == 0x08 and frame[13] == 0x00:
            start = 14 + (frame[14] & 15) * 4
            proto = frame[14 + 9]
            if (frame[14 + 6] & 0x3F) or frame[14 + 7]:     # a fragment
                return
        elif frame[12] == 0x86 and frame[13] == 0xDD:
            start = 14 + 40
            proto = frame[14 + 6]
        else:
            return
        if proto == 6 and start + 20 <= left:
            header.csum_offset = 16
        elif proto == 17 and start + 8 <= left:
            header.csum_offset = 6
        else:
            return
        header.csum_start = start
        header.flags |= VIRTIO_NET_HDR_F_NEEDS_CSUM
        self._rx_vouched += 1
