# SPDX-License-Identifier: GPL-2.0-or-later
"""The other end of a QEMU guest's transfers: a peer on a host of the laboratory.

Speaks what ``guest_agent/agent.c`` describes, both as server and, for
connections from outside to the guest, as client. It runs in a thread of its
own; its sockets belong to the namespace that it was made for.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import threading
import time
import zlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from godwit.lab import stream
from godwit.lab.errors import LabError
from godwit.lab.netns import Namespace

PORT = 5001
_CHUNK = 1 << 16


@dataclass
class Transfer:
    """One connection, as this end sees it.

    ``kind`` is what this end does: ``send``, ``receive``, ``echo`` (gives back)
    or ``ask`` (sends, and expects it back). ``state`` is ``running``, ``ok`` or
    ``failed``, and then ``error`` says why; ``gap`` is the longest time without
    progress, in seconds.
    """

    kind: str
    job: int
    peer: str
    state: str = "running"
    bytes: int = 0
    crc: int = 0
    wrong_at: int | None = None
    error: str = ""
    gap: float = 0.0
    progressed: float = field(default_factory=time.monotonic)
    stopped: bool = False

    def progress(self) -> None:
        """Take note that something moved."""
        now = time.monotonic()
        self.gap = max(self.gap, now - self.progressed)
        self.progressed = now


class Peer:
    """Serves transfers on ``port`` in ``space``, over both IPv4 and IPv6; opens some, too.

    ``transfers`` has all that there were, in order. Jobs of the guest's have its
    numbers; those opened here count from 1 000 000.
    """

    def __init__(self, space: Namespace, port: int = PORT) -> None:
        self.space = space
        self.port = port
        self.transfers: list[Transfer] = []
        self._jobs = itertools.count(1_000_000)
        self._changed = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._checks: dict[int, list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]] = {}
        with space.enter():
            # One socket would do for both, but a host without IPv6 should serve as well.
            listener = socket.create_server(
                ("::", port), family=socket.AF_INET6, backlog=4096, dualstack_ipv6=True, reuse_port=False
            )
        self._listener = listener
        listener.setblocking(False)
        self._thread = threading.Thread(target=self._run, name=f"peer in {space.name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(
            asyncio.start_server(self._accepted, sock=self._listener, limit=_CHUNK * 4, backlog=4096)
        )
        try:
            self._loop.run_forever()
        finally:
            server.close()
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
            for writer in self._writers:
                writer.transport.abort()
            # What was cancelled and aborted comes to its end in the next turns.
            self._loop.run_until_complete(asyncio.sleep(0.01))
            self._loop.close()

    # --- what the tests ask -------------------------------------------------

    def find(self, job: int, kind: str | None = None) -> Transfer | None:
        """Return the transfer of ``job``, or None if it has not come yet."""
        with self._changed:
            return self._find(job, kind)

    def _find(self, job: int, kind: str | None) -> Transfer | None:
        return next((t for t in self.transfers if t.job == job and kind in (None, t.kind)), None)

    def until(self, job: int, wanted: Callable[[Transfer], bool], what: str, timeout: float = 30.0) -> Transfer:
        """Wait until a job's transfer is as ``wanted``; :class:`LabError` naming ``what`` if it never is."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                transfer = self._find(job, None)
                if transfer is not None and wanted(transfer):
                    return transfer
                if not self._changed.wait(min(0.25, deadline - time.monotonic())) and time.monotonic() > deadline:
                    raise LabError(f"job {job}: waited {timeout:g} s for {what}; it is {transfer}")

    def wait(self, job: int, timeout: float = 60.0) -> Transfer:
        """Wait for the end of a job's transfer and return it, good or bad."""
        return self.until(job, lambda t: t.state != "running", "the end of the transfer", timeout)

    def reached(self, job: int, goal: int, timeout: float = 30.0) -> Transfer:
        """Wait until ``goal`` bytes have gone over a job's transfer, or it has ended."""
        return self.until(job, lambda t: t.bytes >= goal or t.state != "running", f"byte {goal}", timeout)

    def stop(self, job: int) -> None:
        """End what this end sends for ``job``; the receiver then confirms it."""
        transfer = self.find(job)
        if transfer is None:
            raise LabError(f"job {job} never came")
        transfer.stopped = True

    # --- connections from outside to the guest ------------------------------

    def get(self, addr: str, port: int, seed: int, length: int, rate: int = 0) -> int:
        """Start to download from an agent that listens, and return the job."""
        job = next(self._jobs)
        transfer = self._new("receive", job, addr)
        self._submit(self._client(transfer, addr, port, f"get {job} {seed} {length} {rate}\n", seed, length, 0))
        return job

    def put(self, addr: str, port: int, seed: int, length: int = 0, rate: int = 0) -> int:
        """Start to upload to an agent that listens, and return the job; 0 bytes: until :meth:`stop`."""
        job = next(self._jobs)
        transfer = self._new("send", job, addr)
        self._submit(self._client(transfer, addr, port, f"put {job} {seed}\n", seed, length, rate))
        return job

    def echo(self, addr: str, port: int, count: int, timeout: float = 60.0) -> int:
        """Open ``count`` connections to an agent that listens; :meth:`check` them with the job returned."""
        job = next(self._jobs)

        async def one() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            reader, writer = await self._connect(addr, port)
            writer.write(f"echo {job}\n".encode())
            return reader, writer

        async def every() -> None:
            self._checks[job] = await asyncio.gather(*(one() for _ in range(count)))

        asyncio.run_coroutine_threadsafe(every(), self._loop).result(timeout)
        return job

    def check(self, job: int, timeout: float = 10.0) -> int:
        """Send something over each connection of an echo job; return how many gave it back."""

        async def one(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
            token = b"%08x" % (number ^ int(time.monotonic() * 1000) & 0xFFFF)
            try:
                writer.write(token)
                return await asyncio.wait_for(reader.readexactly(len(token)), timeout) == token
            except (OSError, EOFError, TimeoutError):
                return False

        async def every() -> int:
            ends = enumerate(self._checks[job])
            return sum(await asyncio.gather(*(one(number, *end) for number, end in ends)))

        return asyncio.run_coroutine_threadsafe(every(), self._loop).result(timeout + 10)

    # --- inside the thread --------------------------------------------------

    def _submit(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop)

    def _new(self, kind: str, job: int, peer: str) -> Transfer:
        transfer = Transfer(kind, job, peer)
        with self._changed:
            self.transfers.append(transfer)
            self._changed.notify_all()
        return transfer

    def _end(self, transfer: Transfer, error: str = "") -> None:
        with self._changed:
            transfer.error = error
            transfer.state = "failed" if error else "ok"
            self._changed.notify_all()

    async def _connect(self, addr: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        with self.space.enter():
            sock = socket.socket(socket.AF_INET6 if ":" in addr else socket.AF_INET, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            await self._loop.sock_connect(sock, (addr, port))
        except BaseException:
            sock.close()
            raise
        reader, writer = await asyncio.open_connection(sock=sock, limit=_CHUNK * 4)
        self._writers.add(writer)
        return reader, writer

    async def _client(
        self, transfer: Transfer, addr: str, port: int, request: str, seed: int, length: int, rate: int
    ) -> None:
        try:
            reader, writer = await self._connect(addr, port)
        except OSError as error:
            self._end(transfer, f"connect: {_reason(error)}")
            return
        writer.write(request.encode())
        if transfer.kind == "send":
            await self._send(transfer, reader, writer, seed, length, rate)
        else:
            await self._receive(transfer, reader, writer, seed, length)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            words = (await reader.readline()).decode(errors="replace").split()
            peer = str(writer.get_extra_info("peername")[0])
            if len(words) == 5 and words[0] == "get":
                job, seed, length, rate = map(int, words[1:])
                await self._send(self._new("send", job, peer), reader, writer, seed, length, rate)
            elif len(words) == 3 and words[0] == "put":
                await self._receive(self._new("receive", int(words[1]), peer), reader, writer, int(words[2]), 0)
            elif len(words) == 2 and words[0] == "echo":
                await self._echo(self._new("echo", int(words[1]), peer), reader, writer)
        except (OSError, asyncio.CancelledError):
            pass  # before a request came, when nobody waits for it; or this peer is being closed
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _send(
        self,
        transfer: Transfer,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        seed: int,
        length: int,
        rate: int,
    ) -> None:
        began = time.monotonic()
        try:
            while not transfer.stopped and not (length and transfer.bytes >= length):
                limit = min(_CHUNK, length - transfer.bytes) if length else _CHUNK
                if rate:
                    due = int((time.monotonic() - began) * rate) - transfer.bytes
                    if due < min(limit, rate // 100):  # not a few bytes at a time
                        await asyncio.sleep(0.01)
                        continue
                    limit = min(limit, due)
                data = stream.chunk(seed, transfer.bytes, limit)
                writer.write(bytes(data))
                await writer.drain()
                transfer.crc = zlib.crc32(data, transfer.crc)
                self._count(transfer, len(data))
            writer.write_eof()
            answer = (await reader.read(1024)).split()
            if len(answer) != 2:
                self._end(transfer, f"instead of its totals the receiver sent {answer}")
            elif (int(answer[0]), int(answer[1], 16)) != (transfer.bytes, transfer.crc):
                self._end(transfer, f"the receiver has {answer}, not {transfer.bytes} {transfer.crc:08x}")
            else:
                self._end(transfer)
        except (OSError, ValueError) as error:
            self._end(transfer, _reason(error))
        finally:
            writer.close()

    async def _receive(
        self, transfer: Transfer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seed: int, length: int
    ) -> None:
        receiver = stream.Receiver(seed)
        try:
            while data := await reader.read(_CHUNK * 4):
                receiver.feed(data)
                transfer.crc = receiver.crc
                transfer.wrong_at = receiver.wrong_at
                self._count(transfer, len(data))
            writer.write(f"{transfer.bytes} {transfer.crc:08x}\n".encode())
            await writer.drain()
            if transfer.wrong_at is not None:
                self._end(transfer, f"byte {transfer.wrong_at} is wrong")
            elif length and transfer.bytes != length:
                self._end(transfer, f"ended after {transfer.bytes} of {length} bytes")
            else:
                self._end(transfer)
        except OSError as error:
            self._end(transfer, _reason(error))
        finally:
            writer.close()

    async def _echo(self, transfer: Transfer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(4096):
                writer.write(data)
                await writer.drain()
                self._count(transfer, len(data))
            self._end(transfer)
        except OSError as error:
            self._end(transfer, _reason(error))

    def _count(self, transfer: Transfer, count: int) -> None:
        with self._changed:
            transfer.bytes += count
            transfer.progress()
            self._changed.notify_all()

    # --- the end ------------------------------------------------------------

    def close(self) -> None:
        """Close every connection and the listener. May be repeated."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    return str(error) or type(error).__name__
