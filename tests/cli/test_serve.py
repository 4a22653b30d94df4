# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon as a process: start, readiness, front-ends, end."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from scapy.layers.l2 import ARP, Ether
from scapy.utils import RawPcapReader

from godwit.vhost_user import FrontendClient

SERVE = (sys.executable, "-m", "godwit.cli.main", "serve")
PASST = (sys.executable, "-m", "godwit.cli.passt", "--vhost-user")
STAY = ("--runas", f"{os.getuid()}:{os.getgid()}")  # tmp_path is ours


def eventually(condition: Callable[[], bool], what: str, seconds: float = 10) -> None:
    """Wait for a condition; fails with what was waited for."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.01)


def gone(process_id: int) -> bool:
    """Whether a process has ended; a zombie that nobody reaps has."""
    try:
        with open(f"/proc/{process_id}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):  # before it was opened, or since
        return True


class Place:
    """Paths for a daemon, and those that run there."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "s"
        self.repair = folder / "s.repair"
        self.pid = folder / "pid"
        self.log = folder / "log"
        self.foreground: list[subprocess.Popen[str]] = []

    def launch(self, *args: str, command: tuple[str, ...] = SERVE) -> subprocess.CompletedProcess[str]:
        """Start in the background as libvirt does: wait for the exit and for the end of the output."""
        return subprocess.run(
            [*command, "-s", str(self.socket), "-P", str(self.pid), "-l", str(self.log), *STAY, *args],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def start(self, *args: str, fds: tuple[int, ...] = (), path: bool = True) -> subprocess.Popen[str]:
        """Start in the foreground; returns when it says that it is ready."""
        where = ("-s", str(self.socket)) if path else ()
        process = subprocess.Popen(
            [*SERVE, "-f", *where, *STAY, *args], stderr=subprocess.PIPE, text=True, pass_fds=fds
        )
        self.foreground.append(process)
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "is ready on" in line:
                return process
        raise AssertionError(f"ended with {process.wait(10)}: {''.join(lines)}")

    def daemon(self) -> int:
        """The process id in the PID file."""
        return int(self.pid.read_text())

    def close(self) -> None:
        for process in self.foreground:
            process.kill()
            process.wait(10)
            if process.stderr is not None:
                process.stderr.close()
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it is ending, perhaps
            if (text := self.pid.read_text()) and not gone(int(text)):
                os.kill(int(text), signal.SIGKILL)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    made.close()


def test_ready_means_that_the_launched_process_exits_with_0(place: Place) -> None:
    launched = place.launch()
    assert (launched.returncode, launched.stdout, launched.stderr) == (0, "", "")
    # No waiting: all of it is there now.
    assert not gone(place.daemon())
    assert stat.S_ISSOCK(os.stat(place.repair).st_mode)
    with FrontendClient.connect(place.socket) as front_end:
        front_end.get_features()
    assert f"is ready on {place.socket}" in place.log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_leaves_no_file(place: Place, number: int) -> None:
    assert place.launch().returncode == 0
    daemon = place.daemon()
    os.kill(daemon, number)
    eventually(lambda: gone(daemon), "the daemon's end")
    assert sorted(path.name for path in place.socket.parent.iterdir()) == ["log"]
    assert "stopped by a signal" in place.log.read_text()


def test_a_signal_ends_it_while_a_front_end_is_served(place: Place) -> None:
    process = place.start()
    with FrontendClient.connect(place.socket) as front_end:
        front_end.get_features()
        process.terminate()
        assert process.wait(10) == 0
    assert not place.socket.exists()


def test_after_a_crash_it_starts_with_the_same_arguments(place: Place) -> None:
    assert place.launch().returncode == 0
    first = place.daemon()
    os.kill(first, signal.SIGKILL)
    eventually(lambda: gone(first), "the first daemon's end")
    assert place.socket.exists()
    launched = place.launch()
    assert (launched.returncode, launched.stderr) == (0, "")
    assert place.daemon() != first
    with FrontendClient.connect(place.socket) as front_end:
        front_end.get_features()


def test_a_running_daemon_keeps_its_socket(place: Place) -> None:
    process = place.start("--one-off")
    launched = place.launch()
    assert launched.returncode == 1
    assert f"{place.socket} is in use: another process listens there" in launched.stderr
    # Nor does the look at it end a one-off daemon.
    with FrontendClient.connect(place.socket) as front_end:
        front_end.get_features()
    assert process.wait(10) == 0


def test_one_off_ends_with_its_front_end(place: Place) -> None:
    assert place.launch("--one-off").returncode == 0
    daemon = place.daemon()
    with FrontendClient.connect(place.socket) as front_end:
        front_end.get_features()
        assert not gone(daemon)
    eventually(lambda: gone(daemon), "the daemon's end")
    assert not place.socket.exists()
    assert not place.repair.exists()
    assert not place.pid.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end_while_it_starts(place: Place, number: signal.Signals) -> None:
    """As soon as there is something that would stay."""
    for delay in (0.0, 0.003, 0.006, 0.01):
        process = subprocess.Popen(
            [*SERVE, "-f", "-s", str(place.socket), "-P", str(place.pid), *STAY], stderr=subprocess.DEVNULL
        )
        eventually(place.socket.exists, "the socket", 60)
        time.sleep(delay)
        process.send_signal(number)
        assert process.wait(30) == 0
        assert not any(path.exists() for path in (place.socket, place.repair, place.pid))


def test_told_to_end_again_and_again(place: Place) -> None:
    """Also when it is all but over."""
    process = place.start()
    while process.poll() is None:
        process.terminate()
        time.sleep(0.0005)
    assert process.returncode == 0


def test_otherwise_it_serves_the_next_one(place: Place) -> None:
    process = place.start()
    for _ in range(3):
        with FrontendClient.connect(place.socket) as front_end:
            front_end.get_features()
    assert process.poll() is None


def test_a_second_front_end_waits_for_the_first(place: Place) -> None:
    place.start()
    with FrontendClient.connect(place.socket) as first:
        first.get_features()
        with FrontendClient.connect(place.socket, timeout=0.5) as second, pytest.raises(TimeoutError):
            second.get_features()
        with FrontendClient.connect(place.socket) as third:
            first.close()
            third.get_features()


def said(process: subprocess.Popen[str]) -> list[str]:
    """End a daemon in the foreground; what it has logged since it was ready."""
    process.terminate()
    _, rest = process.communicate(timeout=10)
    return rest.splitlines()


def test_that_a_second_front_end_waits_is_logged_once(place: Place) -> None:
    process = place.start()
    with FrontendClient.connect(place.socket) as first:
        first.get_features()
        with socket.socket(socket.AF_UNIX) as second, FrontendClient.connect(place.socket):
            second.connect(str(place.socket))
            second.sendall(struct.pack("<III", 1, 1, 0))  # GET_FEATURES
            for _ in range(3):
                first.get_features()
    waits = "another front-end has connected, and waits: one is served at a time"
    assert [line for line in said(process) if "another" in line] == [waits]


def test_a_look_whether_it_lives_is_no_front_end(place: Place) -> None:
    process = place.start()
    with FrontendClient.connect(place.socket) as first:
        first.get_features()
        for _ in range(3):
            assert "is in use: another process listens there" in place.launch().stderr
            first.get_features()
        for _ in range(3):  # others look, too, and have no name that says so
            with socket.socket(socket.AF_UNIX) as look:
                look.connect(str(place.socket))
            first.get_features()
    assert not [line for line in said(process) if "another" in line]


def test_a_front_end_in_stream_mode_is_told_what_is_spoken_here(place: Place) -> None:
    process = place.start()
    for destination in (b"\xff" * 6, b"\x33\x33\0\0\0\x16", b"\x01\0\x5e\0\0\x16"):
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(str(place.socket))
            other.settimeout(10)
            other.sendall(struct.pack(">I", 60) + destination.ljust(60, b"\0"))
            with contextlib.suppress(ConnectionResetError):  # closed with our bytes unread
                assert other.recv(1) == b""
    with FrontendClient.connect(place.socket) as front_end:
        front_end.get_features()
    hint = "this front-end sends Ethernet frames, and vhost-user is what is spoken here: start with --stream"
    assert [line for line in said(process) if "Ethernet" in line] == [hint] * 3


def test_that_a_front_end_says_nothing_is_logged_once(place: Place) -> None:
    process = place.start()
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(place.socket))
        time.sleep(6)
    with FrontendClient.connect(place.socket) as front_end:
        front_end.get_features()
    logged = said(process)
    assert [line for line in logged if "said nothing" in line] == [
        "somebody has connected and said nothing for 5 s: no front-end is served until it does, or hangs up"
    ]
    assert "a front-end has connected" in logged


