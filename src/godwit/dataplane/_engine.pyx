# SPDX-License-Identifier: GPL-2.0-or-later
"""The flows as the control thread sees them, and how they move from one data plane to another."""

import os

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from godwit.dataplane._base cimport carried_from, check, copy_bytes
from godwit.dataplane._rings cimport RingEngine
from godwit.dataplane.flow cimport (
    carry_free,
    carry_new,
    flow_close,
    flow_find,
    flow_index,
    flow_new,
    flow_used,
    flow_wait_ring,
    flow_watch,
)
from godwit.dataplane.host cimport get_sockaddr, is_link_local6, is_loopback, is_unspecified, is_v4, to_host
from godwit.dataplane.icmp cimport PING_TIMEOUT, ping_open
from godwit.dataplane.layouts cimport Moved
from godwit.dataplane.loop cimport clock_ms
from godwit.dataplane.moving cimport moved_out
from godwit.dataplane.plane cimport (
    EV_ESTABLISHED,
    FF_ANSWERED,
    FF_ANY_PEER,
    FF_CONNECTING,
    FF_DRAINING,
    FF_FORWARD,
    FF_FOUND,
    FF_FROM_GUEST,
    FF_HEARD,
    FF_HELD,
    FF_HURRY,
    FF_RESET_DUE,
    FF_TAKES_V4,
    FF_V6,
    FLOW_PING,
    FLOW_TCP,
    FLOW_UDP,
    FLOW_UDP_PORT,
    NONE,
    PARTIALS,
    UDP_SLOT,
    Carry,
    Flow,
    UdpIn,
)
from godwit.dataplane.sockstate cimport sock_is_connecting
from godwit.dataplane.sys cimport (
    EPOLL_CTL_DEL,
    epoll_ctl,
    errno,
    getsockname,
    sockaddr,
    sockaddr_storage,
    socklen_t,
)
from godwit.dataplane.tcp cimport tcp_abort, tcp_drop_socket, tcp_hurry, tcp_reset, tcp_resume
from godwit.dataplane.tcp_open cimport tcp_accept, tcp_open_anew, tcp_refuse_waiting
from godwit.dataplane.udp cimport PORT_LOOPBACK, PORT_OWN, udp_add_peer, udp_prepare, udp_used
from godwit.dataplane.udp_to_guest cimport Carried, Seen, look_at_control, udp_drain, udp_take_waiting

from godwit.dataplane.state import Datagram, FlowState, Ping, Side, UdpPeer, UdpPort

cdef enum:
    PIF_HOST = 1
    PIF_GUEST = 2
    MOST_DATA4 = 65507  # bytes of a datagram's data (RFC 768, and the 16 bits of RFC 791's total length)
    MOST_DATA6 = 65527


