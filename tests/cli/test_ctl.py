# SPDX-License-Identifier: GPL-2.0-or-later
"""``godwit ctl`` and a daemon's control socket: who may ask, what is answered, and where the socket is."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pwd
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from godwit.cli import ctl
from godwit.daemon import lifecycle
from godwit.daemon.errors import StartError
from godwit.vhost_user import FrontendClient

from ..repair.conftest import FakeHelper
from .test_serve import PASST, SERVE, STAY, Place, eventually, gone

# Of a user and of groups that nobody has.
STRANGER, GROUP = 61000, 61001


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    made.close()


def godwit_ctl(*args: object, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, sys.executable, "-m", "godwit.cli.main", "ctl", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def status(place: Place) -> dict[str, Any]:
    return ctl.document(f"{place.socket}.ctl", "status")


def metrics(path: object) -> dict[tuple[str, ...], float]:
    """The samples by their names and the values of their labels."""
    text = b"\n".join(ctl.ask(f"{path}.ctl", "metrics")).decode()
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


# ---- where it is, and whose


def test_it_is_beside_the_front_ends_and_its_users_alone(place: Place) -> None:
    process = place.start()
    made = os.stat(f"{place.socket}.ctl")
    assert (stat.S_IMODE(made.st_mode), made.st_uid) == (0o600, os.getuid())
    asked = godwit_ctl("-s", place.socket, "status", "--json")
    assert (asked.returncode, asked.stderr) == (0, "")
    now = json.loads(asked.stdout)
    assert now["pid"] == process.pid
    assert now["sockets"]["control"] == f"{place.socket}.ctl"
    assert now["front_end"]["connected"] is False
    process.terminate()
    assert process.wait(10) == 0
    assert list(place.socket.parent.iterdir()) == []


def test_another_path_and_none(place: Place, tmp_path: Path) -> None:
    place.start("--ctl-path", str(tmp_path / "other.ctl"))
    assert not Path(f"{place.socket}.ctl").exists()
    assert godwit_ctl("-s", tmp_path / "other.ctl", "status").returncode == 0
    place.close()
    os.unlink(place.socket)
    place.start("--ctl-path", "none")
    assert not Path(f"{place.socket}.ctl").exists()


def test_with_a_descriptor_only_where_a_path_is_given(place: Place, tmp_path: Path) -> None:
    for given, there in (((), []), (("--ctl-path", str(tmp_path / "c")), ["c"])):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            process = place.start("--fd", str(theirs.fileno()), *given, fds=(theirs.fileno(),), path=False)
            assert [path.name for path in tmp_path.iterdir()] == there
            if there:
                assert ctl.document(str(tmp_path / "c"), "status")["sockets"]["front_end"] is None
            theirs.close()
            ours.close()
            assert process.wait(10) == 0
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [(*SERVE, "--stream"), PASST[:-1], PASST])
def test_in_stream_mode_and_for_passts_command_too(place: Place, command: tuple[str, ...]) -> None:
    assert place.launch(command=command).returncode == 0
    now = status(place)
    assert now["mode"] == ("vhost-user" if command == PASST else "stream")
    assert (now["sockets"]["repair"] is None) == (now["mode"] == "stream")
    assert "repair_helper" not in {one["reason"] for one in now["health"]["reasons"]} or now["mode"] == "vhost-user"


def test_one_that_cannot_be_is_no_reason_not_to_start(place: Place, tmp_path: Path) -> None:
    """Unless it was asked for."""
    Path(f"{place.socket}.ctl").write_text("something else")
    launched = place.launch()
    assert launched.returncode == 0
    assert "nobody can ask how things stand" in place.log.read_text()
    refused = place.launch("-s", str(tmp_path / "t"), "--ctl-path", f"{place.socket}.ctl")
    assert refused.returncode == 1
    assert "exists and is no socket" in refused.stderr
    refused = place.launch("-s", str(tmp_path / "t"), "--ctl-group", "no-such-group")
    assert refused.returncode == 1
    assert "--ctl-group: no such group: no-such-group" in refused.stderr


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that everyone may look into."""
    with tempfile.TemporaryDirectory(prefix="godwit-ctl.") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def test_who_may_ask(public: Path) -> None:
    """With --ctl-group its members, and root; also where the daemon has become another user."""
    place = Place(public)
    try:
        if os.geteuid() == 0:
            process = place.start("--runas", "nobody", "--ctl-group", str(GROUP))
            assert os.stat(f"{place.socket}.ctl").st_uid == os.stat(f"/proc/{process.pid}").st_uid != 0
            assert connects(place, "--regid", str(GROUP), "--clear-groups") == "answered"
            assert connects(place, "--regid", str(STRANGER), "--groups", str(GROUP)) == "answered"
            assert connects(place, "--regid", str(STRANGER), "--clear-groups") == "PermissionError"
        else:
            place.start("--ctl-group", str(os.getgid()))
        made = os.stat(f"{place.socket}.ctl")
        assert (stat.S_IMODE(made.st_mode), made.st_gid) == (0o660, GROUP if os.geteuid() == 0 else os.getgid())
        assert godwit_ctl("-s", place.socket, "status").returncode == 0
    finally:
        place.close()


