# SPDX-License-Identifier: GPL-2.0-or-later
"""``serve`` and ``FrontendClient`` over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from godwit.vhost_user import (
    BaseDevice,
    DeviceError,
    Direction,
    DisconnectedError,
    Feature,
    FrontendClient,
    MemoryRegion,
    ProtocolError,
    ProtocolFeature,
    Request,
    RequestFailedError,
    VhostUserError,
    VringAddr,
    serve,
)
from godwit.vhost_user import aio as backend
from godwit.vhost_user.frames import HEADER, REPLY, encode

ADDR = VringAddr(0, 1 << 40, (1 << 40) + 4, (1 << 40) + 2)
REGION = MemoryRegion(0, 4096, 1 << 40, 0)
STOP = object()


class Recorder(BaseDevice):
    """Notes each call; keeps eventfds it is given so that the front-end can see them signalled."""

    features = BaseDevice.features | Feature.VIRTIO_NET_F_MTU
    protocol_features = (
        BaseDevice.protocol_features | ProtocolFeature.MQ | ProtocolFeature.RARP | ProtocolFeature.NET_MTU
    )
    max_mem_slots = 8

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.transferred = b""
        self.result = True

    async def set_features(self, features: int) -> None:
        self.calls.append(("set_features", features))

    async def set_mem_table(self, regions: list[MemoryRegion]) -> None:
        self.calls.append(("set_mem_table", [region._replace(fd=-1) for region in regions]))
        await super().set_mem_table(regions)

    async def remove_mem_region(self, region: MemoryRegion) -> None:
        self.calls.append(("remove_mem_region", region))

    async def set_vring_num(self, index: int, num: int) -> None:
        if num == 2:
            raise DeviceError("two is too few")
        if num == 4:
            raise ZeroDivisionError("an error of the device's author")
        self.calls.append(("set_vring_num", index, num))

    async def get_vring_base(self, index: int) -> int:
        return 40 + index

    async def set_vring_kick(self, index: int, fd: int | None) -> None:
        self.calls.append(("set_vring_kick", index, fd is not None))
        if fd is not None:
            os.eventfd_write(fd, 1)
            os.close(fd)

    async def send_rarp(self, mac: bytes) -> None:
        self.calls.append(("send_rarp", mac))

    async def set_mtu(self, mtu: int) -> None:
        self.calls.append(("set_mtu", mtu))

    async def set_device_state_fd(self, direction: Direction, phase: int, fd: int) -> int | None:
        try:
            if direction == Direction.SAVE:
                os.write(fd, b"the state")
            else:
                self.transferred = await asyncio.to_thread(os.read, fd, 100)
        finally:
            os.close(fd)
        return None

    async def check_device_state(self) -> bool:
        return self.result

    async def disconnected(self) -> None:
        self.calls.append(("disconnected",))


class Server:
    """A session served by a thread of its own."""

    def __init__(self, device: BaseDevice) -> None:
        ours, self.sock = socket.socketpair()
        self.device = device
        self.outcome: queue.SimpleQueue[VhostUserError | BaseException | None] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(serve(ours, device))
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.outcome.put(self._loop.run_until_complete(self._task))
        except BaseException as error:
            self.outcome.put(error)
        finally:
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

    def cancel(self) -> None:
        self._loop.call_soon_threadsafe(self._task.cancel)

    def ended(self) -> VhostUserError | BaseException | None:
        """What ``serve`` returned or raised; the front-end has hung up, or the back-end ended the session."""
        outcome = self.outcome.get(timeout=10)
        self._thread.join(10)
        assert not self._thread.is_alive()
        return outcome


@contextlib.contextmanager
def serving(device: BaseDevice, *, acks: bool = True) -> Iterator[tuple[Server, FrontendClient]]:
    server = Server(device)
    with FrontendClient(server.sock, timeout=10, acks=acks) as client:
        try:
            yield server, client
        finally:
            client.close()
            server._thread.join(10)


def begin(client: FrontendClient) -> None:
    client.set_protocol_features(client.get_protocol_features())
    client.set_owner()
    client.set_features(client.get_features())


def set_up(client: FrontendClient, index: int) -> None:
    client.set_vring_num(index, 256)
    client.set_vring_base(index, 0)
    client.set_vring_addr(index, ADDR)


@pytest.mark.parametrize("acks", [True, False])
def test_a_whole_session(acks: bool) -> None:
    device = Recorder()
    memory = os.memfd_create("memory")
    kick = os.eventfd(0)
    with serving(device, acks=acks) as (server, client):
        begin(client)
        assert client.get_features() == Recorder.features
        assert client.get_queue_num() == 1
        assert client.get_max_mem_slots() == 8
        client.set_mem_table([REGION._replace(fd=memory)])
        client.add_mem_region(MemoryRegion(4096, 4096, 1 << 41, 0, memory))
        client.remove_mem_region(MemoryRegion(4096, 4096, 1 << 41, 0))
        for index in range(2):
            set_up(client, index)
            client.set_vring_call(index, kick)
            client.set_vring_err(index, None)
            client.set_vring_enable(index, True)
        client.set_vring_kick(0, kick)
        client.set_vring_kick(1, None)
        client.set_log_base(memory, 4096, 4096)
        client.set_log_fd(kick)
        client.net_set_mtu(1500)
        client.send_rarp(bytes(range(6)))
        assert [client.get_vring_base(index) for index in range(2)] == [40, 41]
        assert os.eventfd_read(kick) == 1
        read, write = os.pipe()
        assert client.set_device_state_fd(Direction.SAVE, write) is None
        os.close(write)
        assert os.read(read, 100) == b"the state"
        assert os.read(read, 100) == b""
        assert client.check_device_state()
        os.close(read)
        read, write = os.pipe()
        os.write(write, b"another state")
        client.set_device_state_fd(Direction.LOAD, read)
        device.result = False
        assert not client.check_device_state()
        assert device.transferred == b"another state"
        os.close(read)
        os.close(write)
        client.reset_owner()
        client.get_features()
        client.close()
        assert server.ended() is None
    assert device.calls == [
        ("set_features", Recorder.features),
        ("set_mem_table", [REGION]),
        ("remove_mem_region", MemoryRegion(4096, 4096, 1 << 41, 0)),
        ("set_vring_num", 0, 256),
        ("set_vring_num", 1, 256),
        ("set_vring_kick", 0, True),
        ("set_vring_kick", 1, False),
        ("set_mtu", 1500),
        ("send_rarp", bytes(range(6))),
        ("disconnected",),
    ]
    os.close(memory)
    os.close(kick)


def test_each_request_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "godwit.vhost_user")
    with serving(Recorder()) as (_, client):
        begin(client)
        client.set_vring_num(0, 8)
    for name in ("SET_OWNER", "SET_PROTOCOL_FEATURES", "SET_FEATURES", "SET_VRING_NUM"):
        assert len([record for record in caplog.messages if record.startswith(f"{name} ")]) == 1


def test_the_device_says_no(caplog: pytest.LogCaptureFixture) -> None:
    with serving(Recorder()) as (_, client):
        begin(client)
        with pytest.raises(RequestFailedError, match="refused SET_VRING_NUM"):
            client.set_vring_num(0, 2)
        assert "SET_VRING_NUM failed: two is too few" in caplog.text
        with pytest.raises(RequestFailedError):
            client.set_vring_num(0, 4)
        assert "ZeroDivisionError: an error of the device's author" in caplog.text
        client.set_vring_num(0, 8)


@pytest.mark.parametrize(("num", "reason"), [(2, "two is too few"), (4, "ZeroDivisionError"), (3, "3 entries")])
def test_where_nobody_can_be_told_the_session_ends(num: int, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    device = Recorder()
    with serving(device, acks=False) as (server, client):
        begin(client)
        client.set_vring_num(0, num)
        outcome = server.ended()
        assert isinstance(outcome, VhostUserError)
        assert reason in str(outcome)
        assert reason in caplog.text
        with pytest.raises(DisconnectedError):
            client.get_features()
    assert device.calls[-1] == ("disconnected",)


def test_surplus_descriptors_are_closed_and_told_of(caplog: pytest.LogCaptureFixture) -> None:
    with serving(Recorder()) as (_, client):
        begin(client)
        read, write = os.pipe()
        client.send_raw(encode(Request.SET_OWNER, 1 << 3, b""), [write] * 20)
        os.close(write)
        assert os.read(read, 1) == b"", "the back-end still has the other end"
        os.close(read)
        assert client._sock.recv(100) == encode(Request.SET_OWNER, REPLY, struct.pack("=Q", 1))
        client.get_features()
    assert "SET_OWNER came with 20 descriptors" in caplog.text


def test_more_descriptors_than_the_kernel_delivers() -> None:
    with serving(Recorder()) as (server, client):
        read, write = os.pipe()
        client.send_raw(encode(Request.SET_OWNER, 0, b""), [write] * 33)
        outcome = server.ended()
        assert isinstance(outcome, ProtocolError)
        assert "cut off" in str(outcome)
        os.close(write)
        assert os.read(read, 1) == b""
        os.close(read)


def test_byte_by_byte_with_a_descriptor_in_the_middle() -> None:
    kick = os.eventfd(0)
    with serving(Recorder(), acks=False) as (_, client):
        begin(client)
        set_up(client, 0)
        data = encode(Request.SET_VRING_KICK, 0, bytes(8))
        for offset, byte in enumerate(data):
            client.send_raw(bytes([byte]), [kick] if offset == 15 else [])
        assert client.get_vring_base(0) == 40
    assert os.eventfd_read(kick) == 1
    os.close(kick)


def test_many_requests_without_reading_a_reply() -> None:
    """Neither side's buffers hold all this: the back-end has to wait for room, and go on."""
    count = 20000
    with serving(Recorder()) as (_, client):
        writer = threading.Thread(target=client._sock.sendall, args=(encode(Request.GET_FEATURES, 0, b"") * count,))
        writer.start()
        time.sleep(0.1)
        left = count * (HEADER.size + 8)
        while left:
            left -= len(client._sock.recv(min(left, 65536)))
        writer.join()


