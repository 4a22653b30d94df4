# SPDX-License-Identifier: GPL-2.0-or-later
"""TCP between the guest's segments and a host socket (RFC 9293).

Theory of operation. godwit stands for the peer towards the guest, and for the
guest towards the peer, and buffers nothing: the queues of the host's socket
are the buffers.

*From the guest*: the payload of in-order segments goes from guest memory into
the socket; what the socket took is acknowledged to the guest, no more. The
window that the guest is given is the free room in the socket's send buffer.
When that gets short the socket is polled for writability, which also makes
the kernel enlarge the buffer as the congestion window grows, and the event
that says "writable again" sends the guest a window update.

*To the guest*: data is peeked from the socket's receive queue straight into
the guest's buffers, at the offset of what is in flight (SO_PEEK_OFF), as far
as the guest's window goes. Only when the guest has acknowledged it is it taken
from the queue. So the peer's window is closed by a guest that does not read,
and a retransmission is another peek.

A flow's state is `events` (plane.pxd): which of SYN, established, FIN was seen
on which side. Nothing is answered while a batch of frames is worked on; each
flow touched is settled once at its end: discard, send, acknowledge, timer.
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t, uint8_t
from libc.string cimport memset

from godwit.dataplane.flow cimport (
    age_out,
    carry_append,
    carry_left,
    carry_take,
    flow_close,
    flow_deadline,
    flow_find,
    flow_index,
    flow_touch,
    flow_unwait,
    flow_wait_ring,
)
from godwit.dataplane.host cimport get_sockaddr
from godwit.dataplane.packet cimport Packet, packet_payload
from godwit.dataplane.plane cimport (
    DROP_MALFORMED,
    DROP_NO_FLOW,
    DROP_SEND,
    DROP_SHORT,
    DROP_WINDOW,
    EV_ACCEPTED,
    EV_ESTABLISHED,
    EV_FIN_ACKED,
    EV_FIN_FROM_GUEST,
    EV_FIN_TO_GUEST,
    EV_FIN_TO_SOCK,
    EV_SYN_FROM_GUEST,
    FF_ACK_DUE,
    FF_CONNECTING,
    FF_DRAINING,
    FF_EOF,
    FF_FAST_DONE,
    FF_FIN_KNOWN,
    FF_FROM_GUEST,
    FF_HELD,
    FF_HURRY,
    FF_MORE,
    FF_PEER_FIN,
    FF_PROBE_DUE,
    FF_RESET_DUE,
    FF_RING_WAIT,
    FF_SYN_DUE,
    FF_TRY_AGAIN,
    FF_URGENT,
    FF_V6,
    FF_WINDOW_LOW,
    FLOW_TCP,
    NONE,
    Flow,
    Plane,
    drop,
)
from godwit.dataplane.shortage cimport shortage
from godwit.dataplane.sockstate cimport sock_hurry
from godwit.dataplane.sys cimport (
    EAGAIN,
    EINTR,
    EPOLLERR,
    EPOLLHUP,
    EPOLLIN,
    EPOLLOUT,
    EPOLLPRI,
    EPOLLRDHUP,
    ETIMEDOUT,
    MSG_DONTWAIT,
    MSG_NOSIGNAL,
    SHUT_WR,
    SIOCOUTQ,
    SOL_SOCKET,
    SO_ERROR,
    SO_PEEK_OFF,
    be16,
    be32,
    before,
    errno,
    getsockname,
    getsockopt,
    ioctl,
    msghdr,
    reset_on_close,
    send,
    sendmsg,
    setsockopt,
    shutdown,
    sockaddr,
    sockaddr_storage,
    socket,
    socklen_t,
)
from godwit.dataplane.tcp_open cimport (
    CONNECT_TIMEOUT,
    tcp_answer_from_guest,
    tcp_close_with_reset,
    tcp_connected,
    tcp_establish,
    tcp_give_up,
    tcp_open_from_guest,
    tcp_send_syn,
)
from godwit.dataplane.tcp_to_guest cimport (
    TCP_ACK,
    TCP_FIN,
    TCP_HLEN,
    TCP_RST,
    TCP_SYN,
    arm_retransmit,
    discard,
    hold_in_repair,
    in_flight,
    own_mss,
    rewind,
    send_data,
    send_flags,
    send_reset_for,
    send_window,
)
from godwit.dataplane.virtqueue cimport MAX_CHAIN, RX, queue_active

cdef enum:
    SYN_RETRIES = 6             # as Linux: given up after about two minutes
    DATA_RETRIES = 15           # as Linux's tcp_retries2
    RETRIES_PAUSED = 6          # by then the wait is the longest
    KEEPALIVE_IDLE = 7200000    # ms; RFC 9293, 3.8.4: no less than two hours
    DUP_ACK_LIMIT = 3           # RFC 5681, 3.2
    TRY_AGAIN = 1000            # ms; after a shortage of memory
    WINDOW_LEFT = 16384         # bytes, with which a guest can go on after a move


# ---- the end of a flow

cdef void tcp_drop_socket(Flow *f) noexcept nogil:
    if f.sock >= 0:
        tcp_close_with_reset(f.sock)
        f.sock = -1


cdef void tcp_reset(Plane *p, Flow *f) noexcept nogil:
    tcp_local_end(f)    # of which a migration may have to speak when the socket is gone
    tcp_drop_socket(f)
    age_out(p, f)
    if not f.flags & FF_RESET_DUE:
        p.counters.flows_reset += 1
    f.flags &= ~FF_HELD
    f.seq_to_guest = f.seq_max_to_guest
    if f.events & EV_SYN_FROM_GUEST or f.events & EV_ACCEPTED:
        if not send_flags(p, f, f.seq_to_guest, TCP_RST | TCP_ACK):
            f.flags |= FF_RESET_DUE
            flow_deadline(p, f, 0)
            flow_wait_ring(p, f)
            return
    flow_close(p, f)


cdef void tcp_abort(Plane *p, Flow *f) noexcept nogil:
    """Reset the peer; the guest knows already, or is no more."""
    tcp_drop_socket(f)
    p.counters.flows_reset += 1
    flow_close(p, f)


cdef void tcp_local_end(Flow *f) noexcept nogil:
    """Ask the socket for its own address and port."""
    cdef sockaddr_storage addr
    cdef socklen_t n = sizeof(addr)
    if f.sock >= 0 and getsockname(f.sock, <sockaddr *>&addr, &n) == 0:
        get_sockaddr(<sockaddr *>&addr, f.local_addr, &f.local_port)


cdef void close_if_done(Plane *p, Flow *f) noexcept nogil:
    """Both directions are closed and acknowledged to the guest; once the peer has all as well, the flow is over.

    Until then the socket's queue holds bytes that the guest believes to be
    there, and they have to move with it if it moves. That the kernel is done is
    an event (EPOLLHUP, when the state changes).
    """
    cdef int left = 0
    if not (f.events & EV_FIN_TO_SOCK and f.events & EV_FIN_ACKED and not f.flags & FF_ACK_DUE
            and f.carry_to_sock == NULL):
        return
    if ioctl(f.sock, SIOCOUTQ, &left) == 0 and left > 0:
        f.flags |= FF_DRAINING
        flow_deadline(p, f, 0)
        return
    flow_close(p, f)


cdef int end_to_sock(Flow *f) noexcept nogil:
    """The socket has all that the guest had to say; 0, or -1 and errno. From here on its end is the guest's own word."""
    reset_on_close(f.sock, False)
    return shutdown(f.sock, SHUT_WR)


