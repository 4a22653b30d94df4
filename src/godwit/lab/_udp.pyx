# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# SPDX-License-Identifier: GPL-2.0-or-later
"""UDP at the speed of C, for measurements: send, receive, echo, ask.

What goes over the network: datagrams that bear their number, from 0 on, in the
first eight bytes and again in the last eight (`MIN_SIZE`), so that a receiver
knows what was lost, came twice, came late, or was put together wrongly.

All that takes long runs without the GIL, on a socket that the caller has opened,
in whatever network namespace. Sockets are connected, but for an `Echo`'s.
"""

from libc.errno cimport EAGAIN, ECONNREFUSED, EINTR, EMSGSIZE, ENOBUFS, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset
from posix.time cimport CLOCK_MONOTONIC, clock_nanosleep, timespec

from godwit.dataplane.sys cimport (
    IPPROTO_UDP,
    MSG_DONTWAIT,
    MSG_TRUNC,
    POLLIN,
    UDP_SEGMENT,
    iovec,
    mmsghdr,
    poll,
    pollfd,
    recv,
    recvmmsg,
    send,
    sendmmsg,
    setsockopt,
    sockaddr_storage,
)
from godwit.lab._measure cimport flag_load, flag_store, monotonic

cdef enum:
    BATCH = 32              # datagrams in one system call
    LARGEST = 65536
    SLICE = 50000           # ns: a paced sender sleeps no shorter
    TICK = 20               # ms between looks at whether to stop
    HEAD = 8

MIN_SIZE = 2 * HEAD


