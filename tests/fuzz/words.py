# SPDX-License-Identifier: GPL-2.0-or-later
"""What people and other programs write: the targets ``forwards``, ``options``, ``resolv`` and ``netlink``.

What holds: what is no sense is refused with the error that is declared for it;
what is taken is within its limits, and reads the same when it is written again.
"""

from __future__ import annotations

import contextlib
import functools
import io
import struct
from collections.abc import Callable, Iterator
from typing import Final

from godwit.daemon.errors import OptionError
from godwit.daemon.options import Dialect, parse
from godwit.net import netlink
from godwit.net.forward import ForwardError, parse_forwards
from godwit.net.resolv import is_domain, parse_resolv

from .devices import require
from .target import Target

EPHEMERAL: Final = (32768, 60999)
FAMILIES: Final = (2, 10)
LONGEST: Final = 4096  # bytes of an input


def forwards(data: bytes) -> bool:
    """Values of ``--tcp-ports``, a line each."""
    try:
        found = parse_forwards(data.decode(errors="replace").split("\n"), ephemeral=EPHEMERAL)
    except ForwardError:
        return False
    for one in found.ranges:
        require(1 <= one.first <= one.last <= 65535, f"ports {one.first} to {one.last}")
        require(1 <= one.to_first <= 65535 - (one.last - one.first), f"to {one.to_first}, and more")
        require(not one.weak or one.last < EPHEMERAL[0] or one.first > EPHEMERAL[1], "ports that the kernel gives away")
        if one.to_address is None:
            again = parse_forwards(str(one), ephemeral=EPHEMERAL)
            require(again.ranges == (one._replace(weak=False),), f"{one} is {again} when it is read again")
    require(found.ports == sum(one.last - one.first + 1 for one in found.ranges), "another number of ports")
    return bool(found)


def options(data: bytes) -> bool:
    """A command line, an argument each line."""
    dialect = Dialect.PASST if data[:1] == b"p" else Dialect.GODWIT
    words = [word for word in data[1:].decode(errors="replace").split("\n") if "\0" not in word]
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            parse(words, dialect)
    except OptionError as error:
        require("\n" not in str(error), "an error of several lines")
        return False
    except SystemExit as ended:
        require(ended.code in (0, None) and bool(out.getvalue()), "an end without a word")
        return True
    return True


def resolv(data: bytes) -> bool:
    """A resolv.conf."""
    found = parse_resolv(data.decode(errors="replace"))
    require(len(set(found.servers)) == len(found.servers), "a server twice")
    require(not any(one.is_multicast or one.is_unspecified for one in found.servers), "a server that is no machine")
    require(all(map(is_domain, found.search)), "a name that cannot be encoded")
    text = "".join(f"nameserver {one}\n" for one in found.servers)
    text += f"search {' '.join(found.search)}\n" if found.search else ""
    require(parse_resolv(text) == found, "it reads another way when it is written again")
    return bool(found.servers or found.search)


def from_kernel(data: bytes) -> bool:
    """What netlink sends: messages of links, addresses and routes."""
    count = 0
    try:
        for message in netlink.parse_messages(data):
            if message.kind == netlink.RTM_NEWLINK:
                netlink._link(message.payload)
            elif message.kind == netlink.RTM_NEWADDR:
                netlink._address(message.payload)
            else:
                for family in FAMILIES:
                    netlink._default_route(message.payload, family)
            count += 1
    except (netlink.MalformedNetlinkError, struct.error, ValueError):
        return False  # as `read_network` has it
    return count > 0


KINDS: Final[dict[str, Callable[[bytes], bool]]] = {
    "forwards": forwards,
    "options": options,
    "resolv": resolv,
    "netlink": from_kernel,
}


# ---- to begin with

_FORWARDS: Final = (
    "8080", "8080:80", "8000-8010:9000-9010", "22,80,443", "127.0.0.1/8080:80", "::1/53", "%eth0/80", "all",
    "~22", "192.0.2.1%eth0/80-90,~85", "none", "[2001:db8::1]/80:8080", "80:10.0.0.1/80", "443:[2001:db8::2]/8443",
    "all,~22,~80-90", "1-65535", "22\n80", "all:10.0.0.1",
)  # fmt: skip
_OPTIONS: Final = (
    "g", "p", "g--help", "g--version", "g-f", "g--socket\n/tmp/a", "p-s\n/tmp/a\n-t\n8080", "g--mtu\n1500",
    "g--address\n192.0.2.10/24\n--gateway\n192.0.2.1", "p-a\n2001:db8::10\n-n\n64\n-g\nfe80::1", "g--fd\n5",
    "g--tcp-ports\n22:22\n--udp-ports\n53", "p--vhost-user\n-D\nnone", "g--map-guest-addr\nnone", "g--dns\n192.0.2.53",
    "g--no-tcp\n--no-udp\n--no-icmp", "g--hostname\nguest\n--fqdn\nguest.example.org", "g--busy-poll\n50",
    "p-P\n/tmp/pid\n-l\n/tmp/log\n--log-size\n65536\n--trace\n-q", "g--pcap\n/tmp/a.pcap\n--stats\n5",
)  # fmt: skip
_RESOLV: Final = (
    "nameserver 192.0.2.53\nnameserver fe80::1%eth0\nsearch example.org a.b # x\n",
    "domain example.org.\noptions ndots:2\n; nothing\nnameserver ::\nnameserver ::ffff:10.0.0.1\n",
    "nameserver 0.0.0.0\nnameserver 224.0.0.1\nsearch\nsearch x" + "y" * 64 + "\n",
)


def seeds(name: str) -> Iterator[bytes]:
    """Of one target."""
    if name == "netlink":
        yield from _dumps()
        return
    texts = {"forwards": _FORWARDS, "options": _OPTIONS, "resolv": _RESOLV}[name]
    for text in texts:
        yield text.encode()


def _dumps() -> Iterator[bytes]:
    """What this host's kernel says."""
    import socket

    for ask, head in ((netlink.RTM_GETLINK, b""), (netlink.RTM_GETADDR, b""), (netlink.RTM_GETROUTE, b"")):
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as sock:
            sock.bind((0, 0))
            sock.send(struct.pack("=IHHII", 32, ask, 0x301, 1, 0) + head.ljust(16, b"\0"))
            yield sock.recv(65536)[:4096]


TARGETS: Final = {name: Target(kind, functools.partial(seeds, name), LONGEST) for name, kind in KINDS.items()}
