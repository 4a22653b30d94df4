# SPDX-License-Identifier: GPL-2.0-or-later
"""Which system calls this process may make (seccomp(2)); any other ends it, and the log has its name.

The filter is a list: a call that is not in there does not exist. For those on it without a condition the kernel looks
nothing up (it keeps their numbers in a bitmap, Linux 5.11), so they cost what they cost without it.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from godwit.confine import _kernel

# linux/bpf_common.h, of struct sock_filter: code, where to go if true and if false, operand
_LOAD, _EQUAL, _AT_LEAST, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
_INSTRUCTION: Final = struct.Struct("=HBBI")
_KILL, _TRAP, _ERROR, _ALLOW = 0x80000000, 0x00030000, 0x00050000, 0x7FFF0000  # SECCOMP_RET_*
_NUMBER_AT, _ARCH_AT, _ARGUMENTS_AT = 0, 4, 16  # struct seccomp_data
_X32: Final = 0x40000000  # the other numbers of x86-64
_ENOSYS: Final = 38
_WHOLE: Final = 0xFFFFFFFF


class Only(NamedTuple):
    """What must hold for an argument (from 0 on), of which the lower half counts: after ``mask`` it is one of these."""

    argument: int
    mask: int
    values: tuple[int, ...]


class Call(NamedTuple):
    """A system call, and all that must hold for it; otherwise ``error`` is the answer, or it is a violation."""

    name: str
    conditions: tuple[Only, ...]
    error: int = 0


_PROT_EXEC: Final = 4
#: Memory, as long as nothing in it can be run: neither what is written now nor what is loaded.
NOT_TO_BE_RUN: Final = tuple(Call(name, (Only(2, _PROT_EXEC, (0,)),)) for name in ("mmap", "mprotect"))


def program(plain: Iterable[str], conditional: Iterable[Call] = (), missing: Iterable[str] = ()) -> bytes:
    """The filter: what is allowed, what is under a condition, and what is answered as if the kernel had it not.

    This process may end itself by a signal, as abort() does and a violation. Names that this architecture does not have
    are passed over.
    """
    numbers = _kernel.calls()
    made: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, _ARCH_AT),
        (_EQUAL, 1, 0, _kernel.ARCH),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _KILL),
        # What came after this was built: a newer C library asks for it first, and falls back on what there was.
        (_AT_LEAST, 0, 1, max(numbers.values()) + 1),
        (_RETURN, 0, 0, _ERROR | _ENOSYS),
    ]

    def when(name: str, then: Sequence[tuple[int, int, int, int]]) -> None:
        if name in numbers:
            made.extend([(_EQUAL, 0, len(then), numbers[name]), *then])

    for name in plain:
        when(name, [(_RETURN, 0, 0, _ALLOW)])
    for name in missing:
        when(name, [(_RETURN, 0, 0, _ERROR | _ENOSYS)])
    for call in (*conditional, Call("tgkill", (Only(0, _WHOLE, (os.getpid(),)),))):
        when(call.name, tuple(_conditions(call)))
    made.append((_RETURN, 0, 0, _TRAP))
    return b"".join(_INSTRUCTION.pack(*each) for each in made)


def _conditions(call: Call) -> Iterator[tuple[int, int, int, int]]:
    lower_half = 0 if sys.byteorder == "little" else 4
    for argument, mask, values in call.conditions:
        yield _LOAD, 0, 0, _ARGUMENTS_AT + 8 * argument + lower_half
        yield _AND, 0, 0, mask
        for left, value in zip(range(len(values), 0, -1), values, strict=True):
            yield _EQUAL, left, 0, value  # over the others, and what is answered where none is right
        yield _RETURN, 0, 0, _ERROR | call.error if call.error else _TRAP
    yield _RETURN, 0, 0, _ALLOW


def restrict(filter_program: bytes, log: int, before: bytes) -> None:
    """Have the filter hold for this thread and those that it starts. Needs no_new_privs.

    A call that is not allowed writes a line to the descriptor ``log``, which begins with ``before``, and ends the
    process by SIGSYS. OSError where the kernel, or this build, has no filter.
    """
    if not _kernel.ARCH:
        raise OSError(_ENOSYS, "no filter is known for this architecture")
    _kernel.load_for_thread_ends()
    _kernel.catch_violations(log, before)
    _kernel.filter_calls(filter_program)
