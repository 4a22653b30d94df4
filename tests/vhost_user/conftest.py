# SPDX-License-Identifier: GPL-2.0-or-later
"""Every test of vhost-user is also a test that no descriptor leaks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from godwit.vhost_user import BackendSession, Feature, ProtocolFeature

FEATURES = (
    Feature.VIRTIO_F_VERSION_1
    | Feature.VIRTIO_NET_F_MRG_RXBUF
    | Feature.VHOST_F_LOG_ALL
    | Feature.VHOST_USER_F_PROTOCOL_FEATURES
)
PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.RARP
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.NET_MTU
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.DEVICE_STATE
)


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def no_descriptor_leaks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    close = os.close
    twice: list[int] = []

    def checked(fd: int) -> None:
        try:
            close(fd)
        except OSError:
            twice.append(fd)
            raise

    monkeypatch.setattr(os, "close", checked)
    before = len(open_fds())
    yield
    assert len(open_fds()) == before, "descriptors leaked"
    assert not twice, "descriptors were closed twice"


@pytest.fixture
def fd() -> Callable[[], int]:
    """Makes descriptors for somebody else to close."""
    return lambda: os.eventfd(0, os.EFD_CLOEXEC)


@pytest.fixture
def backend() -> Iterator[BackendSession]:
    """A new session that offers all that is supported."""
    session = BackendSession(
        features=FEATURES,
        protocol_features=PROTOCOL_FEATURES,
        queues=2,
        queue_num=1,
        max_mem_slots=4,
    )
    yield session
    session.close()
