# SPDX-License-Identifier: GPL-2.0-or-later
"""What is fuzzed, and what holds whatever the bytes are. Each target raises when it does not."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from ipaddress import IPv6Address
from typing import Any, Final, cast

from godwit.cli.inspect import main as show
from godwit.dataplane.state import Datagram, FlowState, Observed, Ping, SocketState, UdpPeer, UdpPort
from godwit.migration import (
    Direction,
    Migration,
    MigrationError,
    StageError,
    State,
    UnknownEntryError,
)
from godwit.migration.inspect import inspect
from godwit.net.config import Withdrawn
from godwit.net.native import FLOW as NATIVE_FLOW
from godwit.net.native import NATIVE
from godwit.net.records import FLOW, SOCKET
from godwit.net.state import NEVER_SEEN, FlowMover
from godwit.net.versions import versions

from .devices import BrokenError, Device, require

# What a reader may take: a sum for every input, and more for each of its bytes. Measured with many small entries of
# each kind: up to 2.5 us a byte, 16 us while memory is measured, and 29 bytes of memory.
SECONDS: Final = 1.0
SECONDS_PER_BYTE: Final = 100e-6
MEMORY: Final = 2 << 20
MEMORY_PER_BYTE: Final = 64

FLOWS: Final = 131072  # in one stream
BATCH: Final = 1012  # prepared at once
QUEUE: Final = 64 << 20  # bytes
TEXT: Final = 65536  # bytes of the configuration
REASON: Final = 130  # characters of a reason that is kept
UDP_KINDS: Final = (0, 2, 3)
TCP_STATES: Final = (1, 4, 5, 8, 9, 11)  # that can be restored
TCP_NONE: Final = (0, 6, 7)  # lost, or ended
ACCEPTED: Final = 0x01  # of a flow's events
SYN_FROM_GUEST: Final = 0x02
ESTABLISHED: Final = 0x04

log = logging.getLogger()


# ---- limits, said once more, for the reader's checks are what is in question


def host(address: bytes) -> int:
    """4 or 6, for an address that a host can have."""
    found = IPv6Address(address)
    four = found.ipv4_mapped
    require(not (four or found).is_unspecified and not (four or found).is_multicast, f"{found} is no host's")
    require(four is None or int(four) < 0xE0000000, f"{found} is no host's")
    return 6 if four is None else 4


def within(value: int, first: int, last: int) -> None:
    """A number."""
    require(first <= value <= last, f"{value} is not from {first} to {last}")


def check_flow(flow: FlowState) -> None:
    """A flow as the data plane may get it."""
    require(sorted(flow.pif) == [1, 2], f"interfaces {flow.pif}")
    for side in flow.sides:
        require(host(side.our_addr) == host(side.end_addr), "two families on one side")
        within(side.our_port, 1, 65535)
        within(side.end_port, 1, 65535)
    within(flow.ws_from_tap, 0, 14)
    within(flow.ws_to_tap, 0, 14)
    within(flow.tap_mss, 4, 65535)
    within(flow.sndbuf, 0, 0xFFFFFFFF)
    for byte in (flow.retries, flow.events, flow.flags, flow.seq_dup_ack_approx):
        within(byte, 0, 255)
    for word in (flow.wnd_from_tap, flow.wnd_to_tap):
        within(word, 0, 65535)
    for number in (*flow[12:17], flow.idle):
        within(number, 0, 0xFFFFFFFF)
    for number in (flow.bytes_from_guest, flow.bytes_to_guest):
        within(number, 0, 0xFFFFFFFFFFFFFFFF)
    begun = SYN_FROM_GUEST if flow.pif[0] == 2 else ACCEPTED
    require(bool(flow.events & ESTABLISHED) or flow.events == begun, f"a flow with events {flow.events}")


def check_socket(socket: SocketState, sndq: bytes, rcvq: bytes) -> None:
    """A socket as the kernel may get it."""
    require((socket.sndq, socket.rcvq) == (len(sndq), len(rcvq)), "queues of another length")
    require(max(len(sndq), len(rcvq)) <= QUEUE, "a queue that is too long")
    within(socket.notsent, 0, socket.sndq)
    within(socket.mss, 1, 65535)
    within(socket.snd_ws, 0, 14)
    within(socket.rcv_ws, 0, 14)
    require(socket.tcpi_state in TCP_STATES, f"a socket in state {socket.tcpi_state}")


def check_addresses(*addresses: bytes) -> None:
    """Each of the length that the data plane has."""
    require(all(len(address) == 16 for address in addresses), "an address of another length")


def check_observed(observed: Observed) -> None:
    """What a guest can have used, or nothing."""
    require([len(address) for address in observed] == [16, 16, 4, 6], "an address of another length")
    require(observed.addr6[0] != 0xFF and observed.addr4[0] < 224 and not observed.mac[0] & 1, "a group's address")
    link_local = IPv6Address(observed.addr6_ll)
    require(link_local.is_link_local or link_local.is_unspecified, f"{link_local} is not link-local")


class Recorder:
    """A device with an eye on every call of its reader's, those included that are not known here.

    Before a discard anything may come in, within limits; after it nothing.
    """

    def __init__(self) -> None:
        self.device = Device()
        self.calls: Counter[str] = Counter()
        self.waiting = 0
        self.over = False

    @property
    def mover(self) -> FlowMover:
        """As a transfer takes it."""
        return cast(FlowMover, self)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.device, name)
        watch = getattr(type(self), f"_{name}", None)

        def call(*arguments: Any, **options: Any) -> Any:
            self.calls[name] += 1
            require(not self.over or (name, arguments) == ("set_observed", (NEVER_SEEN,)), f"{name} after the end")
            if watch is not None:
                watch(self, *arguments, **options)
            return method(*arguments, **options)

        return call

    def _prepare(self, records: bytes, *, native: bool) -> None:
        record = NATIVE_FLOW if native else FLOW
        require(len(records) % record.size == 0, "no whole records")
        flows = [record.build(flat) for flat in record.unpack_many(records)]
        within(len(flows), 1, BATCH)
        within(len(flows) + len(self.device.states), 1, FLOWS)
        for flow in flows:
            check_flow(flow)

    def _restore(self, first: int, sockets: bytes) -> None:
        """Whatever is in there is looked at by itself, before the device has any of it."""
        at = 0
        while at < len(sockets):
            socket = SocketState._make(SOCKET.unpack(sockets[at : at + SOCKET.size]))
            at += SOCKET.size
            self._once(first)
            if socket.tcpi_state not in TCP_NONE:
                check_socket(socket, sockets[at:][: socket.sndq], sockets[at + socket.sndq :][: socket.rcvq])
            if socket.tcpi_state:
                at += socket.sndq + socket.rcvq
            first += 1
        require(at == len(sockets), "queues that are cut off")

    def _mark_lost(self, number: int, why: str = "") -> None:
        self._once(number)
        require(len(why) <= REASON and (not why or why.isprintable()), f"a reason that no log can have: {why!r}")

    def _open_anew(self, number: int) -> None:
        self._once(number)
        state = self.device.states[number]
        require(state.pif[0] == 2 and state.events == SYN_FROM_GUEST, "a call that is not the guest's")

    def _once(self, number: int) -> None:
        require(0 <= number < len(self.device.states), f"there is no flow {number}")
        require(not (number in self.device.sockets or number in self.device.unanswered), f"flow {number} comes twice")

    def _add_ping(self, ping: Ping) -> None:
        within(len(self.device.echoes) + 1, 1, FLOWS)
        require(host(ping.guest_addr) == host(ping.our_addr), "two families")

    def _set_told(self, told: Withdrawn) -> None:
        within(self.calls["set_told"], 1, 1)
        within(sum(map(len, told)), 0, TEXT)

    def _compare(self, told: Mapping[str, str]) -> None:
        within(self.calls["compare"], 1, 1)
        within(sum(len(name) + len(value) for name, value in told.items()), 0, TEXT)

    def _set_observed(self, observed: Observed) -> None:
        check_observed(observed)

    def _add_udp_port(self, port: UdpPort) -> None:
        within(len(self.device.ports) + 1, 1, FLOWS)
        require(port.kind in UDP_KINDS and port.any_peer in (0, 1), "a port of no kind")
        check_addresses(port.guest_addr, port.local_addr)
        within(port.guest_port, 1, 65535)
        within(port.local_port, 1, 65535)

    def _add_udp_peers(self, number: int, peers: Sequence[UdpPeer]) -> None:
        within(number, 0, len(self.device.ports) - 1)
        for peer in peers:
            require(host(peer.guest_addr) == (4 if IPv6Address(peer.our_addr).ipv4_mapped else 6), "two families")
            check_addresses(peer.remote_addr, peer.local_addr)
            within(peer.remote_port, 1, 65535)
            require(peer.from_guest in (0, 1) and peer.answered in (0, 1), "neither yes nor no")

    def _add_datagrams(self, number: int, datagrams: Sequence[Datagram]) -> None:
        within(number, 0, len(self.device.ports) - 1)
        self.waiting += sum(len(one.data) for one in datagrams)
        within(self.waiting, 0, QUEUE)
        for one in datagrams:
            check_addresses(one.remote_addr, one.local_addr)
            within(one.remote_port, 1, 65535)
            within(len(one.data), 0, 65535)

    def _give_up(self, flow: int, why: str) -> None:
        raise BrokenError(f"what was loaded cannot be saved: flow {flow}: {why}")

    def _discard(self) -> None:
        self.over = True

    def _commit(self) -> None:
        self.over = True


# ---- what is measured


class _Formatting(logging.Handler):
    """Whatever is logged can be made into text, and is one line."""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        require(text.isprintable(), f"a line of the log that a terminal obeys: {text!r}")


@contextlib.contextmanager
def measured(size: int, memory: bool) -> Iterator[None]:
    """Time, and if asked for memory, in proportion to what there is to read; and all that is logged."""
    handler, level = _Formatting(), log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    if memory:
        tracemalloc.start()
    started = time.thread_time()
    try:
        yield
        took = time.thread_time() - started
        peak = tracemalloc.get_traced_memory()[1] if memory else 0
    finally:
        if memory:
            tracemalloc.stop()
        log.removeHandler(handler)
        log.setLevel(level)
    require(took <= SECONDS + SECONDS_PER_BYTE * size, f"{took:.2f} s for {size} bytes")
    require(peak <= MEMORY + MEMORY_PER_BYTE * size, f"{peak} bytes of memory for {size} bytes")


# ---- the targets


def load(data: bytes) -> tuple[Recorder, MigrationError | None, Migration[FlowMover]]:
    """A load, with all that holds when it is over."""
    recorder = Recorder()
    transfer: Migration[FlowMover] = Migration(versions(), recorder.mover)
    transfer.request(io.BytesIO(data), Direction.TARGET)
    outcome = transfer.run()
    if isinstance(outcome.error, StageError):
        raise outcome.error
    require(outcome.undo_errors == [], f"{outcome.undo_errors}")
    if outcome.error is None:
        require(transfer.state is State.LOADED and not recorder.over, f"loaded, and {transfer.state}")
        require(outcome.size == len(data), "something was left unread")
    else:
        require_empty(recorder, transfer)
    return recorder, outcome.error, transfer


def require_empty(recorder: Recorder, transfer: Migration[FlowMover]) -> None:
    """Refused or dropped: nothing is left, and if something was begun the device was told so once."""
    require(transfer.state is State.DISCARDED, f"refused, and {transfer.state}")
    begun = recorder.calls.keys() - {"set_observed"}
    require(recorder.calls["discard"] == 1 or not begun, f"{dict(recorder.calls)}")
    require(not recorder.calls["commit"], "committed")
    device = recorder.device
    require(not (device.states or device.sockets or device.ports), "something is left")
    require(device.seen == NEVER_SEEN, "the guest's addresses are left")


def save(device: Device, number: int) -> bytes:
    """What was loaded is sound: it can be saved whole."""
    source = Recorder()
    source.device = device
    transfer: Migration[FlowMover] = Migration(versions(), source.mover)
    file = io.BytesIO()
    transfer.request(file, Direction.SOURCE, number)
    outcome = transfer.run()
    if outcome.error is not None:
        raise outcome.error
    transfer.close()
    return file.getvalue()


def content(device: Device) -> dict[str, object]:
    """For comparing: a reason is the reader's own, and no socket is a socket that is lost."""
    found = device.content()
    sockets = {number: device.sockets.get(number) for number in range(len(device.states))}
    return {**found, "sockets": sockets, "lost": None, "compared": None}


