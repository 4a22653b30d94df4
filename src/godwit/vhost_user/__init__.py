# SPDX-License-Identifier: GPL-2.0-or-later
"""vhost-user for Python: back-ends and front-ends for any device.

To write a back-end, derive from ``BaseDevice`` and run ``serve`` on each
connection. To drive one, use ``FrontendClient``. Underneath are sessions that
do no I/O of their own, ``BackendSession`` and ``FrontendSession``, over one
table of requests, ``TABLE``.
"""

from godwit.vhost_user.aio import Server, serve
from godwit.vhost_user.backend import (
    BackendSession,
    RequestReceived,
    RequestRefused,
    SessionEnded,
)
from godwit.vhost_user.client import FrontendClient
from godwit.vhost_user.device import BaseDevice, Device
from godwit.vhost_user.errors import (
    DeviceError,
    DisconnectedError,
    ProtocolError,
    RequestFailedError,
    VhostUserError,
)
from godwit.vhost_user.features import Feature, ProtocolFeature
from godwit.vhost_user.frames import Outgoing
from godwit.vhost_user.frontend import FrontendSession, Reply
from godwit.vhost_user.messages import TABLE, Request, Row, When
from godwit.vhost_user.payloads import Direction, MemoryRegion, Phase, VringAddr, VringFlag
from godwit.vhost_user.state import SavedSession

__all__ = [
    "TABLE",
    "BackendSession",
    "BaseDevice",
    "Device",
    "DeviceError",
    "Direction",
    "DisconnectedError",
    "Feature",
    "FrontendClient",
    "FrontendSession",
    "MemoryRegion",
    "Outgoing",
    "Phase",
    "ProtocolError",
    "ProtocolFeature",
    "Reply",
    "Request",
    "RequestFailedError",
    "RequestReceived",
    "RequestRefused",
    "Row",
    "SavedSession",
    "Server",
    "SessionEnded",
    "VhostUserError",
    "VringAddr",
    "VringFlag",
    "When",
    "serve",
]
