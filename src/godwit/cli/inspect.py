# SPDX-License-Identifier: GPL-2.0-or-later
"""``godwit inspect``: what is in a device state."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence

from godwit.cli.differences import changed, pairs
from godwit.migration import Item, MigrationError
from godwit.migration.inspect import inspect, open_streams
from godwit.net.versions import versions


def _items(path: str, quiet: list[str], everything: bool) -> Iterator[tuple[int, Item]]:
    """The number of the stream and the item, of all streams in a file; errors go to ``quiet``, one line each."""
    try:
        with open(path, "rb") as file:
            streams, passed_over = open_streams(file, versions(), everything=everything)
            if passed_over:
                sys.stderr.write(
                    f"godwit inspect: {path}: {passed_over} places that look like a device state and are no whole one"
                    " were passed over; --all shows them\n"
                )
            for number, (at, stream) in enumerate(streams):
                try:
                    for item in inspect(stream, versions()):
                        yield number, item
                except MigrationError as error:
                    where = f"{path}, at {at}" if at else path
                    quiet.append(f"{where}: {error}")
    except (OSError, MigrationError) as error:
        quiet.append(f"{path}: {error.strerror if isinstance(error, OSError) and error.strerror else error}")


def _line(item: Item) -> str:
    values = " ".join(f"{_word(name)}={_word(value)}" for name, value in item.values.items())
    return f"{item.offset:8} {item.size:8}  {item.name}: {values}".rstrip(": ")


def _word(value: int | str) -> str:
    """Something without a space in it, or in quotes."""
    text = str(value)
    return text if text.isprintable() and " " not in text and text else repr(text)


def _show(path: str, as_json: bool, everything: bool) -> int:
    errors: list[str] = []
    last = 0
    for number, item in _items(path, errors, everything):
        if as_json:
            one = {"stream": number, "offset": item.offset, "size": item.size, "name": item.name, "values": item.values}
            sys.stdout.write(json.dumps(one) + "\n")
            continue
        if number != last:
            sys.stdout.write("\n")
            last = number
        sys.stdout.write(_line(item) + "\n")
    return _end(errors)


def _diff(one: str, other: str, as_json: bool, everything: bool) -> int:
    """What is the same in both is not shown; what is in one alone is shown with a sign."""
    errors: list[str] = []
    differ = False
    for a, b in pairs(_items(one, errors, everything), _items(other, errors, everything)):
        differ = True
        if as_json:
            both = [None if item is None else {"name": item.name, "values": item.values} for item in (a, b)]
            sys.stdout.write(json.dumps(both) + "\n")
        elif a is not None and b is not None:
            changes = ", ".join(
                f"{_word(name)} {_word(a.values.get(name, '-'))} -> {_word(b.values.get(name, '-'))}"
                for name in changed(a, b)
            )
            sys.stdout.write(f"{a.name} at {a.offset} and {b.offset}: {changes}\n")
        else:
            for sign, item in (("-", a), ("+", b)):
                if item is not None:
                    sys.stdout.write(f"{sign}{_line(item)}\n")
    return _end(errors) or int(differ)


def _end(errors: Sequence[str]) -> int:
    for error in errors:
        sys.stderr.write(f"godwit inspect: {error}\n")
    return 2 if errors else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="godwit inspect",
        description="Show what is in a device state: one that was recorded (godwit serve --record), or one in a file"
        " that QEMU has migrated to. Offsets and sizes are in bytes. Exit status 2: a stream is broken, what comes"
        " before the break is shown, and stderr says where and why.",
    )
    parser.add_argument("file", metavar="FILE", nargs="?", help="the file")
    parser.add_argument("--json", action="store_true", help="one JSON object for each item")
    parser.add_argument(
        "--all",
        action="store_true",
        help="of a file of QEMU's, show also what looks like a device state and is no whole one: it may be the guest's"
        " memory, or broken",
    )
    parser.add_argument(
        "--diff", nargs=2, metavar=("A", "B"), help="what differs between two; exit status 1 if something does"
    )
    options = parser.parse_args(argv)
    if (options.file is None) == (options.diff is None):
        parser.error("one of FILE and --diff A B is needed")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what is in a stream is of any language
    try:
        if options.diff:
            status = _diff(options.diff[0], options.diff[1], options.json, options.all)
        else:
            status = _show(options.file, options.json, options.all)
        sys.stdout.flush()
    except OSError as error:
        # What is left in the buffer goes nowhere, at the end of the process too.
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 0  # whoever reads has seen enough
        return _end([f"cannot write: {error.strerror}"])
    return status
