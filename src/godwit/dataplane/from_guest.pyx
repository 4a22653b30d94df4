# SPDX-License-Identifier: GPL-2.0-or-later

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

from godwit.dataplane.host cimport is_link_local6, is_v4, map_v4
from godwit.dataplane.icmp cimport error_from_guest, ping_from_guest
from godwit.dataplane.packet cimport Packet
from godwit.dataplane.pcap cimport pcap_frame
from godwit.dataplane.plane cimport (
    DROP_FRAGMENT,
    DROP_MALFORMED,
    DROP_PROTOCOL,
    DROP_RARE_FULL,
    DROP_SHORT,
    DROP_SOURCE,
    DROP_UNREACHABLE,
    ETH_HLEN,
    HEADERS,
    MAX_FRAME,
    RARE_FRAME,
    RARE_SLOTS,
    Chain,
    Plane,
    RareFrame,
    drop,
    flows_opened,
)
from godwit.dataplane.reassembly cimport fragment_in
from godwit.dataplane.sys cimport (
    IPPROTO_ICMP,
    IPPROTO_ICMPV6,
    IPPROTO_TCP,
    IPPROTO_UDP,
    be16,
    be32,
    load32_acquire,
    store32_release,
    write,
)
from godwit.dataplane.tcp cimport tcp_from_guest, tcp_send_pending
from godwit.dataplane.to_guest cimport IPV4_HLEN, IPV6_HLEN, VNET_GSO_UDP_L4
from godwit.dataplane.udp cimport udp_flush, udp_from_guest
from godwit.dataplane.virtqueue cimport (
    MAX_CHAIN,
    TX,
    Queue,
    queue_active,
    queue_break,
    queue_chain,
    queue_notify_off,
    queue_notify_on,
    queue_pending,
    queue_publish,
    queue_used,
)

cdef enum:
    OPENING = 8             # frames that one which opens a flow counts for: it takes a socket, and the others wait
    ETHERTYPE_IPV4 = 0x0800
    ETHERTYPE_ARP = 0x0806
    ETHERTYPE_IPV6 = 0x86DD
    IPV6_HOP_BY_HOP = 0
    IPV6_ROUTING = 43
    IPV6_FRAGMENT = 44
    FRAGMENT_HLEN = 8
    IPV6_DESTINATION = 60
    MAX_EXTENSIONS = 8
    L4_ROOM = 60            # the header of TCP at its longest, to be had in Packet.header
    ARP_HLEN = 28
    DHCP_SERVER = 67
    DHCPV6_SERVER = 547
    ICMP_ECHO = 8
    ICMP_UNREACHABLE = 3
    ICMPV6_UNREACHABLE = 1
    ICMPV6_ECHO = 128
    ICMPV6_ECHO_REPLY = 129
    ICMPV6_ROUTER_SOLICITATION = 133
    ICMPV6_NEIGHBOUR_SOLICITATION = 135
    ICMPV6_NEIGHBOUR_ADVERTISEMENT = 136


cdef void rare(Plane *p, Packet *k) noexcept nogil:
    """Hand a whole frame to the control thread."""
    cdef RareFrame *slot
    cdef uint32_t head = p.up.head, at = 0
    cdef uint64_t one = 1
    cdef size_t skip = k.skip, part
    cdef int i
    if head - load32_acquire(&p.up.tail) >= RARE_SLOTS or k.size > RARE_FRAME:
        drop(p, DROP_RARE_FULL)
        return
    slot = &p.up.frames[head % RARE_SLOTS]
    for i in range(k.count):
        part = k.iov[i].iov_len
        if skip >= part:
            skip -= part
            continue
        part -= skip
        if part > k.size - at:
            part = k.size - at
        memcpy(slot.data + at, <uint8_t *>k.iov[i].iov_base + skip, part)
        at += <uint32_t>part
        skip = 0
    slot.size = at
    store32_release(&p.up.head, head + 1)
    write(p.rare_event, &one, 8)