def test_a_group_that_it_may_not_be_given_to(public: Path) -> None:
    """An ordinary user's process can give it to groups of its own alone; nothing is left of it."""
    public.chmod(0o777)
    path = public / "s.ctl"
    listens = functools.partial(why_not_to_group, str(path), GROUP)
    said = as_stranger(listens) if os.geteuid() == 0 else listens()
    assert f"{path} cannot be made over to group {GROUP} (--ctl-group): user" in said
    assert not path.exists()


def why_not_to_group(path: str, group: int) -> str:
    try:
        lifecycle.listen(path, mode=0o600, group=group).close()
    except StartError as error:
        return str(error)
    return "listens"


def connects(place: Place, *whose: str) -> str:
    """What becomes of a question that a user without rights asks."""
    program = (
        "import socket, sys\n"
        "sock = socket.socket(socket.AF_UNIX)\n"
        "try:\n"
        "    sock.connect(sys.argv[1])\n"
        "    sock.sendall(b'status\\n')\n"
        "    print('answered' if sock.recv(100).startswith(b'{') else 'not answered')\n"
        "except OSError as error:\n"
        "    print(type(error).__name__)\n"
    )
    words = ["setpriv", "--reuid", str(STRANGER), *whose, "/usr/bin/env", "python3", "-c", program]
    asked = subprocess.run(
        [*words, f"{place.socket}.ctl"], capture_output=True, text=True, timeout=30, check=True, cwd="/"
    )
    return asked.stdout.strip()


def test_the_group_of_a_socket_that_was_made_without_it(place: Place) -> None:
    """A successor that is told a group opens the socket to it."""
    own = os.getgid()
    old = place.start()
    place.start("--takeover", f"{place.socket}.takeover", "--ctl-group", str(own), path=False)
    assert old.wait(10) == 0
    made = os.stat(f"{place.socket}.ctl")
    assert (stat.S_IMODE(made.st_mode), made.st_gid) == (0o660, own)


# ---- at any time


def test_a_takeover(place: Place) -> None:
    """The path is the new one's, a client that waits in the queue is answered by it, and the counters go on."""
    old = place.start()
    with FrontendClient.connect(place.socket) as front_end:
        front_end.set_owner()
        front_end.set_features(front_end.get_features())
        front_end.get_features()  # that is answered: so was the request before
        before = metrics(place.socket)
        assert before["godwit_front_end_requests_total",] == 1
        new = place.start("--takeover", f"{place.socket}.takeover", path=False)
        assert old.wait(10) == 0
        now = status(place)
        assert now["pid"] == new.pid
        assert now["front_end"]["connected"] is True
        assert now["sockets"]["control"] == f"{place.socket}.ctl"
        front_end.set_features(front_end.get_features())
        front_end.get_features()
        assert metrics(place.socket)["godwit_front_end_requests_total",] == 2
    eventually(lambda: not status(place)["front_end"]["connected"], "the front-end's end")
    assert metrics(place.socket)["godwit_front_end_sessions_total",] == 1
    new.terminate()
    assert new.wait(10) == 0
    assert list(place.socket.parent.iterdir()) == []


