# SPDX-License-Identifier: GPL-2.0-or-later
"""What becomes of connections in a migration: every state, between all programs, and what is to become of them.

A *case* is one migration: from which program to which, in which dialect, with
whose helpers, over which IP version, and when the network is switched. In each
there is a connection in every state (``tcp_states``), opened by the guest and
by its peer. ``DEVIATIONS`` declares where one does not simply come through, and
why; all else is wrong.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from godwit.lab.scenario import Scenario
from godwit.lab.tcp_states import (
    FORWARDED,
    STATES,
    Bed,
    Download,
    End,
    GuestDoesNotRead,
    GuestHasEnded,
    Held,
    Idle,
    LastWordsToGuest,
    LastWordsToPeer,
    OpeningFromOutside,
    Outcome,
    PeerDoesNotRead,
    PeerHasEnded,
    Upload,
    finish,
)

BEFORE, AT, SOON, LATE = -0.2, None, 0.2, 3.0
#: When the network is switched: seconds after the guest runs on the target, as ``Scenario.move`` takes them.
SWITCHES: dict[float | None, str] = {
    BEFORE: "before the stop",
    AT: "while it stands still",
    SOON: "0.2 s after",
    LATE: "3 s after",
}
#: From, to, and the dialect of the source.
PAIRINGS: tuple[tuple[str, str, str], ...] = (
    ("godwit", "godwit", "native"),
    ("godwit", "godwit", "2"),
    ("passt", "godwit", "2"),
    ("godwit", "passt", "2"),
)
HELPERS = ("godwit", "passt")


@dataclass(frozen=True)
class Case:
    """One migration. ``helper``: whose repair helper both sides have, if any; ``switch``: one of ``SWITCHES``."""

    source: str
    target: str
    dialect: str
    helper: str | None
    ipv6: bool
    switch: float | None

    @property
    def pairing(self) -> str:
        """From where to where, and how it is written."""
        return f"{self.source} to {self.target}, {'version ' * (self.dialect == '2')}{self.dialect}"

    def __str__(self) -> str:
        helpers = f"helpers of {self.helper}" if self.helper else "no helpers"
        family = "IPv6" if self.ipv6 else "IPv4"
        return f"{self.pairing}, {helpers}, {family}, network switched {SWITCHES[self.switch]}"


@dataclass(frozen=True)
class Deviation:
    """Where something else than the best may come of a state, and why."""

    states: tuple[type[Held], ...]
    applies: Callable[[Case], bool]
    outcomes: tuple[Outcome, ...]
    why: str


_OPEN = (Idle, Upload, PeerDoesNotRead, GuestDoesNotRead, GuestHasEnded, PeerHasEnded)
_LAST_WORDS = (LastWordsToPeer, LastWordsToGuest)

#: The first that applies holds. They say what is, not what ought to be: one that is no longer needed is an error too.
DEVIATIONS: tuple[Deviation, ...] = (
    Deviation(
        (*_OPEN, Download, *_LAST_WORDS),
        lambda case: case.target == "passt" and case.switch == BEFORE,
        (Outcome.LIVES, Outcome.RESET, Outcome.LOST),
        "What the peer sends before the guest has stopped meets a kernel that knows nothing of the connection, and is "
        "answered with a reset; and where that was before passt has restored it, the guest is not told.",
    ),
    Deviation(
        (*_OPEN, Download, *_LAST_WORDS),
        lambda case: case.helper is None,
        (Outcome.RESET,),
        "Without a helper nothing can be moved but the guest.",
    ),
    Deviation(
        _LAST_WORDS,
        lambda case: case.target == "passt",
        (Outcome.LOST, Outcome.RESET),
        "passt does not go on with a connection that both sides have closed: what is queued does not arrive.",
    ),
    Deviation(
        _LAST_WORDS,
        lambda case: case.source == "passt",
        (Outcome.RESET,),
        "passt leaves what is queued then to the kernel of the host that is left, and does not move it.",
    ),
    Deviation(
        (PeerDoesNotRead,),
        lambda case: case.target == "passt",
        (Outcome.RESET,),
        "passt restores no more than the send buffer of a new socket takes.",
    ),
    Deviation(
        (*_OPEN, Download),
        lambda case: case.target == "passt" and case.switch == LATE,
        (Outcome.LIVES, Outcome.RESET, Outcome.LOST),
        "With passt as the target and a network that comes late some are lost now and then, between two passts too.",
    ),
    Deviation(
        (Download,),
        lambda case: case.switch == BEFORE,
        (Outcome.RESET,),
        "What the peer sends before the guest has stopped meets a kernel that knows nothing of the connection, and "
        "is answered with a reset: the network is to be switched after the stop.",
    ),
    Deviation(
        (*_OPEN, *_LAST_WORDS),
        lambda case: case.switch == BEFORE,
        (Outcome.LIVES, Outcome.ENDS, Outcome.RESET),
        "The same, if the peer sends anything at that time: an acknowledgement, or a question for the window.",
    ),
    Deviation(
        (OpeningFromOutside,),
        lambda case: case.helper is None or (case.dialect == "2" and case.source == case.target),
        (Outcome.RESET,),
        "A connection that the guest has not answered has no place in version 2, and needs a helper.",
    ),
    Deviation(
        (OpeningFromOutside,),
        lambda case: "passt" in (case.source, case.target),
        (Outcome.UNTOLD, Outcome.RESET),
        "passt does not move a connection that the guest has not answered, nor tells anybody. The peer, which the host "
        "has answered, learns it when it next sends something, and not before: one that has asked already waits.",
    ),
)


def expected(state: type[Held], case: Case) -> tuple[tuple[Outcome, ...], str]:
    """What may become of a connection, and why, if that is not what is best."""
    for row in DEVIATIONS:
        if state in row.states and row.applies(case):
            return row.outcomes, row.why
    return (state.good,), ""


@dataclass(frozen=True)
class Row:
    """What became of one connection."""

    case: Case
    state: type[Held]
    outside: bool
    end: End

    @property
    def wrong(self) -> str:
        """What is wrong with it, or nothing."""
        outcomes, _ = expected(self.state, self.case)
        if self.end.outcome in outcomes and not self.end.lost:
            return ""
        wanted = " or ".join(outcome.value for outcome in outcomes)
        opener = "the peer" if self.outside else "the guest"
        said = f"{self.end.outcome.value}, {self.end.lost} bytes lost, {self.end.note or 'no error'}"
        return f"{self.case}: {self.state.name}, opened by {opener}: {said}; is to be: {wanted}"


def cases() -> Iterator[Case]:
    """All that there are."""
    for (source, target, dialect), helper, ipv6, switch in itertools.product(
        PAIRINGS, HELPERS, (False, True), SWITCHES
    ):
        yield Case(source, target, dialect, helper, ipv6, switch)


def run(case: Case, states: Sequence[type[Held]] = STATES) -> list[Row]:
    """Migrate once, and see what becomes of a connection in each state."""
    options = [] if case.dialect == "2" else ["--migrate-version", case.dialect]
    if "passt" in (case.source, case.target):
        options += ["--virtio-features", "passt"]  # a guest keeps the features that it has found
    with (
        Scenario(
            backends=(case.source, case.target),
            helpers=(case.helper, case.helper),
            arguments=["--tcp-ports", FORWARDED],
            godwit_arguments=options,
            ipv6=case.ipv6,
        ) as scenario,
        Bed(scenario) as bed,
    ):
        held = [state(bed, outside) for state in states for outside in state.openers]
        for connection in held:
            connection.about_to_move()
        scenario.move(switch_delay=case.switch)
        for connection in held:
            connection.go_on()
        ends = finish(held)
        return [Row(case, type(one), one.outside, end) for one, end in zip(held, ends, strict=True)]
