# SPDX-License-Identifier: GPL-2.0-or-later
"""Giving up capabilities (capabilities(7)), for a process with one thread."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Collection
from typing import Final

CAP_DAC_OVERRIDE: Final = 1
CAP_NET_ADMIN: Final = 12

_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
_VERSION_3: Final = 0x20080522  # _LINUX_CAPABILITY_VERSION_3: two words of 32 capabilities

_libc = ctypes.CDLL(None, use_errno=True)


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Word(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


_Words = _Word * 2


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def has(capability: int) -> bool:
    """Whether this process may use a capability now."""
    words = _Words()
    _check(_libc.capget(ctypes.byref(_Header(_VERSION_3, 0)), words))
    return bool(words[capability // 32].effective >> capability % 32 & 1)


def keep_only(capabilities: Collection[int]) -> None:
    """Give up every other capability, for good, and the means to gain any by running a program.

    What is to be kept and is not there is not gained. May be called again with fewer.
    """
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    # The bounding set is for programs run later, of which there are none; dropping needs a capability of its own.
    with open("/proc/sys/kernel/cap_last_cap") as file:
        last = int(file.read())
    for capability in range(last + 1):
        _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    words = _Words()
    header = _Header(_VERSION_3, 0)
    _check(_libc.capget(ctypes.byref(header), words))
    for number, word in enumerate(words):
        mask = sum(1 << capability % 32 for capability in capabilities if capability // 32 == number)
        word.permitted &= mask
        word.effective &= mask
        word.inheritable = 0
    _check(_libc.capset(ctypes.byref(header), words))
