# SPDX-License-Identifier: GPL-2.0-or-later
"""UDP from the host's sockets to the guest.

Theory of operation. A port's socket is read with recvmmsg, many messages at
once; where the kernel has joined datagrams of one sender (UDP_GRO) a message
is several of them, which the guest gets as one frame if it can cut that up
itself (VIRTIO_NET_F_GUEST_USO), else one by one. Messages lie in memory of our
own first: their sizes are not known before, and one copy of a datagram costs
much less than a call of the kernel's for each.

What the guest's ring has no room for stays *in hand* (p.udp_in) until it has;
there is one such batch, and while it is in hand no other is taken in. So
little is taken from a socket before the guest can have it, and what overflows
is the socket's own queue, where the kernel drops the newest.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport realloc
from libc.string cimport memcmp, memcpy, memset

from godwit.dataplane.datagram cimport DELIVERED, RING_SHORT, Datagram, datagram_to_guest, fits_mtu
from godwit.dataplane.flow cimport (
    carry_free,
    carry_new,
    carry_take,
    flow_close,
    flow_find,
    flow_index,
    flow_wait_ring,
    peer_in,
    peer_out,
)
from godwit.dataplane.host cimport (
    get_sockaddr,
    guest_side,
    is_link_local6,
    is_unspecified,
    is_v4,
    map_v4,
    put_sockaddr6,
    to_guest_name,
)
from godwit.dataplane.plane cimport (
    DROP_NO_FLOW,
    DROP_UNREACHABLE,
    FF_ANY_PEER,
    FF_FORWARD,
    FF_HEARD,
    FLOW_UDP,
    FLOW_UDP_PORT,
    NONE,
    UDP_CONTROL,
    UDP_IN,
    UDP_SLOT,
    Carry,
    Flow,
    Plane,
    UdpIn,
    count_to_guest,
    drop,
)
from godwit.dataplane.sys cimport (
    AF_INET6,
    CMSG_DATA,
    CMSG_FIRSTHDR,
    CMSG_LEN,
    CMSG_NXTHDR,
    CMSG_SPACE,
    EAGAIN,
    ENOMEM,
    IPPROTO_IP,
    IPPROTO_IPV6,
    IPPROTO_UDP,
    IPV6_PKTINFO,
    IPV6_TCLASS,
    IP_PKTINFO,
    IP_TOS,
    MAP_ANONYMOUS,
    MAP_FAILED,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MSG_DONTWAIT,
    MSG_PEEK,
    MSG_TRUNC,
    PROT_READ,
    PROT_WRITE,
    SOCK_CLOEXEC,
    SOCK_DGRAM,
    UDP_GRO,
    bind,
    close,
    cmsghdr,
    errno,
    getsockname,
    in6_pktinfo,
    in_pktinfo,
    iovec,
    mmap,
    msghdr,
    munmap,
    put16,
    recv,
    recvmmsg,
    recvmsg,
    sockaddr,
    sockaddr_in6,
    socket,
    socklen_t,
)
from godwit.dataplane.udp cimport udp_add_peer, udp_is_held, udp_peer, udp_remembers_others, udp_used
from godwit.dataplane.virtqueue cimport RX, Queue, queue_active, queue_break, queue_pending

cdef enum:
    UDP_HLEN = 8
    UDP_CSUM = 6        # offset of the checksum
    ROUNDS = 4          # batches of one socket before the others have their turn
    DRAIN = 100000      # more datagrams than a queue holds
    ERRORS = 64         # of earlier datagrams, in a row: each is reported by one call
    LARGEST = 2 * UDP_SLOT  # bytes that one message can take where it is carried, with all that its datagrams cost


cdef int udp_init(Plane *p) noexcept nogil:
    cdef UdpIn *u = &p.udp_in
    cdef int i
    u.port = NONE
    u.data = <uint8_t *>mmap(NULL, <size_t>UDP_IN * UDP_SLOT, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if u.data == MAP_FAILED:
        u.data = NULL
        return -ENOMEM
    for i in range(UDP_IN):
        u.iov[i].iov_base = u.data + i * UDP_SLOT
        u.iov[i].iov_len = UDP_SLOT
    return 0


cdef void udp_free(Plane *p) noexcept nogil:
    if p.udp_in.data != NULL:
        munmap(p.udp_in.data, <size_t>UDP_IN * UDP_SLOT)
        p.udp_in.data = NULL


cdef bint udp_take_waiting(Flow *port, uint64_t most, uint32_t cost) noexcept nogil:
    cdef Carry *c = port.carry_to_guest
    cdef Carried head
    cdef Seen seen
    cdef sockaddr_in6 name
    cdef uint64_t control[16]     # UDP_CONTROL bytes
    cdef msghdr m
    cdef iovec iov
    cdef ssize_t n
    cdef uint64_t capacity, used = 0
    cdef uint8_t *grown
    cdef int errors = 0
    cdef bint empty = False
    if c == NULL:
        c = carry_new(NULL, 0)
        if c == NULL:
            return False
    capacity = c.size
    while used + LARGEST <= most:
        if capacity - c.size < LARGEST:     # before it is read: what was taken has its place
            grown = NULL
            if 2 * <uint64_t>c.size + LARGEST <= 0xFFFFFFFFU:
                grown = <uint8_t *>realloc(c.data, 2 * <size_t>c.size + LARGEST)
            if grown == NULL:
                break
            c.data = grown
            capacity = 2 * <uint64_t>c.size + LARGEST
        iov.iov_base = c.data + c.size + sizeof(Carried)
        iov.iov_len = UDP_SLOT
        m.msg_name = &name
        m.msg_namelen = sizeof(name)
        m.msg_iov = &iov
        m.msg_iovlen = 1
        m.msg_control = control
        m.msg_controllen = UDP_CONTROL
        n = recvmsg(port.sock, &m, MSG_DONTWAIT)
        if n < 0:
            errors += 1     # of an earlier datagram, as in take_in()
            empty = errno == EAGAIN or errors == ERRORS
            if empty:
                break
            continue
        errors = 0
        look_at_control(&m, &seen)
        memset(&head, 0, sizeof(head))
        get_sockaddr(<sockaddr *>&name, head.remote_addr, &head.remote_port)
        head.scope = name.sin6_scope_id if is_link_local6(head.remote_addr) else 0
        memcpy(head.local_addr, seen.local_addr, 16)
        head.segment = seen.segment
        head.tos = seen.tos
        head.size = <uint32_t>n
        memcpy(c.data + c.size, &head, sizeof(head))
        c.size += <uint32_t>sizeof(head) + head.size
        used += head.size + cost * (1 if head.size <= head.segment or head.segment == 0
                                    else (head.size + head.segment - 1) // head.segment)
    if not empty:
        empty = recv(port.sock, NULL, 0, MSG_PEEK | MSG_DONTWAIT | MSG_TRUNC) < 0 and errno == EAGAIN
    grown = <uint8_t *>realloc(c.data, c.size) if c.size else NULL
    if grown != NULL:
        c.data = grown
    port.carry_to_guest = c
    if c.size == 0:
        carry_free(c)
        port.carry_to_guest = NULL
    return empty


cdef size_t put_control(uint8_t *at, int level, int kind, const void *value, size_t size) noexcept nogil:
    """A control message, as the kernel would have written it; how many bytes it takes."""
    cdef cmsghdr *control = <cmsghdr *>at
    memset(at, 0, CMSG_SPACE(size))
    control.cmsg_level = level
    control.cmsg_type = kind
    control.cmsg_len = CMSG_LEN(size)
    memcpy(CMSG_DATA(control), value, size)
    return CMSG_SPACE(size)


cdef int take_carried(Plane *p, Flow *port, int most) noexcept nogil:
    """The same from what the port carries (`Engine.carry_datagrams`, `udp_take_waiting`)."""
    cdef UdpIn *u = &p.udp_in
    cdef Carry *c = port.carry_to_guest
    cdef Carried head       # copied: there it lies as it comes
    cdef in6_pktinfo info
    cdef uint8_t *control
    cdef size_t used
    cdef int value, n = 0
    while n < most and c != NULL:
        memcpy(&head, c.data + c.at, sizeof(Carried))
        u.msgs[n].msg_len = head.size
        u.msgs[n].msg_hdr.msg_name = &u.names[n]
        if head.scope == 0 and is_link_local6(head.remote_addr):
            head.scope = p.config.ifindex
        u.msgs[n].msg_hdr.msg_namelen = put_sockaddr6(<sockaddr *>&u.names[n], head.remote_addr, head.remote_port,
                                                      head.scope)
        control = <uint8_t *>u.control[n]
        memset(&info, 0, sizeof(info))
        memcpy(&info.ipi6_addr, head.local_addr, 16)
        used = put_control(control, IPPROTO_IPV6, IPV6_PKTINFO, &info, sizeof(info))
        value = head.tos
        used += put_control(control + used, IPPROTO_IPV6, IPV6_TCLASS, &value, sizeof(value))
        value = <int>head.segment
        used += put_control(control + used, IPPROTO_UDP, UDP_GRO, &value, sizeof(value))
        u.msgs[n].msg_hdr.msg_control = control
        u.msgs[n].msg_hdr.msg_controllen = used
        memcpy(u.iov[n].iov_base, c.data + c.at + sizeof(Carried), head.size)
        c = carry_take(c, <uint32_t>sizeof(Carried) + head.size)
        n += 1
    port.carry_to_guest = c
    u.port = flow_index(p, port)
    u.generation = port.generation
    u.count = n
    u.next = 0
    u.at = u.done = 0
    return n


cdef int take_in(Plane *p, Flow *port, int most) noexcept nogil:
    """Take messages from a port's socket in hand; how many, 0 if there are none."""
    cdef UdpIn *u = &p.udp_in
    cdef msghdr *m
    cdef int i, n
    if port.carry_to_guest != NULL:
        return take_carried(p, port, most)
    for i in range(most):
        m = &u.msgs[i].msg_hdr
        m.msg_name = &u.names[i]
        m.msg_namelen = sizeof(sockaddr_in6)
        m.msg_iov = &u.iov[i]
        m.msg_iovlen = 1
        m.msg_control = u.control[i]
        m.msg_controllen = UDP_CONTROL
    for i in range(ERRORS):
        n = recvmmsg(port.sock, u.msgs, most, MSG_DONTWAIT, NULL)
        if n > 0:
            u.port = flow_index(p, port)
            u.generation = port.generation
            u.count = n
            u.next = 0
            u.at = u.done = 0
            return n
        if n == 0 or errno == EAGAIN:
            return 0
        # Else it was an earlier datagram's error, which the error queue tells of, or a signal.
    return 0