cdef int parse_ipv4(Plane *p, Packet *k, const uint8_t *ip, uint32_t room) noexcept nogil:
    """Fill in what is above IP; 0, or the reason to drop the frame plus 1."""
    cdef uint32_t size, total
    if room < IPV4_HLEN:
        return DROP_SHORT + 1
    size = (ip[0] & 0xF) << 2
    total = be16(ip + 2)
    if ip[0] >> 4 != 4 or ip[8] == 0 or size < IPV4_HLEN or total < size or total > k.size - ETH_HLEN:
        return DROP_MALFORMED + 1
    k.v6 = False
    k.tos = ip[1]
    k.ttl = ip[8]
    k.dont_fragment = ip[6] & 0x40 != 0
    k.more = ip[6] & 0x20 != 0
    k.offset = (be16(ip + 6) & 0x1FFF) << 3
    k.fragment = k.more or k.offset != 0
    k.ident = be16(ip + 4)
    k.proto = ip[9]
    k.l4 = ETH_HLEN + size
    k.l4_size = total - size
    map_v4(k.saddr, ip + 12)
    map_v4(k.daddr, ip + 16)
    return 0


cdef int skip_extensions(Packet *k) noexcept nogil:
    """From `k.proto` at `k.l4` on to what is no extension header, or to what is in fragments.

    0, or the reason to drop the frame plus 1.
    """
    cdef const uint8_t *h = k.header
    cdef uint32_t end = k.l4 + k.l4_size, have = end if end < HEADERS else HEADERS
    cdef uint32_t at = k.l4, size
    cdef int i
    for i in range(MAX_EXTENSIONS):
        if k.proto == IPV6_FRAGMENT:
            size = FRAGMENT_HLEN
        elif k.proto == IPV6_HOP_BY_HOP or k.proto == IPV6_ROUTING or k.proto == IPV6_DESTINATION:
            size = 8
        else:
            break
        if at + size > have:
            return DROP_SHORT + 1
        if k.proto == IPV6_FRAGMENT:
            k.offset = be16(h + at + 2) & 0xFFF8
            k.more = h[at + 3] & 1 != 0
            k.ident = be32(h + at + 4)
            # One alone is no fragment to anybody (RFC 6946).
            k.fragment = k.more or k.offset != 0
            k.dont_fragment = False
        else:
            size = (<uint32_t>h[at + 1] + 1) << 3
            if at + size > have:
                return DROP_MALFORMED + 1
        k.proto = h[at]
        at += size
        if k.fragment:
            break       # what is above it is looked at when it is whole
    k.l4 = at
    k.l4_size = end - at
    return 0


cdef int parse_ipv6(Plane *p, Packet *k, const uint8_t *ip, uint32_t room) noexcept nogil:
    cdef uint32_t total
    if room < IPV6_HLEN:
        return DROP_SHORT + 1
    total = be16(ip + 4)
    if ip[0] >> 4 != 6 or ip[7] == 0 or total > k.size - ETH_HLEN - IPV6_HLEN:
        return DROP_MALFORMED + 1
    k.v6 = True
    k.tos = <uint8_t>(be16(ip) >> 4)
    k.ttl = ip[7]
    k.dont_fragment = True
    k.fragment = False
    memcpy(k.saddr, ip + 8, 16)
    memcpy(k.daddr, ip + 24, 16)
    k.proto = ip[6]
    k.l4 = ETH_HLEN + IPV6_HLEN
    k.l4_size = total
    return skip_extensions(k)


cdef void note(Plane *p, uint8_t *seen, const uint8_t *a) noexcept nogil:
    """The guest uses this address. Not if it is another machine's, to which a forwarded port leads."""
    cdef int i
    if memcmp(seen, a, 16) == 0:
        return
    for i in range(p.target_count):
        if memcmp(p.targets[i], a, 16) == 0:
            return
    memcpy(seen, a, 16)


cdef bint observe(Plane *p, Packet *k) noexcept nogil:
    """Note the address that the guest uses. False: it cannot be the guest's."""
    cdef const uint8_t *a = k.saddr
    cdef int i
    cdef uint8_t any_bit = 0
    if not k.v6:
        if a[12] == 0:
            return True     # 0.0.0.0 while it has none: DHCP
        if a[12] == 127 or a[12] >= 224:
            return False
        note(p, p.seen4, a)
        return True
    if a[0] == 0xFF:
        return False
    if is_link_local6(a):
        note(p, p.seen6_ll, a)
        return True
    for i in range(15):
        any_bit |= a[i]
    if any_bit == 0:
        return a[15] == 0   # "::" while it has none; "::1" is nobody's on a wire
    note(p, p.seen6, a)
    return True


cdef bint is_in_prefix(Plane *p, const uint8_t *a) noexcept nogil:
    """In which the guest makes up addresses, of 64 bits (RFC 4862; RFC 4291, 2.5.1)."""
    return memcmp(a, p.config.addr6, 8) == 0


