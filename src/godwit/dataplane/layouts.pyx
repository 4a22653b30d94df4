# SPDX-License-Identifier: GPL-2.0-or-later
# cython: boundscheck=False, wraparound=False
"""How TCP flows and their sockets lie in streams: the quick way in and out for very many.

The layouts are declared, field by field and with all rules, in ``godwit.net``
(``records.FLOW`` and ``SOCKET``, ``native.FLOW``): that is where they are
explained, and where it is said what is wrong with a record. Here is the quick
way for records with which nothing is wrong; the tests compare the two.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memcmp, memcpy, memset

from godwit.dataplane.host cimport is_v4
from godwit.dataplane.plane cimport EV_ACCEPTED, EV_ESTABLISHED, EV_SYN_FROM_GUEST
from godwit.dataplane.sockstate cimport SockState

from godwit.dataplane.state import Side

cdef enum:
    PIF_HOST = 1
    PIF_GUEST = 2
    WORDS = 12
    MAX_QUEUE = 64 << 20    # bytes
    MAX_SCALE = 14          # RFC 7323, 2.3
    # TCP_INFO's, of a connection
    STATES = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 9 | 1 << 11


# ---- flows

cdef void side_out(gw_side2 *side, const End *our, const End *end) noexcept nogil:
    memcpy(side.our, our.addr, 16)
    memcpy(side.end, end.addr, 16)
    side.our_port = our.port
    side.end_port = end.port


cdef void side_in(const gw_side2 *side, End *our, End *end) noexcept nogil:
    memcpy(our.addr, side.our, 16)
    memcpy(end.addr, side.end, 16)
    our.port = side.our_port
    end.port = side.end_port


cdef void out2(const Moved *m, gw_flow2 *r) noexcept nogil:
    cdef int guest = 0 if m.from_guest else 1
    memset(r, 0, sizeof(gw_flow2))
    r.pif[guest] = PIF_GUEST
    r.pif[1 - guest] = PIF_HOST
    side_out(&r.side[guest], &m.guest_our, &m.guest_end)
    side_out(&r.side[1 - guest], &m.host_our, &m.host_end)
    r.retries = m.retries
    r.ws_from = m.ws_from_guest
    r.ws_to = m.ws_to_guest
    r.events = m.events
    r.mss = htobe32(m.mss)
    r.wnd_from = htobe16(m.wnd_from_guest)
    r.wnd_to = htobe16(m.wnd_to_guest)
    r.seq_to = htobe32(m.seq_to_guest)
    r.ack_from = htobe32(m.ack_from_guest)
    r.seq_from = htobe32(m.seq_from_guest)
    r.ack_to = htobe32(m.ack_to_guest)
    r.init_from = htobe32(m.init_from_guest)


cdef bint in2(const gw_flow2 *r, Moved *m) noexcept nogil:
    """Whether the record is surely sound."""
    cdef int guest = 0 if r.pif[0] == PIF_GUEST else 1
    if r.pif[guest] != PIF_GUEST or r.pif[1 - guest] != PIF_HOST:
        return False
    memset(m, 0, sizeof(Moved))
    m.from_guest = guest == 0
    side_in(&r.side[guest], &m.guest_our, &m.guest_end)
    side_in(&r.side[1 - guest], &m.host_our, &m.host_end)
    m.retries = r.retries
    m.ws_from_guest = r.ws_from
    m.ws_to_guest = r.ws_to
    m.events = r.events
    m.mss = htobe32(r.mss)
    m.wnd_from_guest = htobe16(r.wnd_from)
    m.wnd_to_guest = htobe16(r.wnd_to)
    m.seq_to_guest = htobe32(r.seq_to)
    m.ack_from_guest = htobe32(r.ack_from)
    m.seq_from_guest = htobe32(r.seq_from)
    m.ack_to_guest = htobe32(r.ack_to)
    m.init_from_guest = htobe32(r.init_from)
    return is_sound(m) and m.events & EV_ESTABLISHED and m.mss % 4 == 0 and htobe32(r.sndbuf) < 1 << 24


cdef void out_native(const Moved *m, gw_flow_native *r) noexcept nogil:
    r.initiator = PIF_GUEST if m.from_guest else PIF_HOST
    memcpy(r.guest_our, m.guest_our.addr, 16)
    memcpy(r.guest_end, m.guest_end.addr, 16)
    memcpy(r.host_our, m.host_our.addr, 16)
    memcpy(r.host_end, m.host_end.addr, 16)
    r.guest_our_port = htobe16(m.guest_our.port)
    r.guest_end_port = htobe16(m.guest_end.port)
    r.host_our_port = htobe16(m.host_our.port)
    r.host_end_port = htobe16(m.host_end.port)
    r.events = m.events
    r.ws_from = m.ws_from_guest
    r.ws_to = m.ws_to_guest
    r.mss = htobe16(<uint16_t>m.mss)
    r.wnd_from = htobe16(m.wnd_from_guest)
    r.wnd_to = htobe16(m.wnd_to_guest)
    r.seq_to = htobe32(m.seq_to_guest)
    r.ack_from = htobe32(m.ack_from_guest)
    r.seq_from = htobe32(m.seq_from_guest)
    r.ack_to = htobe32(m.ack_to_guest)
    r.init_from = htobe32(m.init_from_guest)
    r.bytes_from = htobe64(m.bytes_from_guest)
    r.bytes_to = htobe64(m.bytes_to_guest)
    r.idle = htobe32(m.idle)


cdef bint in_native(const gw_flow_native *r, Moved *m) noexcept nogil:
    """Whether the record is surely sound."""
    memset(m, 0, sizeof(Moved))
    m.from_guest = r.initiator == PIF_GUEST
    memcpy(m.guest_our.addr, r.guest_our, 16)
    memcpy(m.guest_end.addr, r.guest_end, 16)
    memcpy(m.host_our.addr, r.host_our, 16)
    memcpy(m.host_end.addr, r.host_end, 16)
    m.guest_our.port = htobe16(r.guest_our_port)
    m.guest_end.port = htobe16(r.guest_end_port)
    m.host_our.port = htobe16(r.host_our_port)
    m.host_end.port = htobe16(r.host_end_port)
    m.events = r.events
    m.ws_from_guest = r.ws_from
    m.ws_to_guest = r.ws_to
    m.mss = htobe16(r.mss)
    m.wnd_from_guest = htobe16(r.wnd_from)
    m.wnd_to_guest = htobe16(r.wnd_to)
    m.seq_to_guest = htobe32(r.seq_to)
    m.ack_from_guest = htobe32(r.ack_from)
    m.seq_from_guest = htobe32(r.seq_from)
    m.ack_to_guest = htobe32(r.ack_to)
    m.init_from_guest = htobe32(r.init_from)
    m.bytes_from_guest = htobe64(r.bytes_from)
    m.bytes_to_guest = htobe64(r.bytes_to)
    m.idle = htobe32(r.idle)
    if r.initiator != PIF_GUEST and r.initiator != PIF_HOST:
        return False
    if not m.events & EV_ESTABLISHED and m.events != (EV_SYN_FROM_GUEST if m.from_guest else EV_ACCEPTED):
        return False
    return is_sound(m)


cdef bint is_sound(const Moved *m) noexcept nogil:
    """What every layout asks of a flow."""
    return (m.ws_from_guest <= MAX_SCALE and m.ws_to_guest <= MAX_SCALE and 4 <= m.mss < 65536
            and are_ends(&m.guest_our, &m.guest_end) and are_ends(&m.host_our, &m.host_end))


cdef bint are_ends(const End *our, const End *end) noexcept nogil:
    cdef int family = host_family(our.addr)
    return family != 0 and family == host_family(end.addr) and our.port != 0 and end.port != 0


cdef int host_family(const uint8_t *addr) noexcept nogil:
    """4 or 6; 0 for an address that no host can have."""
    cdef uint8_t zeros[16]
    memset(zeros, 0, 16)
    if memcmp(addr, zeros, 16) == 0:
        return 0
    if is_v4(addr):
        return 4 if addr[12] < 0xE0 and memcmp(addr + 12, zeros, 4) != 0 else 0
    return 6 if addr[0] != 0xFF else 0


def odd_flows(const uint8_t[::1] records, bint native):
    cdef size_t each = sizeof(gw_flow_native) if native else sizeof(gw_flow2)
    cdef size_t i, count = <size_t>records.shape[0] // each
    cdef Moved m
    odd = []
    for i in range(count):
        if not (in_native(<const gw_flow_native *>&records[i * each], &m) if native
                else in2(<const gw_flow2 *>&records[i * each], &m)):
            odd.append(i)
    return odd


def ends(const uint8_t[::1] records, bint native):
    cdef size_t each = sizeof(gw_flow_native) if native else sizeof(gw_flow2)
    cdef size_t i
    cdef Moved m
    found = []
    for i in range(<size_t>records.shape[0] // each):
        if native:
            in_native(<const gw_flow_native *>&records[i * each], &m)
        else:
            in2(<const gw_flow2 *>&records[i * each], &m)
        found.append(Side(m.host_our.addr[:16], m.host_end.addr[:16], m.host_our.port, m.host_end.port))
    return found


# ---- sockets

cdef void socket_out(const SockState *s, gw_socket *r) noexcept nogil:
    cdef int i
    for i in range(WORDS):
        r.words[i] = htobe32((<const uint32_t *>s)[i])
    r.snd_ws = s.snd_ws
    r.rcv_ws = s.rcv_ws
    r.state = s.tcpi_state
    r.options = s.tcpi_options


cdef bint socket_in(const gw_socket *r, SockState *s) noexcept nogil:
    """Whether the record is surely sound."""
    cdef int i
    for i in range(WORDS):
        (<uint32_t *>s)[i] = htobe32(r.words[i])
    s.snd_ws = r.snd_ws
    s.rcv_ws = r.rcv_ws
    s.tcpi_state = r.state
    s.tcpi_options = r.options
    return (s.sndq <= MAX_QUEUE and s.rcvq <= MAX_QUEUE and s.notsent <= s.sndq and 1 <= s.mss <= 65535
            and s.snd_ws <= MAX_SCALE and s.rcv_ws <= MAX_SCALE and s.tcpi_state < 16 and STATES >> s.tcpi_state & 1)


cdef size_t whole_socket(const uint8_t *data, size_t size, bint lost) noexcept nogil:
    """Bytes of the sound socket there, with its queues; 0: that is none, or not whole. ``lost`` is one as well."""
    cdef SockState s
    if size < sizeof(gw_socket):
        return 0
    if (<const gw_socket *>data).state == 0:
        return sizeof(gw_socket) if lost else 0
    if not socket_in(<const gw_socket *>data, &s):
        return 0
    if size - sizeof(gw_socket) < <size_t>s.sndq + s.rcvq:
        return 0
    return sizeof(gw_socket) + s.sndq + s.rcvq


def sound_sockets(const uint8_t[::1] data, size_t at, size_t most):
    cdef size_t size = <size_t>data.shape[0], count = 0, n
    while count < most and at < size:
        n = whole_socket(&data[at], size - at, True)
        if n == 0:
            break
        at += n
        count += 1
    return count, at


def entries(const uint8_t[::1] sockets, uint16_t kind, uint16_t flags, uint32_t first):
    cdef size_t size = <size_t>sockets.shape[0], at = 0, n, count = 0
    cdef bytes made
    cdef char *out
    cdef gw_entry head
    while at < size:
        n = whole_socket(&sockets[at], size - at, False)
        if n == 0:
            raise ValueError("no sockets with their queues")
        at += n
        count += 1
    made = PyBytes_FromStringAndSize(NULL, size + count * sizeof(gw_entry))
    out = PyBytes_AS_STRING(made)
    at = 0
    head.type = htobe16(kind)
    head.flags = htobe16(flags)
    head.size = htobe16(sizeof(gw_socket))
    while at < size:
        n = whole_socket(&sockets[at], size - at, False)
        head.length = htobe32(<uint32_t>(sizeof(uint32_t) + sizeof(uint16_t) + n))
        head.flow = htobe32(first)
        memcpy(out, &head, sizeof(head))
        memcpy(out + sizeof(head), &sockets[at], n)
        out += sizeof(head) + n
        at += n
        first += 1
    return made


def sockets_of(const uint8_t[::1] data, size_t at, uint16_t kind):
    cdef size_t size = <size_t>data.shape[0], begin = at, n, count = 0, total = 0
    cdef uint32_t first = 0, length
    cdef const gw_entry *head
    cdef bytes made
    cdef char *out
    while size - at >= sizeof(gw_entry):
        head = <const gw_entry *>&data[at]
        length = htobe32(head.length)
        if htobe16(head.type) != kind or htobe16(head.size) != sizeof(gw_socket) or length < 6:
            break
        if count == 0:
            first = htobe32(head.flow)
        elif htobe32(head.flow) != first + count:
            break
        n = whole_socket(<const uint8_t *>(head + 1), size - at - sizeof(gw_entry), False)
        if n == 0 or n + 6 != length:
            break
        at += sizeof(gw_entry) + n
        total += n
        count += 1
    made = PyBytes_FromStringAndSize(NULL, total)
    out = PyBytes_AS_STRING(made)
    n = begin
    while n < at:
        length = htobe32((<const gw_entry *>&data[n]).length) - 6
        memcpy(out, &data[n] + sizeof(gw_entry), length)
        out += length
        n += sizeof(gw_entry) + length
    return at, first, count, made
