# SPDX-License-Identifier: GPL-2.0-or-later
"""The network device: a vhost-user device over a data plane, and its migration.

The methods are the front-end's requests, in its order. Which of them means
what for a migration, `godwit.migration.transfers` knows.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from ipaddress import IPv6Address

from godwit.confine.procfs import network_namespace
from godwit.daemon import signals
from godwit.daemon.errors import StartError, reason
from godwit.daemon.forwards import open_forwards
from godwit.daemon.inherit import collect, inherit
from godwit.daemon.lifecycle import User
from godwit.daemon.linger import LINGER_SECONDS, Linger
from godwit.daemon.mover import Left, Mover
from godwit.daemon.moves import Moves
from godwit.daemon.options import Options, VirtioFeatures
from godwit.daemon.probe import AddressProbe
from godwit.daemon.record import Recording
from godwit.daemon.shortages import Shortages
from godwit.daemon.stats import Statistics
from godwit.dataplane import Engine, StreamCard, handover
from godwit.migration import Direction as Transfer
from godwit.migration import Migration, State, StateError, Transfers
from godwit.migration.layout import printable
from godwit.net.change import WITHDRAWN_SECONDS, differences, facts_elsewhere, take_back, told
from godwit.net.config import IPAddress, NetConfig, Withdrawn, packed16
from godwit.net.handover import Handed, Process
from godwit.net.ndp import ADVERTISE_INTERVAL, CHANGE_INTERVAL, CHANGE_REPEATS, is_about_addresses, questions
from godwit.net.records import MAX_FLOWS
from godwit.net.responder import Responder
from godwit.net.state import FlowMover
from godwit.net.versions import versions
from godwit.repair import RepairListener
from godwit.vhost_user import BaseDevice, DeviceError, Direction, Feature, MemoryRegion, ProtocolFeature, VringAddr

log = logging.getLogger(__name__)

_SHARED_MEMORY = "-object memory-backend-memfd,id=mem,size=SIZE,share=on -numa node,memdev=mem"
_LOOK_AFTER = 3.0  # seconds after the start of a ring

_BUSY = (State.SAVING, State.LOADING, State.COMMITTING, State.ROLLING_BACK, State.DISCARDING)

_FEATURES_PASST = (
    Feature.VIRTIO_F_VERSION_1
    | Feature.VIRTIO_NET_F_MRG_RXBUF
    | Feature.VIRTIO_NET_F_GUEST_CSUM  # since 2026; of its offloads the only one
    | Feature.VHOST_F_LOG_ALL
    | Feature.VHOST_USER_F_PROTOCOL_FEATURES
)
_FEATURES_FULL = (
    _FEATURES_PASST
    | Feature.VIRTIO_F_EVENT_IDX
    | Feature.VIRTIO_F_INDIRECT_DESC
    | Feature.VIRTIO_NET_F_CSUM
    | Feature.VIRTIO_NET_F_HOST_TSO4
    | Feature.VIRTIO_NET_F_HOST_TSO6
    | Feature.VIRTIO_NET_F_GUEST_TSO4
    | Feature.VIRTIO_NET_F_GUEST_TSO6
    | Feature.VIRTIO_NET_F_HOST_USO
    | Feature.VIRTIO_NET_F_GUEST_USO4
    | Feature.VIRTIO_NET_F_GUEST_USO6
)


def _packed(address: IPAddress | None) -> bytes:
    """16 bytes, zeros for none."""
    return bytes(16) if address is None else packed16(address)


def _open_capture(path: str, flag: int) -> int:
    """Open a file for frames. As whoever we are now: later we may not be allowed to."""
    try:
        # Without waiting, should it be a pipe that nobody has opened for reading.
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | flag, 0o600)
    except OSError as error:
        raise StartError(_no_capture(path, error)) from error


def _no_capture(path: str, error: OSError) -> str:
    nobody = " (nobody reads this pipe)" if error.errno == errno.ENXIO else ""
    return f"--pcap: cannot write to {path}: {reason(error, path)}{nobody}"


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """What the engine does not take becomes an answer to the front-end."""
    try:
        yield
    except OSError as error:
        raise DeviceError(error.strerror or str(error)) from error
    except ValueError as error:
        raise DeviceError(str(error)) from error


class NetDevice(BaseDevice):
    """One guest's network device. ``repair`` None: connections cannot move.

    ``before_answer`` is called before the guest is answered about its network; it may call ``follow``.
    """

    protocol_features = (
        ProtocolFeature.LOG_SHMFD
        | ProtocolFeature.RARP
        | ProtocolFeature.REPLY_ACK
        | ProtocolFeature.DEVICE_STATE
        | ProtocolFeature.CONFIGURE_MEM_SLOTS
    )
    max_mem_slots = 64

    def __init__(
        self,
        config: NetConfig,
        options: Options,
        repair: RepairListener | None,
        before_answer: Callable[[], None] = lambda: None,
    ) -> None:
        full = options.virtio_features is VirtioFeatures.FULL
        self.features: int = _FEATURES_FULL if full else _FEATURES_PASST
        self._config = config
        self._host = config  # as long as nothing is due, what the guest has; but for what it was told elsewhere
        self._elsewhere = Withdrawn()  # what this guest was told on another host, as long as it may believe in it
        self._forgetting: asyncio.TimerHandle | None = None
        self._options = options
        self._repair = repair
        self._engine = Engine()
        self._engine.busy_poll(options.busy_poll)
        udp_flows = (options.max_flows + 1) // 2 if options.max_udp_flows is None else options.max_udp_flows
        self._engine.set_limits(options.max_flows, udp_flows, options.max_half_open)
        self._responder = Responder(config)
        self._mover = Mover(
            self._engine,
            repair,
            config.scope6,
            self._in_background,
            self._facts,
            lambda: told(self._config),
            freebind=options.freebind,
        )
        self._transfers: Transfers[FlowMover] = Transfers()
        self.moves = Moves()
        self._background: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._advertising: asyncio.TimerHandle | None = None
        self._probe = AddressProbe(self._ask)
        self._before_answer = before_answer
        self._due = False  # the network is another, which is to be followed when the guest runs
        self._stands_still = False  # its rings were stopped: suspended, or its end is near
        self._going_on: asyncio.Task[None] | None = None  # what a transfer has left is let go
        self._has_rings = False  # and meanwhile a ring was started
        self._moved_in = False  # and has not been told of the network here
        self._telling: asyncio.TimerHandle | None = None
        self._descriptors = MAX_FLOWS  # that flows may have, those that linger included
        self._statistics: Statistics | None = None
        self._shortages = Shortages(self._engine)
        self._capturing = False
        self.moved_away = False  # a guest that was here: its front-end took its state along
        self._lingers: list[Linger] = []  # the sockets of guests that were here
        self._rescuing = False
        self._began_at = 0  # CLOCK_MONOTONIC, ns
        self._handed_over = False
        self._capture_next = -1  # for the frames from the moment on in which this process takes over

    # ---- life

    def open(self) -> None:
        """Open all that needs to be opened: the forwarded ports, and the file for frames."""
        self._loop = asyncio.get_running_loop()
        self._configure()
        if self._options.pcap is not None:
            self._capture(self._options.pcap)
        self._descriptors = open_forwards(self._engine, self._options)

    def start(self) -> None:
        """Start the data plane: from here on there is a second thread."""
        self._begin()

    def _begin(self) -> None:
        assert self._loop is not None  # since start()
        self._limit_flows()
        with signals.blocked():
            self._engine.start()
        self._began_at = time.monotonic_ns()
        self._loop.add_reader(self._engine.rare_fileno(), self._data_plane_calls)
        if self._options.stats:
            self._statistics = Statistics(self._engine, self._options.stats)
        if self._repair is not None:
            self._repair.on_come = partial(self._in_background, 0, self._repair.try_out)
            self._loop.add_reader(self._repair, self._repair.accept_ready)

    # ---- the same guest in another process

    def why_not(self) -> str:
        """What speaks against another process's going on with the guest right now; empty: nothing."""
        if self._transfers.current is not None or self._going_on is not None or handover.is_logged(self._engine):
            return "a migration is under way"
        if self._repair is not None and self._repair.untried:
            return "a repair helper has just come, and is being tried"
        if self._rescuing or handover.is_held(self._engine) or not self._mover.settled:
            return "connections stand still: they wait for a repair helper, or for their address"
        return ""

    def hand_over(self) -> Handed:
        """All that another process needs to go on. Everything stands still until ``take_back`` or ``let_go``.

        Raises ``ValueError`` where something speaks against it.
        """
        self._engine.park()
        parked_at = time.monotonic_ns()
        try:
            self._answer_rare()
            if why := self.why_not():
                raise ValueError(why)
            handed = collect(self._engine)
        except BaseException:
            self._engine.unpark()
            raise
        handed.facts = self._facts()
        handed.told = self._mover.guest_told()
        handed.counters |= self.moves.to_hand_over()
        handed.process = Process(
            handover.hash_key(self._engine),
            parked_at,
            os.getpid(),
            int(self._stands_still),
            int(self._moved_in),
            int(self._advertising is not None),
            int(self._mover.listeners_frozen),
            network_namespace(),
        )
        return handed

    def take_back(self) -> None:
        """Nobody else goes on: go on."""
        self._engine.unpark()

    def let_go(self) -> None:
        """Another process goes on: nothing of the guest's is touched any more."""
        self._handed_over = True

    def prepare(self, handed: Handed) -> None:
        """In place of ``start``: load what another process has handed over, and touch nothing of it.

        Raises ``ValueError``, ``OSError`` or ``ForwardError`` where this process could not go on with it.
        """
        if handed.process.network != network_namespace():
            raise ValueError("it is in another network namespace: start this one there, too (ip netns exec, nsenter)")
        self._loop = asyncio.get_running_loop()
        self._configure()
        self._descriptors = inherit(self._engine, self._options, handed)
        self.moves.take_over(handed.counters)
        if self._options.pcap is not None:
            self._capture_next = _open_capture(self._options.pcap, os.O_APPEND)

    def take_over(self, handed: Handed) -> float:
        """The guest is this process's: go on, at once. Gives for how many seconds its network stood still."""
        if self._capture_next >= 0:
            self._begin_capture(self._capture_next)
        handover.look_at_once(self._engine)
        self._begin()
        process = handed.process
        still = (self._began_at - process.parked_at) / 1e9
        self._stands_still, self._moved_in = bool(process.stands_still), bool(process.moved_in)
        self._mover.take_over(listeners_frozen=bool(process.listeners_frozen))
        for frame in handed.frames:
            self._engine.inject(frame)
        if any(handed.observed.mac):
            self._config.guest_mac = handed.observed.mac
        if process.guest_runs:
            self._advertising = self._loop_now.call_later(ADVERTISE_INTERVAL, self._advertise)
            self._probe.start()
        if differing := differences(handed.facts, self._facts()):
            log.warning("the guest's network is another than with the process before: %s", printable(differing, 1000))
        self._remember(handed.told)
        self._follow_now()
        return still

    @property
    def _loop_now(self) -> asyncio.AbstractEventLoop:
        assert self._loop is not None  # since start()
        return self._loop

    def _configure(self) -> None:
        """Tell the data plane of the guest's network."""
        config = self._config
        self._engine.configure(
            our_mac=config.our_mac,
            addr4=None if config.addr4 is None else packed16(config.addr4),
            # "::" where the guest has but link-local ones: the one that is seen is taken.
            addr6=packed16(config.addr6 or IPv6Address(0)) if config.has_ipv6 else None,
            our4=_packed(config.gateway4),
            our_ll=packed16(config.our_link_local),
            broadcast4=_packed(None if config.network4 is None else config.network4.broadcast_address),
            outbound4=_packed(config.outbound4),
            outbound6=_packed(config.outbound6),
            outbound_if4=config.outbound_if4,
            outbound_if6=config.outbound_if6,
            ifindex4=config.scope4,
            ifindex=config.scope6,
            mtu=config.mtu,
            maps=[(row.guest, row.port, row.host, row.scope) for row in config.rewrites()],
            tcp=self._options.tcp,
            udp=self._options.udp,
            icmp=self._options.icmp,
        )

    def own(self, user: User) -> None:
        """Hand the listening sockets over to the user that we are about to be."""
        for fd in self._engine.listeners():
            os.fchown(fd, user.uid, user.gid)

    async def close(self) -> None:
        """Stop. Connections of the guest are reset, but those that moved away are left in silence, for their time."""
        loop = asyncio.get_running_loop()
        if not self._handed_over:
            await self.disconnected()
        loop.remove_reader(self._engine.rare_fileno())
        if self._repair is not None and self._repair.fileno() >= 0:
            loop.remove_reader(self._repair)
        for task in self._background:
            task.cancel()
        self._shortages.close()
        if self._statistics is not None:
            self._statistics.close()
        if self._capturing and (missed := self._engine.capture_missed()):
            log.warning("%d frames are not in %s: it did not take them in time", missed, self._options.pcap)
        self._engine.close()
        for linger in self._lingers:
            linger.leave_keeper()
            linger.close()

    def _limit_flows(self) -> None:
        """A guest that opens flows without end shall be refused, before nothing else can be opened any more."""
        self._engine.limit_flows(max(1, self._descriptors - sum(len(linger) for linger in self._lingers)))

    @property
    def lingering(self) -> float:
        """Seconds for which a process that is about to end had better wait, for connections that moved away."""
        return max((linger.remaining for linger in self._lingers), default=0.0)

    # ---- for those who look on (`godwit.daemon.report`)

    @property
    def engine(self) -> Engine:
        """The data plane, to be read."""
        return self._engine

    @property
    def config(self) -> NetConfig:
        """The guest's network, as it is now."""
        return self._config

    @property
    def transfer_state(self) -> State | None:
        """Where the transfer is that has begun and not ended."""
        return self._transfers.state

    @property
    def is_moving(self) -> bool:
        """Whether the guest's connections are being written, read or let go: nobody should be in the way."""
        return self._going_on is not None or self._transfers.state in _BUSY

    @property
    def lingering_sockets(self) -> int:
        """Sockets of guests that were here, kept for a while."""
        return sum(len(linger) for linger in self._lingers)

    @property
    def held(self) -> bool:
        """Whether connections stand still until a helper comes, or their address."""
        return self._transfers.current is None and handover.is_held(self._engine)

    @property
    def capture_ended(self) -> bool:
        """Whether the capture that was asked for could not be gone on with."""
        return self._options.pcap is not None and self._engine.capture_error() != 0

    def _in_background(self, delay: float, work: Callable[[], None]) -> None:
        """Run blocking work in a thread of its own, after ``delay`` seconds. Called from any thread."""
        assert self._loop is not None  # since start()

        async def later() -> None:
            await asyncio.sleep(delay)
            await asyncio.to_thread(work)

        def begin() -> None:
            task = asyncio.ensure_future(later())
            self._background.add(task)
            task.add_done_callback(self._background.discard)

        self._loop.call_soon_threadsafe(begin)

    def _capture(self, path: str) -> None:
        """Write all frames to a file."""
        fd = _open_capture(path, os.O_TRUNC)
        try:
            self._engine.capture(fd)
        except OSError as error:
            raise StartError(_no_capture(path, error)) from error
        self._capturing = True

    def _begin_capture(self, fd: int) -> None:
        """Begin anew in a file that was another process's until now. The guest goes on, whatever comes of it."""
        try:
            with contextlib.suppress(OSError):
                os.ftruncate(fd, 0)  # which a pipe refuses
            self._engine.capture(fd)
            self._capturing = True
        except OSError as error:
            log.error("%s", _no_capture(str(self._options.pcap), error))

    def _data_plane_calls(self) -> None:
        self._answer_rare()
        for index, fault in self._engine.take_faults():
            log.error(
                "the %s ring is broken, and stands still until the guest starts it anew: %s",
                ("receive", "transmit")[index],
                fault,
            )
        self._shortages.look()
        if self._statistics is not None:
            self._statistics.look()
        if self._capturing and (error := self._engine.capture_error()):
            self._capturing = False
            log.error(
                "the capture has ended, the guest goes on: cannot write to %s: %s",
                self._options.pcap,
                os.strerror(error),
            )

    # ---- the guest's network

    def follow(self, config: NetConfig) -> None:
        """The guest's network is another: from now on, or once the guest runs. Nothing changes under a migration."""
        self._host = config
        self._due = True
        self._follow_now()

    def _follow_now(self) -> None:
        if not self._due or self._transfers.current is not None or self._stands_still:
            return
        self._due = False
        config = take_back(self._host, self._elsewhere)
        config.guest_mac = self._config.guest_mac
        self._config = config
        self._configure()
        self._mover.scope = config.scope6
        self._tell(self._responder.change(config), CHANGE_REPEATS)

    def _remember(self, elsewhere: Withdrawn) -> None:
        """This guest was told that on another host; what of it does not hold here is taken back, for a while."""
        if self._forgetting is not None:
            self._forgetting.cancel()
            self._forgetting = None
        self._elsewhere = elsewhere
        if take_back(self._host, elsewhere).withdrawn != self._config.withdrawn:
            self._due = True
        if elsewhere != Withdrawn():
            assert self._loop is not None  # since start()
            self._forgetting = self._loop.call_later(WITHDRAWN_SECONDS, self._forget)

    def _forget(self) -> None:
        self._remember(Withdrawn())
        self._follow_now()

    def _tell(self, frames: list[bytes], repeats: int) -> None:
        """Tell the guest of its network, unasked, and some more times: it may be deaf at the moment."""
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        if self._advertising is None:
            return  # no guest has started
        self._say(frames)
        self._probe.start()
        if repeats:
            assert self._loop is not None  # since start()
            self._telling = self._loop.call_later(
                CHANGE_INTERVAL, lambda: self._tell(self._responder.announce(), repeats - 1)
            )

    def _facts(self) -> dict[str, str]:
        """What a migration's other side should know of the guest's network here."""
        forwards = {"TCP ports": str(self._options.tcp_ports), "UDP ports": str(self._options.udp_ports)}
        return {**facts_elsewhere(self._config), **forwards}

    def _say(self, frames: list[bytes]) -> None:
        """Send the guest what it has not asked for; nothing while it may be about to leave."""
        if self._transfers.current is None and not self._stands_still:
            for frame in frames:
                self._engine.inject(frame)

    def _ask(self) -> bool:
        if self._advertising is None:
            return False  # there is no guest
        seen = self._engine.observed()
        frames = questions(self._config, IPv6Address(seen.addr6), IPv6Address(seen.addr6_ll))
        self._say(frames)
        return bool(frames)

    def _answer_rare(self) -> None:
        frames = self._engine.take_rare()
        if frames:
            self._before_answer()
            if any(map(is_about_addresses, frames)):
                self._probe.go_on()
        for frame in frames:
            for answer in self._responder.respond(frame):
                self._engine.inject(answer)
        self._rescue_found()  # after that: what is found meanwhile is told again

    def _rescue_found(self) -> None:
        if self._rescuing or not self._engine.has_found():
            return
        self._rescuing = True
        self._in_background(0, self._rescue)

    def _rescue(self) -> None:
        assert self._loop is not None  # since start()
        try:
            self._mover.rescue_found()
        finally:
            self._loop.call_soon_threadsafe(self._rescued)

    def _rescued(self) -> None:
        self._rescuing = False
        self._rescue_found()

    def _advertise(self) -> None:
        """Keep the guest's IPv6 route alive (RFC 4861, 6.2.4)."""
        self._before_answer()
        self._say(self._responder.announce())
        assert self._loop is not None  # since start()
        self._advertising = self._loop.call_later(ADVERTISE_INTERVAL, self._advertise)

    # ---- features and memory

    async def set_features(self, features: int) -> None:
        """SET_FEATURES."""
        self._engine.set_features(features)

    async def set_mem_table(self, regions: list[MemoryRegion]) -> None:
        """SET_MEM_TABLE."""
        with _refusals():
            self._engine.set_memory([(r.guest_addr, r.size, r.user_addr, r.mmap_offset, r.fd) for r in regions])

    async def add_mem_region(self, region: MemoryRegion) -> None:
        """ADD_MEM_REG."""
        with _refusals():
            self._engine.add_region(region.guest_addr, region.size, region.user_addr, region.mmap_offset, region.fd)

    async def remove_mem_region(self, region: MemoryRegion) -> None:
        """REM_MEM_REG."""
        with _refusals():
            self._engine.remove_region(region.guest_addr, region.size, region.user_addr)

    async def set_log(self, fd: int, size: int, offset: int) -> None:
        """SET_LOG_BASE: where a migration begins, for a source."""
        await self._at_rest()  # a migration that has just ended is not to take what this one expects for its own
        with _refusals():
            self._engine.set_log(fd, size, offset)
        # One that has refused was started for the connections' sake: they had better stay than be lost.
        self._mover.helper_expected = self._repair is not None and (
            self._repair.connected() or bool(self._repair.refused)
        )

    # ---- rings

    async def set_vring_num(self, index: int, num: int) -> None:
        """SET_VRING_NUM."""
        with _refusals():
            self._engine.ring_num(index, num)

    async def set_vring_addr(self, index: int, addr: VringAddr) -> None:
        """SET_VRING_ADDR."""
        try:
            self._engine.ring_addr(index, addr.flags, addr.descriptor, addr.used, addr.available, addr.log)
        except OSError as error:
            raise DeviceError(
                f"ring {index} does not lie in memory that the front-end shares (start QEMU with {_SHARED_MEMORY})"
            ) from error

    async def set_vring_base(self, index: int, base: int) -> None:
        """SET_VRING_BASE."""
        self._engine.ring_base(index, base)

    async def get_vring_base(self, index: int) -> int:
        """GET_VRING_BASE: the ring stands still from here on."""
        await self._at_rest()
        self._stands_still = True
        self.moves.ring_stopped()
        return self._engine.ring_stop(index)

    async def set_vring_kick(self, index: int, fd: int | None) -> None:
        """SET_VRING_KICK: the guest runs, here."""
        self._guest_runs()
        with _refusals():
            self._engine.ring_kick(index, fd)
        if self._advertising is None and not self._has_rings:
            assert self._loop is not None  # since start()
            self._loop.call_later(_LOOK_AFTER, self._look_at_memory)
        self._guest_has_rings()

    async def plug(self, card: StreamCard) -> None:
        """In place of all the requests before: the guest is behind this card, and runs (`godwit.daemon.stream`)."""
        self._guest_runs()
        with _refusals():
            self._engine.plug(card)
        self._guest_has_rings()

    def _guest_has_rings(self) -> None:
        self.moves.ring_started()
        if self._going_on is not None:
            self._has_rings = True  # it is told of its network when its connections are there
            return
        if self._advertising is None:
            assert self._loop is not None  # since start()
            self._advertising = self._loop.call_later(ADVERTISE_INTERVAL, self._advertise)
        self._stands_still = False
        if self._due:
            self._follow_now()
        elif self._moved_in:
            self._tell(self._responder.announce(), 0)  # the network here, should it be another
        self._moved_in = False
        self._probe.start()

    def _look_at_memory(self) -> None:
        """Nothing else tells of memory that is shared with us as a private copy: the network is dead, in silence."""
        if self._engine.sees_nothing():
            log.error(
                "the guest has started its network, and nothing of what it writes is seen here: "
                "its memory is not shared (start QEMU with %s)",
                _SHARED_MEMORY,
            )

    async def set_vring_call(self, index: int, fd: int | None) -> None:
        """SET_VRING_CALL."""
        with _refusals():
            self._engine.ring_call(index, fd)

    async def set_vring_err(self, index: int, fd: int | None) -> None:
        """SET_VRING_ERR."""
        with _refusals():
            self._engine.ring_err(index, fd)

    async def set_vring_enable(self, index: int, enabled: bool) -> None:
        """SET_VRING_ENABLE."""
        self._engine.ring_enable(index, enabled)

    async def reset_owner(self) -> None:
        """RESET_OWNER: rings off."""
        for index in range(self.queues):
            self._engine.ring_enable(index, False)

    async def send_rarp(self, mac: bytes) -> None:
        """SEND_RARP: after a load, the guest runs. No network below us would have to learn its address."""
        if self._transfers.loaded:
            self._guest_runs()

    # ---- migration

    async def set_device_state_fd(self, direction: Direction, phase: int, fd: int) -> int | None:
        """SET_DEVICE_STATE_FD: start a save or a load; it goes on in a thread."""
        saving = direction is Direction.SAVE
        try:
            await self._at_rest()
        except BaseException:
            os.close(fd)
            raise
        recording = Recording(path, "saved" if saving else "loaded") if (path := self._options.record) else None
        copy, done = (recording.write, recording.close) if recording is not None else (None, lambda: None)
        transfer: Migration[FlowMover] = Migration(versions(), self._mover, copy=copy)
        way, version = (Transfer.SOURCE, self._options.migrate_version) if saving else (Transfer.TARGET, None)
        move = self.moves.begin(way)

        def over() -> None:
            done()
            move.done(transfer.outcome)

        try:
            await self._transfers.begin(transfer, fd, way, version, done=over)
        except ValueError as error:
            self.moves.end(None, (0, 0))
            raise DeviceError(str(error)) from error
        return None

    async def check_device_state(self) -> bool:
        """CHECK_DEVICE_STATE: how the transfer ended, once it has."""
        await self._at_rest()
        try:
            return await self._transfers.check()
        except StateError as error:
            raise DeviceError(str(error)) from error

    def _guest_runs(self) -> None:
        """The front-end starts the guest: what a save froze is thawed, what a load brought is let go."""
        if self._going_on is not None:
            return
        if self._transfers.current is None:
            self._mover.thaw_listeners()
        else:
            # The guest need not stand still for it: while flows are at rest no ring is served, and what it sends waits.
            self._going_on = asyncio.ensure_future(self._go_on())

    async def _go_on(self) -> None:
        """Let go what a transfer has left, while the front-end starts the rings and the guest."""
        try:
            self._note_end(await self._transfers.guest_runs())
            await asyncio.to_thread(self._mover.give_up_all)
        except Exception:
            log.exception("the end of the migration has failed")
            self._mover.give_up_all()  # here: it may be that there is no thread for it
        finally:
            self._going_on = None
            self._mover.thaw_listeners()
            if self._has_rings:
                self._has_rings = False
                self._guest_has_rings()

    async def _at_rest(self) -> None:
        """Wait until all that a transfer has left has been let go."""
        if self._going_on is not None:
            await asyncio.wait([self._going_on])

    def _note_end(self, ended: State | None) -> None:
        """A transfer has ended, in that state."""
        if ended is not None:
            self.moves.end(ended, self._mover.went)
            self._mover.helper_expected = False
            self._end_guard()
        if ended is State.COMMITTED:
            self._moved_in = True
            self._remember(self._mover.take_told())

    def _end_guard(self) -> None:
        """Connections are here or given up: a reset may be said again, where the helper keeps that back."""
        if self._repair is not None:
            self._in_background(0, self._repair.end_guard)

    def guest_comes(self) -> None:
        """A front-end has connected. What came to its guest's ports while there was none is for nobody."""
        self._engine.drain_forwards()

    async def disconnected(self) -> None:
        """The front-end is gone, and the guest with it: for good, or to where it was moved."""
        await self._at_rest()
        if await self._transfers.settle("the front-end has hung up") in (State.SAVED, State.LINGERING):
            await self._begin_linger(await asyncio.to_thread(self._mover.leave))
        self._note_end(await self._transfers.hung_up())
        if self._advertising is not None:
            self._advertising.cancel()
            self._advertising = None
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        self._probe.stop()
        # At one time: a guest that still runs must not leave a flow that it has opened in between to the next one.
        self._engine.park()
        try:
            await asyncio.to_thread(self._mover.close_flows)
            self._engine.detach()
        finally:
            self._engine.unpark()
        self._stands_still = self._moved_in = False
        self._forget()
        self._end_guard()

    async def _begin_linger(self, left: Left) -> None:
        """Keep the sockets for a while: those of moved connections frozen and in repair mode, those of UDP unread."""
        self.moved_away = True
        self._lingers = [linger for linger in self._lingers if linger.remaining]
        fds = [*left.connections, *left.ports]
        if not fds:
            return
        numbers = len(left.connections), len(left.ports)
        if not self._options.migrate_linger:
            log.info("%d connections have moved away; their sockets are closed, and %d of UDP", *numbers)
            for fd in fds:
                os.close(fd)
            return
        log.info(
            "%d connections have moved away; their sockets, and %d of UDP, stay for %g s", *numbers, LINGER_SECONDS
        )
        self._lingers.append(Linger(fds, self._limit_flows))
        self._limit_flows()
        await self._lingers[-1].listen()
