# SPDX-License-Identifier: GPL-2.0-or-later
"""The flows as the control thread sees them, and how they move from one data plane to another."""

from libc.stdint cimport uint32_t

from godwit.dataplane._base cimport EngineBase, copy_bytes
from godwit.dataplane.flow cimport carry_new, flow_close, flow_find, flow_index, flow_new, flow_watch
from godwit.dataplane.host cimport is_loopback, is_v4
from godwit.dataplane.loop cimport clock_ms
from godwit.dataplane.plane cimport (
    EV_ACCEPTED,
    EV_ESTABLISHED,
    EV_FIN_TO_GUEST,
    EV_SYN_FROM_GUEST,
    FF_DRAINING,
    FF_FIN_KNOWN,
    FF_FORWARD,
    FF_FOUND,
    FF_FROM_GUEST,
    FF_HELD,
    FF_HURRY,
    FF_PEER_FIN,
    FF_RESET_DUE,
    FF_V6,
    FLOW_PING,
    FLOW_TCP,
    FLOW_UDP,
    FLOW_UDP_PORT,
    NONE,
    PARTIALS,
    Carry,
    Flow,
)
from godwit.dataplane.sys cimport EPOLL_CTL_DEL, epoll_ctl
from godwit.dataplane.tcp cimport (
    tcp_abort,
    tcp_drop_socket,
    tcp_hurry,
    tcp_local_end,
    tcp_reset,
    tcp_resume,
)
from godwit.dataplane.tcp_open cimport tcp_refuse_waiting
from godwit.dataplane.udp_to_guest cimport udp_drain

from godwit.dataplane.state import FlowState, Side

cdef enum:
    PIF_HOST = 1
    PIF_GUEST = 2


