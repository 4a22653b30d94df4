# SPDX-License-Identifier: GPL-2.0-or-later
"""The life cycle of a transfer, with a device of three stages that notes all that is done to it."""

from __future__ import annotations

import gc
import io
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import BinaryIO

import pytest

from godwit.migration import (
    AbortedError,
    BadRecordError,
    Direction,
    Faults,
    Header,
    InjectedFaultError,
    Migration,
    MigrationError,
    NotAStreamError,
    Outcome,
    PeerGoneError,
    PipeError,
    Reader,
    Stage,
    StageError,
    State,
    StateError,
    TrailingDataError,
    TruncatedError,
    Version,
    VersionRefusedError,
    Writer,
)
from godwit.migration.lifecycle import TABLE, Event, LifeCycle

NAMES = ("first", "second", "third")
SOURCE, TARGET = Direction.SOURCE, Direction.TARGET


class Device:
    """Holds a number per stage; ``calls`` is what was done, ``broken`` which of it raises."""

    def __init__(self, numbers: tuple[int, ...] = (0, 0, 0)) -> None:
        self.numbers = dict(zip(NAMES, numbers, strict=True))
        self.calls: list[str] = []
        self.broken: set[str] = set()

    def note(self, call: str) -> None:
        self.calls.append(call)
        if call in self.broken:
            raise RuntimeError(f"{call} is broken")


def make_stage(name: str) -> Stage[Device]:
    def source(device: Device, writer: Writer) -> None:
        device.note(f"source {name}")
        writer.push_u32(device.numbers[name])

    def target(device: Device, reader: Reader) -> None:
        device.note(f"target {name}")
        number = reader.pull_u32()
        if number > 1000:
            raise reader.bad("number", name, number, "must be at most 1000", 4)
        device.numbers[name] = number

    def other(callback: str) -> Callable[[Device], None]:
        return lambda device: device.note(f"{callback} {name}")

    return Stage(
        name,
        source=source,
        target=target,
        rollback=other("rollback"),
        discard=other("discard"),
        commit=other("commit"),
        linger=other("linger"),
    )


STAGES = tuple(make_stage(name) for name in NAMES)
VERSIONS: tuple[Version[Device], ...] = (
    Version(1, STAGES[:1], withdrawn="too short"),
    Version(2, STAGES[:2]),
    Version(3, STAGES, compat=3),
)
STREAM = Header(3, 3).pack() + b"".join(number.to_bytes(4, "big") for number in (11, 22, 33))


def save(
    device: Device, *, version: int | None = None, faults: Faults | None = None
) -> tuple[Migration[Device], bytes]:
    transfer = Migration(VERSIONS, device, faults=faults)
    file = io.BytesIO()
    transfer.request(file, SOURCE, version)
    transfer.run()
    return transfer, file.getvalue()


def load(device: Device, data: bytes, *, faults: Faults | None = None) -> Migration[Device]:
    transfer = Migration(VERSIONS, device, faults=faults)
    transfer.request(io.BytesIO(data), TARGET)
    transfer.run()
    return transfer


def calls(callback: str, *names: str) -> list[str]:
    return [f"{callback} {name}" for name in names]


def state_of(transfer: Migration[Device]) -> State:
    """The state now; to the type checker it is the same value until something is assigned."""
    return transfer.state


def outcome_of(transfer: Migration[Device]) -> Outcome:
    assert transfer.outcome is not None
    return transfer.outcome


# Good transfers


def test_save_linger_close() -> None:
    device = Device((11, 22, 33))
    transfer, data = save(device)
    outcome = outcome_of(transfer)
    assert data == STREAM
    assert outcome
    assert (outcome.version, outcome.size, list(outcome.durations)) == (3, len(STREAM), list(NAMES))
    assert state_of(transfer) is State.SAVED
    assert transfer.linger() == []
    transfer.close()
    assert state_of(transfer) is State.CLOSED
    assert device.calls == calls("source", *NAMES) + calls("linger", *NAMES)


