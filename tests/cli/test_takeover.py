# SPDX-License-Identifier: GPL-2.0-or-later
"""``godwit serve --takeover`` as a process: start, paths, PID file, and the front-end's connection."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import stat
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from godwit.vhost_user import FrontendClient, MemoryRegion, Request
from godwit.vhost_user.frames import HEADER, encode

from ..repair.conftest import FakeHelper
from .test_serve import SERVE, STAY, Place, eventually, gone


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    made.close()


def takeover(place: Place, *args: str) -> subprocess.CompletedProcess[str]:
    """Take over, in the background."""
    return subprocess.run(
        [*SERVE, "--takeover", f"{place.socket}.takeover", "-P", str(place.pid), "-l", str(place.log), *STAY, *args],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_in_the_background_and_the_files_are_the_new_ones(place: Place) -> None:
    assert place.launch().returncode == 0
    with FrontendClient.connect(place.socket) as front_end:
        features = front_end.get_features()
        front_end.set_owner()
        for _ in range(3):
            first = place.daemon()
            launched = takeover(place)
            assert (launched.returncode, launched.stdout) == (0, ""), launched.stderr
            eventually(functools.partial(gone, first), "the old one's end")
            assert place.daemon() != first
            assert not gone(place.daemon())
            assert front_end.get_features() == features
            front_end.set_features(features)  # which only one that has an owner takes
        names = sorted(path.name for path in place.socket.parent.iterdir())
        assert names == ["log", "pid", "s", "s.ctl", "s.repair", "s.takeover"]
        assert stat.S_IMODE(os.stat(f"{place.socket}.takeover").st_mode) == 0o600
    with FrontendClient.connect(place.socket) as front_end:  # by the path, too
        assert front_end.get_features() == features
    last = place.daemon()
    os.kill(last, signal.SIGTERM)
    eventually(lambda: gone(last), "the last one's end")
    assert [path.name for path in place.socket.parent.iterdir()] == ["log"]
    said = place.log.read_text()
    assert said.count("has taken over from godwit") == 3
    assert said.count("ends: another godwit goes on with the guest") == 3
    assert "Traceback" not in said


def test_other_paths(place: Place, tmp_path: Path) -> None:
    """The old one removes what the new one has no use for, and no more."""
    assert place.launch("--takeover-path", str(tmp_path / "t")).returncode == 0
    first = place.daemon()
    with FrontendClient.connect(place.socket) as front_end:
        features = front_end.get_features()
        paths = ["-s", str(tmp_path / "new"), "-P", str(tmp_path / "new.pid"), "-l", str(place.log)]
        launched = subprocess.run(
            [*SERVE, "--takeover", str(tmp_path / "t"), *paths, *STAY], timeout=60, check=False, capture_output=True
        )
        assert launched.returncode == 0, launched.stderr
        eventually(lambda: gone(first), "the old one's end")
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == ["log", "new", "new.ctl", "new.pid", "new.repair", "new.takeover"]
        assert front_end.get_features() == features
    os.kill(int((tmp_path / "new.pid").read_text()), signal.SIGTERM)


def test_what_keeps_it_from_taking_over(place: Place) -> None:
    """Nobody is there; the features do not fit; a place is taken: it says so, and the old one goes on."""
    nobody = takeover(place)
    assert nobody.returncode == 1
    assert "nobody hands a guest over at" in nobody.stderr
    assert place.launch().returncode == 0
    daemon = place.daemon()
    with FrontendClient.connect(place.socket) as front_end:
        front_end.set_owner()
        front_end.set_features(front_end.get_features())
        unfit = takeover(place, "--virtio-features", "passt")
        assert unfit.returncode == 1
        assert "the session uses features" in unfit.stderr
        taken = takeover(place, "-s", "/dev/null")
        assert taken.returncode == 1
        assert "/dev/null exists and is no socket" in taken.stderr
        assert place.daemon() == daemon
        assert not gone(daemon)
        front_end.get_features()
    assert place.log.read_text().count("nobody takes over") == 2
    assert takeover(place).returncode == 0


def test_one_that_is_refused_leaves_no_pid_file(place: Place) -> None:
    """Also where it may not remove it any more: in the folder of another user than the one that it has become."""
    old = place.start()
    no_such = ("--runas", "nobody", "-p", str(place.socket.parent / "none" / "frames"))
    refused = takeover(place, *no_such)
    assert refused.returncode == 1
    assert "cannot take over: --pcap: cannot write" in refused.stderr
    assert not place.pid.exists()
    place.pid.write_text(f"{old.pid}\n")
    assert takeover(place, *no_such).returncode == 1
    assert place.daemon() == old.pid  # another process's is left alone


def test_not_in_stream_mode(place: Place) -> None:
    place.start("--stream")
    assert not Path(f"{place.socket}.takeover").exists()
    refused = takeover(place)
    assert refused.returncode == 1
    assert "in stream mode there is none" in refused.stderr
    assert takeover(place, "--stream").returncode == 2


def test_an_inherited_connection_and_half_a_request(place: Place, tmp_path: Path) -> None:
    """With ``--fd`` there is no path; the connection goes along, with the part of a request that has come."""
    ours, theirs = socket.socketpair()
    path = str(tmp_path / "t")
    with ours, theirs:
        ours.settimeout(10)
        old = place.start("--fd", str(theirs.fileno()), "--takeover-path", path, fds=(theirs.fileno(),), path=False)
        theirs.close()
        message = encode(Request.GET_FEATURES, 0, b"")
        ours.sendall(message)
        answer = ours.recv(100)
        ours.sendall(encode(Request.SET_OWNER, 0, b""))
        memory = os.memfd_create("region")
        os.ftruncate(memory, 4096)
        region = MemoryRegion(0, 4096, 1 << 40, 0)
        table = encode(Request.SET_MEM_TABLE, 0, struct.pack("=II4Q", 1, 0, *region[:4]))
        for cut in (1, HEADER.size, HEADER.size + 8, len(table) - 1):
            socket.send_fds(ours, [table[:cut]], [memory])
            process = place.start("--takeover", path, path=False)
            assert old.wait(10) == 0
            old = process
            ours.sendall(table[cut:] + message)
            assert ours.recv(100) == answer
        os.close(memory)
        ours.close()
        assert old.wait(10) == 0  # as the first one would have
    assert not Path(path).exists()


def test_a_capture_begins_anew(place: Place, tmp_path: Path) -> None:
    """In the same file: it is the old one's until the guest is the new one's."""
    path = tmp_path / "frames"
    old = place.start("-p", str(path))
    head = path.read_bytes()
    assert len(head) == 24
    path.write_bytes(head + b"what the old one has seen")
    nobody = takeover(place, "-p", str(path), "-s", "/dev/null")
    assert nobody.returncode == 1
    assert path.read_bytes() == head + b"what the old one has seen"
    place.start("--takeover", f"{place.socket}.takeover", "-p", str(path), path=False)
    assert old.wait(10) == 0
    assert path.read_bytes() == head


def test_a_repair_helper_stays_connected(place: Place) -> None:
    old = place.start()
    with contextlib.closing(FakeHelper(str(place.repair))) as helper:
        eventually(lambda: helper.answered == 1, "the helper to be tried")
        for _ in range(2):
            new = place.start("--takeover", f"{place.socket}.takeover", path=False)
            assert old.wait(10) == 0
            old = new
        assert not helper.ended.is_set()
        with contextlib.closing(FakeHelper(str(place.repair))):
            assert helper.ended.wait(10)  # the last one serves: so the new one knew of both
        assert len(helper.requests) == 1  # and none was tried again
