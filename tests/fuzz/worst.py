# SPDX-License-Identifier: GPL-2.0-or-later
"""Streams of very many small entries: what costs a reader most for each byte."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Final

from godwit.migration.entries import END
from godwit.net.native import FLOW, UDP_PEER, UDP_PORT, WAITING, Waiting
from godwit.net.state import BATCH

from .streams import ADDRESSES, NATIVE, Stream, entry, header, sound

_FIRST: Final = bytes(4)  # the number of a flow or port
_FLOW: Final = sound(Random(1), FLOW)
_PORT: Final = entry(6, UDP_PORT.struct.size.to_bytes(2, "big") + UDP_PORT.pack(sound(Random(2), UDP_PORT)))
_PEER: Final = sound(Random(3), UDP_PEER)
_EMPTY: Final = WAITING.sized(Waiting(ADDRESSES[0], bytes(16), 1, 0))


def _lost(count: int) -> bytes:
    """Flows, and of each that it is lost."""
    flows = (entry(3, FLOW.sized_many([_FLOW] * min(BATCH, count - at))) for at in range(0, count, BATCH))
    return b"".join((*flows, *(entry(5, number.to_bytes(4, "big")) for number in range(count))))


_BODIES: Final[dict[str, Callable[[int], bytes]]] = {
    "unknown": lambda count: b"".join(entry(1000 + number % 60000, b"", 0) for number in range(count)),
    "no flows": lambda count: entry(3, FLOW.sized_many([])) * count,
    "flows": lambda count: entry(3, FLOW.sized_many([_FLOW])) * count,
    "lost flows": _lost,
    "ports": lambda count: _PORT * count,
    "no peers": lambda count: _PORT + entry(7, _FIRST + UDP_PEER.sized_many([])) * count,
    "peers": lambda count: _PORT + entry(7, _FIRST + UDP_PEER.sized_many([_PEER])) * count,
    "datagrams": lambda count: _PORT + entry(8, _FIRST + _EMPTY) * count,
}


def _whole(body: Callable[[int], bytes]) -> Callable[[int], bytes]:
    return lambda count: Stream(header(NATIVE), parts=[body(count)], rest=entry(END, bytes(4))).repaired()


#: Sound streams of so many entries each, by what is in them.
WORST: Final = {name: _whole(body) for name, body in _BODIES.items()}
