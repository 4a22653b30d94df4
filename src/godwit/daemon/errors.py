# SPDX-License-Identifier: GPL-2.0-or-later
"""What can keep the daemon from running; each message is one line for the user."""

from __future__ import annotations

import errno
import os


class DaemonError(Exception):
    """The daemon cannot run; says why."""


class OptionError(DaemonError):
    """The command line is wrong: the caller's error."""


class StartError(DaemonError):
    """The system refuses what the command line asks for: a path, a user, a socket."""


class SocketInUseError(StartError):
    """A running process listens on the path."""


def reason(error: OSError, path: str) -> str:
    """Why a file could not be made at ``path``, in the system's words or in clearer ones."""
    folder = os.path.dirname(path)
    if error.errno == errno.ENOENT and folder and not os.path.isdir(folder):
        return f"there is no directory {folder}"
    return os.strerror(error.errno) if error.errno else str(error)
