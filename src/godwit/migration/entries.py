# SPDX-License-Identifier: GPL-2.0-or-later
"""A stage of self-describing entries, for formats that are to grow.

Each entry says its type, whether a reader must understand it, and its length::

    type u16 | flags u16 | length u32 | that many bytes

all big-endian. A reader passes over an entry of a type that it does not know,
and refuses the stream if the entry is one that must be understood (flag 1). It
passes over what an entry has behind what it knows of it, too. So a new writer
says more to an old reader without harm, or says clearly that it cannot be
understood, one entry at a time.

Type 0 ends the stage. It holds the CRC-32 of all entries before it, since a
stream that passes through several hands on its way may be damaged by one. (A
CRC because it costs least: the guest stands still meanwhile. It is no seal;
whoever can change a stream on purpose can change its check value.)
"""

from __future__ import annotations

import logging
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic

from godwit.migration.errors import DamagedError, UnknownEntryError
from godwit.migration.layout import BEYOND, Element, pull_all, show_all
from godwit.migration.stream import SMALL, Part, Reader, Writer
from godwit.migration.version import Context, Item, Stage

log = logging.getLogger(__name__)

HEAD: Final = struct.Struct(">HHI")
END: Final = 0
REQUIRED: Final = 0x0001
SHOWN_TYPES: Final = 8  # of those not known, in the log


@dataclass(frozen=True)
class Kind(Generic[Context]):
    """One type of entries: what one consists of, and what becomes of it.

    ``load(context, part, *values)`` takes the values of the elements of
    ``layout``; ``part`` is for errors (``bad``), and has what lies behind them.
    ``check(notes, part, *values)`` comes before it, in the inspector too: what
    entries must be beside each other. ``notes`` lasts for one reading (`Entries`).
    ``run(context, notes, data, at)`` may load many such entries at once, and say
    where they end: those that lie whole in ``data`` from ``at`` on and with which
    nothing at all is wrong. The others are read one by one.
    """

    type: int
    name: str
    layout: Sequence[Element]
    load: Callable[..., None]
    check: Callable[..., None] | None = None
    required: bool = True
    run: Callable[[Context, Any, bytes, int], int] | None = None
    numbered: bool = False  # others refer to one of these by its number: the inspector shows it
    doc: str = ""

    def __post_init__(self) -> None:
        if not END < self.type <= 0xFFFF:
            raise ValueError(f"{self.name}: no entry can have type {self.type}")

    @property
    def flags(self) -> int:
        """What its entries have there."""
        return REQUIRED if self.required else 0


