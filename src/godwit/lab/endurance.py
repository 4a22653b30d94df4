# SPDX-License-Identifier: GPL-2.0-or-later
"""One guest moves there and back, many times in a row, under load: nothing is lost, and nothing grows.

``python -m godwit.lab.endurance --moves 200`` (``make endurance``). Streams each
way, idle connections that are asked for an echo after each move, connections
that are opened, used and closed all along, and datagrams. The two back-ends are
the same processes from the beginning to the end. Ends with status 1 if a byte
or a connection is lost, or a back-end has more memory or descriptors in the
end than after the first moves.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from godwit.lab.errors import LabError
from godwit.lab.guest import EmbeddedGuest
from godwit.lab.netns import enter_user_namespace, wait_until
from godwit.lab.say import say
from godwit.lab.scenario import PORT, Load, Scenario, qemu_guest
from godwit.lab.size import Size, growth
from godwit.lab.users import LIMIT, Answers, Churn, Datagrams, Grace, end_all

WARM = 20  # moves after which nothing is to grow any more
REST = 11.0  # seconds after which sockets of what has moved away are closed
RATE = 3_000_000  # bytes per second of each stream
IDLE = 10
CHURNS = 3  # that open and close connections at one time, from either side


@dataclass
class Report:
    """What came of it; times in seconds."""

    moves: int = 0
    seconds: float = 0.0
    downtimes: list[float] = field(default_factory=list)
    blackouts: list[float] = field(default_factory=list)
    bytes: int = 0
    opened: int = 0
    refused: int = 0
    asked: int = 0
    answered: int = 0
    sizes: dict[str, list[Size]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    untold: list[str] = field(default_factory=list)
    """Connections that were in their handshake at a migration, and nobody told their peer that they are gone."""

    def __str__(self) -> str:
        still, silence = self.downtimes, self.blackouts
        lines = [
            f"{self.moves} migrations in {self.seconds:.0f} s",
            f"the guest stood still: median {_ms(statistics.median(still))}, longest {_ms(max(still))}",
            f"silence of a stream: median {_ms(statistics.median(silence))}, longest {_ms(max(silence))}",
            f"{self.bytes / 1e6:.0f} MB in long streams, compared byte by byte",
            f"{self.opened} connections opened and closed meanwhile, {self.refused} refused while in handshake",
            f"{self.asked} datagrams asked, {self.answered} answered",
        ]
        for name, sizes in self.sizes.items():
            said = " -> ".join(map(str, sizes))
            lines.append(f"back-end {name}: {said}")
        return "\n".join([*lines, *(f"FAILED: {failure}" for failure in (*self.failures, *self.untold))])


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"


class Journey:
    """The guest, its connections, and what has come of them so far in ``report``."""

    def __init__(self, scenario: Scenario, say: Callable[[str], None]) -> None:
        self.scenario = scenario
        self.report = Report(sizes={name: [] for name in scenario.backends})
        self._say = say
        self._there = there = scenario.network.a.address(scenario.ipv6)
        guest = scenario.guest
        guest.agent.listen(PORT)
        if isinstance(guest, EmbeddedGuest):
            self._answering = Answers(guest.space)
        else:
            guest.agent.serve_datagrams(PORT)
        self._loads = [scenario.start_load(idle=IDLE, rate=RATE)]
        if isinstance(guest, EmbeddedGuest):
            self._loads.append(Load(guest.agent, scenario.server, there, idle=IDLE, rate=RATE))
        self._outside = scenario.server.echo(there, PORT, IDLE)
        self._began = time.monotonic()

    def go(self, moves: int) -> None:
        """Move so many times, with everything that goes on meanwhile."""
        scenario, report, grace = self.scenario, self.report, Grace()
        churns = [Churn(scenario.network.server, self._there, grace) for _ in range(CHURNS)]
        if isinstance(scenario.guest, EmbeddedGuest):
            churns += [Churn(scenario.guest.space, scenario.server_address, grace) for _ in range(CHURNS)]
        datagrams = Datagrams(scenario.network.server, self._there)
        try:
            with grace.handshakes():  # version 2 takes along what is open
                for _ in range(moves):
                    self._move(datagrams)
        finally:
            report.failures += end_all([*churns, datagrams])
            report.untold += [said for churn in churns for said in churn.untold]
            report.opened += sum(churn.opened for churn in churns)
            report.refused += sum(churn.refused for churn in churns)
            report.asked += datagrams.asked
            report.answered += datagrams.done

    def _move(self, datagrams: Datagrams) -> None:
        report = self.report
        number = report.moves + 1
        move = self.scenario.move(switch_delay=0.2 if number % 5 == 0 else None)
        answered = datagrams.done
        report.moves = number
        report.downtimes.append(move.downtime)
        report.blackouts += move.blackout.values()
        for load in self._loads:
            load.wait_alive()
            if said := load.check_idle():
                raise LabError(f"after {number} moves: {said}")
        if (echoes := self.scenario.server.check(self._outside)).alive != IDLE:
            raise LabError(f"after {number} moves, connections from outside: {echoes}")
        wait_until(lambda: datagrams.done > answered, "datagrams to be answered", LIMIT)
        if number % 10 == 0:
            sizes = ", ".join(f"{n}: {Size.of(b.pid)}" for n, b in self.scenario.backends.items())
            self._say(f"{time.monotonic() - self._began:7.0f} s  {number} moves  {sizes}")

    def look(self, rest: float) -> None:
        """See how large the back-ends are, after a rest."""
        time.sleep(rest)
        for name, backend in self.scenario.backends.items():
            self.report.sizes[name].append(Size.of(backend.pid))

    def end(self) -> None:
        """End the streams, and compare."""
        report = self.report
        report.seconds = time.monotonic() - self._began
        for load in self._loads:
            for outcome in load.finish():
                report.bytes += outcome.received
                if not outcome.ok:
                    report.failures.append(f"{outcome}")
        if isinstance(self.scenario.guest, EmbeddedGuest):
            report.failures += self._answering.end()
            self.scenario.guest.check()
        report.failures += growth({f"back-end {name}": sizes for name, sizes in report.sizes.items()})


def run(
    moves: int,
    *,
    warm: int = WARM,
    rest: float = REST,
    qemu: bool = False,
    ipv6: bool = False,
    arguments: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Move ``moves`` times, ``warm`` of them before the first look; ``arguments`` are for ``godwit serve``.

    :raises LabError: a migration failed, or a connection has ended.
    """
    options = ["--tcp-ports", str(PORT), "--udp-ports", str(PORT), *arguments]
    with Scenario(godwit_arguments=options, ipv6=ipv6, make_guest=qemu_guest if qemu else None) as scenario:
        journey = Journey(scenario, say)
        for count in (warm, moves - warm):
            journey.go(count)
            journey.look(rest)
        journey.end()
    return journey.report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(prog="python -m godwit.lab.endurance", description=__doc__)
    parser.add_argument(
        "--moves", type=int, default=200, metavar="N", help=f"how often: even, and more than {WARM} (%(default)s)"
    )
    parser.add_argument("--qemu", action="store_true", help="a QEMU guest, not an embedded one")
    parser.add_argument("--ipv6", action="store_true", help="over IPv6")
    parser.add_argument("argument", nargs="*", help="more options for godwit serve")
    options = parser.parse_args(arguments)
    if options.moves <= WARM or options.moves % 2:
        parser.error(f"--moves is even, so that the guest is where it was, and more than {WARM}, to see what grows")

    try:
        enter_user_namespace()
        report = run(options.moves, qemu=options.qemu, ipv6=options.ipv6, arguments=options.argument, say=say)
    except LabError as error:
        say(f"FAILED: {error}")
        return 1
    say(str(report))
    return 1 if report.failures or report.untold else 0


if __name__ == "__main__":
    sys.exit(main())
