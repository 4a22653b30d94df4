# SPDX-License-Identifier: GPL-2.0-or-later
"""Port forwards from the host to the guest: the SPEC of ``-t`` and ``-u``, and their sockets.

    SPEC   := none | [[PLACE]/] item {, item}
    PLACE  := ADDR | [ADDR]%DEV            where the host listens
    item   := ~first[-last]
            | all [:ADDR]
            | first[-last] [:ADDR | :[ADDR/]to[-tolast]]

``~`` takes ports out of what the same SPEC forwards; a SPEC of nothing but
these forwards all others. ``all``, written or so implied, leaves out the ports
that the host hands out to its own connections (ephemeral), and a port of it
that is taken is passed over. An ADDR behind a colon is where in the guest's
network the port leads, if not to the guest; where the host then listens
without an ADDR of its own, it does so for that one's IP version. An IPv6
address may stand in brackets.

Forwards are kept as ranges, never port by port.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import resource
import socket
from array import array
from collections.abc import Callable, Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple

from godwit.dataplane.listen import open_ports, sockets
from godwit.dataplane.sockstate import ephemeral_ports

IPAddress = IPv4Address | IPv6Address

MAX_PORT = 65535
IFNAMSIZ = 16  # with its zero byte

# As Docker writes it, ADDR:PORT:PORT; an address in brackets is one of IPv6.
_COLON_FOR_SLASH = re.compile(r"([0-9]+(?:\.[0-9]+){3}|\[[0-9A-Fa-f:.]+\]):([0-9].*)")
# Ports, a colon, and the beginning of a target address.
_TARGET = re.compile(r"(?:[~0-9,:-]*[0-9]|(?:.*,)?all):")
_PORTS = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")


class ForwardError(ValueError):
    """A SPEC that cannot be understood, or a port that cannot be listened on."""


class Place(NamedTuple):
    """Where the host listens: an address or every one, on an interface or all of them."""

    address: IPAddress | None = None
    device: str | None = None


class Forward(NamedTuple):
    """Host ports ``first`` to ``last`` to the guest's, from ``to_first`` on.

    ``to_address``: a destination other than the guest's own address.
    ``weak``: a port that cannot be listened on is passed over.
    """

    first: int
    last: int
    to_first: int
    place: Place = Place()
    to_address: IPAddress | None = None
    weak: bool = False

    def __str__(self) -> str:
        """As the options have it, or nearly: where there is no other way to say it."""
        place = "".join(f"{part}/" for part in (_at(self.place),) if part)
        ports = f"{self.first}-{self.last}" if self.last != self.first else f"{self.first}"
        to = "" if self.to_first == self.first else f":{self.to_first}"
        if self.last != self.first and to:
            to += f"-{self.to_first + self.last - self.first}"
        guest = "" if self.to_address is None else f" to {self.to_address}"
        return f"{place}{ports}{to}{guest}"


def _at(place: Place) -> str:
    """An address, and an interface behind ``%``, as far as there are any."""
    address = "" if place.address is None else str(place.address)
    return address + (f"%{place.device}" if place.device else "")


class Listener(NamedTuple):
    """A socket of a forward: its descriptor, the host's port and where in the guest it leads."""

    fd: int
    port: int
    to_port: int
    to_address: IPAddress | None


class Forwards(NamedTuple):
    """All the forwards of one protocol, in ranges; the ones that must succeed come first."""

    ranges: tuple[Forward, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.ranges)

    def __str__(self) -> str:
        return ",".join(map(str, self.ranges)) or "none"

    @property
    def ports(self) -> int:
        """How many host ports that is."""
        return sum(one.last - one.first + 1 for one in self.ranges)

    def target(self, port: int) -> int | None:
        """The guest's port for a host port, from the first range that has it."""
        for one in self.ranges:
            if one.first <= port <= one.last:
                return one.to_first + port - one.first
        return None


def parse_forwards(specs: str | Iterable[str], *, ephemeral: tuple[int, int] | None = None) -> Forwards:
    """One SPEC or several (an option given more than once adds). Raises ForwardError.

    ``ephemeral``: the ports that the host gives its own sockets, first and last; as it says itself if None.
    """
    ranges: list[Forward] = []
    for text in [specs] if isinstance(specs, str) else specs:
        if text == "none":
            if ranges:
                raise ForwardError("'none' takes back nothing: it stands alone, or first")
            continue
        for new in _parse_spec(text, ephemeral):
            for old in ranges:
                if not new.weak and not old.weak and _conflict(old, new):
                    raise ForwardError(f"{text!r}: port {max(old.first, new.first)} is forwarded twice")
            ranges.append(new)
    ranges.sort(key=lambda one: one.weak)
    return Forwards(tuple(ranges))


