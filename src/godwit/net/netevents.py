# SPDX-License-Identifier: GPL-2.0-or-later
"""When to look at the host's network again: a netlink socket that hears of changes (rtnetlink(7)).

It is a trigger and no more. Messages are not taken for what is the case: some
may be lost, and what they say is read anew by `godwit.net.netlink`, which knows
how. Needs no privilege.
"""

from __future__ import annotations

import errno
import socket
from typing import Self

from godwit.net.netlink import (
    RTM_DELADDR,
    RTM_DELLINK,
    RTM_DELROUTE,
    RTM_NEWADDR,
    RTM_NEWLINK,
    RTM_NEWROUTE,
    MalformedNetlinkError,
    is_default_route,
    parse_messages,
)

# linux/rtnetlink.h
RTMGRP_LINK = 0x1
RTMGRP_IPV4_IFADDR = 0x10
RTMGRP_IPV4_ROUTE = 0x40
RTMGRP_IPV6_IFADDR = 0x100
RTMGRP_IPV6_ROUTE = 0x400
GROUPS = RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV4_ROUTE | RTMGRP_IPV6_IFADDR | RTMGRP_IPV6_ROUTE
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
    try:
        for message in parse_messages(data):
            if message.kind in (RTM_NEWLINK, RTM_DELLINK, RTM_NEWADDR, RTM_DELADDR):
                return True
            if message.kind in (RTM_NEWROUTE, RTM_DELROUTE) and is_default_route(message.payload):
                return True
    except MalformedNetlinkError:
        return True  # not understood: look
    return False
