# SPDX-License-Identifier: GPL-2.0-or-later
"""Any stream into the daemon's own mover: an engine, and sockets of the kernel's.

Until the guest runs nobody in the network hears of it; and a load that is
refused, called off or dropped leaves no descriptor and no flow.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import resource
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from random import Random

import pytest

from godwit.daemon.mover import Mover
from godwit.dataplane import Engine, FlowState, Side, SocketState, handover
from godwit.lab.netns import Namespace, wait_until
from godwit.migration import Direction, Migration, StageError, State
from godwit.net.native import FLOW
from godwit.net.records import V4_MAPPED
from godwit.net.state import FlowMover
from godwit.net.versions import versions
from godwit.repair import Repair, RepairError, RepairListener

from ..net.test_state import Dumped
from .devices import Device, filled
from .streams import NATIVE, mutated, sound_flow
from .targets import load, save

PAGE = os.sysconf("SC_PAGE_SIZE")
TCP_REPAIR = 19  # linux/tcp.h
LOADS = 120  # in each test
PLACES = 3  # of flows in the device
OURS = {4: V4_MAPPED + bytes((10, 9, 0, 1)), 6: socket.inet_pton(socket.AF_INET6, "2001:db8::1")}
PEER = {4: V4_MAPPED + bytes((10, 9, 0, 7)), 6: socket.inet_pton(socket.AF_INET6, "2001:db8::7")}


def descriptors() -> dict[str, str]:
    """What is open, by number."""
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the list itself
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
    return found


class Rig:
    """A mover that loads, on an engine of a few places; the repair helper is this process."""

    def __init__(self, space: Namespace, folder: object) -> None:
        self.space = space
        self.engine = Engine(PLACES)
        self.engine.start()
        self.listener = RepairListener(f"{folder}/r")
        self.mover = Mover(self.engine, self.listener, 0, self.schedule)
        self.helped = 0
        self.help = 1 << 30
        self.restored = 0
        self.wire = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, socket.htons(3))

    def schedule(self, delay: float, work: Callable[[], None]) -> None:
        """Nothing later."""

    def set_mode(self, fds: Sequence[int], mode: Repair) -> None:
        """The helper, which is gone when it has helped so often."""
        for done, fd in enumerate(fds):
            self.helped += 1
            if self.helped > self.help:
                raise RepairError("the helper is gone", done)
            sock = socket.socket(fileno=fd)
            try:
                sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, mode)
            finally:
                sock.detach()

    def content(self) -> tuple[object, ...]:
        """All that a load may leave."""
        engine = self.engine
        return descriptors(), engine.flows(), engine.tcp_flows(), engine.udp_ports(), engine.udp_peers()

    def heard(self) -> list[str]:
        """TCP and UDP that went out since the last time."""
        found: list[str] = []
        while True:
            try:
                packet, (interface, protocol, *_) = self.wire.recvfrom(65536)
            except BlockingIOError:
                return found
            number = packet[9] if protocol == 0x0800 else packet[6] if protocol == 0x86DD else 0
            if number in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
                found.append(f"{interface}: {packet[:60].hex()}")

    def close(self) -> None:
        self.engine.close()
        self.listener.close()
        self.wire.close()


@pytest.fixture
def rig(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    with Namespace("streams") as space, space.enter():
        space.ip(
            "link add d0 type veth peer name d1",
            "link set d0 up",
            "link set d1 up",
            "addr add 10.9.0.1/24 dev d0",
            "addr add 2001:db8::1/64 dev d0 nodad",
            "route add default dev d0",
        )
        gc.collect()  # the engines of the tests before have descriptors
        made = Rig(space, tmp_path)
        monkeypatch.setattr(made.mover, "_set_mode", made.set_mode)  # in place of a helper's process
        yield made
        made.close()


def here(rng: Random, flow: FlowState) -> FlowState:
    """With ends that the kernel has, mostly: an address of this host, and a peer that there is a route to."""
    if not rng.randrange(6):
        return flow
    family = rng.choice((4, 6))
    sides = list(flow.sides)
    place = flow.pif.index(1)
    sides[place] = sides[place]._replace(
        our_addr=OURS[family], end_addr=PEER[family], our_port=rng.randrange(1024, 1034)
    )
    return flow._replace(sides=(sides[0], sides[1]))


def likely(rng: Random, dumped: Dumped | None) -> Dumped | None:
    """With windows that the kernel takes, mostly: ``tcp_repair_set_window`` of its tcp.c."""
    if dumped is None or not rng.randrange(6):
        return dumped
    state, sndq, rcvq = dumped
    state = state._replace(
        max_window=max(state.max_window, state.snd_wnd), snd_wl1=state.seq_rcv, rcv_wup=state.seq_rcv
    )
    return state, sndq, rcvq


def stream(rng: Random, number: int) -> bytes:
    """One that is sound, or was before something came over it."""

    def made() -> bytes:
        device = filled(rng, number)
        device.states = [here(rng, flow) for flow in device.states]
        device.sockets = {flow: likely(rng, dumped) for flow, dumped in device.sockets.items()}
        return save(device, number)

    return mutated(rng, made(), made()) if rng.randrange(3) else made()


class Slowly(io.BytesIO):
    """A stream that comes in small pieces, and ``stop`` is called before one of them."""

    def __init__(self, data: bytes, after: int, stop: Callable[[], None]) -> None:
        super().__init__(data)
        self.after = after
        self.stop = stop

    def read(self, size: int | None = -1, /) -> bytes:
        self.after -= 1
        if self.after == 0:
            self.stop()
        return super().read(min(size or 0, 100))


@contextlib.contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """No more than so many can be opened."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = {int(fd) for fd in descriptors()}
    free = [fd for fd in range(len(taken) + count + 1) if fd not in taken]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[count], hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def arrive(rig: Rig, rng: Random, number: int) -> Migration[FlowMover]:
    """Load any stream; the helper and the front-end may go away meanwhile, and descriptors be short."""
    rig.help = rig.helped + rng.choice((0, 1, 2, *[1 << 30] * 5))
    transfer: Migration[FlowMover] = Migration(versions(), rig.mover)
    file = Slowly(stream(rng, number), rng.choice((0, 0, 0, rng.randrange(1, 20))), lambda: transfer.cancel("enough"))
    transfer.request(file, Direction.TARGET)
    with descriptors_left(rng.choice((0, 1, 2, 3, *[100] * 8))):
        outcome = transfer.run()
    if isinstance(outcome.error, StageError):
        raise outcome.error
    assert outcome.undo_errors == []
    return transfer


