# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's side of a TCP connection: frozen, read out, and made anew.

All functions work on a descriptor alone and return 0 or a negative error
number. docs/platform/tcp-repair.md has the kernel behaviour relied on.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t

from godwit.dataplane.sys cimport pollfd, sockaddr_storage, socklen_t

cdef enum:
    # TCP states as TCP_INFO gives them (the kernel's tcp_states.h)
    ESTABLISHED = 1
    SYN_SENT = 2
    FIN_WAIT1 = 4
    FIN_WAIT2 = 5
    TIME_WAIT = 6
    CLOSED = 7
    CLOSE_WAIT = 8
    LAST_ACK = 9
    CLOSING = 11
    # Of tcpi_options, in states with a FIN of ours: seq_snd is the number of
    # the first byte. passt, which does not look at this bit, writes one more:
    # the FIN counted as one of the bytes before the queue. (The kernel's
    # meaning, a child of a fast open, no socket of either program has.)
    SEQ_OF_FIRST_BYTE = 0x80

cdef struct SockState:
    uint32_t seq_snd        # of the first byte in the send queue (in a stream of passt: see SEQ_OF_FIRST_BYTE)
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

# Numbers in TCP's sequence space: a FIN is among them.
cdef struct Queued:
    uint32_t out
    uint32_t incoming

cdef int sock_freeze(int fd, bint v6) noexcept nogil
# Whether it is in SYN_SENT.
cdef bint sock_is_connecting(int fd) noexcept nogil
cdef void sock_hurry(int fd, bint on) noexcept nogil
# Undo that, and a lock of a repair helper's, on a socket in repair mode that sock_finish() is to follow.
cdef int sock_open(int fd, bint v6) noexcept nogil
# A new socket, frozen; or a negative error number.
cdef int sock_create(bint v6) noexcept nogil
# Fills in what sock_dump() has to know, of many sockets in one call.
cdef void sock_look(pollfd *looked, int count) noexcept nogil
# All but the queues, and how long these may be.
cdef int sock_dump(const pollfd *looked, SockState *s, Queued *q) noexcept nogil
# The send queue, and right behind it the receive queue: there has to be room for as much as `q` says.
cdef int sock_dump_queues(int fd, SockState *s, const Queued *q, uint8_t *out) noexcept nogil
cdef socklen_t sock_end(sockaddr_storage *out, const uint8_t *a, uint16_t port, uint32_t scope) noexcept nogil
# The last number of a file below /proc/sys/net; `default` where there is none to be read.
cdef object kernel_limit(str name, default)
cpdef tuple ephemeral_ports()
# Bytes of a receive queue that surely fit into a new socket.
cdef uint32_t receive_room()
# `step` says where it failed, by its index in STEPS.
cdef int sock_connect(int fd, const sockaddr_storage *local, const sockaddr_storage *remote, socklen_t size,
                      const SockState *given, const uint8_t *rcvq, uint32_t room, uint32_t *left_out,
                      int *step) noexcept nogil
cdef int sock_complete(int fd, const SockState *s, const uint8_t *sndq) noexcept nogil
cdef int sock_finish(int fd, const SockState *s, const uint8_t *unsent) noexcept nogil
