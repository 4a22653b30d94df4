# SPDX-License-Identifier: GPL-2.0-or-later
"""The migration stages of the network device, and version 2 of its stream.

Version 2 is passt's, byte for byte (``docs/stream-v2.md``): a guest can move
between the two programs. Ours is in ``native``. Here is the order of things in a stream and what is
believed of it; how a flow is frozen, dumped and restored is the device's, seen
through ``FlowMover``.

Nothing in a stream is used before it was checked. A bad value fails the load;
a flow that could not be dumped or restored is that flow's loss alone.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, Protocol

from godwit.dataplane.state import Datagram, FlowState, Observed, Ping, SocketState, UdpPeer, UdpPort
from godwit.migration import Item, Part, Reader, Section, Stage, UnsoundError, Version, Writer
from godwit.migration.layout import Data, Shown, show_all
from godwit.migration.section import shown
from godwit.net.config import Withdrawn
from godwit.net.records import (
    EVENT_ACCEPTED,
    EVENT_ESTABLISHED,
    FLOW,
    LOST,
    MAX_FLOWS,
    MAX_QUEUE,
    OBSERVED,
    SOCKET,
    STATE_LOST,
    STATES_ENDED,
    flat_of,
    flow_of,
)

log = logging.getLogger(__name__)

#: Flows read and prepared at once: four full messages to the repair helper.
BATCH: Final = 4 * 253


def queues_behind(socket: int) -> tuple[Data, Data]:
    """What follows a socket's record, which is the value of that index."""
    return (
        Data("sndq", lambda values: int(values[socket].sndq), MAX_QUEUE, "the send queue, `sndq` bytes"),
        Data("rcvq", lambda values: int(values[socket].rcvq), MAX_QUEUE, "the receive queue, `rcvq` bytes"),
    )


NEVER_SEEN: Final = Observed(bytes(16), bytes(16), bytes(4), bytes(6))


class FlowMover(Protocol):
    """The device, as its migration stages see it. Every call may block; none comes from an event loop.

    Flow ids mean something to the device only. Trouble with one flow is
    recorded with that flow and never raised; what is raised fails the transfer.
    """

    def observed(self) -> Observed:
        """The guest's addresses as seen in its frames."""

    def set_observed(self, observed: Observed) -> None:
        """Target: what the source has seen (``NEVER_SEEN`` to forget it). Causes no packet."""

    def freeze(self) -> None:
        """Source: no flow takes or sends anything from here on; sockets ready to be dumped."""

    def thaw(self) -> None:
        """Source: undo ``freeze``, also a half-way one, at any time until the front-end is gone."""

    def flows(self, *, handshakes: bool = False) -> Sequence[int]:
        """Source, frozen: the TCP flows that are established on the guest's side, also those that cannot be dumped.

        With ``handshakes`` those in a handshake, too.
        """

    def is_connecting(self, flow: int) -> bool:
        """Source, frozen: the guest has opened it and its peer has not answered; there is nothing to dump."""

    def flow_state(self, flow: int) -> FlowState:
        """Source, frozen: the flow."""

    def dump(self, flow: int) -> tuple[SocketState, bytes, bytes] | None:
        """Source, frozen: the socket, its send queue and its receive queue. None: it cannot move."""

    def give_up(self, flow: int, why: str) -> None:
        """Source, frozen: this flow is not in the stream, or as lost: to be reset when the guest has moved."""

    def configuration(self) -> Mapping[str, str]:
        """Source: what the guest's network is here, by names for people."""

    def compare(self, configuration: Mapping[str, str]) -> None:
        """Target: what it was where the guest comes from; differences are reported. Causes no packet."""

    def guest_told(self) -> Withdrawn:
        """Source: what the guest was told of its network and may believe in."""

    def set_told(self, told: Withdrawn) -> None:
        """Target: what it was told where it comes from, to be taken back at the commit where it does not hold here."""

    def prepared(self) -> Sequence[int]:
        """Target: the ids of all flows that were prepared, in their order."""

    def prepare(self, flows: Sequence[FlowState]) -> Sequence[int]:
        """Target: make flows and frozen sockets in repair mode, silently; an id for each.

        Called once for every batch of ``BATCH`` flows. A flow whose socket
        cannot be made has an id all the same and is reset at the commit.
        """

    def restore(self, flow: int, socket: SocketState, sndq: bytes, rcvq: bytes) -> None:
        """Target: fill the socket of a prepared flow, silently; on failure the flow is reset at the commit."""

    def open_anew(self, flow: int) -> None:
        """Target: the guest has opened it, and its peer has not answered: ask it again at the commit."""

    def pings(self) -> Sequence[Ping]:
        """Source, frozen: the guest's echoes."""

    def add_ping(self, ping: Ping) -> None:
        """Target: one of them; it may be that there is no place for it."""

    def mark_lost(self, flow: int, why: str = "") -> None:
        """Target: the source could not move this flow: reset it on the guest's side at the commit."""

    def udp(self) -> Iterator[tuple[UdpPort, Sequence[UdpPeer], Sequence[Datagram]]]:
        """Source, frozen: each UDP port of the guest's, its peers, and what waits for the guest.

        ``thaw`` undoes it as all else: nothing that waits is lost, or comes twice.
        """

    def add_udp_port(self, port: UdpPort) -> None:
        """Target: the next of them, numbered from 0 on. It may be that there is none to be had."""

    def add_udp_peers(self, number: int, peers: Sequence[UdpPeer]) -> None:
        """Target: peers of that port."""

    def add_datagrams(self, number: int, datagrams: Sequence[Datagram]) -> None:
        """Target: what waits for the guest at that port."""

    def commit(self) -> None:
        """Target: the guest runs: let all go."""

    def discard(self) -> None:
        """Target: close all that was prepared, silently."""

    def linger(self) -> None:
        """Source, saved: keep the frozen sockets silent until ``thaw``, or until the front-end is gone."""


