# SPDX-License-Identifier: GPL-2.0-or-later
"""``godwit inspect`` on streams of passt's, of ours, in QEMU's file, and on broken ones."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import pytest

from godwit.cli.differences import KNOWN_BY, REFERS
from godwit.cli.inspect import main
from godwit.migration import MAGIC, Direction, Migration, NotAStreamError
from godwit.migration.entries import HEAD
from godwit.migration.inspect import SEARCHED, open_streams
from godwit.net.native import NATIVE as NATIVE_VERSION
from godwit.net.state import FlowMover
from godwit.net.versions import versions

from ..net.streams import CONTENTS, another
from ..net.test_state import Mover

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
    other.write_bytes(IDLE.read_bytes()[:173] + b"\x3d" + IDLE.read_bytes()[174:])
    assert run(capsys, "--diff", IDLE, other)[1] == ["flow at 62 and 62: seq_init_from_tap 2802226492 -> 2802226493"]
    other.write_bytes(IDLE.read_bytes()[:78] + b"\x09" + IDLE.read_bytes()[79:])  # another peer: another connection
    assert [line[0] for line in run(capsys, "--diff", IDLE, other)[1]] == ["-", "-", "+", "+"]
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


def written(path: Path, mover: Mover, *, version: int = NATIVE_VERSION) -> Path:
    transfer: Migration[FlowMover] = Migration(versions(), mover)
    with path.open("wb") as file:
        transfer.request(file, Direction.SOURCE, version)
        assert transfer.run()
    return path


@pytest.mark.parametrize("version", [2, NATIVE_VERSION])
def test_one_flow_more_changes_nothing_about_the_others(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, version: int
) -> None:
    """Numbers and places of all that follow are others."""
    mover = CONTENTS["flows"]()
    first, socket = mover.states[0], mover.sockets[0]
    assert socket is not None
    mover.states = [first, *(another(first, number) for number in range(1, 20))]
    mover.sockets = {number: (socket[0]._replace(seq_snd=number), *socket[1:]) for number in range(20)}
    mover.unanswered.clear()
    one = written(tmp_path / "one", mover, version=version)
    del mover.states[3]
    mover.sockets = {number: mover.sockets[number + (number >= 3)] for number in range(19)}
    dumped = mover.sockets[10]
    assert dumped is not None
    mover.sockets[10] = (dumped[0]._replace(mss=999), *dumped[1:])
    other = written(tmp_path / "other", mover, version=version)
    status, lines, errors = run(capsys, "--diff", one, other)
    assert (status, errors) == (1, "")
    of_flows = [line for line in lines if "check value" not in line and not line.startswith(("flows", "end"))]
    assert [line.split()[0] for line in of_flows if line[0] == "-"] == ["-"] * 2
    assert [line for line in of_flows if line[0] != "-"] == [
        line for line in of_flows if line.endswith(": mss 1460 -> 999")
    ]
    assert len(of_flows) == 3
    back = run(capsys, "--diff", other, one)[1]
    assert sum(line.startswith("+") for line in back) == 2


def test_one_udp_port_more_changes_nothing_about_the_others(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    mover = CONTENTS["datagrams"]()
    one = written(tmp_path / "one", mover)
    del mover.ports[0]
    other = written(tmp_path / "other", mover)
    status, lines, errors = run(capsys, "--diff", one, other)
    assert (status, errors) == (1, "")
    assert {line[0] for line in lines} == {"-"}
    assert sum(": number=" in line for line in lines) == 1
    assert all("port=0" in line or "number=0" in line for line in lines)


def test_what_items_are_known_by_is_in_them(capsys: pytest.CaptureFixture[str]) -> None:
    found: dict[str, set[str]] = {}
    for path in [*GOLDEN.glob("*.bin"), *NATIVE.glob("*.bin")]:
        for item in map(json.loads, run(capsys, "--json", path)[1]):
            found.setdefault(item["name"], set()).update(item["values"])
    for name, values in KNOWN_BY.items():
        assert set(values) <= found[name]
    for name, (value, of) in REFERS.items():
        assert value in found[name]
        assert "number" in found[of]


def of_text(text: bytes) -> bytes:
    """A whole native stream of nothing but a configuration."""
    body = HEAD.pack(1, 0, len(text)) + text
    header = versions()[-1].header(MAGIC).pack()
    return header + body + HEAD.pack(0, 1, 4) + zlib.crc32(body).to_bytes(4, "big")


def test_nothing_in_a_stream_reaches_a_terminal_as_it_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(of_text(b"IPv4\t\x1b[2J\xff\xe2\x80\xae\r\n"))
    other.write_bytes(of_text(b"\x9b\x07"))
    for words in ([one], [other], ["--diff", one, other], ["--diff", one, IDLE], ["--json", one]):
        status, lines, errors = run(capsys, *words)
        assert status < 2
        assert all(line.isprintable() for line in lines)
        assert errors == ""
    assert run(capsys, "--diff", one, other)[1] == [
        "configuration at 16 and 16: text 'IPv4\\t\\x1b[2J\ufffd\\u202e\\r\\n' -> '\ufffd\\x07'"
    ]


def piped(words: list[str], stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "godwit.cli.main", "inspect", *words]
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        command, input=stdin, capture_output=True, check=False, timeout=60, env={**plain, **environment}
    )


def test_from_a_pipe_and_into_an_encoding_that_has_not_all() -> None:
    done = piped(["/dev/stdin"], of_text("IPv4\tä".encode()), PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"text='IPv4\t\xe4'" in done.stdout
    done = piped(["/dev/stdin"], b"x" * 100)
    assert done.returncode == 2
    assert done.stderr.startswith(b"godwit inspect: /dev/stdin: not a device-state stream")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written(unbuffered: str) -> None:
    words = f"PYTHONUNBUFFERED={unbuffered} {sys.executable} -m godwit.cli.main inspect {IDLE}"
    for script, status, message in (
        (f"{words} > /dev/full", 2, "godwit inspect: cannot write: No space left on device\n"),
        (f"set -o pipefail; (sleep 0.3; {words}) | true", 0, ""),
    ):
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False, timeout=60)
        assert (done.returncode, done.stderr) == (status, message)


def test_what_only_looks_like_a_stream_hides_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """In a guest's memory: behind any length, and with the seams of what is searched at once within the word."""
    word = MAGIC.to_bytes(8, "big")
    path = tmp_path / "vm.mig"
    whole = in_qemus_file(tmp_path, IDLE.read_bytes()).read_bytes()
    seam = 505 + SEARCHED  # behind the last of what is no stream, below
    for at in (seam - 8, seam - 7, seam - 4, seam - 1, seam):
        before = bytearray(at - 1008 + 5000)
        before[0:8] = word[:7] + b"x"
        for place, junk in (
            (100, word),
            (300, bytes(3) + b"\5" + word + bytes(8)),
            (500, b"\xff" * 4 + word + b"\1" * 8),
        ):
            before[place : place + len(junk)] = junk
        path.write_bytes(before[: at - 1008] + whole)
        status, lines, errors = run(capsys, "--json", path)
        assert (status, errors, json.loads(lines[-1])["name"]) == (0, "", "end")
    fake = bytes(2) + b"\x30\x28" + word + b"\x80\0\0\1" * 2 + b"\1" * 200
    path.write_bytes(b"QEVM" + fake + whole)
    status, lines, errors = run(capsys, "--all", "--json", path)
    assert status == 2
    assert f"{path}, at 8: " in errors
    assert json.loads(lines[-1]) == {"stream": 1, "offset": 226, "size": 0, "name": "end", "values": {}}
    status, lines, errors = run(capsys, "--json", path)
    assert status == 0
    assert "1 places that look like a device state and are no whole one were passed over; --all shows them" in errors
    assert json.loads(lines[-1]) == {"stream": 0, "offset": 226, "size": 0, "name": "end", "values": {}}


