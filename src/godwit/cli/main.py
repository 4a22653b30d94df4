# SPDX-License-Identifier: GPL-2.0-or-later
"""``godwit``: finds the command and hands its arguments over.

A command's module is imported when the command is given, and no other: the
daemon runs once per guest and carries nothing that it does not need.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from godwit import __version__

COMMANDS = {
    "serve": ("godwit.cli.serve", "give a guest its network, over vhost-user or a stream socket"),
    "repair": ("godwit.cli.repair", "help a back-end to move TCP connections (needs CAP_NET_ADMIN)"),
    "ctl": ("godwit.cli.ctl", "ask a running godwit how things stand: status, flows, metrics"),
    "inspect": ("godwit.cli.inspect", "show what is in a device state"),
    "demo": ("godwit.cli.demo", "migrate a guest with open connections, there and back"),
    "bench": ("godwit.cli.bench", "measure godwit, passt and other back-ends beside each other"),
}


def _read(words: list[str]) -> tuple[str, list[str]]:
    """The command and its arguments; help, and what is no command, end the process."""
    parser = argparse.ArgumentParser(
        prog="godwit",
        usage="godwit [--version] COMMAND [ARGUMENT ...]",
        description="Virtual-machine networking over vhost-user that survives live migration.",
        epilog="godwit COMMAND --help shows a command's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"godwit {__version__}")
    commands = parser.add_argument_group("commands")
    width = max(map(len, COMMANDS))
    commands.description = "\n".join(f"{name:{width}}  {summary}" for name, (_, summary) in COMMANDS.items())
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    if not words:
        parser.print_help(sys.stderr)
        parser.exit(2, "\ngodwit: a command is needed\n")
    given = parser.parse_args(words)
    return given.command, given.arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    # Where a command comes first there is nothing to read here.
    command, arguments = (words[0], words[1:]) if words and words[0] in COMMANDS else _read(words)
    module, _ = COMMANDS[command]
    status: int = importlib.import_module(module).main(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