def test_nonsense_ends_the_session_and_not_the_daemon(place: Place) -> None:
    process = place.start()
    with socket.socket(socket.AF_UNIX) as wild:
        wild.connect(str(place.socket))
        wild.settimeout(10)
        wild.sendall(b"\xff" * 512)
        try:
            assert wild.recv(1) == b""
        except ConnectionResetError:
            pass  # closed with our bytes unread
    with FrontendClient.connect(place.socket) as front_end:
        front_end.get_features()
    assert process.poll() is None


def test_a_connected_descriptor_is_the_only_front_end(place: Place) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        process = place.start("--fd", str(theirs.fileno()), fds=(theirs.fileno(),), path=False)
    with FrontendClient(ours) as front_end:
        front_end.get_features()
        assert process.poll() is None
    assert process.wait(10) == 0


def test_a_descriptor_in_the_background_as_qemu_does_it(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    pid = tmp_path / "pid"
    with theirs:
        fd = theirs.fileno()
        launched = subprocess.run(
            [*PASST, "--quiet", "--pid", str(pid), "--fd", str(fd), *STAY],
            capture_output=True,
            text=True,
            pass_fds=(fd,),
            timeout=60,
            check=False,
        )
    assert (launched.returncode, launched.stdout, launched.stderr) == (0, "", "")
    daemon = int(pid.read_text())
    with FrontendClient(ours) as front_end:
        front_end.get_features()
        assert not gone(daemon)
    eventually(lambda: gone(daemon), "the daemon's end")


def test_in_the_background_without_a_log_file(place: Place) -> None:
    launched = subprocess.run(
        [*SERVE, "-s", str(place.socket), "-P", str(place.pid), *STAY],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert launched.returncode == 0
    if os.path.exists("/dev/log"):
        assert launched.stderr == ""
    else:
        assert launched.stderr == (
            "godwit serve: goes on without a log, since there is no syslog (/dev/log): give a file with --log-file\n"
        )


def test_passts_default_socket(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    log = tmp_path / "log"
    launched = subprocess.run(
        [*PASST, "-P", str(pid), "-l", str(log), *STAY], capture_output=True, text=True, timeout=60, check=False
    )
    daemon = int(pid.read_text())
    path = log.read_text().partition("is ready on ")[2].partition(",")[0]
    try:
        assert path.startswith("/tmp/passt_")
        assert (launched.returncode, launched.stderr) == (0, f"godwit-passt: listens on {path}\n")
        with FrontendClient.connect(path) as front_end:
            front_end.get_features()
    finally:
        os.kill(daemon, signal.SIGTERM)
        eventually(lambda: gone(daemon), "the daemon's end")
    assert not os.path.exists(path)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("-P", "/no/such/folder/pid"),
            "cannot write the PID file /no/such/folder/pid: there is no directory /no/such/folder",
        ),
        (
            ("-l", "/no/such/folder/log"),
            "cannot open the log file /no/such/folder/log: there is no directory /no/such/folder",
        ),
        (("-s", "/no/such/folder/s"), "cannot listen on /no/such/folder/s: there is no directory /no/such/folder"),
        (
            ("--repair-path", "/no/such/folder/r"),
            "cannot listen on /no/such/folder/r: there is no directory /no/such/folder",
        ),
        (
            ("-p", "/no/such/folder/p"),
            "--pcap: cannot write to /no/such/folder/p: there is no directory /no/such/folder",
        ),
        (("-p", "/dev/full"), "--pcap: cannot write to /dev/full: No space left on device"),
        (("--runas", "no-such-user"), "--runas: no such user: no-such-user"),
        (("--runas", "4294967295"), "--runas: 4294967295 is out of range: users and groups are 0 to 4294967294"),
        (("--runas", "0:4294967295"), "--runas: 4294967295 is out of range"),
        (("--ctl-group", "99999999999"), "--ctl-group: 99999999999 is out of range"),
        (("--ctl-group", "²"), "--ctl-group: no such group: ²"),
        (("--interface", "no-such-if"), "there is no interface 'no-such-if' (--interface)"),
        (("-t", "192.0.2.77/80"), "cannot listen on 192.0.2.77 port 80"),
    ],
)
@pytest.mark.parametrize("mode", [(), ("-f",)], ids=["background", "foreground"])
def test_what_the_system_refuses_is_the_reason_on_stderr(
    place: Place, args: tuple[str, ...], message: str, mode: tuple[str, ...]
) -> None:
    launched = place.launch(*args, *mode)
    assert launched.returncode == 1
    assert message in launched.stderr
    assert launched.stderr.startswith("godwit serve: ")
    assert "Traceback" not in launched.stderr
    assert not place.socket.exists()
    assert not place.repair.exists()


