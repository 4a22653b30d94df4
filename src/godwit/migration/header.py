# SPDX-License-Identifier: GPL-2.0-or-later
"""The header of a device-state stream: 16 bytes, big-endian, before any stage."""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from godwit.migration.errors import NotAStreamError, version_name

#: First 8 bytes of a stream of a user-mode network device (godwit, passt). Another device takes its own.
MAGIC: Final = 0xB1BB1D1B0BB1D1B0

_HEADER: Final = struct.Struct(">QII")


class Header(NamedTuple):
    """What a stream says of itself.

    ``version`` is the newest version that its writer knew when writing it;
    ``compat_version`` the oldest whose reader can still read it.
    """

    version: int
    compat_version: int
    magic: int = MAGIC

    def pack(self) -> bytes:
        """The header as ``Header.size()`` bytes.

        :raises ValueError: a version that no stream can carry.
        """
        if not 0 < self.compat_version <= self.version <= 0xFFFFFFFF:
            raise ValueError(f"no header can say version {self.version}, compatible down to {self.compat_version}")
        return _HEADER.pack(self.magic, self.version, self.compat_version)

    @classmethod
    def parse(cls, data: bytes, magic: int = MAGIC) -> Header:
        """The header in ``data``, which holds ``Header.size()`` bytes.

        :raises NotAStreamError: another magic, a version of zero, or a compat_version above the version.
        """
        found, version, compat_version = _HEADER.unpack(data)
        if found != magic:
            raise NotAStreamError(f"not a device-state stream: it begins with {found:#018x}, not {magic:#018x}")
        if version == 0 or compat_version == 0:
            raise NotAStreamError(f"not a device-state stream: version {version}, compatible down to {compat_version}")
        if compat_version > version:
            raise NotAStreamError(
                f"not a device-state stream: version {version_name(version)} "
                f"is below compat_version {version_name(compat_version)}"
            )
        return cls(version, compat_version, found)

    @staticmethod
    def size() -> int:
        """Bytes of a packed header: 16."""
        return _HEADER.size
