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
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

from godwit.dataplane import layouts
from godwit.dataplane.state import Datagram, FlowState, Observed, Ping, SocketState, UdpPeer, UdpPort
from godwit.migration import Item, Part, Reader, Record, Section, Stage, UnsoundError, Version, Writer
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
)

log = logging.getLogger(__name__)

_EVENTS: Final = FLOW.index("events")

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

    def flows(self) -> Sequence[int]:
        """Source, frozen: all TCP flows, also those that cannot be dumped, and those that are in their handshake."""

    def is_connecting(self, flow: int) -> bool:
        """Source, frozen: the guest has opened it and its peer has not answered; there is nothing to dump."""

    def flow_records(self, flows: Sequence[int], *, native: bool) -> bytes:
        """Source, frozen: their records, one after another, for this stream or for ``native``; not checked."""

    def dump(self, flows: Sequence[int]) -> Iterator[bytes | str]:
        """Source, frozen: their sockets, in their order.

        Bytes are the socket records of some, each with its send queue and its receive queue behind it; a text says why
        one cannot move.
        """

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

    def prepare(self, records: bytes, *, native: bool) -> None:
        """Target: make flows and frozen sockets in repair mode, silently, for sound records of up to ``BATCH`` flows.

        Flows are numbered from 0 on, in the order in which they come. One whose
        socket cannot be made is reset at the commit.
        """

    def restore(self, first: int, sockets: bytes) -> None:
        """Target: fill the sockets of the flows from number ``first`` on, silently; what fails is reset at the commit.

        ``sockets`` are sound records with their queues, as ``dump`` gives them; among them may be lost and ended ones.
        """

    def open_anew(self, number: int) -> None:
        """Target: the guest has opened it, and its peer has not answered: ask it again at the commit."""

    def pings(self) -> Sequence[Ping]:
        """Source, frozen: the guest's echoes."""

    def add_ping(self, ping: Ping) -> None:
        """Target: one of them; it may be that there is no place for it."""

    def mark_lost(self, number: int, why: str = "") -> None:
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


class Begun(NamedTuple):
    """Flows to be written, their records, and which of them, by their place, are not established."""

    flows: Sequence[int]
    records: bytes
    begun: Sequence[int]


