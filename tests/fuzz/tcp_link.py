# SPDX-License-Identifier: GPL-2.0-or-later
"""One connection of a game (`tcp_model`): its guest by hand, its peer a socket, and what is known to be so.

Places in a stream are counted from 0, the first byte behind the SYN; a FIN has the place behind the last byte, and
takes one. ``must`` is how far a receiver that keeps nothing out of order has to be, ``cover`` how far any can be.
Between the two everything is allowed. Sections are those of RFC 9293 unless said otherwise; where it leaves a choice,
what Linux does is the standard.
"""

from __future__ import annotations

import contextlib
import enum
import math
import random
import select
import socket
import struct
import time
from collections import Counter
from typing import TYPE_CHECKING, Final

from .tcp_rig import FORWARDED, MASK, BreachError, Segment, require, segment

if TYPE_CHECKING:
    from .tcp_model import Game

FIN, SYN, RST, PSH, ACK, URG = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20

PATTERN: Final = random.Random(793).randbytes(1 << 20)
HALF: Final = 1 << 31
SCALES: Final = (7, 7, 7, None, 0, 2, 14, 15, 255)
SIZES: Final = (1460, 1460, None, 536, 64, 0, 1, 65535, 9000)
STARTS: Final = (0, 1, 5000, 70_000, 2_000_000)  # so far before an edge of the numbers
WINDOWS: Final = (0xFFFF, 0xFFFF, 0xFFFF, 0, 0, 1, 10, 100, 1000, 8000)
PIECES: Final = (1460, 1460, 1448, 1, 2, 100, 1000, 536, 0, 3000, 8000, 30_000)
WRITES: Final = (1, 100, 1460, 1461, 5000, 20_000, 65_536, 200_000)
RETRIES: Final = 15  # RFC 1122, 4.2.3.5: R2; Linux's tcp_retries2
SYN_RETRIES: Final = 6
CALL_PATIENCE: Final = 127_000  # ms in which the kernel gives up a call
FIRST_WAIT, LONGEST_WAIT = 1000, 60_000  # ms; RFC 6298, 2.1 and 2.5
LAG: Final = 20  # ms between two clocks
LINGER: Final = struct.pack("ii", 1, 0)


class Phase(enum.Enum):
    """What the data plane has of a connection."""

    NEW = "nothing yet"
    CALLED = "the guest has called"
    RINGING = "the guest is called"
    OPEN = "open"
    FADING = "both ends are done with; it may be there still"
    GONE = "nothing any more"


def relative(number: int) -> int:
    """The difference of two sequence numbers, as a signed one."""
    return ((number + HALF) & MASK) - HALF


def stream(salt: int, place: int, size: int) -> bytes:
    """The bytes of a stream."""
    at = (salt + place) % len(PATTERN)
    data = PATTERN[at : at + size]
    while len(data) < size:
        data += PATTERN[: size - len(data)]
    return data


