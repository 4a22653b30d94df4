# SPDX-License-Identifier: GPL-2.0-or-later
"""What an entry consists of, declared: numbers, records, data and text, one after another.

From the declaration come the encoding, the decoding, the documentation and
what the inspector shows. Only a text is as long as what is left of the entry;
everything else says, or is told by what came before it, how long it is.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from godwit.migration.errors import TruncatedError
from godwit.migration.section import Record, shown
from godwit.migration.stream import CHUNK, Part

#: What was decoded of an entry so far, in order.
Values = Sequence[Any]
#: Names and values for people and programs: numbers, texts.
Shown = dict[str, int | str]
#: The name of how many bytes lie behind what is known.
BEYOND = "bytes not known here"


class Element(ABC):
    """One part of an entry."""

    @abstractmethod
    def push(self, value: Any) -> bytes:
        """The bytes of a value."""

    @abstractmethod
    def pull(self, part: Part, before: Values) -> Any:
        """The value that comes next. Raises as ``Reader`` and ``Record`` do."""

    @abstractmethod
    def show(self, part: Part, before: Values) -> tuple[Any, list[Shown]]:
        """What ``pull`` gives, or as much of it as matters to what follows; and what there is to see."""

    @abstractmethod
    def describe(self) -> str:
        """One phrase for the documentation."""


@dataclass(eq=False, repr=False)
class Number(Element):
    """A u32."""

    name: str
    doc: str

    def push(self, value: Any) -> bytes:
        """Big-endian."""
        return int(value).to_bytes(4, "big")

    def pull(self, part: Part, before: Values) -> int:
        """The number."""
        return part.pull_u32()

    def show(self, part: Part, before: Values) -> tuple[int, list[Shown]]:
        """The number by its name."""
        number = part.pull_u32()
        return number, [{self.name: number}]

    def describe(self) -> str:
        """What the number is."""
        return f"{self.doc} (u32)"


@dataclass(eq=False, repr=False)
class One(Element):
    """A record behind its size, so that it may grow."""

    record: Record[Any]

    def push(self, value: Any) -> bytes:
        """Size and fields; of a value, or of the bytes that ``Record.encode`` has made of one."""
        return self.record.sized(value)

    def pull(self, part: Part, before: Values) -> Any:
        """The record's value."""
        return self.record.pull_sized(part)

    def show(self, part: Part, before: Values) -> tuple[Any, list[Shown]]:
        """Each field by its name."""
        value = self.record.pull_sized(part)
        return value, [shown(self.record, self.record.flatten(value))]

    def describe(self) -> str:
        """Which record."""
        return f"the size of the record (u16) and a [{self.record.name}](#{anchor(self.record.name)})"


@dataclass(eq=False, repr=False)
class Many(Element):
    """As many records of one kind as there are, ``most`` at most; their values are flat tuples."""

    record: Record[Any]
    most: int

    def push(self, value: Any) -> bytes:
        """Size, number, and the fields of each."""
        return self.record.sized_many(value)

    def pull(self, part: Part, before: Values) -> Any:
        """The flat tuples."""
        return self.record.pull_sized_many(part, self.most)

    def show(self, part: Part, before: Values) -> tuple[Any, list[Shown]]:
        """One after another."""
        flats = self.pull(part, before)
        return flats, [shown(self.record, flat) for flat in flats]

    def describe(self) -> str:
        """Which records, and how many."""
        return (
            f"the size of a record (u16), their number (u32, at most {self.most}) and so many of "
            f"[{self.record.name}](#{anchor(self.record.name)})"
        )


@dataclass(eq=False, repr=False)
class Packed(Many):
    """The same where the bytes of the records, one after another, are the value: for very many.

    ``odd`` gives the places of those that are not surely sound: only these are looked at by the declaration.
    """

    odd: Callable[[bytes], Sequence[int]]

    def push(self, value: Any) -> bytes:
        """Size, number, and the records."""
        return self.record.packed_many(value)

    def pull(self, part: Part, before: Values) -> Any:
        """The records, all of the size that is known here."""
        return self.record.pull_packed_many(part, self.most, self.odd)

    def show(self, part: Part, before: Values) -> tuple[Any, list[Shown]]:
        """One after another."""
        records = self.pull(part, before)
        return records, [shown(self.record, flat) for flat in self.record.unpack_many(records)]


@dataclass(eq=False, repr=False)
class Data(Element):
    """Bytes; how many follows from what came before."""

    name: str
    size: Callable[[Values], int]
    most: int
    doc: str

    def push(self, value: Any) -> bytes:
        """As they are."""
        return bytes(value)

    def pull(self, part: Part, before: Values) -> bytes:
        """The bytes."""
        return part.pull_bytes(self.size(before), self.most, self.name)

    def show(self, part: Part, before: Values) -> tuple[None, list[Shown]]:
        """How many, and their CRC-32; never all of them in memory."""
        left = size = self.size(before)
        begin = part.offset
        if size > min(self.most, part.left):
            part.pull_bytes(size, self.most, self.name)  # says why not
        check = 0
        while left:
            try:
                data = part.pull_bytes(min(left, CHUNK), self.most, self.name)
            except TruncatedError as error:  # what ``pull`` would say, which takes all at once
                raise TruncatedError(error.stage, begin, size, error.offset + error.got - begin) from None
            check = zlib.crc32(data, check)
            left -= len(data)
        return None, [{f"{self.name} bytes": size, f"{self.name} crc32": f"{check:08x}"}]

    def describe(self) -> str:
        """What they are."""
        return self.doc


@dataclass(eq=False, repr=False)
class Text(Element):
    """The rest of the entry, as UTF-8; what is none is replaced."""

    name: str
    most: int
    doc: str

    def push(self, value: Any) -> bytes:
        """Cut at the limit."""
        return str(value).encode(errors="replace")[: self.most]

    def pull(self, part: Part, before: Values) -> str:
        """The text."""
        return part.pull_bytes(part.left, self.most).decode(errors="replace")

    def show(self, part: Part, before: Values) -> tuple[str, list[Shown]]:
        """The text."""
        text = self.pull(part, before)
        return text, [{self.name: text}]

    def describe(self) -> str:
        """What it says."""
        return f"{self.doc} (UTF-8, at most {self.most} bytes)"


def printable(text: str, most: int) -> str:
    """A text out of a stream as a log may have it: one line that no terminal obeys, ``most`` characters or so."""
    cut = text[:most]
    safe = "".join(one if one.isprintable() else "?" for one in cut)
    return safe if len(text) <= most else f"{safe}... ({len(text)} characters)"


def anchor(name: str) -> str:
    """Where the heading ``name`` is found in a page."""
    return name.lower().replace(" ", "-")


def pull_all(layout: Sequence[Element], part: Part) -> list[Any]:
    """The values of an entry, in order; what is behind them is left."""
    values: list[Any] = []
    for element in layout:
        values.append(element.pull(part, values))
    return values


def show_all(layout: Sequence[Element], part: Part, values: list[Any]) -> Iterator[Shown]:
    """What there is to see of an entry; a new dictionary where there are several of a kind.

    ``values`` has what came before it, and gets each element's value, as far as ``show`` gives it.
    """
    together: Shown = {}
    alone = True
    for element in layout:
        value, parts = element.show(part, values)
        values.append(value)
        if len(parts) == 1:
            together |= parts[0]
        else:
            alone = not parts
            yield from ({**together, **one} for one in parts)
    if alone or together or part.left:
        yield {**together, **({BEYOND: part.left} if part.left else {})}
