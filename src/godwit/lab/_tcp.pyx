# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# SPDX-License-Identifier: GPL-2.0-or-later
"""TCP at the speed of C, for measurements: bytes one way, questions and answers, short connections.

All that takes long runs without the GIL, on sockets that the caller has opened,
in whatever network namespace; `visit` opens its own, in that of its thread. Each
end is one thread, however many connections it has.

What stands still for longer than a patience, given in milliseconds, is a
TimeoutError, never a low figure.
"""

import os

from libc.errno cimport EAGAIN, EBADMSG, ECONNRESET, EINTR, EINVAL, ENOMEM, ETIMEDOUT, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc

from godwit.dataplane.sys cimport (
    AF_INET,
    MSG_DONTWAIT,
    MSG_NOSIGNAL,
    MSG_TRUNC,
    POLLIN,
    POLLOUT,
    SOCK_CLOEXEC,
    SOCK_STREAM,
    SOL_SOCKET,
    accept4,
    close,
    connect,
    poll,
    pollfd,
    recv,
    send,
    setsockopt,
    sockaddr,
    sockaddr_in,
    socket,
)
from godwit.lab._measure cimport count_add, count_load, flag_load, flag_store, monotonic

cdef extern from "<arpa/inet.h>" nogil:
    uint16_t htons(uint16_t value)
    int inet_pton(int family, const char *text, void *address)

cdef extern from "<sys/time.h>" nogil:
    cdef struct timeval:
        long tv_sec
        long tv_usec

cdef extern from "<sys/socket.h>" nogil:
    enum:
        SO_RCVTIMEO
        SO_SNDTIMEO

cdef enum:
    TO_SEND = 256 * 1024        # bytes at a time
    TO_RECEIVE = 1024 * 1024
    TICK = 20                   # ms between looks at whether to stop
    FIRST_ROOM = 1 << 10        # times

PATIENCE = 3000  # ms


cdef inline bint passing() noexcept nogil:
    return errno == EAGAIN or errno == EINTR


cdef class Times:
    """Nanoseconds that something took, over and over, in this order."""

    cdef:
        uint64_t *_times
        size_t _count
        size_t _room

    def __dealloc__(self):
        free(self._times)

    def __len__(self):
        return self._count

    def __iter__(self):
        return iter([self._times[i] for i in range(self._count)])

    cdef int add(self, uint64_t time) noexcept nogil:
        """Keep one more; an error, or 0."""
        cdef size_t room = 2 * self._room or FIRST_ROOM
        cdef uint64_t *times
        if self._count == self._room:
            times = <uint64_t *>realloc(self._times, room * sizeof(uint64_t))
            if times is NULL:
                return ENOMEM
            self._times, self._room = times, room
        self._times[self._count] = time
        self._count += 1
        return 0


cdef class _Ends:
    """One end of each of some connections, and a count of bytes for each. ``stop`` ends ``run``."""

    cdef:
        pollfd *_fds
        uint64_t *_bytes
        int _count
        int _stop

    def __cinit__(self, fds, **options):
        cdef int i
        self._count = len(fds)
        self._fds = <pollfd *>calloc(self._count, sizeof(pollfd))
        self._bytes = <uint64_t *>calloc(self._count, sizeof(uint64_t))
        if self._fds is NULL or self._bytes is NULL:
            raise MemoryError
        for i in range(self._count):
            self._fds[i].fd = fds[i]
            self._fds[i].events = POLLIN

    def __dealloc__(self):
        free(self._fds)
        free(self._bytes)

    def stop(self):
        """End ``run``."""
        flag_store(&self._stop, 1)

    @property
    def bytes(self):
        """How many bytes went over each connection so far; while ``run`` runs, too."""
        return [count_load(&self._bytes[i]) for i in range(self._count)]

    cdef int wait(self) noexcept nogil:
        """Until one is ready, or a tick has passed; an error, or 0."""
        if poll(self._fds, self._count, TICK) < 0 and errno != EINTR:
            return errno
        return 0


cdef class Sender(_Ends):
    """Sends on all connections what they take; ``run`` in a thread until ``stop``. It ends no stream."""

    def run(self):
        """Send."""
        cdef uint8_t *data = <uint8_t *>calloc(TO_SEND, 1)
        cdef ssize_t n
        cdef int i, error = 0
        if data is NULL:
            raise MemoryError
        with nogil:
            for i in range(self._count):
                self._fds[i].events = POLLOUT
            while not error and not flag_load(&self._stop):
                error = self.wait()
                for i in range(self._count):
                    if not self._fds[i].revents:
                        continue
                    n = send(self._fds[i].fd, data, TO_SEND, MSG_DONTWAIT | MSG_NOSIGNAL)
                    if n >= 0:
                        count_add(&self._bytes[i], n)
                    elif not passing():
                        error = errno
            free(data)
        if error:
            raise OSError(error, f"send: {os.strerror(error)}")