@pytest.mark.parametrize("lingering", [False, True])
def test_roll_back_after_a_good_save(lingering: bool) -> None:
    device = Device()
    transfer, _ = save(device)
    if lingering:
        transfer.linger()
    device.calls.clear()
    assert transfer.rollback() == []
    assert state_of(transfer) is State.ROLLED_BACK
    assert device.calls == calls("rollback", "third", "second", "first")
    transfer.close()


def test_load_commit() -> None:
    device = Device()
    transfer = load(device, STREAM)
    assert state_of(transfer) is State.LOADED
    assert device.calls == calls("target", *NAMES)
    assert device.numbers == {"first": 11, "second": 22, "third": 33}
    assert transfer.commit() == []
    assert state_of(transfer) is State.COMMITTED
    transfer.close()
    assert device.calls == calls("target", *NAMES) + calls("commit", *NAMES)


@pytest.mark.parametrize("by_close", [False, True])
def test_load_discard(by_close: bool) -> None:
    device = Device()
    transfer = load(device, STREAM)
    device.calls.clear()
    if not by_close:
        assert transfer.discard() == []
        assert state_of(transfer) is State.DISCARDED
    transfer.close()
    assert device.calls == calls("discard", "third", "second", "first")


def test_version_of_the_source() -> None:
    _, data = save(Device((1, 2, 3)), version=2)
    assert data == Header(2, 2).pack() + b"\0\0\0\1\0\0\0\2"
    device = Device()
    transfer = load(device, data)
    assert outcome_of(transfer).version == 2
    transfer.commit()
    assert device.calls == calls("target", "first", "second") + calls("commit", "first", "second")


@pytest.mark.parametrize("version", [1, 4, 0x80000001])
def test_version_that_cannot_be_written(version: int) -> None:
    transfer = Migration(VERSIONS, Device())
    read_fd, write_fd = os.pipe()
    with pytest.raises(ValueError, match="cannot be written; known are 2, 3"):
        transfer.request(write_fd, SOURCE, version)
    assert os.read(read_fd, 1) == b""  # closed: the descriptor was ours from the call on
    os.close(read_fd)
    assert state_of(transfer) is State.NEW
    transfer.close()


def test_versions_are_different() -> None:
    with pytest.raises(ValueError, match="two versions of one id"):
        Migration((VERSIONS[1], VERSIONS[1]), Device())


# Bad streams


