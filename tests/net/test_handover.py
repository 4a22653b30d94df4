# SPDX-License-Identifier: GPL-2.0-or-later
"""What is handed over, as a stream: all of it comes through, and what cannot be right does not."""

from __future__ import annotations

import struct
import zlib

import pytest

from godwit.dataplane.live import LiveFlag, LivePartial, LivePeer, LivePing, LivePort, LiveRing, LiveTcp
from godwit.dataplane.state import Datagram, Observed
from godwit.migration import BadRecordError, DamagedError, MigrationError, TruncatedError, UnknownEntryError
from godwit.migration.entries import HEAD, REQUIRED
from godwit.net import handover
from godwit.net.handover import FRONT_END, PID_FILE, Handed, Name, Process
from godwit.vhost_user import MemoryRegion, SavedSession

A, B, C, D = (bytes(10) + b"\xff\xff" + bytes((192, 0, 2, last)) for last in (1, 2, 3, 4))


def tcp(**values: int) -> LiveTcp:
    numbers = dict.fromkeys(LiveTcp._fields, 7)
    addresses = dict(zip(("guest_addr", "our_addr", "remote_addr", "local_addr"), (A, B, C, D), strict=True))
    every = {**numbers, **addresses, **values}
    return LiveTcp._make(every[name] for name in LiveTcp._fields)


def whole() -> Handed:
    """Something of everything."""
    unread = SavedSession(
        1 << 32,
        9,
        True,
        ((True, True, True), (True, False, False)),
        (MemoryRegion(0, 4096, 1 << 40, 0),),
        b"\x01\0\0",
        (21, 22),
    )
    return Handed(
        process=Process(bytes(range(16)), 12345678901, 99, 1, 0, 1, 0),
        facts={"IPv4": "192.0.2.1/24", "MTU": "1500"},
        counters={"frames_from_guest": 1 << 40, "drops.short": 3},
        observed=Observed(bytes(range(16)), bytes(16), b"\x01\x02\x03\x04", b"\x52\0\0\0\0\x01"),
        names=[Name(FRONT_END, "/run/vm.sock", 3), Name(PID_FILE, "/run/vm.pid", -1)],
        helper=4,
        waiting=5,
        connection=6,
        session=unread,
        regions=[(0, 4096, 1 << 40, 0, 7)],
        rings=[
            (LiveRing(256, 65535, 2, 1, 9, 1 << 40, 2 << 40, 3 << 40, 1, 1, 1, 0, 1), 8, 9, -1),
            (LiveRing(128, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0), -1, -1, -1),
        ],
        listeners=[10, 11],
        ports=[
            (LivePort(LiveFlag.FORWARD | LiveFlag.V6, 2, bytes(16), 53, 64, 0), 12, [Datagram(A, B, 9, b"x" * 60000)]),
            (LivePort(LiveFlag.FROM_GUEST, 0, A, 5000, 0, 4), 13, []),
        ],
        peers=[(1, LivePeer(LiveFlag.ANSWERED, A, B, C, D, 53, 54, 2, 1000, 20))],
        tcp=[(tcp(), 14, b"", b""), (tcp(flags=LiveFlag.RESET_DUE), -1, b"to the guest", b"to the socket")],
        pings=[(LivePing(LiveFlag.V6, A, B, C, 17, 3, 64, 100, 5), 15)],
        partials=[LivePartial(0, 17, 0x1234, A, B, 10, 0, 16, 16, b"header", bytes(1024), b"d" * 16)],
        frames=[b"a frame", b""],
    )


def test_all_of_it_comes_through() -> None:
    """With other numbers for the descriptors, as they are in another process; each goes where it belongs."""
    handed = whole()
    stream, fds = handover.write(handed)
    assert sorted(fds) == [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 21, 22]
    assert handover.read(stream, fds) == (handed, [])
    moved, left = handover.read(stream, [*(fd + 100 for fd in fds), 77])
    assert left == [77]
    assert moved.session is not None
    assert moved.session.fds == (121, 122)
    assert (moved.connection, moved.helper, moved.waiting) == (106, 104, 105)
    assert [fd for _, fd, _, _ in moved.tcp] == [114, -1]
    assert handover.write(moved)[0] == stream