def test_those_who_ask_do_not_keep_others_from_taking_over(place: Place) -> None:
    """Asked all the time, every question is answered by one of them; with some who hang on, and say nothing."""
    old = place.start()
    stop = threading.Event()
    pids: list[int] = []
    failed: list[BaseException] = []

    def ask_on() -> None:
        while not stop.is_set():
            try:
                pids.append(status(place)["pid"])
            except ctl.CtlError as error:
                if "ended early" not in str(error):  # of the one that was just answering as it ended
                    failed.append(error)

    thread = threading.Thread(target=ask_on)
    hung = []
    try:
        for _ in range(20):
            hung.append(socket.socket(socket.AF_UNIX))
            hung[-1].connect(f"{place.socket}.ctl")
        thread.start()
        eventually(lambda: len(pids) > 10, "answers")
        new = place.start("--takeover", f"{place.socket}.takeover", path=False)
        assert old.wait(10) == 0
        eventually(lambda: new.pid in pids, "answers of the new one")
    finally:
        stop.set()
        thread.join(30)
        for sock in hung:
            sock.close()
    assert failed == []
    assert set(pids) == {old.pid, new.pid}
    assert pids == sorted(pids, key=[old.pid, new.pid].index)


def test_20_who_hang_on(place: Place) -> None:
    """Silent ones, and such as ask and do not read: others are answered at once, and a front-end is served."""
    process = place.start()
    hung = []
    try:
        for number in range(20):
            sock = socket.socket(socket.AF_UNIX)
            hung.append(sock)
            sock.connect(f"{place.socket}.ctl")
            sock.sendall(b"metrics\n" if number % 2 else b"stat")
        began = time.monotonic()
        for _ in range(20):
            assert status(place)["pid"] == process.pid
        assert time.monotonic() - began < 5  # which is when a silent one is hung up on
        with FrontendClient.connect(place.socket) as front_end:
            front_end.get_features()
        assert metrics(place.socket)["godwit_process_open_fds",] < 100
    finally:
        for sock in hung:
            sock.close()


def test_a_daemon_that_nobody_asks_sleeps(place: Place) -> None:
    """Also after it was asked: it is not woken once for that."""
    process = place.start()
    assert status(place)["pid"] == process.pid

    def switches() -> int:
        total = 0
        for task in Path(f"/proc/{process.pid}/task").iterdir():
            lines = (task / "status").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if "voluntary_ctxt" in line)
        return total

    settled = [switches()]

    def quiet() -> bool:
        time.sleep(1.0)
        settled.append(switches())
        return settled[-1] == settled[-2]

    eventually(quiet, "a second in which it is not run at all", 30)


# ---- what is answered


def test_metrics_are_what_prometheus_reads(place: Place) -> None:
    place.start("--pcap", str(place.socket.parent / "frames"))
    text = b"\n".join(ctl.ask(f"{place.socket}.ctl", "metrics")).decode()
    families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len(names) == len(set(names)) > 30
    for family in families:
        assert family.name.startswith("godwit_")
        assert family.type in ("counter", "gauge")
        assert family.documentation.endswith(".")
        assert family.samples
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter")
        assert len({str(sample.labels) for sample in family.samples}) == len(family.samples)
    found = metrics(place.socket)
    assert found["godwit_dropped_frames_total", "ring_full"] == 0
    assert found["godwit_process_open_fds",] > 5
    assert found["godwit_process_resident_memory_bytes",] > 1 << 20
    document = ctl.document(f"{place.socket}.ctl", "metrics json")
    assert {one["name"].removesuffix("_total") for one in document["metrics"]} == set(names)


