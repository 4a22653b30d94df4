# SPDX-License-Identifier: GPL-2.0-or-later
"""A rule in the host's packet filter that keeps back resets, for as long as this process wants it.

When the network leads to a target before the connections are there, its kernel
answers the peers' segments: it knows no such connection (RFC 9293, 3.10.7.1).
That answer is a bare reset, one without ACK, since the segment had one. No
socket sends such by itself: its own resets have ACK, and so has the one that
refuses a SYN. So what is dropped here is a bare reset from one of the guarded
addresses, and nothing else. The peer, without an answer, sends again.

The rule is in a table of its own that belongs to a netlink socket
(NFT_TABLE_F_OWNER, Linux 5.12): nobody else can change the table, and the
kernel takes it away when the socket is closed, however the process ends.

The messages are the kernel's nfnetlink (linux/netfilter/nf_tables.h), in host
byte order, attributes' numbers in network byte order.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import Final

_NETLINK_NETFILTER: Final = 12
_REQUEST, _ACK, _EXCL, _CREATE, _APPEND = 0x1, 0x4, 0x200, 0x400, 0x800  # linux/netlink.h
_ERROR: Final = 2
_NESTED: Final = 0x8000  # NLA_F_NESTED
_HEAD: Final = struct.Struct("=IHHII")  # struct nlmsghdr
_ATTRIBUTE: Final = struct.Struct("=HH")

# linux/netfilter/nfnetlink.h
_NFTABLES: Final = 10
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11

# linux/netfilter/nf_tables.h
_NEW_TABLE, _NEW_CHAIN, _NEW_RULE = 0, 3, 6
_OWNED: Final = 0x2  # NFT_TABLE_F_OWNER
_L4PROTO: Final = 16  # NFT_META_L4PROTO
_NETWORK, _TRANSPORT = 1, 2  # NFT_PAYLOAD_*_HEADER
_REGISTER: Final = 1
_VERDICT: Final = 0  # NFT_REG_VERDICT
_EQUAL: Final = 0

_LOCAL_OUT: Final = 3  # NF_INET_LOCAL_OUT
_DROP: Final = 0
_CHAIN: Final = "output"
_TCP_FLAGS_AT: Final = 13
_SYN, _RST, _ACK_FLAG = 0x02, 0x04, 0x10
_FAMILIES: Final = {4: (2, 12), 6: (10, 8)}  # NFPROTO_*, and where the source is in the header
_TIMEOUT: Final = 5.0  # seconds; the kernel answers at once


class GuardError(Exception):
    """The packet filter does not take the rule; one line for the user."""


class Guard:
    """Bare resets from these addresses are dropped, until ``close`` or the end of this process.

    :raises GuardError: no CAP_NET_ADMIN, or no nf_tables that does this.
    """

    def __init__(self, addresses: Sequence[IPv4Address | IPv6Address]) -> None:
        self.addresses = tuple(dict.fromkeys(addresses))
        self._sock: socket.socket | None = None
        try:
            sock = self._sock = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER
            )
            sock.settimeout(_TIMEOUT)
            _carry_out(sock, _messages(self.addresses))
        except OSError as error:
            self.close()
            raise GuardError(
                f"the packet filter does not take the guard: {error.strerror or error} "
                "(it needs CAP_NET_ADMIN, and nf_tables of Linux 5.12 or later)"
            ) from error

    def close(self) -> None:
        """Take the rule away. May be repeated."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None


