# SPDX-License-Identifier: GPL-2.0-or-later
"""The flow table for people and monitoring: read in parts, so that the guest's network hardly stands still for it.

Each part is an errand of the data plane's thread (``loop.pyx``): it copies a few dozen flows, asks the kernel for what
is in their sockets' queues, and goes on; Python's objects are made from the copies. Between two parts flows come and go:
one that is there all the time is listed once, of others some are.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from godwit.dataplane._base cimport EngineBase
from godwit.dataplane.host cimport get_sockaddr
from godwit.dataplane.loop cimport clock_ms, clock_ns, loop_wake
from godwit.dataplane.plane cimport (
    EV_ESTABLISHED,
    EV_FIN_FROM_GUEST,
    EV_FIN_FROM_SOCK,
    FF_ANSWERED,
    FF_DRAINING,
    FF_FROM_GUEST,
    FF_HELD,
    FF_PEER_FIN,
    FF_RESET_DUE,
    FLOW_PING,
    FLOW_TCP,
    FLOW_UDP,
    Flow,
    Plane,
)
from godwit.dataplane.sys cimport (
    SIOCINQ,
    SIOCOUTQ,
    getsockname,
    ioctl,
    sem_wait,
    sockaddr,
    sockaddr_storage,
    socklen_t,
)
from godwit.dataplane.virtqueue cimport QUEUES

from godwit.dataplane.state import Listed

cdef enum:
    PART = 64           # flows that are copied by one errand
    SCANNED = 2048      # and places in the table that are looked at for them

cdef enum State:
    CONNECTING          # its handshake is not over
    ESTABLISHED
    CLOSED_BY_GUEST
    CLOSED_BY_PEER
    CLOSED_BY_BOTH
    DRAINING            # and the kernel has still to send
    HELD                # it stands still, until a repair helper comes or its address, or for a migration
    RESET               # and the guest is to hear of it
    ANSWERED            # by the guest
    UNANSWERED
    NO_STATE

STATES = (
    "connecting", "established", "closed by guest", "closed by peer", "closed", "draining", "held", "reset",
    "answered", "unanswered", "-",
)

cdef struct Row:
    uint8_t kind
    State state
    bint from_guest
    uint8_t guest_addr[16]
    uint8_t our_addr[16]
    uint8_t remote_addr[16]
    uint8_t local_addr[16]
    uint16_t guest_port
    uint16_t our_port
    uint16_t remote_port
    uint16_t local_port
    uint64_t bytes_from_guest
    uint64_t bytes_to_guest
    uint64_t idle
    uint32_t in_flight
    int unsent
    int unread


cdef State tcp_state(Flow *f) noexcept nogil:
    cdef bint guest = f.events & EV_FIN_FROM_GUEST != 0
    cdef bint peer = f.events & EV_FIN_FROM_SOCK != 0 or f.flags & FF_PEER_FIN != 0
    if f.flags & FF_RESET_DUE:
        return RESET
    if f.flags & FF_HELD:
        return HELD
    if not f.events & EV_ESTABLISHED:
        return CONNECTING
    if f.flags & FF_DRAINING:
        return DRAINING
    if guest:
        return CLOSED_BY_BOTH if peer else CLOSED_BY_GUEST
    return CLOSED_BY_PEER if peer else ESTABLISHED


cdef void ask_socket(Flow *f, Row *r) noexcept nogil:
    """What the kernel knows of a TCP flow."""
    cdef sockaddr_storage addr
    cdef socklen_t n = sizeof(addr)
    r.unsent = r.unread = -1
    if f.sock < 0:
        return
    if ioctl(f.sock, SIOCOUTQ, &r.unsent) != 0:
        r.unsent = -1
    if ioctl(f.sock, SIOCINQ, &r.unread) != 0:
        r.unread = -1
    elif r.unread >= 0:
        # What the guest has acknowledged is taken out of the queue a little later.
        r.unread = r.unread - <int>f.acked if <uint32_t>r.unread > f.acked else 0
    if f.local_port == 0 and getsockname(f.sock, <sockaddr *>&addr, &n) == 0:
        get_sockaddr(<sockaddr *>&addr, r.local_addr, &r.local_port)


cdef void copy(Flow *f, uint64_t now, Row *r) noexcept nogil:
    memset(r, 0, sizeof(Row))
    r.kind = f.kind
    r.from_guest = f.flags & FF_FROM_GUEST != 0
    memcpy(r.guest_addr, f.guest_addr, 16)
    memcpy(r.our_addr, f.our_addr, 16)
    memcpy(r.remote_addr, f.remote_addr, 16)
    memcpy(r.local_addr, f.local_addr, 16)
    r.guest_port = f.guest_port
    r.our_port = f.our_port
    r.remote_port = f.remote_port
    r.local_port = f.local_port
    r.bytes_from_guest = f.bytes_from_guest
    r.bytes_to_guest = f.bytes_to_guest
    r.idle = now - f.last_active if now > f.last_active else 0
    if f.kind == FLOW_TCP:
        r.in_flight = f.seq_to_guest - f.seq_ack_from_guest
        r.state = tcp_state(f)
        ask_socket(f, r)
    elif f.kind == FLOW_UDP:
        r.state = ANSWERED if f.flags & FF_ANSWERED else UNANSWERED
    else:
        r.state = NO_STATE


# A part of the table. Flows of these kinds (bits by FlowKind) from a place on; where the next part begins, if there is one.
cdef struct Errand:
    Plane *p
    uint32_t first
    uint32_t kinds
    uint32_t following
    bint over
    uint64_t took           # ns
    int count
    Row rows[PART]


cdef void copy_part(void *at) noexcept nogil:
    cdef Errand *e = <Errand *>at
    cdef Plane *p = e.p
    cdef uint64_t since = clock_ns(), now = clock_ms(p)
    cdef uint32_t i = e.first, end = p.used_flows
    if i < end and end - i > SCANNED:
        end = i + SCANNED
    while i < end and e.count < PART:
        if e.kinds >> p.flows[i].kind & 1:
            copy(&p.flows[i], now, &e.rows[e.count])
            e.count += 1
        i += 1
    e.following = i
    e.over = i >= p.used_flows
    e.took = clock_ns() - since


def part(EngineBase engine not None, uint32_t first, bint tcp=True, bint udp=True, bint ping=True):
    """(a list of `Listed`, where the next part begins, None at the end, seconds that the thread took for it).

    The first one begins at 0.
    """
    cdef Errand e
    cdef int i
    cdef bint asks
    cdef Plane *p = engine.p
    cdef Row *r
    e.p = p
    e.first = first
    e.kinds = (tcp << <int>FLOW_TCP) | (udp << <int>FLOW_UDP) | (ping << <int>FLOW_PING)
    e.count = 0
    with engine.lock:   # nobody else parks the thread, or lets it go
        asks = engine.parks == 0 and runs(engine)
        if asks:
            p.errand_for = &e
            p.errand = copy_part
            loop_wake(p)
        with nogil:
            if asks:
                while sem_wait(&p.parked) != 0:
                    pass
            else:
                copy_part(&e)
    found = []
    for i in range(e.count):
        r = &e.rows[i]
        found.append(Listed(
            "tcp" if r.kind == FLOW_TCP else "udp" if r.kind == FLOW_UDP else "ping", STATES[<int>r.state],
            bool(r.from_guest), r.guest_addr[:16], r.guest_port, r.our_addr[:16], r.our_port, r.remote_addr[:16],
            r.remote_port, r.local_addr[:16], r.local_port, r.bytes_from_guest, r.bytes_to_guest, r.idle, r.in_flight,
            r.unsent, r.unread,
        ))
    return found, None if e.over else e.following, e.took / 1e9


def gauges(EngineBase engine not None):
    """Numbers that go up and down, by name; the thread is not parked for them."""
    cdef Plane *p = engine.p
    cdef uint32_t flows = p.open_flows, udp = p.open_peers, pings = p.open_pings
    return {
        # They may change between two looks: then it is one too many or too few, but never less than none.
        "flows_tcp": flows - udp - pings if flows > udp + pings else 0,
        "flows_udp": udp,
        "flows_ping": pings,
        "flow_places": p.max_flows,
        "flow_sockets": p.open_sockets,
        "flow_sockets_limit": p.flow_limit,
        "tcp_forwards": p.listener_count,
        "udp_forwards": p.forwards,
    }


def rare_frames(EngineBase engine not None):
    """(frames of the guest's that went to the control thread, frames from there), since the start, modulo 2^32."""
    return engine.p.up.head, engine.p.down.head


def features(EngineBase engine not None):
    """The features that the front-end has acknowledged; 0 without one."""
    return engine.p.features


def rings(EngineBase engine not None):
    """(entries, started, enabled, broken) of each ring; the thread is not parked."""
    cdef int i
    return [
        (engine.p.queues[i].num, bool(engine.p.queues[i].started), bool(engine.p.queues[i].enabled),
         bool(engine.p.queues[i].broken)) for i in range(QUEUES)
    ]


def runs(EngineBase engine not None):
    """Whether the data plane's thread has not ended."""
    return engine.thread is not None and engine.thread.is_alive()
