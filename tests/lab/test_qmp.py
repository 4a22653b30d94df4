# SPDX-License-Identifier: GPL-2.0-or-later
"""The monitor's client, and the guest's agent, against scripted other ends."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from godwit.lab.agent import Agent, AgentError, Echoes
from godwit.lab.errors import CommandError
from godwit.lab.qmp import QMP, QMPError, migration, named

Handler = Callable[[str], "list[dict[str, Any]] | None"]


def monitor(handler: Handler) -> socket.socket:
    """A QEMU that answers each command with the messages that ``handler`` gives; None: it ends."""
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with theirs, theirs.makefile("rb") as lines:
            theirs.sendall(b'{"QMP": {}}\n')
            for line in lines:
                messages = handler(json.loads(line)["execute"])
                if messages is None:
                    return
                for message in messages:
                    theirs.sendall(json.dumps(message).encode() + b"\n")

    threading.Thread(target=serve, daemon=True).start()
    return ours


def status(state: str) -> dict[str, Any]:
    return {"event": "MIGRATION", "data": {"status": state}}


def answers(command: str) -> list[dict[str, Any]] | None:
    known: dict[str, list[dict[str, Any]]] = {
        "qmp_capabilities": [{"return": {}}],
        "query-status": [{"event": "STOP"}, {"return": {"status": "paused"}}],
        "migrate": [{"return": {}}, status("setup"), status("active"), {"event": "STOP"}, status("pre-switchover")],
        "bad": [{"error": {"class": "GenericError", "desc": "no such thing"}}],
    }
    return known.get(command)


@pytest.fixture
def qmp() -> Iterator[QMP]:
    client = QMP(monitor(answers), timeout=2)
    yield client
    client.close()


def test_commands_and_events(qmp: QMP) -> None:
    assert qmp.command("query-status") == {"status": "paused"}
    assert [event["event"] for event in qmp.events] == ["STOP"]
    qmp.command("migrate", uri="unix:/x")
    assert qmp.wait(migration("pre-switchover", "failed"), "it")["data"]["status"] == "pre-switchover"
    # What was passed over is still there, in order.
    assert qmp.wait(migration("setup"), "it") == status("setup")
    assert qmp.wait(named("STOP"), "it")["event"] == "STOP"


def test_refusal_and_end(qmp: QMP) -> None:
    with pytest.raises(QMPError, match="bad: no such thing"):
        qmp.command("bad")
    with pytest.raises(QMPError, match="has ended"):
        qmp.command("quit")
    with pytest.raises(QMPError):
        qmp.command("quit")


def test_silence(qmp: QMP) -> None:
    began = time.monotonic()
    with pytest.raises(QMPError, match=r"waiting for the moon: .*silent"):
        qmp.wait(named("MOON"), "the moon", timeout=0.1)
    assert time.monotonic() - began < 1


@pytest.fixture
def line() -> Iterator[tuple[Agent, socket.socket]]:
    ours, theirs = socket.socketpair()
    agent = Agent(ours)
    yield agent, theirs
    theirs.close()
    ours.close()


def test_agent_results(line: tuple[Agent, socket.socket]) -> None:
    agent, guest = line
    guest.sendall(b"\0\xffhello 1\n")
    agent.hello(1)
    job = agent.get("192.0.2.2", 5001, seed=3, length=10)
    assert guest.recv(100) == b"get %d 192.0.2.2 5001 3 10 0\n" % job
    guest.sendall(b"done 99 ok 1 00000000 -1 0 0\ndone %d failed 5 000000ff 4 1500 104\n" % job)
    result = agent.wait(job, 1)
    assert (result.ok, result.bytes, result.crc, result.wrong_at, result.gap) == (False, 5, 255, 4, 1.5)
    assert "reset" in result.error
    assert agent.wait(99, 1).ok


def test_agent_runs_commands(line: tuple[Agent, socket.socket]) -> None:
    agent, guest = line
    commands = []

    def serve(answer: str) -> None:
        _, job, command = guest.recv(100).decode().rstrip().split(" ", 2)
        commands.append(command)
        guest.sendall(answer.replace("JOB", job).encode())

    with ThreadPoolExecutor(1) as pool:
        served = pool.submit(serve, "out JOB one  word\nout JOB two\nexit JOB 0\n")
        assert agent.run("cat", "/a file") == "one  word\ntwo"
        served.result(1)
        served = pool.submit(serve, "out JOB sorry\nexit JOB 3\n")
        with pytest.raises(CommandError, match="exit status 3: sorry"):
            agent.run("false")
        served.result(1)
    assert ["cat '/a file'" in commands[0], "false" in commands[1]] == [True, True]


def test_agent_moves_to_another_line(line: tuple[Agent, socket.socket]) -> None:
    """A line may come half from the old QEMU and half from the new one."""
    agent, guest = line
    guest.sendall(b"alive 1 5 0 0\nali")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"ve 2 4 1 2\n")
        agent.attach(ours)
        assert agent.check(1, 1) == Echoes(5, 0, 0)
        assert agent.check(2, 1) == Echoes(4, 1, 2)


def test_agent_errors_silence_and_end(line: tuple[Agent, socket.socket]) -> None:
    agent, guest = line
    guest.sendall(b"error listen: Address in use\n")
    with pytest.raises(AgentError, match="Address in use"):
        agent.listen(80)
    with pytest.raises(AgentError, match="nothing from the guest's agent"):
        agent.wait(1, 0.05)
    guest.close()
    with pytest.raises(AgentError, match="the guest is gone"):
        agent.wait(1, 5)


def test_agent_takes_more_than_a_socket_holds(line: tuple[Agent, socket.socket]) -> None:
    agent, guest = line
    guest.settimeout(5)
    for byte in b"done 1 ok 1 00000000 -1 0 0\n" * 200:
        guest.sendall(bytes([byte]))
    assert agent.wait(1, 1).ok
