# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests move between passt, as Debian packages it, and godwit; and between two passts.

passt goes on receiving after it has saved its state, so wherever it is the
source the network is cut first.
"""

from __future__ import annotations

import pytest

from .conftest import Traffic, World

# What passt offers too: a guest that is to move there cannot have more.
LIKE_PASST = ("--virtio-features", "passt")


def test_laboratory_with_passt_alone(world: World) -> None:
    """Shows that guest, agent, network and migration do their part, with nothing of ours in it."""
    guest = world.boot("passt")
    traffic = Traffic(world, inbound=True)
    for _ in range(2):
        world.move("passt", cut=True)
        traffic.flowing()
    traffic.finish()
    assert guest.boot_time < 15


@pytest.mark.parametrize("helper", ["godwit", "passt"])
def test_passt_to_godwit_and_back(world: World, helper: str) -> None:
    world.boot("passt", helper=helper)
    traffic = Traffic(world, inbound=True)
    world.move("godwit", cut=True, helper=helper, arguments=LIKE_PASST)
    traffic.flowing()
    world.move("passt", helper=helper)
    traffic.flowing()
    world.move("godwit", cut=True, helper=helper, arguments=LIKE_PASST)
    traffic.finish()


def test_godwit_to_passt_and_back(world: World) -> None:
    world.boot("godwit", arguments=LIKE_PASST)
    traffic = Traffic(world, inbound=True)
    world.move("passt", delay=0.5)
    traffic.flowing()
    world.move("godwit", cut=True, arguments=LIKE_PASST)
    traffic.finish()


def test_connections_end_well_at_passt(world: World) -> None:
    """Behind the real passt, with what godwit has written: both ends have every byte, and each other's end."""
    world.boot("godwit", arguments=LIKE_PASST)
    traffic = Traffic(world, inbound=True)
    world.move("passt", delay=0.2)
    traffic.finish()
