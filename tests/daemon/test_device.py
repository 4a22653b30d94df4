# SPDX-License-Identifier: GPL-2.0-or-later
"""The device follows its host's network, but never under a migration. With a data plane that only notes."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Awaitable, Callable
from contextlib import closing
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet6 import ICMPv6ND_NS, ICMPv6ND_RA, ICMPv6NDOptPrefixInfo, IPv6
from scapy.layers.l2 import ARP, Ether

from godwit.daemon import device as device_module
from godwit.daemon.device import NetDevice
from godwit.daemon.options import Options
from godwit.dataplane import Observed, sockstate
from godwit.migration import Direction as Transfer
from godwit.migration import Migration
from godwit.net import state
from godwit.net.change import settle
from godwit.net.config import NetConfig, link_local, packed16
from godwit.net.state import NEVER_SEEN
from godwit.net.versions import versions
from godwit.repair import RepairListener
from godwit.vhost_user import Direction

from ..repair.conftest import FakeHelper

OLD, NEW = "2001:db8:1::7", "2001:db8:2::7"


def config(address6: str, router6: str = "fe80::1", **fields: Any) -> NetConfig:
    return NetConfig(
        addr4=IPv4Address("192.0.2.7"),
        prefix_len4=24,
        gateway4=IPv4Address("192.0.2.1"),
        addr6=IPv6Address(address6),
        gateway6=IPv6Address(router6),
        our_link_local=IPv6Address(router6),
        **fields,
    )


class Engine:
    """Notes what it is told; everything else does nothing."""

    def __init__(self) -> None:
        self.configured: list[dict[str, Any]] = []
        self.injected: list[Any] = []
        self.rare: list[bytes] = []
        self.faults: list[tuple[int, str]] = []
        self.listening: list[int] = []
        self._ready, self._other = os.pipe()

    def configure(self, **what: Any) -> None:
        self.configured.append(what)

    def inject(self, frame: bytes) -> bool:
        self.injected.append(Ether(frame))
        return True

    def rare_fileno(self) -> int:
        return self._ready

    def take_rare(self) -> list[bytes]:
        taken, self.rare = self.rare, []
        return taken

    def take_shortages(self) -> list[str]:
        return []

    def take_faults(self) -> list[tuple[int, str]]:
        taken, self.faults = self.faults, []
        return taken

    def close(self) -> None:
        os.close(self._ready)
        os.close(self._other)

    def has_found(self) -> bool:
        return False

    def tcp_flows(self) -> list[int]:
        return []

    def observed(self) -> Observed:
        return NEVER_SEEN

    def listeners(self) -> list[int]:
        return self.listening

    def sees_nothing(self) -> bool:
        return False

    def ring_stop(self, index: int) -> int:
        return 0

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None

    def told(self) -> list[tuple[str, list[str]]]:
        """The router advertisements since the last call: from where, with which prefixes."""
        frames, self.injected = self.injected, []
        return [
            (frame[IPv6].src, [f"{one.prefix} {one.preferredlifetime:#x}" for one in _prefixes(frame)])
            for frame in frames
            if ICMPv6ND_RA in frame
        ]


def _prefixes(frame: Any) -> list[Any]:
    found = []
    layer = frame[ICMPv6ND_RA]
    while layer:
        if isinstance(layer, ICMPv6NDOptPrefixInfo):
            found.append(layer)
        layer = layer.payload
    return found


Work = Callable[[NetDevice, Engine], Awaitable[None]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[Work], None]:
    monkeypatch.setattr(device_module, "Engine", Engine)
    monkeypatch.setattr(device_module, "CHANGE_INTERVAL", 0.05)

    def run(work: Work, **options: Any) -> None:
        async def main() -> None:
            device = NetDevice(config(OLD), Options(), None, **options)
            engine: Any = device._engine
            device.open()
            device.start()
            try:
                async with asyncio.timeout(20):
                    await work(device, engine)
            finally:
                await device.close()

        asyncio.run(main())

    return run


async def start(device: NetDevice) -> None:
    for index in (0, 1):
        await device.set_vring_kick(index, None)
    await device._at_rest()


async def load(device: NetDevice) -> None:
    """A guest with no flows arrives, and does not run yet."""
    reads, writes = os.pipe()
    os.write(writes, _empty_stream())
    os.close(writes)
    await device.set_device_state_fd(Direction.LOAD, 0, reads)
    assert await device.check_device_state()


async def stop(device: NetDevice) -> None:
    for index in (0, 1):
        await device.get_vring_base(index)


def changed(device: NetDevice, address6: str = NEW, router6: str = "fe80::1") -> None:
    device.follow(settle(device._config, config(address6, router6)))


CHANGED = ("fe80::1", ["2001:db8:2:: 0xffffffff", "2001:db8:1:: 0x0"])


def test_flows_that_move_take_the_interface_of_the_moment(run: Any) -> None:
    """Link-local peers are bound to it again on the target."""

    async def work(device: NetDevice, engine: Engine) -> None:
        await start(device)
        device.follow(replace(device._config, scope6=7))
        assert device._mover.scope == 7
        assert engine.configured[-1]["ifindex"] == 7

    run(work)


def test_another_host_is_told_of_no_interface(run: Any) -> None:
    async def work(device: NetDevice, engine: Engine) -> None:
        told = device._mover.configuration()
        assert told["IPv4"] == "192.0.2.7/24"
        assert "interface" not in told

    run(work)


def test_a_guest_that_runs_is_told_three_times(run: Any) -> None:
    async def work(device: NetDevice, engine: Engine) -> None:
        await start(device)
        assert engine.told() == []
        changed(device)
        assert engine.configured[-1]["addr6"] == packed16(IPv6Address(NEW))
        assert engine.told() == [CHANGED]
        await asyncio.sleep(1)
        assert engine.told() == [CHANGED, CHANGED]

    run(work)


def test_an_old_router_says_farewell(run: Any) -> None:
    async def work(device: NetDevice, engine: Engine) -> None:
        await start(device)
        changed(device, router6="fe80::2")
        first, *frames = engine.injected
        assert (first[IPv6].src, first[ICMPv6ND_RA].routerlifetime) == ("fe80::1", 0)
        assert [frame[ARP].psrc for frame in frames if ARP in frame] == ["192.0.2.1"]
        assert frames[-1][IPv6].src == "fe80::2"

    run(work)


def test_with_no_guest_nobody_is_told(run: Any) -> None:
    async def work(device: NetDevice, engine: Engine) -> None:
        changed(device)
        assert engine.configured[-1]["addr6"] == packed16(IPv6Address(NEW))
        await asyncio.sleep(0.2)
        assert engine.injected == []

    run(work)


def test_a_guest_that_stands_still_is_told_when_it_runs(run: Any) -> None:
    async def work(device: NetDevice, engine: Engine) -> None:
        await start(device)
        await stop(device)
        changed(device)
        changed(device, "2001:db8:3::7")
        await asyncio.sleep(0.2)
        assert (len(engine.configured), engine.injected) == (1, [])
        await start(device)
        assert engine.configured[-1]["addr6"] == packed16(IPv6Address("2001:db8:3::7"))
        assert engine.told() == [("fe80::1", ["2001:db8:3:: 0xffffffff", "2001:db8:1:: 0x0"])]

    run(work)


def test_repeats_do_not_reach_a_guest_that_stands_still(run: Any) -> None:
    async def work(device: NetDevice, engine: Engine) -> None:
        await start(device)
        changed(device)
        engine.told()
        await stop(device)
        await asyncio.sleep(0.2)
        assert engine.injected == []

    run(work)


@pytest.mark.parametrize("committed", [True, False])
def test_a_loaded_guest_is_not_disturbed(run: Any, committed: bool) -> None:
    async def work(device: NetDevice, engine: Engine) -> None:
        reads, writes = os.pipe()
        os.write(writes, _empty_stream())
        os.close(writes)
        await device.set_device_state_fd(Direction.LOAD, 0, reads)
        changed(device)
        assert await device.check_device_state()
        assert (len(engine.configured), engine.injected) == (1, [])
        if committed:
            await device.send_rarp(b"\x52\0\0\0\0\1")
            await start(device)
            assert engine.told() == [CHANGED]
        else:
            await device.disconnected()
            assert engine.injected == []
        assert engine.configured[-1]["addr6"] == packed16(IPv6Address(NEW))

    run(work)


def test_a_guest_that_has_moved_in_is_told_of_its_new_host(run: Any) -> None:
    async def work(device: NetDevice, engine: Engine) -> None:
        await load(device)
        await start(device)
        assert engine.told() == [("fe80::1", ["2001:db8:1:: 0xffffffff"])]

    run(work)


@pytest.mark.parametrize("begins", ["a kick", "an announcement"])
def test_a_guest_need_not_wait_for_its_connections(run: Any, monkeypatch: pytest.MonkeyPatch, begins: str) -> None:
    async def work(device: NetDevice, engine: Engine) -> None:
        committing, may_end, ended = threading.Event(), threading.Event(), threading.Event()

        def commit() -> None:
            committing.set()
            assert may_end.wait(10)
            ended.set()

        monkeypatch.setattr(device._mover, "commit", commit)
        await load(device)
        if begins == "an announcement":
            await device.send_rarp(b"\x52\0\0\0\0\1")
        for index in (0, 1):
            await device.set_vring_kick(index, None)
        await device.send_rarp(b"\x52\0\0\0\0\1")
        assert await asyncio.to_thread(committing.wait, 10)
        assert device.why_not() == "a migration is under way"
        changed(device)
        assert (len(engine.configured), engine.told()) == (1, [])
        stopping = asyncio.ensure_future(device.get_vring_base(0))  # for the next migration
        assert (await asyncio.wait([stopping], timeout=0.1))[0] == set()
        may_end.set()
        assert await stopping == 0
        assert ended.is_set()
        assert engine.told() == [CHANGED]

    run(work)


def test_a_guest_that_comes_back_is_called_again(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ports have given no answer since it left; both rings are started before its connections are let go."""

    async def work(device: NetDevice, engine: Engine) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            engine.listening = [listener.fileno()]
            sockstate.freeze_listener(listener.fileno())
            device._mover.take_over(listeners_frozen=True)
            await load(device)
            await start(device)
            assert not device._mover.listeners_frozen
            with socket.create_connection(listener.getsockname(), 5.0):
                pass

    run(work)


