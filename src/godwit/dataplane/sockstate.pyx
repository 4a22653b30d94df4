# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's side of a TCP connection: frozen, read out, and made anew.

The order is the callers', who have many sockets (`moving`). On the source:
freeze, repair on (by the helper), dump; to go on after all: thaw, repair off,
thaw. On the target: create (frozen), repair on, connect; at the commit: open,
complete, repair off, finish. Repair mode ends with TCP_REPAIR_OFF, whose window
probe has the peer say where it is, and the thaw comes first lest the answer be
missed.

A dump changes nothing but SO_PEEK_OFF, which the caller sets anew.
docs/platform/ has the kernel's behaviour that this relies on.
"""

import os

from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy, memmove, memset

from godwit.dataplane.host cimport is_link_local6, is_v4
from godwit.dataplane.sys cimport (
    AF_INET,
    AF_INET6,
    EAGAIN,
    ECONNREFUSED,
    EINPROGRESS,
    EINTR,
    EINVAL,
    ENOBUFS,
    ENOMEM,
    IPPROTO_IPV6,
    IPPROTO_TCP,
    MSG_DONTWAIT,
    MSG_NOSIGNAL,
    MSG_PEEK,
    SHUT_WR,
    SIOCINQ,
    SIOCOUTQ,
    SO_BUF_LOCK,
    SO_ERROR,
    SO_KEEPALIVE,
    SO_OOBINLINE,
    SO_PEEK_OFF,
    SO_REUSEADDR,
    SO_REUSEPORT,
    SO_SNDBUF,
    SOCK_CLOEXEC,
    SOCK_NONBLOCK,
    SOCK_STREAM,
    SOL_SOCKET,
    TCP_NODELAY,
    TCP_RTO_MAX_MS,
    bind,
    close,
    connect,
    errno,
    getsockname,
    getsockopt,
    ioctl,
    poll,
    pollfd,
    put16,
    recv,
    send,
    setsockopt,
    shutdown,
    sockaddr,
    sockaddr_in,
    sockaddr_in6,
    sockaddr_storage,
    socket,
    socklen_t,
)

cdef extern from "<linux/tcp.h>" nogil:
    cdef struct tcp_info:
        uint8_t tcpi_state
        uint8_t tcpi_options
        uint8_t tcpi_snd_wscale
        uint8_t tcpi_rcv_wscale
        uint32_t tcpi_unacked
        uint32_t tcpi_segs_in
        uint32_t tcpi_notsent_bytes
    cdef struct tcp_repair_opt:
        uint32_t opt_code
        uint32_t opt_val
    cdef struct tcp_repair_window:
        uint32_t snd_wl1
        uint32_t snd_wnd
        uint32_t max_window
        uint32_t rcv_wnd
        uint32_t rcv_wup
    enum:
        TCP_INFO
        TCP_MAXSEG
        TCP_TIMESTAMP
        TCP_REPAIR_QUEUE
        TCP_QUEUE_SEQ
        TCP_REPAIR_OPTIONS
        TCP_REPAIR_WINDOW
        TCP_NO_QUEUE
        TCP_RECV_QUEUE
        TCP_SEND_QUEUE
        TCPI_OPT_TIMESTAMPS
        TCPI_OPT_SACK

cdef extern from *:
    """
    #include <sys/socket.h>
    #include <linux/in.h>
    #include <linux/in6.h>
    #include <linux/sockios.h>
    #ifndef IP_MINTTL
    #define IP_MINTTL 21
    #endif
    #ifndef IPV6_MINHOPCOUNT
    #define IPV6_MINHOPCOUNT 73
    #endif
    #include <poll.h>
    """
    enum:
        IP_MINTTL
        IPV6_MINHOPCOUNT
        IPPROTO_IP
        SIOCOUTQNSD
        POLLIN
        POLLPRI
        SO_DETACH_FILTER

cdef enum:
    # option codes that TCP_REPAIR_OPTIONS takes: those of the wire
    OPT_MSS = 2
    OPT_WS = 3
    OPT_SACK = 4
    OPT_TS = 8
    MAX_WINDOW = 0xFFFF << 14   # RFC 7323, 2.2
    MAX_QUEUE = 64 << 20    # bytes; as the published stream has it
    PIECE = 128 << 10       # a queue is written in pieces of this, halved where the kernel is short
    LEAST_PIECE = 1024
    FROZEN_TTL = 255
    HURRY_RTO = 1000        # ms; the least that the kernel takes
    LINUX_RTO = 120000      # its own limit (TCP_RTO_MAX)
    DEFAULT_ROOM = 32 << 10     # bytes of a queue that every new socket takes
    # TCP_MAXSEG takes no more. See send_room().
    MOST_MSS = 32767


cdef int set_int(int fd, int level, int option, int value) noexcept nogil:
    return -errno if setsockopt(fd, level, option, &value, sizeof(value)) != 0 else 0


cdef int set_u32(int fd, int option, uint32_t value) noexcept nogil:
    return -errno if setsockopt(fd, IPPROTO_TCP, option, &value, sizeof(value)) != 0 else 0


cdef int get_u32(int fd, int option, uint32_t *value) noexcept nogil:
    cdef socklen_t n = sizeof(uint32_t)
    return -errno if getsockopt(fd, IPPROTO_TCP, option, value, &n) != 0 else 0


cdef int sock_freeze(int fd, bint v6) noexcept nogil:
    """Have the kernel discard what comes in, before TCP sees it (RFC 5082).

    Nobody off-link can send with a hop limit of 255. So nothing is
    acknowledged, and the peer keeps its data and sends it again.
    """
    if v6:
        return set_int(fd, IPPROTO_IPV6, IPV6_MINHOPCOUNT, FROZEN_TTL)
    return set_int(fd, IPPROTO_IP, IP_MINTTL, FROZEN_TTL)


cdef int sock_thaw(int fd, bint v6) noexcept nogil:
    # The end of repair mode takes this from a socket, and then nobody could
    # listen on its port any more.
    set_int(fd, SOL_SOCKET, SO_REUSEADDR, 1)
    # As at first, should repair mode not end: nothing is to be read or written by mistake. Refused where it has ended.
    set_u32(fd, TCP_REPAIR_QUEUE, TCP_NO_QUEUE)
    return sock_open(fd, v6)


cdef int sock_open(int fd, bint v6) noexcept nogil:
    # A repair helper locks a socket by a filter, and another one may have
    # ended the repair mode: without this the connection would be deaf.
    set_int(fd, SOL_SOCKET, SO_DETACH_FILTER, 0)
    if v6:
        return set_int(fd, IPPROTO_IPV6, IPV6_MINHOPCOUNT, 0)
    return set_int(fd, IPPROTO_IP, IP_MINTTL, 0)


cdef void sock_hurry(int fd, bint on) noexcept nogil:
    """Limit the kernel's wait between retransmissions, or end that limit.

    Until the network has been switched all that is sent gets lost, and the
    kernel's waits would double. Not for long: the limit also shortens the time
    after which the kernel gives up (to about 13 s). Before Linux 6.15 there is
    no such option, and the waits double.
    """
    set_int(fd, IPPROTO_TCP, TCP_RTO_MAX_MS, HURRY_RTO if on else LINUX_RTO)


cdef int sock_create(bint v6) noexcept nogil:
    cdef int rc, fd = socket(AF_INET6 if v6 else AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)
    if fd < 0:
        return -errno
    # Repair mode, which begins before the socket is bound, has SO_REUSEADDR in it.
    rc = sock_freeze(fd, v6)
    if rc != 0:
        close(fd)
        return rc
    return fd


cdef bint sock_is_connecting(int fd) noexcept nogil:
    """Whether a SYN of ours waits for its answer."""
    cdef tcp_info info
    cdef socklen_t n = sizeof(info)
    memset(&info, 0, sizeof(info))
    return getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &n) == 0 and info.tcpi_state == SYN_SENT


cdef bint fin_received(uint8_t state) noexcept nogil:
    return state == CLOSE_WAIT or state == LAST_ACK or state == CLOSING or state == CLOSED


cdef bint fin_sent(uint8_t state) noexcept nogil:
    return state == FIN_WAIT1 or state == FIN_WAIT2 or state == LAST_ACK or state == CLOSING


cdef int peek_queue(int fd, uint8_t *out, uint32_t size, uint32_t *got) noexcept nogil:
    """Copy the selected queue. `got` may be less than `size`: a count may hold a FIN."""
    cdef ssize_t n
    got[0] = 0
    if size == 0:
        return 0
    while True:
        n = recv(fd, out, size, MSG_PEEK | MSG_DONTWAIT)
        if n >= 0:
            got[0] = <uint32_t>n
            return 0
        if errno == EAGAIN:
            return 0
        if errno != EINTR:
            return -errno


cdef void sock_look(pollfd *looked, int count) noexcept nogil:
    """Ask for all at once what sock_dump() has to know of each."""
    cdef int i
    for i in range(count):
        looked[i].events = POLLIN | POLLPRI
        looked[i].revents = POLLIN
    while poll(looked, count, 0) < 0:
        if errno != EINTR:
            for i in range(count):
                looked[i].revents = POLLPRI     # not known: it is not dumped
            return


cdef int sock_dump(const pollfd *looked, SockState *s, Queued *q) noexcept nogil:
    cdef tcp_info info
    cdef tcp_repair_window window
    cdef int fd = looked.fd
    cdef socklen_t n = sizeof(info)
    cdef sockaddr_storage local
    cdef int outq = 0, inq = 0, rc, error = 0
    cdef bint known
    memset(s, 0, sizeof(SockState))
    memset(&info, 0, sizeof(info))
    if getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &n) != 0:
        return -errno
    known = n >= sizeof(info)
    s.tcpi_state = info.tcpi_state
    s.tcpi_options = info.tcpi_options
    s.snd_ws = info.tcpi_snd_wscale
    s.rcv_ws = info.tcpi_rcv_wscale
    if s.tcpi_state == CLOSED:
        # Closed by both sides, with bytes to be read perhaps; or broken.
        n = sizeof(error)
        if getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &n) != 0:
            return -errno
        if error != 0:
            return -error
        n = sizeof(local)
        if getsockname(fd, <sockaddr *>&local, &n) != 0:
            return -errno
        if (<sockaddr_in *>&local).sin_port == 0:   # sin6_port is at the same place
            return -EINVAL      # it has never been connected
    elif s.tcpi_state != ESTABLISHED and s.tcpi_state != CLOSE_WAIT and not fin_sent(s.tcpi_state):
        return -EINVAL
    # A peek ends before an urgent byte, and what comes after it would be lost.
    if looked.revents & POLLPRI:
        return -EINVAL
    rc = get_u32(fd, TCP_MAXSEG, &s.mss)
    if rc == 0 and s.tcpi_options & TCPI_OPT_TIMESTAMPS:
        rc = get_u32(fd, TCP_TIMESTAMP, &s.timestamp)
    if rc != 0:
        return rc
    n = sizeof(window)
    if getsockopt(fd, IPPROTO_TCP, TCP_REPAIR_WINDOW, &window, &n) != 0:
        return -errno
    s.snd_wl1 = window.snd_wl1
    s.snd_wnd = window.snd_wnd
    s.max_window = window.max_window
    s.rcv_wnd = window.rcv_wnd
    s.rcv_wup = window.rcv_wup
    if s.tcpi_state == CLOSE_WAIT or s.tcpi_state == LAST_ACK or s.tcpi_state == CLOSED:
        s.rcv_wnd += 1
        s.rcv_wup -= 1
    # Of an idle connection that says all there is to know of its queues.
    if not (known and s.tcpi_state == ESTABLISHED and info.tcpi_unacked == 0 and info.tcpi_notsent_bytes == 0):
        if ioctl(fd, SIOCOUTQ, &outq) != 0:
            return -errno
    if looked.revents != 0 and ioctl(fd, SIOCINQ, &inq) != 0:
        return -errno
    if outq < 0 or inq < 0 or outq > MAX_QUEUE or inq > MAX_QUEUE:
        return -ENOBUFS
    q.out = outq
    q.incoming = inq
    return 0


cdef int sock_dump_queues(int fd, SockState *s, const Queued *q, uint8_t *out) noexcept nogil:
    cdef uint32_t end, fin = fin_sent(s.tcpi_state)
    cdef int rc, notsent = 0
    if q.out or q.incoming:
        # With an offset set, peeking in repair mode starts anywhere. Without
        # the option there is no offset either.
        set_int(fd, SOL_SOCKET, SO_PEEK_OFF, -1)
    rc = set_u32(fd, TCP_REPAIR_QUEUE, TCP_RECV_QUEUE)
    if rc == 0:
        rc = get_u32(fd, TCP_QUEUE_SEQ, &end)
    if rc == 0:
        rc = peek_queue(fd, out + q.out, q.incoming, &s.rcvq)
    if rc != 0:
        return rc
    if s.rcvq + fin_received(s.tcpi_state) < q.incoming:
        return -EINVAL
    # A FIN that was received stays counted: the new socket never sees it, but
    # must expect what comes after.
    s.seq_rcv = end - s.rcvq
    # Last, and it stays selected. Otherwise a socket in repair mode, too, sends what it has not sent yet, without an
    # acknowledgement that would let it: when the device has taken what was sent before (TCP small queues), or to probe
    # for a loss (RFC 8985, 7). The peer would have more than the new socket knows to be sent, and that would never
    # believe its acknowledgements.
    rc = set_u32(fd, TCP_REPAIR_QUEUE, TCP_SEND_QUEUE)
    # At once: what it would send now only counts as sent.
    if rc == 0 and q.out and ioctl(fd, SIOCOUTQNSD, &notsent) != 0:
        rc = -errno
    if rc == 0:
        rc = get_u32(fd, TCP_QUEUE_SEQ, &end)
    if rc == 0:
        rc = peek_queue(fd, out, q.out, &s.sndq)
    if rc != 0:
        return rc
    # The counts and the sequence number are of TCP's sequence space: a FIN is
    # in them, acknowledged or not. The bytes are what could be read.
    if s.sndq + fin < q.out:
        return -EINVAL
    if s.sndq < q.out:
        memmove(out + s.sndq, out + q.out, s.rcvq)
    s.seq_snd = end - fin - s.sndq
    s.tcpi_options &= ~SEQ_OF_FIRST_BYTE
    if fin:
        s.tcpi_options |= SEQ_OF_FIRST_BYTE
    s.notsent = <uint32_t>notsent - fin if notsent > <int>fin else 0
    if s.notsent > s.sndq:
        s.notsent = s.sndq
    return 0


cdef int write_queue(int fd, const uint8_t *data, uint32_t size, uint32_t *done) noexcept nogil:
    """Write into the selected queue, or to the peer; `done` counts. A full buffer is no error."""
    cdef uint32_t piece = PIECE
    cdef ssize_t n
    done[0] = 0
    while done[0] < size:
        n = send(fd, data + done[0], piece if piece < size - done[0] else size - done[0], MSG_DONTWAIT | MSG_NOSIGNAL)
        if n > 0:
            done[0] += <uint32_t>n
        elif n == 0 or errno == EAGAIN:
            return 0
        elif (errno == ENOMEM or errno == ENOBUFS) and piece > LEAST_PIECE:
            piece >>= 1
        elif errno == ENOMEM or errno == ENOBUFS:
            return 0
        elif errno != EINTR:
            return -errno
    return 0


cdef int sock_restore(int fd, const SockState *s, const uint8_t *rcvq) noexcept nogil:
    """Fill a connected socket in repair mode, its receive queue selected: all but the send queue."""
    cdef tcp_repair_opt options[4]
    cdef tcp_repair_window window
    cdef int rc, n = 2
    cdef uint32_t done
    # The kernel checks the window's other fields, and would accept data from
    # anywhere in sequence space with this one.
    if s.rcv_wnd > MAX_WINDOW + 1:
        return -EINVAL
    rc = write_queue(fd, rcvq, s.rcvq, &done)
    if rc == 0 and done < s.rcvq:
        rc = -ENOBUFS
    if rc != 0:
        return rc
    options[0].opt_code = OPT_WS
    options[0].opt_val = s.snd_ws | <uint32_t>s.rcv_ws << 16
    options[1].opt_code = OPT_MSS
    options[1].opt_val = s.mss
    if s.tcpi_options & TCPI_OPT_SACK:
        options[n].opt_code = OPT_SACK
        options[n].opt_val = 0
        n += 1
    if s.tcpi_options & TCPI_OPT_TIMESTAMPS:
        options[n].opt_code = OPT_TS
        options[n].opt_val = 0
        n += 1
    if setsockopt(fd, IPPROTO_TCP, TCP_REPAIR_OPTIONS, options, n * sizeof(tcp_repair_opt)) != 0:
        return -errno
    window.snd_wl1 = s.snd_wl1
    window.snd_wnd = s.snd_wnd
    window.max_window = s.max_window
    window.rcv_wnd = s.rcv_wnd
    window.rcv_wup = s.rcv_wup
    if setsockopt(fd, IPPROTO_TCP, TCP_REPAIR_WINDOW, &window, sizeof(window)) != 0:
        return -errno
    return 0


cdef socklen_t sock_end(sockaddr_storage *out, const uint8_t *a, uint16_t port, uint32_t scope) noexcept nogil:
    """An address of 16 bytes as the kernel takes it."""
    cdef sockaddr_in *a4 = <sockaddr_in *>out
    cdef sockaddr_in6 *a6 = <sockaddr_in6 *>out
    memset(out, 0, sizeof(sockaddr_storage))
    if is_v4(a):
        a4.sin_family = AF_INET
        put16(&a4.sin_port, port)
        memcpy(&a4.sin_addr, a + 12, 4)
        return sizeof(sockaddr_in)
    a6.sin6_family = AF_INET6
    put16(&a6.sin6_port, port)
    memcpy(&a6.sin6_addr, a, 16)
    if is_link_local6(a):
        a6.sin6_scope_id = scope
    return sizeof(sockaddr_in6)


cdef bint send_room(int fd, uint32_t bytes_sent) noexcept nogil:
    """Make the send buffer of an unconnected socket large enough, or as large as we may.

    Repair mode obeys its limit. The kernel goes on to size it by itself
    (SO_BUF_LOCK), from there. Returns whether segments are larger for it, until it is connected.
    """
    cdef int size = 0, wanted = bytes_sent + bytes_sent // 8 + 2 * PIECE
    cdef socklen_t n = sizeof(size)
    if bytes_sent <= DEFAULT_ROOM:
        return False
    set_int(fd, SOL_SOCKET, SO_SNDBUF, wanted // 2)     # which doubles it
    set_int(fd, SOL_SOCKET, SO_BUF_LOCK, 0)
    if getsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, &n) == 0 and size >= wanted:
        return False
    # Beyond net.core.wmem_max (208 KiB before Linux 6.18): on connect the
    # kernel has room for an initial window of segments; so let them be large.
    set_int(fd, IPPROTO_TCP, TCP_MAXSEG, MOST_MSS)
    return True


# Where sock_connect() may fail.
cdef enum:
    AT_BIND = 0
    AT_TIMESTAMP
    AT_SEQUENCE
    AT_CONNECT
    AT_FILLING

STEPS = (
    "binding to the address of the connection", "TCP_TIMESTAMP", "TCP_QUEUE_SEQ", "connecting in repair mode",
    "filling the connection",
)


cdef int sock_connect(int fd, const sockaddr_storage *local, const sockaddr_storage *remote, socklen_t size,
                      const SockState *given, const uint8_t *rcvq, uint32_t room, uint32_t *left_out,
                      int *step) noexcept nogil:
    """Make a socket in repair mode the connection that `given` describes: all but the send queue.

    This host's buffers may be smaller than the source's: bytes from the start
    of the receive queue that are beyond `room` are left out. The end of the
    queue goes into the socket: its numbers must be right.
    """
    cdef SockState s = given[0]
    cdef uint32_t first_byte = s.seq_snd
    cdef bint larger
    cdef int rc
    if fin_sent(s.tcpi_state) and not s.tcpi_options & SEQ_OF_FIRST_BYTE:
        first_byte -= 1
    left_out[0] = s.rcvq - room if s.rcvq > DEFAULT_ROOM and s.rcvq > room else 0
    step[0] = AT_BIND
    if bind(fd, <const sockaddr *>local, size) != 0:
        return -errno
    step[0] = AT_TIMESTAMP
    if s.tcpi_options & TCPI_OPT_TIMESTAMPS:
        rc = set_u32(fd, TCP_TIMESTAMP, s.timestamp)
        if rc != 0:
            return rc
    step[0] = AT_SEQUENCE
    rc = set_u32(fd, TCP_REPAIR_QUEUE, TCP_SEND_QUEUE)
    if rc == 0:
        rc = set_u32(fd, TCP_QUEUE_SEQ, first_byte)
    if rc == 0:
        rc = set_u32(fd, TCP_REPAIR_QUEUE, TCP_RECV_QUEUE)
    if rc == 0:
        rc = set_u32(fd, TCP_QUEUE_SEQ, s.seq_rcv + left_out[0])
    if rc != 0:
        return rc
    # The size of segments is settled by connect(): the MSS among the options
    # comes too late for it, and segments would stay at the least size, 536.
    set_int(fd, IPPROTO_TCP, TCP_MAXSEG, <int>min(s.mss, <uint32_t>MOST_MSS))
    larger = send_room(fd, s.sndq - s.notsent)
    step[0] = AT_CONNECT
    if connect(fd, <const sockaddr *>remote, size) != 0:
        return -errno
    if larger:
        set_int(fd, IPPROTO_TCP, TCP_MAXSEG, 0)     # as large as the options say
    step[0] = AT_FILLING
    s.rcvq -= left_out[0]
    return sock_restore(fd, &s, rcvq + left_out[0])


cdef int sock_complete(int fd, const SockState *s, const uint8_t *sndq) noexcept nogil:
    """Still in repair mode, at the commit: the part of the send queue that was sent.

    Not before: what is in the queue counts as sent just now, and repair mode
    does not keep the kernel from sending it again when the time has come.
    """
    cdef uint32_t done, sent = s.sndq - s.notsent
    cdef int rc
    set_int(fd, IPPROTO_TCP, TCP_NODELAY, 1)
    set_int(fd, SOL_SOCKET, SO_OOBINLINE, 1)    # this and the next: see begin(), tcp.pyx
    set_int(fd, SOL_SOCKET, SO_KEEPALIVE, 1)
    # Before the queue: a connection without a measured round-trip time waits
    # 3 s before it retransmits, and its timer starts when that is written.
    sock_hurry(fd, True)
    if s.sndq == 0 and s.tcpi_state != FIN_WAIT2:
        return 0
    rc = set_u32(fd, TCP_REPAIR_QUEUE, TCP_SEND_QUEUE)
    if rc == 0:
        rc = write_queue(fd, sndq, sent, &done)
        if rc == 0 and done < sent:
            rc = -ENOBUFS
    # In FIN_WAIT2 the FIN was acknowledged: it counts as sent, as all in repair mode.
    if rc == 0 and s.tcpi_state == FIN_WAIT2 and shutdown(fd, SHUT_WR) != 0:
        rc = -errno
    return rc


cdef int sock_finish(int fd, const SockState *s, const uint8_t *unsent) noexcept nogil:
    """Out of repair mode: hand over what was not sent yet. Returns the bytes taken, or an error.

    The FIN, where one is due, follows when all was taken.
    """
    cdef uint32_t done
    cdef int rc
    set_int(fd, SOL_SOCKET, SO_REUSEADDR, 1)    # see sock_thaw()
    rc = write_queue(fd, unsent, s.notsent, &done)
    if rc != 0:
        return rc
    if done == s.notsent and (s.tcpi_state == FIN_WAIT1 or s.tcpi_state == LAST_ACK or s.tcpi_state == CLOSING):
        if shutdown(fd, SHUT_WR) != 0:
            return -errno
    return <int>done


# ---- for the control thread

cdef object check(int rc, str what):
    if rc < 0:
        raise OSError(-rc, f"{what}: {os.strerror(-rc)}")


def thaw(int fd, bint v6):
    """Undo `moving.freeze`, and what repair mode and its helper have left on the socket."""
    check(sock_thaw(fd, v6), "thawing a socket")


def freeze_listener(int fd):
    """Freeze a listening socket, of either family or both: a SYN gets no answer."""
    sock_freeze(fd, True)   # not for an IPv4 socket, which refuses it
    check(sock_freeze(fd, False), "freezing a listening socket")


def thaw_listener(int fd):
    """Undo freeze_listener()."""
    sock_thaw(fd, True)
    check(sock_thaw(fd, False), "thawing a listening socket")


def knock(bytes our_addr, uint16_t our_port, bytes end_addr, uint16_t end_port, uint32_t scope, bint share=False):
    """Have the peer of a connection that is no more find that out. See the .pyi."""
    cdef sockaddr_storage local, remote
    cdef socklen_t local_size = fill(&local, our_addr, our_port, scope)
    cdef socklen_t remote_size = fill(&remote, end_addr, end_port, scope)
    cdef int one = 1, error = 0
    cdef bint answered = False
    cdef tcp_info info
    cdef socklen_t n = sizeof(info)
    cdef sockaddr nobody
    cdef int fd = socket(local.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)
    check(-errno if fd < 0 else 0, "socket")
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one))
    if share:
        setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &one, sizeof(one))
    if bind(fd, <sockaddr *>&local, local_size) != 0:
        error = errno
    elif connect(fd, <sockaddr *>&remote, remote_size) != 0 and errno != EINPROGRESS:
        error = errno
    # Where the peer is near, its answer may be there already.
    memset(&info, 0, sizeof(info))
    if error == ECONNREFUSED or (error == 0 and getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &n) == 0
                                 and info.tcpi_segs_in > 0):
        answered = True
        error = 0
    # Ended at once: were it there when the answer comes it would connect anew
    # after the reset. And if it has connected, to a peer that is long another's.
    memset(&nobody, 0, sizeof(nobody))
    connect(fd, &nobody, sizeof(nobody))
    close(fd)
    check(-error, "knocking")
    return answered


cdef socklen_t fill(sockaddr_storage *out, bytes addr, uint16_t port, uint32_t scope) except 0:
    if len(addr) != 16:
        raise ValueError(f"an address of {len(addr)} bytes")
    return sock_end(out, addr, port, scope)


LIMITS = ("core/wmem_max", "ipv4/tcp_rmem", "ipv4/ip_local_port_range")
kept_limits = {}    # what was read, by name


def keep_limits():
    """Read the kernel's limits now, for a process that will see no /proc. See the .pyi."""
    for name in LIMITS:
        kept_limits[name] = read_limits(name)


cdef object read_limits(str name):
    try:
        with open(f"/proc/sys/net/{name}") as limits:
            return [int(word) for word in limits.read().split()]
    except (OSError, ValueError):
        return []


cdef object kernel_limits(str name):
    """The numbers in a file below /proc/sys/net, of which a namespace need not show all; an empty list then."""
    return kept_limits[name] if name in kept_limits else read_limits(name)


cpdef tuple ephemeral_ports():
    """See the .pyi."""
    found = kernel_limits("ipv4/ip_local_port_range")
    return (found[0], found[1]) if len(found) == 2 else (32768, 60999)     # as it is where nobody has changed it


cdef object kernel_limit(str name, default):
    """The last of them."""
    found = kernel_limits(name)
    return found[-1] if found else default


cdef uint32_t receive_room():
    """Bytes of a receive queue that surely fit into a new socket.

    A receive buffer grows by itself as the queue is written, as long as nobody
    has set its size; to tcp_rmem's limit.
    """
    return min(kernel_limit("ipv4/tcp_rmem", 4 << 20), MAX_QUEUE) // 8 * 7
