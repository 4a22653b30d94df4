# SPDX-License-Identifier: GPL-2.0-or-later
# cython: boundscheck=False, wraparound=False
"""TCP flows and their sockets on their way into a stream and out of it, many at a time and without the GIL.

See the .pyi for what the control thread calls.
"""

from array import array

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EDQUOT, EEXIST, EMFILE, ENFILE, ENOMEM, EPERM, EXDEV
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memmove, memset

from godwit.dataplane._base cimport EngineBase
from godwit.dataplane.flow cimport (
    carry_left,
    carry_new,
    flow_find,
    flow_index,
    flow_new_beyond,
    flow_watch,
)
from godwit.dataplane.host cimport is_loopback, is_v4
from godwit.dataplane.layouts cimport (
    Moved,
    gw_flow2,
    gw_flow_native,
    gw_socket,
    in2,
    in_native,
    out2,
    out_native,
    socket_in,
    socket_out,
    whole_socket,
)
from godwit.dataplane.loop cimport clock_ms
from godwit.dataplane.plane cimport (
    EV_ACCEPTED,
    EV_ESTABLISHED,
    EV_FIN_TO_GUEST,
    EV_FIN_TO_SOCK,
    EV_SYN_FROM_GUEST,
    FF_FIN_KNOWN,
    FF_FOUND,
    FF_FROM_GUEST,
    FF_HELD,
    FF_HURRY,
    FF_PEER_FIN,
    FF_V6,
    FLOW_TCP,
    NONE,
    Flow,
    Plane,
)
from godwit.dataplane.sockstate cimport (
    CLOSE_WAIT,
    CLOSED,
    CLOSING,
    ESTABLISHED,
    FIN_WAIT1,
    LAST_ACK,
    SEQ_OF_FIRST_BYTE,
    TIME_WAIT,
    Queued,
    SockState,
    receive_room,
    sock_complete,
    sock_connect,
    sock_create,
    sock_dump,
    sock_dump_queues,
    sock_end,
    sock_finish,
    sock_freeze,
    sock_look,
    sock_open,
)
from godwit.dataplane.sys cimport pollfd, sockaddr_storage, socklen_t
from godwit.dataplane.tcp cimport tcp_drop_socket, tcp_local_end, tcp_reset, tcp_resume

from godwit.dataplane.sockstate import STEPS

cdef extern from *:
    bint swapped "__sync_bool_compare_and_swap" (int64_t *value, int64_t before, int64_t after) nogil

cdef enum:
    LOOK = 256              # sockets that are asked at once
    MOST_MSS4 = (65535 - 20 - 20) & 0xFFFC
    MOST_MSS6 = (65535 - 40 - 20) & 0xFFFC


# ---- flows

cdef void moved_out(Plane *p, Flow *f, Moved *m) noexcept nogil:
    cdef uint32_t window = f.window >> f.ws_from_guest
    cdef uint32_t granted = f.edge - f.seq_ack_to_guest     # as it was told: from the last acknowledgement on
    cdef int64_t idle = <int64_t>(p.now - f.last_active)
    # Of one that came with a migration it is known, and its socket may be bound to nothing yet.
    if f.local_port == 0 or not (f.events & EV_ESTABLISHED or f.flags & FF_HELD):
        tcp_local_end(f)
    m.from_guest = f.flags & FF_FROM_GUEST != 0
    # How it came to be established is said by who opened it alone, as in every
    # stream of passt's, which takes a flow with these bits for one in its
    # handshake. And a FIN that is being sent again was sent: the numbers below
    # count it.
    m.events = f.events
    if f.events & EV_ESTABLISHED:
        m.events &= ~<uint8_t>(EV_ACCEPTED | EV_SYN_FROM_GUEST)
    if f.flags & FF_FIN_KNOWN:
        m.events |= EV_FIN_TO_GUEST
    m.retries = min(f.retries, <uint8_t>7)
    m.ws_from_guest = f.ws_from_guest
    m.ws_to_guest = f.ws_to_guest
    m.mss = f.mss
    m.wnd_from_guest = <uint16_t>min(window, <uint32_t>0xFFFF)
    granted = granted >> f.ws_to_guest if <int>granted > 0 else 0
    m.wnd_to_guest = <uint16_t>min(granted, <uint32_t>0xFFFF)
    m.seq_to_guest = f.seq_max_to_guest
    m.ack_from_guest = f.seq_ack_from_guest
    m.seq_from_guest = f.seq_from_guest
    m.ack_to_guest = f.seq_ack_to_guest
    m.init_from_guest = f.seq_init_from_guest
    m.bytes_from_guest = f.bytes_from_guest
    m.bytes_to_guest = f.bytes_to_guest
    m.idle = 0 if idle < 0 else <uint32_t>min(idle, <int64_t>0xFFFFFFFFU)
    memcpy(m.guest_our.addr, f.our_addr, 16)
    memcpy(m.guest_end.addr, f.guest_addr, 16)
    memcpy(m.host_our.addr, f.local_addr, 16)
    memcpy(m.host_end.addr, f.remote_addr, 16)
    m.guest_our.port = f.our_port
    m.guest_end.port = f.guest_port
    m.host_our.port = f.local_port
    m.host_end.port = f.remote_port


