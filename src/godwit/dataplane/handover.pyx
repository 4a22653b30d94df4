# SPDX-License-Identifier: GPL-2.0-or-later
"""A data plane handed over to another process on the same host, with all that it has.

The source's thread is parked, and nothing here changes the source: it may go on as if nothing had been asked. The
target's thread has not been started. Nothing here does anything to a socket, a ring or the guest's memory but watch it
(epoll), since all of them are the source's as well until it has let go. What was missed is found then: a new watch
begins with an event that tells how things are.
"""

import os

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from godwit.dataplane._base cimport EngineBase, carried_from, check, copy_bytes
from godwit.dataplane._rings cimport RingEngine
from godwit.dataplane.flow cimport (
    age_in,
    carry_bytes,
    WATCH_KICK,
    carry_new,
    flow_deadline,
    flow_find,
    flow_index,
    flow_new_beyond,
    flow_touch,
    flow_wait_ring,
    flow_watch,
    peer_in,
    watch_data,
)
from godwit.dataplane.loop cimport clock_ms
from godwit.dataplane.pcap cimport pcap_flush
from godwit.dataplane.plane cimport (
    DROPS,
    EV_ESTABLISHED,
    FF_ACK_DUE,
    FF_ANSWERED,
    FF_ANY_PEER,
    FF_CONNECTING,
    FF_DONT_FRAGMENT,
    FF_DRAINING,
    FF_EOF,
    FF_FAST_DONE,
    FF_FIN_KNOWN,
    FF_FORWARD,
    FF_FOUND,
    FF_FROM_GUEST,
    FF_HEARD,
    FF_HELD,
    FF_HURRY,
    FF_MORE,
    FF_NO_GSO,
    FF_PEER_FIN,
    FF_RESET_DUE,
    FF_RING_WAIT,
    FF_SHARED,
    FF_SYN_DUE,
    FF_TAKES_V4,
    FF_URGENT,
    FF_V6,
    FF_WINDOW_LOW,
    FLOW_PING,
    FLOW_TCP,
    FLOW_UDP,
    FLOW_UDP_PORT,
    HEADERS,
    PARTIALS,
    PARTIAL_SIZE,
    RARE_SLOTS,
    Datagrams,
    Flow,
    FlowKind,
    Partial,
    Plane,
    RareFrame,
)
from godwit.dataplane.sys cimport (
    EPOLLET,
    EPOLLIN,
    EPOLL_CTL_ADD,
    epoll_ctl,
    epoll_event,
    errno,
    load32_acquire,
)
from godwit.dataplane.udp cimport PORT_FORWARDED, PORT_FORWARDED_AT, udp_new_forward
from godwit.dataplane.virtqueue cimport MAX_QUEUE_SIZE, Queue, queue_map

from godwit.dataplane.live import LiveFlag, LivePartial, LivePeer, LivePing, LivePort, LiveRing, LiveTcp

cdef enum:
    FLAGS = 23

# In the order of LiveFlag.
cdef uint32_t[FLAGS] KNOWN = [
    FF_V6, FF_FROM_GUEST, FF_ACK_DUE, FF_RING_WAIT, FF_MORE, FF_EOF, FF_URGENT, FF_RESET_DUE, FF_FAST_DONE, FF_SYN_DUE,
    FF_CONNECTING, FF_DRAINING, FF_FIN_KNOWN, FF_PEER_FIN, FF_HURRY, FF_WINDOW_LOW, FF_FORWARD, FF_ANY_PEER,
    FF_TAKES_V4, FF_DONT_FRAGMENT, FF_NO_GSO, FF_ANSWERED, FF_SHARED,
]
assert len(LiveFlag) == FLAGS


cdef uint32_t flags_out(Flow *f) noexcept:
    cdef uint32_t flags = 0
    cdef int i
    for i in range(FLAGS):
        if f.flags & KNOWN[i]:
            flags |= <uint32_t>1 << i
    return flags


