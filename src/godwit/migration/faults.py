# SPDX-License-Identifier: GPL-2.0-or-later
"""Faults with names, put into a transfer by tests.

Points that a transfer passes, in order: ``source:header``, then for each stage
``source:NAME`` (before it) and ``source:NAME:after``, then ``source:end``
(all written, pipe still open). The same with ``target:``. And ``rollback:NAME``,
``discard:NAME``, ``commit:NAME``, ``linger:NAME`` before those callbacks, which
can only be made to fail.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol


class Cuttable(Protocol):
    """What a fault may do to the transfer that it is in."""

    def cut(self) -> None:
        """Close the pipe as it is now, as a crash of our side would."""


class InjectedFaultError(Exception):
    """Raised by the fault ``fail``."""


Action = Callable[[str, Cuttable], None]


def fail(point: str, _transfer: Cuttable) -> None:
    """The stage (or callback) at this point raises."""
    raise InjectedFaultError(f"fault injected at {point}")


def cut(_point: str, transfer: Cuttable) -> None:
    """The pipe is closed at this point; what was not yet written is lost."""
    transfer.cut()


class Faults:
    """Which faults happen where. The points that were passed are kept in ``passed``."""

    ACTIONS: Mapping[str, Action] = {"fail": fail, "cut": cut}

    def __init__(self, actions: Mapping[str, Action] | None = None) -> None:
        self.actions = dict(actions or {})
        self.passed: list[str] = []

    @classmethod
    def parse(cls, text: str) -> Faults:
        """Faults from ``POINT=ACTION[;POINT=ACTION]...``, for example ``source:end=cut``.

        :raises ValueError: no such action.
        """
        actions: dict[str, Action] = {}
        for item in filter(None, (part.strip() for part in text.split(";"))):
            point, _, action = item.rpartition("=")
            if not point or action not in cls.ACTIONS:
                raise ValueError(f"fault {item!r}: want POINT=ACTION with ACTION one of {', '.join(cls.ACTIONS)}")
            actions[point] = cls.ACTIONS[action]
        return cls(actions)

    def at(self, point: str, transfer: Cuttable) -> None:
        """Called by the transfer at each point."""
        self.passed.append(point)
        action = self.actions.get(point)
        if action is not None:
            action(point, transfer)
