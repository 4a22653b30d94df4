# SPDX-License-Identifier: GPL-2.0-or-later
"""TCP flows and their sockets on their way into a stream and out of it, many at a time and without the GIL.

The data plane is parked during all of this. What a record is, and what is sound: see ``layouts``.
"""

from array import array
from collections.abc import Sequence

from godwit.dataplane._base import EngineBase

def flow_records(engine: EngineBase, flows: Sequence[int], native: bool) -> bytes:
    """The records of these flows, in their order. Nothing in them was checked."""

def freeze(engine: EngineBase) -> tuple[array[int], list[tuple[int, int]]]:
    """Have the kernel discard what arrives for TCP flows, before TCP sees it.

    Nothing is acknowledged; RST and FIN are ignored (IP_MINTTL or IPV6_MINHOPCOUNT 255, RFC 5082). Needs no privilege.
    A frozen connection still sends, and even in repair mode still retransmits. Of the flows that have a socket returns
    those that are frozen, and (flow, error number) of the others.
    """

def sockets(engine: EngineBase, flows: Sequence[int]) -> array[int]:
    """Their descriptors; -1 for one without."""

def dump(
    engine: EngineBase, flows: Sequence[int], at: int, most: int, local_moves: bool = False
) -> tuple[int, bytes, int]:
    """Sockets of frozen flows in repair mode, from the ``at``-th on, until there are ``most`` bytes or so.

    Changes nothing but SO_PEEK_OFF, which is -1 afterwards. One that both sides have closed has a receive queue still.
    Returns how far it has come, the sockets, and the error number of the one that has ended it, or 0; it goes on
    behind that one. EXDEV: its peer is this host itself, which does not move (unless ``local_moves``); EINVAL: it is
    not connected, or has an urgent byte in its queue; ENOBUFS: a queue is larger than 64 MiB; EPERM: it is not in
    repair mode; one that broke gives the error that broke it.
    """

class Arrivals:
    """Flows that have been loaded, by their *number* in the stream; of some flows there is none in the table.

    ``scope`` is the interface of link-local addresses, ``memory`` how many bytes of queues may be kept until the
    commit. What a flow is lost for is the caller's to remember.
    """

    def __init__(self, engine: EngineBase, scope: int, memory: int) -> None: ...
    def __len__(self) -> int: ...
    def prepare(self, records: bytes, native: bool) -> list[tuple[int, int]]:
        """Flows for sound records, held, each with a new frozen socket: (number, error) of those where that is not so.

        EEXIST: there are two flows between the same ends; ENFILE: the flow table is full, and there is no place for it;
        EMFILE: it would have more descriptors than flows may have. ``ValueError``: a record is not sound.
        """

    def adopt(self, flow: int) -> tuple[int, int]:
        """A flow that is in the table already. Returns its number, and why it could not be given a socket, or 0."""

    def flow(self, number: int) -> int:
        """Its index in the table; -1: it has no place there."""

    def has_place(self, number: int) -> bool:
        """There was a descriptor left for it."""

    def flows(self) -> list[int]:
        """The indices of all that have a place in the table."""

    def not_restored(self) -> list[int]:
        """The numbers of those that have a place, are not lost, and whose socket is not the connection."""

    def with_socket(self, first: int, restored: bool = False) -> array[int]:
        """The numbers from ``first`` on that have a socket, or only those that are restored."""

    def sockets(self, numbers: Sequence[int]) -> array[int]:
        """The descriptors of these; -1 for one without."""

    def enter_repair(self, numbers: Sequence[int]) -> None:
        """Their sockets are in repair mode."""

    def lose(self, number: int) -> None:
        """It cannot move: close its socket."""

    def free_socket(self, number: int) -> None:
        """Close its socket; it gets another one, later."""

    def take_memory(self, size: int) -> bool:
        """Whether there is memory for so much of queues; then it is taken."""

    def restore(self, first: int, sockets: bytes | memoryview) -> list[tuple[int, int, int, int, str]]:
        """Make the sockets of the numbers from ``first`` on the connections that these sound records describe.

        All but the send queues, which are kept until the commit. Not those without a socket in repair mode. Returns
        (number, where its record begins, bytes of it with its queues, error number, step) of those that could not be.
        Error 0: it is a lost one, or has ended; EDQUOT: there is no memory for its queues. Several threads may do it at
        once, for different numbers.
        """

    def complete(self, numbers: array[int]) -> list[tuple[int, int]]:
        """At the commit, in repair mode still: how a running socket is set, and what was sent.

        (number, error) of those where it failed.
        """

    def finish(self, numbers: array[int]) -> list[tuple[int, int]]:
        """After repair mode: what was not sent yet; then they go on. (number, error) where it failed."""
