# SPDX-License-Identifier: GPL-2.0-or-later
"""When the guest is asked where it is."""

from __future__ import annotations

import asyncio

import pytest

from godwit.daemon import probe
from godwit.daemon.probe import AddressProbe


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "PAUSES", (0.0, 0.05, 0.05))


class Asked:
    def __init__(self, answered_at: int = 99) -> None:
        self.times = 0
        self._answered_at = answered_at

    def __call__(self) -> bool:
        self.times += 1
        return self.times < self._answered_at


def test_asks_until_it_knows() -> None:
    async def run(asked: Asked) -> int:
        AddressProbe(asked).start()
        await asyncio.sleep(1)
        return asked.times

    assert asyncio.run(run(Asked())) == 3
    assert asyncio.run(run(Asked(answered_at=2))) == 2


def test_goes_on_where_there_is_no_end_in_sight() -> None:
    async def run() -> None:
        asked = Asked()
        asking = AddressProbe(asked)
        asking.go_on()
        asking.go_on()  # however often the guest sends something
        await asyncio.sleep(0)
        assert asked.times == 0
        await asyncio.sleep(1)
        assert asked.times == 2
        asking.go_on()
        asking.stop()
        asking.stop()
        await asyncio.sleep(0.2)
        assert asked.times == 2

    asyncio.run(run())
