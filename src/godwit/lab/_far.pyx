# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# SPDX-License-Identifier: GPL-2.0-or-later

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from godwit.dataplane.checksum cimport fold, sum_bytes, sum_pseudo
from godwit.dataplane.sys cimport be16, be32, before, put16, put32

cdef enum:
    DISCARD = 9
    CHARGEN = 19
    PROTO_TCP = 6
    PROTO_UDP = 17
    # RFC 9293, 3.1
    FIN = 1
    SYN = 2
    RST = 4
    ACK = 16
    OPTION_END = 0
    OPTION_NONE = 1
    OPTION_MSS = 2
    OPTION_SCALE = 3        # RFC 7323, 2.2
    OUR_SHIFT = 14          # the most that is allowed: the guest may send as it likes
    DEFAULT_MSS = 536
    # struct virtio_net_hdr, virtio 1.3, 5.1.6
    NEEDS_CSUM = 1
    GSO_TCPV4 = 1
    GSO_TCPV6 = 4
    LARGEST = 65535         # of an IPv4 packet, and what an IPv6 header says of what follows it

# A segment from the guest. Offsets are from the virtio header on.
cdef struct Segment:
    bint v6
    uint32_t tcp            # offset of its header
    uint32_t end            # offset of its data
    uint32_t data           # bytes
    uint8_t flags
    uint32_t seq
    uint32_t ack
    uint16_t window
    uint16_t port           # the guest's
    uint16_t service
    uint16_t mss            # of the options
    int shift               # -1: none


cdef inline void swap(uint8_t *a, uint8_t *b, int size) noexcept nogil:
    cdef uint8_t kept[16]
    memcpy(kept, a, size)
    memcpy(a, b, size)
    memcpy(b, kept, size)


cdef bint turn_round(uint8_t *headers, uint32_t looked) noexcept nogil:
    """Have source and destination change places; False if the frame is not for one addressee.

    No checksum changes by that, nor what the virtio header says of the frame.
    """
    cdef uint8_t *frame = headers + VNET_HLEN
    cdef uint8_t *ip = headers + AT_IP
    if looked < AT_IP + 20 or frame[0] & 1:
        return False
    if be16(frame + 12) == 0x0800:
        swap(ip + 12, ip + 16, 4)
    elif be16(frame + 12) == 0x86DD and looked >= AT_IP + 40:
        swap(ip + 8, ip + 24, 16)
    else:
        return False
    swap(frame, frame + 6, 6)
    return True


cdef bint is_discarded(const uint8_t *headers, uint32_t looked) noexcept nogil:
    """Whether this is a datagram to be thrown away, or the first fragment of one."""
    cdef const uint8_t *ip = headers + AT_IP
    cdef bint v6 = be16(ip - 2) == 0x86DD
    cdef uint32_t udp = AT_IP + (40 if v6 else 20)
    if looked < udp + 8 or ip[6 if v6 else 9] != PROTO_UDP or (not v6 and (ip[0] != 0x45 or be16(ip + 6) & 0x1FFF)):
        return False
    return be16(headers + udp + 2) == DISCARD


cdef bint find_segment(Segment *s, const uint8_t *headers, uint32_t looked, uint32_t size) noexcept nogil:
    """Whether this is TCP to one of the services, whole and without IP options."""
    cdef const uint8_t *ip = headers + AT_IP
    cdef const uint8_t *tcp
    cdef uint32_t total
    s.v6 = be16(headers + AT_IP - 2) == 0x86DD
    s.tcp = AT_IP + (40 if s.v6 else 20)
    if looked < s.tcp + 20 or ip[6 if s.v6 else 9] != PROTO_TCP:
        return False
    if not s.v6 and (ip[0] != 0x45 or be16(ip + 6) & 0x3FFF):
        return False
    tcp = headers + s.tcp
    s.port, s.service = be16(tcp), be16(tcp + 2)
    if s.service != DISCARD and s.service != CHARGEN:
        return False
    s.end = s.tcp + (tcp[12] >> 4) * 4
    total = s.tcp + be16(ip + 4) if s.v6 else AT_IP + be16(ip + 2)
    if s.end < s.tcp + 20 or s.end > looked or total < s.end or total > size:
        return False
    s.data = total - s.end
    s.seq, s.ack = be32(tcp + 4), be32(tcp + 8)
    s.flags = tcp[13]
    s.window = be16(tcp + 14)
    return True


