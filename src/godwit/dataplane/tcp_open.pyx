# SPDX-License-Identifier: GPL-2.0-or-later
"""TCP connections that begin, from either side (RFC 9293, 3.10.1 and 3.10.7; theory of operation: ``tcp.pyx``)."""

from libc.stdint cimport uint16_t, uint32_t, uint8_t
from libc.string cimport memcpy, memset

from godwit.dataplane.flow cimport (
    age_in,
    age_out,
    flow_close,
    flow_deadline,
    flow_find,
    flow_new,
    flow_touch,
    flows_for_others,
    flow_wait_ring,
    WATCH_LISTENER,
    flow_watch,
    keyed_hash,
    watch_data,
)
from godwit.dataplane.host cimport (
    bind_outbound,
    get_sockaddr,
    guest_side,
    is_loopback,
    is_unspecified,
    is_v4,
    put_sockaddr,
    to_guest_name,
    to_host,
)
from godwit.dataplane.icmp cimport unreachable_to_guest
from godwit.dataplane.packet cimport Packet
from godwit.dataplane.plane cimport (
    DROP_LIMIT_HALF_OPEN,
    DROP_NO_SOCKET,
    DROP_TABLE_FULL,
    DROP_UNREACHABLE,
    EV_ACCEPTED,
    EV_ESTABLISHED,
    EV_SYN_FROM_GUEST,
    FF_ACK_DUE,
    FF_CONNECTING,
    FF_FROM_GUEST,
    FF_HELD,
    FF_MORE,
    FF_SYN_DUE,
    FF_V6,
    FLOW_TCP,
    HALF_OPEN,
    SHORT_PLACES,
    Flow,
    Listener,
    Plane,
    drop,
)
from godwit.dataplane.shortage cimport shortage, shortage_of
from godwit.dataplane.sys cimport (
    AF_INET,
    AF_INET6,
    ECONNREFUSED,
    ECONNRESET,
    EFD_CLOEXEC,
    EHOSTUNREACH,
    EINPROGRESS,
    EMFILE,
    ENFILE,
    EPOLLIN,
    EPOLL_CTL_MOD,
    ETIMEDOUT,
    IPPROTO_TCP,
    SOCK_CLOEXEC,
    SOCK_NONBLOCK,
    SOCK_STREAM,
    SOL_SOCKET,
    SO_ERROR,
    SO_KEEPALIVE,
    SO_OOBINLINE,
    SO_PEEK_OFF,
    TCP_NODELAY,
    accept4,
    be16,
    be32,
    close,
    connect,
    epoll_ctl,
    epoll_event,
    errno,
    eventfd,
    getsockopt,
    reset_on_close,
    setsockopt,
    sockaddr,
    sockaddr_storage,
    socket,
    socklen_t,
)
from godwit.dataplane.tcp cimport tcp_abort, tcp_drop_socket, tcp_reset
from godwit.dataplane.tcp_to_guest cimport (
    TCP_ACK,
    TCP_HLEN,
    TCP_RST,
    TCP_SYN,
    arm_retransmit,
    own_mss,
    send_flags,
    send_reset_for,
)

cdef enum:
    KEEPALIVE_IDLE = 7200000    # ms; RFC 9293, 3.8.4: no less than two hours
    WS_TO_GUEST = 8             # 16 MiB in 16 bits
    OPT_MSS = 2
    OPT_WS = 3
    DEFAULT_MSS4 = 536          # RFC 9293, 3.7.1
    DEFAULT_MSS6 = 1220
    ACCEPT_BATCH = 64
    TIME_TO_ANSWER = 1000       # ms, before a connection is given up for another: then the guest asks again (RFC 6298)
    ACCEPT_AGAIN = 100          # ms for which a listener rests when there is nothing to accept with


cdef uint32_t initial_seq(Plane *p, Flow *f) noexcept nogil:
    """RFC 6528: a keyed hash of the connection, plus a clock of 4 us."""
    return <uint32_t>keyed_hash(p.hash_key, f.guest_addr, 72) + <uint32_t>(p.now * 250)


cdef void tcp_close_with_reset(int s) noexcept nogil:
    """Close a socket, and reset its peer; in repair mode this says nothing.

    By dissolving the connection (connect(2), AF_UNSPEC), not by SO_LINGER: a
    helper that hangs may hold the socket too, and keep it from being closed.
    """
    cdef sockaddr nobody
    memset(&nobody, 0, sizeof(nobody))
    connect(s, &nobody, sizeof(nobody))
    close(s)


# ---- the guest opens