class Push:
    """Writes entries. Called: one, of its kind, with the values of its elements."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def __call__(self, kind: Kind[Any], *values: Any) -> None:
        self._writer.check_cancelled()
        parts = [element.push(value) for element, value in zip(kind.layout, values, strict=True)]
        length = sum(map(len, parts))
        parts.insert(0, HEAD.pack(kind.type, kind.flags, length))
        for part in parts if length > SMALL else (b"".join(parts),):
            self._writer.push_bytes(part)

    def packed(self, entries: bytes) -> None:
        """Whole entries, very many: the target may see to these while the next ones are made."""
        self._writer.check_cancelled()
        self._writer.push_bytes(entries)
        self._writer.flush()


class Entries(Stage[Context]):
    """A stage that is a table of kinds. ``save(context, push)`` calls ``push(kind, *values)`` for each entry there is.

    ``notes()`` is made anew for each reading, for the kinds' ``check``. ``loaded(context)`` is called on the target
    when all were read, and the check value was right.
    """

    def __init__(
        self,
        name: str,
        kinds: Sequence[Kind[Context]],
        save: Callable[[Context, Push], None],
        *,
        notes: Callable[[], Any] = dict,
        loaded: Callable[[Context], None] | None = None,
        rollback: Callable[[Context], None] | None = None,
        linger: Callable[[Context], None] | None = None,
        discard: Callable[[Context], None] | None = None,
        commit: Callable[[Context], None] | None = None,
        doc: str = "",
    ) -> None:
        super().__init__(
            name,
            source=self._save,
            target=self._load,
            rollback=rollback,
            linger=linger,
            discard=discard,
            commit=commit,
            inspect=self._inspect,
            doc=doc,
        )
        self.kinds = tuple(kinds)
        self._known = {kind.type: kind for kind in kinds}
        self._save_all = save
        self._notes = notes
        self._loaded = loaded
        if len(self._known) != len(self.kinds):
            raise ValueError(f"{name}: two kinds of one type")

    def _save(self, context: Context, writer: Writer) -> None:
        writer.begin_check()
        self._save_all(context, Push(writer))
        check = writer.check
        writer.push_bytes(HEAD.pack(END, REQUIRED, 4) + check.to_bytes(4, "big"))

    def _load(self, context: Context, reader: Reader) -> None:
        unknown: Counter[int] = Counter()
        notes = self._notes()

        def load_runs() -> None:
            while True:
                reader.check_cancelled()
                data, at = reader.ahead()
                kind = self._known.get(int.from_bytes(data[at : at + 2], "big"))
                end = at if kind is None or kind.run is None else kind.run(context, notes, data, at)
                if end == at:
                    return
                reader.pull_bytes(end - at)

        for before, number, flags, kind, part in self._entries(reader, load_runs):
            if kind is not None:
                values = pull_all(kind.layout, part)
                if kind.check is not None:
                    kind.check(notes, part, *values)
                kind.load(context, part, *values)
            elif flags & REQUIRED:
                raise UnknownEntryError(self.name, number, before, max(self._known, default=END))
            else:
                unknown[number] += 1
        if unknown:
            types = ", ".join(map(str, sorted(unknown)[:SHOWN_TYPES])) + (" ..." if len(unknown) > SHOWN_TYPES else "")
            count = unknown.total()
            log.info("%s: %d entries of types not known here were passed over: %s", self.name, count, types)
        if self._loaded is not None:
            self._loaded(context)

    def _inspect(self, reader: Reader) -> Iterator[Item]:
        notes = self._notes()
        numbers: Counter[str] = Counter()
        for offset, number, flags, kind, part in self._entries(reader):
            size = HEAD.size + part.left
            if kind is not None:
                values: list[Any] = []
                for shown in show_all(kind.layout, part, values):
                    if kind.numbered and shown.keys() - {BEYOND}:
                        shown = {"number": numbers[kind.name], **shown}
                        numbers[kind.name] += 1
                    yield Item(offset, size, kind.name, shown)
                if kind.check is not None:
                    kind.check(notes, part, *values)
            else:
                rule = "must be understood" if flags & REQUIRED else "may be skipped"
                yield Item(offset, size, f"entry of type {number}", {BEYOND: part.left, "rule": rule})
        size = HEAD.size + 4
        yield Item(reader.offset - size, size, "check value", {"crc32": "right"})

    def _entries(
        self, reader: Reader, before_each: Callable[[], None] | None = None
    ) -> Iterator[tuple[int, int, int, Kind[Context] | None, Part]]:
        """Offset, type, flags, kind if known, and payload of each entry; at the end the check value is compared."""
        reader.begin_check()
        while True:
            reader.check_cancelled()
            if before_each is not None:
                before_each()
            before, check = reader.offset, reader.check
            number, flags, length = HEAD.unpack(reader.pull_bytes(HEAD.size))
            if number == END:
                break
            kind = self._known.get(number)
            part = Part(reader, kind.name if kind else f"entry of type {number}", length)
            yield before, number, flags, kind, part
            part.skip()
        if (flags, length) != (REQUIRED, 4):
            raise reader.bad("end", "head", f"{flags:#x}, {length}", "must be 0x1, 4", 6)
        said = reader.pull_u32()
        if said != check:
            raise DamagedError(self.name, before, said, check)
