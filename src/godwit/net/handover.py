# SPDX-License-Identifier: GPL-2.0-or-later
"""What a godwit hands over to another one on the same host, as a stream of self-describing entries.

The entries are those of a migration's native stream (`godwit.migration.entries`), and grow like it: so a godwit may
take over from one of another version. Sockets, eventfds and the guest's memory go along as descriptors, which the
entries name by their place in one list. ``docs/takeover.md`` has the format and who says what when.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from godwit.dataplane.live import LiveFlag, LivePartial, LivePeer, LivePing, LivePort, LiveRing, LiveTcp
from godwit.dataplane.state import Datagram, Observed
from godwit.migration import Entries, Field, Header, Kind, Part, Reader, Record, Writer
from godwit.migration.entries import Push
from godwit.migration.layout import Data, Many, Number, One, Text
from godwit.migration.section import octets, u8, u16, u32, u64
from godwit.net.config import Withdrawn
from godwit.net.native import CONFIGURATION_KIND, MAX_PEERS, Waiting
from godwit.net.native import TOLD_KIND as NATIVE_TOLD
from godwit.net.records import MAX_FLOWS, MAX_QUEUE, MAX_WINDOW_SCALE, OBSERVED, address_text
from godwit.net.told import flats_of, told_of
from godwit.vhost_user import MemoryRegion, SavedSession

MAGIC: Final = 0x676F64776974_544F  # "godwitTO"
#: The version of the stream. A new one is for what the entries themselves cannot say.
VERSION: Final = 1
#: No descriptor.
NONE: Final = 0xFFFFFFFF

MAX_TEXT: Final = 65536
MAX_PATH: Final = 4096
MAX_UNREAD: Final = 8192
MAX_PARTS: Final = 65536
UNITS: Final = 1024  # bytes: a bit for each 8 of a datagram
MAX_HEADERS: Final = 256
MAX_FRAME: Final = 2048
BATCH: Final = 1024
RINGS: Final = 2
MAX_REGIONS: Final = 64
MAX_PARTIALS: Final = 16
ALL_FLAGS: Final = range(1 << len(LiveFlag))

#: Names that others find a godwit by, and what is there.
FRONT_END, REPAIR, TAKEOVER, PID_FILE, CONTROL = 1, 2, 3, 4, 5


class Name(NamedTuple):
    """A path of the file system, and the socket that listens there; -1: it is no socket."""

    what: int
    path: str
    fd: int


class Process(NamedTuple):
    """What a godwit knows besides its data plane.

    ``parked_at``: CLOCK_MONOTONIC, in nanoseconds; ``pid`` is for the log;
    ``network``: the network namespace that it is in (st_ino of ns/net), 0: not known.
    """

    hash_key: bytes
    parked_at: int
    pid: int
    stands_still: int = 0
    moved_in: int = 0
    guest_runs: int = 0
    listeners_frozen: int = 0
    network: int = 0


@dataclass
class Handed:
    """All that goes along. Descriptors are those of whoever holds this."""

    process: Process = field(default_factory=lambda: Process(bytes(16), 0, 0))
    facts: dict[str, str] = field(default_factory=dict)
    told: Withdrawn = field(default_factory=Withdrawn)  # what the guest was told of its network
    counters: dict[str, int] = field(default_factory=dict)
    observed: Observed = field(default_factory=lambda: Observed(bytes(16), bytes(16), bytes(4), bytes(6)))
    names: list[Name] = field(default_factory=list)
    helper: int = -1
    waiting: int = -1  # a front-end that has connected, and is not served yet
    connection: int = -1
    session: SavedSession | None = None
    regions: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    rings: list[tuple[LiveRing, int, int, int]] = field(default_factory=list)
    listeners: list[int] = field(default_factory=list)
    ports: list[tuple[LivePort, int, list[Datagram]]] = field(default_factory=list)
    peers: list[tuple[int, LivePeer]] = field(default_factory=list)  # by the place of their port
    tcp: list[tuple[LiveTcp, int, bytes, bytes]] = field(default_factory=list)
    pings: list[tuple[LivePing, int]] = field(default_factory=list)
    partials: list[LivePartial] = field(default_factory=list)
    frames: list[bytes] = field(default_factory=list)

    def sockets(self) -> int:
        """How many descriptors the flows and the forwarded ports have."""
        return len(self.listeners) + len(self.ports) + len(self.tcp) + len(self.pings)

    def summary(self) -> str:
        """In numbers, for the log."""
        forwarded = len(self.listeners) + sum(bool(port.flags & LiveFlag.FORWARD) for port, _, _ in self.ports)
        waiting = sum(len(datagrams) for _, _, datagrams in self.ports)
        return (
            f"{len(self.tcp)} TCP connections, {len(self.peers)} UDP peers, {len(self.pings)} pings, "
            f"{forwarded} forwarded ports, {waiting} datagrams in hand"
        )


class Parcel:
    """What is handed over, and its descriptors in the order in which they are sent."""

    def __init__(self, handed: Handed, fds: Iterable[int] = ()) -> None:
        self.handed = handed
        self.fds = list(fds)
        self._left = dict(enumerate(self.fds))
        self.complete = False  # there is an entry about the process: the one that is always there

    def put(self, fd: int) -> int:
        """Send a descriptor along; gives its number."""
        if fd < 0:
            return NONE
        self.fds.append(fd)
        return len(self.fds) - 1

    def take(self, part: Part, number: int) -> int:
        """The descriptor of that number, which is named this one time; -1 for none."""
        if number == NONE:
            return -1
        if number not in self._left:
            raise part.bad(part.name, "descriptor", number, "which did not come, or was named before", 0)
        return self._left.pop(number)

    def left(self) -> list[int]:
        """The descriptors that were not named."""
        return list(self._left.values())


# ---- records


class Session(NamedTuple):
    """The head of a vhost-user session."""

    features: int
    protocol_features: int
    owned: int
    unread: int


_ADDRESSES: Final = ("guest_addr", "our_addr", "remote_addr", "local_addr")
_MEANING: Final = {
    "flags": "see `LiveFlag`",
    "events": "as in a migration's stream",
    "guest_addr": "the guest's address",
    "our_addr": "what the guest calls the peer",
    "remote_addr": "what the host calls the peer",
    "local_addr": "address of the host's socket, or unspecified",
    "guest_port": "the guest's port",
    "our_port": "port to `our_addr`",
    "remote_port": "port to `remote_addr`",
    "local_port": "port to `local_addr`, or 0",
    "seq_to_guest": "next sequence number to the guest",
    "seq_max_to_guest": "the highest ever sent to it, plus one",
    "seq_ack_from_guest": "the first that it has not acknowledged",
    "seq_from_guest": "the next expected from it",
    "seq_ack_to_guest": "the last acknowledged to it",
    "seq_init_from_guest": "the first of its data",
    "seq_fin": "of our FIN",
    "acked": "bytes acknowledged by the guest and still in the socket's queue",
    "window": "the guest's, in bytes from `seq_ack_from_guest`",
    "edge": "right edge of the window that the guest was given",
    "granted": "its size when it was last computed",
    "mss": "largest segment to the guest",
    "wnd_sent": "the window field of the last segment to it",
    "ws_from_guest": "window scale that the guest announced",
    "ws_to_guest": "window scale announced to the guest",
    "retries": "attempts so far at what was sent last",
    "dup_acks": "duplicate acknowledgements of the guest's in a row",
    "due": "milliseconds until the flow's deadline; 0: none",
    "idle": "milliseconds since something was heard of it",
    "bytes_from_guest": "bytes of payload so far that the guest has sent",
    "bytes_to_guest": "bytes of payload so far that the guest was sent",
    "kind": "0: its own, 1: its own to the host's loopback, 2: forwarded on every address, 3: on one",
    "ttl": "hop limit that the socket was told last; 0: none",
    "tos": "traffic class that the socket was told last",
    "scope": "interface of a link-local peer",
    "ident": "identifier",
    "sequence": "sequence number of the last request",
}
_RULES: Final[dict[str, tuple[Any, Any]]] = {
    "flags": (u32, ALL_FLAGS),
    "events": (u8, None),
    "guest_port": (u16, None),
    "our_port": (u16, None),
    "remote_port": (u16, None),
    "local_port": (u16, None),
    "mss": (u16, range(4, 65536)),
    "wnd_sent": (u16, None),
    "ws_from_guest": (u8, range(MAX_WINDOW_SCALE + 1)),
    "ws_to_guest": (u8, range(MAX_WINDOW_SCALE + 1)),
    "retries": (u8, None),
    "dup_acks": (u8, None),
    "bytes_from_guest": (u64, None),
    "bytes_to_guest": (u64, None),
    "kind": (u16, range(4)),
    "ttl": (u8, None),
    "tos": (u8, None),
    "ident": (u16, None),
    "sequence": (u16, None),
}
_SOCKET: Final = Field("socket", u32, "the number of its descriptor, 0xffffffff: none")


def _flow_record(name: str, kind: Any, first: Field, doc: str) -> Record[tuple[Any, ...]]:
    """The fields of one of the data plane's tuples, behind another: all flows say the same things by the same names."""
    fields = [first]
    for each in kind._fields:
        if each in _ADDRESSES:
            fields.append(Field(each, octets(16), _MEANING[each], show=address_text))
        else:
            code, allowed = _RULES.get(each, (u32, None))
            fields.append(Field(each, code, _MEANING[each], allowed))
    return Record(name, fields, lambda *flat: flat, doc=doc)


