# SPDX-License-Identifier: GPL-2.0-or-later
"""What the daemon gives up once all is open: the last step of its start, before it has a second thread.

In this order, each a layer of its own, since no system need allow all of them:

* *namespaces*: mount, IPC and UTS. The file system is an empty one, with the few directories that the options
  named, as far as something is done there later.
* *user*: what ``--runas`` says. Whoever starts the daemon as root has it run as nobody. (First, where it is root that
  may not make namespaces: the user may, then.)
* *capabilities*: none, and no_new_privs.
* *Landlock*: in what is left of the file system, what is done there and no more; and signals to nobody.
* *system calls*: those that `godwit.daemon.syscalls` lists. Any other ends the process, and the log names it.

What the system refuses is named in the log, once. A container without extra rights refuses the namespaces, mostly, and
has the rest.
"""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401  # asyncio would import it with the first use, when nothing can be imported
import contextlib
import logging
import os
import stat
from collections.abc import Callable, Iterable
from typing import NamedTuple

from godwit.confine import _kernel, capabilities, landlock, namespaces, procfs, seccomp
from godwit.confine.landlock import Access
from godwit.daemon.lifecycle import User
from godwit.daemon.options import Options
from godwit.daemon.record import refusal
from godwit.daemon.syscalls import CONDITIONAL, MISSING, PLAIN
from godwit.dataplane.sockstate import keep_limits
from godwit.net.resolv import PATH as RESOLV

log = logging.getLogger(__name__)

_PR_SET_DUMPABLE = 4


class Layer(NamedTuple):
    """One means, whether it is in force, and what it does, or why it is not."""

    name: str
    holds: bool
    what: str


class Sandbox:
    """What is kept, by directory. ``enter`` once, in a process with one thread."""

    def __init__(self, options: Options) -> None:
        self.layers: list[Layer] = []
        self._options = options
        self._directories: dict[str, Access] = {}
        self._see(RESOLV, Access.READ_FILE)
        if options.record is not None:
            self._see(options.record, Access.MAKE_REG | Access.WRITE_FILE | Access.REMOVE_FILE)
        if options.pcap is not None and options.takeover is not None:  # opened when the guest is this process's
            self._see(options.pcap, Access.MAKE_REG | Access.WRITE_FILE | Access.TRUNCATE)
        if options.pid is not None:
            self._see(options.pid, Access.REMOVE_FILE)

    def sockets(self, paths: Iterable[str]) -> None:
        """Those that this process removes in its end, or makes once it has taken over."""
        for path in paths:
            self._see(path, Access.REMOVE_FILE | (Access.MAKE_SOCK if self._options.takeover else Access(0)))

    def _see(self, path: str, access: Access) -> None:
        """As the kernel looks the path up, without links: the last part of it may well not be there yet."""
        directory = os.path.dirname(os.path.realpath(path))
        self._directories[directory] = self._directories.get(directory, Access(0)) | access

    def enter(self, user: User | None, own: Callable[[User], None], last_words: tuple[int, bytes]) -> None:
        """Give up all that is not needed any more. Raises `StartError` where the user cannot be assumed; a layer that
        the system refuses raises nothing.

        ``own`` hands what is open over to the user. ``last_words``: where the log goes, and how a line of it begins.
        """
        procfs.keep()
        keep_limits()
        _close_directories()
        _kernel.load_for_reports()
        if user is not None:
            own(user)
        # Root that may not do it becomes the user first, who may have a user namespace of its own.
        as_root = capabilities.has(capabilities.CAP_SYS_ADMIN)
        if self._options.sandbox and as_root:
            self._layer("namespaces", self._leave_the_file_system)
        capabilities.empty_bounding_set()  # while this may be root's process still
        if user is not None:
            user.assume()
            _kernel.prctl(_PR_SET_DUMPABLE, 1)  # for a moment: the files below /proc/self are this user's then
        if self._options.sandbox and not as_root:
            self._layer("namespaces", self._leave_the_file_system)
        if os.geteuid() == 0:
            log.warning("runs as root, with --runas: root's files are in reach of whoever takes this process over")
        self._layer("capabilities", _keep_no_capability)
        # While it can be asked; no file is a reason not to serve, and a migration is late for hearing of it.
        if self._options.record is not None and (why := refusal(self._options.record)) is not None:
            log.warning("--record: no device state will be kept: %s", why)
        if self._options.sandbox:
            self._layer("Landlock", self._restrict_files)
            self._layer("system calls", lambda: _restrict_calls(last_words))
        else:
            log.warning("--no-sandbox: nothing but the user and its capabilities keeps this process from anything")
        log.info("given up: %s", "; ".join(f"{one.name} ({one.what})" for one in self.layers if one.holds))

    def _layer(self, name: str, work: Callable[[], str]) -> None:
        try:
            layer = Layer(name, True, work())
        except OSError as error:
            layer = Layer(name, False, str(error.strerror or error))
            log.warning("the system does not allow to give up %s: %s", name, layer.what)
        self.layers.append(layer)

    def _leave_the_file_system(self) -> str:
        resolv = os.path.realpath(RESOLV)
        namespaces.enter()
        procfs.detach()
        namespaces.leave_root(
            {path: bool(access & ~Access.READ_FILE) for path, access in self._directories.items()},
            [(RESOLV, resolv)] if resolv != RESOLV else [],
        )
        return "mount, IPC and UTS of its own"

    def _restrict_files(self) -> str:
        abi = landlock.restrict(self._directories)
        return f"version {abi}"


def _keep_no_capability() -> str:
    capabilities.keep_only(())
    # No core file with the guest's memory, and no debugger of another process of this user's.
    _kernel.prctl(_PR_SET_DUMPABLE, 0)
    return "none left"


def _restrict_calls(last_words: tuple[int, bytes]) -> str:
    seccomp.restrict(seccomp.program(PLAIN, CONDITIONAL, MISSING), *last_words)
    return f"{len(PLAIN) + len(CONDITIONAL) + 1} left"  # and what ends it


def _close_directories() -> None:
    """Close those that whoever started this has left open: each is a way into the file system."""
    for fd in procfs.foreign_descriptors():
        with contextlib.suppress(OSError):  # that of the listing itself is closed by now
            if fd > 2 and stat.S_ISDIR(os.fstat(fd).st_mode):
                os.close(fd)
