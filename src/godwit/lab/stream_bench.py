# SPDX-License-Identifier: GPL-2.0-or-later
"""TCP throughput in stream mode, godwit beside passt, each with the same guest behind it.

By hand: ``python -m godwit.lab.stream_bench [--rounds N] [--seconds S] [--mtus M,...]``
prints a table: for each MTU and direction the median over the rounds, in Gbit/s,
with the least and the most, their ratio, and the processor time that each
program took for a second. A transfer that does not end counts as 0, and is told.
Every second round begins with the other program, so that what the machine does
meanwhile meets both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

from godwit.lab.backend import KINDS, Backend
from godwit.lab.errors import LabError
from godwit.lab.guest import StreamGuest
from godwit.lab.netns import Network, enter_user_namespace

PORT = 5001
UP, DOWN = "up", "down"  # from the guest, to the guest
_PATIENCE = 8.0  # seconds after which a transfer that has not ended is taken for one that never will

# Both ends are as thin as they can be. The client says in its first byte which way it goes.
_SERVER = """
import socket, sys, time
listening = socket.create_server(("", int(sys.argv[1])))
print("ready", flush=True)
buffer = bytearray(1 << 20)
while True:
    sock, _ = listening.accept()
    with sock:
        if sock.recv(1) == b"u":
            while sock.recv_into(buffer):
                pass
        else:
            end = time.monotonic() + float(sys.argv[2])
            try:
                while time.monotonic() < end:
                    sock.sendall(buffer)
            except ConnectionError:
                pass
"""
_CLIENT = """
import socket, sys, time
buffer = bytearray(1 << 20)
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as sock:
    began = time.monotonic()
    sock.sendall(sys.argv[3][:1].encode())
    total = 0
    if sys.argv[3] == "up":
        while time.monotonic() < began + float(sys.argv[4]):
            total += sock.send(buffer)
        sock.shutdown(socket.SHUT_WR)
        sock.recv(1)
    else:
        while got := sock.recv_into(buffer):
            total += got
    print(total / (time.monotonic() - began) * 8 / 1e9)
"""


def _processor_time(pid: int) -> float:
    """Seconds that a process has run so far."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(net: Network, folder: str, kind: str, mtu: int, seconds: float) -> dict[str, tuple[float, float]]:
    """Return Gbit/s and processor time per second, by direction, of one program with a guest of its own."""
    found = {}
    with (
        Backend(net.a, folder, kind, stream=True, arguments=["--mtu", str(mtu)]) as backend,
        StreamGuest(mtu=mtu) as guest,
    ):
        guest.connect(backend.socket)
        guest.configure()
        for direction in (UP, DOWN):
            before, began = _processor_time(backend.pid), time.monotonic()
            words = [sys.executable, "-c", _CLIENT, net.server.addr4, str(PORT), direction, str(seconds)]
            try:
                rate = float(guest.run(*words, timeout=seconds + _PATIENCE).stdout)
            except subprocess.TimeoutExpired:
                rate = 0.0
            found[direction] = rate, (_processor_time(backend.pid) - before) / (time.monotonic() - began)
        guest.check()
    return found


def main() -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m godwit.lab.stream_bench", description=main.__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--mtus", default="65520,1500")
    given = parser.parse_args()
    try:
        enter_user_namespace()
        with Network() as net, tempfile.TemporaryDirectory() as folder:
            os.chmod(folder, 0o755)
            words = [sys.executable, "-c", _SERVER, str(PORT), str(given.seconds)]
            server = net.server.popen(words, stdout=subprocess.PIPE)
            assert server.stdout is not None
            server.stdout.readline()
            for mtu in map(int, given.mtus.split(",")):
                results: dict[tuple[str, str], list[tuple[float, float]]] = {}
                for number in range(given.rounds):
                    for kind in KINDS if number % 2 == 0 else reversed(KINDS):
                        for direction, value in measure(net, folder, kind, mtu, given.seconds).items():
                            results.setdefault((direction, kind), []).append(value)
                for direction in (UP, DOWN):
                    sys.stdout.write(f"{_row(mtu, direction, results)}\n")
                    sys.stdout.flush()
    except LabError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _row(mtu: int, direction: str, results: dict[tuple[str, str], list[tuple[float, float]]]) -> str:
    cells, medians = [], []
    for kind in KINDS:
        rates, times = zip(*results[direction, kind], strict=True)
        medians.append(statistics.median(rates))
        stalled = f", {rates.count(0.0)} stalled" if 0.0 in rates else ""
        span = f"({min(rates):.1f} to {max(rates):.1f}{stalled})"
        cells.append(f"{kind} {medians[-1]:.2f} Gbit/s {span}, {statistics.median(times):.2f} s/s")
    ratio = medians[0] / medians[1] if medians[1] else float("inf")
    return f"MTU {mtu:5} {direction:4}: {'; '.join(cells)}; ratio {ratio:.2f}"


if __name__ == "__main__":
    sys.exit(main())
