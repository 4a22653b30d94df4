# SPDX-License-Identifier: GPL-2.0-or-later
"""A part of what `make faults` goes through; and that it can tell."""

from __future__ import annotations

import dataclasses

import pytest

from godwit.lab.fault_matrix import MESSAGES, Fault, Result, What, Where, expected, message_faults, run, stage_faults
from godwit.vhost_user import FrontendClient

SOME = [
    Fault("native", "source", "source:end", What.CUT),
    Fault("native", "source", "linger:prepare flows", What.ERROR),
    Fault("native", "target", "target:state", What.KILLED),
    Fault("2", "target", "target:end", What.ERROR),
    Fault("2", "source", "rollback:prepare flows", What.HELPER_KILLED),
    Fault("2", "target", "commit:transfer flows", What.HELPER_KILLED),
    Fault("2", "source", "rollback:prepare flows", What.ERROR),
    Fault("native", "target", "commit:state", What.ERROR),
    Fault("2", "target", "after SEND_RARP", What.HANG_UP),
    Fault("2", "source", "before GET_VRING_BASE", What.KILLED),
]


@pytest.mark.parametrize("fault", SOME, ids=str)
def test_afterwards_connections_are_where_they_are_to_be(fault: Fault) -> None:
    result = run(fault)
    assert not result.wrong
    assert result.where is not Where.HANG


def test_what_is_tested_here_is_part_of_the_whole() -> None:
    every = {*stage_faults(), *message_faults()}
    assert set(SOME) <= every
    assert len(every) > 180
    assert all(hasattr(FrontendClient, method) for _, _, method in MESSAGES)


def test_anything_else_is_wrong() -> None:
    for fault in stage_faults():
        for where in set(Where) - set(expected(fault)):
            result = Result(fault, where, True)
            assert where.value in result.wrong
            assert "not reached" in dataclasses.replace(result, reached=False).wrong
