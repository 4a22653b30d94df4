# SPDX-License-Identifier: GPL-2.0-or-later
"""What can go wrong in a vhost-user session, sorted by whose fault it is.

The peer's: ``ProtocolError`` (it broke the protocol), ``RequestFailedError`` (it
refused what we asked), ``DisconnectedError`` (it went away). Ours: ``DeviceError``
(the device could not do what was asked of it). The caller's: ``ValueError``
and ``TypeError``, as everywhere in Python.
"""

from __future__ import annotations


class VhostUserError(Exception):
    """Any error of this package; the message says what happened."""


class ProtocolError(VhostUserError):
    """The peer sent something the protocol does not allow.

    ``fatal`` is True where the session cannot go on: the stream of messages
    can no longer be told apart, or the peer waits for a reply that cannot
    carry a failure.
    """

    def __init__(self, message: str, *, fatal: bool = False) -> None:
        super().__init__(message)
        self.fatal = fatal


class RequestFailedError(VhostUserError):
    """The back-end answered a request of ours with a failure; the session goes on."""


class DisconnectedError(VhostUserError):
    """The peer closed the connection while something was still expected of it."""


class DeviceError(VhostUserError):
    """Raised by a device's method: it could not do what the front-end asked.

    The front-end gets a failure reply where the request has one; where it has
    none the session is ended, since the front-end would go on as if all were well.
    """