@pytest.mark.parametrize("copied", [GOLDEN / "idle-v6.bin", NATIVE / "0x80000001-idle-v6.bin"], ids=["v2", "native"])
def test_a_whole_stream_in_the_guests_memory_is_none(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, copied: Path
) -> None:
    """A guest that has a file of them: in a page, behind the page's address and flags, as QEMU writes pages."""
    data = copied.read_bytes()
    real = in_qemus_file(tmp_path, HALF.read_bytes()).read_bytes()
    expected = run(capsys, "--json", HALF)[1]
    path = tmp_path / "vm.mig"
    # What would be its length: of page 1; and, by a bad chance, the right one, with no end behind it or another length.
    for low, behind in ((0x1008, b"\xff"), (0x1008, b"\0"), (len(data), b"\xff"), (len(data) + 1, b"\0")):
        page = (0x100000000 + low).to_bytes(8, "big") + data + behind * (4096 - len(data))
        path.write_bytes(real[:200] + page + real[200:])
        status, lines, errors = run(capsys, "--json", path)
        assert status == 0, (low, behind)
        assert lines == expected, (low, behind)
        assert "1 places that look like" in errors


def test_what_looks_like_a_stream_all_over_is_read_once() -> None:
    """A guest may have its memory full of it."""

    class Counting(io.BytesIO):
        taken = 0

        def read(self, size: int | None = -1, /) -> bytes:
            data = super().read(size)
            self.taken += len(data)
            return data

    word = MAGIC.to_bytes(8, "big")
    file = Counting(b"QEVM" + word * 50_000)
    with pytest.raises(NotAStreamError):
        open_streams(file, versions())
    assert file.taken < 5 * len(file.getvalue())  # of each place besides, the length and the header
    file = Counting(b"QEVM" + (bytes(2) + b"\1\0" + word + b"\1" * 8 + bytes(36)) * 1000)
    streams, passed_over = open_streams(file, versions(), everything=True)
    assert [at for at, _ in streams] == list(range(8, 56_000, 56))
    assert passed_over == 0
    assert file.taken < 5 * len(file.getvalue())


