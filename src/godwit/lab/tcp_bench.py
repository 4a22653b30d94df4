# SPDX-License-Identifier: GPL-2.0-or-later
"""TCP cases of the bench: streams, questions and answers, short connections.

*Up* is from the guest to the server, *down* to the guest, over connections that
the guest has opened; *forwarded* are those that the server opens, to ports of the
host. What sends and receives (``_tcp``) are threads of this process with sockets
in the namespaces, one for each end, so that a back-end's processor time is its
own. What stands still is a failure, never a low figure.

**Streams** send as much as goes, and the receiver throws it away unread. What is
measured begins when they run, all of them, and begins anew where nothing comes for
a retransmission timeout: that would else be most of what is measured, once here and
once there. It ends before the senders do; then all that was sent must arrive.
``Gbit/s`` and ``CPU s/GiB`` are those of a stream that runs, then, with the
back-end's ``CPU s/s``, and ``fairness``, Jain's index of the streams' shares (1: all
the same; 1/n: one has all). What it leaves out is in ``Gbit/s from the beginning``,
in ``ms until steady``, the time until that from which all counts, and in ``longest
standstill ms``, the longest without a byte over any of them since they first ran.
The rates are the receiver's. The ideal back-end is the server of streams itself,
and their figures are those of the guest's ends. Once *together*, with all on one
processor, and once *split*, with the guest's ends and the front-end on one, and the
back-end and the server's ends on another (``godwit.lab.placement``).

**Transactions**: a byte to the server, the same byte back, then the next one.

**Connections**: opened, a byte there and back, and closed, by the server first:
so it is the server where they go through TIME_WAIT, and nobody's search for a
free port becomes what is measured. The client takes one after the other, until it
has read the end; the server's ports take turns.

Of both, the rate, how long one takes for the client (``p50 us``, ``p99 us``), and
the back-end's time for each (``CPU us``); once *together*, and once *apart*, with
the back-end on a processor of its own. Alone, and beside thousands of idle connections through
the same back-end, which go to many of the server's ports: there a second back-end
of the same kind, without any, is measured in between (``, none idle``). Each round
sees whether the connections to one of the ports carry something; all have to in a
case of their own, the last one.

*In stream mode* the guest's frames go over a socket, not through rings.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import socket
import time
from collections.abc import Callable, Iterator, Sequence

from godwit.lab._tcp import PATIENCE, Answerer, Echo, Receiver, Sender, Times, ask, visit
from godwit.lab.backend import IDEAL, Backend, Kind
from godwit.lab.bench import DESCRIPTORS, NONE, PORT_COUNT, Bed, Case, Side, Working
from godwit.lab.closing import Closing
from godwit.lab.errors import LabError
from godwit.lab.guest import StreamGuest
from godwit.lab.ideal import CHARGEN, DISCARD
from godwit.lab.netns import Namespace, Network, wait_until
from godwit.lab.placement import PLACEMENTS, STREAM_PLACEMENTS, TOGETHER, at, measured, placed
from godwit.lab.traffic import Traffic

GIB = 1 << 30
TIMEOUT = 5.0  # seconds for a connection to open
WARM = 0.05  # seconds that questions, or short connections, go on before they count

SLICE = 0.05  # seconds in each of which something comes over each, if streams run
STEADY = 5  # slices that are enough to believe it
STEADY_WITHIN = 10.0  # seconds
LOOK = 0.01  # seconds between looks at whether something has come
STANDSTILL = 0.15  # seconds; a retransmission timeout takes 0.2 at least (TCP_RTO_MIN), not all of which is seen

STREAMS = (1, 4, 16)
MTUS = (65520, 9000, 1500)
STREAM_MODE_MTUS = (65520, 1500)
AT_ONCE = 16  # transactions
IDLE = (5000, 19_000)
PASSTS_MOST = 9000  # of which it can have about so many here: each takes two descriptors of 20 000
IDLE_PORTS = 20  # of the server, for each side's idle connections
IDLE_TIMEOUT = 15.0  # seconds for those to one port to open

Measure = Callable[[Side, float], dict[str, float]]


def _listen(space: Namespace, port: int = 0) -> socket.socket:
    with space.enter():
        return socket.create_server(("", port))


@contextlib.contextmanager
def _connections(side: Side, count: int) -> Iterator[tuple[list[socket.socket], list[socket.socket]]]:
    """Connections from the guest to a server: the guest's ends, and the server's in the same order."""
    guests: list[socket.socket] = []
    servers: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(_listen(side.server))
        listening.settimeout(TIMEOUT)
        address = side.server_addr, listening.getsockname()[1]
        for _ in range(count):
            with side.space.enter():
                guests.append(stack.enter_context(socket.create_connection(address, TIMEOUT)))
            servers.append(stack.enter_context(listening.accept()[0]))
        for sock in (*guests, *servers):
            sock.setblocking(True)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield guests, servers


def _fds(socks: Sequence[socket.socket]) -> list[int]:
    return [sock.fileno() for sock in socks]


@contextlib.contextmanager
def _running(end: Sender | Receiver | Echo | Answerer, processor: int | None = None) -> Iterator[Working]:
    """Have it run in a thread for a ``with`` block: on this processor, or where the caller is."""
    working = Working(end.run if processor is None else functools.partial(at, processor, end.run))
    try:
        yield working
    finally:
        end.stop()
        working.result()


# --- streams ------------------------------------------------------------------


def fairness(shares: Sequence[int]) -> float:
    """Jain's index (Jain, Chiu, Hawe 1984): 1 if all are the same, 1/n if one has all."""
    return sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares))


