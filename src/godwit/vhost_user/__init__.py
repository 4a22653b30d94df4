# SPDX-License-Identifier: GPL-2.0-or-later
"""vhost-user for Python: back-ends and front-ends."""

from godwit.vhost_user.client import FrontendClient
from godwit.vhost_user.device import (
    BaseDevice,
    Device,
    Direction,
    MemoryRegion,
    Phase,
    VringAddr,
    VringFlag,
)
from godwit.vhost_user.errors import (
    DeviceError,
    Disconnected,
    ProtocolError,
    RequestFailed,
    VhostUserError,
)
from godwit.vhost_user.features import Feature, ProtocolFeature

__all__ = [
    "BaseDevice",
    "Device",
    "DeviceError",
    "Direction",
    "Disconnected",
    "Feature",
    "FrontendClient",
    "MemoryRegion",
    "Phase",
    "ProtocolError",
    "ProtocolFeature",
    "RequestFailed",
    "VhostUserError",
    "VringAddr",
    "VringFlag",
]