def again(device: Device, number: int) -> None:
    """Saved and loaded it is the same, and saved again it is the same bytes."""
    device.told = device.compared or {}
    first = save(device, number)
    other, error, transfer = load(first)
    if error is not None:
        raise error
    other.device.told = device.told
    require(content(other.device) == content(device), "it does not come through")
    require(save(other.device, number) == first, "it is written in another way the second time")
    require(transfer.discard() == [], "the discard failed")
    require_empty(other, transfer)


def inspected(data: bytes) -> str:
    """What the inspector ends with; its items come in order and name every byte."""
    begin = end = 0
    try:
        for item in inspect(io.BytesIO(data), versions()):
            require(item.offset in (begin, end), f"{item} after {end}")  # an entry may have several
            begin, end = item.offset, item.offset + item.size
    except MigrationError as error:
        return str(error)
    require(end == len(data), f"{len(data) - end} bytes are shown nowhere")
    return ""


def read(data: bytes) -> bool:
    """A stream loads whole or leaves nothing; what was loaded is within limits. The inspector agrees."""
    recorder, error, transfer = load(data)
    said = inspected(data)
    version = transfer.outcome.version if transfer.outcome is not None else 0
    if error is None:
        require(not said, f"loaded, and the inspector says: {said}")
        again(recorder.device, version)
        if zlib.crc32(data) & 1:
            require(transfer.commit() == [], "the commit failed")
            require(recorder.calls["commit"] == 1 and not recorder.calls["discard"], f"{dict(recorder.calls)}")
        else:
            require(transfer.discard() == [], "the discard failed")
            require_empty(recorder, transfer)
    elif not isinstance(error, UnknownEntryError):  # the inspector shows those
        # Of version 2 a target reads a batch where the inspector reads a flow: it may be another place.
        same = bool(said) if version == 2 else said == str(error)
        require(same, f"a target says {error}, the inspector {said or 'nothing'}")
    transfer.close()
    return error is None


