# SPDX-License-Identifier: GPL-2.0-or-later
"""Shared by the tests of the laboratory."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import shlex
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import godwit
from godwit.lab.scenario import Load, Scenario
from godwit.vhost_user import (
    BaseDevice,
    DeviceError,
    Direction,
    Feature,
    MemoryRegion,
    ProtocolFeature,
    VringAddr,
    VringFlag,
    serve,
)

from .moves import IDLE, RATE


def _closed_ancestor(path: str) -> str | None:
    """Return the topmost directory on the way to ``path`` that not all may pass."""
    parts = path.split("/")
    for depth in range(2, len(parts) + 1):
        ancestor = "/".join(parts[:depth])
        if not os.stat(ancestor).st_mode & 0o001:
            return ancestor
    return None


def _run_as_nobody(program: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run ``program`` as uid 65534 with no capabilities.

    In a mount namespace of its own, where the interpreter and this package can
    be reached by everyone, wherever they are installed, and where /dev/net/tun
    is open to all, as most distributions have it.
    """
    needed = {
        os.path.realpath(p) for p in (sys.base_prefix, sys.prefix, os.path.dirname(os.path.dirname(godwit.__file__)))
    }
    quoted = shlex.quote
    with tempfile.TemporaryDirectory() as scratch:
        script = ["set -e", f"mount -t tmpfs -o mode=755 none {scratch}"]
        kept = []
        for number, path in enumerate(sorted(needed)):
            if _closed_ancestor(path) is not None:
                kept.append((path, f"{scratch}/{number}"))
                script.append(f"mkdir {scratch}/{number}")
                script.append(f"mount --rbind {quoted(path)} {scratch}/{number}")
        closed = {a for path, _ in kept if (a := _closed_ancestor(path)) is not None}
        script += [f"mount -t tmpfs -o mode=755 none {quoted(a)}" for a in sorted(closed)]
        for path, place in kept:
            script.append(f"mkdir -p {quoted(path)}")
            script.append(f"mount --rbind {place} {quoted(path)}")
        script += [
            f"mknod -m 666 {scratch}/tun c 10 200",
            f"mount --bind {scratch}/tun /dev/net/tun",
            "cd /",
            "exec setpriv --reuid=65534 --regid=65534 --clear-groups --inh-caps=-all"
            f" {quoted(sys.executable)} -c {quoted(program)}",
        ]
        return subprocess.run(
            ["unshare", "--mount", "sh", "-c", "\n".join(script)],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env={"PATH": os.environ["PATH"]},
        )