def _version(one: Forward) -> int | None:
    """The IP version for which a forward listens; None for both."""
    address = one.place.address or one.to_address
    return None if address is None else address.version


def _conflict(one: Forward, other: Forward) -> bool:
    """Whether the host would have to listen twice on a port."""
    if one.first > other.last or other.first > one.last:
        return False
    for mine, theirs in (
        (_version(one), _version(other)),
        (one.place.address, other.place.address),
        (one.place.device, other.place.device),
    ):
        if mine is not None and theirs is not None and mine != theirs and not _is_any(mine) and not _is_any(theirs):
            return False
    return True


def _is_any(what: object) -> bool:
    return isinstance(what, IPv4Address | IPv6Address) and what.is_unspecified


def _parse_spec(text: str, ephemeral: tuple[int, int] | None) -> Iterator[Forward]:
    if (misread := _COLON_FOR_SLASH.fullmatch(text)) is not None:
        raise ForwardError(f"{text!r}: the host's address stands before a slash: {misread[1]}/{misread[2]}")
    place, body = _split_place(text)
    items = [_parse_item(text, item) for item in body.split(",")]
    excluded = [(one.first, one.last) for one in items if one.negative]
    chosen = [one for one in items if not one.negative]
    if not chosen:
        chosen.append(_Item(1, MAX_PORT, 1, weak=True))
    found = False
    for one in chosen:
        if one.to_address is not None and place.address is not None and one.to_address.version != place.address.version:
            raise ForwardError(f"{text!r}: {place.address} and {one.to_address} are of different IP versions")
        left_out = [*excluded, ephemeral or ephemeral_ports()] if one.weak else excluded
        for first, last in _without(one.first, one.last, left_out):
            found = True
            yield Forward(first, last, one.to_first + first - one.first, place, one.to_address, one.weak)
    if not found:
        raise ForwardError(f"{text!r}: the excluded ports leave nothing to forward")


def _split_place(text: str) -> tuple[Place, str]:
    """Where the host listens, and the rest."""
    head, slash, rest = text.partition("/")
    # A slash after a colon belongs to a target address: 80:10.0.0.1/80. In an
    # IPv6 address before the slash there is a colon, too.
    if not slash or (_TARGET.match(head) and not _is_address(head)):
        return Place(), text
    return _parse_place(text, head), rest


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _parse_place(text: str, head: str) -> Place:
    if _PORTS.fullmatch(head):
        raise ForwardError(
            f"{text!r}: before a slash stands an address of the host; the guest's ports stand behind a colon:"
            " 2222:22, 8000-8010:9000-9010"
        )
    address_text, percent, device = head.partition("%")
    address = _parse_address(text, address_text) if address_text else None
    if percent and not (0 < len(device) < IFNAMSIZ and re.fullmatch(r"[^\s/]+", device)):
        raise ForwardError(f"{text!r}: {device!r} is not the name of an interface")
    return Place(address, device or None)


def _bare(word: str) -> str:
    return word[1:-1] if word.startswith("[") and word.endswith("]") else word


def _parse_address(text: str, word: str) -> IPAddress:
    try:
        address = ip_address(_bare(word))
    except ValueError:
        raise ForwardError(f"{text!r}: {word!r} is not an IP address") from None
    if isinstance(address, IPv6Address) and address.scope_id is not None:
        raise ForwardError(f"{text!r}: {word} names an interface, which has no place here")
    if address.is_multicast:
        raise ForwardError(f"{text!r}: {word} is a multicast address")
    return address


class _Item(NamedTuple):
    """One of the comma-separated parts of a SPEC."""

    first: int
    last: int
    to_first: int
    to_address: IPAddress | None = None
    negative: bool = False
    weak: bool = False


def _parse_item(text: str, item: str) -> _Item:
    negative = item.startswith("~")
    source, colon, target = item.removeprefix("~").partition(":")
    if negative and colon:
        raise ForwardError(f"{text!r}: the excluded {source} cannot have a target")
    if source in ("none", "auto"):
        why = "stands alone" if source == "none" else "is not for a guest; use 'all' or list the ports"
        raise ForwardError(f"{text!r}: {source!r} {why}")
    if source == "all" and not negative:
        return _Item(1, MAX_PORT, 1, _target_address(text, target) if colon else None, weak=True)
    first, last = _parse_ports(text, source)
    if not colon:
        return _Item(first, last, first, negative=negative)
    if _is_address(_bare(target)):
        return _Item(first, last, first, _target_address(text, target))
    address_text, slash, ports = target.rpartition("/")
    address = _target_address(text, address_text) if slash else None
    to_first, to_last = _parse_ports(text, ports)
    if to_last - to_first != last - first:
        raise ForwardError(
            f"{text!r}: {source} and {ports} differ in length: {last - first + 1} and {to_last - to_first + 1} ports"
        )
    return _Item(first, last, to_first, address)


