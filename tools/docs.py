#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Write the generated parts of the documentation anew: ``tools/docs.py``.

A generated part stands between ``<!-- generated: NAME -->`` and
``<!-- end -->``; the rest of each page is written by hand. A test compares
the pages with the declarations, and with the results of the bench that are kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from godwit.lab import bench_chart, bench_report
from godwit.lab.bench import Results
from godwit.migration.document import entries_table, lifecycle_diagram, lifecycle_states, record_table, stages_list
from godwit.net import handover, native
from godwit.net.records import FLOW, OBSERVED, SIDE, SOCKET
from godwit.net.told import TOLD
from godwit.net.versions import versions

DOCS = Path(__file__).resolve().parent.parent / "docs"


def measured(make: Callable[[Results], str]) -> Callable[[], str]:
    """What is made of the bench's results."""
    return lambda: make(Results.loads((DOCS / "performance.json").read_text()))


def group(name: str) -> Callable[[], str]:
    """The bench's results of one group of cases."""
    return measured(lambda results: bench_report.cases(results, name))


PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "migration.md": {
        "life cycle": lifecycle_diagram,
        "states": lifecycle_states,
    },
    "stream.md": {
        "entries": lambda: entries_table(native.ENTRIES),
        "what the guest was told": lambda: record_table(TOLD),
        "observed addresses": lambda: record_table(OBSERVED),
        "TCP flow": lambda: record_table(native.FLOW),
        "UDP port": lambda: record_table(native.UDP_PORT),
        "UDP peer": lambda: record_table(native.UDP_PEER),
        "datagram": lambda: record_table(native.WAITING),
        "ping": lambda: record_table(native.PING),
        "socket": lambda: record_table(SOCKET),
    },
    "takeover.md": {
        # The one kind that is described on another page.
        "entries": lambda: entries_table(handover.ENTRIES).replace("(#what-the", "(stream.md#what-the"),
        "process": lambda: record_table(handover.PROCESS),
        "name": lambda: record_table(handover.NAME),
        "vhost-user session": lambda: record_table(handover.SESSION),
        "descriptor": lambda: record_table(handover.DESCRIPTOR),
        "memory region": lambda: record_table(handover.REGION),
        "ring": lambda: record_table(handover.RING),
        "live TCP flow": lambda: record_table(handover.TCP),
        "live UDP port": lambda: record_table(handover.PORT),
        "live UDP peer": lambda: record_table(handover.PEER),
        "waiting datagram": lambda: record_table(handover.WAITING),
        "live ping": lambda: record_table(handover.PING),
        "partial datagram": lambda: record_table(handover.PARTIAL),
        "observed addresses": lambda: record_table(OBSERVED),
    },
    "performance.md": {
        "machine": measured(bench_report.about),
        "targets": measured(bench_report.targets),
        "limits": measured(bench_report.limits),
        "failures": measured(bench_report.failures),
        "TCP": group("tcp"),
        "UDP": group("udp"),
        "migration": group("move"),
        "the rest": group("rest"),
        "QEMU": group("qemu"),
    },
    "stream-v2.md": {
        "stages": lambda: stages_list(next(version for version in versions() if version.id == 2)),
        "observed addresses": lambda: record_table(OBSERVED),
        "flow": lambda: record_table(FLOW),
        "side": lambda: record_table(SIDE),
        "socket": lambda: record_table(SOCKET),
    },
}

# Pages and pictures that are generated as a whole.
WHOLE: dict[str, Callable[[], str]] = {"performance.svg": measured(bench_chart.svg)}

PART = re.compile(r"(<!-- generated: (?P<name>[^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def renew(page: str, text: str) -> str:
    """The text of a page with every generated part made anew."""
    return replace(page, text, PARTS[page])


def replace(page: str, text: str, parts: dict[str, Callable[[], str]]) -> str:
    """The text of a page with these parts made anew.

    :raises KeyError: a part that nothing generates, or one that the page lacks.
    """
    makers = dict(parts)
    renewed = PART.sub(lambda match: f"{match[1]}{makers.pop(match['name'])()}\n{match[3]}", text)
    if makers:
        raise KeyError(f"{page} has no part for {', '.join(makers)}")
    return renewed


def main() -> None:
    for page in PARTS:
        path = DOCS / page
        path.write_text(renew(page, path.read_text()))
    for page, make in WHOLE.items():
        (DOCS / page).write_text(make())


if __name__ == "__main__":
    main()
