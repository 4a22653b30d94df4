# SPDX-License-Identifier: GPL-2.0-or-later
"""UDP from the guest, and the ports that both directions share.

Theory of operation. Each port that the guest sends from is one socket on the
host, whoever it sends to: so all peers see the same source port, which is what
programs that make peers of each other count on (RFC 4787, 4.1: endpoint-
independent mapping). A forwarded port is such a socket too, only that it is
there before the guest. Both are a Flow of the kind FLOW_UDP_PORT: it has the
socket, its events and its place in the queue for receive buffers.

Who the guest talks to through a port is a FLOW_UDP, without a socket: how the
guest names the peer, how the host does, and until when it is remembered. What
comes from anyone else is dropped (RFC 4787, 5: address and port-dependent
filtering), but for forwarded ports and for those that the guest has sent a
multicast or a broadcast from, to which any address may answer. The last flow
of a port that is not forwarded closes it.

Datagrams are collected while a batch of frames is worked on, and leave in one
sendmmsg per port. Those of one size to one peer are joined to a single
message, which the kernel, or the network card, cuts up again (UDP_SEGMENT):
on the wire they are what the guest sent.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from godwit.dataplane.flow cimport (
    age_in,
    age_out,
    flow_close,
    flow_find,
    flow_index,
    flow_new,
    flow_new_beyond,
    flow_used,
    flow_watch,
    flows_for_others,
    peer_find,
    peer_in,
    peer_out,
)
from godwit.dataplane.host cimport (
    bind_outbound,
    get_sockaddr,
    is_link_local6,
    is_loopback,
    is_unspecified,
    is_v4,
    map_v4,
    put_sockaddr,
    put_sockaddr6,
    to_host,
)
from godwit.dataplane.icmp cimport PING_TIMEOUT, errors_from_sock, unreachable_to_guest
from godwit.dataplane.packet cimport Packet, packet_payload
from godwit.dataplane.plane cimport (
    DROP_LIMIT_UDP,
    DROP_MALFORMED,
    DROP_NO_SOCKET,
    DROP_SEND,
    DROP_SHORT,
    DROP_TABLE_FULL,
    DROP_UNREACHABLE,
    FF_ANSWERED,
    FF_ANY_PEER,
    FF_DONT_FRAGMENT,
    FF_FORWARD,
    FF_FROM_GUEST,
    FF_NO_GSO,
    FF_SHARED,
    FF_TAKES_V4,
    FF_V6,
    FLOW_PING,
    FLOW_UDP,
    FLOW_UDP_PORT,
    NONE,
    ONE_WAY,
    TWO_WAY,
    UDP_OUT,
    Flow,
    Plane,
    UdpOut,
    count_from_guest,
    drop,
    drop_all,
)
from godwit.dataplane.shortage cimport shortage
from godwit.dataplane.sys cimport (
    AF_INET,
    AF_INET6,
    CMSG_DATA,
    CMSG_LEN,
    CMSG_SPACE,
    EADDRNOTAVAIL,
    EAGAIN,
    EINTR,
    EINVAL,
    EIO,
    EMSGSIZE,
    ENETUNREACH,
    ENFILE,
    ENOBUFS,
    ENOMEM,
    IPPROTO_IP,
    IPPROTO_IPV6,
    IPPROTO_UDP,
    IPV6_MTU_DISCOVER,
    IPV6_MULTICAST_HOPS,
    IPV6_PKTINFO,
    IPV6_PMTUDISC_DO,
    IPV6_PMTUDISC_WANT,
    IPV6_RECVERR,
    IPV6_RECVPKTINFO,
    IPV6_RECVTCLASS,
    IPV6_TCLASS,
    IPV6_UNICAST_HOPS,
    IPV6_V6ONLY,
    IP_MTU_DISCOVER,
    IP_MULTICAST_TTL,
    IP_PKTINFO,
    IP_PMTUDISC_DO,
    IP_PMTUDISC_DONT,
    IP_RECVERR,
    IP_RECVTOS,
    IP_TOS,
    IP_TTL,
    MSG_DONTWAIT,
    MSG_NOSIGNAL,
    SOCK_CLOEXEC,
    SOCK_DGRAM,
    SOCK_NONBLOCK,
    SOL_SOCKET,
    SO_BINDTODEVICE,
    SO_BROADCAST,
    SO_RCVBUF,
    UDP_GRO,
    UDP_SEGMENT,
    be16,
    cmsghdr,
    errno,
    getsockname,
    getsockopt,
    in6_pktinfo,
    in_pktinfo,
    iovec,
    msghdr,
    sendmmsg,
    sendmsg,
    set_option,
    sockaddr,
    sockaddr_storage,
    socket,
    socklen_t,
)
from godwit.dataplane.virtqueue cimport MAX_CHAIN

cdef enum:
    UDP_HLEN = 8
    DNS = 53
    # ms. RFC 4787, 4.3: at least two minutes; for a service of a well-known
    # port it may be less, and a resolver asks from a new port each time.
    TIMEOUT = 180000
    TIMEOUT_DNS = 20000
    TIMEOUT_UNANSWERED = 30000  # opened from outside, and the guest has said nothing
    IDLE = 30000                # of an exchange that makes room for another
    LOOK = 64                   # flows that are looked at for that
    MAX_SEGMENTS = 64           # of one message, in every kernel that can do it (UDP_MAX_SEGMENTS)
    MOST_SEGMENTS = 512         # of a frame of the guest's
    MAX_JOINED = 64000          # bytes of one message
    RECEIVE_BUFFER = 16 << 20   # bytes; as much of it as the system allows (net.core.rmem_max)

cdef uint8_t NOBODY[16]   # zeros


# ---- ports and peers

cdef void udp_prepare(int fd, bint v6, bint v4, bint forwarded) noexcept nogil:
    # What one kernel does not know, it does without.
    set_option(fd, IPPROTO_UDP, UDP_GRO, 1)
    # A burst waits there while the guest's ring is short, or this thread is not run.
    set_option(fd, SOL_SOCKET, SO_RCVBUF, RECEIVE_BUFFER)
    if v4:
        set_option(fd, IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DONT)   # as mark() has it without DF
        set_option(fd, SOL_SOCKET, SO_BROADCAST, 1)
        set_option(fd, IPPROTO_IP, IP_RECVERR, 1)
        set_option(fd, IPPROTO_IP, IP_RECVTOS, 1)
        if forwarded and not v6:
            set_option(fd, IPPROTO_IP, IP_PKTINFO, 1)
    if v6:
        set_option(fd, IPPROTO_IPV6, IPV6_RECVERR, 1)
        set_option(fd, IPPROTO_IPV6, IPV6_RECVTCLASS, 1)
        if forwarded:
            set_option(fd, IPPROTO_IPV6, IPV6_RECVPKTINFO, 1)


cdef Flow *udp_new_forward(Plane *p, const uint8_t *guest_addr, uint16_t guest_port, int port_class) noexcept nogil:
    cdef Flow *f = flow_new_beyond(p, FLOW_UDP_PORT, guest_addr, guest_port, NOBODY, <uint16_t>port_class)
    if f != NULL:
        p.open_ports -= 1
        p.open_sockets -= 1
        p.forwards += 1
        f.flags = FF_FORWARD
    return f


cdef int udp_forward(Plane *p, int fd, const uint8_t *guest_addr, uint16_t guest_port) noexcept nogil:
    cdef sockaddr_storage addr
    cdef socklen_t n = sizeof(addr)
    cdef uint8_t bound[16]
    cdef uint16_t port
    cdef char device[16]
    cdef socklen_t device_size = sizeof(device)
    cdef int only = 1
    cdef bint v6, v4, wild
    cdef Flow *f
    if getsockname(fd, <sockaddr *>&addr, &n) != 0:
        return -errno
    get_sockaddr(<sockaddr *>&addr, bound, &port)
    v6 = addr.ss_family == AF_INET6
    n = sizeof(only)
    if v6:
        getsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &only, &n)
    v4 = not v6 or not only
    if getsockopt(fd, SOL_SOCKET, SO_BINDTODEVICE, device, &device_size) != 0:
        device_size = 0
    # What the guest itself sends from the port leaves through a socket that anyone can be reached from.
    wild = is_unspecified(bound) and device_size == 0 and memcmp(guest_addr, NOBODY, 16) == 0
    f = udp_new_forward(p, guest_addr, guest_port, PORT_FORWARDED if wild else PORT_FORWARDED_AT)
    if f == NULL:
        return -ENFILE
    f.flags |= (FF_V6 if v6 else 0) | (FF_TAKES_V4 if v4 else 0)
    f.sock = fd
    udp_prepare(fd, v6, v4, True)
    return flow_watch(p, f)


cdef uint32_t guests_share(Plane *p) noexcept nogil:
    """How many exchanges are remembered. They take no descriptor, but a place in the table: TCP shall always find one."""
    return (p.max_flows - p.forwards + 1) >> 1


cdef bint udp_remembers_others(Plane *p) noexcept nogil:
    cdef uint32_t share = (p.max_flows - p.forwards + 3) >> 2
    cdef uint32_t allowed = (min(p.most_udp, p.most_flows) + 1) >> 1
    return p.open_peers < min(share, allowed) and flows_for_others(p)


cdef Flow *open_port(Plane *p, Packet *k, uint16_t guest_port, bint v4, int port_class) noexcept nogil:
    cdef int reason = udp_room(p, True)
    cdef Flow *f = NULL
    if reason == 0:
        f = flow_new(p, FLOW_UDP_PORT, k.saddr, guest_port, NOBODY, <uint16_t>port_class)
    if f == NULL:
        drop(p, reason - 1 if reason else DROP_TABLE_FULL)
        return NULL
    f.flags = FF_FROM_GUEST | (0 if v4 else FF_V6)
    f.sock = socket(AF_INET if v4 else AF_INET6, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)
    if f.sock >= 0:
        if not v4:
            set_option(f.sock, IPPROTO_IPV6, IPV6_V6ONLY, 1)
        udp_prepare(f.sock, not v4, v4, False)
    if (f.sock < 0 or (port_class != PORT_LOOPBACK and bind_outbound(p, f.sock, v4, 0) != 0)
            or flow_watch(p, f) != 0):
        shortage(p, errno)
        drop(p, DROP_NO_SOCKET)
        flow_close(p, f)
        return NULL
    return f


cdef Flow *port_for(Plane *p, Packet *k, uint16_t guest_port, const uint8_t *host) noexcept nogil:
    """The port through which a datagram to `host` leaves; opened if need be. NULL: none to be had."""
    cdef bint v4 = is_v4(host)
    cdef int port_class = PORT_LOOPBACK if is_loopback(host) else PORT_OWN
    cdef Flow *f = flow_find(p, FLOW_UDP_PORT, NOBODY, guest_port, NOBODY, PORT_FORWARDED)
    if f != NULL and f.flags & (FF_TAKES_V4 if v4 else FF_V6):
        return f
    f = flow_find(p, FLOW_UDP_PORT, k.saddr, guest_port, NOBODY, <uint16_t>port_class)
    if f != NULL:
        return f
    if not udp_remembers_others(p):
        # Then not every stranger is remembered, and this may be the answer to one of the others: it comes from the
        # port that was asked.
        f = flow_find(p, FLOW_UDP_PORT, NOBODY, guest_port, NOBODY, PORT_FORWARDED_AT)
        if f != NULL and f.flags & (FF_TAKES_V4 if v4 else FF_V6):
            return f
    return open_port(p, k, guest_port, v4, port_class)


cdef Flow *udp_peer(Plane *p, Flow *port, const uint8_t *remote, uint16_t remote_port) noexcept nogil:
    return peer_find(p, flow_index(p, port), remote, remote_port)


cdef Flow *udp_add_peer(Plane *p, Flow *port, const uint8_t *guest_addr, const uint8_t *our_addr,
                        const uint8_t *remote, uint16_t remote_port, uint32_t flags) noexcept nogil:
    cdef Flow *f
    if p.open_peers >= guests_share(p):
        return NULL
    f = flow_new(p, FLOW_UDP, guest_addr, port.guest_port, our_addr, remote_port)
    if f == NULL:
        return NULL
    f.flags = flags | (0 if is_v4(guest_addr) else FF_V6)
    memcpy(f.remote_addr, remote, 16)
    f.remote_port = remote_port
    f.port = flow_index(p, port)
    port.peers += 1
    peer_in(p, f)
    age_in(p, f)
    return f


cdef bint udp_is_held(Plane *p, Flow *f) noexcept nogil:
    return f.flags & FF_ANSWERED != 0 and p.now - f.last_active < TIMEOUT


cdef uint64_t timeout_of(Flow *f) noexcept nogil:
    if f.kind == FLOW_PING:
        return PING_TIMEOUT
    if not f.flags & FF_ANSWERED:
        return TIMEOUT_UNANSWERED
    return TIMEOUT_DNS if f.our_port == DNS else TIMEOUT


cdef void udp_used(Plane *p, Flow *f) noexcept nogil:
    flow_used(p, f, timeout_of(f))


# ---- limits

cdef Flow *oldest(Plane *p, int age, bint with_socket) noexcept nogil:
    """The first of a list, or the first whose end frees a socket; NULL: there is none among the oldest.

    Of those that one side alone has used, such as free none go to the young end: else so many of them would be in the
    way until they end by themselves. Exchanges stay in order, which says how long they have been silent.
    """
    cdef uint32_t i = p.oldest[age]
    cdef Flow *f
    cdef Flow *port
    cdef int n
    for n in range(LOOK):
        if i == NONE:
            break
        f = &p.flows[i]
        if not with_socket or f.kind == FLOW_PING:
            return f
        port = &p.flows[f.port]
        if port.peers == 1 and not port.flags & FF_FORWARD:
            return f
        i = f.younger
        if age == ONE_WAY:
            age_out(p, f)
            age_in(p, f)
    return NULL


cdef bint is_idle(Plane *p, Flow *f) noexcept nogil:
    """Whether it was silent for a while, which is half of its time at most."""
    cdef uint64_t timeout = timeout_of(f)
    return f.deadline + min(<uint64_t>IDLE, timeout >> 1) <= p.now + timeout


cdef bint recycle(Plane *p, bint with_socket) noexcept nogil:
    """Close the UDP flow or ping that was not used for longest. False: none can be spared.

    Those first of which one side alone has ever sent, as routers do it: a guest that asks the whole world shall not
    lose what it talks to. An exchange has to have been silent for a while.
    """
    cdef Flow *f = oldest(p, ONE_WAY, with_socket)
    cdef uint32_t index
    cdef int i
    if f == NULL:
        f = oldest(p, TWO_WAY, with_socket)
        if f == NULL or not is_idle(p, f):
            return False
    index = flow_index(p, f)
    for i in range(p.udp_out.count):
        if p.udp_out.flows[i] == index:
            udp_flush(p)    # it is still to go
            break
    flow_close(p, f)
    p.counters.flows_recycled += 1
    return True


cdef int udp_room(Plane *p, bint with_socket) noexcept nogil:
    cdef uint32_t udp = p.open_flows - (p.open_sockets - p.open_ports)      # all but TCP
    cdef int reason = 0
    if with_socket:
        if p.open_ports >= p.most_ports or p.open_ports >= (p.flow_limit >> 1) + 1:
            reason = DROP_LIMIT_UDP + 1
        elif p.open_sockets >= p.flow_limit:
            reason = DROP_TABLE_FULL + 1
    elif udp >= p.most_udp or p.open_peers >= guests_share(p):
        reason = DROP_LIMIT_UDP + 1
    if reason == 0 and (p.open_flows >= p.most_flows or (p.free_head == NONE and p.used_flows >= p.max_flows)):
        reason = DROP_TABLE_FULL + 1
    return 0 if reason and recycle(p, with_socket) else reason


cdef bint to_many(Plane *p, const uint8_t *addr) noexcept nogil:
    """Whether it is a multicast or broadcast address: others than it will answer."""
    if not is_v4(addr):
        return addr[0] == 0xFF
    return addr[12] >= 224 or memcmp(addr, p.config.broadcast4, 16) == 0


cdef Flow *flow_of(Plane *p, Packet *k, uint16_t guest_port, uint16_t our_port) noexcept nogil:
    cdef Flow *f = flow_find(p, FLOW_UDP, k.saddr, guest_port, k.daddr, our_port)
    cdef Flow *port
    cdef uint8_t host[16]
    cdef int reason
    if f != NULL:
        return f
    if not to_host(p, k.daddr, our_port, host):
        drop(p, DROP_UNREACHABLE)
        return NULL
    # Before the port is looked for: with its last peer it would be closed.
    reason = udp_room(p, False)
    if reason:
        drop(p, reason - 1)
        return NULL
    port = port_for(p, k, guest_port, host)
    if port == NULL:
        return NULL
    f = udp_add_peer(p, port, k.saddr, k.daddr, host, our_port, FF_FROM_GUEST)
    if f == NULL:
        drop(p, DROP_TABLE_FULL)
        if port.peers == 0 and not port.flags & FF_FORWARD:
            flow_close(p, port)
        return NULL
    f.scope = p.config.ifindex if is_link_local6(host) else 0
    if port.flags & FF_FORWARD:
        memcpy(f.local_addr, &p.config.outbound4[0] if is_v4(host) else &p.config.outbound6[0], 16)
        if is_loopback(host):
            memset(f.local_addr, 0, 16)
    if to_many(p, host) and not port.flags & FF_ANY_PEER:
        port.flags |= FF_ANY_PEER
    return f


# ---- messages for the host

cdef void mark(Plane *p, Flow *port, Packet *k, bint v4) noexcept nogil:
    """Have what follows leave as the guest's datagram came: hop limit, traffic class, may it be fragmented."""
    cdef bint whole = k.dont_fragment
    # What a socket was told is noted once: one of both families is told for both, whichever this is of.
    v4 = v4 or port.flags & FF_TAKES_V4 != 0
    if port.ttl != k.ttl:
        udp_flush(p)
        port.ttl = k.ttl
        if v4:
            set_option(port.sock, IPPROTO_IP, IP_TTL, k.ttl)
            set_option(port.sock, IPPROTO_IP, IP_MULTICAST_TTL, k.ttl)
        if port.flags & FF_V6:
            set_option(port.sock, IPPROTO_IPV6, IPV6_UNICAST_HOPS, k.ttl)
            set_option(port.sock, IPPROTO_IPV6, IPV6_MULTICAST_HOPS, k.ttl)
    if port.tos != k.tos:
        udp_flush(p)
        port.tos = k.tos
        if v4:
            set_option(port.sock, IPPROTO_IP, IP_TOS, k.tos)
        if port.flags & FF_V6:
            set_option(port.sock, IPPROTO_IPV6, IPV6_TCLASS, k.tos)
    if (port.flags & FF_DONT_FRAGMENT != 0) != whole:
        udp_flush(p)
        port.flags ^= FF_DONT_FRAGMENT
        if v4:
            set_option(port.sock, IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO if whole else IP_PMTUDISC_DONT)
        if port.flags & FF_V6:
            set_option(port.sock, IPPROTO_IPV6, IPV6_MTU_DISCOVER, IPV6_PMTUDISC_DO if whole else IPV6_PMTUDISC_WANT)


