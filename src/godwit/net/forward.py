# SPDX-License-Identifier: GPL-2.0-or-later
"""Port forwards from the host to the guest: the SPEC of ``-t`` and ``-u``, and their sockets.

    SPEC   := none | [PLACE/] all {, ~first[-last]} | [PLACE/] item {, item}
    PLACE  := ADDR | [ADDR]%DEV            where the host listens
    item   := [~] first[-last] [:[ADDR/]to[-tolast]]

``~`` takes ports out of what the same SPEC forwards; a SPEC of nothing but
these (``all`` may stand before them) forwards all others. ``all``, alone or so implied, leaves out the ports
that the host hands out to its own connections (ephemeral), and a port of it
that is taken is passed over. An IPv6 address may stand in brackets; behind a
colon it must.

Forwards are kept as ranges, never port by port.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple

IPAddress = IPv4Address | IPv6Address

MAX_PORT = 65535
EPHEMERAL_PATH = "/proc/sys/net/ipv4/ip_local_port_range"
DEFAULT_EPHEMERAL = (32768, 60999)  # the kernel's, where procfs does not say
BACKLOG = 1024
IFNAMSIZ = 16  # with its zero byte

# As Docker writes it, ADDR:PORT:PORT; an address in brackets is one of IPv6.
_COLON_FOR_SLASH = re.compile(r"([0-9]+(?:\.[0-9]+){3}|\[[0-9A-Fa-f:.]+\]):([0-9].*)")
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


class Listener(NamedTuple):
    """A socket of a forward: its descriptor, the host's port and where in the guest it leads."""

    fd: int
    port: int
    to_port: int
    to_address: IPAddress | None


