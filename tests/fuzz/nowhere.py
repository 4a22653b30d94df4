# SPDX-License-Identifier: GPL-2.0-or-later
"""A network with the loopback, and an interface with routes that everything goes into and nothing comes back from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache

from godwit.lab.netns import Namespace

_COMMANDS = (
    "link add far type veth peer name beyond",
    "link set far up",
    "link set beyond up",
    "addr add 198.51.100.2/24 dev far",
    "addr add 2001:db8:1::2/64 dev far nodad",
    "addr add 10.9.0.1/24 dev far",
    "addr add 2001:db8::1/128 dev far nodad",
    # Nobody is there to be asked.
    "neigh add 198.51.100.1 lladdr 02:00:00:00:00:09 dev far nud permanent",
    "neigh add 2001:db8:1::1 lladdr 02:00:00:00:00:09 dev far nud permanent",
    "route add default via 198.51.100.1",
    "route add default via 2001:db8:1::1",
)

_here = ""  # the network that this process is in


@cache
def nowhere(name: str) -> Namespace:
    """The network of that name, one for the process."""
    space = Namespace(name)
    space.ip(*_COMMANDS)
    return space


@contextlib.contextmanager
def inside(name: str = "fuzz") -> Iterator[None]:
    """This thread, within it. Cheap when it is there already."""
    global _here
    if _here == name:
        yield
        return
    with nowhere(name).enter():
        before, _here = _here, name
        try:
            yield
        finally:
            _here = before