cdef uint32_t flags_in(uint32_t flags) noexcept:
    """But for the place in the list of those that wait for receive buffers, which is taken by `settle_in`."""
    cdef uint32_t found = 0
    cdef int i
    for i in range(FLAGS):
        if flags >> i & 1 and KNOWN[i] != FF_RING_WAIT:
            found |= KNOWN[i]
    return found


cdef uint32_t between(uint64_t earlier, uint64_t later) noexcept:
    """Milliseconds, of which 32 bits have room for seven weeks; 0 where it is the other way round."""
    cdef uint64_t found = later - earlier if later > earlier else 0
    return <uint32_t>found if found < 0xFFFFFFFFU else 0xFFFFFFFFU


cdef uint32_t due(Plane *p, Flow *f) noexcept:
    """Milliseconds until the flow's deadline, at least 1; 0: it has none."""
    return 0 if f.deadline == 0 else between(p.now, f.deadline) or 1


cdef uint32_t idle(Plane *p, Flow *f) noexcept:
    return between(f.last_active, p.now)


# ---- what there is

def rings(RingEngine engine not None):
    """(LiveRing, descriptor to be kicked, to call, for errors; -1: none) of each ring."""
    cdef Queue *q
    cdef int i
    found = []
    for i in range(2):
        q = engine.queue(i)
        found.append((LiveRing(
            q.num, q.last_avail, q.used_idx, q.published, q.most, q.user_desc, q.user_avail, q.user_used,
            int(q.addr_set), int(q.started), int(q.enabled), int(q.broken), int(q.kicked)), q.kick, q.call, q.err))
    return found


def regions(EngineBase engine not None):
    """The regions of the guest's memory, as `Engine.set_memory` takes them; the descriptors stay the engine's."""
    cdef int i
    found = []
    for i in range(engine.p.mem.count):
        r = engine.p.mem.regions[i]
        found.append((r.guest_addr, r.size, r.user_addr, r.mapping_size - r.size, r.fd))
    return found


def is_logged(EngineBase engine not None):
    """Whether what is written is marked in a dirty log: the guest is about to be migrated."""
    return bool(engine.p.mem.log_all and engine.p.mem.log != NULL)


def is_held(EngineBase engine not None):
    """Whether a flow stands still for want of something that only this process knows of."""
    cdef uint32_t i
    for i in range(engine.p.used_flows):
        if engine.p.flows[i].kind == FLOW_TCP and engine.p.flows[i].flags & (FF_HELD | FF_FOUND):
            return True
    return False


def tcp(EngineBase engine not None):
    """(LiveTcp, socket or -1, bytes carried for the guest, and for the socket) of each TCP flow."""
    cdef Plane *p = engine.p
    cdef Flow *f
    cdef uint32_t i
    found = []
    p.now = clock_ms(p)
    for i in range(p.used_flows):
        f = &p.flows[i]
        if f.kind == FLOW_TCP:
            found.append((LiveTcp(
                flags_out(f), f.events, f.guest_addr[:16], f.our_addr[:16], f.remote_addr[:16], f.local_addr[:16],
                f.guest_port, f.our_port, f.remote_port, f.local_port,
                f.seq_to_guest, f.seq_max_to_guest, f.seq_ack_from_guest, f.seq_from_guest, f.seq_ack_to_guest,
                f.seq_init_from_guest, f.seq_fin, f.acked, f.window, f.edge, f.granted, f.mss, f.wnd_sent,
                f.ws_from_guest, f.ws_to_guest, f.retries, f.dup_acks, due(p, f), idle(p, f),
                f.bytes_from_guest, f.bytes_to_guest,
            ), f.sock, carry_bytes(f.carry_to_guest), carry_bytes(f.carry_to_sock)))
    return found