# ---- segments from the guest

cdef void take_ack(Plane *p, Flow *f, uint32_t ack, uint32_t window, bint bare) noexcept nogil:
    """An acknowledgement: of data, perhaps of our FIN, and the guest's window."""
    cdef uint32_t n = ack - f.seq_ack_from_guest
    cdef bint same_window = window == f.window, opened = f.window <= 1 and window > 1
    if before(ack, f.seq_ack_from_guest) or before(f.seq_max_to_guest, ack):
        # Old, or of what was never sent: RFC 9293, 3.10.7.4, says answer the latter.
        if before(f.seq_max_to_guest, ack):
            f.flags |= FF_ACK_DUE
        return
    f.window = window
    if n == 0:
        # It has answered a keep-alive, or opened its window. While that is shut, probes come ever more rarely.
        if opened or (window and not in_flight(f)):
            f.retries = 0
        if bare and same_window and in_flight(f) and not f.flags & FF_FAST_DONE:
            f.dup_acks += 1
            if f.dup_acks >= DUP_ACK_LIMIT:
                rewind(p, f)
        return
    f.dup_acks = 0
    f.retries = 0
    if f.flags & FF_FIN_KNOWN and ack == f.seq_fin + 1:
        f.events |= EV_FIN_TO_GUEST | EV_FIN_ACKED
        n -= 1
    f.acked += n
    f.seq_ack_from_guest = ack
    if before(f.seq_to_guest, ack):
        f.seq_to_guest = ack    # it was sent again meanwhile; the kernel's offset follows the discard
    if f.seq_to_guest == f.seq_max_to_guest:
        f.flags &= ~FF_FAST_DONE
    if in_flight(f):
        arm_retransmit(p, f)
    else:
        flow_deadline(p, f, p.now + KEEPALIVE_IDLE)


