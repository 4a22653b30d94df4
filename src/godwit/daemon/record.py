# SPDX-License-Identifier: GPL-2.0-or-later
"""Device states kept in files, for debugging (``--record``): what was saved here, and what was loaded.

They hold what was in the connections' queues, so nobody else may read them. A
file that cannot be written is no reason to fail a migration.
"""

from __future__ import annotations

import itertools
import logging
import os

log = logging.getLogger(__name__)


class Recording:
    """One state: ``PATH.N.saved`` or ``PATH.N.loaded``, with the next N that is free."""

    def __init__(self, path: str, kind: str) -> None:
        self._fd = -1
        self.path = path
        try:
            for number in itertools.count(1):
                self.path = f"{path}.{number}.{kind}"
                try:
                    self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                    return
                except FileExistsError:
                    continue
        except OSError as error:
            self._fail(error)

    def write(self, data: bytes) -> None:
        """Append."""
        try:
            while data and self._fd >= 0:
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            self._fail(error)

    def close(self) -> None:
        """There is no more. May be repeated."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _fail(self, error: OSError) -> None:
        log.error("the device state is not recorded: cannot write %s: %s", self.path, error.strerror)
        self.close()
