# SPDX-License-Identifier: GPL-2.0-or-later
"""Flows that come from another back-end."""

from __future__ import annotations

import pytest

from godwit.dataplane import Engine, FlowState, Side
from godwit.dataplane._base import FLOW_BYTES

from .arrivals import arrive

V4 = bytes(10) + b"\xff\xff"
GUEST = Side(V4 + b"\xc0\x00\x02\x02", V4 + b"\xc0\x00\x02\x0a", 80, 40000)
HOST = Side(V4 + b"\xc0\x00\x02\x0a", V4 + b"\xc0\x00\x02\x02", 40000, 80)


STATE = FlowState(
    pif=(2, 1),
    sides=(GUEST, HOST),
    retries=0,
    ws_from_tap=7,
    ws_to_tap=8,
    events=0x04,
    tap_mss=1460,
    sndbuf=0,
    flags=0,
    seq_dup_ack_approx=0,
    wnd_from_tap=1000,
    wnd_to_tap=0xFFFF,
    seq_to_tap=0,
    seq_ack_from_tap=0,
    seq_from_tap=0,
    seq_ack_to_tap=0,
    seq_init_from_tap=0,
)


@pytest.mark.parametrize("at", [0, 0xFFFFFFFF, 0xFFFFFFFF - 0xFFFF, 0x7FFFFFFF])
def test_a_flow_anywhere_in_sequence_space_is_the_same_when_it_moves_on(at: int) -> None:
    """Numbers and the window beyond them wrap (RFC 9293, 3.4)."""
    state = STATE._replace(seq_to_tap=at, seq_ack_from_tap=at, seq_from_tap=at, seq_ack_to_tap=at, seq_init_from_tap=at)
    engine = Engine(16)
    try:
        assert engine.flow_state(arrive(engine, state).flow(0)) == state
    finally:
        engine.close()


def test_the_largest_segment_is_one_that_a_frame_can_hold() -> None:
    """Whatever a stream says: else nothing would ever be sent, or frames that say the wrong length."""
    engine = Engine(16)
    try:
        assert engine.flow_state(arrive(engine, STATE._replace(tap_mss=65532)).flow(0)).tap_mss == 65492
    finally:
        engine.close()


def test_a_flow_takes_less_than_a_quarter_of_a_kilobyte() -> None:
    """A guest may have 131072 of them."""
    assert FLOW_BYTES <= 236