def streams(side: Side, seconds: float, *, up: bool, count: int, placement: str) -> dict[str, float]:
    """Send over ``count`` connections at once: for so long, when they run.

    ``placement`` is one of `STREAM_PLACEMENTS`.
    """
    with placed(side.pid, placement) as host:
        if side.kind == IDEAL:
            return _to_the_limit(side, seconds, up=up, count=count)
        return _from_end_to_end(side, seconds, host, up=up, count=count)


def _from_end_to_end(side: Side, seconds: float, host: int, *, up: bool, count: int) -> dict[str, float]:
    """The server's ends are at the processor ``host``."""
    with _connections(side, count) as (guests, servers):
        sources, targets = (guests, servers) if up else (servers, guests)
        sender, receiver = Sender(_fds(sources)), Receiver(_fds(targets))

        def arrived() -> bool:
            return receiver.bytes == sender.bytes

        with _running(receiver, host if up else None) as receiving:
            with _running(sender, None if up else host):
                values = _sampled(side, seconds, receiver, receiving)
            # Before the streams are closed: passt resets one that ends while the guest's ring is full.
            wait_until(lambda: arrived() or not receiving.is_alive(), "what was sent to arrive", PATIENCE / 1e3)
    if not arrived():
        raise LabError(f"{sender.bytes} bytes were sent, {receiver.bytes} have arrived")
    return values


def _to_the_limit(side: Side, seconds: float, *, up: bool, count: int) -> dict[str, float]:
    """The same with a back-end that is the other end itself."""
    address = side.server_addr, DISCARD if up else CHARGEN
    with contextlib.ExitStack() as stack:
        with side.space.enter():
            guests = [stack.enter_context(socket.create_connection(address, TIMEOUT)) for _ in range(count)]
        end = Sender(_fds(guests)) if up else Receiver(_fds(guests))
        with _running(end) as working:
            return _sampled(side, seconds, end, working)


def _sampled(side: Side, seconds: float, end: Sender | Receiver, running: Working) -> dict[str, float]:
    """What goes over the connections of a running end in so many seconds without a standstill."""
    began = time.monotonic()
    longest = 0.0
    while True:
        steady = _until_steady(end, running, began + STEADY_WITHIN)
        since, cpu, before = time.monotonic(), side.cpu(), end.bytes
        standstill = _longest_standstill(end, seconds)
        took, used, after = time.monotonic() - since, side.cpu() - cpu, end.bytes
        longest = max(longest, standstill)
        if standstill <= STANDSTILL and after != before:
            break
    shares = [there - here for here, there in zip(before, after, strict=True)]
    total = sum(shares)
    values = {
        "Gbit/s": total * 8 / took / 1e9,
        "Gbit/s from the beginning": sum(after) * 8 / (since + took - began) / 1e9,
        "ms until steady": (steady - began) * 1000,
        "longest standstill ms": longest * 1000,
    }
    if side.kind != NONE:
        values |= {"CPU s/GiB": used / total * GIB, "CPU s/s": used / took}
    if len(shares) > 1:
        values["fairness"] = fairness(shares)
    return values


def _until_steady(end: Sender | Receiver, running: Working, limit: float) -> float:
    """Wait until some slices in a row each brought something over each connection; return when the first began.

    `LabError` if it was not before ``limit``.
    """
    slices, since, before = 0, time.monotonic(), end.bytes
    while slices < STEADY:
        if not running.is_alive():
            running.result()
            raise LabError("the streams have ended")
        if since > limit:
            raise LabError("the streams come to no steady rate")
        time.sleep(SLICE)
        count = end.bytes
        if all(map(operator.lt, before, count)):
            slices += 1
        else:
            slices, since = 0, time.monotonic()
        before = count
    return since


