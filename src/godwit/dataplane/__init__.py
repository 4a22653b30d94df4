# SPDX-License-Identifier: GPL-2.0-or-later
"""The packet path: guest memory, virtqueues, flows and sockets, on a thread of its own."""

from godwit.dataplane._engine import Engine
from godwit.dataplane.card import StreamCard
from godwit.dataplane.state import Datagram, FlowState, Observed, Ping, Side, SocketState, UdpPeer, UdpPort

__all__ = [
    "Datagram",
    "Engine",
    "FlowState",
    "Observed",
    "Ping",
    "Side",
    "SocketState",
    "StreamCard",
    "UdpPeer",
    "UdpPort",
]
