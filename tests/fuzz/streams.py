# SPDX-License-Identifier: GPL-2.0-or-later
"""Device-state streams out of their declarations: sound ones, and what may become of them on the way.

A new field, record or kind of entry is made and mutated as soon as it is declared.
All is drawn from a ``random.Random``, which whoever asks has seeded.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

from godwit.dataplane.state import FlowState, SocketState
from godwit.migration import MAGIC, BadRecordError, Header, Kind, Part, Reader, Record, UnsoundError
from godwit.migration.entries import END, HEAD, REQUIRED
from godwit.migration.layout import Data, Many, Number, One, Packed, Text
from godwit.migration.section import MAX_RECORD, Leaf
from godwit.net import native
from godwit.net.records import FLOW, LOST, OBSERVED, SOCKET, STATE_LOST, V4_MAPPED
from godwit.net.versions import versions

LONGEST: Final = 300  # bytes of a queue or the like that is made here
MOST: Final = 8  # flows; entries twice as many
NATIVE: Final = native.NATIVE
TRIES: Final = 40  # until what was drawn is sound
ADDRESSES: Final = (
    *(V4_MAPPED + bytes(address) for address in ((10, 9, 0, 2), (127, 0, 0, 1), (224, 0, 0, 1), (255,) * 4)),
    *(bytes.fromhex(address) + bytes(12) + b"\1" for address in ("200100", "fe8000", "ff0200", "000000")),
    bytes(16),
)
KINDS: Final = {kind.type: kind for kind in native.ENTRIES.kinds}
HEADER: Final = Header.size()
FLOWS_AT: Final = HEADER + OBSERVED.size + 4  # in a stream of version 2


def header(number: int) -> bytes:
    """That of a stream of a version that we write."""
    return next(version for version in versions() if version.id == number).header(MAGIC).pack()


# ---- values


def octets(rng: Random, count: int) -> bytes:
    """Any bytes."""
    return rng.getrandbits(8 * count).to_bytes(count, "big") if count else b""


def allowed(rng: Random, leaf: Leaf) -> int | bytes:
    """A value that the field may have; edges and small ones often."""
    if leaf.code.endswith("s"):
        return rng.choice(ADDRESSES) if leaf.size == 16 and rng.randrange(4) else octets(rng, leaf.size)
    values = range(1 << 8 * leaf.size) if leaf.allowed is None else leaf.allowed
    if not isinstance(values, range):
        return rng.choice(sorted(values))
    count = (values[-1] - values[0]) // values.step + 1  # which may be more than len() can say
    place = rng.randrange(5)
    if place < 3:
        return values[rng.randrange(min(count, 4 if place < 2 else LONGEST))]
    return values[-1 if place == 3 else rng.randrange(count)]


def anything(rng: Random, leaf: Leaf) -> bytes:
    """Bytes for the field, which need not be allowed."""
    if leaf.code.endswith("s") or not rng.randrange(3):
        return octets(rng, leaf.size) if rng.randrange(2) else rng.choice((b"\0", b"\xff")) * leaf.size
    value = allowed(rng, leaf)
    assert isinstance(value, int)
    most = (1 << 8 * leaf.size) - 1
    return ((value + rng.choice((-1, 0, 1))) & most).to_bytes(leaf.size, rng.choice(("big", "big", "little")))


def sound(rng: Random, record: Record[Any]) -> tuple[Any, ...]:
    """The flat tuple of a record that passes every check."""
    flat = [allowed(rng, leaf) for leaf in record.leaves]
    while True:
        try:
            record.check(tuple(flat))
        except UnsoundError as error:
            for index in {error.leaf, max(0, error.leaf - 1)}:  # it may be the one before that is wrong
                flat[index] = allowed(rng, record.leaves[index])
        else:
            return tuple(flat)


def sound_socket(rng: Random) -> SocketState:
    """One with queues of a handy length."""
    return SocketState._make(sound(rng, SOCKET))._replace(
        sndq=(sndq := rng.randrange(LONGEST)), notsent=rng.randrange(sndq + 1), rcvq=rng.randrange(LONGEST)
    )


def sound_flow(rng: Random, record: Record[FlowState]) -> FlowState:
    """A flow as that record has it."""
    return record.build(sound(rng, record))


# ---- whole streams


def payload(rng: Random, kind: Kind[Any], notes: Any) -> bytes | None:
    """What an entry of that kind holds that is sound beside those before; None: nothing was found."""
    values: list[Any] = []
    for element in kind.layout:
        match element:
            case Number():
                values.append(rng.randrange(4))
            case One(record):
                values.append(record.build(sound(rng, record)))
            case Packed(record, most):
                values.append(b"".join(record.pack(sound(rng, record)) for _ in range(rng.randrange(min(4, most + 1)))))
            case Many(record, most):
                values.append([sound(rng, record) for _ in range(rng.randrange(min(4, most + 1)))])
            case Data():
                size = element.size(values)
                if size > LONGEST:
                    return None
                values.append(octets(rng, size))
            case Text(_, most):
                values.append("".join(rng.choice("a\tb\n\x1b\u202e\U0001f600=1") for _ in range(rng.randrange(20))))
            case _:
                raise TypeError(f"say here how a {type(element).__name__} is made")
    if kind.check is not None:
        try:
            kind.check(notes, Part(Reader(io.BytesIO()), kind.name, 0), *values)
        except BadRecordError:
            return None
    return b"".join(element.push(value) for element, value in zip(kind.layout, values, strict=True))


def entry(kind: int, data: bytes, flags: int = REQUIRED) -> bytes:
    """One entry."""
    return HEAD.pack(kind, flags, len(data)) + data


def entries(rng: Random) -> list[bytes]:
    """Entries that a target takes, in their order."""
    notes = native.ENTRIES._notes()
    made: list[bytes] = []
    for place in range(rng.randrange(2 * MOST)):
        number = native.FLOWS_KIND.type if place == 0 and rng.randrange(4) else rng.choice(sorted(KINDS))
        for _ in range(TRIES):
            data = payload(rng, KINDS[number], notes)
            if data is not None:
                made.append(entry(number, data, REQUIRED * KINDS[number].required))
                break
    return made


def socket_bytes(rng: Random) -> bytes:
    """A socket of version 2 with its queues, or a lost one."""
    if not rng.randrange(5):
        return LOST
    made = sound_socket(rng)
    return SOCKET.pack(made) + octets(rng, made.sndq + made.rcvq)


@dataclass
class Stream:
    """A stream in parts that can be exchanged."""

    head: bytes  # up to the flows, or to the entries
    flows: list[bytes] = field(default_factory=list)  # version 2
    parts: list[bytes] = field(default_factory=list)  # sockets, or entries
    rest: bytes = b""

    @property
    def native(self) -> bool:
        """Whether it is of our version."""
        return int.from_bytes(self.head[8:12], "big") >= NATIVE

    @classmethod
    def parse(cls, data: bytes) -> Stream:
        """As a reader finds the parts, whatever is in them."""
        if int.from_bytes(data[8:12], "big") >= NATIVE:
            made, at = cls(data[:HEADER]), HEADER
            while at + HEAD.size <= len(data):
                kind, _, length = HEAD.unpack_from(data, at)
                if kind == END:
                    break
                made.parts.append(data[at : at + HEAD.size + length])
                at += HEAD.size + length
        else:
            made, at = cls(data[:FLOWS_AT]), FLOWS_AT
            count = min(int.from_bytes(data[FLOWS_AT - 4 : FLOWS_AT], "big"), len(data) // FLOW.size)
            for _ in range(count):
                made.flows.append(data[at : at + FLOW.size])
                at += FLOW.size
            while at + SOCKET.size <= len(data) and len(made.parts) < count:
                found = SocketState._make(SOCKET.unpack(data[at : at + SOCKET.size]))
                queues = 0 if found.tcpi_state == STATE_LOST else found.sndq + found.rcvq
                made.parts.append(data[at : at + SOCKET.size + queues])
                at += len(made.parts[-1])
        made.rest = data[at:]
        return made

    @classmethod
    def made(cls, rng: Random, number: int) -> Stream:
        """One that a target takes."""
        head = header(number)
        if number == NATIVE:
            return cls(head, parts=entries(rng), rest=entry(END, bytes(4)))
        count = rng.randrange(MOST)
        flows = [FLOW.pack(sound(rng, FLOW)) for _ in range(count)]
        return cls(
            head + OBSERVED.pack(sound(rng, OBSERVED)) + bytes(4), flows, [socket_bytes(rng) for _ in range(count)]
        )

    def as_it_is(self) -> bytes:
        """The bytes, with nothing made right."""
        return b"".join((self.head, *self.flows, *self.parts, self.rest))

    def repaired(self) -> bytes:
        """With a count, or with an end and a check value, that a reader finds right as far as it gets."""
        if not self.native:
            return b"".join((self.head[: FLOWS_AT - 4], len(self.flows).to_bytes(4, "big"), self.as_it_is()[FLOWS_AT:]))
        found = Stream.parse(self.as_it_is())  # the lengths may be others now
        body = b"".join(found.parts)
        end = found.rest[HEAD.size + 4 :]
        return found.head + body + entry(END, zlib.crc32(body).to_bytes(4, "big")) + end


# ---- what may become of them


def leaves(part: bytes, record: Record[Any], at: int) -> Iterator[tuple[int, Leaf]]:
    """The places of a record's fields."""
    for leaf in record.leaves:
        if at + leaf.offset + leaf.size <= len(part):
            yield at + leaf.offset, leaf