cdef cmsghdr *control(UdpOut *o, int i, int level, int kind, size_t size) noexcept nogil:
    """Append a control message of `size` bytes to message i."""
    cdef msghdr *m = &o.msgs[i].msg_hdr
    cdef cmsghdr *c = <cmsghdr *>(<uint8_t *>o.control[i] + m.msg_controllen)
    m.msg_control = o.control[i]
    m.msg_controllen += CMSG_SPACE(size)
    memset(c, 0, CMSG_SPACE(size))
    c.cmsg_len = CMSG_LEN(size)
    c.cmsg_level = level
    c.cmsg_type = kind
    return c


cdef void put_source(Plane *p, UdpOut *o, int i, Flow *port, Flow *f) noexcept nogil:
    """Say which address and interface a message leaves from, where that is not the route's to say."""
    cdef in_pktinfo *info4
    cdef in6_pktinfo *info6
    cdef bint v4 = is_v4(f.remote_addr)
    cdef bint many = to_many(p, f.remote_addr)
    cdef uint32_t index = 0
    if many:
        index = p.config.ifindex4 if v4 else p.config.ifindex
    if is_unspecified(f.local_addr) and index == 0:
        return
    if port.flags & FF_V6:
        info6 = <in6_pktinfo *>CMSG_DATA(control(o, i, IPPROTO_IPV6, IPV6_PKTINFO, sizeof(in6_pktinfo)))
        memcpy(&info6.ipi6_addr, f.local_addr, 16)
        if v4:
            # Also where it is left to the route: of IPv4, that is said as v4-mapped.
            map_v4(<uint8_t *>&info6.ipi6_addr, f.local_addr + 12)
        info6.ipi6_ifindex = index
    else:
        info4 = <in_pktinfo *>CMSG_DATA(control(o, i, IPPROTO_IP, IP_PKTINFO, sizeof(in_pktinfo)))
        memcpy(&info4.ipi_spec_dst, f.local_addr + 12, 4)
        info4.ipi_ifindex = index


