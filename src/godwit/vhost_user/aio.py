# SPDX-License-Identifier: GPL-2.0-or-later
"""A back-end session under asyncio: ``serve`` joins a socket, a session and a device.

``Server`` is the same as an object, for a device that another process is to go
on with while the front-end notices nothing: ``suspend`` brings the session to
a stop between two requests and says how it stands. The other process builds a
``Server`` from that and from duplicates of the descriptors; this one then
either goes on as if nothing had been (``resume``) or lets go (``leave``).
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Coroutine

from godwit.vhost_user import transport
from godwit.vhost_user.backend import BackendSession, RequestReceived, RequestRefused, SessionEnded
from godwit.vhost_user.device import Device
from godwit.vhost_user.errors import DeviceError, ProtocolError, VhostUserError
from godwit.vhost_user.messages import Request
from godwit.vhost_user.state import SavedSession

log = logging.getLogger(__name__)

# Messages read ahead of the one that the device works on; each may hold descriptors.
MAX_BACKLOG = 16


async def serve(sock: socket.socket, device: Device) -> VhostUserError | None:
    """Run one session with the front-end at the other end of a connected UNIX stream socket.

    Returns when the session is over: None if the front-end hung up between two
    messages, otherwise what ended it, which is also logged. Never raises but
    for cancellation. The device's methods are called one after the other, last
    ``disconnected``, also after cancellation, and that one to its end. The
    socket is closed.
    """
    return await Server(sock, device).run()


async def disconnect(device: Device) -> None:
    """Tell a device that its session is over. No cancellation interrupts that, and nothing is raised but for one."""
    await _to_the_end(_disconnect(device))


async def _disconnect(device: Device) -> None:
    try:
        await device.disconnected()
    except Exception:
        log.exception("the device failed to take note of the end of its session")


async def _to_the_end(work: Coroutine[object, object, None]) -> None:
    """Do what no cancellation may interrupt; one that comes meanwhile has its effect after it."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


