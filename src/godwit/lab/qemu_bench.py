# SPDX-License-Identifier: GPL-2.0-or-later
"""TCP streams of a QEMU guest, up and down: whether what the embedded guest shows holds for a real one.

The guests run without KVM here, on one processor each: how fast they are is mostly
how fast that is, and what counts is the processor time of the back-end.
"""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
from collections.abc import Sequence

from godwit.lab.backend import IDEAL, Backend, Kind
from godwit.lab.bench import NONE, Case, cpu, grounds
from godwit.lab.closing import Closing
from godwit.lab.errors import LabError
from godwit.lab.netns import Network
from godwit.lab.qemu import QemuGuest

PORT = 5003
MTUS = (65520, 1500)
STREAMS = (1, 4)
_MORE = 3.0  # a slow guest is given so many times the seconds that a case is given

# What floods of `Agent.flood` go to and come from.
SERVER = """
import socket, sys, threading
def serve(sock):
    buffer = bytearray(1 << 20)
    with sock:
        try:
            if sock.recv(1) == b"u":
                while sock.recv_into(buffer, 0, socket.MSG_TRUNC):
                    pass
            else:
                while True:
                    sock.sendall(buffer)
        except ConnectionError:
            pass
listening = socket.create_server(("", int(sys.argv[1])))
print("ready", flush=True)
while True:
    threading.Thread(target=serve, args=listening.accept()[:1], daemon=True).start()
"""


class QemuSide:
    """One back-end and the QEMU guest behind it."""

    def __init__(self, kind: Kind, net: Network, folder: str, cleanup: contextlib.ExitStack) -> None:
        mtu = min(net.mtu, 65520)
        self.server_addr = net.server.addr4
        self.backend = cleanup.enter_context(Backend(net.a, folder, kind, helper=None, mtu=mtu))
        self.guest = cleanup.enter_context(QemuGuest(self.backend.socket))
        self.guest.wait_network()
        self.guest.agent.run(f"ip link set eth0 mtu {mtu}")

    def check(self) -> None:
        """Raise `LabError` if the back-end is gone."""
        if not self.backend.running:
            raise LabError(f"{self.backend.name} has ended: {self.backend.messages()[-1000:]}")


class QemuBed(Closing):
    """A network at one MTU, with a guest behind each back-end. All stay up; only one is used at a time."""

    def __init__(self, mtu: int, kinds: Sequence[Kind]) -> None:
        self._cleanup = contextlib.ExitStack()
        try:
            net, folder = grounds(self._cleanup, mtu)
            server = net.server.popen([sys.executable, "-c", SERVER, str(PORT)], stdout=subprocess.PIPE)
            assert server.stdout is not None
            self._cleanup.callback(server.stdout.close)
            if server.stdout.readline() != b"ready\n":
                raise LabError("the server does not start")
            self.sides = {kind: QemuSide(kind, net, folder, self._cleanup) for kind in kinds}
        except BaseException:
            self._cleanup.close()
            raise

    def close(self) -> None:
        """Take it all down. May be repeated."""
        self._cleanup.close()


def streams(side: QemuSide, seconds: float, *, up: bool, count: int) -> dict[str, float]:
    """So many streams: how fast all together, and what they cost the back-end."""
    before = cpu(side.backend.pid)
    carried, took = side.guest.agent.flood(side.server_addr, PORT, _MORE * seconds, up=up, count=count)
    used = cpu(side.backend.pid) - before
    return {"Gbit/s": carried * 8 / took / 1e9, "CPU s/GiB": used / (carried / (1 << 30))}


CASES: tuple[Case, ...] = tuple(
    Case(
        f"qemu-{way}-{count}-{mtu}",
        f"QEMU guest, {count} stream{'s' * (count > 1)} {way}, MTU {mtu}",
        mtu,
        functools.partial(streams, up=way == "up", count=count),
        QemuBed,
        frozenset({NONE, IDEAL}),
    )
    for mtu in MTUS
    for way in ("up", "down")
    for count in STREAMS
)
