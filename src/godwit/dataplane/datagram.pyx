# SPDX-License-Identifier: GPL-2.0-or-later

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from godwit.dataplane.checksum cimport fold, sum_bytes, sum_iov
from godwit.dataplane.flow cimport (
    flow_close,
    flow_deadline,
    flow_find,
    flow_new,
    flow_wait_ring,
    flow_watch,
)
from godwit.dataplane.host cimport is_v4, put_sockaddr, to_host
from godwit.dataplane.packet cimport Packet, packet_payload
from godwit.dataplane.plane cimport (
    DROP_MALFORMED,
    DROP_NO_SOCKET,
    DROP_RING_FULL,
    DROP_SEND,
    DROP_SHORT,
    DROP_TABLE_FULL,
    DROP_UNREACHABLE,
    ETH_HLEN,
    FF_FROM_GUEST,
    FF_V6,
    FLOW_PING,
    FLOW_UDP,
    Flow,
    FlowKind,
    Plane,
    drop,
)
from godwit.dataplane.sys cimport (
    AF_INET,
    AF_INET6,
    EAGAIN,
    EINTR,
    IPPROTO_ICMP,
    IPPROTO_ICMPV6,
    IPPROTO_UDP,
    MSG_DONTWAIT,
    MSG_NOSIGNAL,
    MSG_PEEK,
    SOCK_CLOEXEC,
    SOCK_DGRAM,
    SOCK_NONBLOCK,
    be16,
    connect,
    errno,
    iovec,
    msghdr,
    put16,
    recv,
    recvmsg,
    sendmsg,
    sockaddr,
    sockaddr_storage,
    socket,
    socklen_t,
)
from godwit.dataplane.to_guest cimport (
    IPV4_HLEN,
    IPV6_HLEN,
    MAX_HEADERS,
    put_checksum,
    put_headers,
    rx_finish,
    rx_reserve,
    rx_view,
)
from godwit.dataplane.virtqueue cimport MAX_CHAIN

cdef enum:
    UDP_HLEN = 8
    ICMP_HLEN = 8
    UDP_TIMEOUT = 180000    # ms; RFC 4787, 4.3: at least two minutes
    PING_TIMEOUT = 60000    # RFC 5508, 3.2
    READ_BATCH = 64
    FIRST_PICK = 2048       # bytes of buffer picked before a datagram's size is known
    ICMP_ECHO = 8
    ICMP_ECHO_REPLY = 0
    ICMPV6_ECHO = 128
    ICMPV6_ECHO_REPLY = 129


cdef Flow *find_or_open(Plane *p, Packet *k, FlowKind kind, uint16_t guest_port, uint16_t our_port) noexcept nogil:
    """The flow of a datagram from the guest, its socket connected; NULL: none to be had."""
    cdef Flow *f = flow_find(p, kind, k.saddr, guest_port, k.daddr, our_port)
    cdef uint8_t host[16]
    cdef sockaddr_storage addr
    cdef socklen_t n
    cdef int protocol = IPPROTO_UDP
    if f != NULL:
        return f
    if not to_host(p, k.daddr, our_port, host):
        drop(p, DROP_UNREACHABLE)
        return NULL
    f = flow_new(p, kind, k.saddr, guest_port, k.daddr, our_port)
    if f == NULL:
        drop(p, DROP_TABLE_FULL)
        return NULL
    f.flags = FF_FROM_GUEST | (FF_V6 if k.v6 else 0)
    memcpy(f.remote_addr, host, 16)
    f.remote_port = our_port
    if kind == FLOW_PING:
        protocol = IPPROTO_ICMP if is_v4(host) else IPPROTO_ICMPV6
    f.sock = socket(AF_INET if is_v4(host) else AF_INET6, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, protocol)
    n = put_sockaddr(p, &addr, host, our_port)
    if f.sock < 0 or connect(f.sock, <sockaddr *>&addr, n) != 0 or flow_watch(p, f) != 0:
        drop(p, DROP_NO_SOCKET)
        flow_close(p, f)
        return NULL
    return f