cdef class Engine(RingEngine):
    """One guest's data plane: memory, two virtqueues, flows, one thread."""

    # ---- flows that move. The thread is parked by the caller during all of this.

    cdef Flow *flow(self, uint32_t index) except NULL:
        if index >= self.p.used_flows or self.p.flows[index].kind != FLOW_TCP:
            raise ValueError(f"no TCP flow {index}")
        return &self.p.flows[index]

    def tcp_flows(self, bint handshakes=False):
        """The TCP flows that are established on the guest's side, their indices; with ``handshakes`` all others, too.

        Also those without a socket: that were reset, and of which the guest has not heard yet, or that are held until
        they can have one.
        """
        cdef uint32_t i
        cdef Flow *f
        found = []
        for i in range(self.p.used_flows):
            f = &self.p.flows[i]
            if (f.kind == FLOW_TCP and (handshakes or f.events & EV_ESTABLISHED)
                    and (f.sock >= 0 or f.flags & (FF_RESET_DUE | FF_HELD))):
                found.append(i)
        return found

    def accept_waiting(self):
        """Accept what waits at the listening sockets; as flows, these can move."""
        cdef int j
        self.p.now = clock_ms(self.p)
        for j in range(self.p.listener_count):
            while self.p.listeners[j].fd >= 0 and tcp_accept(self.p, &self.p.listeners[j]):
                pass

    def has_found(self):
        """Whether there is something for take_found()."""
        return bool(self.p.found)

    def take_found(self):
        """The TCP flows that were found in repair mode and are held since, their indices. Each is told once."""
        cdef uint32_t i
        found = []
        with self.parked():
            self.p.found = False
            for i in range(self.p.used_flows):
                if self.p.flows[i].kind == FLOW_TCP and self.p.flows[i].flags & FF_FOUND:
                    self.p.flows[i].flags &= ~FF_FOUND
                    found.append(i)
        return found

    def hold_flow(self, uint32_t index):
        """Have nothing of a flow move until resume_flow(), also when the thread goes on."""
        self.flow(index).flags |= FF_HELD

    def flow_socket(self, uint32_t index):
        """(descriptor or -1, whether it is an IPv6 socket) of a TCP flow."""
        cdef Flow *f = self.flow(index)
        return f.sock, not is_v4(f.remote_addr)

    def flow_is_connecting(self, uint32_t index):
        """Whether the guest has opened a TCP flow, and nothing is known of an answer from its peer."""
        cdef Flow *f = self.flow(index)
        return f.flags & FF_CONNECTING != 0 and sock_is_connecting(f.sock)

    def flow_is_local(self, uint32_t index):
        """Whether the peer of a TCP flow is this host itself, on its loopback."""
        return is_loopback(self.flow(index).remote_addr)

    def flow_generation(self, uint32_t index):
        """With the index, the name of a flow for as long as the engine lives; None: there is no such TCP flow."""
        if index >= self.p.used_flows or self.p.flows[index].kind != FLOW_TCP:
            return None
        return self.p.flows[index].generation

    def flow_state(self, uint32_t index):
        """The FlowState of a TCP flow, to be written into a stream."""
        cdef Moved m
        moved_out(self.p, self.flow(index), &m)
        guest = Side(m.guest_our.addr[:16], m.guest_end.addr[:16], m.guest_our.port, m.guest_end.port)
        host = Side(m.host_our.addr[:16], m.host_end.addr[:16], m.host_our.port, m.host_end.port)
        return FlowState(
            (PIF_GUEST, PIF_HOST) if m.from_guest else (PIF_HOST, PIF_GUEST),
            (guest, host) if m.from_guest else (host, guest),
            m.retries, m.ws_from_guest, m.ws_to_guest, m.events, m.mss, 0, 0, 0, m.wnd_from_guest, m.wnd_to_guest,
            m.seq_to_guest, m.ack_from_guest, m.seq_from_guest, m.ack_to_guest, m.init_from_guest,
            m.bytes_from_guest, m.bytes_to_guest, m.idle,
        )

    def drop_flow_socket(self, uint32_t index):
        """Close a flow's socket without a word to the guest. The peer is reset, unless it is in repair mode."""
        tcp_drop_socket(self.flow(index))

    def release_flow(self, uint32_t index):
        """Forget a flow, without a word to anyone. Returns its socket, which is the caller's now."""
        cdef Flow *f = self.flow(index)
        cdef int fd = f.sock
        if fd >= 0:
            # Closing a descriptor would end this only if it were the last one of the socket.
            epoll_ctl(self.p.epfd, EPOLL_CTL_DEL, fd, NULL)
            f.sock = -1
        flow_close(self.p, f)
        return fd

    # ---- UDP that moves; the thread is parked here, too

    cdef Flow *udp_port(self, uint32_t index) except NULL:
        if index >= self.p.used_flows or self.p.flows[index].kind != FLOW_UDP_PORT:
            raise ValueError(f"no UDP port {index}")
        return &self.p.flows[index]

    def udp_ports(self):
        """The guest's UDP ports that can move, their indices: all but those that lead to this host's loopback."""
        cdef uint32_t i
        return [
            i for i in range(self.p.used_flows)
            if self.p.flows[i].kind == FLOW_UDP_PORT and self.p.flows[i].sock >= 0
            and self.p.flows[i].our_port != PORT_LOOPBACK
        ]

    def udp_port_state(self, uint32_t index):
        """The UdpPort of one, to be written into a stream."""
        cdef Flow *f = self.udp_port(index)
        cdef sockaddr_storage addr
        cdef socklen_t n = sizeof(addr)
        cdef uint8_t bound[16]
        cdef uint16_t port
        check(-errno if getsockname(f.sock, <sockaddr *>&addr, &n) != 0 else 0, "UDP socket")
        get_sockaddr(<sockaddr *>&addr, bound, &port)
        return UdpPort(f.our_port, f.guest_addr[:16], f.guest_port, bound[:16], port, int(f.flags & FF_ANY_PEER != 0))

    def udp_peers(self):
        """(index of the port, UdpPeer) for each that the guest exchanges datagrams with."""
        cdef uint32_t i
        cdef Flow *f
        found = []
        for i in range(self.p.used_flows):
            f = &self.p.flows[i]
            if f.kind == FLOW_UDP and not is_loopback(f.remote_addr):
                found.append((f.port, UdpPeer(
                    f.guest_addr[:16], f.our_addr[:16], f.remote_addr[:16], f.local_addr[:16], f.remote_port,
                    int(f.flags & FF_FROM_GUEST != 0), int(f.flags & FF_ANSWERED != 0),
                )))
        return found

    def udp_waiting(self, uint32_t index):
        """The Datagrams of a port that are no more, or not yet, in its socket, and not with the guest."""
        cdef Flow *f = self.udp_port(index)
        cdef UdpIn *u = &self.p.udp_in
        cdef uint32_t at, total, each
        cdef uint8_t remote[16]
        cdef uint16_t port
        cdef int i
        cdef Seen seen
        cdef bytes local
        found = []
        if u.port == index and u.generation == f.generation:
            for i in range(u.next, u.count):
                look_at_control(&u.msgs[i].msg_hdr, &seen)
                get_sockaddr(<sockaddr *>&u.names[i], remote, &port)
                local = seen.local_addr[:16]
                total = u.msgs[i].msg_len
                each = seen.segment if 0 < seen.segment < total else total
                at = u.at if i == u.next else 0
                found += datagrams_apart(remote[:16], local, port, each, (u.data + i * UDP_SLOT)[at:total])
        if f.carry_to_guest != NULL:
            found += carried_datagrams(f.carry_to_guest, f.carry_to_guest.at)
        return found

    def take_datagrams(self, uint32_t index, uint64_t most, uint32_t cost):
        """(the Datagrams that wait in a port's socket, whether these are all).

        They are no longer in the socket, and still for the guest: should it go
        on here, it gets them before all that comes to the socket from now on.
        Up to ``most`` bytes are taken, of which each datagram is to take ``cost``
        besides its data; what is beyond that, or beyond the memory that there
        is, stays in the socket.
        """
        cdef Flow *f = self.udp_port(index)
        cdef uint32_t before = 0 if f.carry_to_guest == NULL else f.carry_to_guest.size
        cdef bint empty
        with nogil:
            empty = udp_take_waiting(f, most, cost)
        if f.carry_to_guest == NULL:
            return [], empty
        flow_wait_ring(self.p, f)
        return carried_datagrams(f.carry_to_guest, before), empty

    def find_udp_port(self, state):
        """The index of the port of that kind, forwarded here too, or None.

        Of several, each on an address of its own, the one on the same address, else one of the same family.
        """
        cdef bytes guest_addr = state.guest_addr, bound = state.local_addr
        cdef bytes nobody = bytes(16)
        cdef uint16_t guest_port = state.guest_port, kind = state.kind
        cdef Flow *f = flow_find(self.p, FLOW_UDP_PORT, guest_addr, guest_port, nobody, kind)
        cdef uint32_t i
        cdef int fits, best = -1
        found = None
        while f != NULL:
            i = flow_index(self.p, f)
            if f.kind == FLOW_UDP_PORT and f.guest_port == guest_port and f.our_port == kind \
                    and f.guest_addr[:16] == guest_addr:
                fits = 2 if self.udp_port_state(i).local_addr == bound else udp_takes(f, bound)
                if fits > best:
                    best, found = fits, i
            f = NULL if f.hash_next == 0 else &self.p.flows[f.hash_next - 1]
        return found

    def import_udp_port(self, state, int fd):
        """A port of the guest's own, with a bound socket, which is the engine's from now on. Returns its index.

        ValueError: there is one, or the table is full; the socket stays the caller's.
        """
        cdef Flow *f
        cdef bytes guest_addr = state.guest_addr
        cdef bytes nobody = bytes(16)
        if self.find_udp_port(state) is not None:
            raise ValueError("the guest has this UDP port already")
        f = flow_new(self.p, FLOW_UDP_PORT, guest_addr, state.guest_port, nobody, PORT_OWN)
        if f == NULL:
            raise ValueError("the flow table is full")
        f.flags = FF_FROM_GUEST | (0 if is_v4(guest_addr) else FF_V6)
        if state.any_peer:
            f.flags |= FF_ANY_PEER
        f.sock = fd
        udp_prepare(fd, not is_v4(guest_addr), is_v4(guest_addr), False)
        if flow_watch(self.p, f) != 0:
            f.sock = -1
            flow_close(self.p, f)
            raise ValueError("its socket cannot be watched")
        return flow_index(self.p, f)

    def import_udp_peer(self, uint32_t index, state):
        """Somebody with whom the guest exchanged datagrams through that port.

        False: there is no place, or that is not who the guest would reach here
        by that name, with that socket. What it sends to the name next opens a
        flow as from a new guest.
        """
        cdef Flow *port = self.udp_port(index)
        cdef Flow *f
        cdef bytes guest_addr = state.guest_addr, our_addr = state.our_addr, remote_addr = state.remote_addr
        cdef uint8_t host[16]
        self.p.now = clock_ms(self.p)
        if (not to_host(self.p, our_addr, state.remote_port, host) or host[:16] != remote_addr
                or is_loopback(host) or is_unspecified(host)):
            return False
        if not udp_takes(port, host):
            return False
        if flow_find(self.p, FLOW_UDP, guest_addr, port.guest_port, our_addr, state.remote_port) != NULL:
            return False
        f = udp_add_peer(self.p, port, guest_addr, our_addr, remote_addr, state.remote_port,
                         (FF_FROM_GUEST if state.from_guest else 0) | (FF_ANSWERED if state.answered else 0))
        if f == NULL:
            return False
        copy_bytes(f.local_addr, state.local_addr, 16, "address")
        f.scope = self.p.config.ifindex if is_link_local6(f.remote_addr) else 0
        f.last_active = self.p.now
        f.flags |= FF_HEARD     # which is not told: what is there shall go on
        udp_used(self.p, f)
        return True

    def note_any_peer(self, uint32_t index):
        """The guest has asked many through that port, a forwarded one, and hears itself."""
        self.udp_port(index).flags |= FF_ANY_PEER

    def udp_outbound(self, bint v4):
        """(address, 16 bytes, unspecified: the route's; interface or "") that the guest's own ports leave through."""
        if v4:
            return self.p.config.outbound4[:16], os.fsdecode(<const char *>self.p.config.outbound_if4)
        return self.p.config.outbound6[:16], os.fsdecode(<const char *>self.p.config.outbound_if6)

    def carry_datagrams(self, uint32_t index, datagrams):
        """Datagrams for the guest that came along: they go before all that the port's socket has."""
        cdef Flow *f = self.udp_port(index)
        cdef bytes data, remote
        ours = []
        for one in datagrams:
            remote = one.remote_addr
            if is_loopback(remote) or is_unspecified(remote) or not udp_takes(f, remote):
                # An answer to another host's own loopback would go to somebody of this one's; here, none could leave.
                continue
            if (MOST_DATA4 if is_v4(remote) else MOST_DATA6) < len(one.data) <= UDP_SLOT:
                continue    # there are none such, and headers could not say their size
            ours.append(one)
        data = carried_from(ours)
        if not data or f.carry_to_guest != NULL:
            return
        f.carry_to_guest = carry_new(data, <uint32_t>len(data))
        if f.carry_to_guest == NULL:
            raise MemoryError
        flow_wait_ring(self.p, f)

    def forget_lone_udp(self, ports):
        """Of ports that were imported, take those away that nobody came along with: nothing would ever end them."""
        for i in set(ports):
            if self.udp_port(i).peers == 0 and not self.udp_port(i).flags & FF_FORWARD:
                flow_close(self.p, self.udp_port(i))

    def forget_udp(self, ports):
        """Take ports that were imported away again, and what was imported into others (their indices)."""
        cdef uint32_t i
        wanted = set(ports)
        for i in range(self.p.used_flows):
            if self.p.flows[i].kind == FLOW_UDP and self.p.flows[i].port in wanted:
                flow_close(self.p, &self.p.flows[i])
        for i in wanted:
            if self.p.flows[i].kind == FLOW_UDP_PORT:
                carry_free(self.p.flows[i].carry_to_guest)
                self.p.flows[i].carry_to_guest = NULL
                if not self.p.flows[i].flags & FF_FORWARD:
                    flow_close(self.p, &self.p.flows[i])

    def release_udp_port(self, uint32_t index):
        """Forget a port, and all that the guest had with its peers. Returns its socket, which is the caller's now."""
        cdef Flow *f = self.udp_port(index)
        cdef int fd = f.sock
        epoll_ctl(self.p.epfd, EPOLL_CTL_DEL, fd, NULL)     # as in release_flow()
        f.sock = -1
        self.forget_udp([index])
        return fd

    # ---- echoes that move; the thread is parked here, too

    def pings(self):
        """The Pings of the guest's that can move: all but those of this host's own loopback."""
        cdef uint32_t i
        cdef Flow *f
        cdef sockaddr_storage addr
        cdef socklen_t n
        cdef uint8_t bound[16]
        cdef uint16_t ident
        found = []
        for i in range(self.p.used_flows):
            f = &self.p.flows[i]
            if f.kind != FLOW_PING or is_loopback(f.remote_addr):
                continue
            n = sizeof(addr)
            if getsockname(f.sock, <sockaddr *>&addr, &n) == 0:
                get_sockaddr(<sockaddr *>&addr, bound, &ident)
                found.append(Ping(f.guest_addr[:16], f.our_addr[:16], f.guest_port, ident, f.ping_seq))
        return found

    def import_ping(self, ping):
        """Echoes that came: an answer to one that was sent before arrives here. Returns the index of the flow.

        Where the identifier is another's here, or there is no place, None: the next request opens a flow.
        """
        cdef Flow *f
        cdef bytes guest_addr = ping.guest_addr, our_addr = ping.our_addr
        if flow_find(self.p, FLOW_PING, guest_addr, ping.guest_ident, our_addr, 0) != NULL:
            return None
        self.p.now = clock_ms(self.p)
        f = ping_open(self.p, guest_addr, ping.guest_ident, our_addr, ping.host_ident)
        if f == NULL:
            return None
        f.ping_seq = ping.seq
        f.flags |= FF_HEARD
        flow_used(self.p, f, PING_TIMEOUT)
        return flow_index(self.p, f)

    def forget_pings(self, pings):
        """Take away what import_ping() has made."""
        cdef uint32_t i
        for i in pings:
            if i < self.p.used_flows and self.p.flows[i].kind == FLOW_PING:
                flow_close(self.p, &self.p.flows[i])

    def resume_flow(self, uint32_t index):
        """Go on with a flow that was held here."""
        cdef Flow *f = self.flow(index)
        self.p.now = clock_ms(self.p)
        f.flags &= ~(FF_HELD | FF_FOUND)
        # Watched anew, so that what came while it was held, and was passed over, is told again.
        epoll_ctl(self.p.epfd, EPOLL_CTL_DEL, f.sock, NULL)
        if flow_watch(self.p, f) != 0:
            tcp_reset(self.p, f)
            return
        tcp_resume(self.p, f)

    def open_flow(self, uint32_t index):
        """Have the host's side of an imported flow opened as if the guest had just asked for it."""
        self.p.now = clock_ms(self.p)
        tcp_open_anew(self.p, self.flow(index))

    def calm(self):
        """The time after a move is over: flows go back to the kernel's own retransmission timing."""
        cdef uint32_t i
        with self.parked():
            for i in range(self.p.used_flows):
                if self.p.flows[i].kind == FLOW_TCP and self.p.flows[i].flags & FF_HURRY:
                    tcp_hurry(&self.p.flows[i], False)

    def reset_flow(self, uint32_t index):
        """Reset a flow on both sides; the guest hears of it as soon as its ring has room."""
        self.p.now = clock_ms(self.p)
        tcp_reset(self.p, self.flow(index))

    def forget_flow(self, uint32_t index):
        """Close a flow without a word to anyone."""
        flow_close(self.p, self.flow(index))

    def limit_flows(self, uint32_t most):
        """Refuse new flows while they have so many sockets: each takes a descriptor."""
        with self.parked():
            self.p.flow_limit = min(most, self.p.max_flows)

    def set_limits(self, uint32_t flows, uint32_t udp_flows, uint32_t half_open):
        """How much a guest, and who calls it, may have open at a time; what moves in may be more.

        ``flows``: connections, UDP flows and pings; ``udp_flows``: of these, UDP flows and pings; ``half_open``:
        connections that the guest has asked for and that were not answered yet.
        """
        with self.parked():
            self.p.most_flows = flows
            self.p.most_udp = udp_flows
            self.p.most_half_open = half_open

    def close_flows(self):
        """Close every flow: the guest is gone. TCP peers are reset, and those that wait to be accepted; datagrams that
        wait are forgotten.

        But for connections that the guest itself has closed: their last bytes still go.
        """
        cdef uint32_t i
        cdef int j
        with self.parked():
            for j in range(self.p.listener_count):
                if self.p.listeners[j].fd >= 0:
                    tcp_refuse_waiting(&self.p.listeners[j])
            for i in range(self.p.used_flows):
                if self.p.flows[i].kind == FLOW_TCP and not self.p.flows[i].flags & FF_DRAINING:
                    tcp_abort(self.p, &self.p.flows[i])
                elif self.p.flows[i].kind == FLOW_TCP:
                    flow_close(self.p, &self.p.flows[i])    # the kernel sends what the guest has left
                elif self.p.flows[i].kind == FLOW_UDP or self.p.flows[i].kind == FLOW_PING:
                    flow_close(self.p, &self.p.flows[i])
            self.drain_forwards()
            self.p.udp_in.port = NONE
            for j in range(PARTIALS):
                self.p.fragments.partials[j].used = False

    def drain_forwards(self):
        """Forget the datagrams that wait at forwarded ports: a guest comes, and they are older than it."""
        cdef uint32_t i
        with self.parked():
            for i in range(self.p.used_flows):
                if self.p.flows[i].kind == FLOW_UDP_PORT and self.p.flows[i].flags & FF_FORWARD:
                    udp_drain(self.p, &self.p.flows[i])

    def flows(self):
        """All flows, as dictionaries, for people to read. Parks the thread."""
        cdef uint32_t i
        cdef Flow *f
        found = []
        with self.parked():
            for i in range(self.p.used_flows):
                f = &self.p.flows[i]
                if f.kind in (FLOW_TCP, FLOW_UDP, FLOW_PING):
                    found.append({
                        "index": i, "kind": {FLOW_TCP: "tcp", FLOW_UDP: "udp", FLOW_PING: "ping"}[f.kind],
                        "guest": (f.guest_addr[:16], f.guest_port), "our": (f.our_addr[:16], f.our_port),
                        "remote": (f.remote_addr[:16], f.remote_port), "events": f.events, "flags": f.flags,
                        **tcp_numbers(f),
                    })
        return found


