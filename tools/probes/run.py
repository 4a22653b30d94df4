#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Measure what else the data plane's system calls could be: ``make probes``.

Each group but one is a way of doing something, first as the data plane does it, and
others. All are measured one after the other in each round, every second round in
the opposite order, and the medians are given with the least and the most. The
plane and the far end (``probe.h``) are in two network namespaces, or both in one,
on the loopback interface (``--loopback``). The group ``moving`` is what the system
calls of a migration take for each connection.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from godwit.lab.netns import SERVER4, Host, Network, enter_user_namespace

SOURCES = Path(__file__).resolve().parent
PROGRAM = SOURCES.parent.parent / "build" / "probes" / "plane"
PORT = 7000

# By group: the work, and by title the options of a way to do it.
GROUPS: dict[str, dict[str, dict[str, str]]] = {
    "io_uring": {
        work: {
            "epoll": "",
            "io_uring": "engine=uring",
            **({"io_uring, receives posted": "engine=posted"} if work == "rr" else {}),
            "io_uring, SQPOLL": "engine=uring sqpoll=1",
        }
        for work in ("rr", "up", "down")
    },
    "zerocopy": {
        "up": {
            f"{size >> 10} KiB{title}": f"batch={size}{option}"
            for size in (1 << 16, 1 << 18, 1 << 20)
            for title, option in (("", ""), (", MSG_ZEROCOPY", " zerocopy=1"))
        }
    },
    "receive": {
        "rr": {"peek, discard": "", "read once": "take=read"},
        "down": {
            "peek, discard": "",
            "read once": "take=read",
            "read once, keep a copy": "take=copy",
            "splice": "take=splice",
        },
    },
    "calls": {"rr": {"one call": "", "one more, for what was sent": "tell_sent=1"}},
    "frames": {
        "down": {
            f"{count} frame{'s' * (count > 1)} of {size} a call": f"frames={count} frame={size}"
            for size, counts in ((65536, (1, 4, 16)), (1448, (1, 16, 64)))
            for count in counts
        }
    },
    "polling": {
        "rr": {
            "sleep": "",
            **{f"look for {n} us": f"spin={n}" for n in (20, 50, 100)},
            "50 us, unless others want the processor": "spin=50 adapt=1",
            "SO_BUSY_POLL 50 us": "busy_poll=50",
        }
    },
}
# Guest and far end are on the first processor. How long a wake-up takes, and whom it costs, hangs on where the
# plane is: with them, or on the second. Whoever is left to the scheduler changes between the two.
ON_FIRST = ("taskset", "-c", "0")
PLACES = {"rr": {"on their processor": 0, "on one of its own": 1}, "up": {"": 1}, "down": {"": 1}}
HIDDEN = {"threads", "NAPI id", "notices"}
MOVING, MOVED, QUEUED = "moving", 1000, (0, 24 * 1024)  # connections, and bytes that are queued on each


def build() -> None:
    """Compile the probe, if it is older than its sources."""
    sources = sorted(SOURCES.glob("*.[ch]"))
    if PROGRAM.exists() and PROGRAM.stat().st_mtime > max(source.stat().st_mtime for source in sources):
        return
    PROGRAM.parent.mkdir(parents=True, exist_ok=True)
    command = [os.environ.get("CC", "cc"), "-std=c11", "-O2", "-Wall", "-Wextra", "-o", str(PROGRAM)]
    subprocess.run([*command, *(str(source) for source in sources if source.suffix == ".c")], check=True)


