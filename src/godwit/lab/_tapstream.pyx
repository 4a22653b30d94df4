# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames between a TAP device and a stream socket: QEMU's side of its ``-netdev stream``.

One thread each way, as blunt as the protocol: a frame from the TAP device is
written to the socket after its length; what comes from the socket is cut into
frames, which are written to the TAP device. As with QEMU, each frame from the
guest is a write of its own, and what the other side does not read stops it.
"""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memmove

import os
import threading

from godwit.dataplane.sys cimport MSG_NOSIGNAL, POLLIN, be32, poll, pollfd, put32, read, recv, send, write

cdef enum:
    MOST = 69632            # QEMU's own limit of a frame (NET_BUFSIZE)
    PIECE = 69632           # what it reads at a time


cdef class Pump:
    """Both ways, from its making to `end`. ``tap`` is non-blocking, ``stream`` is blocking."""

    cdef:
        int _tap
        int _stream
        int _control
        const char *_failure
        list _threads
        uint8_t _up[4 + MOST]
        uint8_t _down[PIECE + 4 + MOST]

    def __init__(self, int tap, int stream):
        self._tap = tap
        self._stream = stream
        self._failure = NULL
        self._control = os.eventfd(0, os.EFD_CLOEXEC)
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._run_up, self._run_down)]
        for thread in self._threads:
            thread.start()

    def end(self):
        """Wait for the end of both; the socket must have been shut down."""
        os.eventfd_write(self._control, 1)
        for thread in self._threads:
            thread.join()
        os.close(self._control)

    @property
    def failure(self):
        """What the other side did that none may do, or None."""
        return None if self._failure == NULL else self._failure.decode()

    def _run_up(self):
        with nogil:
            self._from_tap()

    def _run_down(self):
        with nogil:
            self._to_tap()

    cdef void _from_tap(self) noexcept nogil:
        cdef pollfd fds[2]
        cdef ssize_t size, n
        cdef size_t at
        fds[0].fd = self._tap
        fds[1].fd = self._control
        fds[0].events = fds[1].events = POLLIN
        while True:
            size = read(self._tap, self._up + 4, MOST)
            if size < 0:
                if errno != EAGAIN and errno != EINTR:
                    return
                poll(fds, 2, -1)
                if fds[1].revents:
                    return
                continue
            put32(self._up, <uint32_t>size)
            at = 0
            while at < 4 + <size_t>size:
                n = send(self._stream, self._up + at, 4 + size - at, MSG_NOSIGNAL)
                if n <= 0:
                    return
                at += n

    cdef void _to_tap(self) noexcept nogil:
        cdef size_t have = 0, at
        cdef ssize_t n
        cdef uint32_t size
        while True:
            n = recv(self._stream, self._down + have, PIECE, 0)
            if n <= 0:
                return
            have += n
            at = 0
            while have - at >= 4:
                size = be32(self._down + at)
                if size < 14 or size > MOST:
                    self._failure = b"a frame of a length that none can have"
                    return
                if have - at < 4 + size:
                    break
                # A TAP device that is down takes none, as a cable that is not plugged in.
                write(self._tap, self._down + at + 4, size)
                at += 4 + size
            have -= at
            memmove(self._down, self._down + at, have)
