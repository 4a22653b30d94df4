# SPDX-License-Identifier: GPL-2.0-or-later
"""TCP towards the guest: segments, windows, and what is in flight.

See tcp.pyx for how the parts work together.
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t, uint8_t
from libc.string cimport memcpy, memset

from godwit.dataplane.flow cimport carry_left, carry_take, flow_deadline, flow_wait_ring
from godwit.dataplane.loop cimport read_clock
from godwit.dataplane.packet cimport Packet
from godwit.dataplane.plane cimport (
    DROP_RING_FULL,
    ETH_HLEN,
    EV_ESTABLISHED,
    EV_FIN_FROM_SOCK,
    EV_FIN_TO_GUEST,
    EV_FIN_TO_SOCK,
    FF_ACK_DUE,
    FF_CONNECTING,
    FF_EOF,
    FF_FAST_DONE,
    FF_FIN_KNOWN,
    FF_MORE,
    FF_PEER_FIN,
    FF_URGENT,
    FF_V6,
    FF_WINDOW_LOW,
    RX_BURST,
    Flow,
    Plane,
    drop,
)
from godwit.dataplane.shortage cimport shortage
from godwit.dataplane.sys cimport (
    CLOCK_MONOTONIC,
    CLOCK_THREAD_CPUTIME_ID,
    EAGAIN,
    EINTR,
    IPPROTO_TCP,
    MSG_DONTWAIT,
    MSG_PEEK,
    MSG_TRUNC,
    POLLOUT,
    SOL_SOCKET,
    SO_BUF_LOCK,
    SO_MEMINFO,
    SO_PEEK_OFF,
    SO_SNDBUF,
    be32,
    before,
    errno,
    getsockopt,
    msghdr,
    poll,
    pollfd,
    put16,
    put32,
    recv,
    recvmsg,
    setsockopt,
    socklen_t,
)
from godwit.dataplane.to_guest cimport (
    IPV4_HLEN,
    IPV6_HLEN,
    MAX_HEADERS,
    VNET_GSO_TCPV4,
    VNET_GSO_TCPV6,
    put_checksum,
    put_headers,
    rx_finish,
    rx_reserve,
    rx_reserve_another,
    rx_view,
)
from godwit.dataplane.virtqueue cimport MAX_CHAIN

cdef enum:
    RTO_FIRST = 1000            # ms; RFC 6298, 2.1: with no sample, one second
    RTO_MOST = 60000            # RFC 6298, 2.5
    OPT_MSS = 2
    OPT_WS = 3
    MAX_SEGMENT = 65535         # what IP can say of its own length
    MEMINFO_SNDBUF = 3          # SK_MEMINFO_*, linux/sock_diag.h
    MEMINFO_WMEM_QUEUED = 5
    MEMINFO_VARS = 9
    PEEK_NS = 250000            # for which a peek may last, and a nanosecond for each byte
    FLIGHT_LEAST = 9            # logarithms
    FLIGHT_MOST = 30            # as large as any window (RFC 7323, 2.3)


cdef uint16_t own_mss(Plane *p, bint v6) noexcept nogil:
    """What we tell the guest that we take: what fits the MTU it was given."""
    cdef uint32_t mtu = p.config.mtu if p.config.mtu else MAX_SEGMENT
    return <uint16_t>(mtu - TCP_HLEN - (IPV6_HLEN if v6 else IPV4_HLEN))


cdef uint16_t window_left(Flow *f) noexcept nogil:
    """The field of a segment's window: what is left up to the edge, which only moves on."""
    cdef uint32_t left = f.edge - f.seq_from_guest
    if <int>left < 0:
        return 0
    left >>= f.ws_to_guest
    return <uint16_t>left if left < 0xFFFF else 0xFFFF


cdef void put_tcp(uint8_t *t, Flow *f, uint32_t seq, uint8_t flags, uint32_t size) noexcept nogil:
    memset(t, 0, TCP_HLEN)
    put16(t, f.our_port)
    put16(t + 2, f.guest_port)
    put32(t + 4, seq)
    t[12] = <uint8_t>(size << 2)
    t[13] = flags
    if flags & TCP_ACK:
        put32(t + 8, f.seq_from_guest)
        f.seq_ack_to_guest = f.seq_from_guest
        f.flags &= ~FF_ACK_DUE
    f.wnd_sent = window_left(f)
    put16(t + 14, f.wnd_sent)


