# SPDX-License-Identifier: GPL-2.0-or-later
"""What the control socket tells: how things stand, the flows, the metrics. ``docs/control.md`` has what it means.

Nothing here changes anything. The data plane's counters are read as they are, while it runs; the flows its own thread
copies, some at a time (`godwit.dataplane.listing`).
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from godwit import __version__
from godwit.daemon.control import RequestError
from godwit.daemon.device import NetDevice
from godwit.daemon.moves import RESULTS
from godwit.daemon.options import Options
from godwit.daemon.texts import Family, exposition, to_json
from godwit.dataplane import listing
from godwit.dataplane.state import Listed
from godwit.migration import State
from godwit.net.change import facts
from godwit.vhost_user import Feature

if TYPE_CHECKING:
    from godwit.daemon.house import House

#: Of the answer to ``status`` and ``flows``, and of what ``metrics json`` says. It grows by more members alone.
FORMAT: Final = 1
#: Descriptors: with fewer left the daemon says that it runs out of them.
FEW_DESCRIPTORS: Final = 32
#: Seconds between two looks whether a transfer has ended, and for which a list of flows waits for that.
_LOOK_EVERY: Final = 0.02
_PATIENCE: Final = 5.0

_KINDS: Final = ("tcp", "udp", "ping")
_RINGS: Final = ("to_guest", "from_guest")
#: What a transfer is about, for people.
_STATES: Final = {
    State.NEW: "idle",
    State.REQUESTED: "saving or loading",
    State.SAVING: "saving",
    State.SAVED: "saved",
    State.LINGERING: "saved",
    State.ROLLING_BACK: "going on",
    State.ROLLED_BACK: "going on",
    State.LOADING: "loading",
    State.LOADED: "loaded",
    State.COMMITTING: "letting go",
    State.COMMITTED: "letting go",
    State.DISCARDING: "discarding",
    State.DISCARDED: "discarding",
    State.CLOSED: "idle",
}
_V4: Final = bytes(10) + b"\xff\xff"


class Report:
    """Answers the requests of the control socket."""

    def __init__(self, house: House, device: NetDevice, options: Options) -> None:
        self._house = house
        self._device = device
        self._options = options
        self._turn = asyncio.Lock()  # one list of flows is gone on with at a time, however many are asked for
        #: Seconds that the data plane took for a part of a list of flows: the longest.
        self.longest_pause = 0.0

    async def answer(self, words: Sequence[str]) -> AsyncGenerator[str, None]:
        """The pieces of the answer to a request. Raises `RequestError` before the first if it is none."""
        match list(words):
            case ["status"]:
                yield to_json(self.status()) + "\n"
            case ["flows", *rest]:
                async for piece in self._flows(*_filters(rest)):
                    yield piece
            case ["metrics"]:
                for piece in exposition(self.families()):
                    yield piece
            case ["metrics", "json"]:
                yield to_json({"format": FORMAT, "metrics": [one.shown() for one in self.families()]}) + "\n"
            case _:
                raise RequestError("a request is one of: status, flows [tcp|udp|ping ...] [ADDRESS], metrics [json]")

    # ---- status

    def status(self) -> dict[str, object]:
        """How things stand."""
        house, device = self._house, self._device
        process = house.process
        engine = device.engine
        seen = engine.observed()
        bits, gauges = listing.features(engine), listing.gauges(engine)
        rings = zip(_RINGS, listing.rings(engine), strict=True)
        reasons = [{"reason": name, "text": text} for name, text in self._reasons()]
        return {
            "format": FORMAT,
            "version": __version__,
            "pid": os.getpid(),
            "uptime_seconds": round(process.uptime, 3),
            "command": self._options.dialect.value,
            "mode": "stream" if self._options.stream else "vhost-user",
            "health": {"state": "degraded" if reasons else "ok", "reasons": reasons},
            "sockets": {
                "front_end": house.path if house.listener is not None else None,
                "repair": house.repair.path if house.repair is not None else None,
                "takeover": house.takeover_path,
                "control": house.control.path if house.control is not None else None,
            },
            "front_end": {
                "connected": house.sessions.open,
                "features": [str(one.name) for one in Feature if bits & one],
                "rings": {
                    name: {"entries": num, "started": started, "enabled": enabled, "broken": broken}
                    for name, (num, started, enabled, broken) in rings
                },
            },
            "guest": {
                "told": facts(device.config),
                "seen": {
                    "mac": seen.mac.hex(":") if any(seen.mac) else None,
                    "ipv4": str(ipaddress.IPv4Address(seen.addr4)) if any(seen.addr4) else None,
                    "ipv6": _seen6(seen.addr6),
                    "ipv6_link_local": _seen6(seen.addr6_ll),
                },
            },
            "flows": {kind: gauges[f"flows_{kind}"] for kind in _KINDS},
            "migration": self._migration(),
            "repair_helper": {
                "connected": house.repair is not None and house.repair.connected(),
                "ever_connected": house.repair is not None and house.repair.ever_connected,
                "refused": house.repair is not None and bool(house.repair.refused),
            },
            "sandbox": [
                {"layer": layer.name, "in_force": layer.holds, "what" if layer.holds else "reason": layer.what}
                for layer in house.sandbox
            ],
        }

    def _migration(self) -> dict[str, object]:
        device = self._device
        last = device.moves.last
        return {
            "state": self._state(),
            "lingering_seconds": round(device.lingering, 3),
            "last": None if last is None else last.shown(),
            "counts": {way: {name: device.moves.numbers[f"{way}.{name}"] for name in RESULTS[way]} for way in RESULTS},
        }

    def _state(self) -> str:
        device, last = self._device, self._device.moves.last
        if device.transfer_state is not None:
            return _STATES[device.transfer_state]
        if device.lingering:
            return "lingering"
        left = last is not None and (last.way, last.result) == ("out", "moved")
        return "moved away" if left and not self._house.sessions.open else "idle"

    def _reasons(self) -> Iterator[tuple[str, str]]:
        """What is not as it should be, by name and for people."""
        house, device = self._house, self._device
        engine = device.engine
        if not listing.runs(engine):
            yield "data_plane", "the data plane has stopped: the guest has no network"
        for name, (_, started, _, broken) in zip(_RINGS, listing.rings(engine), strict=True):
            if started and broken:
                yield "ring_broken", f"the ring {name} is broken, and not served any more: the log says why"
        # Where none has ever come, there is perhaps to be none.
        if house.repair is not None and not house.repair.connected() and house.repair.ever_connected:
            what = house.repair.refused or f"the repair helper at {house.repair.path} has gone"
            yield "repair_helper", f"{what}: connections cannot move"
        if device.held:
            yield "connections_held", "connections stand still: they wait for a repair helper, or for their address"
        numbers = listing.gauges(engine)
        if numbers["flow_sockets"] >= numbers["flow_sockets_limit"]:
            yield "flows", f"all {numbers['flow_sockets_limit']} places for flows are taken: new ones are refused"
        used, most = house.process.descriptors(), house.process.most_descriptors()
        if used is not None and most is not None and most - used < FEW_DESCRIPTORS:
            yield "descriptors", f"{used} of {most} descriptors are in use: new connections are refused (ulimit -Hn)"
        if house.no_ping:
            yield "ping", "the kernel does not let this process send pings (net.ipv4.ping_group_range)"
        if device.capture_ended:
            yield "capture", "the capture (--pcap) has ended: its file could not be written"

    # ---- flows

    async def _flows(self, kinds: Sequence[str], about: bytes | None) -> AsyncGenerator[str, None]:
        wanted = {kind: kind in kinds for kind in _KINDS}
        yield f'{{"format": {FORMAT}, "flows": ['
        count = 0
        pause = 0.0
        place: int | None = 0
        until = asyncio.get_running_loop().time() + _PATIENCE
        while place is not None:
            async with self._turn:
                await self._until_at_rest(until)
                await asyncio.sleep(0)
                rows, place, seconds = listing.part(self._device.engine, place, **wanted)
                pause = max(pause, seconds)
                lines = [_line(row) for row in rows if about is None or _is_about(row, about)]
            if lines:
                yield (",\n" if count else "\n") + ",\n".join(lines)
                count += len(lines)
        self.longest_pause = max(self.longest_pause, pause)
        yield f'\n], "count": {count}, "longest_pause_seconds": {pause!r}}}\n'

    async def _until_at_rest(self, until: float) -> None:
        """While a guest's connections are written or read nothing else takes time of this process's, for a moment."""
        while self._device.is_moving and asyncio.get_running_loop().time() < until:  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_EVERY)  # who moves them need not know of us

    # ---- metrics

    def families(self) -> Iterator[Family]:
        """All metrics."""
        yield Family("godwit_build_info", "gauge", "The version that runs.", [({"version": __version__}, 1)])
        yield from self._health()
        yield from self._data_plane()
        yield from self._control()
        yield from self._migrations()
        yield from self._process()

    def _health(self) -> Iterator[Family]:
        reasons = {name for name, _ in self._reasons()}
        yield _gauge("godwit_healthy", "1 if nothing is amiss.", int(not reasons))
        yield Family(
            "godwit_degraded",
            "gauge",
            "What is amiss, each by its reason.",
            [({"reason": name}, 1) for name in sorted(reasons)],
        )

    def _data_plane(self) -> Iterator[Family]:
        engine = self._device.engine
        c, g = engine.counters(), listing.gauges(engine)
        yield Family(
            "godwit_frames_total",
            "counter",
            "Ethernet frames, by direction; one may have many segments in it.",
            _both_ways(c["frames_from_guest"], c["frames_to_guest"]),
        )
        yield Family(
            "godwit_payload_bytes_total",
            "counter",
            "Payload that the host's sockets took and the guest was sent, by protocol and direction.",
            [
                *_both_ways(c["bytes_from_guest"], c["bytes_to_guest"], protocol="tcp"),
                *_both_ways(c["udp_bytes_from_guest"], c["udp_bytes_to_guest"], protocol="udp"),
                *_both_ways(c["ping_bytes_from_guest"], c["ping_bytes_to_guest"], protocol="ping"),
            ],
        )
        yield Family(
            "godwit_datagrams_total",
            "counter",
            "Datagrams of UDP, echo requests and replies, by direction.",
            [
                *_both_ways(c["udp_from_guest"], c["udp_to_guest"], protocol="udp"),
                *_both_ways(c["ping_from_guest"], c["ping_to_guest"], protocol="ping"),
            ],
        )
        yield Family(
            "godwit_dropped_frames_total",
            "counter",
            "Frames and datagrams from either side that went nowhere, by reason.",
            [({"reason": name}, count) for name, count in c["drops"].items()],
        )
        yield _counter(
            "godwit_retransmissions_total",
            "Times that a connection's bytes were sent to the guest again, however many.",
            c["retransmits"],
        )
        yield Family(
            "godwit_flows",
            "gauge",
            "Flows that are open, by protocol.",
            [({"protocol": kind}, g[f"flows_{kind}"]) for kind in _KINDS],
        )
        yield Family(
            "godwit_flows_opened_total",
            "counter",
            "Flows that were opened, by protocol; those that came by migration count too.",
            [({"protocol": kind}, c[f"opened_{kind}"]) for kind in _KINDS],
        )
        yield _counter("godwit_flows_reset_total", "TCP connections that were reset.", c["flows_reset"])
        yield _gauge("godwit_flow_sockets", "Sockets that flows have.", g["flow_sockets"])
        yield _gauge("godwit_flow_sockets_limit", "And how many they may have.", g["flow_sockets_limit"])
        forwards = (({"protocol": "tcp"}, g["tcp_forwards"]), ({"protocol": "udp"}, g["udp_forwards"]))
        yield Family("godwit_forwarded_sockets", "gauge", "Sockets of forwarded ports, by protocol.", forwards)
        yield Family(
            "godwit_control_frames_total",
            "counter",
            "Frames that the control thread answers (ARP, DHCP, NDP), and its own, by direction.",
            _both_ways(*listing.rare_frames(engine)),
        )
        if self._options.pcap is not None:
            missed = engine.capture_missed()
            yield _counter("godwit_capture_missed_frames_total", "Frames that the capture lacks.", missed)

    def _control(self) -> Iterator[Family]:
        house = self._house
        numbers = house.sessions.numbers(house.server)
        yield _gauge("godwit_front_end_connected", "1 while a front-end is served.", int(house.sessions.open))
        yield _counter("godwit_front_end_sessions_total", "Sessions with front-ends.", numbers["sessions"])
        yield _counter("godwit_front_end_session_errors_total", "Those that an error ended.", numbers["errors"])
        yield _counter(
            "godwit_front_end_requests_total", "Requests of front-ends that the device was to do.", numbers["requests"]
        )
        yield Family(
            "godwit_front_end_request_errors_total",
            "counter",
            "Requests that were no good (refused), and those that could not be done (failed).",
            [({"kind": kind}, numbers[kind]) for kind in ("refused", "failed")],
        )
        rings = list(zip(_RINGS, listing.rings(self._device.engine), strict=True))
        for name, what, place in (
            ("godwit_ring_started", "1 while the front-end has the ring started, by direction.", 1),
            ("godwit_ring_broken", "1 if a rule was broken with it, and it is not served.", 3),
        ):
            yield Family(name, "gauge", what, [({"ring": ring}, int(state[place])) for ring, state in rings])
        repair = house.repair
        if repair is not None:
            yield _gauge("godwit_repair_helper_connected", "1 while a helper is there.", int(repair.connected()))
            yield _counter("godwit_repair_requests_total", "Times that a helper was asked.", repair.asked)
            yield _counter("godwit_repair_sockets_total", "Sockets that it was asked for.", repair.sockets)
            yield _counter("godwit_repair_request_errors_total", "Times that it has failed.", repair.failed)

    def _migrations(self) -> Iterator[Family]:
        moves = self._device.moves
        yield Family(
            "godwit_migrations_total",
            "counter",
            "Migrations that have ended, by direction and result.",
            [
                ({"direction": way, "result": name}, moves.numbers[f"{way}.{name}"])
                for way, names in RESULTS.items()
                for name in names
            ],
        )
        yield Family(
            "godwit_migrated_connections_total",
            "counter",
            "Connections of guests that have moved, by direction, and by whether they went along.",
            [
                ({"direction": way, "outcome": name}, moves.numbers[f"{way}.connections_{name}"])
                for way in RESULTS
                for name in ("moved", "lost")
            ],
        )
        for name, what, counts in (
            ("godwit_migration_seconds_total", "Time that the device's state took, by direction.", moves.durations),
            ("godwit_migration_standstill_seconds_total", "Time that guests stood still for it here.", moves.stills),
        ):
            yield Family(name, "counter", what, [({"direction": way}, counts[way] / 1e6) for way in RESULTS])
        yield _gauge(
            "godwit_migration_under_way", "1 from its request until it has ended.", int(moves.current is not None)
        )
        yield _gauge(
            "godwit_lingering_sockets",
            "Sockets of connections that have moved away, kept for a while.",
            self._device.lingering_sockets,
        )

    def _process(self) -> Iterator[Family]:
        process = self._house.process
        yield _counter("godwit_process_cpu_seconds_total", "Processor time used.", process.cpu_seconds())
        yield _gauge("godwit_process_start_time_seconds", "When it has started, since the epoch.", process.began_at)
        yield _gauge("godwit_process_uptime_seconds", "How long that is ago.", process.uptime)
        memory = process.memory()
        if memory is not None:
            yield _gauge("godwit_process_virtual_memory_bytes", "Memory mapped, the guest's included.", memory[0])
            yield _gauge(
                "godwit_process_resident_memory_bytes",
                "And resident, the guest's that was touched included.",
                memory[1],
            )
        used, most = process.descriptors(), process.most_descriptors()
        if used is not None:
            yield _gauge("godwit_process_open_fds", "Descriptors in use.", used)
        if most is not None:
            yield _gauge("godwit_process_max_fds", "And how many there may be.", most)
        yield _gauge(
            "godwit_flow_list_longest_pause_seconds",
            "The longest time that the data plane took for a part of a list of flows.",
            self.longest_pause,
        )


def _counter(name: str, what: str, value: float) -> Family:
    return Family(name, "counter", what, [({}, value)])


def _gauge(name: str, what: str, value: float) -> Family:
    return Family(name, "gauge", what, [({}, value)])


def _both_ways(from_guest: int, to_guest: int, **labels: str) -> list[tuple[Mapping[str, str], float]]:
    return [
        ({**labels, "direction": way}, count) for way, count in (("from_guest", from_guest), ("to_guest", to_guest))
    ]


def _seen6(address: bytes) -> str | None:
    return str(ipaddress.IPv6Address(address)) if any(address) else None


def _filters(words: Sequence[str]) -> tuple[Sequence[str], bytes | None]:
    """Which kinds of flows, and about which address, 16 bytes; None for any."""
    kinds = [word for word in words if word in _KINDS]
    addresses = [word for word in words if word not in _KINDS]
    if len(addresses) > 1:
        raise RequestError("flows: one address at most")
    if not addresses:
        return kinds or _KINDS, None
    try:
        address = ipaddress.ip_address(addresses[0])
    except ValueError:
        raise RequestError(
            f"flows: {addresses[0][:60]!r} is no filter: there are tcp, udp, ping, and an address"
        ) from None
    return kinds or _KINDS, address.packed if address.version == 6 else _V4 + address.packed


def _is_about(row: Listed, address: bytes) -> bool:
    return address in (row.guest_addr, row.our_addr, row.remote_addr)


def _end(address: bytes, port: int) -> str:
    """`address_text` is for people who wait for one: here there may be a hundred thousand."""
    v4 = address.startswith(_V4)
    text = socket.inet_ntop(socket.AF_INET, address[12:]) if v4 else socket.inet_ntop(socket.AF_INET6, address)
    return f'{{"address": "{text}", "port": {port}}}'


def _line(row: Listed) -> str:
    """A flow as JSON; nothing in it needs an escape."""
    line = (
        f'{{"protocol": "{row.kind}", "state": "{row.state}", "opened_by": "{"guest" if row.from_guest else "peer"}", '
        f'"guest": {_end(row.guest_addr, row.guest_port)}, "peer": {_end(row.our_addr, row.our_port)}, '
        f'"remote": {_end(row.remote_addr, row.remote_port)}, "bytes_from_guest": {row.bytes_from_guest}, '
        f'"bytes_to_guest": {row.bytes_to_guest}, "idle_seconds": {row.idle / 1000}'
    )
    if row.kind != "tcp":
        return line + "}"
    return (
        f'{line}, "local": {_end(row.local_addr, row.local_port)}, "in_flight_to_guest": {row.in_flight}, '
        f'"queue_to_peer": {_or_null(row.unsent)}, "queue_to_guest": {_or_null(row.unread)}}}'
    )


def _or_null(number: int) -> str:
    return "null" if number < 0 else str(number)