cdef void take_data(Plane *p, Flow *f, Packet *k, uint32_t seq, bint fin) noexcept nogil:
    """Payload in order goes to the socket; the rest the guest sends again."""
    cdef uint32_t expected = f.seq_from_guest, skip = 0, size = k.payload_size, room
    cdef int n
    if p.send.flow == flow_index(p, f):
        expected += p.send.bytes
    elif p.send.count:
        tcp_send_pending(p)
        if f.kind != FLOW_TCP:
            return
    f.flags |= FF_ACK_DUE
    if f.events & EV_FIN_FROM_GUEST:
        return                  # nothing counts after a FIN
    if seq != expected:
        skip = expected - seq
        if before(expected, seq) or skip > size or (skip == size and not fin):
            # A gap, or all of it old (a retransmission, a keep-alive): acknowledged.
            if before(expected, seq):
                drop(p, DROP_WINDOW)
            return
        size -= skip
    room = f.edge - expected
    if <int>room < 0:
        room = 0
    if size > room:
        # Beyond the window: not taken, nor is a FIN behind it.
        drop(p, DROP_WINDOW)
        size = room
        fin = False
    if size:
        n = packet_payload(k, skip, size, p.send.iov + p.send.count, MAX_CHAIN - p.send.count)
        if n < 0 and p.send.count:
            tcp_send_pending(p)
            if f.kind != FLOW_TCP or f.seq_from_guest != expected:
                return
            n = packet_payload(k, skip, size, p.send.iov, MAX_CHAIN)
        if n < 0:
            drop(p, DROP_MALFORMED)
            return
        p.send.flow = flow_index(p, f)
        p.send.count += n
        p.send.bytes += size
    if fin:
        tcp_send_pending(p)
        if f.kind != FLOW_TCP or f.seq_from_guest != expected + size:
            return
        f.seq_from_guest += 1
        f.events |= EV_FIN_FROM_GUEST | EV_FIN_TO_SOCK
        if f.carry_to_sock == NULL and end_to_sock(f) != 0:
            tcp_reset(p, f)