cdef class Receiver(_Ends):
    """Counts what comes, without looking at it; ``run`` in a thread, which ends when all streams have ended, too.

    A stream that brings nothing for ``patience`` ms is a TimeoutError.
    """

    cdef uint64_t _patience

    def __init__(self, fds, *, patience=PATIENCE):
        self._patience = patience * 1000000

    def run(self):
        """Receive."""
        cdef uint64_t *last = <uint64_t *>calloc(self._count, sizeof(uint64_t))
        cdef uint64_t now
        cdef ssize_t n
        cdef int i, error = 0, silent = -1, open = self._count
        if last is NULL:
            raise MemoryError
        with nogil:
            now = monotonic()
            for i in range(self._count):
                last[i] = now
            while open and not error and silent < 0 and not flag_load(&self._stop):
                error = self.wait()
                now = monotonic()
                for i in range(self._count):
                    if self._fds[i].fd < 0:
                        continue
                    if not self._fds[i].revents:
                        if now - last[i] > self._patience:
                            silent = i
                        continue
                    # MSG_TRUNC: the kernel lets go of the bytes and copies nothing (tcp(7)).
                    n = recv(self._fds[i].fd, NULL, TO_RECEIVE, MSG_DONTWAIT | MSG_TRUNC)
                    if n > 0:
                        count_add(&self._bytes[i], n)
                        last[i] = now
                    elif n == 0:
                        self._fds[i].fd = -1    # which poll(2) passes over
                        open -= 1
                    elif not passing():
                        error = errno
            free(last)
        if error:
            raise OSError(error, f"recv: {os.strerror(error)}")
        if silent >= 0:
            raise TimeoutError(f"stream {silent} stood still for {self._patience // 1000000} ms")


cdef class Echo(_Ends):
    """Gives back what comes; ``run`` in a thread, which ends when all connections have ended, too."""

    def run(self):
        """Give back."""
        cdef uint8_t data[64]
        cdef ssize_t n
        cdef int i, error = 0, open = self._count
        with nogil:
            while open and not error and not flag_load(&self._stop):
                error = self.wait()
                for i in range(self._count):
                    if not self._fds[i].revents:
                        continue
                    n = recv(self._fds[i].fd, data, sizeof(data), MSG_DONTWAIT)
                    if n > 0:
                        n = send(self._fds[i].fd, data, n, MSG_DONTWAIT | MSG_NOSIGNAL)
                    if n > 0:
                        count_add(&self._bytes[i], n)
                    elif n == 0:
                        self._fds[i].fd = -1
                        open -= 1
                    elif not passing():
                        error = errno
        if error:
            raise OSError(error, f"echo: {os.strerror(error)}")


def ask(fds, *, double seconds, int patience=PATIENCE):
    """Send a byte over each connection, the next one when it has come back, and so on for so long.

    Returns the `Times` that each took. Something else than the byte is an OSError.
    """
    cdef _Ends ends = _Ends(fds)
    cdef Times times = Times()
    cdef uint64_t *begun = <uint64_t *>calloc(ends._count, sizeof(uint64_t))
    cdef uint8_t came[2]
    cdef uint8_t sent[1]
    cdef uint64_t now, end
    cdef ssize_t n
    cdef int i, ready, error = 0, open = ends._count
    if begun is NULL:
        raise MemoryError
    with nogil:
        end = monotonic() + <uint64_t>(seconds * 1e9)
        for i in range(ends._count):
            begun[i] = monotonic()
            sent[0] = <uint8_t>begun[i]
            if send(ends._fds[i].fd, sent, 1, MSG_NOSIGNAL) != 1:
                error = errno
        while open and not error:
            ready = poll(ends._fds, ends._count, patience)
            if ready <= 0:
                if ready == 0:
                    error = ETIMEDOUT
                elif errno != EINTR:
                    error = errno
                continue
            for i in range(ends._count):
                if ends._fds[i].fd < 0 or not ends._fds[i].revents:
                    continue
                n = recv(ends._fds[i].fd, came, sizeof(came), MSG_DONTWAIT)
                now = monotonic()
                if n < 0:
                    if not passing():
                        error = errno
                    continue
                # What was sent is the low byte of when it was sent.
                if n == 0:
                    error = ECONNRESET
                elif n != 1 or came[0] != <uint8_t>begun[i]:
                    error = EBADMSG
                if times.add(now - begun[i]) != 0:
                    error = ENOMEM
                if now >= end:
                    ends._fds[i].fd = -1
                    open -= 1
                    continue
                begun[i] = monotonic()
                sent[0] = <uint8_t>begun[i]
                if send(ends._fds[i].fd, sent, 1, MSG_NOSIGNAL) != 1:
                    error = errno
        free(begun)
    if error:
        raise OSError(error, f"ask: {os.strerror(error)}")
    return times