cdef int moved_in(Plane *p, const Moved *m, Flow **made) noexcept nogil:
    """A new flow, held, without a socket; -EEXIST: it is there already, -ENFILE: the table is full."""
    cdef Flow *f
    if flow_find(p, FLOW_TCP, m.guest_end.addr, m.guest_end.port, m.guest_our.addr, m.guest_our.port) != NULL:
        return -EEXIST
    # Also beyond the limit: without a descriptor it is reset, and has to be there for that.
    f = flow_new_beyond(p, FLOW_TCP, m.guest_end.addr, m.guest_end.port, m.guest_our.addr, m.guest_our.port)
    if f == NULL:
        return -ENFILE
    memcpy(f.remote_addr, m.host_end.addr, 16)
    memcpy(f.local_addr, m.host_our.addr, 16)
    f.remote_port = m.host_end.port
    f.local_port = m.host_our.port
    f.flags = (FF_FROM_GUEST if m.from_guest else 0) | (0 if is_v4(f.guest_addr) else FF_V6) | FF_HELD
    f.events = m.events | (EV_SYN_FROM_GUEST if m.events & EV_ESTABLISHED else 0)
    f.ws_from_guest = m.ws_from_guest
    f.ws_to_guest = m.ws_to_guest
    # No more than a frame can say of its length, with the headers in it.
    f.mss = <uint16_t>min(max(m.mss, <uint32_t>64), <uint32_t>(MOST_MSS6 if f.flags & FF_V6 else MOST_MSS4))
    f.window = <uint32_t>m.wnd_from_guest << m.ws_from_guest
    f.seq_to_guest = f.seq_max_to_guest = m.seq_to_guest
    f.seq_ack_from_guest = m.ack_from_guest
    f.seq_from_guest = m.seq_from_guest
    f.seq_ack_to_guest = m.ack_to_guest
    f.seq_init_from_guest = m.init_from_guest
    f.edge = m.ack_to_guest + (<uint32_t>m.wnd_to_guest << m.ws_to_guest)
    f.bytes_from_guest = m.bytes_from_guest
    f.bytes_to_guest = m.bytes_to_guest
    f.last_active = p.now - m.idle if p.now > m.idle else 0
    if f.events & EV_FIN_TO_GUEST:
        f.flags |= FF_FIN_KNOWN
        f.seq_fin = f.seq_to_guest - 1
    made[0] = f
    return 0


def flow_records(EngineBase engine not None, flows, bint native):
    cdef Plane *p = engine.p
    cdef size_t each = sizeof(gw_flow_native) if native else sizeof(gw_flow2)
    cdef const uint32_t[::1] wanted = indices(p, flows)
    cdef Py_ssize_t i, count = wanted.shape[0]
    cdef bytes made = PyBytes_FromStringAndSize(NULL, count * each)
    cdef char *at = PyBytes_AS_STRING(made)
    cdef Moved m
    with nogil:
        for i in range(count):
            moved_out(p, &p.flows[wanted[i]], &m)
            if native:
                out_native(&m, <gw_flow_native *>at)
            else:
                out2(&m, <gw_flow2 *>at)
            at += each
    return made


