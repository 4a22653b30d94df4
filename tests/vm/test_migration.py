# SPDX-License-Identifier: GPL-2.0-or-later
"""A QEMU guest migrates between two godwits with its connections open."""

from __future__ import annotations

import re

import pytest

from .conftest import Traffic, World


def test_online(world: World) -> None:
    """Address, name server, ping, and transfers each way over both families."""
    guest = world.boot()
    assert guest.boot_time < 15
    shown = guest.agent.run("ip addr show eth0; ip route; ip -6 route")
    assert "192.0.2.10" in shown
    assert "inet6 2001:db8:" in shown
    guest.agent.run("ping -c1 -W5 192.0.2.2")
    for server in (world.net.server.addr4, world.net.server.addr6):
        for start, length in ((guest.agent.get, 30_000_000), (guest.agent.put, 30_000_000)):
            job = start(server, world.peer.port, 5, length)
            at_guest, at_peer = guest.agent.wait(job), world.peer.wait(job)
            assert at_guest.ok, at_guest
            assert at_peer.state == "ok", at_peer
            assert at_guest.bytes == at_peer.bytes == length
            assert at_guest.crc == at_peer.crc


@pytest.mark.timeout(300)
@pytest.mark.parametrize("delay", [0, 0.2, 1, 3])
def test_there_and_back_five_times(world: World, delay: float) -> None:
    """The network switches ``delay`` seconds late, and the server sends all the time."""
    world.boot()
    traffic = Traffic(world)
    for _ in range(5):
        for _ in ("there", "back"):
            world.move(delay=delay)
            traffic.flowing()
    traffic.finish()


def segment_sizes(world: World) -> list[str]:
    """The sizes of the segments that the back-end's sockets send."""
    return sorted(re.findall(r"\bmss:(\d+)", world.net.hosts[world.here].run("ss", "-tniH").stdout))


def test_connections_from_outside(world: World) -> None:
    world.boot()
    traffic = Traffic(world, inbound=True)
    before = segment_sizes(world)
    for _ in ("there", "back"):
        world.move(delay=0.2)
        traffic.flowing()
        assert segment_sizes(world) == before
    traffic.finish()


def test_transfers_that_end_while_the_guest_moves(world: World) -> None:
    """FINs under way in the state, not only data."""
    guest = world.boot()
    server = world.net.server.addr4
    jobs = [guest.agent.get(server, world.peer.port, seed, 300_000 * seed, 1_000_000) for seed in range(1, 9)]
    jobs += [guest.agent.put(server, world.peer.port, seed, 300_000 * seed, 1_000_000) for seed in range(1, 9)]
    for _ in ("there", "back"):
        world.move(delay=0.2)
    for job in jobs:
        at_guest, at_peer = guest.agent.wait(job), world.peer.wait(job)
        assert at_guest.ok, f"job {job}: {at_guest}"
        assert at_peer.state == "ok", f"job {job}: {at_peer}"


@pytest.mark.timeout(240)
def test_a_thousand_flows(world: World) -> None:
    guest = world.boot()
    jobs = [
        guest.agent.echo(server, world.peer.port, 500) for server in (world.net.server.addr4, world.net.server.addr6)
    ]
    for _ in ("there", "back"):
        world.move(delay=0.2)
        for job in jobs:
            answers = guest.agent.check(job, 30)
            assert (answers.alive, answers.failed) == (500, 0)
