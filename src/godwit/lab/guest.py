# SPDX-License-Identifier: GPL-2.0-or-later
"""The embedded guest: a real Linux TCP stack behind a vhost-user front-end of ours.

A network namespace with a TAP device, ``eth0``; the TAP device's other end is a
virtio-net driver (``_tapguest``) whose rings lie in shared memory, served by any
vhost-user net back-end. It starts in milliseconds, runs every usual tool, and
can be "migrated": rings and namespace stay, the back-end changes::

    with EmbeddedGuest() as guest:
        guest.connect("/run/a.sock")
        guest.configure()
        guest.run("ping", "-c1", "192.0.2.2")
        guest.migrate("/run/b.sock")

By hand, against a back-end that listens already: ``python -m godwit.lab.guest
SOCKET [COMMAND ...]`` runs a command (a shell, if there is none) in a guest.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import IO

from godwit.lab._tapguest import Mover
from godwit.lab._tapstream import Pump
from godwit.lab.attachment import DRIVER_FEATURES, Attachment
from godwit.lab.closing import Closing
from godwit.lab.errors import LabError, UnavailableError
from godwit.lab.memory import PAGE, RX, TX, TX_FRAME, GuestMemory
from godwit.lab.migration import Migration, Record
from godwit.lab.netns import (
    GATEWAY4,
    GATEWAY6,
    HOST4,
    HOST6,
    PREFIX4,
    PREFIX6,
    Namespace,
    enter_user_namespace,
    missing_tun,
)
from godwit.lab.traffic import Traffic
from godwit.vhost_user import Feature

GUEST_MAC = "52:54:00:67:64:77"

# linux/if_tun.h
TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
TUNSETVNETHDRSZ = 0x400454D8
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
TUN_F_CSUM = 0x01
TUN_F_TSO4 = 0x02
TUN_F_TSO6 = 0x04
TUN_F_TSO_ECN = 0x08
TUN_F_USO4 = 0x20
TUN_F_USO6 = 0x40

HEADER = 12  # struct virtio_net_hdr_v1

TX_LAYOUTS = {"single": 0, "chain": 1, "indirect": 2}


class NamespaceGuest(Closing):
    """What a guest is that is a network namespace, whatever its network card is: ``eth0``, and commands."""

    def __init__(self, name: str, mac: str, mtu: int) -> None:
        reason = missing_tun()
        if reason is not None:
            raise UnavailableError(reason)
        self.mac = mac
        self.mtu = mtu
        self._agent: Traffic | None = None
        self._cleanup = contextlib.ExitStack()
        self.space = Namespace(name)
        self._cleanup.callback(self.space.close)

    def _open_tap(self, *, headers: bool) -> int:
        """Make ``eth0``, and return its other end: for frames with a virtio header each, or without."""
        with self.space.enter():
            fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
            self._cleanup.callback(os.close, fd)
            flags = IFF_TAP | IFF_NO_PI | (IFF_VNET_HDR if headers else 0)
            fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", b"eth0", flags))
            if headers:
                fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", HEADER))
        self.space.ip(
            # The TAP device drops what its queue cannot hold, where a virtio card
            # would stop the stack's queue: so let it hold a window's worth.
            f"link set eth0 address {self.mac} mtu {self.mtu} txqueuelen 10000",
        )
        return fd

    # --- commands -----------------------------------------------------------

    @property
    def agent(self) -> Traffic:
        """The traffic agent inside; it starts when first asked for."""
        if self._agent is None:
            self._agent = Traffic(self.space)
            self._cleanup.callback(self._agent.close)
        return self._agent

    def run(
        self, *args: str, check: bool = True, timeout: float = 60.0, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside to its end; see :meth:`godwit.lab.netns.Namespace.run`."""
        return self.space.run(*args, check=check, timeout=timeout, stdin=stdin)

    def popen(
        self, args: Sequence[str], *, stdin: int | IO[bytes] | None = subprocess.DEVNULL, stdout: int | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command inside; it ends with the guest at the latest."""
        return self.space.popen(args, stdin=stdin, stdout=stdout)

    def configure(
        self,
        *,
        addr4: str | None = HOST4,
        prefix4: int = PREFIX4,
        gateway4: str | None = GATEWAY4,
        addr6: str | None = HOST6,
        prefix6: int = PREFIX6,
        gateway6: str | None = GATEWAY6,
        mtu: int | None = None,
    ) -> None:
        """Bring the interface up with these addresses: the hosts' own, unless told otherwise."""
        if mtu is not None:
            self.mtu = mtu
        commands = [f"link set eth0 mtu {self.mtu} up"]
        if addr4 is not None:
            commands.append(f"addr replace {addr4}/{prefix4} dev eth0")
            if gateway4 is not None:
                commands.append(f"route replace default via {gateway4} dev eth0")
        if addr6 is not None:
            commands.append(f"addr replace {addr6}/{prefix6} dev eth0 nodad")
            if gateway6 is not None:
                commands.append(f"route replace default via {gateway6} dev eth0")
        self.space.ip(*commands)

    def close(self) -> None:
        """End the guest and all that runs inside. May be repeated."""
        self._cleanup.close()


class EmbeddedGuest(NamespaceGuest):
    """A guest that is a network namespace. Not to be used from two threads at once.

    ``queue_size``: entries of each ring. ``rx_buffer``: bytes of each buffer for
    what the guest receives; a frame takes as many as it needs. ``tx_layout``:
    how sent frames are described: ``single`` (one descriptor), ``chain`` or
    ``indirect`` (the header apart, the frame in pieces of ``tx_chunk`` bytes).
    ``features``: virtio features to accept where offered. ``acks``: ask for
    an acknowledgement of each request (REPLY_ACK). ``timeout``: seconds for a
    vhost-user request, for CHECK_DEVICE_STATE too.
    """

    def __init__(
        self,
        name: str = "guest",
        *,
        mac: str = GUEST_MAC,
        mtu: int = 1500,
        queue_size: int = 256,
        rx_buffer: int = PAGE,
        tx_layout: str = "single",
        tx_chunk: int = 16 * 1024,
        features: int = DRIVER_FEATURES,
        acks: bool = True,
        timeout: float = 30.0,
    ) -> None:
        super().__init__(name, mac, mtu)
        if tx_layout == "indirect":
            features |= Feature.VIRTIO_F_INDIRECT_DESC
        self.attachment: Attachment | None = None
        self._queue_size = queue_size
        self._driver_features = features
        self._acks = acks
        self.timeout = timeout
        self._tx_layout = tx_layout
        self._offloads = -1
        self._left: Migration | None = None
        try:
            self._tap = self._open_tap(headers=True)
            pieces = 1 + -(-TX_FRAME // tx_chunk)
            table_size = queue_size * pieces * 16 if tx_layout == "indirect" else 0
            self.memory = GuestMemory(queue_size, rx_buffer, table_size)
            self._cleanup.callback(self.memory.close)
            memory = self.memory
            self.mover = Mover(
                self._tap,
                num=queue_size,
                rx_ring=memory.ring_addresses(RX),
                rx_buffers=memory.base + memory.rx_buffers,
                rx_gpa=memory.gpa(memory.rx_buffers),
                rx_size=rx_buffer,
                tx_ring=memory.ring_addresses(TX),
                tx_frames=memory.base + memory.tx_frames,
                tx_gpa=memory.gpa(memory.tx_frames),
                tx_size=TX_FRAME,
                tx_tables=memory.base + memory.tables,
                tx_tables_gpa=memory.gpa(memory.tables),
                tx_chunk=tx_chunk,
                tx_layout=TX_LAYOUTS[tx_layout],
            )
            self.mover.start()
            self._cleanup.callback(self.mover.end)
        except BaseException:
            self._cleanup.close()
            raise

    # --- the back-end -------------------------------------------------------

    def attach(self, path: str) -> Attachment:
        """Connect to the back-end at ``path`` and start nothing yet."""
        return Attachment(
            path,
            self.memory,
            num=self._queue_size,
            driver_features=self._driver_features,
            acks=self._acks,
            timeout=self.timeout,
        )

    def connect(self, path: str) -> None:
        """Attach to the back-end at ``path`` and start the rings, from their beginning.

        As a guest does that boots. An attachment that there was is closed.
        """
        self.disconnect()
        attachment = self.attach(path)
        try:
            self.mover.reset(self.memory.ring_addresses(RX), self.memory.ring_addresses(TX))
            self.move_to(attachment, [0, 0])
        except BaseException:
            attachment.close()
            raise

    def reconnect(self, path: str | None = None) -> None:
        """Attach again after the back-end has gone, and go on with the rings as they are.

        As QEMU does when its back-end comes back: the rings go on from what was
        last used, and what the old back-end held is given to the new one.
        """
        if path is None:
            if self.attachment is None:
                raise LabError("there is no back-end to connect to again")
            path = self.attachment.path
        self.disconnect()
        attachment = self.attach(path)
        try:
            self.move_to(attachment, [self.mover.used_index(RX), self.mover.used_index(TX)])
        except BaseException:
            attachment.close()
            raise

    def disconnect(self) -> None:
        """Hang up on the back-end, with no word of parting."""
        self.pause()
        if self.attachment is not None:
            self.mover.detach()
            self.attachment.close()
            self.attachment = None

    def move_to(self, attachment: Attachment, bases: Sequence[int]) -> None:
        """Start the rings on ``attachment`` and let the guest run there.

        Closes no other attachment: that is the caller's to do.
        """
        self.pause()
        if self._tx_layout == "indirect" and not attachment.features & Feature.VIRTIO_F_INDIRECT_DESC:
            raise LabError(f"the back-end at {attachment.path} does not take indirect descriptors")
        self.set_offloads(attachment.features)
        attachment.start(bases)
        self.mover.attach(
            rx_kick=attachment.kick(RX),
            rx_call=attachment.call(RX),
            tx_kick=attachment.kick(TX),
            tx_call=attachment.call(TX),
            event_idx=bool(attachment.features & Feature.VIRTIO_F_EVENT_IDX),
            guest_csum=bool(attachment.features & Feature.VIRTIO_NET_F_GUEST_CSUM),
            guest_tso=bool(attachment.features & (Feature.VIRTIO_NET_F_GUEST_TSO4 | Feature.VIRTIO_NET_F_GUEST_TSO6)),
        )
        self.attachment = attachment
        self.resume()

    def set_offloads(self, features: int) -> None:
        """Let the guest's stack leave to the back-end what these features say it does."""
        offloads = 0
        if features & Feature.VIRTIO_NET_F_CSUM:
            offloads = TUN_F_CSUM
            for feature, flags in (
                (Feature.VIRTIO_NET_F_HOST_TSO4, TUN_F_TSO4),
                (Feature.VIRTIO_NET_F_HOST_TSO6, TUN_F_TSO6),
                (Feature.VIRTIO_NET_F_HOST_USO, TUN_F_USO4 | TUN_F_USO6),
            ):
                if features & feature:
                    offloads |= flags
            if offloads & (TUN_F_TSO4 | TUN_F_TSO6) and features & Feature.VIRTIO_NET_F_HOST_ECN:
                offloads |= TUN_F_TSO_ECN
        if offloads != self._offloads:
            fcntl.ioctl(self._tap, TUNSETOFFLOAD, offloads)
            self._offloads = offloads

    def pause(self) -> None:
        """Stop the guest: its rings are not touched from here on. May be repeated."""
        self.mover.pause()

    def resume(self) -> None:
        """Let it run. May be repeated."""
        self.check()
        self.mover.resume()

    def check(self) -> None:
        """Raise :class:`LabError` if the back-end has done what none may do."""
        if self.mover.failure is not None:
            raise LabError(f"the back-end broke a ring: {self.mover.failure}")
        broken = self.attachment.ring_errors() if self.attachment is not None else []
        if broken:
            raise LabError(f"the back-end says that ring {broken[0]} is broken")

    @property
    def counters(self) -> dict[str, int]:
        """Frames, bytes, kicks and so on since the start."""
        return self.mover.counters

    @property
    def backend_gone(self) -> bool:
        """Whether the back-end has hung up, or there is none."""
        if self.attachment is None:
            return True
        poll = select.poll()
        poll.register(self.attachment.client.fileno(), select.POLLRDHUP)
        return bool(poll.poll(0))

    # --- migration ----------------------------------------------------------

    def migration(self, path: str) -> Migration:
        """Begin a migration to the back-end at ``path``, to be taken step by step."""
        return Migration(self, path)

    def migrate(self, backend: str, *, retire: bool = True, before_run: Callable[[], None] | None = None) -> Record:
        """Migrate to behind the back-end at ``backend`` as QEMU would, and return what happened.

        Unless ``retire`` is false, the source is hung up on at once. ``before_run``
        is called when the target has the state and nothing runs yet. Raises
        :class:`godwit.lab.migration.MigrationError` if it fails; the guest then
        runs on the source again.
        """
        self.retire()
        migration = self.migration(backend)
        record = migration.run(before_run)
        self._left = migration
        if retire:
            self.retire()
        return record

    def retire(self) -> None:
        """Hang up on the back-end that the guest has left, if that was not done. May be repeated."""
        left, self._left = self._left, None
        if left is not None:
            left.finish()

    def close(self) -> None:
        """End the guest and all that runs inside. May be repeated."""
        self.retire()
        if self.attachment is not None:
            self.disconnect()
        super().close()


class StreamGuest(NamespaceGuest):
    """A guest behind a back-end in stream mode: frames over a socket, no vhost-user, no offloads, no migration."""

    def __init__(self, name: str = "guest", *, mac: str = GUEST_MAC, mtu: int = 1500) -> None:
        super().__init__(name, mac, mtu)
        self._sock: socket.socket | None = None
        try:
            self._tap = self._open_tap(headers=False)
        except BaseException:
            self._cleanup.close()
            raise

    def connect(self, path: str) -> None:
        """Connect to the back-end at ``path``; a connection that there was is closed."""
        self.disconnect()
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.connect(path)
        self._pump = Pump(self._tap, self._sock.fileno())

    def disconnect(self) -> None:
        """Hang up. May be repeated."""
        if self._sock is not None:
            with contextlib.suppress(OSError):  # the other side has hung up
                self._sock.shutdown(socket.SHUT_RDWR)
            self._pump.end()
            self._sock.close()
            self._sock = None

    def check(self) -> None:
        """Raise :class:`LabError` if the back-end has done what none may do."""
        if self._sock is not None and self._pump.failure is not None:
            raise LabError(f"the back-end has sent {self._pump.failure}")

    def close(self) -> None:
        """End the guest and all that runs inside. May be repeated."""
        self.disconnect()
        super().close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command in a guest behind the back-end that listens at a socket."""
    parser = argparse.ArgumentParser(prog="python -m godwit.lab.guest", description=main.__doc__)
    parser.add_argument("socket", help="where the vhost-user back-end listens")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run inside (default: a shell)")
    parser.add_argument("--mtu", type=int, default=1500)
    parser.add_argument("--address", default=f"{HOST4}/{PREFIX4}", help="IPv4 address/prefix (%(default)s)")
    parser.add_argument("--gateway", default=GATEWAY4, help="IPv4 default gateway (%(default)s)")
    parser.add_argument("--address6", default=f"{HOST6}/{PREFIX6}", help="IPv6 address/prefix (%(default)s)")
    parser.add_argument("--gateway6", default=GATEWAY6, help="IPv6 default gateway (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        enter_user_namespace()
        with EmbeddedGuest(mtu=options.mtu) as guest:
            guest.connect(options.socket)
            addr4, _, prefix4 = options.address.partition("/")
            addr6, _, prefix6 = options.address6.partition("/")
            guest.configure(
                addr4=addr4,
                prefix4=int(prefix4),
                gateway4=options.gateway,
                addr6=addr6,
                prefix6=int(prefix6),
                gateway6=options.gateway6,
            )
            process = guest.popen(options.command or [os.environ.get("SHELL", "/bin/sh")], stdin=None)
            while process.poll() is None:
                guest.check()
                with contextlib.suppress(KeyboardInterrupt):
                    time.sleep(0.02)
            return process.returncode
    except LabError as error:
        sys.stderr.write(f"{error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
