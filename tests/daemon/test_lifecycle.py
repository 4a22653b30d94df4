# SPDX-License-Identifier: GPL-2.0-or-later
"""Readiness, sockets, PID file and user, with real processes."""

from __future__ import annotations

import os
import pwd
import resource
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from godwit.daemon import lifecycle
from godwit.daemon.errors import SocketInUseError, StartError

# A daemon of nothing but its life cycle: what to do before it is ready comes as its first argument.
DAEMON = """
import sys, time
from godwit.daemon import lifecycle
readiness = lifecycle.background()
pid = lifecycle.PidFile(sys.argv[2])
{before}
pid.write()
readiness.declare()
time.sleep(60)
"""


@pytest.fixture
def pid_file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "pid"
    yield path
    if path.exists() and (text := path.read_text()):
        os.kill(int(text), signal.SIGKILL)


def start(pid_file: Path, before: str = "pass") -> subprocess.CompletedProcess[str]:
    """Launch it as libvirt does: wait for the exit and for the end of its output."""
    return subprocess.run(
        [sys.executable, "-c", DAEMON.format(before=before), "-", str(pid_file)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_what_is_handed_over_is_what_is_at_the_path_itself(tmp_path: Path) -> None:
    """And not what a link leads to: a daemon that root has started would give that away."""
    link = tmp_path / "socket"
    link.symlink_to("nowhere")
    lifecycle.User(os.getuid(), os.getgid()).own(str(link))


def test_the_launched_process_exits_when_all_is_ready(pid_file: Path) -> None:
    started = time.monotonic()
    launched = start(pid_file, "time.sleep(0.5)")
    assert (launched.returncode, launched.stdout, launched.stderr) == (0, "", "")
    assert time.monotonic() - started >= 0.5
    daemon = int(pid_file.read_text())
    os.kill(daemon, 0)
    assert os.getsid(daemon) == daemon
    assert {os.readlink(f"/proc/{daemon}/fd/{fd}") for fd in (0, 1, 2)} == {"/dev/null"}


def test_a_failed_start_is_the_launched_processs(pid_file: Path) -> None:
    launched = start(pid_file, "sys.exit('no such thing')")
    assert launched.returncode == 1
    assert launched.stderr == "no such thing\n"
    assert pid_file.read_text() == ""


def test_the_exit_status_is_handed_on(pid_file: Path) -> None:
    assert start(pid_file, "sys.exit(7)").returncode == 7


def test_an_end_with_status_0_before_it_is_ready_is_a_failure(pid_file: Path) -> None:
    assert start(pid_file, "sys.exit(0)").returncode == 1


def test_a_killed_start_says_so(pid_file: Path) -> None:
    launched = start(pid_file, "import os; os.kill(os.getpid(), 9)")
    assert launched.returncode == 1
    assert "ended by signal 9 before it was ready" in launched.stderr


def test_inherited_descriptors_are_closed_but_for_those_kept() -> None:
    kept, other = os.pipe()
    code = f"""
import os
from godwit.daemon import lifecycle
lifecycle.background([{kept}])
print(*(fd for fd in ({kept}, {other}) if os.path.exists(f"/proc/self/fd/{{fd}}")), flush=True)
"""
    try:
        launched = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            pass_fds=(kept, other),
            timeout=30,
            check=False,
        )
    finally:
        os.close(kept)
        os.close(other)
    assert launched.stdout == f"{kept}\n"


# --- Sockets


def test_a_socket_listens(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with lifecycle.listen(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(path)


def test_a_stale_socket_is_taken_over(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    lifecycle.listen(path).close()
    assert os.path.exists(path)
    with lifecycle.listen(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(path)


@pytest.mark.parametrize("clients", [0, 1, 20])
def test_a_live_socket_is_not(tmp_path: Path, clients: int) -> None:
    path = str(tmp_path / "s")
    with lifecycle.listen(path):
        waiting = []
        for _ in range(clients):
            client = socket.socket(socket.AF_UNIX)
            client.setblocking(False)
            client.connect_ex(path)
            waiting.append(client)
        with pytest.raises(SocketInUseError, match="is in use: another process listens there"):
            lifecycle.listen(path)
        for client in waiting:
            client.close()
        assert stat.S_ISSOCK(os.stat(path).st_mode)


def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    with pytest.raises(StartError, match="exists and is no socket"):
        lifecycle.listen(str(path))
    assert path.read_text() == "precious"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"cannot listen on .*/none/s: there is no directory .*/none$"):
        lifecycle.listen(str(tmp_path / "none" / "s"))


def test_the_first_free_default_path(tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in "ab"]
    with lifecycle.listen(paths[0]):
        listener, path = lifecycle.listen_on_first(paths)
        with listener:
            assert path == paths[1]
            with pytest.raises(StartError, match="name one with --socket"):
                lifecycle.listen_on_first(paths)


def test_a_connected_descriptor() -> None:
    ours, theirs = socket.socketpair()
    with ours, lifecycle.connected(theirs.detach()) as made:
        assert not made.getblocking()
        assert not made.get_inheritable()
        ours.send(b"x")
        assert made.recv(1) == b"x"


def test_descriptor_where_standard_input_was(pid_file: Path) -> None:
    """The null device goes there when the daemon is ready; the connection must not."""
    ours, theirs = socket.socketpair()
    code = """
import sys, time
from godwit.daemon import lifecycle
readiness = lifecycle.background([0])
pid = lifecycle.PidFile(sys.argv[1])
connection = lifecycle.connected(0)
pid.write()
readiness.declare()
connection.setblocking(True)
connection.send(connection.recv(10))
time.sleep(60)
"""
    with ours:
        subprocess.run([sys.executable, "-c", code, str(pid_file)], stdin=theirs.fileno(), timeout=30, check=True)
        theirs.close()
        ours.settimeout(10)
        ours.send(b"there?")
        assert ours.recv(10) == b"there?"


def test_descriptors_that_will_not_do(tmp_path: Path) -> None:
    with (
        open(tmp_path / "file", "w") as file,
        socket.socket(socket.AF_UNIX) as lonely,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams,
    ):
        for descriptor, message in (
            (file.fileno(), "is no socket"),
            (lonely.fileno(), "is not connected"),
            (datagrams.fileno(), "is no UNIX stream socket"),
            (1 << 19, "is no socket"),
        ):
            with pytest.raises(StartError, match=f"--fd {descriptor} {message}"):
                lifecycle.connected(descriptor)


@pytest.mark.parametrize("foreground", [False, True])
@pytest.mark.parametrize("descriptor", [3, 4, 77])
def test_a_descriptor_that_was_not_handed_on(descriptor: int, foreground: bool) -> None:
    """One line says so. What the daemon itself opens gets these numbers, and must not be taken for it."""
    words = ["serve", "--fd", str(descriptor), *(["--foreground"] if foreground else [])]
    code = "import sys; from godwit.cli.main import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=30, check=False, close_fds=True
    )
    assert done.returncode == 1
    assert done.stderr == f"godwit serve: --fd {descriptor} is no socket: Bad file descriptor\n"


# --- PID file, user, limits


def test_the_pid_file(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    path.write_text("123456789 of a dead daemon\n")
    pid = lifecycle.PidFile(str(path))
    pid.write()
    assert path.read_text() == f"{os.getpid()}\n"
    pid.close()
    assert not path.exists()


def test_a_start_that_fails_leaves_the_pid_file_of_another(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    path.write_text("1\n")
    lifecycle.PidFile(str(path)).close()
    assert path.read_text() == "1\n"


def test_the_pid_file_of_who_came_after(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    pid = lifecycle.PidFile(str(path))
    pid.write()
    path.write_text("1\n")  # of the next one, which has started while we end
    pid.close()
    assert path.read_text() == "1\n"


def test_a_pid_file_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="cannot write the PID file"):
        lifecycle.PidFile(str(tmp_path))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("0", (0, 0)),
        ("root", (0, 0)),
        ("nobody:0", (pwd.getpwnam("nobody").pw_uid, 0)),
        ("root:root", (0, 0)),
        ("4000000", (4000000, 4000000)),
        ("4000000:7", (4000000, 7)),
    ],
)
def test_users(spec: str, expected: tuple[int, int]) -> None:
    user = lifecycle.user(spec)
    assert user is not None
    assert (user.uid, user.gid) == expected


def test_root_becomes_nobody_and_others_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    user = lifecycle.user(None)
    assert user is not None
    assert user.uid == pwd.getpwnam("nobody").pw_uid
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert lifecycle.user(None) is None


@pytest.mark.parametrize("spec", ["no-such-user", "0:no-such-group", "", ":0"])
def test_users_that_do_not_exist(spec: str) -> None:
    with pytest.raises(StartError, match="--runas: no such"):
        lifecycle.user(spec)


NO_PING = """
import sys
from godwit.daemon import lifecycle
for allowed in sys.argv[1:]:
    with open("/proc/sys/net/ipv4/ping_group_range", "w") as file:
        file.write(allowed)
    print(lifecycle.no_ping())
"""


def test_whether_pings_can_be_sent() -> None:
    """In a network namespace: it has the setting to itself."""
    unshare = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--net"]
    done = subprocess.run(
        [*unshare, sys.executable, "-c", NO_PING, "1 0", "0 0"], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines() == [
        "the guest's pings get no answer: net.ipv4.ping_group_range leaves out group 0;"
        " sysctl -w net.ipv4.ping_group_range='0 2147483647' lets all in, --no-icmp does without",
        "None",
    ]


def test_there_is_a_place_for_each_descriptor_from_the_beginning() -> None:
    """So that a load does not wait for the kernel to make room for more, again and again."""
    program = """
from godwit.daemon import lifecycle
lifecycle.raise_descriptor_limit()
print(open("/proc/self/status").read())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    places = next(int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("FDSize:"))
    assert places >= min(32768, resource.getrlimit(resource.RLIMIT_NOFILE)[1])


def test_the_descriptor_limit_is_raised() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        lifecycle.raise_descriptor_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