def _number(code: str, values: range | None = None) -> Leaf:
    """A place that is no field's."""
    return Leaf("", 0, struct.calcsize(">" + code), code, False, values, "")


U16, U32 = _number("H"), _number("I")


def places(part: bytes) -> list[tuple[int, Leaf]]:
    """Of an entry: its head, and each number, size and field in it."""
    found: list[tuple[int, Leaf]] = [(0, U16), (2, U16), (4, U32)]
    kind = KINDS.get(int.from_bytes(part[:2], "big"))
    at = HEAD.size
    for element in kind.layout if kind else ():
        match element:
            case Number():
                found.append((at, U32))
                at += 4
            case One(record):
                found += [(at, _number("H", range(record.size, MAX_RECORD + 1))), *leaves(part, record, at + 2)]
                at += 2 + int.from_bytes(part[at : at + 2], "big")
            case Many(record, most):
                found.append((at, _number("H", range(record.size, MAX_RECORD + 1))))
                found.append((at + 2, _number("I", range(most + 1))))
                size = int.from_bytes(part[at : at + 2], "big")
                for first in range(at + 6, len(part), max(1, size))[:4]:
                    found += leaves(part, record, first)
                at = len(part)
            case _:
                break
    return [(at, leaf) for at, leaf in found if at + leaf.size <= len(part)]