cdef void tcp_send_pending(Plane *p) noexcept nogil:
    """Hand the payload that was gathered to its socket."""
    cdef Flow *f
    cdef msghdr msg
    cdef ssize_t n = 0
    if p.send.flow == NONE:
        return
    f = &p.flows[p.send.flow]
    memset(&msg, 0, sizeof(msg))
    msg.msg_iov = p.send.iov
    msg.msg_iovlen = p.send.count
    while f.carry_to_sock == NULL:
        n = sendmsg(f.sock, &msg, MSG_DONTWAIT | MSG_NOSIGNAL)
        if n >= 0 or errno != EINTR:
            break
    if n < 0 and shortage(p, errno):
        # Nothing was taken, and nothing is acknowledged: the guest sends it again.
        drop(p, DROP_SEND)
        n = p.send.bytes = 0
    elif n < 0 and (errno == EAGAIN or hold_in_repair(p, f, errno)):
        n = 0
    if n >= 0 and <uint32_t>n < p.send.bytes:
        # The socket has less room than the window that the guest was given
        # said (the kernel counts its own book-keeping too). What was promised
        # is kept: the rest goes first when there is room, and until then the
        # window does not grow.
        if carry_append(&f.carry_to_sock, p.send.iov, p.send.count, <uint32_t>n, p.send.bytes - <uint32_t>n):
            n = p.send.bytes
        else:
            drop(p, DROP_SEND)
    if n >= 0:
        f.seq_from_guest += <uint32_t>n
        f.bytes_from_guest += n
        p.counters.bytes_from_guest += n
    p.send.flow = NONE
    p.send.count = 0
    p.send.bytes = 0
    if n < 0:
        tcp_reset(p, f)


cdef void tcp_from_guest(Plane *p, Packet *k) noexcept nogil:
    cdef const uint8_t *t = k.header + k.l4
    cdef uint32_t size, seq, ack, window, end
    cdef uint8_t flags
    cdef Flow *f
    if k.l4_size < TCP_HLEN:
        drop(p, DROP_SHORT)
        return
    size = (t[12] >> 4) << 2
    if size < TCP_HLEN or size > k.l4_size:
        drop(p, DROP_MALFORMED)
        return
    k.payload = k.l4 + size
    k.payload_size = k.l4_size - size
    flags = t[13]
    f = flow_find(p, FLOW_TCP, k.saddr, be16(t), k.daddr, be16(t + 2))
    if f == NULL:
        if flags & TCP_RST:
            return
        if flags & (TCP_SYN | TCP_ACK | TCP_FIN) == TCP_SYN:
            tcp_open_from_guest(p, k, t, size)
        else:
            drop(p, DROP_NO_FLOW)
            send_reset_for(p, k, t)
        return
    seq = be32(t + 4)
    ack = be32(t + 8)
    f.last_active = p.now
    if f.flags & (FF_RESET_DUE | FF_HELD):
        return                  # its reset waits for a receive buffer, or it is frozen
    if f.flags & FF_DRAINING:
        if flags & TCP_RST:
            return              # the guest has forgotten the connection; the kernel has not
        if flags & (TCP_SYN | TCP_ACK | TCP_FIN) == TCP_SYN:
            # Another connection from the same port: the kernel ends the former one alone.
            flow_close(p, f)
            tcp_open_from_guest(p, k, t, size)
            return
    if not f.events & EV_SYN_FROM_GUEST:
        tcp_answer_from_guest(p, f, k, t, size)
        return
    if flags & TCP_RST:
        # RFC 5961, 3.2: exactly the expected number resets; one within the
        # window is asked about; any other is a stranger's.
        if p.send.flow == flow_index(p, f):
            tcp_send_pending(p)
            if f.kind != FLOW_TCP:
                return
        if seq == f.seq_from_guest:
            tcp_abort(p, f)
        elif not before(seq, f.seq_from_guest) and before(seq, f.edge):
            f.flags |= FF_ACK_DUE
            flow_touch(p, f)
        return
    if flags & TCP_SYN:
        if f.events & EV_ESTABLISHED:
            f.flags |= FF_ACK_DUE   # RFC 5961, 4.2
            flow_touch(p, f)
        elif seq + 1 != f.seq_init_from_guest:
            # Another connection from the same port: the old one is no more.
            tcp_abort(p, f)
            tcp_open_from_guest(p, k, t, size)
        elif not f.flags & FF_CONNECTING and f.flags & FF_FROM_GUEST:
            tcp_send_syn(p, f)
        return
    if not flags & TCP_ACK:
        drop(p, DROP_MALFORMED)
        return
    # RFC 9293, 3.10.7.4: what is old, such as a keep-alive without a byte, or beyond the window is answered, and nothing
    # in it believed. The window is told in units: what was told may be that much more than what is meant here.
    end = seq + k.payload_size + (1 if flags & TCP_FIN else 0)
    if not f.flags & FF_CONNECTING and (
            before(end, f.seq_from_guest) or before(f.edge + (<uint32_t>1 << f.ws_to_guest), seq)):
        if k.payload_size and not before(end, f.seq_from_guest):
            drop(p, DROP_WINDOW)
        f.flags |= FF_ACK_DUE
        flow_touch(p, f)
        return
    if not f.events & EV_ESTABLISHED:
        # Its number may be right also while our answer is to be sent again.
        if f.flags & FF_CONNECTING or f.seq_to_guest == f.seq_ack_from_guest or ack != f.seq_to_guest:
            send_reset_for(p, k, t)
            return
        f.seq_ack_from_guest = ack
        f.window = <uint32_t>be16(t + 14) << f.ws_from_guest
        tcp_establish(p, f)
    flow_touch(p, f)
    window = <uint32_t>be16(t + 14) << f.ws_from_guest
    take_ack(p, f, ack, window, k.payload_size == 0 and not flags & TCP_FIN)
    if k.payload_size or flags & TCP_FIN:
        take_data(p, f, k, seq, flags & TCP_FIN != 0)


