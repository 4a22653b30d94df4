# SPDX-License-Identifier: GPL-2.0-or-later
"""Declared records, and the stages that are nothing but one.

A ``Record`` is a tuple of ``Field``: name, kind, what it means, which values
it may have. From that one declaration come the encoding, the decoding, the
validation, the documentation and (field names with offsets) what an inspector
shows. A record has a fixed length and no padding.

Whoever handles many records uses ``unpack``, ``check`` and ``pack``: these work
on the flat tuple of the record's integers and byte strings and look at nothing
but compiled tables. ``decode`` and ``encode`` build and take apart the nested
values that the declaration describes.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, NamedTuple, TypeVar

from godwit.migration.errors import BadRecordError
from godwit.migration.stream import Puller, Reader, Writer
from godwit.migration.version import Context, Item, Stage

#: One integer or byte string of a record.
Scalar = int | bytes
Value = TypeVar("Value")

#: Bytes that a later version may make of a record: thousands of one kind are in memory at once.
MAX_RECORD: Final = 4096

_LITTLE: Final = sys.byteorder == "little"
_SIZE: Final = struct.Struct(">H")
_COUNT: Final = struct.Struct(">I")


class Leaf(NamedTuple):
    """One scalar of a record: ``offset`` in bytes from its start, ``code`` for ``struct``."""

    name: str
    offset: int
    size: int
    code: str
    native: bool
    allowed: Collection[Scalar] | None
    why: str
    show: Callable[[Any], str] | None = None


class Scalars(NamedTuple):
    """The kind of an integer or of a byte string."""

    name: str
    code: str
    native: bool = False

    @property
    def size(self) -> int:
        """Bytes of one value."""
        return struct.calcsize(">" + self.code)


@dataclass(frozen=True)
class Array:
    """``count`` values of one kind, one after another."""

    kind: Kind
    count: int

    @property
    def size(self) -> int:
        """Bytes of the whole array."""
        return self.count * self.kind.size

    @property
    def name(self) -> str:
        """The kind as documentation writes it."""
        return f"{self.kind.name}[{self.count}]"


u8: Final = Scalars("u8", "B")
u16: Final = Scalars("u16", "H")
u32: Final = Scalars("u32", "I")
u64: Final = Scalars("u64", "Q")
#: Integers in the byte order of the machine that wrote them: for formats that have such, not for new ones.
native_u16: Final = Scalars("u16, byte order of the machine", "H", True)
native_u32: Final = Scalars("u32, byte order of the machine", "I", True)
native_u64: Final = Scalars("u64, byte order of the machine", "Q", True)


def octets(count: int) -> Scalars:
    """The kind of a byte string of ``count`` bytes."""
    return Scalars(f"{count} bytes", f"{count}s")


def array(kind: Kind, count: int) -> Array:
    """The kind of ``count`` values of ``kind``."""
    return Array(kind, count)


class Field(NamedTuple):
    """One field: ``allowed`` holds every value it may have (a range, a frozenset); None: all.

    For an array, ``allowed`` is about each element. ``why`` says what is
    allowed, for messages and documentation; by default it is made from ``allowed``.
    ``default`` is for fields that were added later, behind all others: what they
    are where an older writer did not have them (`Record.pull_sized`). ``show``
    makes a value readable for people.
    """

    name: str
    kind: Kind
    doc: str = ""
    allowed: Collection[Scalar] | None = None
    why: str = ""
    default: Scalar | None = None
    show: Callable[[Any], str] | None = None

    @property
    def rule(self) -> str:
        """What is allowed, as a phrase; empty when everything is."""
        return self.why or ("" if self.allowed is None else _phrase(self.allowed))


class UnsoundError(Exception):
    """Raised by a record's own check: which leaf (by index), and why."""

    def __init__(self, leaf: int, why: str) -> None:
        super().__init__(why)
        self.leaf = leaf
        self.why = why