def test_what_looks_like_streams_to_the_end_of_the_file_is_not_read_without_end(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Each begins in the one before, with an entry that is passed over. A good one behind them is found."""
    version = (0x80000001).to_bytes(4, "big") * 2
    unit = (24).to_bytes(4, "big") + MAGIC.to_bytes(8, "big") + version + HEAD.pack(99, 0, 0x7F000000)
    path = in_qemus_file(tmp_path, IDLE.read_bytes())
    good = path.read_bytes()
    path.write_bytes(b"QEVM" + unit * 4000)
    status, _, errors = run(capsys, "--json", path)
    *broken, last = sorted(errors.splitlines(), key=lambda line: "places that look like" in line)
    assert status == 2
    assert 100 < len(broken) < 1000
    assert all("state: stream ended at offset" in error for error in broken)
    assert f": {4000 - len(broken)} places that look like a device state and are no whole one were passed over" in last
    path.write_bytes(b"QEVM" + unit * 4000 + good)
    status, lines, _ = run(capsys, "--json", path)
    assert status == 0
    assert [json.loads(line)["name"] for line in lines][-1] == "end"


def test_a_file_of_qemus_that_ends_in_its_first_piece(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = in_qemus_file(tmp_path, IDLE.read_bytes())
    path.write_bytes(path.read_bytes()[:1050])
    status, _, errors = run(capsys, path)
    assert (status, errors) == (
        2,
        f"godwit inspect: {path}, at 1008: observed addresses: stream ended at offset 42: wanted 42 bytes, got 26\n",
    )


def test_a_file_larger_than_memory_would_like(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Queues are read in pieces: one of 60 MiB with less than that to spare."""
    good = (GOLDEN / "idle-v4.bin").read_bytes()
    size = 60 << 20
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.write(good[:182] + size.to_bytes(4, "big") + good[186:])
        file.truncate(len(good) + size)
    tracemalloc.start()
    try:
        status, lines, _ = run(capsys, path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert status == 0
    assert any(f"'sndq bytes'={size}" in line for line in lines)
    assert peak < 8 << 20
