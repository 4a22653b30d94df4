# SPDX-License-Identifier: GPL-2.0-or-later
"""Devices to save and to load: the tests' own."""

from __future__ import annotations

from random import Random

from godwit.dataplane.state import Datagram, Observed, Ping, UdpPeer, UdpPort
from godwit.net import native
from godwit.net.native import NATIVE, PING, UDP_PEER, UDP_PORT, WAITING, Waiting
from godwit.net.records import EVENT_SYN_FROM_GUEST, FLOW, OBSERVED
from godwit.net.state import usable
from godwit.net.told import TOLD, told_of

from ..net.test_state import Dumped, Mover
from .streams import LONGEST, octets, sound, sound_flow, sound_socket


class BrokenError(Exception):
    """Something that shall hold does not."""


def require(holds: bool, what: str) -> None:
    """An ``assert`` that stays."""
    if not holds:
        raise BrokenError(what)


class Device(Mover):
    """One that is saved as it was loaded."""

    def dump_one(self, flow: int) -> Dumped | None:
        return self.sockets.get(flow)  # None too for what was never restored

    def content(self) -> dict[str, object]:
        """All that came."""
        return {name: value for name, value in vars(self).items() if name not in ("calls", "batches", "given_up")}


def filled(rng: Random, number: int) -> Device:
    """One with anything in it that a stream of that version has a place for."""
    made = Device()
    made.seen = usable(Observed._make(sound(rng, OBSERVED)))
    for flow in range(rng.randrange(5)):
        made.states.append(sound_flow(rng, FLOW if number == 2 else native.FLOW))
        socket = sound_socket(rng)
        ended = socket.tcpi_state in (6, 7)
        queues = octets(rng, socket.sndq), octets(rng, socket.rcvq)
        if made.states[flow].events == EVENT_SYN_FROM_GUEST and rng.randrange(2):
            made.unanswered.add(flow)
        else:
            made.sockets[flow] = None if ended or not rng.randrange(4) else (socket, *queues)
    if number == NATIVE:
        made.told = {f"name {line}": f"value\t{line}" for line in range(rng.randrange(3))}
        made.echoes = [Ping._make(sound(rng, PING)) for _ in range(rng.randrange(3))]
        made.told_guest = told_of([sound(rng, TOLD) for _ in range(rng.randrange(3))], "example.org")
        for _ in range(rng.randrange(4)):
            peers = [UdpPeer._make(sound(rng, UDP_PEER)) for _ in range(rng.randrange(4))]
            heads = [Waiting._make(sound(rng, WAITING)) for _ in range(rng.randrange(4))]
            waiting = [Datagram(*head[:3], octets(rng, rng.randrange(LONGEST))) for head in heads]
            made.ports.append((UdpPort._make(sound(rng, UDP_PORT)), peers, waiting))
    return made
