# SPDX-License-Identifier: GPL-2.0-or-later
"""godwit as the program that QEMU itself starts: ``-netdev passt``."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from godwit.lab import overlay
from godwit.lab.errors import LabError
from godwit.lab.netns import Network, wait_until
from godwit.lab.qemu import QemuGuest
from godwit.lab.transfer import Peer

from . import online
from .conftest import FAILED

# What -netdev passt may speak with the program.
MODES = pytest.mark.parametrize("vhost_user", [True, False], ids=["vhost-user", "stream"])
PROGRAM = os.path.join(sysconfig.get_path("scripts"), "godwit-passt")
# Now and then QEMU 11.1.3, when it has started the program itself, passes on some other descriptor as the guest's
# memory (fstat shows an anonymous inode). No back-end can map that; and QEMU crashes over the refusal.
_QEMU_S_OWN_FAULT = "vhost_set_mem_table failed"


class Place:
    """Host a, with a server beside it, and where QEMU's words and surroundings come from."""

    def __init__(self, folder: Path) -> None:
        self.net = Network()
        self.peer = Peer(self.net.server)
        self.log = folder / "passt.log"
        self.temporary = folder / "tmp"  # where QEMU makes up a PID file for the program
        self.temporary.mkdir()
        self._etc = folder / "etc"
        self._etc.mkdir()
        (self._etc / "resolv.conf").write_text(online.RESOLV)

    def boot(self, *, vhost_user: bool, param: str = "") -> QemuGuest:
        """Boot a guest; QEMU starts the program, in host a and as an ordinary user."""
        words = ["--log-file", str(self.log), *param.split()]
        netdev = ",".join(
            [
                "passt,id=n0",
                f"path={PROGRAM}",
                f"vhost-user={'on' if vhost_user else 'off'}",
                f"mtu={online.MTU}",
                f"tcp-ports={online.LISTENS}",
                f"udp-ports={online.LISTENS}",
                *(f"param={word}" for word in words),
            ]
        )
        newer = overlay.fetch()
        inside = newer.command("env", f"TMPDIR={self.temporary}", user=True, etc=str(self._etc))
        launcher = [*self.net.a.enter_command, *inside]
        for _ in range(3):
            try:
                return QemuGuest(["-netdev", netdev], launcher=launcher)
            except LabError as error:
                if _QEMU_S_OWN_FAULT not in str(error):
                    raise
                sys.stderr.write(f"QEMU has not passed on the guest's memory; once more: {error}\n")
                self.gone()
        raise LabError("QEMU has not passed on the guest's memory, three times")

    def runs(self) -> None:
        """See that the program runs, once, and that its PID file is right."""
        (pid,) = self.net.a.processes("godwit-passt")
        (pid_file,) = self.temporary.iterdir()
        assert pid_file.read_text() == f"{pid}\n"

    def gone(self) -> None:
        """See that the program has ended with its QEMU, and nothing is left of it."""
        wait_until(lambda: not self.net.a.processes("godwit-passt"), "godwit-passt to end", 5.0)
        assert list(self.temporary.iterdir()) == []

    def close(self) -> None:
        self.peer.close()
        self.net.close()


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Give a test its network."""
    made = Place(tmp_path)
    yield made
    if request.node.stash.get(FAILED, False) and made.log.exists():
        sys.stderr.write(f"--- {made.log.name}\n{made.log.read_text(errors='replace')[-6000:]}\n")
    made.close()


@MODES
def test_a_guest_is_online(place: Place, vhost_user: bool) -> None:
    with place.boot(vhost_user=vhost_user) as guest:
        guest.wait_network()
        online.has_its_configuration(guest.agent, place.net.a)
        online.reaches_others(guest.agent, place.peer)
        online.pings(guest.agent)
        online.resolves(guest.agent, place.net.server)
        guest.agent.listen(online.LISTENS)
        online.is_reached(place.peer, online.LISTENS)
        guest.agent.serve_datagrams(online.LISTENS)
        online.gives_datagrams_back(place.net.server, online.LISTENS)
        place.runs()
        guest.qemu.quit()
        place.gone()
    # The same ports, at once; and this time QEMU has no occasion to say goodbye.
    with place.boot(vhost_user=vhost_user) as guest:
        place.runs()
        guest.qemu.kill()
        place.gone()


@MODES
def test_what_is_wrong_is_said(place: Place, vhost_user: bool) -> None:
    """QEMU does not start, and shows the program's own words."""
    with online.occupied(place.net.a, online.LISTENS), pytest.raises(LabError, match="Address already in use"):
        place.boot(vhost_user=vhost_user)
    with pytest.raises(LabError, match="--no-such-option"):
        place.boot(vhost_user=vhost_user, param="--no-such-option")
    assert not place.net.a.processes("godwit-passt")
