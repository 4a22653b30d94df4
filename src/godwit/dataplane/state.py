# SPDX-License-Identifier: GPL-2.0-or-later
"""What a TCP flow and its socket look like from outside the data plane.

These are the values that migrate. They name the fields and bits of the
published device-state stream, version 2, as native integers; how they are
written into a stream is not known here (see ``godwit.net.state``).
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
    for the host, 2 for the guest. ``sndbuf`` is in bytes.
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


class Observed(NamedTuple):
    """The guest's addresses as last seen in its frames; all zero where never seen."""

    addr6: bytes
    addr6_ll: bytes
    addr4: bytes
    mac: bytes