@contextlib.contextmanager
def places(mtu: int, loopback: bool) -> Iterator[tuple[Host, str]]:
    """Where the plane runs, and the far end's address."""
    with Network(mtu=mtu) as net:
        far = net.a if loopback else net.server
        process = far.popen([*ON_FIRST, str(PROGRAM), "far", str(PORT)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        with process.stdout:
            process.stdout.readline()
            yield net.a, "127.0.0.1" if loopback else SERVER4


def measure(place: Host, address: str, work: str, options: str, seconds: float) -> dict[str, float]:
    """One measurement: values by metric."""
    command = [*ON_FIRST, str(PROGRAM), work, address, str(PORT), *options.split(), f"seconds={seconds}"]
    values: dict[str, float] = json.loads(place.run(*command, timeout=seconds + 30).stdout)
    return values


def cell(values: list[float]) -> str:
    """Median, least and most."""

    def short(value: float) -> str:
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) >= 0.001 else "0"

    least, median, most = min(values), statistics.median(values), max(values)
    return short(median) if short(least) == short(most) else f"{short(median)} ({short(least)}..{short(most)})"


def table(work: str, title: str, results: dict[str, list[dict[str, float]]]) -> str:
    """A table in Markdown; CPU of the first row is 1."""
    ways = list(results)
    metrics = [m for m in dict.fromkeys(m for rounds in results.values() for m in rounds[0]) if m not in HIDDEN]
    cost = "CPU us" if work == "rr" else "CPU s/GiB"
    first = statistics.median(values[cost] for values in results[ways[0]])
    lines = [f"| {title} | {' | '.join(metrics)} | CPU : first's |", "|---" * (len(metrics) + 2) + "|"]
    for way, rounds in results.items():
        cells = [cell([values[m] for values in rounds]) if m in rounds[0] else "" for m in metrics]
        ratio = statistics.median(values[cost] for values in rounds) / first
        lines.append(f"| {way} | {' | '.join(cells)} | {ratio:.2f} |")
    return "\n".join(lines)


def moving(place: Host, rounds: int) -> str:
    """A table in Markdown."""
    lines = []
    for queued in QUEUED:
        command = (*ON_FIRST, str(PROGRAM), MOVING, str(MOVED), str(queued))
        found = [json.loads(place.run(*command).stdout) for _ in range(rounds)]
        cells = [cell([values[metric] for values in found]) for metric in found[0]]
        if not lines:
            lines = [f"| bytes queued | {' | '.join(found[0])} |", "|---" * (len(cells) + 1) + "|"]
        lines.append(f"| {queued} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    known = (*GROUPS, MOVING)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(known)}; all if none is named")
    parser.add_argument("--rounds", type=int, default=9, metavar="N")
    parser.add_argument("--seconds", type=float, default=0.5, metavar="S", help="of each measurement")
    parser.add_argument("--mtu", type=int, default=1500)
    parser.add_argument("--loopback", action="store_true", help="both ends in one namespace, on its loopback interface")
    parser.add_argument("--json", metavar="FILE", help="write every value to this file")
    options = parser.parse_args()
    if unknown := set(options.groups) - set(known):
        parser.error(f"no such group: {', '.join(sorted(unknown))}")
    enter_user_namespace()
    build()
    everything: dict[str, dict[str, dict[str, list[dict[str, float]]]]] = {}
    with places(options.mtu, options.loopback) as (place, address):
        if not options.groups or "receive" in options.groups:
            sys.stdout.write(f"TCP_ZEROCOPY_RECEIVE: {measure(place, address, 'map', '', options.seconds)}\n\n")
        if not options.groups or MOVING in options.groups:
            sys.stdout.write(f"{MOVING}\n\n{moving(place, options.rounds)}\n\n")
        for group in [group for group in GROUPS if not options.groups or group in options.groups]:
            for work, ways in GROUPS[group].items():
                for where, cpu in PLACES[work].items():
                    title = f"{work}, {where}" if where else work
                    results: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
                    began, load = time.monotonic(), os.getloadavg()[0]
                    for number in range(options.rounds):
                        for way in list(ways) if number % 2 == 0 else reversed(ways):
                            words = f"{ways[way]} cpu={cpu}"
                            results[way].append(measure(place, address, work, words, options.seconds))
                    everything.setdefault(group, {})[title] = results
                    took = f"{time.monotonic() - began:.0f} s, load {load:.1f} to {os.getloadavg()[0]:.1f}"
                    sys.stdout.write(f"{group}, {took}\n\n{table(work, title, results)}\n\n")
                    sys.stdout.flush()
    if options.json:
        Path(options.json).write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
