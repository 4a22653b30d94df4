# SPDX-License-Identifier: GPL-2.0-or-later
"""The data plane's thread.

One turn: wait; take the events; run the timers that are due, but not before what
the guest has said is read; settle the flows that were touched; give receive
buffers to those that wait for them; publish the used entries. Where the guest's
network card is ours too (``card.pyx``), it has its turn within this one: it fills
the one ring after the events, and empties the other at the end. The control thread's wish to change something is granted at
the end of a turn, when nothing is half done: the thread is then *parked* until
it is let go. What the control thread wants to look at, and is looked at quickly,
is an *errand*: the thread itself does it then, and waits for nobody.
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

from godwit.dataplane.card cimport card_event, card_from_socket, card_to_socket
from godwit.dataplane.flow cimport (
    WATCH_CARD,
    WATCH_FLOW,
    WATCH_KICK,
    WATCH_LISTENER,
    WATCH_WAKE,
    flow_close,
    flow_due,
    flow_release,
    flow_unwait,
    timeout_ms,
)
from godwit.dataplane.from_guest cimport TX_BATCH, frames_from_guest
from godwit.dataplane.icmp cimport errors_from_sock, ping_from_sock
from godwit.dataplane.memory cimport memory_gone
from godwit.dataplane.pcap cimport pcap_flush
from godwit.dataplane.plane cimport (
    FF_RING_WAIT,
    FF_TOUCHED,
    FLOW_DEAD,
    FLOW_PING,
    FLOW_TCP,
    FLOW_UDP_PORT,
    NONE,
    RARE_SLOTS,
    Flow,
    Plane,
    RareFrame,
    frames_both_ways,
)
from godwit.dataplane.sys cimport (
    CLOCK_MONOTONIC,
    EINTR,
    EPOLLERR,
    clock_gettime,
    epoll_event,
    epoll_wait,
    errno,
    load32_acquire,
    read,
    sem_post,
    sem_wait,
    store32_release,
    timespec,
    write,
)
from godwit.dataplane.tcp cimport tcp_from_sock, tcp_settle, tcp_timer
from godwit.dataplane.tcp_open cimport tcp_accept, tcp_accept_again
from godwit.dataplane.to_guest cimport frame_to_guest
from godwit.dataplane.udp_to_guest cimport udp_from_sock
from godwit.dataplane.virtqueue cimport (
    NO_MEMORY,
    QUEUES,
    RX,
    TX,
    Queue,
    queue_active,
    queue_break,
    queue_notify_off,
    queue_notify_on,
    queue_pending,
    queue_publish,
    queue_seen,
)

cdef enum:
    EVENTS = 64
    TIMERS = 64         # in one turn, the next comes at once: all flows of a flood end at one time
    RING_ROUNDS = 8


cdef uint64_t read_clock(int clock) noexcept nogil:
    cdef timespec ts
    clock_gettime(clock, &ts)
    return <uint64_t>ts.tv_sec * 1000000000 + ts.tv_nsec


cdef uint64_t clock_ns() noexcept nogil:
    return read_clock(CLOCK_MONOTONIC)


cdef uint64_t clock_ms(Plane *p) noexcept nogil:
    return clock_ns() // 1000000 + p.ahead


cdef void loop_wake(Plane *p) noexcept nogil:
    cdef uint64_t one = 1
    write(p.wake, &one, 8)


cdef void frames_from_control(Plane *p) noexcept nogil:
    cdef uint32_t tail = p.down.tail
    cdef RareFrame *slot
    while tail != load32_acquire(&p.down.head):
        slot = &p.down.frames[tail % RARE_SLOTS]
        frame_to_guest(p, slot.data, slot.size)
        tail += 1
        store32_release(&p.down.tail, tail)


cdef void settle(Plane *p) noexcept nogil:
    cdef uint32_t i
    cdef Flow *f
    while p.touched != NONE:
        i = p.touched
        f = &p.flows[i]
        p.touched = f.touched_next
        f.flags &= ~FF_TOUCHED
        if f.kind == FLOW_DEAD:
            flow_release(p, f)
        else:
            tcp_settle(p, f)


cdef void datagrams_from_sock(Plane *p, Flow *f) noexcept nogil:
    if f.kind == FLOW_UDP_PORT:
        udp_from_sock(p, f)
    elif f.kind == FLOW_PING:
        ping_from_sock(p, f)


cdef void serve_ring_waiters(Plane *p) noexcept nogil:
    """Each flow that waits for receive buffers gets a turn, in order."""
    cdef uint32_t last = p.ring_wait_tail, i
    cdef Flow *f
    if not queue_active(&p.queues[RX]):
        return
    while p.ring_wait != NONE:
        i = p.ring_wait
        f = &p.flows[i]
        flow_unwait(p, f)
        if f.kind == FLOW_TCP:
            tcp_settle(p, f)
        else:
            datagrams_from_sock(p, f)
        # One that got nothing waits again, at the end: so will the others.
        if i == last or f.flags & FF_RING_WAIT:
            return


cdef void flow_event(Plane *p, uint64_t data, uint32_t events) noexcept nogil:
    cdef uint32_t i = <uint32_t>data
    cdef Flow *f
    if i >= p.used_flows:
        return
    f = &p.flows[i]
    # An event of the same turn may have closed the flow and reused its slot.
    if f.generation & 0xFFFFFF != (data >> 32) & 0xFFFFFF:
        return
    if f.kind == FLOW_TCP:
        tcp_from_sock(p, f, events)
        return
    if f.sock >= 0 and events & EPOLLERR:
        errors_from_sock(p, f, NULL)
    datagrams_from_sock(p, f)


cdef void tell_of_faults(Plane *p) noexcept nogil:
    """Wake the control thread for rings that have been broken."""
    cdef uint64_t one = 1
    cdef int i
    if memory_gone(&p.mem):
        for i in range(QUEUES):
            if p.queues[i].started and not p.queues[i].broken:
                queue_break(&p.queues[i], NO_MEMORY)
    for i in range(QUEUES):
        if p.queues[i].broken and not p.queues[i].told:
            p.queues[i].told = p.faults = True
            write(p.rare_event, &one, 8)


cdef void serve_rings(Plane *p) noexcept nogil:
    """Serve those that wait for receive buffers, and publish what was used."""
    cdef Queue *q = &p.queues[RX]
    cdef int i
    cdef uint16_t seen
    if q.broken and q.used != NULL:
        queue_publish(q, &p.mem)    # what was used before it broke
    if not queue_active(q):
        return
    for i in range(RING_ROUNDS):
        seen = queue_seen(q)
        serve_ring_waiters(p)
        settle(p)
        queue_publish(q, &p.mem)
        if p.ring_wait == NONE:
            queue_notify_off(q, &p.mem)
            return
        if not queue_notify_on(q, &p.mem, seen):
            return
    p.again = True   # the guest adds buffers all the time: others first, then again


cdef void card_out(Plane *p) noexcept nogil:
    """Send what was published, where that is for us to do."""
    if p.card == NULL:
        return
    if card_to_socket(p.card) and p.ring_wait != NONE:
        p.again = True      # there are buffers again for those that wait
    if p.card.readable:
        p.again = True


cdef void end_turn(Plane *p) noexcept nogil:
    """Settle what was touched, serve the rings, and tell of them."""
    settle(p)
    serve_rings(p)
    tell_of_faults(p)
    card_out(p)


cdef int sleep_ms(Plane *p) noexcept nogil:
    """How long the loop may sleep: milliseconds, -1 for ever."""
    cdef int most = timeout_ms(p), left
    if not p.accept_again:
        return most
    left = <int>(p.accept_again - p.now) if p.accept_again > p.now else 0
    return left if most < 0 or left < most else most


cdef int poll_busy(Plane *p, epoll_event *events) noexcept nogil:
    """Wait, first without sleeping, and without kicks from the guest.

    Returns as epoll_wait does, with p.again where the guest has sent something.
    """
    cdef Queue *q = &p.queues[TX]
    cdef uint64_t until = clock_ns() + p.busy_poll
    cdef int n
    while True:
        n = epoll_wait(p.epfd, events, EVENTS, 0)
        if queue_active(q) and queue_pending(q) != 0:
            break           # also where there are events: there may be some each time
        if n != 0:
            return n
        if clock_ns() >= until:
            if not queue_active(q) or not queue_notify_on(q, &p.mem, q.last_avail):
                return epoll_wait(p.epfd, events, EVENTS, sleep_ms(p))
            break
    p.again = True
    return n


cdef void run_timers(Plane *p) noexcept nogil:
    """Timers that are due, when the guest's ring is read to where it was when they became due.

    What it has acknowledged is not sent again: this thread may have stood still for a while, and nothing need have told
    of the ring yet. A ring takes several turns where it is large; a guest that fills it all the time gains no more.
    """
    cdef Flow *f
    cdef int i
    if not p.again:
        frames_from_guest(p)
    if p.again and p.timers_wait < p.queues[TX].num // TX_BATCH:
        p.timers_wait += 1
        return
    p.timers_wait = 0
    for i in range(TIMERS):
        f = flow_due(p)
        if f == NULL:
            return
        if f.kind == FLOW_TCP:
            tcp_timer(p, f)
        else:
            flow_close(p, f)    # nothing was heard of it for so long


cdef void go_on(Plane *p) noexcept nogil:
    """What control changed may have made something possible."""
    p.now = clock_ms(p)
    frames_from_guest(p)
    end_turn(p)


cdef int turn(Plane *p, bint wait) noexcept nogil:
    """One turn; with ``wait`` there is something to do before it. Whether control has woken us, or a negative error
    number."""
    cdef epoll_event events[EVENTS]
    cdef int n, i, kind
    cdef uint64_t data, ignored, one = 1
    cdef bint woken = False
    if p.pcap.fd >= 0:
        pcap_flush(p)
    if p.tell_activity and frames_both_ways(p) != p.quiet_frames:
        p.tell_activity = False
        write(p.rare_event, &one, 8)
    if p.again or not wait:
        n = epoll_wait(p.epfd, events, EVENTS, 0)
    elif p.busy_poll:
        n = poll_busy(p, events)
    else:
        n = epoll_wait(p.epfd, events, EVENTS, sleep_ms(p))
    if n < 0 and errno == EINTR:
        # Stopped in its sleep (signal(7)), perhaps for long: events are due, and not the timers alone.
        n = epoll_wait(p.epfd, events, EVENTS, 0)
    if n < 0 and errno != EINTR:
        return -errno
    p.now = clock_ms(p)
    if p.again:
        frames_from_guest(p)
    for i in range(n):
        data = events[i].data.u64
        kind = <int>(data >> 56)
        if kind == WATCH_FLOW:
            flow_event(p, data, events[i].events)
        elif kind == WATCH_KICK:
            p.queues[<uint32_t>data].kicked = True
            if <uint32_t>data == TX:
                frames_from_guest(p)
            # A kick of the receive ring: those that wait are served below.
        elif kind == WATCH_CARD:
            if p.card != NULL:
                card_event(p.card, events[i].events)
        elif kind == WATCH_LISTENER:
            if <int>data < p.listener_count and p.listeners[<int>data].fd >= 0:
                tcp_accept(p, &p.listeners[<int>data])
        elif kind == WATCH_WAKE:
            read(p.wake, &ignored, 8)
            woken = True
    if p.card != NULL and card_from_socket(p.card):
        frames_from_guest(p)
    if woken:
        frames_from_control(p)
    if p.accept_again and p.accept_again <= p.now:
        tcp_accept_again(p)
    if timeout_ms(p) == 0:
        run_timers(p)
    end_turn(p)
    return woken


cdef int loop_run(Plane *p) noexcept nogil:
    cdef int woken
    while True:
        woken = turn(p, True)
        if woken < 0:
            return woken
        if not woken:
            continue
        if p.stop_wanted:
            return 0
        if p.errand != NULL:
            p.errand(p.errand_for)
            p.errand = NULL
            sem_post(&p.parked)
        if p.park_wanted:
            p.park_wanted = False
            sem_post(&p.parked)
            while sem_wait(&p.resume) != 0:
                pass
            if p.stop_wanted:
                return 0    # what control was about to change is half changed
            go_on(p)


cdef int loop_step(Plane *p) noexcept nogil:
    go_on(p)
    return turn(p, False)
