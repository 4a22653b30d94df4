# SPDX-License-Identifier: GPL-2.0-or-later
"""What a godwit counts, as its control socket tells it; and whether that can be."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from typing import Any

from godwit.lab.backend import Backend
from godwit.lab.errors import LabError

TIMEOUT = 10.0  # seconds


def ask(path: str, request: str) -> bytes:
    """Ask at a control socket; :class:`LabError` if there is no answer."""
    answer = b""
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(TIMEOUT)
            sock.connect(path)
            sock.sendall(f"{request}\n".encode())
            while piece := sock.recv(1 << 16):
                answer += piece
    except OSError as error:
        raise LabError(f"{path} does not answer {request!r}: {error!r}") from error
    return answer


def metrics(path: str) -> list[dict[str, Any]]:
    """Ask at a control socket for all metrics; :class:`LabError` if there is no answer."""
    answer = ask(path, "metrics json")
    try:
        found = json.loads(answer)["metrics"]
    except (ValueError, KeyError) as error:
        raise LabError(f"{path} does not tell what is counted: {error!r}; {answer[:200]!r}") from error
    assert isinstance(found, list)
    return found


@dataclass(frozen=True)
class Counters:
    """The metrics of a process, at one time: each by its name and labels."""

    pid: int
    counters: dict[str, float]
    gauges: dict[str, float]

    @classmethod
    def of(cls, backend: Backend) -> Counters:
        """Of a back-end, now."""
        values: dict[str, dict[str, float]] = {"counter": {}, "gauge": {}}
        for family in metrics(f"{backend.socket}.ctl"):
            for sample in family["samples"]:
                labels = ", ".join(f"{name}={value}" for name, value in sample["labels"].items())
                values[family["type"]][f"{family['name']}({labels})"] = sample["value"]
        return cls(backend.pid, values["counter"], values["gauge"])

    @property
    def connections(self) -> int:
        """TCP connections that are open."""
        return int(self.gauges["godwit_flows(protocol=tcp)"])

    @property
    def amiss(self) -> list[str]:
        """The names of what is amiss."""
        return [name for name in self.gauges if name.startswith("godwit_degraded(")]

    def backwards(self, before: Counters) -> list[str]:
        """What has been counted less by now than before, in the same process."""
        if self.pid != before.pid:
            return []
        found = ((name, value, self.counters.get(name, 0)) for name, value in before.counters.items())
        return [f"{name} is {now:g}, and was {value:g}" for name, value, now in found if now < value]
