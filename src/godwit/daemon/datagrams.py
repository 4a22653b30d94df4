# SPDX-License-Identifier: GPL-2.0-or-later
"""UDP sockets that move: one like it is made elsewhere, and it stays for a while where it was.

A socket of UDP needs no helper to move: its state is the address that it is
bound to, and the datagrams in its queue.
"""

from __future__ import annotations

import contextlib
import socket
from ipaddress import ip_address

from godwit.daemon.awaited import free_bind
from godwit.dataplane import UdpPort
from godwit.net.records import V4_MAPPED, unpacked


def open_socket(
    state: UdpPort, outbound: bytes = bytes(16), interface: str = "", *, freebind: bool = False
) -> tuple[int, bool]:
    """A socket for a port of the guest's, and whether it has the address and port that it had; else others.

    ``outbound`` and ``interface`` are what the guest's ports leave through
    here (``Engine.udp_outbound``). With ``freebind`` it may have an address
    that is yet to come. Raises OSError where none is to be had.
    """
    v4 = state.guest_addr[:12] == V4_MAPPED
    had = unpacked(state.local_addr)
    anywhere = unpacked(outbound) if any(outbound) else ip_address("0.0.0.0" if v4 else "::")
    addresses = [(str(anywhere), state.local_port), (str(anywhere), 0)]
    if had.version == anywhere.version and not had.is_loopback and not had.is_unspecified:
        addresses.insert(0, (str(had), state.local_port))
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(
            socket.socket(socket.AF_INET if v4 else socket.AF_INET6, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        )
        if not v4:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if interface:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
        if freebind:
            free_bind(sock)
        for address in addresses:
            try:
                sock.bind(address)
            except OSError:
                if address[1] == 0:
                    raise
                continue
            return sock.detach(), address is addresses[0]
    raise AssertionError("a socket is bound, or that is an error")


def silence(fd: int) -> None:
    """Have a socket take next to nothing: what comes is dropped without a word, which it would not be without a socket.

    Nothing must be read from it any more.
    """
    sock = socket.socket(fileno=fd)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)  # the kernel makes it its least, some 2 KiB
    finally:
        sock.detach()
