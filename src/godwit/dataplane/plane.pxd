# SPDX-License-Identifier: GPL-2.0-or-later
"""The state of one data plane: one guest, one thread, no locks.

Only the data plane's thread touches any of this while it runs; the control
thread does so while that thread is parked (see ``loop.pyx``).
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from godwit.dataplane.card cimport Card
from godwit.dataplane.memory cimport Memory
from godwit.dataplane.sys cimport iovec, mmsghdr, sem_t, sockaddr_in6
from godwit.dataplane.virtqueue cimport MAX_CHAIN, QUEUES, Chain, Queue

cdef enum:
    NONE = 0xFFFFFFFFU      # no flow: end of a list, no place in the heap
    MAX_MAPS = 32
    MAX_TARGETS = 32
    RARE_SLOTS = 64
    RARE_FRAME = 2048       # bytes; rare frames (ARP, DHCP, NDP) are small
    ETH_HLEN = 14
    HEADERS = 256           # vnet, Ethernet, IP with extensions, TCP with options
    MAX_FRAME = 14 + 40 + 65535    # Ethernet, IPv6, and the longest payload that it can state
    MAX_RX_CHAINS = 1024    # a 64 KiB frame in the smallest buffers that a guest would use
    RX_BURST = 32           # frames that are filled by one system call
    PARTIALS = 16
    PARTIAL_SIZE = 65536
    SEND_BUFFER = 1 << 20   # bytes; to which a TCP socket's grows for a guest that could send more
    UDP_OUT = 64            # messages handed to the kernel in one call
    UDP_IN = 32             # and taken from it
    UDP_CONTROL = 128       # bytes of control messages with each
    UDP_SLOT = 65536        # bytes of one message taken in: several datagrams, where the kernel joins them

# Why a frame from either side went nowhere. Names in DROP_NAMES, flow.pyx.
cdef enum Drop:
    DROP_SHORT              # too short for its own headers
    DROP_MALFORMED          # headers that contradict themselves
    DROP_FRAGMENT
    DROP_PROTOCOL           # no such protocol here
    DROP_SOURCE             # a source address that cannot be the guest's
    DROP_NO_FLOW            # a segment of no known connection (a reset is sent)
    DROP_WINDOW             # outside the receive window, or a gap before it
    DROP_TABLE_FULL
    DROP_NO_SOCKET          # the host gave no socket
    DROP_RING_FULL          # no buffer in the guest's receive queue
    DROP_RARE_FULL          # the control thread is behind with rare frames
    DROP_SEND               # the host's socket took it not
    DROP_UNREACHABLE        # an address that is not to be reached from here
    DROP_LIMIT_UDP          # as many UDP flows and pings are open as may be, and none is idle
    DROP_LIMIT_HALF_OPEN    # a SYN of the guest's that was given up for a newer one, or had to wait itself
    DROPS

# What the host was short of, bits. Names in SHORTAGES, shortage.pyx.
cdef enum Shortage:
    SHORT_DESCRIPTORS = 1
    SHORT_MEMORY = 2
    SHORT_PORTS = 4
    SHORT_PLACES = 8        # in the flow table, or of what `limit_flows` allows

cdef enum FlowKind:
    FLOW_FREE = 0
    FLOW_TCP
    FLOW_UDP                # a peer of a port of the guest's; has no socket
    FLOW_UDP_PORT           # a port of the guest's: the socket that its peers share (udp.pyx)
    FLOW_PING
    FLOW_DEAD               # closed, its slot is released once nothing refers to it
    FLOW_KINDS

# A TCP flow's state: what was seen on either side. These are the bits of the
# published device-state stream (version 2), so that they move as they are.
cdef enum Event:
    EV_ACCEPTED = 0x01      # opened from outside: accepted on the host
    EV_SYN_FROM_GUEST = 0x02
    EV_ESTABLISHED = 0x04
    EV_FIN_FROM_SOCK = 0x08
    EV_FIN_TO_SOCK = 0x10
    EV_FIN_FROM_GUEST = 0x20
    EV_FIN_TO_GUEST = 0x40
    EV_FIN_ACKED = 0x80     # the guest acknowledged that FIN

cdef enum FlowFlag:
    FF_V6 = 0x0001
    FF_FROM_GUEST = 0x0002  # the guest opened it
    FF_ACK_DUE = 0x0004     # the guest waits for an acknowledgement
    FF_TOUCHED = 0x0008     # in the list to be settled at the end of the batch
    FF_RING_WAIT = 0x0010   # in the list that waits for receive buffers
    FF_MORE = 0x0020        # the socket may have data that did not fit window or ring
    FF_EOF = 0x0040         # the kernel said that the peer's FIN has come
    FF_URGENT = 0x0080      # an urgent mark in the socket's queue ends each read before it
    FF_RESET_DUE = 0x0100   # tell the guest, then close
    FF_FAST_DONE = 0x0200   # fast retransmission done for this window
    FF_SYN_DUE = 0x0400     # SYN or SYN,ACK waits for a receive buffer
    FF_CONNECTING = 0x0800
    FF_HELD = 0x1000        # frozen: not a byte moves until it is resumed
    FF_FOUND = 0x2000       # held by the data plane itself, and control does not know yet
    FF_DRAINING = 0x8000    # both sides have closed, and the kernel has still to send
    FF_FIN_KNOWN = 0x4000   # seq_fin is valid
    FF_PEER_FIN = 0x20000   # the peer's FIN came before a migration: the socket does not know of it
    FF_HURRY = 0x40000      # the kernel retransmits every second, for the time after a move
    FF_WINDOW_LOW = 0x10000 # "writable" from the socket is worth a window update
    FF_FORWARD = 0x80000    # UDP port: a forwarded one, open until the engine ends
    FF_ANY_PEER = 0x100000  # UDP port: datagrams from anyone are for the guest
    FF_TAKES_V4 = 0x200000  # UDP port: an IPv6 socket that has IPv4 as well
    FF_DONT_FRAGMENT = 0x400000 # the socket's datagrams leave unfragmented, or not at all
    FF_NO_GSO = 0x800000    # UDP port: the kernel refused to cut up a large datagram
    FF_ANSWERED = 0x1000000 # UDP: the guest has sent to this peer
    FF_SHARED = 0x2000000   # UDP: another flow is, or was, of the same port and the same peer
    FF_TRY_AGAIN = 0x8000000    # the kernel was short of memory for carry_to_sock: the timer sees to it
    FF_PROBE_DUE = 0x4000000    # a probe waits for a receive buffer; another process sends it when it is due again
    FF_HEARD = 0x8000000    # UDP, ping: the peer has sent
    FF_AGED = 0x10000000    # in a list by age
    FF_TWO_WAY = 0x20000000 # in that of the flows that both sides have used

# Lists of flows that may be given up for others, the oldest first.
cdef enum:
    HALF_OPEN               # TCP: the guest has opened it, and the peer has not answered
    ONE_WAY                 # UDP, ping: one side has sent, the other has not
    TWO_WAY                 # both have
    AGES

# A flow is declared in C, since Cython knows no unnamed unions: what only TCP
# has and what only UDP and pings have share their place. Which of them a flow
# has, its kind says; nobody may touch the other's.
cdef extern from *:
    """
    #include <stdint.h>

    /* Bytes that a socket's buffers did not take: of a flow that has migrated,
       or of a guest that was promised more room than there was. */
    struct Carry {
        uint8_t *data;
        uint32_t size;
        uint32_t at;                    /* bytes that are done with */
    };

    struct Flow {
        uint8_t kind, events, retries, dup_acks;
        int sock;
        uint32_t flags;
        uint32_t generation;            /* odd/even use does not matter; changes at each release */
        uint32_t hash_next;             /* next in the bucket; next free slot when free */
        uint32_t touched_next;
        uint32_t wait_next, wait_prev;  /* the list that waits for receive buffers */
        uint32_t heap_pos;
        uint32_t older, younger;        /* the list by age */
        uint16_t mss;                   /* towards the guest */
        uint16_t frames_seen;           /* frames_from_guest, its low bits, at the last retransmission */
        uint64_t deadline;              /* ms, CLOCK_MONOTONIC; 0: none */
        uint64_t last_due;              /* its key in the heap: the deadline when it was last moved */
        uint64_t last_active;           /* ms */
        /* Who talks to whom. On the guest's side "our" is the peer as the guest sees it. */
        uint8_t guest_addr[16], our_addr[16], remote_addr[16];
        uint8_t local_addr[16];         /* of the host's socket; known after a load, else asked at a save */
        uint16_t guest_port;            /* ICMP: the identifier */
        uint16_t our_port, remote_port, local_port;
        struct Carry *carry_to_guest;   /* before what the socket has; NULL: none, the usual */
        struct Carry *carry_to_sock;    /* before what the guest sends */
        uint64_t bytes_from_guest;      /* payload that the socket took, and that was sent once at least */
        uint64_t bytes_to_guest;
        union {
            struct {    /* TCP. Sequence numbers are those between guest and us. */
                uint32_t seq_to_guest;          /* next to send */
                uint32_t seq_max_to_guest;      /* highest ever sent + 1 (differs during retransmission) */
                uint32_t seq_ack_from_guest;    /* first not acknowledged by the guest */
                uint32_t seq_from_guest;        /* next expected */
                uint32_t seq_ack_to_guest;      /* last acknowledged by us */
                uint32_t seq_init_from_guest;
                uint32_t seq_fin;               /* of our FIN to the guest, if FF_FIN_KNOWN */
                uint32_t acked;                 /* acknowledged by the guest, still in the socket's queue */
                uint32_t window;                /* the guest's, bytes from seq_ack_from_guest */
                uint32_t edge;                  /* right edge of the window that the guest was given */
                uint32_t granted;               /* its size when it was last computed */
                uint16_t wnd_sent;              /* the window field of the last segment */
                uint8_t ws_from_guest : 4, ws_to_guest : 4;
                uint8_t flight;                 /* logarithm of what may be in flight; 0: the window. See note_peek */
            };
            struct {    /* UDP and ping */
                uint32_t port;          /* UDP: the index of its FLOW_UDP_PORT */
                uint32_t remote_next;   /* UDP: next in the bucket of Plane.remotes */
                uint32_t peers;         /* UDP port: how many flows have it */
                uint32_t scope;         /* interface of a link-local peer */
                uint32_t reply_done;    /* ping: of a reply that goes in fragments, as in datagram.pxd */
                uint32_t reply_ident;
                uint16_t ping_seq;      /* of the last request */
                uint8_t ttl, tos;       /* what the socket was last told; 0: nothing */
            };
        };
    };
    _Static_assert(sizeof(struct Flow) == 224, "there are up to 128 Ki flows: mind their size");
    """
    cdef struct Carry:
        uint8_t *data
        uint32_t size
        uint32_t at
    cdef struct Flow:
        uint8_t kind, events, retries, dup_acks
        int sock
        uint32_t flags, generation, hash_next, touched_next, wait_next, wait_prev, heap_pos, older, younger
        uint16_t mss, frames_seen
        uint64_t deadline, last_due, last_active
        uint8_t guest_addr[16]
        uint8_t our_addr[16]
        uint8_t remote_addr[16]
        uint8_t local_addr[16]
        uint16_t guest_port, our_port, remote_port, local_port
        Carry *carry_to_guest
        Carry *carry_to_sock
        uint64_t bytes_from_guest, bytes_to_guest
        # TCP
        uint32_t seq_to_guest, seq_max_to_guest, seq_ack_from_guest
        uint32_t seq_from_guest, seq_ack_to_guest, seq_init_from_guest
        uint32_t seq_fin, acked, window, edge, granted
        uint16_t wnd_sent
        uint8_t ws_from_guest, ws_to_guest, flight
        # UDP and ping
        uint32_t port, remote_next, peers, scope, reply_done, reply_ident
        uint16_t ping_seq
        uint8_t ttl, tos

cdef struct AddrMap:
    uint8_t guest[16]       # as the guest names it
    uint8_t host[16]        # as the host knows it
    uint16_t port           # 0: any
    uint32_t scope          # interface of a link-local host address

cdef struct Listener:
    int fd
    uint16_t guest_port
    uint8_t guest_addr[16]  # unspecified: the guest's own
    bint resting            # not watched, since there is nothing to accept with (Plane.accept_again)

cdef struct RareFrame:
    uint32_t size
    uint8_t data[RARE_FRAME]

# Frames on the way between the data plane and the control thread: one writer,
# one reader, indices published with release and read with acquire.
cdef struct RareRing:
    uint32_t head
    uint32_t tail
    RareFrame frames[RARE_SLOTS]

cdef struct Config:
    uint8_t our_mac[6]
    uint8_t guest_mac[6]
    bint guest_mac_known
    bint has_v4
    bint has_v6
    bint no_tcp
    bint no_udp
    bint no_icmp
    uint8_t addr4[16]       # the guest's, v4-mapped
    uint8_t addr6[16]
    uint8_t our4[16]        # the router as the guest sees it
    uint8_t our_ll[16]
    uint8_t broadcast4[16]  # of the guest's subnet
    uint8_t outbound4[16]   # where its connections and datagrams leave from; unspecified: as the host routes
    uint8_t outbound6[16]
    uint8_t outbound_if4[16]    # and through which interface, its name; empty: as the host routes
    uint8_t outbound_if6[16]
    uint32_t ifindex4       # interface of multicast and limited broadcast
    uint32_t ifindex        # scope of link-local peers, and the same for IPv6
    uint16_t mtu
    int map_count
    AddrMap maps[MAX_MAPS]

# Payload of consecutive segments of one flow, handed over in one sendmsg.
cdef struct Send:
    uint32_t flow
    int count
    uint32_t bytes
    iovec iov[MAX_CHAIN]

# Datagrams of one UDP port for the host, handed over in one sendmmsg.
cdef struct UdpOut:
    uint32_t port
    int count
    int iovs
    uint32_t flows[UDP_OUT]     # whose each message is
    uint32_t sizes[UDP_OUT]     # bytes
    uint16_t segments[UDP_OUT]  # datagrams in the message
    uint16_t segment[UDP_OUT]   # bytes of each but the last
    mmsghdr msgs[UDP_OUT]
    sockaddr_in6 names[UDP_OUT]
    uint64_t control[UDP_OUT][16]
    iovec iov[MAX_CHAIN]

# Datagrams of one UDP port that were taken from the kernel for the guest.
cdef struct UdpIn:
    uint32_t port           # NONE: there are none
    uint32_t generation
    int count
    int next                # the first that is still to be delivered
    uint32_t at             # bytes of it that were
    uint32_t done           # and of the datagram there, which goes in fragments (datagram.pxd)
    uint32_t ident
    mmsghdr msgs[UDP_IN]
    iovec iov[UDP_IN]
    sockaddr_in6 names[UDP_IN]
    uint64_t control[UDP_IN][16]
    uint8_t *data           # UDP_IN slots

# A datagram of the guest's that comes in fragments (reassembly.pyx).
cdef struct Partial:
    bint used
    bint v6
    uint8_t proto
    uint32_t ident
    uint8_t saddr[16]
    uint8_t daddr[16]
    uint64_t since              # ms
    uint32_t size               # of the whole payload above IP; 0: the last fragment has not come
    uint32_t have               # bytes
    uint32_t end                # of the fragment that reaches furthest
    uint32_t header_size        # 0: the first fragment has not come
    uint8_t header[HEADERS]     # Ethernet and IP, of the first fragment
    uint64_t map[128]           # one bit for each 8 bytes that have come
    uint8_t *data               # PARTIAL_SIZE bytes

cdef struct Fragments:
    Partial partials[PARTIALS]
    iovec iov[2]

# Where a frame's share of the picked receive buffers begins.
cdef struct RxFrame:
    int chain
    int iov
    int view

# Receive buffers picked for frames to the guest.
cdef struct RxBuf:
    int pending             # chains that were there to pick from
    int chains
    int count               # of iov
    int views               # of view
    uint32_t capacity       # bytes of the last frame, with the vnet header
    int frames
    int finished            # of them, handed to the guest
    RxFrame frame[RX_BURST]
    uint16_t heads[MAX_RX_CHAINS]
    uint32_t sizes[MAX_RX_CHAINS]
    iovec iov[MAX_CHAIN]
    uint64_t guest_addr[MAX_CHAIN]
    iovec view[MAX_CHAIN]   # the parts of iov that take payload

# Payload that the kernel took, and that the guest was given.
cdef struct Datagrams:
    uint64_t from_guest
    uint64_t to_guest
    uint64_t bytes_from_guest
    uint64_t bytes_to_guest

cdef struct Counters:
    uint64_t frames_from_guest
    uint64_t frames_to_guest
    uint64_t bytes_from_guest   # TCP payload
    uint64_t bytes_to_guest
    Datagrams udp
    Datagrams ping              # requests and replies
    uint64_t retransmits
    uint64_t opened[FLOW_KINDS] # flows, by FlowKind
    uint64_t flows_reset
    uint64_t flows_recycled     # UDP flows and pings that were idle and made room for others
    uint64_t drops[DROPS]

# Frames on their way into a file (pcap.pyx).
cdef struct Capture:
    int fd                  # -1: no capture
    int error               # that ended it
    uint32_t used           # bytes of data
    uint64_t written        # bytes in the file
    uint64_t whole          # of these those up to the end of a record, at the last flush that left nothing
    uint64_t missed         # frames left out, since nobody took them
    uint8_t *data

cdef struct Plane:
    Memory mem
    Queue queues[QUEUES]
    uint64_t features           # as acknowledged by the driver
    uint32_t vnet_size          # 12 with VERSION_1 or MRG_RXBUF, else 10
    bint mergeable
    bint guest_csum             # the guest takes frames without a checksum
    bint guest_tso4
    bint guest_tso6
    bint guest_uso4             # the guest cuts up large UDP frames itself
    bint guest_uso6
    bint host_uso               # and may send such frames
    Config config
    # what the guest was seen to use
    uint8_t seen4[16]
    uint8_t seen6[16]
    uint8_t seen6_ll[16]
    uint8_t targets[MAX_TARGETS][16]    # behind its MAC address, where forwarded ports lead: not the guest's own
    int target_count
    # flows
    Flow *flows
    uint32_t max_flows
    uint32_t flow_limit         # of open_sockets: descriptors may be fewer than slots
    uint32_t used_flows         # slots ever used
    uint32_t most_flows         # of open_flows, beyond which neither side opens another; what moves in may be more
    uint32_t most_udp           # of these, UDP flows and pings
    uint32_t most_ports         # of open_ports: what the host keeps for its own datagrams is not the guest's
    uint32_t most_half_open
    uint32_t oldest[AGES]       # lists of flows by age
    uint32_t youngest[AGES]
    uint32_t aged[AGES]         # how many are in each
    uint32_t open_flows
    uint32_t open_peers         # of those the UDP ones
    uint32_t open_pings
    uint32_t forwards           # forwarded UDP ports: places that nobody else ever has
    uint16_t many_from[65536]   # for each port of the host's: sockets that the guest has sent to many through
    uint32_t open_ports         # UDP ports of the guest's own, and pings
    uint32_t open_sockets       # of flows and UDP ports, forwarded ones not counted: what flow_limit limits
    uint32_t free_head
    uint32_t *buckets           # of all flows and ports, by the ends as the guest knows them
    uint32_t *remotes           # of UDP flows, by port and peer
    uint32_t bucket_mask
    uint64_t table_key[2]       # of the buckets
    uint64_t hash_key[2]        # of initial sequence numbers: the guest is told these, and shall not learn the other
    uint32_t *heap
    uint32_t heap_size
    uint32_t touched            # lists of flows
    uint32_t ring_wait
    uint32_t ring_wait_tail
    # listeners: slots, fd -1 where free
    Listener *listeners
    int listener_count
    uint64_t accept_again       # ms; when listeners that rest are watched again; 0: none rests
    Card *card                  # the guest's network card, if that is ours; else NULL
    # the loop
    int epfd
    int wake                    # eventfd: the control thread wants something
    int rare_event              # eventfd: frames wait for the control thread
    int spare                   # a descriptor to give up, so that one connection can be refused when none is left
    uint64_t now                # ms
    uint64_t busy_poll          # ns to look for work before the thread sleeps
    uint64_t ahead              # of the system's clock, ms: not 0 in tests only
    bint park_wanted
    bint stop_wanted
    void (*errand)(void *) noexcept nogil   # to be run once, at the end of a turn; `parked` tells that it was
    void *errand_for
    bint again                  # work was left for the next turn, which begins at once
    uint32_t timers_wait        # turns for which timers that are due have waited for the guest's ring to be read
    bint tell_activity          # wake the control thread at the next frame
    uint64_t quiet_frames       # frames both ways when it asked for that
    uint32_t short_of           # Shortage bits that control has not been told of
    uint32_t short_told         # and those of which it does not want to hear again yet
    bint found                  # flows were found in repair mode (FF_FOUND)
    bint faults                 # a ring was broken by the guest, and control does not know yet
    bint peek_offset            # the kernel has SO_PEEK_OFF for TCP
    int send_buffer             # bytes; as large as it makes sense to make a TCP socket's
    sem_t parked
    sem_t resume
    RareRing up
    RareRing down
    Send send
    UdpOut udp_out
    UdpIn udp_in
    Fragments fragments
    uint32_t fragment_ident     # of the last datagram that the guest got in fragments
    Chain chain
    RxBuf rx
    Counters counters
    Capture pcap
    uint8_t scratch[65536]      # a ping's answer, an error's message


cdef inline void drop(Plane *p, int reason) noexcept nogil:
    """Count a frame that goes nowhere."""
    p.counters.drops[reason] += 1

cdef inline void drop_all(Plane *p, int reason, int count) noexcept nogil:
    """Count several."""
    p.counters.drops[reason] += count

cdef inline void count_from_guest(Datagrams *all, Flow *f, uint64_t number, uint64_t size) noexcept nogil:
    """Count datagrams of a flow that the kernel took, and the bytes of their payload."""
    all.from_guest += number
    all.bytes_from_guest += size
    f.bytes_from_guest += size

cdef inline void count_to_guest(Datagrams *all, Flow *f, uint64_t number, uint64_t size) noexcept nogil:
    """Count datagrams that the guest was given; ``f`` is NULL for one from somebody who is not remembered."""
    all.to_guest += number
    all.bytes_to_guest += size
    if f != NULL:
        f.bytes_to_guest += size

cdef inline uint64_t flows_opened(Plane *p) noexcept nogil:
    return p.counters.opened[<int>FLOW_TCP] + p.counters.opened[<int>FLOW_UDP] + p.counters.opened[<int>FLOW_PING]

cdef inline uint64_t frames_both_ways(Plane *p) noexcept nogil:
    return p.counters.frames_from_guest + p.counters.frames_to_guest