cdef void parse_options(Flow *f, const uint8_t *t, uint32_t size, bint v6) noexcept nogil:
    cdef uint32_t at = TCP_HLEN, n
    f.mss = DEFAULT_MSS6 if v6 else DEFAULT_MSS4
    f.ws_from_guest = 0
    f.ws_to_guest = 0
    while at < size:
        if t[at] == 0:
            break
        if t[at] == 1:
            at += 1
            continue
        if at + 1 >= size:
            break
        n = t[at + 1]
        if n < 2 or at + n > size:
            break
        if t[at] == OPT_MSS and n == 4:
            f.mss = be16(t + at + 2)
        elif t[at] == OPT_WS and n == 3:
            # RFC 7323, 2.3: more than 14 counts as 14.
            f.ws_from_guest = t[at + 2] if t[at + 2] < 14 else 14
            f.ws_to_guest = WS_TO_GUEST
        at += n


cdef void limit_mss(Plane *p, Flow *f) noexcept nogil:
    cdef uint16_t own = own_mss(p, f.flags & FF_V6 != 0)
    if f.mss > own:
        f.mss = own
    if f.mss < 64:
        f.mss = 64              # what a hostile guest asks for costs it, not us
    f.mss &= 0xFFFC             # the published stream says it in units of four


cdef int stream_socket(Plane *p, bint v6) noexcept nogil:
    cdef int one = 1
    cdef int s = socket(AF_INET6 if v6 else AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)
    if s >= 0:
        # The guest's own stack has decided already what is worth a segment.
        setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one))
    return s


cdef void begin(Plane *p, Flow *f) noexcept nogil:
    """Have the loop watch a connection's socket; peeking starts at its queue's start.

    Urgent data is ordinary data (RFC 6093, 5). Out of line, the byte would be
    missing in what is read, and every offset of what is peeked after it wrong.

    Until the guest has ended its stream nobody else may: should this process be
    killed, the kernel's FIN would tell the peer that what it has is all.
    """
    cdef int zero = 0, one = 1, rc
    setsockopt(f.sock, SOL_SOCKET, SO_OOBINLINE, &one, sizeof(one))
    reset_on_close(f.sock, True)
    if p.peek_offset:
        setsockopt(f.sock, SOL_SOCKET, SO_PEEK_OFF, &zero, sizeof(zero))
    setsockopt(f.sock, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof(one))
    rc = flow_watch(p, f)
    if rc != 0 and f.flags & FF_CONNECTING:
        tcp_give_up(p, f, -rc)
    elif rc != 0:
        shortage(p, -rc)
        tcp_reset(p, f)


cdef bint half_open_room(Plane *p) noexcept nogil:
    """Whether the guest may open one more connection; the oldest that was not answered is given up for it, if need be.

    In silence: the guest sends its SYN again, and that opens it anew. So a host that answers is reached, however many
    that do not answer are asked. Each has its time to answer, which limits how many sockets are opened in a second as
    well: one is the work of many frames.
    """
    cdef Flow *f
    if p.aged[HALF_OPEN] < p.most_half_open and p.aged[HALF_OPEN] < (p.flow_limit >> 2) + 1:
        return True
    f = &p.flows[p.oldest[HALF_OPEN]]
    if f.flags & FF_HELD or p.now + CONNECT_TIMEOUT < f.deadline + TIME_TO_ANSWER:
        return False
    drop(p, DROP_LIMIT_HALF_OPEN)
    flow_close(p, f)
    return True


cdef void tcp_open_from_guest(Plane *p, Packet *k, const uint8_t *t, uint32_t size) noexcept nogil:
    cdef uint8_t host[16]
    cdef Flow *f
    if not to_host(p, k.daddr, be16(t + 2), host):
        drop(p, DROP_UNREACHABLE)
        send_reset_for(p, k, t)
        return
    if not half_open_room(p):
        drop(p, DROP_LIMIT_HALF_OPEN)
        return
    f = NULL
    if p.open_flows < p.most_flows:
        f = flow_new(p, FLOW_TCP, k.saddr, be16(t), k.daddr, be16(t + 2))
    if f == NULL:
        # At once, since it may last: whoever asks shall hear that, and not wait for two minutes.
        drop(p, DROP_TABLE_FULL)
        shortage_of(p, SHORT_PLACES)
        send_reset_for(p, k, t)
        return
    f.flags = FF_FROM_GUEST | (FF_V6 if k.v6 else 0)
    f.events = EV_SYN_FROM_GUEST
    parse_options(f, t, size, k.v6)
    limit_mss(p, f)
    f.seq_init_from_guest = be32(t + 4) + 1
    f.seq_from_guest = f.seq_ack_to_guest = f.edge = f.seq_init_from_guest
    f.window = be16(t + 14)
    f.seq_to_guest = f.seq_max_to_guest = f.seq_ack_from_guest = initial_seq(p, f)
    connect_out(p, f, host)


