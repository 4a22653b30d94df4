# SPDX-License-Identifier: GPL-2.0-or-later
"""The embedded guest against a back-end that returns every frame."""

from __future__ import annotations

import hashlib
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from godwit.lab.errors import LabError
from godwit.lab.guest import GUEST_MAC, EmbeddedGuest
from godwit.lab.memory import HIGH
from godwit.lab.migration import MigrationError
from godwit.lab.netns import wait_until
from godwit.vhost_user import DisconnectedError, Feature

# Fixtures of conftest.py, which cannot be imported from here.
Backends = Any
Loopback = Any

ETHERTYPE = 0x88B5  # for local experiments, IEEE 802
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33  # asm-generic/socket.h
SIZES = [60, 61, 1514, 4083, 4084, 4085, 4096, 8180, 16384, 65000, 65534]


class Card:
    """A packet socket on the guest's interface: frames out, and what comes back."""

    def __init__(self, guest: EmbeddedGuest) -> None:
        with guest.space.enter():
            self.sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETHERTYPE))
        self.sock.bind(("eth0", ETHERTYPE))
        self.sock.settimeout(5)

    def send(self, number: int, size: int) -> bytes:
        head = struct.pack("!6s6sHI", b"\xff" * 6, b"\x02" * 6, ETHERTYPE, number)
        frame = head + hashlib.shake_128(head).digest(size - len(head))
        self.sock.send(frame)
        return frame

    def receive(self) -> bytes:
        return self.sock.recv(1 << 17)

    def exchange(self, count: int, size: int = 1514) -> None:
        """Send frames and take each back."""
        for number in range(count):
            frame = self.send(number, size)
            assert self.receive() == frame

    def silent(self) -> bool:
        self.sock.settimeout(0.1)
        try:
            self.sock.recv(1 << 17)
        except TimeoutError:
            return True
        finally:
            self.sock.settimeout(5)
        return False


@pytest.fixture
def opened() -> Iterator[Callable[..., tuple[EmbeddedGuest, Card]]]:
    """Make guests with a card each; both closed at the end."""
    made: list[tuple[EmbeddedGuest, Card]] = []

    def make(path: str, **options: Any) -> tuple[EmbeddedGuest, Card]:
        guest = EmbeddedGuest(mtu=65520, **options)
        guest.space.sysctl("net/ipv6/conf/all/disable_ipv6", "1")  # the kernel's own frames would be counted
        guest.connect(path)
        guest.configure(addr4=None, addr6=None)
        card = Card(guest)
        made.append((guest, card))
        return guest, card

    yield make
    for guest, card in made:
        card.sock.close()
        guest.close()


def counts(guest: EmbeddedGuest, what: str) -> tuple[int, int]:
    counters = guest.counters
    return counters[f"from_guest_{what}"], counters[f"to_guest_{what}"]


Opened = Callable[..., tuple[EmbeddedGuest, Card]]


@pytest.mark.parametrize("event_idx", [True, False])
@pytest.mark.parametrize("layout", ["single", "chain", "indirect"])
def test_frames_come_back_unchanged(
    backends: Backends, loopback: type[Loopback], opened: Opened, layout: str, event_idx: bool
) -> None:
    device = loopback()
    if not event_idx:
        device.features &= ~Feature.VIRTIO_F_EVENT_IDX
    guest, card = opened(backends.start(device), tx_layout=layout, tx_chunk=8192)
    for number, size in enumerate(SIZES):
        frame = card.send(number, size)
        assert card.receive() == frame
    assert device.frames >= len(SIZES)
    wait_until(lambda: counts(guest, "frames") == (device.frames, device.frames), "the stack's own frames")
    sent, returned = counts(guest, "bytes")
    assert sent == returned
    counters = guest.counters
    assert counters["to_guest_refused"] == 0
    guest.check()


