#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""What ``--busy-poll`` does for transactions, with a processor for the back-end alone and without."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

from godwit.lab.backend import Kind, Program
from godwit.lab.bench import Bed
from godwit.lab.netns import enter_user_namespace
from godwit.lab.tcp_bench import transactions

ROUNDS = 9
SECONDS = 0.4
GODWIT = (
    "godwit serve --foreground --vhost-user --socket {socket} --no-map-gw --mtu {mtu}"
    " --tcp-ports {ports} --udp-ports {ports} --busy-poll "
)


def main() -> int:
    """Run the command."""
    enter_user_namespace()
    os.environ["PATH"] = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    os.sched_setaffinity(0, {0})  # the front-end, the guest and the server; the back-ends inherit it
    kinds: list[Kind] = [Program(f"busy-poll-{n}", (*GODWIT.split(), str(n))) for n in (0, 20, 50, 100)]
    kinds.append("passt")
    for cpu, where in enumerate(("on their processor", "on one of its own")):
        results: dict[Kind, list[dict[str, float]]] = {kind: [] for kind in kinds}
        with Bed(1500, kinds) as bed:
            for side in bed.sides.values():
                command = ["taskset", "--all-tasks", "--cpu-list", "--pid", str(cpu), str(side._pid)]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            for number in range(ROUNDS):
                for kind in kinds if number % 2 == 0 else reversed(kinds):
                    results[kind].append(transactions(bed.sides[kind], SECONDS))
        for kind, rounds in results.items():
            cells = []
            for metric in rounds[0]:
                values = [measured[metric] for measured in rounds]
                cells.append(f"{metric} {statistics.median(values):.0f} ({min(values):.0f}..{max(values):.0f})")
            sys.stdout.write(f"{where}, {kind}: {', '.join(cells)}\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
