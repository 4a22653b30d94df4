# SPDX-License-Identifier: GPL-2.0-or-later
"""The bytes of a transfer, and what checks them."""

from __future__ import annotations

import zlib

from hypothesis import given, settings
from hypothesis import strategies as st

from godwit.lab import stream


def reference(seed: int, length: int) -> bytes:
    x = seed
    once = bytearray()
    for _ in range(stream.PERIOD):
        x = (x * 1664525 + 1013904223) % 2**32
        once.append(x // 2**24)
    return (bytes(once) * (length // stream.PERIOD + 1))[:length]


def test_definition() -> None:
    assert stream.period(7) == reference(7, stream.PERIOD)
    assert stream.crc32(7, 200_000) == zlib.crc32(reference(7, 200_000))
    assert stream.crc32(7, 0) == 0


def test_chunks_follow_each_other() -> None:
    data = bytearray()
    while len(data) < 150_000:
        data += stream.chunk(3, len(data), 4096)
    assert data == reference(3, len(data))


@settings(max_examples=30)
@given(st.lists(st.integers(1, 200_000), min_size=1, max_size=5))
def test_receiver_takes_any_pieces(sizes: list[int]) -> None:
    data = reference(5, sum(sizes))
    receiver = stream.Receiver(5)
    at = 0
    for size in sizes:
        receiver.feed(data[at : at + size])
        at += size
    assert (receiver.received, receiver.crc, receiver.wrong_at) == (len(data), zlib.crc32(data), None)


@settings(max_examples=30)
@given(st.integers(0, 149_999), st.integers(1, 255))
def test_receiver_finds_the_first_wrong_byte(at: int, flip: int) -> None:
    data = bytearray(reference(5, 150_000))
    data[at] ^= flip
    receiver = stream.Receiver(5)
    for begin in range(0, len(data), 40_000):
        receiver.feed(bytes(data[begin : begin + 40_000]))
    assert receiver.wrong_at == at


def test_receiver_notices_what_is_lost_or_repeated() -> None:
    data = reference(9, 400_000)
    for piece in (1448, 4096, 65536):
        for changed in (data[:100_000] + data[100_000 + piece :], data[:100_000] + data[100_000 - piece :]):
            receiver = stream.Receiver(9)
            receiver.feed(changed)
            assert receiver.wrong_at is not None
            assert 100_000 <= receiver.wrong_at < 100_010