def test_a_helper_for_another_user_is_noticed_when_it_comes(place: Place) -> None:
    os.chmod(place.socket.parent, 0o755)
    place.launch("--runas", "nobody")
    nobody = pwd.getpwnam("nobody").pw_uid
    words = (sys.executable, "-m", "godwit.cli.main", "repair", str(place.repair))
    with subprocess.Popen((*words, "--user", str(STRANGER)), stderr=subprocess.PIPE, text=True) as helper:
        assert helper.wait(20) == 1
        assert helper.stderr is not None
        assert f"it is of user {nobody}, and not of" in helper.stderr.read()
    eventually(lambda: status(place)["repair_helper"]["refused"], "the refusal")
    now = status(place)
    assert (now["health"]["state"], now["repair_helper"]["connected"]) == ("degraded", False)
    assert any("has refused when it came" in one["text"] for one in now["health"]["reasons"])
    assert "\nhelper       refused: " in godwit_ctl("-s", place.socket, "status").stdout
    log = place.log.read_text()
    assert log.count("does not do what it is asked") == 1
    assert f"let that be {nobody}, or leave it out" in log
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as helper:
        eventually(lambda: status(place)["repair_helper"]["connected"], "the helper")
        assert status(place)["repair_helper"]["refused"] is False
        assert "\nhelper       connected\n" in godwit_ctl("-s", place.socket, "status").stdout
        helper.kill()


def test_without_a_helper_all_is_well_and_with_one_that_has_gone_it_is_not(place: Place) -> None:
    """One that never came may be one that is not to come. The kernel's leave for pings is another matter."""
    place.start("--no-icmp")
    assert status(place)["health"] == {"state": "ok", "reasons": []}
    assert godwit_ctl("-s", f"{place.socket}.ctl", "status", "--check").returncode == 0
    assert metrics(place.socket)["godwit_healthy",] == 1
    with contextlib.closing(FakeHelper(str(place.repair))) as helper:
        eventually(lambda: status(place)["repair_helper"]["connected"], "the helper")
        # One that goes while it is tried is one that refuses: that is how they do it.
        eventually(lambda: helper.answered == 1, "the helper to be tried")
        assert godwit_ctl("-s", place.socket, "status", "--check").returncode == 0
    eventually(lambda: status(place)["health"]["state"] == "degraded", "the helper to have gone")
    assert [one["reason"] for one in status(place)["health"]["reasons"]] == ["repair_helper"]
    shown = godwit_ctl("-s", place.socket, "status", "--check")
    assert shown.returncode == 3
    assert "\nhelper       has gone: connections cannot move\n" in shown.stdout


def test_the_command_in_all_its_forms(place: Place) -> None:
    process = place.start()
    shown = godwit_ctl("-s", place.socket, "status")
    assert shown.returncode == 0
    assert f"pid {process.pid}" in shown.stdout
    assert "\nhelper       none: connections cannot move\n" in shown.stdout
    assert godwit_ctl("-s", place.socket, "flows").stdout == "0 flows\n"
    assert json.loads(godwit_ctl("-s", place.socket, "flows", "--json", "tcp", "192.0.2.1").stdout)["flows"] == []
    assert "godwit_build_info" in godwit_ctl("-s", place.socket, "metrics").stdout
    text = godwit_ctl("-s", place.socket, "metrics", "--prometheus", "--label", 'vm=one "and" \\two').stdout
    for family in text_string_to_metric_families(text):
        assert all(sample.labels["vm"] == 'one "and" \\two' for sample in family.samples)
    assert json.loads(godwit_ctl("-s", place.socket, "metrics", "--json").stdout)["format"] == 1
    with subprocess.Popen(
        [sys.executable, "-m", "godwit.cli.main", "ctl", "-s", str(place.socket), "status", "--watch", "0.1"],
        stdout=subprocess.PIPE,
        text=True,
    ) as watching:
        assert watching.stdout is not None
        assert sum(line.startswith("godwit ") for line, _ in zip(watching.stdout, range(60), strict=False)) > 2
        watching.terminate()


