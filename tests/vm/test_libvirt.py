# SPDX-License-Identifier: GPL-2.0-or-later
"""godwit as the ``passt`` that libvirt starts: domains of an ordinary user's session."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from godwit.lab.errors import CommandError
from godwit.lab.libvirt import Domain, Libvirt, interface
from godwit.lab.netns import HOST4, HOST6, SERVER4, SERVER6, Network, wait_until
from godwit.lab.transfer import Peer

from . import online
from .conftest import FAILED

# libvirt's types of an interface that passt serves.
KINDS = pytest.mark.parametrize("kind", ["vhostuser", "user"])

INSIDE = f"""
<mtu size='{online.MTU}'/>
<portForward proto='tcp'><range start='{online.LISTENS}'/></portForward>
<portForward proto='tcp'>
  <range start='7100' end='7110' to='{online.LISTENS}'/>
  <range start='7105' exclude='yes'/>
</portForward>
<portForward proto='tcp' address='{HOST6}'><range start='7200' to='{online.LISTENS}'/></portForward>
<portForward proto='udp'>
  <range start='{online.LISTENS}'/>
  <range start='7300' to='{online.LISTENS}'/>
</portForward>
"""


class Session:
    """The laboratory's network, with a server, and a user's libvirt on host a."""

    def __init__(self) -> None:
        self.net = Network()
        self.peer = Peer(self.net.server)
        self.libvirt = Libvirt(self.net.a, resolv=online.RESOLV)

    def passt(self) -> list[int]:
        """The processes that run as passt."""
        return self.net.a.processes("passt")

    def left(self) -> list[str]:
        """What there is of passt's sockets and PID files."""
        folder = self.libvirt.passt_state
        return sorted(os.listdir(folder)) if os.path.exists(folder) else []

    def gone(self) -> None:
        """See that nothing is left of passt: no process, no socket, no PID file."""
        # libvirt waits for the PID file's process; the last moments of a daemon that ends by itself it does not.
        wait_until(lambda: not self.passt(), "passt to end", 5.0)
        assert self.left() == []

    def close(self) -> None:
        self.libvirt.close()
        self.peer.close()
        self.net.close()


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    """Give the tests of this file one libvirt: it takes some seconds to learn what QEMU can do."""
    made = Session()
    yield made
    made.close()


Define = Callable[..., Domain]


@pytest.fixture
def define(request: pytest.FixtureRequest, session: Session) -> Iterator[Define]:
    """Give a test a way to define a domain with passt behind one interface, which is gone with the test."""
    made: list[Domain] = []
    log = os.path.join(session.libvirt.folder, "passt.log")

    def make(kind: str, inside: str = INSIDE, *, device: str = "eth0") -> Domain:
        made.append(session.libvirt.define("guest", interface(inside, kind=kind, device=device, log=log)))
        return made[-1]

    yield make
    if request.node.stash.get(FAILED, False):
        logs = [Path(log), Path(session.libvirt.log), *(Path(domain.console) for domain in made)]
        logs += Path(session.libvirt.folder).glob("home/.cache/libvirt/qemu/log/*.log")
        for path in logs:
            if path.exists():
                sys.stderr.write(f"--- {path.name}\n{path.read_text(errors='replace')[-6000:]}\n")
    Path(log).unlink(missing_ok=True)
    for domain in made:
        domain.undefine()


@KINDS
def test_a_domain_is_online(session: Session, define: Define, kind: str) -> None:
    """A guest has the host's configuration and reaches others, and is reached on the ports that are forwarded."""
    domain = define(kind)
    domain.start()
    (pid,) = session.passt()
    (pid_file,) = (name for name in session.left() if name.endswith(".pid"))
    assert Path(session.libvirt.passt_state, pid_file).read_text() == f"{pid}\n"
    domain.wait_network()
    online.has_its_configuration(domain.agent, session.net.a)
    online.reaches_others(domain.agent, session.peer)
    online.pings(domain.agent)
    online.resolves(domain.agent, session.net.server)
    domain.agent.listen(online.LISTENS)
    online.is_reached(session.peer, online.LISTENS)
    online.is_reached(session.peer, 7100)
    online.is_refused(session.peer, 7105)
    online.is_reached(session.peer, 7200, families=(HOST6,))
    online.is_refused(session.peer, 7200, HOST4)
    domain.agent.serve_datagrams(online.LISTENS)
    online.gives_datagrams_back(session.net.server, online.LISTENS)
    online.gives_datagrams_back(session.net.server, 7300)
    domain.destroy()
    session.gone()