TCP: Final = _flow_record("live TCP flow", LiveTcp, _SOCKET, "A TCP connection, in whatever state it is.")
PORT: Final = _flow_record("live UDP port", LivePort, _SOCKET, "A UDP port of the guest's.")
PEER: Final = _flow_record(
    "live UDP peer",
    LivePeer,
    Field("port", u32, "the number of its port"),
    "Somebody with whom the guest exchanges datagrams.",
)
# What is on the wire may be in here: port 0, too, which no stream of a migration has.
WAITING: Final[Record[Waiting]] = Record(
    "waiting datagram",
    (
        Field("remote_addr", octets(16), "where it came from", show=address_text),
        Field("local_addr", octets(16), "which address of the host's it came to, or unspecified", show=address_text),
        Field("remote_port", u16, "the sender's port"),
        Field("size", u32, "bytes", range(65536)),
    ),
    Waiting,
    doc="A datagram that is on its way to the guest.",
)
PING: Final = _flow_record("live ping", LivePing, _SOCKET, "An exchange of echo requests and replies.")

PROCESS: Final[Record[Process]] = Record(
    "process",
    (
        Field("hash_key", octets(16), "what sequence numbers of new connections come from"),
        Field("parked_at", u64, "when the guest's network came to a stop: CLOCK_MONOTONIC, ns"),
        Field("pid", u32, "its process, for the log"),
        Field("stands_still", u8, "1: the front-end has stopped the rings", range(2)),
        Field("moved_in", u8, "1: the guest has come by migration, and not been told of the network here", range(2)),
        Field("guest_runs", u8, "1: it has started its rings", range(2)),
        Field("listeners_frozen", u8, "1: until a guest comes, nobody gets a connection to a forwarded port", range(2)),
        Field("network", u64, "its network namespace, as the kernel numbers it; 0: not known"),
    ),
    Process,
    doc="What the old one knows besides its data plane.",
)

