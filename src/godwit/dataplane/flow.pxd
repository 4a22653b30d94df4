# SPDX-License-Identifier: GPL-2.0-or-later
"""The flow table, the lists that flows are in, and their timers."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from godwit.dataplane.plane cimport Carry, Flow, FlowKind, Plane
from godwit.dataplane.sys cimport iovec

# What an epoll event is about: kind, generation (24 bits), index.
cdef enum Watch:
    WATCH_WAKE = 1
    WATCH_KICK
    WATCH_FLOW
    WATCH_LISTENER
    WATCH_CARD

cdef int flows_init(Plane *p, uint32_t max_flows) noexcept nogil
cdef void flows_free(Plane *p) noexcept nogil

cdef Flow *flow_find(Plane *p, int kind, const uint8_t *guest_addr, uint16_t guest_port,
                     const uint8_t *our_addr, uint16_t our_port) noexcept nogil
# Whether others than the guest may open one more: a sixteenth of what there may be is always the guest's own.
cdef inline bint flows_for_others(Plane *p) noexcept nogil:
    return p.open_flows < p.most_flows - (p.most_flows >> 4)

# A new flow with these ends, in the table; NULL when the table is full. Whether
# there may be one more (Plane.most_flows and so on) is asked before.
cdef Flow *flow_new(Plane *p, FlowKind kind, const uint8_t *guest_addr, uint16_t guest_port,
                    const uint8_t *our_addr, uint16_t our_port) noexcept nogil
# The same for one that is not to be refused for its descriptor (Plane.flow_limit).
cdef Flow *flow_new_beyond(Plane *p, FlowKind kind, const uint8_t *guest_addr, uint16_t guest_port,
                           const uint8_t *our_addr, uint16_t our_port) noexcept nogil
# UDP flows by their port and their peer on the host's side. Of several the one
# that was put in last is found. A flow is taken out while either changes.
cdef Flow *peer_find(Plane *p, uint32_t port, const uint8_t *remote, uint16_t remote_port) noexcept nogil
cdef void peer_in(Plane *p, Flow *f) noexcept nogil
cdef void peer_out(Plane *p, Flow *f) noexcept nogil
# Close the socket and take the flow out of everything.
cdef void flow_close(Plane *p, Flow *f) noexcept nogil
cdef void flow_release(Plane *p, Flow *f) noexcept nogil
cdef int flow_watch(Plane *p, Flow *f) noexcept nogil

cdef void flow_touch(Plane *p, Flow *f) noexcept nogil
cdef void flow_wait_ring(Plane *p, Flow *f) noexcept nogil
cdef void flow_unwait(Plane *p, Flow *f) noexcept nogil

# Lists by age: in at its young end, and out of it. What is in none is not taken out.
cdef void age_in(Plane *p, Flow *f) noexcept nogil
cdef void age_out(Plane *p, Flow *f) noexcept nogil
# A UDP flow or a ping was used: it is to live for so many ms.
cdef void flow_used(Plane *p, Flow *f, uint64_t timeout) noexcept nogil

cdef Carry *carry_new(const uint8_t *data, uint32_t size) noexcept nogil
# Add `size` bytes of an iovec, after the first `skip`. False: no memory.
cdef bint carry_append(Carry **c, const iovec *iov, int count, uint32_t skip, uint32_t size) noexcept nogil
cdef void carry_free(Carry *c) noexcept nogil
# Done with n bytes; returns NULL (and frees it) when that was the last.
cdef Carry *carry_take(Carry *c, uint32_t n) noexcept nogil

# What is left of it, for the control thread.
cdef bytes carry_bytes(Carry *c)

cdef inline uint32_t carry_left(Carry *c) noexcept nogil:
    return 0 if c == NULL else c.size - c.at

# Timers: a flow has one deadline; it may be moved later at no cost.
cdef void flow_deadline(Plane *p, Flow *f, uint64_t when) noexcept nogil
cdef Flow *flow_due(Plane *p) noexcept nogil
cdef int timeout_ms(Plane *p) noexcept nogil

cdef uint64_t keyed_hash(const uint64_t *secret, const void *data, size_t n) noexcept nogil

cdef inline uint32_t flow_index(Plane *p, Flow *f) noexcept nogil:
    return <uint32_t>(f - p.flows)

cdef inline uint64_t watch_data(int kind, uint32_t generation, uint32_t index) noexcept nogil:
    return (<uint64_t>kind << 56) | (<uint64_t>(generation & 0xFFFFFF) << 32) | index
