# SPDX-License-Identifier: GPL-2.0-or-later
"""resolv.conf: the host's name servers and search list (resolv.conf(5)).

``options`` and everything else that is not for the guest is passed over, and
so is a line that cannot be understood: the resolver library does the same.
"""

from __future__ import annotations

import errno
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple

PATH = "/etc/resolv.conf"
MAX_NAME = 253  # RFC 1035, section 2.3.4, as text without the last dot
MAX_LABEL = 63


class Resolv(NamedTuple):
    """Name servers in their order, and the search list.

    An IPv6 server may carry the scope of a link-local address
    (``IPv6Address.scope_id``).
    """

    servers: tuple[IPv4Address | IPv6Address, ...] = ()
    search: tuple[str, ...] = ()


def read_resolv(path: str = PATH) -> Resolv:
    """The file at ``path``; empty where there is none or it may not be read.

    Raises ``OSError`` where the host is out of what it takes to look: that says nothing of the file.
    """
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return parse_resolv(file.read())
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise
        return Resolv()


def parse_resolv(text: str) -> Resolv:
    """The text of a resolv.conf; the last of ``search`` and ``domain`` wins."""
    servers: list[IPv4Address | IPv6Address] = []
    search: tuple[str, ...] = ()
    for line in text.splitlines():
        words = line.partition("#")[0].partition(";")[0].split()
        if len(words) < 2:
            continue
        if words[0] == "nameserver":
            server = _server(words[1])
            if server is not None and server not in servers:
                servers.append(server)
        elif words[0] == "search":
            search = tuple(dict.fromkeys(name for name in map(_domain, words[1:]) if name))
        elif words[0] == "domain":
            name = _domain(words[1])
            search = (name,) if name else ()
    return Resolv(tuple(servers), search)


def _server(text: str) -> IPv4Address | IPv6Address | None:
    """The address as it is reached from here, or None where it is that of no single machine."""
    try:
        server = ip_address(text)
    except ValueError:
        return None
    if isinstance(server, IPv6Address) and server.ipv4_mapped is not None:
        server = server.ipv4_mapped
    if server.is_unspecified:  # this host, for who sends there (tcp(7), and the resolver library's own default)
        return IPv4Address("127.0.0.1") if isinstance(server, IPv4Address) else IPv6Address("::1")
    return None if server.is_multicast or server == IPv4Address("255.255.255.255") else server


def _domain(text: str) -> str | None:
    """The name without its last dot, or None where it is no name that can be encoded."""
    name = text.rstrip(".")
    return name if is_domain(name) else None


def is_domain(name: str) -> bool:
    """Whether ``name`` fits the wire format of DNS names (RFC 1035, section 3.1)."""
    if not name or len(name) > MAX_NAME or not name.isascii() or not name.isprintable():
        return False
    return all(0 < len(label) <= MAX_LABEL for label in name.split("."))
