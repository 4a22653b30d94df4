# SPDX-License-Identifier: GPL-2.0-or-later
"""Declared records: one declaration, both ways, and what is refused."""

from __future__ import annotations

import io
import struct
import sys
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from godwit.migration import BadRecordError, Field, Reader, Record, Section, UnsoundError, Writer
from godwit.migration.document import record_table
from godwit.migration.section import array, native_u16, native_u32, native_u64, octets, u8, u16, u32, u64


class Point(NamedTuple):
    x: int
    y: int


class Shape(NamedTuple):
    kind: int
    name: bytes
    corners: tuple[Point, Point]
    weights: tuple[int, int, int]
    total: int


POINT: Record[Point] = Record(
    "point", (Field("x", u16, "right"), Field("y", native_u16, "down", range(0, 8, 4))), Point
)
SHAPE: Record[Shape] = Record(
    "shape",
    (
        Field("kind", u8, "what it is", frozenset((1, 3))),
        Field("name", octets(3), "how it is called"),
        Field("corners", array(POINT, 2), "two of them"),
        Field("weights", array(u32, 3), "", range(100), "must be small"),
        Field("total", u64),
    ),
    Shape,
)
GOOD = Shape(3, b"abc", (Point(1, 4), Point(2, 0)), (5, 6, 7), 1 << 40)
WIRE = (
    b"\x03abc"
    + b"\0\1"
    + struct.pack("=H", 4)
    + b"\0\2"
    + struct.pack("=H", 0)
    + struct.pack(">IIIQ", 5, 6, 7, 1 << 40)
)


def test_both_ways() -> None:
    assert SHAPE.size == len(WIRE)
    assert SHAPE.encode(GOOD) == WIRE
    assert SHAPE.decode(WIRE) == GOOD
    assert SHAPE.flatten(GOOD) == SHAPE.unpack(WIRE)
    assert SHAPE.unpack_many(WIRE * 3) == [SHAPE.unpack(WIRE)] * 3


def test_leaves_name_the_place() -> None:
    assert [(leaf.name, leaf.offset) for leaf in SHAPE.leaves] == [
        ("kind", 0),
        ("name", 1),
        ("corners[0].x", 4),
        ("corners[0].y", 6),
        ("corners[1].x", 8),
        ("corners[1].y", 10),
        ("weights[0]", 12),
        ("weights[1]", 16),
        ("weights[2]", 20),
        ("total", 24),
    ]
    assert SHAPE.index("corners[1].y") == 5


def test_native_integers() -> None:
    record: Record[tuple[int, int, int, int]] = Record(
        "native",
        (Field("a", native_u16), Field("b", native_u32), Field("c", native_u64), Field("d", u32)),
        lambda *values: values,
    )
    wire = record.encode((0x0102, 0x01020304, 0x0102030405060708, 0x01020304))
    assert wire == struct.pack("=HIQ", 0x0102, 0x01020304, 0x0102030405060708) + b"\1\2\3\4"
    assert (wire[0] == 2) == (sys.byteorder == "little")
    assert record.decode(wire) == (0x0102, 0x01020304, 0x0102030405060708, 0x01020304)


@pytest.mark.parametrize(
    ("shape", "field", "why"),
    [
        (GOOD._replace(kind=2), "kind", "must be one of 1, 3"),
        (GOOD._replace(kind=0), "kind", "must be one of 1, 3"),
        (GOOD._replace(weights=(0, 100, 0)), "weights[1]", "must be small"),
        (GOOD._replace(corners=(Point(1, 4), Point(1, 8))), "corners[1].y", "must be a multiple of 4 from 0 to 4"),
        (GOOD._replace(corners=(Point(1, 3), Point(1, 0))), "corners[0].y", "must be a multiple of 4 from 0 to 4"),
    ],
)
def test_refused_both_ways(shape: Shape, field: str, why: str) -> None:
    flat = SHAPE.flatten(shape)
    data = SHAPE.pack(flat)
    leaf = SHAPE.leaves[SHAPE.index(field)]
    reader = Reader(io.BytesIO(b"12345" + data))
    reader.stage = "shapes"
    reader.pull_bytes(5)
    with pytest.raises(BadRecordError) as caught:
        SHAPE.pull(reader, "shape 8")
    error = caught.value
    assert (error.stage, error.record, error.field, error.why) == ("shapes", "shape 8", field, why)
    assert error.offset == 5 + leaf.offset
    assert str(error) == f"shapes: shape 8: {field} is {error.value}, {why} (at offset {error.offset})"
    with pytest.raises(ValueError, match="shape"):
        SHAPE.push(Writer(io.BytesIO()), shape)


def test_edges_are_accepted() -> None:
    for weight in (0, 99):
        for y in (0, 4):
            shape = GOOD._replace(weights=(weight,) * 3, corners=(Point(0, y), Point(65535, y)))
            assert SHAPE.decode(SHAPE.encode(shape)) == shape


def test_what_does_not_fit_is_the_devices_fault() -> None:
    with pytest.raises(ValueError, match="shape"):
        SHAPE.push(Writer(io.BytesIO()), GOOD._replace(total=1 << 64))
    with pytest.raises(ValueError, match="2 values for an array of 3"):
        SHAPE.encode(Shape._make((3, b"abc", GOOD.corners, (1, 2), 0)))


def test_own_check() -> None:
    def ascending(flat: tuple[int, ...]) -> None:
        if flat[0] > flat[1]:
            raise UnsoundError(1, "must not be below the first")

    record: Record[Point] = Record("pair", (Field("x", u8), Field("y", u8)), Point, check=ascending)
    assert record.decode(b"\1\1") == (1, 1)
    with pytest.raises(BadRecordError, match=r"y is 1, must not be below the first \(at offset 1\)"):
        record.pull(Reader(io.BytesIO(b"\2\1")))


def test_value_of_a_class() -> None:
    class Box:
        def __init__(self, width: int) -> None:
            self.width = width

    fields = (Field("width", u8),)
    assert Record("box", fields, Box, fields_of=lambda box: (box.width,)).encode(Box(7)) == b"\7"
    with pytest.raises(TypeError, match="fields_of was not given"):
        Record("box", fields, Box).encode(Box(7))


def test_section_is_a_stage() -> None:
    held: list[Point] = [Point(9, 4)]
    section: Section[list[Point], Point] = Section("where", POINT, lambda c: c[-1], lambda c, value: c.append(value))
    file = io.BytesIO()
    writer = Writer(file)
    assert section.source is not None
    assert section.target is not None
    section.source(held, writer)
    writer.flush()
    section.target(held, Reader(io.BytesIO(file.getvalue())))
    assert held == [Point(9, 4), Point(9, 4)]


@given(st.binary(min_size=SHAPE.size, max_size=SHAPE.size))
def test_any_bytes(data: bytes) -> None:
    """A record of any bytes is refused, or gives the same bytes again."""
    try:
        value = SHAPE.decode(data)
    except UnsoundError:
        return
    assert SHAPE.encode(value) == data


def test_documentation() -> None:
    table = record_table(SHAPE).splitlines()
    assert table[0] == "32 bytes, no padding."
    assert "| 0 | 1 | `kind` | u8 | what it is; must be one of 1, 3 |" in table
    assert "| 4 | 8 | `corners` | [point](#point)[2] | two of them |" in table
    assert "| 12 | 12 | `weights` | u32[3] | must be small |" in table
