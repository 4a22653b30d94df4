# SPDX-License-Identifier: GPL-2.0-or-later
"""When to look at the host's network again: a netlink socket that hears of changes (rtnetlink(7)).

It is a trigger and no more. Messages are not taken for what is the case: some
may be lost, and what they say is read anew by `godwit.net.netlink`, which knows
how. Needs no privilege.
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import Self

# linux/netlink.h, linux/rtnetlink.h
RTMGRP_LINK = 0x1
RTMGRP_IPV4_IFADDR = 0x10
RTMGRP_IPV4_ROUTE = 0x40
RTMGRP_IPV6_IFADDR = 0x100
RTMGRP_IPV6_ROUTE = 0x400
GROUPS = RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV4_ROUTE | RTMGRP_IPV6_IFADDR | RTMGRP_IPV6_ROUTE
RTM_NEWLINK, RTM_DELLINK = 16, 17
RTM_NEWADDR, RTM_DELADDR = 20, 21
RTM_NEWROUTE, RTM_DELROUTE = 24, 25
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_BUFFER = 1 << 16


class NetEvents:
    """Changes of links, addresses and routes in the network namespace of the thread that makes it.

    Raises OSError where netlink is refused.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
        )
        try:
            self._socket.bind((0, GROUPS))
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """The descriptor that gets readable."""
        return self._socket.fileno()

    def drain(self) -> bool:
        """Take what has come, without waiting; whether it can matter to a guest."""
        matters = False
        while True:
            try:
                data = self._socket.recv(_BUFFER)
            except BlockingIOError:
                return matters
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                matters = True  # more has happened than fits the socket's buffer
                continue
            matters = matters or any_matters(data)

    def close(self) -> None:
        """Hear no more. May be repeated."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def any_matters(data: bytes) -> bool:
    """Whether one of these messages can matter: of routes only those to everywhere, of which a router has few."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, _flags, _sequence, _port = _HEADER.unpack_from(data, at)
        if length < _HEADER.size:
            return True  # not understood
        if kind in (RTM_NEWLINK, RTM_DELLINK, RTM_NEWADDR, RTM_DELADDR):
            return True
        # struct rtmsg: family, then the prefix length of the destination
        if kind in (RTM_NEWROUTE, RTM_DELROUTE) and data[at + 17 : at + 18] in (b"\0", b""):
            return True
        at += (length + 3) & ~3
    return False