cdef dict tcp_numbers(Flow *f):
    """What people read of a TCP flow besides its ends; zeros of any other."""
    if f.kind != FLOW_TCP:
        return {"in_flight": 0, "window": 0, "bytes_from_guest": 0, "bytes_to_guest": 0}
    return {
        "in_flight": f.seq_to_guest - f.seq_ack_from_guest, "window": f.window,
        "bytes_from_guest": f.bytes_from_guest, "bytes_to_guest": f.bytes_to_guest,
    }


cdef bint udp_takes(Flow *port, const uint8_t *host) noexcept:
    """Whether the socket of a UDP port is one for that family."""
    if is_v4(host):
        return port.flags & FF_TAKES_V4 != 0 or not port.flags & FF_V6
    return port.flags & FF_V6 != 0


cdef list datagrams_apart(bytes remote, bytes local, uint16_t port, uint32_t each, bytes data):
    """The Datagrams of a message: the kernel joins those that come one upon the other. One of no bytes is one, too."""
    if len(data) <= each or each == 0:
        return [Datagram(remote, local, port, data)]
    return [Datagram(remote, local, port, data[at:at + each]) for at in range(0, len(data), each)]


cdef list carried_datagrams(Carry *c, uint32_t at):
    """The Datagrams that lie there from ``at`` on."""
    cdef Carried head
    found = []
    while at < c.size:
        memcpy(&head, c.data + at, sizeof(Carried))
        at += sizeof(Carried)
        found += datagrams_apart(head.remote_addr[:16], head.local_addr[:16], head.remote_port, head.segment,
                                 c.data[at:at + head.size])
        at += head.size
    return found
