#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""How far the data plane's one thread is from its limit when streams go both ways at once.

Behind the embedded guest, as in ``godwit bench``, whose process has the guest's
front-end and both ends of the streams. What one thread could carry if it had a
processor for itself is reckoned from what a GiB costs it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import sys
import time
from collections.abc import Iterator

from godwit.lab._tcp import Receiver, Sender
from godwit.lab.bench import Bed, Side, Working
from godwit.lab.netns import enter_user_namespace

STREAMS = (1, 4, 16)  # each way
GIB = 1 << 30


@contextlib.contextmanager
def connections(side: Side, count: int) -> Iterator[tuple[list[socket.socket], list[socket.socket]]]:
    """The guest's ends and the server's of so many connections."""
    guests, servers = [], []
    with contextlib.ExitStack() as stack:
        with side.server.enter():
            listening = stack.enter_context(socket.create_server(("", 0)))
        for _ in range(count):
            with side.space.enter():
                address = side.server_addr, listening.getsockname()[1]
                guests.append(stack.enter_context(socket.create_connection(address, 5)))
            servers.append(stack.enter_context(listening.accept()[0]))
        for sock in (*guests, *servers):
            sock.setblocking(True)
        yield guests, servers


def threads(pid: int) -> dict[str, float]:
    """Processor seconds of each thread of a process (/proc/PID/task/TID/schedstat)."""
    times = {}
    for tid in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{tid}/schedstat", encoding="ascii") as file:
            times[tid] = int(file.read().split()[0]) / 1e9
    return times


def measure(side: Side, pid: int, count: int, seconds: float) -> dict[str, float]:
    """Send as much as goes over ``count`` connections each way."""
    with connections(side, 2 * count) as (guests, servers):
        ends = [
            (Sender([s.fileno() for s in source]), Receiver([s.fileno() for s in target]))
            for source, target in ((guests[:count], servers[:count]), (servers[count:], guests[count:]))
        ]
        working = [Working(end.run) for pair in ends for end in reversed(pair)]
        time.sleep(seconds / 4)
        began, others, before = time.monotonic(), time.process_time(), threads(pid)
        bytes_before = [sum(receiver.bytes) for _, receiver in ends]
        time.sleep(seconds)
        took, others, after = time.monotonic() - began, time.process_time() - others, threads(pid)
        up, down = (sum(receiver.bytes) - b for (_, receiver), b in zip(ends, bytes_before, strict=True))
        for pair in ends:
            for end in pair:
                end.stop()
        for thread in working:
            thread.result()
    shares = sorted(((after[tid] - before.get(tid, 0.0)) / took for tid in after), reverse=True)
    gib = (up + down) / GIB
    return {
        "up Gbit/s": up * 8 / took / 1e9,
        "down Gbit/s": down * 8 / took / 1e9,
        "busiest thread, CPU s/s": shares[0],
        "front-end and ends, CPU s/s": others / took,
        "other threads, CPU s/s": sum(shares[1:]),
        "CPU s/GiB": shares[0] * took / gib,
        "one thread's limit, Gbit/s": gib * GIB * 8 / 1e9 / (shares[0] * took),
    }


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="S", help="of each measurement")
    parser.add_argument("--mtu", type=int, default=65520)
    options = parser.parse_args()
    enter_user_namespace()
    results: dict[int, list[dict[str, float]]] = {}
    load = os.getloadavg()[0]
    with Bed(options.mtu, ("godwit",)) as bed:
        side = bed.sides["godwit"]
        for count in STREAMS:
            results[count] = [measure(side, side._pid, count, options.seconds) for _ in range(options.rounds)]
    head = list(next(iter(results.values()))[0])
    sys.stdout.write(f"MTU {options.mtu}, load {load:.1f} to {os.getloadavg()[0]:.1f}\n\n")
    sys.stdout.write(f"| streams each way | {' | '.join(head)} |\n{'|---' * (len(head) + 1)}|\n")
    for count, rounds in results.items():
        cells = []
        for metric in head:
            values_of = [values[metric] for values in rounds]
            cells.append(f"{statistics.median(values_of):.2f} ({min(values_of):.2f}..{max(values_of):.2f})")
        sys.stdout.write(f"| {count} | {' | '.join(cells)} |\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