def test_the_user(place: Place) -> None:
    """Root becomes nobody, and its files are nobody's; everybody else stays."""
    os.chmod(place.socket.parent, 0o755)
    process = subprocess.Popen(
        [*SERVE, "-f", "-s", str(place.socket), "-P", str(place.pid)], stderr=subprocess.PIPE, text=True
    )
    place.foreground.append(process)
    assert process.stderr is not None
    assert any("is ready on" in line for line in process.stderr)
    wanted = pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else os.geteuid()
    status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    ids = next(line for line in status if line.startswith("Uid:")).split()[1:]
    assert ids == [str(wanted)] * 4
    assert next(line for line in status if line.startswith("CapEff:")).split()[1] == "0" * 16
    assert os.stat(place.socket).st_uid == wanted
    assert os.stat(place.repair).st_uid == wanted
    with FrontendClient.connect(place.socket) as front_end:
        front_end.get_features()
    rest = said(process)
    assert process.returncode == 0
    # Nobody may not remove what is in our folder. It says so of each file in one line, and leaves none that misleads.
    ours = (place.socket, place.repair, place.pid)
    stay = [path for path in ours if path.exists()]
    assert stay == (list(ours) if os.geteuid() == 0 else [])
    said_of = [line for line in rest if "left for the next start" in line]
    assert len(said_of) == (1 if stay else 0)
    for path in stay:
        assert f" {path}" in said_of[0]
    assert place.pid not in stay or place.pid.read_text() == ""


