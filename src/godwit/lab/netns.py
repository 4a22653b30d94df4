# SPDX-License-Identifier: GPL-2.0-or-later
"""Hosts as network namespaces on a bridge.

Namespaces have no name in the file system: each is held open by a descriptor
of this process, so two runs never collide, and when this process ends, however
it ends, the kernel takes namespaces, links and addresses away. What could
outlive it are the processes started inside; a small reaper ends those.

The network has two hosts, ``a`` and ``b``, that are one address: the same MAC,
IPv4 and IPv6 addresses, as the source and the target of a migration see the
world when the guest's address moves with it. Only one of them is connected at
any time. The server is always connected, and is the gateway too::

    with Network() as net:
        net.a.run("ping", "-c1", net.server.addr4)
        net.switch("b")
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import IO, Self, TypeVar

from godwit.lab.errors import CommandError, LabError, UnavailableError

CLONE_NEWNET = 0x40000000
CAP_NET_ADMIN = 12
CAP_SYS_ADMIN = 21

_IN_USERNS = "GODWIT_LAB_USERNS"  # set across the re-exec into a user namespace

PREFIX4 = 24
PREFIX6 = 64
GATEWAY4 = "192.0.2.1"
GATEWAY6 = "fe80::1"
SERVER4 = "192.0.2.2"
SERVER6 = "2001:db8::2"
HOST4 = "192.0.2.10"
HOST6 = "2001:db8::10"
HOST_MAC = "02:67:6f:64:77:0a"
SERVER_MAC = "02:67:6f:64:77:02"

_PORT_DISABLED = 0  # BR_STATE_DISABLED and BR_STATE_FORWARDING of linux/if_bridge.h
_PORT_FORWARDING = 3

# linux/netlink.h, linux/rtnetlink.h, linux/if_link.h
_NLM_F_REQUEST, _NLM_F_ACK, _NLMSG_ERROR, _NLA_F_NESTED = 0x1, 0x4, 2, 0x8000
_RTM_NEWLINK, _RTM_GETLINK, _RTM_SETLINK = 16, 18, 19
_IFF_UP, _IFLA_OPERSTATE, _IF_OPER_UP = 0x1, 16, 6
_IFLA_PROTINFO, _IFLA_BRPORT_STATE = 12, 1
_IFLA_LINKINFO, _IFLA_INFO_KIND, _IFLA_INFO_DATA, _IFLA_BR_FDB_FLUSH = 18, 1, 2, 21

NamespaceT = TypeVar("NamespaceT", bound="Namespace")

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *args: int) -> None:
    if getattr(_libc, name)(*args) != 0:
        err = ctypes.get_errno()
        raise OSError(err, f"{name}: {os.strerror(err)}")


# --- what this user may do --------------------------------------------------


def _look_in_sbin() -> None:
    """Have commands found where an ordinary user's PATH may not lead, by this process and those it starts.

    Debian keeps ``bridge`` there, which works for everybody.
    """
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    os.environ["PATH"] = os.pathsep.join([*folders, *(f for f in ("/usr/sbin", "/sbin") if f not in folders)])


def missing() -> str | None:
    """Say what stands in the way of making namespaces here, or None.

    Needs the capabilities CAP_SYS_ADMIN and CAP_NET_ADMIN, in whatever user
    namespace this process is, and the commands of iproute2 and util-linux.
    """
    _look_in_sbin()
    absent = [c for c in ("ip", "bridge", "nsenter") if shutil.which(c) is None]
    if absent:
        return f"commands not found: {', '.join(absent)} (Debian: apt-get install iproute2 util-linux)"
    effective = 0
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("CapEff:"):
                effective = int(line.split()[1], 16)
    need = 1 << CAP_NET_ADMIN | 1 << CAP_SYS_ADMIN
    if effective & need != need:
        return "making network namespaces needs root, or a user namespace in which this process is root (unshare -Urnm)"
    return None


def missing_tun() -> str | None:
    """Say what stands in the way of opening /dev/net/tun, or None."""
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return "/dev/net/tun does not exist: load the module (modprobe tun)"
    except PermissionError:
        return (
            "/dev/net/tun is not open to this user: run as root, or let all"
            " users open it (chmod 0666 /dev/net/tun), as most distributions do"
        )
    except OSError as error:
        return f"/dev/net/tun: {error.strerror}"
    return None


def require() -> None:
    """Raise :class:`UnavailableError` if namespaces cannot be made here."""
    reason = missing()
    if reason is not None:
        raise UnavailableError(reason)


def enter_user_namespace() -> None:
    """Make this process able to build the network, by starting it again if need be.

    Does nothing where namespaces can be made already. Otherwise the same
    command line is executed again as root of new user, network and mount
    namespaces; then this does not return. Raises :class:`UnavailableError` where the
    system does not allow that.
    """
    reason = missing()
    if reason is None:
        return
    if os.environ.get(_IN_USERNS) or shutil.which("unshare") is None:
        raise UnavailableError(reason)
    prefix = ["unshare", "--map-root-user", "--net", "--mount"]
    probe = subprocess.run([*prefix, "true"], capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        raise UnavailableError(
            f"{reason}; and this system gives this user none: {probe.stderr.strip()}"
            " (see the settings user.max_user_namespaces,"
            " kernel.unprivileged_userns_clone and"
            " kernel.apparmor_restrict_unprivileged_userns)"
        )
    os.environ[_IN_USERNS] = "1"
    os.execvp(prefix[0], [*prefix, *sys.orig_argv])


# --- one namespace ----------------------------------------------------------


class _Reaper:
    """Ends what was started inside the namespaces, should this process be killed.

    A child of its own that reads which namespaces there are from a pipe, and
    acts at the end of file. Processes are found by the inode of their network
    namespace.
    """

    _PROGRAM = """