def _target_address(text: str, word: str) -> IPAddress | None:
    """Where a port leads; None for the guest, which the unspecified address means, too."""
    address = _parse_address(text, word)
    return None if address.is_unspecified else address


def _parse_ports(text: str, word: str) -> tuple[int, int]:
    match = _PORTS.fullmatch(word)
    if match is None or not word.isascii():
        what = f"{word!r} is not a port or a range of ports" if word else "a port is missing: 2222:22 has both"
        raise ForwardError(f"{text!r}: {what}")
    first, last = int(match[1]), int(match[2] or match[1])
    for port in (first, last):
        if not 1 <= port <= MAX_PORT:
            raise ForwardError(f"{text!r}: port {port} is out of range; ports are 1 to {MAX_PORT}")
    if last < first:
        raise ForwardError(f"{text!r}: the range {word} ends before it begins")
    return first, last


def _without(first: int, last: int, excluded: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The parts of a range that are in none of the excluded ones."""
    for start, end in sorted(excluded):
        if end < first or start > last:
            continue
        if start > first:
            yield first, start - 1
        first = end + 1
    if first <= last:
        yield first, last


class Bound(NamedTuple):
    """Where a socket listens: what tells it from all others that there may be."""

    kind: int
    family: int
    v6only: bool
    address: bytes
    scope: int
    port: int
    device: bytes


def bound(fds: Iterable[int]) -> list[Bound]:
    """Where these sockets listen. Raises OSError or ValueError if one of them is none of IP, or blocks."""
    return [Bound._make(each) for each in sockets(fds)]


class Listeners:
    """The sockets of the forwards of one protocol. Whoever has it owns the descriptors."""

    def __init__(self, opened: Iterable[tuple[Forward, array[int]]] = (), left_out: int = 0) -> None:
        self._opened = list(opened)
        self.left_out = left_out  # ports of ``all`` for which no descriptor was to be had

    def __len__(self) -> int:
        return sum(1 for _, fds in self._opened for fd in fds if fd >= 0)

    def __iter__(self) -> Iterator[Listener]:
        for forward, fds in self._opened:
            for at, fd in enumerate(fds):
                if fd >= 0:
                    yield Listener(fd, forward.first + at, forward.to_first + at, forward.to_address)

    def close(self) -> None:
        """Close the descriptors. May be repeated."""
        for one in self:
            os.close(one.fd)
        self._opened.clear()


_SCARCE = (errno.EMFILE, errno.ENFILE)


def open_listeners(
    forwards: Forwards,
    *,
    kind: socket.SocketKind = socket.SOCK_STREAM,
    ipv4: bool = True,
    ipv6: bool = True,
    freebind: bool = False,
    most: int = MAX_PORT,
    inherited: dict[Bound, int] | None = None,
) -> Listeners:
    """Open the sockets of ``forwards``: SOCK_STREAM ones listen, SOCK_DGRAM ones are bound.

    Without an address, one socket takes IPv4 and IPv6 where both are on.
    ``freebind``: also on addresses that the host does not have. The descriptors
    are non-blocking. Raises ForwardError, with nothing left open, for a port
    that cannot be had, or where not one port of a weak forward can. Weak forwards
    open no more sockets than there are ``most`` in all, the lowest ports first.
    Sockets that another process has ``inherited`` to this one are taken instead
    of new ones, and taken out of there, whatever ``most`` says.
    """
    opened: list[tuple[Forward, array[int]]] = []
    count = left_out = 0
    weak: dict[Place, tuple[int, int]] = {}  # ports open or left out, and an error
    try:
        for one in forwards.ranges:
            room = max(0, most - count) if one.weak else MAX_PORT
            fds = _open(one, kind, ipv4, ipv6, freebind, room, {} if inherited is None else inherited)
            opened.append((one, fds))
            got = sum(1 for fd in fds if fd >= 0)
            count += got
            failed = next(((one.first + at, -fd) for at, fd in enumerate(fds) if fd < 0), None)
            if failed is not None and not one.weak:
                raise ForwardError(_reason(one.place, *failed, forwards.ports))
            ended = -fds[-1] if fds else 0  # the error that ended it early, if it is one of these
            if ended in (errno.ENOMEM, errno.ENOBUFS):
                raise ForwardError(_reason(one.place, one.first + len(fds) - 1, ended, forwards.ports))
            if one.weak:
                missing = one.last + 1 - one.first - len(fds) + (ended in _SCARCE)
                left_out += missing
                before, earlier = weak.get(one.place, (0, 0))
                weak[one.place] = before + got + missing, failed[1] if failed else earlier
        for place, (there, error) in weak.items():
            if not there:
                raise ForwardError(f"of all ports not one can be listened on: {_reason(place, 0, error, 0)}")
    except BaseException:
        Listeners(opened).close()
        raise
    return Listeners(opened, left_out)


def _open(
    one: Forward,
    kind: socket.SocketKind,
    ipv4: bool,
    ipv6: bool,
    freebind: bool,
    most: int,
    inherited: dict[Bound, int],
) -> array[int]:
    """A descriptor or a negative error number for each port of a range, as `open_ports` has it."""
    version = _version(one) or (6 if ipv6 else 4)
    if not (ipv6 if version == 6 else ipv4):
        what = one.place.address or one.to_address or "it"
        raise ForwardError(f"cannot listen on port {one.first}: IPv{version} is off, and {what} needs it")
    both = _version(one) is None and ipv4
    fds = _open_as(version, one, kind, both=both, freebind=freebind, most=most, inherited=inherited)
    # A kernel without IPv6: IPv4 alone is what "every address" then means.
    if both and version == 6 and fds and fds[0] == -errno.EAFNOSUPPORT:
        return _open_as(4, one, kind, both=False, freebind=freebind, most=most, inherited=inherited)
    return fds


def _open_as(
    version: int,
    one: Forward,
    kind: socket.SocketKind,
    *,
    both: bool,
    freebind: bool,
    most: int,
    inherited: dict[Bound, int],
) -> array[int]:
    address, device = one.place
    scope = 0
    if isinstance(address, IPv6Address) and address.is_link_local and device is not None:
        try:
            scope = socket.if_nametoindex(device)
        except OSError:
            raise ForwardError(_reason(one.place, one.first, errno.ENODEV, 0)) from None
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    packed = address.packed if address is not None else bytes(16 if version == 6 else 4)
    name = (device or "").encode()

    def open_new(first: int, last: int, most: int) -> array[int]:
        return open_ports(family, kind, packed, scope, name, not both, freebind, first, last, most)

    if not inherited:
        return open_new(one.first, one.last, most)
    only = version == 6 and not both
    there = [
        inherited.pop(Bound(int(kind), int(family), only, packed, scope, port, name), -1)
        for port in range(one.first, one.last + 1)
    ]
    return _fill(there, one.first, most, open_new)


def _fill(there: list[int], first: int, most: int, open_new: Callable[[int, int, int], array[int]]) -> array[int]:
    """A descriptor, or the error, for each port from ``first`` on: those that are there, and new ones between them."""
    fds: array[int] = array("i")
    most -= sum(1 for fd in there if fd >= 0)
    for missing, run in itertools.groupby(there, lambda fd: fd < 0):
        some = list(run)
        if not missing:
            fds.extend(some)
            continue
        start = first + len(fds)
        opened = open_new(start, start + len(some) - 1, max(0, most)) if most > 0 else array("i")
        most -= sum(1 for fd in opened if fd >= 0)
        # One that was not tried counts as one for which there was no descriptor.
        fds.extend([*opened, *[-errno.EMFILE] * (len(some) - len(opened))])
    return fds


def _reason(place: Place, port: int, error: int, ports: int) -> str:
    """What failed, of so many ports, and what to do about it."""
    where = f"port {port}" if port else "the first port tried"
    if place.address is not None:
        where = f"{place.address} {where}"
    if place.device is not None:
        where = f"{where} on {place.device}"
    advice = {
        errno.EACCES: "; ports below net.ipv4.ip_unprivileged_port_start need CAP_NET_BIND_SERVICE",
        errno.EADDRINUSE: "; another program has it",
        errno.EADDRNOTAVAIL: "; the host does not have this address (--freebind listens all the same)",
        errno.ENODEV: "; there is no such interface",
        errno.EINVAL: "; a link-local address needs its interface: ADDRESS%INTERFACE/PORT"
        if place.address is not None and place.address.is_link_local and place.device is None
        else "",
        errno.EMFILE: f"; each of the {ports} ports to forward takes one, and the limit (ulimit -n) is"
        f" {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}: raise it or forward fewer ports",
        errno.EPERM: "; binding to an interface needs Linux 5.7 or CAP_NET_RAW",
    }.get(error, "")
    return f"cannot listen on {where}: {os.strerror(error)}{advice}"


def share(tcp: Forwards, udp: Forwards, most: int) -> int:
    """Of ``most`` descriptors those that TCP may take: half, or more where UDP does not need it."""
    return max(most // 2, most - udp.ports)