@dataclass(frozen=True, slots=True)
class Forwards:
    """All the forwards of one protocol, in ranges; the ones that must succeed come first."""

    ranges: tuple[Forward, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.ranges)

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

    ``ephemeral`` is the host's range, first and last; read from procfs if None.
    """
    ranges: list[Forward] = []
    texts = [specs] if isinstance(specs, str) else list(specs)
    for text in texts:
        if text == "none":
            if len(texts) > 1:
                raise ForwardError("'none' does not go together with other port forwards")
            continue
        for new in _parse_spec(text, ephemeral):
            for old in ranges:
                if not new.weak and not old.weak and old.place == new.place and _overlap(old, new):
                    raise ForwardError(f"{text!r}: port {max(old.first, new.first)} is forwarded twice")
            ranges.append(new)
    ranges.sort(key=lambda one: one.weak)
    return Forwards(tuple(ranges))


def _overlap(one: Forward, other: Forward) -> bool:
    return one.first <= other.last and other.first <= one.last


def _parse_spec(text: str, ephemeral: tuple[int, int] | None) -> Iterator[Forward]:
    if (misread := _COLON_FOR_SLASH.fullmatch(text)) is not None:
        raise ForwardError(f"{text!r}: the host's address stands before a slash: {misread[1]}/{misread[2]}")
    head, slash, rest = text.partition("/")
    # A slash after a colon belongs to a target address: 80:10.0.0.1/80. In an
    # IPv6 address before the slash every colon has another one or brackets.
    if slash and not _is_target(head):
        place, body = _parse_place(text, head), rest
    else:
        place, body = Place(), text
    if body == "all":
        body = ""
        items: list[tuple[bool, int, int, int, IPAddress | None]] = []
    elif body in ("none", "auto"):
        why = "takes no address or interface" if body == "none" else "is not for a guest; use 'all' or list the ports"
        raise ForwardError(f"{text!r}: {body!r} {why}")
    else:
        words = body.split(",")
        if words[0] == "all" and all(word.startswith("~") for word in words[1:]):
            del words[0]  # what nothing but exceptions means by itself
        items = [_parse_item(text, item) for item in words]
    excluded = [(first, last) for negative, first, last, _, _ in items if negative]
    chosen = [item[1:] for item in items if not item[0]]
    weak = not chosen
    if weak:
        excluded.append(ephemeral or ephemeral_ports())
        chosen = [(1, MAX_PORT, 1, None)]
    found = False
    for first, last, to_first, to_address in chosen:
        for part_first, part_last in _without(first, last, excluded):
            found = True
            yield Forward(part_first, part_last, to_first + part_first - first, place, to_address, weak)
    if not found:
        raise ForwardError(f"{text!r}: the excluded ports leave nothing to forward")


def _is_target(head: str) -> bool:
    """Whether the text before the first slash ends in ports, a colon and a target address."""
    return re.match(r"[~0-9,:-]*[0-9]:[0-9.]+\Z|[~0-9,:-]*[0-9]:\[[^\]]*\]\Z", head) is not None and not _is_address(
        head
    )


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
    if not address_text and not percent:
        raise ForwardError(f"{text!r}: an address or %interface is missing before the '/'")
    return Place(address, device or None)


def _parse_address(text: str, word: str) -> IPAddress:
    bare = word[1:-1] if word.startswith("[") and word.endswith("]") else word
    try:
        address = ip_address(bare)
    except ValueError:
        raise ForwardError(f"{text!r}: {word!r} is not an IP address") from None
    if address.is_multicast:
        raise ForwardError(f"{text!r}: {word} is a multicast address")
    return address


def _parse_item(text: str, item: str) -> tuple[bool, int, int, int, IPAddress | None]:
    """Whether it excludes, first and last port, first target port, target address."""
    negative = item.startswith("~")
    source, colon, target = item.removeprefix("~").partition(":")
    first, last = _parse_ports(text, source)
    if not colon:
        return negative, first, last, first, None
    if negative:
        raise ForwardError(f"{text!r}: the excluded {source} cannot have a target")
    address_text, slash, ports = target.rpartition("/")
    address = _parse_address(text, address_text) if slash else None
    to_first, to_last = _parse_ports(text, ports)
    if to_last - to_first != last - first:
        raise ForwardError(
            f"{text!r}: {source} is {last - first + 1} ports, but its target {ports} is {to_last - to_first + 1}"
        )
    return negative, first, last, to_first, address


def _parse_ports(text: str, word: str) -> tuple[int, int]:
    match = _PORTS.fullmatch(word)
    if match is None or not word.isascii():
        what = f"{word!r} is not a port or a range of ports" if word else "a port is missing"
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


def ephemeral_ports() -> tuple[int, int]:
    """The ports that the host gives its own connections, first and last (ip-sysctl, ip_local_port_range)."""
    try:
        with open(EPHEMERAL_PATH, encoding="ascii") as file:
            first, last = map(int, file.read().split())
    except (OSError, ValueError):
        return DEFAULT_EPHEMERAL
    return first, last


def open_listeners(
    forwards: Forwards, *, kind: socket.SocketKind = socket.SOCK_STREAM, ipv4: bool = True, ipv6: bool = True
) -> list[Listener]:
    """Open the sockets of ``forwards``: SOCK_STREAM ones listen, SOCK_DGRAM ones are bound.

    Without an address, one socket takes IPv4 and IPv6 where both are on. The
    caller owns the descriptors, which are non-blocking. Raises ForwardError,
    with nothing left open, for a port that cannot be had, or where not one
    port of a weak forward can.
    """
    opened: list[Listener] = []
    try:
        weak: dict[Place, tuple[int, OSError | None]] = {}
        for one in forwards.ranges:
            count, failure = 0, None
            for port in range(one.first, one.last + 1):
                try:
                    fd = _open(one.place, port, kind, ipv4, ipv6)
                except OSError as error:
                    if not one.weak:
                        raise ForwardError(_reason(one.place, port, error, forwards.ports)) from error
                    failure = error
                    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                        raise ForwardError(_reason(one.place, port, error, forwards.ports)) from error
                    continue
                opened.append(Listener(fd, port, one.to_first + port - one.first, one.to_address))
                count += 1
            if one.weak:
                before, earlier = weak.get(one.place, (0, None))
                weak[one.place] = before + count, failure or earlier
        for place, (count, failure) in weak.items():
            if not count and failure is not None:
                raise ForwardError(f"of all ports not one can be listened on: {_reason(place, 0, failure, 0)}")
    except BaseException:
        close_listeners(opened)
        raise
    return opened


def close_listeners(listeners: Iterable[Listener]) -> None:
    """Close the descriptors."""
    for one in listeners:
        os.close(one.fd)


def _open(place: Place, port: int, kind: socket.SocketKind, ipv4: bool, ipv6: bool) -> int:
    version = place.address.version if place.address is not None else 6 if ipv6 else 4
    if not (ipv6 if version == 6 else ipv4):
        raise OSError(errno.EAFNOSUPPORT, f"IPv{version} is off")
    try:
        return _bind(version, place, port, kind, both=place.address is None and ipv4)
    except OSError as error:
        # A kernel without IPv6: IPv4 alone is what "every address" then means.
        if place.address is None and version == 6 and ipv4 and error.errno == errno.EAFNOSUPPORT:
            return _bind(4, place, port, kind, both=False)
        raise


def _bind(version: int, place: Place, port: int, kind: socket.SocketKind, *, both: bool) -> int:
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    with socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as sock:
        if kind == socket.SOCK_STREAM:
            # A port whose connections are in TIME_WAIT is free. Not for UDP,
            # where it would share the port with another program.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if version == 6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if both else 1)
        if place.device is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, place.device.encode() + b"\0")
        address = "" if place.address is None else str(place.address)
        if isinstance(place.address, IPv6Address) and place.address.is_link_local and place.device is not None:
            sock.bind((address, port, 0, socket.if_nametoindex(place.device)))
        else:
            sock.bind((address, port))
        if kind == socket.SOCK_STREAM:
            sock.listen(BACKLOG)
        return sock.detach()


def _reason(place: Place, port: int, error: OSError, ports: int) -> str:
    """What failed, of so many ports, and what to do about it."""
    where = f"port {port}" if port else "the first port tried"
    if place.address is not None:
        where = f"{place.address} {where}"
    if place.device is not None:
        where = f"{where} on {place.device}"
    advice = {
        errno.EACCES: "; ports below net.ipv4.ip_unprivileged_port_start need CAP_NET_BIND_SERVICE",
        errno.EADDRINUSE: "; another program has it",
        errno.EADDRNOTAVAIL: "; the host does not have this address",
        errno.ENODEV: "; there is no such interface",
        errno.EMFILE: f"; each of the {ports} ports to forward takes one, and the limit (ulimit -n) is"
        f" {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}: raise it or forward fewer ports",
        errno.EPERM: "; binding to an interface needs Linux 5.7 or CAP_NET_RAW",
    }.get(error.errno or 0, "")
    return f"cannot listen on {where}: {error.strerror}{advice}"