def test_hanging_up_with_replies_unread() -> None:
    device = Recorder()
    with serving(device) as (server, client):
        client.send_raw(encode(Request.GET_FEATURES, 0, b"") * 100)
        client.close()
        assert server.ended() is None
    assert device.calls == [("disconnected",)]


def test_hanging_up_within_a_message() -> None:
    with serving(Recorder()) as (server, client):
        kick = os.eventfd(0)
        client.send_raw(encode(Request.SET_VRING_KICK, 0, bytes(8))[:15], [kick])
        os.close(kick)
        client.close()
        outcome = server.ended()
        assert isinstance(outcome, ProtocolError)
        assert "15 bytes into a message" in str(outcome)


class Waiting(Recorder):
    """A transfer that never ends, and one request that takes long."""

    def __init__(self) -> None:
        super().__init__()
        self.checking = threading.Event()

    async def check_device_state(self) -> bool:
        self.checking.set()
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            self.calls.append(("cancelled",))
            raise
        return True

    async def set_mtu(self, mtu: int) -> None:
        self.checking.set()
        await asyncio.sleep(0.2)
        await super().set_mtu(mtu)


def wait_for_state(client: FrontendClient, device: Waiting) -> None:
    client.timeout = 0.05
    with pytest.raises(TimeoutError):
        client.check_device_state()
    assert device.checking.wait(10)


