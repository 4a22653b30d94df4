# SPDX-License-Identifier: GPL-2.0-or-later
"""Back-ends on the hosts of the laboratory: godwit or passt, each with a repair helper, and any other.

A back-end serves one guest at ``socket``; its helper is at ``socket`` plus
``.repair``. Either program's helper serves either back-end::

    with Backend(net.a, folder) as source, Backend(net.b, folder, "passt") as target:
        guest = QemuGuest(source.socket)
        guest.migrate(target.socket)
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import ClassVar, Self

from godwit.lab import peer
from godwit.lab.errors import LabError
from godwit.lab.netns import Namespace, wait_until

KINDS = ("godwit", "passt")
LOG_SIZE = 1 << 28  # bytes of a log with levels, after which it would be cut
IDEAL = "ideal"  # godwit.lab.ideal, which is its own network: without ports, helper and migration
# The command as it is installed: nothing here may import it.
_GODWIT = [sys.executable, os.path.join(sysconfig.get_path("scripts"), "godwit")]

_STOOD_STILL = re.compile(r"has taken over from .* the guest stood still for ([0-9.]+) ms")
# A system call that is not on the list, or a module that was still to be imported.
_MISSED = re.compile(r"system call .* is not among|ModuleNotFoundError|ImportError")

_numbers = itertools.count()


@dataclass(frozen=True)
class Program:
    """A vhost-user back-end by its command line.

    Words of it may hold ``{socket}``, the path to listen at, ``{ports}``, ports
    of the host to forward to the same ports of the guest as ``first-last``, and
    ``{mtu}``, the guest's.
    """

    name: str
    words: tuple[str, ...]

    PLACES: ClassVar[tuple[str, ...]] = ("socket", "ports", "mtu")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Take ``NAME=COMMAND LINE``, the latter as a shell would split it; :class:`ValueError` says what is wrong."""
        name, _, line = text.partition("=")
        if not re.fullmatch(r"[a-zA-Z][a-zA-Z0-9._-]*", name):
            raise ValueError(f"{text!r} is not NAME=COMMAND LINE, the name of letters, digits, '.', '_' and '-'")
        words = tuple(shlex.split(line))
        if not words:
            raise ValueError(f"no command line for {name}")
        places = [place for word in words for place in re.findall(r"{([^{}]*)}", word)]
        for place in places:
            if place not in cls.PLACES:
                raise ValueError(f"{{{place}}} is none of {', '.join(f'{{{known}}}' for known in cls.PLACES)}")
        if "socket" not in places:
            raise ValueError(f"the command line of {name} has no {{socket}}, where it is to listen")
        return cls(name, words)

    def command(self, **values: object) -> list[str]:
        """Return the words with a value in each place."""
        return [re.sub(r"{([^{}]*)}", lambda match: str(values[match[1]]), word) for word in self.words]

    def __str__(self) -> str:
        return self.name


Kind = str | Program  # a back-end that the laboratory knows by name, or any other


