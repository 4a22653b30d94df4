# SPDX-License-Identifier: GPL-2.0-or-later
"""``godwit repair``: the helper with the one privilege that moving TCP connections needs."""

from __future__ import annotations

import argparse
import logging
import pwd
import sys
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address

MAX_GUARD_SECONDS = 3600


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="godwit repair",
        description="Set TCP_REPAIR on the sockets of a back-end, godwit or passt, that runs without privilege."
        " Ends when the back-end closes the connection.",
        epilog="Needs CAP_NET_ADMIN in the user namespace of the back-end's network.",
    )
    parser.add_argument(
        "path",
        metavar="SOCKET|DIRECTORY",
        help="the back-end's repair socket (its vhost-user socket's path and .repair),"
        " or the directory in which to wait for one",
    )
    parser.add_argument(
        "--guard",
        metavar="ADDRESS",
        action="append",
        default=[],
        type=_address,
        help="on a target to which the network is switched before the guest's connections are there: have this host"
        " send no resets from this address that answer for connections which it does not know (yet); may be repeated."
        " From now on until the guest's connections have come, or the back-end's front-end has gone",
    )
    parser.add_argument(
        "--guard-seconds", metavar="N", type=_seconds, default=300, help="but for no longer than this (default: 300)"
    )
    parser.add_argument(
        "--user",
        metavar="USER",
        type=_uid,
        help="whose processes may ask for something, besides root's: a name or a number"
        " (default: the user that the socket belongs to; where that is root, anybody's)",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("-d", "--debug", action="store_true", help="log each request")
    how.add_argument("-q", "--quiet", action="store_true", help="log errors only")
    given = parser.parse_args(argv)
    level = logging.DEBUG if given.debug else logging.ERROR if given.quiet else logging.INFO
    logging.basicConfig(level=level, format="godwit repair: %(message)s", stream=sys.stderr)
    # Only now: --help needs none of it.
    from godwit.repair.helper import run

    return run(given.path, given.guard, given.guard_seconds, given.user)


def _uid(text: str) -> int:
    if text.isascii() and text.isdigit():
        return int(text)
    try:
        return pwd.getpwnam(text).pw_uid
    except KeyError:
        raise argparse.ArgumentTypeError(f"no such user: {text} (a number does without)") from None


def _address(text: str) -> IPv4Address | IPv6Address:
    try:
        return ip_address(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no IPv4 or IPv6 address") from None


def _seconds(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= MAX_GUARD_SECONDS:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from 1 to {MAX_GUARD_SECONDS}")
    return int(text)