class Server:
    """The life of one session. ``saved``: it goes on with what another process's ``suspend`` gave, and the device is
    already as the other's was; raises ``ProtocolError`` if this one could not have come to be so.

    Nothing is read or sent before ``run``.
    """

    def __init__(self, sock: socket.socket, device: Device, saved: SavedSession | None = None) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._device = device
        self._session = BackendSession(
            features=device.features,
            protocol_features=device.protocol_features,
            queues=device.queues,
            queue_num=device.queue_num,
            max_mem_slots=device.max_mem_slots,
            saved=saved,
        )
        self._sender = transport.Sender(sock)
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._gone = asyncio.Event()
        self._reading = False
        self._suspended: asyncio.Future[SavedSession | None] | None = None
        self._resumed = asyncio.Event()
        self._left = self._over = False
        #: Requests so far, those that were refused unseen, and those that the device has failed to do.
        self.requests = self.refused = self.failed = 0

    async def run(self) -> VhostUserError | None:
        """Serve to the end, as ``serve`` does; after ``leave`` the device is told nothing, and it returns None."""
        try:
            return await self._run()
        finally:
            self.close()
            if not self._left:
                await disconnect(self._device)

    async def suspend(self) -> SavedSession | None:
        """Read no more, have what has been read worked off, and stop before the next request.

        Gives how the session stands, or None if it is over; ``DeviceError`` in
        the midst of a transfer of the device's state. To be followed by
        ``resume`` or ``leave``, also when it is cancelled.
        """
        if self._suspended is not None:
            raise RuntimeError("the session is suspended already")
        if self._over:
            return None
        self._suspended = self._loop.create_future()
        self._resumed.clear()
        self._stop_reading()
        self._arrived.set()
        return await self._suspended

    def fileno(self) -> int:
        """The connection with the front-end."""
        return self._sock.fileno()

    def resume(self) -> None:
        """Go on as if ``suspend`` had not been called."""
        self._suspended = None
        self._resumed.set()

    def leave(self) -> None:
        """Another process goes on: ``run`` returns, with not a word to the front-end or to the device."""
        self._left = True
        self._resumed.set()

    async def _run(self) -> VhostUserError | None:
        while True:
            self._arrived.clear()
            event = self._session.next_event()
            await self._flush()
            self._read_on()
            if isinstance(event, SessionEnded):
                if event.error is not None:
                    log.error("the vhost-user session is over: %s", event.error)
                return event.error
            if isinstance(event, RequestRefused):
                self.requests += 1
                self.refused += 1
                log.warning("refused: %s", event.error)
            elif isinstance(event, RequestReceived):
                self.requests += 1
                await self._carry_out(event)
            elif self._suspended is not None:
                if not self._suspended.done():
                    self._tell_suspended(self._suspended)
                await self._resumed.wait()
                if self._left:
                    return None
            else:
                await self._arrived.wait()

    def _tell_suspended(self, suspended: asyncio.Future[SavedSession | None]) -> None:
        try:
            suspended.set_result(self._session.save())
        except RuntimeError as error:
            suspended.set_exception(DeviceError(str(error)))

    def close(self) -> None:
        """Close the socket and whatever else is held; ``run`` does it."""
        self._over = True
        if self._suspended is not None and not self._suspended.done():
            self._suspended.set_result(None)
        self._stop_reading()
        self._loop.remove_writer(self._sock)
        self._sender.close()
        self._session.close()
        self._sock.close()

    async def _carry_out(self, request: RequestReceived) -> None:
        name = request.row.name
        method: Callable[..., Awaitable[object]] = getattr(self._device, request.row.handler)
        log.debug("%s %s", name, request.payload)
        try:
            call = method(*request.take_arguments())
            if request.row.request == Request.CHECK_DEVICE_STATE:
                value = await self._unless_gone(call)
            else:
                value = await call
        except DeviceError as error:
            failure = error
        except Exception as error:
            log.exception("the device failed in %s", name)
            failure = DeviceError(f"{type(error).__name__}: {error}")
            failure.__cause__ = error
        else:
            self._session.complete(value)
            return
        self.failed += 1
        reason = DeviceError(f"{name} failed: {failure}")
        reason.__cause__ = failure
        if self._session.fail(reason):
            log.warning("%s", reason)

    async def _unless_gone(self, call: Awaitable[object]) -> object:
        """Wait, but no longer than there is somebody to wait for."""
        task = asyncio.ensure_future(call)
        gone = asyncio.ensure_future(self._gone.wait())
        try:
            await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise DeviceError("the front-end hung up meanwhile")
            return task.result()
        finally:
            gone.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait((task,))

    def _read_on(self) -> None:
        if self._reading or self._suspended is not None:
            return
        if self._session.wanted and self._session.backlog < MAX_BACKLOG:
            self._loop.add_reader(self._sock, self._readable)
            self._reading = True

    def _stop_reading(self) -> None:
        if self._reading:
            self._loop.remove_reader(self._sock)
            self._reading = False

    def _readable(self) -> None:
        try:
            while self._session.wanted and self._session.backlog < MAX_BACKLOG:
                data, fds = transport.receive(self._sock, self._session.wanted)
                self._session.receive(data, fds)
                if not data:
                    self._gone.set()
        except (BlockingIOError, InterruptedError):
            pass
        except ProtocolError as error:
            self._session.receive_error(error)
        except ConnectionResetError:
            # How Linux reports a peer that hung up without having read all our replies.
            self._session.receive(b"")
            self._gone.set()
        except OSError as error:
            self._session.receive_error(ProtocolError(f"the front-end is gone: {error}", fatal=True))
            self._gone.set()
        if not self._session.wanted or self._session.backlog >= MAX_BACKLOG:
            self._stop_reading()
        self._arrived.set()

    async def _flush(self) -> None:
        """Send all replies. If nobody is there to take them, the reader will say so."""
        self._sender.put(self._session.outgoing())
        while self._sender.pending:
            try:
                self._sender.send()
            except BlockingIOError:
                writable = self._loop.create_future()
                self._loop.add_writer(self._sock, _set_result, writable)
                try:
                    await writable
                finally:
                    self._loop.remove_writer(self._sock)
            except (BrokenPipeError, ConnectionResetError) as error:
                log.debug("a reply could not be sent: %s", error)
                self._sender.close()
            except OSError as error:
                self._sender.close()
                self._session.receive_error(ProtocolError(f"a reply could not be sent: {error}", fatal=True))
                self._arrived.set()


def _set_result(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
