# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames between a stream socket and two virtqueues: the driver's side of both rings.

A front-end that speaks no vhost-user (QEMU's ``-netdev stream``) sends and
takes Ethernet frames over a UNIX stream socket, each after its length as a
32-bit number in network byte order. The data plane knows rings in shared
memory, and nothing else. So here is a guest's network card in between: the
rings lie in a memfd of ours, and the data plane's own thread moves the frames, at
the beginning and at the end of each of its turns (``loop.pyx``). A thread of the
card's own would do as well, but each frame would wake two.

*From the guest.* Bytes are received into a ring buffer of shared memory, as
many as there are; the frames in it are described to the data plane where they
lie, after a virtio header that is zero: frames come with no offloads.

*To the guest.* Used receive buffers are sent from where they lie; the length
takes the place of the virtio header's last four bytes. The data plane may leave
checksums and TCP segmentation to its guest (one ``recvmsg`` for 64 KiB, at any
MTU), which is done here (``gso.pyx``): segments are sent from the payload where it
lies. When the socket is full, the buffers are kept, the data plane runs out of
them and leaves the bytes in its own sockets: nothing is dropped.

Both areas are mapped twice in a row, so that what wraps around is in one piece
all the same. That needs buffers to come back in the order in which they were
given, which this data plane does; it is checked.

All that comes from the socket is hostile. A length of 0, or beyond what any
front-end sends, ends the session; what a frame holds is the data plane's to
check. What the data plane does wrong ends the session as well.
"""

import os
from typing import NamedTuple

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from godwit.dataplane.driver cimport (
    VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
    ring_init,
    ring_put,
    ring_show,
    ring_signal,
    ring_used,
    vring_desc,
    vring_used_elem,
)
from godwit.dataplane.gso cimport (
    GSO_HEADERS,
    VNET_SIZE,
    Gso,
    checksum_fill,
    gso_headers,
    gso_read,
    gso_wanted,
)
from godwit.dataplane.sys cimport (
    EAGAIN,
    ECONNRESET,
    EINTR,
    EPIPE,
    EPOLLERR,
    EPOLLHUP,
    EPOLLIN,
    EPOLLOUT,
    EPOLLRDHUP,
    MAP_ANONYMOUS,
    MAP_FAILED,
    MAP_FIXED,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    MSG_DONTWAIT,
    MSG_NOSIGNAL,
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
    be32,
    close,
    errno,
    iovec,
    mmap,
    msghdr,
    munmap,
    put32,
    recv,
    sendmsg,
)

cdef enum:
    VHOST_USER_REQUESTS = 64    # the number of a request, little-endian, is what its messages begin with
    VHOST_USER_NEED_REPLY = 8
    PAGE = 4096
    RX_NUM = 256            # buffers to the guest
    RX_SIZE = 8192          # bytes of each; a frame takes as many as it needs
    RX_AREA = RX_NUM * RX_SIZE
    TX_AREA = 512 * 1024    # bytes received ahead of the data plane
    # The largest that QEMU can send, a buffer of its own; what of it is no frame the data plane drops.
    MOST = 69632
    LENGTH = 4
    IOV_MAX = 1024
    IOVS = 4096             # of frames on their way into the socket
    SEGMENTS = IOVS // 2
    AHEAD = 256 * 1024      # bytes made ready for the socket at a time
    # virtio 1.3, 5.1.3 and 6
    F_GUEST_CSUM = 1
    F_GUEST_TSO4 = 7
    F_GUEST_TSO6 = 8
    F_MRG_RXBUF = 15
    F_VERSION_1 = 32

cdef enum Failure:
    FINE = 0
    HUNG_UP
    CUT_SHORT
    BAD_LENGTH
    SOCKET
    RX_BROKEN
    TX_BROKEN


class RingPlace(NamedTuple):
    """A ring of ``num`` entries: addresses in this process."""

    num: int
    descriptor: int
    available: int
    used: int


cdef inline size_t pages(size_t n) noexcept nogil:
    return (n + PAGE - 1) & ~<size_t>(PAGE - 1)


# ---- from the guest


cdef int reclaim(Card *c) noexcept nogil:
    """Take back what the data plane has read."""
    cdef uint16_t used = ring_used(&c.tx)
    cdef uint32_t slot
    if <uint16_t>(used - c.tx.seen) > <uint16_t>(c.tx.made - c.tx.seen):
        return TX_BROKEN
    while c.tx.seen != used:
        slot = c.tx.seen % TX_SLOTS
        if c.tx.elems[c.tx.seen % TX_NUM].id != 2 * slot:
            return TX_BROKEN
        c.freed += c.sizes[slot]
        c.tx.seen += 1
    if c.freed == c.received:
        # Empty: from the start again, where the memory is still in the processor's cache.
        c.freed = c.parsed = c.received = 0
    return FINE


cdef int receive(Card *c) noexcept nogil:
    """Receive what there is, as far as there is room."""
    cdef size_t room = TX_AREA - <size_t>(c.received - c.freed)
    cdef ssize_t n
    while c.readable and room:
        n = recv(c.fd, c.from_guest + c.received % TX_AREA, room, MSG_DONTWAIT)
        c.reads += 1
        if n > 0:
            c.received += n
            # Less than asked for: the socket is empty, and more is another event (epoll(7), Q9).
            # But for its end, which may have been told already.
            c.readable = <size_t>n == room or c.hung_up
            return FINE
        if n == 0 or errno == ECONNRESET:   # so is called an end with something of ours not read
            return HUNG_UP if c.received == c.parsed else CUT_SHORT
        if errno == EAGAIN:
            c.readable = False
        elif errno != EINTR:
            c.error = errno
            return SOCKET
    return FINE


cdef int give(Card *c) noexcept nogil:
    """Describe the frames that are whole."""
    cdef uint16_t before = c.tx.made
    cdef uint32_t size, slot
    cdef uint64_t at
    cdef vring_desc *desc
    cdef int failure = FINE
    while c.received - c.parsed >= LENGTH and <uint16_t>(c.tx.made - c.tx.seen) < TX_SLOTS:
        at = c.parsed % TX_AREA
        size = be32(c.from_guest + at)
        if size == 0 or size > MOST:
            c.bad_length = size
            failure = BAD_LENGTH    # after what came before it
            break
        if c.received - c.parsed < LENGTH + size:
            break
        slot = c.tx.made % TX_SLOTS
        desc = &c.tx.desc[2 * slot + 1]
        desc.addr = c.rings_size + at + LENGTH
        desc.len = size
        ring_put(&c.tx, 2 * slot)
        c.sizes[slot] = LENGTH + size
        c.parsed += LENGTH + size
        c.bytes_from += size
    if c.tx.made != before:
        c.frames_from += <uint16_t>(c.tx.made - before)
        ring_show(&c.tx)
    return failure


# ---- to the guest


cdef void add(Card *c, uint8_t *data, uint32_t size) noexcept nogil:
    c.iov[c.iov_end].iov_base = data
    c.iov[c.iov_end].iov_len = size
    c.release[c.iov_end] = 0
    c.iov_end += 1
    c.unsent += size


cdef uint32_t add_frame(Card *c, uint8_t *vnet, uint32_t size) noexcept nogil:
    """One frame in one piece. How many it became: 0 if it cannot be had, yet or ever."""
    if c.iov_end == IOVS or not checksum_fill(vnet, size):
        return 0
    put32(vnet + VNET_SIZE - LENGTH, size)
    add(c, vnet + VNET_SIZE - LENGTH, LENGTH + size)
    c.frames_to += 1
    c.bytes_to += size
    return 1


cdef uint32_t add_segments(Card *c, uint8_t *vnet, uint32_t size) noexcept nogil:
    """The same in segments."""
    cdef Gso gso
    cdef uint32_t i, payload
    cdef uint8_t *headers
    if not gso_read(&gso, vnet, size):
        return 0
    if gso.count > SEGMENTS - c.segments or 2 * gso.count > IOVS - c.iov_end:
        return 0
    for i in range(gso.count):
        headers = c.headers + <size_t>c.segments * (LENGTH + GSO_HEADERS)
        c.segments += 1
        payload = gso_headers(&gso, i, headers + LENGTH)
        put32(headers, gso.head + payload)
        add(c, headers, LENGTH + gso.head)
        add(c, <uint8_t *>gso.frame + gso.head + i * gso.size, payload)
        c.bytes_to += gso.head + payload
    c.frames_to += gso.count
    return gso.count


cdef int collect(Card *c) noexcept nogil:
    """Make iovecs of the frames that the data plane has for the guest."""
    cdef uint16_t used = ring_used(&c.rx)
    cdef uint32_t count, i, size, total
    cdef uint8_t *frame
    cdef vring_used_elem *elem
    if <uint16_t>(used - c.rx.seen) > RX_NUM:
        return RX_BROKEN
    # No further than the socket may take: the rest is better done while that is on its way.
    while c.taken != used and c.unsent < AHEAD:
        frame = c.to_guest + (c.taken % RX_NUM) * RX_SIZE
        count = frame[10] | <uint32_t>frame[11] << 8
        if count == 0 or count > <uint16_t>(used - c.taken):
            return RX_BROKEN
        total = 0
        for i in range(count):
            elem = &c.rx.elems[<uint16_t>(c.taken + i) % RX_NUM]
            size = elem.len
            # In order, and each buffer full but the last: then the frame is in one piece.
            if (elem.id != <uint16_t>(c.taken + i) % RX_NUM or size > RX_SIZE
                    or (size < RX_SIZE and i + 1 < count)):
                return RX_BROKEN
            total += size
        if total <= VNET_SIZE or total > VNET_SIZE + MOST:
            return RX_BROKEN
        if gso_wanted(frame):
            i = add_segments(c, frame, total - VNET_SIZE)
        else:
            i = add_frame(c, frame, total - VNET_SIZE)
        if i == 0:
            return FINE if c.iov_start != c.iov_end else RX_BROKEN
        c.release[c.iov_end - 1] = count
        c.taken += count
    return FINE


cdef int send(Card *c) noexcept nogil:
    """Send what is in c.iov, as much as the socket takes, and free the buffers of what was sent."""
    cdef msghdr message
    cdef ssize_t n
    cdef uint32_t freed = 0, i = c.iov_start
    memset(&message, 0, sizeof(message))
    message.msg_iov = c.iov + i
    message.msg_iovlen = c.iov_end - i
    if message.msg_iovlen > IOV_MAX:
        message.msg_iovlen = IOV_MAX
    n = sendmsg(c.fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
    c.writes += 1
    if n < 0:
        if errno == EAGAIN:
            c.writable = False
            c.full += 1
        elif errno == EPIPE or errno == ECONNRESET:
            c.writable = False      # that it is over is for receive() to say: there may be frames before it
            c.readable = True
        elif errno != EINTR:
            c.error = errno
            return SOCKET
        return FINE
    c.unsent -= n
    while n:
        if <size_t>n < c.iov[i].iov_len:
            c.iov[i].iov_base = <uint8_t *>c.iov[i].iov_base + n
            c.iov[i].iov_len -= n
            break
        n -= c.iov[i].iov_len
        freed += c.release[i]
        i += 1
    if i == c.iov_end:
        i = c.iov_end = c.segments = 0
    c.iov_start = i
    for i in range(freed):
        ring_put(&c.rx, c.rx.seen % RX_NUM)
        c.rx.seen += 1
    ring_show(&c.rx)
    return FINE


# ---- what the loop calls


cdef void fail(Card *c, int failure) noexcept nogil:
    c.failure = failure
    c.readable = c.writable = False
    ring_signal(c.done)


cdef void card_event(Card *c, uint32_t events) noexcept nogil:
    if c.failure != FINE:
        return
    if events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR):
        c.hung_up = True
    if events & EPOLLIN or c.hung_up:
        c.readable = True
    if events & EPOLLOUT:
        c.writable = True


cdef bint card_from_socket(Card *c) noexcept nogil:
    cdef uint16_t before = c.tx.made
    cdef int failure
    if c.failure != FINE:
        return False
    failure = reclaim(c)
    if failure == FINE:
        failure = receive(c)
    if failure == FINE:
        failure = give(c)
    if failure != FINE:
        fail(c, failure)
    return c.tx.made != before


cdef bint card_to_socket(Card *c) noexcept nogil:
    cdef uint16_t before = c.rx.made
    cdef int failure = FINE
    while c.writable:
        failure = collect(c)
        if failure != FINE or c.iov_start == c.iov_end:
            break
        failure = send(c)
        if failure != FINE:
            break
    if failure != FINE:
        fail(c, failure)
    return c.rx.made != before


# ---- for those who put it together


cdef class StreamCard:
    """A network card with a connected UNIX stream socket in place of its cable.

    The socket ``fd`` stays the caller's, to be open for as long as an engine has
    the card (`Engine.plug`, which takes the feature bits ``FEATURES`` and what
    `regions` and `rings` say). `fileno` is readable when the card has come to its
    end by itself; `failure` then says why, None if the other side has hung up
    between two frames.
    """

    FEATURES = (1ULL << F_VERSION_1 | 1ULL << F_MRG_RXBUF
                | 1ULL << F_GUEST_CSUM | 1ULL << F_GUEST_TSO4 | 1ULL << F_GUEST_TSO6)
    MAX_FRAME = MOST

    def __cinit__(self):
        self.c.fd = self.c.done = self._memory = -1

    def __init__(self, int fd):
        if self.c.view != NULL:
            raise RuntimeError("a card is made once")
        self.c.fd = fd
        self.c.iov = <iovec *>calloc(IOVS, sizeof(iovec))
        self.c.release = <uint16_t *>calloc(IOVS, sizeof(uint16_t))
        self.c.headers = <uint8_t *>calloc(SEGMENTS, LENGTH + GSO_HEADERS)
        if self.c.iov == NULL or self.c.release == NULL or self.c.headers == NULL:
            raise MemoryError
        self.c.done = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.c.readable = self.c.writable = True
        self._map()
        self._fill()

    def __dealloc__(self):
        if self.c.view != NULL:
            munmap(self.c.view, self.c.view_size)
        if self._memory >= 0:
            close(self._memory)     # not through os: at the interpreter's end that is gone
        if self.c.done >= 0:
            close(self.c.done)
        free(self.c.iov)
        free(self.c.release)
        free(self.c.headers)

    cdef _map(self):
        """Make the memory, and our view of it."""
        cdef size_t at = 0
        cdef void *reserved
        cdef list places = []
        for num in (RX_NUM, TX_NUM):
            for size in (16 * num, 6 + 2 * num, 6 + 8 * num):
                places.append(at)
                at += pages(size)
        self.c.zeros = at
        self.c.rings_size = at + PAGE
        self._memory = os.memfd_create("godwit-stream", os.MFD_CLOEXEC)
        os.ftruncate(self._memory, self.c.rings_size + TX_AREA + RX_AREA)
        self.c.view_size = self.c.rings_size + 2 * (TX_AREA + RX_AREA)
        reserved = mmap(NULL, self.c.view_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if reserved == MAP_FAILED:
            raise OSError(errno, os.strerror(errno))
        self.c.view = <uint8_t *>reserved
        for _, size, address, offset in self.regions():
            if mmap(<void *><uintptr_t>address, size, PROT_READ | PROT_WRITE,
                    MAP_SHARED | MAP_FIXED, self._memory, offset) == MAP_FAILED:
                raise OSError(errno, os.strerror(errno))
        self.c.from_guest = self.c.view + self.c.rings_size
        self.c.to_guest = self.c.from_guest + 2 * TX_AREA
        base = <uintptr_t>self.c.view
        ring_init(&self.c.rx, base + places[0], base + places[1], base + places[2], RX_NUM)
        ring_init(&self.c.tx, base + places[3], base + places[4], base + places[5], TX_NUM)

    cdef _fill(self):
        """Give the data plane all receive buffers; prepare the pairs of descriptors for what is sent."""
        cdef uint32_t i
        cdef vring_desc *desc
        for i in range(<uint32_t>RX_NUM):
            desc = &self.c.rx.desc[i]
            desc.addr = <uint64_t>(self.c.to_guest - self.c.view) + i * RX_SIZE
            desc.len = RX_SIZE
            desc.flags = VRING_DESC_F_WRITE
            ring_put(&self.c.rx, i)
        ring_show(&self.c.rx)
        for i in range(<uint32_t>TX_SLOTS):
            desc = &self.c.tx.desc[2 * i]
            desc.addr = self.c.zeros    # a new file is of nothing else
            desc.len = VNET_SIZE
            desc.flags = VRING_DESC_F_NEXT
            desc.next = 2 * i + 1

    def regions(self):
        """The memory for the data plane: (guest address, bytes, address in this process, offset in `memory`) each."""
        base = <uintptr_t>self.c.view
        found = []
        address = 0
        offset = 0
        for size, times in ((self.c.rings_size, 1), (TX_AREA, 2), (RX_AREA, 2)):
            for _ in range(times):
                found.append((address, size, base + address, offset))
                address += size
            offset += size
        return found

    @property
    def memory(self):
        """The memfd that the regions lie in."""
        return self._memory

    def rings(self):
        """The receive ring and the transmit ring."""
        return [RingPlace(self.c.rx.num, <uintptr_t>self.c.rx.desc, <uintptr_t>self.c.rx.avail,
                          <uintptr_t>self.c.rx.used),
                RingPlace(self.c.tx.num, <uintptr_t>self.c.tx.desc, <uintptr_t>self.c.tx.avail,
                          <uintptr_t>self.c.tx.used)]

    def socket(self):
        """The descriptor of the socket."""
        return self.c.fd

    def fileno(self):
        """An eventfd that is readable when the card has come to its end by itself."""
        return self.c.done

    @property
    def failure(self):
        """What has ended it; None if the other side has hung up in good order, or nothing has."""
        if self.c.failure == CUT_SHORT:
            return "it was closed in the middle of a frame"
        if self.c.failure == BAD_LENGTH:
            if self.c.frames_from == 0 and self._speaks_vhost_user():
                return "this is a vhost-user front-end: start with --vhost-user, without --stream"
            return f"a frame of {self.c.bad_length} bytes was announced, and 1 to {MOST} is what there can be"
        if self.c.failure == SOCKET:
            return os.strerror(self.c.error)
        if self.c.failure == RX_BROKEN:
            return "the data plane has broken the receive ring"
        if self.c.failure == TX_BROKEN:
            return "the data plane has broken the transmit ring"
        return None

    cdef bint _speaks_vhost_user(self):
        """Whether what came in place of a first frame is the header of a vhost-user request.

        Three numbers in the byte order of the machine: the request, flags of which the lowest two
        bits are the version, 1, and how many bytes follow (vhost-user, "Header").
        """
        cdef uint32_t *header = <uint32_t *>self.c.from_guest
        return (self.c.received >= 8 and 0 < header[0] <= <uint32_t>VHOST_USER_REQUESTS
                and header[1] & ~<uint32_t>VHOST_USER_NEED_REPLY == 1)

    @property
    def counters(self):
        """Numbers since the start, by name."""
        return {
            "frames_from_guest": self.c.frames_from,
            "bytes_from_guest": self.c.bytes_from,
            "reads": self.c.reads,
            "frames_to_guest": self.c.frames_to,
            "bytes_to_guest": self.c.bytes_to,
            "writes": self.c.writes,
            "full": self.c.full,
        }