def ports(EngineBase engine not None):
    """(index, LivePort, socket) of each UDP port; `Engine.udp_waiting` has what of theirs is in hand."""
    cdef Plane *p = engine.p
    cdef Flow *f
    cdef uint32_t i
    found = []
    for i in range(p.used_flows):
        f = &p.flows[i]
        if f.kind == FLOW_UDP_PORT and f.sock >= 0:
            found.append((i, LivePort(
                flags_out(f), f.our_port, f.guest_addr[:16], f.guest_port, f.ttl, f.tos), f.sock))
    return found


def peers(EngineBase engine not None):
    """(index of the port, LivePeer) of each UDP peer."""
    cdef Plane *p = engine.p
    cdef Flow *f
    cdef uint32_t i
    found = []
    p.now = clock_ms(p)
    for i in range(p.used_flows):
        f = &p.flows[i]
        if f.kind == FLOW_UDP:
            found.append((f.port, LivePeer(
                flags_out(f), f.guest_addr[:16], f.our_addr[:16], f.remote_addr[:16], f.local_addr[:16],
                f.our_port, f.remote_port, f.scope, due(p, f), idle(p, f))))
    return found


def pings(EngineBase engine not None):
    """(LivePing, socket) of each exchange of pings."""
    cdef Plane *p = engine.p
    cdef Flow *f
    cdef uint32_t i
    found = []
    p.now = clock_ms(p)
    for i in range(p.used_flows):
        f = &p.flows[i]
        if f.kind == FLOW_PING and f.sock >= 0:
            found.append((LivePing(
                flags_out(f), f.guest_addr[:16], f.our_addr[:16], f.remote_addr[:16], f.guest_port, f.ping_seq, f.ttl,
                due(p, f), idle(p, f)), f.sock))
    return found


def partials(EngineBase engine not None):
    """The LivePartial of each datagram of which the guest has sent a part."""
    cdef Partial *part
    cdef int i
    found = []
    engine.p.now = clock_ms(engine.p)
    for i in range(PARTIALS):
        part = &engine.p.fragments.partials[i]
        if part.used:
            found.append(LivePartial(
                int(part.v6), part.proto, part.ident, part.saddr[:16], part.daddr[:16],
                between(part.since, engine.p.now), part.size, part.have, part.end,
                part.header[:part.header_size], (<uint8_t *>part.map)[:sizeof(part.map)], part.data[:part.end]))
    return found


def frames(EngineBase engine not None):
    """The frames that were injected and have not gone to the guest yet. They stay."""
    cdef uint32_t tail = engine.p.down.tail
    cdef RareFrame *slot
    found = []
    while tail != load32_acquire(&engine.p.down.head):
        slot = &engine.p.down.frames[tail % RARE_SLOTS]
        found.append(slot.data[:slot.size])
        tail += 1
    return found


def hash_key(EngineBase engine not None):
    """16 bytes that the sequence numbers of new connections come from (RFC 6528)."""
    return (<uint8_t *>engine.p.hash_key)[:16]


def flush_capture(EngineBase engine not None):
    """Write what the capture has gathered: another one may write to the same file from now on."""
    if engine.p.pcap.fd >= 0:
        pcap_flush(engine.p)


# ---- taking it over

def set_hash_key(EngineBase engine not None, bytes key):
    """Before there is any flow."""
    if engine.p.used_flows:
        raise ValueError("there are flows already, whose numbers come from another key")
    copy_bytes(<uint8_t *>engine.p.hash_key, key, 16, "hash key")


cdef set_datagrams(Datagrams *d, str kind, counters):
    d.from_guest = counters.get(f"{kind}_from_guest", 0)
    d.to_guest = counters.get(f"{kind}_to_guest", 0)
    d.bytes_from_guest = counters.get(f"{kind}_bytes_from_guest", 0)
    d.bytes_to_guest = counters.get(f"{kind}_bytes_to_guest", 0)