SESSION: Final[Record[Session]] = Record(
    "vhost-user session",
    (
        Field("features", u64, "as negotiated"),
        Field("protocol_features", u64, "as negotiated"),
        Field("owned", u8, "1: SET_OWNER has come", range(2)),
        Field("unread", u16, "bytes of a message that has come in part", range(MAX_UNREAD + 1)),
    ),
    Session,
    doc="The session with the front-end, between two requests. Memory and rings have entries of their own.",
)

DESCRIPTOR: Final[Record[int]] = Record(
    "descriptor",
    (Field("number", u32, "its number"),),
    lambda number: number,
    fields_of=lambda number: (number,),
    doc="One of those that came along.",
)


class Region(NamedTuple):
    """A region of the guest's memory, without its descriptor."""

    guest_addr: int
    size: int
    user_addr: int
    offset: int


REGION: Final[Record[Region]] = Record(
    "memory region",
    (
        Field("guest_addr", u64, "first guest-physical address"),
        Field("size", u64, "bytes"),
        Field("user_addr", u64, "the same place in the front-end's address space"),
        Field("offset", u64, "of its first byte in the descriptor"),
    ),
    Region,
    doc="A piece of the guest's memory.",
)

RING: Final[Record[LiveRing]] = Record(
    "ring",
    (
        Field("num", u16, "entries; 0: not said yet"),
        Field("last_avail", u16, "the next available entry to take"),
        Field("used", u16, "the next used entry to fill"),
        Field("shown", u16, "what the guest was last shown of that"),
        Field("most", u16, "chains that waited at a time"),
        Field("descriptor", u64, "the front-end's address of the descriptor table"),
        Field("available", u64, "of the available ring"),
        Field("used_ring", u64, "of the used ring"),
        Field("has_addr", u8, "1: these were said", range(2)),
        Field("started", u8, "1: between SET_VRING_KICK and GET_VRING_BASE", range(2)),
        Field("enabled", u8, "1: SET_VRING_ENABLE", range(2)),
        Field("broken", u8, "1: the guest broke a rule, and it is not used", range(2)),
        Field("kicked", u8, "1: the guest has kicked it", range(2)),
    ),
    LiveRing,
    doc="A virtqueue.",
)


