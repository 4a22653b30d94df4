# SPDX-License-Identifier: GPL-2.0-or-later
"""An embedded guest that sets up its network itself, with the programs of a usual distribution.

They write to /etc and /run, and set the host name. So each guest has those for
itself, in a folder::

    system = GuestSystem(guest.space, folder)
    system.start("udhcpc", "-f", "-i", "eth0")
    system.resolv_conf
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

from godwit.lab.netns import Namespace

RESOLV_CONF = "/etc/resolv.conf"
NETWORKD = "/lib/systemd/systemd-networkd"

_SYSTEM = """
mount --bind "$0/etc" /etc
mount --bind "$0/run" /run
mount -t sysfs -o ro sysfs /sys  # as in a container: there is no udev to wait for
hostname localhost
exec "$@"
"""

_NETWORK = """\
[Match]
Name=eth0

[Network]
DHCP=yes
IPv6AcceptRA=yes
LinkLocalAddressing=ipv6
IPv6DuplicateAddressDetection=1

[DHCPv4]
UseMTU=yes
UseDomains=yes

[IPv6AcceptRA]
UseDomains=yes
"""


def with_resolv_conf(path: str) -> list[str]:
    """Return the words that run a command with the file at ``path`` as its /etc/resolv.conf."""
    return ["unshare", "--mount", "sh", "-ec", f'mount --bind "$0" {RESOLV_CONF}; exec "$@"', path]


class GuestSystem:
    """The files and the host name that a guest's programs see. ``folder`` is empty, and outlives them."""

    def __init__(self, space: Namespace, folder: str) -> None:
        self.space = space
        self.folder = folder
        # What an ordinary user may not read is left out.
        with contextlib.suppress(shutil.Error):
            shutil.copytree("/etc", self.path("/etc"), symlinks=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path(RESOLV_CONF))
        with open(self.path(RESOLV_CONF), "w"):
            pass
        os.mkdir(self.path("/run"))
        self.last: subprocess.Popen[bytes] | None = None

    def path(self, path: str) -> str:
        """Where the guest's ``path`` (below /etc or /run) is."""
        return os.path.join(self.folder, path.lstrip("/"))

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """Start a program; its output goes to ``output``."""
        with open(os.path.join(self.folder, "output"), "ab") as output:
            wrapper = ["unshare", "--mount", "--uts", "sh", "-ec", _SYSTEM, self.folder]
            # The sanitizers are for us: the programs of a distribution may not bear them.
            env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
            self.last = self.space.popen([*wrapper, *words], stdout=output, stderr=output, env=env)
        return self.last

    def start_udhcpc(self) -> subprocess.Popen[bytes]:
        """Start busybox's DHCP client, as Debian sets it up. SIGUSR1 has it renew."""
        return self.start("busybox", "udhcpc", "-f", "-i", "eth0", "-s", "/etc/udhcpc/default.script")

    def start_dhclient(self, version: int, *lines: str) -> subprocess.Popen[bytes]:
        """Start ISC's client for one IP version, with Debian's configuration and these ``lines`` of one more.

        Started again it goes on from the lease that it had.
        """
        conf = "/etc/dhcp/dhclient.conf"
        with open(self.path(conf), "a") as file:
            file.writelines(f"{line}\n" for line in lines)
        names = [f"/etc/dhcp/{version}.lease", "-pf", f"/run/dhclient{version}.pid"]
        return self.start("dhclient", f"-{version}", "-d", "-cf", conf, "-lf", *names, "eth0")

    def start_networkd(self) -> subprocess.Popen[bytes]:
        """Start systemd-networkd, with DHCP, DHCPv6 and router advertisements."""
        folder = self.path("/etc/systemd/network")
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "10-eth0.network"), "w") as file:
            file.write(_NETWORK)
        netif = self.path("/run/systemd/netif")
        for name in ("", "links", "leases", "lldp"):
            os.makedirs(os.path.join(netif, name), exist_ok=True)
            with contextlib.suppress(LookupError, PermissionError):
                shutil.chown(os.path.join(netif, name), "systemd-network", "systemd-network")
        return self.start("env", "SYSTEMD_LOG_TARGET=console", "SYSTEMD_LOG_LEVEL=info", NETWORKD)

    def networkd(self) -> dict[str, list[str]]:
        """Return what systemd-networkd knows of ``eth0`` (networkctl reads the same file); lists of words."""
        index = _ip(self.space, "link", "show", "dev", "eth0")[0]["ifindex"]
        state = {}
        with contextlib.suppress(FileNotFoundError), open(self.path(f"/run/systemd/netif/links/{index}")) as file:
            for line in file:
                name, equals, value = line.strip().partition("=")
                if equals:
                    state[name] = value.split()
        return state

    def output(self) -> str:
        """Return what the programs have said."""
        with open(os.path.join(self.folder, "output"), errors="replace") as file:
            return file.read()

    def resolv_conf(self) -> dict[str, list[str]]:
        """Return the words of the guest's resolv.conf, by the first of each line."""
        found: dict[str, list[str]] = {}
        with open(self.path(RESOLV_CONF)) as file:
            for line in file:
                words = line.split()
                if words and not words[0].startswith("#"):
                    found.setdefault(words[0], []).extend(words[1:])
        return found

    def hostname(self) -> str:
        """Return the host name as the program that was started last sees it."""
        assert self.last is not None
        words = ["nsenter", f"--uts=/proc/{self.last.pid}/ns/uts", "--", "hostname"]
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def addresses(space: Namespace, *, scope: str = "global", deprecated: bool | None = None) -> set[str]:
    """Return the addresses of ``eth0`` with their prefix lengths; those deprecated, or not, or all."""
    found = set()
    for link in _ip(space, "addr", "show", "dev", "eth0"):
        for one in link.get("addr_info", []):
            old = bool(one.get("deprecated"))
            usable = not one.get("tentative") and not one.get("dadfailed")
            if one["scope"] == scope and usable and deprecated in (None, old):
                found.add(f"{one['local']}/{one['prefixlen']}")
    return found


def routers(space: Namespace) -> set[str]:
    """Return the routers of the default routes, of both IP versions."""
    routes = [one for version in ("-4", "-6") for one in _ip(space, version, "route", "show", "default")]
    return {one["gateway"] for one in routes if "gateway" in one}


def mtu(space: Namespace) -> int:
    """Return the MTU of ``eth0``."""
    return int(_ip(space, "link", "show", "dev", "eth0")[0]["mtu"])


def _ip(space: Namespace, *words: str) -> Sequence[dict[str, Any]]:
    return list(json.loads(space.run("ip", "-j", *words).stdout or "[]"))
