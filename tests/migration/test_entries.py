# SPDX-License-Identifier: GPL-2.0-or-later
"""A device whose state is entries, and its relatives: an older one, and a newer one that says more."""

from __future__ import annotations

import io
import logging
import tracemalloc
import zlib
from typing import Any, NamedTuple

import pytest

from godwit.migration import (
    BadRecordError,
    DamagedError,
    Direction,
    Entries,
    Field,
    Kind,
    Migration,
    Outcome,
    Part,
    Record,
    TrailingDataError,
    TruncatedError,
    UnknownEntryError,
    Version,
)
from godwit.migration.entries import END, HEAD, Push
from godwit.migration.layout import Many, One
from godwit.migration.section import octets, u8, u32

MAGIC = 0x1122334455667788


class Old(NamedTuple):
    number: int
    name: bytes


class New(NamedTuple):
    number: int
    name: bytes
    mode: int
    level: int


class Device:
    def __init__(self) -> None:
        self.seen: list[object] = []


COUNT = Field("number", u32, "", range(1000))
NAME = Field("name", octets(4))
OLD = Record("thing", (COUNT, NAME), Old)
NEW = Record("thing", (COUNT, NAME, Field("mode", u8, "", range(4), default=2), Field("level", u32, default=7)), New)


def kind(record: Record[Any], number: int = 1, *, required: bool = True) -> Kind[Device]:
    return Kind(number, "thing", (One(record),), take, required=required)


def take(device: Device, _part: Part, value: object) -> None:
    device.seen.append(value)


def device_versions(*kinds: Kind[Device], save: object = None) -> tuple[Version[Device], ...]:
    def write(_device: Device, push: Push) -> None:
        push(kinds[0], save)

    entries = Entries("things", kinds, write, loaded=lambda device: device.seen.append("all"))
    return (Version(1, (entries,)),)


def entry(number: int, payload: bytes, flags: int = 1) -> bytes:
    return HEAD.pack(number, flags, len(payload)) + payload


def stream(*entries: bytes, check: int | None = None) -> bytes:
    body = b"".join(entries)
    value = zlib.crc32(body) if check is None else check
    header = device_versions(kind(OLD))[0].header(MAGIC).pack()
    return header + body + entry(END, value.to_bytes(4, "big"))


def load(data: bytes, *kinds: Kind[Device]) -> tuple[list[object], Outcome]:
    device = Device()
    transfer: Migration[Device] = Migration(device_versions(*kinds), device, magic=MAGIC)
    transfer.request(io.BytesIO(data), Direction.TARGET)
    return device.seen, transfer.run()


def test_what_is_written_is_read() -> None:
    file = io.BytesIO()
    transfer: Migration[Device] = Migration(device_versions(kind(OLD), save=Old(7, b"name")), Device(), magic=MAGIC)
    transfer.request(file, Direction.SOURCE)
    assert transfer.run()
    assert file.getvalue() == stream(entry(1, OLD.sized(Old(7, b"name"))))
    assert load(file.getvalue(), kind(OLD))[0] == [Old(7, b"name"), "all"]


def test_older_and_newer_writers_are_read() -> None:
    """A field that was added has its default; one that is not known yet is passed over; and so is what is behind."""
    old, new = OLD.sized(Old(7, b"name")), NEW.sized(New(8, b"eman", 3, 9))
    between = b"\0\x09" + old[2:] + b"\1"  # of the version that had `mode` already
    data = stream(entry(1, old), entry(1, between), entry(1, new), entry(1, old + b"and more"))
    seen, outcome = load(data, kind(NEW))
    assert outcome
    assert seen == [New(7, b"name", 2, 7), New(7, b"name", 1, 7), New(8, b"eman", 3, 9), New(7, b"name", 2, 7), "all"]
    seen, outcome = load(data, kind(OLD))
    assert outcome
    assert seen == [Old(7, b"name"), Old(7, b"name"), Old(8, b"eman"), Old(7, b"name"), "all"]


def test_what_is_not_known_is_passed_over_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    value = entry(1, OLD.sized(Old(7, b"name")))
    with caplog.at_level(logging.INFO):
        seen, outcome = load(stream(entry(9, b"x" * 1_000_000, 0), value, entry(9, b"", 0x8000)), kind(OLD))
    assert outcome
    assert seen == [Old(7, b"name"), "all"]
    assert "things: 2 entries of types not known here were passed over: 9" in caplog.text
    many = stream(*(entry(number, b"", 0) for number in range(2, 65536)))
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert load(many, kind(OLD))[1]
    assert [message for message in caplog.messages if "passed over" in message] == [
        "things: 65534 entries of types not known here were passed over: 2, 3, 4, 5, 6, 7, 8, 9 ..."
    ]
    seen, outcome = load(stream(value, entry(9, b"x", 1)), kind(OLD))
    assert seen == [Old(7, b"name")]
    assert isinstance(outcome.error, UnknownEntryError)
    assert str(outcome.error) == (
        "things: the entry at offset 34 is of type 9, which must be understood and is not known here "
        "(the types up to 1 are): have the source write an older version of the device state"
    )


def test_what_is_passed_over_takes_no_memory() -> None:
    data = stream(entry(9, bytes(32 << 20), 0))
    tracemalloc.start()
    try:
        assert load(data, kind(OLD))[1]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - len(data) < 4 << 20  # its copy in the file object counts