cdef bint send_flags(Plane *p, Flow *f, uint32_t seq, uint8_t flags) noexcept nogil:
    """A segment without payload. False: no receive buffer, nothing was sent."""
    cdef uint8_t h[MAX_HEADERS]
    cdef uint32_t size = TCP_HLEN, l4
    cdef bint v6 = f.flags & FF_V6 != 0
    if flags & TCP_SYN:
        size += 4
        if f.ws_to_guest:
            size += 4
    if rx_reserve(p, p.vnet_size + ETH_HLEN + IPV6_HLEN + size) < (
            p.vnet_size + ETH_HLEN + (IPV6_HLEN if v6 else IPV4_HLEN) + size):
        return False
    l4 = put_headers(p, h, v6, f.our_addr, f.guest_addr, IPPROTO_TCP, size)
    put_tcp(h + l4, f, seq, flags, size)
    if flags & TCP_SYN:
        # RFC 7323, 2.2: the window of a segment with SYN is never scaled.
        put16(h + l4 + 14, 0xFFFF)
        h[l4 + 20] = OPT_MSS
        h[l4 + 21] = 4
        put16(h + l4 + 22, own_mss(p, v6))
        if f.ws_to_guest:
            h[l4 + 24] = 1      # no operation, for the alignment
            h[l4 + 25] = OPT_WS
            h[l4 + 26] = 3
            h[l4 + 27] = f.ws_to_guest
    put_checksum(p, h, l4, 16, l4 + size, 0, v6, f.our_addr, f.guest_addr, IPPROTO_TCP)
    rx_finish(p, h, l4 + size, l4 + size)
    return True


cdef void send_reset_for(Plane *p, Packet *k, const uint8_t *t) noexcept nogil:
    """RFC 9293, 3.10.7.1: the reset that answers a segment of no connection."""
    cdef uint8_t h[MAX_HEADERS]
    cdef uint32_t l4, size = TCP_HLEN, ack
    if rx_reserve(p, p.vnet_size + ETH_HLEN + IPV6_HLEN + size) < p.vnet_size + ETH_HLEN + IPV6_HLEN + size:
        drop(p, DROP_RING_FULL)
        return
    l4 = put_headers(p, h, k.v6, k.daddr, k.saddr, IPPROTO_TCP, size)
    memset(h + l4, 0, TCP_HLEN)
    memcpy(h + l4, t + 2, 2)
    memcpy(h + l4 + 2, t, 2)
    h[l4 + 12] = TCP_HLEN << 2
    if t[13] & TCP_ACK:
        memcpy(h + l4 + 4, t + 8, 4)
        h[l4 + 13] = TCP_RST
    else:
        ack = be32(t + 4) + k.payload_size + (1 if t[13] & TCP_SYN else 0) + (1 if t[13] & TCP_FIN else 0)
        put32(h + l4 + 8, ack)
        h[l4 + 13] = TCP_RST | TCP_ACK
    put_checksum(p, h, l4, 16, l4 + size, 0, k.v6, k.daddr, k.saddr, IPPROTO_TCP)
    rx_finish(p, h, l4 + size, l4 + size)


cdef void enlarge(Plane *p, Flow *f, uint32_t *info) noexcept nogil:
    """Double the send buffer of a guest that has used some of its window, and whose socket is empty all the same.

    The kernel enlarges a buffer that was full, and no other. Where the peer takes
    everything sooner than the guest hears of its window, none ever is, and the
    connection would stay at the initial one.
    """
    cdef int size = <int>info[MEMINFO_SNDBUF], unlocked = 0
    cdef socklen_t n = MEMINFO_VARS * sizeof(uint32_t)
    # Without SO_BUF_LOCK (Linux 5.14) the kernel would not size it by itself any more.
    if size >= p.send_buffer or setsockopt(f.sock, SOL_SOCKET, SO_BUF_LOCK, &unlocked, sizeof(unlocked)) != 0:
        return
    size = min(size, p.send_buffer // 2)    # the kernel doubles it
    setsockopt(f.sock, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size))
    setsockopt(f.sock, SOL_SOCKET, SO_BUF_LOCK, &unlocked, sizeof(unlocked))
    getsockopt(f.sock, SOL_SOCKET, SO_MEMINFO, info, &n)