cdef void tcp_settle(Plane *p, Flow *f) noexcept nogil:
    """The end of a batch: everything that it made due for this flow."""
    cdef int i
    if f.flags & FF_HELD:
        return
    if f.kind != FLOW_TCP or f.sock < 0:
        if f.kind == FLOW_TCP and f.flags & FF_RESET_DUE:
            flow_unwait(p, f)
            tcp_reset(p, f)
        return
    flow_unwait(p, f)
    if f.flags & FF_SYN_DUE:
        tcp_send_syn(p, f)
        return
    if f.flags & FF_PROBE_DUE:
        send_probe(p, f)
    discard(p, f)
    if f.flags & FF_MORE or (f.flags & FF_EOF and not f.events & EV_FIN_TO_GUEST):
        if send_data(p, f) != 0:
            tcp_reset(p, f)
            return
    if f.flags & FF_ACK_DUE:
        if not send_window(p, f, f.seq_to_guest, TCP_ACK):
            flow_wait_ring(p, f)
            return
    if f.flags & FF_TRY_AGAIN and (not f.deadline or f.deadline > p.now + TRY_AGAIN):
        flow_deadline(p, f, p.now + TRY_AGAIN)
    close_if_done(p, f)


# ---- the host's socket

cdef bint send_carried(Plane *p, Flow *f) noexcept nogil:
    """Send what a migration brought and the new socket had no room for. False: some is left."""
    cdef ssize_t n
    while f.carry_to_sock != NULL:
        n = send(f.sock, f.carry_to_sock.data + f.carry_to_sock.at, carry_left(f.carry_to_sock),
                 MSG_DONTWAIT | MSG_NOSIGNAL)
        if n < 0:
            if errno == EINTR:
                continue
            if shortage(p, errno):
                f.flags |= FF_TRY_AGAIN     # no event tells when there is memory again
                flow_touch(p, f)
            elif errno == EAGAIN:
                f.flags &= ~FF_TRY_AGAIN    # but of room there is
            elif not hold_in_repair(p, f, errno):
                tcp_reset(p, f)
            return False
        f.carry_to_sock = carry_take(f.carry_to_sock, <uint32_t>n)
    f.flags |= FF_WINDOW_LOW
    f.flags &= ~FF_TRY_AGAIN
    # The guest's FIN had to wait for it.
    if f.events & EV_FIN_TO_SOCK and end_to_sock(f) != 0:
        tcp_reset(p, f)
        return False
    return True


