# SPDX-License-Identifier: GPL-2.0-or-later
"""Giving up capabilities (capabilities(7)), for a process with one thread."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from typing import Final

from godwit.confine import _kernel

CAP_DAC_OVERRIDE: Final = 1
CAP_NET_ADMIN: Final = 12
CAP_SYS_ADMIN: Final = 21

_LAST: Final = 63  # the kernel's sets have 64 bits
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4


def has(capability: int) -> bool:
    """Whether this process may use a capability now."""
    return bool(_kernel.get_capabilities()[1] >> capability & 1)


def empty_bounding_set() -> None:
    """Have no program that is run later gain a capability, where this process may still decide that (CAP_SETPCAP)."""
    for capability in range(_LAST + 1):
        with contextlib.suppress(OSError):
            _kernel.prctl(_PR_CAPBSET_DROP, capability)


def keep_only(capabilities: Collection[int]) -> None:
    """Give up every other capability, for good, and the means to gain any by running a program.

    What is to be kept and is not there is not gained. May be called again with fewer.
    """
    _kernel.prctl(_PR_SET_NO_NEW_PRIVS, 1)
    empty_bounding_set()
    with contextlib.suppress(OSError):  # before Linux 4.3
        _kernel.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    permitted, effective = _kernel.get_capabilities()
    wanted = sum(1 << capability for capability in capabilities)
    _kernel.set_capabilities(permitted & effective & wanted)
