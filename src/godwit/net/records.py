# SPDX-License-Identifier: GPL-2.0-or-later
"""The records of the device-state stream, version 2, as declarations.

Offsets, names and rules of ``docs/stream-v2.md`` come from here. All integers
are big-endian except the four ports of a flow, which the format has in the
byte order of the machine that wrote them.
"""

from __future__ import annotations

import functools
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, Final

from godwit.dataplane.state import FlowState, Observed, Side, SocketState
from godwit.migration.section import Field, Record, UnsoundError, array, native_u16, octets, u8, u16, u32

#: Flows in one stream: the size of the flow table, here and in passt.
MAX_FLOWS: Final = 131072
#: Bytes in one queue of a socket; the kernel's own limits are below.
MAX_QUEUE: Final = 64 << 20
#: RFC 7323, section 2.3.
MAX_WINDOW_SCALE: Final = 14

PIF_HOST: Final = 1
PIF_GUEST: Final = 2
EVENT_ACCEPTED: Final = 0x01
EVENT_SYN_FROM_GUEST: Final = 0x02
EVENT_ESTABLISHED: Final = 0x04

# States of TCP_INFO (linux tcp_states.h).
TCP_ESTABLISHED: Final = 1
TCP_FIN_WAIT1: Final = 4
TCP_FIN_WAIT2: Final = 5
TCP_TIME_WAIT: Final = 6
TCP_CLOSE: Final = 7
TCP_CLOSE_WAIT: Final = 8
TCP_LAST_ACK: Final = 9
TCP_CLOSING: Final = 11

#: The socket could not be dumped; nothing else in its record means anything.
STATE_LOST: Final = 0
#: A connection that ended while it was dumped: it cannot be restored, and is no reason to refuse the others.
STATES_ENDED: Final = frozenset((TCP_TIME_WAIT, TCP_CLOSE))
#: A handshake in progress cannot be in a stream of version 2, a listening socket in none.
STATES_KNOWN: Final = STATES_ENDED | {
    TCP_ESTABLISHED,
    TCP_FIN_WAIT1,
    TCP_FIN_WAIT2,
    TCP_CLOSE_WAIT,
    TCP_LAST_ACK,
    TCP_CLOSING,
}

V4_MAPPED: Final = bytes(10) + b"\xff\xff"
_UNSPECIFIED: Final = (bytes(16), V4_MAPPED + bytes(4))


def unpacked(address: bytes) -> IPv4Address | IPv6Address:
    """The address in 4 or 16 bytes; IPv4 may be v4-mapped."""
    found = ip_address(address)
    return found.ipv4_mapped or found if isinstance(found, IPv6Address) else found


def address_text(address: bytes) -> str:
    """4 or 16 bytes as people write them; IPv4 may be v4-mapped."""
    return str(unpacked(address))


OBSERVED: Final[Record[Observed]] = Record(
    "observed addresses",
    (
        Field("addr6", octets(16), "IPv6 address, not link-local, that the guest used last", show=address_text),
        Field("addr6_ll", octets(16), "link-local IPv6 address that the guest used last", show=address_text),
        Field("addr4", octets(4), "IPv4 address that the guest used last", show=address_text),
        Field("mac", octets(6), "MAC address that the guest used last"),
    ),
    Observed,
    doc="The guest's addresses as seen in its frames. All zero where none was seen.",
)

SIDE: Final[Record[Side]] = Record(
    "side",
    (
        Field("our_addr", octets(16), "address that the back-end stands for; IPv4 as v4-mapped", show=address_text),
        Field("end_addr", octets(16), "address of the other party: the guest, or the remote peer", show=address_text),
        Field("our_port", native_u16, "port to `our_addr`", range(1, 65536)),
        Field("end_port", native_u16, "port to `end_addr`", range(1, 65536)),
    ),
    Side,
    doc="One side of a flow.",
)


@functools.lru_cache(maxsize=4096)
def address_family(address: bytes) -> int:
    """4 or 6, by the form of the address; 0 for one that no host can have. Few are different, hence the cache."""
    if address in _UNSPECIFIED:
        return 0
    if address[:12] == V4_MAPPED:
        return 4 if address[12] < 0xE0 else 0
    return 6 if address[0] != 0xFF else 0


def check_ends(flat: tuple[Any, ...], *, sides: tuple[int, int]) -> None:
    """The two addresses of each side of a flow, which begin at these leaves."""
    for index in sides:
        ours, end = address_family(flat[index]), address_family(flat[index + 1])
        if not ours or not end:
            raise UnsoundError(index if not ours else index + 1, "must be the address of one host")
        if ours != end:
            raise UnsoundError(index + 1, "must be of the same family as our address on that side")


EVENTS: Final = Field(
    "events",
    u8,
    "0x01 accepted on the host, 0x02 SYN from the guest, 0x04 established, 0x08 FIN from the host, "
    "0x10 FIN to the host, 0x20 FIN from the guest, 0x40 FIN to the guest, 0x80 that one acknowledged",
)