@KINDS
def test_a_domain_is_started_again(session: Session, define: Define, kind: str) -> None:
    """However it ends, nothing of passt is left, and the same domain starts at once."""
    domain = define(kind)
    ends: list[Callable[[], None]] = [domain.destroy, domain.shutdown, domain.power_off_inside]
    for end in ends:
        domain.start()
        assert len(session.passt()) == 1
        end()
        assert domain.state() == "shut off"
        session.gone()


@KINDS
def test_a_domain_is_ended_with_traffic(session: Session, define: Define, kind: str) -> None:
    """Open connections are no reason to linger: the same ports are forwarded again at once."""
    domain = define(kind)
    for _ in range(2):
        domain.start()
        domain.wait_network()
        domain.agent.listen(online.LISTENS)
        job = domain.agent.get(session.net.server.addr4, session.peer.port, 1)
        session.peer.reached(job, 1_000_000)
        inbound = session.peer.put(HOST4, online.LISTENS, 2)
        session.peer.reached(inbound, 1_000_000)
        domain.destroy()
        session.gone()
        assert session.peer.wait(inbound).state == "failed"  # the peer knows that the guest is gone


@KINDS
def test_a_domain_is_paused_and_reset(session: Session, define: Define, kind: str) -> None:
    """Connections stand still while it is paused, and no longer; after a reset the guest begins anew."""
    domain = define(kind)
    domain.start()
    domain.wait_network()
    domain.agent.listen(online.LISTENS)
    download = domain.agent.get(session.net.server.addr4, session.peer.port, 1, 8_000_000, rate=4_000_000)
    upload = session.peer.put(HOST4, online.LISTENS, 2, 8_000_000, rate=4_000_000)
    session.peer.reached(download, 1_000_000)
    session.libvirt.virsh("suspend", "guest")
    assert domain.state() == "paused"
    time.sleep(2.0)
    session.libvirt.virsh("resume", "guest")
    assert domain.agent.wait(download).ok
    assert session.peer.wait(upload).state == "ok"

    before = session.passt()
    session.libvirt.virsh("reset", "guest")
    domain.agent.hello(60.0)
    domain.wait_network()
    assert session.passt() == before
    online.reaches_others(domain.agent, session.peer)
    domain.agent.listen(online.LISTENS)
    online.is_reached(session.peer, online.LISTENS)


@KINDS
def test_a_port_that_is_taken_is_said(session: Session, define: Define, kind: str) -> None:
    domain = define(kind)
    with online.occupied(session.net.a, online.LISTENS):
        with pytest.raises(CommandError) as caught:
            domain.start()
        assert f"{online.LISTENS}" in caught.value.output
        assert "Address already in use" in caught.value.output
        session.gone()
    domain.start()
    domain.destroy()
    session.gone()


@KINDS
def test_an_interface_that_is_not_there_is_said(session: Session, define: Define, kind: str) -> None:
    domain = define(kind, device="absent0")
    with pytest.raises(CommandError) as caught:
        domain.start()
    assert "absent0" in caught.value.output
    session.gone()


@KINDS
def test_passt_is_killed(session: Session, define: Define, kind: str) -> None:
    """libvirt starts it again with the same words, over what it has left; the guest is back within seconds."""
    domain = define(kind)
    domain.start()
    domain.wait_network()
    (before,) = session.passt()
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: session.passt() not in ([], [before]), "libvirt to start passt again", 15.0)
    domain.agent.listen(online.LISTENS)

    # QEMU connects again within 5 s. What the guest's IPv6 address is, passt learns from what it sends.
    for server in (SERVER4, SERVER6):
        ping = shlex.join(["ping", "-c1", "-W1", server])
        domain.agent.run(f"for _ in $(seq 20); do {ping} && exit; done; exit 1", timeout=30.0)
    online.is_reached(session.peer, online.LISTENS)
    domain.destroy()
    session.gone()