def test_a_capture_into_a_pipe_needs_its_reader_first(place: Place) -> None:
    pipe = place.socket.parent / "pipe"
    os.mkfifo(pipe)
    launched = place.launch("-p", str(pipe))
    assert launched.returncode == 1
    assert f"cannot write to {pipe}: No such device or address (nobody reads this pipe)" in launched.stderr
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert place.launch("-p", str(pipe)).returncode == 0
    assert os.read(reader, 4) == b"\x4d\x3c\xb2\xa1"
    os.close(reader)


def test_without_vhost_user_frames_are_captured_too(place: Place) -> None:
    path = place.socket.parent / "pcap"
    place.start("--stream", "-p", str(path), "-a", "192.0.2.2", "-g", "192.0.2.1")
    asked = bytes(
        Ether(src="02:00:00:00:00:02", dst="ff:ff:ff:ff:ff:ff")
        / ARP(hwsrc="02:00:00:00:00:02", psrc="192.0.2.2", pdst="192.0.2.1")
    )
    with socket.socket(socket.AF_UNIX) as guest:
        guest.settimeout(10)
        guest.connect(str(place.socket))
        guest.sendall(len(asked).to_bytes(4) + asked)
        while True:
            answer = guest.recv(int.from_bytes(guest.recv(4, socket.MSG_WAITALL)), socket.MSG_WAITALL)
            if Ether(answer).type == 0x0806:
                break

    def captured() -> list[bytes]:
        with RawPcapReader(str(path)) as reader:
            return [data for data, _ in reader]

    eventually(lambda: asked in captured() and answer in captured(), "both frames in the file")


