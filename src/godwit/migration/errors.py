# SPDX-License-Identifier: GPL-2.0-or-later
"""What can go wrong in a transfer, sorted by whose fault it is.

* The stream's (or its writer's): ``NotAStreamError``, ``VersionRefusedError``,
  ``TruncatedError``, ``TrailingDataError``, ``BadRecordError``,
  ``UnknownEntryError``, ``DamagedError``.
* The pipe's: ``PeerGoneError``, ``TimedOutError``, ``PipeError``.
* Ours: ``StageError`` (a device's stage raised), ``AbortedError``.
* The caller's: ``StateError``, which is no ``MigrationError``: it is a bug.

No error ends the process. After any ``MigrationError`` the transfer is over,
what it had begun has been undone, and a new one may be started.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from godwit.migration.header import Header


class MigrationError(Exception):
    """A transfer failed; the text says where and why."""


class NotAStreamError(MigrationError):
    """The first 16 bytes are no header of ours."""


class VersionRefusedError(MigrationError):
    """The stream is sound, and none of our versions can read it."""

    def __init__(self, header: Header, known: tuple[int, ...], reason: str = "") -> None:
        self.header = header
        self.known = known
        names = ", ".join(version_name(version) for version in known) or "none"
        text = (
            f"device state version {version_name(header.version)}, "
            f"compatible down to {version_name(header.compat_version)}; this target knows {names}: "
            "have the source write one of these"
        )
        super().__init__(f"{text} ({reason})" if reason else text)


class TruncatedError(MigrationError):
    """The stream ended within something that was still expected."""

    def __init__(self, stage: str, offset: int, wanted: int, got: int) -> None:
        self.stage = stage
        self.offset = offset
        self.wanted = wanted
        self.got = got
        super().__init__(f"{stage}: stream ended at offset {offset + got}: wanted {wanted} bytes, got {got}")


class TrailingDataError(MigrationError):
    """Bytes follow the last stage: the stream is not what its header says."""

    def __init__(self, offset: int) -> None:
        self.offset = offset
        super().__init__(f"bytes follow the last stage, from offset {offset}")


class BadRecordError(MigrationError):
    """A value that cannot be right. ``offset`` counts bytes from the start of the stream."""

    def __init__(self, stage: str, record: str, field: str, value: object, offset: int, why: str) -> None:
        self.stage = stage
        self.record = record
        self.field = field
        self.value = value
        self.offset = offset
        self.why = why
        shown = value.hex(":") if isinstance(value, bytes) else value
        super().__init__(f"{stage}: {record}: {field} is {shown}, {why} (at offset {offset})")


class UnknownEntryError(MigrationError):
    """An entry that must be understood, of a type that is not known here: a newer writer's."""

    def __init__(self, stage: str, kind: int, offset: int, newest: int) -> None:
        self.stage = stage
        self.kind = kind
        self.offset = offset
        super().__init__(
            f"{stage}: the entry at offset {offset} is of type {kind}, which must be understood and is not known here "
            f"(the types up to {newest} are): have the source write an older version of the device state"
        )


class DamagedError(MigrationError):
    """The check value at the end of the stream is not that of what came before it."""

    def __init__(self, stage: str, offset: int, said: int, found: int) -> None:
        self.stage = stage
        self.offset = offset
        super().__init__(
            f"{stage}: the stream was damaged on the way: its CRC-32 up to offset {offset} is {found:08x}, "
            f"and the source's was {said:08x}"
        )


class PeerGoneError(MigrationError):
    """The other end of the pipe was closed while we were writing."""


class TimedOutError(MigrationError):
    """The pipe stood still for longer than the time limit."""


class PipeError(MigrationError):
    """Reading or writing the pipe gave an error other than its end."""


class AbortedError(MigrationError):
    """The transfer was called off from our side."""


class StageError(MigrationError):
    """A callback of a stage raised; ``__cause__`` is what it raised."""

    def __init__(self, stage: str, callback: str, cause: BaseException) -> None:
        self.stage = stage
        self.callback = callback
        self.__cause__ = cause
        super().__init__(f"{stage}: {callback} failed: {str(cause) or type(cause).__name__}")


class StateError(RuntimeError):
    """A method was called in a state in which it may not be. The caller's bug."""


def version_name(version: int) -> str:
    """A version as people write it: 2, or 0x80000001 for the high ones."""
    return str(version) if version < 0x80000000 else f"{version:#x}"
