# SPDX-License-Identifier: GPL-2.0-or-later
"""The native stream: between two godwits, with what version 2 has no place for.

It is made of entries that say what they are (`godwit.migration.entries`), so
that it can grow without a new version: ``docs/stream.md``. As in version 2
nothing is used before it was checked, a bad value fails the load, and a flow
that could not be dumped or restored is that flow's loss alone.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from godwit.dataplane import layouts
from godwit.dataplane.state import Datagram, FlowState, Observed, Ping, Side, SocketState, UdpPeer, UdpPort
from godwit.migration import Entries, Field, Kind, Part, Record, UnsoundError, Version
from godwit.migration.entries import Push
from godwit.migration.layout import Data, Many, Number, One, Packed, Text, printable
from godwit.migration.section import octets, u8, u16, u32, u64
from godwit.net.records import (
    EVENT_ACCEPTED,
    EVENT_ESTABLISHED,
    EVENT_SYN_FROM_GUEST,
    EVENTS,
    MAX_FLOWS,
    MAX_WINDOW_SCALE,
    OBSERVED,
    PIF_GUEST,
    PIF_HOST,
    SOCKET,
    V4_MAPPED,
    address_family,
    address_text,
    check_ends,
)
from godwit.net.state import (
    BATCH,
    NEVER_SEEN,
    PREPARE_STAGE,
    FlowMover,
    queues_behind,
    sound_flows,
    sound_sockets,
    usable,
)
from godwit.net.told import MAX_NAMES, MAX_TOLD, TOLD, flats_of, told_of

log = logging.getLogger(__name__)

#: The id of the first version of our own; passt's have small ones.
NATIVE: Final = 0x80000001
MAX_CONFIGURATION: Final = 65536  # bytes of text
MAX_WHY: Final = 1024  # bytes of text
MAX_PEERS: Final = 4096  # in one entry
MAX_DATAGRAMS: Final = 4096  # in one entry
MAX_DATA: Final = 1 << 20  # bytes of their data, together
MAX_WAITING: Final = 64 << 20  # bytes of datagrams in a stream: they are in memory at the target, all of them
DATAGRAM_COST: Final = 256  # bytes that each counts for besides its data: it is an object of Python's there
SHOWN_WHY: Final = 100  # characters of it that are kept: there may be one for each flow


def _make_flow(*flat: Any) -> FlowState:
    """The flow of the fields' values. What version 2 has besides these is passt's own business."""
    initiator, guest, host = flat[0], Side._make(flat[1:5]), Side._make(flat[5:9])
    sides = (guest, host) if initiator == PIF_GUEST else (host, guest)
    pif = (PIF_GUEST, PIF_HOST) if initiator == PIF_GUEST else (PIF_HOST, PIF_GUEST)
    events, from_guest, to_guest, mss, *rest = flat[9:]
    return FlowState(pif, sides, 0, from_guest, to_guest, events, mss, 0, 0, 0, *rest)


def _check_flow(flat: tuple[Any, ...]) -> None:
    check_ends(flat, sides=(1, 5))
    begun = EVENT_SYN_FROM_GUEST if flat[0] == PIF_GUEST else EVENT_ACCEPTED
    if not flat[9] & EVENT_ESTABLISHED and flat[9] != begun:
        raise UnsoundError(9, f"must have bit 0x04, or be {begun}: established, or opened by the initiator")


def _flow_fields(flow: FlowState) -> tuple[Any, ...]:
    guest, host = flow.sides if flow.pif[0] == PIF_GUEST else flow.sides[::-1]
    return (flow.pif[0], *guest, *host, flow.events, flow.ws_from_tap, flow.ws_to_tap, flow.tap_mss, *flow[10:])


FLOW: Final[Record[FlowState]] = Record(
    "TCP flow",
    (
        Field("initiator", u8, "who opened it: 1 the host's side, 2 the guest", (PIF_HOST, PIF_GUEST)),
        Field(
            "guest_our_addr",
            octets(16),
            "towards the guest: address that the back-end stands for; IPv4 as v4-mapped",
            show=address_text,
        ),
        Field("guest_end_addr", octets(16), "the guest's address", show=address_text),
        Field("guest_our_port", u16, "port to `guest_our_addr`", range(1, 65536)),
        Field("guest_end_port", u16, "port to `guest_end_addr`", range(1, 65536)),
        Field("host_our_addr", octets(16), "towards the peer: address of the socket on the host", show=address_text),
        Field("host_end_addr", octets(16), "the peer's address", show=address_text),
        Field("host_our_port", u16, "port to `host_our_addr`", range(1, 65536)),
        Field("host_end_port", u16, "port to `host_end_addr`", range(1, 65536)),
        EVENTS,
        Field("ws_from_guest", u8, "window scale that the guest announced", range(MAX_WINDOW_SCALE + 1)),
        Field("ws_to_guest", u8, "window scale announced to the guest", range(MAX_WINDOW_SCALE + 1)),
        Field("mss", u16, "largest segment to the guest", range(4, 65536)),
        Field("window_from_guest", u16, "window that the guest announced last, in its scale"),
        Field("window_to_guest", u16, "window announced to the guest last, in its scale"),
        Field("seq_to_guest", u32, "next sequence number to the guest"),
        Field("ack_from_guest", u32, "last acknowledged by the guest"),
        Field("seq_from_guest", u32, "next sequence number expected from the guest"),
        Field("ack_to_guest", u32, "last acknowledged to the guest"),
        Field("init_from_guest", u32, "sequence number of the guest's SYN"),
        Field("bytes_from_guest", u64, "bytes of payload so far that the guest has sent", default=0),
        Field("bytes_to_guest", u64, "bytes of payload so far that the guest was sent", default=0),
        Field("idle", u32, "milliseconds since anything was heard", default=0),
    ),
    _make_flow,
    fields_of=_flow_fields,
    check=_check_flow,
    doc="A TCP connection as the guest's side knows it. Before bit 0x04 is among its events it is in its handshake: "
    "with 0x01 the guest has not answered our SYN, with 0x02 it has not acknowledged our answer to its own.",
)


_EVENTS_AT: Final = FLOW.leaves[FLOW.index("events")].offset


UDP_PORT: Final[Record[UdpPort]] = Record(
    "UDP port",
    (
        Field(
            "kind",
            u8,
            "0: opened when the guest first sent from it; 2: forwarded on every address, 3: on one",
            (0, 2, 3),
        ),
        Field("guest_addr", octets(16), "the guest's address; unspecified: any of its", show=address_text),
        Field("guest_port", u16, "the guest's port", range(1, 65536)),
        Field("local_addr", octets(16), "address that the socket is bound to", show=address_text),
        Field("local_port", u16, "port that the socket is bound to", range(1, 65536)),
        Field("any_peer", u8, "1: the guest has asked many, whoever answers is heard", range(2)),
    ),
    UdpPort,
    doc="A UDP port of the guest's, and the socket that it leaves through.",
)


def _check_peer(flat: tuple[Any, ...]) -> None:
    guest = address_family(flat[0])
    if not guest:
        raise UnsoundError(0, "must be the address of one host")
    if guest != (4 if flat[1][:12] == V4_MAPPED else 6):
        raise UnsoundError(1, "must be of the same family as the guest's address")


UDP_PEER: Final[Record[UdpPeer]] = Record(
    "UDP peer",
    (
        Field("guest_addr", octets(16), "the guest's address", show=address_text),
        Field("our_addr", octets(16), "what the guest calls the peer", show=address_text),
        Field("remote_addr", octets(16), "what the host calls it", show=address_text),
        Field("local_addr", octets(16), "the host's address in this exchange, or unspecified", show=address_text),
        Field("remote_port", u16, "the peer's port", range(1, 65536)),
        Field("from_guest", u8, "1: the guest was the first to send", range(2)),
        Field("answered", u8, "1: the guest has sent something", range(2)),
    ),
    UdpPeer,
    check=_check_peer,
    doc="Somebody with whom the guest exchanges datagrams.",
)


class Waiting(NamedTuple):
    """A datagram without its data."""

    remote_addr: bytes
    local_addr: bytes
    remote_port: int
    size: int


WAITING: Final[Record[Waiting]] = Record(
    "datagram",
    (
        Field("remote_addr", octets(16), "where it came from", show=address_text),
        Field("local_addr", octets(16), "which address of the host's it came to, or unspecified", show=address_text),
        Field("remote_port", u16, "the sender's port", range(1, 65536)),
        Field("size", u32, "bytes", range(65536)),
    ),
    Waiting,
    doc="A datagram that waits for the guest.",
)


def _check_ping(flat: tuple[Any, ...]) -> None:
    guest = address_family(flat[0])
    if not guest or guest != address_family(flat[1]):
        raise UnsoundError(0 if not guest else 1, "must be the address of one host, of the guest's family")


PING: Final[Record[Ping]] = Record(
    "ping",
    (
        Field("guest_addr", octets(16), "the guest's address", show=address_text),
        Field("our_addr", octets(16), "what the guest calls whom it asks", show=address_text),
        Field("guest_ident", u16, "identifier of the guest's requests"),
        Field("host_ident", u16, "the one that they leave with"),
        Field("seq", u16, "sequence number of the last request"),
    ),
    Ping,
    check=_check_ping,
    doc="Echo requests of the guest's to one host.",
)


# ---- reading


def _load_configuration(mover: FlowMover, _part: Part, text: str) -> None:
    pairs = (line.partition("\t") for line in text.splitlines())
    mover.compare({name: value for name, tab, value in pairs if tab})


def _load_observed(mover: FlowMover, _part: Part, observed: Observed) -> None:
    mover.set_observed(usable(observed))


def _load_flows(mover: FlowMover, _part: Part, records: bytes) -> None:
    if records:
        mover.prepare(records, native=True)


def _load_socket(mover: FlowMover, _part: Part, number: int, state: SocketState, sndq: bytes, rcvq: bytes) -> None:
    mover.restore(number, SOCKET.encode(state) + sndq + rcvq)


def _load_sockets(mover: FlowMover, notes: _Notes, data: bytes, at: int) -> int:
    end, first, count, sockets = layouts.sockets_of(data, at, SOCKET_KIND.type)
    numbers = range(first, first + count)
    if not count or numbers.stop > notes.flows or not notes.settled.isdisjoint(numbers):
        return at  # one by one, it is said what is wrong
    notes.settled.update(numbers)
    mover.restore(first, sockets)
    return end


def _load_attempt(mover: FlowMover, _part: Part, number: int) -> None:
    mover.open_anew(number)


def _load_pings(mover: FlowMover, _part: Part, flats: Sequence[tuple[Any, ...]]) -> None:
    for flat in flats:
        mover.add_ping(PING.build(flat))


def _load_lost(mover: FlowMover, _part: Part, number: int, why: str) -> None:
    mover.mark_lost(number, printable(why, SHOWN_WHY))


class _Notes:
    """What has come in a stream so far."""

    def __init__(self) -> None:
        self.flows = 0
        self.opened: set[int] = set()  # flows that the guest has opened, and that are not established
        self.pings = 0
        self.udp_ports = 0
        self.waiting = 0  # bytes of datagrams
        self.settled: set[int] = set()
        self.once: set[str] = set()


def _check_once(notes: _Notes, part: Part, _value: object) -> None:
    if part.name in notes.once:
        raise part.bad(part.name, "entry", 2, "must be the only one", part.offset - part.start)
    notes.once.add(part.name)


def _check_flows(notes: _Notes, part: Part, records: bytes) -> None:
    events = records[_EVENTS_AT :: FLOW.size]
    notes.opened.update(notes.flows + n for n, value in enumerate(events) if value == EVENT_SYN_FROM_GUEST)
    notes.flows += len(events)
    if notes.flows > MAX_FLOWS:
        raise part.bad(part.name, "count", notes.flows, f"must be at most {MAX_FLOWS} in all", part.offset - part.start)


def _check_number(notes: _Notes, part: Part, number: int, *_values: object) -> None:
    """A flow has come, and what became of it comes once."""
    why = ""
    if number >= notes.flows:
        why = f"must be below {notes.flows}, the number of flows so far"
    elif number in notes.settled:
        why = "which has come before"
    if why:
        raise part.bad(part.name, "flow", number, why, part.offset - part.start)
    notes.settled.add(number)


def _check_attempt(notes: _Notes, part: Part, number: int) -> None:
    _check_number(notes, part, number)
    if number not in notes.opened:
        why = "which the guest has not opened, or which is established"
        raise part.bad(part.name, "flow", number, why, part.offset - part.start)


def _check_pings(notes: _Notes, part: Part, flats: Sequence[tuple[Any, ...]]) -> None:
    notes.pings += len(flats)
    if notes.pings > MAX_FLOWS:
        raise part.bad(part.name, "count", notes.pings, f"must be at most {MAX_FLOWS} in all", part.offset - part.start)


CONFIGURATION_KIND: Final[Kind[FlowMover]] = Kind(
    1,
    "configuration",
    (Text("text", MAX_CONFIGURATION, "lines, each a name, a tab and a value"),),
    _load_configuration,
    check=_check_once,
    required=False,
    doc="At most one. The guest's network where it comes from. The target compares it with its own and reports what "
    "differs.",
)


def _load_told(mover: FlowMover, _part: Part, flats: Sequence[tuple[Any, ...]], names: str) -> None:
    mover.set_told(told_of(flats, names))


def _check_told(notes: _Notes, part: Part, _flats: object, names: str) -> None:
    _check_once(notes, part, names)


TOLD_KIND: Final[Kind[FlowMover]] = Kind(
    12,
    "what the guest was told",
    (Many(TOLD, MAX_TOLD), Text("search", MAX_NAMES, "the search list, names apart by blanks")),
    _load_told,
    check=_check_told,
    required=False,
    doc="At most one. Of its network: what holds where it comes from, and what it may believe in still, the latest "
    "first. The target takes back what does not hold there.",
)


OBSERVED_KIND: Final[Kind[FlowMover]] = Kind(
    2,
    "observed addresses",
    (One(OBSERVED),),
    _load_observed,
    check=_check_once,
    doc="At most one. What the guest uses.",
)
FLOWS_KIND: Final[Kind[FlowMover]] = Kind(
    3,
    "TCP flows",
    (Packed(FLOW, BATCH, lambda records: layouts.odd_flows(records, native=True)),),
    _load_flows,
    check=_check_flows,
    numbered=True,
    doc="Flows, numbered from 0 on through all such entries. They come before their sockets.",
)
SOCKET_KIND: Final[Kind[FlowMover]] = Kind(
    4,
    "TCP socket",
    (
        Number("flow", "the number of its flow"),
        One(SOCKET),
        *queues_behind(1),
    ),
    _load_socket,
    check=_check_number,
    run=_load_sockets,
    doc="The kernel's side of one flow; once for each flow at most.",
)
LOST_KIND: Final[Kind[FlowMover]] = Kind(
    5,
    "lost TCP flow",
    (Number("flow", "the number of the flow"), Text("why", MAX_WHY, "why")),
    _load_lost,
    check=_check_number,
    doc="In place of a socket: the source could not save the flow, and it is reset on both sides.",
)


def _load_udp_port(mover: FlowMover, _part: Part, port: UdpPort) -> None:
    mover.add_udp_port(port)


def _load_udp_peers(mover: FlowMover, _part: Part, number: int, flats: Sequence[tuple[Any, ...]]) -> None:
    mover.add_udp_peers(number, [UDP_PEER.build(flat) for flat in flats])


def _load_datagrams(mover: FlowMover, _part: Part, number: int, flats: Sequence[tuple[Any, ...]], data: bytes) -> None:
    datagrams: list[Datagram] = []
    at = 0
    for remote_addr, local_addr, remote_port, size in flats:
        datagrams.append(Datagram(remote_addr, local_addr, remote_port, data[at : at + size]))
        at += size
    mover.add_datagrams(number, datagrams)


def _check_udp_port(notes: _Notes, part: Part, _port: UdpPort) -> None:
    notes.udp_ports += 1
    if notes.udp_ports > MAX_FLOWS:
        raise part.bad(part.name, "ports", notes.udp_ports, f"must be at most {MAX_FLOWS}", part.offset - part.start)


def _check_datagrams(notes: _Notes, part: Part, number: int, flats: Sequence[tuple[Any, ...]], _data: object) -> None:
    _check_udp_number(notes, part, number)
    notes.waiting += _data_size(flats) + len(flats) * DATAGRAM_COST
    if notes.waiting > MAX_WAITING:
        raise part.bad(
            part.name, "size", notes.waiting, f"must be at most {MAX_WAITING} in all", part.offset - part.start
        )


def _data_size(flats: Sequence[tuple[Any, ...]]) -> int:
    """Bytes of the data of those datagrams, together."""
    return sum(flat[3] for flat in flats)


def _check_udp_number(notes: _Notes, part: Part, number: int, *_values: object) -> None:
    if number >= notes.udp_ports:
        why = f"must be below {notes.udp_ports}, the number of ports so far"
        raise part.bad(part.name, "port", number, why, part.offset - part.start)


UDP_PORT_KIND: Final[Kind[FlowMover]] = Kind(
    6,
    "UDP port",
    (One(UDP_PORT),),
    _load_udp_port,
    check=_check_udp_port,
    required=False,
    numbered=True,
    doc="Numbered from 0 on. Of forwarded ports those with peers or datagrams.",
)
UDP_PEERS_KIND: Final[Kind[FlowMover]] = Kind(
    7,
    "UDP peers",
    (Number("port", "the number of their port"), Many(UDP_PEER, MAX_PEERS)),
    _load_udp_peers,
    check=_check_udp_number,
    required=False,
    doc="Peers of one port.",
)
DATAGRAMS_KIND: Final[Kind[FlowMover]] = Kind(
    8,
    "UDP datagrams",
    (
        Number("port", "the number of its port"),
        Many(WAITING, MAX_DATAGRAMS),
        Data(
            "data", lambda values: _data_size(values[1]), MAX_DATA, "the data of one after another, `size` bytes each"
        ),
    ),
    _load_datagrams,
    check=_check_datagrams,
    required=False,
    doc="Some that wait for the guest, oldest first; of 64 MiB in all, each with 256 bytes besides its data.",
)


ATTEMPT_KIND: Final[Kind[FlowMover]] = Kind(
    9,
    "TCP attempt",
    (Number("flow", "the number of the flow"),),
    _load_attempt,
    check=_check_attempt,
    doc="In place of a socket: nobody has answered yet. The target asks anew, as if the guest's SYN had just come: "
    "the peer knows of no connection, and needs no number of an earlier attempt.",
)
PINGS_KIND: Final[Kind[FlowMover]] = Kind(
    10,
    "pings",
    (Many(PING, MAX_PEERS),),
    _load_pings,
    check=_check_pings,
    required=False,
    doc="So that an answer that is under way finds the guest.",
)


# ---- writing


def _save(mover: FlowMover, push: Push) -> None:
    lines = "".join(f"{name}\t{value}\n" for name, value in mover.configuration().items())
    push(CONFIGURATION_KIND, lines)
    told = mover.guest_told()
    push(TOLD_KIND, flats_of(told), " ".join(told.search))
    push(OBSERVED_KIND, mover.observed())
    _save_flows(mover, push)
    pings = [PING.flatten(ping) for ping in mover.pings() if _is_sound(PING, ping)]
    for first in range(0, len(pings), MAX_PEERS):
        push(PINGS_KIND, pings[first : first + MAX_PEERS])
    _save_udp(mover, push)  # last: what comes to a socket after that is not in the stream


def _save_udp(mover: FlowMover, push: Push) -> None:
    """Write what can be of UDP; what cannot be is no loss that a datagram's sender does not know."""
    number, room = 0, MAX_WAITING
    for port, peers, datagrams in mover.udp():
        if not _is_sound(UDP_PORT, port):
            continue
        push(UDP_PORT_KIND, port)
        flats = [UDP_PEER.flatten(peer) for peer in peers if _is_sound(UDP_PEER, peer)]
        for first in range(0, len(flats), MAX_PEERS):
            push(UDP_PEERS_KIND, number, flats[first : first + MAX_PEERS])
        room = _save_datagrams(push, number, datagrams, room)
        number += 1


