# SPDX-License-Identifier: GPL-2.0-or-later
"""ICMP and ICMPv6: echo through ping sockets, and errors either way.

An unprivileged process neither sees ICMP messages nor sends them. But what
came back for a datagram of a socket's the kernel keeps in the socket's error
queue (ip(7), IP_RECVERR): who complained, about what, and the start of the
datagram. The guest gets the message as it would have got it, with its own
names in it. So `traceroute` shows the routers, a closed port is refused, and
the path MTU is found.

The other way, the guest says that a port of its own is closed. Where the
socket is the guest's alone it is closed, and the kernel answers what still
comes with the same message. For a forwarded port it cannot be passed on: as
long as the socket is there, the kernel answers nothing.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from godwit.dataplane.checksum cimport fold, sum_bytes
from godwit.dataplane.datagram cimport DELIVERED, RING_SHORT, Datagram, datagram_to_guest
from godwit.dataplane.flow cimport (
    age_in,
    flow_close,
    flow_find,
    flow_new,
    flow_used,
    flow_wait_ring,
    flow_watch,
)
from godwit.dataplane.host cimport (
    bind_outbound,
    get_sockaddr,
    is_loopback,
    is_unspecified,
    is_v4,
    map_v4,
    put_sockaddr,
    to_guest_name,
    to_host,
)
from godwit.dataplane.packet cimport Packet, packet_payload
from godwit.dataplane.plane cimport (
    DROP_MALFORMED,
    DROP_NO_FLOW,
    DROP_NO_SOCKET,
    DROP_SEND,
    DROP_SHORT,
    DROP_TABLE_FULL,
    DROP_UNREACHABLE,
    FF_ANSWERED,
    FF_DONT_FRAGMENT,
    FF_FROM_GUEST,
    FF_HEARD,
    FF_V6,
    FLOW_PING,
    FLOW_TCP,
    FLOW_UDP,
    Flow,
    Plane,
    count_from_guest,
    count_to_guest,
    drop,
)
from godwit.dataplane.shortage cimport shortage
from godwit.dataplane.sys cimport (
    AF_INET,
    AF_INET6,
    CMSG_DATA,
    CMSG_FIRSTHDR,
    CMSG_NXTHDR,
    EACCES,
    EAGAIN,
    EHOSTUNREACH,
    EINTR,
    EMSGSIZE,
    EPERM,
    IPPROTO_ICMP,
    IPPROTO_ICMPV6,
    IPPROTO_IP,
    IPPROTO_IPV6,
    IPPROTO_TCP,
    IPPROTO_UDP,
    IPV6_MTU_DISCOVER,
    IPV6_PMTUDISC_DO,
    IPV6_PMTUDISC_WANT,
    IPV6_RECVERR,
    IPV6_UNICAST_HOPS,
    IP_MTU_DISCOVER,
    IP_PMTUDISC_DO,
    IP_PMTUDISC_DONT,
    IP_RECVERR,
    IP_TTL,
    MSG_DONTWAIT,
    MSG_ERRQUEUE,
    MSG_NOSIGNAL,
    MSG_PEEK,
    MSG_TRUNC,
    SOCK_CLOEXEC,
    SOCK_DGRAM,
    SOCK_NONBLOCK,
    SO_EE_OFFENDER,
    SO_EE_ORIGIN_ICMP,
    SO_EE_ORIGIN_ICMP6,
    SO_EE_ORIGIN_LOCAL,
    be16,
    cmsghdr,
    connect,
    errno,
    iovec,
    msghdr,
    put16,
    put32,
    recv,
    recvmsg,
    sendmsg,
    set_option,
    sock_extended_err,
    sockaddr,
    sockaddr_storage,
    socket,
    socklen_t,
)
from godwit.dataplane.to_guest cimport IPV4_HLEN, IPV6_HLEN
from godwit.dataplane.udp cimport udp_flush, udp_peer, udp_room
from godwit.dataplane.virtqueue cimport MAX_CHAIN

cdef enum:
    ICMP_HLEN = 8
    ICMP_CSUM = 2
    UDP_HLEN = 8
    READ_BATCH = 64
    ERROR_BATCH = 1024      # more than an error queue holds
    # types and codes of RFC 792 and RFC 4443
    ICMP_ECHO = 8
    ICMP_ECHO_REPLY = 0
    ICMP_UNREACHABLE = 3
    ICMP_HOST = 1
    ICMP_PORT = 3
    ICMP_TOO_BIG = 4
    ICMP_PROHIBITED = 13
    ICMP_TIME_EXCEEDED = 11
    ICMP_PARAMETER = 12
    ICMPV6_UNREACHABLE = 1
    ICMPV6_NO_ROUTE = 0
    ICMPV6_PROHIBITED = 1
    ICMPV6_ADDRESS = 3
    ICMPV6_PORT = 4
    ICMPV6_TOO_BIG = 2
    ICMPV6_ECHO = 128
    ICMPV6_ECHO_REPLY = 129
    # How much of a message that caused an error goes back: RFC 1812, 4.3.2.3
    # (576 bytes in all), and RFC 4443, 2.4 (c): the smallest MTU.
    QUOTED4 = 576 - 20 - ICMP_HLEN - 20 - 8
    QUOTED6 = 1280 - 40 - ICMP_HLEN - 40 - 8
    ERROR_CONTROL = 64      # words of 8 bytes


# ---- echo

cdef Flow *ping_flow(Plane *p, Packet *k, uint16_t ident) noexcept nogil:
    """The flow of an echo request, its socket connected; NULL: none to be had."""
    cdef Flow *f = flow_find(p, FLOW_PING, k.saddr, ident, k.daddr, 0)
    cdef int reason
    if f != NULL:
        return f
    reason = udp_room(p, False)
    if reason == 0:
        reason = udp_room(p, True)
    if reason:
        drop(p, reason - 1)
        return NULL
    return ping_open(p, k.saddr, ident, k.daddr, 0)


cdef Flow *ping_open(Plane *p, const uint8_t *guest, uint16_t ident, const uint8_t *our,
                     uint16_t host_ident) noexcept nogil:
    cdef uint8_t host[16]
    cdef sockaddr_storage addr
    cdef socklen_t n
    cdef bint v4
    cdef Flow *f
    if not to_host(p, our, 0, host):
        drop(p, DROP_UNREACHABLE)
        return NULL
    f = flow_new(p, FLOW_PING, guest, ident, our, 0)
    if f == NULL:
        drop(p, DROP_TABLE_FULL)
        return NULL
    v4 = is_v4(host)
    f.flags = FF_FROM_GUEST | (0 if is_v4(guest) else FF_V6)
    memcpy(f.remote_addr, host, 16)
    f.sock = socket(AF_INET if v4 else AF_INET6, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC,
                    IPPROTO_ICMP if v4 else IPPROTO_ICMPV6)
    n = put_sockaddr(p, <sockaddr *>&addr, host, 0)
    if f.sock >= 0:
        if v4:
            set_option(f.sock, IPPROTO_IP, IP_RECVERR, 1)
            set_option(f.sock, IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DONT)   # as mark() has it without DF
        else:
            set_option(f.sock, IPPROTO_IPV6, IPV6_RECVERR, 1)
    if (f.sock < 0 or (not is_loopback(host) and bind_outbound(p, f.sock, v4, host_ident) != 0)
            or connect(f.sock, <sockaddr *>&addr, n) != 0 or flow_watch(p, f) != 0):
        shortage(p, errno)
        drop(p, DROP_NO_SOCKET)
        flow_close(p, f)
        return NULL
    f.flags |= FF_ANSWERED
    age_in(p, f)
    return f


cdef void mark(Flow *f, Packet *k) noexcept nogil:
    """The socket's hop limit and fragmentation as the guest's request has them."""
    cdef bint v4 = is_v4(f.remote_addr)
    if f.ttl != k.ttl:
        f.ttl = k.ttl
        if v4:
            set_option(f.sock, IPPROTO_IP, IP_TTL, k.ttl)
        else:
            set_option(f.sock, IPPROTO_IPV6, IPV6_UNICAST_HOPS, k.ttl)
    if (f.flags & FF_DONT_FRAGMENT != 0) != k.dont_fragment:
        f.flags ^= FF_DONT_FRAGMENT
        if v4:
            set_option(f.sock, IPPROTO_IP, IP_MTU_DISCOVER,
                       IP_PMTUDISC_DO if k.dont_fragment else IP_PMTUDISC_DONT)
        else:
            set_option(f.sock, IPPROTO_IPV6, IPV6_MTU_DISCOVER,
                       IPV6_PMTUDISC_DO if k.dont_fragment else IPV6_PMTUDISC_WANT)


cdef void ping_from_guest(Plane *p, Packet *k) noexcept nogil:
    cdef Flow *f
    cdef msghdr msg
    cdef ssize_t n
    cdef int count
    if k.l4_size < ICMP_HLEN:
        drop(p, DROP_SHORT)
        return
    f = ping_flow(p, k, be16(k.header + k.l4 + 4))
    if f == NULL:
        return
    mark(f, k)
    f.ping_seq = be16(k.header + k.l4 + 6)
    # The kernel puts its own identifier and checksum into the header.
    k.payload = k.l4 + ICMP_HLEN
    k.payload_size = k.l4_size - ICMP_HLEN
    # p.rx.view is free while a frame from the guest is worked on.
    p.rx.view[0].iov_base = k.header + k.l4
    p.rx.view[0].iov_len = ICMP_HLEN
    count = packet_payload(k, 0, k.payload_size, p.rx.view + 1, MAX_CHAIN - 1)
    if count < 0:
        drop(p, DROP_MALFORMED)
        return
    memset(&msg, 0, sizeof(msg))
    msg.msg_iov = p.rx.view
    msg.msg_iovlen = count + 1
    n = sendmsg(f.sock, &msg, MSG_DONTWAIT | MSG_NOSIGNAL)
    if n < 0 and errno != EAGAIN and errno != EMSGSIZE:
        # The error may be an earlier request's: once more.
        n = sendmsg(f.sock, &msg, MSG_DONTWAIT | MSG_NOSIGNAL)
    if n < 0:
        drop(p, DROP_SEND)
    else:
        count_from_guest(&p.counters.ping, f, 1, k.payload_size)
    f.last_active = p.now
    flow_used(p, f, PING_TIMEOUT)


cdef void ping_from_sock(Plane *p, Flow *f) noexcept nogil:
    cdef Datagram d
    cdef ssize_t n
    cdef int i, result
    for i in range(READ_BATCH):
        # It stays in the queue until the guest has room.
        n = recv(f.sock, p.scratch, sizeof(p.scratch), MSG_PEEK | MSG_DONTWAIT)
        if n < 0:
            if errno == EAGAIN:
                return
            continue        # an earlier request's error, or a signal
        if n >= ICMP_HLEN and p.scratch[0] == (ICMPV6_ECHO_REPLY if f.flags & FF_V6 else ICMP_ECHO_REPLY):
            memset(&d, 0, sizeof(d))
            d.v6 = f.flags & FF_V6 != 0
            d.proto = IPPROTO_ICMPV6 if d.v6 else IPPROTO_ICMP
            d.field = ICMP_CSUM
            d.saddr = f.our_addr
            d.daddr = f.guest_addr
            memcpy(d.header, p.scratch, ICMP_HLEN)
            put16(d.header + 4, f.guest_port)   # the guest's own identifier
            d.payload = p.scratch + ICMP_HLEN
            d.size = <uint32_t>(n - ICMP_HLEN)
            d.done = f.reply_done
            d.ident = f.reply_ident
            result = datagram_to_guest(p, &d)
            if result == RING_SHORT:
                f.reply_done = d.done
                f.reply_ident = d.ident
                flow_wait_ring(p, f)
                return
            if result == DELIVERED:
                count_to_guest(&p.counters.ping, f, 1, <uint64_t>(n - ICMP_HLEN))
            f.reply_done = 0
            f.last_active = p.now
            f.flags |= FF_HEARD
            flow_used(p, f, PING_TIMEOUT)
        recv(f.sock, p.scratch, 0, MSG_TRUNC | MSG_DONTWAIT)
    flow_wait_ring(p, f)
    p.again = True


# ---- errors for the guest

cdef void router(Plane *p, Flow *f, uint8_t *addr) noexcept nogil:
    """The router, as the guest knows it: what we have to say ourselves comes from there."""
    memcpy(addr, &p.config.our_ll[0] if f.flags & FF_V6 else &p.config.our4[0], 16)


cdef void error_to_guest(Plane *p, Flow *f, const uint8_t *source, uint8_t kind, uint8_t code, uint32_t info,
                         const uint8_t *quoted, uint32_t size) noexcept nogil:
    """Tell the guest of an error about a datagram of its own, of which `quoted` is the payload, or about its SYN."""
    cdef uint8_t message[1280]
    cdef bint v6 = f.flags & FF_V6 != 0
    cdef uint32_t most = QUOTED6 if v6 else QUOTED4
    cdef uint32_t head = IPV6_HLEN if v6 else IPV4_HLEN
    cdef uint8_t proto = IPPROTO_UDP
    cdef Datagram d
    cdef uint16_t value
    if size > most:
        size = most
    if f.kind == FLOW_PING:
        proto = IPPROTO_ICMPV6 if v6 else IPPROTO_ICMP
    elif f.kind == FLOW_TCP:
        proto = IPPROTO_TCP
        size = 0
    memset(message, 0, head + UDP_HLEN)
    if v6:
        message[0] = 0x60
        put16(message + 4, <uint16_t>(UDP_HLEN + size))
        message[6] = proto
        message[7] = 1
        memcpy(message + 8, f.guest_addr, 16)
        memcpy(message + 24, f.our_addr, 16)
    else:
        message[0] = 0x45
        put16(message + 2, <uint16_t>(IPV4_HLEN + UDP_HLEN + size))
        message[6] = 0x40
        message[8] = 1
        message[9] = proto
        memcpy(message + 12, f.guest_addr + 12, 4)
        memcpy(message + 16, f.our_addr + 12, 4)
        value = ~fold(sum_bytes(message, IPV4_HLEN, 0))
        memcpy(message + 10, &value, 2)
    if f.kind == FLOW_PING:
        # What the kernel quotes begins with the request's own header; of its own errors it quotes nothing.
        if size >= ICMP_HLEN:
            memcpy(message + head, quoted, size)
            size -= ICMP_HLEN
        else:
            message[head] = ICMPV6_ECHO if v6 else ICMP_ECHO
            put16(message + head + 6, f.ping_seq)
            size = 0
        put16(message + head + 4, f.guest_port)
    elif f.kind == FLOW_TCP:
        # Eight bytes, the least that there may be (RFC 1812, 4.3.2.3): the sequence number tells whose it is.
        put16(message + head, f.guest_port)
        put16(message + head + 2, f.our_port)
        put32(message + head + 4, f.seq_init_from_guest - 1)
    else:
        put16(message + head, f.guest_port)
        put16(message + head + 2, f.our_port)
        put16(message + head + 4, <uint16_t>(UDP_HLEN + size))
        memcpy(message + head + UDP_HLEN, quoted, size)
    memset(&d, 0, sizeof(d))
    d.v6 = v6
    d.proto = IPPROTO_ICMPV6 if v6 else IPPROTO_ICMP
    d.field = ICMP_CSUM
    d.saddr = source
    d.daddr = f.guest_addr
    d.header[0] = kind
    d.header[1] = code
    put32(d.header + 4, info)
    d.payload = message
    d.size = head + UDP_HLEN + size
    datagram_to_guest(p, &d)    # where there is no room, it is lost as such messages may be


cdef void unreachable_to_guest(Plane *p, Flow *f, int why, const iovec *iov, int count) noexcept nogil:
    cdef uint8_t quoted[QUOTED6]
    cdef uint8_t source[16]
    cdef uint32_t size = 0, part
    cdef int i
    cdef bint v6 = f.flags & FF_V6 != 0
    if f.kind != FLOW_UDP and f.kind != FLOW_TCP:
        return
    for i in range(count):
        part = <uint32_t>iov[i].iov_len if iov[i].iov_len < QUOTED6 - size else QUOTED6 - size
        memcpy(quoted + size, iov[i].iov_base, part)
        size += part
    router(p, f, source)
    if why == EACCES or why == EPERM:
        error_to_guest(p, f, source, ICMPV6_UNREACHABLE if v6 else ICMP_UNREACHABLE,
                       ICMPV6_PROHIBITED if v6 else ICMP_PROHIBITED, 0, quoted, size)
    elif v6:
        error_to_guest(p, f, source, ICMPV6_UNREACHABLE,
                       ICMPV6_ADDRESS if why == EHOSTUNREACH else ICMPV6_NO_ROUTE, 0, quoted, size)
    else:
        error_to_guest(p, f, source, ICMP_UNREACHABLE, ICMP_HOST if why == EHOSTUNREACH else 0, 0, quoted, size)


cdef void pass_on(Plane *p, Flow *f, sock_extended_err *e, const uint8_t *quoted, uint32_t size) noexcept nogil:
    """One entry of an error queue, about a datagram of the flow's."""
    cdef bint v6 = f.flags & FF_V6 != 0
    cdef sockaddr *offender = SO_EE_OFFENDER(e)
    cdef uint8_t host[16]
    cdef uint8_t source[16]
    cdef uint16_t ignored
    cdef uint8_t kind = e.ee_type, code = e.ee_code
    cdef uint32_t info = 0
    router(p, f, source)
    if e.ee_origin == SO_EE_ORIGIN_ICMP or e.ee_origin == SO_EE_ORIGIN_ICMP6:
        if (e.ee_origin == SO_EE_ORIGIN_ICMP6) != v6:
            return
        if v6 and not 1 <= kind <= 4:
            return
        if not v6 and kind != ICMP_UNREACHABLE and kind != ICMP_TIME_EXCEEDED and kind != ICMP_PARAMETER:
            return
        if offender.sa_family == AF_INET or offender.sa_family == AF_INET6:
            get_sockaddr(offender, host, &ignored)
            if is_v4(host) != v6 and not is_unspecified(host):
                to_guest_name(p, host, 0, source)
    elif e.ee_origin == SO_EE_ORIGIN_LOCAL and e.ee_errno == EMSGSIZE:
        kind = ICMPV6_TOO_BIG if v6 else ICMP_UNREACHABLE
        code = 0 if v6 else ICMP_TOO_BIG
    elif e.ee_origin == SO_EE_ORIGIN_LOCAL and e.ee_errno == EHOSTUNREACH:
        kind = ICMPV6_UNREACHABLE if v6 else ICMP_UNREACHABLE
        code = ICMPV6_ADDRESS if v6 else ICMP_HOST
    else:
        return
    if kind == ICMPV6_TOO_BIG if v6 else (kind == ICMP_UNREACHABLE and code == ICMP_TOO_BIG):
        info = e.ee_info & 0xFFFFFFFFU if v6 else e.ee_info & 0xFFFFU
    error_to_guest(p, f, source, kind, code, info, quoted, size)