cdef void read_options(Segment *s, const uint8_t *headers) noexcept nogil:
    cdef uint32_t at = s.tcp + 20
    cdef uint8_t kind, size
    s.mss, s.shift = DEFAULT_MSS, -1
    while at < s.end:
        kind = headers[at]
        if kind == OPTION_END:
            break
        if kind == OPTION_NONE:
            at += 1
            continue
        if at + 2 > s.end:
            break
        size = headers[at + 1]
        if size < 2 or at + size > s.end:
            break
        if kind == OPTION_MSS and size == 4 and be16(headers + at + 2) != 0:
            s.mss = be16(headers + at + 2)
        elif kind == OPTION_SCALE and size == 3:
            s.shift = headers[at + 2] if headers[at + 2] < OUR_SHIFT else OUR_SHIFT
        at += size


cdef uint32_t finish(uint8_t *headers, bint v6, uint8_t flags, uint32_t seq, uint32_t ack, uint32_t options,
                     uint32_t data, uint32_t mss) noexcept nogil:
    """Complete the headers of a segment to the guest, in which addresses and ports stand already.

    How many bytes they have. The TCP checksum is left to whom it may concern.
    """
    cdef uint8_t *ip = headers + AT_IP
    cdef uint8_t *tcp = ip + (40 if v6 else 20)
    cdef uint32_t header = 20 + options, size = header + data
    cdef uint16_t value
    if v6:
        put16(ip + 4, <uint16_t>size)
    else:
        put16(ip + 2, <uint16_t>(20 + size))
        put16(ip + 10, 0)
        value = ~fold(sum_bytes(ip, 20, 0))
        memcpy(ip + 10, &value, 2)
    put32(tcp + 4, seq)
    put32(tcp + 8, ack)
    tcp[12] = <uint8_t>(header // 4 << 4)
    tcp[13] = flags
    put16(tcp + 14, 0xFFFF)
    value = fold(sum_pseudo(ip + 8, ip + 24, True, PROTO_TCP, size) if v6
                 else sum_pseudo(ip, ip + 4, False, PROTO_TCP, size))
    memcpy(tcp + 16, &value, 2)
    put16(tcp + 18, 0)
    memset(headers, 0, VNET_HLEN)
    headers[0] = NEEDS_CSUM
    headers[6] = <uint8_t>(tcp - headers - VNET_HLEN)
    headers[8] = 16
    if data > mss:
        headers[1] = GSO_TCPV6 if v6 else GSO_TCPV4
        headers[2] = <uint8_t>(tcp - headers - VNET_HLEN + header)
        headers[4], headers[5] = mss & 0xFF, mss >> 8
    return <uint32_t>(tcp - headers) + header


cdef Source *source_of(Far *far, Segment *s) noexcept nogil:
    """The guest's connection from this port, or NULL."""
    cdef int i
    for i in range(MAX_SOURCES):
        if far.sources[i].open and far.sources[i].v6 == s.v6 \
                and be16(far.sources[i].headers + s.tcp + 2) == s.port:
            return &far.sources[i]
    return NULL


cdef void source_new(Far *far, Segment *s, const uint8_t *headers) noexcept nogil:
    """A connection to the source is opened, again if the answer to its SYN was lost."""
    cdef Source *source = source_of(far, s)
    cdef int i
    for i in range(MAX_SOURCES):
        if source != NULL:
            break
        if not far.sources[i].open:
            source = &far.sources[i]
    if source == NULL:
        return              # it hears nothing
    source.open = True
    source.v6 = s.v6
    source.shift = <uint8_t>(s.shift if s.shift >= 0 else 0)
    source.mss = s.mss
    source.next = source.acked = source.edge = 1
    source.repeats = 0
    memcpy(source.headers, headers, s.tcp + 20)
    put32(source.headers + s.tcp + 8, s.seq + 1)


cdef void source_acknowledged(Source *source, Segment *s) noexcept nogil:
    cdef uint32_t edge = s.ack + (<uint32_t>s.window << source.shift)
    if before(source.acked, s.ack) and not before(source.next, s.ack):
        source.acked = s.ack
        source.repeats = 0
    elif s.ack == source.acked and edge == source.edge and source.next != source.acked:
        source.repeats += 1
        if source.repeats == 3:     # RFC 5681, 3.2
            source.next = source.acked
    source.edge = edge


cdef int far_hear(Far *far, uint8_t *headers, uint32_t looked, uint32_t size, bint services,
                  uint32_t *answer) noexcept nogil:
    cdef Segment s
    cdef Source *source
    cdef uint8_t *tcp
    cdef uint32_t options = 0
    if not turn_round(headers, looked):
        return NOT_OURS
    answer[0] = 0
    if is_discarded(headers, looked):
        return 0
    if not services or not find_segment(&s, headers, looked, size):
        answer[0] = size
        return <int>looked
    tcp = headers + s.tcp
    swap(tcp, tcp + 2, 2)
    source = source_of(far, &s) if s.service == CHARGEN else NULL
    if s.flags & RST:
        if source != NULL:
            source.open = False
        return 0
    if s.flags & SYN:
        read_options(&s, headers)
        if s.service == CHARGEN:
            source_new(far, &s, headers)
        tcp[20], tcp[21] = OPTION_MSS, 4
        put16(tcp + 22, s.mss)
        options = 4
        if s.shift >= 0:
            tcp[24], tcp[25], tcp[26], tcp[27] = OPTION_SCALE, 3, OUR_SHIFT, OPTION_END
            options = 8
        answer[0] = finish(headers, s.v6, SYN | ACK, 0, s.seq + 1, options, 0, s.mss)
    elif s.flags & FIN:
        # Sent again if the guest has not heard it: so a source is closed at once, but numbers stay the same.
        if source != NULL:
            source.open = False
        answer[0] = finish(headers, s.v6, FIN | ACK, s.ack if source == NULL else source.next,
                           s.seq + s.data + 1, 0, 0, 0)
    elif source != NULL:
        source_acknowledged(source, &s)
        put32(source.headers + s.tcp + 8, s.seq + s.data)   # what it says itself is heard, and not answered
    elif s.data:
        answer[0] = finish(headers, s.v6, ACK, s.ack, s.seq + s.data, 0, 0, 0)
    return <int>answer[0]


cdef Source *far_due(Far *far, uint32_t *payload) noexcept nogil:
    cdef Source *source
    cdef uint32_t room, most
    cdef int i
    for i in range(MAX_SOURCES):
        far.turn = (far.turn + 1) % MAX_SOURCES
        source = &far.sources[far.turn]
        if not source.open or not before(source.next, source.edge):
            continue
        room = source.edge - source.next
        if room < source.mss and source.next != source.acked:
            continue        # RFC 9293, 3.8.6.2.1: no small segments while a larger one may become possible
        most = LARGEST - 20 if source.v6 else LARGEST - 40
        if room > most:
            room = most
        if room > source.mss:
            room -= room % source.mss
        payload[0] = room
        return source
    return NULL


cdef uint32_t far_say(Source *source, uint32_t payload, uint8_t *headers) noexcept nogil:
    cdef uint32_t size = AT_IP + (40 if source.v6 else 20) + 20
    memcpy(headers, source.headers, size)
    finish(headers, source.v6, ACK, source.next, be32(headers + size - 12), 0, payload, source.mss)
    source.next += payload
    return size