@pytest.fixture(scope="session")
def run_as_nobody() -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Run a Python program as a user without any rights: ``run_as_nobody(program)``."""
    return _run_as_nobody


# --- a back-end that returns every frame ------------------------------------------

OFFERED = (
    Feature.VIRTIO_F_VERSION_1
    | Feature.VIRTIO_NET_F_MRG_RXBUF
    | Feature.VIRTIO_F_EVENT_IDX
    | Feature.VIRTIO_F_INDIRECT_DESC
    | Feature.VHOST_F_LOG_ALL
    | Feature.VHOST_USER_F_PROTOCOL_FEATURES
)
NEXT, INDIRECT = 1, 4  # VRING_DESC_F_*


class Ring:
    """One virtqueue as the back-end sees it."""

    def __init__(self) -> None:
        self.num = 0
        self.base = 0
        self.used = 0
        self.addr = VringAddr(0, 0, 0, 0)
        self.kick: int | None = None
        self.call: int | None = None
        self.running = False


class Loopback(BaseDevice):
    """Takes frames from the transmit ring and puts them on the receive ring; slow and simple.

    Its state is ``state``, saved and loaded as bytes. ``spoil`` is called before
    a frame is returned, to do wrong in some way.
    """

    def __init__(self, features: int = OFFERED) -> None:
        self.features = features
        self.protocol_features = BaseDevice.protocol_features | ProtocolFeature.RARP
        self.acked = 0
        self.state = b""
        self.refuse_load = False
        self.spoil: Callable[[Loopback, Ring], None] | None = None
        self.frames = 0
        self.events: list[str] = []
        self.rings = [Ring(), Ring()]
        self.regions: list[tuple[MemoryRegion, mmap.mmap]] = []
        self.log: mmap.mmap | None = None
        self._transfer: asyncio.Task[bool] | None = None

    # memory

    def place(self, address: int, user: bool = False) -> tuple[mmap.mmap, int]:
        """Find a guest-physical (or front-end's) address."""
        for region, memory in self.regions:
            start = region.user_addr if user else region.guest_addr
            if start <= address < start + region.size:
                return memory, address - start + region.mmap_offset
        raise AssertionError(f"address {address:#x} is in no region")

    def get(self, layout: str, address: int, user: bool = True) -> tuple[int, ...]:
        memory, at = self.place(address, user)
        return struct.unpack_from(layout, memory, at)

    def put(self, layout: str, address: int, *values: int) -> None:
        memory, at = self.place(address, True)
        struct.pack_into(layout, memory, at, *values)

    def load(self, address: int) -> int:
        """Read 16 bits that both sides use, in one piece."""
        memory, at = self.place(address, True)
        with memoryview(memory) as octets, octets.cast("H") as halves:
            return halves[at // 2]

    def store(self, address: int, value: int) -> None:
        """Write 16 bits in one piece, which struct does not: it clears them first."""
        memory, at = self.place(address, True)
        with memoryview(memory) as octets, octets.cast("H") as halves:
            halves[at // 2] = value

    def dirty(self, gpa: int, size: int) -> None:
        if self.log is not None and self.acked & Feature.VHOST_F_LOG_ALL:
            for page in range(gpa // 4096, (gpa + size - 1) // 4096 + 1):
                self.log[page // 8] |= 1 << page % 8

    # rings

    def chain(self, ring: Ring, head: int) -> list[tuple[int, int]]:
        """Return (address, length) of each descriptor."""
        table, user, index = ring.addr.descriptor, True, head
        found = []
        while True:
            addr, size, flags, after = self.get("<QIHH", table + 16 * index, user)
            if flags & INDIRECT:
                table, user, index = addr, False, 0
                continue
            found.append((addr, size))
            if not flags & NEXT:
                return found
            index = after

    def available(self, ring: Ring) -> int:
        return (self.load(ring.addr.available + 2) - ring.base) & 0xFFFF

    def take(self, ring: Ring) -> int:
        head = self.load(ring.addr.available + 4 + 2 * (ring.base % ring.num))
        ring.base = (ring.base + 1) & 0xFFFF
        return head

    def give(self, ring: Ring, entries: list[tuple[int, int]]) -> None:
        for number, (head, size) in enumerate(entries):
            self.put("<II", ring.addr.used + 4 + 8 * ((ring.used + number) % ring.num), head, size)
        before, ring.used = ring.used, (ring.used + len(entries)) & 0xFFFF
        self.store(ring.addr.used + 2, ring.used)
        if ring.addr.flags & VringFlag.LOG:
            self.dirty(ring.addr.log, 6 + 8 * ring.num)
        if self.acked & Feature.VIRTIO_F_EVENT_IDX:
            event = self.load(ring.addr.available + 4 + 2 * ring.num)
            wanted = (ring.used - event - 1) & 0xFFFF < (ring.used - before) & 0xFFFF
        else:
            wanted = not self.load(ring.addr.available) & 1
        if wanted and ring.call is not None:
            os.eventfd_write(ring.call, 1)

    def process(self) -> None:
        rx, tx = self.rings
        for ring in self.rings:
            if ring.kick is not None:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(ring.kick)
        while rx.running and tx.running and self.available(tx) and self.available(rx) > 64:
            if self.spoil is not None:
                self.spoil(self, rx)
            head = self.take(tx)
            frame = b""
            for addr, size in self.chain(tx, head):
                memory, at = self.place(addr)
                frame += memory[at : at + size]
            self.give(tx, [(head, 0)])
            self.frames += 1
            used = []
            buffers = []
            left = len(frame)
            while left > 0:
                buffer = self.take(rx)
                ((addr, size),) = self.chain(rx, buffer)
                part = min(size, left)
                buffers.append((addr, part))
                used.append((buffer, part))
                left -= part
            frame = struct.pack("<10xH", len(buffers)) + frame[12:]
            for addr, size in buffers:
                memory, at = self.place(addr)
                memory[at : at + size], frame = frame[:size], frame[size:]
                self.dirty(addr, size)
            self.give(rx, used)
        # Kicks are wanted for all that comes from here on.
        for ring in self.rings:
            if ring.running:
                self.store(ring.addr.used + 4 + 8 * ring.num, ring.base + (64 if ring is rx else 0) & 0xFFFF)
        if rx.running and tx.running and self.available(tx) and self.available(rx) > 64:
            self.process()

    # requests

    async def set_features(self, features: int) -> None:
        self.acked = features

    async def set_mem_table(self, regions: list[MemoryRegion]) -> None:
        for _, memory in self.regions:
            memory.close()
        self.regions = []
        for region in regions:
            self.regions.append((region, mmap.mmap(region.fd, region.mmap_offset + region.size)))
            os.close(region.fd)

    async def set_log(self, fd: int, size: int, offset: int) -> None:
        self.log = mmap.mmap(fd, size, offset=offset)
        os.close(fd)

    async def set_vring_num(self, index: int, num: int) -> None:
        self.rings[index].num = num

    async def set_vring_base(self, index: int, base: int) -> None:
        self.rings[index].base = base

    async def set_vring_addr(self, index: int, addr: VringAddr) -> None:
        self.rings[index].addr = addr
        self.rings[index].used = self.load(addr.used + 2)

    async def set_vring_kick(self, index: int, fd: int | None) -> None:
        assert fd is not None
        ring = self.rings[index]
        self._forget(ring)
        ring.kick = fd
        ring.running = True
        self.events.append(f"kick {index}")
        asyncio.get_running_loop().add_reader(fd, self.process)

    async def set_vring_call(self, index: int, fd: int | None) -> None:
        ring = self.rings[index]
        if ring.call is not None:
            os.close(ring.call)
        ring.call = fd

    async def get_vring_base(self, index: int) -> int:
        ring = self.rings[index]
        self._forget(ring)
        ring.running = False
        self.events.append(f"base {index}")
        return ring.base

    def _forget(self, ring: Ring) -> None:
        if ring.kick is not None:
            asyncio.get_running_loop().remove_reader(ring.kick)
            os.close(ring.kick)
            ring.kick = None

    async def send_rarp(self, mac: bytes) -> None:
        self.events.append(f"rarp {mac.hex(':')}")

    async def set_device_state_fd(self, direction: Direction, phase: int, fd: int) -> int | None:
        self.events.append(direction.name.lower())
        work = self._save if direction is Direction.SAVE else self._load
        self._transfer = asyncio.create_task(asyncio.to_thread(work, fd))
        return None

    def _save(self, fd: int) -> bool:
        with open(fd, "wb") as pipe:
            pipe.write(self.state)
        return True

    def _load(self, fd: int) -> bool:
        with open(fd, "rb") as pipe:
            self.state = b"" if self.refuse_load else pipe.read()
        return not self.refuse_load

    async def check_device_state(self) -> bool:
        if self._transfer is None:
            raise DeviceError("no transfer")
        return await self._transfer

    async def disconnected(self) -> None:
        self.events.append("gone")
        for ring in self.rings:
            self._forget(ring)
            ring.running = False
            if ring.call is not None:
                os.close(ring.call)
                ring.call = None
        for _, memory in self.regions:
            memory.close()
        if self.log is not None:
            self.log.close()


class Backends:
    """Back-ends in a thread with an event loop of its own, each listening at a path."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._count = 0
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, device: Loopback) -> str:
        """Serve ``device`` to whoever connects, one after the other; return the path."""
        self._count += 1
        path = str(self._folder / f"{self._count}.sock")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(path)
        listener.listen()
        listener.setblocking(False)

        async def accept() -> None:
            with listener:
                while True:
                    connection, _ = await self._loop.sock_accept(listener)
                    await serve(connection, device)

        async def start() -> None:
            self._tasks.append(asyncio.create_task(accept()))

        asyncio.run_coroutine_threadsafe(start(), self._loop).result()
        return path

    def close(self) -> None:
        async def stop() -> None:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._loop.shutdown_default_executor()

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def backends(tmp_path: Path) -> Iterator[Backends]:
    """Serve devices: ``path = backends.start(Loopback())``."""
    served = Backends(tmp_path)
    yield served
    served.close()


@pytest.fixture(scope="session")
def loopback() -> type[Loopback]:
    """Return the class of the back-end that returns every frame."""
    return Loopback


@pytest.fixture
def scenario() -> Iterator[Scenario]:
    """Two hosts, a server, and an embedded guest behind host a's back-end."""
    with Scenario() as made:
        yield made


@pytest.fixture
def load(scenario: Scenario) -> Load:
    """Its connections: a download, an upload, and idle ones."""
    return scenario.start_load(idle=IDLE, rate=RATE)