cdef object indices(Plane *p, flows):
    """Indices of TCP flows, all of which there are, as an array."""
    made = flows if isinstance(flows, array) else array("I", flows)
    cdef const uint32_t[::1] at = made
    cdef Py_ssize_t i
    for i in range(at.shape[0]):
        if at[i] >= p.used_flows or p.flows[at[i]].kind != FLOW_TCP:
            raise ValueError(f"no TCP flow {at[i]}")
    return made


# ---- source

def freeze(EngineBase engine not None):
    cdef Plane *p = engine.p
    cdef uint32_t i
    cdef int rc
    frozen = array("I")
    failed = []
    for i in range(p.used_flows):
        if p.flows[i].kind == FLOW_TCP and p.flows[i].sock >= 0:
            rc = sock_freeze(p.flows[i].sock, not is_v4(p.flows[i].remote_addr))
            if rc == 0:
                frozen.append(i)
            else:
                failed.append((i, -rc))
    return frozen, failed


def sockets(EngineBase engine not None, flows):
    cdef const uint32_t[::1] wanted = indices(engine.p, flows)
    cdef Py_ssize_t i
    made = array("i", bytes(wanted.shape[0] * sizeof(int)))
    cdef int[::1] fds = made
    for i in range(wanted.shape[0]):
        fds[i] = engine.p.flows[wanted[i]].sock
    return made


cdef struct Output:
    uint8_t *data
    size_t size
    size_t room


cdef uint8_t *more(Output *o, size_t n) noexcept nogil:
    """Room for so much more; NULL: there is no memory."""
    cdef uint8_t *grown
    cdef size_t room = o.room
    if o.size + n > room:
        room = max(2 * room, o.size + n)
        grown = <uint8_t *>realloc(o.data, room)
        if grown == NULL:
            return NULL
        o.data = grown
        o.room = room
    o.size += n
    return o.data + o.size - n


cdef void whole(const Flow *f, SockState *s) noexcept nogil:
    """The state and the numbers with what an earlier migration has left with the flow."""
    cdef uint32_t to_guest = carry_left(f.carry_to_guest), to_sock = carry_left(f.carry_to_sock)
    cdef uint8_t state = s.tcpi_state
    if to_sock and f.events & EV_FIN_TO_SOCK:
        state = LAST_ACK if state == CLOSE_WAIT else FIN_WAIT1
    if state == CLOSED:
        # Both have closed and know it. What is left is for the guest to read; no FIN is due.
        state = CLOSE_WAIT
    elif f.flags & FF_PEER_FIN:
        state = CLOSE_WAIT if state == ESTABLISHED else LAST_ACK
    if state != s.tcpi_state:
        # Whatever the state says now, no FIN is in the number of the first byte.
        s.tcpi_options |= SEQ_OF_FIRST_BYTE
    s.tcpi_state = state
    s.sndq += to_sock
    s.notsent += to_sock
    s.rcvq += to_guest
    s.seq_rcv -= to_guest


cdef int dump_one(Flow *f, const pollfd *looked, bint local_moves, Output *o) noexcept nogil:
    cdef SockState s
    cdef Queued q
    cdef size_t begin = o.size
    cdef uint32_t to_guest = carry_left(f.carry_to_guest), to_sock = carry_left(f.carry_to_sock), sndq, rcvq
    cdef uint8_t *at
    cdef int rc
    if is_loopback(f.remote_addr) and not local_moves:
        return -EXDEV
    if f.sock < 0:
        return -EPERM
    rc = sock_dump(looked, &s, &q)
    if rc != 0:
        return rc
    at = more(o, sizeof(gw_socket) + <size_t>q.out + q.incoming + to_sock + to_guest)
    if at == NULL:
        return -ENOMEM
    at += sizeof(gw_socket)
    rc = sock_dump_queues(f.sock, &s, &q, at)
    if rc != 0:
        o.size = begin
        return rc
    sndq, rcvq = s.sndq, s.rcvq
    if to_sock or to_guest:
        # Between the two queues: what is to follow the one, and what goes before the other.
        memmove(at + sndq + to_sock + to_guest, at + sndq, rcvq)
        if to_sock:
            memcpy(at + sndq, f.carry_to_sock.data + f.carry_to_sock.at, to_sock)
        if to_guest:
            memcpy(at + sndq + to_sock, f.carry_to_guest.data + f.carry_to_guest.at, to_guest)
    whole(f, &s)
    socket_out(&s, <gw_socket *>(at - sizeof(gw_socket)))
    o.size = begin + sizeof(gw_socket) + s.sndq + s.rcvq
    return 0


