# SPDX-License-Identifier: GPL-2.0-or-later
"""The table of requests as Markdown: ``python -m godwit.vhost_user.doc FILE`` brings it up to date in FILE."""

from __future__ import annotations

import sys
from pathlib import Path

from godwit.vhost_user.messages import ROWS, Row, When
from godwit.vhost_user.payloads import Payload

BEGIN = "<!-- made by python -m godwit.vhost_user.doc: begin -->"
END = "<!-- made by python -m godwit.vhost_user.doc: end -->"

_WHEN = {
    When.OWNED: "owned",
    When.SUSPENDED: "suspended",
    When.RING_STOPPED: "ring stopped",
    When.RING_SET_UP: "ring set up",
    When.TRANSFER: "transfer",
}


def request_table() -> str:
    """The requests that are supported, then the names of those that are only known."""
    lines = [
        "| | request | payload, bytes | fds | needs | legal when | reply | device's method |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(_line(row) for row in ROWS if row.supported),
        "",
        "Known, and refused: "
        + ", ".join(f"{row.name} ({row.request.value})" for row in ROWS if not row.supported)
        + ".",
    ]
    return "\n".join(lines)


def update(text: str) -> str:
    """A document with the table between its markers made anew; ``ValueError`` if it has no markers."""
    head, begin, rest = text.partition(BEGIN)
    _old, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError("the markers for the table are missing")
    return f"{head}{BEGIN}\n\n{request_table()}\n\n{END}{tail}"


def _line(row: Row) -> str:
    least, most = row.fds
    needs = [
        *(f"`{bit.name}` offered" for bit in row.feature),
        *(f"`{bit.name}`" for bit in row.protocol),
    ]
    when = [text for condition, text in _WHEN.items() if condition in row.when]
    cells = [
        str(row.request.value),
        f"`{row.name}`",
        _payload(row.payload),
        str(least) if least == most else f"{least} to {most}",
        ", ".join(needs),
        ", ".join(when) or "always",
        "acknowledgement" if row.reply is None else _payload(row.reply),
        f"`{row.handler}`" if row.handler else "the session",
    ]
    return f"| {' | '.join(cells)} |"


def _payload(kind: type[Payload]) -> str:
    sizes = sorted(kind.sizes)
    if sizes == [0]:
        return "none"
    if len(sizes) > 2:
        return f"`{kind.__name__}`, {sizes[0]} to {sizes[-1]}"
    return f"`{kind.__name__}`, {' or '.join(map(str, sizes))}"


def main(paths: list[str]) -> None:
    for path in map(Path, paths):
        path.write_text(update(path.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
