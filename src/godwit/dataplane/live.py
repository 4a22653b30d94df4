# SPDX-License-Identifier: GPL-2.0-or-later
"""What of a data plane goes to another one on the same host, while the guest runs.

The sockets and the guest's memory go along as they are. So these are the numbers of the data plane itself, all of
them, where a migration has those that another host can use (``godwit.dataplane.state``). Addresses are 16 bytes, IPv4
as v4-mapped; times are in milliseconds from now; ``flags`` are `LiveFlag`.
"""

from __future__ import annotations

from enum import IntFlag
from typing import NamedTuple


class LiveFlag(IntFlag):
    """What is so with a flow. The numbers are those of the hand-over's stream, not of the data plane."""

    V6 = 1 << 0  # of IPv6 on the guest's side; of a port: its socket is one of IPv6
    FROM_GUEST = 1 << 1  # the guest opened it
    ACK_DUE = 1 << 2  # the guest waits for an acknowledgement
    RING_WAIT = 1 << 3  # it waits for receive buffers
    MORE = 1 << 4  # the socket may have data that did not fit window or ring
    EOF = 1 << 5  # the kernel said that the peer's FIN has come
    URGENT = 1 << 6  # an urgent mark in the socket's queue
    RESET_DUE = 1 << 7  # it has no socket, and the guest is to be told
    FAST_DONE = 1 << 8  # fast retransmission done for this window
    SYN_DUE = 1 << 9  # SYN or SYN,ACK waits for a receive buffer
    CONNECTING = 1 << 10  # the host's side of the handshake is under way
    DRAINING = 1 << 11  # both sides have closed, and the kernel has still to send
    FIN_KNOWN = 1 << 12  # `seq_fin` is valid
    PEER_FIN = 1 << 13  # the peer's FIN came before a migration: the socket does not know of it
    HURRY = 1 << 14  # the kernel retransmits every second, for the time after a move
    WINDOW_LOW = 1 << 15  # "writable" from the socket is worth a window update
    FORWARD = 1 << 16  # UDP port: a forwarded one
    ANY_PEER = 1 << 17  # UDP port: datagrams from anyone are for the guest
    TAKES_V4 = 1 << 18  # UDP port: an IPv6 socket that has IPv4 as well
    DONT_FRAGMENT = 1 << 19  # what the socket was told last
    NO_GSO = 1 << 20  # UDP port: the kernel refused to cut up a large datagram
    ANSWERED = 1 << 21  # UDP peer: the guest has sent to it
    SHARED = 1 << 22  # UDP peer: another is, or was, of the same port and the same address


class LiveRing(NamedTuple):
    """A virtqueue: where it is in memory, and how far it is worked off."""

    num: int
    last_avail: int
    used: int  # the next used entry to fill
    shown: int  # what the guest was last shown of that
    most: int  # chains that waited at a time
    descriptor: int  # the front-end's addresses
    available: int
    used_ring: int
    has_addr: int
    started: int
    enabled: int
    broken: int
    kicked: int


class LiveTcp(NamedTuple):
    """A TCP flow, in whatever state it is."""

    flags: int
    events: int
    guest_addr: bytes
    our_addr: bytes
    remote_addr: bytes
    local_addr: bytes
    guest_port: int
    our_port: int
    remote_port: int
    local_port: int
    seq_to_guest: int
    seq_max_to_guest: int
    seq_ack_from_guest: int
    seq_from_guest: int
    seq_ack_to_guest: int
    seq_init_from_guest: int
    seq_fin: int
    acked: int
    window: int
    edge: int
    granted: int
    mss: int
    wnd_sent: int
    ws_from_guest: int
    ws_to_guest: int
    retries: int
    dup_acks: int
    due: int
    idle: int
    bytes_from_guest: int
    bytes_to_guest: int


class LivePort(NamedTuple):
    """A UDP port of the guest's. ``kind``: 0 its own, 1 its own to the host's loopback, 2 and 3 forwarded."""

    flags: int
    kind: int
    guest_addr: bytes
    guest_port: int
    ttl: int
    tos: int


class LivePeer(NamedTuple):
    """Somebody with whom the guest exchanges datagrams."""

    flags: int
    guest_addr: bytes
    our_addr: bytes
    remote_addr: bytes
    local_addr: bytes
    our_port: int
    remote_port: int
    scope: int
    due: int
    idle: int


class LivePing(NamedTuple):
    """An exchange of echo requests and replies."""

    flags: int
    guest_addr: bytes
    our_addr: bytes
    remote_addr: bytes
    ident: int
    sequence: int
    ttl: int
    due: int
    idle: int


class LivePartial(NamedTuple):
    """A datagram of the guest's of which some fragments have come. ``size`` is 0 until the last one has."""

    v6: int
    proto: int
    ident: int
    source: bytes
    destination: bytes
    age: int
    size: int
    have: int
    end: int
    header: bytes
    units: bytes  # a bit for each 8 bytes that have come
    data: bytes
