# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# SPDX-License-Identifier: GPL-2.0-or-later
"""TCP at the speed of C, for measurements: bytes one way.

All that takes long runs without the GIL, on sockets that the caller has opened,
in whatever network namespace. Each end is one thread, however many connections
it has.

What stands still for longer than a patience given in milliseconds is a
TimeoutError, never a low figure.
"""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free

from godwit.lab._measure cimport POLLIN, POLLOUT, count_add, count_load, flag_load, flag_store, monotonic, poll, pollfd

cdef extern from "<sys/socket.h>" nogil:
    ssize_t send(int fd, const void *data, size_t size, int flags)
    ssize_t recv(int fd, void *data, size_t size, int flags)
    int shutdown(int fd, int how)
    enum:
        MSG_DONTWAIT
        MSG_NOSIGNAL
        MSG_TRUNC
        SHUT_WR

cdef enum:
    TO_SEND = 256 * 1024        # bytes at a time
    TO_RECEIVE = 1024 * 1024
    TICK = 20                   # ms between looks at whether to stop

PATIENCE = 3000  # ms


cdef class _Ends:
    """One end of each of some connections, and a count of bytes for each."""

    cdef:
        pollfd *_fds
        uint64_t *_bytes
        int _count

    def __cinit__(self, fds, **options):
        cdef int i
        self._count = len(fds)
        self._fds = <pollfd *>calloc(self._count, sizeof(pollfd))
        self._bytes = <uint64_t *>calloc(self._count, sizeof(uint64_t))
        if self._fds is NULL or self._bytes is NULL:
            raise MemoryError
        for i in range(self._count):
            self._fds[i].fd = fds[i]

    def __dealloc__(self):
        free(self._fds)
        free(self._bytes)

    @property
    def bytes(self):
        """How many bytes went over each connection so far; while ``run`` runs, too."""
        return [count_load(&self._bytes[i]) for i in range(self._count)]


cdef class Sender(_Ends):
    """Sends on all connections what they take; ``run`` in a thread until ``stop``, which ends the streams (FIN)."""

    cdef int _stop

    def stop(self):
        """End ``run``."""
        flag_store(&self._stop, 1)

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
                if poll(self._fds, self._count, TICK) < 0 and errno != EINTR:
                    error = errno
                    break
                for i in range(self._count):
                    if not self._fds[i].revents:
                        continue
                    n = send(self._fds[i].fd, data, TO_SEND, MSG_DONTWAIT | MSG_NOSIGNAL)
                    if n >= 0:
                        count_add(&self._bytes[i], n)
                    elif errno != EAGAIN and errno != EINTR:
                        error = errno
                        break
            for i in range(self._count):
                shutdown(self._fds[i].fd, SHUT_WR)
            free(data)
        if error:
            raise OSError(error, "send")


cdef class Receiver(_Ends):
    """Counts what comes, without looking at it; ``run`` in a thread, which ends with the last of the streams.

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
                self._fds[i].events = POLLIN
                last[i] = now
            while open and not error and silent < 0:
                if poll(self._fds, self._count, TICK) < 0 and errno != EINTR:
                    error = errno
                    break
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
                    elif errno != EAGAIN and errno != EINTR:
                        error = errno
                        break
            free(last)
        if error:
            raise OSError(error, "recv")
        if silent >= 0:
            raise TimeoutError(f"stream {silent} stood still for {self._patience // 1000000} ms")
