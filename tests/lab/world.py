# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest behind a back-end, with a world around it: for tests of what guests do all day.

    guest -- host a -- bridge -- server, the gateway -- far

``far`` is behind the server, over a link of a smaller MTU. With
GODWIT_TEST_BACKEND=passt in the environment the same tests run against passt,
as far as it does what they ask for; with ``none`` the host is in the guest's
place, which shows whether a test itself is right.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self

from godwit.lab.backend import Backend
from godwit.lab.errors import LabError
from godwit.lab.guest import EmbeddedGuest
from godwit.lab.netns import HOST4, HOST6, PREFIX4, PREFIX6, SERVER4, SERVER6, Namespace, Network, wait_until

KIND = os.environ.get("GODWIT_TEST_BACKEND", "godwit")

# The host's second addresses.
OTHER4, OTHER6 = "192.0.2.11", "2001:db8::11"
# Behind the server.
FAR4, FAR6 = "198.51.100.2", "2001:db8:1::2"
FAR_MTU = 1400

SERVER = {4: SERVER4, 6: SERVER6}
HOST = {4: HOST4, 6: HOST6}
# The server rejects what goes there.
NOWHERE = {4: "203.0.113.1", 6: "2001:db8:ffff::1"}
_REJECT = f"""
table inet nowhere {{
    chain forward {{
        type filter hook forward priority 0;
        ip daddr {NOWHERE[4]} reject with icmp type net-unreachable
        ip6 daddr {NOWHERE[6]} reject with icmpv6 type no-route
    }}
}}
"""
OTHER = {4: OTHER4, 6: OTHER6}
FAR = {4: FAR4, 6: FAR6}
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
LOOPBACK = {4: "127.0.0.1", 6: "::1"}

# For programs of others: what the sanitizers need is for ours.
PLAIN = ("env", "-u", "LD_PRELOAD", "-u", "PYTHONMALLOC")

TIMEOUT = 3.0  # seconds, for what is to come
SILENCE = 0.15  # seconds, for what is not


class World:
    """The network, and a back-end on host ``a`` with a guest that has the host's addresses.

    ``arguments`` are the back-end's. ``families``: of IP versions the host has
    these alone. ``wrapper``: see :class:`Backend`. ``prepare`` is called before the back-end starts.
    """

    def __init__(
        self,
        *arguments: str,
        families: Sequence[int] = (4, 6),
        wrapper: Sequence[str] = (),
        map_gw: bool = False,
        prepare: Callable[[World], None] | None = None,
    ) -> None:
        self.cleanup = contextlib.ExitStack()
        try:
            self.folder = self.cleanup.enter_context(tempfile.TemporaryDirectory())
            os.chmod(self.folder, 0o755)  # passt becomes another user
            self.net = self.cleanup.enter_context(Network())
            self.server = self.net.server
            self.host = self.net.a
            # Nothing is sent from these by itself: they are no address of the guest's.
            self.host.ip(
                f"addr add {OTHER4}/{PREFIX4} dev eth0",
                f"addr add {OTHER6}/{PREFIX6} dev eth0 preferred_lft 0 nodad",
            )
            self.far = self._add_far()
            # A namespace without a link: a test may give it one.
            self.side = self.cleanup.enter_context(Namespace("side"))
            for version in {4, 6} - set(families):
                self.host.run("ip", f"-{version}", "addr", "flush", "dev", "eth0")
                self.host.run("ip", f"-{version}", "route", "flush", "table", "main")
            if prepare is not None:
                prepare(self)
            self.guest: Namespace = self.host
            self._embedded: EmbeddedGuest | None = None
            self._backend: Backend | None = None
            if KIND != "none":
                self._add_guest(arguments, map_gw, wrapper)
        except BaseException:
            self.cleanup.close()
            raise

    def _add_guest(self, arguments: Sequence[str], map_gw: bool, wrapper: Sequence[str]) -> None:
        self._backend = self.cleanup.enter_context(
            Backend(self.host, self.folder, KIND, helper=None, arguments=arguments, wrapper=wrapper, map_gw=map_gw)
        )
        self._embedded = self.cleanup.enter_context(EmbeddedGuest())
        self._embedded.connect(self._backend.socket)
        self._embedded.configure()
        self.guest = self._embedded.space

    @property
    def backend(self) -> Backend:
        """The back-end: only where there is one."""
        assert self._backend is not None
        return self._backend

    @property
    def embedded(self) -> EmbeddedGuest:
        """The guest, with its front-end: only where there is one."""
        assert self._embedded is not None
        return self._embedded

    def messages(self) -> str:
        """Return what the back-end has said."""
        return self._backend.messages() if self._backend is not None else ""

    def _add_far(self) -> Namespace:
        far = self.cleanup.enter_context(Namespace("far"))
        self.server.ip(
            f"link add far mtu {FAR_MTU} type veth peer name eth0 mtu {FAR_MTU} netns {far.path}",
            "addr add 198.51.100.1/24 dev far",
            "addr add 2001:db8:1::1/64 dev far nodad",
            "link set far up",
        )
        far.ip(
            f"addr add {FAR4}/24 dev eth0",
            f"addr add {FAR6}/64 dev eth0 nodad",
            "link set eth0 up",
            "route add default via 198.51.100.1",
            "route add default via 2001:db8:1::1",
        )
        self.server.sysctl("net/ipv4/ip_forward", "1")
        self.server.sysctl("net/ipv6/conf/all/forwarding", "1")
        # Not simply without a route: those errors the kernel limits to a few, whatever is asked for.
        self.server.ip(f"route add {NOWHERE[4]} via {FAR4}", f"route add {NOWHERE[6]} via {FAR6}")
        self.server.run("nft", "-f", "-", stdin=_REJECT)
        for space in (self.server, far):
            # As many errors as there are reasons: tests come in close succession.
            space.sysctl("net/ipv4/icmp_ratelimit", "0")
            space.sysctl("net/ipv6/icmp/ratelimit", "0")
        return far

    def serve(self, space: Namespace, *words: str, port: int, addr: str = "127.0.0.1") -> subprocess.Popen[bytes]:
        """Start a server; TCP connections to ``port`` are taken when this returns."""
        with open(os.path.join(self.folder, f"{os.path.basename(words[0])}-{port}.log"), "wb") as log:
            process = space.popen([*PLAIN, *words], stdout=log, stderr=log)

        def listens() -> bool:
            if process.poll() is not None:
                with open(log.name, errors="replace") as said:
                    raise LabError(f"{words[0]} ended with {process.returncode}: {said.read()}")
            with space.enter(), contextlib.suppress(OSError), socket.create_connection((addr, port), 1.0):
                return True
            return False

        wait_until(listens, f"{words[0]} to listen", interval=0.02)
        return process

    def close(self) -> None:
        """Take it all down; the back-end must have kept to the rules."""
        try:
            if self._embedded is not None:
                self._embedded.check()
            assert self._backend is None or self._backend.running, self.messages()
        finally:
            self.cleanup.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.cleanup.close()
        else:
            self.close()