class NameHead(NamedTuple):
    """What a name is for."""

    what: int


NAME: Final[Record[NameHead]] = Record(
    "name",
    (
        Field(
            "what",
            u8,
            "where connect 1: front-ends, 2: repair helpers, 3: who takes over, 5: who asks; 4: a PID file",
            range(1, 6),
        ),
    ),
    NameHead,
    doc="A path that others find it by.",
)


class PartialHead(NamedTuple):
    """A `LivePartial` without its bytes."""

    v6: int
    proto: int
    ident: int
    source: bytes
    destination: bytes
    age: int
    size: int
    have: int
    end: int
    header_size: int


PARTIAL: Final[Record[PartialHead]] = Record(
    "partial datagram",
    (
        Field("v6", u8, "1: of IPv6", range(2)),
        Field("proto", u8, "the protocol above IP"),
        Field("ident", u32, "identification of its fragments"),
        Field("source", octets(16), "where it came from", show=address_text),
        Field("destination", octets(16), "where it goes", show=address_text),
        Field("age", u32, "milliseconds since the first fragment came"),
        Field("size", u32, "bytes above IP; 0: the last fragment has not come", range(MAX_PARTS)),
        Field("have", u32, "bytes that have come", range(MAX_PARTS)),
        Field("end", u32, "end of the fragment that reaches furthest", range(MAX_PARTS)),
        Field("header_size", u32, "bytes of Ethernet's and IP's headers", range(MAX_HEADERS)),
    ),
    PartialHead,
    doc="A datagram of the guest's of which some fragments have come.",
)


# ---- reading


def _load_facts(parcel: Parcel, _part: Part, text: str) -> None:
    parcel.handed.facts = {name: value for name, tab, value in (x.partition("\t") for x in text.splitlines()) if tab}


def _load_counters(parcel: Parcel, _part: Part, text: str) -> None:
    pairs = (line.partition("\t") for line in text.splitlines())
    known = {name: int(value) for name, _, value in pairs if value.isascii() and value.isdigit()}
    parcel.handed.counters = {name: value for name, value in known.items() if value < 1 << 64}


def _load_observed(parcel: Parcel, _part: Part, observed: Observed) -> None:
    parcel.handed.observed = observed