cdef void send_to_host(Plane *p, Flow *f, iovec *iov, int count) noexcept nogil:
    cdef msghdr msg
    cdef ssize_t n
    memset(&msg, 0, sizeof(msg))
    msg.msg_iov = iov
    msg.msg_iovlen = count
    n = sendmsg(f.sock, &msg, MSG_DONTWAIT | MSG_NOSIGNAL)
    if n < 0 and errno != EAGAIN:
        # The error may be an earlier datagram's (an ICMP message): once more.
        n = sendmsg(f.sock, &msg, MSG_DONTWAIT | MSG_NOSIGNAL)
    if n < 0:
        drop(p, DROP_SEND)
    f.last_active = p.now
    flow_deadline(p, f, p.now + (UDP_TIMEOUT if f.kind == FLOW_UDP else PING_TIMEOUT))


cdef void udp_from_guest(Plane *p, Packet *k) noexcept nogil:
    cdef const uint8_t *u = k.header + k.l4
    cdef uint16_t size
    cdef Flow *f
    cdef int n
    if k.l4_size < UDP_HLEN:
        drop(p, DROP_SHORT)
        return
    size = be16(u + 4)
    if size < UDP_HLEN or size > k.l4_size:
        drop(p, DROP_MALFORMED)
        return
    k.payload = k.l4 + UDP_HLEN
    k.payload_size = size - UDP_HLEN
    f = find_or_open(p, k, FLOW_UDP, be16(u), be16(u + 2))
    if f == NULL:
        return
    # p.rx.view is free while a frame from the guest is worked on.
    n = packet_payload(k, 0, k.payload_size, p.rx.view, MAX_CHAIN)
    if n < 0:
        drop(p, DROP_MALFORMED)
        return
    send_to_host(p, f, p.rx.view, n)


cdef void ping_from_guest(Plane *p, Packet *k) noexcept nogil:
    cdef const uint8_t *u = k.header + k.l4
    cdef Flow *f
    cdef int n
    if k.l4_size < ICMP_HLEN:
        drop(p, DROP_SHORT)
        return
    k.payload = k.l4 + ICMP_HLEN
    k.payload_size = k.l4_size - ICMP_HLEN
    f = find_or_open(p, k, FLOW_PING, be16(u + 4), 0)
    if f == NULL:
        return
    # The kernel puts its own identifier and checksum into the header.
    p.rx.view[0].iov_base = <void *>u
    p.rx.view[0].iov_len = ICMP_HLEN
    n = packet_payload(k, 0, k.payload_size, p.rx.view + 1, MAX_CHAIN - 1)
    if n < 0:
        drop(p, DROP_MALFORMED)
        return
    send_to_host(p, f, p.rx.view, n + 1)


cdef int pick(Plane *p, Flow *f, uint32_t head) noexcept nogil:
    """Pick buffers for a datagram whose size is not known yet.

    How many bytes of it they take after `head`; -1: wait for more buffers.
    """
    cdef uint32_t capacity = rx_reserve(p, head + FIRST_PICK)
    cdef ssize_t n
    if capacity < head:
        return -1
    if capacity < head + FIRST_PICK and p.mergeable:
        # The ring runs short. What is not too large for a ring that is full
        # stays in the socket until there is room. (Without mergeable buffers
        # there is never more than the one.)
        n = recv(f.sock, p.scratch, sizeof(p.scratch), MSG_PEEK | MSG_DONTWAIT)
        if n > capacity - head and n <= FIRST_PICK:
            return -1
    return <int>(capacity - head)


cdef void copy_out(Plane *p, uint32_t at, const uint8_t *data, uint32_t size) noexcept nogil:
    """Copy into p.rx.view from byte `at` on."""
    cdef int i = 0
    cdef size_t part
    while size:
        part = p.rx.view[i].iov_len
        if at >= part:
            at -= <uint32_t>part
        else:
            part -= at
            if part > size:
                part = size
            memcpy(<uint8_t *>p.rx.view[i].iov_base + at, data, part)
            data += part
            size -= <uint32_t>part
            at = 0
        i += 1


cdef void copy_in(Plane *p, uint8_t *data, uint32_t size) noexcept nogil:
    """Copy the first bytes of p.rx.view, which has as many."""
    cdef int i = 0
    cdef uint32_t part
    while size:
        part = size if size < p.rx.view[i].iov_len else <uint32_t>p.rx.view[i].iov_len
        memcpy(data, p.rx.view[i].iov_base, part)
        data += part
        size -= part
        i += 1


