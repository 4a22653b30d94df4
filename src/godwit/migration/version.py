# SPDX-License-Identifier: GPL-2.0-or-later
"""Versions and stages: a migration as a table.

A ``Version`` is an id and its stages in order. A ``Stage`` is a name and what
to do for it on either side. Everything that happens in a transfer, and
everything that undoes it, is found by reading the table of a device from top
to bottom (or, for undoing, from bottom to top).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from godwit.migration.errors import VersionRefusedError
from godwit.migration.header import Header
from godwit.migration.stream import Reader, Writer

#: The device, as its stages see it. One object, handed to every callback of a transfer.
Context = TypeVar("Context")


class Item(NamedTuple):
    """Something in a stream: where (in bytes from its start), how long, what, and its values by name."""

    offset: int
    size: int
    name: str
    values: dict[str, int | str]


class Stage(Generic[Context]):
    """One step of a transfer. Every callback is optional and takes the device first.

    ``source(context, writer)``
        saves: may change the device only in ways that ``rollback`` undoes.
    ``rollback(context)``
        on the source, undoes ``source``, also one that raised half-way. May
        come after the whole stream was written, as long as the front-end lives.
    ``linger(context)``
        on the source, after a success: stay silent until the end.
    ``target(context, reader)``
        loads: nothing may be visible from outside yet.
    ``discard(context)``
        on the target, drops what ``target`` loaded, also half-way, silently.
    ``commit(context)``
        on the target, lets what was loaded live. There is no way back.

    ``inspect(reader)``
        shows what the stage has in a stream, item by item, and changes nothing
        (`godwit.migration.inspect`). A stage that writes nothing needs none.

    A callback that raises fails the transfer (``source``, ``target``) or is
    logged and collected (the others: each of them runs whatever the others do).
    """

    def __init__(
        self,
        name: str,
        *,
        source: Callable[[Context, Writer], None] | None = None,
        target: Callable[[Context, Reader], None] | None = None,
        rollback: Callable[[Context], None] | None = None,
        linger: Callable[[Context], None] | None = None,
        discard: Callable[[Context], None] | None = None,
        commit: Callable[[Context], None] | None = None,
        inspect: Callable[[Reader], Iterator[Item]] | None = None,
        doc: str = "",
    ) -> None:
        self.name = name
        self.source = source
        self.target = target
        self.rollback = rollback
        self.linger = linger
        self.discard = discard
        self.commit = commit
        self.inspect = inspect
        self.doc = doc

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"


@dataclass(frozen=True)
class Version(Generic[Context]):
    """A version of a device's stream: its stages, in the order of the stream.

    ``compat`` is the oldest version whose reader reads what this one writes
    (itself when 0). ``withdrawn``, when not empty, is the reason why this
    version is neither written nor read any more; its id stays known, so that
    it is refused by name.
    """

    id: int
    stages: Sequence[Stage[Context]] = ()
    compat: int = 0
    withdrawn: str = ""
    doc: str = ""

    def __post_init__(self) -> None:
        if not 0 < (self.compat or self.id) <= self.id <= 0xFFFFFFFF:
            raise ValueError(f"version {self.id}, compatible down to {self.compat}: out of range")
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"version {self.id} has two stages of one name")

    def header(self, magic: int) -> Header:
        """The header of a stream written in this version."""
        return Header(self.id, self.compat or self.id, magic)


def negotiate(header: Header, versions: Sequence[Version[Context]]) -> Version[Context]:
    """The newest of ``versions`` that reads the stream which ``header`` begins.

    :raises VersionRefusedError: there is none.
    """
    candidates = [v for v in versions if header.compat_version <= v.id <= header.version]
    living = [v for v in candidates if not v.withdrawn]
    if living:
        return max(living, key=lambda v: v.id)
    known = tuple(sorted(v.id for v in versions if not v.withdrawn))
    reason = "; ".join(f"version {v.id} was withdrawn: {v.withdrawn}" for v in candidates)
    raise VersionRefusedError(header, known, reason)
