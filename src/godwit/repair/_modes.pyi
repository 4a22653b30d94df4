# SPDX-License-Identifier: GPL-2.0-or-later
"""TCP_REPAIR on many sockets at once: the guest stands still meanwhile."""

from array import array

def drop_all() -> int | None:
    """Load a program that drops all that arrives, for any number of sockets; its descriptor is the caller's.

    None where the kernel does not let us (bpf(2): that needs CAP_BPF, in the initial user namespace).
    """

def first_not_tcp(fds: array[int]) -> int:
    """The place of the first descriptor that is no TCP socket; -1 where all are."""

def set_mode(fds: array[int], mode: int, program: int | None) -> tuple[int, int]:
    """Set TCP_REPAIR on each TCP socket, a value of ``Repair``; ON comes with a filter that drops all that arrives.

    ``program`` is what ``drop_all`` has given. Without it each socket gets a filter of its own, which costs the kernel
    ten times as much. Returns how many sockets were done, and the error number of the next one, 0 if that
    were all.
    """

def count_in_mode(fds: array[int], on: bool) -> int:
    """How many sockets, from the first, are in repair mode, or out of it. Reading that needs no capability.

    ``OSError``: one of them is no TCP socket.
    """
