# SPDX-License-Identifier: GPL-2.0-or-later
"""A front-end that asks for anything: the target ``vhost_user``.

Messages with descriptors go into the session, what it takes out of them into
the network device, and that into the engine, which has a step after each. What
holds: the device raises nothing but `DeviceError`; a request is answered once
if it is to be answered, else not; an answer is of the protocol; and when the
front-end is gone, no descriptor, no mapping and no ring is left.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Final

from godwit.daemon.device import NetDevice
from godwit.daemon.options import Options
from godwit.dataplane import Engine
from godwit.net.config import NetConfig
from godwit.vhost_user import (
    TABLE,
    BackendSession,
    DeviceError,
    Feature,
    Request,
    RequestReceived,
    SessionEnded,
)
from godwit.vhost_user.frames import HEADER, NEED_REPLY, REPLY, VERSION, encode

from .devices import require
from .frames import ADDR4, ADDR6, GATEWAY4
from .nowhere import inside
from .ram import AVAIL, BASE, DESC, F_WRITE, FIRST, FREE, RX, SIZE, TX, USED, USER, Ram
from .rings import PLACES, good_frames
from .script import Script, Writer
from .target import Target

STEPS: Final = 40
NUM: Final = 16
STREAM: Final = Path(__file__).resolve().parent.parent / "golden" / "empty.bin"
REQUESTS: Final = sorted(TABLE)

# Of a region: the guest's address, size, the front-end's address, offset in the file.
REGIONS: Final = (
    (BASE, SIZE, USER + BASE, 0),
    (BASE, FIRST, USER + BASE, 0),
    (BASE + FIRST, SIZE - FIRST, USER + BASE + FIRST, FIRST),
    (BASE + SIZE, SIZE, USER + BASE + SIZE, 0),
    (BASE, SIZE + 4096, USER + BASE, 0),
    (0, 1 << 40, 0, 0),
    ((1 << 64) - 4096, 4096, USER, 0),
    (BASE, 4096, USER + BASE, (1 << 64) - 4096),
)

# The flags of a message; what is left of the byte is for the request.
NEEDS, REPLIES, RAW, CUT, MORE_FDS, FEWER_FDS = 1, 2, 4, 8, 16, 32
KINDS: Final = 15  # of descriptors
#: Kinds of descriptors.
QUIET, KICKED, RAM, SMALL, FROM, TO, NAME, NULL, FOLDER, EPOLL, PEERLESS, READ_ONLY, STATE, PROC, PLAIN = range(KINDS)


class AtOnce(ThreadPoolExecutor):
    """In place of a thread: another one each time would take longer than all the rest."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(fn(*args, **kwargs))
        except BaseException as error:
            done.set_exception(error)
        return done