def test_a_migration_that_follows_at_once_is_not_without_its_helper(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The end of the one before comes first. A helper that is lost then fails the migration, not the connections."""

    async def work(device: NetDevice, engine: Engine) -> None:
        may_end = threading.Event()
        monkeypatch.setattr(device._mover, "commit", lambda: may_end.wait(10))
        listener = RepairListener(str(tmp_path / "r"))
        monkeypatch.setattr(device, "_repair", listener)
        with closing(listener), socket.socket(socket.AF_UNIX) as helper:
            helper.connect(listener.path)
            await load(device)
            await device.set_vring_kick(0, None)
            beginning = asyncio.ensure_future(device.set_log(os.memfd_create("log"), 4096, 0))
            await asyncio.wait([beginning], timeout=0.1)
            may_end.set()
            await beginning
            await device._at_rest()
            assert device._mover.helper_expected

    run(work)


def test_with_a_helper_that_has_refused_connections_stay_rather_than_be_lost(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def work(device: NetDevice, engine: Engine) -> None:
        listener = RepairListener(str(tmp_path / "r"))
        monkeypatch.setattr(device, "_repair", listener)
        with closing(listener):
            await device.set_log(os.memfd_create("log"), 4096, 0)
            without = device._mover.helper_expected
            helper = await asyncio.to_thread(FakeHelper, listener.path, lambda *_: None)
            with closing(helper):
                listener.accept_ready()
                await asyncio.to_thread(listener.try_out)
            await device.set_log(os.memfd_create("log"), 4096, 0)
            assert (without, device._mover.helper_expected) == (False, True)

    run(work)


@pytest.mark.parametrize("thread", [True, False])
def test_a_commit_that_has_an_accident_leaves_nothing_standing_still(
    run: Any, monkeypatch: pytest.MonkeyPatch, thread: bool
) -> None:
    async def work(device: NetDevice, engine: Engine) -> None:
        calls: list[str] = []
        monkeypatch.setattr(device._mover, "give_up_all", lambda: calls.append("given up"))
        monkeypatch.setattr(device._mover, "thaw_listeners", lambda: calls.append("thawed"))
        await load(device)
        changed(device)

        async def fail(*_: object) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patched:
            if thread:
                patched.setattr(device._mover, "commit", lambda: 1 / 0)
            else:
                patched.setattr(asyncio, "to_thread", fail)
            await start(device)
        assert calls == ["given up", "thawed"]
        if thread:
            assert engine.told() == [CHANGED]

    run(work)


def test_a_front_end_that_hangs_up_meanwhile_does_not_cut_that_short(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(device: NetDevice, engine: Engine) -> None:
        calls: list[str] = []
        may_end = threading.Event()
        monkeypatch.setattr(device._mover, "commit", lambda: calls.append(f"commit {may_end.wait(10)}"))
        monkeypatch.setattr(device._mover, "close_flows", lambda: calls.append("close"))
        await load(device)
        await device.set_vring_kick(0, None)
        hanging_up = asyncio.ensure_future(device.disconnected())
        assert (await asyncio.wait([hanging_up], timeout=0.1))[0] == set()
        may_end.set()
        await hanging_up
        assert calls == ["commit True", "close"]

    run(work)


def _empty_stream() -> bytes:
    """A guest with no flows, as a source writes it."""
    reads, writes = os.pipe()

    class Source:
        def observed(self) -> Any:
            return state.NEVER_SEEN

        def flows(self) -> list[int]:
            return []

        def flow_records(self, flows: list[int], *, native: bool) -> bytes:
            return b""

        def dump(self, flows: list[int]) -> list[bytes | str]:
            return []

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_: None

    source: Any = Source()
    migration: Any = Migration(versions(), source)
    migration.request(writes, Transfer.SOURCE, 2)
    migration.run()
    assert migration.outcome
    migration.close()
    data = os.read(reads, 1 << 16)
    os.close(reads)
    return data


def test_the_host_is_looked_at_before_the_guest_is_answered(run: Any) -> None:
    calls: list[NetDevice] = []

    async def work(device: NetDevice, engine: Engine) -> None:
        calls.append(device)
        device._answer_rare()
        assert len(engine.configured) == 1
        solicitation = Ether(src="52:54:00:00:00:01") / ARP(psrc="192.0.2.7", pdst="192.0.2.1")
        engine.rare = [bytes(solicitation)]
        device._answer_rare()
        assert len(engine.configured) == 2

    run(work, before_answer=lambda: changed(calls[0]))


def test_a_ring_that_the_guest_has_broken_is_told_of_once(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def work(device: NetDevice, engine: Engine) -> None:
        engine.faults = [(1, "a descriptor names memory that the guest does not have")]
        device._data_plane_calls()
        device._data_plane_calls()

    run(work)
    assert [one.message for one in caplog.records if one.levelname == "ERROR"] == [
        "the transmit ring is broken, and stands still until the guest starts it anew: "
        "a descriptor names memory that the guest does not have"
    ]


def test_a_guest_that_looks_for_its_neighbours_is_not_asked_anew(run: Any) -> None:
    class Asking:
        went_on = 0

        def go_on(self) -> None:
            self.went_on += 1

        def stop(self) -> None:
            pass

    async def work(device: NetDevice, engine: Engine) -> None:
        asking: Any = Asking()
        device._probe = asking
        ether = Ether(src="52:54:00:00:00:01")
        engine.rare = [
            bytes(ether / ARP(psrc="192.0.2.7", pdst="192.0.2.1")),
            bytes(ether / IPv6(src="fe80::7", dst="fe80::1", hlim=255) / ICMPv6ND_NS(tgt="fe80::1")),
        ]
        device._answer_rare()
        assert asking.went_on == 0
        engine.rare = [bytes(ether / IPv6(src="::", dst="ff02::1:ff00:7", hlim=255) / ICMPv6ND_NS(tgt="fe80::7"))]
        device._answer_rare()
        assert asking.went_on == 1

    run(work)


def test_nothing_happens_between_the_end_of_the_flows_and_that_of_the_rings(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(device: NetDevice, engine: Engine) -> None:
        calls: list[str] = []
        for name in ("park", "close_flows", "detach", "unpark"):
            monkeypatch.setattr(engine, name, lambda name=name: calls.append(name), raising=False)
        await device.disconnected()
        assert calls == ["park", "close_flows", "detach", "unpark"]

    run(work)


def test_a_host_with_no_ipv6_address(run: Any) -> None:
    """The data plane has IPv6 on, and no address for the guest but what it sees."""

    async def work(device: NetDevice, engine: Engine) -> None:
        ours = link_local(b"\x9a\x55\x9a\x55\x9a\x55")
        device.follow(NetConfig(local6=True, gateway6=ours, our_link_local=ours))
        assert (engine.configured[-1]["addr4"], engine.configured[-1]["addr6"]) == (None, bytes(16))

    run(work)
