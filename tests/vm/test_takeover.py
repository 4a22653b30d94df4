# SPDX-License-Identifier: GPL-2.0-or-later
"""A QEMU guest whose back-end is replaced under it, which then migrates as if nothing had been."""

from __future__ import annotations

import pytest

from .conftest import Traffic, World


@pytest.mark.parametrize("arguments", [(), ("--migrate-version", "native")], ids=["version2", "native"])
def test_handed_over_and_migrated(world: World, arguments: tuple[str, ...]) -> None:
    """Running and paused, on the first host and on the second, and back."""
    world.boot(arguments=arguments)
    traffic = Traffic(world, inbound=True)
    for _ in ("there", "back"):
        for _ in range(2):
            world.source.hand_over()
            traffic.flowing()
        qmp = world.guest.qemu.qmp
        qmp.command("stop")
        world.source.hand_over()
        world.guest.cont()
        traffic.flowing()
        world.move(arguments=arguments)
        traffic.flowing()
    traffic.finish()


def test_a_front_end_that_comes_back(world: World) -> None:
    """QEMU resets the guest: its rings begin anew in the process that has taken over."""
    world.boot()
    world.source.hand_over()
    world.guest.qemu.qmp.command("system_reset")
    world.guest.agent.hello(60)  # which it says once, when it has booted
    world.guest.wait_network()
    world.source.hand_over()
    traffic = Traffic(world, inbound=True)
    traffic.finish()