def test_cut_off_anywhere_or_damaged() -> None:
    stream, fds = handover.write(whole())
    for end in (0, 5, 16, 20, 100, len(stream) - 1):
        with pytest.raises(TruncatedError):
            handover.read(stream[:end], fds)
    with pytest.raises(BadRecordError, match="bytes follow"):
        handover.read(stream + b"x", fds)
    at = stream.index(b"to the guest")
    with pytest.raises(DamagedError):
        handover.read(stream[:at] + b"T" + stream[at + 1 :], fds)


def with_entry(stream: bytes, kind: int, flags: int, payload: bytes) -> bytes:
    """One entry more, at the end, and the check value that it then has."""
    size = HEAD.size + 4
    body = stream[16:-size] + HEAD.pack(kind, flags, len(payload)) + payload
    return stream[:16] + body + HEAD.pack(0, REQUIRED, 4) + zlib.crc32(body).to_bytes(4, "big")


def test_entries_of_a_newer_one() -> None:
    stream, fds = handover.write(whole())
    assert handover.read(with_entry(stream, 999, 0, b"whatever"), fds)[0] == whole()
    with pytest.raises(UnknownEntryError):
        handover.read(with_entry(stream, 999, REQUIRED, b"whatever"), fds)
    newer = stream[:8] + struct.pack(">II", 2, 2) + stream[16:]
    with pytest.raises(BadRecordError, match="version is 2"):
        handover.read(newer, fds)
    assert handover.read(stream[:8] + struct.pack(">II", 2, 1) + stream[16:], fds)[0] == whole()


def test_descriptors_that_did_not_come_or_are_named_twice() -> None:
    handed = whole()
    stream, fds = handover.write(handed)
    with pytest.raises(BadRecordError, match=r"descriptor is .* did not come"):
        handover.read(stream, fds[:-1])
    twice = with_entry(stream, handover.LISTENERS_KIND.type, REQUIRED, struct.pack(">HII", 4, 1, 3))
    with pytest.raises(BadRecordError, match="named before"):
        handover.read(twice, fds)


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (handover.WAITING_DATAGRAM_KIND.type, struct.pack(">I", 2)),  # of no port
        (handover.CARRIED_KIND.type, struct.pack(">III", 2, 0, 0)),  # of no flow
        (handover.CARRIED_KIND.type, struct.pack(">III", 0, 1 << 31, 0)),
        (handover.FRAME_KIND.type, struct.pack(">I", 5000) + bytes(5000)),
        (handover.WAITING_KIND.type, struct.pack(">I", 0xFFFFFFFF)),  # a second one
        (handover.PROCESS_KIND.type, b"\0\x01x"),
    ],
)
def test_what_cannot_be(kind: int, payload: bytes) -> None:
    stream, fds = handover.write(whole())
    with pytest.raises(MigrationError):
        handover.read(with_entry(stream, kind, REQUIRED, payload), fds)


def test_flags_that_are_not_known() -> None:
    handed = whole()
    handed.tcp = [(tcp(flags=1 << len(LiveFlag)), 14, b"", b"")]
    stream, fds = handover.write(handed)
    with pytest.raises(BadRecordError, match="flags"):
        handover.read(stream, fds)


def test_without_the_process_there_is_nothing() -> None:
    stream, _ = handover.write(Handed())
    size = HEAD.size + 4
    empty = stream[:16] + HEAD.pack(0, REQUIRED, 4) + bytes(4)
    assert len(empty) == 16 + size
    with pytest.raises(BadRecordError, match="process"):
        handover.read(empty, [])