import os, signal, sys
held = set()
for line in sys.stdin:
    word, inode = line.split()
    (held.add if word == "add" else held.discard)(int(inode))
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        if int(pid) != os.getpid() and os.stat(f"/proc/{pid}/ns/net").st_ino in held:
            os.kill(int(pid), signal.SIGKILL)
    except OSError:
        pass
"""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pid = 0
        self._process: subprocess.Popen[str] | None = None

    def tell(self, word: str, inode: int) -> None:
        with self._lock:
            if self._process is None or self._pid != os.getpid():
                self._pid = os.getpid()
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", self._PROGRAM],
                    stdin=subprocess.PIPE,
                    text=True,
                    start_new_session=True,  # not for the terminal's interrupt
                )
            assert self._process.stdin is not None
            self._process.stdin.write(f"{word} {inode}\n")
            self._process.stdin.flush()

    def close(self) -> None:
        with self._lock:
            process, self._process = self._process, None
        if process is not None and self._pid == os.getpid():
            assert process.stdin is not None
            process.stdin.close()
            process.wait()


_reaper = _Reaper()
atexit.register(_reaper.close)


def _inside(inode: int) -> list[int]:
    """Return the processes, this one excepted, whose network namespace this is."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            with contextlib.suppress(OSError):
                if os.stat(f"/proc/{entry}/ns/net").st_ino == inode:
                    found.append(int(entry))
    return found