cdef void observe_arp(Plane *p, const uint8_t *e, uint32_t have) noexcept nogil:
    """Note the address that the guest says it has (RFC 826), asking or answering."""
    cdef const uint8_t *arp = e + ETH_HLEN
    cdef uint8_t a[16]
    if have < ETH_HLEN + ARP_HLEN or be16(arp + 2) != ETHERTYPE_IPV4 or memcmp(arp + 8, e + 6, 6) != 0:
        return
    map_v4(a, arp + 14)
    if 0 < a[12] < 224 and a[12] != 127:    # zeros while it asks whether somebody has the address (RFC 5227)
        note(p, p.seen4, a)


cdef void observe_detection(Plane *p, Packet *k, const uint8_t *l4) noexcept nogil:
    """Note the address that the guest is about to use, where it has not been seen to use any in its prefix.

    Before that it asks from the unspecified address whether somebody else has it
    (RFC 4862, 5.4.2). A guest that only serves sends nothing more from an address
    that it made up until somebody has reached it there.
    """
    cdef const uint8_t *target = l4 + 8
    cdef int i
    if l4[0] != ICMPV6_NEIGHBOUR_SOLICITATION or k.l4_size < 24 or target[0] == 0xFF or target[0] == 0:
        return
    for i in range(16):
        if k.saddr[i]:
            return
    if is_link_local6(target):
        if p.seen6_ll[0] == 0:
            note(p, p.seen6_ll, target)
    elif p.seen6[0] == 0 or (is_in_prefix(p, target) and not is_in_prefix(p, p.seen6)):
        note(p, p.seen6, target)


cdef bint is_multicast(Packet *k) noexcept nogil:
    if k.v6:
        return k.daddr[0] == 0xFF
    return k.daddr[12] >= 224


cdef void above_ip(Plane *p, Packet *k) noexcept nogil:
    """A packet that is whole, to the protocol that it is of."""
    cdef const uint8_t *l4 = k.header + k.l4
    cdef uint16_t port
    # The whole header above IP is in the copy, or is not there at all.
    if k.l4 + (L4_ROOM if k.l4_size > L4_ROOM else k.l4_size) > HEADERS:
        drop(p, DROP_MALFORMED)
    elif k.proto == IPPROTO_TCP and not p.config.no_tcp:
        if is_multicast(k):
            drop(p, DROP_UNREACHABLE)
            return
        tcp_from_guest(p, k)
    elif k.proto == IPPROTO_UDP and not p.config.no_udp:
        port = be16(l4 + 2) if k.l4_size >= 8 else 0
        if port == (DHCPV6_SERVER if k.v6 else DHCP_SERVER):
            rare(p, k)
        else:
            udp_from_guest(p, k)
    elif k.proto == (IPPROTO_ICMPV6 if k.v6 else IPPROTO_ICMP) and k.l4_size >= 8:
        if k.v6 and ICMPV6_ROUTER_SOLICITATION <= l4[0] <= ICMPV6_NEIGHBOUR_ADVERTISEMENT:
            observe_detection(p, k, l4)
            rare(p, k)
        elif l4[0] == (ICMPV6_ECHO if k.v6 else ICMP_ECHO) and not is_multicast(k) and not p.config.no_icmp:
            ping_from_guest(p, k)
        elif l4[0] == (ICMPV6_UNREACHABLE if k.v6 else ICMP_UNREACHABLE):
            error_from_guest(p, k)
        elif k.v6 and l4[0] == ICMPV6_ECHO_REPLY:
            pass    # the answer to our own question is its source address, and that is noted
        else:
            drop(p, DROP_PROTOCOL)
    else:
        drop(p, DROP_PROTOCOL)


