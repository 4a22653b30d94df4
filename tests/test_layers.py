# SPDX-License-Identifier: GPL-2.0-or-later
"""The rooms of the house: an import may point down, never up.

Read from the sources, not by importing: an import inside a function or under
TYPE_CHECKING counts as well, and so does import_module("...").
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "godwit"

# From the top down. What each room may import of godwit, besides itself.
ROOMS: dict[str, set[str]] = {
    "cli": {"lab", "confine", "daemon", "net", "repair", "dataplane", "migration", "vhost_user"},
    "lab": {"confine", "daemon", "net", "repair", "dataplane", "migration", "vhost_user"},
    "daemon": {"confine", "net", "repair", "dataplane", "migration", "vhost_user"},
    "net": {"repair", "dataplane", "migration", "vhost_user"},
    "repair": {"confine", "migration"},
    "confine": set(),
    "dataplane": set(),
    "migration": set(),
    "vhost_user": set(),
}
PURE_PYTHON = {"vhost_user", "migration"}

SOURCES = sorted(path for pattern in ("*.py", "*.pyi", "*.pyx", "*.pxd") for path in PACKAGE.rglob(pattern))

CYTHON_IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+(?P<base>[\w.]+)[ \t]+c?import[ \t]+(?P<names>\([^)]*\)|[^\n#]+)"
    r"|c?import[ \t]+(?P<modules>[^\n#]+))",
    re.MULTILINE,
)


def _absolute(base: str, level: int, module: str) -> str:
    """The full name of what a relative import names; ``module`` is the importer's package."""
    if not level:
        return base
    package = module.split(".")
    parts = package[: len(package) - level + 1]
    return ".".join([*parts, base] if base else parts)


def _names(text: str) -> list[str]:
    return [name.split(" as ")[0].strip() for name in text.strip("()\n ").replace("\n", " ").split(",") if name.strip()]


def _from(base: str, names: list[str]) -> list[str]:
    """``from godwit import x`` names a room; deeper down the base alone says which."""
    return [f"godwit.{name}" for name in names] if base == "godwit" else [base]


def python_imports(text: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and full name of each module of godwit that Python source imports."""
    for node in ast.walk(ast.parse(text)):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node.module or "", node.level, package)
            found = _from(base, [alias.name for alias in node.names])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found = [str(each.value) for each in node.args[:1] if isinstance(each, ast.Constant)]
        for name in found:
            if name.split(".")[0] == "godwit":
                yield getattr(node, "lineno", 0), name


def cython_imports(text: str, package: str) -> Iterator[tuple[int, str]]:
    """The same for Cython source, with cimports."""
    for match in CYTHON_IMPORT.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        if match["modules"]:
            found = _names(match["modules"])
        else:
            dots = len(match["base"]) - len(match["base"].lstrip("."))
            found = _from(_absolute(match["base"][dots:], dots, package), _names(match["names"]))
        for name in found:
            if name.split(".")[0] == "godwit":
                yield line, name


def room_of(module: str) -> str | None:
    """The room that a full module name lies in; None for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else None


def upward(room: str, imports: Iterator[tuple[int, str]]) -> list[str]:
    """The imports that a module of ``room`` must not have, as ``line: name``."""
    return [
        f"{line}: {name}"
        for line, name in imports
        if (target := room_of(name)) is not None and target != room and target not in ROOMS[room]
    ]


def _package(path: Path) -> str:
    return ".".join(("godwit", *path.parent.relative_to(PACKAGE).parts))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    parts = path.relative_to(PACKAGE).parts
    read = python_imports if path.suffix in (".py", ".pyi") else cython_imports
    imports = read(path.read_text(encoding="utf-8"), _package(path))
    if len(parts) == 1:
        # The package itself holds constants and imports no room.
        assert not [name for _, name in imports if room_of(name)]
        return
    assert parts[0] in ROOMS, f"{path} lies in no room of the house"
    assert upward(parts[0], imports) == []


@pytest.mark.parametrize("room", sorted(PURE_PYTHON))
def test_libraries_are_pure_python(room: str) -> None:
    assert not [*(PACKAGE / room).rglob("*.pyx"), *(PACKAGE / room).rglob("*.pxd")]


@pytest.mark.parametrize(
    ("read", "room", "text", "expected"),
    [
        (python_imports, "net", "import godwit.daemon.log", ["1: godwit.daemon.log"]),
        (python_imports, "net", "from godwit import cli, repair", ["1: godwit.cli"]),
        (python_imports, "net", "def f():\n    from godwit.lab import netns", ["2: godwit.lab"]),
        (python_imports, "net", "from ..daemon import log", ["1: godwit.daemon"]),
        (python_imports, "repair", "from .. import net", ["1: godwit.net"]),
        (python_imports, "repair", "import godwit.dataplane.state", ["1: godwit.dataplane.state"]),
        (python_imports, "daemon", "importlib.import_module('godwit.cli.main')", ["1: godwit.cli.main"]),
        (python_imports, "lab", "run([sys.executable, '-m', 'godwit.cli.main'])", []),
        (python_imports, "daemon", "from godwit import __version__\nfrom godwit.net import config", []),
        (python_imports, "net", "from . import arp\nfrom .dhcp import x\nimport os", []),
        (cython_imports, "dataplane", "from godwit.net.state cimport x", ["1: godwit.net.state"]),
        (cython_imports, "dataplane", "\ncimport godwit.net.state as s, godwit.dataplane.tcp", ["2: godwit.net.state"]),
        (cython_imports, "dataplane", "cdef f():\n    from ..net cimport (a,\n  b)", ["2: godwit.net"]),
        (cython_imports, "dataplane", "from godwit cimport lab, dataplane", ["1: godwit.lab"]),
        (cython_imports, "dataplane", "from godwit.dataplane.memory cimport m\nfrom libc.stdint cimport uint8_t", []),
    ],
)
def test_the_reader_sees(read: object, room: str, text: str, expected: list[str]) -> None:
    assert callable(read)
    assert upward(room, read(text, f"godwit.{room}")) == expected
