# SPDX-License-Identifier: GPL-2.0-or-later
"""Freezing, saving and restoring the kernel's side of a TCP connection.

Addresses are 16 bytes, IPv4 as v4-mapped; ports are host integers. A socket for
IPv4 is of the family AF_INET. Every function raises ``OSError`` with the
kernel's error number, and leaves the descriptor open.

The order: on the source ``freeze``, repair mode on (a helper's work), ``dump``;
to go on after all ``thaw``, repair mode off, ``thaw`` again. On the target
``create``, repair mode on, ``restore``; at the commit ``thaw``, ``complete``,
repair mode off, ``finish``. Repair mode is ended by ``Repair.OFF``, in which an
established connection sends a window probe: the peer's answer says what it has.
``OFF_NO_WP`` is for sockets that are to be closed without a word.
"""

from godwit.dataplane.state import SocketState

#: Of ``tcpi_options``, in states with a FIN of ours: ``seq_snd`` is the sequence number of the first byte. passt
#: does not know this bit; what it writes there is one more.
FIRST_BYTE: int

def freeze(fd: int, v6: bool) -> None:
    """Have the kernel discard what arrives for a connection, before TCP sees it.

    Nothing is acknowledged; RST and FIN are ignored (IP_MINTTL or
    IPV6_MINHOPCOUNT 255, RFC 5082). Needs no privilege. A frozen connection
    still sends, and even in repair mode still retransmits.
    """

def thaw(fd: int, v6: bool) -> None:
    """Undo ``freeze``, and what repair mode and its helper have left on the socket."""

def freeze_listener(fd: int) -> None:
    """Freeze a listening socket, of either family or both: a SYN gets no answer, and is sent again."""

def thaw_listener(fd: int) -> None:
    """Undo ``freeze_listener``."""

def knock(our_addr: bytes, our_port: int, end_addr: bytes, end_port: int, scope: int, share: bool = False) -> bool:
    """Have the peer of a connection that is no more find that out; whether it has answered already.

    The peer, connected still, answers a SYN from the same port by saying where
    it is (RFC 5961, 4.2); this host knows no such connection and sends a reset
    with the number that the peer expects. The SYN's own socket is ended at once.
    ``share``: from a port on which sockets of the same user listen that have
    SO_REUSEPORT at the moment. ``OSError``: no SYN could be sent: the address is
    not this host's, or somebody else listens on the port (EADDRINUSE).
    """

def create(v6: bool) -> int:
    """Return a new TCP socket: frozen, non-blocking, to be restored into. The caller closes it."""

def dump(fd: int) -> tuple[SocketState, bytes, bytes]:
    """Save a connection that is frozen and in repair mode: its state, send queue and receive queue.

    Changes nothing but SO_PEEK_OFF, which is -1 afterwards. One that both sides
    have closed (CLOSE, 7) has a receive queue still. EINVAL for a connection
    that cannot move: not connected, or with an urgent byte in the queue; one
    that broke gives the error that broke it. ENOBUFS: a queue is larger than 64 MiB.
    """

def restore(
    fd: int,
    our_addr: bytes,
    our_port: int,
    end_addr: bytes,
    end_port: int,
    scope: int,
    state: SocketState,
    rcvq: bytes,
) -> int:
    """Make a socket of ``create``, in repair mode, the connection that ``state`` describes, but for its send queue.

    It sends nothing, however long it waits. ``scope`` is the interface of
    link-local addresses. Returns how many bytes from the start of the receive
    queue found no room: they are the caller's to deliver first.

    Among the kernel's errors: EADDRNOTAVAIL (the address is not this host's, or
    the connection exists here), EINVAL (a state that cannot be). ``ValueError``:
    a queue that does not have its stated length.
    """

def complete(fd: int, state: SocketState, sndq: bytes) -> None:
    """Write the part of the send queue that was sent; in repair mode still, right before that ends.

    The last ``state.notsent`` bytes are for ``finish``. ENOBUFS: the queue is
    larger than this process may have it. ``ValueError`` as in ``restore``.
    """

def finish(fd: int, state: SocketState, unsent: bytes) -> int:
    """Write what was unsent, and the FIN if one is due; the socket is thawed and out of repair mode.

    Returns how many bytes the socket took. If that is not all, the FIN has not
    been sent either: both are left to the caller, for when there is room.
    """