def test_damage_is_noticed() -> None:
    data = stream(entry(1, OLD.sized(Old(7, b"name"))), entry(9, b"passed over", 0))
    assert load(data, kind(OLD))[1]
    for at in range(16, len(data)):
        for bit in (1, 0x80):
            changed = data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]
            seen, outcome = load(changed, kind(OLD))
            assert not outcome, at
            assert "all" not in seen, at
    outcome = load(stream(entry(1, OLD.sized(Old(7, b"name"))), check=0x12345678), kind(OLD))[1]
    assert isinstance(outcome.error, DamagedError)
    assert "its CRC-32 up to offset 34 is" in str(outcome.error)
    assert "and the source's was 12345678" in str(outcome.error)


def test_a_stream_that_is_cut_is_refused() -> None:
    data = stream(entry(1, OLD.sized(Old(7, b"name"))), entry(9, b"passed over", 0))
    for size in range(len(data)):
        seen, outcome = load(data[:size], kind(OLD))
        assert isinstance(outcome.error, TruncatedError), size
        assert "all" not in seen
    assert isinstance(load(data + b"x", kind(OLD))[1].error, TrailingDataError)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "things: thing: length is 2, and 0 bytes of it are left (at offset 24)"),
        (b"\0\x08\0\0\0\1nam", "things: thing: length is 8, and 7 bytes of it are left (at offset 26)"),
        (
            b"\0\x07\0\0\0\1nam",
            "things: thing: size is 7, must be one of [8, 9, 13], or more, up to 4096 (at offset 24)",
        ),
        (
            b"\0\x0a\0\0\0\1name\1\0",
            "things: thing: size is 10, must be one of [8, 9, 13], or more, up to 4096 (at offset 24)",
        ),
        (b"\0\x08\0\0\x03\xe8name", "things: thing: number is 1000, must be from 0 to 999 (at offset 26)"),
        (b"\0\x09\0\0\0\1name\4", "things: thing: mode is 4, must be from 0 to 3 (at offset 34)"),
    ],
)
def test_an_entry_that_is_wrong_is_named(payload: bytes, message: str) -> None:
    seen, outcome = load(stream(entry(1, payload)), kind(NEW))
    assert isinstance(outcome.error, BadRecordError)
    assert str(outcome.error) == message
    assert seen == []


def test_an_end_that_is_none() -> None:
    header = device_versions(kind(OLD))[0].header(MAGIC).pack()
    outcome = load(header + entry(END, bytes(3)), kind(OLD))[1]
    assert "things: end: head is 0x1, 3, must be 0x1, 4 (at offset 18)" in str(outcome.error)


def test_many_of_a_kind() -> None:
    def take_many(device: Device, _part: Part, flats: list[tuple[Any, ...]]) -> None:
        device.seen += map(NEW.build, flats)

    many: Kind[Device] = Kind(1, "many", (Many(NEW, 3),), take_many)
    old = OLD.sized_many([Old(1, b"name"), Old(2, b"eman")])
    seen, outcome = load(stream(entry(1, old), entry(1, NEW.sized_many([New(3, b"mean", 0, 1)]))), many)
    assert outcome
    assert seen == [New(1, b"name", 2, 7), New(2, b"eman", 2, 7), New(3, b"mean", 0, 1), "all"]
    for data, message in (
        (OLD.sized_many([Old(1, b"name")] * 4), "thing: count is 4, must be at most 3 (at offset 26)"),
        (
            OLD.sized_many([Old(1, b"name"), Old(1000, b"name")]),
            "thing 1: number is 1000, must be from 0 to 999 (at offset 38)",
        ),
        (
            OLD.sized_many([Old(1000, b"name"), Old(1, b"name")]),
            "thing 0: number is 1000, must be from 0 to 999 (at offset 30)",
        ),
        (OLD.sized_many([Old(1, b"name")])[:-1], "many: length is 8, and 7 bytes of it are left (at offset 30)"),
    ):
        outcome = load(stream(entry(1, data)), many)[1]
        assert str(outcome.error) == f"things: {message}"


def test_declarations_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="no entry can have type 0"):
        kind(OLD, END)
    with pytest.raises(ValueError, match="two kinds of one type"):
        device_versions(kind(OLD), kind(NEW))
    with pytest.raises(ValueError, match="name follows a field with a default and has none"):
        Record("thing", (COUNT, Field("mode", u8, default=1), NAME), New)
    with pytest.raises(ValueError, match="mode is the first field and has a default"):
        Record("thing", (Field("mode", u8, default=1),), Old)
    with pytest.raises(ValueError, match="inner is no scalar and cannot have a default"):
        Record("thing", (COUNT, Field("inner", OLD, default=1)), Old)


def test_a_value_that_is_no_such_record() -> None:
    nested: Record[Any] = Record("nested", (Field("thing", OLD),), tuple)
    cases: list[tuple[Record[Any], tuple[Any, ...]]] = [(OLD, (1,)), (OLD, (1, b"name", 2)), (nested, ())]
    for record, value in cases:
        with pytest.raises(ValueError, match=r"values for 2 fields|argument 2 is shorter"):
            record.flatten(value)
