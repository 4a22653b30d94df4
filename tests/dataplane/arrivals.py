# SPDX-License-Identifier: GPL-2.0-or-later
"""TCP flows that come to a data plane as with a migration, and sockets of a test's own for them."""

from __future__ import annotations

import os
import socket
from array import array

from godwit.dataplane import Engine, FlowState, moving
from godwit.net import native


def arrive(engine: Engine, state: FlowState, sock: socket.socket | None = None) -> moving.Arrivals:
    """One flow that has come: held, with a new frozen socket, or with a copy of the descriptor of ``sock``."""
    arrivals = moving.Arrivals(engine, 0, 0)
    assert arrivals.prepare(native.FLOW.encode(state), True) == []
    if sock is not None:
        os.dup2(sock.fileno(), engine.flow_socket(arrivals.flow(0))[0], inheritable=False)
    return arrivals


def add_flow(engine: Engine, state: FlowState, sock: socket.socket, *, goes_on: bool = False) -> int:
    """A flow with that socket, which is the engine's from then on; held, unless it ``goes_on``. Returns its index."""
    arrivals = arrive(engine, state, sock)
    sock.close()
    if goes_on:
        assert arrivals.finish(array("I", [0])) == []
    return arrivals.flow(0)