cdef bint errors_from_sock(Plane *p, Flow *f, Flow *sending) noexcept nogil:
    cdef uint8_t quoted[QUOTED6 + ICMP_HLEN]
    cdef uint64_t room[ERROR_CONTROL]   # aligned as control messages have to be
    cdef sockaddr_storage name
    cdef uint8_t remote[16]
    cdef uint16_t port
    cdef msghdr msg
    cdef iovec iov
    cdef cmsghdr *c
    cdef sock_extended_err *e
    cdef Flow *about
    cdef ssize_t n
    cdef int i
    cdef bint too_big = False
    for i in range(ERROR_BATCH):
        memset(&msg, 0, sizeof(msg))
        iov.iov_base = quoted
        iov.iov_len = sizeof(quoted)
        msg.msg_name = &name
        msg.msg_namelen = sizeof(name)
        msg.msg_iov = &iov
        msg.msg_iovlen = 1
        msg.msg_control = room
        msg.msg_controllen = sizeof(room)
        n = recvmsg(f.sock, &msg, MSG_ERRQUEUE | MSG_DONTWAIT)
        if n < 0:
            if errno == EINTR:
                continue
            break
        e = NULL
        c = CMSG_FIRSTHDR(&msg)
        while c != NULL:
            if ((c.cmsg_level == IPPROTO_IP and c.cmsg_type == IP_RECVERR)
                    or (c.cmsg_level == IPPROTO_IPV6 and c.cmsg_type == IPV6_RECVERR)):
                e = <sock_extended_err *>CMSG_DATA(c)
            c = CMSG_NXTHDR(&msg, c)
        if e == NULL:
            continue
        if e.ee_origin == SO_EE_ORIGIN_LOCAL and e.ee_errno == EMSGSIZE:
            too_big = True
        about = f
        if f.kind != FLOW_PING:
            if msg.msg_namelen == 0:
                continue
            get_sockaddr(<sockaddr *>&name, remote, &port)
            about = udp_peer(p, f, remote, port)
            if port == 0 and sending != NULL and memcmp(remote, sending.remote_addr, 16) == 0:
                about = sending     # IPv4's own errors do not say the port where the socket is not connected
        if about != NULL:
            pass_on(p, about, e, quoted, <uint32_t>n)
    return too_big