def _save_datagrams(push: Push, number: int, datagrams: Sequence[Datagram], room: int) -> int:
    """Write those of a port, as many as ``room`` bytes suffice for; how many of these are left."""
    heads: list[Waiting] = []
    data: list[bytes] = []
    size = 0
    for one in datagrams:
        head = Waiting(one.remote_addr, one.local_addr, one.remote_port, len(one.data))
        room -= head.size + DATAGRAM_COST
        if room < 0:
            break
        try:
            WAITING.check(head)
        except UnsoundError:
            continue  # from port 0: whoever sends that wants no answer, and the target cannot give one
        if len(heads) == MAX_DATAGRAMS or size + head.size > MAX_DATA:
            push(DATAGRAMS_KIND, number, heads, b"".join(data))
            heads, data, size = [], [], 0
        heads.append(head)
        data.append(one.data)
        size += head.size
    if heads:
        push(DATAGRAMS_KIND, number, heads, b"".join(data))
    return room


def _is_sound(record: Record[Any], value: Any) -> bool:
    try:
        record.encode(value)
    except (UnsoundError, struct.error) as error:
        log.info("%s does not move: %s", record.name, error)
        return False
    return True


def _save_flows(mover: FlowMover, push: Push) -> None:
    """Write the flows, and then the socket of each, or what there is in its place."""
    flows, records, begun = sound_flows(mover, FLOW, native=True)
    for first in range(0, len(records), BATCH * FLOW.size):
        push(FLOWS_KIND, records[first : first + BATCH * FLOW.size])
    attempts = [place for place in begun if mover.is_connecting(flows[place])]
    number = 0
    for place in (*attempts, len(flows)):
        for count, sockets in sound_sockets(mover, flows[number:place]):
            if isinstance(sockets, str):
                push(LOST_KIND, number, sockets)
            else:
                push.packed(layouts.entries(sockets, SOCKET_KIND.type, SOCKET_KIND.flags, number))
            number += count
        if place < len(flows):
            push(ATTEMPT_KIND, place)
            number = place + 1


def _discard(mover: FlowMover) -> None:
    try:
        mover.discard()
    finally:
        mover.set_observed(NEVER_SEEN)


ENTRIES: Final[Entries[FlowMover]] = Entries(
    "state",
    (
        CONFIGURATION_KIND,
        TOLD_KIND,
        OBSERVED_KIND,
        FLOWS_KIND,
        SOCKET_KIND,
        LOST_KIND,
        UDP_PORT_KIND,
        UDP_PEERS_KIND,
        DATAGRAMS_KIND,
        ATTEMPT_KIND,
        PINGS_KIND,
    ),
    _save,
    notes=_Notes,
    discard=_discard,
    commit=lambda mover: mover.commit(),
    doc="Entries, up to one of type 0.",
)

VERSION: Final[Version[FlowMover]] = Version(
    NATIVE,
    (PREPARE_STAGE, ENTRIES),
    doc="Ours: what a guest has, whatever it is, as long as both sides are godwit.",
)
