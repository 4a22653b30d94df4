# SPDX-License-Identifier: GPL-2.0-or-later
"""The example device, run as a program: a guest writes notes and is moved, with a front-end that shares its memory."""

from __future__ import annotations

import ast
import mmap
import os
import re
import select
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from godwit.vhost_user import Direction, Feature, FrontendClient, MemoryRegion, RequestFailedError, VringAddr, VringFlag

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLE = ROOT / "examples" / "notepad.py"
STREAMS = Path(__file__).resolve().parent / "streams"
LIMIT = 20.0  # seconds for anything

NUM = 8
GUEST, USER = 0x4000_0000, 0x7F00_0000_0000  # where the memory is for the guest, and for the front-end
BEFORE = 4096  # bytes of the file before the memory
SIZE = 0x10000
DESCRIPTORS, AVAILABLE, USED, NOTE, ANSWER = 0, 0x1000, 0x2000, 0x4000, 0x8000
NEXT, WRITE, INDIRECT = 1, 2, 4


class Answer(NamedTuple):
    serial: bytes
    written: int
    refused: int
    notes: list[str]


class Guest:
    """A driver in memory of its own; it goes where its front-end takes it."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("notepad-guest")
        os.ftruncate(self.fd, BEFORE + SIZE)
        self.memory = mmap.mmap(self.fd, BEFORE + SIZE)
        self.kick, self.call, self.err = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3))
        self.available = self.used = 0

    def close(self) -> None:
        self.memory.close()
        for fd in (self.fd, self.kick, self.call, self.err):
            os.close(fd)

    def put(self, at: int, data: bytes) -> None:
        self.memory[BEFORE + at : BEFORE + at + len(data)] = data

    def get(self, at: int, size: int) -> bytes:
        return self.memory[BEFORE + at : BEFORE + at + size]

    def descriptor(self, index: int, address: int, length: int, flags: int, following: int = 0) -> None:
        self.put(DESCRIPTORS + 16 * index, struct.pack("<QIHH", address, length, flags, following))

    def offer(self, head: int, count: int = 1) -> None:
        self.put(AVAILABLE + 4 + 2 * (self.available % NUM), struct.pack("<H", head))
        self.available = (self.available + count) & 0xFFFF
        self.put(AVAILABLE + 2, struct.pack("<H", self.available))
        os.eventfd_write(self.kick, 1)

    def write(self, note: bytes, room: int = 4096) -> None:
        """Make a request of two descriptors for the note and one for the answer."""
        half = len(note) // 2
        self.put(NOTE, note)
        self.put(ANSWER, bytes(room))
        self.descriptor(0, GUEST + NOTE, half, NEXT, 3)
        self.descriptor(3, GUEST + NOTE + half, len(note) - half, NEXT, 1)
        self.descriptor(1, GUEST + ANSWER, 16, NEXT | WRITE, 2)
        self.descriptor(2, GUEST + ANSWER + 16, room - 16, WRITE)
        self.offer(0)

    def answer(self) -> Answer:
        """Wait until the request has come back."""
        wait_for(lambda: struct.unpack("<H", self.get(USED + 2, 2))[0] != self.used, "an answer")
        assert select.select([self.call], [], [], LIMIT)[0]
        os.eventfd_read(self.call)
        head, size = struct.unpack("<II", self.get(USED + 4 + 8 * (self.used % NUM), 8))
        self.used = (self.used + 1) & 0xFFFF
        assert head == 0
        serial, written, refused, length = struct.unpack("<8sQII", self.get(ANSWER, 24))
        assert size == 24 + length
        return Answer(serial, written, refused, self.get(ANSWER + 24, length).decode().split("\n") if length else [])

    def ask(self, note: bytes = b"") -> Answer:
        self.write(note)
        return self.answer()


def wait_for(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, f"no {what} for {LIMIT} s"
        time.sleep(0.002)


class Daemon:
    """The example, in a process of its own."""

    def __init__(self, directory: Path, name: str, *arguments: str) -> None:
        self.path = directory / f"{name}.sock"
        self._out, self._err = directory / f"{name}.out", directory / f"{name}.err"
        with self._out.open("w") as out, self._err.open("w") as err:
            command = [sys.executable, str(EXAMPLE), str(self.path), "--name", name, *arguments]
            self.process = subprocess.Popen(command, stdout=out, stderr=err, stdin=subprocess.DEVNULL)
        wait_for(lambda: self.path.exists() or self.process.poll() is not None, "socket")

    @property
    def printed(self) -> list[str]:
        return [line.partition(": ")[2] for line in self._out.read_text().splitlines()]

    @property
    def log(self) -> str:
        return self._err.read_text()

    def connect(self, guest: Guest, *, log: int | None = None) -> FrontendClient:
        """All that a front-end says before the guest runs."""
        for _ in range(100):
            try:
                client = FrontendClient.connect(self.path, timeout=LIMIT)
                break
            except ConnectionRefusedError:
                time.sleep(0.01)
        features = client.get_features()
        client.set_protocol_features(client.get_protocol_features())
        client.set_owner()
        client.set_features(features if log is not None else features & ~Feature.VHOST_F_LOG_ALL)
        if log is not None:
            client.set_log_base(log, 1 << 18, 0)
        client.set_mem_table([MemoryRegion(GUEST, SIZE, USER, BEFORE, guest.fd)])
        client.set_vring_num(0, NUM)
        flags = VringFlag.LOG if log is not None else 0
        parts = (USER + DESCRIPTORS, USER + USED, USER + AVAILABLE, GUEST + USED)
        client.set_vring_addr(0, VringAddr(flags, *parts))
        client.set_vring_call(0, guest.call)
        client.set_vring_err(0, guest.err)
        return client

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(LIMIT)
        finally:
            self.process.kill()


def start(client: FrontendClient, guest: Guest, base: int = 0) -> None:
    client.set_vring_base(0, base)
    client.set_vring_kick(0, guest.kick)
    client.set_vring_enable(0, True)


def save(client: FrontendClient) -> bytes:
    """The state, as a front-end reads it to send it on."""
    theirs, ours = os.pipe()[::-1]
    client.set_device_state_fd(Direction.SAVE, theirs)
    os.close(theirs)
    with open(ours, "rb") as pipe:
        stream = pipe.read()
    assert client.check_device_state()
    return stream


def load(client: FrontendClient, stream: bytes) -> bool:
    theirs, ours = os.pipe()
    client.set_device_state_fd(Direction.LOAD, theirs)
    os.close(theirs)
    try:
        with open(ours, "wb") as pipe:
            pipe.write(stream)
    except BrokenPipeError:
        pass  # it has seen enough
    return client.check_device_state()


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    daemons: list[Daemon] = []

    def begin(name: str, *arguments: str) -> Daemon:
        daemons.append(Daemon(tmp_path, name, *arguments))
        return daemons[-1]

    yield begin
    for one in daemons:
        assert one.stop() == 0, one.log
        assert "Traceback" not in one.log


def test_a_guest_writes_notes(daemon: Callable[..., Daemon], guest: Guest) -> None:
    here = daemon("here")
    with here.connect(guest) as client:
        start(client, guest)
        first = guest.ask(b"buy ink")
        assert (first.written, first.refused, first.notes) == (1, 0, ["buy ink"])
        assert guest.ask("größer".encode()) == (first.serial, 2, 0, ["buy ink", "größer"])
        assert guest.ask(b"x" * 257)[1:3] == (2, 1)
        assert guest.ask(b"\xff")[1:3] == (2, 2)
        assert guest.ask(b"x" * 256)[1:3] == (3, 2)
        for number in range(4, 80):
            assert guest.ask(b"%d" % number).written == number  # round the ring several times
        assert guest.ask().notes == [str(number) for number in range(16, 80)]
        guest.write(b"", room=24 + 5)
        assert guest.answer().notes == ["16", "17"]
    assert here.printed[:3] == ["note 1: 'buy ink'", "note 2: 'größer'", f"note 3: {'x' * 256!r}"]


@pytest.mark.parametrize("version", [1, 2])
def test_a_pad_moves(daemon: Callable[..., Daemon], guest: Guest, version: int) -> None:
    here, there = daemon("here", "--migrate-version", str(version)), daemon("there")
    with here.connect(guest) as source, there.connect(guest) as target:
        start(source, guest)
        before = guest.ask(b"one")
        assert guest.ask(b"\xff").refused == 1
        base = source.get_vring_base(0)
        assert base == 2
        guest.write(b"two")  # while it stands still
        theirs, ours = os.pipe()  # straight from one to the other
        target.set_device_state_fd(Direction.LOAD, theirs)
        source.set_device_state_fd(Direction.SAVE, ours)
        os.close(theirs)
        os.close(ours)
        assert source.check_device_state()
        assert target.check_device_state()
        assert there.printed == []  # the guest is not there yet
        start(target, guest, base)
        after = guest.answer()
        assert (after.serial, after.written) == (before.serial, 2)
        assert (after.refused, after.notes) == ((1, ["one", "two"]) if version == 2 else (0, ["two"]))
        source.close()
        wait_for(lambda: len(here.printed) == 2, "farewell")
    whence = "here" if version == 2 else "somewhere"
    assert here.printed == ["note 1: 'one'", "the pad has moved away"]
    assert there.printed == [f"a pad has come from {whence}, 1 notes were written", "note 2: 'two'"]


def test_a_guest_that_is_started_again_goes_on_and_nothing_is_left_at_the_target(
    daemon: Callable[..., Daemon], guest: Guest
) -> None:
    """After a good save and a good load, as after any other: the front-end may still find that it cannot migrate."""
    here, there = daemon("here"), daemon("there")
    with here.connect(guest) as source:
        start(source, guest)
        before = guest.ask(b"one")
        for written in (2, 3):
            base = source.get_vring_base(0)
            with there.connect(guest) as target:
                assert load(target, save(source))
            start(source, guest, base)
            assert guest.ask(b"more")[:2] == (before.serial, written)
        assert here.printed == [
            "note 1: 'one'",
            *(f for n in (2, 3) for f in ("the pad stays here", f"note {n}: 'more'")),
        ]
        base = source.get_vring_base(0)
        with there.connect(guest) as another:
            start(another, guest, base)
            stranger = guest.ask()
            assert stranger.serial != before.serial
            assert stranger.notes == []
    assert there.printed == []


def test_a_front_end_that_does_not_read_the_state(daemon: Callable[..., Daemon], guest: Guest) -> None:
    here = daemon("here")
    with here.connect(guest) as source:
        start(source, guest)
        guest.ask(b"one")
        base = source.get_vring_base(0)
        ours, theirs = os.pipe()
        os.close(ours)
        source.set_device_state_fd(Direction.SAVE, theirs)
        os.close(theirs)
        assert not source.check_device_state()
        assert here.printed[1:] == ["the pad stays here"]
        start(source, guest, base)
        assert guest.ask(b"two").notes == ["one", "two"]


def entry(number: int, flags: int, payload: bytes) -> bytes:
    return struct.pack(">HHI", number, flags, len(payload)) + payload


def sealed(entries: bytes) -> bytes:
    return b"NOTEPAD!" + struct.pack(">II", 2, 2) + entries + entry(0, 1, zlib.crc32(entries).to_bytes(4, "big"))


def entries_of(stream: bytes) -> bytes:
    return stream[16:-12]


TWO = (STREAMS / "2.bin").read_bytes()
ONE = (STREAMS / "1.bin").read_bytes()
SERIAL = bytes.fromhex("0123456789abcdef")
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "header: stream ended at offset 0"),
    "cut": (TWO[:-1], "pad: stream ended at offset"),
    "cut version 1": (ONE[:-1], "pad: stream ended at offset 31"),
    "more": (TWO + b"\0", "bytes follow the last stage"),
    "another device's": (bytes.fromhex("b1bb1d1b0bb1d1b0") + TWO[8:], "not a device-state stream"),
    "damaged": (TWO.replace(b"one", b"oNe"), "was damaged on the way"),
    "newer": (TWO[:8] + struct.pack(">II", 3, 3) + TWO[16:], "this target knows 1, 2"),
    "not understood": (sealed(entries_of(TWO) + entry(9, 1, b"!")), "type 9"),
    "no pad": (sealed(entry(2, 1, b"note")), "must come behind the pad"),
    "nothing": (sealed(b""), "there is no pad in the stream"),
    "too many notes": (sealed(entries_of(TWO) + 63 * entry(2, 1, b"note")), "must be at most 64"),
    "long note": (sealed(entries_of(TWO) + entry(2, 1, bytes(257))), "must be at most 256"),
    "impossible count": (b"NOTEPAD!" + struct.pack(">II8sQ", 1, 1, SERIAL, 1 << 48), "written"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_state_is_refused_and_the_source_goes_on(
    daemon: Callable[..., Daemon], guest: Guest, name: str
) -> None:
    stream, why = BROKEN[name]
    here, there = daemon("here"), daemon("there")
    with here.connect(guest) as source, there.connect(guest) as target:
        start(source, guest)
        before = guest.ask(b"one")
        base = source.get_vring_base(0)
        save(source)
        assert not load(target, stream)
        assert why in there.log
        target.close()
        start(source, guest, base)
        assert guest.ask(b"two") == (before.serial, 2, 0, ["one", "two"])
    assert there.printed == []


def test_nothing_is_left_of_a_state_that_was_not_used(daemon: Callable[..., Daemon], guest: Guest) -> None:
    """Neither of one that was broken nor of one that another came after."""
    there = daemon("there")
    with there.connect(guest) as target:
        assert not load(target, BROKEN["damaged"][0])
        assert load(target, TWO)
        assert load(target, ONE)
        assert load(target, TWO)
        start(target, guest)
        assert guest.ask() == Answer(SERIAL, 2, 1, ["one", "zwei ✓"])
    assert there.printed == ["a pad has come from frozen, 2 notes were written"]


@pytest.mark.parametrize(
    ("stream", "answer"),
    [
        ("1.bin", Answer(SERIAL, 3, 0, [])),
        ("2-first.bin", Answer(SERIAL, 2, 0, ["one", "zwei ✓"])),
        ("2.bin", Answer(SERIAL, 2, 1, ["one", "zwei ✓"])),
    ],
)
def test_states_of_every_version_are_read(
    daemon: Callable[..., Daemon], guest: Guest, stream: str, answer: Answer
) -> None:
    there = daemon("there")
    with there.connect(guest) as target:
        assert load(target, (STREAMS / stream).read_bytes())
        start(target, guest)
        assert guest.ask() == answer


def test_what_is_read_is_written_the_same(daemon: Callable[..., Daemon], guest: Guest) -> None:
    """A state of today through a daemon of the name that it was made with; and as version 1."""
    for stream, arguments in (("2.bin", ()), ("1.bin", ("--migrate-version", "1"))):
        there = daemon("frozen", *arguments)
        with there.connect(guest) as target:
            frozen = (STREAMS / stream).read_bytes()
            assert load(target, frozen)
            start(target, guest)
            guest.ask()
            base = target.get_vring_base(0)
            assert base == 1
            assert save(target) == frozen
            guest.available = guest.used = 0
            guest.put(AVAILABLE, bytes(8))
            guest.put(USED, bytes(8))
        there.stop()


def test_a_newer_writer_may_say_more(daemon: Callable[..., Daemon], guest: Guest) -> None:
    """An entry that may be skipped, a record with a field that nobody here knows."""
    there = daemon("there")
    pad = entry(1, 1, struct.pack(">H8sQIQ", 28, SERIAL, 5, 7, 99))
    with there.connect(guest) as target:
        assert load(target, sealed(entry(9, 0, b"whatever") + pad + entry(2, 1, b"note")))
        start(target, guest)
        assert guest.ask() == Answer(SERIAL, 5, 7, ["note"])


def test_what_the_device_writes_is_logged(daemon: Callable[..., Daemon], guest: Guest) -> None:
    """Or a migration would leave it behind."""
    log = os.memfd_create("log")
    os.ftruncate(log, 1 << 18)
    with daemon("here").connect(guest, log=log) as client:
        start(client, guest)
        guest.ask(b"one")
        client.get_vring_base(0)
        written = os.pread(log, 1 << 18, 0)
    os.close(log)
    pages = {8 * at + bit for at, byte in enumerate(written) if byte for bit in range(8) if byte >> bit & 1}
    assert {(GUEST + USED) // 4096, (GUEST + ANSWER) // 4096} <= pages
    assert pages <= set(range(GUEST // 4096, (GUEST + SIZE) // 4096))


def _outside(guest: Guest) -> None:
    guest.descriptor(0, GUEST + SIZE - 8, 16, 0)


def _below(guest: Guest) -> None:
    guest.descriptor(0, GUEST - 8, 16, WRITE)


def _far(guest: Guest) -> None:
    guest.descriptor(0, (1 << 64) - 8, 0xFFFFFFFF, WRITE)


def _loop(guest: Guest) -> None:
    guest.descriptor(0, GUEST + NOTE, 1, NEXT, 0)


def _no_such_descriptor(guest: Guest) -> None:
    guest.descriptor(0, GUEST + NOTE, 1, NEXT, NUM)


def _indirect(guest: Guest) -> None:
    guest.descriptor(0, GUEST + NOTE, 16, INDIRECT)


def _wrong_order(guest: Guest) -> None:
    guest.descriptor(0, GUEST + ANSWER, 16, WRITE | NEXT, 1)
    guest.descriptor(1, GUEST + NOTE, 16, 0)


@pytest.mark.parametrize(
    "spoil", [_outside, _below, _far, _loop, _no_such_descriptor, _indirect, _wrong_order], ids=lambda f: f.__name__[1:]
)
def test_a_driver_that_writes_nonsense_stops_its_ring_and_nothing_else(
    daemon: Callable[..., Daemon], guest: Guest, spoil: Callable[[Guest], None]
) -> None:
    here = daemon("here")
    with here.connect(guest) as client:
        start(client, guest)
        spoil(guest)
        guest.offer(0)
        assert select.select([guest.err], [], [], LIMIT)[0]
        assert "the ring is broken" in here.log
        assert client.get_vring_base(0) == 0
        guest.offer(0, NUM + 1)  # more than there can be
        os.eventfd_read(guest.err)
        start(client, guest)
        assert select.select([guest.err], [], [], LIMIT)[0]
    guest.available = 0
    guest.put(AVAILABLE, bytes(4))
    guest.put(USED, bytes(4))
    with here.connect(guest) as client:
        start(client, guest)
        assert guest.ask(b"one").notes == ["one"]


def test_what_the_device_cannot_do_is_refused(daemon: Callable[..., Daemon], guest: Guest) -> None:
    with daemon("here").connect(guest) as client:
        with pytest.raises(RequestFailedError):
            client.set_vring_num(0, 6)
        with pytest.raises(RequestFailedError):
            client.set_vring_kick(0, None)
        with pytest.raises(RequestFailedError):
            client.set_mem_table([MemoryRegion(GUEST, 2 * SIZE, USER, BEFORE, guest.fd)])
        start(client, guest)
        assert guest.ask(b"one").written == 1


def test_the_examples_are_built_on_the_two_libraries_alone() -> None:
    for path in (ROOT / "examples").glob("*.py"):
        modules = {
            name
            for node in ast.walk(ast.parse(path.read_text()))
            for name in (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else []
            )
        }
        ours = {".".join(name.split(".")[:2]) for name in modules if name.split(".")[0] == "godwit"}
        assert ours == {"godwit.vhost_user", "godwit.migration"}


def test_the_tutorial_quotes_the_example() -> None:
    """Every piece of code in it is in the program, as it is there."""
    text = EXAMPLE.read_text()
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "tutorial.md").read_text(), re.DOTALL)
    assert len(blocks) >= 10
    assert [block for block in blocks if block not in text] == []
