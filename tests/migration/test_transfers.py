# SPDX-License-Identifier: GPL-2.0-or-later
"""What a front-end does next decides a transfer: with real pipes, and a device that notes what is done to it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from godwit.migration import Direction, Header, Migration, Reader, Stage, State, StateError, Transfers, Version, Writer

SOURCE, TARGET = Direction.SOURCE, Direction.TARGET
LIMIT = 10.0


class Device:
    def __init__(self) -> None:
        self.calls: list[str] = []
        self.held = threading.Event()  # commit and rollback wait for it
        self.held.set()
        self.entered = threading.Event()
        self.begun = threading.Event()


def source(device: Device, writer: Writer) -> None:
    device.calls.append("source")
    device.begun.set()
    writer.push_bytes(b"x" * (1 << 20))  # more than a pipe holds


def target(device: Device, reader: Reader) -> None:
    device.calls.append("target")
    device.begun.set()
    reader.pull_bytes(1 << 20)


def noted(name: str) -> Callable[[Device], None]:
    def call(device: Device) -> None:
        device.calls.append(name)
        device.entered.set()
        assert device.held.wait(LIMIT)

    return call


STAGE: Stage[Device] = Stage(
    "all",
    source=source,
    target=target,
    rollback=noted("rollback"),
    linger=lambda device: device.calls.append("linger"),
    discard=noted("discard"),
    commit=noted("commit"),
)
VERSIONS = (Version(1, (STAGE,)),)
STREAM = Header(1, 1).pack() + b"x" * (1 << 20)

Step = Callable[[Transfers[Device]], Coroutine[Any, Any, object]]


def run(work: Callable[[Transfers[Device], Device], Coroutine[Any, Any, None]]) -> list[str]:
    """What was done to the device."""
    device = Device()

    async def main() -> None:
        async with asyncio.timeout(LIMIT):
            await work(Transfers(), device)

    asyncio.run(main())
    return device.calls


class Pipe:
    """The front-end's end of a transfer, in a thread of its own; ``whole`` False: it neither reads nor writes."""

    def __init__(self, direction: Direction, stream: bytes = STREAM, *, whole: bool = True) -> None:
        reading, writing = os.pipe()
        self.theirs, self.ours = (writing, reading) if direction is SOURCE else (reading, writing)
        self._thread = threading.Thread(target=self._read if direction is SOURCE else lambda: self._write(stream))
        if whole:
            self._thread.start()

    def _read(self) -> None:
        while os.read(self.ours, 1 << 16):
            pass

    def _write(self, stream: bytes) -> None:
        with contextlib.suppress(BrokenPipeError), open(self.ours, "wb", closefd=False) as pipe:
            pipe.write(stream)
        os.close(self.ours)
        self.ours = -1

    def close(self) -> None:
        if self._thread.ident is not None:
            self._thread.join(LIMIT)
        if self.ours >= 0:
            os.close(self.ours)
            self.ours = -1


async def begin(
    transfers: Transfers[Device], device: Device, direction: Direction, stream: bytes = STREAM, *, whole: bool = True
) -> Pipe:
    pipe = Pipe(direction, stream, whole=whole)
    await transfers.begin(Migration(VERSIONS, device), pipe.theirs, direction)
    return pipe


def now(transfers: Transfers[Device]) -> State | None:
    """The state; to the type checker it is the same value until something is assigned."""
    return transfers.state


RUNS: Step = Transfers.guest_runs
ANNOUNCED: Step = Transfers.guest_is_announced
GONE: Step = Transfers.hung_up
OTHER: Step = functools.partial(Transfers.end, why="something else")


@pytest.mark.parametrize(
    ("direction", "step", "ended", "done"),
    [
        (SOURCE, RUNS, State.ROLLED_BACK, ["source", "linger", "rollback"]),
        (SOURCE, ANNOUNCED, None, ["source", "linger"]),
        (SOURCE, GONE, State.LINGERING, ["source", "linger"]),
        (SOURCE, OTHER, State.ROLLED_BACK, ["source", "linger", "rollback"]),
        (TARGET, RUNS, State.COMMITTED, ["target", "commit"]),
        (TARGET, ANNOUNCED, State.COMMITTED, ["target", "commit"]),
        (TARGET, GONE, State.DISCARDED, ["target", "discard"]),
        (TARGET, OTHER, State.DISCARDED, ["target", "discard"]),
    ],
)
def test_what_comes_after_a_good_transfer(
    direction: Direction, step: Step, ended: State | None, done: list[str]
) -> None:
    async def work(transfers: Transfers[Device], device: Device) -> None:
        pipe = await begin(transfers, device, direction)
        assert await transfers.check()
        assert await transfers.check()  # it may be asked again
        assert await step(transfers) is ended
        assert (transfers.current is None) == (ended is not None)
        await transfers.hung_up()
        pipe.close()

    assert run(work) == done