def usable(observed: Observed) -> Observed:
    """What a guest can have used; the rest as never seen. These come from a guest's frames: odd is not broken."""
    usable = Observed(
        observed.addr6 if observed.addr6[0] != 0xFF else NEVER_SEEN.addr6,
        observed.addr6_ll if observed.addr6_ll[:1] == b"\xfe" and observed.addr6_ll[1] >> 6 == 2 else bytes(16),
        observed.addr4 if observed.addr4[0] < 0xE0 else NEVER_SEEN.addr4,
        observed.mac if not observed.mac[0] & 1 else NEVER_SEEN.mac,
    )
    for name, before, after in zip(Observed._fields, observed, usable, strict=True):
        if before != after:
            log.warning("observed addresses: %s %s is no host's, ignored", name, before.hex(":"))
    return usable


def _take_observed(mover: FlowMover, observed: Observed) -> None:
    mover.set_observed(usable(observed))


def _save_flows(mover: FlowMover, writer: Writer) -> None:
    """Write the count, the flows, and in the same order each socket with its queues.

    There is no place for a connection that has only begun. When the guest has
    called, it calls again, and the target opens another. One from outside is
    written as if it had been established, and lost: so the target tells the
    caller, to whom the source's kernel has answered.
    """
    moving: list[tuple[int, bool]] = []  # a flow, and whether it has only begun
    records: list[bytes] = []
    for flow in mover.flows(handshakes=True):
        state = mover.flow_state(flow)
        begun = not state.events & EVENT_ESTABLISHED
        if begun and state.events != EVENT_ACCEPTED:
            continue
        flat = flat_of(state._replace(events=EVENT_ESTABLISHED) if begun else state)
        try:
            FLOW.check(flat)
            records.append(FLOW.pack(flat))
        except UnsoundError as error:
            mover.give_up(flow, f"{FLOW.leaves[error.leaf].name} {error.why}")
            continue
        except struct.error as error:
            mover.give_up(flow, str(error))
            continue
        moving.append((flow, begun))
    writer.push_u32(len(moving))
    writer.push_bytes(b"".join(records))
    for flow, begun in moving:
        writer.check_cancelled()
        if begun:
            writer.push_bytes(LOST)
        else:
            _save_socket(mover, flow, writer)


def sound_socket(mover: FlowMover, flow: int) -> tuple[bytes, bytes, bytes] | str:
    """A flow's socket and its queues, to be written; or why there are none, and then the flow is given up."""
    dumped = mover.dump(flow)
    if dumped is None:
        return "the source could not save it"
    state, sndq, rcvq = dumped
    try:
        record = SOCKET.encode(state)
        if state.sndq != len(sndq) or state.rcvq != len(rcvq):
            raise UnsoundError(2, f"with {len(sndq)} + {len(rcvq)} bytes in the queues")
    except UnsoundError as error:
        why = f"{SOCKET.leaves[error.leaf].name} {state[error.leaf]} {error.why}"
    except struct.error as error:
        why = str(error)
    else:
        return record, sndq, rcvq
    mover.give_up(flow, why)
    return why


def _save_socket(mover: FlowMover, flow: int, writer: Writer) -> None:
    found = sound_socket(mover, flow)
    if isinstance(found, str):
        writer.push_bytes(LOST)
        return
    for part in found:
        if part:
            writer.push_bytes(part)


