# SPDX-License-Identifier: GPL-2.0-or-later
"""Why connections that came, or were to go, are lost, and what is said of it."""

from __future__ import annotations

import errno
import logging
import os
from collections import Counter
from collections.abc import Iterable

from godwit.daemon.awaited import PATIENCE
from godwit.dataplane import FlowState
from godwit.net.records import address_text

log = logging.getLogger(__name__)

RESET = "its peer has reset it"  # and so it ends here as it would have anywhere: it is not lost
NOT_SAVED = "the source could not save it"
NO_PLACE = {
    errno.EEXIST: "two flows between the same ends",
    errno.ENFILE: "the flow table is full",
}
NO_DESCRIPTOR = "there are too few descriptors for it"
NO_MEMORY = "all queues together are too large for this host"

# Reasons that a source can make the log give at most.
MAX_REASONS = 20


def why(step: str, error: int) -> str:
    """Why a connection is lost whose socket is there, but a step with it has failed: or that it is not."""
    return RESET if error in (errno.ECONNRESET, errno.EPIPE) else f"{step}: {os.strerror(error)}"


def report(lost: Iterable[tuple[str, FlowState]]) -> None:
    """Say why connections were lost: the most frequent reasons, with one of the connections for each."""
    examples: dict[str, FlowState] = {}
    numbers: Counter[str] = Counter()
    for why, state in lost:
        numbers[why] += 1
        examples.setdefault(why, state)
    most = numbers.most_common(MAX_REASONS)
    for why, number in most:
        log.error("%d lost, %s%s: %s", number, _ends(examples[why]), " and so on" if number > 1 else "", why)
    if len(numbers) > len(most):
        log.error("%d lost for %d other reasons", numbers.total() - sum(n for _, n in most), len(numbers) - len(most))


def advice(error: OSError, address: bytes, *, here: bool) -> str:
    """What the kernel said of a socket that was to have this address of ours, and what to do about it."""
    if error.errno != errno.EADDRNOTAVAIL:
        return str(error)
    if here:
        return f"{error}. Another socket on this host has the same two ends: end the process that has it"
    return (
        f"this host does not have the address {address_text(address)}: let it come to this host with the guest,"
        f" before it or (with --freebind) up to {PATIENCE:.0f} s after it"
    )


def _ends(state: FlowState) -> str:
    """Both ends of the host's side, for people."""
    side = state.host_side
    return f"{address_text(side.our_addr)} port {side.our_port} to {address_text(side.end_addr)} port {side.end_port}"
