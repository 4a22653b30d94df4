# SPDX-License-Identifier: GPL-2.0-or-later
"""Messages out of a stream, however it is cut."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from godwit.vhost_user import ProtocolError
from godwit.vhost_user.frames import HEADER, MAX_FDS, MAX_PAYLOAD, Frame, FrameReader, close_fds, encode

MESSAGES = [(1, b""), (2, bytes(8)), (5, bytes(range(72))), (3, b""), (99, b"x" * MAX_PAYLOAD)]
STREAM = b"".join(encode(number, 0, payload) for number, payload in MESSAGES)


def frames(reader: FrameReader) -> list[Frame]:
    return list(iter(reader.next_frame, None))


@pytest.mark.parametrize("step", [1, 3, 11, 12, 13, 20, 4096, len(STREAM)])
def test_a_stream_however_it_is_cut(step: int) -> None:
    reader = FrameReader()
    got: list[Frame] = []
    for start in range(0, len(STREAM), step):
        reader.feed(STREAM[start : start + step])
        got += frames(reader)
    assert [(frame.request, frame.payload) for frame in got] == MESSAGES


def test_wanted_leads_from_message_to_message() -> None:
    reader = FrameReader()
    rest = STREAM
    while rest:
        assert 0 < reader.wanted <= len(rest)
        data, rest = rest[: reader.wanted], rest[reader.wanted :]
        reader.feed(data)
    assert reader.backlog == len(MESSAGES)
    assert reader.wanted == HEADER.size


@pytest.mark.parametrize("at", range(20))
def test_descriptors_belong_to_the_message_they_come_with(at: int, fd: Callable[[], int]) -> None:
    reader = FrameReader()
    message = encode(2, 0, bytes(8))
    sent = fd()
    reader.feed(message)
    for offset in range(len(message)):
        reader.feed(message[offset : offset + 1], [sent] if offset == at else [])
    reader.feed(message)
    assert [frame.fds for frame in frames(reader)] == [(), (sent,), ()]
    os.close(sent)


def test_descriptors_go_to_the_last_message_of_what_was_read(fd: Callable[[], int]) -> None:
    reader = FrameReader()
    message = encode(2, 0, bytes(8))
    first, second, third = fd(), fd(), fd()
    reader.feed(message[:5], [first])
    reader.feed(message[5:] + message, [second])
    reader.feed(message + message[:1], [third])
    reader.feed(message[1:])
    got = frames(reader)
    assert [frame.fds for frame in got] == [(first,), (second,), (), (third,)]
    close_fds((first, second, third))


@pytest.mark.parametrize("version", [0, 2, 3])
def test_wrong_version(version: int, fd: Callable[[], int]) -> None:
    reader = FrameReader()
    reader.feed(STREAM[:12] + HEADER.pack(1, version, 0), [fd()])
    assert reader.wanted == 0
    assert reader.next_frame() == Frame(1, 1, b"", ())
    for _ in range(2):
        with pytest.raises(
            ProtocolError, match=f"has version {version}, not 1: does the other side speak vhost-user"
        ) as raised:
            reader.next_frame()
        assert raised.value.fatal
    reader.feed(STREAM, [fd()])
    with pytest.raises(ProtocolError):
        reader.next_frame()


def test_unknown_flags() -> None:
    reader = FrameReader()
    reader.feed(HEADER.pack(1, 1 | 1 << 4, 0))
    with pytest.raises(ProtocolError, match="unknown flags"):
        reader.next_frame()


def test_too_large() -> None:
    reader = FrameReader()
    reader.feed(HEADER.pack(1, 1, MAX_PAYLOAD + 1))
    with pytest.raises(ProtocolError, match="payload of 4097 bytes"):
        reader.next_frame()


def test_too_many_descriptors_for_one_message(fd: Callable[[], int]) -> None:
    reader = FrameReader()
    reader.feed(STREAM[:1], [fd() for _ in range(MAX_FDS)])
    assert reader.next_frame() is None
    reader.feed(STREAM[1:2], [fd()])
    with pytest.raises(ProtocolError, match="more than 32 descriptors"):
        reader.next_frame()


@pytest.mark.parametrize("length", range(1, 20))
def test_the_end_within_a_message(length: int, fd: Callable[[], int]) -> None:
    reader = FrameReader()
    reader.feed(encode(2, 0, bytes(8))[:length], [fd()])
    reader.feed(b"")
    with pytest.raises(ProtocolError, match=f"hung up {length} bytes into a message"):
        reader.next_frame()


def test_the_end_between_messages(fd: Callable[[], int]) -> None:
    reader = FrameReader()
    reader.feed(STREAM)
    reader.feed(b"", [fd()])
    assert reader.eof
    assert len(frames(reader)) == len(MESSAGES)
    reader.feed(STREAM, [fd()])
    assert reader.next_frame() is None


def test_close_closes_what_is_held(fd: Callable[[], int]) -> None:
    reader = FrameReader()
    reader.feed(STREAM[:12], [fd()])
    reader.feed(STREAM[:3], [fd(), fd()])
    reader.close()
    assert reader.next_frame() is None
