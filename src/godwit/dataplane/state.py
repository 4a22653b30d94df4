# SPDX-License-Identifier: GPL-2.0-or-later
"""What a TCP flow and its socket look like from outside the data plane.

These are the values that migrate. They name the fields and bits of the
published device-state stream, version 2, as native integers; how they lie in a
stream is declared in ``godwit.net`` (``layouts`` is the quick way for many).
"""

from __future__ import annotations

from typing import NamedTuple


class Side(NamedTuple):
    """One side of a flow, as the back-end sees it.

    Addresses are 16 bytes, IPv4 as v4-mapped. On the guest's side the end is
    the guest; on the host's side it is the remote peer.
    """

    our_addr: bytes
    end_addr: bytes
    our_port: int
    end_port: int


class FlowState(NamedTuple):
    """A TCP flow between the guest and a host socket.

    ``pif`` and ``sides`` start with the side that opened the flow; a pif is 1
    for the host, 2 for the guest. ``sndbuf`` is in bytes. The last three are no
    part of version 2: bytes of payload so far, each way, and the milliseconds
    since anything was heard.
    """

    pif: tuple[int, int]
    sides: tuple[Side, Side]
    retries: int
    ws_from_tap: int
    ws_to_tap: int
    events: int
    tap_mss: int
    sndbuf: int
    flags: int
    seq_dup_ack_approx: int
    wnd_from_tap: int
    wnd_to_tap: int
    seq_to_tap: int
    seq_ack_from_tap: int
    seq_from_tap: int
    seq_ack_to_tap: int
    seq_init_from_tap: int
    bytes_from_guest: int = 0
    bytes_to_guest: int = 0
    idle: int = 0

    @property
    def host_side(self) -> Side:
        """The side of the remote peer."""
        return self.sides[0] if self.pif[0] == 1 else self.sides[1]


class SocketState(NamedTuple):
    """The kernel's side of a TCP flow, as TCP_REPAIR gives and takes it.

    ``tcpi_state`` 0 says that the socket could not be saved.
    """

    seq_snd: int
    seq_rcv: int
    sndq: int
    notsent: int
    rcvq: int
    mss: int
    timestamp: int
    snd_wl1: int
    snd_wnd: int
    max_window: int
    rcv_wnd: int
    rcv_wup: int
    snd_ws: int
    rcv_ws: int
    tcpi_state: int
    tcpi_options: int


class UdpPort(NamedTuple):
    """A UDP port of the guest's, and the socket on the host that it leaves through.

    ``kind`` is 0 for one that was opened when the guest first sent from it, 2
    for one that is forwarded on every address, 3 for one forwarded on one.
    ``guest_addr`` is unspecified where the port is any address's of the guest.
    ``any_peer``: whoever answers is heard, since the guest has asked many.
    """

    kind: int
    guest_addr: bytes
    guest_port: int
    local_addr: bytes
    local_port: int
    any_peer: int


class UdpPeer(NamedTuple):
    """Somebody with whom the guest exchanges datagrams through one of its ports.

    ``our_addr`` is what the guest calls it, ``remote_addr`` and ``remote_port``
    are what the host does. ``local_addr`` is the host's address in this
    exchange, unspecified where the kernel chooses.
    """

    guest_addr: bytes
    our_addr: bytes
    remote_addr: bytes
    local_addr: bytes
    remote_port: int
    from_guest: int
    answered: int


class Listed(NamedTuple):
    """A flow, for people. ``our`` is the peer as the guest names it, ``remote`` as the host does.

    Ports are 0 where there are none; of a ping ``guest_port`` is the identifier. Bytes are of payload, since this
    process or one that it took over from has the flow; ``idle`` is in milliseconds. Of TCP alone: ``local``, the end of
    the host's socket; ``in_flight``, bytes that the guest has not acknowledged; ``unsent``, bytes in the socket's
    queue that its peer has not acknowledged, and ``unread``, those that wait there for the guest; -1 without a socket.
    """

    kind: str
    state: str
    from_guest: bool  # the guest opened it
    guest_addr: bytes
    guest_port: int
    our_addr: bytes
    our_port: int
    remote_addr: bytes
    remote_port: int
    local_addr: bytes
    local_port: int
    bytes_from_guest: int
    bytes_to_guest: int
    idle: int
    in_flight: int
    unsent: int
    unread: int


class Ping(NamedTuple):
    """Echoes of the guest's: what it calls the host that it asks, its identifier, and the one that they leave with."""

    guest_addr: bytes
    our_addr: bytes
    guest_ident: int
    host_ident: int
    seq: int


class Datagram(NamedTuple):
    """One that waits for the guest: where it came from, which address of the host's it came to (or unspecified)."""

    remote_addr: bytes
    local_addr: bytes
    remote_port: int
    data: bytes


class Observed(NamedTuple):
    """The guest's addresses as last seen in its frames; all zero where never seen."""

    addr6: bytes
    addr6_ll: bytes
    addr4: bytes
    mac: bytes