def put(data: bytes, at: int, new: bytes) -> bytes:
    """With ``new`` in place of what is there."""
    return data[:at] + new + data[at + len(new) :]


def change_field(rng: Random, stream: Stream, _other: Stream) -> None:
    """One field, number, length or count."""
    sections = [section for section in (stream.flows, stream.parts) if section]
    if not sections or not rng.randrange(16):
        if stream.native:
            at, leaf = rng.choice([(8, U32), (12, U32)])
        else:
            at, leaf = rng.choice([(8, U32), (12, U32), *leaves(stream.head, OBSERVED, HEADER)])
        stream.head = put(stream.head, at, anything(rng, leaf))
        return
    section = rng.choice(sections)
    number = rng.randrange(len(section))
    part = section[number]
    record = FLOW if section is stream.flows else SOCKET
    spots = places(part) if stream.native else list(leaves(part, record, 0))
    if spots:
        at, leaf = rng.choice(spots)
        section[number] = put(part, at, anything(rng, leaf))


def announce(rng: Random, stream: Stream, _other: Stream) -> None:
    """Something says that the most follows that may follow."""
    if not stream.parts:
        return
    number = rng.randrange(len(stream.parts))
    part = stream.parts[number]
    if stream.native:
        part = put(part, 4, b"\x7f\xff\xff\xff")
    for at, leaf in places(part) if stream.native else leaves(part, SOCKET, 0):
        if isinstance(leaf.allowed, range) and rng.randrange(2):
            part = put(part, at, int(leaf.allowed[-1]).to_bytes(leaf.size, "big"))
    stream.parts[number] = part


def change_bytes(rng: Random, stream: Stream, _other: Stream) -> None:
    """A part becomes longer, shorter, or another at one place; the head of an entry says so."""
    if not stream.parts:
        return
    number = rng.randrange(len(stream.parts))
    part = stream.parts[number]
    at = rng.randrange(len(part)) if part else 0
    match rng.randrange(3):
        case 0:
            part = part[:at] + octets(rng, rng.randrange(1, 9)) + part[at:]
        case 1:
            part = part[:at] + part[at + rng.randrange(1, 9) :]
        case _:
            part = put(part, at, octets(rng, 1))
    if stream.native and rng.randrange(8):
        part = put(part, 4, max(0, len(part) - HEAD.size).to_bytes(4, "big"))
    stream.parts[number] = part


