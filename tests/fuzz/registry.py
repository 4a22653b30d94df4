# SPDX-License-Identifier: GPL-2.0-or-later
"""All targets, by name: what ``make fuzz`` runs, and the test suite with what was kept."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from .target import Target

CORPUS: Final = Path(__file__).resolve().parent / "corpus"
WORK: Final = CORPUS.parent.parent.parent / "build" / "fuzz"


class Place(NamedTuple):
    """A module with targets, ``TARGETS``."""

    module: str
    names: Sequence[str]
    packages: Sequence[str] = ()  # that are followed line by line; the compiled modules always are, if they are not

    def load(self, name: str) -> Target:
        """One of them; the module is imported now."""
        found: Target = importlib.import_module(f".{self.module}", __package__).TARGETS[name]
        return found


PLACES: Final = (
    Place("frames", ["frames"]),
    Place("rings", ["rings"]),
    Place("card", ["card"]),
    Place("tcp_model", ["tcp"]),
    Place("vhost_user", ["vhost_user"], ["godwit.daemon.device", "godwit.vhost_user"]),
    Place("arrivals", ["arrivals"], ["godwit.daemon.losses", "godwit.daemon.mover", "godwit.migration", "godwit.net"]),
    Place("readers", ["version2", "native", "inspect"], ["godwit.cli.inspect", "godwit.migration", "godwit.net"]),
    Place("services", ["arp", "dhcp", "dhcpv6", "ndp", "rare"], ["godwit.net"]),
    Place(
        "words",
        ["forwards", "options", "resolv", "netlink"],
        ["godwit.daemon.options", "godwit.net.config", "godwit.net.forward", "godwit.net.netlink", "godwit.net.resolv"],
    ),
    Place(
        "peers",
        ["handover", "takeover", "repair"],
        ["godwit.daemon.takeover", "godwit.migration", "godwit.net.handover", "godwit.repair"],
    ),
)

BY_NAME: Final = {name: place for place in PLACES for name in place.names}


def target(name: str) -> Target:
    """A target."""
    return BY_NAME[name].load(name)


def kept(name: str) -> list[bytes]:
    """The inputs of a target that are in the repository."""
    return [path.read_bytes() for path in sorted((CORPUS / name).glob("*"))]