def _load_process(parcel: Parcel, _part: Part, process: Process) -> None:
    parcel.handed.process = process
    parcel.complete = True


def _load_name(parcel: Parcel, part: Part, number: int, head: NameHead, path: str) -> None:
    if any(name.what == head.what for name in parcel.handed.names):
        raise part.bad(part.name, "what", head.what, "which has come before", 0)
    parcel.handed.names.append(Name(head.what, path, parcel.take(part, number)))


def _load_fd(attribute: str) -> Callable[[Parcel, Part, int], None]:
    def load(parcel: Parcel, part: Part, number: int) -> None:
        if getattr(parcel.handed, attribute) >= 0:
            raise part.bad(part.name, "entry", 2, "must be the only one", 0)
        setattr(parcel.handed, attribute, parcel.take(part, number))

    return load


def _load_session(parcel: Parcel, part: Part, number: int, head: Session, unread: bytes, fds: list[tuple[int]]) -> None:
    handed = parcel.handed
    if handed.session is not None:
        raise part.bad(part.name, "entry", 2, "must be the only one", 0)
    handed.connection = parcel.take(part, number)
    came = tuple(parcel.take(part, fd) for (fd,) in fds)
    handed.session = SavedSession(head.features, head.protocol_features, bool(head.owned), (), (), unread, came)


def _load_region(parcel: Parcel, part: Part, number: int, region: Region) -> None:
    if len(parcel.handed.regions) == MAX_REGIONS:
        raise part.bad(part.name, "regions", MAX_REGIONS + 1, f"must be at most {MAX_REGIONS}", 0)
    parcel.handed.regions.append((*region, parcel.take(part, number)))


def _load_ring(parcel: Parcel, part: Part, kick: int, call: int, err: int, ring: LiveRing) -> None:
    if len(parcel.handed.rings) == RINGS:
        raise part.bad(part.name, "rings", RINGS + 1, f"must be at most {RINGS}", 0)
    take = parcel.take
    parcel.handed.rings.append((ring, take(part, kick), take(part, call), take(part, err)))


def _load_listeners(parcel: Parcel, part: Part, numbers: list[tuple[int]]) -> None:
    parcel.handed.listeners += [parcel.take(part, number) for (number,) in numbers]


def _load_ports(parcel: Parcel, part: Part, flats: Sequence[tuple[Any, ...]]) -> None:
    parcel.handed.ports += [(LivePort._make(flat[1:]), parcel.take(part, flat[0]), []) for flat in flats]


def _load_peers(parcel: Parcel, part: Part, flats: Sequence[tuple[Any, ...]]) -> None:
    for flat in flats:
        _check_port(parcel, part, flat[0])
        parcel.handed.peers.append((flat[0], LivePeer._make(flat[1:])))


def _load_datagram(parcel: Parcel, part: Part, number: int, head: Waiting, data: bytes) -> None:
    _check_port(parcel, part, number)
    parcel.handed.ports[number][2].append(Datagram(*head[:3], data))


def _check_port(parcel: Parcel, part: Part, number: int) -> None:
    if number >= len(parcel.handed.ports):
        raise part.bad(part.name, "port", number, f"must be below {len(parcel.handed.ports)}, the ports so far", 0)


def _load_tcp(parcel: Parcel, part: Part, flats: Sequence[tuple[Any, ...]]) -> None:
    if len(parcel.handed.tcp) + len(flats) > MAX_FLOWS:
        raise part.bad(part.name, "flows", len(parcel.handed.tcp) + len(flats), f"must be at most {MAX_FLOWS}", 0)
    parcel.handed.tcp += [(LiveTcp._make(flat[1:]), parcel.take(part, flat[0]), b"", b"") for flat in flats]


def _load_carried(
    parcel: Parcel, part: Part, number: int, _first: int, _second: int, to_guest: bytes, to_sock: bytes
) -> None:
    if number >= len(parcel.handed.tcp):
        raise part.bad(part.name, "flow", number, f"must be below {len(parcel.handed.tcp)}, the flows so far", 0)
    flow, fd, _, _ = parcel.handed.tcp[number]
    parcel.handed.tcp[number] = flow, fd, to_guest, to_sock


