# SPDX-License-Identifier: GPL-2.0-or-later
"""What a running daemon cannot do any more, and that it works all the same."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from godwit.vhost_user import MemoryRegion, VringAddr
from godwit.vhost_user.client import FrontendClient

SERVE = (sys.executable, "-m", "godwit.cli.main", "serve")
LAUNCH = (sys.executable, "-m", "tests.daemon.launch")
ROOT = Path(__file__).resolve().parents[2]

Daemon = subprocess.Popen[str]
Start = Callable[..., tuple[Daemon, list[str]]]


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that everybody can reach, and make files in; pytest's own are for their user."""
    with tempfile.TemporaryDirectory(prefix="godwit-test-") as name:
        Path(name).chmod(0o777)
        yield Path(name).resolve()


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """Start a daemon, and give what it says until it is ready."""
    running: list[Daemon] = []

    def start(*command: str) -> tuple[Daemon, list[str]]:
        paths = () if "-s" in command else ("-s", str(folder / "s"), "--pid", str(folder / "pid"))
        words = [*command, "-f", *paths]
        daemon = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        running.append(daemon)
        assert daemon.stderr is not None
        said = []
        for line in daemon.stderr:
            said.append(line.rstrip())
            if "the guest is told" in line:
                return daemon, said
        raise AssertionError(f"ended with {daemon.wait(10)}: {said}")

    yield start
    for daemon in running:
        daemon.kill()
        daemon.communicate(timeout=10)


def status(pid: int, thread: str = "") -> dict[str, str]:
    path = Path(f"/proc/{pid}/task/{thread}/status" if thread else f"/proc/{pid}/status")
    return dict(line.split(":\t", 1) for line in path.read_text().splitlines() if ":\t" in line)


def serves(folder: Path) -> bool:
    with FrontendClient.connect(folder / "s") as front_end:
        return front_end.get_features() != 0


def ends(daemon: Daemon, folder: Path) -> None:
    """In an orderly way, and removes its files: also from behind its walls."""
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(10) == 0
    assert sorted(os.listdir(folder)) == []


def assert_locked_in(pid: int, uid: int, bounding: bool = True) -> None:
    """No thread of it can do anything. ``bounding``: it could empty its bounding set, too, which takes a privilege."""
    sets = {"CapInh", "CapPrm", "CapEff", "CapAmb", *(["CapBnd"] if bounding else [])}
    threads = os.listdir(f"/proc/{pid}/task")
    assert len(threads) >= 2  # one is the data plane's
    for thread in threads:
        found = status(pid, thread)
        assert {found[name] for name in sets} == {"0" * 16}
        assert found["NoNewPrivs"] == "1"
        assert found["Seccomp"] == "2"
        assert found["Uid"].split() == [str(uid)] * 4
        assert found["Groups"].strip() in ("", str(uid))


def assert_nothing_else_there(pid: int, kept: Sequence[str]) -> None:
    """In its file system, but for some directories and the way to them."""
    root = f"/proc/{pid}/root"
    ways = {str(way) for path in kept for way in Path(path).parents}
    for path, below, files in os.walk(root):
        inside = path.removeprefix(root) or "/"
        if inside in kept:
            below.clear()
        else:
            assert inside in ways
            assert files == []


def namespaces(pid: int | str) -> dict[str, str]:
    return {name: os.readlink(f"/proc/{pid}/ns/{name}") for name in ("mnt", "ipc", "uts", "net", "user")}


def test_started_by_root(start: Start, folder: Path) -> None:
    daemon, said = start(*SERVE, "--runas", "65534:65534")
    assert_locked_in(daemon.pid, 65534)
    ours, its = namespaces("self"), namespaces(daemon.pid)
    assert [name for name in ours if ours[name] != its[name]] == ["mnt", "ipc", "uts"]
    assert_nothing_else_there(daemon.pid, [str(folder), os.path.dirname(os.path.realpath("/etc/resolv.conf")), "/etc"])
    assert [line for line in said if "does not allow" in line] == []
    assert sum("given up: namespaces" in line for line in said) == 1
    assert serves(folder)
    ends(daemon, folder)


def test_started_by_an_ordinary_user(start: Start, folder: Path) -> None:
    daemon, said = start(*LAUNCH, "user")
    assert_locked_in(daemon.pid, 107)
    ours, its = namespaces("self"), namespaces(daemon.pid)
    assert [name for name in ours if ours[name] != its[name]] == ["mnt", "ipc", "uts", "user"]
    assert [line for line in said if "does not allow" in line] == []
    assert serves(folder)
    ends(daemon, folder)