def move_parts(rng: Random, stream: Stream, other: Stream) -> None:
    """A part is there twice, or not at all, elsewhere, or comes from another stream."""
    section = rng.choice([stream.flows, stream.parts])
    if stream.native != other.native:
        other = stream
    theirs = other.flows if section is stream.flows else other.parts
    at = rng.randrange(len(section) + 1)
    kind = rng.randrange(4)
    if kind == 0 and theirs:
        section.insert(at, rng.choice(theirs))
    elif kind == 1 and at < len(section):
        del section[at]
    elif kind == 2 and section:
        section.insert(at, section.pop(rng.randrange(len(section))))
    elif theirs:
        section[at:] = theirs[rng.randrange(len(theirs)) :]


def add_part(rng: Random, stream: Stream, _other: Stream) -> None:
    """A sound part more, or an entry of no kind that we know."""
    if not stream.native:
        stream.flows.append(FLOW.pack(sound(rng, FLOW)))
        stream.parts.append(socket_bytes(rng))
        return
    made = [entry(rng.choice((9, 77, 0xFFFF)), octets(rng, rng.randrange(9)), rng.randrange(4))]
    if rng.randrange(3):
        made = entries(rng) or made
    at = rng.randrange(len(stream.parts) + 1)
    stream.parts[at:at] = [rng.choice(made)]


def change_end(rng: Random, stream: Stream, _other: Stream) -> None:
    """Something follows, or the end is another."""
    stream.rest = stream.rest[: rng.randrange(len(stream.rest) + 1)] + octets(rng, rng.randrange(3))


CHANGES: Final[Sequence[Callable[[Random, Stream, Stream], None]]] = (
    change_field,
    change_field,
    change_field,
    change_bytes,
    announce,
    move_parts,
    move_parts,
    add_part,
    change_end,
)


def mutated(rng: Random, data: bytes, other: bytes = b"") -> bytes:
    """Another stream, mostly one in which a reader gets far. ``other`` is one to take parts from."""
    stream, donor = Stream.parse(data), Stream.parse(other or data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice(CHANGES)(rng, stream, donor)
    made = stream.repaired() if rng.randrange(8) else stream.as_it_is()
    if not rng.randrange(16):
        made = made[: rng.randrange(len(made) + 1)]
    return made


# ---- in a file of QEMU's


def in_pieces(rng: Random, stream: bytes) -> bytes:
    """As QEMU writes it."""
    data = b""
    at = 0
    while at < len(stream):
        size = rng.randrange(24 if at == 0 else 1, 200)
        data += (length := min(size, len(stream) - at)).to_bytes(4, "big") + stream[at : at + length]
        at += size
    return data + bytes(4)


def in_file(rng: Random, *streams: bytes) -> bytes:
    """As QEMU writes them, with other things around."""
    around = [b"QEVM" + octets(rng, rng.randrange(20)), *(octets(rng, rng.randrange(20)) for _ in streams)]
    return around[0] + b"".join(in_pieces(rng, one) + other for one, other in zip(streams, around[1:], strict=True))


def out_of_file(data: bytes) -> bytes:
    """The first stream in it."""
    at = data.find(MAGIC.to_bytes(8, "big")) - 4
    stream = b""
    while 0 <= at < len(data) and (length := int.from_bytes(data[at : at + 4], "big")):
        stream += data[at + 4 : at + 4 + length]
        at += 4 + length
    return stream


def mutated_file(rng: Random, data: bytes, other: bytes = b"") -> bytes:
    """Another file for the inspector: a stream, or one of QEMU's with streams in it."""
    magic = MAGIC.to_bytes(8, "big")
    stream, donor = (one if one.startswith(magic) else out_of_file(one) for one in (data, other or data))
    if not stream:
        stream = Stream.made(rng, rng.choice((2, NATIVE))).repaired()
    made = mutated(rng, stream, donor)
    match rng.randrange(8):
        case 0 | 1 | 2:
            return made
        case 3 | 4:
            return in_file(rng, made)
        case 5:
            return in_file(rng, made, donor)
        case _:
            file = in_file(rng, made)
            return put(file, rng.randrange(len(file)), octets(rng, rng.choice((1, 4))))[: len(file)]
