# SPDX-License-Identifier: GPL-2.0-or-later
"""Files of device states: for nobody else, never over what is there, and no reason to fail."""

from __future__ import annotations

import io
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from godwit.daemon import record as module
from godwit.daemon.record import Recording
from godwit.migration import Direction, Migration, Stage, Version, Writer


def much(_device: None, writer: Writer) -> None:
    for number in range(40):
        writer.push_bytes(bytes([number]) * 99999)


DEVICE: tuple[Version[Any], ...] = (Version(1, (Stage("much", source=much),)),)


@pytest.fixture
def base(tmp_path: Path) -> Iterator[str]:
    before = os.umask(0)
    yield str(tmp_path / "state")
    os.umask(before)


class Disk:
    """One that takes nothing until it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.goes = threading.Event()
        self.asked = threading.Event()
        monkeypatch.setattr(module, "_write", self.write)

    def write(self, fd: int, data: bytes) -> int:
        self.asked.set()
        assert self.goes.wait(20)
        return os.write(fd, data[:1000])


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    made = Disk(monkeypatch)
    yield made
    made.goes.set()


def record(base: str, *pieces: bytes) -> str:
    recording = Recording(base, "saved")
    for piece in pieces:
        recording.write(piece)
    recording.close()
    recording.close()
    recording.write(b"too late")
    assert recording.wait(20)
    return recording.path


def test_the_next_number_that_is_free(base: str, tmp_path: Path) -> None:
    """A link is not followed, whoever has put it there."""
    (tmp_path / "state.1.saved").write_bytes(b"of before")
    (tmp_path / "state.2.saved").symlink_to(tmp_path / "elsewhere")
    assert record(base, b"one ", b"", b"two") == f"{base}.3.saved"
    assert (tmp_path / "state.3.saved").read_bytes() == b"one two"
    assert (tmp_path / "state.3.saved").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "state.1.saved").read_bytes() == b"of before"
    assert not (tmp_path / "elsewhere").exists()
    assert record(base) == f"{base}.4.saved"


def test_no_more_room(base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    open_before = len(os.listdir("/proc/self/fd"))
    try:
        record(base, bytes(600), bytes(600), bytes(600))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caplog.messages == [f"the device state is not recorded: cannot write {base}.1.saved: File too large"]
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_a_disk_that_stands_still_keeps_nobody_waiting(base: str, disk: Disk) -> None:
    """A whole transfer passes meanwhile, and is in the file when the disk goes on."""
    recording = Recording(base, "saved")
    transfer: Migration[Any] = Migration(DEVICE, None, copy=recording.write)
    stream = io.BytesIO()
    transfer.request(stream, Direction.SOURCE)
    assert transfer.run()
    recording.close()
    assert disk.asked.wait(20)
    assert not recording.wait(0)
    assert Path(recording.path).stat().st_size == 0
    disk.goes.set()
    assert recording.wait(20)
    assert Path(recording.path).read_bytes() == stream.getvalue()
    assert len(stream.getvalue()) > 3 << 20


def test_a_disk_that_is_too_slow_costs_the_recording(
    base: str, disk: Disk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "MOST_BEHIND", 3 << 20)
    open_before = len(os.listdir("/proc/self/fd"))
    recording = Recording(base, "saved")
    for _ in range(3):
        recording.write(bytes(1 << 20))
    assert disk.asked.wait(20)
    assert caplog.messages == []
    for _ in range(1000):
        recording.write(bytes(1 << 20))
    recording.close()
    why = f"{base}.1.saved takes too long: 3 MiB wait to be written"
    assert caplog.messages == [f"the device state is not recorded: {why}"]
    disk.goes.set()
    assert recording.wait(20)
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == open_before
    assert len(caplog.messages) == 1