cdef void frame(Plane *p, Packet *k) noexcept nogil:
    """One Ethernet frame, its first bytes in k.header."""
    cdef const uint8_t *e = k.header
    cdef uint32_t have = k.size if k.size < HEADERS else HEADERS
    cdef uint16_t kind
    cdef int reason
    if k.size < ETH_HLEN:
        drop(p, DROP_SHORT)
        return
    if e[6] & 1:
        drop(p, DROP_SOURCE)
        return
    if memcmp(p.config.guest_mac, e + 6, 6) != 0 or not p.config.guest_mac_known:
        memcpy(p.config.guest_mac, e + 6, 6)
        p.config.guest_mac_known = True
    kind = be16(e + 12)
    if kind == ETHERTYPE_ARP:
        if p.config.has_v4:
            observe_arp(p, e, have)
        rare(p, k)
        return
    if kind == ETHERTYPE_IPV4 and p.config.has_v4:
        reason = parse_ipv4(p, k, e + ETH_HLEN, have - ETH_HLEN)
    elif kind == ETHERTYPE_IPV6 and p.config.has_v6:
        reason = parse_ipv6(p, k, e + ETH_HLEN, have - ETH_HLEN)
    else:
        reason = DROP_PROTOCOL + 1
    if reason:
        drop(p, reason - 1)
        return
    # A v4-mapped address is no address on a wire (RFC 4291, 2.5.5.2), and would
    # be taken for the IPv4 one.
    if (k.v6 and (is_v4(k.saddr) or is_v4(k.daddr))) or not observe(p, k):
        drop(p, DROP_SOURCE)
        return
    if not k.fragment:
        above_ip(p, k)
    elif fragment_in(p, k):
        reason = skip_extensions(k) if k.v6 else 0
        if reason or k.fragment:
            drop(p, reason - 1 if reason else DROP_FRAGMENT)    # fragments of fragments: nobody sends them
            return
        above_ip(p, k)
        # Its payload lies where the next one will be put together.
        tcp_send_pending(p)
        udp_flush(p)


cdef uint16_t gso_size(Plane *p, Chain *c) noexcept nogil:
    """Of a UDP frame that is to be cut up (virtio 1.3, 5.1.6.2); 0 if it is not."""
    cdef uint8_t h[6]
    cdef size_t at = 0, part
    cdef int i
    for i in range(c.count):
        if at == sizeof(h):
            break
        part = c.iov[i].iov_len if c.iov[i].iov_len < sizeof(h) - at else sizeof(h) - at
        memcpy(h + at, c.iov[i].iov_base, part)
        at += part
    return h[4] | <uint16_t>h[5] << 8 if h[1] == VNET_GSO_UDP_L4 else 0


cdef bint chain_to_packet(Plane *p, Chain *c, Packet *k) noexcept nogil:
    """Copy the frame's first bytes; False if it is no frame at all."""
    cdef size_t skip = p.vnet_size, part, at = 0, want
    cdef int i
    if c.total < p.vnet_size or c.total - p.vnet_size > MAX_FRAME:
        drop(p, DROP_SHORT if c.total < p.vnet_size else DROP_MALFORMED)
        return False
    k.size = <uint32_t>(c.total - p.vnet_size)
    k.iov = c.iov
    k.count = c.count
    k.skip = p.vnet_size
    k.payload = k.payload_size = 0
    k.gso = gso_size(p, c) if p.host_uso else 0
    want = k.size if k.size < HEADERS else HEADERS
    for i in range(c.count):
        if at == want:
            break
        part = c.iov[i].iov_len
        if skip >= part:
            skip -= part
            continue
        part -= skip
        if part > want - at:
            part = want - at
        memcpy(k.header + at, <uint8_t *>c.iov[i].iov_base + skip, part)
        at += part
        skip = 0
    return True


cdef void frames_from_guest(Plane *p) noexcept nogil:
    cdef Queue *q = &p.queues[TX]
    cdef Chain *c = &p.chain
    cdef Packet k
    cdef int pending, i, n, done = 0
    cdef uint64_t opened
    p.again = False
    if not queue_active(q):
        return
    queue_notify_off(q, &p.mem)
    while done < TX_BATCH:
        pending = queue_pending(q)
        if pending < 0:
            queue_break(q, pending)
            break
        if pending == 0:
            if p.busy_poll:
                break           # a kick is asked for when there is nobody who looks (loop.pyx)
            if queue_notify_on(q, &p.mem, q.last_avail):
                queue_notify_off(q, &p.mem)
                continue
            break
        for i in range(pending):
            n = queue_chain(q, &p.mem, 0, False, c.iov, c.guest_addr, MAX_CHAIN, &c.head, &c.total)
            if n < 0:
                queue_break(q, n)
                break
            c.count = n
            q.last_avail += 1
            p.counters.frames_from_guest += 1
            opened = flows_opened(p)
            if chain_to_packet(p, c, &k):
                if p.pcap.fd >= 0:
                    pcap_frame(p, k.iov, k.count, k.skip, k.size)
                frame(p, &k)
            queue_used(q, c.head, 0)
            done += 1 if flows_opened(p) == opened else OPENING
            if done >= TX_BATCH:
                break
        if q.broken:
            break
    if done >= TX_BATCH:
        p.again = True
    # Payload still refers to the guest's buffers: send it before they go back.
    tcp_send_pending(p)
    udp_flush(p)
    queue_publish(q, &p.mem)
