# SPDX-License-Identifier: GPL-2.0-or-later
"""Migration of a device's state: versions, stages, sections and their life cycle.

For any device; nothing here knows of networks or sockets. ``docs/migration.md``
explains it from the start.
"""

from godwit.migration.errors import (
    AbortedError,
    BadRecordError,
    MigrationError,
    NotAStreamError,
    PeerGoneError,
    PipeError,
    StageError,
    StateError,
    TimedOutError,
    TrailingDataError,
    TruncatedError,
    VersionRefusedError,
)
from godwit.migration.faults import Faults, InjectedFaultError
from godwit.migration.header import MAGIC, Header
from godwit.migration.lifecycle import Direction, State
from godwit.migration.migration import Migration, Outcome, describe
from godwit.migration.section import Field, Record, Section, UnsoundError
from godwit.migration.stream import Cancel, Reader, Writer
from godwit.migration.version import Stage, Version, negotiate

__all__ = [
    "MAGIC",
    "AbortedError",
    "BadRecordError",
    "Cancel",
    "Direction",
    "Faults",
    "Field",
    "Header",
    "InjectedFaultError",
    "Migration",
    "MigrationError",
    "NotAStreamError",
    "Outcome",
    "PeerGoneError",
    "PipeError",
    "Reader",
    "Record",
    "Section",
    "Stage",
    "StageError",
    "State",
    "StateError",
    "TimedOutError",
    "TrailingDataError",
    "TruncatedError",
    "UnsoundError",
    "Version",
    "VersionRefusedError",
    "Writer",
    "describe",
    "negotiate",
]