@pytest.mark.parametrize(
    ("direction", "step", "ended", "done"),
    [
        (SOURCE, RUNS, State.ROLLED_BACK, ["source", "rollback"]),
        (SOURCE, GONE, State.ROLLED_BACK, ["source", "rollback"]),
        (SOURCE, OTHER, State.ROLLED_BACK, ["source", "rollback"]),
        (TARGET, RUNS, State.DISCARDED, ["target", "discard"]),
        (TARGET, GONE, State.DISCARDED, ["target", "discard"]),
        (TARGET, OTHER, State.DISCARDED, ["target", "discard"]),
    ],
)
def test_what_comes_while_it_runs(direction: Direction, step: Step, ended: State, done: list[str]) -> None:
    """The pipe stands still: nobody would wait for it."""

    async def work(transfers: Transfers[Device], device: Device) -> None:
        pipe = await begin(transfers, device, direction, whole=False)
        if direction is TARGET:
            os.write(pipe.ours, STREAM[:100])
        assert await asyncio.to_thread(device.begun.wait, LIMIT)
        assert await transfers.guest_is_announced() is None
        assert await step(transfers) is ended
        assert transfers.current is None
        pipe.close()

    assert run(work) == done


def test_a_save_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is left to be done when the guest runs on, but to say so."""
    caplog.set_level(logging.INFO, "godwit.migration")

    async def work(transfers: Transfers[Device], device: Device) -> None:
        pipe = await begin(transfers, device, SOURCE, whole=False)
        assert await asyncio.to_thread(device.begun.wait, LIMIT)
        pipe.close()
        assert not await transfers.check()
        assert "the guest goes on here" not in caplog.text
        assert await transfers.guest_runs() is State.ROLLED_BACK

    assert run(work) == ["source", "rollback"]
    assert "the guest goes on here: its state was not saved" in caplog.messages


def test_a_load_that_fails() -> None:
    async def work(transfers: Transfers[Device], device: Device) -> None:
        await begin(transfers, device, TARGET, STREAM[:-1])
        assert not await transfers.check()
        assert await transfers.guest_runs() is State.DISCARDED

    assert run(work) == ["target", "discard"]


def test_without_a_transfer_nothing_happens() -> None:
    async def work(transfers: Transfers[Device], device: Device) -> None:
        for step in (RUNS, ANNOUNCED, GONE, OTHER, lambda transfers: transfers.settle("why")):
            assert await step(transfers) is None
        with pytest.raises(StateError, match="no state was transferred"):
            await transfers.check()

    assert run(work) == []


def test_the_next_one_undoes_the_one_before() -> None:
    async def work(transfers: Transfers[Device], device: Device) -> None:
        ran: list[int] = []
        first = await begin(transfers, device, SOURCE)
        assert await transfers.check()
        second = Pipe(SOURCE)
        again = Migration(VERSIONS, device)
        await transfers.begin(again, second.theirs, SOURCE, done=lambda: ran.append(threading.get_ident()))
        assert await transfers.check()
        assert len(ran) == 1
        assert ran[0] != threading.get_ident()
        assert transfers.current is again
        await transfers.hung_up()
        first.close()
        second.close()

    assert run(work) == ["source", "linger", "rollback", "source", "linger"]


def test_a_version_that_is_not_known_is_no_transfer() -> None:
    async def work(transfers: Transfers[Device], device: Device) -> None:
        pipe, done = Pipe(SOURCE), threading.Event()
        with pytest.raises(ValueError, match="version 9 cannot be written"):
            await transfers.begin(Migration(VERSIONS, device), pipe.theirs, SOURCE, 9, done=done.set)
        assert done.is_set()
        assert transfers.current is None
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(pipe.theirs)
        pipe.close()

    assert run(work) == []


@pytest.mark.parametrize(("direction", "callback"), [(SOURCE, "rollback"), (TARGET, "commit")])
def test_a_caller_that_is_cancelled_leaves_the_work_to_its_end(direction: Direction, callback: str) -> None:
    """As when the daemon is stopped: the last request is cancelled, and `disconnected` comes after it."""

    async def work(transfers: Transfers[Device], device: Device) -> None:
        pipe = await begin(transfers, device, direction)
        assert await transfers.check()
        device.held.clear()
        device.entered.clear()
        starting = asyncio.ensure_future(transfers.guest_runs())
        assert await asyncio.to_thread(device.entered.wait, LIMIT)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        ending = asyncio.ensure_future(transfers.hung_up())
        await asyncio.sleep(0.05)
        assert not ending.done()
        device.held.set()
        assert await ending is (State.ROLLED_BACK if direction is SOURCE else State.COMMITTED)
        assert now(transfers) is None
        pipe.close()

    assert run(work)[-1] == callback


def test_a_question_that_is_cancelled_leaves_the_transfer_alone() -> None:
    async def work(transfers: Transfers[Device], device: Device) -> None:
        pipe = await begin(transfers, device, SOURCE, whole=False)
        asking = asyncio.ensure_future(transfers.check())
        assert await asyncio.to_thread(device.begun.wait, LIMIT)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert now(transfers) is State.SAVING
        assert await transfers.settle("the front-end has hung up") is State.ROLLED_BACK
        assert await transfers.hung_up() is State.ROLLED_BACK
        pipe.close()

    assert run(work) == ["source", "rollback"]
