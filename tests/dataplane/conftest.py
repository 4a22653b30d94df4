# SPDX-License-Identifier: GPL-2.0-or-later
"""What the tests of the data plane share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .driver import V4, V6, Family, Guest


@pytest.fixture(params=[V4, V6], ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    found: Family = request.param
    return found


@pytest.fixture
def guest() -> Iterator[Guest]:
    """A guest with all features, and buffers enough."""
    with Guest() as it:
        yield it
