# SPDX-License-Identifier: GPL-2.0-or-later
"""What a back-end costs that does nothing, and how many connections it holds.

Each measurement has a back-end and a guest of its own, so that none finds what
another has left: memory that a process has once used it mostly keeps.

* *PSS* is the memory of the back-end's process, what it shares with others
  divided among them, without the guest's memory, which is not its own; *RSS* is the
  same undivided. The bench is Python, as godwit is: between the two is what godwit
  shares with it, and with no one where it runs alone. What connections add is what
  it alone has, and has written to: how many others use the same libraries changes
  all the time.
* *wake-ups* are context switches of all its threads, of its own accord or not.
* At the limit of descriptors the next connection of the guest is to be refused,
  and told so; all others live, also after a migration.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from godwit.lab.backend import IDEAL, Backend, Kind
from godwit.lab.bench import DESCRIPTORS, NONE, Case, cpu, expect_descriptors, grounds
from godwit.lab.closing import Closing
from godwit.lab.crowd import Crowd, RefusedError
from godwit.lab.errors import LabError
from godwit.lab.guest import EmbeddedGuest
from godwit.lab.move_bench import MOVING, MoveSide, cpu_when_quiet
from godwit.lab.netns import Network

MTU = 1500
STARTS = 3  # at least so many are measured at a time
WATCHED = 10.0  # an idle back-end is watched for so long times the seconds that a case is given
_GUEST_MEMORY = "/memfd:godwit-guest"
SETTLING = 4.0  # seconds before an idle back-end is looked at: it and the guest have done what they do at first
_SPARE = 100  # of the descriptors that a process may have, the ends of the connections leave so many


class RestSide:
    """A kind of back-end, and one after the other of it."""

    def __init__(self, kind: Kind, mtu: int, net: Network, folder: str) -> None:
        self.kind = kind
        self._mtu = mtu
        self._net = net
        self._folder = folder

    def start(self, descriptors: int | None = None) -> Backend:
        """Start one, that may have so many descriptors; the caller's to close."""
        return Backend(self._net.a, self._folder, self.kind, helper=None, mtu=self._mtu, descriptors=descriptors)

    @contextmanager
    def serving(self) -> Iterator[tuple[Backend, Crowd]]:
        """One with a guest, and its connections, of which there are none yet."""
        with self.start(DESCRIPTORS) as backend, EmbeddedGuest(mtu=self._mtu) as guest:
            guest.connect(backend.socket)
            guest.configure()
            with Crowd(guest.space, self._net.server, self._net.server.addr4) as crowd:
                yield backend, crowd
                guest.check()

    def check(self) -> None:
        """Nothing is left to look at."""


class RestBed(Closing):
    """A network, and what makes back-ends of each kind on it."""

    def __init__(self, mtu: int, kinds: Sequence[Kind]) -> None:
        expect_descriptors()
        self._cleanup = contextlib.ExitStack()
        try:
            net, folder = grounds(self._cleanup, mtu)
            self.sides = {kind: RestSide(kind, mtu, net, folder) for kind in kinds}
        except BaseException:
            self._cleanup.close()
            raise

    def close(self) -> None:
        """Take it all down. May be repeated."""
        self._cleanup.close()


@dataclass(frozen=True)
class Memory:
    """Memory of a process in bytes: all, its proportional share, and what it alone has and has written to."""

    rss: int
    pss: int
    own: int

    @classmethod
    def of(cls, pid: int) -> Memory:
        """Read proc_pid_smaps(5), and leave out a guest's memory."""
        rss = pss = own = 0
        of_the_guest = False
        with open(f"/proc/{pid}/smaps") as file:
            for line in file:
                words = line.split()
                if "-" in words[0]:  # address range, permissions, offset, device, inode, path
                    of_the_guest = len(words) > 5 and words[5].startswith(_GUEST_MEMORY)
                elif of_the_guest:
                    continue
                elif words[0] == "Rss:":
                    rss += int(words[1]) * 1024
                elif words[0] == "Pss:":
                    pss += int(words[1]) * 1024
                elif words[0] == "Private_Dirty:":
                    own += int(words[1]) * 1024
        return cls(rss, pss, own)


def switches(pid: int) -> int:
    """How often threads of a process were switched to so far."""
    total = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(FileNotFoundError), open(f"/proc/{pid}/task/{task}/status") as file:
            total += sum(map(int, re.findall(r"^(?:non)?voluntary_ctxt_switches:\s*(\d+)", file.read(), re.MULTILINE)))
    return total


