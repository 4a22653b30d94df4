# SPDX-License-Identifier: GPL-2.0-or-later

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from godwit.dataplane.checksum cimport fold, sum_bytes, sum_iov, sum_pseudo
from godwit.dataplane.memory cimport log_write
from godwit.dataplane.pcap cimport pcap_frame
from godwit.dataplane.plane cimport (
    DROP_RING_FULL,
    ETH_HLEN,
    HEADERS,
    MAX_RX_CHAINS,
    Plane,
    RX_BURST,
    RxBuf,
    RxFrame,
    drop,
)
from godwit.dataplane.sys cimport put16, put32
from godwit.dataplane.virtqueue cimport (
    BAD_BUFFER,
    MAX_CHAIN,
    RX,
    Queue,
    queue_active,
    queue_break,
    queue_chain,
    queue_pending,
    queue_used,
)


cdef uint32_t rx_reserve(Plane *p, uint32_t want) noexcept nogil:
    cdef Queue *q = &p.queues[RX]
    cdef RxBuf *rx = &p.rx
    cdef int pending
    rx.pending = rx.chains = rx.count = rx.views = rx.frames = rx.finished = 0
    rx.capacity = 0
    if not queue_active(q):
        return 0
    pending = queue_pending(q)
    if pending < 0:
        queue_break(q, pending)
        return 0
    rx.pending = pending
    if pending > q.most:
        q.most = <uint16_t>pending
    pick(p, want)
    return rx.capacity


cdef bint rx_reserve_another(Plane *p, uint32_t want) noexcept nogil:
    cdef RxBuf *rx = &p.rx
    cdef int chains = rx.chains, count = rx.count
    if rx.frames == RX_BURST:
        return False
    pick(p, want)
    if rx.capacity >= want:
        return True
    rx.frames -= 1
    rx.chains = chains
    rx.count = count
    return False


cdef void pick(Plane *p, uint32_t want) noexcept nogil:
    """Pick buffers for a frame of `want` bytes, behind those picked already."""
    cdef Queue *q = &p.queues[RX]
    cdef RxBuf *rx = &p.rx
    cdef RxFrame *frame = &rx.frame[rx.frames]
    cdef int n, most
    cdef uint64_t total
    frame.chain = rx.chains
    frame.iov = rx.count
    frame.view = rx.views
    rx.frames += 1
    rx.capacity = 0
    most = MAX_RX_CHAINS if p.mergeable else rx.chains + 1
    while rx.capacity < want and rx.chains < rx.pending and rx.chains < most:
        n = queue_chain(q, &p.mem, rx.chains, True, rx.iov + rx.count, rx.guest_addr + rx.count,
                        MAX_CHAIN - rx.count, &rx.heads[rx.chains], &total)
        if n <= 0 or (rx.chains == frame.chain and total < p.vnet_size):
            if rx.chains == 0:
                queue_break(q, n if n < 0 else BAD_BUFFER)
            return      # what was picked serves; the fault shows when its turn comes
        if total > want:
            total = want    # a buffer may be of gigabytes, a frame is not
        rx.sizes[rx.chains] = <uint32_t>total
        rx.capacity += <uint32_t>total
        rx.chains += 1
        rx.count += n


cdef int rx_view(Plane *p, uint32_t skip, uint32_t limit) noexcept nogil:
    cdef RxBuf *rx = &p.rx
    cdef int i
    cdef size_t size
    for i in range(rx.frame[rx.frames - 1].iov, rx.count):
        size = rx.iov[i].iov_len
        if skip >= size:
            skip -= <uint32_t>size
            continue
        if limit == 0:
            break
        size -= skip
        rx.view[rx.views].iov_base = <uint8_t *>rx.iov[i].iov_base + skip
        skip = 0
        if size > limit:
            size = limit
        rx.view[rx.views].iov_len = size
        limit -= <uint32_t>size
        rx.views += 1
    return rx.views