def set_counters(EngineBase engine not None, counters):
    """Go on counting from what `Engine.counters` gave; what is not known here is left out."""
    from godwit.dataplane._base import DROP_NAMES
    cdef int i
    c = &engine.p.counters
    c.frames_from_guest = counters.get("frames_from_guest", 0)
    c.frames_to_guest = counters.get("frames_to_guest", 0)
    c.bytes_from_guest = counters.get("bytes_from_guest", 0)
    c.bytes_to_guest = counters.get("bytes_to_guest", 0)
    c.retransmits = counters.get("retransmits", 0)
    c.flows_recycled = counters.get("flows_recycled", 0)
    c.opened[<int>FLOW_TCP] = counters.get("opened_tcp", 0)
    c.opened[<int>FLOW_UDP] = counters.get("opened_udp", 0)
    c.opened[<int>FLOW_PING] = counters.get("opened_ping", 0)
    c.flows_reset = counters.get("flows_reset", 0)
    set_datagrams(&c.udp, "udp", counters)
    set_datagrams(&c.ping, "ping", counters)
    for i in range(<int>DROPS):
        c.drops[i] = counters.get(f"drops.{DROP_NAMES[i]}", 0)


def set_ring(RingEngine engine not None, int index, ring, int kick, int call, int err):
    """A ring as another data plane had it; memory and features are there. The descriptors are the engine's then."""
    cdef Queue *q = engine.queue(index)
    cdef epoll_event ev
    if q.kick >= 0 or q.call >= 0 or q.err >= 0:
        raise ValueError(f"ring {index} is in use")
    q.kick, q.call, q.err = kick, call, err
    if ring.num > MAX_QUEUE_SIZE or ring.num & (ring.num - 1):
        raise ValueError(f"ring {index}: a size of {ring.num} is not a power of two up to {MAX_QUEUE_SIZE}")
    q.num = ring.num
    q.last_avail = ring.last_avail
    q.most = ring.most
    q.user_desc = ring.descriptor
    q.user_avail = ring.available
    q.user_used = ring.used_ring
    q.addr_set = ring.has_addr
    q.kicked = ring.kicked
    q.broken = ring.broken
    q.enabled = ring.enabled
    q.used_idx = ring.used
    q.published = ring.shown
    # A front-end may have taken the memory away from under a ring.
    if q.addr_set and queue_map(q, &engine.p.mem) != 0 and ring.started and not ring.broken:
        raise ValueError(f"ring {index} does not lie in the memory that is shared")
    if not ring.started:
        return
    if kick < 0 or (q.used == NULL and not ring.broken):
        raise ValueError(f"ring {index} is started without a kick descriptor, or nowhere in memory")
    ev.events = EPOLLIN | EPOLLET
    ev.data.u64 = watch_data(WATCH_KICK, 0, index)
    check(-errno if epoll_ctl(engine.p.epfd, EPOLL_CTL_ADD, kick, &ev) != 0 else 0,
          f"ring {index}: the kick descriptor")
    q.started = True


cdef Flow *new_flow(EngineBase engine, FlowKind kind, bytes guest_addr, uint16_t guest_port, bytes our_addr,
                    uint16_t our_port) except NULL:
    """Beyond the limit of sockets, too: they are open already."""
    cdef Flow *f
    if len(guest_addr) != 16 or len(our_addr) != 16:
        raise ValueError("an address must be 16 bytes")
    if flow_find(engine.p, kind, guest_addr, guest_port, our_addr, our_port) != NULL:
        raise ValueError("two flows between the same ends")
    engine.p.now = clock_ms(engine.p)
    f = flow_new_beyond(engine.p, kind, guest_addr, guest_port, our_addr, our_port)
    if f == NULL:
        raise ValueError("the flow table is full")
    engine.p.counters.opened[<int>kind] -= 1     # it was counted when it was
    return f