def start(side: RestSide, seconds: float) -> dict[str, float]:
    """How long a back-end takes from its start until it listens."""
    took: list[tuple[float, float]] = []
    end = time.monotonic() + seconds
    while len(took) < STARTS or time.monotonic() < end:
        backend = side.start()
        took.append((backend.start_seconds, cpu(backend.pid)))
        backend.close()
    clock, processor = (statistics.median(column) * 1e3 for column in zip(*took, strict=True))
    return {"start ms": clock, "start CPU ms": processor}


def memory(side: RestSide, seconds: float, *, counts: Sequence[int]) -> dict[str, float]:
    """Memory with a guest and no connection, and what each of so many idle ones adds. ``seconds`` does not matter.

    Of the first ones each adds more: a hash table's pages come into being one by one, wherever in it they fall. So
    there is also what each adds beyond the least count.
    """
    with side.serving() as (backend, crowd):
        cpu_when_quiet(backend)
        none = Memory.of(backend.pid)
        found = {"PSS MB": none.pss / 1e6, "RSS MB": none.rss / 1e6}
        own = {0: none.own}
        for count in counts:
            crowd.open(count - crowd.count)
            crowd.expect_alive()
            cpu_when_quiet(backend)
            own[count] = Memory.of(backend.pid).own
            found[f"bytes/flow of {count}"] = (own[count] - none.own) / count
    least, most = counts[0], counts[-1]
    if most > least:
        found[f"bytes/flow beyond {least}"] = (own[most] - own[least]) / (most - least)
    return found


def idle(side: RestSide, seconds: float, *, count: int) -> dict[str, float]:
    """Wake-ups and processor time of a back-end of which nobody wants anything."""
    with side.serving() as (backend, crowd):
        if count:
            crowd.open(count)
            crowd.expect_alive()
        time.sleep(SETTLING)
        began, woken, used = time.monotonic(), switches(backend.pid), cpu(backend.pid)
        time.sleep(WATCHED * seconds)
        woken, used = switches(backend.pid) - woken, cpu(backend.pid) - used
        took = time.monotonic() - began
    return {"wake-ups/s": woken / took, "CPU us/s": used * 1e6 / took}


@contextmanager
def full(kind: Kind, descriptors: int) -> Iterator[tuple[MoveSide, RefusedError]]:
    """Open connections through a back-end that may have so many descriptors, until they are refused."""
    with MoveSide(kind, MTU, "native", descriptors=descriptors) as moving:
        try:
            moving.crowd.open(descriptors - _SPARE, tickers=0)
        except RefusedError as error:
            moving.crowd.expect_alive()
            yield moving, error
        else:
            raise LabError(f"{moving.crowd.count} connections do not reach the limit of {descriptors} descriptors")


def limit(side: RestSide, seconds: float, *, descriptors: int = DESCRIPTORS) -> dict[str, float]:
    """How many connections there are when one is refused. ``seconds`` does not matter.

    *refused at once* is 1 if the guest was told within a second, and else 0.
    """
    with full(side.kind, descriptors) as (_, refused):
        return {"flows": float(refused.opened), "refused at once": float(refused.at_once)}


def limit_move(side: RestSide, seconds: float, *, descriptors: int = DESCRIPTORS) -> dict[str, float]:
    """Move with as many connections as there can be, and count those that live."""
    with full(side.kind, descriptors) as (moving, _):
        moving.step_by_step()
        return {"alive after a move": float(moving.crowd.check())}


_NONE = frozenset({NONE, IDEAL})


def _idle(count: int) -> Callable[[RestSide, float], dict[str, float]]:
    return functools.partial(idle, count=count)


CASES: tuple[Case, ...] = (
    Case("start", "start until the socket listens", MTU, start, RestBed, _NONE),
    Case(
        "memory", "memory, idle and per connection", MTU, functools.partial(memory, counts=(1000, 9000)), RestBed, _NONE
    ),
    Case("idle", "idle, without connections", MTU, _idle(0), RestBed, _NONE),
    Case("idle-5000", "idle, 5000 connections", MTU, _idle(5000), RestBed, _NONE),
    Case("limit", "connections until the limit of descriptors", MTU, limit, RestBed, only=MOVING),
    Case("limit-move", "move with all of these", MTU, limit_move, RestBed, only=MOVING),
)