@pytest.mark.parametrize("number", [2, NATIVE])
def test_a_load_that_ends_without_the_guest_leaves_nothing(rig: Rig, number: int) -> None:
    ends: Counter[str] = Counter()
    before = rig.content()
    rig.heard()
    for seed in range(LOADS):
        transfer = arrive(rig, Random(f"{number} {seed}"), number)
        outcome = transfer.outcome
        assert outcome is not None
        ends[type(outcome.error).__name__] += 1
        if rig.mover._arrivals is not None:
            ends["filled"] += len(rig.mover._arrivals.with_socket(0, restored=True))
        transfer.close()
        assert rig.content() == before, seed
        assert rig.heard() == [], seed
        with pytest.raises(ValueError, match="without park"):  # the data plane goes on
            rig.engine.unpark()
    # All of it was there: loads that were dropped, with sockets filled, that were refused, and that were called off.
    assert min(ends[name] for name in ("NoneType", "filled", "BadRecordError", "AbortedError")) > 1, ends


@pytest.mark.parametrize("number", [2, NATIVE])
def test_what_a_guest_has_after_any_load_can_be_saved_and_closed(rig: Rig, number: int) -> None:
    """It runs, is saved again, and goes; then all is as before."""
    before = rig.content()
    for seed in range(LOADS):
        rng = Random(f"commit {number} {seed}")
        transfer = arrive(rig, rng, number)
        if transfer.state is State.LOADED:
            assert transfer.commit() == []
            again: Migration[FlowMover] = Migration(versions(), rig.mover)
            again.request(file := io.BytesIO(), Direction.SOURCE, number)
            rig.help = 1 << 30
            assert again.run().error is None
            _, error, other = load(file.getvalue())
            assert error is None, seed
            other.close()
            again.rollback()
            again.close()
        transfer.close()
        rig.mover.close_flows()
        wait_until(lambda: rig.content() == before, f"all is closed after {seed}: {rig.content()}")


def test_what_finds_no_room_in_the_kernel_is_not_kept_without_end(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Receive queues of 1 MiB each, of which 2 MiB in all may be kept: the third is one too many."""
    rig.space.sysctl("net/ipv4/tcp_rmem", "4096 65536 65536")
    monkeypatch.setattr("godwit.daemon.mover.QUEUES_SHARE", (2 << 20) / (PAGE * os.sysconf("SC_PHYS_PAGES")))
    queue = bytes(range(256)) * 4096
    device = Device()
    rng = Random(0)
    for number in range(3):
        flow = sound_flow(rng, FLOW)
        side = Side(OURS[4], PEER[4], 2000 + number, 80)
        device.states.append(flow._replace(pif=(1, 2), sides=(side, side)))
        state = SocketState(1, 1, 0, 0, len(queue), 1460, 0, 1, 1000, 1000, 1000, 1, 7, 7, 1, 0)
        device.sockets[number] = (state, b"", queue)
    transfer: Migration[FlowMover] = Migration(versions(), rig.mover)
    transfer.request(io.BytesIO(save(device, NATIVE)), Direction.TARGET)
    assert transfer.run()
    assert rig.mover._arrivals is not None
    carried = [len(to_guest) for _, _, to_guest, _ in handover.tcp(rig.engine)]
    assert carried[0] == carried[1] > 900_000
    assert carried[2] == 0
    assert transfer.commit() == []
    assert "1 lost, 10.9.0.1 port 2002 to 10.9.0.7 port 80: all queues together are too large" in caplog.text
    transfer.close()
    rig.mover.close_flows()
