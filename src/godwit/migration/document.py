# SPDX-License-Identifier: GPL-2.0-or-later
"""Documentation from declarations: Markdown for records and versions, a diagram of the life cycle."""

from __future__ import annotations

from typing import Any

from godwit.migration.entries import Entries
from godwit.migration.layout import anchor
from godwit.migration.lifecycle import TABLE, State
from godwit.migration.section import Array, Field, Kind, Record, Scalars, Section
from godwit.migration.version import Version


def lifecycle_diagram() -> str:
    """The table of states as a Mermaid state diagram."""
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {State.NEW.name}"]
    lines += [f"    {before.name} --> {after.name}: {event.value}" for (before, event), after in TABLE.items()]
    lines += [f"    {State.CLOSED.name} --> [*]", "```"]
    return "\n".join(lines)


def lifecycle_states() -> str:
    """What holds in each state, as a Markdown table."""
    rows = [f"| {state.name} | {state.value} |" for state in State]
    return "\n".join(["| state | what holds, and what may come next |", "| --- | --- |", *rows])


def record_table(record: Record[Any]) -> str:
    """The fields of a record, as a Markdown table; nested records have tables of their own."""
    lines = [
        f"{record.doc} {record.size} bytes, no padding.".strip(),
        "",
        "| offset | bytes | field | kind | meaning |",
        "| ---: | ---: | --- | --- | --- |",
    ]
    offset = 0
    for field in record.fields:
        meaning = "; ".join(filter(None, (field.doc, field.rule)))
        lines.append(f"| {offset} | {field.kind.size} | `{field.name}` | {_kind_name(field)} | {meaning} |")
        offset += field.kind.size
    return "\n".join(lines)


def stages_list(version: Version[Any]) -> str:
    """The stages of a version in order, as a Markdown list."""
    lines = []
    for number, stage in enumerate(version.stages, 1):
        size = f" {stage.record.size} bytes." if isinstance(stage, Section) else ""
        lines.append(f"{number}. **{stage.name}**: {stage.doc}{size}")
    return "\n".join(lines)


def entries_table(stage: Entries[Any]) -> str:
    """The kinds of a stage of entries, as a Markdown table."""
    lines = ["| type | entry | unknown, it is | what is in it |", "| ---: | --- | --- | --- |"]
    for kind in stage.kinds:
        rule = "refused" if kind.required else "passed over"
        layout = "; ".join(element.describe() for element in kind.layout)
        lines.append(f"| {kind.type} | **{kind.name}** | {rule} | {kind.doc} {layout[:1].upper()}{layout[1:]}. |")
    lines.append("| 0 | **end** | | The CRC-32 of all entries before it (u32). |")
    return "\n".join(lines)


def _kind_name(field: Field) -> str:
    kind: Kind = field.kind
    count = ""
    while isinstance(kind, Array):
        count = f"[{kind.count}]{count}"
        kind = kind.kind
    name = kind.name if isinstance(kind, Scalars) else f"[{kind.name}](#{anchor(kind.name)})"
    return name + count
