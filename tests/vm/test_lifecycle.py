# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU guests outlive their back-end, back-ends their guest, and connections that either stands still for a while."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable

from godwit.lab.errors import LabError
from godwit.lab.netns import wait_until
from godwit.lab.qemu import QemuGuest

from .conftest import Traffic, World


def uptime(guest: QemuGuest) -> float:
    return float(guest.agent.run("cat /proc/uptime").split()[0])


def comes_online(world: World, guest: QemuGuest, seconds: float = 30.0) -> float:
    """Wait until a transfer of the guest's succeeds; how long that took."""
    began = time.monotonic()
    while True:
        with contextlib.suppress(LabError):
            job = guest.agent.get(world.net.server.addr4, world.peer.port, 1, 1_000_000)
            result = guest.agent.wait(job, seconds)
            if result.ok:
                return time.monotonic() - began
        assert time.monotonic() - began < seconds


def test_the_guest_outlives_its_back_end_and_the_other_way_round(world: World) -> None:
    path = os.path.join(world.folder, "link")
    first = world.backend("a")
    os.symlink(first.socket, path)
    words = ["-chardev", f"socket,id=c0,path={path},reconnect-ms=200", "-netdev", "vhost-user,id=n0,chardev=c0"]
    with QemuGuest(words) as guest:
        guest.wait_network()
        booted = uptime(guest)
        echo = guest.agent.echo(world.net.server.addr4, world.peer.port, 3)
        first.kill()
        second = world.backend("a")
        os.unlink(path)
        os.symlink(second.socket, path)
        comes_online(world, guest)
        # What was open is reset when the guest next uses it.
        answers = guest.agent.check(echo, 10.0)
        assert (answers.alive, answers.failed) == (0, 3), answers
        assert uptime(guest) > booted
        # Once more: the back-end ends in good order, and its end leaves nothing that the next would stumble over.
        second.terminate()
        assert second.wait(10.0) == 0, second.messages()
        third = world.backend("a")
        os.unlink(path)
        os.symlink(third.socket, path)
        comes_online(world, guest)
        guest.agent.put(world.net.server.addr4, world.peer.port, 4)
        guest.qemu.kill()
    with QemuGuest(words) as guest:
        guest.wait_network()
        comes_online(world, guest)
    assert "Traceback" not in third.messages()


def test_either_stands_still_for_a_while(world: World) -> None:
    """Stopped: the guest, the back-end, both as when the host is suspended. Nothing is lost."""
    guest = world.boot()
    traffic = Traffic(world, inbound=True)

    def both(stop: bool) -> None:
        if stop:
            guest.qemu.qmp.command("stop")
            world.source.stop()
        else:
            world.source.resume()
            guest.qemu.qmp.command("cont")

    ways: list[tuple[Callable[[], object], Callable[[], object]]] = [
        (lambda: guest.qemu.qmp.command("stop"), lambda: guest.qemu.qmp.command("cont")),
        (world.source.stop, world.source.resume),
        (lambda: both(True), lambda: both(False)),
    ]
    for stop, go_on in ways:
        stop()
        time.sleep(4.0)
        go_on()
        traffic.flowing()
    # And the guest asleep (S3): its driver stops the rings and sets them up anew.
    asleep = threading.Thread(target=guest.agent.run, args=("echo mem > /sys/power/state",))
    asleep.start()
    wait_until(lambda: guest.qemu.status() == "suspended", "the guest to fall asleep", 20.0)
    time.sleep(2.0)
    guest.qemu.qmp.command("system_wakeup")
    asleep.join(30.0)
    assert not asleep.is_alive()
    traffic.flowing()
    traffic.finish()
