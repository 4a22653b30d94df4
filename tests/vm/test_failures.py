# SPDX-License-Identifier: GPL-2.0-or-later
"""A migration fails, at each point where QEMU can make it: the guest goes on where it was.

After each failure all connections of the source's guest work, and the next
migration succeeds.
"""

from __future__ import annotations

import time

import pytest

from godwit.lab.qemu import Attempt

from .conftest import Traffic, World


@pytest.fixture
def traffic(world: World) -> Traffic:
    """Boot the guest and open its connections."""
    world.boot()
    return Traffic(world)


def goes_on(world: World, traffic: Traffic) -> None:
    """See that the guest's connections work where it is, and survive a migration now."""
    assert world.guest.qemu.status() == "running"
    traffic.flowing()
    world.move(delay=0.2)
    traffic.finish()


def test_cancelled_in_pre_switchover(world: World, traffic: Traffic) -> None:
    target, _ = world.target()
    for pause in (0, 1):
        attempt = world.attempt(target)
        time.sleep(pause)
        attempt.cancel()
        traffic.flowing()
    goes_on(world, traffic)


def test_target_killed_before_the_load(world: World, traffic: Traffic) -> None:
    target, _ = world.target()
    attempt = world.attempt(target)
    target.kill()
    attempt.go_on()
    attempt.failed()
    goes_on(world, traffic)


def test_target_killed_during_the_load(world: World, traffic: Traffic) -> None:
    target, _ = world.target()
    attempt = world.attempt(target)
    target.stop()  # so that the load begins, and never ends
    attempt.go_on()
    time.sleep(1)
    target.kill()
    attempt.failed()
    goes_on(world, traffic)


def loaded(world: World) -> Attempt:
    """Migrate up to where QEMU has said ``completed`` and the target's guest waits to be let run."""
    target, _ = world.target()
    attempt = world.attempt(target, paused=True)
    attempt.go_on()
    assert attempt.ended()
    attempt.loaded()
    return attempt


def test_target_killed_after_the_load(world: World, traffic: Traffic) -> None:
    attempt = loaded(world)
    world.backends[-1].kill()
    time.sleep(0.5)
    attempt.back()
    goes_on(world, traffic)


def test_target_qemu_killed_in_pre_switchover(world: World, traffic: Traffic) -> None:
    target, _ = world.target()
    attempt = world.attempt(target)
    attempt.target.kill()
    attempt.go_on_if_it_can()
    attempt.failed()
    goes_on(world, traffic)


def test_target_qemu_killed_during_the_load(world: World, traffic: Traffic) -> None:
    target, _ = world.target()
    attempt = world.attempt(target)
    target.stop()
    attempt.go_on()
    time.sleep(1)
    attempt.target.kill()
    target.resume()
    attempt.failed()
    goes_on(world, traffic)


def test_target_qemu_killed_after_the_load(world: World, traffic: Traffic) -> None:
    """The target had everything, and its front-end is gone: not a packet may have come from there."""
    attempt = loaded(world)
    attempt.target.kill()
    time.sleep(0.5)
    attempt.back()
    goes_on(world, traffic)


def test_loaded_and_called_off_late(world: World, traffic: Traffic) -> None:
    """As libvirt does when its last step fails: seconds after ``completed``."""
    attempt = loaded(world)
    time.sleep(3)
    attempt.back()
    goes_on(world, traffic)


def test_let_run_late(world: World, traffic: Traffic) -> None:
    """The target's guest waits for seconds, then runs."""
    attempt = loaded(world)
    time.sleep(3)
    attempt.target.qmp.command("cont")
    attempt.arrived()
    world.moved(world.backends[-1], "b")
    traffic.flowing()
    goes_on(world, traffic)


def test_target_without_helper(world: World, traffic: Traffic) -> None:
    """The guest migrates; its connections are reset promptly, and new ones work."""
    world.move(helper=None)
    traffic.all_reset()
    fresh = Traffic(world)
    fresh.finish()


def test_source_without_helper(world: World) -> None:
    world.boot(helper=None)
    traffic = Traffic(world)
    world.move()
    traffic.all_reset()
    fresh = Traffic(world)
    fresh.finish()


def test_helper_of_the_source_killed(world: World, traffic: Traffic) -> None:
    """Killed in pre-switchover: the save fails, the guest goes on, and can move once there is a helper."""
    target, _ = world.target()
    attempt = world.attempt(target)
    world.source.kill_helper()
    attempt.go_on()
    attempt.failed()
    traffic.flowing()
    world.source.start_helper()
    goes_on(world, traffic)