def _messages(addresses: Sequence[IPv4Address | IPv6Address]) -> list[tuple[int, int, int, bytes]]:
    """A table for each IP version, with a rule for each address: family, kind, flags, attributes."""
    found = []
    name = f"godwit-repair-{os.getpid()}"
    for version in sorted({one.version for one in addresses}):
        family, at = _FAMILIES[version]
        found.append((family, _NEW_TABLE, _CREATE | _EXCL, _text(1, name) + _number(2, _OWNED)))
        hook = _nested(4, _number(1, _LOCAL_OUT), _number(2, 0))
        chain = _text(1, name) + _text(3, _CHAIN) + hook + _text(7, "filter")
        found.append((family, _NEW_CHAIN, _CREATE | _EXCL, chain))
        for address in addresses:
            if address.version == version:
                rule = _text(1, name) + _text(2, _CHAIN) + _nested(4, *_bare_reset_from(address, at))
                found.append((family, _NEW_RULE, _CREATE | _APPEND, rule))
    return found


def _bare_reset_from(address: IPv4Address | IPv6Address, at: int) -> list[bytes]:
    """The expressions of ``saddr ADDRESS meta l4proto tcp tcp flags & (syn | rst | ack) == rst drop``."""
    source = address.packed
    flags = _number(1, _REGISTER) + _number(2, _REGISTER) + _number(3, 1)
    flags += _nested(4, _attribute(1, bytes([_SYN | _RST | _ACK_FLAG]))) + _nested(5, _attribute(1, b"\0"))
    verdict = _number(1, _VERDICT) + _nested(2, _nested(2, _number(1, _DROP)))
    return [
        _expression("payload", _loaded(_NETWORK, at, len(source))),
        _expression("cmp", _is(source)),
        _expression("meta", _number(1, _REGISTER) + _number(2, _L4PROTO)),
        _expression("cmp", _is(bytes([socket.IPPROTO_TCP]))),
        _expression("payload", _loaded(_TRANSPORT, _TCP_FLAGS_AT, 1)),
        _expression("bitwise", flags),
        _expression("cmp", _is(bytes([_RST]))),
        _expression("immediate", verdict),
    ]


def _expression(name: str, data: bytes) -> bytes:
    return _nested(1, _text(1, name), _nested(2, data))


def _loaded(base: int, offset: int, size: int) -> bytes:
    return _number(1, _REGISTER) + _number(2, base) + _number(3, offset) + _number(4, size)


def _is(value: bytes) -> bytes:
    return _number(1, _REGISTER) + _number(2, _EQUAL) + _nested(3, _attribute(1, value))


def _attribute(kind: int, data: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(data), kind) + data + bytes(-len(data) % 4)


def _number(kind: int, value: int) -> bytes:
    return _attribute(kind, value.to_bytes(4, "big"))


def _text(kind: int, text: str) -> bytes:
    return _attribute(kind, text.encode() + b"\0")


def _nested(kind: int, *parts: bytes) -> bytes:
    return _attribute(kind | _NESTED, b"".join(parts))


def _carry_out(sock: socket.socket, messages: Sequence[tuple[int, int, int, bytes]]) -> None:
    """All of them in one batch, or none."""
    batch = _message(_BATCH_BEGIN, _REQUEST, 0, struct.pack("!BBH", 0, 0, _NFTABLES))
    for number, (family, kind, flags, attributes) in enumerate(messages, 1):
        body = struct.pack("!BBH", family, 0, 0) + attributes
        batch += _message(_NFTABLES << 8 | kind, _REQUEST | _ACK | flags, number, body)
    batch += _message(_BATCH_END, _REQUEST, 0, struct.pack("!BBH", 0, 0, _NFTABLES))
    sock.sendto(batch, (0, 0))
    waiting = set(range(1, len(messages) + 1))
    while waiting:
        answers = sock.recv(65536)
        while answers:
            size, kind, _flags, number, _port = _HEAD.unpack_from(answers)
            if kind == _ERROR:
                (error,) = struct.unpack_from("=i", answers, _HEAD.size)
                if error:
                    raise OSError(-error, os.strerror(-error))
                waiting.discard(number)
            answers = answers[(size + 3) & ~3 :]


def _message(kind: int, flags: int, number: int, body: bytes) -> bytes:
    return _HEAD.pack(_HEAD.size + len(body), kind, flags, number, 0) + body