class Record(Generic[Value]):
    """A declared record.

    ``make`` takes the fields' values, in order, and gives the value of the
    record; ``fields_of`` takes it apart again (not needed for a tuple).
    ``check`` is given the flat tuple and raises ``UnsoundError`` for what no field
    can know of itself.
    """

    def __init__(
        self,
        name: str,
        fields: Sequence[Field],
        make: Callable[..., Value],
        *,
        fields_of: Callable[[Value], Sequence[Any]] | None = None,
        check: Callable[[tuple[Any, ...]], None] | None = None,
        doc: str = "",
    ) -> None:
        self.name = name
        self.fields = tuple(fields)
        self.doc = doc
        self._make = make
        self._fields_of = fields_of
        self._own_check = check
        self.leaves = tuple(_leaves(self.fields))
        self.struct = struct.Struct(">" + "".join(leaf.code for leaf in self.leaves))
        self.size = self.struct.size
        self._swapped = tuple(
            (index, leaf.size) for index, leaf in enumerate(self.leaves) if leaf.native and _LITTLE and leaf.size > 1
        )
        self._allowed = tuple(
            (index, leaf.allowed) for index, leaf in enumerate(self.leaves) if leaf.allowed is not None
        )
        # Then a value is its own flat tuple, which is the quick case.
        self._is_flat = all(isinstance(field.kind, Scalars) for field in self.fields)
        self._sizes, self._defaults = _growth(self.name, self.fields)

    def unpack(self, data: bytes) -> tuple[Any, ...]:
        """The scalars in ``data``, which is ``size`` bytes long, in the order of ``leaves``. Checks nothing."""
        flat = self.struct.unpack(data)
        return self._swap(flat) if self._swapped else flat

    def unpack_many(self, data: bytes) -> list[tuple[Any, ...]]:
        """``unpack`` for a whole number of records, one after another."""
        if not self._swapped:
            return list(self.struct.iter_unpack(data))
        return [self._swap(flat) for flat in self.struct.iter_unpack(data)]

    def pack(self, flat: Sequence[Any]) -> bytes:
        """The bytes of a flat tuple.

        :raises struct.error: a value does not fit.
        """
        return self.struct.pack(*(self._swap(tuple(flat)) if self._swapped else flat))

    def check(self, flat: tuple[Any, ...]) -> None:
        """:raises UnsoundError: a value is not allowed."""
        for index, allowed in self._allowed:
            if flat[index] not in allowed:
                raise UnsoundError(index, self.leaves[index].why)
        if self._own_check is not None:
            self._own_check(flat)

    def decode(self, data: bytes) -> Value:
        """The value in ``data``.

        :raises UnsoundError: a value is not allowed.
        """
        flat = self.unpack(data)
        self.check(flat)
        return self.build(flat)

    def encode(self, value: Value) -> bytes:
        """The bytes of ``value``.

        :raises UnsoundError: a value is not allowed.
        """
        flat = self.flatten(value)
        self.check(flat)
        return self.pack(flat)

    def build(self, flat: tuple[Any, ...]) -> Value:
        """The nested value of a flat tuple."""
        if self._is_flat:
            return self._make(*flat)
        scalars = iter(flat)
        return self._make(*(_build(field.kind, scalars) for field in self.fields))

    def flatten(self, value: Value) -> tuple[Any, ...]:
        """The flat tuple of a nested value."""
        flat: list[Any] = []
        if self._fields_of is not None:
            parts = self._fields_of(value)
        elif isinstance(value, tuple):
            parts = value
        else:
            raise TypeError(f"{self.name}: {type(value).__name__} is no tuple, and fields_of was not given")
        if self._is_flat:
            if len(parts) != len(self.fields):
                raise ValueError(f"{self.name}: {len(parts)} values for {len(self.fields)} fields")
            return tuple(parts)
        for field, part in zip(self.fields, parts, strict=True):
            _flatten(field.kind, part, flat)
        return tuple(flat)

    def pull(self, reader: Puller, name: str = "") -> Value:
        """Read one record; ``name`` is what messages call it.

        :raises TruncatedError: the stream ends within it.
        :raises BadRecordError: a value is not allowed.
        """
        flat = self.unpack(reader.pull_bytes(self.size))
        self.check_pulled(flat, reader, self.size, name)
        return self.build(flat)

    def check_pulled(self, flat: tuple[Any, ...], reader: Puller, pulled: int, name: str = "") -> None:
        """``check`` for what was read: ``pulled`` bytes of the stream ago the record began.

        :raises BadRecordError: a value is not allowed.
        """
        try:
            self.check(flat)
        except UnsoundError as error:
            raise self.bad(error, flat, reader, pulled, name) from None

    def bad(
        self, error: UnsoundError, flat: tuple[Any, ...], reader: Puller, pulled: int, name: str = ""
    ) -> BadRecordError:
        """What ``check_pulled`` raises, for those who check very many and make their names only then."""
        leaf = self.leaves[error.leaf]
        return reader.bad(name or self.name, leaf.name, flat[error.leaf], error.why, pulled - leaf.offset)

    def push(self, writer: Writer, value: Value) -> None:
        """Write one record.

        :raises ValueError: a value is not allowed: the device's fault.
        """
        try:
            writer.push_bytes(self.encode(value))
        except UnsoundError as error:
            raise ValueError(f"{self.name}: {self.leaves[error.leaf].name} {error.why}") from None
        except struct.error as error:
            raise ValueError(f"{self.name}: {error}") from None

    def sized(self, value: Value | bytes) -> bytes:
        """The bytes of ``value`` behind their number (u16): a record that later versions may add fields to.

        ``value`` may be what ``encode`` has given, where that was asked before.

        :raises UnsoundError: a value is not allowed.
        """
        return _SIZE.pack(self.size) + (value if isinstance(value, bytes) else self.encode(value))

    def pull_sized(self, reader: Puller, name: str = "") -> Value:
        """Read what ``sized`` gives, of this version, an older or a newer one.

        Fields that the writer did not know get their defaults; those that it
        knew beyond ours are passed over.

        :raises TruncatedError: the stream ends within it.
        :raises BadRecordError: a value is not allowed, or no version had that size.
        """
        size = self._pull_size(reader, name)
        return self.build(self._grown(reader, reader.pull_bytes(size), size, name))

    def sized_many(self, flats: Sequence[Sequence[Any]]) -> bytes:
        """The bytes of flat tuples that passed ``check``, behind the size of one (u16) and their number (u32)."""
        return b"".join((_SIZE.pack(self.size), _COUNT.pack(len(flats)), *map(self.pack, flats)))

    def packed_many(self, records: bytes) -> bytes:
        """The same for records that are packed already."""
        return _SIZE.pack(self.size) + _COUNT.pack(len(records) // self.size) + records

    def pull_sized_many(self, reader: Puller, limit: int, name: str = "") -> list[tuple[Any, ...]]:
        """Read what ``sized_many`` gives, as flat tuples; at most ``limit`` of them. Raises as ``pull_sized``."""
        return self.unpack_many(self.pull_packed_many(reader, limit, None, name))

    def pull_packed_many(
        self, reader: Puller, limit: int, odd: Callable[[bytes], Sequence[int]] | None = None, name: str = ""
    ) -> bytes:
        """The same as the bytes of the records, each as large as it is here.

        ``odd`` may know which of them are not surely sound, by their place: then the others are not looked at here.
        """
        size = self._pull_size(reader, name)
        (count,) = _COUNT.unpack(reader.pull_bytes(_COUNT.size))
        if count > limit:
            raise reader.bad(name or self.name, "count", count, f"must be at most {limit}", _COUNT.size)
        data = reader.pull_bytes(size * count)
        if size != self.size:
            data = b"".join(self._fitted(data[at : at + size]) for at in range(0, len(data), size))
        for number in range(count) if odd is None else odd(data):
            flat = self.unpack(data[number * self.size : (number + 1) * self.size])
            self.check_pulled(flat, reader, (count - number) * size, f"{name or self.name} {number}")
        return data

    def _pull_size(self, reader: Puller, name: str) -> int:
        (size,) = _SIZE.unpack(reader.pull_bytes(_SIZE.size))
        if size not in self._sizes and not self.size < size <= MAX_RECORD:
            why = f"must be one of {sorted(self._sizes)}, or more, up to {MAX_RECORD}"
            raise reader.bad(name or self.name, "size", size, why, 2)
        return int(size)

    def _grown(self, reader: Puller, data: bytes, pulled: int, name: str) -> tuple[Any, ...]:
        """The checked scalars of a record as another version wrote it; ``pulled`` as for ``check_pulled``."""
        flat = self.unpack(self._fitted(data))
        self.check_pulled(flat, reader, pulled, name)
        return flat

    def _fitted(self, data: bytes) -> bytes:
        """A record as another version wrote it, without what is not known here, and with defaults for what lacks."""
        lacking = self.size - len(data)
        return data[: self.size] if lacking <= 0 else data + self._defaults[len(self._defaults) - lacking :]

    def index(self, name: str) -> int:
        """The place of the leaf of that name in a flat tuple."""
        return next(index for index, leaf in enumerate(self.leaves) if leaf.name == name)

    def _swap(self, flat: tuple[Any, ...]) -> tuple[Any, ...]:
        values = list(flat)
        for index, size in self._swapped:
            value = values[index]
            if size == 2:
                values[index] = (value >> 8) | (value & 0xFF) << 8
            else:
                values[index] = int.from_bytes(value.to_bytes(size, "little"), "big")
        return tuple(values)


Kind = Scalars | Array | Record[Any]


class Section(Stage[Context], Generic[Context, Value]):
    """A stage that is one record.

    ``get(context)`` gives the value to save, ``put(context, value)`` takes what
    was loaded (and validated); the other callbacks are a ``Stage``'s.
    """

    def __init__(
        self,
        name: str,
        record: Record[Value],
        get: Callable[[Context], Value],
        put: Callable[[Context, Value], None],
        *,
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
            doc=doc or record.doc,
        )
        self.record = record
        self._get = get
        self._put = put

    def _save(self, context: Context, writer: Writer) -> None:
        self.record.push(writer, self._get(context))

    def _load(self, context: Context, reader: Reader) -> None:
        self._put(context, self.record.pull(reader))

    def _inspect(self, reader: Reader) -> Iterator[Item]:
        offset = reader.offset
        value = self.record.pull(reader)
        yield Item(offset, self.record.size, self.name, shown(self.record, self.record.flatten(value)))


def _growth(name: str, fields: Sequence[Field]) -> tuple[frozenset[int], bytes]:
    """The sizes that a record has had, its present one included, and the bytes of its defaults."""
    sizes: set[int] = set()
    size, defaults = 0, b""
    for field in fields:
        if field.default is None and defaults:
            raise ValueError(f"{name}: {field.name} follows a field with a default and has none")
        if field.default is not None:
            if not size:
                raise ValueError(f"{name}: {field.name} is the first field and has a default")
            if not isinstance(field.kind, Scalars):
                raise ValueError(f"{name}: {field.name} is no scalar and cannot have a default")
            sizes.add(size)
            defaults += struct.pack(">" + field.kind.code, field.default)
        size += field.kind.size
    return frozenset(sizes | {size}), defaults


def shown(record: Record[Any], flat: Sequence[Scalar]) -> dict[str, int | str]:
    """The scalars of a record by their names, as people and programs read them: numbers and texts."""
    found: dict[str, int | str] = {}
    for leaf, value in zip(record.leaves, flat, strict=True):
        if leaf.show is not None:
            found[leaf.name] = leaf.show(value)
        else:
            found[leaf.name] = value.hex(":") if isinstance(value, bytes) else value
    return found


def _phrase(allowed: Collection[Scalar]) -> str:
    """``allowed`` in words."""
    if isinstance(allowed, range) and len(allowed):
        last = allowed[-1]
        step = f"a multiple of {allowed.step} " if allowed.step > 1 else ""
        return f"must be {step}from {allowed[0]} to {last}"
    shown = sorted(value.hex() if isinstance(value, bytes) else str(value) for value in allowed)
    return "must be one of " + ", ".join(shown)


def _leaves(fields: Sequence[Field], prefix: str = "", offset: int = 0) -> list[Leaf]:
    """The scalars of ``fields`` in the order of the stream."""
    leaves: list[Leaf] = []
    for field in fields:
        leaves += _kind_leaves(field.kind, prefix + field.name, offset, field)
        offset += field.kind.size
    return leaves


def _kind_leaves(kind: Kind, name: str, offset: int, field: Field) -> list[Leaf]:
    if isinstance(kind, Scalars):
        return [Leaf(name, offset, kind.size, kind.code, kind.native, field.allowed, field.rule, field.show)]
    if isinstance(kind, Record):
        return _leaves(kind.fields, name + ".", offset)
    leaves: list[Leaf] = []
    for number in range(kind.count):
        leaves += _kind_leaves(kind.kind, f"{name}[{number}]", offset + number * kind.kind.size, field)
    return leaves


def _build(kind: Kind, scalars: Any) -> Any:
    if isinstance(kind, Scalars):
        return next(scalars)
    if isinstance(kind, Record):
        return kind._make(*(_build(field.kind, scalars) for field in kind.fields))
    return tuple(_build(kind.kind, scalars) for _ in range(kind.count))


def _flatten(kind: Kind, value: Any, flat: list[Any]) -> None:
    if isinstance(kind, Scalars):
        flat.append(value)
    elif isinstance(kind, Record):
        flat.extend(kind.flatten(value))
    else:
        if len(value) != kind.count:
            raise ValueError(f"{len(value)} values for an array of {kind.count}")
        for element in value:
            _flatten(kind.kind, element, flat)
