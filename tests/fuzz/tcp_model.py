# SPDX-License-Identifier: GPL-2.0-or-later
"""TCP between a hostile guest and a hostile peer, and what any correct TCP shows both: bytes are a game to play.

``run(data)`` plays one: a guest whose segments are made by hand, peers that are sockets of the kernel's in another
network namespace, the data plane between them, its clock moved at will, the guest moved from host to host. After each
move of the game everything that came out is compared with what RFC 9293 and RFC 5961 allow, and at the end both sides
become well-behaved: then all that was acknowledged must arrive, both ends must be seen, and nothing may be left.

A byte of a stream is a function of its place, so whatever order segments come in, each byte can be checked. How a game
is written: a head of `HEAD` bytes, then `STEP` bytes for each action, so that dropping an action is dropping bytes.

    python -m tests.fuzz.tcp_model --seconds 60 --seed 1        random games; the first that fails is shrunk and kept
    python -m tests.fuzz.tcp_model build/fuzz/tcp-crash-...     what happens in that one, step by step
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import random
import select
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from godwit.lab.say import say

from .target import Target
from .tcp_link import Link, Phase
from .tcp_rig import FULL, NATIVE, RECEIVE, SLOTS, BreachError, Rig, require

WORK: Final = Path(__file__).resolve().parent.parent.parent / "build" / "fuzz"
HEAD: Final = 16
STEP: Final = 6
LONGEST: Final = HEAD + STEP * 120
PLAIN: Final = FULL & ~(0x1983 | 1 << 29)  # no offloads, no event index
PATIENCE: Final = 10.0  # seconds of the real clock in which something must have come on, once all are well-behaved
HOURS: Final = 7_300_000  # ms, more than an idle connection is left alone
MTUS: Final = (1500, 1500, 1500, 576, 1280, 9000, 65520)
TIMES: Final = (1, 40, 500, 999, 1001, 2050, 4100, 30_000, 61_000, 61_000, 131_000, 600_000, HOURS)


class Action(NamedTuple):
    """What is done, to which connection, and how, by three numbers that its method reads."""

    name: str
    link: int
    a: int
    b: int
    c: int

    def __str__(self) -> str:
        return f"{self.name}({self.link}, {self.a}, {self.b}, {self.c})"


class Game:
    """One sequence of actions."""

    def __init__(self, rig: Rig, head: bytes, trace: list[str]) -> None:
        self.rig = rig
        self.trace = trace
        features = FULL if head[0] & 1 else PLAIN
        mtu = MTUS[head[1] % len(MTUS)]
        rig.begin(features, mtu)
        self.cooperative = bool(head[0] & 2)  # at the end the guest says by itself that its window is open
        self.out: list[bytes] = []  # the guest's frames of this turn
        self.paused: list[int] | None = None  # where the rings are, while the guest stands still
        self.since = self.looked = rig.now()  # what comes out now has come since then; and when that was looked at last
        self.advanced = 0  # ms in it that its clock was moved
        self.passed = 0  # the same of the last turn
        self.moves = 0
        self.pressed = False  # in this turn there were no receive buffers left
        self.served_before = True
        self.descriptors = rig.descriptors()
        self.links = [Link(self, number, head[2 + 3 * number :]) for number in range(1 + head[14] % SLOTS)]
        for link in self.links:
            if head[15] >> link.number & 3:
                link.open()
        self.settle()

    # ---- a turn

    def note(self, text: str) -> None:
        """What happens, for people."""
        self.trace.append(text)

    def play(self, action: Action) -> None:
        """One action, and all that comes of it."""
        self.note(str(action))
        self.served_before = self.serves
        link = self.links[action.link % len(self.links)]
        ACTIONS[action.name](self, link, action.a, action.b, action.c)
        self.settle()
        for one in self.links:
            one.check_due()
        self.passed = 0
        answers = [one.acknowledge_got() for one in self.links]
        if any(answers):
            self.settle()
            for one in self.links:
                one.check_due()

    def settle(self) -> None:
        """Give the data plane what there is, see what it makes of it, and let the peers read."""
        for link in self.links:
            link.begin_turn()
        self.flush()
        self.pressed = False
        while True:
            self.rig.barrier()
            self.look()
            self.pressed = self.pressed or self.rig.guest.taken > RECEIVE - 2 * SLOTS
            if self.rig.guest.taken < RECEIVE // 4 or not self.rig.guest.refill:
                break
        for link in self.links:
            link.peer_turn()
            link.end_turn()
        self.passed, self.advanced = self.advanced, 0

    def flush(self) -> None:
        """Hand the frames of this turn over, as one batch."""
        if self.paused is not None or not self.out:
            self.out.clear()
            return
        at = size = 0
        for number, frame in enumerate(self.out):
            size += len(frame) + 12
            if size > 900_000 or number - at >= 120:
                self.rig.guest.send_all(self.out[at:number])
                at, size = number, len(frame)
        self.rig.guest.send_all(self.out[at:])
        self.out.clear()

    def look(self) -> None:
        """Everything that has come out."""
        self.since, self.looked = self.looked, self.rig.now()
        for segment in self.rig.guest.segments():
            for link in self.links:
                if link.is_mine(segment):
                    link.take(segment)
                    break
            else:
                raise BreachError(f"a segment of no connection: {segment}")

    @property
    def serves(self) -> bool:
        """The data plane can say whatever there is to say to the guest."""
        return self.paused is None and not self.pressed and self.rig.guest.buffers >= 16 + 2 * len(self.links)

    # ---- actions that are nobody's

    def advance(self, ms: int) -> None:
        """Have time pass."""
        self.note(f"    {ms} ms pass")
        with self.rig.here.engine.parked():
            self.look()  # what the real clock has brought since the last turn
            self.rig.advance(ms)
            self.looked = self.rig.now()
        self.advanced = ms

    def silence(self) -> None:
        """Half an hour in which the guest is there, and says nothing about its connections."""
        before = [(link, link.phase is Phase.OPEN and not link.held and self.serves) for link in self.links]
        for _ in range(24):
            self.out.append(bytes(12) + b"\x88\xb5" + bytes(46))  # an experimental protocol
            self.advance(61_000)
            self.settle()
        if self.serves:
            for link, was_open in before:
                link.check_silence(was_open)

    def pause(self) -> None:
        """The guest is stopped, or runs on."""
        if self.paused is None:
            self.paused = self.rig.stop_rings()
        else:
            bases, self.paused = self.paused, None
            self.rig.start_rings(bases)

    def withhold(self, give_back: int) -> None:
        """The guest keeps its receive buffers, or gives some back."""
        guest = self.rig.guest
        guest.refill = give_back == RECEIVE
        for _ in range(min(give_back, len(guest.kept))):
            guest.hand_out(guest.kept.pop())

    def move(self, a: int, b: int) -> None:
        """The guest to the other host, or nearly."""
        if self.paused is not None:
            self.pause()
        for link in self.links:
            link.before_move(abort=bool(a & 1))
        held = [link for link in self.links if link.held]
        for link in held:
            link.hold(on=False)

        def between() -> None:
            for link in self.links:
                link.during_move(b)

        self.moves += 1
        self.rig.move(NATIVE if a & 2 else 2, abort=bool(a & 1), early=bool(a & 4), between=between)
        for link in self.links:
            link.after_move(abort=bool(a & 1))

    # ---- the end

    def finish(self) -> None:
        """Everybody is well-behaved now: all of it arrives, and nothing is left."""
        self.note("the end")
        if self.paused is not None:
            self.pause()
        self.withhold(RECEIVE)
        self.settle()
        for link in self.links:
            link.behave()
        deadline = time.monotonic() + PATIENCE
        idle = 0
        while True:
            for link in self.links:
                link.continue_well()
            before = [link.progress() for link in self.links]
            self.settle()
            if all(link.is_over() for link in self.links):
                break
            if before != [link.progress() for link in self.links]:
                idle, deadline = 0, time.monotonic() + PATIENCE
            else:
                idle += 1
            if idle > 2:
                # Something of the kernel's may be on its way; then it is the turn of the data plane's timers.
                select.select([self.rig.guest.rx.call_fd], [], [], 0.002 * min(idle, 10))
                if idle == 12:
                    for link in self.links:
                        link.give_up()
                elif idle > 4:
                    self.advance(500 << min(idle - 4, 7))
                    self.settle()  # before anybody says more
            require(time.monotonic() < deadline, "the end does not come: " + "; ".join(map(str, self.links)))
        self.leave()

    def leave(self) -> None:
        """No flow, no descriptor."""
        for link in self.links:
            link.close()
        deadline = time.monotonic() + PATIENCE
        while left := self.rig.here.flows() + self.rig.there.flows():
            require(time.monotonic() < deadline, f"flows are left: {left}")
            self.rig.barrier()
            time.sleep(0.001)
            self.look()
        self.rig.barrier()
        self.look()
        require(self.rig.descriptors() <= self.descriptors, "descriptors are left")
        require(self.rig.guest.buffers == RECEIVE, "receive buffers are missing")


# ---- the actions, by name

_Do = Callable[[Game, Link, int, int, int], None]
ACTIONS: Final[dict[str, _Do]] = {
    "data": lambda _game, link, a, b, c: link.do_data(a, b, c),
    "burst": lambda _game, link, a, b, c: link.do_burst(a, b, c),
    "ack": lambda _game, link, a, b, c: link.do_ack(a, b, c),
    "dup_acks": lambda _game, link, a, _b, _c: link.do_dup_acks(2 + a % 5),
    "fin": lambda _game, link, a, b, _c: link.do_fin(a, b),
    "rst": lambda _game, link, a, b, _c: link.do_rst(a, b),
    "syn": lambda _game, link, a, b, c: link.do_syn(a, b, c),
    "flags": lambda _game, link, a, b, c: link.do_flags(a, b, c),
    "lose": lambda _game, link, a, _b, _c: link.do_lose(a),
    "greedy": lambda _game, link, a, _b, _c: link.do_greedy(a),
    "send": lambda _game, link, a, b, c: link.do_send(a, b, c),
    "read": lambda _game, link, a, _b, c: link.do_read(a, c),
    "shut": lambda _game, link, _a, _b, _c: link.do_shut(),
    "close": lambda _game, link, a, _b, _c: link.do_close(a),
    "hold": lambda _game, link, _a, _b, _c: link.do_hold(),
    "time": lambda game, _link, a, _b, _c: game.advance(TIMES[a % len(TIMES)]),
    "silence": lambda game, _link, _a, _b, _c: game.silence(),
    "pause": lambda game, _link, _a, _b, _c: game.pause(),
    "buffers": lambda game, _link, a, _b, _c: game.withhold((0, 1, 3, 40, RECEIVE)[a % 5]),
    "move": lambda game, _link, a, b, _c: game.move(a, b),
}
WEIGHTS: Final = {
    "data": 40, "burst": 16, "ack": 36, "dup_acks": 8, "fin": 6, "rst": 5, "syn": 6, "flags": 6, "lose": 12,
    "greedy": 8, "send": 40, "read": 10, "shut": 5, "close": 2, "hold": 6, "time": 26, "silence": 1,
    "pause": 4, "buffers": 12, "move": 7,
}  # fmt: skip
TABLE: Final = [name for name in ACTIONS for _ in range(WEIGHTS[name])]


def actions(data: bytes) -> Iterator[Action]:
    """What is written behind the head."""
    for at in range(HEAD, len(data) - STEP + 1, STEP):
        op, link, a, b, c = struct.unpack_from("<BBBBH", data, at)
        yield Action(TABLE[op % len(TABLE)], link % SLOTS, a, b, c)


# ---- playing

_rig: list[Rig] = []


def _the_rig() -> Rig:
    if not _rig:
        logging.getLogger("godwit").setLevel(logging.CRITICAL)  # what is lost, and why, is the model's to judge
        _rig.append(Rig())
    return _rig[0]


def close() -> None:
    """Take down what games are played on; the next one makes it anew."""
    while _rig:
        _rig.pop().close()
        logging.getLogger("godwit").setLevel(logging.NOTSET)


def run(data: bytes) -> bool:
    """One game; whether it had a move in it. `BreachError`: the data plane did what no TCP may, or not what it must."""
    played(data[:LONGEST])
    return any(True for _ in actions(data[:LONGEST]))


def played(data: bytes) -> Game | None:
    """The same, for those who want to know how it went; what happened is in the notes of what is raised."""
    if len(data) < HEAD:
        return None
    game: Game | None = None
    trace: list[str] = []
    try:
        game = Game(_the_rig(), data, trace)
        for action in actions(data):
            game.play(action)
        game.finish()
    except BaseException as error:
        error.__dict__["trace"] = trace
        with contextlib.suppress(Exception):
            if game is not None:
                for link in game.links:
                    link.close()
        close()  # whatever is left there is not for the next one
        raise
    return game


def made(rng: random.Random) -> bytes:
    """A random one."""
    return rng.randbytes(HEAD + STEP * rng.choice((5, 10, 20, 20, 40, 80)))


def failure(data: bytes) -> Exception | None:
    """What is wrong with a game."""
    try:
        run(data)
    except Exception as error:
        return error
    return None


def shrunk(data: bytes, seconds: float = 120.0) -> bytes:
    """The same failure with fewer actions: halves, quarters, ... single ones are dropped while it still fails."""
    deadline = time.monotonic() + seconds
    head, steps = data[:HEAD], [data[at : at + STEP] for at in range(HEAD, len(data) - STEP + 1, STEP)]
    width = max(1, len(steps) // 2)
    while steps and time.monotonic() < deadline:
        at = 0
        dropped = False
        while at < len(steps) and time.monotonic() < deadline:
            fewer = steps[:at] + steps[at + width :]
            if failure(head + b"".join(fewer)) is not None:
                steps, dropped = fewer, True
            else:
                at += width
        if width == 1 and not dropped:
            break
        width = max(1, width // 2)
    return head + b"".join(steps)


def report(error: Exception) -> None:
    """Print a game that failed, step by step."""
    for step in error.__dict__.get("trace", ()):
        say(step)
    say(f"{type(error).__name__}: {error}")


def search(seconds: float, seed: int, *, keep_going: bool = False) -> int:
    """Random games for so long; the number of those that failed, which lie in ``build/fuzz``."""
    WORK.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    done: Counter[str] = Counter()
    found = 0
    started = time.monotonic()
    while time.monotonic() < started + seconds and (keep_going or not found):
        data = made(rng)
        done["games"] += 1
        try:
            game = played(data)
        except Exception as error:
            found += 1
            path = WORK / f"tcp-crash-{seed}-{done['games']}"
            path.write_bytes(data)
            path.with_suffix(".txt").write_text("\n".join(error.__dict__.get("trace", ())))
            say(f"{path}: {type(error).__name__}: {error}")
            if not keep_going:
                path.write_bytes(small := shrunk(data))
                report(failure(small) or error)
                say(f"The game is in {path}")
            continue
        assert game is not None
        done.update(action.name for action in actions(data))
        for link in game.links:
            done.update(link.counts)
    took = time.monotonic() - started
    total = sum(done[name] for name in ACTIONS)
    say(f"{done['games']} games, {total} actions, {took:.0f} s, {found} failed; seed {seed}")
    say(", ".join(f"{name} {count}" for name, count in sorted(done.items())))
    close()
    return found


def seeds() -> Iterator[bytes]:
    """A head alone, and games."""
    rng = random.Random(793)
    yield made(rng)[:HEAD]
    for _ in range(20):
        yield made(rng)


TARGETS: Final = {"tcp": Target(run, seeds, LONGEST)}


def main() -> None:
    """Play what the arguments say."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.tcp_model", description=__doc__.splitlines()[0])
    parser.add_argument("games", nargs="*", type=Path, help="play these")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first that fails, nor shrink it")
    options = parser.parse_args()
    if not options.games:
        raise SystemExit(min(1, search(options.seconds, options.seed, keep_going=options.keep_going)))
    for path in options.games:
        error = failure(path.read_bytes())
        if error is not None:
            report(error)
            raise SystemExit(1)
        say(f"{path}: as it should be")
    close()


if __name__ == "__main__":
    main()
