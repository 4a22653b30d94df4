# SPDX-License-Identifier: GPL-2.0-or-later
"""The data plane as the control thread sees it, but for memory and rings (``_rings.pyx``) and flows (``_engine.pyx``).

All that changes the plane does so while its thread is parked. A failure in the
plane is a negative error number; ``check`` makes an exception of it.
"""

from contextlib import contextmanager
import logging
import os
import threading

from libc.stdint cimport uint16_t, uint32_t, uint64_t, uint8_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy, memset

from godwit.dataplane.flow cimport (
    WATCH_LISTENER,
    WATCH_WAKE,
    flows_free,
    flows_init,
    watch_data,
)
from godwit.dataplane.loop cimport clock_ms, loop_run, loop_step, loop_wake
from godwit.dataplane.memory cimport memory_clear, memory_clear_log
from godwit.dataplane.pcap cimport pcap_close, pcap_flush, pcap_open
from godwit.dataplane.plane cimport (
    DROPS,
    FF_ANSWERED,
    FLOW_PING,
    FLOW_TCP,
    FLOW_UDP,
    MAX_MAPS,
    MAX_TARGETS,
    NONE,
    RARE_FRAME,
    RARE_SLOTS,
    SEND_BUFFER,
    UDP_SLOT,
    Counters,
    Datagrams,
    Flow,
    Listener,
    Plane,
    RareFrame,
    flows_opened,
    frames_both_ways,
)
from godwit.dataplane.reassembly cimport reassembly_free, reassembly_init
from godwit.dataplane.sockstate cimport ephemeral_ports, kernel_limit
from godwit.dataplane.sys cimport (
    AF_INET,
    EFD_CLOEXEC,
    EFD_NONBLOCK,
    ENFILE,
    EPOLLIN,
    EPOLL_CLOEXEC,
    EPOLL_CTL_ADD,
    SOCK_CLOEXEC,
    SOCK_DGRAM,
    SOCK_STREAM,
    SOL_SOCKET,
    SO_PEEK_OFF,
    SO_TYPE,
    close,
    epoll_create1,
    epoll_ctl,
    epoll_event,
    errno,
    eventfd,
    getsockopt,
    load32_acquire,
    read,
    sem_destroy,
    sem_init,
    sem_post,
    sem_wait,
    setsockopt,
    socket,
    socklen_t,
    store32_release,
)
from godwit.dataplane.udp cimport udp_forward
from godwit.dataplane.udp_to_guest cimport Carried, udp_free, udp_init
from godwit.dataplane.virtqueue cimport QUEUES, Queue

from godwit.dataplane.shortage import SHORTAGES
from godwit.dataplane.state import Observed

# What a flow takes at most: its place in the table, and one in each hash table and in the heap.
FLOW_BYTES = sizeof(Flow) + 3 * sizeof(uint32_t)

DROP_NAMES = (
    "short", "malformed", "fragment", "protocol", "source", "no_flow", "window", "table_full",
    "no_socket", "ring_full", "rare_full", "send", "unreachable", "limit_udp", "limit_half_open",
)
assert len(DROP_NAMES) == DROPS


log = logging.getLogger(__name__)


cdef object check(int rc, str what):
    """Raise OSError for a negative error number."""
    if rc < 0:
        raise OSError(-rc, f"{what}: {os.strerror(-rc)}")


cdef object copy_bytes(uint8_t *out, bytes value, int size, str what):
    if len(value) != size:
        raise ValueError(f"{what} must be {size} bytes, not {len(value)}")
    memcpy(out, <const uint8_t *>value, size)


cdef bytes carried_from(datagrams):
    cdef Carried head
    parts = []
    for one in datagrams:
        if len(one.data) > UDP_SLOT:
            raise ValueError(f"a datagram of {len(one.data)} bytes")
        memset(&head, 0, sizeof(head))
        copy_bytes(head.remote_addr, one.remote_addr, 16, "address")
        copy_bytes(head.local_addr, one.local_addr, 16, "address")
        head.remote_port = one.remote_port
        head.size = <uint32_t>len(one.data)
        parts.append((<uint8_t *>&head)[:sizeof(head)])
        parts.append(one.data)
    return b"".join(parts)


cdef dict datagrams(str kind, Datagrams *d):
    """The counters of one protocol, by their names."""
    return {
        f"{kind}_from_guest": d.from_guest,
        f"{kind}_to_guest": d.to_guest,
        f"{kind}_bytes_from_guest": d.bytes_from_guest,
        f"{kind}_bytes_to_guest": d.bytes_to_guest,
    }


