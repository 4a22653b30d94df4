# SPDX-License-Identifier: GPL-2.0-or-later
"""A program in a QEMU guest asks the whole world for connections, or sends it datagrams: the guest's own go on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from godwit.lab.netns import SERVER4, wait_until
from godwit.lab.size import Size

from .conftest import Traffic, World

SPRAY = Path(__file__).with_name("spray.c")
RATE = 2000  # a guest without KVM does no more
SECONDS = 10
PORT = 8000


@pytest.mark.parametrize("kind", ["syn", "udp"])
def test_connections_beside_a_spray(world: World, tmp_path: Path, kind: str) -> None:
    """With no more than its limits say; and with new connections, which find their place all the same."""
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-O2", "-static", "-o", str(tmp_path / "spray"), str(SPRAY)], check=True, timeout=60)
    guest = world.boot(arguments=["--max-half-open", "300", "--max-udp-flows", "400"])
    serving = [sys.executable, "-m", "http.server", "-d", str(tmp_path), "-b", SERVER4, str(PORT)]
    server = world.net.server.popen(serving, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:

        def fetched() -> bool:
            return "spray" in guest.agent.run(
                f"wget -qO /tmp/spray http://{SERVER4}:{PORT}/spray; ls /tmp", check=False
            )

        wait_until(lambda: fetched() and "+" in guest.agent.run("test -s /tmp/spray && echo +", check=False), "spray")
    finally:
        server.kill()
    guest.agent.run("chmod +x /tmp/spray")
    traffic = Traffic(world)
    guest.agent.run(f"(/tmp/spray {kind} {RATE} {SECONDS} >/tmp/said 2>&1 &)")
    for _ in range(3):
        traffic.flowing()
        job = guest.agent.get(SERVER4, world.peer.port, 7, 100_000)
        assert guest.agent.wait(job, 30.0).ok
    assert Size.of(world.source.pid).descriptors < 900
    wait_until(lambda: "sent" in guest.agent.run("cat /tmp/said"), "the end of the spray", timeout=60.0, interval=0.5)
    sent = re.match(r"(\d+) sent", guest.agent.run("cat /tmp/said"))
    assert sent is not None
    assert int(sent[1]) > 1000
    traffic.finish()
    assert world.source.running
