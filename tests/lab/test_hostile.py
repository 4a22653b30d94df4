# SPDX-License-Identifier: GPL-2.0-or-later
"""A short run of ``python -m godwit.lab.hostile``: what is beside a flood goes on."""

from __future__ import annotations

from godwit.lab.hostile import run


def test_connections_beside_floods() -> None:
    """The rate is one that any machine can do; what the back-end has grows no further than its limits."""
    kinds = ["syn", "udp-ports", "junk"]
    arguments = ["--max-udp-flows", "200", "--max-half-open", "100"]
    rows = list(run(kinds, 3.0, 3000.0, arguments=arguments))
    assert [row.flood for row in rows] == kinds
    for row in rows:
        assert not row.failures, f"{row}"
        assert row.frames > 100  # of 3000: the machine may be a busy one
        assert row.asked > 10
        assert row.descriptors < 400