cdef void update_window(Plane *p, Flow *f) noexcept nogil:
    """The window for the guest: the free room in the socket's send buffer."""
    cdef uint32_t info[MEMINFO_VARS]
    cdef socklen_t n = sizeof(info)
    cdef uint32_t room, left = f.edge - f.seq_from_guest
    cdef pollfd pfd
    if <int>left < 0:
        left = 0
    if f.carry_to_sock != NULL:
        f.granted = 0           # no more than was promised, until it is sent
        return
    # Most of what was granted is still there: no need to ask the kernel again.
    if left < f.granted - (f.granted >> 2) or f.granted == 0:
        room = 0
        if f.sock >= 0 and not f.flags & FF_CONNECTING:
            if getsockopt(f.sock, SOL_SOCKET, SO_MEMINFO, info, &n) == 0:
                if f.granted and info[MEMINFO_WMEM_QUEUED] < info[MEMINFO_SNDBUF] >> 2:
                    enlarge(p, f, info)
                if info[MEMINFO_WMEM_QUEUED] < info[MEMINFO_SNDBUF]:
                    room = info[MEMINFO_SNDBUF] - info[MEMINFO_WMEM_QUEUED]
                f.flags &= ~FF_WINDOW_LOW
                if room <= info[MEMINFO_SNDBUF] // 3:
                    f.flags |= FF_WINDOW_LOW
                    # poll() on a full socket is what makes the kernel grow its
                    # buffer later and tell us when there is room again.
                    pfd.fd = f.sock
                    pfd.events = POLLOUT
                    pfd.revents = 0
                    poll(&pfd, 1, 0)
                room -= room >> 3   # the kernel's own book-keeping takes room too
                room = min(room, <uint32_t>0xFFFF << f.ws_to_guest)     # more cannot be told, so it is not granted
        if room > left:
            # RFC 9293, 3.8.6.2.2: the right edge moves by a segment or by half
            # of the buffer, or not at all.
            if room - left >= f.mss or room - left >= room >> 1:
                f.edge = f.seq_from_guest + room
                left = room
        f.granted = room if room > left else left


cdef bint send_window(Plane *p, Flow *f, uint32_t seq, uint8_t flags) noexcept nogil:
    """send_flags() with the window as it is now. What could not be told is not granted: a migration would believe it."""
    cdef uint32_t edge = f.edge
    update_window(p, f)
    if send_flags(p, f, seq, flags):
        return True
    f.edge = edge
    f.granted = 0
    return False


cdef void arm_retransmit(Plane *p, Flow *f) noexcept nogil:
    cdef uint64_t rto = RTO_FIRST << (f.retries if f.retries < 6 else 6)
    flow_deadline(p, f, p.now + (rto if rto < RTO_MOST else RTO_MOST))


cdef void send_fin(Plane *p, Flow *f) noexcept nogil:
    """The peer has closed and the guest has been sent all: tell it."""
    if not (send_window(p, f, f.seq_to_guest, TCP_FIN | TCP_ACK) if f.flags & FF_ACK_DUE
            else send_flags(p, f, f.seq_to_guest, TCP_FIN | TCP_ACK)):
        flow_wait_ring(p, f)
        return
    f.events |= EV_FIN_FROM_SOCK | EV_FIN_TO_GUEST
    f.seq_fin = f.seq_to_guest
    f.flags |= FF_FIN_KNOWN
    f.seq_to_guest += 1
    if before(f.seq_max_to_guest, f.seq_to_guest):
        f.seq_max_to_guest = f.seq_to_guest
    f.flags &= ~FF_MORE
    arm_retransmit(p, f)


cdef uint32_t may_fly(Flow *f) noexcept nogil:
    """How many bytes may be in flight to the guest: what its window says, or less."""
    cdef uint32_t most = <uint32_t>1 << f.flight
    return f.window if f.flight == 0 or f.window < most else most


cdef void note_peek(Flow *f, uint64_t took, uint32_t seen) noexcept nogil:
    """Have less in flight where looking at ``seen`` bytes, which are in the queue, took that many nanoseconds: by the
    clock, or of the processor's time where ``flight`` is set (the one costs nothing, and counts what others have run).

    A peek looks for the place of each piece from the head of the queue. A peer that sends its bytes one by one, and the
    kernel cannot join them, makes that a matter of a second, in which nothing else is done. What the guest has
    acknowledged is taken out of the queue at once, so little in flight is little to be looked through.
    """
    if took <= PEEK_NS + seen:
        if f.flight:
            f.flight = f.flight + 1 if f.flight < FLIGHT_MOST else 0
    elif f.flight == 0:
        f.flight = FLIGHT_MOST  # no limit yet: it may have waited for the processor, the next one tells
    else:
        f.flight = FLIGHT_LEAST
        while f.flight < FLIGHT_MOST and seen >> (f.flight + 2):
            f.flight += 1       # half of it


