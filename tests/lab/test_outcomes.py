# SPDX-License-Identifier: GPL-2.0-or-later
"""A part of what `make outcomes` goes through; and that it tells one end from another."""

from __future__ import annotations

import dataclasses

import pytest

from godwit.lab.outcomes import SOON, Case, Row, cases, expected, run
from godwit.lab.tcp_states import STATES, End, Held, Idle, OpeningFromOutside, Outcome

# It takes the ten seconds in which a peer might be told, while it is not.
AT_ONCE = tuple(state for state in STATES if state is not OpeningFromOutside)


@pytest.mark.parametrize(
    ("dialect", "ipv6", "states"), [("2", False, STATES), ("2", True, AT_ONCE), ("native", True, AT_ONCE)]
)
def test_every_state_comes_to_the_end_that_is_declared(
    dialect: str, ipv6: bool, states: tuple[type[Held], ...]
) -> None:
    rows = run(Case("godwit", "godwit", dialect, "godwit", ipv6, SOON), states)
    assert len(rows) == sum(len(state.openers) for state in states)
    assert not [row.wrong for row in rows if row.wrong]


def test_without_a_helper_all_are_reset_at_both_ends() -> None:
    rows = run(Case("godwit", "godwit", "native", None, False, None), AT_ONCE)
    assert not [row.wrong for row in rows if row.wrong]
    assert {row.end.outcome for row in rows if row.state is Idle} == {Outcome.RESET}
    with_helper = [dataclasses.replace(row, case=dataclasses.replace(row.case, helper="godwit")) for row in rows]
    assert all("is to be: lives on" in row.wrong for row in with_helper if row.state is Idle)


def test_a_byte_lost_is_wrong_whatever_the_outcome() -> None:
    case = next(cases())
    for outcomes in {expected(state, case)[0] for state in STATES}:
        for outcome in outcomes:
            assert "1 bytes lost" in Row(case, Idle, False, End(outcome, 1)).wrong


def test_no_way_is_left_out() -> None:
    assert len({str(case) for case in cases()}) == 4 * 2 * 2 * 4
