# SPDX-License-Identifier: GPL-2.0-or-later
"""The header and what a target makes of it."""

from __future__ import annotations

import pytest

from godwit.migration import MAGIC, Header, NotAStreamError, Stage, Version, VersionRefusedError, negotiate

WIRE = bytes.fromhex("b1bb1d1b0bb1d1b0 00000007 00000005")


def test_both_ways() -> None:
    header = Header(7, 5)
    assert header.pack() == WIRE
    assert Header.parse(WIRE) == header
    assert len(WIRE) == Header.size()


def test_another_magic() -> None:
    assert Header.parse(Header(1, 1, 0x1234).pack(), 0x1234).magic == 0x1234
    with pytest.raises(NotAStreamError, match="it begins with 0x0000000000001234, not 0xb1bb1d1b0bb1d1b0"):
        Header.parse(Header(1, 1, 0x1234).pack())


@pytest.mark.parametrize(
    ("version", "compat"), [(0, 0), (0, 1), (2, 0), (2, 3), (0x7FFFFFFF, 0x80000001), (0, 0xFFFFFFFF)]
)
def test_not_a_stream(version: int, compat: int) -> None:
    data = MAGIC.to_bytes(8, "big") + version.to_bytes(4, "big") + compat.to_bytes(4, "big")
    with pytest.raises(NotAStreamError):
        Header.parse(data)


@pytest.mark.parametrize(("version", "compat"), [(0, 0), (1, 0), (1, 2), (1 << 32, 1)])
def test_never_written(version: int, compat: int) -> None:
    with pytest.raises(ValueError, match="no header can say"):
        Header(version, compat).pack()


@pytest.mark.parametrize(
    ("known", "version", "compat", "taken"),
    [
        ([2], 2, 2, 2),
        ([2], 7, 2, 2),
        ([2], 7, 1, 2),
        ([2, 5], 7, 2, 5),
        ([5, 2], 7, 2, 5),
        ([2, 5, 9], 7, 2, 5),
        ([2, 0x80000001], 0x80000001, 0x80000001, 0x80000001),
        ([2, 0x80000001], 2, 1, 2),
        ([2], 7, 3, None),
        ([7], 2, 2, None),
        ([2], 0x80000001, 0x80000001, None),
        ([], 2, 2, None),
        ([2], 1, 1, None),
    ],
)
def test_negotiation(known: list[int], version: int, compat: int, taken: int | None) -> None:
    versions: list[Version[object]] = [Version(number) for number in known]
    header = Header(version, compat)
    if taken is None:
        with pytest.raises(VersionRefusedError):
            negotiate(header, versions)
    else:
        assert negotiate(header, versions).id == taken


def test_refusal_names_both_sides() -> None:
    with pytest.raises(VersionRefusedError) as caught:
        negotiate(Header(7, 5), [Version[object](2)])
    assert (
        str(caught.value)
        == "device state version 7, compatible down to 5; this target knows 2: have the source write one of these"
    )
    with pytest.raises(VersionRefusedError, match=r"version 0x80000002, .* this target knows 2, 0x80000001: have the"):
        negotiate(Header(0x80000002, 0x80000002), [Version[object](0x80000001), Version(2)])


def test_withdrawn_is_refused_by_name() -> None:
    versions: list[Version[object]] = [Version(1, withdrawn="it was wrong"), Version(2)]
    with pytest.raises(VersionRefusedError) as caught:
        negotiate(Header(1, 1), versions)
    assert str(caught.value).endswith(
        "this target knows 2: have the source write one of these (version 1 was withdrawn: it was wrong)"
    )
    assert negotiate(Header(2, 1), versions).id == 2


@pytest.mark.parametrize(("number", "compat"), [(0, 0), (2, 3), (1 << 32, 0), (-1, 0)])
def test_version_out_of_range(number: int, compat: int) -> None:
    with pytest.raises(ValueError, match="out of range"):
        Version[object](number, compat=compat)


def test_stages_have_different_names() -> None:
    with pytest.raises(ValueError, match="two stages of one name"):
        Version[object](1, (Stage("a"), Stage("a")))
