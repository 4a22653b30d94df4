# SPDX-License-Identifier: GPL-2.0-or-later
"""Split virtqueues, the device's side (virtio 1.2, section 2.7).

The guest writes the descriptor table and the available ring while we read
them: every field is read once, and checked after it was read.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from godwit.dataplane.memory cimport Memory
from godwit.dataplane.sys cimport iovec, load16_acquire

cdef enum:
    RX = 0              # to the guest
    TX = 1              # from the guest
    QUEUES = 2
    MAX_QUEUE_SIZE = 32768
    MAX_CHAIN = 1024    # elements of one chain that we take: a 64 KiB frame in scraps of 64 bytes

# Why a ring is not served any more: the rule that the guest broke, or the front-end. In words: FAULTS, _rings.pyx.
cdef enum Fault:
    BAD_INDEX = -1      # more entries in the available ring than it has
    BAD_CHAIN = -2      # a descriptor that there is none of, or a loop
    BAD_ADDRESS = -3    # memory that it does not have
    BAD_DIRECTION = -4  # a buffer to be written in the ring that is read, or the other way
    BAD_TABLE = -5      # an indirect table within one, with others behind it, or of no whole number of entries
    NO_ROOM = -6        # more elements than are taken
    BAD_BUFFER = -7     # a receive buffer with no room for the header
    NO_MEMORY = -8      # the file that the guest's memory is in, or that of the dirty log, was cut off

cdef struct Queue:
    uint16_t num            # descriptors, a power of two
    uint16_t last_avail     # the next available entry to take
    uint16_t used_idx       # the next used entry to fill; published by queue_publish
    uint16_t published      # what the guest was last shown of it
    uint16_t most           # chains that waited at a time, since it was started (receive queue)
    bint event_idx          # VIRTIO_F_EVENT_IDX negotiated
    uint8_t *desc
    uint8_t *avail
    uint8_t *used
    uint64_t user_desc      # the ring's addresses as the front-end gave them
    uint64_t user_avail
    uint64_t user_used
    uint64_t log_addr       # guest-physical address for the log of the used ring
    bint log_used           # VHOST_VRING_F_LOG
    bint addr_set
    int kick                # eventfds; -1: none
    int call
    int err
    bint started            # between SET_VRING_KICK and GET_VRING_BASE
    bint kicked             # since it was started
    bint enabled
    bint broken             # a rule was broken; stays so until the ring is started anew
    int fault               # which (Fault)
    bint told               # the control thread knows

cdef inline uint16_t queue_seen(Queue *q) noexcept nogil:
    return load16_acquire(q.avail + 2)

cdef struct Chain:
    uint16_t head
    int count               # of iov
    uint64_t total          # bytes
    iovec iov[MAX_CHAIN]
    uint64_t guest_addr[MAX_CHAIN]

cdef inline bint queue_active(Queue *q) noexcept nogil:
    return q.started and q.enabled and not q.broken and q.desc != NULL

# How many chains wait from `last_avail` on; BAD_INDEX if the guest's index is absurd.
cdef int queue_pending(Queue *q) noexcept nogil
# Read the chain `ahead` entries after last_avail, appending to iov/guest_addr
# (room for `room` elements). Returns the elements added, or a Fault; NO_ROOM: it
# needs more elements than that.
cdef int queue_chain(Queue *q, Memory *m, int ahead, bint writable, iovec *iov,
                     uint64_t *guest_addr, int room, uint16_t *head, uint64_t *total) noexcept nogil
cdef void queue_used(Queue *q, uint16_t head, uint32_t written) noexcept nogil
cdef void queue_publish(Queue *q, Memory *m) noexcept nogil
cdef void queue_notify_off(Queue *q, Memory *m) noexcept nogil
# Ask for a kick at the next entry that the guest adds. `seen` is its index as
# it was before the ring was looked at for the last time: True if it has added
# one since then, of which no kick tells.
cdef bint queue_notify_on(Queue *q, Memory *m, uint16_t seen) noexcept nogil
cdef int queue_map(Queue *q, Memory *m) noexcept nogil
cdef void queue_break(Queue *q, int fault) noexcept nogil