cdef void renumber(Plane *p) noexcept nogil:
    """The guest will have other addresses: what comes to forwarded ports is not for those of before."""
    cdef uint32_t i
    for i in range(p.used_flows):
        if p.flows[i].kind == FLOW_UDP:
            p.flows[i].flags &= ~FF_ANSWERED


cdef class EngineBase:
    """One guest's data plane: thread, configuration, listeners, and what is counted.

    Descriptors that are handed in belong to the engine from then on. Methods raise OSError where the kernel refused,
    ValueError for what the caller got wrong.
    """

    def __cinit__(self, uint32_t max_flows=131072):
        cdef int i
        self.p = <Plane *>calloc(1, sizeof(Plane))
        if self.p == NULL:
            raise MemoryError
        self.lock = threading.Lock()
        self.p.epfd = self.p.wake = self.p.rare_event = self.p.spare = self.p.pcap.fd = -1
        self.p.flow_limit = self.p.most_flows = self.p.most_udp = self.p.most_half_open = max_flows
        self.p.vnet_size = 12
        self.p.send.flow = NONE
        self.p.udp_out.port = NONE
        for i in range(QUEUES):
            self.p.queues[i].kick = self.p.queues[i].call = self.p.queues[i].err = -1
        sem_init(&self.p.parked, 0, 0)
        sem_init(&self.p.resume, 0, 0)
        check(flows_init(self.p, max_flows), "flow table")
        check(udp_init(self.p), "memory for datagrams")
        check(reassembly_init(self.p), "memory for fragments")

    def __init__(self, max_flows=131072):
        cdef epoll_event ev
        self.p.epfd = epoll_create1(EPOLL_CLOEXEC)
        check(-errno if self.p.epfd < 0 else 0, "epoll")
        self.p.wake = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        self.p.rare_event = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        check(-errno if self.p.wake < 0 or self.p.rare_event < 0 else 0, "eventfd")
        ev.events = EPOLLIN
        ev.data.u64 = watch_data(WATCH_WAKE, 0, 0)
        check(-errno if epoll_ctl(self.p.epfd, EPOLL_CTL_ADD, self.p.wake, &ev) != 0 else 0, "epoll")
        self.p.peek_offset = kernel_has_peek_offset()
        self.p.send_buffer = min(2 * kernel_limit("core/wmem_max", 212992), SEND_BUFFER)     # SO_SNDBUF is doubled
        self.p.most_ports = ports_for_the_guest()
        self.p.now = clock_ms(self.p)

    def __dealloc__(self):
        cdef int i
        cdef Queue *q
        if self.p == NULL:
            return
        memory_clear(&self.p.mem)
        memory_clear_log(&self.p.mem)
        for i in range(QUEUES):
            q = &self.p.queues[i]
            for fd in (q.kick, q.call, q.err):
                if fd >= 0:
                    close(fd)
        for i in range(self.p.listener_count):
            if self.p.listeners[i].fd >= 0:
                close(self.p.listeners[i].fd)
        free(self.p.listeners)
        pcap_close(self.p)
        flows_free(self.p)
        udp_free(self.p)
        reassembly_free(self.p)
        for fd in (self.p.epfd, self.p.wake, self.p.rare_event, self.p.spare):
            if fd >= 0:
                close(fd)
        sem_destroy(&self.p.parked)
        sem_destroy(&self.p.resume)
        free(self.p)

    def busy_poll(self, uint32_t microseconds):
        """Look for work so long before the thread sleeps, each time. Before the start, or while parked."""
        self.p.busy_poll = <uint64_t>microseconds * 1000

    # ---- the thread

    def start(self):
        """Start the thread."""
        self.thread = threading.Thread(target=self._run, name="data plane", daemon=True)
        self.thread.start()

    def _run(self):
        cdef int rc
        with nogil:
            rc = loop_run(self.p)
        if rc < 0:
            log.critical("the data plane has stopped: %s", os.strerror(-rc))

    def step(self):
        """Do what there is to do now, in the caller's thread, where none was started: one turn, the same each time.

        For tests. RuntimeError: there is a thread.
        """
        cdef int rc
        if self.thread is not None:
            raise RuntimeError("the data plane has a thread of its own")
        with nogil:
            rc = loop_step(self.p)
        check(rc, "epoll")

    def close(self):
        """Stop the thread. Sockets stay as they are until the engine is freed."""
        with self.lock:
            if self.thread is None:
                return
            self.p.stop_wanted = True
            if self.parks:
                sem_post(&self.p.resume)
            loop_wake(self.p)
            self.thread.join()
            self.thread = None
            self.p.stop_wanted = False
            if self.p.pcap.fd >= 0:
                pcap_flush(self.p)

    def park(self):
        """Bring the thread to a stop between two events. Counts; see unpark()."""
        with self.lock:
            if self.parks == 0 and self.thread is not None:
                self.p.park_wanted = True
                loop_wake(self.p)
                with nogil:
                    while sem_wait(&self.p.parked) != 0:
                        pass
            self.parks += 1

    def unpark(self):
        """Let the thread go on, once for each park(). One too many is an error of the caller's."""
        with self.lock:
            if self.parks == 0:
                raise ValueError("unpark() without park()")
            self.parks -= 1
            if self.parks == 0 and self.thread is not None:
                sem_post(&self.p.resume)

    @contextmanager
    def parked(self):
        """The thread stands still inside the block."""
        self.park()
        try:
            yield
        finally:
            self.unpark()

    # ---- configuration

    def configure(self, *, bytes our_mac, bytes addr4=None, bytes addr6=None, bytes our_ll=bytes(16),
                  bytes our4=bytes(16), bytes broadcast4=bytes(16), bytes outbound4=bytes(16),
                  bytes outbound6=bytes(16), str outbound_if4="", str outbound_if6="", uint32_t ifindex4=0,
                  uint32_t ifindex=0, uint16_t mtu=0, maps=(), bint tcp=True, bint udp=True,
                  bint icmp=True):
        """Say who the guest is and what it may reach. May be called again at any time.

        ``addr4`` and ``addr6`` are 16 bytes (v4-mapped), None without that
        family; ``our4`` and ``our_ll`` the router as the guest knows it.
        ``broadcast4`` is that of the guest's subnet. ``outbound...``: the
        address and the interface that the guest's own connections and
        datagrams leave from; zeros and "" leave that to the host's routes.
        ``ifindex4`` and ``ifindex`` are the interfaces (of IPv4 and of IPv6)
        for multicast, limited broadcast and link-local addresses.
        ``maps`` lists (address as the guest names it, port or 0 for any,
        address as the host knows it, its scope or 0), 16 bytes each address.
        """
        maps = list(maps)
        if 0 < mtu < 68:
            raise ValueError(f"an MTU of {mtu} is below what IPv4 needs")
        if len(maps) > MAX_MAPS:
            raise ValueError(f"at most {MAX_MAPS} address mappings, not {len(maps)}")
        with self.parked():
            if (self.p.config.addr4[:16], self.p.config.addr6[:16]) != (addr4 or bytes(16), addr6 or bytes(16)):
                renumber(self.p)
            copy_bytes(self.p.config.our_mac, our_mac, 6, "MAC address")
            self.p.config.has_v4 = addr4 is not None
            self.p.config.has_v6 = addr6 is not None
            copy_bytes(self.p.config.addr4, addr4 or bytes(16), 16, "IPv4 address")
            copy_bytes(self.p.config.addr6, addr6 or bytes(16), 16, "IPv6 address")
            copy_bytes(self.p.config.our4, our4, 16, "router's address")
            copy_bytes(self.p.config.our_ll, our_ll, 16, "link-local address")
            copy_bytes(self.p.config.broadcast4, broadcast4, 16, "broadcast address")
            copy_bytes(self.p.config.outbound4, outbound4, 16, "outbound address")
            copy_bytes(self.p.config.outbound6, outbound6, 16, "outbound address")
            copy_bytes(self.p.config.outbound_if4, os.fsencode(outbound_if4)[:15].ljust(16, b"\0"), 16, "interface")
            copy_bytes(self.p.config.outbound_if6, os.fsencode(outbound_if6)[:15].ljust(16, b"\0"), 16, "interface")
            self.p.config.ifindex4 = ifindex4
            self.p.config.ifindex = ifindex
            self.p.config.mtu = mtu
            self.p.config.no_tcp = not tcp
            self.p.config.no_udp = not udp
            self.p.config.no_icmp = not icmp
            self.p.config.map_count = 0
            for guest, port, host, scope in maps:
                copy_bytes(self.p.config.maps[self.p.config.map_count].guest, guest, 16, "address")
                copy_bytes(self.p.config.maps[self.p.config.map_count].host, host, 16, "address")
                self.p.config.maps[self.p.config.map_count].port = port
                self.p.config.maps[self.p.config.map_count].scope = scope
                self.p.config.map_count += 1

    # ---- rare frames

    def rare_fileno(self):
        """An eventfd that is readable when frames wait for take_rare(), or flows for take_found()."""
        return self.p.rare_event

    def take_rare(self):
        """The whole Ethernet frames that wait for the control thread, a list of bytes; perhaps none."""
        cdef uint64_t ignored
        cdef uint32_t tail = self.p.up.tail, head
        cdef RareFrame *slot
        frames = []
        read(self.p.rare_event, &ignored, 8)
        # Those that are there now. More may come as fast as these are taken, and each has written to the event.
        head = load32_acquire(&self.p.up.head)
        while tail != head:
            slot = &self.p.up.frames[tail % RARE_SLOTS]
            frames.append(slot.data[:slot.size])
            tail += 1
            store32_release(&self.p.up.tail, tail)
        return frames

    def inject(self, bytes frame not None):
        """Send the guest a whole Ethernet frame. False: too many wait already."""
        cdef uint32_t head = self.p.down.head
        cdef RareFrame *slot
        if len(frame) > RARE_FRAME:
            raise ValueError(f"a frame of {len(frame)} bytes is too long, {RARE_FRAME} is the most")
        if head - load32_acquire(&self.p.down.tail) >= RARE_SLOTS:
            return False
        slot = &self.p.down.frames[head % RARE_SLOTS]
        memcpy(slot.data, <const uint8_t *>frame, len(frame))
        slot.size = <uint32_t>len(frame)
        store32_release(&self.p.down.head, head + 1)
        loop_wake(self.p)
        return True

    # ---- listeners

    def listen(self, int fd, uint16_t guest_port, bytes guest_addr=None):
        """What comes to this socket goes to a port of the guest's: connections, or datagrams if it is one of UDP.

        ``guest_addr`` (16 bytes): to this address behind the guest's MAC
        address, not to the guest's own.
        """
        cdef int i, rc, kind = 0
        cdef socklen_t n = sizeof(kind)
        cdef uint8_t addr[16]
        cdef Listener *grown
        cdef epoll_event ev
        copy_bytes(addr, guest_addr or bytes(16), 16, "address")
        os.set_blocking(fd, False)
        with self.parked():
            if self.p.spare < 0:
                self.p.spare = eventfd(0, EFD_CLOEXEC)  # now, while there are descriptors (see refuse_one())
            if guest_addr is not None:
                self._note_target(guest_addr)
            check(-errno if getsockopt(fd, SOL_SOCKET, SO_TYPE, &kind, &n) != 0 else 0, "listening socket")
            if kind == SOCK_DGRAM:
                rc = udp_forward(self.p, fd, addr, guest_port)
                if rc == -ENFILE:
                    raise ValueError("the flow table is full")
                check(rc, "UDP socket")
                return
            i = self.p.listener_count
            if i & (i - 1) == 0:    # room for twice as many, each time
                grown = <Listener *>realloc(self.p.listeners, (2 * i if i else 1) * sizeof(Listener))
                if grown == NULL:
                    raise MemoryError
                self.p.listeners = grown
            memcpy(self.p.listeners[i].guest_addr, addr, 16)
            self.p.listener_count += 1
            self.p.listeners[i].fd = fd
            self.p.listeners[i].resting = False
            self.p.listeners[i].guest_port = guest_port
            ev.events = EPOLLIN
            ev.data.u64 = watch_data(WATCH_LISTENER, 0, i)
            check(-errno if epoll_ctl(self.p.epfd, EPOLL_CTL_ADD, fd, &ev) != 0 else 0, "listening socket")

    cdef _note_target(self, bytes addr):
        """What comes from this address is not from the guest's own; of so many as one would ever have."""
        cdef int i
        for i in range(self.p.target_count):
            if self.p.targets[i][:16] == addr:
                return
        if self.p.target_count < MAX_TARGETS:
            copy_bytes(self.p.targets[self.p.target_count], addr, 16, "address")
            self.p.target_count += 1

    def listen_many(self, sockets):
        """`listen` for each (descriptor, port of the guest's, address or None). The thread stops once."""
        with self.parked():
            for fd, guest_port, guest_addr in sockets:
                self.listen(fd, guest_port, guest_addr)

    def listeners(self):
        """The descriptors of the listening sockets, those of forwarded UDP ports not among them."""
        return [self.p.listeners[i].fd for i in range(self.p.listener_count) if self.p.listeners[i].fd >= 0]

    def advance(self, uint64_t ms):
        """Have the plane's clock go ahead of the system's: for tests of what takes minutes."""
        with self.parked():
            self.p.ahead += ms
            self.p.now = clock_ms(self.p)

    # ---- what there is

    def capture(self, int fd):
        """Write all frames from and to the guest to ``fd``, as pcap, until the engine ends or writing fails."""
        os.set_blocking(fd, False)  # a pipe that nobody reads must not stop the guest
        with self.parked():
            pcap_close(self.p)
            check(pcap_open(self.p, fd), "capture")

    def capture_error(self):
        """The error number that has ended the capture; 0 if it goes on, or there was none."""
        return self.p.pcap.error

    def capture_missed(self):
        """Frames that the capture lacks, since what it is written to did not take them in time."""
        return self.p.pcap.missed

    def take_shortages(self):
        """What the host was short of since the last time, the names; each is told once until watch_shortages()."""
        cdef uint32_t bits = self.p.short_of
        if not bits:
            return []
        with self.parked():
            bits = self.p.short_of
            self.p.short_of = 0
        return [name for bit, name in SHORTAGES.items() if bits & bit]

    def watch_shortages(self):
        """Have rare_fileno() become readable at the next shortage, of whatever it is."""
        with self.parked():
            self.p.short_told = self.p.short_of

    def watch_activity(self):
        """Have rare_fileno() become readable at the next frame, whatever it is; see was_active()."""
        with self.parked():
            self.p.quiet_frames = frames_both_ways(self.p)
            self.p.tell_activity = True

    def was_active(self):
        """Whether there was a frame since watch_activity()."""
        return not self.p.tell_activity

    def counters(self):
        """Counters since the start; ``drops`` by reason."""
        cdef Counters *c = &self.p.counters
        return {
            "frames_from_guest": c.frames_from_guest,
            "frames_to_guest": c.frames_to_guest,
            "bytes_from_guest": c.bytes_from_guest,
            "bytes_to_guest": c.bytes_to_guest,
            **datagrams("udp", &c.udp),
            **datagrams("ping", &c.ping),
            "retransmits": c.retransmits,
            "opened_tcp": c.opened[<int>FLOW_TCP],
            "opened_udp": c.opened[<int>FLOW_UDP],
            "opened_ping": c.opened[<int>FLOW_PING],
            "flows_opened": flows_opened(self.p),
            "flows_reset": c.flows_reset,
            "flows_recycled": c.flows_recycled,
            "flows": self.p.open_flows,
            "drops": {name: c.drops[i] for i, name in enumerate(DROP_NAMES)},
        }

    def observed(self):
        """The guest's addresses as last seen in its frames."""
        return Observed(self.p.seen6[:16], self.p.seen6_ll[:16], self.p.seen4[12:16],
                        self.p.config.guest_mac[:6] if self.p.config.guest_mac_known else bytes(6))

    def forget_observed(self, before):
        """Put back what was seen before set_observed() was called; zeros: nothing was."""
        with self.parked():
            copy_bytes(self.p.seen6, before.addr6, 16, "IPv6 address")
            copy_bytes(self.p.seen6_ll, before.addr6_ll, 16, "link-local address")
            copy_bytes(self.p.seen4, bytes(10) + b"\xff\xff" + before.addr4 if any(before.addr4) else bytes(16), 16,
                       "IPv4 address")
            copy_bytes(self.p.config.guest_mac, before.mac, 6, "MAC address")
            self.p.config.guest_mac_known = any(before.mac)

    def set_observed(self, seen):
        """Take over what another back-end saw; zeros leave things as they are."""
        with self.parked():
            if any(seen.addr6):
                copy_bytes(self.p.seen6, seen.addr6, 16, "IPv6 address")
            if any(seen.addr6_ll):
                copy_bytes(self.p.seen6_ll, seen.addr6_ll, 16, "link-local address")
            if any(seen.addr4):
                copy_bytes(self.p.seen4, bytes(10) + b"\xff\xff" + seen.addr4, 16, "IPv4 address")
            if any(seen.mac):
                copy_bytes(self.p.config.guest_mac, seen.mac, 6, "MAC address")
                self.p.config.guest_mac_known = True


cdef uint32_t ports_for_the_guest():
    """Half of those that the kernel chooses from. One of UDP is taken by one socket, whoever that talks to (ip(7))."""
    first, last = ephemeral_ports()
    return max(1, (last + 1 - first) // 2)


cdef bint kernel_has_peek_offset():
    """SO_PEEK_OFF works on TCP since Linux 6.9; older kernels refuse it there."""
    cdef int zero = 0, rc
    cdef int s = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)
    if s < 0:
        return False
    rc = setsockopt(s, SOL_SOCKET, SO_PEEK_OFF, &zero, sizeof(zero))
    close(s)
    return rc == 0