@pytest.mark.parametrize("size", range(len(STREAM)))
def test_truncated_at_every_byte(size: int) -> None:
    device = Device()
    transfer = load(device, STREAM[:size])
    assert isinstance(outcome_of(transfer).error, TruncatedError)
    assert state_of(transfer) is State.DISCARDED
    entered = NAMES[: 0 if size < 16 else 1 + (size - 16) // 4]
    assert device.calls == calls("target", *entered) + calls("discard", *reversed(entered))
    assert load(device, STREAM).commit() == []


BAD: list[tuple[str, bytes, type[MigrationError], int, str]] = [
    ("magic", b"\0" + STREAM[1:], NotAStreamError, 0, "not a device-state stream"),
    ("zero", STREAM[:12] + bytes(4) + STREAM[16:], NotAStreamError, 0, "compatible down to 0"),
    ("inverted", Header(3, 3).pack()[:12] + b"\0\0\0\4", NotAStreamError, 0, "below compat_version 4"),
    ("newer", Header(7, 5).pack(), VersionRefusedError, 0, "version 7, compatible down to 5; this target knows 2, 3"),
    ("withdrawn", Header(1, 1).pack(), VersionRefusedError, 0, "version 1 was withdrawn: too short"),
    (
        "value",
        STREAM[:20] + b"\xff" * 8,
        BadRecordError,
        2,
        "second is 4294967295, must be at most 1000 .at offset 20.",
    ),
    ("trailing", STREAM + b"\0", TrailingDataError, 3, "bytes follow the last stage, from offset 28"),
]


@pytest.mark.parametrize(("data", "kind", "entered", "text"), [c[1:] for c in BAD], ids=[c[0] for c in BAD])
def test_refused(
    data: bytes, kind: type[MigrationError], entered: int, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    device = Device()
    transfer = load(device, data)
    error = outcome_of(transfer).error
    assert type(error) is kind
    with pytest.raises(kind, match=text):
        raise error
    assert state_of(transfer) is State.DISCARDED
    assert [c for c in device.calls if "discard" in c] == calls("discard", *reversed(NAMES[:entered]))
    assert [(r.levelname, str(error) in r.message) for r in caplog.records] == [("ERROR", True)]
    assert load(device, STREAM).commit() == []


# Failing stages


@pytest.mark.parametrize("side", [SOURCE, TARGET])
@pytest.mark.parametrize("failing", range(3))
def test_failing_stage_is_undone_too(side: Direction, failing: int) -> None:
    device = Device()
    device.broken = {f"{side.value} {NAMES[failing]}"}
    transfer = save(device)[0] if side is SOURCE else load(device, STREAM)
    undo = "rollback" if side is SOURCE else "discard"
    entered = NAMES[: failing + 1]
    assert device.calls == calls(side.value, *entered) + calls(undo, *reversed(entered))
    error = outcome_of(transfer).error
    assert isinstance(error, StageError)
    assert (error.stage, error.callback) == (NAMES[failing], side.value)
    assert isinstance(error.__cause__, RuntimeError)
    assert str(error) == f"{NAMES[failing]}: {side.value} failed: {side.value} {NAMES[failing]} is broken"
    assert state_of(transfer) is (State.ROLLED_BACK if side is SOURCE else State.DISCARDED)


def test_undoing_goes_on_past_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    device = Device()
    device.broken = {"source third", "rollback third", "rollback first"}
    transfer, _ = save(device)
    assert device.calls == calls("source", *NAMES) + calls("rollback", "third", "second", "first")
    errors = outcome_of(transfer).undo_errors
    assert [error.stage for error in errors] == ["third", "first"]
    assert [r.message for r in caplog.records if r.levelno == logging.ERROR][:2] == [str(error) for error in errors]
    assert state_of(transfer) is State.ROLLED_BACK


@pytest.mark.parametrize("callback", ["commit", "discard", "rollback", "linger"])
def test_every_callback_runs(callback: str) -> None:
    device = Device()
    device.broken = {f"{callback} second"}
    transfer = save(device)[0] if callback in ("rollback", "linger") else load(device, STREAM)
    device.calls.clear()
    errors: list[StageError] = getattr(transfer, callback)()
    assert [(error.stage, error.callback) for error in errors] == [("second", callback)]
    assert sorted(device.calls) == sorted(calls(callback, *NAMES))
    transfer.close()


def test_interrupt_undoes_and_is_raised() -> None:
    device = Device()

    def interrupt(_device: Device, _writer: Writer) -> None:
        raise KeyboardInterrupt

    transfer = Migration((Version(1, (*STAGES, Stage("stop", source=interrupt))),), device)
    transfer.request(io.BytesIO(), SOURCE)
    with pytest.raises(KeyboardInterrupt):
        transfer.run()
    assert state_of(transfer) is State.ROLLED_BACK
    assert not outcome_of(transfer)
    assert device.calls[3:] == calls("rollback", "third", "second", "first")


# The table of states


def test_table_has_no_dead_end_and_no_orphan() -> None:
    reached = {State.NEW} | set(TABLE.values())
    assert reached == set(State)
    assert {before for before, _ in TABLE} == set(State) - {State.CLOSED}


def test_what_the_table_lacks_is_refused() -> None:
    life = LifeCycle()
    with pytest.raises(StateError, match="commit: not possible while NEW"):
        life.move(Event.COMMIT)
    assert life.state is State.NEW


METHODS: dict[str, Callable[[Migration[Device]], object]] = {
    "request": lambda t: t.request(io.BytesIO(), SOURCE),
    "run": lambda t: t.run(),
    "rollback": lambda t: t.rollback(),
    "linger": lambda t: t.linger(),
    "commit": lambda t: t.commit(),
    "discard": lambda t: t.discard(),
}
MAKERS: dict[str, tuple[Callable[[], Migration[Device]], set[str]]] = {
    "new": (lambda: Migration(VERSIONS, Device()), {"request"}),
    "saved": (lambda: save(Device())[0], {"rollback", "linger"}),
    "loaded": (lambda: load(Device(), STREAM), {"commit", "discard"}),
    "failed": (lambda: load(Device(), b""), set()),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("state", MAKERS)
def test_methods_in_wrong_states(state: str, method: str) -> None:
    make, legal = MAKERS[state]
    transfer = make()
    if method in legal:
        METHODS[method](transfer)
    else:
        before = transfer.state
        with pytest.raises(StateError):
            METHODS[method](transfer)
        assert state_of(transfer) is before
    transfer.close()
    transfer.close()
    for call in METHODS.values():
        with pytest.raises(StateError):
            call(transfer)


# Faults with names


def test_points_that_are_passed() -> None:
    faults = Faults()
    save(Device(), faults=faults)[0].rollback()
    assert faults.passed == [
        "source:header",
        *(f"source:{name}{when}" for name in NAMES for when in ("", ":after")),
        "source:end",
        "rollback:third",
        "rollback:second",
        "rollback:first",
    ]
    faults = Faults()
    load(Device(), STREAM, faults=faults).commit()
    assert faults.passed == [
        "target:header",
        *(f"target:{name}{when}" for name in NAMES for when in ("", ":after")),
        "target:end",
        *(f"commit:{name}" for name in NAMES),
    ]


POINTS = ["header", *(f"{name}{when}" for name in NAMES for when in ("", ":after")), "end"]


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("side", [SOURCE, TARGET])
def test_fault_at_every_point(side: Direction, point: str) -> None:
    device = Device()
    faults = Faults.parse(f"{side.value}:{point}=fail")
    transfer = save(device, faults=faults)[0] if side is SOURCE else load(device, STREAM, faults=faults)
    error = outcome_of(transfer).error
    assert isinstance(error, StageError)
    assert isinstance(error.__cause__, InjectedFaultError)
    entered = 0 if point == "header" else 3 if point == "end" else 1 + NAMES.index(point.split(":")[0])
    undo = "rollback" if side is SOURCE else "discard"
    assert [c for c in device.calls if undo in c] == calls(undo, *reversed(NAMES[:entered]))
    assert state_of(transfer) is (State.ROLLED_BACK if side is SOURCE else State.DISCARDED)


def test_fault_in_the_undoing() -> None:
    transfer, _ = save(Device(), faults=Faults.parse("rollback:second=fail"))
    assert [error.stage for error in transfer.rollback()] == ["second"]


@pytest.mark.parametrize("text", ["source:end", "source:end=burn", "=cut"])
def test_unknown_faults(text: str) -> None:
    with pytest.raises(ValueError, match="want POINT=ACTION"):
        Faults.parse(text)


# Peer against peer over a pipe


def between(
    source: Device, target: Device, source_faults: str = "", target_faults: str = ""
) -> tuple[Migration[Device], Migration[Device]]:
    """One transfer from a thread to this one."""
    read_fd, write_fd = os.pipe()
    saving = Migration(VERSIONS, source, faults=Faults.parse(source_faults), timeout=10)
    loading = Migration(VERSIONS, target, faults=Faults.parse(target_faults), timeout=10)
    saving.request(write_fd, SOURCE)
    loading.request(read_fd, TARGET)
    thread = threading.Thread(target=saving.run)
    thread.start()
    loading.run()
    thread.join()
    for fd in (read_fd, write_fd):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    return saving, loading


def test_between_peers() -> None:
    source, target = Device((5, 6, 7)), Device()
    saving, loading = between(source, target)
    assert saving.outcome
    assert loading.outcome
    assert target.numbers == source.numbers
    assert outcome_of(saving).size == outcome_of(loading).size == len(STREAM)


@pytest.mark.parametrize("point", [*POINTS])
def test_source_cuts_the_pipe(point: str) -> None:
    source, target = Device((5, 6, 7)), Device()
    saving, loading = between(source, target, source_faults=f"source:{point}=cut")
    if point in ("third:after", "end"):  # all was written before
        assert loading.outcome
        assert saving.outcome
        assert saving.rollback() == []
    else:
        assert isinstance(outcome_of(loading).error, TruncatedError)
        assert isinstance(outcome_of(saving).error, PipeError)
        assert loading.state is State.DISCARDED
    assert saving.state is State.ROLLED_BACK


@pytest.mark.parametrize("point", [*POINTS])
def test_target_cuts_the_pipe(point: str) -> None:
    """The source notices or has written all before; either way it can go on."""
    source, target = Device((5, 6, 7)), Device()
    saving, loading = between(source, target, target_faults=f"target:{point}=cut")
    assert loading.state in (State.DISCARDED, State.LOADED)
    if saving.outcome:
        saving.rollback()
    else:
        assert isinstance(outcome_of(saving).error, PeerGoneError)
    assert saving.state is State.ROLLED_BACK
    assert [c for c in source.calls if "rollback" in c] == calls(
        "rollback", *(c.split()[1] for c in reversed(source.calls) if "source" in c)
    )


def test_outcome_is_known_before_the_pipe_closes() -> None:
    read_fd, write_fd = os.pipe()
    transfer = Migration(VERSIONS, Device((1, 2, 3)))
    transfer.request(write_fd, SOURCE)
    thread = threading.Thread(target=transfer.run)
    thread.start()
    reader = Reader(read_fd)
    reader.pull_bytes(len(STREAM))
    assert reader.at_end()
    assert outcome_of(transfer)
    thread.join()
    os.close(read_fd)


@pytest.mark.parametrize("side", [SOURCE, TARGET])
def test_cancel_from_another_thread(side: Direction) -> None:
    device = Device()
    stuck = threading.Event()

    def fill(_device: Device, writer: Writer) -> None:
        stuck.set()
        writer.push_bytes(bytes(1 << 20))  # nobody reads

    def starve(_device: Device, reader: Reader) -> None:
        stuck.set()
        reader.pull_bytes(100)  # nobody writes

    stages = (STAGES[0], Stage("stuck", source=fill, target=starve))
    read_fd, write_fd = os.pipe()
    ours, theirs = (write_fd, read_fd) if side is SOURCE else (read_fd, write_fd)
    if side is TARGET:
        os.write(theirs, Header(1, 1).pack() + bytes(4))
    transfer = Migration((Version(1, stages),), device)
    transfer.request(ours, side)
    thread = threading.Thread(target=transfer.run)
    thread.start()
    assert stuck.wait(10)
    with pytest.raises(StateError):
        transfer.close()
    transfer.cancel("front-end gone")
    thread.join(10)
    assert not thread.is_alive()
    assert isinstance(outcome_of(transfer).error, AbortedError)
    assert device.calls[-1] == ("rollback first" if side is SOURCE else "discard first")
    transfer.close()
    os.close(theirs)


def test_timeout_of_a_transfer() -> None:
    read_fd, write_fd = os.pipe()
    transfer = Migration(VERSIONS, Device(), timeout=0.05)
    transfer.request(read_fd, TARGET)
    started = time.monotonic()
    assert not transfer.run()
    assert time.monotonic() - started < 5
    assert state_of(transfer) is State.DISCARDED
    os.close(write_fd)


def test_file_object_stays_the_callers() -> None:
    file: BinaryIO = io.BytesIO(STREAM)
    transfer = Migration(VERSIONS, Device())
    transfer.request(file, TARGET)
    assert transfer.run()
    transfer.close()
    assert not file.closed


def test_no_descriptor_is_left() -> None:
    gc.collect()  # what other tests did not close
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        saving, loading = between(Device(), Device())
        saving.close()
        loading.close()
    assert len(os.listdir("/proc/self/fd")) == before