cdef void look_at_control(msghdr *m, Seen *seen) noexcept nogil:
    cdef cmsghdr *c = CMSG_FIRSTHDR(m)
    cdef int value
    memset(seen, 0, sizeof(Seen))
    while c != NULL:
        if c.cmsg_level == IPPROTO_UDP and c.cmsg_type == UDP_GRO:
            memcpy(&value, CMSG_DATA(c), sizeof(int))
            seen.segment = <uint32_t>value
        elif c.cmsg_level == IPPROTO_IP and c.cmsg_type == IP_TOS:
            seen.tos = CMSG_DATA(c)[0]
        elif c.cmsg_level == IPPROTO_IPV6 and c.cmsg_type == IPV6_TCLASS:
            memcpy(&value, CMSG_DATA(c), sizeof(int))
            seen.tos = <uint8_t>value
        elif c.cmsg_level == IPPROTO_IP and c.cmsg_type == IP_PKTINFO:
            map_v4(seen.local_addr, <const uint8_t *>&(<in_pktinfo *>CMSG_DATA(c)).ipi_addr)
        elif c.cmsg_level == IPPROTO_IPV6 and c.cmsg_type == IPV6_PKTINFO:
            memcpy(seen.local_addr, &(<in6_pktinfo *>CMSG_DATA(c)).ipi6_addr, 16)
        c = CMSG_NXTHDR(m, c)