cdef void put_segment(UdpOut *o, int i) noexcept nogil:
    """Have the kernel cut message i up."""
    cdef cmsghdr *c
    if o.segments[i] > 1:
        c = control(o, i, IPPROTO_UDP, UDP_SEGMENT, sizeof(uint16_t))
        memcpy(CMSG_DATA(c), &o.segment[i], sizeof(uint16_t))


cdef bint joins(UdpOut *o, Flow *port, uint32_t flow, uint32_t size) noexcept nogil:
    """Whether a datagram can be one more segment of the last message."""
    cdef int i = o.count - 1
    if i < 0 or o.flows[i] != flow or size == 0 or port.flags & FF_NO_GSO:
        return False
    # The first that is shorter than the others is the last.
    return (size <= o.segment[i] and o.sizes[i] == <uint32_t>o.segment[i] * o.segments[i]
            and o.segments[i] < MAX_SEGMENTS and o.sizes[i] + size <= MAX_JOINED)


cdef void collect(Plane *p, Flow *port, Flow *f, Packet *k) noexcept nogil:
    """Add a datagram to those that leave at the end of the batch."""
    cdef UdpOut *o = &p.udp_out
    cdef uint32_t own = flow_index(p, port), flow = flow_index(p, f)
    cdef bint v4 = is_v4(f.remote_addr)
    cdef msghdr *m
    cdef int n, i
    if k.gso and k.payload_size > <uint32_t>k.gso * MOST_SEGMENTS:
        drop(p, DROP_MALFORMED)     # where the kernel does not cut it up, each would be a call
        return
    if o.port != own:
        udp_flush(p)
        o.port = own
    mark(p, port, k, v4)
    n = packet_payload(k, 0, k.payload_size, o.iov + o.iovs, MAX_CHAIN - o.iovs)
    if n < 0 or o.count == UDP_OUT:
        udp_flush(p)
        n = packet_payload(k, 0, k.payload_size, o.iov, MAX_CHAIN)
    o.port = own    # a flush has forgotten it
    if n < 0:
        drop(p, DROP_MALFORMED)
        return
    if k.gso == 0 and joins(o, port, flow, k.payload_size):
        i = o.count - 1
        o.msgs[i].msg_hdr.msg_iovlen += n
        o.sizes[i] += k.payload_size
        o.segments[i] += 1
        o.iovs += n
        return
    i = o.count
    memset(&o.msgs[i], 0, sizeof(o.msgs[i]))
    m = &o.msgs[i].msg_hdr
    m.msg_iov = o.iov + o.iovs
    m.msg_iovlen = n
    m.msg_name = &o.names[i]
    if port.flags & FF_V6:
        m.msg_namelen = put_sockaddr6(<sockaddr *>&o.names[i], f.remote_addr, f.remote_port, f.scope)
    else:
        m.msg_namelen = put_sockaddr(p, <sockaddr *>&o.names[i], f.remote_addr, f.remote_port)
    o.flows[i] = flow
    o.sizes[i] = k.payload_size
    o.segment[i] = <uint16_t>k.payload_size
    o.segments[i] = 1
    if k.gso and k.gso < k.payload_size:
        o.segment[i] = k.gso
        o.segments[i] = <uint16_t>((k.payload_size + k.gso - 1) // k.gso)
    put_source(p, o, i, port, f)
    o.iovs += n
    o.count += 1


cdef int send_apart(Plane *p, Flow *port, int i) noexcept nogil:
    """Send the segments of message i one by one; how many went."""
    cdef UdpOut *o = &p.udp_out
    cdef msghdr m = o.msgs[i].msg_hdr
    cdef iovec part[64]
    cdef iovec *from_ = o.msgs[i].msg_hdr.msg_iov
    cdef size_t have = o.msgs[i].msg_hdr.msg_iovlen, at = 0, take
    cdef uint32_t left = o.sizes[i], want
    cdef int n, sent = 0
    # Without the last control message, which asks for the cut.
    m.msg_controllen -= CMSG_SPACE(sizeof(uint16_t))
    m.msg_iov = part
    while left:
        want = o.segment[i] if o.segment[i] < left else left
        left -= want
        n = 0
        while want:
            if n == 64 or have == 0:
                return sent     # a datagram in more than 64 scraps: nobody sends such
            take = from_.iov_len - at
            if take > want:
                take = want
            part[n].iov_base = <uint8_t *>from_.iov_base + at
            part[n].iov_len = take
            n += 1
            want -= <uint32_t>take
            at += take
            if at == from_.iov_len:
                from_ += 1
                have -= 1
                at = 0
        m.msg_iovlen = n
        if sendmsg(port.sock, &m, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0:
            sent += 1
        elif errno == EMSGSIZE:
            errors_from_sock(p, port, &p.flows[o.flows[i]])
            return sent         # the others would fare the same, and the guest is told once
        elif sendmsg(port.sock, &m, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0:
            sent += 1           # the error was that of an earlier datagram
    return sent


cdef bint from_elsewhere(Plane *p, Flow *port, int i) noexcept nogil:
    """Send message i from the address that the route gives. False: it was to, or the kernel does not take that either.

    Where the question went may be no address to answer from: a broadcast, or
    one that the host has no more. If it was not for that, things stay as they
    were: the kernel refuses a cut with the same error, and a network is out of
    reach only for a while.
    """
    cdef UdpOut *o = &p.udp_out
    cdef Flow *f = &p.flows[o.flows[i]]
    cdef uint8_t before[16]
    cdef int attempt
    if is_unspecified(f.local_addr):
        return False
    memcpy(before, f.local_addr, 16)
    memset(f.local_addr, 0, 16)
    for attempt in range(2):
        o.msgs[i].msg_hdr.msg_controllen = 0
        put_source(p, o, i, port, f)
        put_segment(o, i)
        if attempt:
            return False
        if sendmsg(port.sock, &o.msgs[i].msg_hdr, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0:
            return True
        memcpy(f.local_addr, before, 16)


cdef void took(Plane *p, int i, uint32_t sent) noexcept nogil:
    """Count message i, of which the kernel took so many segments."""
    cdef UdpOut *o = &p.udp_out
    cdef uint32_t size = o.sizes[i] if sent == o.segments[i] else sent * o.segment[i]
    count_from_guest(&p.counters.udp, &p.flows[o.flows[i]], sent, size)


cdef void refused(Plane *p, Flow *port, int i, int why) noexcept nogil:
    """The kernel does not take message i, for a reason that is its own."""
    cdef UdpOut *o = &p.udp_out
    cdef int sent
    if (why == EINVAL or why == EADDRNOTAVAIL or why == ENETUNREACH) and from_elsewhere(p, port, i):
        took(p, i, o.segments[i])
        return
    if o.segments[i] > 1 and (why == EINVAL or why == EIO or why == EMSGSIZE):
        # Larger than the way allows, or an interface that cannot: as they were, then.
        if why != EMSGSIZE and o.segments[i] <= MAX_SEGMENTS:
            port.flags |= FF_NO_GSO
        sent = send_apart(p, port, i)
        took(p, i, <uint32_t>sent)
        drop_all(p, DROP_SEND, o.segments[i] - sent)
        return
    drop_all(p, DROP_SEND, o.segments[i])
    if why == ENOMEM:
        shortage(p, why)    # unlike ENOBUFS, which a queue that is full for a moment gives too
    if why == EMSGSIZE:
        errors_from_sock(p, port, &p.flows[o.flows[i]])     # they say what would fit
    elif why != EAGAIN and why != ENOBUFS and why != ENOMEM:
        unreachable_to_guest(p, &p.flows[o.flows[i]], why, o.msgs[i].msg_hdr.msg_iov,
                             <int>o.msgs[i].msg_hdr.msg_iovlen)


cdef void note_many(Plane *p, Flow *port) noexcept nogil:
    """The guest sends to many through this socket, and may hear itself; which port it has the kernel has said by now."""
    cdef sockaddr_storage addr
    cdef socklen_t n = sizeof(addr)
    cdef uint8_t ignored[16]
    if getsockname(port.sock, <sockaddr *>&addr, &n) == 0:
        get_sockaddr(<sockaddr *>&addr, ignored, &port.local_port)
        if port.local_port:
            p.many_from[port.local_port] += 1


cdef void udp_flush(Plane *p) noexcept nogil:
    cdef UdpOut *o = &p.udp_out
    cdef Flow *port
    cdef int i, j, n, why
    cdef bint again = False
    if o.port == NONE:
        return
    port = &p.flows[o.port]
    for i in range(o.count):
        put_segment(o, i)
    i = 0
    while i < o.count:
        n = sendmmsg(port.sock, o.msgs + i, o.count - i, MSG_DONTWAIT | MSG_NOSIGNAL)
        if n > 0:
            for j in range(n):
                took(p, i + j, o.segments[i + j])
            i += n
            again = False
            continue
        why = errno
        if why == EINTR:
            continue
        if why == EMSGSIZE and o.segments[i] == 1 and errors_from_sock(p, port, &p.flows[o.flows[i]]):
            drop_all(p, DROP_SEND, 1)   # it was this one, and the guest has been told: once
            i += 1
            again = False
            continue
        if why != EAGAIN and not again:
            again = True    # it may be an earlier datagram's error, which a call reports once
            continue
        refused(p, port, i, why)
        i += 1
        again = False
    o.port = NONE
    o.count = o.iovs = 0
    if port.flags & FF_ANY_PEER and port.local_port == 0:
        note_many(p, port)


cdef void udp_from_guest(Plane *p, Packet *k) noexcept nogil:
    cdef const uint8_t *u = k.header + k.l4
    cdef uint16_t size
    cdef Flow *f
    if k.l4_size < UDP_HLEN:
        drop(p, DROP_SHORT)
        return
    size = be16(u + 4)
    if size < UDP_HLEN or size > k.l4_size or be16(u + 2) == 0:
        drop(p, DROP_MALFORMED)
        return
    k.payload = k.l4 + UDP_HLEN
    k.payload_size = size - UDP_HLEN
    f = flow_of(p, k, be16(u), be16(u + 2))
    if f == NULL:
        return
    f.flags |= FF_ANSWERED
    f.last_active = p.now
    udp_used(p, f)
    if f.flags & FF_SHARED and udp_peer(p, &p.flows[f.port], f.remote_addr, f.remote_port) != f:
        # The guest has several addresses, or names for the peer: the answer is for the one that it used last.
        peer_out(p, f)
        peer_in(p, f)
    collect(p, &p.flows[f.port], f, k)
