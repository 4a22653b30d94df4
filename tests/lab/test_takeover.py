# SPDX-License-Identifier: GPL-2.0-or-later
"""Another process on the same host goes on with the guest, and the guest notices nothing; or it does not, and the old
one goes on, and the guest notices nothing."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from godwit.daemon.takeover import MAGIC, PROTOCOL, Word
from godwit.lab.backend import Backend
from godwit.lab.errors import LabError
from godwit.lab.guest import EmbeddedGuest
from godwit.lab.netns import wait_until
from godwit.lab.scenario import PORT, Load, Scenario

from .moves import IDLE, OWN_PORT, RATE, connection, datagrams, receive_all, receive_exactly, saved, works_on
from .successor import STEPS

FORWARD = ("--tcp-ports", str(PORT), "--udp-ports", str(PORT))
TIMES = 15 if os.environ.get("GODWIT_SANITIZE") else 100  # a process starts three times as long with the sanitizers
SO_RCVBUFFORCE = 33  # socket(7)


@contextlib.contextmanager
def in_thread(work: Callable[[], None]) -> Iterator[None]:
    """Work beside the block; what it raises is raised at the end."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join(30.0)
    assert not thread.is_alive()
    if failed:
        raise failed[0]


def give_room(receiver: socket.socket) -> None:
    """Whoever has to wait before it reads loses no datagram for that."""
    receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 24)


class Numbered:
    """Numbered datagrams from one socket to another, at a steady rate, until told to stop: who has got which."""

    def __init__(self, sender: socket.socket, where: tuple[str, int], receiver: socket.socket) -> None:
        self._sender, self._where, self._receiver = sender, where, receiver
        self.stop = threading.Event()
        self.sent = 0
        self.got: list[int] = []

    def send(self) -> None:
        """Send until told to stop, then the end."""
        while not self.stop.wait(0.002):
            self._sender.sendto(self.sent.to_bytes(4, "big"), self._where)
            self.sent += 1
        self._sender.sendto(b"end", self._where)

    def receive(self) -> None:
        """Take all up to the end."""
        while (data := self._receiver.recv(100)) != b"end":
            self.got.append(int.from_bytes(data, "big"))

    def amiss(self) -> str:
        """What has not come once and in its turn; empty if nothing is."""
        missing = sorted(set(range(self.sent)) - set(self.got))
        late = [(before, after) for before, after in itertools.pairwise(self.got) if before >= after]
        return f"missing {missing}, out of turn {late}" if missing or late else ""


def ask(ours: socket.socket, peer: socket.socket, stop: threading.Event) -> int:
    """Question and answer over a connection, one after the other; how many."""
    count = 0
    while not stop.is_set():
        for one, other in ((ours, peer), (peer, ours)):
            data = random.randbytes(1 + count % 3000)
            one.sendall(data)
            assert receive_exactly(other, len(data)) == data
        count += 1
    return count


def connect_often(scenario: Scenario, stop: threading.Event) -> int:
    """Connections of the guest's, and from outside, one after the other, each with a word both ways; how many."""
    assert isinstance(scenario.guest, EmbeddedGuest)
    count = 0
    with scenario.guest.space.enter():
        inside = socket.create_server((("", PORT + 2)), backlog=64)
    with scenario.network.server.enter():
        outside = socket.create_server((scenario.server_address, PORT + 2), backlog=64)
    with inside, outside:
        for listening in (inside, outside):
            listening.settimeout(10)
        while not stop.is_set():
            for space, where, listening in (
                (scenario.guest.space, scenario.server_address, outside),
                (scenario.network.server, scenario.network.a.address(False), inside),
            ):
                with space.enter():
                    sock = socket.socket()
                with sock:
                    sock.settimeout(10)
                    sock.connect((where, PORT + 2))
                    sock.sendall(b"hello")
                    with listening.accept()[0] as accepted:
                        accepted.settimeout(10)
                        assert receive_exactly(accepted, 5) == b"hello"
                        accepted.sendall(b"good bye")
                        accepted.shutdown(socket.SHUT_WR)
                        assert receive_all(sock) == b"good bye"
                        sock.shutdown(socket.SHUT_WR)
                        assert accepted.recv(1) == b""
            count += 1
    return count


def descriptors(pid: int) -> int:
    """How many a process has."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def resident(pid: int) -> int:
    """KiB of memory that a process has for itself, the guest's not counted."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1])
    raise LabError("no RssAnon")


