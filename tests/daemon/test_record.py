# SPDX-License-Identifier: GPL-2.0-or-later
"""Files of device states: for nobody else, never over what is there, and no reason to fail."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from godwit.daemon.record import Recording


@pytest.fixture
def base(tmp_path: Path) -> Iterator[str]:
    before = os.umask(0)
    yield str(tmp_path / "state")
    os.umask(before)


def record(base: str, *pieces: bytes) -> str:
    recording = Recording(base, "saved")
    for piece in pieces:
        recording.write(piece)
    recording.close()
    recording.close()
    recording.write(b"too late")
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
    assert (tmp_path / "state.1.saved").stat().st_size == 1000
    assert len(os.listdir("/proc/self/fd")) == open_before