def test_the_front_end_is_gone_while_the_device_waits() -> None:
    device = Waiting()
    with serving(device) as (server, client):
        begin(client)
        read, write = os.pipe()
        client.set_device_state_fd(Direction.SAVE, write)
        os.close(read)
        os.close(write)
        wait_for_state(client, device)
        client.close()
        assert server.ended() is None
    assert device.calls[-2:] == [("cancelled",), ("disconnected",)]


def test_serve_is_cancelled() -> None:
    device = Waiting()
    with serving(device) as (server, client):
        begin(client)
        read, write = os.pipe()
        client.set_device_state_fd(Direction.SAVE, write)
        os.close(read)
        os.close(write)
        wait_for_state(client, device)
        server.cancel()
        assert isinstance(server.ended(), asyncio.CancelledError)
    assert device.calls[-2:] == [("cancelled",), ("disconnected",)]


def test_requests_are_carried_out_in_order_and_to_the_end() -> None:
    device = Waiting()
    with serving(device, acks=False) as (server, client):
        begin(client)
        client.net_set_mtu(1400)
        client.send_rarp(bytes(6))
        client.net_set_mtu(1500)
        assert device.checking.wait(10)
        client.close()
        assert server.ended() is None
    assert device.calls[1:] == [("set_mtu", 1400), ("send_rarp", bytes(6)), ("set_mtu", 1500), ("disconnected",)]


