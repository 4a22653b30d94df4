# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's agent as a process on this machine, and the peer that it talks to."""

from __future__ import annotations

import os
import pty
import socket
import subprocess
import sys
import threading
import time
import tty
from collections.abc import Iterator
from pathlib import Path

import pytest

import godwit.lab
from godwit.lab import qemu_bench, stream
from godwit.lab.agent import Agent, AgentError
from godwit.lab.errors import LabError
from godwit.lab.netns import Network
from godwit.lab.transfer import Peer

SOURCE = Path(godwit.lab.__file__).parent / "guest_agent" / "agent.c"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Compile the agent, with the sanitizers: it reads what comes from the network."""
    built = str(tmp_path_factory.mktemp("agent") / "agent")
    options = ["-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined", "-fno-sanitize-recover"]
    subprocess.run([os.environ.get("CC", "cc"), *options, "-o", built, str(SOURCE)], check=True)
    return built


@pytest.fixture
def net() -> Iterator[Network]:
    with Network() as made:
        yield made


@pytest.fixture
def peer(net: Network) -> Iterator[Peer]:
    with Peer(net.server) as made:
        yield made


def carry(read: int, write: int) -> None:
    """Copy bytes until either end is closed."""
    try:
        while data := os.read(read, 4096):
            os.write(write, data)
    except OSError:
        pass


@pytest.fixture
def agent(net: Network, program: str, tmp_path: Path) -> Iterator[Agent]:
    """Start the agent on host a, behind a terminal as behind a serial port."""
    leader, follower = pty.openpty()
    tty.setraw(follower)
    ours, theirs = socket.socketpair()
    # The sanitizers of a whole run are not this program's.
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    said = tmp_path / "stderr"
    with said.open("wb") as errors:
        process = net.a.popen([program, os.ttyname(follower)], stderr=errors, env=environment)
    carriers = [
        threading.Thread(target=carry, args=ends) for ends in ((leader, theirs.fileno()), (theirs.fileno(), leader))
    ]
    for carrier in carriers:
        carrier.start()
    made = Agent(ours)
    try:
        made.hello(10)
        yield made
        assert process.poll() is None, said.read_text()
    finally:
        process.kill()
        process.wait()
        ours.shutdown(socket.SHUT_RDWR)
        os.close(follower)
        for carrier in carriers:
            carrier.join()
        os.close(leader)
        theirs.close()
        ours.close()
    assert said.read_text() == ""


@pytest.mark.parametrize("ipv6", [False, True], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("length", [0, 1, stream.PERIOD, 3_000_001])
def test_transfers(net: Network, agent: Agent, peer: Peer, ipv6: bool, length: int) -> None:
    server = net.server.address(ipv6)
    for start, there in ((agent.get, "send"), (agent.put, "receive")):
        job = start(server, peer.port, 77, length)
        if not length:  # until it is stopped
            peer.reached(job, 100_000)
            if there == "send":
                peer.stop(job)
            else:
                agent.stop(job)
        here, other = agent.wait(job, 20), peer.wait(job, 20)
        assert (here.state, here.error, here.wrong_at) == ("ok", "", None)
        assert (other.kind, other.state, other.error) == (there, "ok", "")
        assert here.bytes == other.bytes
        assert not length or here.bytes == length
        assert here.crc == other.crc == stream.crc32(77, here.bytes)


def test_rate(net: Network, agent: Agent, peer: Peer) -> None:
    for start in (agent.get, agent.put):
        began = time.monotonic()
        job = start(net.server.addr4, peer.port, 1, 500_000, 1_000_000)
        assert agent.wait(job).ok
        assert 0.4 < time.monotonic() - began < 2


def test_idle_connections(net: Network, agent: Agent, peer: Peer) -> None:
    job = agent.echo(net.server.addr6, peer.port, 700)
    for _ in range(2):
        answers = agent.check(job)
        assert (answers.alive, answers.failed, answers.silent) == (700, 0, 0)
    peer.close()
    answers = agent.check(job, 2)
    assert (answers.alive, answers.failed, answers.silent) == (0, 700, 0)
    agent.drop(job)


def test_connections_from_outside(net: Network, agent: Agent, peer: Peer) -> None:
    agent.listen(7000)
    for address in (net.a.addr4, net.a.addr6):
        for job in (peer.get(address, 7000, 8, 1_000_000), peer.put(address, 7000, 9, 1_000_000)):
            transfer = peer.wait(job)
            assert (transfer.state, transfer.bytes) == ("ok", 1_000_000)
        job = peer.echo(address, 7000, 20)
        assert peer.check(job) == 20
        assert peer.check(job) == 20
    assert peer.wait(peer.get(net.a.addr4, 7001, 1, 1)).error == "connect: Connection refused"


def test_datagrams_come_back(net: Network, agent: Agent) -> None:
    agent.serve_datagrams(7000)
    for address, family in ((net.a.addr4, socket.AF_INET), (net.a.addr6, socket.AF_INET6)):
        with net.server.enter():
            sock = socket.socket(family, socket.SOCK_DGRAM)
        with sock:
            sock.settimeout(10.0)
            sock.connect((address, 7000))
            for data in (b"", b"a", bytes(range(256)) * 200):
                sock.send(data)
                assert sock.recv(65535) == data


def test_a_connection_that_hangs_or_breaks(net: Network, agent: Agent, peer: Peer) -> None:
    job = agent.get(net.server.addr4, peer.port, 4, 50_000_000, rate=2_000_000)
    echo = agent.echo(net.server.addr4, peer.port, 5)
    peer.reached(job, 100_000)
    net.switch(None)
    answers = agent.check(echo, 0.3)
    assert (answers.alive, answers.failed, answers.silent) == (0, 0, 5)
    time.sleep(0.3)
    assert agent.status(job).state == "running"
    assert agent.status(job).gap > 0.3
    net.switch("a")
    assert agent.check(echo, 20).alive == 5
    peer.close()
    result = agent.wait(job, 10)
    assert not result.ok
    assert result.bytes < 50_000_000


def test_refused(net: Network, agent: Agent) -> None:
    job = agent.get(net.server.addr4, 1, 1, 1)
    assert agent.wait(job, 5).error == "Connection refused"
    with pytest.raises(AgentError, match="3 failed and 0 opened"):
        agent.echo(net.server.addr4, 1, 3)


def opened(net: Network) -> int:
    """How many TCP connections the guest has opened so far."""
    names, values = [line.split() for line in net.a.run("cat", "/proc/net/snmp").stdout.splitlines() if "Tcp:" in line]
    return int(values[names.index("ActiveOpens")])


def test_floods(net: Network, agent: Agent) -> None:
    """In both directions, and what ends them; what the kernel has counted is what the agent says."""
    with net.server.popen([sys.executable, "-c", qemu_bench.SERVER, "5003"], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        for up, direction, streams in ((True, "tx", 1), (False, "rx", 1), (True, "tx", 4), (False, "rx", 4)):
            counter = ["cat", f"/sys/class/net/eth0/statistics/{direction}_bytes"]
            opens = opened(net)
            before = int(net.a.run("unshare", "-m", "sh", "-c", f"mount -t sysfs s /sys; {' '.join(counter)}").stdout)
            count, took = agent.flood(net.server.addr4, 5003, 0.2, up=up, count=streams)
            after = int(net.a.run("unshare", "-m", "sh", "-c", f"mount -t sysfs s /sys; {' '.join(counter)}").stdout)
            assert 0.2 <= took < 5
            assert opened(net) - opens == streams
            assert 1_000_000 < count < after - before < 1.3 * count + 20_000_000
        server.kill()
        server.wait()
        with pytest.raises(AgentError, match="Connection refused"):
            agent.flood(net.server.addr4, 5003, 0.2, up=True)


def test_commands(agent: Agent) -> None:
    assert agent.run("echo one; echo two >&2") == "one\ntwo"
    assert agent.run("echo", "a  b") == "a  b"
    for wrong in (
        "get 5 nowhere 1 1 1 1",
        "flood 5 nowhere 1 u 1 1",
        "flood 5 127.0.0.1 1 u 1 17",
        "nonsense",
        "status 4711",
    ):
        agent._send(wrong)
        with pytest.raises(AgentError, match="the guest's agent says"):
            agent.hello(2)


def test_peer_says_what_it_waits_for(peer: Peer) -> None:
    with pytest.raises(LabError, match=r"job 3: waited 0.1 s for the end of the transfer"):
        peer.wait(3, 0.1)
    with pytest.raises(LabError, match="job 3 never came"):
        peer.stop(3)