def _load_pings(parcel: Parcel, part: Part, flats: Sequence[tuple[Any, ...]]) -> None:
    parcel.handed.pings += [(LivePing._make(flat[1:]), parcel.take(part, flat[0])) for flat in flats]


def _load_partial(parcel: Parcel, part: Part, head: PartialHead, header: bytes, units: bytes, data: bytes) -> None:
    if len(parcel.handed.partials) == MAX_PARTIALS:
        raise part.bad(part.name, "datagrams", MAX_PARTIALS + 1, f"must be at most {MAX_PARTIALS}", 0)
    parcel.handed.partials.append(LivePartial(*head[:9], header, units, data))


def _load_frame(parcel: Parcel, _part: Part, _size: int, frame: bytes) -> None:
    parcel.handed.frames.append(frame)


_FD: Final = Number("socket", "the number of the descriptor, or 0xffffffff")
_DESCRIPTORS: Final = Many(DESCRIPTOR, 65536)

FACTS_KIND: Final[Kind[Parcel]] = Kind(
    1, "configuration", CONFIGURATION_KIND.layout, _load_facts, required=False, doc="The guest's network."
)
COUNTERS_KIND: Final[Kind[Parcel]] = Kind(
    2,
    "counters",
    (Text("text", MAX_TEXT, "lines, each a name, a tab and a number"),),
    _load_counters,
    required=False,
    doc="What was counted so far.",
)
OBSERVED_KIND: Final[Kind[Parcel]] = Kind(3, "observed addresses", (One(OBSERVED),), _load_observed)
PROCESS_KIND: Final[Kind[Parcel]] = Kind(4, "process", (One(PROCESS),), _load_process)
NAME_KIND: Final[Kind[Parcel]] = Kind(
    5, "name", (_FD, One(NAME), Text("path", MAX_PATH, "the path")), _load_name, doc="Where others find it."
)
HELPER_KIND: Final[Kind[Parcel]] = Kind(
    6, "repair helper", (_FD,), _load_fd("helper"), required=False, doc="Its connection."
)
WAITING_KIND: Final[Kind[Parcel]] = Kind(
    7, "waiting front-end", (_FD,), _load_fd("waiting"), doc="One that has connected, and is not served yet."
)
SESSION_KIND: Final[Kind[Parcel]] = Kind(
    8,
    "session",
    (
        _FD,
        One(SESSION),
        Data("unread", lambda values: int(values[1].unread), MAX_UNREAD, "the bytes that have come"),
        Many(DESCRIPTOR, 64),
    ),
    _load_session,
    doc="With the front-end that is served. The descriptors are those that came with the bytes.",
)
REGION_KIND: Final[Kind[Parcel]] = Kind(9, "memory", (_FD, One(REGION)), _load_region)
RING_KIND: Final[Kind[Parcel]] = Kind(
    10,
    "ring",
    (
        Number("kick", "descriptor to be kicked by"),
        Number("call", "descriptor to interrupt the guest"),
        Number("err", "descriptor to tell the front-end of an error"),
        One(RING),
    ),
    _load_ring,
    doc="In their order.",
)
LISTENERS_KIND: Final[Kind[Parcel]] = Kind(
    11, "TCP listeners", (_DESCRIPTORS,), _load_listeners, doc="Forwarded ports, with who waits at them."
)
PORTS_KIND: Final[Kind[Parcel]] = Kind(
    12, "UDP ports", (Many(PORT, 65536),), _load_ports, doc="Numbered from 0 on through all such entries."
)
PEERS_KIND: Final[Kind[Parcel]] = Kind(13, "UDP peers", (Many(PEER, MAX_PEERS),), _load_peers)
WAITING_DATAGRAM_KIND: Final[Kind[Parcel]] = Kind(
    14,
    "UDP datagram",
    (
        Number("port", "the number of its port"),
        One(WAITING),
        Data("data", lambda values: int(values[1].size), 65535, "its data, `size` bytes"),
    ),
    _load_datagram,
    doc="One that is not in its socket's queue any more.",
)
TCP_KIND: Final[Kind[Parcel]] = Kind(
    15, "TCP flows", (Many(TCP, BATCH),), _load_tcp, doc="Numbered from 0 on through all such entries."
)
CARRIED_KIND: Final[Kind[Parcel]] = Kind(
    16,
    "carried bytes",
    (
        Number("flow", "the number of the TCP flow"),
        Number("to_guest", "bytes for the guest"),
        Number("to_sock", "bytes for the socket"),
        Data("for the guest", lambda values: int(values[1]), MAX_QUEUE, "the bytes for the guest"),
        Data("for the socket", lambda values: int(values[2]), MAX_QUEUE, "the bytes for the socket"),
    ),
    _load_carried,
    doc="What goes before all that is in the socket's queues.",
)
PINGS_KIND: Final[Kind[Parcel]] = Kind(17, "pings", (Many(PING, BATCH),), _load_pings, required=False)
PARTIAL_KIND: Final[Kind[Parcel]] = Kind(
    18,
    "partial datagram",
    (
        One(PARTIAL),
        Data("header", lambda values: int(values[0].header_size), MAX_HEADERS, "the headers"),
        Data("units", lambda _values: UNITS, UNITS, f"a bit for each 8 bytes that have come, {UNITS} bytes"),
        Data("data", lambda values: int(values[0].end), MAX_PARTS, "`end` bytes"),
    ),
    _load_partial,
    required=False,
)
FRAME_KIND: Final[Kind[Parcel]] = Kind(
    19,
    "frame",
    (Number("size", "bytes"), Data("frame", lambda values: int(values[0]), MAX_FRAME, "the whole Ethernet frame")),
    _load_frame,
    required=False,
    doc="One that is on its way to the guest.",
)