def test_started_by_root_that_may_not_do_everything(start: Start, folder: Path) -> None:
    """As in a container without a profile: no CAP_SYS_ADMIN, and user namespaces for everybody."""
    few = "-sys_admin,-net_admin,-sys_ptrace"
    prefix = ("setpriv", f"--bounding-set={few}", f"--inh-caps={few}")
    daemon, _ = start(*prefix, *SERVE, "--runas", "12345:12345")
    assert_locked_in(daemon.pid, 12345)
    assert serves(folder)
    ends(daemon, folder)


@pytest.mark.parametrize("how", [(*SERVE, "--runas", "65534:65534"), (*LAUNCH, "user")], ids=["root", "user"])
def test_paths_through_a_link(start: Start, folder: Path, how: Sequence[str]) -> None:
    """/var/run is one, everywhere. In the end nothing is left."""
    (folder / "there").mkdir()
    (folder / "there").chmod(0o777)
    (folder / "link").symlink_to("there")
    daemon, _ = start(*how, "-s", str(folder / "link" / "s"), "--pid", str(folder / "link" / "pid"))
    assert serves(folder / "there")
    ends(daemon, folder / "there")


@pytest.mark.parametrize("how", [(*SERVE, "--runas", "65534:65534"), (*LAUNCH, "user")], ids=["root", "user"])
def test_a_folder_that_no_device_state_can_be_kept_in(start: Start, folder: Path, how: Sequence[str]) -> None:
    """Said in the start, as the user that it has become sees it; in a migration it would be too late."""
    (folder / "open").mkdir()
    (folder / "open").chmod(0o777)
    (folder / "closed").mkdir(mode=0o755)
    uid = 107 if "user" in how else 65534
    for name, why in (
        ("open", None),
        ("closed", f"user {uid} may make no files in {folder}/closed"),
        ("missing", f"there is no directory {folder}/missing"),
    ):
        daemon, said = start(*how, "--record", str(folder / name / "state"))
        assert [line for line in said if "--record" in line] == (
            [f"--record: no device state will be kept: {why}"] if why else []
        )
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(10) == 0


@pytest.mark.parametrize("how", [(*SERVE, "--runas", "65534:65534"), (*LAUNCH, "user")], ids=["root", "user"])
def test_it_follows_the_hosts_network(start: Start, folder: Path, how: Sequence[str]) -> None:
    """Behind its walls it reads again what it read in its start: the network, and resolv.conf."""
    resolv = folder / "resolv"
    resolv.mkdir()
    (resolv / "resolv.conf").write_text("nameserver 192.0.2.53\n")
    mounted = f'mount --bind {resolv} /run && mount --bind /run/resolv.conf /etc/resolv.conf && exec "$@"'
    daemon, said = start("unshare", "--net", "--mount", "sh", "-c", mounted, "sh", *how, "-s", str(folder / "s"))
    assert any("192.0.2.53" in line for line in said)
    (resolv / "resolv.conf").write_text("nameserver 192.0.2.54\n")  # the same file, as container engines do it
    for words in ("link add far type veth", "addr add 192.0.2.7/24 dev far", "link set far up"):
        subprocess.run(["nsenter", f"--net=/proc/{daemon.pid}/ns/net", "ip", *words.split()], check=True)
    assert daemon.stderr is not None
    assert any("192.0.2.54 (was 192.0.2.53)" in line for line in daemon.stderr)
    assert daemon.poll() is None


def test_in_a_container(start: Start, folder: Path) -> None:
    """What is refused is named once, and the rest holds."""
    daemon, said = start(*LAUNCH, "container")
    assert_locked_in(daemon.pid, 107, bounding=False)
    assert [line for line in said if "does not allow" in line] == [
        "the system does not allow to give up namespaces: Operation not permitted"
    ]
    assert any("given up: capabilities (none left); Landlock (" in line for line in said)
    assert serves(folder)
    ends(daemon, folder)


def test_on_an_old_kernel(start: Start, folder: Path) -> None:
    daemon, said = start(*LAUNCH, "old")
    assert_locked_in(daemon.pid, 107, bounding=False)
    assert [line for line in said if "does not allow" in line] == [
        "the system does not allow to give up namespaces: Function not implemented",
        "the system does not allow to give up Landlock: landlock_create_ruleset: Function not implemented",
    ]
    assert serves(folder)
    ends(daemon, folder)


