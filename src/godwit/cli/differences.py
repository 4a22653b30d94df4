# SPDX-License-Identifier: GPL-2.0-or-later
"""Two device states beside each other: which item of one is which of the other.

A connection is the same where its ends are, a UDP port where the guest has it,
whatever number it has: one more or less in between changes nothing about the
others, nor about what refers to them by number. Of all else the first is the
first, and so on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Final

from godwit.migration import Item

_SIDES = tuple(f"side[{side}].{end}" for side in (0, 1) for end in ("our_addr", "end_addr", "our_port", "end_port"))
_ENDS = tuple(f"{side}_{end}" for side in ("guest", "host") for end in ("our_addr", "end_addr", "our_port", "end_port"))

#: The values that an item is known by, by its name.
KNOWN_BY: Final = {
    "flow": _SIDES,
    "TCP flows": _ENDS,
    "UDP port": ("guest_addr", "guest_port", "kind"),
    "UDP peers": ("guest_addr", "our_addr", "remote_port"),
    "pings": ("guest_addr", "our_addr", "guest_ident"),
}
#: The value that is the number of another item, and the name of that.
REFERS: Final = {
    "socket": ("flow", "flow"),
    "TCP socket": ("flow", "TCP flows"),
    "lost TCP flow": ("flow", "TCP flows"),
    "TCP attempt": ("flow", "TCP flows"),
    "UDP peers": ("port", "UDP port"),
    "UDP datagrams": ("port", "UDP port"),
}
NUMBER: Final = "number"

Key = tuple[object, ...]


def pairs(
    one: Iterable[tuple[int, Item]], other: Iterable[tuple[int, Item]]
) -> Iterator[tuple[Item | None, Item | None]]:
    """Those that differ, or are in one alone: in the order of the first, then what only the second has.

    Each comes with the number of its stream.
    """
    there = dict(_keyed(other))
    for key, item in _keyed(one):
        like = there.pop(key, None)
        if like is None or changed(item, like):
            yield item, like
    for item in there.values():
        yield None, item


def changed(one: Item, other: Item) -> list[str]:
    """The names of the values that differ; numbers alone do not."""
    numbers = {NUMBER, REFERS.get(one.name, ("",))[0]}
    names = [name for name in {**one.values, **other.values} if name not in numbers]
    return [name for name in names if one.values.get(name) != other.values.get(name)]


def _keyed(items: Iterable[tuple[int, Item]]) -> Iterator[tuple[Key, Item]]:
    numbered: dict[Key, Key] = {}
    before: Counter[Key] = Counter()
    for stream, item in items:
        known_by = tuple(item.values.get(name) for name in KNOWN_BY.get(item.name, ()))
        refers = REFERS.get(item.name)
        of = None if refers is None else numbered.get((stream, refers[1], item.values.get(refers[0])))
        key: Key = (stream, item.name, known_by, of)
        before[key] += 1
        key = (*key, before[key])
        if NUMBER in item.values:
            numbered[(stream, item.name, item.values[NUMBER])] = key
        yield key, item