def run(
    space: Namespace, *words: str, check: bool = True, timeout: float = 20.0, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program of others in ``space`` to its end."""
    return space.run(*PLAIN, *words, check=check, timeout=timeout, stdin=stdin)


def udp(space: Namespace, version: int, addr: str = "", port: int = 0) -> socket.socket:
    """Open a UDP socket in ``space``, bound to ``addr`` and ``port``, which receives with a timeout."""
    with space.enter():
        sock = socket.socket(FAMILY[version], socket.SOCK_DGRAM)
    sock.settimeout(TIMEOUT)
    sock.bind((addr, port))
    return sock


def tcp(space: Namespace, version: int, addr: str, port: int) -> socket.socket:
    """Open a TCP socket in ``space`` that listens at ``addr`` and ``port``."""
    with space.enter():
        sock = socket.create_server((addr, port), family=FAMILY[version])
    sock.settimeout(TIMEOUT)
    return sock


def connect(space: Namespace, addr: str, port: int, timeout: float = TIMEOUT) -> socket.socket:
    """Open a TCP connection from ``space``; :class:`TimeoutError` after so many seconds.

    The kernel waits, not ``poll()``: that may tell of an ICMP error before SO_ERROR holds it (seen with Linux 6.18),
    and a connection that failed passes for an open one.
    """
    with contextlib.ExitStack() as stack, space.enter():
        family, kind, _, _, address = socket.getaddrinfo(addr, port, type=socket.SOCK_STREAM)[0]
        sock = stack.enter_context(socket.socket(family, kind))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", *divmod(round(timeout * 1e6), 10**6)))
        try:
            sock.connect(address)
        except BlockingIOError as error:
            raise TimeoutError(f"no connection to {addr} port {port} in {timeout} s") from error
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", 0, 0))
        sock.settimeout(timeout)
        stack.pop_all()
        return sock


_MUTE = "table inet mute { chain out { type filter hook output priority 0; tcp dport 5001 drop; }; }"


@contextlib.contextmanager
def mute(space: Namespace) -> Iterator[None]:
    """Nothing leaves that is for port 5001 of TCP."""
    space.run("nft", "-f", "-", stdin=_MUTE)
    try:
        yield
    finally:
        space.run("nft", "delete", "table", "inet", "mute")


def silent(sock: socket.socket) -> bool:
    """Whether nothing comes for a while."""
    sock.settimeout(SILENCE)
    try:
        sock.recv(65536)
    except (TimeoutError, ConnectionRefusedError):
        return True
    finally:
        sock.settimeout(TIMEOUT)
    return False