cdef bint to_one(Plane *p, const uint8_t *addr) noexcept nogil:
    """Whether an address can be a source as well: neither multicast nor broadcast."""
    if is_v4(addr):
        return 0 < addr[12] < 224 and memcmp(addr, p.config.broadcast4, 16) != 0
    return addr[0] != 0xFF


cdef bint is_local(const uint8_t *addr) noexcept nogil:
    """Whether the host has this address: then, and only then, may it be bound to."""
    cdef sockaddr_in6 name
    cdef int fd = socket(AF_INET6, SOCK_DGRAM | SOCK_CLOEXEC, 0)
    cdef bint found
    if fd < 0:
        return False
    put_sockaddr6(<sockaddr *>&name, addr, 0, 0)
    found = bind(fd, <sockaddr *>&name, sizeof(name)) == 0
    close(fd)
    return found


cdef bint is_own_echo(Plane *p, const uint8_t *remote, uint16_t remote_port) noexcept nogil:
    """Whether a datagram to many is the guest's own: the host hears itself, and the guest has heard itself already."""
    return p.many_from[remote_port] != 0 and is_local(remote)


cdef Flow *known(Plane *p, Flow *port, const uint8_t *guest, const uint8_t *name, const uint8_t *remote,
                 uint16_t remote_port) noexcept nogil:
    """The flow between these, if it is there; it is this port's and this peer's from now on, if it was another's."""
    cdef Flow *f = flow_find(p, FLOW_UDP, guest, port.guest_port, name, remote_port)
    cdef Flow *other
    if f == NULL or (f.port == flow_index(p, port) and memcmp(f.remote_addr, remote, 16) == 0):
        return f
    peer_out(p, f)
    # Addresses of the host's own may share a name: the answer goes to who asked last.
    memcpy(f.remote_addr, remote, 16)
    other = &p.flows[f.port]
    f.port = flow_index(p, port)
    peer_in(p, f)
    port.peers += 1
    other.peers -= 1
    if other.peers == 0 and not other.flags & FF_FORWARD:
        flow_close(p, other)
    return f


