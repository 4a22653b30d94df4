# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU guests in stream mode: no vhost-user, no offloads, no shared memory, no migration."""

from __future__ import annotations

import os
import time

from godwit.lab.qemu import QemuGuest

from .conftest import Traffic, World, stream_netdev


def test_a_guest_is_online(world: World) -> None:
    """DHCP and a router's advertisement; streams both ways, idle connections, and from outside."""
    guest = world.boot(stream=True)
    assert "mtu 65520" in guest.agent.run("ip link show eth0")
    traffic = Traffic(world, inbound=True, rate=0)
    traffic.flowing(20_000_000)
    traffic.finish()
    # Nothing that came had a wrong checksum: nobody but the guest looks at them.
    tcp = [line.split() for line in guest.agent.run("cat /proc/net/snmp").splitlines() if line.startswith("Tcp:")]
    assert dict(zip(*tcp, strict=True))["InCsumErrors"] == "0"


def test_the_next_guest_is_served_too(world: World) -> None:
    backend = world.backend("a", stream=True)
    for seed in (1, 2):
        with QemuGuest(stream_netdev(backend.socket)) as guest:
            guest.wait_network()
            job = guest.agent.get(world.net.server.addr4, world.peer.port, seed, 1_000_000)
            assert guest.agent.wait(job).ok
            guest.agent.put(world.net.server.addr4, world.peer.port, seed)
        # Killed in the middle of a stream, and perhaps of a frame.
    assert backend.running
    assert "Traceback" not in backend.messages()


def test_the_guest_outlives_its_back_end(world: World) -> None:
    """QEMU connects again to one that was started anew, and the guest is online as before."""
    path = os.path.join(world.folder, "link")
    first = world.backend("a", stream=True)
    os.symlink(first.socket, path)
    netdev = stream_netdev(path)
    with QemuGuest([*netdev[:-1], f"{netdev[-1]},reconnect-ms=200"]) as guest:
        guest.wait_network()
        first.kill()
        second = world.backend("a", stream=True)
        os.unlink(path)
        os.symlink(second.socket, path)
        end = time.monotonic() + 30
        while True:
            job = guest.agent.get(world.net.server.addr4, world.peer.port, 1, 1_000_000)
            result = guest.agent.wait(job, 30)
            if result.ok:
                break
            assert time.monotonic() < end, result
        assert "a front-end has connected" in second.messages()
