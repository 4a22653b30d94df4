# SPDX-License-Identifier: GPL-2.0-or-later
"""The traffic agent: streams both ways, echoes, and what it says when something goes wrong."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterator

import pytest

from godwit.lab import stream
from godwit.lab.agent import AgentError
from godwit.lab.netns import Network, wait_until
from godwit.lab.traffic import Traffic, served

PORT = 5001


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network() as net:
        yield net


@pytest.fixture(scope="module")
def server(network: Network) -> Iterator[Traffic]:
    with Traffic(network.server) as traffic:
        traffic.listen(PORT)
        yield traffic


@pytest.fixture
def client(network: Network) -> Iterator[Traffic]:
    network.switch("a")
    with Traffic(network.a) as traffic:
        yield traffic


@pytest.mark.parametrize("ipv6", [False, True])
@pytest.mark.parametrize("length", [1, 65_521, 10_000_000])
def test_streams_arrive(network: Network, server: Traffic, client: Traffic, length: int, ipv6: bool) -> None:
    addr = network.server.address(ipv6)
    for start in (client.get, client.put):
        job = start(addr, PORT, 7, length)
        ours, theirs = client.wait(job), server.wait(served(job))
        assert ours.ok, ours
        assert theirs.ok, theirs
        assert ours.bytes == theirs.bytes == length
        assert ours.crc == theirs.crc == stream.crc32(7, length)


def test_endless_streams_end_when_stopped(network: Network, server: Traffic, client: Traffic) -> None:
    down = client.get(network.server.addr4, PORT, 1)
    up = client.put(network.server.addr4, PORT, 2)
    wait_until(lambda: client.status(down).bytes > 1e6, "the download")
    wait_until(lambda: client.status(up).bytes > 1e6, "the upload")
    server.stop(served(down))
    client.stop(up)
    for job in (down, up):
        ours, theirs = client.wait(job), server.wait(served(job))
        assert ours.ok
        assert theirs.ok
        assert (ours.bytes, ours.crc) == (theirs.bytes, theirs.crc)


def test_rate(network: Network, server: Traffic, client: Traffic) -> None:
    began = time.monotonic()
    for start in (client.get, client.put):
        job = start(network.server.addr4, PORT, 3, 300_000, 1_000_000)
        assert client.wait(job).ok
    assert 0.5 < time.monotonic() - began < 2


def small_gap(server: Traffic, job: int) -> None:
    """It is small again, counted anew; unless the machine does something else just then, which may be once or twice."""

    def small() -> bool:
        server.rewind(served(job))
        return server.status(served(job)).gap < 0.2

    wait_until(small, "a small gap", 2.0)


def test_gap_is_the_blackout(network: Network, server: Traffic, client: Traffic) -> None:
    job = client.put(network.server.addr4, PORT, 4, 0, 1_000_000)
    wait_until(lambda: (server.known(served(job)) or client.status(job)).bytes > 100_000, "the upload")
    small_gap(server, job)
    network.switch(None)
    time.sleep(0.5)
    network.switch("a")
    before = server.status(served(job)).bytes
    wait_until(lambda: server.status(served(job)).bytes > before + 100_000, "the upload to go on")
    gap = server.rewind(served(job)).gap
    assert 0.4 < gap < 2
    small_gap(server, job)
    client.stop(job)
    assert client.wait(job).ok


def test_echoes(network: Network, server: Traffic, client: Traffic) -> None:
    job = client.echo(network.server.addr4, PORT, 500)
    for _ in range(2):
        echoes = client.check(job)
        assert (echoes.alive, echoes.failed, echoes.silent) == (500, 0, 0)
    network.switch(None)
    echoes = client.check(job, 0.2)
    assert (echoes.alive, echoes.failed, echoes.silent) == (0, 0, 500)
    network.switch("a")
    wait_until(lambda: client.check(job, 1).alive == 500, "the echoes to come late")
    client.drop(job)
    with pytest.raises(AgentError, match="no job"):
        client.check(job)


def test_dropping_what_has_ended_leaves_others_alone(network: Network, server: Traffic, client: Traffic) -> None:
    ended = client.get(network.server.addr4, PORT, 1, 1000)
    assert client.wait(ended).ok
    echoes = client.echo(network.server.addr4, PORT, 5)  # one of them has the descriptor's number by now
    client.drop(ended)
    assert client.check(echoes, 2.0).alive == 5


def test_closed_connections_are_counted(network: Network, client: Traffic) -> None:
    with Traffic(network.server) as other:
        other.listen(5002)
        job = client.echo(network.server.addr4, 5002, 10)
        assert client.check(job).alive == 10
    echoes = client.check(job)
    assert (echoes.alive, echoes.failed) == (0, 10)


def test_refused_connection(network: Network, client: Traffic) -> None:
    result = client.wait(client.get(network.server.addr4, 5999, 1))
    assert (result.state, result.error) == ("failed", os.strerror(errno.ECONNREFUSED))
    with pytest.raises(AgentError, match="3 failed"):
        client.echo(network.server.addr4, 5999, 3)


def test_wrong_bytes_are_found(network: Network, server: Traffic) -> None:
    """A stream with one bit changed, with too few bytes said to be there, and a false answer."""
    data = bytearray(bytes(stream.chunk(9, 0, 60_000)))
    data[41_234] ^= 1
    with network.server.enter():
        raw = socket.create_connection((network.server.addr4, PORT), timeout=5)
    with raw:
        raw.sendall(b"put 77 9\n" + data)
        raw.shutdown(socket.SHUT_WR)
        assert raw.recv(100).startswith(b"60000 ")
    result = server.wait(served(77))
    assert (result.state, result.wrong_at, result.bytes) == ("failed", 41_234, 60_000)

    with network.server.enter():
        raw = socket.create_connection((network.server.addr4, PORT), timeout=5)
    with raw:
        raw.sendall(b"get 78 9 1000 0\n")
        while raw.recv(1000):
            pass
        raw.sendall(b"999 00000000\n")
    result = server.wait(served(78))
    assert (result.state, result.bytes, result.error) == ("failed", 1000, os.strerror(errno.EBADMSG))


def test_short_stream_fails(network: Network, client: Traffic) -> None:
    with network.server.enter():
        listener = socket.create_server((network.server.addr4, 5003))
    with listener:
        job = client.get(network.server.addr4, 5003, 5, 1000)
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(100) == b"get %d 5 1000 0\n" % job
            connection.sendall(stream.chunk(5, 0, 999))
    result = client.wait(job)
    assert (result.state, result.bytes) == ("failed", 999)


def test_mistakes_are_answered(network: Network, client: Traffic) -> None:
    with pytest.raises(AgentError, match="no job 99"):
        client.status(99)
    with pytest.raises(AgentError, match=r"is not a|does not appear"):
        client.wait(client.get("nowhere", 1, 1))
    assert client.run("echo a; echo b >&2") == "a\nb"
    assert client.known(99) is None