cdef Flow *flow_from(Plane *p, Flow *port, int i, Seen *seen, uint8_t *guest, uint8_t *name) noexcept nogil:
    """Whose message i is: the ends as the guest knows them, and the flow.

    NULL: a message from nobody (`guest` is unspecified), or the table is full,
    and it can be delivered all the same.
    """
    cdef sockaddr_in6 *sender = &p.udp_in.names[i]
    cdef uint8_t remote[16]
    cdef uint16_t remote_port
    cdef Flow *f
    cdef bint open_to_all = port.flags & (FF_FORWARD | FF_ANY_PEER) != 0
    memset(guest, 0, 16)
    get_sockaddr(<sockaddr *>sender, remote, &remote_port)
    f = udp_peer(p, port, remote, remote_port)
    if f == NULL and not open_to_all:
        drop(p, DROP_NO_FLOW)
        return NULL
    if port.flags & FF_FORWARD and not to_one(p, seen.local_addr) and is_own_echo(p, remote, remote_port):
        return NULL
    if f != NULL and (not open_to_all or udp_is_held(p, f)):
        memcpy(guest, f.guest_addr, 16)
        memcpy(name, f.our_addr, 16)
    else:
        if port.flags & FF_FORWARD and is_unspecified(port.guest_addr):
            memcpy(guest, guest_side(p, remote), 16)
        elif is_v4(port.guest_addr) == is_v4(remote):
            memcpy(guest, port.guest_addr, 16)
        if is_unspecified(guest) or remote_port == 0 or not to_guest_name(p, remote, remote_port, name):
            drop(p, DROP_UNREACHABLE)
            memset(guest, 0, 16)
            return NULL
        f = known(p, port, guest, name, remote, remote_port)
        if f == NULL and udp_remembers_others(p):
            f = udp_add_peer(p, port, guest, name, remote, remote_port, 0)
        if f == NULL:
            return NULL
    # Of two on different links with the same address, too, the answer goes to who asked last.
    f.scope = sender.sin6_scope_id if is_link_local6(remote) else 0
    if port.flags & FF_FORWARD and to_one(p, seen.local_addr):
        memcpy(f.local_addr, seen.local_addr, 16)   # the answer comes from where the question went
    return f


