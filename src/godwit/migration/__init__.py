# SPDX-License-Identifier: GPL-2.0-or-later
"""Migration of a device's state: versions, stages, sections and their life cycle.

For any device; nothing here knows of networks or sockets. ``docs/migration.md``
explains it from the start.
"""

from godwit.migration.entries import Entries, Kind
from godwit.migration.errors import (
    AbortedError,
    BadRecordError,
    DamagedError,
    MigrationError,
    NotAStreamError,
    PeerGoneError,
    PipeError,
    StageError,
    StateError,
    TimedOutError,
    TrailingDataError,
    TruncatedError,
    UnknownEntryError,
    VersionRefusedError,
)
from godwit.migration.faults import Faults, InjectedFaultError
from godwit.migration.header import MAGIC, Header
from godwit.migration.lifecycle import Direction, State
from godwit.migration.migration import Migration, Outcome, describe
from godwit.migration.section import Field, Record, Section, UnsoundError
from godwit.migration.stream import Cancel, Part, Reader, Writer
from godwit.migration.transfers import Transfers
from godwit.migration.version import Item, Stage, Version, negotiate

__all__ = [
    "MAGIC",
    "AbortedError",
    "BadRecordError",
    "Cancel",
    "DamagedError",
    "Direction",
    "Entries",
    "Faults",
    "Field",
    "Header",
    "InjectedFaultError",
    "Item",
    "Kind",
    "Migration",
    "MigrationError",
    "NotAStreamError",
    "Outcome",
    "Part",
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
    "Transfers",
    "TruncatedError",
    "UnknownEntryError",
    "UnsoundError",
    "Version",
    "VersionRefusedError",
    "Writer",
    "describe",
    "negotiate",
]
