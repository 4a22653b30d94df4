# SPDX-License-Identifier: GPL-2.0-or-later
"""What is left of the file system, for root and for everybody else."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import Run

BEGIN = """
    import os, socket
    from godwit.confine import _kernel, namespaces
    def tried(work):
        try:
            return work()
        except OSError as error:
            return error.errno
    os.setresgid({gid}, {gid}, {gid}); os.setresuid({uid}, {uid}, {uid})
    _kernel.prctl(4, 1)  # as one that has been this user from its start
    before = {{name: os.readlink("/proc/self/ns/" + name) for name in ("mnt", "ipc", "uts", "net", "user")}}
    after = os.open("/proc/self/ns", os.O_RDONLY)
    namespaces.enter()
    now = {{name: os.readlink(name, dir_fd=after) for name in before}}
    namespaces.leave_root({directories}, {links})
"""


@pytest.fixture
def top() -> Iterator[Path]:
    """A folder with two others, which everybody can reach; pytest's own are for their user."""
    with tempfile.TemporaryDirectory(prefix="godwit-test-") as folder:
        top = Path(folder).resolve()
        top.chmod(0o755)
        for name in ("read", "write"):
            (top / name).mkdir()
            (top / name).chmod(0o777)
            (top / name / "there").write_text(name)
        yield top


@pytest.mark.parametrize("uid", [0, 12345])
def test_only_what_is_named_is_left(run: Run, top: Path, uid: int) -> None:
    directories = f"{{'{top}/read': False, '{top}/write': True, '/nowhere/at/all': True}}"
    links = f"[('/etc/resolv.conf', '{top}/read/there')]"
    text = BEGIN.format(uid=uid, gid=uid, directories=directories, links=links)
    text += f"""
    top = {str(top)!r}
    print(sorted(os.listdir("/")), sorted(os.listdir(top)))
    print(open(top + "/read/there").read(), open("/etc/resolv.conf").read())
    print(tried(lambda: open(top + "/read/there", "w")), tried(lambda: os.unlink(top + "/read/there")))
    print(tried(lambda: open(top + "/write/new", "x").close()), tried(lambda: os.unlink(top + "/write/there")))
    print(tried(lambda: os.mkdir("/new")), tried(lambda: os.listdir(top + "/..")), os.getcwd())
    print(" ".join(name for name in before if before[name] == now[name]))
"""
    done = run(text)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"{sorted(['etc', top.parts[1]])} ['read', 'write']"
    assert lines[1] == "read read"
    assert lines[2] == "30 30"  # EROFS
    assert lines[3] == "None None"
    assert lines[4].startswith("30 [")
    assert lines[4].endswith("/")
    assert lines[5] == ("net user" if uid == 0 else "net")
    assert sorted(os.listdir(top / "write")) == ["new"]  # outside too: it is the same directory


def test_where_the_system_refuses_nothing_has_changed(run: Run) -> None:
    """As in a container without further rights."""
    text = """
    import os
    from godwit.confine import namespaces
    before = os.readlink("/proc/self/ns/mnt")
    try:
        namespaces.enter()
    except OSError as error:
        print(error.errno, os.readlink("/proc/self/ns/mnt") == before, len(os.listdir("/")) > 5)
"""
    limit = 'echo 0 > /proc/sys/user/max_mnt_namespaces; exec setpriv --bounding-set=-all --inh-caps=-all "$@"'
    done = run(text, "unshare", "--user", "--map-root-user", "sh", "-c", limit, "sh")
    assert done.stdout.split() == ["28", "True", "True"], done.stderr
