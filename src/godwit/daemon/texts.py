# SPDX-License-Identifier: GPL-2.0-or-later
"""How the control socket writes what it has to say: JSON (RFC 8259) and Prometheus's text format.

Python's own ``json`` takes a start of the daemon longer than all of this, and the daemon reads none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

_SHORT: Final = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


class Family(NamedTuple):
    """A metric: its name, its type, what it is, and its samples by their labels."""

    name: str
    kind: str  # counter or gauge
    help: str
    samples: Sequence[tuple[Mapping[str, str], float]]

    def shown(self) -> dict[str, object]:
        """For JSON."""
        samples = [{"labels": dict(labels), "value": value} for labels, value in self.samples]
        return {"name": self.name, "type": self.kind, "help": self.help, "samples": samples}


def to_json(value: object) -> str:
    """None, truth values, numbers, text, mappings with text for keys, and sequences, in one line of ASCII."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else "null"
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_quoted(name)}: {to_json(one)}" for name, one in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(map(to_json, value)) + "]"
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def _quoted(text: str) -> str:
    if text.isascii() and text.isprintable() and '"' not in text and "\\" not in text:
        return f'"{text}"'
    return '"' + "".join(map(_character, text)) + '"'


def _character(one: str) -> str:
    if one in _SHORT:
        return _SHORT[one]
    if " " <= one <= "~":
        return one
    # In UTF-16; what stands for a byte that is no UTF-8 (in a path) is half a pair, and stays one.
    units = one.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))


def exposition(families: Iterable[Family]) -> Iterator[str]:
    """Prometheus's text format, version 0.0.4, a family at a time."""
    for family in families:
        if family.samples:
            lines = [f"# HELP {family.name} {_escaped(family.help)}", f"# TYPE {family.name} {family.kind}"]
            lines += [f"{family.name}{_labels(labels)} {_number(value)}" for labels, value in family.samples]
            yield "\n".join(lines) + "\n"


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    pairs = (f'{name}="{_escaped(value).replace(chr(34), _SHORT[chr(34)])}"' for name, value in labels.items())
    return "{" + ",".join(pairs) + "}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else repr(float(value))