class Generous(Recorder):
    """Hands the front-end a descriptor of its own for the state."""

    async def set_device_state_fd(self, direction: Direction, phase: int, fd: int) -> int | None:
        os.close(fd)
        read, write = os.pipe()
        os.write(write, b"from the back-end's own pipe")
        os.close(write)
        return read

    async def disconnected(self) -> None:
        raise RuntimeError("even here")


def test_a_descriptor_from_the_back_end(caplog: pytest.LogCaptureFixture) -> None:
    with serving(Generous()) as (server, client):
        begin(client)
        read, write = os.pipe()
        theirs = client.set_device_state_fd(Direction.SAVE, write)
        os.close(read)
        os.close(write)
        assert theirs is not None
        assert os.read(theirs, 100) == b"from the back-end's own pipe"
        assert os.read(theirs, 100) == b"", "the back-end still holds the other end"
        os.close(theirs)
        client.close()
        assert server.ended() is None
    assert "even here" in caplog.text


class Confused(Recorder):
    """Answers with a descriptor that is not open."""

    async def set_device_state_fd(self, direction: Direction, phase: int, fd: int) -> int | None:
        os.close(fd)
        return 1 << 20


def test_a_reply_that_cannot_be_sent_ends_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, serving(Confused()) as (server, client):
        patch.setattr("godwit.vhost_user.transport.close_fds", lambda fds: None)
        begin(client)
        read, write = os.pipe()
        with pytest.raises(DisconnectedError):
            client.set_device_state_fd(Direction.SAVE, write)
        os.close(read)
        os.close(write)
        outcome = server.ended()
        assert isinstance(outcome, ProtocolError)
        assert "could not be sent" in str(outcome)


@pytest.fixture
def scripted() -> Iterator[Callable[[bytes | None], FrontendClient]]:
    """A client whose back-end sends what it is told to, and hangs up for None."""
    socks: list[socket.socket] = []
    clients: list[FrontendClient] = []

    def make(answer: bytes | None) -> FrontendClient:
        ours, theirs = socket.socketpair()
        if answer is None:
            theirs.close()
        else:
            theirs.sendall(answer)
            socks.append(theirs)
        client = FrontendClient(ours, timeout=0.2)
        clients.append(client)
        return client

    yield make
    for client in clients:
        client.close()
    for sock in socks:
        sock.close()


def test_a_back_end_that_does_not_answer(scripted: Callable[[bytes | None], FrontendClient]) -> None:
    with pytest.raises(TimeoutError):
        scripted(b"").get_features()
    with pytest.raises(TimeoutError):
        scripted(encode(Request.GET_FEATURES, REPLY, bytes(8))[:19]).get_features()


def test_a_back_end_that_is_gone(scripted: Callable[[bytes | None], FrontendClient]) -> None:
    with pytest.raises(DisconnectedError):
        scripted(None).get_features()
    with pytest.raises(DisconnectedError):
        scripted(None).set_owner()


