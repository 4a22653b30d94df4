# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon started as libvirt, QEMU and KubeVirt start passt: their words, an ordinary user, a host of its own.

Ready means that the launched process exits with 0 and has said nothing; then
sockets listen and the PID file is complete, with no waiting (docs of libvirt
and QEMU say nothing of it, their code does it so).
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from godwit.lab.netns import HOST4, HOST6, Namespace, Network, wait_until
from godwit.vhost_user import FrontendClient

USER = 107  # as KubeVirt has it: nobody in particular
# Of root's capabilities the one to read files is kept: Python may be installed where only root looks.
COMMAND = (
    "setpriv",
    f"--reuid={USER}",
    f"--regid={USER}",
    "--clear-groups",
    "--inh-caps=-all,+dac_read_search",
    "--ambient-caps=-all,+dac_read_search",
    sys.executable,
    "-m",
    "godwit.cli.passt",
)


@pytest.fixture(scope="module")
def host() -> Iterator[Namespace]:
    with Network() as network:
        yield network.hosts["a"]


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that the user may write to, as front-ends see to it."""
    made = Path(tempfile.mkdtemp(prefix="godwit-front-end."))
    os.chown(made, USER, USER)
    yield made
    pid = made / "pid"
    if pid.exists() and (text := pid.read_text()):
        os.kill(int(text), 9)
    shutil.rmtree(made)


def launch(host: Namespace, text: str, folder: Path, pass_fds: tuple[int, ...] = ()) -> tuple[int, bytes, bytes]:
    """Run to the exit, and to the end of the output, as libvirt does; the status and what was said."""
    words = text.replace("DIR", str(folder)).split()
    process = host.popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=pass_fds)
    said, errors = process.communicate(timeout=60)
    return process.returncode, said, errors


def connects(host: Namespace, address: str, port: int) -> bool:
    with host.enter():
        try:
            socket.create_connection((address, port), timeout=5).close()
        except ConnectionRefusedError:
            return False
        except ConnectionResetError:
            pass  # no guest runs that would take it
    return True


def is_bound(host: Namespace, port: int) -> bool:
    """Whether somebody has this UDP port."""
    with host.enter(), socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        try:
            sock.bind(("::", port))
        except OSError:
            return True
    return False


def ends_with(front_end: FrontendClient, folder: Path) -> None:
    """See that a front-end is served, and that the daemon ends when it hangs up, and leaves nothing behind."""
    daemon = int((folder / "pid").read_text())
    with front_end:
        assert front_end.get_features()
    wait_until(lambda: not os.path.exists(f"/proc/{daemon}"), "the daemon's end")
    assert {path.name for path in folder.iterdir()} <= {"log"}


LIBVIRT = (
    "--vhost-user --one-off --socket DIR/s --pid DIR/pid --mtu 1500 --interface eth0 --log-file DIR/log"
    f" --hostname guest --fqdn guest.example.org --address {HOST4} --netmask 24 --address {HOST6}"
    f" --gateway 192.0.2.1 --gateway fe80::1 --tcp-ports {HOST4}/2022:22 --tcp-ports %eth0/8000-8999,~8500"
    f" --tcp-ports {HOST6}/80-81:[2001:db8::77]/8080-8081 --udp-ports 5353:53 --udp-ports %eth0/6000-6010:7000-7010"
)


def test_libvirt(host: Namespace, folder: Path) -> None:
    host.sysctl("net/ipv4/ip_unprivileged_port_start", "80")
    assert launch(host, LIBVIRT, folder) == (0, b"", b"")
    assert int((folder / "pid").read_text()) > 1
    assert connects(host, HOST4, 2022)
    assert not connects(host, "127.0.0.1", 2022)
    assert [connects(host, HOST4, port) for port in (7999, 8000, 8499, 8500, 8501, 8999, 9000)] == [
        False, True, True, False, True, True, False,
    ]  # fmt: skip
    assert connects(host, HOST6, 81)
    assert [is_bound(host, port) for port in (5352, 5353, 6000, 6010, 6011)] == [False, True, True, True, False]
    assert {"s", "s.ctl", "s.repair", "s.takeover", "pid", "log"} == {path.name for path in folder.iterdir()}
    ends_with(FrontendClient.connect(folder / "s"), folder)
    assert "WARNING" not in re.sub(r".*ping_group_range.*", "", (folder / "log").read_text())


def test_libvirt_after_a_crash(host: Namespace, folder: Path) -> None:
    """The same words again, with what the dead one has left."""
    assert launch(host, LIBVIRT, folder) == (0, b"", b"")
    daemon = int((folder / "pid").read_text())
    os.kill(daemon, 9)
    wait_until(lambda: not os.path.exists(f"/proc/{daemon}"), "its end")
    assert launch(host, LIBVIRT, folder) == (0, b"", b"")
    ends_with(FrontendClient.connect(folder / "s"), folder)


def test_libvirt_shows_the_reason(host: Namespace, folder: Path) -> None:
    """Not 0, and one line on stderr: libvirt shows it as the reason why the domain does not start."""
    with host.enter(), socket.create_server((HOST4, 2022)):
        status, said, errors = launch(host, LIBVIRT, folder)
    assert (status, said) == (1, b"")
    assert errors.decode() == (
        f"godwit-passt: cannot listen on {HOST4} port 2022: Address already in use; another program has it\n"
    )
    assert {path.name for path in folder.iterdir()} == {"log"}


def test_qemu(host: Namespace, folder: Path) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        number = theirs.fileno()
        words = f"--vhost-user --quiet --pid DIR/pid --fd {number} --mtu 1400 --no-map-gw --tcp-ports 2022:22"
        assert launch(host, words, folder, pass_fds=(number,)) == (0, b"", b"")
    # QEMU reads the file the moment the launched process has ended.
    assert int((folder / "pid").read_text()) > 1
    assert connects(host, HOST4, 2022)
    ends_with(FrontendClient(ours), folder)


def test_kubevirt(host: Namespace, folder: Path) -> None:
    words = "--vhost-user --one-off --socket DIR/s --interface eth0 --log-file DIR/log --tcp-ports all --udp-ports all"
    # The PID file is not KubeVirt's: it is for this test.
    assert launch(host, f"{words} --pid DIR/pid", folder) == (0, b"", b"")
    for port in (1024, 1100):  # the lowest that may be had, should descriptors be few
        assert connects(host, HOST4, port)
        assert is_bound(host, port)
    assert not connects(host, HOST4, 40000)  # one that the host itself opens connections from
    ends_with(FrontendClient.connect(folder / "s"), folder)


@pytest.mark.parametrize("more", ["--tcp-ports 2022:22 --freebind", "-4", "-6", "--no-tcp --no-udp --no-icmp"])
def test_what_people_add(host: Namespace, folder: Path, more: str) -> None:
    words = f"--vhost-user -1 -s DIR/s -P DIR/pid -l DIR/log -e --chroot-fallback --log-size 65536 {more}"
    assert launch(host, words, folder) == (0, b"", b"")
    ends_with(FrontendClient.connect(folder / "s"), folder)
