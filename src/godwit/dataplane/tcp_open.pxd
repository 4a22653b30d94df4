# SPDX-License-Identifier: GPL-2.0-or-later
"""TCP connections that begin, from either side."""

from libc.stdint cimport uint8_t, uint32_t

from godwit.dataplane.packet cimport Packet
from godwit.dataplane.plane cimport Flow, Listener, Plane

cdef enum:
    CONNECT_TIMEOUT = 130000    # ms; the kernel gives up at about 127 s by itself

# A SYN of the guest's; `t` is its TCP header, of `size` bytes.
cdef void tcp_open_from_guest(Plane *p, Packet *k, const uint8_t *t, uint32_t size) noexcept nogil
# What the guest answers to a SYN of ours.
cdef void tcp_answer_from_guest(Plane *p, Flow *f, Packet *k, const uint8_t *t, uint32_t size) noexcept nogil
# SYN to the guest, or SYN,ACK as the answer to its own.
cdef void tcp_send_syn(Plane *p, Flow *f) noexcept nogil
# The socket of a connection that the guest opens is connected, or has failed.
cdef void tcp_connected(Plane *p, Flow *f) noexcept nogil
# The guest cannot be connected with whom it has called, with this error number: it is told what the network would tell.
cdef void tcp_give_up(Plane *p, Flow *f, int why) noexcept nogil
# Begin the host's side of a connection once more that the guest opens: a flow
# that came with a migration, and no socket for it.
cdef void tcp_open_anew(Plane *p, Flow *f) noexcept nogil
# Accept what waits at a listening socket. True: there may be more.
cdef bint tcp_accept(Plane *p, Listener *listener) noexcept nogil
# Watch the listening sockets again that rest for want of something to accept with.
cdef void tcp_accept_again(Plane *p) noexcept nogil
# Reset those that wait to be accepted.
cdef void tcp_refuse_waiting(Listener *listener) noexcept nogil
# Close a socket, and reset its peer.
cdef void tcp_close_with_reset(int s) noexcept nogil
# Both sides of the handshake with the guest are done.
cdef void tcp_establish(Plane *p, Flow *f) noexcept nogil