cdef bint over_already(Flow *f) noexcept nogil:
    """Both sides had closed before a migration, and the guest has still to read."""
    return f.flags & FF_PEER_FIN and f.events & EV_FIN_TO_SOCK and not f.events & EV_FIN_ACKED


cdef void tcp_from_sock(Plane *p, Flow *f, uint32_t events) noexcept nogil:
    cdef int error = 0
    cdef socklen_t n = sizeof(error)
    if f.sock < 0 or f.flags & FF_HELD:
        return
    if f.flags & FF_CONNECTING:
        if events & (EPOLLOUT | EPOLLERR | EPOLLHUP):
            tcp_connected(p, f)
            if f.kind != FLOW_TCP or f.sock < 0:
                return
        else:
            return
    elif events & (EPOLLERR | EPOLLHUP) and over_already(f):
        # The peer had closed, and knows nothing of a connection any more. What
        # it sent before is in the queue still, and the error is none: taken.
        getsockopt(f.sock, SOL_SOCKET, SO_ERROR, &error, &n)
        f.flags |= FF_EOF
    elif events & EPOLLERR or (events & EPOLLHUP and not f.events & EV_FIN_TO_SOCK):
        # A reset from the peer, or a timeout in the kernel: nothing more can
        # be read or written.
        tcp_reset(p, f)
        return
    if events & EPOLLRDHUP:
        f.flags |= FF_EOF
    if events & EPOLLPRI:
        f.flags |= FF_URGENT
    else:
        f.flags &= ~FF_URGENT
    if events & (EPOLLIN | EPOLLRDHUP):
        f.flags |= FF_MORE
        f.last_active = p.now
    if events & EPOLLOUT and f.events & EV_ESTABLISHED:
        if f.carry_to_sock != NULL:
            if not send_carried(p, f):
                return
        if f.flags & FF_WINDOW_LOW:
            f.flags &= ~FF_WINDOW_LOW
            f.flags |= FF_ACK_DUE
            f.granted = 0
    if f.events & EV_ESTABLISHED:
        flow_touch(p, f)


cdef inline bint takes_nothing(Plane *p, Flow *f) noexcept nogil:
    """Whether the guest takes no frame now, which is no fault of the flow's: nothing is retried, nothing given up."""
    return not queue_active(&p.queues[RX]) or f.flags & FF_RING_WAIT != 0


cdef void tcp_timer(Plane *p, Flow *f) noexcept nogil:
    cdef bint idle
    if f.flags & (FF_RESET_DUE | FF_HELD) or f.sock < 0:
        return
    if f.flags & FF_TRY_AGAIN:
        if send_carried(p, f):
            f.flags |= FF_ACK_DUE
            f.granted = 0
        if f.kind != FLOW_TCP or f.sock < 0:
            return
        flow_touch(p, f)
        if f.flags & FF_TRY_AGAIN:
            return              # a pause: it was not the time for a retransmission that has come, and none counts
    if not f.events & EV_ESTABLISHED:
        if f.flags & FF_CONNECTING:
            tcp_give_up(p, f, ETIMEDOUT)
            return
        if takes_nothing(p, f):
            arm_retransmit(p, f)
            return
        if f.retries >= SYN_RETRIES:
            tcp_reset(p, f)
            return
        f.retries += 1
        tcp_send_syn(p, f)
        if f.deadline == 0:
            arm_retransmit(p, f)
        return
    discard(p, f)
    idle = in_flight(f) == 0 and (not f.flags & FF_MORE or f.events & EV_FIN_ACKED)
    if idle and f.last_active + KEEPALIVE_IDLE > p.now:
        flow_deadline(p, f, f.last_active + KEEPALIVE_IDLE)
        return
    if takes_nothing(p, f):
        arm_retransmit(p, f)
        return
    if f.retries >= DATA_RETRIES and (idle or f.window):
        tcp_reset(p, f)
        return
    # A guest from which no frame at all has come since stands still (paused):
    # then the wait grows to its longest, and no further.
    if f.retries < RETRIES_PAUSED or (f.retries < DATA_RETRIES
                                      and f.frames_seen != <uint16_t>p.counters.frames_from_guest):
        f.retries += 1
    f.frames_seen = <uint16_t>p.counters.frames_from_guest
    if in_flight(f):
        rewind(p, f)
        if f.window == 0:
            f.window = 1        # one byte tries the window (RFC 9293, 3.8.6.1)
    if idle or f.window == 0:
        send_probe(p, f)
    elif send_data(p, f) != 0:
        tcp_reset(p, f)
        return
    arm_retransmit(p, f)


