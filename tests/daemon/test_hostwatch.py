# SPDX-License-Identifier: GPL-2.0-or-later
"""When the host is looked at, what comes of it, and what is said."""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import pytest

from godwit.daemon import hostwatch
from godwit.daemon.hostwatch import HostWatch
from godwit.net.config import NetConfig, NetConfigError, NetOptions
from godwit.net.netlink import IFF_UP, RT_SCOPE_UNIVERSE, Address, DefaultRoute, HostNetwork, Link
from godwit.net.resolv import Resolv, read_resolv

ETH0 = Link(2, "eth0", 1500, IFF_UP)


def network(number: int, *, ipv6: bool = True) -> HostNetwork:
    addresses = [Address(2, IPv4Address(f"192.0.2.{number}"), 24, RT_SCOPE_UNIVERSE, 0)]
    if ipv6:
        addresses.append(Address(2, IPv6Address("2001:db8::7"), 64, RT_SCOPE_UNIVERSE, 0))
    return HostNetwork((ETH0,), tuple(addresses), (DefaultRoute(4, 2, IPv4Address("192.0.2.1"), None, 0),))


class Events:
    """As `NetEvents`, of what a test says has happened."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe2(os.O_NONBLOCK)
        self.failure: OSError | None = None

    def happen(self, matters: bool = True) -> None:
        os.write(self._write, b"y" if matters else b"n")

    def fileno(self) -> int:
        return self._read

    def drain(self) -> bool:
        if self.failure is not None:
            raise self.failure
        try:
            return b"y" in os.read(self._read, 100)
        except BlockingIOError:
            return False

    def close(self) -> None:
        os.close(self._read)
        os.close(self._write)


class Host:
    """A host that changes, and what followed."""

    def __init__(self, folder: Path) -> None:
        self.resolv = folder / "resolv.conf"
        self.resolv.write_text("nameserver 192.0.2.53\n")
        self.network: HostNetwork | OSError = network(7)
        self.reads = 0
        self.events = Events()
        self.followed: list[NetConfig] = []
        self.watch: HostWatch

    def read(self) -> HostNetwork:
        self.reads += 1
        if isinstance(self.network, OSError):
            raise self.network
        return self.network

    def has_read_since(self, reads: int) -> bool:
        return self.reads > reads

    def run(self, work: Callable[[], Awaitable[None]], **options: Any) -> list[NetConfig]:
        """Watch while ``work`` is done; what followed."""

        async def main() -> None:
            self.watch = HostWatch(NetOptions(**options), str(self.resolv))
            await asyncio.to_thread(self.watch.read)
            self.watch.start(self.followed.append)
            try:
                await work()
            finally:
                self.watch.close()

        asyncio.run(main())
        return self.followed


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Host:
    made = Host(tmp_path)
    monkeypatch.setattr(hostwatch, "NetEvents", lambda: made.events)
    monkeypatch.setattr(hostwatch, "read_network", made.read)
    monkeypatch.setattr(hostwatch, "SETTLES", 0.05)
    monkeypatch.setattr(hostwatch, "AT_MOST_EVERY", 0.0)
    monkeypatch.setattr(hostwatch, "GLANCES", (0.1,))
    monkeypatch.setattr(hostwatch, "LET_GO_SECONDS", 0.3)
    return made


async def until(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < ends
        await asyncio.sleep(0.01)


def test_a_change_is_followed(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def work() -> None:
        host.network = network(8)
        host.events.happen()
        await until(lambda: bool(host.followed))

    [config] = host.run(work)
    assert str(config.addr4) == "192.0.2.8"
    lines = [one.message for one in caplog.records if "follows" in one.message]
    assert lines == ["the host's network has changed, the guest's follows: IPv4 192.0.2.8/24 (was 192.0.2.7/24)"]


def test_events_that_come_together_are_one(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostwatch, "SETTLES", 0.4)

    async def work() -> None:
        for number in range(8, 12):
            host.network = network(number)
            host.events.happen()
            await asyncio.sleep(0.005)
        await until(lambda: bool(host.followed))
        await asyncio.sleep(0.6)

    [config] = host.run(work)
    assert str(config.addr4) == "192.0.2.11"
    assert host.reads == 2


def test_what_happens_during_a_look_is_looked_at(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        loop = asyncio.get_running_loop()

        def read() -> HostNetwork:
            found = host.read()
            if host.reads == 2:
                host.network = network(9)
                loop.call_soon_threadsafe(host.events.happen)
                go_on.wait()
            return found

        go_on = threading.Event()
        loop.call_later(0.3, go_on.set)
        monkeypatch.setattr(hostwatch, "read_network", read)
        host.network = network(8)
        host.events.happen()
        await until(lambda: len(host.followed) == 2)

    assert [str(one.addr4) for one in host.run(work)] == ["192.0.2.8", "192.0.2.9"]


def test_nothing_follows_from_nothing(host: Host) -> None:
    async def work() -> None:
        host.events.happen(matters=False)
        await asyncio.sleep(0.15)
        assert host.reads == 1
        host.events.happen()
        await until(lambda: host.reads == 2)
        await asyncio.sleep(0.1)

    assert host.run(work) == []


def test_resolv_conf_is_looked_at_before_an_answer(host: Host) -> None:
    async def work() -> None:
        host.watch.glance()
        assert host.followed == []
        new = host.resolv.with_suffix(".new")
        new.write_text("nameserver 192.0.2.54\nsearch example.org\n")
        new.rename(host.resolv)
        host.watch.glance()
        assert [str(one) for one in host.followed[0].dns4] == ["192.0.2.54"]
        host.watch.glance()
        host.resolv.unlink()
        host.watch.glance()

    [config] = host.run(work)
    assert (config.search, host.reads) == (["example.org"], 1)


def test_resolv_conf_that_is_written_a_little_later(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostwatch, "GLANCES", (0.1, 1.0))

    async def work() -> None:
        host.network = network(8)
        host.events.happen()
        await until(lambda: len(host.followed) == 1)
        host.resolv.write_text("nameserver 198.51.100.53\n")
        await until(lambda: len(host.followed) == 2)

    first, second = host.run(work)
    assert (str(first.addr4), [str(one) for one in first.dns4]) == ("192.0.2.8", ["192.0.2.53"])
    assert [str(one) for one in second.dns4] == ["198.51.100.53"]
    assert [str(one) for one in second.withdrawn.dns4] == ["192.0.2.53"]


def test_a_version_that_stays_lost_is_let_go(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostwatch, "LET_GO_SECONDS", 1.5)

    async def work() -> None:
        host.network = network(7, ipv6=False)
        for _ in range(4):
            host.events.happen()
            await asyncio.sleep(0.05)
        assert host.followed == []
        await until(lambda: bool(host.followed))

    [config] = host.run(work)
    assert (config.local6, config.addr6) == (True, None)


def test_what_comes_back_in_time_was_never_gone(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostwatch, "LET_GO_SECONDS", 1.5)

    async def work() -> None:
        host.network = network(7, ipv6=False)
        host.events.happen()
        await until(lambda: host.reads == 2)
        host.network = network(7)
        host.events.happen()
        await asyncio.sleep(2)

    assert host.run(work) == []


def test_what_is_lost_again_is_lost_from_then_on(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostwatch, "LET_GO_SECONDS", 3.0)

    async def happen(ipv6: bool) -> None:
        reads = host.reads
        host.network = network(7, ipv6=ipv6)
        host.events.happen()
        await until(lambda: host.reads > reads)

    async def work() -> None:
        await happen(False)
        await asyncio.sleep(0.2)
        await happen(True)
        await asyncio.sleep(1.5)
        await happen(False)
        await asyncio.sleep(2.0)  # the first time would have been over by now
        assert host.followed == []
        await until(lambda: bool(host.followed))

    [config] = host.run(work)
    assert config.local6


def test_events_without_end_are_looked_at_now_and_then(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostwatch, "AT_MOST_EVERY", 0.5)

    async def work() -> None:
        began = time.monotonic()
        for _ in range(60):
            host.events.happen()
            await asyncio.sleep(0.02)
        assert 1 <= host.reads - 2 <= (time.monotonic() - began) / 0.5  # but for the first, and one at once

    host.run(work)


def test_resolv_conf_that_changes_while_it_is_read(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: str) -> Resolv:
        found = read_resolv(path)
        if len(host.followed) == 0:
            host.resolv.write_text("nameserver 192.0.2.155\n")
        return found

    async def work() -> None:
        host.resolv.write_text("nameserver 192.0.2.54\n")
        monkeypatch.setattr(hostwatch, "read_resolv", read)
        host.watch.glance()
        host.watch.glance()

    first, second = host.run(work)
    assert [str(one) for one in (*first.dns4, *second.dns4)] == ["192.0.2.54", "192.0.2.155"]


def test_what_was_withdrawn_is_forgotten(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostwatch, "WITHDRAWN_SECONDS", 0.2)

    async def work() -> None:
        host.resolv.write_text("nameserver 192.0.2.54\n")
        host.watch.glance()
        await until(lambda: len(host.followed) == 2)

    first, second = host.run(work)
    assert [len(one.withdrawn.dns4) for one in (first, second)] == [1, 0]
    assert second == first


def test_trouble_is_said_once(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        for found in (OSError(1, "no"), OSError(1, "no"), HostNetwork((Link(3, "eth1", 1500, IFF_UP),))):
            host.network = found
            reads = host.reads
            host.events.happen()
            await until(functools.partial(host.has_read_since, reads))
            await asyncio.sleep(0.05)
        host.events.happen()
        await asyncio.sleep(0.2)

    assert host.run(work, interface="eth0") == []
    said = [one.message for one in caplog.records if one.levelno >= logging.WARNING]
    assert said == [
        "the host's network cannot be read: [Errno 1] no",
        "there is no interface 'eth0' (--interface); there are: eth1; the guest keeps what it has",
    ]


def test_what_could_not_be_read_is_read_again(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shortage makes no event when it ends."""
    monkeypatch.setattr(hostwatch, "AGAIN", 0.1)

    async def work() -> None:
        host.network = OSError(errno.EMFILE, "out of descriptors")
        reads = host.reads
        host.events.happen()
        await until(functools.partial(host.has_read_since, reads + 1))
        host.network = network(8)
        await until(lambda: bool(host.followed))

    assert [one.addr4 for one in host.run(work)] == [IPv4Address("192.0.2.8")]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_shortage_is_no_host_without_name_servers(host: Host, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def no_descriptor(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    async def work() -> None:
        host.resolv.write_text("nameserver 192.0.2.54\n")
        with monkeypatch.context() as patched:
            patched.setattr("builtins.open", no_descriptor)
            host.watch.glance()
        assert host.followed == []
        host.watch.glance()
        await until(lambda: bool(host.followed))

    assert [one.dns4 for one in host.run(work)] == [[IPv4Address("192.0.2.54")]]


def test_a_host_that_cannot_be_watched(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused() -> Events:
        raise PermissionError(1, "not here")

    monkeypatch.setattr(hostwatch, "NetEvents", refused)

    async def work() -> None:
        host.resolv.write_text("nameserver 192.0.2.54\n")
        host.watch.glance()

    assert len(host.run(work)) == 1
    assert "changes of the host's network will not reach the guest" in caplog.text
    host.events.close()


def test_a_watch_that_breaks(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        host.events.failure = OSError(9, "broken")
        host.events.happen()
        await until(lambda: "any more" in caplog.text)

    assert host.run(work) == []


def test_the_first_look_may_refuse(host: Host) -> None:
    with pytest.raises(NetConfigError):
        host.run(lambda: asyncio.sleep(0), interface="eth9")
    host.events.close()


@pytest.mark.parametrize(("ipv6", "said"), [(True, 0), (False, 1)])
def test_notes_are_said_once(host: Host, caplog: pytest.LogCaptureFixture, ipv6: bool, said: int) -> None:
    caplog.set_level(logging.INFO)
    host.network = network(7, ipv6=ipv6)

    async def work() -> None:
        host.network = network(8, ipv6=ipv6)
        host.events.happen()
        await until(lambda: bool(host.followed))

    host.run(work)
    assert caplog.text.count("link-local IPv6 only") == said


def test_what_was_said_long_ago_is_not_kept(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    """Where containers come and go, each set of interfaces is another text: a daemon for months shall not keep all."""

    def several(number: int) -> HostNetwork:
        links = ETH0, Link(3, f"veth{number}", 1500, IFF_UP)
        addresses = [Address(one.index, IPv4Address(f"192.0.2.{one.index}"), 24, RT_SCOPE_UNIVERSE, 0) for one in links]
        return HostNetwork(links, tuple(addresses), ())

    watch = HostWatch(NetOptions(), str(host.resolv))
    for number in (0, 0, *range(1, hostwatch.REMEMBERED + 1), 0):
        host.network = several(number)
        watch.read()
    watch.close()
    assert sum("(eth0, veth0)" in message for message in caplog.messages) == 2
