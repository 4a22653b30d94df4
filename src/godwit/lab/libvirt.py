# SPDX-License-Identifier: GPL-2.0-or-later
"""libvirt on a host of the laboratory, with godwit found as ``passt``.

libvirt's daemon runs in the host's network namespace, from the newer packages
(:mod:`godwit.lab.overlay`), with ``qemu:///session`` as its users know it: by an
ordinary user with no capabilities, whose home is a temporary folder. On its PATH
is a symbolic link ``passt`` to ``godwit-passt``, as the user's guide has it; what
libvirt starts, and how, is its own affair::

    with Libvirt(net.a) as libvirt:
        guest = libvirt.define("guest", interface("<portForward .../>"))
        guest.start()
        guest.wait_network()
        guest.agent.run("ping -c1 192.0.2.2")
        guest.destroy()
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from types import TracebackType
from typing import Self
from xml.sax.saxutils import escape, quoteattr

from godwit.lab import image, overlay
from godwit.lab.agent import Agent, AgentError
from godwit.lab.errors import CommandError, LabError
from godwit.lab.netns import Namespace, wait_until
from godwit.lab.qemu import MAC, wait_network

URI = "qemu:///session"
_STARTS_WITHIN = 30.0  # seconds; libvirt asks QEMU what it can do, first of all


def passt_folder(folder: str) -> str:
    """Make a folder for a PATH in ``folder``, with godwit as the ``passt`` that is found there."""
    path = os.path.join(folder, "bin")
    os.mkdir(path)
    os.symlink(os.path.join(sysconfig.get_path("scripts"), "godwit-passt"), os.path.join(path, "passt"))
    return path


def interface(inside: str = "", *, kind: str = "vhostuser", device: str = "eth0", log: str = "") -> str:
    """Return the XML of an interface that passt serves.

    ``kind`` is libvirt's type of it, ``device`` the host's interface whose
    configuration the guest gets, ``log`` passt's log file, and ``inside`` more
    of its elements, port forwards above all.
    """
    log_file = f" logFile={quoteattr(log)}" if log else ""
    return (
        f"<interface type='{kind}'><mac address='{MAC}'/><backend type='passt'{log_file}/>"
        f"<source dev={quoteattr(device)}/>{inside}<model type='virtio'/></interface>"
    )


class Libvirt:
    """libvirt's daemon in ``space``, and the user's home with it.

    ``resolv`` is what the host's resolv.conf says, for libvirt and all that it
    starts.
    """

    def __init__(self, space: Namespace, *, resolv: str = "nameserver 192.0.2.2\n") -> None:
        self.space = space
        self.overlay = overlay.fetch()
        self._cleanup = contextlib.ExitStack()
        # Not a long name: libvirt makes UNIX sockets far below.
        self.folder = self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="godwit-lv."))
        for name in ("home", "run", "etc"):
            os.mkdir(os.path.join(self.folder, name))
        with open(os.path.join(self.folder, "etc/resolv.conf"), "w") as file:
            file.write(resolv)
        self._environment = {
            "PATH": f"{passt_folder(self.folder)}:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": os.path.join(self.folder, "home"),
            "XDG_RUNTIME_DIR": os.path.join(self.folder, "run"),
            "LC_ALL": "C.UTF-8",
        }
        self.log = os.path.join(self.folder, "libvirtd.log")
        with open(self.log, "wb") as log:
            self._daemon = space.popen(self._command("libvirtd"), env=self._environment, stdout=log, stderr=log)
        self._cleanup.callback(self._stop)
        try:
            wait_until(self._listens, "libvirt's daemon to listen", _STARTS_WITHIN)
        except BaseException:
            self.close()
            raise

    def _command(self, *args: str) -> list[str]:
        return self.overlay.command(*args, user=True, etc=os.path.join(self.folder, "etc"))

    def _listens(self) -> bool:
        if self._daemon.poll() is not None:
            raise LabError(f"libvirtd ended with {self._daemon.returncode}: {self.messages()}")
        return os.path.exists(os.path.join(self.folder, "run/libvirt/libvirt-sock"))

    def _stop(self) -> None:
        """End the daemon, and whatever it has left: its guests would run on."""
        self._daemon.terminate()
        try:
            self._daemon.wait(10)
        except subprocess.TimeoutExpired:
            self._daemon.kill()
            self._daemon.wait()

    def run(self, *args: str, check: bool = True, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run ``virsh`` with ``args`` to its end; :class:`CommandError` if it fails, unless ``check`` is false."""
        done = subprocess.run(
            [*self.space.enter_command, *self._command("virsh", "--quiet", "--connect", URI, *args)],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode != 0:
            raise CommandError("virsh", " ".join(args), done.returncode, done.stdout)
        return done

    def virsh(self, *args: str, timeout: float = 60.0) -> str:
        """Run ``virsh`` with ``args`` and return its output; :class:`CommandError` if it fails."""
        return self.run(*args, timeout=timeout).stdout.strip()

    def define(self, name: str, *interfaces: str, memory: int = 256) -> Domain:
        """Define a domain with these interfaces (XML) and ``memory`` MiB. It is not started."""
        return Domain(self, name, interfaces, memory)

    @property
    def passt_state(self) -> str:
        """The folder in which libvirt keeps passt's sockets and PID files."""
        return os.path.join(self.folder, "run/libvirt/qemu/run/passt")

    def messages(self) -> str:
        """Return what the daemon has said."""
        with open(self.log, errors="replace") as file:
            return file.read()

    def close(self) -> None:
        """End the daemon; guests end with the namespace. May be repeated."""
        self._cleanup.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Domain:
    """One of libvirt's domains: the laboratory's guest. ``agent`` is there while it runs."""

    def __init__(self, libvirt: Libvirt, name: str, interfaces: Sequence[str], memory: int) -> None:
        self.libvirt = libvirt
        self.name = name
        self.console = os.path.join(libvirt.folder, f"{name}.console")
        self._line = os.path.join(libvirt.folder, f"{name}.line")
        self._socket: socket.socket | None = None
        path = os.path.join(libvirt.folder, f"{name}.xml")
        with open(path, "w") as file:
            file.write(self._xml(interfaces, memory))
        libvirt.virsh("define", path)

    def _xml(self, interfaces: Sequence[str], memory: int) -> str:
        boot = image.build()
        append = "console=ttyS0 quiet panic=-1 godwit.ip=dhcp godwit.ip6=auto"
        return f"""\
<domain type='qemu'>
  <name>{escape(self.name)}</name>
  <memory unit='MiB'>{memory}</memory>
  <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{escape(boot.kernel)}</kernel>
    <initrd>{escape(boot.initrd)}</initrd>
    <cmdline>{append}</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='maximum'/>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <serial type='file'><source path={quoteattr(self.console)}/><target port='0'/></serial>
    <serial type='unix'><source mode='connect' path={quoteattr(self._line)}/><target port='1'/></serial>
    {"".join(interfaces)}
  </devices>
</domain>
"""

    def start(self, timeout: float = 60.0) -> None:
        """Start it, up to where its agent answers; :class:`CommandError` with virsh's words if it does not start."""
        self._hang_up()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self._line)
            try:
                listener.listen()
                listener.settimeout(timeout)
                self.libvirt.virsh("start", self.name, timeout=timeout)
                self._socket, _ = listener.accept()
            finally:
                os.unlink(self._line)
        self._socket.settimeout(None)
        self.agent = Agent(self._socket)
        self.agent.hello(timeout)

    def wait_network(self, timeout: float = 30.0) -> None:
        """Wait until the guest has an IPv4 and an IPv6 address."""
        wait_network(self.agent, ("ip4", "ip6"), timeout)

    def state(self) -> str:
        """Return libvirt's word for its state: ``running``, ``shut off``..."""
        return self.libvirt.virsh("domstate", self.name)

    def destroy(self) -> None:
        """End it at once."""
        self.libvirt.virsh("destroy", self.name)
        self._hang_up()

    def shutdown(self, timeout: float = 30.0) -> None:
        """Press its power button, and wait until it is shut off."""
        self.libvirt.virsh("shutdown", self.name)
        self.wait_off(timeout)

    def wait_off(self, timeout: float = 30.0) -> None:
        """Wait until it is shut off."""
        wait_until(lambda: self.state() == "shut off", f"the domain {self.name} to be shut off", timeout, 0.1)
        self._hang_up()

    def power_off_inside(self, timeout: float = 30.0) -> None:
        """Have the guest turn itself off, and wait until it is shut off."""
        with contextlib.suppress(AgentError):  # it is gone before it could answer
            self.agent.run("poweroff -f", check=False)
        self.wait_off(timeout)

    def undefine(self) -> None:
        """End it where it runs, and have libvirt forget it."""
        self.libvirt.run("destroy", self.name, check=False)
        self.libvirt.run("undefine", self.name, check=False)
        self._hang_up()

    def _hang_up(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
