# SPDX-License-Identifier: GPL-2.0-or-later
"""UDP sockets that move: one like it is made elsewhere, and it stays for a while where it was.

A socket of UDP needs no helper to move: its state is the address that it is
bound to, and the datagrams in its queue.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from ipaddress import ip_address

from godwit.daemon.awaited import free_bind
from godwit.dataplane import Datagram, Engine, Side, UdpPeer, UdpPort
from godwit.net.native import DATAGRAM_COST, MAX_WAITING
from godwit.net.records import V4_MAPPED, address_text, unpacked

log = logging.getLogger(__name__)

LEAST_PORT = 1024  # that a stream can have us bind


class UdpDepartures:
    """The guest's UDP ports as they are saved, and what becomes of their sockets when it has moved."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._too_many = 0  # ports with more datagrams than can move

    def take(self) -> Iterator[tuple[UdpPort, Sequence[UdpPeer], Sequence[Datagram]]]:
        """Each port that has anything to move.

        What waits at one is taken from its socket, and is then the first that
        the guest gets, should it go on here: there is nothing to undo.
        """
        self.clear()
        peers: dict[int, list[UdpPeer]] = {}
        for port, peer in self._engine.udp_peers():
            peers.setdefault(port, []).append(peer)
        room = MAX_WAITING
        for port in self._engine.udp_ports():
            found = self._engine.udp_waiting(port)
            room -= _size(found)
            taken, all_taken = self._engine.take_datagrams(port, max(0, room), DATAGRAM_COST)
            room -= _size(taken)
            self._too_many += not all_taken or room < 0
            if found or taken or port in peers:
                yield self._engine.udp_port_state(port), peers.get(port, []), found + taken

    def clear(self) -> None:
        """Forget about what was taken: it goes on here, or has gone."""
        self._too_many = 0

    def leave(self) -> list[int]:
        """The guest has moved away: the sockets of the ports that were its own, of which nothing more is read."""
        if self._too_many:
            log.warning("more datagrams waited than can move: those left at %d UDP ports are lost", self._too_many)
        own = [port for port in self._engine.udp_ports() if not self._engine.udp_port_state(port).kind]
        fds = [self._engine.release_udp_port(port) for port in own]
        for fd in fds:
            silence(fd)
        return fds