def read_version2(data: bytes) -> bool:
    """``read``, whatever version the header says, as version 2."""
    return read(data[:8] + (2).to_bytes(4, "big") * 2 + data[16:])


def read_native(data: bytes) -> bool:
    """``read``, as our version."""
    return read(data[:8] + NATIVE.to_bytes(4, "big") * 2 + data[16:])


def inspect_file(data: bytes) -> bool:
    """``godwit inspect`` shows lines that no terminal obeys, and ends with 0, or with 2 and a reason."""
    fd = os.memfd_create("stream")
    out, errors = io.StringIO(), io.StringIO()
    try:
        os.write(fd, data)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            status = show([f"/proc/self/fd/{fd}", *(["--json"] if len(data) & 1 else [])])
    finally:
        os.close(fd)
    said = [line for line in errors.getvalue().splitlines() if not line.endswith("passed over; --all shows them")]
    require(status in (0, 2) and (status == 2) == bool(said), f"status {status}: {errors.getvalue()}")
    for line in (out.getvalue() + errors.getvalue()).split("\n"):
        require(line.isprintable(), f"a line that a terminal obeys: {line!r}")
    return status == 0


TARGETS: Final[dict[str, Callable[[bytes], bool]]] = {
    "version2": read_version2,
    "native": read_native,
    "inspect": inspect_file,
}


def run(target: str, data: bytes, *, memory: bool = True) -> bool:
    """One input, within time and memory. Whether it is a sound one."""
    with measured(len(data), memory):
        return TARGETS[target](data)
