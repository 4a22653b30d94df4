# SPDX-License-Identifier: GPL-2.0-or-later
"""What can go wrong in the laboratory."""

from __future__ import annotations


class LabError(Exception):
    """Something in the laboratory failed; the message says what and why."""


class UnavailableError(LabError):
    """This machine, or this user, cannot run the laboratory.

    The message says what is missing and how to get it.
    """


class CommandError(LabError):
    """A command that the laboratory ran did not succeed."""

    def __init__(self, where: str, command: str, status: int, output: str) -> None:
        self.where = where
        self.command = command
        self.status = status
        self.output = output
        super().__init__(f"{where}: {command}: exit status {status}: {output.strip()}")