cdef void tcp_give_up(Plane *p, Flow *f, int why) noexcept nogil:
    """The guest cannot be connected with whom it has called, for this reason; it sees what it would of the network.

    A reset is the peer's own word, and nobody else's. Routers and hosts that
    cannot deliver send "unreachable"; so does a translator of addresses
    that is out of what a connection takes (RFC 6888, REQ-8). Silence ends in
    silence: the guest has its own patience.
    """
    if why == ECONNREFUSED or why == ECONNRESET:
        tcp_reset(p, f)
        return
    if shortage(p, why):
        drop(p, DROP_NO_SOCKET)
        why = EHOSTUNREACH
    tcp_drop_socket(f)
    if why != ETIMEDOUT:
        unreachable_to_guest(p, f, why, NULL, 0)
    p.counters.flows_reset += 1
    flow_close(p, f)


cdef void tcp_open_anew(Plane *p, Flow *f) noexcept nogil:
    cdef uint8_t host[16]
    f.flags &= ~FF_HELD
    if to_host(p, f.our_addr, f.our_port, host):
        connect_out(p, f, host)
    else:
        tcp_reset(p, f)


cdef void connect_out(Plane *p, Flow *f, const uint8_t *host) noexcept nogil:
    """Begin to connect to whom the guest has called, which is `host` here."""
    cdef sockaddr_storage addr
    cdef socklen_t n
    cdef int rc
    memcpy(f.remote_addr, host, 16)
    f.remote_port = f.our_port
    f.local_port = 0    # whatever it was where the flow comes from: asked when it is wanted
    f.sock = stream_socket(p, not is_v4(host))
    if f.sock < 0 or (not is_loopback(host) and bind_outbound(p, f.sock, is_v4(host), 0) != 0):
        rc = errno
        if not shortage(p, rc):
            drop(p, DROP_NO_SOCKET)
        tcp_give_up(p, f, rc)
        return
    n = put_sockaddr(p, <sockaddr *>&addr, host, f.remote_port)
    rc = connect(f.sock, <sockaddr *>&addr, n)
    if rc != 0 and errno != EINPROGRESS:
        tcp_give_up(p, f, errno)
        return
    # Also when connected at once: the first event says "writable" all the same.
    f.flags |= FF_CONNECTING
    age_in(p, f)
    flow_deadline(p, f, p.now + CONNECT_TIMEOUT)
    begin(p, f)


cdef void tcp_send_syn(Plane *p, Flow *f) noexcept nogil:
    """SYN to the guest, or SYN,ACK as the answer to its own."""
    cdef uint8_t flags = TCP_SYN | (TCP_ACK if f.events & EV_SYN_FROM_GUEST else 0)
    f.flags |= FF_SYN_DUE
    if not send_flags(p, f, f.seq_ack_from_guest, flags):
        flow_wait_ring(p, f)
        return
    f.flags &= ~FF_SYN_DUE
    f.seq_to_guest = f.seq_max_to_guest = f.seq_ack_from_guest + 1
    f.edge = f.seq_from_guest + 0xFFFF
    arm_retransmit(p, f)


cdef void tcp_connected(Plane *p, Flow *f) noexcept nogil:
    """The host's side of a connection that the guest opened is there, or failed."""
    cdef int error = 0
    cdef socklen_t n = sizeof(error)
    age_out(p, f)
    if getsockopt(f.sock, SOL_SOCKET, SO_ERROR, &error, &n) != 0 or error:
        tcp_give_up(p, f, error)
        return
    f.flags &= ~FF_CONNECTING
    tcp_send_syn(p, f)


# ---- opened from outside

cdef void tcp_refuse_waiting(Listener *listener) noexcept nogil:
    cdef int s
    while True:
        s = accept4(listener.fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)
        if s < 0:
            return
        tcp_close_with_reset(s)


cdef bint refuse_one(Plane *p, Listener *listener) noexcept nogil:
    """Without a descriptor left: give up the spare one to refuse a connection, which would wait for ever.

    False: there is no more to refuse.
    """
    cdef int s
    if p.spare < 0:
        return False
    close(p.spare)
    s = accept4(listener.fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)
    if s >= 0:
        drop(p, DROP_NO_SOCKET)
        tcp_close_with_reset(s)
    p.spare = eventfd(0, EFD_CLOEXEC)
    return s >= 0


cdef void watch_listener(Plane *p, int i, bint on) noexcept nogil:
    cdef epoll_event ev
    ev.events = EPOLLIN if on else 0
    ev.data.u64 = watch_data(WATCH_LISTENER, 0, i)
    epoll_ctl(p.epfd, EPOLL_CTL_MOD, p.listeners[i].fd, &ev)
    p.listeners[i].resting = not on


