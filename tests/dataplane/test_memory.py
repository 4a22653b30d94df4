# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's memory: its regions, as they come and go, and the dirty log."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import socket
from collections.abc import Callable, Iterator

import pytest

from godwit.dataplane import Engine
from godwit.lab.netns import Namespace

from .driver import (
    EVENT_IDX,
    FULL,
    LOG_ALL,
    PAGE,
    PLAIN,
    RX,
    TX,
    USER_BASE,
    V4,
    Family,
    Guest,
    Memory,
    Part,
    Piece,
    Ring,
    is_echo_reply,
    open_pair,
    other_frame,
    pattern,
    read_exactly,
    wait_until,
)

MIB = 1 << 20
# Three regions, one behind the other for the guest, in another order in the file.
SPLIT = (Piece(0, 4 * MIB, MIB), Piece(4 * MIB, PAGE, 0), Piece(4 * MIB + PAGE, 64 * PAGE, 6 * MIB))
EDGE = 4 * MIB


def descriptors() -> int:
    gc.collect()  # what earlier tests have left is not to be closed amid this one
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def split() -> Iterator[Guest]:
    with Guest(regions=SPLIT, rx=()) as it:
        yield it


# ---- regions


@pytest.mark.parametrize("before", [1, 11, 12, 13, 30, 100])
def test_frame_from_the_guest_straddles_regions(split: Guest, before: int) -> None:
    """The cut is in the virtio header, behind it, in the other headers, in the payload."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.bind((V4.loopback, 0))
        peer.settimeout(5)
        payload = pattern(2 * PAGE)
        frame = split.vnet + bytes(split.udp(V4, 5000, peer.getsockname()[1], payload))
        split.memory.write(EDGE - before, frame)
        split.send_parts([Part(EDGE - before, len(frame), write=False)])
        assert peer.recv(65536) == payload


@pytest.mark.parametrize("before", [1, 12, 13, 30, 100])
@pytest.mark.parametrize("features", [FULL, PLAIN], ids=["full", "plain"])
def test_buffer_for_the_guest_straddles_regions(before: int, features: int) -> None:
    with Guest(features, regions=SPLIT, rx=(), mtu=65520) as guest:
        guest.hand_out([Part(EDGE - before, 4 * PAGE, write=True)])
        guest.refill = False
        frame = other_frame(1500)
        assert guest.engine.inject(frame)
        assert guest.receive().raw == frame
        guest.hand_out([Part(EDGE - before, 4 * PAGE, write=True)])
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
            peer.bind((V4.loopback, 0))
            peer.settimeout(5)
            guest.send(guest.udp(V4, 5000, peer.getsockname()[1], b"?"))
            data = pattern(3 * PAGE)
            peer.sendto(data, peer.recvfrom(10)[1])
            assert guest.receive().payload == data


def test_indirect_table_straddles_regions(split: Guest) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.bind((V4.loopback, 0))
        peer.settimeout(5)
        frame = split.vnet + bytes(split.udp(V4, 5000, peer.getsockname()[1], pattern(100)))
        parts = split.layout(frame, [12, 14, 20, 8])
        head = split.tx.add(parts, indirect=True, table=EDGE - 40)  # amid the third of five descriptors
        split.tx.publish(1)
        split.reap_tx(head)
        assert peer.recv(65536) == pattern(100)


@pytest.mark.parametrize(
    "addr",
    [SPLIT[-1].addr + SPLIT[-1].size - 100, SPLIT[-1].addr + SPLIT[-1].size, 1 << 40, (1 << 64) - 100, (1 << 64) - 1],
)
@pytest.mark.parametrize("index", [RX, TX])
def test_buffer_outside_of_memory_breaks_the_ring(split: Guest, addr: int, index: int) -> None:
    """Outside altogether, or with its last bytes."""
    ring = split.rings[index]
    head = ring.free.popleft()
    ring.set_desc(head, addr, 200, 2 if index == RX else 0)
    ring.push(head)
    ring.publish(1)
    split.engine.inject(bytes(60))
    assert ring.broken()
    assert ring.reap() == []
    assert not split.rings[1 - index].broken(0)


def test_region_comes_and_goes(guest: Guest) -> None:
    extra = Piece(1 << 40, MIB, 0)
    fd = os.memfd_create("more", os.MFD_CLOEXEC)
    os.ftruncate(fd, MIB)
    engine = guest.engine
    frame = guest.vnet + bytes(guest.udp(V4, 5000, 9, b"x"))
    os.pwrite(fd, frame, 0)
    for _ in range(3):
        opened = descriptors()
        engine.add_region(extra.addr, extra.size, USER_BASE + extra.addr, 0, os.dup(fd))
        assert descriptors() == opened + 1  # kept, for a process that takes over
        before = engine.counters()["frames_from_guest"]
        guest.send_parts([Part(extra.addr, len(frame), write=False)])
        assert engine.counters()["frames_from_guest"] == before + 1
        with pytest.raises(OSError, match="memory region") as caught:  # there already
            engine.add_region(extra.addr, extra.size, USER_BASE + extra.addr, 0, os.dup(fd))
        assert caught.value.errno == errno.EINVAL
        for wrong in ((extra.addr + PAGE, extra.size), (extra.addr, extra.size - PAGE)):
            with pytest.raises(OSError, match="no memory region"):
                engine.remove_region(*wrong, USER_BASE + wrong[0])
        opened = descriptors()
        engine.remove_region(extra.addr, extra.size, USER_BASE + extra.addr)
        assert descriptors() == opened - 1
    guest.send_parts([Part(extra.addr, len(frame), write=False)], wait=False)
    assert guest.tx.broken()
    os.close(fd)


def test_rings_stand_still_while_their_memory_is_away(guest: Guest, family: Family) -> None:
    """Memory is removed and shared anew when a guest gets more of it: no connection minds."""
    conn, sock = open_pair(guest, family)
    with sock:
        piece = guest.memory.regions[0]
        guest.engine.remove_region(piece.addr, piece.size, USER_BASE + piece.addr)
        sock.sendall(b"meanwhile")
        guest.tx.kick()
        guest.barrier()
        guest.engine.set_memory(guest.memory.table())
        assert conn.read(9) == b"meanwhile"
        conn.push(b"and back")
        assert read_exactly(sock, 8) == b"and back"


@pytest.mark.parametrize(
    "table",
    [
        pytest.param([(0, 0, 0, 0)], id="empty"),
        pytest.param([(0, 2 * MIB, 0, 0)], id="file_too_short"),
        pytest.param([(0, MIB, 0, PAGE)], id="file_too_short_for_the_offset"),
        pytest.param([(0, MIB, 0, 1 << 62)], id="offset_far_out"),
        pytest.param([(0, MIB, 0, (1 << 64) - PAGE)], id="offset_wraps"),
        pytest.param([((1 << 64) - PAGE, MIB, 0, 0)], id="guest_address_wraps"),
        pytest.param([(0, MIB, (1 << 64) - PAGE, 0)], id="user_address_wraps"),
        pytest.param([(0, MIB, 0, 0), (MIB - PAGE, PAGE, MIB, 0)], id="overlap_for_the_guest"),
        pytest.param([(0, MIB, 0, 0), (MIB, PAGE, MIB - PAGE, 0)], id="overlap_for_the_front_end"),
        pytest.param([(i * PAGE, PAGE, i * PAGE, 0) for i in range(65)], id="too_many"),
    ],
)
def test_bad_table_is_refused(table: list[tuple[int, int, int, int]]) -> None:
    """Whole, with every descriptor closed; and the next good one is taken."""
    with Guest() as guest:
        guest.engine.set_memory([])
        opened = descriptors()
        fds = [os.memfd_create("bad", os.MFD_CLOEXEC) for _ in table]
        for fd in fds:
            os.ftruncate(fd, MIB)
        with pytest.raises(OSError, match="memory region") as caught:
            guest.engine.set_memory([(*row, fd) for row, fd in zip(table, fds, strict=True)])
        assert caught.value.errno == errno.EINVAL
        assert descriptors() == opened
        guest.engine.set_memory(guest.memory.table())
        assert guest.engine.inject(other_frame(60))
        assert guest.receive().raw == other_frame(60)


def test_ring_must_lie_in_memory(guest: Guest) -> None:
    ring = Ring(guest.memory, 16, event_idx=True)
    desc, used, avail = USER_BASE + ring.desc, USER_BASE + ring.used, USER_BASE + ring.avail
    end = USER_BASE + guest.memory.regions[0].size
    guest.engine.ring_stop(RX)
    guest.engine.ring_num(RX, 16)
    for bad in (
        (end - 16 * 16 + 16, used, avail),
        (desc, end - 8, avail),
        (desc, used, end - 4),
        (desc + 8, used, avail),  # virtio 1.2, 2.7: alignments
        (desc, used + 2, avail),
        (desc, used, avail + 1),
        (ring.desc, used, avail),  # a guest address
        ((1 << 64) - 16, used, avail),
    ):
        with pytest.raises(OSError, match="does not lie in the memory"):
            guest.engine.ring_addr(RX, 0, bad[0], bad[1], bad[2], 0)
        fd = os.dup(ring.kick_fd)
        with pytest.raises(ValueError, match="before its address was set"):
            guest.engine.ring_kick(RX, fd)
    guest.engine.ring_addr(RX, 0, desc, used, avail, 0)
    guest.engine.ring_kick(RX, os.dup(ring.kick_fd))
    ring.close()


# ---- the dirty log


class Log:
    """The front-end's side of a dirty log: one bit for each page."""

    def __init__(self, engine: Engine, pages: int, *, offset: int = 0) -> None:
        self.pages = pages
        self.offset = offset
        self.fd = os.memfd_create("log", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, offset + pages // 8)
        self.map = mmap.mmap(self.fd, offset + pages // 8)
        engine.set_log(os.dup(self.fd), pages // 8, offset)

    def close(self) -> None:
        self.map.close()
        os.close(self.fd)

    def take(self) -> set[int]:
        """The pages marked, and none any more."""
        bits = int.from_bytes(self.map[self.offset :], "little")
        self.map[self.offset :] = bytes(self.pages // 8)
        return {page for page in range(self.pages) if bits >> page & 1}


REGION = Piece(0x10_0000, 4 * MIB, 0)
LOG_PAGES = (REGION.addr + REGION.size) // PAGE


def ours(guest: Guest) -> set[int]:
    """The pages that a device may write: used rings and receive buffers."""
    found = {ring.used // PAGE for ring in guest.rings}
    for parts in guest.rx_buffers.values():
        for part in parts:
            found |= set(range(part.addr // PAGE, (part.addr + part.size - 1) // PAGE + 1))
    return found


def changed(guest: Guest, action: Callable[[], object]) -> set[int]:
    """The pages among those that are different afterwards."""
    pages = ours(guest)
    before = {page: guest.memory.read(page * PAGE, PAGE) for page in pages}
    action()
    guest.barrier()
    return {page for page in pages if guest.memory.read(page * PAGE, PAGE) != before[page]}


class Traffic:
    """One thing of each kind that has the guest's memory written."""

    def __init__(self, guest: Guest, family: Family) -> None:
        self.guest = guest
        self.family = family
        self.conn, self.sock = open_pair(guest, family)
        self.peer = socket.socket(family.af, socket.SOCK_DGRAM)
        self.peer.bind((family.loopback, 0))
        self.peer.settimeout(5)
        self.own = guest.port()

    def close(self) -> None:
        self.sock.close()
        self.peer.close()

    def tcp(self) -> None:
        data = pattern(100_000)
        self.sock.sendall(data)
        assert self.conn.read(len(data)) == data

    def acknowledgement(self) -> None:
        self.conn.push(b"x")
        self.conn.wait_acked()

    def udp(self) -> None:
        for size in (0, 100, 30_000):
            self.guest.send(self.guest.udp(self.family, self.own, self.peer.getsockname()[1], b"?"))
            self.peer.sendto(pattern(size), self.peer.recvfrom(10)[1])
            assert self.guest.receive().payload == pattern(size)

    def ping(self) -> None:
        self.guest.send(self.guest.echo(self.family, 77, 1, pattern(5000)))
        self.guest.receive(is_echo_reply)

    def injected(self) -> None:
        assert self.guest.engine.inject(other_frame(1500))
        assert self.guest.receive().raw == other_frame(1500)

    def nothing_to_say(self) -> None:
        """A frame from the guest that nobody answers: the used ring alone."""
        self.guest.send(bytes(60))


@pytest.fixture(params=["event_idx", "flags"])
def logged(request: pytest.FixtureRequest) -> Iterator[Guest]:
    """A guest without buffers that are used twice, in a network of its own, in which it may ping."""
    features = FULL | LOG_ALL if request.param == "event_idx" else (FULL | LOG_ALL) & ~EVENT_IDX
    with (
        Namespace("dataplane") as space,
        space.enter(),
        Guest(features, regions=(REGION,), rx=((700, 1348),) * 120, log=True, mtu=65520) as guest,
    ):
        guest.refill = False
        yield guest


KINDS = ["tcp", "acknowledgement", "udp", "ping", "injected", "nothing_to_say"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_page_written_is_logged(logged: Guest, family: Family, kind: str) -> None:
    log = Log(logged.engine, LOG_PAGES, offset=PAGE)
    traffic = Traffic(logged, family)
    logged.barrier()
    allowed = ours(logged)
    log.take()
    written = changed(logged, getattr(traffic, kind))
    marked = log.take()
    assert written
    assert written <= marked <= allowed
    assert logged.tx.used // PAGE in marked or kind == "injected"
    assert log.map[:PAGE] == bytes(PAGE)  # before the offset: not the log
    traffic.close()
    log.close()


def test_nothing_is_logged_without_the_feature(logged: Guest, family: Family) -> None:
    """Of the buffers, that is: the rings are logged by a flag of their own (VHOST_VRING_F_LOG)."""
    log = Log(logged.engine, LOG_PAGES)
    traffic = Traffic(logged, family)
    logged.engine.set_features(logged.features & ~LOG_ALL)
    log.take()
    traffic.tcp()
    traffic.udp()
    logged.barrier()
    rings = {ring.used // PAGE for ring in logged.rings}
    assert log.take() == rings
    logged.log = False
    for index in (RX, TX):
        logged.set_addr(index)
    logged.barrier()
    log.take()
    traffic.injected()
    traffic.acknowledgement()
    logged.barrier()
    assert log.take() == set()
    traffic.close()
    log.close()


def test_log_that_ends_early(logged: Guest, family: Family) -> None:
    """Pages beyond it are not marked, and nothing is written behind it."""
    size = 32  # pages that the log has bits for; all that is written lies above
    log = Log(logged.engine, size, offset=8)
    os.ftruncate(log.fd, PAGE)
    traffic = Traffic(logged, family)
    for kind in KINDS:
        getattr(traffic, kind)()
    logged.barrier()
    assert os.pread(log.fd, PAGE, 0) == bytes(PAGE)
    traffic.close()
    log.close()


def test_log_that_is_no_file_of_that_size(guest: Guest) -> None:
    fd = os.memfd_create("log", os.MFD_CLOEXEC)
    os.ftruncate(fd, PAGE)
    for size, offset in ((PAGE + 1, 0), (PAGE, 1), (0, 0), (1 << 63, 1 << 63)):
        opened = descriptors()
        with pytest.raises(OSError, match="dirty log"):
            guest.engine.set_log(os.dup(fd), size, offset)
        assert descriptors() == opened
    os.close(fd)


def test_log_is_exchanged_while_frames_are_on_the_way(logged: Guest, family: Family) -> None:
    """A front-end with more memory gives a larger log; from then on all is in that one."""
    old = Log(logged.engine, LOG_PAGES)
    traffic = Traffic(logged, family)
    traffic.tcp()
    new = Log(logged.engine, 2 * LOG_PAGES)
    logged.barrier()
    new.take()
    old.take()
    written = changed(logged, traffic.injected)
    assert written <= new.take()
    assert old.take() == set()
    traffic.close()
    old.close()
    new.close()


def test_flags_of_the_used_ring_are_logged(logged: Guest) -> None:
    """Whatever was written last of a turn: the target sees what the guest saw."""
    log = Log(logged.engine, LOG_PAGES)
    logged.engine.park()
    for ring in logged.rings:
        logged.memory.write(ring.used, b"\xff\xff")  # so that it shows when the same is written again
    log.take()
    written = changed(logged, logged.engine.unpark)
    assert bool(written) == (not logged.features & EVENT_IDX)
    assert written <= log.take()
    log.close()


# ---- memory that is not shared


def test_a_guest_whose_writes_are_not_seen(guest: Guest) -> None:
    """It kicks its receive ring, and the ring in our copy of its memory stays as it was."""
    assert not guest.engine.sees_nothing()
    guest.rx.kick()
    guest.barrier()
    assert not guest.engine.sees_nothing()  # there are buffers
    private = Memory(guest.memory.regions)  # all zero, as a copy that nobody writes to
    try:
        guest.engine.ring_stop(RX)
        guest.engine.set_memory(private.table())
        os.eventfd_read(guest.rx.kick_fd)
        guest.start_ring(RX, 0)
        guest.barrier()
        assert not guest.engine.sees_nothing()  # not kicked yet
        guest.rx.kick()
        wait_until(guest.engine.sees_nothing)
        guest.engine.set_memory(guest.memory.table())
        assert not guest.engine.sees_nothing()
    finally:
        private.close()
