# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's side of a TCP connection, as far as one socket at a time is seen to. ``moving`` does the rest.

Addresses are 16 bytes, IPv4 as v4-mapped; ports are host integers. A socket for
IPv4 is of the family AF_INET. Every function raises ``OSError`` with the
kernel's error number, and leaves the descriptor open. None needs a privilege.
"""

def thaw(fd: int, v6: bool) -> None:
    """Undo ``moving.freeze``, and what repair mode and its helper have left on the socket."""

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

def ephemeral_ports() -> tuple[int, int]:
    """The ports that the host gives its own sockets, first and last (ip-sysctl, ip_local_port_range)."""

def keep_limits() -> None:
    """Read now what of the kernel's limits is asked for later (/proc/sys/net), for a process that will see no /proc."""
