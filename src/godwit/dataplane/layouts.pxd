# SPDX-License-Identifier: GPL-2.0-or-later
"""How TCP flows and their sockets lie in streams, and what of a flow moves, whatever its layout is there."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from godwit.dataplane.sockstate cimport SockState

cdef extern from *:
    """
    #include <endian.h>
    #include <stdint.h>

    /* docs/stream-v2.md; ports are in the byte order of the machine */
    struct __attribute__((packed)) gw_side2 { uint8_t our[16], end[16]; uint16_t our_port, end_port; };
    struct __attribute__((packed)) gw_flow2 {
        uint8_t pif[2];
        struct gw_side2 side[2];
        uint8_t retries, ws_from, ws_to, events;
        uint32_t mss, sndbuf;
        uint8_t flags, dup_ack;
        uint16_t wnd_from, wnd_to;
        uint32_t seq_to, ack_from, seq_from, ack_to, init_from;
    };
    /* docs/stream.md */
    struct __attribute__((packed)) gw_flow_native {
        uint8_t initiator;
        uint8_t guest_our[16], guest_end[16];
        uint16_t guest_our_port, guest_end_port;
        uint8_t host_our[16], host_end[16];
        uint16_t host_our_port, host_end_port;
        uint8_t events, ws_from, ws_to;
        uint16_t mss, wnd_from, wnd_to;
        uint32_t seq_to, ack_from, seq_from, ack_to, init_from;
        uint64_t bytes_from, bytes_to;
        uint32_t idle;
    };
    /* both */
    struct __attribute__((packed)) gw_socket {
        uint32_t words[12];     /* the first ones of SockState, in its order */
        uint8_t snd_ws, rcv_ws, state, options;
    };
    struct __attribute__((packed)) gw_entry { uint16_t type, flags; uint32_t length, flow; uint16_t size; };
    _Static_assert(sizeof(struct gw_flow2) == 112 && sizeof(struct gw_flow_native) == 122, "flows in streams");
    _Static_assert(sizeof(struct gw_socket) == 52 && sizeof(struct gw_entry) == 14, "sockets in streams");
    """
    cdef struct gw_side2:
        uint8_t our[16]
        uint8_t end[16]
        uint16_t our_port, end_port
    cdef struct gw_flow2:
        uint8_t pif[2]
        gw_side2 side[2]
        uint8_t retries, ws_from, ws_to, events
        uint32_t mss, sndbuf
        uint8_t flags, dup_ack
        uint16_t wnd_from, wnd_to
        uint32_t seq_to, ack_from, seq_from, ack_to, init_from
    cdef struct gw_flow_native:
        uint8_t initiator
        uint8_t guest_our[16]
        uint8_t guest_end[16]
        uint16_t guest_our_port, guest_end_port
        uint8_t host_our[16]
        uint8_t host_end[16]
        uint16_t host_our_port, host_end_port
        uint8_t events, ws_from, ws_to
        uint16_t mss, wnd_from, wnd_to
        uint32_t seq_to, ack_from, seq_from, ack_to, init_from
        uint64_t bytes_from, bytes_to
        uint32_t idle
    cdef struct gw_socket:
        uint32_t words[12]
        uint8_t snd_ws, rcv_ws, state, options
    cdef struct gw_entry:
        uint16_t type, flags
        uint32_t length, flow
        uint16_t size
    uint16_t htobe16(uint16_t v) nogil
    uint32_t htobe32(uint32_t v) nogil
    uint64_t htobe64(uint64_t v) nogil

cdef struct End:
    uint8_t addr[16]
    uint16_t port

cdef struct Moved:
    bint from_guest         # who opened it
    uint8_t events
    uint8_t retries
    uint8_t ws_from_guest
    uint8_t ws_to_guest
    uint32_t mss
    uint16_t wnd_from_guest     # in their scales
    uint16_t wnd_to_guest
    uint32_t seq_to_guest
    uint32_t ack_from_guest
    uint32_t seq_from_guest
    uint32_t ack_to_guest
    uint32_t init_from_guest
    uint32_t idle           # ms
    uint64_t bytes_from_guest
    uint64_t bytes_to_guest
    End guest_our           # the guest's side: the peer as the guest knows it
    End guest_end
    End host_our            # the host's side: our socket
    End host_end

cdef void out2(const Moved *m, gw_flow2 *r) noexcept nogil
cdef void out_native(const Moved *m, gw_flow_native *r) noexcept nogil
# Whether the record is surely sound.
cdef bint in2(const gw_flow2 *r, Moved *m) noexcept nogil
cdef bint in_native(const gw_flow_native *r, Moved *m) noexcept nogil
cdef void socket_out(const SockState *s, gw_socket *r) noexcept nogil
cdef bint socket_in(const gw_socket *r, SockState *s) noexcept nogil
# Bytes of the sound socket there, with its queues; 0: that is none, or not whole. `lost` ones count as well.
cdef size_t whole_socket(const uint8_t *data, size_t size, bint lost) noexcept nogil
