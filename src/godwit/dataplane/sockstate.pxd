# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's side of a TCP connection: frozen, read out, and made anew.

All functions work on a descriptor alone and return 0 or a negative error
number. docs/platform/tcp-repair.md has the kernel behaviour relied on.
"""

from libc.stdint cimport uint8_t, uint32_t

cdef struct SockState:
    uint32_t seq_snd        # of the first byte in the send queue (in a stream of passt: FIRST_BYTE)
    uint32_t seq_rcv        # and in the receive queue
    uint32_t sndq           # bytes, a FIN not counted
    uint32_t notsent
    uint32_t rcvq
    uint32_t mss
    uint32_t timestamp
    uint32_t snd_wl1        # tcp_repair_window, as are the next four
    uint32_t snd_wnd
    uint32_t max_window
    uint32_t rcv_wnd
    uint32_t rcv_wup
    uint8_t snd_ws
    uint8_t rcv_ws
    uint8_t tcpi_state
    uint8_t tcpi_options

cdef int sock_freeze(int fd, bint v6) noexcept nogil
# Whether it is in SYN_SENT.
cdef bint sock_is_connecting(int fd) noexcept nogil
cdef void sock_hurry(int fd, bint on) noexcept nogil
cdef int sock_thaw(int fd, bint v6) noexcept nogil
# `queues` is malloc'ed: the send queue, then the receive queue. NULL when both are empty.
cdef int sock_dump(int fd, SockState *s, uint8_t **queues) noexcept nogil
cdef int sock_restore(int fd, const SockState *s, const uint8_t *rcvq) noexcept nogil
cdef int sock_complete(int fd, const SockState *s, const uint8_t *sndq) noexcept nogil
cdef int sock_finish(int fd, const SockState *s, const uint8_t *unsent) noexcept nogil
