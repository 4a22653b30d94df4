# SPDX-License-Identifier: GPL-2.0-or-later
"""The bench with a QEMU guest: streams each way; and what of it needs passt."""

from __future__ import annotations

from godwit.lab import tcp_bench
from godwit.lab.bench import Bed
from godwit.lab.qemu_bench import QemuBed, streams


def test_streams() -> None:
    with QemuBed(65520, ["godwit"]) as bed:
        side = bed.sides["godwit"]
        assert "mtu 65520" in side.guest.agent.run("ip link show eth0")
        for up, count in ((True, 1), (False, 1), (True, 4), (False, 4)):
            found = streams(side, 0.2, up=up, count=count)
            assert 0.01 < found["Gbit/s"] < 100
            assert 0.01 < found["CPU s/GiB"] < 100
            side.check()


def test_passt_beside_it() -> None:
    cases = {case.name: case for case in tcp_bench.CASES}
    with Bed(1500, ["passt"]) as bed:
        side = bed.sides["passt"]
        for name, metric in (
            ("stream-up-1-1500-together", "Gbit/s"),
            ("rr-together", "transactions/s"),
            ("crr-together", "connections/s"),
        ):
            values = cases[name].measure(side, 0.2)
            side.check()
            assert values[metric] > 0
