#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""A notepad for a guest: a small vhost-user device whose state migrates.

    python examples/notepad.py /tmp/notepad.sock

docs/tutorial.md builds it, part by part.

The guest puts requests into one virtqueue. What it may write is a note in
UTF-8, or nothing; the notepad prints it (this is what is visible outside) and
answers with ``ANSWER`` and the notes that it keeps, a line each, as far as
there is room.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import mmap
import os
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from godwit.migration import Direction as Way
from godwit.migration import Entries, Field, Kind, Migration, Part, Record, Section, State, Transfers, Version
from godwit.migration.entries import Push
from godwit.migration.layout import One, Text
from godwit.migration.section import octets, u32, u64
from godwit.vhost_user import BaseDevice, DeviceError, Direction, Feature, MemoryRegion, VringAddr, VringFlag, serve

log = logging.getLogger("notepad")

MAX_NOTE = 256  # bytes of UTF-8
MAX_NOTES = 64  # that are kept
COUNTS = 1 << 48  # so many can be counted

#: The serial number, how many notes were written and how many refused, and the bytes of text that follow.
ANSWER = struct.Struct("<8sQII")


# ---- the notepad: nothing here knows of virtio or of migrations


@dataclass
class Pad:
    """What a guest knows of its notepad, and has to find again wherever it goes."""

    serial: bytes
    written: int = 0
    refused: int = 0
    notes: tuple[str, ...] = ()  # the last ones
    origin: str = ""  # where it came from

    def answer(self, room: int) -> bytes:
        """What the guest is told, in at most ``room`` bytes."""
        text = "\n".join(self.notes).encode()[: max(0, room - ANSWER.size)]
        return (ANSWER.pack(self.serial, self.written, self.refused, len(text)) + text)[:room]