def test_a_hundred_times_under_load(capsys: pytest.CaptureFixture[str]) -> None:
    """Streams both ways, idle connections, question and answer, new connections, datagrams, pings: nothing is lost."""
    ports = f"{PORT},{PORT + 2}"
    arguments = ["--tcp-ports", ports, "--udp-ports", str(PORT)]
    with Scenario(godwit_arguments=arguments) as scenario, contextlib.ExitStack() as at_end:
        assert isinstance(scenario.guest, EmbeddedGuest)
        load = scenario.start_load(idle=50, rate=RATE)
        ours, peer = at_end.enter_context(connection(scenario))
        service, asking, server, client = at_end.enter_context(datagrams(scenario))
        for receiver in (service, server):
            give_room(receiver)
        inward = Numbered(client, (scenario.network.a.address(False), PORT), service)
        outward = Numbered(asking, (scenario.server_address, PORT), server)
        stop = threading.Event()
        counts: dict[str, int] = {}
        ping = scenario.guest.popen(
            ["ping", "-n", "-i", "0.02", "-W", "5", scenario.server_address], stdout=subprocess.PIPE
        )
        pauses, sizes = [], []
        backend = scenario.backends["a"]
        with contextlib.ExitStack() as beside:
            for numbered in (inward, outward):
                for work in (numbered.receive, numbered.send):
                    beside.enter_context(in_thread(work))
                beside.callback(numbered.stop.set)
            beside.enter_context(in_thread(lambda: counts.update(asked=ask(ours, peer, stop))))
            beside.enter_context(in_thread(lambda: counts.update(connected=connect_often(scenario, stop))))
            beside.callback(stop.set)
            for _ in range(TIMES):
                pauses.append(backend.hand_over())
                load.wait_alive()
                sizes.append((descriptors(backend.pid), resident(backend.pid)))
        time.sleep(1)  # ping does not wait for what is on its way when it is told to end
        ping.send_signal(2)
        said = ping.communicate(timeout=20)[0].decode()
        works_on(scenario, load)
    asked = re.search(r"(\d+) packets transmitted", said)
    answered = [int(number) for number in re.findall(r"bytes from .*icmp_seq=(\d+) ", said)]
    assert asked is not None, said
    assert answered == list(range(1, len(answered) + 1)), said
    assert len(answered) > TIMES
    assert int(asked[1]) - len(answered) < 25, said
    assert (inward.amiss(), outward.amiss()) == ("", "")
    assert min(counts.values()) > TIMES
    early, late = sizes[TIMES // 10 : TIMES // 5], sizes[-TIMES // 10 :]
    for which, slack in ((0, 10), (1, 4096)):
        assert max(size[which] for size in late) <= max(size[which] for size in early) + slack, sizes
    # The figure is for people; the bound is what the old one would give up at, and far above it.
    with capsys.disabled():
        sys.stdout.write(
            f"\n{TIMES} hand-overs: the guest stood still for {statistics.median(pauses) * 1000:.1f} ms (median), "
            f"{max(pauses) * 1000:.1f} ms (worst); {inward.sent} and {outward.sent} datagrams, {counts}, "
            f"{sizes[-1][0]} descriptors and {sizes[-1][1]} KiB at the end\n"
        )
    assert max(pauses) < 2


def noticed(backend: Backend, number: int) -> bool:
    """Wait until so many have failed to take over."""
    wait_until(lambda: backend.messages().count("nobody takes over") >= number, "it to be noticed", 10.0)
    return backend.messages().count("nobody takes over") == number


@pytest.mark.parametrize("deed", ["die", "hang", "garbage", "refuse"])
def test_a_successor_that_fails_at_any_step(deed: str) -> None:
    """The old one goes on; one that hangs is ended by its alarm. The next one takes over."""
    with Scenario(godwit_arguments=["--runas", "0", *FORWARD]) as scenario:
        load = scenario.start_load(idle=IDLE, rate=RATE)
        backend = scenario.backends["a"]
        steps = {"hang": ("greeted", "loaded", "go")}.get(deed, STEPS)
        for number, step in enumerate(steps, 1):
            path = f"{backend.socket}.takeover"
            with subprocess.Popen([sys.executable, "-m", "tests.lab.successor", path, step, deed]) as process:
                process.wait(20.0)
            assert process.returncode == {"die": -signal.SIGKILL, "hang": -signal.SIGALRM}.get(deed, 3)
            assert noticed(backend, number), step
            load.wait_alive()
            assert load.check_idle() == ""
        assert backend.running
        backend.hand_over()
        works_on(scenario, load)


def test_only_for_the_same_user() -> None:
    """Also where everybody may connect."""
    with Scenario() as scenario:
        load = scenario.start_load(idle=IDLE, rate=RATE)
        path = f"{scenario.backends['a'].socket}.takeover"
        Path(path).chmod(0o666)
        assert "uid 12345 is another" in answer_to(12345, path, hello(PROTOCOL))
        works_on(scenario, load)


def test_one_that_comes_late_or_not_at_all() -> None:
    """It has the sockets, and still cannot go on."""
    with Scenario(godwit_arguments=list(FORWARD)) as scenario:
        load = scenario.start_load(idle=IDLE, rate=RATE)
        backend = scenario.backends["a"]
        path = f"{backend.socket}.takeover"
        with subprocess.Popen([sys.executable, "-m", "tests.lab.successor", path, "none", "late"]) as process:
            assert process.wait(20.0) == 5
        load.wait_alive()
        assert backend.running
        left = backend.messages().count("has not ended: end it")
        with subprocess.Popen([sys.executable, "-m", "tests.lab.successor", path, "go", "sleep"]) as process:
            wait_until(lambda: backend.messages().count("has not ended: end it") > left, "it to be left", 10.0)
            load.wait_alive()
            process.kill()
        backend.hand_over()
        works_on(scenario, load)


def test_one_with_too_few_descriptors() -> None:
    with Scenario() as scenario:
        load = scenario.start_load(idle=100, rate=RATE)
        backend = scenario.backends["a"]
        assert backend.successor(wrapper=["prlimit", "--nofile=60:60"]).wait(20.0) == 1
        assert "there are too few descriptors for what the guest has" in backend.messages()
        load.wait_alive()
        backend.hand_over()
        works_on(scenario, load)


def answer_to(uid: int, path: str, word: bytes) -> str:
    """What is said to another user's process. It is a fork of this one: another one may not find its interpreter."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.setresuid(uid, uid, uid)
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.settimeout(10)
                sock.connect(path)
                with contextlib.suppress(BrokenPipeError):
                    sock.send(word)
                os.write(theirs, sock.recv(500))
        except BaseException as error:
            os.write(theirs, repr(error).encode())
        finally:
            os._exit(0)
    os.close(theirs)
    os.waitpid(pid, 0)
    with open(ours, "rb") as pipe:
        return pipe.read().decode(errors="replace")


def hello(protocol: int) -> bytes:
    """The first word, in a version of the protocol."""
    return MAGIC + Word.HELLO.to_bytes(2, sys.byteorder) + protocol.to_bytes(2, sys.byteorder) + bytes(4) + b"9.9.9"


def test_one_in_another_network(scenario: Scenario, load: Load) -> None:
    """It could have the connections, but not open any more of them."""
    backend = scenario.backends["a"]
    elsewhere = backend.successor(wrapper=["nsenter", f"--net={scenario.network.server.path}"])
    assert elsewhere.wait(20.0) == 1
    assert "it is in another network namespace: start this one there, too" in backend.messages()
    works_on(scenario, load)


def test_a_version_of_the_protocol_that_is_not_known(scenario: Scenario, load: Load) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(10)
        sock.connect(f"{scenario.backends['a'].socket}.takeover")
        sock.send(hello(PROTOCOL + 1))
        answer = sock.recv(500)
        assert answer[8] == Word.REFUSED
        assert b"speaks protocol 2" in answer
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.connect(f"{scenario.backends['a'].socket}.takeover")
        scenario.backends["a"].hand_over()  # who says nothing is in nobody's way
    works_on(scenario, load)


def test_not_while_a_migration_is_under_way(scenario: Scenario, load: Load) -> None:
    backend = scenario.backends["a"]
    attempt = saved(scenario)
    with pytest.raises(LabError, match="cannot take over: a migration is under way"):
        backend.hand_over()
    attempt.cancel()
    load.wait_alive()
    backend.hand_over()
    works_on(scenario, load)


@pytest.mark.parametrize("version", ["2", "native"])
def test_a_guest_that_was_handed_over_migrates(version: str) -> None:
    """From a process that has taken over to another host, is taken over there, and comes back."""
    arguments = ["--migrate-version", version, *FORWARD]
    with Scenario(godwit_arguments=arguments) as scenario:
        load = scenario.start_load(idle=IDLE, rate=RATE)
        for _ in range(2):
            scenario.backends[scenario.where].hand_over()
            load.wait_alive()
            scenario.move()
            assert load.check_idle() == ""
        works_on(scenario, load)


def send_all(sock: socket.socket, data: bytes) -> None:
    """Send, and close that direction."""
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


def test_connections_of_which_one_side_has_closed(scenario: Scenario) -> None:
    """The other side goes on, and closes in the new process."""
    backend = scenario.backends["a"]
    data = random.randbytes(300_000)
    for half in ("guest", "peer"):
        with connection(scenario) as (ours, peer):
            closing, other = (ours, peer) if half == "guest" else (peer, ours)
            closing.sendall(b"request")
            closing.shutdown(socket.SHUT_WR)
            assert receive_all(other) == b"request"
            backend.hand_over()
            with in_thread(functools.partial(send_all, other, data)):
                assert receive_all(closing) == data
            backend.hand_over()


def test_the_last_bytes_of_a_connection_that_both_sides_have_closed(scenario: Scenario) -> None:
    """The peer does not take them yet; the guest has forgotten the connection."""
    assert isinstance(scenario.guest, EmbeddedGuest)
    guest = scenario.guest
    data = random.randbytes(50_000)
    with connection(scenario, server_room=20_000) as (ours, peer):
        peer.shutdown(socket.SHUT_WR)
        assert ours.recv(1) == b""
        ours.sendall(data)
        ours.close()
        wait_until(lambda: not guest.space.run("ss", "-Htn").stdout, "the guest to be done with it")
        for _ in range(2):
            scenario.backends["a"].hand_over()
        assert receive_all(peer) == data


def test_a_guest_that_stands_still_misses_nothing() -> None:
    """Paused, with all its rings full: datagrams, connections that are being opened, bytes, and the end of one."""
    with Scenario(godwit_arguments=list(FORWARD)) as scenario, contextlib.ExitStack() as at_end:
        guest, backend = scenario.guest, scenario.backends["a"]
        assert isinstance(guest, EmbeddedGuest)
        here = scenario.network.a.address(False)
        service, asking, server, client = at_end.enter_context(datagrams(scenario))
        give_room(service)  # for all at once, when it goes on
        ours, peer = at_end.enter_context(connection(scenario))
        with guest.space.enter():
            listening = at_end.enter_context(socket.create_server(("", PORT)))
            # Of the guest's: the accept queue is full, and the host's own handshake waits.
            late = at_end.enter_context(socket.socket())
        with scenario.network.server.enter():
            full = at_end.enter_context(socket.socket())
            full.bind((scenario.server_address, PORT + 7))
            full.listen(0)
            first = at_end.enter_context(socket.create_connection((scenario.server_address, PORT + 7)))
            outside = [at_end.enter_context(socket.socket()) for _ in range(20)]
        late.setblocking(False)
        assert late.connect_ex((scenario.server_address, PORT + 7)) == 115
        asking.sendto(b"?", (scenario.server_address, PORT))
        assert server.recvfrom(10)[0] == b"?"
        guest.pause()
        data = random.randbytes(200_000)
        texts = [number.to_bytes(4, "big") * 100 for number in range(400)]  # of which the ring takes 256
        for text in texts:
            client.sendto(text, (here, PORT))
        for sock in outside:
            sock.settimeout(20)
            sock.connect((here, PORT))
            sock.sendall(b"early")
        peer.sendall(data)
        peer.shutdown(socket.SHUT_WR)
        for _ in range(3):
            backend.hand_over()
        guest.resume()
        assert receive_all(ours) == data
        for text in texts:
            assert service.recv(10_000) == text
        for _ in outside:
            accepted, _ = listening.accept()
            with accepted:
                accepted.settimeout(20)
                assert accepted.recv(5, socket.MSG_WAITALL) == b"early"
        full.accept()[0].close()
        first.close()
        with full.accept()[0] as accepted:
            late.settimeout(20)
            accepted.sendall(b"at last")
            assert late.recv(7, socket.MSG_WAITALL) == b"at last"


def test_a_datagram_of_which_the_guest_has_had_a_part() -> None:
    """Taken from its socket, and cut in fragments, of which the guest's ring took some."""
    with Scenario(godwit_arguments=list(FORWARD)) as scenario, contextlib.ExitStack() as at_end:
        guest, backend = scenario.guest, scenario.backends["a"]
        assert isinstance(guest, EmbeddedGuest)
        service, _, _, client = at_end.enter_context(datagrams(scenario))
        give_room(service)
        # Large ones take four buffers of what is left of 256. Where nothing is left in the one round, something is in
        # the other.
        for small in (240, 241):
            texts = [number.to_bytes(4, "big") * (1 if number < small else 1250) for number in range(small + 10)]
            guest.pause()
            for text in texts:
                client.sendto(text, (scenario.network.a.address(False), PORT))
            for _ in range(2):
                backend.hand_over()
            guest.resume()
            for text in texts:
                assert service.recv(10_000) == text
        assert re.search("[1-9][0-9]* datagrams in hand", backend.messages())


def test_forwarded_ports_are_the_new_ones() -> None:
    """Ports that both have keep who waits; the others are opened and closed; connections go on whatever their port."""
    with Scenario(godwit_arguments=["--tcp-ports", f"{PORT},{PORT + 1}", "--udp-ports", str(PORT)]) as scenario:
        assert isinstance(scenario.guest, EmbeddedGuest)
        backend, here = scenario.backends["a"], scenario.network.a.address(False)
        scenario.guest.agent.listen(PORT)
        echo = scenario.server.echo(here, PORT, IDLE)
        taken = scenario.network.a.popen(["sleep", "1000"])
        with scenario.network.a.enter():
            other = socket.create_server(("", PORT + 3))
        with other, pytest.raises(LabError, match=f"cannot listen on port {PORT + 3}: Address already in use"):
            backend.hand_over(["--tcp-ports", str(PORT + 3)])
        taken.kill()
        assert scenario.server.check(echo).alive == IDLE
        backend.hand_over(["--tcp-ports", f"{PORT + 1}:{PORT},{PORT + 3}:{PORT}"])
        assert scenario.server.check(echo).alive == IDLE
        for port in (PORT + 1, PORT + 3):
            another = scenario.server.echo(here, port, 2)
            assert scenario.server.check(another).alive == 2
        with scenario.network.server.enter(), socket.socket() as refused, pytest.raises(ConnectionRefusedError):
            refused.connect((here, PORT))


def test_what_waits_to_be_accepted_is_accepted() -> None:
    """Connections in a listening socket's queue, of a guest that has no front-end yet; and the front-end that waits."""
    with Scenario(godwit_arguments=list(FORWARD)) as scenario, contextlib.ExitStack() as at_end:
        backend = scenario.backends["a"]
        front = at_end.enter_context(socket.socket(socket.AF_UNIX))
        front.connect(backend.socket)
        front.sendall(b"\x01\0\0\0\x01\0\0\0\0\0\0\0")  # GET_FEATURES
        load = scenario.start_load(idle=IDLE, rate=RATE)
        for _ in range(2):
            backend.hand_over()
        works_on(scenario, load)
        assert isinstance(scenario.guest, EmbeddedGuest)
        scenario.guest.disconnect()
        front.settimeout(10)
        assert front.recv(20)[:4] == b"\x01\0\0\0"
        backend.hand_over()
        front.sendall(b"\x01\0\0\0\x01\0\0\0\0\0\0\0")
        assert front.recv(20)[:4] == b"\x01\0\0\0"


def test_datagrams_in_fragments() -> None:
    """Half of the guest's datagram has come before, the rest comes after."""
    with Scenario() as scenario, contextlib.ExitStack() as at_end:
        assert isinstance(scenario.guest, EmbeddedGuest)
        _, asking, server, _ = at_end.enter_context(datagrams(scenario))
        data = random.randbytes(5000)
        with scenario.guest.space.enter():
            raw = at_end.enter_context(socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW))
        source, where = scenario.guest.run("hostname", "-I").stdout.split()[0], scenario.server_address
        udp = (
            OWN_PORT.to_bytes(2, "big") + PORT.to_bytes(2, "big") + (8 + len(data)).to_bytes(2, "big") + bytes(2) + data
        )
        fragments = []
        for at in range(0, len(udp), 1400):
            more = 0x2000 if at + 1400 < len(udp) else 0
            head = b"\x45\0\0\0\x12\x34" + (more | at >> 3).to_bytes(2, "big") + b"\x40\x11\0\0"
            fragments.append(head + socket.inet_aton(source) + socket.inet_aton(where) + udp[at : at + 1400])
        for fragment in fragments[:2]:
            raw.sendto(fragment, (where, 0))
        asking.sendto(b"after these", (where, PORT))
        assert server.recv(100) == b"after these"
        scenario.backends["a"].hand_over()
        for fragment in fragments[2:]:
            raw.sendto(fragment, (where, 0))
        assert server.recv(6000) == data