def test_a_back_end_that_talks_nonsense(scripted: Callable[[bytes | None], FrontendClient]) -> None:
    with pytest.raises(ProtocolError, match="instead of GET_FEATURES"):
        scripted(encode(Request.GET_VRING_BASE, REPLY, bytes(8))).get_features()
    answer = encode(Request.GET_VRING_BASE, REPLY, struct.pack("=II", 1, 0))
    with pytest.raises(ProtocolError, match="for ring 1, not 0"):
        scripted(answer).get_vring_base(0)


def test_connect(tmp_path: os.PathLike[str]) -> None:
    path = os.path.join(tmp_path, "socket")
    with pytest.raises(FileNotFoundError):
        FrontendClient.connect(path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with FrontendClient.connect(path, timeout=5) as client:
            accepted, _ = listener.accept()
            client.set_owner()
            assert accepted.recv(100) == encode(Request.SET_OWNER, 0, b"")
            assert client.fileno() >= 0
            accepted.close()


def test_debug_log_says_what_happens(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="godwit.vhost_user")
    with serving(Recorder()) as (server, client):
        begin(client)
        client.close()
        assert server.ended() is None
    assert "SET_OWNER" in caplog.text
    assert "SET_FEATURES U64" in caplog.text


def test_another_server_goes_on() -> None:
    """Suspended in the midst of a request, resumed; suspended again, and left to another with another device."""

    async def run() -> None:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        loop = asyncio.get_running_loop()
        old, new = Recorder(), Recorder()
        server = backend.Server(ours, old)
        running = asyncio.ensure_future(server.run())

        async def ask(message: bytes) -> bytes:
            await loop.sock_sendall(theirs, message)
            return await loop.sock_recv(theirs, 100)

        features = await ask(encode(Request.GET_FEATURES, 0, b""))
        await loop.sock_sendall(theirs, encode(Request.SET_OWNER, 0, b""))
        num = encode(Request.SET_VRING_NUM, 0, struct.pack("=II", 1, 64))
        await loop.sock_sendall(theirs, num[:14])
        await asyncio.sleep(0.1)
        saved = await server.suspend()
        assert saved is not None
        assert (saved.owned, saved.unread) == (True, num[:14])
        assert saved.rings == ((False, False, False),) * 2
        with pytest.raises(RuntimeError, match="suspended already"):
            await server.suspend()
        await loop.sock_sendall(theirs, num[14:])
        await asyncio.sleep(0.1)
        assert old.calls == []  # it reads no more
        server.resume()
        assert await ask(encode(Request.GET_FEATURES, 0, b"")) == features
        assert old.calls == [("set_vring_num", 1, 64)]

        await loop.sock_sendall(theirs, num[:5])
        await asyncio.sleep(0.1)
        saved = await server.suspend()
        assert saved is not None
        assert saved.rings == ((False, False, False), (True, False, False))
        duplicate = socket.socket(fileno=os.dup(ours.fileno()))
        for wrong in ({"features": 1 << 63}, {"rings": saved.rings[:1]}, {"protocol_features": 1 << 60}):
            with pytest.raises(ProtocolError):
                backend.Server(duplicate, new, saved._replace(**wrong))
        successor = backend.Server(duplicate, new, saved)
        server.leave()
        assert await running is None
        assert old.calls == [("set_vring_num", 1, 64)]  # and no word of an end
        going_on = asyncio.ensure_future(successor.run())
        await loop.sock_sendall(theirs, num[5:])
        assert await ask(encode(Request.GET_FEATURES, 0, b"")) == features
        theirs.close()
        assert await going_on is None
        assert new.calls == [("set_vring_num", 1, 64), ("disconnected",)]

    asyncio.run(run())


def test_a_session_that_is_over_cannot_be_suspended() -> None:
    async def run() -> None:
        ours, theirs = socket.socketpair()
        server = backend.Server(ours, Recorder())
        running = asyncio.ensure_future(server.run())
        theirs.close()
        assert await running is None
        saved = await asyncio.wait_for(server.suspend(), 10)
        assert saved is None

    asyncio.run(run())