class Desk:
    """Where the pad in use lies, and beside it one that has come and must not be used yet."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.pad = Pad(os.urandom(8))
        self.arriving: Pad | None = None

    def request(self, data: bytes, room: int) -> bytes:
        """Take what the guest wrote, and give the answer."""
        pad = self.pad
        try:
            if len(data) > MAX_NOTE:
                raise ValueError(f"longer than {MAX_NOTE} bytes")
            note = data.decode()
        except ValueError as error:  # of which UnicodeDecodeError is one
            pad.refused = (pad.refused + 1) & 0xFFFFFFFF
            log.warning("a note was refused: %s", error)
            return pad.answer(room)
        if note:
            pad.written = (pad.written + 1) % COUNTS
            pad.notes = (*pad.notes, note)[-MAX_NOTES:]
            self.say(f"note {pad.written}: {note!r}")
        return pad.answer(room)

    def say(self, text: str) -> None:
        """Print."""
        print(f"{self.name}: {text}", flush=True)

    # What becomes of the pad when it moves

    def arrive(self, pad: Pad) -> None:
        """Target: put it aside."""
        self.arriving = pad

    def drop(self) -> None:
        """Target, discard: nobody will ever know of it."""
        self.arriving = None

    def use(self) -> None:
        """Target, commit: the guest is here."""
        if self.arriving is not None:
            self.pad, self.arriving = self.arriving, None
            self.say(f"a pad has come from {self.pad.origin or 'somewhere'}, {self.pad.written} notes were written")

    def stay(self) -> None:
        """Source, roll-back: nothing was changed, so there is nothing to change back."""
        self.say("the pad stays here")


# ---- the stream, version 1: what is always the same length

PAD_1 = Record(
    "pad",
    (
        Field("serial", octets(8), "serial number that the guest was shown"),
        Field("written", u64, "notes that were written", range(COUNTS)),
    ),
    Pad,
    fields_of=lambda pad: (pad.serial, pad.written),
    doc="A notepad that forgets its notes when it moves.",
)

VERSION_1 = Version(
    1,
    (
        Section(
            "pad", PAD_1, lambda desk: desk.pad, Desk.arrive, rollback=Desk.stay, discard=Desk.drop, commit=Desk.use
        ),
    ),
)

# ---- the stream, version 2: entries that say what they are

PAD = Record(
    "pad",
    (
        Field("serial", octets(8), "serial number that the guest was shown"),
        Field("written", u64, "notes that were written", range(COUNTS)),
        # Came later; a stream without it is read all the same.
        Field("refused", u32, "notes that were refused", default=0),
    ),
    Pad,
    fields_of=lambda pad: (pad.serial, pad.written, pad.refused),
    doc="A notepad without its notes.",
)


def load_pad(desk: Desk, part: Part, pad: Pad) -> None:
    """The pad, which comes first."""
    if desk.arriving is not None:
        raise part.bad("pad", "count", 2, "must be 1")
    desk.arrive(pad)


def load_note(desk: Desk, part: Part, note: str) -> None:
    """One note, behind those before it."""
    pad = desk.arriving
    if pad is None:
        raise part.bad("note", "count", 1, "must come behind the pad")
    if len(pad.notes) == MAX_NOTES:
        raise part.bad("note", "count", MAX_NOTES + 1, f"must be at most {MAX_NOTES}")
    pad.notes = (*pad.notes, note)


def load_origin(desk: Desk, _part: Part, name: str) -> None:
    """The name of the source."""
    if desk.arriving is not None:
        desk.arriving.origin = name


def loaded(desk: Desk) -> None:
    """All entries were read."""
    if desk.arriving is None:
        raise ValueError("there is no pad in the stream")


PAD_KIND: Kind[Desk] = Kind(1, "pad", (One(PAD),), load_pad, doc="The notepad.")
NOTE_KIND: Kind[Desk] = Kind(
    2, "note", (Text("note", MAX_NOTE, "the note"),), load_note, doc="One for each, oldest first."
)
ORIGIN_KIND: Kind[Desk] = Kind(
    3, "origin", (Text("origin", 255, "a name"),), load_origin, required=False, doc="Where the pad comes from."
)


def save(desk: Desk, push: Push) -> None:
    """All entries, in order."""
    push(PAD_KIND, desk.pad)
    push(ORIGIN_KIND, desk.name)
    for note in desk.pad.notes:
        push(NOTE_KIND, note)


VERSION_2 = Version(
    2,
    (
        Entries(
            "pad",
            (PAD_KIND, NOTE_KIND, ORIGIN_KIND),
            save,
            loaded=loaded,
            rollback=Desk.stay,
            discard=Desk.drop,
            commit=Desk.use,
        ),
    ),
)

VERSIONS = (VERSION_1, VERSION_2)
MAGIC = int.from_bytes(b"NOTEPAD!", "big")  # no other device's


# ---- guest memory


class RingError(Exception):
    """The guest's driver, or the front-end, has put nonsense where the device must read."""


