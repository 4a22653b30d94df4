# SPDX-License-Identifier: GPL-2.0-or-later
"""The initramfs, against the tool that reads one; the rest of the image is for tests/vm."""

from __future__ import annotations

import gzip
import lzma
import os
import stat
import subprocess
from pathlib import Path

import pytest

from godwit.lab import image
from godwit.lab.errors import LabError


def module(*depends: str) -> bytes:
    """The part of a kernel module that says what it needs."""
    return b"\x7fELF...\0license=GPL\0depends=" + ",".join(depends).encode() + b"\0name=x\0"


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Make what the packages of kernel and busybox would leave."""
    folder = tmp_path / "parts"
    modules = {
        "virtio.ko": module(),
        "virtio_ring.ko": module(),
        "virtio-pci.ko": module("virtio", "virtio_ring"),
        "net_failover.ko": module("failover"),
        "failover.ko.xz": lzma.compress(module()),
        "virtio_net.ko": module("virtio_ring", "net_failover", "built_in"),
        "other.ko": module(),
    }
    for name, data in modules.items():
        path = folder / "lib/modules/6.0/kernel" / name[0] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    for name in ("boot/vmlinuz-6.0", "bin/busybox"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def test_modules_come_after_what_they_need(parts: Path) -> None:
    names = [name for name, _ in image._modules(str(parts))]
    assert sorted(names) == ["failover", "net_failover", "virtio", "virtio_net", "virtio_pci", "virtio_ring"]
    for before, after in (("virtio", "virtio_pci"), ("failover", "net_failover"), ("net_failover", "virtio_net")):
        assert names.index(before) < names.index(after)


def test_initramfs_unpacks(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GODWIT_CACHE", str(tmp_path / "cache"))
    image._build_into(str(tmp_path / "built"), str(parts))
    assert (tmp_path / "built" / "vmlinuz").read_bytes() == b"boot/vmlinuz-6.0"
    root = tmp_path / "root"
    root.mkdir()
    packed = gzip.decompress((tmp_path / "built" / "initrd.gz").read_bytes())
    try:
        subprocess.run(["busybox", "cpio", "-idm"], input=packed, cwd=root, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.fail("busybox is not installed (Debian: apt-get install busybox-static)")
    assert (root / "bin/busybox").read_bytes() == b"bin/busybox"
    assert os.access(root / "init", os.X_OK)
    assert (root / "bin/agent").stat().st_size > 100_000
    assert stat.S_ISCHR((root / "dev/console").stat().st_mode)
    order = (root / "modules/order").read_text().split()
    assert len(order) == 6
    assert all((root / "modules" / name).exists() for name in order)


def test_a_package_without_its_parts(parts: Path) -> None:
    with pytest.raises(LabError, match="busybox"):
        image._first_existing(str(parts), "usr/bin/busybox")
    for path in (parts / "lib").rglob("*.ko*"):
        path.unlink()
    with pytest.raises(LabError, match="no modules"):
        image._modules(str(parts))