@pytest.mark.parametrize(("queue_size", "rx_buffer"), [(128, 2048), (1024, 1526), (256, 65600)])
def test_sizes_of_rings_and_buffers(
    backends: Backends, loopback: type[Loopback], opened: Opened, queue_size: int, rx_buffer: int
) -> None:
    guest, card = opened(backends.start(loopback()), queue_size=queue_size, rx_buffer=rx_buffer)
    for number, size in enumerate(SIZES):
        assert card.send(number, size) == card.receive()
    guest.check()


def test_rings_wrap(backends: Backends, loopback: type[Loopback], opened: Opened) -> None:
    """More frames than an index can count, and bursts larger than the ring."""
    device = loopback()
    guest, card = opened(backends.start(device), queue_size=128)
    sent = 0
    deadline = time.monotonic() + 60
    while sent <= 66_000:
        frames = [card.send(number, 60) for number in range(sent, sent + 100)]
        assert [card.receive() for _ in frames] == frames
        sent += len(frames)
        assert time.monotonic() < deadline
    assert device.frames >= sent > 65536
    guest.check()


def test_full_ring_is_waited_out(backends: Backends, loopback: type[Loopback], opened: Opened) -> None:
    """A back-end that takes nothing for a while loses no frame."""
    device = loopback()
    guest, card = opened(backends.start(device), queue_size=128)
    card.exchange(3)
    card.sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 24)
    card.sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 1 << 24)
    device.rings[1].running = False
    frames = [card.send(number, 1000) for number in range(600)]
    wait_until(lambda: guest.counters["from_guest_stalls"] > 0, "a full ring")
    device.rings[1].running = True
    os.eventfd_write(guest.attachment.kick(1), 1) if guest.attachment else None
    assert [card.receive() for _ in frames] == frames
    guest.check()


def test_migration(backends: Backends, loopback: type[Loopback], opened: Opened) -> None:
    first, second = loopback(), loopback()
    first.state = os.urandom(300_000)
    guest, card = opened(backends.start(first))
    card.exchange(10)
    record = guest.migrate(backends.start(second))
    assert record.stream == first.state == second.state
    assert record.downtime > 0
    card.exchange(300)
    assert first.frames == record.bases[1] >= 10
    assert second.frames >= 300
    assert first.events == ["kick 0", "kick 1", "base 0", "base 1", "save", "gone"]
    assert second.events == ["load", f"rarp {GUEST_MAC}", "kick 0", "kick 1"]
    guest.check()