def _longest_standstill(end: Sender | Receiver, seconds: float) -> float:
    """Wait for so long; return for how many seconds in a row nothing came: at least, as far as was looked."""
    longest, since, before = 0.0, time.monotonic(), end.bytes
    over = since + seconds
    while (left := over - time.monotonic()) > 0:
        time.sleep(min(LOOK, left))
        now, count = time.monotonic(), end.bytes
        if count == before:
            longest = max(longest, now - since)
        else:
            since, before = now, count
    return longest


# --- transactions and connections -----------------------------------------------


def _timed(side: Side, what: str, work: Callable[[], Times]) -> dict[str, float]:
    began, cpu = time.monotonic(), side.cpu()
    found = work()
    took, cpu = time.monotonic() - began, side.cpu() - cpu
    times = sorted(found)
    values = {
        f"{what}/s": len(times) / took,
        "p50 us": times[len(times) // 2] / 1e3,
        "p99 us": times[len(times) * 99 // 100] / 1e3,
    }
    if side.kind != NONE:
        values["CPU us"] = cpu / len(times) * 1e6
    return values


def transactions(side: Side, seconds: float, *, count: int = 1) -> dict[str, float]:
    """Ask and be answered over ``count`` connections at once."""
    with _connections(side, count) as (guests, servers), _running(Echo(_fds(servers))):
        ask(_fds(guests), seconds=WARM)
        return _timed(side, "transactions", lambda: ask(_fds(guests), seconds=seconds))


def connections(side: Side, seconds: float, *, forwarded: bool = False) -> dict[str, float]:
    """Open, use and close connections, one after the other."""
    spaces: tuple[Namespace, Namespace] = side.space, side.server
    addr, ports = side.server_addr, [0] * PORT_COUNT
    if forwarded:
        spaces = side.server, side.space
        addr, ports = side.addr, list(range(side.port, side.port + PORT_COUNT))
    client, server = spaces
    with contextlib.ExitStack() as stack:
        listening = [stack.enter_context(_listen(server, port)) for port in ports]
        ports = [sock.getsockname()[1] for sock in listening]
        answerer = Answerer(_fds(listening))
        with _running(answerer), client.enter():
            first = visit(addr, ports, seconds=WARM)
            before = sum(answerer.bytes)
            values = _timed(side, "connections", lambda: visit(addr, ports, seconds=seconds))
    if before != len(first):
        raise LabError(f"{len(first)} connections were opened, {before} have arrived")
    return values


# --- beside idle connections --------------------------------------------------------


class CrowdedSide:
    """A side, and idle connections through it, which are opened when they are first needed; and one without any."""

    def __init__(self, side: Side, empty: Side, idle: int, cleanup: contextlib.ExitStack) -> None:
        self.side = side
        self.empty = empty
        self._each = idle // IDLE_PORTS
        self._cleanup = cleanup
        self._client: Traffic | None = None
        self._jobs: list[int] = []

    def open(self) -> None:
        """Open the connections, once; `LabError` if not all of them open."""
        if self._client is not None:
            return
        jobs: list[int] = []
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(Traffic(self.side.server))
            client = stack.enter_context(Traffic(self.side.space))
            first = self.side.port + PORT_COUNT
            try:
                for port in range(first, first + IDLE_PORTS):
                    server.listen(port)
                    jobs.append(client.echo(self.side.server_addr, port, self._each, IDLE_TIMEOUT))
            except LabError as error:
                least, idle = len(jobs) * self._each, IDLE_PORTS * self._each
                raise LabError(
                    f"of {idle} idle connections, only {least} to {least + self._each} open: {error}"
                ) from error
            self._cleanup.push(stack.pop_all())
        self._client, self._jobs = client, jobs

    def alive(self, ports: int = IDLE_PORTS) -> int:
        """Have the connections to some of the ports, which take turns, carry something; return how many did: all.

        `LabError` if there is one that did not.
        """
        if self._client is None:
            return 0
        for job in self._jobs[:ports]:
            alive = self._client.check(job).alive
            if alive != self._each:
                raise LabError(f"of {self._each} idle connections, {alive} are alive")
        self._jobs = self._jobs[ports:] + self._jobs[:ports]
        return self._each * ports

    def check(self) -> None:
        """Raise `LabError` unless the sides are well, and so are those of the connections that go to one port."""
        self.side.check()
        self.empty.check()
        self.alive(1)


class CrowdedBed(Closing):
    """A bed whose sides have idle connections through them, and a side without any beside each."""

    def __init__(self, idle: int, mtu: int, kinds: Sequence[Kind]) -> None:
        with contextlib.ExitStack() as stack:
            crowded, empty = (stack.enter_context(Bed(mtu, kinds)).sides for _ in range(2))
            self._cleanup = stack.pop_all()
        self.sides = {kind: CrowdedSide(crowded[kind], empty[kind], idle, self._cleanup) for kind in kinds}

    def close(self) -> None:
        """Take it all down. May be repeated."""
        self._cleanup.close()


def _beside(measure: Measure, crowded: CrowdedSide, seconds: float) -> dict[str, float]:
    """Measure with the idle connections and without, half of the time each; what is better for less is compared."""
    crowded.open()
    values = measure(crowded.side, seconds / 2)
    without = measure(crowded.empty, seconds / 2)
    return values | {f"{metric}, none idle": value for metric, value in without.items() if metric.endswith(" us")}


def _alive(crowded: CrowdedSide, seconds: float) -> dict[str, float]:
    """Last of all: do they all still carry something?"""
    crowded.open()
    return {"flows": crowded.alive()}


# --- stream mode ------------------------------------------------------------------------


class StreamSide(Side):
    """A back-end in stream mode and its guest: started when first needed, for not every back-end has it."""

    def __init__(self, kind: Kind, net: Network, folder: str, port: int, cleanup: contextlib.ExitStack) -> None:
        super().__init__(NONE, net, folder, port, cleanup)
        self.kind = kind
        self._net = net
        self._folder = folder
        self._cleanup = cleanup
        self._stream_guest: StreamGuest | None = None

    def open(self) -> None:
        """Start both, once; `LabError` if the back-end does not start."""
        if self._stream_guest is None:
            net = self._net
            backend = self._cleanup.enter_context(
                Backend(net.a, self._folder, self.kind, stream=True, mtu=net.mtu, descriptors=DESCRIPTORS)
            )
            guest = self._cleanup.enter_context(StreamGuest(f"guest-{self.kind}", mtu=net.mtu))
            guest.connect(backend.socket)
            guest.configure()
            self.space, self._pid, self._stream_guest = guest.space, backend.pid, guest

    def check(self) -> None:
        """Raise `LabError` if the back-end has sent what none may."""
        if self._stream_guest is not None:
            self._stream_guest.check()


STREAM_BED = functools.partial(Bed, side=StreamSide)


def _in_stream_mode(measure: Measure, side: StreamSide, seconds: float) -> dict[str, float]:
    side.open()
    return measure(side, seconds)


# --- the cases ------------------------------------------------------------------------


# It has no ports of the host, and no flows that could be idle.
_WITHOUT_IDEAL = frozenset({IDEAL})


def _cases() -> Iterator[Case]:
    for mtu in MTUS:
        for way in ("up", "down"):
            for count in STREAMS:
                for placement, where in STREAM_PLACEMENTS.items():
                    yield Case(
                        f"stream-{way}-{count}-{mtu}-{placement}",
                        f"{way}, {count} stream{'s' * (count > 1)}, MTU {mtu}, {where}",
                        mtu,
                        functools.partial(streams, up=way == "up", count=count, placement=placement),
                    )
    few: dict[str, tuple[str, Measure]] = {
        "rr": ("transactions", transactions),
        "crr": ("connections", connections),
        "crr-forward": ("connections, forwarded", functools.partial(connections, forwarded=True)),
    }
    for name, (title, measure) in few.items():
        for placement, where in PLACEMENTS.items():
            yield Case(
                f"{name}-{placement}",
                f"{title}, {where}",
                1500,
                functools.partial(measured, placement, measure),
                without=_WITHOUT_IDEAL if name == "crr-forward" else frozenset(),
            )
    yield Case(
        f"rr-{AT_ONCE}",
        f"transactions, {AT_ONCE} at once",
        1500,
        functools.partial(transactions, count=AT_ONCE),
    )
    for idle in IDLE:
        bed = functools.partial(CrowdedBed, idle)
        without = _WITHOUT_IDEAL | ({"passt"} if idle > PASSTS_MOST else frozenset())
        many = f"{idle} idle connections{' (beyond passt)' if idle > PASSTS_MOST else ''}"
        for name, (title, measure) in few.items():
            for placement, where in PLACEMENTS.items():
                yield Case(
                    f"{name}-idle-{idle}-{placement}",
                    f"{title}, beside {many}, {where}",
                    1500,
                    functools.partial(_beside, functools.partial(measured, placement, measure)),
                    bed,
                    without,
                )
        yield Case(f"alive-idle-{idle}", f"{many}, after all that", 1500, _alive, bed, without)
    for mtu in STREAM_MODE_MTUS:
        for way in ("up", "down"):
            measure = functools.partial(streams, up=way == "up", count=1, placement=TOGETHER)
            yield Case(
                f"stream-mode-{way}-{mtu}",
                f"{way}, 1 stream, MTU {mtu}, in stream mode, {PLACEMENTS[TOGETHER]}",
                mtu,
                functools.partial(_in_stream_mode, measure),
                STREAM_BED,
                frozenset({IDEAL, NONE}),
            )


CASES = tuple(_cases())