class UdpArrivals:
    """The guest's UDP ports that are loaded, up to ``let_go`` or ``discard``; numbered from 0 on, as they come.

    ``reclaim`` has whoever lingers with sockets of these ends close them. With
    ``freebind`` a port keeps an address that is yet to come.
    """

    def __init__(self, engine: Engine, reclaim: Callable[[Sequence[Side]], None], *, freebind: bool = False) -> None:
        self._engine = engine
        self._reclaim = reclaim
        self._freebind = freebind
        self._ports: list[int | None] = []  # None: it has none here
        self._datagrams: dict[int, list[Datagram]] = {}  # by port of the engine
        self._refused: list[tuple[int, str]] = []  # the guest's port, and why it does not move
        self._moved: list[UdpPort] = []  # those that leave from elsewhere than before

    def add_port(self, port: UdpPort) -> None:
        """The port that is forwarded here too, or a socket like the one it had."""
        index = self._engine.find_udp_port(port)
        if index is not None and port.any_peer:
            self._engine.note_any_peer(index)
        if index is None and port.kind != 0:
            self._refused.append((port.guest_port, "it is not forwarded here"))
        elif index is None:
            try:
                index = self._open(port)
            except (OSError, ValueError) as error:
                self._refused.append((port.guest_port, str(error)))
        self._ports.append(index)

    def _open(self, port: UdpPort) -> int:
        way = self._engine.udp_outbound(port.guest_addr[:12] == V4_MAPPED)
        fd, same = open_socket(port, *way, freebind=self._freebind)
        if not same:  # it may be with who lingers, since the guest was here
            os.close(fd)
            self._reclaim([Side(port.local_addr, bytes(16), port.local_port, 0)])
            fd, same = open_socket(port, *way, freebind=self._freebind)
        try:
            index = self._engine.import_udp_port(port, fd)
        except ValueError:
            os.close(fd)
            raise
        if not same:
            self._moved.append(port)
        return index

    def add_peers(self, number: int, peers: Sequence[UdpPeer]) -> None:
        """Peers of a port that came."""
        index = self._ports[number]
        if index is not None:
            for peer in peers:
                self._engine.import_udp_peer(index, peer)

    def add_datagrams(self, number: int, datagrams: Sequence[Datagram]) -> None:
        """Datagrams of a port that came; they are delivered after ``let_go``."""
        index = self._ports[number]
        if index is not None:
            self._datagrams.setdefault(index, []).extend(datagrams)

    def let_go(self) -> None:
        """The guest runs here."""
        try:
            for port, datagrams in self._datagrams.items():
                try:
                    self._engine.carry_datagrams(port, datagrams)
                except (ValueError, MemoryError) as error:  # the connections go on all the same
                    log.error("%d datagrams are lost: %s", len(datagrams), repr(error))
            self._engine.forget_lone_udp([port for port in self._ports if port is not None])
            self._report()
        finally:
            self._clear()

    def discard(self) -> None:
        """The guest never ran here: close what was opened."""
        try:
            self._engine.forget_udp([port for port in self._ports if port is not None])
        finally:
            self._clear()

    def _clear(self) -> None:
        self._ports.clear()
        self._datagrams.clear()
        self._refused.clear()
        self._moved.clear()

    def _report(self) -> None:
        """One line for all of a kind, with one port as an example: there may be thousands."""
        if self._refused:
            port, why = self._refused[0]
            log.warning("%d UDP ports do not move, %d%s: %s", len(self._refused), port, _more(self._refused), why)
        if self._moved:
            one, more = self._moved[0], _more(self._moved)
            before = f"{address_text(one.local_addr)} port {one.local_port}"
            what = "%d UDP ports leave from elsewhere than before, %d%s: it was %s"
            log.warning(what, len(self._moved), one.guest_port, more, before)


def _size(datagrams: Iterable[Datagram]) -> int:
    """Bytes that these take of what can move."""
    return sum(len(one.data) + DATAGRAM_COST for one in datagrams)


def _more(of: Sequence[object]) -> str:
    return " and so on" if len(of) > 1 else ""


def open_socket(
    state: UdpPort, outbound: bytes = bytes(16), interface: str = "", *, freebind: bool = False
) -> tuple[int, bool]:
    """A socket for a port of the guest's, and whether it has the address and port that it had; else others.

    It never has a port below ``LEAST_PORT``, whoever we are: those are for
    services of the host's. ``outbound`` and ``interface`` are what the guest's
    ports leave through here (``Engine.udp_outbound``). With ``freebind`` it may
    have an address that is yet to come. Raises OSError where none is to be had.
    """
    v4 = state.guest_addr[:12] == V4_MAPPED
    had = unpacked(state.local_addr)
    anywhere = unpacked(outbound) if any(outbound) else ip_address("0.0.0.0" if v4 else "::")
    addresses = [(str(anywhere), state.local_port)]
    if had.version == anywhere.version and not had.is_loopback and not had.is_unspecified:
        addresses.insert(0, (str(had), state.local_port))
    if state.local_port < LEAST_PORT:
        addresses.clear()
    addresses.append((str(anywhere), 0))
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(
            socket.socket(socket.AF_INET if v4 else socket.AF_INET6, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        )
        if not v4:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if interface:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
        if freebind:
            free_bind(sock)
        for address in addresses:
            try:
                sock.bind(address)
            except OSError:
                if address[1] == 0:
                    raise
                continue
            return sock.detach(), address[1] != 0 and address is addresses[0]
    raise AssertionError("a socket is bound, or that is an error")


def silence(fd: int) -> None:
    """Have a socket take next to nothing: what comes is dropped without a word, which it would not be without a socket.

    Nothing must be read from it any more.
    """
    sock = socket.socket(fileno=fd)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)  # the kernel makes it its least, some 2 KiB
    finally:
        sock.detach()
