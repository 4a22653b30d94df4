# SPDX-License-Identifier: GPL-2.0-or-later
"""`godwit repair --guard` for a passt, to which the network is switched before it has the connections."""

from __future__ import annotations

import time

import pytest

from godwit.lab.errors import LabError
from godwit.lab.guest import EmbeddedGuest
from godwit.lab.netns import HOST4, wait_until
from godwit.lab.scenario import Scenario


@pytest.mark.parametrize("guard", [False, True])
def test_a_network_that_leads_to_passt_too_early(guard: bool) -> None:
    with Scenario(
        backends=("godwit", "passt"),
        helpers=("own", "godwit"),
        godwit_arguments=["--virtio-features", "passt"],
    ) as scenario:
        load = scenario.start_load(idle=3, rate=30_000_000)
        target = scenario.backends["b"]
        if guard:
            target.kill_helper()
            target.start_helper("--guard", HOST4)
            wait_until(lambda: "keeping back resets from" in target.messages(), "the guard")

        # While the guest stands still, and nothing has been saved yet.
        assert isinstance(scenario.guest, EmbeddedGuest)
        attempt = scenario.guest.migration(target.socket)
        for step in ("connect_target", "log_on", "suspend"):
            getattr(attempt, step)()
        scenario.network.switch("b")
        time.sleep(1)
        attempt.transfer()
        attempt.switch_over()
        attempt.finish()
        if not guard:
            with pytest.raises(LabError, match="Connection reset by peer"):
                load.wait_alive()
            return
        load.wait_alive()
        assert all(outcome.ok for outcome in load.finish())
        assert scenario.network.b.run("nft", "list", "ruleset").stdout == ""