cdef void rest(Plane *p, Listener *listener) noexcept nogil:
    """Let those wait who have come: there is nothing to accept them with, and the event would not end."""
    watch_listener(p, <int>(listener - p.listeners), False)
    if not p.accept_again:
        p.accept_again = p.now + ACCEPT_AGAIN


cdef void tcp_accept_again(Plane *p) noexcept nogil:
    cdef int i
    p.accept_again = 0
    for i in range(p.listener_count):
        if p.listeners[i].resting and p.listeners[i].fd >= 0:
            watch_listener(p, i, True)


cdef uint32_t callers_share(Plane *p) noexcept nogil:
    """How many sockets there may be while connections from outside are taken: the guest shall always find some for its own."""
    return p.flow_limit - (p.flow_limit >> 4)


cdef bint tcp_accept(Plane *p, Listener *listener) noexcept nogil:
    cdef sockaddr_storage addr
    cdef socklen_t n
    cdef uint8_t remote[16]
    cdef uint8_t name[16]
    cdef const uint8_t *guest
    cdef uint16_t port
    cdef int s, i, why, one = 1
    cdef Flow *f
    if p.spare < 0:
        p.spare = eventfd(0, EFD_CLOEXEC)
    for i in range(ACCEPT_BATCH):
        n = sizeof(addr)
        s = accept4(listener.fd, <sockaddr *>&addr, &n, SOCK_NONBLOCK | SOCK_CLOEXEC)
        if s < 0:
            why = errno
            if (why == EMFILE or why == ENFILE) and refuse_one(p, listener):
                shortage(p, why)
                continue
            if shortage(p, why):
                rest(p, listener)
            return False
        get_sockaddr(<sockaddr *>&addr, remote, &port)
        guest = guest_side(p, remote)
        if not is_unspecified(listener.guest_addr):
            guest = listener.guest_addr
        f = NULL
        if (not is_unspecified(guest) and is_v4(guest) == is_v4(remote) and to_guest_name(p, remote, port, name)
                and flow_find(p, FLOW_TCP, guest, listener.guest_port, name, port) == NULL):
            if flows_for_others(p) and p.open_sockets < callers_share(p):
                f = flow_new(p, FLOW_TCP, guest, listener.guest_port, name, port)
            if f == NULL:
                drop(p, DROP_TABLE_FULL)
                shortage_of(p, SHORT_PLACES)
        else:
            drop(p, DROP_UNREACHABLE)
        if f == NULL:
            tcp_close_with_reset(s)
            continue
        f.sock = s
        f.flags = 0 if is_v4(remote) else FF_V6
        f.events = EV_ACCEPTED
        memcpy(f.remote_addr, remote, 16)
        f.remote_port = port
        f.mss = own_mss(p, f.flags & FF_V6 != 0) & 0xFFFC
        f.ws_to_guest = WS_TO_GUEST
        f.seq_to_guest = f.seq_max_to_guest = f.seq_ack_from_guest = initial_seq(p, f)
        setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one))
        begin(p, f)
        if f.kind == FLOW_TCP:
            tcp_send_syn(p, f)
    return True


cdef void tcp_establish(Plane *p, Flow *f) noexcept nogil:
    f.events |= EV_ESTABLISHED
    f.flags &= ~FF_SYN_DUE
    f.flags |= FF_MORE
    f.retries = 0
    f.granted = 0
    flow_deadline(p, f, p.now + KEEPALIVE_IDLE)


cdef void tcp_answer_from_guest(Plane *p, Flow *f, Packet *k, const uint8_t *t, uint32_t size) noexcept nogil:
    """The guest's answer to our SYN (RFC 9293, 3.10.7.3)."""
    cdef uint8_t flags = t[13]
    if flags & TCP_ACK and be32(t + 8) != f.seq_to_guest:
        if not flags & TCP_RST:
            send_reset_for(p, k, t)
        return
    if flags & TCP_RST:
        if flags & TCP_ACK:
            tcp_abort(p, f)
        return
    if flags & (TCP_SYN | TCP_ACK) != TCP_SYN | TCP_ACK:
        return
    parse_options(f, t, size, k.v6)
    limit_mss(p, f)
    f.seq_init_from_guest = be32(t + 4) + 1
    f.seq_from_guest = f.edge = f.seq_init_from_guest
    # The scale that we offered in our SYN holds only if the guest sent one too;
    # that of its own segments starts with the next one.
    f.window = be16(t + 14)
    f.seq_ack_from_guest = f.seq_to_guest
    f.events |= EV_SYN_FROM_GUEST
    tcp_establish(p, f)
    f.flags |= FF_ACK_DUE
    flow_touch(p, f)