def _check_flow(flat: tuple[Any, ...]) -> None:
    """What no single field of a flow can know."""
    first, second = flat[0], flat[1]
    if first + second != PIF_HOST + PIF_GUEST or first == 0 or second == 0:
        raise UnsoundError(1, f"with {first} on the other side: must be host (1) and guest (2), in either order")
    check_ends(flat, sides=(2, 6))
    if not flat[13] & EVENT_ESTABLISHED:
        raise UnsoundError(13, "must have bit 0x04: only an established flow can be here")


def _make_flow(*fields: Any) -> FlowState:
    """The flow of the fields' values; in the stream ``sndbuf`` is in units of 256 bytes."""
    return FlowState._make((*fields[:7], fields[7] << 8, *fields[8:], 0, 0, 0))


def _flow_fields(flow: FlowState) -> tuple[Any, ...]:
    return (*flow[:7], flow[7] >> 8, *flow[8:17])


FLOW: Final[Record[FlowState]] = Record(
    "flow",
    (
        Field("pif", array(u8, 2), "interface of each side, initiator first: 1 host, 2 guest"),
        Field("side", array(SIDE, 2), "each side, initiator first"),
        Field("retries", u8, "attempts so far at what last timed out"),
        Field("ws_from_tap", u8, "window scale that the guest announced", range(MAX_WINDOW_SCALE + 1)),
        Field("ws_to_tap", u8, "window scale announced to the guest", range(MAX_WINDOW_SCALE + 1)),
        EVENTS,
        Field("tap_mss", u32, "largest segment to the guest", range(4, 65536, 4)),
        Field("sndbuf", u32, "send buffer of the socket, in units of 256 bytes", range(1 << 24)),
        Field(
            "flags",
            u8,
            "0x01 stalled, 0x02 local peer, 0x04 active close, 0x08 ACK to the guest due, "
            "0x10 ACK from the guest due, 0x20 blocked on an ACK, 0x40 SYN sent again",
        ),
        Field("seq_dup_ack_approx", u8, "low byte of the last duplicate ACK sent to the guest"),
        Field("wnd_from_tap", u16, "last window of the guest, unscaled"),
        Field("wnd_to_tap", u16, "last window told to the guest, unscaled"),
        Field("seq_to_tap", u32, "next sequence number to the guest"),
        Field("seq_ack_from_tap", u32, "last acknowledgement from the guest"),
        Field("seq_from_tap", u32, "next sequence number expected from the guest"),
        Field("seq_ack_to_tap", u32, "last acknowledgement sent to the guest"),
        Field("seq_init_from_tap", u32, "initial sequence number of the guest"),
    ),
    _make_flow,
    fields_of=_flow_fields,
    check=_check_flow,
    doc="A TCP flow, as the back-end keeps it.",
)


def _check_socket(flat: tuple[Any, ...]) -> None:
    if flat[3] > flat[2]:
        raise UnsoundError(3, f"must be at most sndq, {flat[2]}")


SOCKET: Final[Record[SocketState]] = Record(
    "socket",
    (
        Field(
            "seq_snd",
            u32,
            "sequence number of the first byte in the send queue; one more in the states 4, 5, 9 and 11, "
            "where our FIN was counted as a byte before it, unless `tcpi_options` has bit 0x80",
        ),
        Field("seq_rcv", u32, "sequence number of the first byte in the receive queue"),
        Field("sndq", u32, "bytes in the send queue, a FIN not counted", range(MAX_QUEUE + 1)),
        Field("notsent", u32, "of those, bytes never sent"),
        Field("rcvq", u32, "bytes in the receive queue, a FIN not counted", range(MAX_QUEUE + 1)),
        Field("mss", u32, "TCP_MAXSEG", range(1, 65536)),
        Field("timestamp", u32, "TCP_TIMESTAMP, 0 without that option"),
        Field("snd_wl1", u32, "TCP_REPAIR_WINDOW, as the next four: sequence number of the last window update"),
        Field("snd_wnd", u32, "window of the peer"),
        Field("max_window", u32, "largest window of the peer"),
        Field("rcv_wnd", u32, "our window; one more in CLOSE_WAIT and LAST_ACK"),
        Field("rcv_wup", u32, "what our window was last counted from; one less in CLOSE_WAIT and LAST_ACK"),
        Field("snd_ws", u8, "window scale of the peer", range(MAX_WINDOW_SCALE + 1)),
        Field("rcv_ws", u8, "our window scale", range(MAX_WINDOW_SCALE + 1)),
        Field(
            "tcpi_state",
            u8,
            "state as in TCP_INFO. 0: the flow is lost, no queue follows, no other field means anything",
            STATES_KNOWN,
            "must be the state of a connection: 0 (lost), 1, 4 to 9 or 11",
        ),
        Field(
            "tcpi_options", u8, "TCPI_OPT bits of TCP_INFO; 0x80 is godwit's, see `seq_snd`: passt does not look at it"
        ),
    ),
    SocketState,
    check=_check_socket,
    doc="The kernel's side of a flow. `sndq` bytes of the send queue follow, then `rcvq` of the receive queue.",
)

#: What is written for a socket that could not be dumped.
LOST: Final = bytes(SOCKET.size)
