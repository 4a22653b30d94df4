# SPDX-License-Identifier: GPL-2.0-or-later
"""What a change of the host's network means for a guest that runs.

Nothing is taken from the guest for nothing: an address, a router or a name
server that the host loses stays the guest's until the host has another. The
guest's packets leave the host through sockets, so that an address of its own
that is out of date does no harm, while a host's link that is down for a moment
would cost the guest all of its connections. Only where the host is online with
the other IP version, and stays without this one for a while, the guest is
better off without it too: it need not try what cannot work.

What is replaced is withdrawn, and the guest told so (`Withdrawn`). So is what a
guest was told on the host that it comes from, and is not so here (`told`,
`take_back`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from ipaddress import IPv4Address
from typing import TypeVar

from godwit.net.config import IPAddress, NetConfig, Withdrawn

LET_GO_SECONDS = 60.0  # that "while"
WITHDRAWN_SECONDS = 7200.0  # by then the guest has heard of it, or does not believe in it any more
_OLD = 3  # of each kind

T = TypeVar("T")


def settle(old: NetConfig, new: NetConfig, *, let_go: bool = False) -> NetConfig:
    """What the guest has next, from what it has and what was read from the host; equal to ``old`` if nothing changes.

    ``let_go``: an IP version that the host has lost was kept for long enough.
    """
    kept4 = _lost4(old, new) and not (let_go and new.routed6)
    kept6 = _lost6(old, new) and not (let_go and new.routed4)
    config = replace(new, guest_mac=old.guest_mac)
    if kept4:
        _keep(config, old, "addr4", "prefix_len4", "gateway4", "local4", "routed4", "interface4", "scope4", "mtu4")
        _keep(config, old, "map_host4", "map_guest4")
    elif _lost_route4(old, new):
        _keep(config, old, "gateway4", "routed4", "map_host4")
    if kept6:
        _keep(config, old, "addr6", "prefix_len6", "gateway6", "our_link_local", "local6", "routed6")
        _keep(config, old, "interface6", "scope6", "mtu6", "map_host6", "map_guest6")
    elif _lost_route6(old, new):
        _keep(config, old, "gateway6", "our_link_local", "routed6", "map_host6")
    config.mtu = min(config.mtu4, config.mtu6)
    # Name servers go by how the addresses above are mapped, and are lost with the link as well.
    if kept4 or config.gateway4 != new.gateway4 or not (new.dns_host4 or new.dns_host6):
        _keep(config, old, "dns4", "dns_match4", "dns_host4")
    if kept6 or config.gateway6 != new.gateway6 or not (new.dns_host4 or new.dns_host6):
        _keep(config, old, "dns6", "dns_match6", "dns_host6")
    if not (new.dns_host4 or new.dns_host6):
        _keep(config, old, "search")
    config.withdrawn = _withdrawn(old, config)
    return config


def _keep(config: NetConfig, old: NetConfig, *names: str) -> None:
    for name in names:
        setattr(config, name, getattr(old, name))


def _lost4(old: NetConfig, new: NetConfig) -> bool:
    """Whether the host has no address any more, or none that leads as far: that of another interface, with no route."""
    if old.addr4 is None or old.local4:
        return False
    return new.local4 or (old.routed4 and not new.routed4 and old.interface4 != new.interface4)


def _lost6(old: NetConfig, new: NetConfig) -> bool:
    if old.addr6 is None:
        return False
    return new.local6 or (old.routed6 and not new.routed6 and old.interface6 != new.interface6)


def _lost_route4(old: NetConfig, new: NetConfig) -> bool:
    same = (old.addr4, old.interface4) == (new.addr4, new.interface4)
    return same and old.routed4 and not new.routed4


def _lost_route6(old: NetConfig, new: NetConfig) -> bool:
    same = (old.addr6, old.interface6) == (new.addr6, new.interface6)
    return same and old.routed6 and not new.routed6


def told(config: NetConfig) -> Withdrawn:
    """All that the guest may believe in, as what is withdrawn where it does not hold: the present first."""
    return _together(_says(config), config.withdrawn)


def take_back(config: NetConfig, elsewhere: Withdrawn) -> NetConfig:
    """``config`` for a guest that was told ``elsewhere`` on the host that it comes from."""
    return replace(config, withdrawn=_without(_together(config.withdrawn, elsewhere), config))


def _withdrawn(old: NetConfig, new: NetConfig) -> Withdrawn:
    """What ``old`` says and ``new`` does not, and what was withdrawn already; the latest first."""
    return _without(told(old), new)


def _says(config: NetConfig) -> Withdrawn:
    """What the guest is told at present."""
    return Withdrawn(
        routers6=(config.our_link_local,) if config.advertises else (),
        prefixes6=() if config.prefix6 is None else (config.prefix6,),
        dns6=tuple(config.dns6),
        search=tuple(config.search),
        dns4=tuple(config.dns4),
        servers4=() if config.addr4 is None or config.gateway4 is None else ((config.addr4, config.gateway4),),
    )


def _together(first: Withdrawn, then: Withdrawn) -> Withdrawn:
    """Both, each thing once."""
    return Withdrawn._make(tuple(dict.fromkeys((*some, *more))) for some, more in zip(first, then, strict=True))


def _without(gone: Withdrawn, config: NetConfig) -> Withdrawn:
    """What of ``gone`` does not hold, and only so much of each kind as can be told; the latest first."""
    servers4: dict[IPv4Address, IPv4Address] = {}
    for address, server in gone.servers4:
        if address != config.addr4:
            servers4.setdefault(address, server)
    return Withdrawn(
        # One that does not speak any more routes all the same, unless IPv6 is off.
        routers6=_others(gone.routers6, [config.our_link_local] if config.has_ipv6 else []),
        prefixes6=_others(gone.prefixes6, [config.prefix6]),
        dns6=_others(gone.dns6, config.dns6),
        search=_others(gone.search, config.search),
        dns4=_others(gone.dns4, config.dns4),
        servers4=tuple(servers4.items())[:_OLD],
    )


def _others(gone: Iterable[T], held: Iterable[T | None]) -> tuple[T, ...]:
    kept = set(held)
    return tuple(one for one in gone if one not in kept)[:_OLD]


def describe(old: NetConfig, new: NetConfig) -> str:
    """What is another, in one line; empty if nothing is that the guest is told."""
    return differences(facts(old), facts(new))


def facts(config: NetConfig) -> dict[str, str]:
    """What the guest is told, and from where, by names for people."""
    return {**facts_elsewhere(config), "interface": _list(_interfaces(config))}


def facts_elsewhere(config: NetConfig) -> dict[str, str]:
    """Those of them that mean the same on another host."""
    return {
        "IPv4": _address(config.addr4, config.prefix_len4, local=config.local4),
        "IPv4 router": str(config.gateway4 or "none"),
        "IPv6": _address(config.addr6, config.prefix_len6, local=config.local6),
        "IPv6 router": str(config.our_link_local if config.has_ipv6 else "none"),
        "MTU": str(config.mtu),
        "name servers": _list([*config.dns4, *config.dns6]),
        "search list": _list(config.search),
    }


def differences(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """Of the facts that both have, those that differ, in one line; empty for none."""
    return ", ".join(
        f"{name} {value} (was {before[name]})"
        for name, value in after.items()
        if name in before and before[name] != value
    )


def _interfaces(config: NetConfig) -> Iterable[str]:
    return dict.fromkeys(name for name in (config.interface4, config.interface6) if name)


def _address(address: IPAddress | None, length: int, *, local: bool) -> str:
    if address is not None:
        return f"{address}/{length}"
    return "link-local" if local else "none"


def _list(items: Iterable[object]) -> str:
    return " ".join(str(item) for item in items) or "none"