# ---- errors from the guest

cdef void error_from_guest(Plane *p, Packet *k) noexcept nogil:
    cdef const uint8_t *inner = k.header + k.l4 + ICMP_HLEN
    cdef uint32_t size = k.l4_size - ICMP_HLEN, head
    cdef uint8_t our[16]
    cdef uint8_t code = k.header[k.l4 + 1]
    cdef Flow *f
    if k.header[k.l4] != (ICMPV6_UNREACHABLE if k.v6 else ICMP_UNREACHABLE):
        return
    if code != (ICMPV6_PORT if k.v6 else ICMP_PORT):
        return
    head = IPV6_HLEN if k.v6 else IPV4_HLEN
    # As much as is looked at must be in the copied header; ours has no options.
    if size < head + UDP_HLEN or k.l4 + ICMP_HLEN + head + UDP_HLEN > sizeof(k.header):
        drop(p, DROP_SHORT)
        return
    if k.v6:
        if inner[0] >> 4 != 6 or inner[6] != IPPROTO_UDP or memcmp(inner + 24, k.saddr, 16) != 0:
            return
        memcpy(our, inner + 8, 16)
    else:
        if inner[0] != 0x45 or inner[9] != IPPROTO_UDP or memcmp(inner + 16, k.saddr + 12, 4) != 0:
            return
        map_v4(our, inner + 12)
    f = flow_find(p, FLOW_UDP, k.saddr, be16(inner + head + 2), our, be16(inner + head))
    if f == NULL:
        drop(p, DROP_NO_FLOW)
        return
    # What waits for the host refers to flows by their place in the table, and is still to go.
    udp_flush(p)
    flow_close(p, f)    # and the socket with its last peer
