# SPDX-License-Identifier: GPL-2.0-or-later
"""The build of the Cython modules; everything else is in pyproject.toml.

Four variants, each with C files of its own below ``build/``:

* plain: what is installed.
* ``GODWIT_DEBUG=1``: no optimisation, debug information that names .pyx lines.
* ``GODWIT_SANITIZE=1``: AddressSanitizer and UndefinedBehaviorSanitizer.
* ``GODWIT_FUZZ=1``: the same, and what libFuzzer needs to see which way the code goes. Only clang can (``CC=clang``).
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import Cython.Compiler.Options
from Cython.Build import cythonize
from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
SOURCE = "src"
COMMON = ["-fno-strict-aliasing", "-Wall"]
SANITIZED = ["-fno-sanitize-recover=undefined", "-O1", "-g3", "-fno-omit-frame-pointer", *COMMON]
VARIANTS: dict[str, tuple[list[str], list[str]]] = {
    "plain": (["-O2", *COMMON], []),
    "debug": (["-O0", "-g3", *COMMON], []),
    "sanitize": (["-fsanitize=address,undefined", *SANITIZED], ["-fsanitize=address,undefined"]),
    # The sanitizers' library is loaded first, by whoever runs it, with libFuzzer in it.
    "fuzz": (["-fsanitize=address,undefined,fuzzer-no-link", *SANITIZED, "-Wno-unused-function"], []),
}

# A nogil function without `noexcept` takes the GIL after each call to look for
# an exception. Cython only hints at that, and its -Werror does not see hints.
FORBIDDEN = "performance hint"


def variant() -> str:
    """The variant that the environment asks for."""
    if os.environ.get("GODWIT_SANITIZE") == "1":
        return "sanitize"
    if os.environ.get("GODWIT_FUZZ") == "1":
        return "fuzz"
    if os.environ.get("GODWIT_DEBUG") == "1":
        return "debug"
    return "plain"


def extensions(compile_args: list[str], link_args: list[str], *, lab: bool) -> list[Any]:
    """One extension for each .pyx file below src/godwit; the laboratory's are not for every build."""
    found = []
    for path in sorted((ROOT / SOURCE / "godwit").rglob("*.pyx")):
        if path.parent.name == "lab" and not lab:
            continue
        relative = path.relative_to(ROOT)
        name = ".".join(path.relative_to(ROOT / SOURCE).with_suffix("").parts)
        found.append(
            Extension(
                name,
                [str(relative)],
                include_dirs=[SOURCE, str(relative.parent)],
                extra_compile_args=compile_args,
                extra_link_args=link_args,
            )
        )
    return found


def write_system_calls() -> None:
    """Write the system calls that the C library's headers know, for `godwit.confine`: CALL(name, number) for each."""
    asked = [*shlex.split(os.environ.get("CC", "cc")), "-E", "-dM", "-include", "sys/syscall.h", "-x", "c", os.devnull]
    macros = subprocess.run(asked, check=True, capture_output=True, text=True).stdout
    # Their values are for the compiler to find: some are other macros. Two of them are no calls but numbers of such.
    calls = set(re.findall(r"^#define __NR_(\w+) ", macros, re.MULTILINE)) - {"syscalls", "arch_specific_syscall"}
    if not calls:
        raise SystemExit("setup.py: sys/syscall.h has no system calls")
    text = "".join(f"CALL({name}, __NR_{name})\n" for name in sorted(calls))
    path = ROOT / SOURCE / "godwit" / "confine" / "_syscalls.h"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


class Tee:
    """A text stream that writes on to another one and keeps a copy."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.kept: list[str] = []

    def write(self, text: str) -> int:
        self.kept.append(text)
        return self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()

    def isatty(self) -> bool:
        return False


@contextmanager
def no_hints(c_files: Path) -> Iterator[None]:
    """Fail the build if Cython hints at lost performance meanwhile.

    The C files written are removed then, or the next build would find them
    up to date and pass.
    """
    before = {path: path.stat().st_mtime_ns for path in c_files.rglob("*.c")}
    streams = sys.stdout, sys.stderr
    tees = Tee(sys.stdout), Tee(sys.stderr)
    sys.stdout, sys.stderr = tees
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
    if FORBIDDEN in "".join(tees[0].kept + tees[1].kept).lower():
        for path in c_files.rglob("*.c"):
            if before.get(path) != path.stat().st_mtime_ns:
                path.unlink()
        raise SystemExit(f"setup.py: Cython printed a {FORBIDDEN!r} (above): a function lacks noexcept or nogil")


def main() -> None:
    os.chdir(ROOT)
    if (
        os.environ.get("GODWIT_BARE") == "1"
    ):  # the package as it lies there, whose modules are compiled in place after that
        setup()
        return
    write_system_calls()
    chosen = variant()
    compile_args, link_args = VARIANTS[chosen]
    c_files = Path("build") / "cython" / chosen
    Cython.Compiler.Options.warning_errors = True
    with no_hints(c_files):
        modules = cythonize(
            extensions(compile_args, link_args, lab=chosen != "fuzz"),
            build_dir=str(c_files),
            include_path=[SOURCE],
            compiler_directives={"language_level": 3, "cdivision": True},
            emit_linenums=chosen != "plain",
        )
    for module in modules:
        module.depends.append("setup.py")  # after cythonize, which would copy it
    setup(ext_modules=modules)


main()