class Desk:
    """The device, and what a front-end has at hand."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        with inside():
            config = NetConfig(addr4=ADDR4, prefix_len4=24, gateway4=GATEWAY4, addr6=ADDR6)
            self.device = NetDevice(config, Options(migrate_linger=False), None)
        self.device._loop = self.loop
        self.device._configure()
        self.engine: Engine = self.device._engine
        self.ram = Ram()
        blank = bytearray(self.ram.blank)
        for at, frame in zip(PLACES, good_frames(), strict=True):
            blank[at : at + 12 + len(frame)] = bytes(12) + frame
        for number, at in enumerate(PLACES):
            put(blank, DESC[TX] + 16 * number, "QIHH", BASE + at, 12 + len(good_frames()[number]), 0, 0)
        for number in range(8):
            put(blank, DESC[RX] + 16 * number, "QIHH", BASE + FREE + 0x1000 + 2048 * number, 1600, F_WRITE, 0)
        put(blank, AVAIL[TX], "HH3H", 0, len(PLACES), *range(len(PLACES)))
        put(blank, AVAIL[RX], "HH8H", 0, 8, *range(8))
        self.ram.blank = bytes(blank)
        self.small = memfd(bytes(4096))
        self.state = memfd(next(iter(sorted(STREAM.parent.glob("*.bin")))).read_bytes())
        self.epoll = select.epoll()
        self.loop.set_default_executor(AtOnce(1))

    def run(self, data: bytes) -> bool:
        """An execution. Whether a request was carried out that a device has a part in."""
        self.ram.wipe()
        with inside():
            return self.loop.run_until_complete(Run(self, Script(data)).all())

    def descriptor(self, kind: int) -> int:
        """A new one."""
        if kind in (QUIET, KICKED):
            return os.eventfd(kind, os.EFD_CLOEXEC)
        if kind in (FROM, TO):
            ends = os.pipe()
            os.close(ends[kind == FROM])
            return ends[kind == TO]
        if kind == PEERLESS:
            here, there = socket.socketpair()
            there.close()
            return here.detach()
        if kind == EPOLL:
            return os.dup(self.epoll.fileno())
        files = {RAM: self.ram.fd, SMALL: self.small, READ_ONLY: self.ram.fd, STATE: self.state}
        if kind in files:
            # Opened anew, for each has its own offset.
            flags = os.O_RDONLY if kind == READ_ONLY else os.O_RDWR
            return os.open(f"/proc/self/fd/{files[kind]}", flags | os.O_CLOEXEC)
        name = {NAME: "/", NULL: "/dev/null", FOLDER: "/", PROC: "/proc/self/stat", PLAIN: __file__}[kind]
        return os.open(name, os.O_CLOEXEC | (os.O_PATH if kind == NAME else os.O_RDONLY))


def put(data: bytearray, at: int, layout: str, *values: int) -> None:
    """Numbers, little-endian."""
    struct.pack_into(f"<{layout}", data, at, *values)


def memfd(data: bytes) -> int:
    """A file in memory."""
    fd = os.memfd_create("fuzz", os.MFD_CLOEXEC)
    os.write(fd, data)
    return fd


class Run:
    """One session."""

    def __init__(self, desk: Desk, script: Script) -> None:
        self.desk, self.device, self.engine, self.script = desk, desk.device, desk.engine, script
        first = script.u8()
        self.session = BackendSession(
            features=self.device.features,
            protocol_features=self.device.protocol_features,
            max_mem_slots=3 if first & 4 else self.device.max_mem_slots,
        )
        self.did = 0
        self.ended = False
        self.begun = first

    async def all(self) -> bool:
        """The whole script, and the end."""
        before = open_fds()
        try:
            if self.begun & 1:
                await self._message(Request.SET_PROTOCOL_FEATURES, 0, struct.pack("=Q", self.device.protocol_features))
                await self._message(Request.SET_OWNER, 0, b"")
            if self.begun & 2:
                await self._usual()
            for _ in range(STEPS):
                if not self.script or self.ended:
                    break
                await self._one()
        finally:
            self.session.close()
            await self.device.disconnected()
            for task in (later := self.device._background.copy()):
                task.cancel()
            await asyncio.gather(*later, return_exceptions=True)
        self.engine.step()
        self.engine.take_rare()
        require(all(ring == (False, False, False, 0, 0) for ring in self.engine.rings()), "a ring is left")
        require(self.engine.counters()["flows"] == 0, "a flow is left")
        after = open_fds()
        if after != before:
            kinds = [os.readlink(f"/proc/self/fd/{fd}") for fd in set(after) - set(before) if fd in open_fds()]
            require(False, f"descriptors are left: {kinds}")
        return self.did > 3

    async def _usual(self) -> None:
        """What a front-end says first: all the rest of a device that works."""
        await self._message(Request.SET_FEATURES, 0, struct.pack("=Q", self.device.features))
        await self._message(Request.SET_MEM_TABLE, 0, table([REGIONS[0]]), [RAM])
        for ring in (RX, TX):
            for request, number in ((Request.SET_VRING_NUM, NUM), (Request.SET_VRING_BASE, 0)):
                await self._message(request, 0, struct.pack("=II", ring, number))
            await self._message(Request.SET_VRING_ADDR, 0, address(ring, 0))
            await self._message(Request.SET_VRING_ERR, 0, struct.pack("=Q", ring), [QUIET])
            await self._message(Request.SET_VRING_CALL, 0, struct.pack("=Q", ring), [QUIET])
            await self._message(Request.SET_VRING_KICK, 0, struct.pack("=Q", ring), [KICKED])
            await self._message(Request.SET_VRING_ENABLE, 0, struct.pack("=II", ring, 1))

    async def _one(self) -> None:
        script = self.script
        number, how = script.u8(), script.u8()
        if number >= len(REQUESTS) + 8:
            self.engine.inject(bytes(60))
            self._step()
            return
        request = REQUESTS[number] if number < len(REQUESTS) else script.u8()
        if how & RAW:
            payload, count = script.take(script.u8()), script.u8() % 4
        else:
            payload, count = self._payload(request)
        count += bool(how & MORE_FDS) - bool(how & FEWER_FDS)
        fds = [script.u8() % KINDS for _ in range(count)]
        flags = (NEED_REPLY if how & NEEDS else 0) | (REPLY if how & REPLIES else 0)
        await self._message(request, flags, payload, fds, script.u8() if how & CUT else 0)

    def _payload(self, request: int) -> tuple[bytes, int]:
        """One that is of the request's form, and how many descriptors it has."""
        script = self.script
        if request == Request.SET_FEATURES:
            return struct.pack("=Q", script.u64() & self.device.features), 0
        if request == Request.SET_PROTOCOL_FEATURES:
            return struct.pack("=Q", script.u8() << 16 | script.u16()), 0
        if request == Request.SET_MEM_TABLE:
            which = [REGIONS[script.u8() % len(REGIONS)] for _ in range(script.u8() % 4)]
            return table(which), len(which)
        if request in (Request.ADD_MEM_REG, Request.REM_MEM_REG):
            region = REGIONS[script.u8() % len(REGIONS)]
            return struct.pack("=5Q", 0, *region), int(request == Request.ADD_MEM_REG)
        if request == Request.SET_LOG_BASE:
            return struct.pack("=QQ", script.u16(), script.u16()), 1
        if request == Request.SET_VRING_ADDR:
            how = script.u8()
            return address(how & 1, how >> 1, script.u16() if how & 128 else 0), 0
        if request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
            how = script.u8()
            return struct.pack("=Q", how & 1 | (256 if how & 2 else 0)), int(not how & 2)
        if request in (Request.SET_VRING_NUM, Request.SET_VRING_BASE):
            return struct.pack("=II", script.u8() & 1, script.u16()), 0
        if request in (Request.SET_VRING_ENABLE, Request.GET_VRING_BASE):
            return struct.pack("=II", script.u8() & 1, script.u8() & 1), 0
        if request in (Request.SEND_RARP, Request.NET_SET_MTU):
            return struct.pack("=Q", script.u16()), 0
        if request == Request.SET_DEVICE_STATE_FD:
            return struct.pack("=II", script.u8() & 1, 0), 1
        return b"", 1 if request == Request.SET_LOG_FD else 0

    async def _message(self, request: int, flags: int, payload: bytes, kinds: Sequence[int] = (), cut: int = 0) -> None:
        """Have a message come, and what it asks for done."""
        if self.ended:
            return
        row = TABLE.get(request)
        ack = bool(flags & NEED_REPLY) and self.session.state.reply_ack
        data = encode(request, flags, payload)
        if request == Request.SET_DEVICE_STATE_FD:
            kinds = [max(kind, RAM) for kind in kinds]  # nothing that has a reader wait: there is no thread for it
        fds = [self.desk.descriptor(kind) for kind in kinds]
        if 0 < cut < len(data):
            self.session.receive(data[:cut], fds)
            require(self.session.next_event() is None, "something comes of a part")
            self.session.receive(data[cut:])
        else:
            self.session.receive(data, fds)
        self.ended = not await self._work_off()
        answers = self.session.outgoing()
        for answer in answers:
            of, said, size = HEADER.unpack_from(answer.data)
            require((of, said) == (request, VERSION | REPLY), f"an answer to {of}, with flags {said:#x}")
            require(size == len(answer.data) - HEADER.size, "an answer of another size")
            for fd in answer.fds:
                os.close(fd)
        due = ack or (row is not None and row.reply is not None)
        require(len(answers) <= due, f"{len(answers)} answers to request {request}")
        require(len(answers) == due or self.ended, f"no answer to request {request}")
        self._step()

    async def _work_off(self) -> bool:
        """Whether the session goes on."""
        while (event := self.session.next_event()) is not None:
            if isinstance(event, SessionEnded):
                return False
            if isinstance(event, RequestReceived):
                method = getattr(self.device, event.row.handler)
                try:
                    value = await method(*event.take_arguments())
                except DeviceError as error:
                    self.session.fail(error)
                else:
                    self.session.complete(value)
                    self.did += 1
        return True

    def _step(self) -> None:
        for _ in range(2):
            self.engine.step()