cdef class Engine(EngineBase):
    """One guest's data plane: memory, two virtqueues, flows, one thread."""

    # ---- flows that move. The thread is parked by the caller during all of this.

    cdef Flow *flow(self, uint32_t index) except NULL:
        if index >= self.p.used_flows or self.p.flows[index].kind != FLOW_TCP:
            raise ValueError(f"no TCP flow {index}")
        return &self.p.flows[index]

    def tcp_flows(self):
        """The TCP flows that are established on the guest's side, their indices.

        Also those that were reset and of which the guest has not heard yet: they have no socket.
        """
        cdef uint32_t i
        cdef Flow *f
        found = []
        for i in range(self.p.used_flows):
            f = &self.p.flows[i]
            if f.kind == FLOW_TCP and f.events & EV_ESTABLISHED and (f.sock >= 0 or f.flags & FF_RESET_DUE):
                found.append(i)
        return found

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
        cdef Flow *f = self.flow(index)
        cdef bint from_guest = f.flags & FF_FROM_GUEST != 0
        tcp_local_end(f)
        guest = Side(f.our_addr[:16], f.guest_addr[:16], f.our_port, f.guest_port)
        host = Side(f.local_addr[:16], f.remote_addr[:16], f.local_port, f.remote_port)
        window = f.window >> f.ws_from_guest
        granted = (f.edge - f.seq_from_guest) >> f.ws_to_guest if <int>(f.edge - f.seq_from_guest) > 0 else 0
        return FlowState(
            pif=(PIF_GUEST, PIF_HOST) if from_guest else (PIF_HOST, PIF_GUEST),
            sides=(guest, host) if from_guest else (host, guest),
            retries=min(f.retries, 7),
            ws_from_tap=f.ws_from_guest,
            ws_to_tap=f.ws_to_guest,
            # How it came to be established is said by `pif` alone, as in every stream of passt's, which
            # takes a flow with these bits for one in its handshake. And a FIN that is being sent again
            # was sent: the numbers below count it.
            events=(f.events & ~(EV_ACCEPTED | EV_SYN_FROM_GUEST)) | (EV_FIN_TO_GUEST if f.flags & FF_FIN_KNOWN else 0),
            tap_mss=f.mss,
            sndbuf=0,
            flags=0,
            seq_dup_ack_approx=0,
            wnd_from_tap=min(window, 0xFFFF),
            wnd_to_tap=min(granted, 0xFFFF),
            seq_to_tap=f.seq_max_to_guest,
            seq_ack_from_tap=f.seq_ack_from_guest,
            seq_from_tap=f.seq_from_guest,
            seq_ack_to_tap=f.seq_ack_to_guest,
            seq_init_from_tap=f.seq_init_from_guest,
        )

    def import_flow(self, state):
        """A flow as another back-end knew it, without a socket yet. Returns its index.

        ValueError: it is in the table already, or the table is full.
        """
        cdef Flow *f
        cdef bint from_guest = state.pif[0] == PIF_GUEST
        guest = state.sides[0 if from_guest else 1]
        host = state.sides[1 if from_guest else 0]
        cdef bytes guest_addr = guest.end_addr, our_addr = guest.our_addr
        if flow_find(self.p, FLOW_TCP, guest_addr, guest.end_port, our_addr, guest.our_port) != NULL:
            raise ValueError("two flows between the same ends")
        self.p.now = clock_ms(self.p)
        # Also beyond the limit: without a descriptor it is reset, and has to be there for that.
        limit, self.p.flow_limit = self.p.flow_limit, self.p.max_flows
        f = flow_new(self.p, FLOW_TCP, guest_addr, guest.end_port, our_addr, guest.our_port)
        self.p.flow_limit = limit
        if f == NULL:
            raise ValueError("the flow table is full")
        copy_bytes(f.remote_addr, host.end_addr, 16, "address")
        copy_bytes(f.local_addr, host.our_addr, 16, "address")
        f.remote_port = host.end_port
        f.local_port = host.our_port
        f.flags = (FF_FROM_GUEST if from_guest else 0) | (0 if is_v4(f.guest_addr) else FF_V6) | FF_HELD
        f.events = state.events | EV_SYN_FROM_GUEST
        f.ws_from_guest = state.ws_from_tap
        f.ws_to_guest = state.ws_to_tap
        f.mss = min(max(state.tap_mss, 64), 65532)
        f.window = state.wnd_from_tap << state.ws_from_tap
        f.seq_to_guest = f.seq_max_to_guest = state.seq_to_tap
        f.seq_ack_from_guest = state.seq_ack_from_tap
        f.seq_from_guest = state.seq_from_tap
        f.seq_ack_to_guest = state.seq_ack_to_tap
        f.seq_init_from_guest = state.seq_init_from_tap
        f.edge = (state.seq_ack_to_tap + (state.wnd_to_tap << state.ws_to_tap)) & 0xFFFFFFFF
        if f.events & EV_FIN_TO_GUEST:
            f.flags |= FF_FIN_KNOWN
            f.seq_fin = f.seq_to_guest - 1
        return flow_index(self.p, f)

    def set_flow_socket(self, uint32_t index, int fd):
        """The socket of a flow that was imported; the engine's from now on."""
        cdef Flow *f = self.flow(index)
        if f.sock >= 0:
            raise ValueError(f"flow {index} has a socket")
        f.sock = fd

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

    def carry(self, uint32_t index, bytes to_guest, bytes to_sock):
        """Bytes of an imported flow that its socket had no room for: they go before all others."""
        cdef Flow *f = self.flow(index)
        if to_guest:
            f.carry_to_guest = carry_new(to_guest, <uint32_t>len(to_guest))
            if f.carry_to_guest == NULL:
                raise MemoryError
        if to_sock:
            f.carry_to_sock = carry_new(to_sock, <uint32_t>len(to_sock))
            if f.carry_to_sock == NULL:
                raise MemoryError

    def carried(self, uint32_t index):
        """(bytes for the guest, bytes for the socket) that a flow still carries."""
        cdef Flow *f = self.flow(index)
        return carried_bytes(f.carry_to_guest), carried_bytes(f.carry_to_sock)

    def peer_closed(self, uint32_t index):
        """Whether the peer closed before a migration, of which the flow's socket does not know."""
        return self.flow(index).flags & FF_PEER_FIN != 0

    def note_peer_closed(self, uint32_t index):
        """The peer of an imported flow has closed: the end of the queue is the end."""
        self.flow(index).flags |= FF_PEER_FIN

    def resume_flow(self, uint32_t index, bint watch):
        """Go on with a flow: one thawed, or (``watch``) one imported and restored."""
        cdef Flow *f = self.flow(index)
        self.p.now = clock_ms(self.p)
        f.flags &= ~(FF_HELD | FF_FOUND)
        if not watch:
            # Watched anew, so that what came while it was held, and was passed over, is told again.
            epoll_ctl(self.p.epfd, EPOLL_CTL_DEL, f.sock, NULL)
        if flow_watch(self.p, f) != 0:
            tcp_reset(self.p, f)
            return
        tcp_resume(self.p, f)

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

    def is_full(self):
        """Whether flows have as many sockets as limit_flows() allows."""
        return self.p.open_sockets >= self.p.flow_limit

    def limit_flows(self, uint32_t most):
        """Refuse new flows while they have so many sockets: each takes a descriptor."""
        with self.parked():
            self.p.flow_limit = min(most, self.p.max_flows)

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
                elif self.p.flows[i].kind == FLOW_UDP_PORT and self.p.flows[i].flags & FF_FORWARD:
                    udp_drain(self.p, &self.p.flows[i])
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
                        "in_flight": f.seq_to_guest - f.seq_ack_from_guest, "window": f.window,
                    })
        return found


cdef bytes carried_bytes(Carry *c):
    return b"" if c == NULL else c.data[c.at:c.size]
