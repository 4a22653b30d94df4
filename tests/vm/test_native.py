# SPDX-License-Identifier: GPL-2.0-or-later
"""The native device state in QEMU's migration: between two godwits, refused by passt, and kept in a file."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from godwit.cli.inspect import main as inspect
from godwit.lab.qmp import migration

from .conftest import Traffic, World

NATIVE = ("--migrate-version", "native")


@pytest.mark.parametrize("delay", [0, 1])
def test_there_and_back(world: World, delay: float) -> None:
    world.boot(arguments=NATIVE)
    traffic = Traffic(world, inbound=True)
    for _ in ("there", "back"):
        world.move(delay=delay, arguments=NATIVE)
        traffic.flowing()
        assert "device state loaded: version 0x80000001" in world.source.messages()
    traffic.finish()


def test_passt_refuses_it_and_the_guest_goes_on(world: World) -> None:
    """Told to write what passt does not read: nothing is lost, and passt's version then does."""
    world.boot(arguments=("--virtio-features", "passt", *NATIVE))
    traffic = Traffic(world)
    target, _ = world.target("passt")
    attempt = world.attempt(target)
    attempt.go_on()
    attempt.failed()
    traffic.flowing()
    target.close()
    world.move(arguments=("--virtio-features", "passt"))
    traffic.flowing()
    world.move("passt", delay=0.2)
    traffic.finish()


@pytest.mark.parametrize("arguments", [(), NATIVE], ids=["version2", "native"])
def test_in_a_file_that_qemu_wrote(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    """Migrated to a file, inspected there, and let run on: nothing has happened to the connections."""
    world.boot(arguments=arguments)
    traffic = Traffic(world)
    world.source.ensure_helper()
    path = tmp_path / "vm.mig"
    qmp = world.guest.qemu.qmp

    qmp.command("migrate", uri=f"file:{path}")
    qmp.wait(migration("completed", "failed"), "the migration to a file", timeout=60)
    assert inspect(["--json", str(path)]) == 0
    names = Counter(json.loads(line)["name"] for line in capsys.readouterr().out.splitlines())
    flows = len(traffic.streams) + sum(count for _, count in traffic.echoes)
    assert names["TCP socket" if arguments else "socket"] == flows
    assert names["end"] == 1
    world.guest.cont()
    traffic.finish()
