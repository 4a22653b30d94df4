# SPDX-License-Identifier: GPL-2.0-or-later
"""Landlock (landlock(7)): which files this process may still open, and that it signals nobody but itself."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from enum import IntFlag
from typing import Final

from godwit.confine import _kernel


class Access(IntFlag):
    """What may be done below a directory (linux/landlock.h, LANDLOCK_ACCESS_FS_*), of which this uses a part."""

    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    REMOVE_FILE = 1 << 5
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    TRUNCATE = 1 << 14


# How many kinds of access each version of the interface knows; later ones know those of the last.
_KINDS: Final = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_SCOPE_SIGNAL: Final = 1 << 1
_SCOPES_SINCE: Final = 6  # the versions with signals
_NETWORK_SINCE: Final = 4


def restrict(allowed: Mapping[str, Access]) -> int:
    """Refuse all access to files but what is ``allowed`` below directories; and signals to other processes.

    What is open stays open. A directory that is not there is passed over. Needs no_new_privs. Returns the version of
    Landlock's interface. OSError where there is none.
    """
    abi = _kernel.landlock_abi()
    handled = (1 << _KINDS[min(abi, max(_KINDS))]) - 1
    attributes = struct.pack("=QQQ", handled, 0, _SCOPE_SIGNAL)
    size = 24 if abi >= _SCOPES_SINCE else 16 if abi >= _NETWORK_SINCE else 8
    ruleset = _kernel.landlock_create(attributes[:size])
    try:
        for path, access in allowed.items():
            try:
                fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                _kernel.landlock_add(ruleset, access & handled, fd)
            finally:
                os.close(fd)
        _kernel.landlock_restrict(ruleset)
    finally:
        os.close(ruleset)
    return abi
