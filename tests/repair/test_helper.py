# SPDX-License-Identifier: GPL-2.0-or-later
"""``godwit repair``, as a process, with real sockets. Needs root."""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import resource
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from godwit.repair.client import RepairListener
from godwit.repair.protocol import MAX_SOCKETS, Repair, RepairError, encode, send_request

from .conftest import repair_mode

Connections = Callable[[int], list[socket.socket]]

CAP_NET_ADMIN = 12


class Helper:
    """The program. What it says is read when it has ended."""

    def __init__(self, path: str | Path, *prefix: str, options: Sequence[str] = ()) -> None:
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "godwit.cli.main", "repair", *options, str(path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def status(self, field: str) -> str:
        """A line of /proc/PID/status."""
        with open(f"/proc/{self.pid}/status") as file:
            return next(line.split()[1] for line in file if line.startswith(f"{field}:"))

    def end(self) -> tuple[int, str]:
        """Wait for its end: exit status, and what it said."""
        _, said = self._process.communicate(timeout=20)
        return self._process.returncode, said

    def kill(self, number: int = signal.SIGKILL) -> None:
        self._process.send_signal(number)
        self._process.communicate(timeout=20)


@pytest.fixture
def start(net_admin: None) -> Iterator[Callable[..., Helper]]:
    """Start a helper: ``start(path)``."""
    started: list[Helper] = []

    def start(path: str | Path, *prefix: str, options: Sequence[str] = ()) -> Helper:
        started.append(Helper(path, *prefix, options=options))
        return started[-1]

    yield start
    for helper in started:
        if helper.running:
            helper.kill()


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[RepairListener]:
    made = RepairListener(str(tmp_path / "s.repair"))
    yield made
    made.close()


def serving(listener: RepairListener, helper: Helper) -> None:
    """Wait until it has connected."""
    assert listener.wait(20), helper.end()


def numbers(sockets: list[socket.socket]) -> list[int]:
    return [sock.fileno() for sock in sockets]


# --- what it is for


def test_it_sets_the_mode_and_ends_with_the_back_end(
    listener: RepairListener, start: Callable[..., Helper], connections: Connections
) -> None:
    helper = start(listener.path)
    serving(listener, helper)
    sockets = connections(3)
    listener.set_mode(numbers(sockets), Repair.ON)
    assert [repair_mode(sock) for sock in sockets] == [1, 1, 1]
    listener.set_mode(numbers(sockets[:2]), Repair.OFF)
    listener.set_mode(numbers(sockets[2:]), Repair.OFF_NO_WP)
    assert [repair_mode(sock) for sock in sockets] == [0, 0, 0]
    listener.close()
    assert helper.end() == (0, f"godwit repair: serving {listener.path}\n")


def test_ipv6_and_a_socket_not_yet_connected(listener: RepairListener, start: Callable[..., Helper]) -> None:
    serving(listener, start(listener.path))
    with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as sock:
        listener.set_mode([sock.fileno()], Repair.ON)
        assert repair_mode(sock) == 1


def test_a_few_then_many(listener: RepairListener, start: Callable[..., Helper], connections: Connections) -> None:
    """Small requests first, then full ones: no socket is overlooked."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, before[1]), before[1]))
    try:
        serving(listener, start(listener.path))
        sockets = connections(2 * MAX_SOCKETS + 2)
        for fds in (numbers(sockets[:1]), numbers(sockets[1:])):
            listener.set_mode(fds, Repair.ON)
        assert all(repair_mode(sock) == 1 for sock in sockets)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def queued(sock: socket.socket, which: int) -> int:
    """Bytes in the receive queue (FIONREAD), or sent and not acknowledged (TIOCOUTQ); tcp(7)."""
    return int.from_bytes(fcntl.ioctl(sock, which, bytes(4)), sys.byteorder)


@pytest.mark.parametrize("prefix", [(), ("setpriv", "--bounding-set=-bpf,-sys_admin")])
def test_in_repair_mode_nothing_arrives(
    listener: RepairListener, start: Callable[..., Helper], prefix: tuple[str, ...]
) -> None:
    """The helper's filter: what comes is neither queued nor acknowledged, and comes after all in the end.

    It is one for all sockets, or where the kernel does not let it have that, one for each.
    """
    serving(listener, start(listener.path, *prefix))
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        ours = stack.enter_context(socket.create_connection(server.getsockname()))
        peer = stack.enter_context(server.accept()[0])
        ours.settimeout(20)
        listener.set_mode([ours.fileno()], Repair.ON)
        peer.sendall(b"x" * 1000)
        time.sleep(0.3)
        assert queued(ours, termios.FIONREAD) == 0
        assert queued(peer, termios.TIOCOUTQ) == 1000
        listener.set_mode([ours.fileno()], Repair.OFF)
        assert ours.recv(1000, socket.MSG_WAITALL) == b"x" * 1000


# --- what it refuses


def refused(listener: RepairListener, helper: Helper, fds: list[int]) -> str:
    """Send a request that it shall refuse; what it says."""
    serving(listener, helper)
    with pytest.raises(RepairError, match="has closed the connection"):
        listener.set_mode(fds, Repair.ON)
    status, said = helper.end()
    assert status == 1
    return said.splitlines()[-1]


def test_udp_is_refused(listener: RepairListener, start: Callable[..., Helper]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        said = refused(listener, start(listener.path), [sock.fileno()])
    assert said == "godwit repair: socket 0 of the request is not TCP"


def test_a_unix_socket_after_a_good_one_is_refused(
    listener: RepairListener, start: Callable[..., Helper], connections: Connections
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        said = refused(listener, start(listener.path), [connections(1)[0].fileno(), sock.fileno()])
    assert said == "godwit repair: socket 1 of the request is not TCP"


def test_a_file_is_refused(listener: RepairListener, start: Callable[..., Helper]) -> None:
    with open(os.devnull) as file:
        said = refused(listener, start(listener.path), [file.fileno()])
    assert said == "godwit repair: descriptor 0 of the request is no socket"


def test_a_listening_socket_is_refused(listener: RepairListener, start: Callable[..., Helper]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        said = refused(listener, start(listener.path), [sock.fileno()])
    assert "TCP_REPAIR ON on socket 0 of the request: not permitted (a listening socket" in said


@pytest.mark.parametrize(
    ("byte", "count", "message"),
    [(b"\x02", 1, "2 is no value of TCP_REPAIR"), (b"\x01", 0, "a request without a socket")],
)
def test_what_is_no_request_ends_it(
    tmp_path: Path, start: Callable[..., Helper], byte: bytes, count: int, message: str
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as back_end:
        back_end.bind(str(tmp_path / "r"))
        back_end.listen()
        back_end.settimeout(20)
        helper = start(tmp_path / "r")
        connection, _ = back_end.accept()
        with connection:
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * count))
            connection.sendmsg([byte], [rights] if count else [])
            connection.settimeout(20)
            assert connection.recv(1) == b""
        status, said = helper.end()
    assert status == 1
    assert said.splitlines()[-1] == f"godwit repair: bad request: {message}"


def test_without_the_capability_it_says_so(listener: RepairListener, start: Callable[..., Helper]) -> None:
    helper = start(listener.path, "setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin")
    status, said = helper.end()
    assert status == 1
    assert said.startswith("godwit repair: TCP_REPAIR needs the capability CAP_NET_ADMIN")
    assert not listener.ever_connected


# --- privileges


def test_it_keeps_one_capability(listener: RepairListener, start: Callable[..., Helper]) -> None:
    helper = start(listener.path)
    serving(listener, helper)
    deadline = time.monotonic() + 10
    while int(helper.status("CapPrm"), 16) != 1 << CAP_NET_ADMIN:  # an instant after it has connected
        assert time.monotonic() < deadline, helper.status("CapPrm")
        time.sleep(0.01)
    kept = {name: int(helper.status(name), 16) for name in ("CapEff", "CapInh", "CapBnd", "CapAmb")}
    assert kept == {"CapEff": 1 << CAP_NET_ADMIN, "CapInh": 0, "CapBnd": 0, "CapAmb": 0}
    assert helper.status("NoNewPrivs") == "1"


def test_the_socket_of_another_user(
    listener: RepairListener, start: Callable[..., Helper], connections: Connections
) -> None:
    """A daemon that root started has become nobody, and its socket is nobody's."""
    os.chown(listener.path, 65534, 65534)
    serving(listener, start(listener.path))
    sockets = connections(1)
    listener.set_mode(numbers(sockets), Repair.ON)
    assert repair_mode(sockets[0]) == 1


# --- finding the back-end


def test_what_is_no_address_is_named(tmp_path: Path, start: Callable[..., Helper]) -> None:
    status, said = start(tmp_path / "s.repair", options=("--guard", "192.0.2")).end()
    assert status == 2
    assert "--guard: '192.0.2' is no IPv4 or IPv6 address" in said


def test_without_a_back_end_it_fails(tmp_path: Path, start: Callable[..., Helper]) -> None:
    missing = tmp_path / "none.repair"
    status, said = start(missing).end()
    assert status == 1
    assert said.startswith(f"godwit repair: cannot connect to {missing}: No such file or directory (")


def test_the_front_ends_socket_is_not_mistaken_for_it(
    tmp_path: Path, listener: RepairListener, start: Callable[..., Helper]
) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as front_ends:
        front_ends.bind(str(path))
        front_ends.listen()
        front_ends.setblocking(False)
        assert start(path).end() == (
            1,
            f"godwit repair: {path} is not the repair socket: did you mean {listener.path}?\n",
        )
        with pytest.raises(BlockingIOError):
            front_ends.accept()


def test_with_a_back_end_that_died_it_fails(tmp_path: Path, start: Callable[..., Helper]) -> None:
    path = str(tmp_path / "dead.repair")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as left:
        left.bind(path)
    status, said = start(path).end()
    assert status == 1
    assert said.startswith(f"godwit repair: cannot connect to {path}: Connection refused (")


def test_a_directory_with_a_back_end(
    tmp_path: Path, listener: RepairListener, start: Callable[..., Helper], connections: Connections
) -> None:
    """Beside a socket that nobody has any more, and files with other names."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as left:
        left.bind(str(tmp_path / "a.repair"))
    (tmp_path / "other").write_text("")
    helper = start(tmp_path)
    serving(listener, helper)
    sockets = connections(1)
    listener.set_mode(numbers(sockets), Repair.ON)
    assert repair_mode(sockets[0]) == 1
    listener.close()
    assert helper.end()[0] == 0


def watching(helper: Helper) -> bool:
    """Whether it has an inotify descriptor."""
    folder = Path(f"/proc/{helper.pid}/fd")
    with contextlib.suppress(FileNotFoundError):
        return any("inotify" in os.readlink(entry) for entry in folder.iterdir())
    return False


def test_a_directory_in_which_a_back_end_appears(
    tmp_path: Path, start: Callable[..., Helper], connections: Connections
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    helper = start(folder)
    deadline = time.monotonic() + 20
    while not watching(helper):
        assert time.monotonic() < deadline
        assert helper.running
        time.sleep(0.02)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(folder / "s.sock"))
        other.listen()
        other.setblocking(False)
        (folder / "file.repair").write_text("")
        time.sleep(0.2)
        listener = RepairListener(str(folder / "s.sock.repair"))
        try:
            serving(listener, helper)
            sockets = connections(1)
            listener.set_mode(numbers(sockets), Repair.ON)
            assert repair_mode(sockets[0]) == 1
            with pytest.raises(BlockingIOError):
                other.accept()
        finally:
            listener.close()
    assert helper.end()[0] == 0


def test_a_directory_that_goes_away(tmp_path: Path, start: Callable[..., Helper]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    helper = start(folder)
    deadline = time.monotonic() + 20
    while not watching(helper):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    folder.rmdir()
    status, said = helper.end()
    assert status == 1
    assert said.splitlines()[-1] == f"godwit repair: cannot read {folder}: No such file or directory"


# --- who asks, and what for


def sends_as(uid: int, sock: socket.socket, fds: Sequence[int]) -> int:
    """A request from a process of another user, over the connection; returns how its process ended."""
    pid = os.fork()
    if not pid:
        try:
            os.setresuid(uid, uid, uid)
            send_request(sock, Repair.ON, fds)
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def asked(tmp_path: Path, start: Callable[..., Helper]) -> Iterator[Callable[..., tuple[Helper, socket.socket]]]:
    """A helper whose back-end's socket belongs to some user, and the connection."""
    with contextlib.ExitStack() as stack:

        def asked(owner: int, *arguments: str) -> tuple[Helper, socket.socket]:
            listening = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            path = tmp_path / "s.repair"
            listening.bind(str(path))
            os.chown(path, owner, owner)
            listening.listen()
            helper = start(path, options=arguments)
            listening.settimeout(20)
            sock = stack.enter_context(listening.accept()[0])
            sock.settimeout(20)
            return helper, sock

        yield asked


Asked = Callable[..., tuple[Helper, socket.socket]]


@pytest.mark.parametrize(
    ("owner", "arguments", "sender", "done"),
    [
        (12345, (), 12345, True),
        (12345, (), 0, True),
        (12345, (), 54321, False),
        (0, (), 54321, True),  # its owner has become another user since
        (0, ("--user", "54321"), 54321, True),
        (0, ("--user", "54321"), 12345, False),
        (12345, ("--user", "54321"), 12345, False),
    ],
)
def test_who_may_ask(
    asked: Asked, connections: Connections, owner: int, arguments: tuple[str, ...], sender: int, done: bool
) -> None:
    helper, sock = asked(owner, *arguments)
    sockets = connections(1)
    assert sends_as(sender, sock, numbers(sockets)) == 0
    assert sock.recv(1) == (encode(Repair.ON) if done else b"")
    assert repair_mode(sockets[0]) == done
    if not done:
        status, said = helper.end()
        assert status == 1
        assert f"bad request: it is of user {sender}, and not of 0 or " in said


def test_nothing_is_done_where_one_socket_is_not_tcp(asked: Asked, connections: Connections) -> None:
    """Not even to those before it."""
    helper, sock = asked(0)
    sockets = connections(2)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        send_request(sock, Repair.ON, [*numbers(sockets), udp.fileno()])
        assert sock.recv(1) == b""
    assert [repair_mode(one) for one in sockets] == [0, 0]
    status, said = helper.end()
    assert (status, said.splitlines()[-1]) == (1, "godwit repair: socket 2 of the request is not TCP")


def test_it_can_do_nothing_else(asked: Asked) -> None:
    """Few system calls, and no file."""
    helper, _ = asked(0)
    deadline = time.monotonic() + 10
    while helper.status("Seccomp") != "2":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert helper.status("Seccomp_filters") == "1"