TOLD = re.compile(r"system call chroot \(\d+[^)]*\) is not among those that this process needs: it ends")


def test_a_system_call_that_is_not_listed(start: Start) -> None:
    """Its name is in the log before the process dies of it."""
    daemon, _ = start(*LAUNCH, "violation")
    assert daemon.stderr is not None
    rest = daemon.stderr.read()
    assert daemon.wait(10) == -signal.SIGSYS
    assert TOLD.fullmatch(rest.splitlines()[-1])


def test_in_a_log_file_too(tmp_path: Path) -> None:
    words = [*LAUNCH, "violation", "-f", "-s", str(tmp_path / "s"), "--log-file", str(tmp_path / "log")]
    done = subprocess.run([*words, "--runas", "0:0"], capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGSYS
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last.startswith("CRITICAL ")
    assert TOLD.fullmatch(last.removeprefix("CRITICAL "))


if os.environ.get("GODWIT_SANITIZE"):

    def test_what_the_sanitizers_find_is_reported(start: Start) -> None:
        """All of it, with names, although there are no files any more to read them from."""
        daemon, _ = start(*LAUNCH, "overflow")
        assert daemon.stderr is not None
        rest = daemon.stderr.read()
        assert daemon.wait(10) == 1
        assert "ERROR: AddressSanitizer: heap-buffer-overflow" in rest
        assert re.search(r"^    #0 0x\w+ in \w*memset", rest, re.MULTILINE)
        assert "0 bytes to the right of 100-byte region" in rest or "0 bytes after 100-byte region" in rest
        assert rest.endswith("ABORTING\n")


def test_for_debugging_it_can_be_left_out(start: Start, folder: Path) -> None:
    daemon, said = start(*SERVE, "--runas", "65534:65534", "--no-sandbox")
    found = status(daemon.pid)
    assert (found["CapEff"], found["NoNewPrivs"], found["Seccomp"]) == ("0" * 16, "1", "0")
    assert namespaces(daemon.pid) == namespaces("self")
    assert sum("--no-sandbox" in line for line in said) == 1
    assert serves(folder)


def test_nobody_of_its_user_can_debug_it(start: Start) -> None:
    """Nor is there a core file with the guest's memory in it."""
    daemon, _ = start(*SERVE, "--runas", "65534:65534")
    tried = """
import ctypes, os, sys
os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
libc = ctypes.CDLL(None, use_errno=True)
print(libc.ptrace(16, int(sys.argv[1]), None, None), ctypes.get_errno())  # PTRACE_ATTACH
"""
    done = subprocess.run([sys.executable, "-c", tried, str(daemon.pid)], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["-1", "1"], done.stderr


def test_a_front_end_that_cuts_off_its_memory(start: Start, folder: Path) -> None:
    """What is missing is replaced, from behind the walls too: the process goes on, and serves the next front-end."""
    daemon, _ = start(*SERVE)
    with FrontendClient.connect(folder / "s") as front_end, contextlib.ExitStack() as stack:

        def descriptor(fd: int) -> int:
            stack.callback(os.close, fd)
            return fd

        memory = descriptor(os.memfd_create("guest", os.MFD_CLOEXEC))
        os.ftruncate(memory, 1 << 20)
        front_end.set_owner()
        front_end.set_features(1 << 32)  # VERSION_1, without which no ring is of this form; rings are enabled at once
        front_end.set_mem_table([MemoryRegion(0, 1 << 20, 0, 0, memory)])
        errors, kicks = [], []
        for index in range(2):
            kicks.append(descriptor(os.eventfd(0)))
            errors.append(descriptor(os.eventfd(0)))
            front_end.set_vring_num(index, 256)
            front_end.set_vring_base(index, 0)
            at = index << 16
            front_end.set_vring_addr(index, VringAddr(0, at, at + 0x4000, at + 0x8000, 0))
            front_end.set_vring_err(index, errors[index])
            front_end.set_vring_kick(index, kicks[index])
        front_end.get_features()  # an answer: all of that was done
        os.ftruncate(memory, 0)
        os.eventfd_write(kicks[1], 1)
        for error in errors:
            assert select.select([error], [], [], 10)[0]
    assert serves(folder)
    ends(daemon, folder)
    assert daemon.stderr is not None
    said = daemon.stderr.read()
    assert said.count("the front-end has cut off the file") == 2