def _load_flows(mover: FlowMover, reader: Reader) -> None:
    """Read what ``_save_flows`` writes; one batch of flows, then one socket, in memory at a time."""
    count = reader.pull_u32()
    if count > MAX_FLOWS:
        raise reader.bad("flows", "count", count, f"must be at most {MAX_FLOWS}", 4)
    ids: list[int] = []
    while len(ids) < count:
        ids += _load_batch(mover, reader, len(ids), min(BATCH, count - len(ids)))
    for number, flow in enumerate(ids):
        reader.check_cancelled()
        _load_socket(mover, reader, number, flow)


def _load_batch(mover: FlowMover, reader: Reader, first: int, count: int) -> Sequence[int]:
    flows: list[FlowState] = []
    check = FLOW.check
    for number, flat in enumerate(FLOW.unpack_many(reader.pull_bytes(count * FLOW.size))):
        try:
            check(flat)
        except UnsoundError as error:
            pulled = (count - number) * FLOW.size
            raise FLOW.bad(error, flat, reader, pulled, f"flow {first + number}") from None
        flows.append(flow_of(flat))
    ids = mover.prepare(flows)
    if len(ids) != count:
        raise RuntimeError(f"{count} flows prepared, {len(ids)} ids returned")
    return ids


def _load_socket(mover: FlowMover, reader: Reader, number: int, flow: int) -> None:
    state = SocketState._make(SOCKET.unpack(reader.pull_bytes(SOCKET.size)))
    if state.tcpi_state == STATE_LOST:
        mover.mark_lost(flow)
        return
    try:
        SOCKET.check(state)
    except UnsoundError as error:
        raise SOCKET.bad(error, state, reader, SOCKET.size, f"socket of flow {number}") from None
    sndq = reader.pull_bytes(state.sndq, MAX_QUEUE, "sndq")
    rcvq = reader.pull_bytes(state.rcvq, MAX_QUEUE, "rcvq")
    if state.tcpi_state in STATES_ENDED:
        mover.mark_lost(flow)
    else:
        mover.restore(flow, state, sndq, rcvq)


def _inspect_flows(reader: Reader) -> Iterator[Item]:
    """What ``_load_flows`` reads; no queue is ever in memory as a whole."""
    offset = reader.offset
    count = reader.pull_u32()
    if count > MAX_FLOWS:
        raise reader.bad("flows", "count", count, f"must be at most {MAX_FLOWS}", 4)
    yield Item(offset, 4, "flows", {"count": count})
    for number in range(count):
        offset = reader.offset
        flow = FLOW.pull(reader, f"flow {number}")
        yield Item(offset, FLOW.size, "flow", {"number": number, **shown(FLOW, flat_of(flow))})
    for number in range(count):
        offset = reader.offset
        state = SocketState._make(SOCKET.unpack(reader.pull_bytes(SOCKET.size)))
        values: Shown = {"flow": number}
        if state.tcpi_state == STATE_LOST:
            yield Item(offset, SOCKET.size, "socket", {**values, "lost": "yes"})
            continue
        SOCKET.check_pulled(state, reader, SOCKET.size, f"socket of flow {number}")
        values |= shown(SOCKET, state)
        part = Part(reader, f"queues of flow {number}", state.sndq + state.rcvq)
        for values_of_queue in show_all(queues_behind(0), part, [state]):
            values |= values_of_queue
        yield Item(offset, reader.offset - offset, "socket", values)


OBSERVED_STAGE: Final[Section[FlowMover, Observed]] = Section(
    "observed addresses",
    OBSERVED,
    lambda mover: mover.observed(),
    _take_observed,
    discard=lambda mover: mover.set_observed(NEVER_SEEN),
)

PREPARE_STAGE: Final[Stage[FlowMover]] = Stage(
    "prepare flows",
    source=lambda mover, _writer: mover.freeze(),
    rollback=lambda mover: mover.thaw(),
    linger=lambda mover: mover.linger(),
    doc="No bytes. The source freezes every flow and has its sockets put into repair mode.",
)

TRANSFER_STAGE: Final[Stage[FlowMover]] = Stage(
    "transfer flows",
    source=_save_flows,
    target=_load_flows,
    discard=lambda mover: mover.discard(),
    commit=lambda mover: mover.commit(),
    inspect=_inspect_flows,
    doc="A count (u32, big-endian); that many flow records; then, in the same order, that many socket records, "
    "each with its queues behind it. A source with no repair helper writes sockets that are lost, so that the target "
    "resets the guest's side; passt writes a count of 0.",
)

VERSION_1: Final[Version[FlowMover]] = Version(
    1,
    withdrawn="it has the MSS in the wrong byte order and no TCP timestamps",
    doc="An early version of passt's.",
)

VERSION_2: Final[Version[FlowMover]] = Version(
    2,
    (OBSERVED_STAGE, PREPARE_STAGE, TRANSFER_STAGE),
    doc="The common one: every released passt that moves flows writes and reads it.",
)