def _load_told(parcel: Parcel, _part: Part, flats: Sequence[tuple[Any, ...]], names: str) -> None:
    parcel.handed.told = told_of(flats, names)


TOLD_KIND: Final[Kind[Parcel]] = Kind(
    20, "what the guest was told", NATIVE_TOLD.layout, _load_told, required=False, doc="Of its network, so far."
)


# ---- writing


def _lines(values: dict[str, Any]) -> str:
    return "".join(f"{name}\t{value}\n" for name, value in values.items())


def _batches(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (items[first : first + size] for first in range(0, len(items), size))


def _save(parcel: Parcel, push: Push) -> None:
    handed, put = parcel.handed, parcel.put
    push(FACTS_KIND, _lines(handed.facts))
    push(TOLD_KIND, flats_of(handed.told), " ".join(handed.told.search))
    push(COUNTERS_KIND, _lines(handed.counters))
    push(OBSERVED_KIND, handed.observed)
    push(PROCESS_KIND, handed.process)
    for name in handed.names:
        push(NAME_KIND, put(name.fd), NameHead(name.what), name.path)
    for kind, fd in ((HELPER_KIND, handed.helper), (WAITING_KIND, handed.waiting)):
        if fd >= 0:
            push(kind, put(fd))
    if handed.session is not None:
        _save_session(parcel, handed.session, push)
    for *region, fd in handed.regions:
        push(REGION_KIND, put(fd), Region._make(region))
    for ring, *fds in handed.rings:
        push(RING_KIND, *map(put, fds), ring)
    for some in _batches(handed.listeners, 65536):
        push(LISTENERS_KIND, [(put(fd),) for fd in some])
    _save_flows(parcel, push)
    for partial in handed.partials:
        head = PartialHead(*partial[:9], len(partial.header))
        push(PARTIAL_KIND, head, partial.header, partial.units, partial.data)
    for frame in handed.frames:
        push(FRAME_KIND, len(frame), frame)


def _save_session(parcel: Parcel, saved: SavedSession, push: Push) -> None:
    head = Session(saved.features, saved.protocol_features, int(saved.owned), len(saved.unread))
    fds = [(parcel.put(fd),) for fd in saved.fds]
    push(SESSION_KIND, parcel.put(parcel.handed.connection), head, saved.unread, fds)


def _save_flows(parcel: Parcel, push: Push) -> None:
    handed, put = parcel.handed, parcel.put
    for ports in _batches(handed.ports, 65536):
        push(PORTS_KIND, [(put(fd), *port) for port, fd, _ in ports])
    for peers in _batches(handed.peers, MAX_PEERS):
        push(PEERS_KIND, [(number, *peer) for number, peer in peers])
    for number, (_, _, datagrams) in enumerate(handed.ports):
        for one in datagrams:
            head = Waiting(one.remote_addr, one.local_addr, one.remote_port, len(one.data))
            push(WAITING_DATAGRAM_KIND, number, head, one.data)
    for flows in _batches(handed.tcp, BATCH):
        push(TCP_KIND, [(put(fd), *flow) for flow, fd, _, _ in flows])
    for number, (_, _, to_guest, to_sock) in enumerate(handed.tcp):
        if to_guest or to_sock:
            push(CARRIED_KIND, number, len(to_guest), len(to_sock), to_guest, to_sock)
    for pings in _batches(handed.pings, BATCH):
        push(PINGS_KIND, [(put(fd), *ping) for ping, fd in pings])


ENTRIES: Final[Entries[Parcel]] = Entries(
    "hand-over",
    (
        FACTS_KIND,
        COUNTERS_KIND,
        OBSERVED_KIND,
        PROCESS_KIND,
        NAME_KIND,
        HELPER_KIND,
        WAITING_KIND,
        SESSION_KIND,
        REGION_KIND,
        RING_KIND,
        LISTENERS_KIND,
        PORTS_KIND,
        PEERS_KIND,
        WAITING_DATAGRAM_KIND,
        TCP_KIND,
        CARRIED_KIND,
        PINGS_KIND,
        PARTIAL_KIND,
        FRAME_KIND,
        TOLD_KIND,
    ),
    _save,
    doc="All that a godwit has.",
)


def write(handed: Handed) -> tuple[bytes, list[int]]:
    """The stream, and the descriptors that go with it, in order; they stay the caller's."""
    parcel = Parcel(handed)
    file = io.BytesIO()
    writer = Writer(file)
    writer.push_bytes(Header(VERSION, VERSION, MAGIC).pack())
    assert ENTRIES.source is not None  # it has one
    ENTRIES.source(parcel, writer)
    writer.flush()
    return file.getvalue(), parcel.fds


def read(stream: bytes, fds: Sequence[int]) -> tuple[Handed, list[int]]:
    """What was written, and those of the descriptors that nothing was said of; all stay the caller's until then.

    :raises MigrationError: it cannot be right, or is a newer one's.
    """
    parcel = Parcel(Handed(), fds)
    reader = Reader(io.BytesIO(stream))
    header = Header.parse(reader.pull_bytes(Header.size()), MAGIC)
    if not header.compat_version <= VERSION <= header.version:
        raise reader.bad("header", "version", header.version, f"and what is known here is {VERSION}")
    reader.stage = ENTRIES.name
    assert ENTRIES.target is not None  # it has one
    ENTRIES.target(parcel, reader)
    if not reader.at_end():
        raise reader.bad("stream", "end", reader.offset, "and bytes follow it")
    if not parcel.complete:
        raise reader.bad("stream", PROCESS_KIND.name, "nowhere", "must be there")
    return _complete(parcel.handed), parcel.left()


def _complete(handed: Handed) -> Handed:
    """The session knows of memory and rings, too."""
    if handed.session is not None:
        handed.session = handed.session._replace(
            regions=tuple(MemoryRegion(*region[:4]) for region in handed.regions),
            rings=tuple((ring.num > 0, bool(ring.has_addr), bool(ring.started)) for ring, *_ in handed.rings),
        )
    return handed