class Namespace:
    """A network namespace, and the processes in it.

    ``path`` names it for ``nsenter --net=PATH`` and ``ip link set ... netns PATH``
    for as long as this object is open.
    """

    def __init__(self, name: str) -> None:
        require()
        self.name = name
        own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _call("unshare", CLONE_NEWNET)
            try:
                self._fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            finally:
                _call("setns", own, CLONE_NEWNET)
        finally:
            os.close(own)
        self.inode = os.fstat(self._fd).st_ino
        self._children: list[subprocess.Popen[bytes] | subprocess.Popen[str]] = []
        self._closed = False
        _reaper.tell("add", self.inode)
        atexit.register(self.close)
        try:
            with self.enter():
                self._prepare()
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        # No duplicate address detection and no autoconfiguration: addresses
        # are usable at once, and there are none that nobody asked for.
        for key, value in (
            ("net/ipv6/conf/all/accept_dad", "0"),
            ("net/ipv6/conf/default/accept_dad", "0"),
            ("net/ipv6/conf/all/accept_ra", "0"),
            ("net/ipv6/conf/default/accept_ra", "0"),
        ):
            self.sysctl(key, value)
        try:
            self.sysctl("net/ipv4/ping_group_range", "0 2147483647")
        except OSError:
            # In a user namespace only the groups that it maps can be named.
            self.sysctl("net/ipv4/ping_group_range", "0 0")
        # Linux's own default, or what every kernel has: results must not hang on
        # what this machine's administrator prefers. A namespace may not choose
        # an algorithm that is restricted to privileged users.
        for algorithm in ("cubic", "reno"):
            with contextlib.suppress(OSError):
                self.sysctl("net/ipv4/tcp_congestion_control", algorithm)
                break
        self.ip("link set lo up")

    @property
    def path(self) -> str:
        """Where this namespace can be opened, by this user's processes."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    @property
    def enter_command(self) -> list[str]:
        """The words to put before a command to run it in here."""
        if self._closed:
            raise LabError(f"namespace {self.name} is closed")
        return ["nsenter", f"--net={self.path}", "--"]

    @contextlib.contextmanager
    def enter(self) -> Iterator[None]:
        """Move the calling thread into this namespace for a ``with`` block.

        Sockets opened inside belong to the namespace for good. Processes are
        better started with :meth:`popen`, which leaves this thread alone.
        """
        own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _call("setns", self._fd, CLONE_NEWNET)
            try:
                yield
            finally:
                _call("setns", own, CLONE_NEWNET)
        finally:
            os.close(own)

    def sysctl(self, key: str, value: str) -> None:
        """Set ``key`` (with slashes, as below /proc/sys) for this namespace."""
        with self.enter(), open(f"/proc/sys/{key}", "w") as file:
            file.write(value)

    def run(
        self,
        *args: str,
        check: bool = True,
        timeout: float = 60.0,
        stdin: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside to its end and return its output, stderr with it.

        Raises :class:`CommandError` on another exit status than 0 unless
        ``check`` is false, and ``subprocess.TimeoutExpired`` after ``timeout``
        seconds.
        """
        done = subprocess.run(
            [*self.enter_command, *args],
            input="" if stdin is None else stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode != 0:
            raise CommandError(self.name, " ".join(args), done.returncode, done.stdout)
        return done

    def ip(self, *commands: str) -> None:
        """Carry out ``ip`` commands inside, all in one call: ``"link set lo up"``."""
        self.run("ip", "-batch", "-", stdin="".join(f"{c}\n" for c in commands))

    def popen(
        self,
        args: Sequence[str],
        *,
        stdin: int | IO[bytes] | None = subprocess.DEVNULL,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
        env: dict[str, str] | None = None,
        cwd: str | None = None,
        pass_fds: Sequence[int] = (),
    ) -> subprocess.Popen[bytes]:
        """Start a command inside; it is ended with the namespace at the latest.

        The process id is the command's own (``nsenter`` replaces itself).
        """
        process = subprocess.Popen(
            [*self.enter_command, *args],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=env,
            cwd=cwd,
            pass_fds=pass_fds,
        )
        self._children = [c for c in self._children if c.poll() is None]
        self._children.append(process)
        return process

    def processes(self, program: str) -> list[int]:
        """Return the processes inside that run ``program``, by name, or by its interpreter."""
        found = []
        for pid in _inside(self.inode):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline") as file:
                if program in map(os.path.basename, file.read().split("\0")[:2]):
                    found.append(pid)
        return found

    def close(self) -> None:
        """End every process inside and let go of the namespace. May be repeated."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        for child in self._children:
            if child.poll() is None:
                child.terminate()
        deadline = time.monotonic() + 3.0
        for child in self._children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, deadline - time.monotonic()))
        for pid in _inside(self.inode):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        for child in self._children:
            child.wait()
        os.close(self._fd)
        with contextlib.suppress(OSError):  # the reaper may be gone at interpreter exit
            _reaper.tell("del", self.inode)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"


class Host(Namespace):
    """A machine on the network: a namespace with one interface, ``eth0``."""

    interface = "eth0"

    def __init__(self, name: str, mac: str, addr4: str, addr6: str) -> None:
        super().__init__(name)
        self.mac = mac
        self.addr4 = addr4
        self.addr6 = addr6
        self.addresses: tuple[str, ...] = (addr4, addr6)

    def address(self, ipv6: bool) -> str:
        """Return the IPv6 or the IPv4 address."""
        return self.addr6 if ipv6 else self.addr4


# --- the network ------------------------------------------------------------


class _Bridge:
    """The bridge ``br0`` of a namespace, over netlink: at once, where a command takes milliseconds.

    A guest stands still while its network is switched.
    """

    def __init__(self, space: Namespace) -> None:
        self._space = space
        with space.enter():
            self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._sock.settimeout(10.0)

    @staticmethod
    def _attribute(kind: int, value: bytes) -> bytes:
        return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)

    def _index(self, name: str) -> int:
        with self._space.enter():
            return socket.if_nametoindex(name)

    def _ask(self, request: int, flags: int, family: int, index: int, attributes: bytes = b"") -> bytes:
        """Send a request about a link; its answer."""
        body = struct.pack("=BxHiII", family, 0, index, 0, 0) + attributes
        self._sock.send(struct.pack("=IHHII", 16 + len(body), request, _NLM_F_REQUEST | flags, 0, 0) + body)
        return self._sock.recv(1 << 16)

    def _change(self, request: int, family: int, name: str, attribute: bytes) -> None:
        answer = self._ask(request, _NLM_F_ACK, family, self._index(name), attribute)
        kind, error = struct.unpack_from("=4xH10xi", answer)
        if kind != _NLMSG_ERROR or error != 0:
            raise LabError(f"the bridge's {name} cannot be changed: {os.strerror(-error)}")

    def _has_settled(self, index: int) -> bool:
        """Whether the kernel has noticed that a link is up; or it has been taken down, and nobody waits for it."""
        answer = self._ask(_RTM_GETLINK, 0, socket.AF_UNSPEC, index)
        (flags,) = struct.unpack_from("=I", answer, 16 + 8)
        if not flags & _IFF_UP:
            return True
        at = 32
        while at < len(answer):
            size, kind = struct.unpack_from("=HH", answer, at)
            if kind == _IFLA_OPERSTATE:
                return answer[at + 4] == _IF_OPER_UP
            at += -(-size // 4) * 4
        return False

    def port(self, name: str, state: int) -> None:
        """Put a port into a state, in which it stays.

        A link that has been set up is so once the kernel gets round to it, on a busy host after a while. Then it has
        the bridge begin to use the port: one that was disabled before forwards again.
        """
        index = self._index(name)
        wait_until(lambda: self._has_settled(index), f"the link of the bridge's {name} to be up", interval=0.001)
        state_of = self._attribute(_IFLA_BRPORT_STATE, bytes([state]))
        self._change(_RTM_SETLINK, socket.AF_BRIDGE, name, self._attribute(_IFLA_PROTINFO | _NLA_F_NESTED, state_of))

    def forget(self) -> None:
        """Forget which address is behind which port."""
        flush = self._attribute(_IFLA_INFO_DATA | _NLA_F_NESTED, self._attribute(_IFLA_BR_FDB_FLUSH, b""))
        kind = self._attribute(_IFLA_INFO_KIND, b"bridge")
        self._change(
            _RTM_NEWLINK, socket.AF_UNSPEC, "br0", self._attribute(_IFLA_LINKINFO | _NLA_F_NESTED, kind + flush)
        )

    def close(self) -> None:
        """Close the netlink socket."""
        self._sock.close()


class Network:
    """Two hosts that are one address, and a server, on a bridge.

    ``connected`` is the host whose port forwards, or None. The other's port is
    blocked with its carrier up: a port taken down would cost the next switch up
    to a second of carrier detection. Pass ``mtu`` for links that are not 1500.
    ``bridge`` is the bridge's namespace, with a port ``p-NAME`` for each host.
    """

    def __init__(self, *, mtu: int = 1500, connected: str | None = "a") -> None:
        self.mtu = mtu
        self.connected: str | None = None
        self._cleanup = contextlib.ExitStack()
        try:
            self.bridge = self._keep(Namespace("bridge"))
            self.bridge.ip(
                "link add br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0",
                f"link set br0 mtu {mtu} up",
            )
            self._ports = _Bridge(self.bridge)
            self._cleanup.callback(self._ports.close)
            self.server = self._keep(Host("server", SERVER_MAC, SERVER4, SERVER6))
            self.a = self._keep(Host("a", HOST_MAC, HOST4, HOST6))
            self.b = self._keep(Host("b", HOST_MAC, HOST4, HOST6))
            self.hosts = {"a": self.a, "b": self.b}
            self._plug(self.server)
            self.server.addresses += (GATEWAY4, GATEWAY6)
            self.server.ip(
                f"addr add {GATEWAY4}/{PREFIX4} dev eth0",
                f"addr add {GATEWAY6}/{PREFIX6} dev eth0 nodad",
            )
            for host in self.hosts.values():
                self._plug(host)
                self._give_routes(host)
                # Whoever sends while disconnected must not lose a second to
                # neighbour discovery after the switch: it is not what is studied.
                for host_side, other in ((host, self.server), (self.server, host)):
                    host_side.ip(
                        *(
                            f"neigh replace {address} lladdr {other.mac} dev eth0 nud permanent"
                            for address in other.addresses
                        )
                    )
                self._ports.port(f"p-{host.name}", _PORT_DISABLED)
            self.switch(connected)
        except BaseException:
            self.close()
            raise

    def _keep(self, space: NamespaceT) -> NamespaceT:
        self._cleanup.callback(space.close)
        return space

    def _give_routes(self, host: Host) -> None:
        host.ip(
            f"route replace default via {GATEWAY4} dev eth0",
            f"route replace default via {GATEWAY6} dev eth0",
        )

    def take_address(self, host: Host, *, ipv6: bool) -> None:
        """Take an address from a host, and with it what leads through it."""
        host.ip(f"addr del {host.address(ipv6)}/{PREFIX6 if ipv6 else PREFIX4} dev eth0")

    def give_address(self, host: Host, *, ipv6: bool) -> None:
        """Give it back, with the routes."""
        nodad = " nodad" if ipv6 else ""
        host.ip(f"addr replace {host.address(ipv6)}/{PREFIX6 if ipv6 else PREFIX4} dev eth0{nodad}")
        self._give_routes(host)

    def _plug(self, host: Host) -> None:
        self.bridge.ip(
            f"link add p-{host.name} mtu {self.mtu} type veth"
            f" peer name eth0 mtu {self.mtu} address {host.mac} netns {host.path}",
            f"link set p-{host.name} master br0 up",
        )
        host.ip(
            "link set eth0 up",
            f"addr add {host.addr4}/{PREFIX4} dev eth0",
            f"addr add {host.addr6}/{PREFIX6} dev eth0 nodad",
        )

    def switch(self, to: str | None) -> None:
        """Connect host ``to`` (``"a"`` or ``"b"``) and only it; None: neither.

        The moment at which the network moves. It is no part of a guest's
        migration, and comes before, with or long after it as the caller likes.
        """
        if to is not None and to not in self.hosts:
            raise LabError(f"no such host on the network: {to}")
        for name in self.hosts:
            if name != to:
                self._ports.port(f"p-{name}", _PORT_DISABLED)
        if to is not None:
            self._ports.port(f"p-{to}", _PORT_FORWARDING)
        self._ports.forget()
        self.connected = to

    def other(self, name: str) -> str:
        """Return the name of the host that ``name`` is not: where to go next."""
        return "b" if name == "a" else "a"

    def close(self) -> None:
        """Take it all down. May be repeated."""
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


def wait_until(condition: Callable[[], bool], what: str, timeout: float = 10.0, interval: float = 0.005) -> None:
    """Wait until ``condition()`` holds; :class:`LabError` naming ``what`` if it never does."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise LabError(f"waited {timeout:g} s for {what}")
        time.sleep(interval)