cdef settle_in(EngineBase engine, Flow *f, uint32_t flags, uint32_t due, uint32_t idle):
    """Times, the place in the queue for receive buffers, and the watch on the socket."""
    cdef Plane *p = engine.p
    f.last_active = p.now - idle if p.now > idle else 0
    if due:
        flow_deadline(p, f, p.now + due)
    if f.sock >= 0:
        check(flow_watch(p, f), "socket of a flow")
    if flags & LiveFlag.RING_WAIT:
        flow_wait_ring(p, f)


def add_tcp(EngineBase engine not None, flow, int fd, bytes to_guest, bytes to_sock):
    """A TCP flow with its socket, which is the engine's then (-1: none, it was reset)."""
    cdef Flow *f = new_flow(engine, FLOW_TCP, flow.guest_addr, flow.guest_port, flow.our_addr, flow.our_port)
    f.sock = fd
    f.flags = flags_in(flow.flags)
    f.events = flow.events
    copy_bytes(f.remote_addr, flow.remote_addr, 16, "address")
    copy_bytes(f.local_addr, flow.local_addr, 16, "address")
    f.remote_port = flow.remote_port
    f.local_port = flow.local_port
    f.seq_to_guest = flow.seq_to_guest
    f.seq_max_to_guest = flow.seq_max_to_guest
    f.seq_ack_from_guest = flow.seq_ack_from_guest
    f.seq_from_guest = flow.seq_from_guest
    f.seq_ack_to_guest = flow.seq_ack_to_guest
    f.seq_init_from_guest = flow.seq_init_from_guest
    f.seq_fin = flow.seq_fin
    f.acked = flow.acked
    f.window = flow.window
    f.edge = flow.edge
    f.granted = flow.granted
    f.mss = flow.mss
    f.wnd_sent = flow.wnd_sent
    f.ws_from_guest = flow.ws_from_guest
    f.ws_to_guest = flow.ws_to_guest
    f.retries = flow.retries
    f.dup_acks = flow.dup_acks
    f.bytes_from_guest = flow.bytes_from_guest
    f.bytes_to_guest = flow.bytes_to_guest
    if to_guest:
        f.carry_to_guest = carry_new(to_guest, <uint32_t>len(to_guest))
    if to_sock:
        f.carry_to_sock = carry_new(to_sock, <uint32_t>len(to_sock))
    if (to_guest and f.carry_to_guest == NULL) or (to_sock and f.carry_to_sock == NULL):
        raise MemoryError
    settle_in(engine, f, flow.flags, flow.due, flow.idle)
    if f.flags & FF_CONNECTING:
        age_in(engine.p, f)
    if f.flags & FF_RESET_DUE:
        flow_wait_ring(engine.p, f)
    elif f.events & EV_ESTABLISHED:
        flow_touch(engine.p, f)


def add_port(EngineBase engine not None, port, int fd, datagrams):
    """A UDP port with its socket, which is the engine's then, and what of it waits for the guest. Returns its index."""
    cdef Flow *f
    cdef bint forwarded = port.flags & LiveFlag.FORWARD
    cdef bytes data
    if (port.kind == PORT_FORWARDED or port.kind == PORT_FORWARDED_AT) != forwarded:
        raise ValueError("a UDP port that is forwarded and is not")
    if forwarded:
        f = new_forward(engine, port.guest_addr, port.guest_port, port.kind)
    else:
        f = new_flow(engine, FLOW_UDP_PORT, port.guest_addr, port.guest_port, bytes(16), port.kind)
    f.sock = fd
    f.flags = flags_in(port.flags)
    f.ttl = port.ttl
    f.tos = port.tos
    data = carried_from(datagrams)
    if data:
        f.carry_to_guest = carry_new(data, <uint32_t>len(data))
        if f.carry_to_guest == NULL:
            raise MemoryError
    settle_in(engine, f, port.flags, 0, 0)
    if data:
        flow_wait_ring(engine.p, f)
    return flow_index(engine.p, f)