cdef void rx_finish(Plane *p, uint8_t *headers, uint32_t size, uint32_t total) noexcept nogil:
    cdef Queue *q = &p.queues[RX]
    cdef RxBuf *rx = &p.rx
    cdef RxFrame *frame = &rx.frame[rx.finished]
    cdef uint32_t left = total, part
    cdef uint32_t copied = 0
    cdef int i, chain = frame.chain, chains
    while left:
        part = rx.sizes[chain] if rx.sizes[chain] < left else left
        queue_used(q, rx.heads[chain], part)
        left -= part
        chain += 1
    chains = chain - frame.chain
    q.last_avail += chains
    if p.vnet_size == 12:
        headers[10] = chains & 0xFF     # num_buffers, little-endian
        headers[11] = chains >> 8
    left = total
    for i in range(frame.iov, rx.count):
        if left == 0:
            break
        part = <uint32_t>rx.iov[i].iov_len if rx.iov[i].iov_len < left else left
        if copied < size:
            if part > size - copied:
                memcpy(rx.iov[i].iov_base, headers + copied, size - copied)
                copied = size
            else:
                memcpy(rx.iov[i].iov_base, headers + copied, part)
                copied += part
        elif not p.mem.log_all:
            break
        if p.mem.log_all:
            log_write(&p.mem, rx.guest_addr[i], part)
        left -= part
    p.counters.frames_to_guest += 1
    if p.pcap.fd >= 0:
        pcap_frame(p, rx.iov + frame.iov, rx.count - frame.iov, p.vnet_size, total - p.vnet_size)
    rx.finished += 1


cdef uint32_t put_headers(Plane *p, uint8_t *h, bint v6, const uint8_t *saddr,
                          const uint8_t *daddr, uint8_t proto, uint32_t payload) noexcept nogil:
    cdef uint8_t *at = h + p.vnet_size
    memset(h, 0, p.vnet_size)
    if p.config.guest_mac_known:
        memcpy(at, p.config.guest_mac, 6)
    else:
        memset(at, 0xFF, 6)
    memcpy(at + 6, p.config.our_mac, 6)
    put16(at + 12, 0x86DD if v6 else 0x0800)
    at += ETH_HLEN
    if v6:
        put32(at, 0x60000000)
        put16(at + 4, <uint16_t>payload)
        at[6] = proto
        at[7] = 64
        memcpy(at + 8, saddr, 16)
        memcpy(at + 24, daddr, 16)
        return p.vnet_size + ETH_HLEN + IPV6_HLEN
    memset(at, 0, IPV4_HLEN)
    at[0] = 0x45
    put16(at + 2, <uint16_t>(payload + IPV4_HLEN))
    at[6] = 0x40    # don't fragment, so no identification is needed (RFC 6864)
    at[8] = 64
    at[9] = proto
    memcpy(at + 12, saddr + 12, 4)
    memcpy(at + 16, daddr + 12, 4)
    (<uint16_t *>(at + 10))[0] = <uint16_t>~fold(sum_bytes(at, IPV4_HLEN, 0))
    return p.vnet_size + ETH_HLEN + IPV4_HLEN


cdef void put_checksum(Plane *p, uint8_t *h, uint32_t l4, uint32_t field, uint32_t size, uint32_t payload,
                       bint v6, const uint8_t *saddr, const uint8_t *daddr, uint8_t proto) noexcept nogil:
    """`h` holds headers up to `size`, that above IP from `l4`, its checksum at
    `field` bytes from there; `payload` bytes of the next frame's part of p.rx.view follow."""
    cdef uint64_t s = sum_pseudo(saddr, daddr, v6, proto, size - l4 + payload)
    cdef uint16_t value
    cdef int first = p.rx.frame[p.rx.finished].view
    memset(h + l4 + field, 0, 2)
    if p.guest_csum:
        value = fold(s)
        h[0] |= VNET_F_NEEDS_CSUM
        h[6] = (l4 - p.vnet_size) & 0xFF    # csum_start and csum_offset, little-endian
        h[7] = (l4 - p.vnet_size) >> 8
        h[8] = field
        h[9] = 0
    else:
        s = sum_bytes(h + l4, size - l4, s)
        s += fold(sum_iov(p.rx.view + first, MAX_CHAIN - first, 0, payload, 0))
        value = ~fold(s)
        if value == 0 and proto == 17:
            value = 0xFFFF  # RFC 768: zero says that there is none
    memcpy(h + l4 + field, &value, 2)


cdef bint frame_to_guest(Plane *p, const uint8_t *frame, uint32_t size) noexcept nogil:
    cdef uint8_t h[HEADERS]
    cdef int i, n
    cdef uint32_t part, done = 0
    if rx_reserve(p, p.vnet_size + size) < p.vnet_size + size:
        drop(p, DROP_RING_FULL)
        return False
    n = rx_view(p, p.vnet_size, size)
    for i in range(n):
        part = <uint32_t>p.rx.view[i].iov_len
        memcpy(p.rx.view[i].iov_base, frame + done, part)
        done += part
    memset(h, 0, p.vnet_size)
    rx_finish(p, h, p.vnet_size, p.vnet_size + size)
    return True
