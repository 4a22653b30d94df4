# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's network card, where that is ours: see card.pyx."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from godwit.dataplane.driver cimport Ring
from godwit.dataplane.sys cimport iovec

cdef enum:
    TX_NUM = 1024           # descriptors from the guest: two for each frame
    TX_SLOTS = TX_NUM // 2

cdef struct Card:
    int fd
    int done                # eventfd: it has come to its end by itself
    int failure             # of card.pyx; then nothing is done any more
    int error               # errno of a failure
    uint32_t bad_length
    uint8_t *view           # rings, from the guest twice, to the guest twice
    size_t view_size
    size_t rings_size
    size_t zeros            # offset of an empty virtio header
    Ring rx
    Ring tx
    # from the guest: running positions; modulo its size, offsets into the area
    uint8_t *from_guest
    uint64_t received       # end of what was received
    uint64_t parsed         # end of what was given to the data plane
    uint64_t freed          # end of what it has given back
    uint32_t sizes[TX_SLOTS]
    bint readable           # the socket may have more
    bint hung_up            # the other side has: what there is to read has an end
    # to the guest
    uint8_t *to_guest
    uint16_t taken          # used entries in iov; rx.seen is behind by those that are not sent yet
    bint writable           # the socket may take more
    iovec *iov
    uint16_t *release       # with each: the buffers that come free when it is sent
    uint32_t iov_start
    uint32_t iov_end
    uint8_t *headers
    uint32_t segments       # of headers, those in iov
    size_t unsent           # bytes in iov
    # counters
    uint64_t frames_from
    uint64_t bytes_from
    uint64_t reads
    uint64_t frames_to
    uint64_t bytes_to
    uint64_t writes
    uint64_t full

# What epoll said of the socket, which is watched edge-triggered.
cdef void card_event(Card *c, uint32_t events) noexcept nogil
# Receive what there is. Whether there are frames in the ring now that were not before.
cdef bint card_from_socket(Card *c) noexcept nogil
# Send what is in the receive ring, as far as the socket takes it. Whether buffers have come free.
cdef bint card_to_socket(Card *c) noexcept nogil

cdef class StreamCard:
    cdef Card c
    cdef int _memory        # memfd
    cdef _map(self)
    cdef _fill(self)
    cdef bint _speaks_vhost_user(self)