def test_dirty_pages_are_kept(backends: Backends, loopback: type[Loopback], opened: Opened) -> None:
    first, second = loopback(), loopback()
    guest, card = opened(backends.start(first))
    card.exchange(10)
    migration = guest.migration(backends.start(second))
    migration.connect_target()
    migration.log_on()
    card.exchange(5, 9000)
    migration.suspend()
    migration.transfer()
    migration.switch_over()
    migration.finish()
    pages = migration.record.dirty
    memory = guest.memory
    assert {memory.gpa(memory.rings[q].used) // 4096 for q in (0, 1)} <= pages
    assert len([page for page in pages if page >= HIGH // 4096]) == 15  # three buffers for each frame
    card.exchange(5)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_cancel_after_each_step(backends: Backends, loopback: type[Loopback], opened: Opened, steps: int) -> None:
    first, second = loopback(), loopback()
    first.state = b"state"
    guest, card = opened(backends.start(first))
    card.exchange(10)
    migration = guest.migration(backends.start(second))
    for step in ("connect_target", "log_on", "suspend", "transfer", "switch_over")[:steps]:
        getattr(migration, step)()
    if steps >= 3:
        card.send(0, 100)
        if steps < 5:
            assert card.silent()  # the guest stands still
        else:
            card.receive()
            migration.record.bases = [guest.mover.used_index(0), guest.mover.used_index(1)]
    migration.cancel()
    if 3 <= steps < 5:
        card.receive()
    card.exchange(300)
    assert second.frames <= 1
    assert not first.acked & Feature.VHOST_F_LOG_ALL
    with pytest.raises(LabError, match="over"):
        migration.cancel()
    # And it can migrate still.
    third = loopback()
    guest.migrate(backends.start(third))
    card.exchange(10)
    assert third.state == b"state"
    guest.check()


def test_refused_load_leaves_the_guest_on_the_source(
    backends: Backends, loopback: type[Loopback], opened: Opened
) -> None:
    first, second = loopback(), loopback()
    first.state = bytes(1_000_000)  # more than a pipe holds
    second.refuse_load = True
    guest, card = opened(backends.start(first))
    card.exchange(10)
    with pytest.raises(MigrationError, match="the target refused the state") as caught:
        guest.migrate(backends.start(second))
    assert caught.value.step == "transfer"
    card.exchange(10)
    assert second.frames == 0
    assert first.frames >= 20


def test_cut_stream(backends: Backends, loopback: type[Loopback], opened: Opened) -> None:
    first, second = loopback(), loopback()
    first.state = os.urandom(200_000)
    guest, card = opened(backends.start(first))
    migration = guest.migration(backends.start(second))
    migration.connect_target()
    migration.log_on()
    migration.suspend()
    migration.transfer(cut=70_001)
    assert second.state == first.state[:70_001]
    assert migration.record.stream == first.state
    migration.cancel()
    card.exchange(10)


def test_target_must_offer_what_is_in_use(backends: Backends, loopback: type[Loopback], opened: Opened) -> None:
    poor = loopback()
    poor.features &= ~Feature.VIRTIO_F_EVENT_IDX
    guest, card = opened(backends.start(loopback()))
    with pytest.raises(MigrationError, match="does not offer features") as caught:
        guest.migrate(backends.start(poor))
    assert caught.value.step == "connect_target"
    card.exchange(10)


def test_reconnect_after_the_backend_is_gone(backends: Backends, loopback: type[Loopback], opened: Opened) -> None:
    first, second = loopback(), loopback()
    guest, card = opened(backends.start(first))
    card.exchange(10)
    assert not guest.backend_gone
    assert guest.attachment is not None
    guest.attachment.client.send_raw(b"\xff" * 12)  # no message at all: ends the session
    with pytest.raises(DisconnectedError):
        guest.attachment.client.get_features()
    wait_until(lambda: guest.backend_gone, "the back-end to hang up")
    frame = card.send(1, 1000)
    guest.reconnect(backends.start(second))
    assert card.receive() == frame
    card.exchange(300)
    assert second.frames >= 301


def _jump(device: Loopback, ring: Any) -> None:
    ring.used = (ring.used + 300) & 0xFFFF
    device.give(ring, [])


def _stranger(device: Loopback, ring: Any) -> None:
    device.give(ring, [(ring.num, 100)])


def _long(device: Loopback, ring: Any) -> None:
    device.give(ring, [(device.take(ring), 5000)])


def _no_count(device: Loopback, ring: Any) -> None:
    device.give(ring, [(device.take(ring), 100)])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_jump, "ran ahead"),
        (_stranger, "names a buffer that the back-end did not have"),
        (_long, "larger than its buffer"),
        (_no_count, "num_buffers is 0"),
    ],
)
def test_broken_rings_are_noticed(
    backends: Backends,
    loopback: type[Loopback],
    opened: Opened,
    spoil: Callable[[Loopback, Any], None],
    message: str,
) -> None:
    device = loopback()
    guest, card = opened(backends.start(device))
    card.exchange(3)
    device.spoil = spoil

    def noticed() -> bool:
        card.send(9, 100)  # it looks at a ring when there is something to do
        return guest.mover.failure is not None

    wait_until(noticed, "the mover to notice", interval=0.05)
    with pytest.raises(LabError, match=message):
        guest.check()


def test_in_an_unprivileged_user_namespace(run_as_nobody: Callable[[str], Any]) -> None:
    done = run_as_nobody("""
from godwit.lab.guest import EmbeddedGuest
from godwit.lab.netns import enter_user_namespace
enter_user_namespace()
with EmbeddedGuest() as guest:
    guest.configure()
    print(guest.run("ip", "-br", "addr", "show", "eth0").stdout)
""")
    assert done.returncode == 0, done.stderr
    assert "192.0.2.10/24" in done.stdout