cdef void send_probe(Plane *p, Flow *f) noexcept nogil:
    """One number before the next, which the guest answers (RFC 9293, 3.8.4); as soon as there is a receive buffer."""
    if send_flags(p, f, f.seq_to_guest - 1, TCP_ACK):
        f.flags &= ~FF_PROBE_DUE
    else:
        f.flags |= FF_PROBE_DUE
        flow_wait_ring(p, f)


cdef void tcp_hurry(Flow *f, bint on) noexcept nogil:
    """Have the kernel retransmit often, for the time after a move; or no more."""
    sock_hurry(f.sock, on)
    if on:
        f.flags |= FF_HURRY
    else:
        f.flags &= ~FF_HURRY


cdef void resume_handshake(Plane *p, Flow *f) noexcept nogil:
    """Go on where the guest has not heard, or not answered, our SYN: it is sent again."""
    cdef int zero = 0
    f.retries = 0
    if f.flags & FF_CONNECTING:
        flow_deadline(p, f, p.now + CONNECT_TIMEOUT)
        return
    if f.flags & FF_PEER_FIN:
        f.flags |= FF_EOF
    reset_on_close(f.sock, True)
    if not f.flags & FF_HURRY:
        tcp_hurry(f, True)
    if p.peek_offset:
        setsockopt(f.sock, SOL_SOCKET, SO_PEEK_OFF, &zero, sizeof(zero))
    tcp_send_syn(p, f)


cdef void tcp_resume(Plane *p, Flow *f) noexcept nogil:
    """Take up a flow that came with a migration, or was thawed."""
    cdef int offset = in_flight(f)
    if not f.events & EV_ESTABLISHED:
        resume_handshake(p, f)
        return
    discard(p, f)       # what could not be done while the socket was in repair mode
    if f.events & EV_FIN_TO_GUEST:
        offset -= 1 if not f.events & EV_FIN_ACKED else 0
    offset -= carry_left(f.carry_to_guest)
    if offset < 0:
        offset = 0
    if f.flags & FF_PEER_FIN:
        f.flags |= FF_EOF
    if not f.events & EV_FIN_TO_SOCK or f.carry_to_sock != NULL:
        reset_on_close(f.sock, True)    # as begin() in tcp_open.pyx has it
    if not f.flags & FF_HURRY:
        tcp_hurry(f, True)
    if p.peek_offset:
        setsockopt(f.sock, SOL_SOCKET, SO_PEEK_OFF, &offset, sizeof(offset))
    # Whether it is writable the loop was told while the flow was held, or never.
    if f.carry_to_sock != NULL and not send_carried(p, f) and f.sock < 0:
        return
    f.flags |= FF_MORE
    # Only where it has something to say: there may be thousands, and each is a frame for a guest that has just begun to run.
    if f.seq_ack_to_guest != f.seq_from_guest or <int>(f.edge - f.seq_from_guest) < max(
            WINDOW_LEFT, <int>own_mss(p, f.flags & FF_V6 != 0)):
        f.flags |= FF_ACK_DUE
    f.granted = 0
    f.retries = 0
    if in_flight(f):
        arm_retransmit(p, f)
    else:
        flow_deadline(p, f, f.last_active + KEEPALIVE_IDLE)
    flow_touch(p, f)