cdef inline void sleep_ns(uint64_t ns) noexcept nogil:
    cdef timespec t
    t.tv_sec = <long>(ns // 1000000000U)
    t.tv_nsec = <long>(ns % 1000000000U)
    clock_nanosleep(CLOCK_MONOTONIC, 0, &t, NULL)


cdef inline bint passing() noexcept nogil:
    """Whether an error is an earlier datagram's, or the queue's of the moment."""
    return errno == EINTR or errno == ECONNREFUSED or errno == ENOBUFS or errno == EAGAIN


cdef class _Batch:
    """Room for BATCH datagrams of `size` bytes, with an address each."""

    cdef:
        mmsghdr messages[BATCH]
        iovec vectors[BATCH]
        sockaddr_storage names[BATCH]
        uint8_t *data
        uint32_t size

    def __cinit__(self, uint32_t size):
        cdef int i
        self.size = size
        self.data = <uint8_t *>malloc(<size_t>BATCH * size)
        if self.data is NULL:
            raise MemoryError
        memset(self.data, 0x5A, <size_t>BATCH * size)
        memset(self.messages, 0, sizeof(self.messages))
        for i in range(BATCH):
            self.vectors[i].iov_base = self.data + <size_t>i * size
            self.vectors[i].iov_len = size
            self.messages[i].msg_hdr.msg_iov = &self.vectors[i]
            self.messages[i].msg_hdr.msg_iovlen = 1

    def __dealloc__(self):
        free(self.data)


def send_numbered(int fd, *, uint32_t size, double seconds, double rate=0.0, bint joined=False):
    """Send numbered datagrams of ``size`` bytes for so long; ``rate``: so many each second, 0 for no limit.

    ``joined``: those that are sent in one call are one message, which is cut up
    on its way (udp(7), UDP_SEGMENT); all of a call must fit into 64 KiB then.

    A paced sender that was kept from running does not make up for what it owes
    beyond one batch: the measure is a rate, not a burst. Returns (datagrams
    sent, datagrams that the kernel refused, seconds taken).
    """
    if not MIN_SIZE <= size <= LARGEST:
        raise ValueError(f"a datagram has {MIN_SIZE} to {LARGEST} bytes")
    if joined:
        if BATCH * size > LARGEST - 100:
            raise ValueError(f"{BATCH} datagrams of {size} bytes are too many for one message")
        if setsockopt(fd, IPPROTO_UDP, UDP_SEGMENT, &size, sizeof(int)) != 0:
            raise OSError(errno, "UDP_SEGMENT")
    cdef _Batch batch = _Batch(size)
    cdef uint64_t sent = 0, refused = 0, number = 0, start, now, end, owed, forgiven = 0
    cdef int i, n, count, error = 0
    cdef uint8_t *data
    with nogil:
        start = now = monotonic()
        end = start + <uint64_t>(seconds * 1e9)
        while now < end:
            count = BATCH
            if rate > 0:
                owed = <uint64_t>(<double>(now - start) * rate / 1e9) + 1 - forgiven
                if owed <= number:
                    # Sleep until a datagram is due, but not for moments.
                    owed = <uint64_t>(<double>(number + forgiven) * 1e9 / rate) + start
                    sleep_ns(owed - now if owed > now + SLICE else SLICE)
                    now = monotonic()
                    continue
                owed -= number
                if owed > BATCH:
                    if owed > 2 * BATCH:
                        forgiven += owed - 2 * BATCH
                else:
                    count = <int>owed
            for i in range(count):
                data = batch.data + <size_t>i * size
                memcpy(data, &number, HEAD)
                memcpy(data + size - HEAD, &number, HEAD)
                number += 1
            if joined:
                batch.vectors[0].iov_len = <size_t>count * size
                n = sendmmsg(fd, batch.messages, 1, 0)
                if n > 0:
                    n = count
            else:
                n = sendmmsg(fd, batch.messages, count, 0)
            if n < 0:
                if not passing():
                    error = errno
                    break
                n = 0
                refused += 1    # the first was, the others were not tried
            sent += n
            number -= count - n     # a number that was not sent is used again
            now = monotonic()
    if error:
        raise OSError(error, "sendmmsg")
    return sent, refused, (now - start) / 1e9


cdef class Receiver:
    """Counts numbered datagrams on a socket; ``run`` in a thread, until ``stop`` and nothing has come for ``quiet`` ms.

    ``received`` counts all, ``duplicates`` those whose number was there
    before, ``reordered`` those with a number below one that was there (RFC 4737,
    3.3), ``damaged`` those whose size, beginning or end is wrong, which count
    nowhere else. ``highest``: the highest number, -1 for none.
    """

    cdef:
        int _fd
        int _stop
        int _quiet
        uint32_t _size
        uint64_t _most
        uint8_t *_seen
        uint64_t _next
        uint64_t _first
        uint64_t _last
        readonly uint64_t received
        readonly uint64_t duplicates
        readonly uint64_t reordered
        readonly uint64_t damaged

    def __cinit__(self, int fd, *, uint32_t size, uint64_t most=1 << 26, int quiet=100):
        self._fd = fd
        self._size = size
        self._most = most
        self._quiet = quiet
        self._seen = <uint8_t *>calloc(most // 8 + 1, 1)
        if self._seen is NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self._seen)

    def stop(self):
        """End ``run``, when no more comes."""
        flag_store(&self._stop, 1)

    @property
    def highest(self):
        return <object>self._next - 1

    @property
    def seconds(self):
        """From the first datagram to the last."""
        return (self._last - self._first) / 1e9

    def run(self):
        """Receive."""
        cdef _Batch batch = _Batch(LARGEST)
        cdef pollfd waiting
        cdef int i, n, error = 0
        cdef int silent = 0
        waiting.fd = self._fd
        waiting.events = POLLIN
        with nogil:
            while True:
                n = recvmmsg(self._fd, batch.messages, BATCH, MSG_DONTWAIT, NULL)
                if n < 0:
                    if errno == EAGAIN:
                        if flag_load(&self._stop) and silent >= self._quiet:
                            break
                        waiting.revents = 0
                        if poll(&waiting, 1, TICK) == 0:
                            silent += TICK
                        continue
                    if not passing():
                        error = errno
                        break
                    continue
                silent = 0
                self._last = monotonic()
                if self._first == 0:
                    self._first = self._last
                for i in range(n):
                    self._count(batch.data + <size_t>i * LARGEST, batch.messages[i].msg_len)
        if error:
            raise OSError(error, "recvmmsg")

    cdef void _count(self, const uint8_t *data, uint32_t size) noexcept nogil:
        cdef uint64_t number, again
        if size != self._size:
            self.damaged += 1
            return
        memcpy(&number, data, HEAD)
        memcpy(&again, data + size - HEAD, HEAD)
        if number != again or number >= self._most:
            self.damaged += 1
            return
        self.received += 1
        if self._seen[number >> 3] & (1 << (number & 7)):
            self.duplicates += 1
            return
        self._seen[number >> 3] |= <uint8_t>(1 << (number & 7))
        if number < self._next:
            self.reordered += 1
        else:
            self._next = number + 1


cdef class Echo:
    """Returns what comes to an unconnected socket to whom it came from; ``run`` in a thread until ``stop``."""

    cdef:
        int _fd
        int _stop
        readonly uint64_t returned

    def __cinit__(self, int fd):
        self._fd = fd

    def stop(self):
        """End ``run``."""
        flag_store(&self._stop, 1)

    def run(self):
        """Return datagrams."""
        cdef _Batch batch = _Batch(LARGEST)
        cdef pollfd waiting
        cdef int i, n, error = 0
        waiting.fd = self._fd
        waiting.events = POLLIN
        with nogil:
            while not flag_load(&self._stop):
                for i in range(BATCH):
                    batch.vectors[i].iov_len = LARGEST
                    batch.messages[i].msg_hdr.msg_name = &batch.names[i]
                    batch.messages[i].msg_hdr.msg_namelen = sizeof(sockaddr_storage)
                n = recvmmsg(self._fd, batch.messages, BATCH, MSG_DONTWAIT, NULL)
                if n <= 0:
                    if n < 0 and errno != EAGAIN and not passing():
                        error = errno
                        break
                    waiting.revents = 0
                    poll(&waiting, 1, TICK)
                    continue
                for i in range(n):
                    batch.vectors[i].iov_len = batch.messages[i].msg_len
                sendmmsg(self._fd, batch.messages, n, 0)
                self.returned += n
        if error:
            raise OSError(error, "recvmmsg")


def ask(int fd, *, uint32_t size, double seconds, int patience=200):
    """Send a datagram, wait for its echo, and so on for so long.

    Returns (nanoseconds of each answer, number of questions that had no answer
    within ``patience`` ms).
    """
    if not MIN_SIZE <= size <= LARGEST:
        raise ValueError(f"a datagram has {MIN_SIZE} to {LARGEST} bytes")
    cdef _Batch batch = _Batch(LARGEST)
    cdef uint64_t number = 0, answered, start, end, now
    cdef uint64_t unanswered = 0
    cdef pollfd waiting
    cdef ssize_t n
    cdef uint32_t most = 1 << 20
    cdef uint32_t count = 0
    cdef uint64_t *times = <uint64_t *>malloc(most * sizeof(uint64_t))
    if times is NULL:
        raise MemoryError
    waiting.fd = fd
    waiting.events = POLLIN
    try:
        with nogil:
            now = monotonic()
            end = now + <uint64_t>(seconds * 1e9)
            while now < end and count < most:
                start = monotonic()
                memcpy(batch.data, &number, HEAD)
                memcpy(batch.data + size - HEAD, &number, HEAD)
                send(fd, batch.data, size, 0)
                while True:
                    waiting.revents = 0
                    if poll(&waiting, 1, patience) == 0:
                        unanswered += 1
                        break
                    n = recv(fd, batch.data + LARGEST, LARGEST, MSG_DONTWAIT)
                    if n != <ssize_t>size:
                        continue
                    memcpy(&answered, batch.data + LARGEST, HEAD)
                    if answered == number:      # not one that was given up
                        times[count] = monotonic() - start
                        count += 1
                        break
                number += 1
                now = monotonic()
        return [times[i] for i in range(count)], unanswered
    finally:
        free(times)