cdef void datagram_from_sock(Plane *p, Flow *f) noexcept nogil:
    cdef uint8_t h[MAX_HEADERS]
    cdef bint v6 = f.flags & FF_V6 != 0
    cdef uint32_t ip = p.vnet_size + ETH_HLEN + (IPV6_HLEN if v6 else IPV4_HLEN)
    cdef uint32_t head, l4, size, most, first
    cdef int picked
    cdef ssize_t n
    cdef msghdr msg
    cdef int count, i
    for i in range(READ_BATCH):
        # An ICMP message comes with its header, a UDP datagram without.
        head = ip + (UDP_HLEN if f.kind == FLOW_UDP else 0)
        picked = pick(p, f, head)
        if picked < 0:
            flow_wait_ring(p, f)
            return
        first = <uint32_t>picked
        count = rx_view(p, head, first)
        if count == MAX_CHAIN:      # the kernel takes no more, and one is still to come
            count -= 1
            first -= <uint32_t>p.rx.view[count].iov_len
        p.rx.view[count].iov_base = p.scratch
        p.rx.view[count].iov_len = sizeof(p.scratch)
        memset(&msg, 0, sizeof(msg))
        msg.msg_iov = p.rx.view
        msg.msg_iovlen = count + 1
        n = recvmsg(f.sock, &msg, MSG_DONTWAIT)
        if n < 0:
            if errno == EAGAIN:
                return
            continue        # an earlier datagram's error, or a signal
        size = <uint32_t>n
        f.last_active = p.now
        flow_deadline(p, f, p.now + (UDP_TIMEOUT if f.kind == FLOW_UDP else PING_TIMEOUT))
        # IPv4 counts its own header (RFC 791, 3.1), IPv6 what follows it (RFC 8200, 3).
        most = 65535 - (head - (ip if v6 else p.vnet_size + ETH_HLEN))
        if size > most:
            drop(p, DROP_MALFORMED)
            continue
        if size > first:
            # The first part lies in the buffers already: the same are picked again.
            if rx_reserve(p, head + size) < head + size:
                drop(p, DROP_RING_FULL)
                continue
            rx_view(p, head, size)
            copy_out(p, first, p.scratch, size - first)
        else:
            rx_view(p, head, size)
        if f.kind == FLOW_UDP:
            l4 = put_headers(p, h, v6, f.our_addr, f.guest_addr, IPPROTO_UDP, UDP_HLEN + size)
            put16(h + l4, f.our_port)
            put16(h + l4 + 2, f.guest_port)
            put16(h + l4 + 4, <uint16_t>(UDP_HLEN + size))
            put_checksum(p, h, l4, 6, head, size, v6, f.our_addr, f.guest_addr, IPPROTO_UDP)
            rx_finish(p, h, head, head + size)
        else:
            echo_to_guest(p, f, h, head, size)
    # More may wait: the edge is gone, so come again, whether or not the guest
    # adds buffers meanwhile.
    flow_wait_ring(p, f)
    p.again = True


cdef void echo_to_guest(Plane *p, Flow *f, uint8_t *h, uint32_t head, uint32_t size) noexcept nogil:
    """An echo reply in p.rx.view: put the guest's identifier back."""
    cdef bint v6 = f.flags & FF_V6 != 0
    cdef uint8_t icmp[ICMP_HLEN]
    cdef uint64_t s = 0
    cdef uint16_t value
    cdef uint8_t proto = IPPROTO_ICMPV6 if v6 else IPPROTO_ICMP
    cdef uint32_t l4
    if size < ICMP_HLEN:
        drop(p, DROP_MALFORMED)
        return
    copy_in(p, icmp, ICMP_HLEN)
    if icmp[0] != (ICMPV6_ECHO_REPLY if v6 else ICMP_ECHO_REPLY):
        return
    put16(icmp + 4, f.guest_port)
    memset(icmp + 2, 0, 2)
    l4 = put_headers(p, h, v6, f.our_addr, f.guest_addr, proto, size)
    memcpy(h + l4, icmp, ICMP_HLEN)
    rx_view(p, head + ICMP_HLEN, size - ICMP_HLEN)
    if v6:
        put_checksum(p, h, l4, 2, head + ICMP_HLEN, size - ICMP_HLEN, v6, f.our_addr, f.guest_addr, proto)
    else:
        s = sum_bytes(icmp, ICMP_HLEN, 0)
        s += sum_iov(p.rx.view, MAX_CHAIN, 0, size - ICMP_HLEN, 0)
        value = ~fold(s)
        memcpy(h + l4 + 2, &value, 2)
    rx_finish(p, h, head + ICMP_HLEN, head + size)


cdef void datagram_timer(Plane *p, Flow *f) noexcept nogil:
    flow_close(p, f)
