# SPDX-License-Identifier: GPL-2.0-or-later
"""Files that can still be opened, made and removed; and nobody is signalled."""

from __future__ import annotations

from pathlib import Path

from .conftest import Run

BEGIN = """
    import os, signal
    from godwit.confine import capabilities, landlock
    from godwit.confine.landlock import Access
    def tried(work):
        try:
            work()
        except OSError as error:
            print(error.errno)
        else:
            print("done")
    folder = {folder!r}
    kept = open(folder + "/other/open", "w")
    capabilities.keep_only(())
    landlock.restrict({rules})
"""


def test_files(run: Run, tmp_path: Path) -> None:
    for name in ("read", "make", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "there").write_text("text")
    rules = f"{{'{tmp_path}/read': Access.READ_FILE, '{tmp_path}/make': Access.MAKE_REG | Access.WRITE_FILE}}"
    text = BEGIN.format(folder=str(tmp_path), rules=rules)
    text += """
    kept.write("what was open stays open")
    kept.flush()
    tried(lambda: open(folder + "/read/there").read())
    tried(lambda: open(folder + "/read/there", "w"))
    tried(lambda: os.unlink(folder + "/read/there"))
    tried(lambda: open(folder + "/make/new", "x"))
    tried(lambda: open(folder + "/make/new"))
    tried(lambda: os.mkdir(folder + "/make/folder"))
    tried(lambda: open(folder + "/other/there"))
    tried(lambda: os.listdir("/"))
    tried(lambda: open("/etc/passwd"))
"""
    done = run(text)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["done", "13", "13", "done", "13", "13", "13", "13", "13"]
    assert (tmp_path / "other" / "open").read_text() == "what was open stays open"


def test_signals(run: Run, tmp_path: Path) -> None:
    """To nobody but itself: Linux 6.12, which the version of the interface says."""
    (tmp_path / "other").mkdir()
    text = BEGIN.format(folder=str(tmp_path), rules="{}")
    text += """
    tried(lambda: os.kill(os.getpid(), 0))
    tried(lambda: os.kill(os.getppid(), 0))
    from godwit.confine import _kernel
    print(_kernel.landlock_abi())
"""
    done = run(text)
    own, others, abi = done.stdout.split()
    assert own == "done"
    assert others == ("1" if int(abi) >= 6 else "done")
