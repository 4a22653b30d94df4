# SPDX-License-Identifier: GPL-2.0-or-later
"""A Linux TCP stack behind godwit in stream mode: every byte, both ways, from inside and from outside."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from godwit.lab.backend import Backend
from godwit.lab.guest import StreamGuest
from godwit.lab.netns import HOST4, HOST6, Network, wait_until
from godwit.lab.traffic import Traffic, served

INBOUND, PORT = 7000, 5001
MTUS = (1280, 1500, 65520)


class Lab:
    """A host with a back-end, a guest behind it, and a server."""

    def __init__(self, folder: Path) -> None:
        os.chmod(folder, 0o755)
        self.net = Network()
        self.folder = str(folder)
        self.server = Traffic(self.net.server)
        self.server.listen(PORT)
        self.guest = StreamGuest()

    def start(self, mtu: int) -> Backend:
        """Start a back-end and put the guest behind it."""
        backend = Backend(self.net.a, self.folder, stream=True, arguments=["-t", str(INBOUND), "-m", str(mtu)])
        self.guest.connect(backend.socket)
        self.guest.configure(mtu=mtu)
        return backend

    def close(self) -> None:
        self.guest.close()
        self.server.close()
        self.net.close()


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("mtu", MTUS)
@pytest.mark.parametrize("v6", [False, True], ids=["IPv4", "IPv6"])
def test_every_byte(lab: Lab, mtu: int, v6: bool) -> None:
    with lab.start(mtu):
        agent, server = lab.guest.agent, lab.net.server.address(v6)
        jobs = [agent.get(server, PORT, 1, 30_000_000), agent.put(server, PORT, 2, 30_000_000)]
        for job in jobs:
            here, there = agent.wait(job), lab.server.wait(served(job))
            assert here.ok, here
            assert there.ok, there
            assert (here.bytes, here.crc) == (there.bytes, there.crc)
        agent.listen(INBOUND)
        job = lab.server.put(HOST6 if v6 else HOST4, INBOUND, 3, 1_000_000)
        assert lab.server.wait(job).ok
        lab.guest.check()


def test_the_guest_is_gone_and_comes_again(lab: Lab) -> None:
    """Its connections are reset on the other side; the next one has a network like the first."""
    with lab.start(1500) as backend:
        agent, server = lab.guest.agent, lab.net.server.addr4
        job = agent.put(server, PORT, 1, rate=1_000_000)
        agent.echo(server, PORT, 5)
        wait_until(lambda: agent.status(job).bytes > 500_000, "the stream to flow")
        lab.guest.disconnect()
        assert lab.server.wait(served(job)).error == "Connection reset by peer"
        lab.guest.connect(backend.socket)
        job = agent.get(server, PORT, 3, 1_000_000)
        assert agent.wait(job).ok
