# SPDX-License-Identifier: GPL-2.0-or-later
"""What a guest was told of its network, in a stream: so that another host can take back what does not hold there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address, IPv6Network
from typing import Any, Final, NamedTuple

from godwit.migration import Field, Record, UnsoundError
from godwit.migration.section import octets, u8
from godwit.net.config import IPAddress, Withdrawn, packed16
from godwit.net.records import V4_MAPPED, address_family, address_text, unpacked
from godwit.net.resolv import is_domain

ROUTER6, PREFIX6, SERVER, LEASE4 = 1, 2, 3, 4
MAX_TOLD: Final = 64  # things in one entry
MAX_NAMES: Final = 4096  # bytes of text
_NOBODY = bytes(16)


class Told(NamedTuple):
    """One thing that the guest was told."""

    what: int
    address: bytes
    length: int = 0
    by: bytes = _NOBODY


def _check(flat: tuple[Any, ...]) -> None:
    what, address, length, by = flat
    family = address_family(address)
    if family == 0:
        raise UnsoundError(1, "must be the address of one host, or of a network")
    if family != {ROUTER6: 6, PREFIX6: 6, LEASE4: 4}.get(what, family):
        raise UnsoundError(1, "is of the wrong IP version for that")
    if what == PREFIX6 and (length == 0 or int.from_bytes(address, "big") & ((1 << 128 - length) - 1)):
        raise UnsoundError(2, "is no length of this prefix")
    if what == ROUTER6 and not unpacked(address).is_link_local:
        raise UnsoundError(1, "must be link-local, as a router's is")
    if what == LEASE4 and address_family(by) != 4:
        raise UnsoundError(3, "must be the IPv4 address of one host")


TOLD: Final[Record[Told]] = Record(
    "what the guest was told",
    (
        Field(
            "what",
            u8,
            "1: an IPv6 router, 2: an IPv6 prefix, 3: a name server, 4: an IPv4 address of its own",
            (ROUTER6, PREFIX6, SERVER, LEASE4),
        ),
        Field("address", octets(16), "that address; IPv4 as v4-mapped", show=address_text),
        Field("length", u8, "of a prefix, its length", range(129)),
        Field("by", octets(16), "of an IPv4 address, the router and DHCP server that gave it", show=address_text),
    ),
    Told,
    check=_check,
    doc="One thing that the guest was told.",
)


def flats_of(told: Withdrawn) -> list[tuple[Any, ...]]:
    """For a stream, the latest first."""
    return [TOLD.flatten(one) for one in _all_of(told)][:MAX_TOLD]


def _all_of(told: Withdrawn) -> Iterator[Told]:
    for router in told.routers6:
        yield Told(ROUTER6, packed16(router))
    for prefix in told.prefixes6:
        yield Told(PREFIX6, prefix.network_address.packed, prefix.prefixlen)
    servers: Iterable[IPAddress] = (*told.dns4, *told.dns6)
    for server in servers:
        yield Told(SERVER, packed16(server))
    for address, by in told.servers4:
        yield Told(LEASE4, packed16(address), 0, packed16(by))


def told_of(flats: Sequence[tuple[Any, ...]], names: str) -> Withdrawn:
    """Out of a stream, and checked by ``TOLD``. Names that are none are left out."""
    every = [TOLD.build(flat) for flat in flats]

    def addresses(wanted: Callable[[Told], bool]) -> Iterator[bytes]:
        return (one.address for one in every if wanted(one))

    return Withdrawn(
        routers6=tuple(map(IPv6Address, addresses(lambda one: one.what == ROUTER6))),
        prefixes6=tuple(IPv6Network((one.address, one.length)) for one in every if one.what == PREFIX6),
        dns6=tuple(
            map(IPv6Address, addresses(lambda one: one.what == SERVER and one.address[:12] != V4_MAPPED)),
        ),
        search=tuple(name for name in names.split() if is_domain(name)),
        dns4=tuple(
            IPv4Address(address[12:])
            for address in addresses(lambda one: one.what == SERVER and one.address[:12] == V4_MAPPED)
        ),
        servers4=tuple(
            (IPv4Address(one.address[12:]), IPv4Address(one.by[12:])) for one in every if one.what == LEASE4
        ),
    )