class Memory:
    """Guest memory as the front-end shares it, and the log of what was written there.

    Every access goes through ``_place``, so that none goes elsewhere.
    """

    PAGE = 4096  # bytes for which the log has a bit

    def __init__(self) -> None:
        self.logging = False
        self._regions: list[tuple[MemoryRegion, mmap.mmap]] = []
        self._log: mmap.mmap | None = None
        self._log_offset = 0

    def add(self, region: MemoryRegion) -> None:
        """Map a region; its descriptor is closed."""
        try:
            # A mapping has to begin at a page; so it begins where the file does.
            self._regions.append((region, mmap.mmap(region.fd, region.mmap_offset + region.size)))
        except (OSError, ValueError) as error:
            raise DeviceError(f"cannot map guest memory: {error}") from error
        finally:
            os.close(region.fd)

    def remove(self, gone: MemoryRegion) -> None:
        """Unmap the region that is at this address."""
        for entry in [entry for entry in self._regions if entry[0].guest_addr == gone.guest_addr]:
            self._regions.remove(entry)
            entry[1].close()

    def close(self) -> None:
        """Unmap everything."""
        while self._regions:
            self._regions.pop()[1].close()
        if self._log is not None:
            self._log.close()
            self._log = None

    def replace(self, regions: list[MemoryRegion]) -> None:
        """These instead of all there were."""
        before, self._regions = self._regions, []
        try:
            for number, region in enumerate(regions):
                try:
                    self.add(region)
                except DeviceError:
                    for rest in regions[number + 1 :]:
                        os.close(rest.fd)
                    raise
        except DeviceError:
            before, self._regions = self._regions, before  # as it was
            raise
        finally:
            for _, mapping in before:
                mapping.close()

    def read(self, address: int, size: int, *, user: bool = False) -> bytes:
        """Bytes at a guest address, or at one of the front-end's (``user``)."""
        mapping, at = self._place(address, size, user)
        return mapping[at : at + size]

    def write(self, address: int, data: bytes, *, user: bool = False) -> None:
        """Put bytes there. At a guest address that is logged."""
        mapping, at = self._place(address, len(data), user)
        mapping[at : at + len(data)] = data
        if not user and self.logging:
            self.mark(address, len(data))

    def check(self, address: int, size: int) -> None:
        """:raises RingError: this is not all in one region."""
        self._place(address, size, False)

    def _place(self, address: int, size: int, user: bool) -> tuple[mmap.mmap, int]:
        for region, mapping in self._regions:
            offset = address - (region.user_addr if user else region.guest_addr)
            if offset >= 0 and offset + size <= region.size:
                return mapping, region.mmap_offset + offset
        raise RingError(f"{size} bytes at {address:#x} are not in memory that is shared")

    def log_to(self, fd: int, size: int, offset: int) -> None:
        """Log there from now on: a bit for each page; the descriptor is closed."""
        try:
            log_map = mmap.mmap(fd, offset + size)
        except (OSError, ValueError) as error:
            raise DeviceError(f"cannot map the log: {error}") from error
        finally:
            os.close(fd)
        if self._log is not None:
            self._log.close()
        self._log, self._log_offset = log_map, offset

    def mark(self, address: int, size: int) -> None:
        """Note that guest memory was written to.

        Others set and clear bits meanwhile, and Python cannot set one bit in one
        go. It can store a byte: so eight pages are said to be written, which
        costs a little time, where a bit that is lost would cost data.
        """
        if self._log is None:
            return
        for byte in range(address // self.PAGE // 8, (address + max(size, 1) - 1) // self.PAGE // 8 + 1):
            if self._log_offset + byte >= len(self._log):
                raise RingError(f"the log has no place for {address:#x}")
            self._log[self._log_offset + byte] = 0xFF


# ---- the virtqueue: split, without indirect descriptors and event indices (virtio 1.3, section 2.7)

DESCRIPTOR = struct.Struct("<QIHH")  # address, length, flags, next
USED = struct.Struct("<II")  # head of the chain, bytes written
NEXT, WRITE, INDIRECT = 1, 2, 4


@dataclass
class Request:
    """A chain of descriptors: what the guest wrote, and where it wants the answer."""

    head: int
    data: bytes
    writable: list[tuple[int, int]]  # addresses and lengths

    @property
    def room(self) -> int:
        """Bytes that the answer may have."""
        return sum(length for _, length in self.writable)


class Ring:
    """One virtqueue in guest memory. Every number in it may be changed by the guest at any time: each is read once."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.num = 0
        self.addr = VringAddr(0, 0, 0, 0)
        self.next = 0  # the next available entry to take, modulo 65536
        self.used = 0  # the next used entry to fill, modulo 65536

    def start(self) -> None:
        """Go on where the used ring says that its last device ended: at another host, maybe."""
        self.used = self._u16(self.addr.used + 2)

    def requests(self) -> Iterator[Request]:
        """All that are waiting."""
        waiting = (self._u16(self.addr.available + 2) - self.next) & 0xFFFF
        if waiting > self.num:
            raise RingError(f"{waiting} entries are available, in a ring of {self.num}")
        for _ in range(waiting):
            head = self._u16(self.addr.available + 4 + 2 * (self.next % self.num))
            request = self._chain(head)
            self.next = (self.next + 1) & 0xFFFF
            yield request

    def _chain(self, head: int) -> Request:
        request = Request(head, b"", [])
        index = head
        for _ in range(self.num):
            if index >= self.num:
                raise RingError(f"descriptor {index}, in a ring of {self.num}")
            entry = self.memory.read(self.addr.descriptor + DESCRIPTOR.size * index, DESCRIPTOR.size, user=True)
            address, length, flags, following = DESCRIPTOR.unpack(entry)
            if flags & INDIRECT:
                raise RingError("an indirect descriptor, which was not offered")
            self.memory.check(address, length)
            if flags & WRITE:
                request.writable.append((address, length))
            elif request.writable:
                raise RingError("a descriptor to read from, behind one to write to")
            else:
                room = MAX_NOTE + 1 - len(request.data)  # one more, so that it is seen to be too long
                request.data += self.memory.read(address, min(length, room))
            if not flags & NEXT:
                return request
            index = following
        raise RingError("a chain of descriptors that has no end")

    def answer(self, request: Request, data: bytes) -> None:
        """Give the chain back, with an answer of at most ``request.room`` bytes."""
        at = 0
        for address, length in request.writable:
            self.memory.write(address, data[at : at + length])
            at += length
        place = 4 + USED.size * (self.used % self.num)
        self._write_used(place, USED.pack(request.head, len(data)))
        self.used = (self.used + 1) & 0xFFFF
        self._write_used(2, self.used.to_bytes(2, "little"))  # last: now the guest sees it

    def _write_used(self, offset: int, data: bytes) -> None:
        self.memory.write(self.addr.used + offset, data, user=True)
        if self.addr.flags & VringFlag.LOG:
            self.memory.mark(self.addr.log + offset, len(data))

    def _u16(self, address: int) -> int:
        return int.from_bytes(self.memory.read(address, 2, user=True), "little")


# ---- the device: what the front-end asks for


class Notepad(BaseDevice):
    """The notepad of one guest, for as long as its front-end is connected. ``version`` is of the streams it writes."""

    queues = 1

    def __init__(self, desk: Desk, version: int | None = None) -> None:
        self._desk = desk
        self._version = version
        self._memory = Memory()
        self._ring = Ring(self._memory)
        self._transfers: Transfers[Desk] = Transfers()
        self._kick = self._call = self._err = -1
        self._enabled = False

    async def set_features(self, features: int) -> None:
        """SET_FEATURES. Without VHOST_USER_F_PROTOCOL_FEATURES a ring is enabled from the start."""
        self._memory.logging = bool(features & Feature.VHOST_F_LOG_ALL)
        if not features & Feature.VHOST_USER_F_PROTOCOL_FEATURES:
            self._enabled = True

    async def set_mem_table(self, regions: list[MemoryRegion]) -> None:
        """SET_MEM_TABLE."""
        self._memory.replace(regions)

    async def add_mem_region(self, region: MemoryRegion) -> None:
        """ADD_MEM_REG."""
        self._memory.add(region)

    async def remove_mem_region(self, region: MemoryRegion) -> None:
        """REM_MEM_REG."""
        self._memory.remove(region)

    async def set_log(self, fd: int, size: int, offset: int) -> None:
        """SET_LOG_BASE."""
        self._memory.log_to(fd, size, offset)

    async def set_vring_num(self, index: int, num: int) -> None:
        """SET_VRING_NUM."""
        if num & (num - 1):
            raise DeviceError(f"a split ring cannot have {num} entries")
        self._ring.num = num

    async def set_vring_addr(self, index: int, addr: VringAddr) -> None:
        """SET_VRING_ADDR."""
        self._ring.addr = addr

    async def set_vring_base(self, index: int, base: int) -> None:
        """SET_VRING_BASE."""
        self._ring.next = base

    async def set_vring_call(self, index: int, fd: int | None) -> None:
        """SET_VRING_CALL."""
        self._call = exchange(self._call, fd)

    async def set_vring_err(self, index: int, fd: int | None) -> None:
        """SET_VRING_ERR."""
        self._err = exchange(self._err, fd)

    async def set_vring_enable(self, index: int, enabled: bool) -> None:
        """SET_VRING_ENABLE."""
        self._enabled = enabled
        self._serve()

    async def reset_owner(self) -> None:
        """RESET_OWNER."""
        self._enabled = False

    # The ring at work

    def _start(self, kick: int) -> None:
        try:
            self._ring.start()
        except RingError as error:
            os.close(kick)
            raise DeviceError(str(error)) from error
        self._stop()
        os.set_blocking(kick, False)
        self._kick = kick
        asyncio.get_running_loop().add_reader(kick, self._kicked)
        self._serve()  # what has waited since the ring was stopped, here or elsewhere

    def _stop(self) -> None:
        if self._kick >= 0:
            asyncio.get_running_loop().remove_reader(self._kick)
            self._kick = exchange(self._kick, None)

    def _kicked(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._kick)
        self._serve()

    def _serve(self) -> None:
        if self._kick < 0 or not self._enabled:
            return
        try:
            for request in self._ring.requests():
                self._ring.answer(request, self._desk.request(request.data, request.room))
                signal_fd(self._call)
        except RingError as error:
            log.error("the ring is broken, and stands still from here on: %s", error)
            self._stop()
            signal_fd(self._err)

    # The guest comes and goes

    async def set_vring_kick(self, index: int, fd: int | None) -> None:
        """SET_VRING_KICK: the guest runs, here."""
        if fd is None:
            raise DeviceError("a ring without a kick would have to be polled, and is not")
        try:
            await self._transfers.guest_runs()
        except BaseException:
            os.close(fd)
            raise
        self._start(fd)

    async def get_vring_base(self, index: int) -> int:
        """GET_VRING_BASE: the guest stands still."""
        self._stop()
        return self._ring.next

    async def set_device_state_fd(self, direction: Direction, phase: int, fd: int) -> int | None:
        """SET_DEVICE_STATE_FD: save to the pipe or load from it, while the front-end goes on."""
        transfer = Migration(VERSIONS, self._desk, magic=MAGIC)
        if direction is Direction.SAVE:
            await self._transfers.begin(transfer, fd, Way.SOURCE, self._version)
        else:
            await self._transfers.begin(transfer, fd, Way.TARGET)
        return None

    async def check_device_state(self) -> bool:
        """CHECK_DEVICE_STATE: whether all of it was saved or loaded."""
        return await self._transfers.check()

    async def disconnected(self) -> None:
        """The front-end has hung up."""
        if await self._transfers.hung_up() in (State.SAVED, State.LINGERING):
            self._desk.say("the pad has moved away")
        self._stop()
        self._call = exchange(self._call, None)
        self._err = exchange(self._err, None)
        self._memory.close()


def exchange(before: int, fd: int | None) -> int:
    """Close a descriptor that is held, if one is; gives the one that is held from now on, -1 for none."""
    if before >= 0:
        os.close(before)
    return -1 if fd is None else fd


def signal_fd(fd: int) -> None:
    """Signal an eventfd, if there is one."""
    if fd >= 0:
        with contextlib.suppress(BlockingIOError):  # it is signalled already
            os.eventfd_write(fd, 1)


# ---- the daemon


async def run(path: str, name: str, version: int | None) -> None:
    """Serve one front-end after another, each with a pad of its own, until a signal comes."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None  # we are in it
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)  # left by an earlier run
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        listener.setblocking(False)
        while True:
            front_end, _ = await loop.sock_accept(listener)
            await serve(front_end, Notepad(Desk(name), version))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="A notepad for a guest, as a vhost-user device that migrates.")
    parser.add_argument("socket", metavar="SOCKET", help="path of the UNIX socket that the front-end connects to")
    parser.add_argument("--name", default=socket.gethostname(), help="what it calls itself (this host's name)")
    parser.add_argument(
        "--migrate-version",
        type=int,
        choices=[version.id for version in VERSIONS],
        help="version of the state that it writes, for a target that is older (the newest)",
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(run(arguments.socket, arguments.name, arguments.migrate_version))
    return 0


if __name__ == "__main__":
    sys.exit(main())
