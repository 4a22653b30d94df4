# SPDX-License-Identifier: GPL-2.0-or-later
"""The capture of the guest's frames, read with scapy; and that no trouble with it is the guest's."""

from __future__ import annotations

import errno
import os
import resource
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from scapy.packet import Packet
from scapy.utils import RawPcapReader

from .driver import (
    FULL,
    OUR_MAC,
    PLAIN,
    TIMEOUT,
    Family,
    Frame,
    Guest,
    open_pair,
    other_frame,
    pattern,
    read_exactly,
    wait_until,
)


def records(path: Path) -> list[tuple[float, bytes]]:
    """Time and bytes of each record; scapy refuses what is no pcap file."""
    with RawPcapReader(str(path)) as reader:
        assert reader.nano
        assert reader.linktype == 1  # Ethernet
        found = []
        for data, about in reader:
            assert about.caplen == about.wirelen == len(data)
            found.append((about.sec + about.usec / 1e9, data))
        return found


def open_file(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)


class Watched(Guest):
    """A guest that notes what it sends and receives."""

    def __init__(self, features: int = FULL) -> None:
        self.seen: list[bytes] = []
        super().__init__(features)

    def send(self, frame: Packet | bytes, *, sizes: Sequence[int] = (), indirect: bool = False) -> None:
        self.seen += [one.raw for one in self.fresh()]
        self.seen.append(bytes(frame))
        super().send(frame, sizes=sizes, indirect=indirect)

    def fresh(self) -> list[Frame]:
        """Frames that have come, into the backlog."""
        got = super().collect()
        self.backlog += got
        return got

    def collect(self) -> list[Frame]:
        got = super().collect()
        self.seen += [one.raw for one in got]
        return got


def answers(guest: Guest, family: Family) -> None:
    """See that the guest is served."""
    conn, peer = open_pair(guest, family)
    with peer:
        conn.push(b"still there?")
        assert read_exactly(peer, 12) == b"still there?"
        peer.sendall(b"yes")
        assert conn.read(3) == b"yes"


@pytest.mark.parametrize("features", [FULL, PLAIN, 0], ids=["full", "plain", "10 byte header"])
def test_frames_both_ways_as_they_are(tmp_path: Path, family: Family, features: int) -> None:
    path = tmp_path / "pcap"
    begin = time.time()
    with Watched(features) as guest:
        guest.engine.capture(open_file(path))
        answers(guest, family)
        told = other_frame(60)
        guest.engine.inject(told)
        guest.receive(lambda frame: frame.raw == told)
        guest.send(told, sizes=(12, 3, 40))
        guest.barrier()
        guest.fresh()
    found = records(path)
    data = [frame for _, frame in found]
    # The order of what goes either way at the same time is anybody's guess.
    assert sorted(data) == sorted(guest.seen)
    assert len(data) > 8
    assert data[-1] == told
    times = [at for at, _ in found]
    assert times == sorted(times)
    assert begin - 0.1 < times[0] <= times[-1] < time.time() + 0.1


def test_large_frames_are_whole(tmp_path: Path, family: Family) -> None:
    path = tmp_path / "pcap"
    data = pattern(60000)
    with Guest() as guest:
        guest.engine.capture(open_file(path))
        conn, peer = open_pair(guest, family)
        with peer:
            conn.push(data)
            assert read_exactly(peer, len(data)) == data
            peer.sendall(data)
            assert conn.read(len(data)) == data
    found = [frame for _, frame in records(path)]
    large = [frame for frame in found if len(frame) > 2000]
    ours = bytes.fromhex(OUR_MAC.replace(":", ""))
    assert [frame[-len(data) :] for frame in large if frame[6:12] != ours] == [data]
    assert b"".join(frame[14 + family.ip_size + 20 :] for frame in large if frame[6:12] == ours) in data


def test_a_frame_is_there_at_the_end_of_its_turn(tmp_path: Path, guest: Guest) -> None:
    path = tmp_path / "pcap"
    guest.engine.capture(open_file(path))
    guest.send(other_frame(60))
    guest.barrier()
    assert [data for _, data in records(path)] == [other_frame(60)]


def test_a_full_disk_ends_the_capture_and_not_the_guest(tmp_path: Path, guest: Guest, family: Family) -> None:
    """What is in the file are whole records."""
    path = tmp_path / "pcap"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    guest.engine.capture(open_file(path))
    # Python ignores the signal, so that a write past the limit fails, as one to a full disk does.
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        for _ in range(20):
            guest.send(other_frame(1500))
        wait_until(guest.engine.capture_error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert guest.engine.capture_error() == errno.EFBIG
    assert [data for _, data in records(path)] == [other_frame(1500)] * 6
    answers(guest, family)


def test_a_place_that_takes_nothing_is_an_error_at_once(guest: Guest, family: Family) -> None:
    with pytest.raises(OSError, match="capture: No space left on device"):
        guest.engine.capture(os.open("/dev/full", os.O_WRONLY))
    answers(guest, family)


def test_a_reader_that_goes_ends_the_capture_and_not_the_guest(guest: Guest, family: Family) -> None:
    ours, its = os.pipe()
    guest.engine.capture(its)
    os.close(ours)
    answers(guest, family)
    wait_until(guest.engine.capture_error)
    assert guest.engine.capture_error() == errno.EPIPE
    answers(guest, family)


def test_a_reader_that_does_not_read_misses_frames_and_the_guest_none(tmp_path: Path, family: Family) -> None:
    path = tmp_path / "pcap"
    ours, its = os.pipe()
    read: list[bytes] = []

    def drain() -> None:
        while piece := os.read(ours, 1 << 16):
            read.append(piece)

    reader = threading.Thread(target=drain)
    sent = 0
    with Guest() as guest:
        guest.engine.capture(its)
        while not guest.engine.capture_missed():
            guest.send_all([other_frame(1500)] * 50)
            guest.barrier()
            sent += 50
            assert sent < 10_000
        answers(guest, family)
        # It reads again, and what it gets is in order.
        reader.start()
        deadline = time.monotonic() + TIMEOUT
        while sum(map(len, read)) < 500_000:
            assert time.monotonic() < deadline
            guest.barrier()
        guest.send(other_frame(99))
    del guest.engine  # the descriptor is the engine's until it is freed
    reader.join(10)
    assert not reader.is_alive()
    os.close(ours)
    path.write_bytes(b"".join(read))
    found = [data for _, data in records(path)]
    assert {one for one in found if len(one) > 99} == {other_frame(1500)}
    assert 300 < found.count(other_frame(1500)) < sent
    assert other_frame(99) in found


def test_nothing_is_captured_unless_asked_for(guest: Guest, family: Family) -> None:
    answers(guest, family)
    assert (guest.engine.capture_error(), guest.engine.capture_missed()) == (0, 0)