class Backend:
    """One back-end process in ``space``, ready when this returns.

    ``kind`` says which program, ``helper`` which one's helper, or None for no
    helper; by default the program's own, which a `Program` has not. ``ports`` are
    the host's, TCP and UDP, that are forwarded to the same ports of the guest, as
    ``first-last``. ``arguments`` go to godwit or passt as they are; what both
    take: ``--dns``, ``--no-dhcp``, and much more. ``descriptors``
    limits how many the back-end may have open. ``wrapper`` is what runs the
    back-end's command line, in its own process. ``map_gw``: the gateway's address
    leads to the host's loopback, as it does by default outside of the laboratory,
    where the gateway is the server too. With ``stream`` it speaks no vhost-user,
    but the protocol of QEMU's ``-netdev stream``; nothing migrates then, and there
    is no helper. ``breakpoints``: the socket of ``godwit.lab.breakpoints`` at which
    a godwit asks what is to fail. ``levels``: a godwit's lines have time and level.
    ``patience``: seconds within which it has to listen; how many it took is in ``start_seconds``.
    """

    def __init__(
        self,
        space: Namespace,
        folder: str,
        kind: Kind = "godwit",
        *,
        helper: str | None = "own",
        ports: str | None = None,
        mtu: int | None = None,
        arguments: Sequence[str] = (),
        descriptors: int | None = None,
        wrapper: Sequence[str] = (),
        map_gw: bool = False,
        stream: bool = False,
        breakpoints: str | None = None,
        levels: bool = False,
        patience: float = 20.0,
    ) -> None:
        self.space = space
        self.kind = kind
        self.name = f"{kind}{next(_numbers)}-{space.name}"
        self.socket = os.path.join(folder, f"{self.name}.sock")
        self.log = os.path.join(folder, f"{self.name}.log")
        own_helper = kind if isinstance(kind, str) and kind in KINDS else None
        self.helper_kind = None if stream else own_helper if helper == "own" else helper
        self._helper: subprocess.Popen[bytes] | None = None
        self._listens_at = {self.socket}
        if not stream and (self.helper_kind or own_helper):
            self._listens_at.add(f"{self.socket}.repair")
        self._common = ["-f", *(() if map_gw else ("--no-map-gw",))]
        if levels:
            self._common += ["--log-file", self.log, "--log-size", str(LOG_SIZE)]
        common = [*self._common, *(() if stream else ("--vhost-user",)), "-s", self.socket]
        common += [] if ports is None else ["--tcp-ports", ports, "--udp-ports", ports]
        common += [*([] if mtu is None else ["--mtu", str(mtu)]), *arguments]
        if isinstance(kind, Program):
            if arguments or stream:
                raise LabError(f"{kind} is started by its own command line, without further arguments")
            words = kind.command(socket=self.socket, ports=ports or "none", mtu=mtu or 1500)
        elif kind == "godwit":
            program = [*_GODWIT, "serve"]
            if breakpoints is not None:
                program = [sys.executable, "-m", "godwit.lab.breakpoints", breakpoints]
            words = [*program, *(("--stream",) if stream else ()), *common]
        elif kind == "passt":
            words = peer.fetch().command(*common)
        elif kind == IDEAL:
            words = [sys.executable, "-m", "godwit.lab.ideal", self.socket]
        else:
            raise LabError(f"no such back-end: {kind}")
        self.arguments = list(arguments)
        if descriptors is not None:
            words = ["prlimit", f"--nofile={descriptors}:{descriptors}", *words]
        with open(self.log, "wb"):
            pass  # of an earlier one
        began = time.monotonic()
        with open(self.log, "ab") as log:  # the helper's lines go there, too
            self._process = space.popen([*wrapper, *words], stdout=log, stderr=log)
        try:
            self._until_it_listens(patience)
            self.start_seconds = time.monotonic() - began
            if self.helper_kind is not None:
                self.start_helper()
        except BaseException:
            self.close()
            raise

    def _until_it_listens(self, patience: float) -> None:
        def listening() -> bool:
            if self._process.poll() is not None:
                raise LabError(f"{self.name} ended with {self._process.returncode}: {self.messages()[-2000:]}")
            return all(map(os.path.exists, self._listens_at)) and self._listens_at <= _listening(self.pid)

        paths = ", ".join(sorted(self._listens_at))
        wait_until(listening, f"{self.name} to listen at {paths}", patience, interval=0.0005)

    def successor(self, arguments: Sequence[str] | None = None, wrapper: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        """Start a godwit that is to take over from this one; it writes into the same log.

        ``arguments``: its own, instead of this one's; ``wrapper``: what runs its command line, in its own process.
        """
        own = self.arguments if arguments is None else arguments
        words = [*_GODWIT, "serve", *self._common, "--takeover", f"{self.socket}.takeover", *own]
        with open(self.log, "ab") as log:
            return self.space.popen([*wrapper, *words], stdout=log, stderr=log)

    def hand_over(self, arguments: Sequence[str] | None = None) -> float:
        """Have another process take over; it is the back-end from then on. Returns how long the guest stood still.

        In seconds, as the new one has measured it. :class:`LabError` if the old one goes on.
        """
        before = len(_STOOD_STILL.findall(self.messages()))
        process = self.successor(arguments)

        def over() -> bool:
            if process.poll() is not None:
                raise LabError(f"{self.name} was not taken over: {self.messages()[-2000:]}")
            return not self.running and len(_STOOD_STILL.findall(self.messages())) > before

        wait_until(over, f"{self.name} to be taken over", 20.0)
        if self._process.returncode != 0:
            raise LabError(f"{self.name} ended with {self._process.returncode}: {self.messages()[-2000:]}")
        self._process = process
        if arguments is not None:
            self.arguments = list(arguments)
        return float(_STOOD_STILL.findall(self.messages())[-1]) / 1000

    def start_helper(self, *arguments: str) -> None:
        """Start a repair helper, with more options if it is godwit's; it has connected when this returns."""
        path = f"{self.socket}.repair"
        passt = self.helper_kind == "passt"
        words = peer.fetch().repair_command(path) if passt else [*_GODWIT, "repair", *arguments, path]
        with open(self.log, "ab") as log:
            helper = self._helper = self.space.popen(words, stdout=log, stderr=log)

        def connected() -> bool:
            if helper.poll() is not None:
                raise LabError(f"the helper of {self.name} ended with {helper.returncode}: {self.messages()}")
            return _has_unix_socket(helper.pid)

        wait_until(connected, f"the helper of {self.name} to connect", 20.0)

    def ensure_helper(self) -> None:
        """Start a helper where there was to be one and it has ended: passt lets go of its after each migration."""
        if self._helper is not None and self._helper.poll() is not None:
            self.start_helper()

    def kill_helper(self) -> None:
        """Kill the helper."""
        if self._helper is not None:
            self._helper.kill()
            self._helper.wait()
            self._helper = None

    def stop_helper(self) -> None:
        """Freeze the helper (SIGSTOP): what it is asked waits."""
        assert self._helper is not None
        self._helper.send_signal(signal.SIGSTOP)

    def leave_helper(self) -> subprocess.Popen[bytes]:
        """Leave the helper to the caller, running or stopped, to be resumed and waited for or killed."""
        assert self._helper is not None
        helper, self._helper = self._helper, None
        return helper

    def resume_helper(self) -> None:
        """Let a stopped helper go on."""
        assert self._helper is not None
        self._helper.send_signal(signal.SIGCONT)

    @property
    def pid(self) -> int:
        """The back-end's process."""
        return self._process.pid

    @property
    def helper_pid(self) -> int | None:
        """The helper's process, if it has one, also one that has just ended."""
        return None if self._helper is None else self._helper.pid

    @property
    def running(self) -> bool:
        """Whether the back-end runs."""
        return self._process.poll() is None

    def kill(self) -> None:
        """Kill the back-end, as a crash would end it."""
        self._process.kill()
        self._process.wait()

    def terminate(self) -> None:
        """Ask the back-end to end (SIGTERM)."""
        self._process.terminate()

    def wait(self, timeout: float) -> int:
        """Wait for the back-end's end; return its exit status."""
        return self._process.wait(timeout)

    def stop(self) -> None:
        """Freeze the process (SIGSTOP): it answers nothing, and its sockets stay."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a stopped process go on."""
        self._process.send_signal(signal.SIGCONT)

    def messages(self) -> str:
        """Return what back-end and helper have said."""
        with open(self.log, errors="replace") as file:
            return file.read()

    def close(self, timeout: float = 5.0) -> None:
        """End both processes; SIGTERM first. May be repeated."""
        self.kill_helper()
        if self.running:
            self._process.send_signal(signal.SIGCONT)
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout)
            self.kill()
        for path in (self.socket, *(f"{self.socket}.{what}" for what in ("repair", "takeover", "ctl"))):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
        if error is None:
            self.check_sandbox()

    def check_sandbox(self) -> None:
        """:class:`LabError` if a godwit has missed something that it had given up at its start."""
        missed = [line for line in self.messages().splitlines() if _MISSED.search(line)]
        if missed and self.kind == "godwit":
            raise LabError(f"{self.name} has given up what it needs: {missed[0]}")

    def __repr__(self) -> str:
        return f"<Backend {self.name}>"


def _listening(pid: int) -> set[str]:
    """Return the paths of the UNIX sockets that listen in the network namespace of a process."""
    paths = set()
    with contextlib.suppress(OSError), open(f"/proc/{pid}/net/unix") as table:
        for line in table:
            # number, references, protocol, flags (0x10000: listens), type, state, inode, path
            words = line.split()
            if len(words) == 8 and words[3] == "00010000":
                paths.add(words[7])
    return paths


def _has_unix_socket(pid: int) -> bool:
    """Whether a process has an open socket: a helper has none until it has connected."""
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:"):
                    return True
    return False
