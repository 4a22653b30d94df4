# SPDX-License-Identifier: GPL-2.0-or-later
"""What is read of procfs without seeing it."""

from __future__ import annotations

from .conftest import Run


def test_the_same_with_and_without_a_file_system(run: Run) -> None:
    text = """
    import os, socket
    from godwit.confine import namespaces, procfs
    def seen():
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(b"\\0a name of this test")
            table = procfs.read(procfs.UNIX_SOCKETS)
            return (procfs.network_namespace(), procfs.count_descriptors(), b"@a name of this test" in table,
                    len(procfs.read(procfs.MEMORY).split()))
    first = seen()
    procfs.keep()
    many = [os.dup(2) for _ in range(100)]
    namespaces.enter()
    namespaces.leave_root({})
    second = seen()
    print(first[0] == second[0], second[1] - first[1], first[2:], second[2:], os.listdir("/"))
    print(b"@a name of this test" in procfs.read(procfs.UNIX_SOCKETS))
"""
    done = run(text)
    assert done.stdout.splitlines() == ["True 103 (True, 7) (True, 7) []", "False"], done.stderr


def test_what_is_kept_leads_nowhere(run: Run) -> None:
    """Without Landlock, too: from the folder of descriptors there is no way up."""
    text = """
    import os
    from godwit.confine import namespaces, procfs
    procfs.keep()
    namespaces.enter()
    procfs.detach()
    namespaces.leave_root({})
    kept = procfs._kept[procfs.DESCRIPTORS]
    print(procfs.count_descriptors() == len(os.listdir(kept)) - 1)
    for path in ("../environ", "../maps", "../../1/cmdline", "../../../etc/passwd"):
        try:
            os.open(path, os.O_RDONLY, dir_fd=kept)
        except (FileNotFoundError, NotADirectoryError):
            print("nothing there")
    """
    done = run(text)
    assert done.stdout.split("\n") == ["True", *["nothing there"] * 4, ""], done.stderr