cdef int within(int fd, int patience) noexcept nogil:
    """Let no call on a socket take longer than this."""
    cdef timeval time
    time.tv_sec = patience // 1000
    time.tv_usec = patience % 1000 * 1000
    if setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &time, sizeof(time)) < 0:
        return errno
    if setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &time, sizeof(time)) < 0:
        return errno
    return 0


cdef class Answerer(_Ends):
    """Accepts on listening sockets; each connection gets its byte back and is closed: from this side first.

    ``run`` in a thread until ``stop``; ``bytes`` counts connections.
    """

    def run(self):
        """Answer."""
        cdef int patience = PATIENCE
        cdef uint8_t byte[1]
        cdef int i, fd, error = 0
        with nogil:
            while not error and not flag_load(&self._stop):
                error = self.wait()
                for i in range(self._count):
                    if not self._fds[i].revents:
                        continue
                    fd = accept4(self._fds[i].fd, NULL, NULL, SOCK_CLOEXEC)
                    if fd < 0:
                        if not passing():
                            error = errno
                        continue
                    # One that says nothing is the client's to tell of.
                    if within(fd, patience) == 0 and recv(fd, byte, 1, 0) == 1:
                        if send(fd, byte, 1, MSG_NOSIGNAL) == 1:
                            count_add(&self._bytes[i], 1)
                    close(fd)
        if error:
            raise OSError(error, f"accept: {os.strerror(error)}")


cdef int call(sockaddr_in *address, uint8_t byte, int patience) noexcept nogil:
    """Connect, have a byte given back, and wait for the end; an error, or 0."""
    cdef int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)
    cdef uint8_t came[2]
    cdef ssize_t n
    cdef int error
    if fd < 0:
        return errno
    error = within(fd, patience)
    if error == 0 and connect(fd, <sockaddr *>address, sizeof(sockaddr_in)) < 0:
        error = errno
    if error == 0 and send(fd, &byte, 1, MSG_NOSIGNAL) != 1:
        error = errno
    if error == 0:
        n = recv(fd, came, sizeof(came), 0)
        if n < 0:
            error = errno
        elif n == 0:
            error = ECONNRESET
        elif n != 1 or came[0] != byte:
            error = EBADMSG
    if error == 0:
        n = recv(fd, came, sizeof(came), 0)
        if n < 0:
            error = errno
        elif n > 0:
            error = EBADMSG
    close(fd)
    return ETIMEDOUT if error == EAGAIN else error


def visit(str addr, ports, *, double seconds, int patience=PATIENCE):
    """Open a connection to an `Answerer` behind an IPv4 address, the next one when it is over, and so on for so long.

    The ports take turns. Returns the `Times` that each took, from the call of
    connect(2) to the end of what the server sent.
    """
    cdef Times times = Times()
    cdef int count = len(ports), turn = 0, error = 0
    cdef uint64_t begun, now, end
    cdef sockaddr_in *addresses = <sockaddr_in *>calloc(count, sizeof(sockaddr_in))
    cdef bytes text = addr.encode()
    if addresses is NULL:
        raise MemoryError
    for turn in range(count):
        addresses[turn].sin_family = AF_INET
        addresses[turn].sin_port = htons(ports[turn])
        if inet_pton(AF_INET, text, &addresses[turn].sin_addr) != 1:
            error = EINVAL
    turn = 0
    with nogil:
        now = monotonic()
        end = now + <uint64_t>(seconds * 1e9)
        while now < end and not error:
            begun = now
            error = call(&addresses[turn % count], <uint8_t>turn, patience)
            now = monotonic()
            turn += 1
            if error == 0:
                error = times.add(now - begun)
        free(addresses)
    if error:
        raise OSError(error, f"connection {turn}: {os.strerror(error)}")
    return times
