# SPDX-License-Identifier: GPL-2.0-or-later
"""The versions of the device's stream that are known here."""

from __future__ import annotations

from typing import Final

from godwit.migration import Version
from godwit.net.native import VERSION as NATIVE
from godwit.net.state import VERSION_1, VERSION_2, FlowMover

_VERSIONS: Final[tuple[Version[FlowMover], ...]] = (VERSION_1, VERSION_2, NATIVE)


def versions() -> tuple[Version[FlowMover], ...]:
    """All of them, oldest first, for ``godwit.migration.Migration``."""
    return _VERSIONS