class Link:
    """A connection, and all that holds of it."""

    def __init__(self, game: Game, number: int, head: bytes) -> None:
        self.game = game
        self.number = number
        self.v6 = bool(head[0] & 1)
        self.incoming = head[0] & 0x0E == 0x0E
        self.small = bool(head[0] & 0x10)
        self.head = head
        self.own = FORWARDED[1] if self.incoming else game.rig.port()
        self.listener = game.rig.listeners[self.v6][number]
        self.peer_port: int = 1 + number if self.incoming else self.listener.getsockname()[1]
        self.calls = 0
        self.accepted = 0
        self.sock: socket.socket | None = None
        self.counts: Counter[str] = Counter()
        self.renew()

    def renew(self) -> None:
        """Nothing is known: another connection begins."""
        head = self.head
        edge = (1 << 32, 1 << 31, random.Random(head[1]).getrandbits(32))[head[1] % 3]
        self.iss = (edge - STARTS[head[1] // 3 % len(STARTS)]) & MASK
        self.scale_asked = SCALES[head[2] % len(SCALES)]
        self.mss_asked = SIZES[head[2] // 9 % len(SIZES)]
        self.salt = self.iss * 7 % len(PATTERN)
        self.phase = Phase.NEW
        self.irs: int | None = None
        self.ws_ours = self.ws_theirs = 0  # scale of the guest's windows, and of those that it is given
        self.window = 0xFFFF
        # From the guest
        self.ranges: list[tuple[int, int]] = []  # that were sent and may have been taken
        self.must = 0
        self.fin: int | None = None
        self.fin_must = False
        self.told = 0  # right edge of the window that the guest was given last
        self.told_most = 0
        self.acked = 0
        self.sent_most = 0
        # To the guest
        self.wrote = 0
        self.end: int | None = None
        self.got = 0
        self.got_fin = False
        self.seen = 0
        self.una = self.una_before = 0  # what the guest has acknowledged, and had when this turn began
        self.edge = 0
        self.edges: list[int] = [0]
        # The peer
        self.read = 0
        self.eof = False
        self.closed = False
        self.peer_reset = False
        self.reading = True
        self.urgent = False
        # What is up
        self.may_reset = ""
        self.reset_by_guest = False
        self.was_reset = False
        self.unknown = False  # nothing is checked any more but how segments look
        self.held = False
        self.auto = True
        self.losing = 0
        self.due = ""
        self.owed = False
        self.replies: list[tuple[int, int, int]] = []  # resets that answer the guest's segments
        self.overtaken: list[tuple[int, int, int]] = []  # the same, should the connection have ended meanwhile
        self.opened = False  # in this turn
        self.fast_turn = False  # three duplicates came in this turn, and then more was acknowledged
        self.heard = self.heard_last = 0  # segments in this turn and in the last
        self.emitted = 0
        self.flying = 0
        self.again = False
        self.base = self.game.rig.now()
        self.base_before = math.inf  # as it was at the beginning of a turn in which it changed
        self.called_at = self.base
        self.dups = 0
        self.tries = 0
        self.silent = 0
        self.recover: int | None = None
        self.fast = False  # what is due is something sent again
        self.last_sent: object = None

    def __str__(self) -> str:
        return (
            f"{self.number}: {self.phase.value}, guest sent {self.sent_most} fin {self.fin} acked {self.acked} must "
            f"{self.must_next} told {self.told} read {self.read}{' eof' if self.eof else ''}; peer wrote {self.wrote} "
            f"end {self.end} seen {self.seen} got {self.got_next} una {self.una} edge {self.edge} {self.may_reset}"
        )

    def note(self, text: str) -> None:
        """What happens, for people."""
        self.game.note(f"    {self.number}: {text}")

    # ---- places

    @property
    def cover(self) -> int:
        """How far what was sent is without a hole; a FIN counted."""
        at = 0
        for start, end in sorted(self.ranges):
            if start > at:
                break
            at = max(at, end)
        return at + (1 if self.fin is not None and self.fin <= at else 0)

    @property
    def must_next(self) -> int:
        """The next place that the data plane expects."""
        return self.must + (1 if self.fin_must else 0)

    @property
    def got_next(self) -> int:
        """The next that the guest expects."""
        return self.got + (1 if self.got_fin else 0)

    @property
    def next(self) -> int:
        """The next that the guest sends."""
        return self.sent_most if self.fin is None else self.fin + 1

    @property
    def slack(self) -> int:
        """A window is told in units: the edge may be so much further, and go back so much (RFC 7323, appendix F).

        In a stream it is in such units too: so each time it moves.
        """
        return ((1 << self.ws_theirs) - 1) * (1 + self.game.moves)

    @property
    def mss(self) -> int:
        """The most that the guest gets at once."""
        head = 60 if self.v6 else 40
        asked = (1220 if self.v6 else 536) if self.mss_asked is None else self.mss_asked
        return max(64, min(asked, self.game.rig.mtu - head))

    def is_mine(self, s: Segment) -> bool:
        """Whose it is."""
        return s.dport == self.own and s.sport == self.peer_port

    # ---- what the guest sends

    def options(self) -> bytes:
        """Of its SYN."""
        made = b"" if self.mss_asked is None else struct.pack("!BBH", 2, 4, self.mss_asked)
        return made + (b"" if self.scale_asked is None else struct.pack("!BBBB", 1, 3, 3, self.scale_asked))

    def emit(self, flags: int, place: int, size: int = 0, *, ack: int | None = None, window: int | None = None) -> None:
        """A segment; what must and may come of it is noted."""
        if self.game.paused is not None:
            return
        if self.fin is not None and not self.fin_must and size:
            size = max(0, min(place + size, self.fin) - place)
            if place > self.fin:
                return
        limit = self.told_most + self.slack
        end = place + size
        if (
            flags & FIN
            and not self.fin_must
            and self.must <= end <= limit
            and (end < self.sent_most or end >= self.told or self.fin not in (None, end))
        ):
            flags &= ~FIN  # there is one end of a stream
        ack = self.got_next if ack is None else ack
        field = self.window if window is None else window
        if self.phase is Phase.OPEN and self._acceptable(place, end) is None:
            ack, field = self.una, max(0, self.edge - self.una) >> self.ws_ours  # it says nothing new
        seq = (self.iss + 1 + place) & MASK
        number = (self.irs or 0) + 1 + ack & MASK if flags & ACK else 0
        options = self.options() if flags & SYN else b""
        payload = stream(self.salt, place, size)
        names = "".join(name for bit, name in enumerate("FSRPAU") if flags >> bit & 1)
        self.note(f"guest sends [{names or '-'}] at {place} size {size} ack {ack} window {field}")
        self.game.out.append(segment(self.v6, self.own, self.peer_port, seq, number, flags, field, payload, options))
        self.emitted += 1
        self.silent = 0
        self._judge(flags, place, size, ack, field, seq, number)

    def _acceptable(self, place: int, end: int) -> bool | None:
        """Whether anything that a segment says counts (3.10.7.4); None: it is not known what the receiver has."""
        if place == self.must_next == self.acked:
            return True
        if end < self.must_next or place > self.told_most + self.slack + (1 << self.ws_theirs):
            return False
        return True if end >= self.cover and place <= self.told - self.slack else None

    def _judge(self, flags: int, place: int, size: int, ack: int, field: int, seq: int, number: int) -> None:
        """What is to come of it."""
        if self.unknown:
            self.replies.append(_reply(flags, size, seq, number))
        elif self.phase in (Phase.NEW, Phase.GONE):
            if not flags & RST:
                self.replies.append(_reply(flags, size, seq, number))
                self.due = self.due or "a segment of no connection (3.10.7.1)"
        elif self.phase is Phase.FADING:
            self.replies.append(_reply(flags, size, seq, number))
        elif self.held:
            self._covered(flags, place, size)
        elif self.phase is Phase.CALLED:
            self._judge_called(flags, place, size, ack, field, seq, number)
        elif self.phase is Phase.RINGING:
            self._judge_ringing(flags, size, ack, field, seq, number)
        else:
            self._judge_open(flags, place, size, ack, field)

    def _judge_called(self, flags: int, place: int, size: int, ack: int, field: int, seq: int, number: int) -> None:
        if flags & RST:
            if place == 0:
                self._end_by_guest()
        elif flags & SYN or not flags & ACK:
            pass
        elif self.irs is not None and not 0 <= place + size + (1 if flags & FIN else 0) <= self.told + size + 1:
            # Its numbers come first (3.10.7.4).
            self.due = "a segment that is not acceptable (3.10.7.4)"
        elif self.irs is None or ack != 0:
            self.replies.append(_reply(flags, size, seq, number))
            self.due = self.due or "a wrong acknowledgement in a handshake (3.10.7.4)"
        else:
            self._established()
            self._judge_open(flags, place, size, ack, field)

    def _judge_ringing(self, flags: int, size: int, ack: int, field: int, seq: int, number: int) -> None:
        if flags & ACK and ack != 0:
            if not flags & RST:
                self.replies.append(_reply(flags, size, seq, number))
        elif flags & RST:
            if flags & ACK:
                self._end_by_guest()
        elif flags & (SYN | ACK) == SYN | ACK:
            self._established()
            self.ws_ours = self._scale_agreed()
            self.ws_theirs = self.ws_theirs if self.scale_asked is not None else 0
            self.edge = field
            self.edges.append(field)
            self.due = "the end of a handshake"

    def _judge_open(self, flags: int, place: int, size: int, ack: int, field: int) -> None:
        if flags & RST:
            # RFC 5961, 3.2: exactly the next resets, within the window is asked about, elsewhere is nothing.
            if place == self.must_next:
                self._end_by_guest()
            elif self.must_next < place < self.told - self.slack and not self.fin_must:
                self.due = "a reset within the window (RFC 5961, 3.2)"
            return
        if flags & SYN:
            self.due = "a SYN on a connection (RFC 5961, 4.2)"
            return
        if not flags & ACK:
            return
        end = place + size
        if self._acceptable(place, end + (1 if flags & FIN else 0)) is False:
            self.due = "a segment that is not acceptable (3.10.7.4)"
        else:
            self._acknowledged(ack, field, bare=not size and not flags & FIN)
        self.overtaken.append(_reply(flags, size, (self.iss + 1 + place) & MASK, (self.irs or 0) + 1 + ack & MASK))
        if size or flags & FIN or place < self.must_next:
            self.due = "a segment with something in it (3.10.7.4)"
        if self.closed and end > self.read:
            self._may_be_reset("the peer has closed, and the guest sends more")
        self._covered(flags, place, size)
        if self.fin_must or place > self.must:
            return
        if end > self.must:
            self.must = max(self.must, min(end, self.told))
        if flags & FIN and end == self.must:
            self.fin_must = True
            self._fade()

    def _acknowledged(self, ack: int, field: int, *, bare: bool) -> None:
        window = field << self.ws_ours
        if not self.una <= ack <= self.seen:
            if ack > self.wrote + 1:
                self.due = "an acknowledgement of what was never sent (3.10.7.4)"
            return
        now = self.game.rig.now()
        if ack > self.una:
            self.una = ack
            self.fast_turn = self.fast_turn or self.dups >= 3
            self.dups = self.tries = 0
            self.base, self.base_before = now, min(self.base, self.base_before)
            self._fade()
        else:
            if bare and window == self.edge - self.una:
                self.dups += 1  # also where nothing is in flight as far as is seen here: something may be on its way
            if window > 1 >= self.edge - self.una or (window and self.una == self.seen):
                self.tries = 0
        self.edge = self.una + window
        self.edges.append(self.edge)

    def _covered(self, flags: int, place: int, size: int) -> None:
        """What of it can have been taken."""
        if self.fin_must or not flags & ACK or flags & (SYN | RST):
            return
        end = place + size
        limit = self.told_most + self.slack
        if size and place <= limit and end > 0:
            self.ranges.append((place, min(end, limit)))
            self.ranges = _merged(self.ranges)
            self.sent_most = max(self.sent_most, min(end, limit))
        if flags & FIN and self.must <= end <= limit:
            self.fin = end

    def _established(self) -> None:
        self.phase = Phase.OPEN
        self.opened = True
        self.ws_ours = self._scale_agreed()
        self.tries = 0
        self.base = self.game.rig.now()

    def _scale_agreed(self) -> int:
        return 0 if self.scale_asked is None else min(14, self.scale_asked)

    def _fade(self) -> None:
        """Both ends were acknowledged."""
        if self.fin_must and self.end is not None and self.una == self.end + 1:
            self.phase = Phase.FADING

    def _end_by_guest(self) -> None:
        self.phase = Phase.GONE
        self.reset_by_guest = True

    def _may_be_reset(self, why: str) -> None:
        if not self.may_reset:
            self.note(f"may be reset: {why}")
        self.may_reset = self.may_reset or why

    # ---- what the guest gets

    def begin_turn(self) -> None:
        """What counts for each turn."""
        self.heard = 0
        self.flying = self.seen - self.una if self.phase is Phase.OPEN else 0
        self.again = False

    def take(self, s: Segment) -> None:
        """A segment of this connection's."""
        self.heard += 1
        self.counts["segments"] += 1
        names = "".join(name for bit, name in enumerate("FSRPAU") if s.flags >> bit & 1)
        self.note(f"guest gets [{names}] seq {s.seq:#x} ack {s.ack:#x} window {s.window} size {len(s.payload)}")
        if self.unknown:
            return
        if s.flags & RST:
            self._take_reset(s)
        elif s.flags & SYN:
            self._take_syn(s)
        else:
            open_ = self.phase in (Phase.OPEN, Phase.FADING)
            # RFC 5961, 3.2, also before the handshake is done
            asks = self.phase is Phase.CALLED and self.irs is not None and s.flags == ACK and not s.payload
            require(open_ or asks, f"a segment of a connection that is {self.phase.value}")
            self._take_segment(s)

    def _take_reset(self, s: Segment) -> None:
        mine = (s.seq, s.flags & ACK, s.ack)
        if mine in self.replies:
            self.replies.remove(mine)
            self.due = ""
            return
        if self.phase is Phase.GONE and self.was_reset and mine in self.overtaken:
            self.overtaken.remove(mine)
            return
        timed_out = (
            self.tries >= RETRIES
            if self.phase in (Phase.OPEN, Phase.FADING)
            else self.tries >= SYN_RETRIES or self.game.rig.now() - self.called_at >= CALL_PATIENCE
        )
        require(self.phase not in (Phase.NEW, Phase.GONE), "a reset of what is no more")
        # A window that is shut is tried for ever (RFC 1122, 4.2.2.17).
        shut = self.phase is Phase.OPEN and self.edge <= self.una == self.seen < self.wrote
        require(self.may_reset or (timed_out and not shut) or self.phase is Phase.FADING, "a reset without reason")
        if self.irs is not None:
            place = relative(s.seq - self.irs - 1)
            require(place == self.seen, f"a reset at {place}, where the guest expects {self.seen} (RFC 5961, 3.2)")
        if self.phase is not Phase.RINGING:
            require(s.flags & ACK, "a reset without an acknowledgement")
            self._check_ack(s)
        self.phase = Phase.GONE
        self.was_reset = True
        self.due = ""

    def _take_syn(self, s: Segment) -> None:
        if self.incoming:
            require(not s.flags & ACK, "a SYN with an acknowledgement of what was not sent")
            late = self.opened or not self.game.served_before  # it waited for a receive buffer
            require(
                self.phase in (Phase.NEW, Phase.RINGING) or late, f"a SYN on a connection that is {self.phase.value}"
            )
        else:
            late = self.opened or not self.game.served_before  # it waited for a receive buffer
            require(self.phase is Phase.CALLED or late, f"a SYN on a connection that is {self.phase.value}")
            require(s.flags & ACK and s.ack == (self.iss + 1) & MASK, "a SYN that answers another")
        require(self.irs in (None, s.seq), "another SYN than before")
        require(not s.payload, "data with a SYN")
        first = self.irs is None
        self.irs = s.seq
        mtu = self.game.rig.mtu
        require(s.options.get(2) == struct.pack("!H", mtu - (60 if self.v6 else 40)), f"the segment size {s.options}")
        scaled = self.incoming or self.scale_asked is not None
        require((3 in s.options) == scaled, "a window scale that was not asked for, or none that was (RFC 7323, 1.3)")
        self.ws_theirs = s.options[3][0] if scaled else 0
        require(self.ws_theirs <= 14, "a window scale beyond 14")
        if first:
            self.base = self.game.since
            self.tries = 0
            if self.incoming:
                self.phase = Phase.RINGING
                self.called_at = self.game.since
        else:
            # Sent again: when its time has come, or since the guest asked.
            if not self.emitted and self.game.rig.now() - self.base >= FIRST_WAIT - LAG:
                self.tries += 1
            self.base = self.game.since
        # In a call from outside it binds to nothing: before the next segment from here the guest has nobody to send to.
        self.told = self.told_most = 0 if self.incoming else s.window

    def _check_ack(self, s: Segment) -> int:
        place = relative(s.ack - self.iss - 1)
        require(place >= self.acked, f"it acknowledged {self.acked}, and now {place}")
        require(place <= self.cover, f"it acknowledges {place}, and {self.cover} was sent")
        return place

    def _take_segment(self, s: Segment) -> None:
        assert self.irs is not None
        require(s.flags & ACK, "a segment without an acknowledgement")
        self.acked = self._check_ack(s)
        if self.acked > self.must_next:
            # It may take more than it must: a receiver's choice.
            if self.fin is not None and self.acked == self.fin + 1:
                self.must, self.fin_must = self.fin, True
                self._fade()
            else:
                self.must = self.acked
        edge = self.acked + (s.window << self.ws_theirs)
        if not self.fin_must:
            require(edge + self.slack >= self.told_most, f"the window's edge went back from {self.told_most} to {edge}")
            self.told, self.told_most = edge, max(edge, self.told_most)
        place = relative(s.seq - self.irs - 1)
        if not self.fast or (place == self.una and (s.payload or s.flags & FIN)):
            self.due, self.fast = "", False
        end = place + len(s.payload)
        fin = s.flags & FIN
        if not s.payload and not fin:
            known = f"{self.una_before} to {self.seen}"
            require(self.una_before - 1 <= place <= self.seen, f"at {place}, where {known} is in flight")
            if place < self.got_next and not self.emitted:
                self.tries += 1
        else:
            self._take_data(s, place, end)
        if place < self.got_next:
            self.owed = True  # 3.10.7.4: whatever is old is answered
        if fin:
            require(self.end == end, f"the end at {end}, and the peer's is {self.end}")
        if self.losing:
            self.losing -= 1
        elif place <= self.got < end or (fin and place <= self.got == end):
            self.got = end
            self.got_fin = self.got_fin or bool(fin)
        self.seen = max(self.seen, end + (1 if fin else 0))

    def _take_data(self, s: Segment, place: int, end: int) -> None:
        require(place >= 0, f"data at {place}")
        require(end <= self.wrote, f"data up to {end}, and the peer wrote {self.wrote}")
        require(s.payload == stream(self.salt + 77, place, len(s.payload)), f"other bytes at {place}")
        require(s.size <= self.mss, f"a segment of {s.size} bytes, and the guest takes {self.mss}")
        allowed = max(*self.edges, self.una + 1)  # 3.8.6.1: one byte tries a window
        require(end <= allowed, f"data up to {end}, and the window is up to {allowed}")
        if place >= self.seen:
            if self.seen == self.una:
                self.base = self.game.since
            return
        if place == self.una:
            self.again = True
        wait = min(FIRST_WAIT << min(self.silent, 6), LONGEST_WAIT) - LAG
        # What comes now may be older than what the guest has said in this turn.
        waited = self.game.rig.now() - min(self.base, self.base_before)
        if waited >= wait and (place == self.una or self.base_before < self.base):
            self.tries += 1
            # Else it may be for these, and late for want of a buffer; or the rest of what was sent again before.
            if self.dups < 3 and not self.fast_turn and place == self.una:
                self.silent += 1
        elif self.recover is None:
            about = f"at {place} of {self.una} to {self.seen}, {self.dups} duplicates"
            require(
                self.dups >= 3 or self.fast_turn,
                f"sent again after {waited:.0f} ms, not {wait} (RFC 6298, 5.5): {about}",
            )
        if self.recover is None or waited >= wait:
            self.dups = 0
            self.base = self.game.since
            self.recover = self.seen
            self.counts["retransmissions"] += 1
        if end + (1 if s.flags & FIN else 0) >= self.recover:
            self.recover = None

    def end_turn(self) -> None:
        """What the next one begins with."""
        self.edges = [self.edge]
        self.una_before = self.una
        require(
            self.unknown or self.phase is Phase.NEW or self.heard <= 8 + 2 * self.emitted + self._frames(),
            f"{self.heard} segments for {self.emitted}",
        )
        if self.recover is not None and (self.una >= self.recover or self.phase is not Phase.OPEN):
            self.recover = None
        self.emitted = 0
        self.opened = self.fast_turn = False
        self.base_before = math.inf
        self.heard_last = self.heard
        self.overtaken.clear()

    def _frames(self) -> int:
        """Of data that there can be in a turn."""
        return 3 * (1 + (max(self.edge, self.wrote) - self.una) // self.mss)

    def check_due(self) -> None:
        """What had to come has come."""
        game = self.game
        served = game.serves and not self.held and not self.unknown and not self.may_reset
        if not (served and game.served_before):
            if self.phase is not Phase.OPEN:
                self.due = ""  # the answer to what belongs to nothing is not kept
            return
        require(not self.due, f"{self.number}: no answer to {self.due}")
        if self.phase is not Phase.OPEN:
            return
        require(self.acked >= self.must_next, f"it acknowledges {self.acked}, and has to have {self.must_next}")
        if game.passed > LONGEST_WAIT and self.flying and self.una < self.seen and game.served_before:
            shut = self.edge <= self.una  # then a number before the next tries the window (3.8.6.1)
            require(self.again or (shut and self.heard_last), f"{self.flying} bytes are in flight, and not sent again")

    def check_silence(self, was_open: bool) -> None:
        """After more time than any retransmission goes on."""
        if was_open and self.phase is Phase.OPEN and not self.may_reset:
            require(self.tries <= RETRIES + 2 or self.edge <= self.una, "something is sent again without end")

    def acknowledge_got(self) -> bool:
        """As a stack does that takes what comes."""
        if not self.auto or self.phase is not Phase.OPEN or self.game.paused is not None:
            return False
        if not self.owed and self.got_next <= self.una:
            return False
        self.owed = False
        self.emit(ACK, self.next)
        return True

    # ---- the peer

    def peer_turn(self) -> None:
        """Take what calls, and what has come."""
        if not self.incoming:
            while True:
                try:
                    sock, _ = self.listener.accept()
                except BlockingIOError:
                    break
                self.accepted += 1
                if self.sock is not None or self.accepted != self.calls:
                    sock.close()
                    continue
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self.small:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                self.sock = sock
        while self.sock is not None and self.reading and not self.eof and self._receive(1 << 20):
            pass

    def _receive(self, size: int) -> bool:
        """Whether there may be more."""
        assert self.sock is not None
        try:
            data = self.sock.recv(size)
        except BlockingIOError:
            return False
        except OSError as error:
            self._peer_ended(error)
            return False
        if not data:
            if not self.unknown:
                require(self.read == self.fin, f"the end for the peer after {self.read}, and the guest's is {self.fin}")
            self.eof = True
            return False
        if not self.unknown:
            require(data == stream(self.salt, self.read, len(data)), f"the peer gets other bytes at {self.read}")
        self.read += len(data)
        if not self.unknown:
            require(self.read <= self.cover, f"the peer gets {self.read}, and the guest has sent {self.cover}")
        return True

    def _peer_ended(self, error: OSError) -> None:
        """Its socket has broken."""
        self.note(f"peer: {error}")
        # A call from a port that the host remembers another connection of (FIN-WAIT-2) is refused by its kernel.
        again = self.incoming and self.phase is Phase.NEW and isinstance(error, ConnectionRefusedError)
        if not self.unknown and not again:
            require(
                self.reset_by_guest or self.was_reset or self.may_reset or self.phase is Phase.GONE,
                f"the peer is told {error}",
            )
        self.peer_reset = True
        self._drop()

    def _drop(self) -> None:
        if self.sock is not None:
            self.sock.close()
            self.sock = None

    # ---- handshakes

    def call(self) -> None:
        """The guest calls, or is called."""
        if self.incoming:
            if self.phase is Phase.NEW and self.sock is None:
                self.sock = self.game.rig.connect(self.v6)
                self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.peer_port = self.sock.getsockname()[1]
            return
        self.calls += 1
        self.emit_syn()
        self.phase = Phase.CALLED
        self.called_at = self.base = self.game.rig.now()

    def emit_syn(self) -> None:
        """As it is, whatever the data plane has of the connection."""
        self.note(f"guest calls, iss {self.iss:#x} mss {self.mss_asked} scale {self.scale_asked}")
        self.game.out.append(
            segment(self.v6, self.own, self.peer_port, self.iss, 0, SYN, self.window, b"", self.options())
        )
        self.emitted += 1

    def answer(self) -> None:
        """What a guest that takes the call says next."""
        if self.phase is Phase.CALLED and self.irs is not None:
            self.emit(ACK, 0)
        elif self.phase is Phase.RINGING:
            self.emit(SYN | ACK, -1, ack=0)

    def open(self) -> None:
        """A handshake as it should be."""
        self.call()
        deadline = time.monotonic() + 10
        while self.phase is not Phase.OPEN or (self.sock is None and not self.incoming):
            self.game.settle()
            self.answer()
            if self.phase is not Phase.OPEN:
                self.game.rig.guest.rx.wait(0.01)
            elif self.sock is None:
                self.game.settle()
                select.select([self.listener], [], [], 0.01)
            require(time.monotonic() < deadline, f"no connection: {self}")
        self.game.settle()

    # ---- the actions

    def do_data(self, a: int, b: int, c: int) -> None:
        """Anywhere, of any size."""
        size = PIECES[b % len(PIECES)]
        next_, told = self.must_next, self.told
        place = (
            next_, next_, next_, next_, next_, next_, self.next, next_ - 1, next_ + 1, next_ - size,
            next_ - size // 2, told - size, told - size + 1, told, told + 1, told + 300, next_ + HALF,
            next_ - HALF, next_ - 70_000, (next_ + told) // 2,
        )[a % 20]  # fmt: skip
        flags = ACK | (PSH if c & 1 else 0) | (URG if c & 6 == 6 else 0)
        self.emit(flags, place, size, window=WINDOWS[c >> 5 & 7] if c & 24 == 24 else None)

    def do_burst(self, a: int, b: int, c: int) -> None:
        """Several in one batch, in any order."""
        size = max(1, PIECES[b % 8])
        places = [self.must_next + number * size for number in range(2 + a % 14)]
        match b >> 5:
            case 1:
                places.reverse()
            case 2:
                places[1::2], places[::2] = (
                    places[::2][: len(places[1::2])],
                    places[1::2] + places[::2][len(places[1::2]) :],
                )
            case 3:
                places = [place for place in places for _ in range(2)]
            case 4:
                del places[len(places) // 2]
            case 5:
                places = [place - number * (size // 2) for number, place in enumerate(places)]
            case 6:
                random.Random(c).shuffle(places)
            case 7:
                self._fill_window(1 + c % 2, end=bool(c & 4))
                return
            case _:
                pass
        for place in places:
            self.emit(ACK | PSH, place, size)

    def _fill_window(self, beyond: int, *, end: bool) -> None:
        """All that the guest was told of, and a little more; with an ``end`` that is surely beyond it."""
        place, last = self.must_next, self.told + beyond
        if end:
            last = self.told_most + 2 * self.slack + 10
        if not 0 < last - place < 300_000:
            return
        while place < last:
            size = min(16_000, last - place)
            self.emit(ACK | (FIN if end and place + size == last else 0), place, size)
            place += size

    def do_ack(self, a: int, b: int, c: int) -> None:
        """Of anything."""
        got, una = self.got_next, self.una
        ack = (
            got, got, got, got, got, una, una + (got - una) // 2, got - 1, self.seen, una - 1, una - 1000,
            self.wrote + 2, self.wrote + 2 + c, una + HALF, una - HALF + 1,
        )[a % 15]  # fmt: skip
        if b & 0x40:
            self.window = WINDOWS[b % len(WINDOWS)]
        if una <= ack <= self.seen and ack > self.got_next:
            self.got, self.got_fin = ack, False  # it says that it has it
            if self.end is not None and ack == self.end + 1:
                self.got, self.got_fin = self.end, True
        self.emit(ACK, self.next if not b & 0x80 else self.must_next, ack=ack)

    def do_dup_acks(self, count: int) -> None:
        """As a stack does that misses something."""
        flying = self.seen - self.una
        known = self.phase is Phase.OPEN and not self.held and self.game.serves and not self.may_reset
        first = self.dups == 0 and not self.counts["retransmissions"] and self.game.moves == 0
        before = self.edge
        window = (self.edge - self.una) >> self.ws_ours
        if self.phase is not Phase.OPEN or window > 0xFFFF:
            return
        for _ in range(count):
            self.emit(ACK, self.next, ack=self.una, window=window)
        if known and first and count >= 3 and flying > 0 and self.edge == before > self.una and self.recover is None:
            self.due = "a third acknowledgement of the same (RFC 5681, 3.2)"
            self.fast = True

    def do_fin(self, a: int, b: int) -> None:
        """Its end, or what looks like it."""
        next_ = self.must_next
        match a % 8:
            case 0:
                self.emit(FIN | ACK, next_ - 2, 1)
            case 1:
                self.emit(FIN | ACK, self.told + 300, 10)
            case 2:
                self.emit(FIN | ACK, self.next + 1)
            case 3:
                self.emit(FIN | ACK, max(self.sent_most - 5, 0), min(5, self.sent_most))
            case _:
                self.emit(FIN | ACK | PSH, self.sent_most, PIECES[b % 6] if self.fin is None else 0)

    def do_rst(self, a: int, b: int) -> None:
        """With any number."""
        next_, told = self.must_next, self.told
        place = (next_, next_ + 1, told - 800, told + 800, next_ - 1, next_ + HALF, next_ - HALF, next_ - 5000)[a % 8]
        if self.phase is Phase.OPEN and (self.acked != self.must_next or not self.game.serves):
            return  # which one is exactly the next is not known
        self.emit(RST | (ACK if b & 1 else 0), place, 3 if b & 6 == 6 else 0)

    def do_syn(self, a: int, b: int, c: int) -> None:
        """Of a new connection, of this one again, or of one that is not."""
        if self.phase in (Phase.NEW, Phase.GONE, Phase.FADING):
            if self.accepted != self.calls or not self.game.serves or self.game.paused is not None or self.unknown:
                return
            if self.phase is Phase.NEW:
                self.call()
            elif not self.incoming and not self.replies:
                self._drop()
                self.head = bytes((self.head[0], b, c & 0xFF))
                self.renew()
                self.call()
        elif self.phase is Phase.CALLED:
            if a & 1:
                self.answer()
            else:
                self.emit_syn()
        elif self.phase is Phase.RINGING:
            if a & 3:
                self.answer()
            else:
                self.emit((SYN | ACK, RST | ACK, RST, ACK)[b % 4], -1, ack=(0, 1, -1, 100)[c % 4])
        else:
            self.emit(SYN | (ACK if b & 1 else 0), (-1, self.must_next, self.told + 1000, HALF)[a % 4], c % 3)

    def do_flags(self, a: int, b: int, c: int) -> None:
        """Combinations that there should not be, and a keep-alive."""
        next_ = self.must_next
        flags = (0, FIN, SYN | FIN | ACK, PSH, FIN | URG | PSH, SYN | FIN, ACK, ACK)[a % 8]
        if flags == ACK:
            self.emit(ACK, next_ - 1, b & 1)
        elif not (flags & SYN and self.phase is not Phase.OPEN):
            self.emit(flags, next_ + (0, 1, -1, 1000)[b % 4], c % 2 * 10)

    def do_lose(self, a: int) -> None:
        """The next that come get lost behind the card."""
        self.losing = (1, 2, 10, 0)[a % 4]

    def do_greedy(self, a: int) -> None:
        """Whether what comes is acknowledged at once."""
        self.auto = bool(a & 1)

    def do_send(self, a: int, b: int, c: int) -> None:
        """The peer writes; ``c``: urgently."""
        if self.sock is None or self.end is not None:
            return
        data = stream(self.salt + 77, self.wrote, WRITES[a % len(WRITES)])
        urgent = b % 16 == 0
        try:
            # Noted before: what is sent may be with the guest sooner than this comes back.
            sent = self.sock.send(data, socket.MSG_OOB if urgent else 0)
        except BlockingIOError:
            return
        except OSError as error:
            self._peer_ended(error)
            return
        self.urgent = self.urgent or urgent
        self.note(f"peer writes {sent} at {self.wrote}{' urgently' if urgent else ''}")
        self.wrote += sent

    def do_read(self, a: int, c: int) -> None:
        """The peer stops reading, or reads a little, or all."""
        self.reading = bool(a & 1)
        self.note(f"peer reads{'' if self.reading else ' no more'}")
        if a & 2 and self.sock is not None and not self.eof:
            self._receive(1 + c)

    def do_shut(self) -> None:
        """The peer has no more to say."""
        if self.sock is None or self.end is not None:
            return
        self.end = self.wrote
        self.note(f"peer's end at {self.end}")
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            if self.incoming and self.phase in (Phase.NEW, Phase.RINGING):
                self.end = None
                return
            self._peer_ended(error)

    def do_close(self, a: int) -> None:
        """The peer goes, with a reset or without."""
        if self.sock is None:
            return
        if a % 2 or (self.incoming and self.phase in (Phase.NEW, Phase.RINGING)):
            self.note("peer resets")
            self._may_be_reset("the peer has reset it")
            with contextlib.suppress(OSError):
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER)
        else:
            self.note("peer closes")
            if self.cover - (1 if self.fin is not None else 0) > self.read:
                self._may_be_reset("the peer has closed with something unread")
            self.end = self.wrote if self.end is None else self.end
        self.closed = True
        self._drop()

    def hold(self, *, on: bool) -> None:
        """Freeze the flow, or let it go on."""
        ends = self.own, self.peer_port
        engine = self.game.rig.here.engine
        with engine.parked():
            for flow in engine.flows():
                if (flow["guest"][1], flow["our"][1]) == ends:
                    (engine.hold_flow if on else engine.resume_flow)(flow["index"])
                    self.held = on
                    self.silent = 0
                    self.note("held" if on else "resumed")
                    return
        self.held = False

    def do_hold(self) -> None:
        """Freeze it, or let it go on."""
        if self.held or (self.phase is Phase.OPEN and not self.may_reset):
            self.hold(on=not self.held)

    # ---- moving

    def before_move(self, *, abort: bool) -> None:
        """What cannot move."""
        if abort:
            return
        if self.phase in (Phase.CALLED, Phase.RINGING) or (self.incoming and self.phase is Phase.NEW and self.sock):
            self.unknown = True
        if self.urgent:
            self._may_be_reset("an urgent byte is in its queue")

    def during_move(self, b: int) -> None:
        """The peer does not know of it."""
        if b >> 2 & 3 == self.number:
            if b & 1:
                self.do_send(b >> 4, 1, 0)
            if b & 2:
                self.do_shut()
            if b >> 4 == 15:
                self.do_close(1)

    def after_move(self, *, abort: bool) -> None:
        """Nothing that was due is."""
        self.due = ""
        self.silent = 0
        if abort:
            return
        self.tries = 0
        self.recover = None
        self.told = self.acked + (max(0, self.told - self.acked) >> self.ws_theirs << self.ws_theirs)
        self.base = self.game.rig.now()

    # ---- the end

    def behave(self) -> None:
        """From now on everything is as it should be."""
        self.reading = True
        self.auto = True
        self.losing = 0
        self.window = 0xFFFF
        if self.held:
            self.hold(on=False)
        if self.phase is Phase.OPEN and self.game.cooperative:
            self.emit(ACK, self.next)

    def continue_well(self) -> None:
        """What a good guest and a good peer do next."""
        if self.unknown:
            return
        self.answer()
        if self.phase is not Phase.OPEN or (self.sock is None and not self.closed and not self.peer_reset):
            return
        if self.end is None:
            self.do_shut()
        state = (self.acked, self.told, self.fin_must, self.tries, self.heard)
        if state != self.last_sent:
            self.last_sent = state
            self._send_rest()

    def give_up(self) -> None:
        """The peer's reset got lost on the way, and nobody has anything to say: the guest's program ends it."""
        if self.may_reset and self.phase is Phase.OPEN:
            self.emit(RST, self.acked)
            self.reset_by_guest = False
            self.phase = Phase.GONE

    def _send_rest(self) -> None:
        last = self.sent_most if self.fin is None else self.fin
        if self.acked <= last and not self.fin_must:
            place = self.acked
            while place < min(last, self.told):
                size = min(1400, last - place, self.told - place)
                self.emit(ACK | PSH, place, size)
                place += size
            if place == last < self.told:
                self.emit(FIN | ACK, last)
        self.acknowledge_got()

    def progress(self) -> tuple[object, ...]:
        """What changes while it goes on."""
        return self.phase, self.acked, self.told, self.una, self.seen, self.read, self.eof, self.got_next, self.end

    def is_over(self) -> bool:
        """And well."""
        if self.unknown or self.phase in (Phase.NEW, Phase.GONE):
            return not (self.incoming and self.phase is Phase.NEW and self.sock is not None)
        if self.phase is not Phase.FADING:
            return False
        require(self.got == self.end and self.got_fin, "the guest has not everything")
        return self.closed or self.peer_reset or (self.eof and self.read == self.fin)

    def close(self) -> None:
        """Leave nothing."""
        if self.unknown:
            self.hold(on=True)
            if self.held:
                ends = self.own, self.peer_port
                engine = self.game.rig.here.engine
                with engine.parked():
                    for flow in engine.flows():
                        if (flow["guest"][1], flow["our"][1]) == ends:
                            engine.forget_flow(flow["index"])
        elif self.reset_by_guest and self.fin is None and not self.small:
            # Behind an end it may be seen by nobody. And what is on its way to a peer without memory for it makes the
            # number of the kernel's reset one that this peer does not expect, as from any host.
            self._see_reset()
        self._drop()
        while not self.incoming:
            try:
                self.listener.accept()[0].close()
            except BlockingIOError:
                return

    def _see_reset(self) -> None:
        """The guest has reset it, and the peer hears of that."""
        deadline = time.monotonic() + 5
        self.reading = True
        while self.sock is not None:
            require(time.monotonic() < deadline, f"the guest's reset does not come to the peer: {self}")
            select.select([self.sock], [], [], 0.01)
            self._receive(1 << 20)
            if self.eof:
                raise BreachError("the peer sees an end where there was a reset")


def _reply(flags: int, size: int, seq: int, number: int) -> tuple[int, int, int]:
    """The reset that a segment of no connection gets (3.10.7.1): number, whether it acknowledges, what."""
    if flags & ACK:
        return number, 0, 0
    return 0, ACK, (seq + size + (1 if flags & SYN else 0) + (1 if flags & FIN else 0)) & MASK


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found