def address(ring: int, wrong: int, number: int = 0) -> bytes:
    """SET_VRING_ADDR of a ring: right, or wrong in some way."""
    desc, used, avail = (USER + BASE + at[ring] for at in (DESC, USED, AVAIL))
    if wrong & 1:
        used = USER + BASE + USED[1 - ring]
    if wrong & 2:
        avail += number
    if wrong & 4:
        desc = USER + BASE + SIZE - 16 * NUM
    if wrong & 8:
        used = desc
    if wrong & 16:
        avail = USER + BASE + FIRST - 20
    return struct.pack("=II4Q", ring, bool(wrong & 32), desc, used, avail, BASE + USED[ring])


def table(regions: Sequence[tuple[int, int, int, int]]) -> bytes:
    """What SET_MEM_TABLE has."""
    return struct.pack("=II", len(regions), 0) + b"".join(struct.pack("=4Q", *row) for row in regions)


def open_fds() -> list[str]:
    """The descriptors of this process."""
    return os.listdir("/proc/self/fd")


desk: Callable[[], Desk] = cache(Desk)


def run(data: bytes) -> bool:
    """The target. Whether something was done."""
    return desk().run(data)


# ---- to begin with


def _ask(writer: Writer, request: int, how: int = 0) -> Writer:
    return writer.put("BB", REQUESTS.index(request), how)