cdef int send_data(Plane *p, Flow *f) noexcept nogil:
    """Move what the socket has to the guest, as far as window and ring go.

    What is there is not known before it is read, so each call asks for twice as
    many frames as the one before; for one after a call that took long.

    0, or a negative error number: the connection is broken.
    """
    cdef uint8_t scratch[4096]
    cdef bint v6 = f.flags & FF_V6 != 0
    cdef bint tso = p.guest_tso6 if v6 else p.guest_tso4
    cdef uint32_t head = p.vnet_size + ETH_HLEN + (IPV6_HLEN if v6 else IPV4_HLEN) + TCP_HLEN
    cdef uint32_t most = MAX_SEGMENT - (IPV6_HLEN if v6 else IPV4_HLEN) - TCP_HLEN
    cdef uint32_t window, room, want, asked, capacity, flying, carried
    cdef uint64_t began
    cdef ssize_t n = 0
    cdef msghdr msg
    cdef int burst = 1, clock
    if not f.events & EV_ESTABLISHED or f.events & EV_FIN_TO_GUEST or f.sock < 0:
        return 0
    if not tso:
        most = f.mss
    else:
        most -= most % f.mss    # whole segments only, but for the last
    memset(&msg, 0, sizeof(msg))
    while True:
        flying = in_flight(f)
        window = may_fly(f)
        room = window - flying if window > flying else 0
        if room == 0 or (room < f.mss and flying and room < window >> 1):
            # Window shut, or nearly: the guest opens it, or the timer asks.
            f.flags |= FF_MORE
            if not f.deadline or f.deadline > p.now + RTO_MOST:
                arm_retransmit(p, f)
            return 0
        want = room if room < most else most
        capacity = rx_reserve(p, head + want)
        if capacity <= head:
            f.flags |= FF_MORE
            flow_wait_ring(p, f)
            return 0
        if want > capacity - head:
            want = capacity - head
        asked = want
        carried = carry_left(f.carry_to_guest)
        if flying < carried:
            n = carry_to_view(p, f, head, want if want < carried - flying else carried - flying, flying)
        else:
            rx_view(p, head, want)
            if want == most:
                asked += view_more(p, head, most, f.mss, room - most, burst - 1)
                burst = min(2 * burst, RX_BURST)
            if p.peek_offset:
                msg.msg_iov = p.rx.view
                msg.msg_iovlen = p.rx.views
            # Before Linux 6.9: peek from the start, what is in flight first.
            elif not peek_past(p, flying - carried, scratch, sizeof(scratch), &msg):
                f.flags |= FF_MORE
                return 0
            clock = CLOCK_THREAD_CPUTIME_ID if f.flight else CLOCK_MONOTONIC
            began = read_clock(clock)
            n = recvmsg(f.sock, &msg, MSG_PEEK | MSG_DONTWAIT)
            note_peek(f, read_clock(clock) - began, flying - carried + <uint32_t>(n if n > 0 else 0))
            if f.flight == FLIGHT_MOST:
                burst = 1           # what tells is not to take long itself
            if n >= 0 and not p.peek_offset:
                n = n - (flying - carried)
                if n <= 0 and not f.flags & FF_EOF:
                    # Up to an urgent mark nothing more is shown until it is next.
                    if not f.flags & FF_URGENT:
                        f.flags &= ~FF_MORE
                    return 0
                n = n if n > 0 else 0
            if n < 0 and f.flags & FF_PEER_FIN and (errno == EAGAIN or f.events & EV_FIN_TO_SOCK):
                n = 0       # the end of the queue, or of a connection that both had closed, is the end
            if n < 0:
                if errno == EAGAIN or errno == EINTR:
                    f.flags &= ~FF_MORE
                    return 0
                if shortage(p, errno):
                    f.flags |= FF_MORE
                    arm_retransmit(p, f)
                    return 0
                return 0 if hold_in_repair(p, f, errno) else -errno
        if n == 0:
            f.flags |= FF_EOF
            send_fin(p, f)
            return 0
        if flying == 0 or not f.deadline:
            arm_retransmit(p, f)
        put_data(p, f, v6, head, <uint32_t>n, want)
        # Less than asked for: the queue is empty now, and more (or the end of
        # it) raises another edge. An end that was announced is still to read,
        # and an urgent mark may have been the reason.
        if n < asked and flying >= carried and not f.flags & (FF_EOF | FF_URGENT):
            f.flags &= ~FF_MORE
            return 0


cdef uint32_t view_more(Plane *p, uint32_t head, uint32_t most, uint32_t mss, uint32_t room, int frames) noexcept nogil:
    """Pick buffers for more frames of `most` bytes after `head`, the last perhaps less, for `room` bytes in all.

    Returns the bytes that they take.
    """
    cdef uint32_t asked = 0, want
    while frames > 0 and room >= mss:
        want = room if room < most else most
        if not rx_reserve_another(p, head + want):
            break
        rx_view(p, head, want)
        asked += want
        room -= want
        frames -= 1
    return asked