def test_what_the_command_says_if_there_is_no_answer(place: Place, tmp_path: Path) -> None:
    def said(*args: object) -> str:
        asked = godwit_ctl(*args)
        assert asked.returncode in (1, 2)
        assert asked.stdout == ""
        return asked.stderr

    assert "there is no" in said("-s", tmp_path / "s", "status")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "dead.ctl"))
    assert "nobody listens" in said("-s", tmp_path / "dead", "status")
    place.start()
    assert "'sctp' is no filter: there are tcp, udp, ping, and an address" in said("-s", place.socket, "flows", "sctp")
    assert "one address at most" in said("-s", place.socket, "flows", "192.0.2.1", "192.0.2.2")
    assert "filters for flows alone" in said("-s", place.socket, "status", "tcp")
    assert "is for metrics" in said("-s", place.socket, "status", "--prometheus")
    assert "no NAME=VALUE" in said("-s", place.socket, "metrics", "--prometheus", "--label", "1=2")
    assert "a request is one of" in json.loads(b"".join(ctl.ask(f"{place.socket}.ctl", "halt")))["error"]


def test_without_a_path_the_command_says_where_it_has_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ctl, "DEFAULT", str(tmp_path / "passt"))
    assert ctl.main(["status"]) == 1
    assert (
        f"there is no {tmp_path}/passt.ctl, where a godwit-passt is that was given no path: " in capsys.readouterr().err
    )


@pytest.mark.parametrize("answer", [b"hello\n", b"", b'{"format": 1, "flows": [\n{"a"', b"[1]\n"])
def test_something_else_listens_there(tmp_path: Path, answer: bytes) -> None:
    with socket.create_server(str(tmp_path / "s.ctl"), family=socket.AF_UNIX) as other:

        def serve() -> None:
            for _ in range(2):
                sock, _ = other.accept()
                with sock:
                    sock.recv(100)
                    sock.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        for what in ("status", "flows"):
            asked = godwit_ctl("-s", tmp_path / "s", what)
            assert asked.returncode == 1
            assert "is no godwit" in asked.stderr or "ended early" in asked.stderr
            assert "Traceback" not in asked.stderr
        thread.join(10)


def test_whose_permission_it_takes(public: Path) -> None:
    """Which group may ask is said to who may not."""
    path = public / "s.ctl"
    root = os.geteuid() == 0
    with socket.create_server(str(path), family=socket.AF_UNIX):
        for mode, words in (
            ((0o600, "--ctl-group"), (0o660, f"not in group {GROUP}")) if root else ((0, "--ctl-group"),)
        ):
            os.chown(path, -1, GROUP if root else -1)
            path.chmod(mode)
            ask = functools.partial(why, str(path))
            assert words in (as_stranger(ask) if root else ask())


def why(path: str) -> str:
    try:
        list(ctl.ask(path, "status"))
    except ctl.CtlError as error:
        return str(error)
    return "answered"


def as_stranger(work: functools.partial[str]) -> str:
    """Do it in a process without rights; what it has given."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setgid(STRANGER)
            os.setuid(STRANGER)
            os.write(writing, work().encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


def test_after_a_crash_its_socket_is_taken(place: Place) -> None:
    process = place.start()
    process.kill()
    process.wait(10)
    assert Path(f"{place.socket}.ctl").exists()
    place.start()
    assert status(place)["pid"] != process.pid
    assert gone(process.pid)


def test_times_and_sizes_for_people() -> None:
    assert [ctl.size(count) for count in (0, 999, 1000, 1.5e6, 10**16)] == [
        "0 B",
        "999 B",
        "1 kB",
        "1.5 MB",
        "1e+04 TB",
    ]
    assert [ctl.span(time) for time in (0.01, 5, 119, 120, 7200, 200000)] == [
        "10 ms",
        "5 s",
        "119 s",
        "2 min",
        "2 h",
        "2 d",
    ]
    assert STAY  # the daemons above run as who runs the tests
