# SPDX-License-Identifier: GPL-2.0-or-later
"""The weather over the laboratory's network is what it says."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from godwit.lab.netns import Network, wait_until
from godwit.lab.weather import Weather

COUNT = 400


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network() as network:
        yield network


@pytest.fixture(scope="module")
def over(network: Network) -> Weather:
    return Weather(network)


@pytest.fixture
def weather(over: Weather) -> Iterator[Weather]:
    yield over
    over.calm()


def numbers(network: Network, *, to_server: bool) -> list[int]:
    """Send numbered datagrams, and return which came, in their order."""
    sender, receiver = (network.a, network.server) if to_server else (network.server, network.a)
    with receiver.enter():
        theirs = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sender.enter():
        ours = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with ours, theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        theirs.bind((receiver.addr4, 0))
        for number in range(COUNT):
            ours.sendto(number.to_bytes(2, "big") + bytes(200), theirs.getsockname())
            if not number % 20:
                time.sleep(0.001)
        theirs.settimeout(0.5)
        came = []
        try:
            while True:
                came.append(int.from_bytes(theirs.recv(300)[:2], "big"))
        except TimeoutError:
            return came


@pytest.mark.parametrize("to_server", [True, False])
@pytest.mark.parametrize(
    ("act", "holds"),
    [
        (lambda weather: weather.lose(200), lambda came: COUNT / 2 < len(came) < COUNT and came == sorted(set(came))),
        (lambda weather: weather.duplicate(200), lambda came: len(came) > COUNT == len(set(came))),
        (
            lambda weather: weather.reorder(200),
            lambda came: len(came) == len(set(came)) > COUNT / 2 and sorted(came) != came,
        ),
        (lambda weather: weather.calm(), lambda came: came == list(range(COUNT))),
    ],
    ids=["loss", "duplicates", "another order", "fine"],
)
def test_datagrams(
    network: Network,
    weather: Weather,
    act: Callable[[Weather], None],
    holds: Callable[[list[int]], bool],
    to_server: bool,
) -> None:
    act(weather)
    assert holds(came := numbers(network, to_server=to_server)), came


def stream(network: Network, size: int) -> tuple[bytes, float]:
    """Send so many zeros over TCP, and return what came, and in how many seconds."""
    with network.server.enter():
        listening = socket.create_server((network.server.addr4, 0))
    with network.a.enter():
        ours = socket.create_connection(listening.getsockname(), 5.0)
    with listening, ours, listening.accept()[0] as theirs:
        ours.settimeout(10.0)
        theirs.settimeout(10.0)

        def send() -> None:
            ours.sendall(bytes(size))
            ours.shutdown(socket.SHUT_WR)

        began = time.monotonic()
        sending = threading.Thread(target=send)
        sending.start()
        came = b"".join(iter(lambda: theirs.recv(1 << 16), b""))
        sending.join()
        return came, time.monotonic() - began


def test_a_narrow_link_and_a_wide_one(network: Network, weather: Weather) -> None:
    weather.narrow(10)
    came, seconds = stream(network, 600_000)
    assert len(came) == 600_000
    assert seconds > 0.3
    weather.calm()
    narrow = seconds
    assert stream(network, 600_000)[1] < narrow


def test_a_changed_byte_gets_through(network: Network, weather: Weather) -> None:
    weather.corrupt(900)
    came, _ = stream(network, 100_000)
    assert len(came) == 100_000
    assert any(came)
    weather.calm()
    assert not any(stream(network, 100_000)[0])


def carrier(network: Network) -> bool:
    return "NO-CARRIER" not in network.a.run("ip", "link", "show", "dev", "eth0").stdout


def test_a_link_that_flaps_and_another_mtu(network: Network, weather: Weather) -> None:
    assert carrier(network)
    weather.cut("a")
    wait_until(lambda: not carrier(network), "the carrier to go")
    weather.calm()
    wait_until(lambda: carrier(network), "the carrier to come")
    assert numbers(network, to_server=True)
    weather.mtu(1280)
    for space in (network.a, network.server):
        assert "mtu 1280" in space.run("ip", "link", "show", "dev", "eth0").stdout
    weather.calm()
    assert "mtu 1500" in network.a.run("ip", "link", "show", "dev", "eth0").stdout
