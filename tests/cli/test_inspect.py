# SPDX-License-Identifier: GPL-2.0-or-later
"""``godwit inspect`` on streams of passt's, of ours, in QEMU's file, and on broken ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from godwit.cli.inspect import main

TESTS = Path(__file__).resolve().parent.parent
GOLDEN, NATIVE = TESTS / "golden", TESTS / "native"
IDLE, HALF = GOLDEN / "idle-v4.bin", GOLDEN / "half-closed-v4.bin"


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, list[str], str]:
    status = main([str(word) for word in words])
    said = capsys.readouterr()
    return status, said.out.splitlines(), said.err


def in_qemus_file(tmp_path: Path, *streams: bytes) -> Path:
    """As QEMU writes them: other things, and each stream in pieces."""
    path = tmp_path / "vm.mig"
    data = b"QEVM" + bytes(1000)
    for stream in streams:
        for at in range(0, len(stream), 100):
            piece = stream[at : at + 100]
            data += len(piece).to_bytes(4, "big") + piece
        data += bytes(4) + b"what follows" * 10
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("path", [*GOLDEN.glob("*.bin"), *NATIVE.glob("*.bin")], ids=lambda path: path.stem)
def test_every_byte_of_a_good_stream_is_accounted_for(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    status, lines, errors = run(capsys, "--json", path)
    assert (status, errors) == (0, "")
    items = [json.loads(line) for line in lines]
    places = {(item["offset"], item["size"]) for item in items}
    at = 0
    for offset, size in sorted(places):
        assert offset == at
        at += size
    assert (at, items[-1]["name"]) == (path.stat().st_size, "end")


def test_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    status, lines, _ = run(capsys, IDLE)
    assert status == 0
    assert lines[0].split() == ["0", "16", "header:", "version=2", "'compatible", "down", "to'=2"]
    assert "addr4=10.9.0.2 mac=52:54:00:12:34:56" in lines[1]
    assert "side[0].our_addr=10.9.0.1" in lines[3]
    assert lines[-1].split() == ["226", "0", "end"]


def test_in_a_file_of_qemus(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    native = NATIVE / "0x80000001-idle-v6.bin"
    path = in_qemus_file(tmp_path, HALF.read_bytes(), native.read_bytes())
    status, lines, errors = run(capsys, "--json", path)
    assert (status, errors) == (0, "")
    _, first, _ = run(capsys, "--json", HALF)
    _, second, _ = run(capsys, "--json", native)
    assert [json.loads(line) for line in lines] == [
        *map(json.loads, first),
        *({**json.loads(line), "stream": 1} for line in second),
    ]
    path.write_bytes(path.read_bytes()[:1300])
    status, lines, errors = run(capsys, path)
    assert status == 2
    assert "at 1008: " in errors
    assert "stream ended at offset" in errors


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "header: stream ended at offset 0"),
        (b"x" * 5000, "there is no device state in it"),
        (IDLE.read_bytes()[:-1], "transfer flows: stream ended at offset 225: wanted 52 bytes, got 51"),
        (IDLE.read_bytes() + b"x", "bytes follow the last stage, from offset 226"),
        (IDLE.read_bytes()[:8] + b"\0\0\0\7\0\0\0\7", "device state version 7"),
        (IDLE.read_bytes()[:62] + b"\3" + IDLE.read_bytes()[63:], "flow 0: pif[1] is 1"),
    ],
)
def test_what_is_broken_is_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "state"
    path.write_bytes(content)
    status, _, errors = run(capsys, path)
    assert status == 2
    assert errors.startswith(f"godwit inspect: {path}: ")
    assert message in errors


def test_no_such_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(capsys, tmp_path / "none")[0::2] == (
        2,
        f"godwit inspect: {tmp_path / 'none'}: No such file or directory\n",
    )
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2


def test_differences(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(capsys, "--diff", IDLE, IDLE) == (0, [], "")
    other = tmp_path / "other"
    other.write_bytes(IDLE.read_bytes()[:78] + b"\x09" + IDLE.read_bytes()[79:])
    assert run(capsys, "--diff", IDLE, other)[1] == ["flow at 62 and 62: side[0].our_addr 10.9.0.1 -> 10.9.9.1"]
    status, lines, _ = run(capsys, "--diff", IDLE, HALF)
    assert status == 1
    assert lines[0] == "flows at 58 and 58: count 1 -> 2"
    assert any(line.startswith("+") for line in lines)
    status, lines, _ = run(capsys, "--json", "--diff", IDLE, HALF)
    assert status == 1
    assert json.loads(lines[0]) == [
        {"name": "flows", "values": {"count": 1}},
        {"name": "flows", "values": {"count": 2}},
    ]


def test_a_file_larger_than_memory_would_like(tmp_path: Path) -> None:
    """Queues are read in pieces: one of 60 MiB with less than that to spare."""
    good = (GOLDEN / "idle-v4.bin").read_bytes()
    size = 60 << 20
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.write(good[:182] + size.to_bytes(4, "big") + good[186:])
        file.truncate(len(good) + size)
    words = ["prlimit", f"--data={48 << 20}", sys.executable, "-m", "godwit.cli.main", "inspect", str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"'sndq bytes'={size}" in done.stdout
