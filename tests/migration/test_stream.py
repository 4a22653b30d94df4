# SPDX-License-Identifier: GPL-2.0-or-later
"""The cursors: fed whole, byte by byte, cut short, stuck, cancelled."""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from godwit.migration import (
    AbortedError,
    BadRecordError,
    Cancel,
    PeerGoneError,
    PipeError,
    Reader,
    TimedOutError,
    TruncatedError,
    Writer,
)


class Drip(io.BytesIO):
    """Gives one byte at a time, whatever is asked."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(min(size, 1) if size else size)


@pytest.fixture
def pipe() -> Iterator[list[int]]:
    """Read end and write end; a test that closes one sets it to -1."""
    ends = list(os.pipe())
    yield ends
    for fd in ends:
        if fd >= 0:
            os.close(fd)


CASES: list[tuple[str, Callable[[Writer], None], Callable[[Reader], object], object, bytes]] = [
    ("u8", lambda w: w.push_u8(0xFE), lambda r: r.pull_u8(), 0xFE, b"\xfe"),
    ("u16", lambda w: w.push_u16(0x1234), lambda r: r.pull_u16(), 0x1234, b"\x12\x34"),
    ("u32", lambda w: w.push_u32(0x12345678), lambda r: r.pull_u32(), 0x12345678, b"\x12\x34\x56\x78"),
    ("u64", lambda w: w.push_u64(1), lambda r: r.pull_u64(), 1, bytes(7) + b"\x01"),
    ("bytes", lambda w: w.push_bytes(b"abc"), lambda r: r.pull_bytes(3), b"abc", b"abc"),
    ("nothing", lambda w: w.push_bytes(b""), lambda r: r.pull_bytes(0), b"", b""),
    ("long", lambda w: w.push_bytes(b"x" * 700_000), lambda r: r.pull_bytes(700_000), b"x" * 700_000, b"x" * 700_000),
]


@pytest.mark.parametrize(("push", "pull", "value", "wire"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_both_ways(
    push: Callable[[Writer], None], pull: Callable[[Reader], object], value: object, wire: bytes
) -> None:
    file = io.BytesIO()
    writer = Writer(file)
    push(writer)
    writer.flush()
    assert file.getvalue() == wire
    assert writer.offset == len(wire)
    for opened in (io.BytesIO, Drip):
        if opened is Drip and len(wire) > 100:
            continue
        reader = Reader(opened(wire + b"rest"))
        assert pull(reader) == value
        assert reader.offset == len(wire)
        assert reader.pull_bytes(4) == b"rest"
        assert reader.at_end()


@pytest.mark.parametrize("opened", [io.BytesIO, Drip])
def test_truncated_says_where(opened: type[io.BytesIO]) -> None:
    reader = Reader(opened(b"\x00\x01abc"))
    reader.stage = "third"
    reader.pull_u16()
    with pytest.raises(TruncatedError) as caught:
        reader.pull_bytes(9)
    error = caught.value
    assert (error.stage, error.offset, error.wanted, error.got) == ("third", 2, 9, 3)
    assert str(error) == "third: stream ended at offset 5: wanted 9 bytes, got 3"
    with pytest.raises(TruncatedError):
        reader.pull_u8()


def test_limit() -> None:
    reader = Reader(io.BytesIO(b"abcdef"))
    assert reader.pull_bytes(3, 3) == b"abc"
    with pytest.raises(BadRecordError, match="queue is 4, must be at most 3"):
        reader.pull_bytes(4, 3, "queue")
    with pytest.raises(BadRecordError):
        reader.pull_bytes(-1)
    assert reader.offset == 3


def test_at_end_keeps_what_it_read() -> None:
    reader = Reader(io.BytesIO(b"ab"))
    assert not reader.at_end()
    assert reader.pull_bytes(2) == b"ab"
    assert reader.at_end()
    assert reader.at_end()


@given(st.lists(st.binary(max_size=2000), max_size=20), st.integers(1, 999))
def test_any_pieces(pieces: list[bytes], split: int) -> None:
    """What was pushed in any pieces can be pulled in any others."""
    file = io.BytesIO()
    writer = Writer(file)
    for piece in pieces:
        writer.push_bytes(piece)
    writer.flush()
    whole = b"".join(pieces)
    reader = Reader(io.BytesIO(file.getvalue()))
    got = b""
    while len(got) < len(whole):
        got += reader.pull_bytes(min(split, len(whole) - len(got)))
    assert got == whole
    assert reader.at_end()


def test_pipe_larger_than_its_buffer(pipe: list[int]) -> None:
    data = os.urandom(3_000_000)

    def write() -> None:
        writer = Writer(pipe[1])
        writer.push_bytes(data)
        writer.flush()
        os.close(pipe[1])
        pipe[1] = -1

    thread = threading.Thread(target=write)
    thread.start()
    reader = Reader(pipe[0])
    assert reader.pull_bytes(len(data)) == data
    assert reader.at_end()
    thread.join()


def test_read_timeout(pipe: list[int]) -> None:
    reader = Reader(pipe[0], timeout=0.05)
    os.write(pipe[1], b"x")
    with pytest.raises(TimedOutError, match=r"header: nothing could be read for 0\.05 s"):
        reader.pull_u16()


def test_write_timeout(pipe: list[int]) -> None:
    writer = Writer(pipe[1], timeout=0.05)
    with pytest.raises(TimedOutError, match="written"):
        writer.push_bytes(bytes(4 << 20))


def test_reader_gone(pipe: list[int]) -> None:
    os.close(pipe[0])
    pipe[0] = -1
    writer = Writer(pipe[1])
    writer.stage = "second"
    writer.push_u8(1)
    with pytest.raises(PeerGoneError, match="second: the reader closed the stream"):
        writer.flush()


def test_reader_goes_while_we_wait(pipe: list[int]) -> None:
    def leave() -> None:
        time.sleep(0.05)
        os.close(pipe[0])
        pipe[0] = -1

    thread = threading.Thread(target=leave)
    thread.start()
    with pytest.raises(PeerGoneError):
        Writer(pipe[1], timeout=10).push_bytes(bytes(4 << 20))
    thread.join()


@pytest.mark.parametrize("side", ["read", "write"])
def test_cancel_ends_a_wait(pipe: list[int], side: str) -> None:
    cancel = Cancel()
    thread = threading.Timer(0.05, cancel.set, ("front-end gone",))
    thread.start()
    reader, writer = Reader(pipe[0], cancel=cancel), Writer(pipe[1], cancel=cancel)
    with pytest.raises(AbortedError, match="front-end gone"):
        reader.pull_u8() if side == "read" else writer.push_bytes(bytes(4 << 20))
    thread.join()
    cancel.close()


def test_cancelled_before(pipe: list[int]) -> None:
    cancel = Cancel()
    cancel.set("")
    os.write(pipe[1], b"x")
    with pytest.raises(AbortedError):
        Reader(pipe[0], cancel=cancel).pull_u8()
    cancel.close()
    cancel.close()
    cancel.set("after the end: of no effect, no error")


def test_errors_of_the_system_are_ours(pipe: list[int]) -> None:
    reader, writer = Reader(pipe[1]), Writer(pipe[0])  # the wrong ends
    with pytest.raises(PipeError, match="cannot be read: Bad file descriptor"):
        reader.pull_u8()
    writer.push_u8(1)
    with pytest.raises(PipeError, match="cannot be written: Bad file descriptor"):
        writer.flush()


def test_a_descriptor_that_names_a_file_alone() -> None:
    fd = os.open("/", os.O_PATH | os.O_CLOEXEC)
    for end in (Reader, Writer):
        with pytest.raises(PipeError, match="header: the stream cannot be used: Bad file descriptor"):
            end(fd)
    os.close(fd)


def test_detached_touches_no_descriptor(pipe: list[int]) -> None:
    writer = Writer(pipe[1])
    writer.push_u8(1)
    writer.detach()
    with pytest.raises(PipeError):
        writer.flush()
    os.set_blocking(pipe[0], False)
    with pytest.raises(BlockingIOError):
        os.read(pipe[0], 1)