def dump(EngineBase engine not None, flows, Py_ssize_t at, size_t most, bint local_moves=False):
    cdef Plane *p = engine.p
    cdef const uint32_t[::1] wanted = indices(p, flows[at:at + <Py_ssize_t>LOOK])
    cdef Py_ssize_t i, count = wanted.shape[0]
    cdef pollfd looked[LOOK]
    cdef int rc = 0, n = <int>count
    cdef Output o
    memset(&o, 0, sizeof(o))
    with nogil:
        for i in range(count):
            looked[i].fd = p.flows[wanted[i]].sock
        sock_look(looked, n)
        i = 0
        while i < count and o.size < most:
            rc = dump_one(&p.flows[wanted[i]], &looked[i], local_moves, &o)
            if rc != 0:
                break
            i += 1
    try:
        return at + i, (<char *>o.data)[:o.size] if o.size else b"", -rc
    finally:
        free(o.data)


# ---- target

cdef struct Arrival:
    uint32_t flow           # NONE: there is no place for it
    bint has_place          # there are descriptors for it
    bint in_repair
    bint restored
    bint lost
    int error               # of what was last done to it
    int step                # where in sock_connect(), by its index in STEPS; -1: nowhere there
    SockState socket
    uint8_t *sndq           # until the commit


cdef class Arrivals:
    """Flows that have been loaded, by their number in the stream."""

    cdef EngineBase engine
    cdef Arrival *all
    cdef size_t count, room
    cdef uint32_t scope, receive_room
    cdef int64_t memory

    def __init__(self, EngineBase engine not None, uint32_t scope, int64_t memory):
        self.engine = engine
        self.scope = scope
        self.memory = memory
        self.receive_room = receive_room()

    def __dealloc__(self):
        cdef size_t i
        for i in range(self.count):
            free(self.all[i].sndq)
        free(self.all)

    def __len__(self):
        return self.count

    cdef Arrival *at(self, size_t number) except NULL:
        if number >= self.count:
            raise ValueError(f"flow {number} has not come")
        return &self.all[number]

    cdef Flow *place(self, const Arrival *a) noexcept nogil:
        """Its flow, which is there still."""
        cdef Plane *p = self.engine.p
        if a.flow >= p.used_flows or p.flows[a.flow].kind != FLOW_TCP:
            return NULL
        return &p.flows[a.flow]

    cdef int make_room(self, size_t count) except -1:
        """For so many more."""
        cdef size_t room = max(2 * self.room, self.count + count)
        cdef Arrival *grown
        if self.count + count > self.room:
            grown = <Arrival *>realloc(self.all, room * sizeof(Arrival))
            if grown == NULL:
                raise MemoryError
            self.all = grown
            self.room = room
        return 0

    cdef Arrival *add(self) noexcept nogil:
        """The next one. There has to be room."""
        cdef Arrival *a = &self.all[self.count]
        memset(a, 0, sizeof(Arrival))
        a.flow = NONE
        self.count += 1
        return a

    cdef int open(self, const Arrival *a) noexcept nogil:
        """Give a flow a socket, frozen; or an error."""
        cdef Flow *f = self.place(a)
        cdef int fd = sock_create(not is_v4(f.remote_addr))
        if fd < 0:
            return fd
        f.sock = fd
        return 0

    cdef list errors(self, size_t first, size_t last):
        """(number, error number) of those with which something was wrong."""
        cdef size_t i
        return [(i, -self.all[i].error) for i in range(first, last) if self.all[i].error != 0]

    cdef bint prepare_one(self, const uint8_t *record, bint native) noexcept nogil:
        cdef Plane *p = self.engine.p
        cdef Moved m
        cdef Flow *f = NULL
        cdef Arrival *a
        cdef bint full = p.open_sockets >= p.flow_limit
        if not (in_native(<const gw_flow_native *>record, &m) if native else in2(<const gw_flow2 *>record, &m)):
            return False
        a = self.add()
        a.error = moved_in(p, &m, &f)
        if a.error == 0:
            a.flow = flow_index(p, f)
            a.has_place = not full
            a.error = -EMFILE if full else self.open(a)
        return True

    def prepare(self, const uint8_t[::1] records, bint native):
        cdef size_t each = sizeof(gw_flow_native) if native else sizeof(gw_flow2)
        cdef size_t i, first = self.count, count = <size_t>records.shape[0] // each
        cdef bint sound = True
        self.make_room(count)
        self.engine.p.now = clock_ms(self.engine.p)
        with nogil:
            for i in range(count):
                sound = self.prepare_one(&records[i * each], native)
                if not sound:
                    break
        if not sound:
            raise ValueError("a flow that was not checked")
        return self.errors(first, self.count)

    def adopt(self, uint32_t flow):
        """One that is in the table already. Returns its number, and why it has no socket, if so."""
        cdef Arrival *a
        self.make_room(1)
        a = self.add()
        a.flow = flow
        a.has_place = True
        if self.place(a) == NULL:
            a.flow = NONE
        return self.count - 1, 0 if a.flow == NONE else -self.open(a)

    def flow(self, size_t number):
        cdef Arrival *a = self.at(number)
        return -1 if a.flow == NONE else a.flow

    def has_place(self, size_t number):
        return bool(self.at(number).has_place)

    def flows(self):
        cdef size_t i
        return [self.all[i].flow for i in range(self.count) if self.all[i].flow != NONE]

    def not_restored(self):
        cdef size_t i
        return [i for i in range(self.count)
                if self.all[i].flow != NONE and not self.all[i].restored and not self.all[i].lost]

    def with_socket(self, size_t first, bint restored=False):
        cdef size_t i
        cdef Flow *f
        numbers = array("I")
        for i in range(first, self.count):
            f = self.place(&self.all[i])
            if f != NULL and f.sock >= 0 and not self.all[i].lost and (self.all[i].restored or not restored):
                numbers.append(i)
        return numbers

    def sockets(self, numbers):
        cdef size_t number
        cdef Flow *f
        fds = array("i")
        for number in numbers:
            f = self.place(self.at(number))
            fds.append(-1 if f == NULL else f.sock)
        return fds

    def enter_repair(self, numbers):
        cdef size_t number
        for number in numbers:
            self.at(number).in_repair = True

    def lose(self, size_t number):
        cdef Arrival *a = self.at(number)
        cdef Flow *f = self.place(a)
        a.lost = True
        if f != NULL:
            tcp_drop_socket(f)

    def free_socket(self, size_t number):
        """Close its socket: it gets another one, later."""
        cdef Flow *f = self.place(self.at(number))
        if f != NULL:
            tcp_drop_socket(f)

    def take_memory(self, uint64_t size):
        """Whether there is memory for so much of queues; then it is taken."""
        return self.take(size)

    cdef bint take(self, uint64_t size) noexcept nogil:
        # Two threads may be restoring.
        cdef int64_t there = self.memory
        while there >= <int64_t>size:
            if swapped(&self.memory, there, there - <int64_t>size):
                return True
            there = self.memory
        return False

    cdef int restore_one(self, Arrival *a, const uint8_t *data) noexcept nogil:
        cdef Flow *f = self.place(a)
        cdef SockState *s = &a.socket
        cdef sockaddr_storage local, remote
        cdef socklen_t size
        cdef uint32_t left_out = 0
        cdef const uint8_t *sndq = data + sizeof(gw_socket)
        cdef const uint8_t *rcvq
        cdef int rc
        a.step = -1
        if f == NULL or f.sock < 0 or a.lost or not a.in_repair or a.restored:
            return 0
        socket_in(<const gw_socket *>data, s)
        rcvq = sndq + s.sndq
        size = sock_end(&local, f.local_addr, f.local_port, self.scope)
        sock_end(&remote, f.remote_addr, f.remote_port, self.scope)
        rc = sock_connect(f.sock, &local, &remote, size, s, rcvq, self.receive_room, &left_out, &a.step)
        if rc != 0:
            return rc
        a.step = -1
        if not self.take(<uint64_t>s.sndq + left_out):
            return -EDQUOT
        if left_out:
            f.carry_to_guest = carry_new(rcvq, left_out)
            if f.carry_to_guest == NULL:
                return -ENOMEM
        if s.sndq:
            a.sndq = <uint8_t *>malloc(s.sndq)
            if a.sndq == NULL:
                return -ENOMEM
            memcpy(a.sndq, sndq, s.sndq)
        if s.tcpi_state == CLOSE_WAIT or s.tcpi_state == LAST_ACK or s.tcpi_state == CLOSING:
            f.flags |= FF_PEER_FIN
        a.restored = True
        return 0

    def restore(self, size_t first, const uint8_t[::1] sockets):
        cdef size_t size = <size_t>sockets.shape[0], at = 0, n = 0, number = first
        cdef const gw_socket *r
        cdef Arrival *a
        trouble = []
        with nogil:
            while at < size:
                n = whole_socket(&sockets[at], size - at, True)
                if n == 0 or number >= self.count:
                    break
                a = &self.all[number]
                r = <const gw_socket *>&sockets[at]
                if r.state == 0 or r.state == TIME_WAIT or r.state == CLOSED:
                    with gil:
                        trouble.append((number, at, n, 0, ""))
                else:
                    a.error = self.restore_one(a, &sockets[at])
                    if a.error != 0:
                        with gil:
                            trouble.append((number, at, n, -a.error, "" if a.step < 0 else STEPS[a.step]))
                at += n
                number += 1
        if at < size:
            raise ValueError("no sockets with their queues" if n == 0 else f"flow {number} has not come")
        return trouble

    cdef int complete_one(self, Arrival *a, Flow *f) noexcept nogil:
        # Thawed first: the answer to the probe that ends repair mode shall not be missed.
        cdef int rc = sock_open(f.sock, not is_v4(f.remote_addr))
        return rc if rc != 0 else sock_complete(f.sock, &a.socket, a.sndq)

    def complete(self, const uint32_t[::1] numbers):
        return self.each(numbers, False)

    cdef int finish_one(self, Arrival *a, Flow *f) noexcept nogil:
        cdef Plane *p = self.engine.p
        cdef uint32_t notsent = a.socket.notsent
        cdef const uint8_t *unsent = a.sndq + (a.socket.sndq - notsent) if a.sndq != NULL else NULL
        cdef int taken = sock_finish(f.sock, &a.socket, unsent)
        if taken < 0:
            return taken
        if <uint32_t>taken < notsent:
            f.carry_to_sock = carry_new(unsent + taken, notsent - <uint32_t>taken)
            if f.carry_to_sock == NULL:
                return -ENOMEM
        f.flags = f.flags & ~<uint32_t>(FF_HELD | FF_FOUND) | FF_HURRY  # as sock_complete() has told the kernel
        # What may write into a ring, or to the guest, has the GIL, as all that changes rings and memory: a front-end
        # starts the rings while this goes on, and nothing keeps it from taking the memory away again.
        if flow_watch(p, f) != 0:
            with gil:
                tcp_reset(p, f)
        elif f.events & EV_ESTABLISHED and f.carry_to_sock == NULL:
            tcp_resume(p, f)
        else:
            with gil:
                tcp_resume(p, f)
        return 0

    def finish(self, const uint32_t[::1] numbers):
        self.engine.p.now = clock_ms(self.engine.p)
        return self.each(numbers, True)

    cdef list each(self, const uint32_t[::1] numbers, bint last):
        """Complete or finish them: (number, error number) of those where that failed."""
        cdef Py_ssize_t i
        cdef Flow *f
        cdef Arrival *a
        with nogil:
            for i in range(numbers.shape[0]):
                if numbers[i] < self.count:
                    a = &self.all[numbers[i]]
                    f = self.place(a)
                    a.error = 0
                    if f != NULL and not a.lost:
                        a.error = self.finish_one(a, f) if last else self.complete_one(a, f)
        return [(number, -self.all[number].error) for number in numbers
                if number < self.count and self.all[<size_t>number].error != 0]