def seeds() -> Iterator[bytes]:
    """Sessions that go well, and come to an end in one way or another."""
    log_all = int(Feature.VHOST_F_LOG_ALL)
    for first in (1, 3, 5, 7):
        yield Writer().put("B", first).data
        rings = Writer().put("B", first)
        _ask(rings, Request.SET_FEATURES, NEEDS).put("Q", (1 << 64) - 1)
        _ask(rings, Request.SET_MEM_TABLE, NEEDS).put("BBBBB", 2, 1, 2, RAM, RAM)
        for ring in (RX, TX):
            _ask(rings, Request.SET_VRING_NUM, NEEDS).put("BH", ring, NUM)
            _ask(rings, Request.SET_VRING_BASE).put("BH", ring, 0)
            _ask(rings, Request.SET_VRING_ADDR, NEEDS).put("B", ring)
            _ask(rings, Request.SET_VRING_CALL).put("BB", ring, QUIET)
            _ask(rings, Request.SET_VRING_ERR).put("BB", ring, QUIET)
            _ask(rings, Request.SET_VRING_KICK, NEEDS).put("BB", ring, KICKED)
            _ask(rings, Request.SET_VRING_ENABLE).put("BB", ring, 1)
        yield rings.put("BB", 255, 255).data
        away = Writer().bytes(rings.data)
        _ask(away, Request.REM_MEM_REG, NEEDS).put("B", 2)
        _ask(away, Request.ADD_MEM_REG, NEEDS).put("BB", 2, RAM)
        _ask(away, Request.SET_MEM_TABLE, NEEDS).put("B", 0)
        yield away.data
        moved = Writer().put("B", first | 2)
        _ask(moved, Request.SET_LOG_BASE).put("HHB", 1024, 0, SMALL)
        _ask(moved, Request.SET_FEATURES).put("Q", (1 << 64) - 1 & ~log_all)
        _ask(moved, Request.SET_FEATURES).put("Q", (1 << 64) - 1)
        _ask(moved, Request.SET_VRING_ADDR).put("B", TX | 32 << 1)
        moved.put("BB", 255, 255)
        for ring in (RX, TX):
            _ask(moved, Request.GET_VRING_BASE).put("BB", ring, 0)
        saved = Writer().bytes(moved.data)
        _ask(saved, Request.SET_DEVICE_STATE_FD).put("BB", 0, STATE)
        _ask(saved, Request.CHECK_DEVICE_STATE)
        yield saved.data
        _ask(saved, Request.SET_VRING_KICK).put("BB", RX, KICKED)
        yield saved.data
        loaded = Writer().put("B", first)
        _ask(loaded, Request.SET_DEVICE_STATE_FD).put("BB", 1, STATE)
        _ask(loaded, Request.CHECK_DEVICE_STATE)
        yield loaded.data
        _ask(loaded, Request.SEND_RARP).put("H", 0)
        yield loaded.data
    for request in REQUESTS:
        for kind in (QUIET, SMALL, NAME, FOLDER):
            yield Writer().put("BBBBBBB", 3, REQUESTS.index(request), NEEDS, 1, kind, kind, kind).data


TARGETS: Final = {"vhost_user": Target(run, seeds, 1024)}
