# SPDX-License-Identifier: GPL-2.0-or-later
"""Domain names in wire format (RFC 1035, section 3.1), uncompressed, as DHCP, DHCPv6 and RA carry them."""

from __future__ import annotations

from collections.abc import Iterable

# Name servers in one message: twice as many as any resolver asks (three are
# usual, resolv.conf(5)), and few enough to leave room for what else is told.
MAX_SERVERS = 8


def encode_name(name: str) -> bytes:
    """One absolute name. ``name`` has passed ``resolv.is_domain``."""
    labels = [label.encode("ascii") for label in name.rstrip(".").split(".")]
    return b"".join(bytes([len(label)]) + label for label in labels) + b"\0"


def encode_names(names: Iterable[str], limit: int) -> bytes:
    """As many names as fit ``limit`` bytes, in their order."""
    encoded = b""
    for name in names:
        more = encode_name(name)
        if len(encoded) + len(more) > limit:
            break
        encoded += more
    return encoded
