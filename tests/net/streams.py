# SPDX-License-Identifier: GPL-2.0-or-later
"""What is in the native streams that are kept (``tests/native``), which this writes anew::

.venv/bin/python -m tests.net.streams
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, IPv6Network
from pathlib import Path

from godwit.dataplane.state import Datagram, FlowState, Ping, UdpPeer, UdpPort
from godwit.migration import Direction, Migration, Outcome
from godwit.net.config import Withdrawn
from godwit.net.native import NATIVE
from godwit.net.records import EVENT_ACCEPTED, EVENT_SYN_FROM_GUEST, PIF_GUEST, PIF_HOST
from godwit.net.state import FlowMover
from godwit.net.versions import versions

from .test_state import Mover, loaded, mapped

FROZEN = Path(__file__).resolve().parent.parent / "native"

GUEST4, PEER4, HOST4 = mapped("10.9.0.2"), mapped("198.51.100.7"), mapped("10.9.0.2")
GUEST6, PEER6, HOST6 = (b"\xfd\x09" + bytes(13) + bytes([n]) for n in (2, 7, 2))
NOBODY = bytes(16)
QUEUE = bytes(range(256)) * 32


def save(mover: Mover) -> tuple[bytes, Outcome]:
    """The native stream of what is in there."""
    transfer: Migration[FlowMover] = Migration(versions(), mover)
    file = io.BytesIO()
    transfer.request(file, Direction.SOURCE, NATIVE)
    outcome = transfer.run()
    return file.getvalue(), outcome


def _from_version_2(name: str) -> Mover:
    """The golden stream of that name, loaded, with a configuration."""
    mover = loaded(name)
    mover.told = {"IPv4": "10.9.0.2/24"}
    return mover


def another(state: FlowState, number: int) -> FlowState:
    """The same between other ends."""
    first, second = (side._replace(our_port=side.our_port + number) for side in state.sides)
    return state._replace(sides=(first, second), idle=number, bytes_from_guest=number << 32, bytes_to_guest=number)


def _queues() -> Mover:
    """Both queues full, and some of the send queue not sent."""
    mover = _from_version_2("half-closed-v4")
    for flow, dumped in mover.sockets.items():
        assert dumped is not None
        socket = dumped[0]._replace(sndq=len(QUEUE), notsent=100 * flow, rcvq=len(QUEUE) - flow)
        mover.sockets[flow] = (socket, QUEUE, QUEUE[flow:])
    return mover


def _flows() -> Mover:
    """One that moves, one that could not be saved, one that nobody has answered, and both handshakes."""
    mover = _from_version_2("idle-v4")
    first, socket = mover.states[0], mover.sockets[0]
    begun = another(first, 3)._replace(pif=(PIF_GUEST, PIF_HOST), events=EVENT_SYN_FROM_GUEST)
    accepted = another(first, 4)._replace(pif=(PIF_HOST, PIF_GUEST), sides=first.sides[::-1], events=EVENT_ACCEPTED)
    mover.states = [first, another(first, 1), another(begun, 2), begun, accepted]
    mover.sockets = {0: socket, 1: None, 3: socket, 4: socket}
    mover.unanswered = {2}
    return mover


def _datagrams() -> Mover:
    """UDP ports of each kind and both families, with peers and what waits; and echoes."""
    mover = _from_version_2("empty")
    mover.ports = [
        (
            UdpPort(0, GUEST4, 5000, HOST4, 40000, 0),
            [UdpPeer(GUEST4, PEER4, PEER4, NOBODY, 53, 1, 1), UdpPeer(GUEST4, PEER4, PEER4, HOST4, 54, 0, 0)],
            [Datagram(PEER4, NOBODY, 53, text) for text in (b"answer", b"", QUEUE)],
        ),
        (
            UdpPort(0, GUEST6, 5001, NOBODY, 40001, 1),
            [UdpPeer(GUEST6, PEER6, PEER6, HOST6, 53, 1, 0)],
            [Datagram(PEER6, HOST6, port, b"from %d" % port) for port in range(1, 40)],
        ),
        (UdpPort(2, NOBODY, 53, NOBODY, 5353, 1), [], [Datagram(PEER4, HOST4, 9, b"question")]),
        (UdpPort(3, GUEST6, 54, HOST6, 54, 0), [UdpPeer(GUEST6, PEER6, PEER6, HOST6, 9, 0, 1)], []),
    ]
    mover.told_guest = Withdrawn(
        (IPv6Address("fe80::1"),), (IPv6Network("2001:db8::/64"),), (), ("example.org",), (IPv4Address("192.0.2.53"),)
    )
    mover.echoes = [Ping(GUEST4, PEER4, 77, 1234, 5), Ping(GUEST6, PEER6, 78, 1235, 65535)]
    return mover


_OF_VERSION_2 = ("empty", "idle-v4", "idle-v6", "half-closed-v4", "half-closed-v6")

CONTENTS: dict[str, Callable[[], Mover]] = {
    **{name: functools.partial(_from_version_2, name) for name in _OF_VERSION_2},
    "queues": _queues,
    "flows": _flows,
    "datagrams": _datagrams,
}


def main() -> None:
    """Write all of them."""
    for name, make in CONTENTS.items():
        data, outcome = save(make())
        assert outcome, outcome.error
        (FROZEN / f"{NATIVE:#x}-{name}.bin").write_bytes(data)


if __name__ == "__main__":
    main()