cdef Flow *new_forward(EngineBase engine, bytes guest_addr, uint16_t guest_port, uint16_t kind) except NULL:
    cdef Flow *f
    cdef uint8_t addr[16]
    cdef bytes nobody = bytes(16)
    copy_bytes(addr, guest_addr, 16, "address")
    # On single addresses of the host's there are several.
    if kind == PORT_FORWARDED and flow_find(engine.p, FLOW_UDP_PORT, addr, guest_port, nobody, kind) != NULL:
        raise ValueError("two flows between the same ends")
    f = udp_new_forward(engine.p, addr, guest_port, kind)
    if f == NULL:
        raise ValueError("the flow table is full")
    if any(guest_addr):
        engine._note_target(guest_addr)
    return f


def add_peer(EngineBase engine not None, uint32_t index, peer):
    """Somebody with whom the guest exchanges datagrams through the port of that index."""
    cdef Plane *p = engine.p
    cdef Flow *port
    cdef Flow *f
    if index >= p.used_flows or p.flows[index].kind != FLOW_UDP_PORT:
        raise ValueError(f"no UDP port {index}")
    port = &p.flows[index]
    f = new_flow(engine, FLOW_UDP, peer.guest_addr, port.guest_port, peer.our_addr, peer.our_port)
    # What flow_close() counts on comes first.
    f.port = index
    port.peers += 1
    copy_bytes(f.remote_addr, peer.remote_addr, 16, "address")
    f.remote_port = peer.remote_port
    peer_in(p, f)
    copy_bytes(f.local_addr, peer.local_addr, 16, "address")
    f.flags |= flags_in(peer.flags) | FF_HEARD  # which is not told: what is there shall go on
    f.scope = peer.scope
    age_in(p, f)
    settle_in(engine, f, 0, peer.due, peer.idle)


def add_ping(EngineBase engine not None, ping, int fd):
    """An exchange of pings with its socket, which is the engine's then."""
    cdef Flow *f = new_flow(engine, FLOW_PING, ping.guest_addr, ping.ident, ping.our_addr, 0)
    f.sock = fd
    f.flags = flags_in(ping.flags) | FF_ANSWERED | FF_HEARD
    age_in(engine.p, f)
    copy_bytes(f.remote_addr, ping.remote_addr, 16, "address")
    f.ping_seq = ping.sequence
    f.ttl = ping.ttl
    settle_in(engine, f, ping.flags, ping.due, ping.idle)


def add_partial(EngineBase engine not None, int place, partial):
    """A datagram of which the guest has sent a part."""
    cdef Partial *part
    cdef bytes units = partial.units
    if not 0 <= place < PARTIALS:
        raise ValueError(f"there is no place {place} for what is put together")
    part = &engine.p.fragments.partials[place]
    if len(partial.data) != partial.end or partial.end > PARTIAL_SIZE or len(partial.header) >= HEADERS:
        raise ValueError("a datagram in fragments that is longer than it can be")
    if partial.size and partial.end > partial.size or partial.have > partial.end or len(units) != sizeof(part.map):
        raise ValueError("a datagram in fragments whose parts do not fit")
    engine.p.now = clock_ms(engine.p)
    part.v6 = partial.v6
    part.proto = partial.proto
    part.ident = partial.ident
    copy_bytes(part.saddr, partial.source, 16, "address")
    copy_bytes(part.daddr, partial.destination, 16, "address")
    part.since = engine.p.now - partial.age if engine.p.now > partial.age else 0
    part.size = partial.size
    part.have = partial.have
    part.end = partial.end
    part.header_size = <uint32_t>len(partial.header)
    memcpy(part.header, <const uint8_t *>(<bytes>partial.header), part.header_size)
    memcpy(part.map, <const uint8_t *>units, sizeof(part.map))
    memcpy(part.data, <const uint8_t *>(<bytes>partial.data), part.end)
    part.used = True


def look_at_once(EngineBase engine not None):
    """Have the first turn look at the rings, whoever has kicked whom: what was left for the next turn is done then."""
    engine.p.again = True