cdef bint deliver(Plane *p, Flow *port, int i) noexcept nogil:
    """Message i to the guest, from where it was left off. False: its ring is short."""
    cdef UdpIn *u = &p.udp_in
    cdef uint32_t total = u.msgs[i].msg_len, each
    cdef Seen seen
    cdef Datagram d
    cdef uint8_t guest[16]
    cdef uint8_t name[16]
    cdef uint8_t ignored[16]
    cdef Flow *f
    cdef uint16_t remote_port
    cdef bint whole
    cdef int result
    look_at_control(&u.msgs[i].msg_hdr, &seen)
    f = flow_from(p, port, i, &seen, guest, name)
    if is_unspecified(guest):
        return True
    if f != NULL:
        f.flags |= FF_HEARD
        udp_used(p, f)
    get_sockaddr(<sockaddr *>&u.names[i], ignored, &remote_port)
    d.v6 = not is_v4(guest)
    d.tos = seen.tos
    d.proto = IPPROTO_UDP
    d.field = UDP_CSUM
    d.saddr = name
    d.daddr = guest
    d.done = u.done
    d.ident = u.ident
    each = seen.segment if 0 < seen.segment < total else total
    # What is beyond the guest's MTU goes in fragments, joined or not.
    whole = (p.guest_uso6 if d.v6 else p.guest_uso4) and fits_mtu(p, &d, each)
    while True:
        d.payload = u.data + i * UDP_SLOT + u.at
        d.size = total - u.at
        d.gso = 0
        if d.size > each:
            if whole:
                d.gso = <uint16_t>each
            else:
                d.size = each
        put16(d.header, remote_port)
        put16(d.header + 2, port.guest_port)
        put16(d.header + 4, <uint16_t>(UDP_HLEN + d.size))
        result = datagram_to_guest(p, &d)
        if result == RING_SHORT and d.gso:
            d.gso = 0
            d.size = each
            put16(d.header + 4, <uint16_t>(UDP_HLEN + each))
            result = datagram_to_guest(p, &d)
        if result == RING_SHORT:
            u.done = d.done
            u.ident = d.ident
            return False
        if result == DELIVERED:
            count_to_guest(&p.counters.udp, f, (d.size + d.gso - 1) // d.gso if d.gso else 1, d.size)
        u.at += d.size
        d.done = u.done = 0
        if u.at >= total:
            return True


cdef bint empty_hand(Plane *p) noexcept nogil:
    """Deliver what is in hand. False: the guest's ring is short, the rest stays."""
    cdef UdpIn *u = &p.udp_in
    cdef Flow *port
    if u.port == NONE:
        return True
    port = &p.flows[u.port]
    if port.generation == u.generation and port.sock >= 0:
        while u.next < u.count:
            if not deliver(p, port, u.next):
                return False
            u.next += 1
            u.at = u.done = 0
    u.port = NONE
    return True


cdef void udp_drain(Plane *p, Flow *port) noexcept nogil:
    cdef int i
    p.udp_in.port = NONE
    carry_free(port.carry_to_guest)
    port.carry_to_guest = NULL
    for i in range(DRAIN):
        if recv(port.sock, NULL, 0, MSG_DONTWAIT | MSG_TRUNC) < 0 and errno == EAGAIN:
            return


cdef void udp_from_sock(Plane *p, Flow *port) noexcept nogil:
    cdef Queue *q = &p.queues[RX]
    cdef int i, most
    cdef uint32_t generation = port.generation
    cdef bint carried
    for i in range(ROUNDS):
        most = 0
        if empty_hand(p) and queue_active(q):
            most = queue_pending(q)
            if most < 0:
                queue_break(q, most)
        if port.generation != generation:
            return      # what was in hand of another port has taken the last peer of this one (known())
        if most <= 0:
            flow_wait_ring(p, port)
            return
        if most > UDP_IN:
            most = UDP_IN
        carried = port.carry_to_guest != NULL   # and the socket was not asked
        if take_in(p, port, most) < most and not carried:
            # There were no more, or there was an error after these: the next event tells of either.
            if not empty_hand(p):
                flow_wait_ring(p, port)
            return
    if not empty_hand(p):
        flow_wait_ring(p, port)
        return
    # More may wait: the edge is gone, so come again, whether or not the guest
    # adds buffers meanwhile.
    flow_wait_ring(p, port)
    p.again = True
