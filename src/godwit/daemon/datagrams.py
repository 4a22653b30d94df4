# SPDX-License-Identifier: GPL-2.0-or-later
"""UDP sockets that move: what waits in one is read without being taken, and one like it is made elsewhere.

A socket of UDP needs no helper to move: its state is the address that it is
bound to, and the datagrams in its queue.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from ipaddress import ip_address

from godwit.dataplane import Datagram, UdpPort
from godwit.net.config import packed16
from godwit.net.records import V4_MAPPED, unpacked

SO_PEEK_OFF = 42  # asm-generic/socket.h; socket(7)
UDP_GRO = 104  # linux/udp.h
IP_PKTINFO = 8
MOST = 65536  # datagrams of one socket
MOST_BYTES = 32 << 20
ERRORS = 64  # in a row: each tells of an earlier datagram, once


def readable(fds: Sequence[int]) -> set[int]:
    """Those of the descriptors at which something waits."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return {fd for fd, events in poll.poll(0) if events & select.POLLIN}


def peek(fd: int, until: float = math.inf) -> list[Datagram]:
    """What waits in a socket, and stays there (SO_PEEK_OFF), oldest first; those that were joined are apart again.

    For each the kernel goes through all that were seen before (16 000 take 2.5 s),
    so this ends, with what it has, at ``until`` of the monotonic clock.
    """
    found: list[Datagram] = []
    size = errors = 0
    with socket.socket(fileno=os.dup(fd)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)
        try:
            while len(found) < MOST and size < MOST_BYTES and errors < ERRORS and time.monotonic() < until:
                try:
                    data, control, _, name = sock.recvmsg(65536, 512, socket.MSG_PEEK | socket.MSG_DONTWAIT)
                except BlockingIOError:
                    break
                except OSError:
                    errors += 1
                    continue
                errors = 0
                size += len(data)
                found += _apart(data, control, name)
        finally:
            sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, -1)
    return found


def _apart(data: bytes, control: Sequence[tuple[int, int, bytes]], name: tuple[str, int]) -> Iterator[Datagram]:
    each, local = len(data), bytes(16)
    for level, kind, value in control:
        if (level, kind) == (socket.IPPROTO_UDP, UDP_GRO):
            each = struct.unpack_from("=i", value)[0] or len(data)
        elif (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO):
            local = value[:16]
        elif (level, kind) == (socket.IPPROTO_IP, IP_PKTINFO):
            local = V4_MAPPED + value[8:12]
    remote = packed16(ip_address(name[0].partition("%")[0]))
    for at in range(0, max(1, len(data)), max(1, each)):
        yield Datagram(remote, local, name[1], data[at : at + each])


def open_socket(state: UdpPort, outbound: bytes = bytes(16), interface: str = "") -> tuple[int, bool]:
    """A socket for a port of the guest's, and whether it has the port that it had; else another.

    ``outbound`` and ``interface`` are what the guest's ports leave through
    here (``Engine.udp_outbound``). Raises OSError where none is to be had.
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
        for address in addresses:
            try:
                sock.bind(address)
            except OSError:
                if address[1] == 0:
                    raise
                continue
            return sock.detach(), address[1] != 0
    raise AssertionError("a socket is bound, or that is an error")
