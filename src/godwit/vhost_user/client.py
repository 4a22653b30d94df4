# SPDX-License-Identifier: GPL-2.0-or-later
"""A blocking vhost-user front-end: one method per request, each of which returns when it is done."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from types import TracebackType

from godwit.vhost_user.device import Direction, MemoryRegion, Phase, VringAddr


class FrontendClient:
    """The front-end's end of a session, over a connected UNIX stream socket.

    ``timeout`` in seconds holds for each request. Descriptors passed to a
    method stay the caller's (the back-end gets a duplicate).
    """

    def __init__(self, sock: socket.socket, *, timeout: float | None = 10.0, acks: bool = True) -> None:
        raise NotImplementedError
    @classmethod
    def connect(cls, path: str | os.PathLike[str], *, timeout: float | None = 10.0, acks: bool = True) -> FrontendClient:
        raise NotImplementedError
    def close(self) -> None:
        raise NotImplementedError
    def __enter__(self) -> FrontendClient:
        raise NotImplementedError
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        raise NotImplementedError
    def get_features(self) -> int:
        raise NotImplementedError
    def set_features(self, features: int) -> None:
        raise NotImplementedError
    def get_protocol_features(self) -> int:
        raise NotImplementedError
    def set_protocol_features(self, features: int) -> None:
        raise NotImplementedError
    def set_owner(self) -> None:
        raise NotImplementedError
    def reset_owner(self) -> None:
        raise NotImplementedError
    def get_queue_num(self) -> int:
        raise NotImplementedError
    def get_max_mem_slots(self) -> int:
        raise NotImplementedError
    def set_mem_table(self, regions: Sequence[MemoryRegion]) -> None:
        raise NotImplementedError
    def add_mem_region(self, region: MemoryRegion) -> None:
        raise NotImplementedError
    def remove_mem_region(self, region: MemoryRegion) -> None:
        raise NotImplementedError
    def set_log_base(self, fd: int, size: int, offset: int = 0) -> None:
        raise NotImplementedError
    def set_log_fd(self, fd: int) -> None:
        raise NotImplementedError
    def set_vring_num(self, index: int, num: int) -> None:
        raise NotImplementedError
    def set_vring_addr(self, index: int, addr: VringAddr) -> None:
        raise NotImplementedError
    def set_vring_base(self, index: int, base: int) -> None:
        raise NotImplementedError
    def get_vring_base(self, index: int) -> int:
        raise NotImplementedError
    def set_vring_kick(self, index: int, fd: int | None) -> None:
        raise NotImplementedError
    def set_vring_call(self, index: int, fd: int | None) -> None:
        raise NotImplementedError
    def set_vring_err(self, index: int, fd: int | None) -> None:
        raise NotImplementedError
    def set_vring_enable(self, index: int, enabled: bool) -> None:
        raise NotImplementedError
    def send_rarp(self, mac: bytes) -> None:
        raise NotImplementedError
    def net_set_mtu(self, mtu: int) -> None:
        raise NotImplementedError
    def set_device_state_fd(self, direction: Direction, fd: int, phase: int = Phase.STOPPED) -> int | None:
        raise NotImplementedError
    def check_device_state(self) -> bool:
        raise NotImplementedError