def _limited(most: int) -> list[str]:
    """Words before a command that limit its descriptors."""
    code = f"import os, resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, ({most}, {most}))"
    return [sys.executable, "-c", f"{code}; os.execv(sys.argv[1], sys.argv[1:])"]


def test_all_ports_leave_descriptors_to_the_guest(place: Place) -> None:
    launched = place.launch("-t", "127.0.0.1/all", command=(*_limited(1200), *SERVE))
    assert (launched.returncode, launched.stderr) == (0, "")
    logged = place.log.read_text()
    found = re.search(
        r"of all ports (\d+) TCP ports are not forwarded: .*is 1200, with (\d+) of them kept .*raise it to (\d+),",
        logged,
    )
    assert found is not None, logged
    left_out, kept, needed = map(int, found.groups())
    descriptors = len(os.listdir(f"/proc/{place.daemon()}/fd"))
    assert 750 < descriptors < 1200 - kept
    assert 250 < kept < 280
    assert needed > left_out > 30000


def test_ports_that_are_named_come_before_the_guests_own_connections(place: Place) -> None:
    launched = place.launch("-t", "127.0.0.1/20000-20999", command=(*_limited(1200), *SERVE))
    assert (launched.returncode, launched.stderr) == (0, "")
    assert re.search(r"1000 forwarded ports leave \d\d descriptors for the guest's", place.log.read_text())
    daemon = place.daemon()
    os.kill(daemon, signal.SIGTERM)
    eventually(lambda: gone(daemon), "the end, and with it that of the listeners")
    launched = place.launch("-t", "127.0.0.1/20000-21999", command=(*_limited(1200), *SERVE))
    assert launched.returncode == 1
    assert re.fullmatch(
        r"godwit serve: cannot listen on 127\.0\.0\.1 port 2\d+: Too many open files; each of the 2000 ports .*\n",
        launched.stderr,
    )


def test_no_repair_socket(place: Place) -> None:
    place.start("--repair-path", "none")
    assert not place.repair.exists()


def test_only_root_becomes_another_user(place: Place) -> None:
    if os.geteuid() == 0:
        os.chmod(place.socket.parent, 0o755)
        words = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *SERVE]
    else:
        words = [*SERVE]
    done = subprocess.run(
        [*words, "-f", "-s", "/tmp/never.sock", "--runas", "1"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "--runas 1: only root can become another user" in done.stderr


def test_the_log_says_what_the_guest_is_told(place: Place, tmp_path: Path) -> None:
    log = tmp_path / "log"
    launched = place.launch(
        "-a", "192.0.2.7/24", "-g", "192.0.2.1", "-D", "192.0.2.53", "-o", "192.0.2.99", "-l", str(log)
    )
    assert (launched.returncode, launched.stderr) == (0, "")
    os.kill(place.daemon(), signal.SIGTERM)
    text = log.read_text()
    assert "INFO the guest is told: IPv4 192.0.2.7/24, IPv4 router 192.0.2.1," in text
    assert "name servers 192.0.2.53" in text
    assert "WARNING --outbound: this host does not have the address 192.0.2.99" in text