def _established(flat: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """A flow as version 2 has it; None for one that it has no place for."""
    if flat[_EVENTS] & EVENT_ESTABLISHED:
        return flat
    return (*flat[:_EVENTS], EVENT_ESTABLISHED, *flat[_EVENTS + 1 :]) if flat[_EVENTS] == EVENT_ACCEPTED else None


def sound_flows(
    mover: FlowMover,
    record: Record[FlowState],
    *,
    native: bool,
    as_written: Callable[[tuple[Any, ...]], tuple[Any, ...] | None] = lambda flat: flat,
) -> Begun:
    """All flows that can be in a stream; what is wrong with another one is said, and it is given up."""
    flows = mover.flows()
    records = mover.flow_records(flows, native=native)
    size, events = record.size, record.leaves[record.index("events")].offset
    begun = [place for place, value in enumerate(records[events::size]) if not value & EVENT_ESTABLISHED]
    odd = layouts.odd_flows(records, native)
    if not odd:
        return Begun(flows, records, begun)
    kept: list[int] = []
    parts: list[bytes] = []
    left_out: list[int] = []
    at = 0
    for place in (*odd, len(flows)):
        kept += flows[at:place]
        parts.append(records[at * size : place * size])
        at = place + 1
        if place == len(flows):
            break
        flat = as_written(record.unpack(records[place * size : at * size]))
        try:
            if flat is not None:
                record.check(flat)
        except UnsoundError as error:
            mover.give_up(flows[place], f"{record.leaves[error.leaf].name} {error.why}")
            flat = None
        if flat is None:
            left_out.append(place)
        else:
            kept.append(flows[place])
            parts.append(record.pack(flat))
    gone = set(left_out)
    return Begun(kept, b"".join(parts), [place - bisect(left_out, place) for place in begun if place not in gone])


def sound_sockets(mover: FlowMover, flows: Sequence[int]) -> Iterator[tuple[int, bytes | str]]:
    """How many flows, in their order, and their sockets with the queues, to be written; or of one why there is none."""
    done = 0
    for found in mover.dump(flows):
        if isinstance(found, str):
            yield 1, found
            done += 1
            continue
        at = 0
        while at < len(found):
            count, end = layouts.sound_sockets(found, at, len(flows) - done)
            if count:
                yield count, found[at:end]
                done, at = done + count, end
                continue
            flat = SOCKET.unpack(found[at : at + SOCKET.size])
            try:
                SOCKET.check(flat)
            except UnsoundError as error:
                why = f"{SOCKET.leaves[error.leaf].name} {flat[error.leaf]} {error.why}"
            else:
                raise RuntimeError("sockets that end before their queues do")
            mover.give_up(flows[done], why)
            yield 1, why
            done, at = done + 1, at + SOCKET.size + flat[2] + flat[4]


def _save_flows(mover: FlowMover, writer: Writer) -> None:
    """Write the count, the flows, and in the same order each socket with its queues.

    There is no place for a connection that has only begun. When the guest has
    called, it calls again, and the target opens another. One from outside is
    written as if it had been established, and lost: so the target tells the
    caller, to whom the source's kernel has answered.
    """
    flows, records, begun = sound_flows(mover, FLOW, native=False, as_written=_established)
    writer.push_u32(len(flows))
    writer.push_bytes(records)
    first = 0
    for place in (*begun, len(flows)):
        for _count, sockets in sound_sockets(mover, flows[first:place]):
            writer.check_cancelled()
            if isinstance(sockets, str):
                writer.push_bytes(LOST)
                continue
            writer.push_bytes(sockets)
            writer.flush()  # the target restores these while the next ones are dumped
        if place < len(flows):
            writer.push_bytes(LOST)
        first = place + 1


def _load_flows(mover: FlowMover, reader: Reader) -> None:
    """Read what ``_save_flows`` writes: flows in batches, then as many sockets at once as have been read ahead."""
    count = reader.pull_u32()
    if count > MAX_FLOWS:
        raise reader.bad("flows", "count", count, f"must be at most {MAX_FLOWS}", 4)
    for first in range(0, count, BATCH):
        _load_batch(mover, reader, first, min(BATCH, count - first))
    number = 0
    while number < count:
        reader.check_cancelled()
        data, at = reader.ahead()
        found, end = layouts.sound_sockets(data, at, min(BATCH, count - number))
        mover.restore(number, reader.pull_bytes(end - at) if found else _pull_socket(reader, number))
        number += found or 1


def _load_batch(mover: FlowMover, reader: Reader, first: int, count: int) -> None:
    records = reader.pull_bytes(count * FLOW.size)
    for number in layouts.odd_flows(records, native=False):
        flat = FLOW.unpack(records[number * FLOW.size : (number + 1) * FLOW.size])
        FLOW.check_pulled(flat, reader, (count - number) * FLOW.size, f"flow {first + number}")
    mover.prepare(records, native=False)


def _pull_socket(reader: Reader, number: int) -> bytes:
    """One socket and its queues, of which not all has been read ahead; or in which something is wrong."""
    record = reader.pull_bytes(SOCKET.size)
    state = SocketState._make(SOCKET.unpack(record))
    if state.tcpi_state == STATE_LOST:
        return record
    SOCKET.check_pulled(state, reader, SOCKET.size, f"socket of flow {number}")
    return b"".join(
        (
            record,
            reader.pull_bytes(state.sndq, MAX_QUEUE, "sndq"),
            reader.pull_bytes(state.rcvq, MAX_QUEUE, "rcvq"),
        )
    )


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
        yield Item(offset, FLOW.size, "flow", {"number": number, **shown(FLOW, FLOW.flatten(flow))})
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