cdef void put_data(Plane *p, Flow *f, bint v6, uint32_t head, uint32_t size, uint32_t most) noexcept nogil:
    """Hand `size` bytes to the guest that lie in the picked buffers, `most` in each frame but the last."""
    cdef uint8_t h[MAX_HEADERS]
    cdef uint32_t part, l4
    if f.flags & FF_ACK_DUE:
        update_window(p, f)
    while size:
        part = size if size < most else most
        l4 = put_headers(p, h, v6, f.our_addr, f.guest_addr, IPPROTO_TCP, TCP_HLEN + part)
        put_tcp(h + l4, f, f.seq_to_guest, TCP_ACK | TCP_PSH, TCP_HLEN)
        put_checksum(p, h, l4, 16, head, part, v6, f.our_addr, f.guest_addr, IPPROTO_TCP)
        if part > f.mss:
            h[1] = VNET_GSO_TCPV6 if v6 else VNET_GSO_TCPV4
            h[2] = head - p.vnet_size       # hdr_len and gso_size, little-endian
            h[3] = 0
            h[4] = f.mss & 0xFF
            h[5] = f.mss >> 8
        rx_finish(p, h, head, head + part)
        f.seq_to_guest += part
        size -= part
    if before(f.seq_max_to_guest, f.seq_to_guest):
        f.bytes_to_guest += f.seq_to_guest - f.seq_max_to_guest
        p.counters.bytes_to_guest += f.seq_to_guest - f.seq_max_to_guest
        f.seq_max_to_guest = f.seq_to_guest


cdef uint32_t carry_to_view(Plane *p, Flow *f, uint32_t head, uint32_t size, uint32_t skip) noexcept nogil:
    """Bytes that came with a migration, from `skip` on, into p.rx.view."""
    cdef const uint8_t *data = f.carry_to_guest.data + f.carry_to_guest.at + skip
    cdef int i, count = rx_view(p, head, size)
    for i in range(count):
        memcpy(p.rx.view[i].iov_base, data, p.rx.view[i].iov_len)
        data += p.rx.view[i].iov_len
    return size


cdef bint peek_past(Plane *p, uint32_t flying, uint8_t *scratch, uint32_t scratch_size, msghdr *msg) noexcept nogil:
    """p.rx.view after elements that swallow the bytes in flight. False: too many."""
    cdef uint32_t part
    cdef int n = 0, i
    while flying:
        if n >= MAX_CHAIN // 2:
            return False
        part = flying if flying < scratch_size else scratch_size
        p.send.iov[n].iov_base = scratch
        p.send.iov[n].iov_len = part
        flying -= part
        n += 1
    if n + p.rx.views > MAX_CHAIN:
        return False
    for i in range(p.rx.views):
        p.send.iov[n + i] = p.rx.view[i]
    msg.msg_iov = p.send.iov
    msg.msg_iovlen = n + p.rx.views
    return True


cdef void discard(Plane *p, Flow *f) noexcept nogil:
    """Take what the guest has acknowledged out of the socket's queue."""
    cdef ssize_t n
    cdef uint32_t part = carry_left(f.carry_to_guest)
    if part and f.acked:
        part = part if part < f.acked else f.acked
        f.carry_to_guest = carry_take(f.carry_to_guest, part)
        f.acked -= part
    while f.acked:
        n = recv(f.sock, NULL, f.acked, MSG_TRUNC | MSG_DONTWAIT)
        if n <= 0:
            if n < 0 and errno == EINTR:
                continue
            if n < 0 and hold_in_repair(p, f, errno):
                return
            # Acknowledged bytes are always there: the guest acknowledged what
            # it was never sent, or the connection broke and will say so.
            f.acked = 0
            return
        f.acked -= <uint32_t>n


cdef void rewind(Plane *p, Flow *f) noexcept nogil:
    """Send again from what the guest has not acknowledged."""
    cdef int zero = 0
    discard(p, f)
    f.seq_to_guest = f.seq_ack_from_guest
    f.dup_acks = 0
    f.flags |= FF_FAST_DONE     # RFC 6582, 4: all of it is sent again already
    f.events &= ~EV_FIN_TO_GUEST
    if p.peek_offset:
        setsockopt(f.sock, SOL_SOCKET, SO_PEEK_OFF, &zero, sizeof(zero))
    f.flags |= FF_MORE
    p.counters.retransmits += 1
