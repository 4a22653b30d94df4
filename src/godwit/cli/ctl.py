# SPDX-License-Identifier: GPL-2.0-or-later
"""``godwit ctl``: asks a running godwit how things stand.

What it asks, and what it is answered, is in ``docs/control.md``. A list of flows may be long: it is shown as it comes.
"""

from __future__ import annotations

import argparse
import errno
import grp
import json
import os
import re
import socket
import stat
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

DEFAULT = "/tmp/passt_1.socket"  # where godwit-passt listens, unless told otherwise
PATIENCE = 10.0  # seconds for the next piece of an answer
PIECE = 1 << 16  # bytes

_FLOWS = ("PROTO", "STATE", "GUEST", "PEER", "FROM GUEST", "TO GUEST", "IDLE")
_LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*=.*", re.DOTALL)
_SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+)")


class CtlError(Exception):
    """There is no answer; says why."""


# ---- the question


def find(path: str) -> str:
    """The control socket's path: as given, or beside the front-end's."""
    return path if path.endswith(".ctl") else f"{path}.ctl"


def ask(path: str, request: str) -> Iterator[bytes]:
    """The lines of the answer, as they come. Raises `CtlError`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(PATIENCE)
        _connect(sock, path)
        rest = b""
        try:
            sock.sendall(request.encode() + b"\n")
            while piece := sock.recv(PIECE):
                *lines, rest = (rest + piece).split(b"\n")
                yield from lines
        except TimeoutError:
            raise CtlError(f"{path}: no answer within {PATIENCE:g} s: is that a godwit?") from None
        except OSError as error:
            raise CtlError(f"{path}: the answer has ended early: {error.strerror}") from error
        if rest:
            raise CtlError(f"{path}: the answer has ended early, or that is no godwit")


def _connect(sock: socket.socket, path: str) -> None:
    until = time.monotonic() + PATIENCE
    while True:
        try:
            sock.connect(path)
            return
        except BlockingIOError as error:  # many are before us
            if time.monotonic() > until:
                raise CtlError(f"{path}: there are too many who ask") from error
            time.sleep(0.02)
        except OSError as error:
            raise CtlError(_why(error, path)) from error


def _why(error: OSError, path: str) -> str:
    if error.errno == errno.ENOENT and path == find(DEFAULT):
        return f"there is no {path}, where a godwit-passt is that was given no path: name your godwit's socket with -s"
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return f"there is no {path}: name the socket of a running godwit (-s), or the one that its --ctl-path says"
    if error.errno == errno.ECONNREFUSED:
        return f"nobody listens at {path}: the godwit that made it is gone"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{path}: permission denied: {_who_may(path)}"
    return f"{path}: {error.strerror}"


def _who_may(path: str) -> str:
    try:
        there = os.stat(path)
    except OSError:
        return "its directory is not yours to look into"
    if not there.st_mode & stat.S_IWGRP:
        return f"only user {there.st_uid} may ask; start godwit with --ctl-group to let a group"
    try:
        name = grp.getgrgid(there.st_gid).gr_name
    except KeyError:
        name = str(there.st_gid)
    return f"you are not in group {name}, which may ask"


def document(path: str, request: str) -> dict[str, Any]:
    """The answer to a question that has one JSON document for an answer."""
    return _checked(path, b"\n".join(ask(path, request)))


def _checked(path: str, text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise CtlError(f"{path}: what listens there is no godwit")
    if "error" in found:
        raise CtlError(str(found["error"]))
    return found


def flows(path: str, request: str) -> Iterator[dict[str, Any]]:
    """The flows, one after the other; the daemon writes each on a line of its own."""
    lines = ask(path, request)
    first = next(lines, b"")
    if not first.endswith(b"["):
        _checked(path, first)
        raise CtlError(f"{path}: what listens there is no godwit")
    for line in lines:
        if line.startswith(b"]"):
            return
        if line:
            yield _checked(path, line.rstrip(b","))
    raise CtlError(f"{path}: the answer has ended early")


# ---- the answer, for people


def size(count: float) -> str:
    """Bytes, in three digits."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000
    return f"{count:.3g} {unit}"


def span(seconds: float) -> str:
    """A time, roughly."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / divisor:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def show_status(now: Mapping[str, Any]) -> Iterator[str]:
    """In lines of a name and what it is."""
    health, front, guest, move = now["health"], now["front_end"], now["guest"], now["migration"]
    yield f"godwit {now['version']}, {now['mode']}, pid {now['pid']}, up for {span(now['uptime_seconds'])}"
    yield f"health       {health['state']}"
    for reason in health["reasons"]:
        yield f"             {reason['reason']}: {reason['text']}"
    yield f"front-end    {'connected' if front['connected'] else 'none'}"
    for name, ring in front["rings"].items():
        state = "broken" if ring["broken"] else "runs" if ring["started"] and ring["enabled"] else "stands still"
        if ring["entries"]:
            yield f"ring         {name.replace('_', ' ')}: {state}, {ring['entries']} entries"
    if front["features"]:
        yield f"features     {' '.join(_short(name) for name in front['features'])}"
    told = ", ".join(f"{name} {value}" for name, value in guest["told"].items())
    yield f"guest        is told: {told}"
    seen = ", ".join(value for value in guest["seen"].values() if value)
    yield f"             uses: {seen or 'nothing that was seen'}"
    yield "flows        " + ", ".join(f"{count} {kind}" for kind, count in now["flows"].items())
    yield f"helper       {_helper(now['repair_helper'])}"
    lingering = move["lingering_seconds"]
    yield f"migration    {move['state']}" + (f", for {lingering:.1f} s more" if lingering else "")
    counts = [
        f"{count} {way} {result.replace('_', ' ')}"
        for way, results in move["counts"].items()
        for result, count in results.items()
        if count
    ]
    if counts:
        yield f"             so far: {', '.join(counts)}"
    if move["last"] is not None:
        yield f"             last: {_last(move['last'])}"
    for name, path in now["sockets"].items():
        yield f"socket       {name.replace('_', ' ')}: {path or 'none'}"
    for layer in now["sandbox"]:
        reason = f": {layer['reason']}" if layer.get("reason") else ""
        yield f"sandbox      {layer['layer']}: {'in force' if layer['in_force'] else 'not in force'}{reason}"


def _helper(state: Mapping[str, Any]) -> str:
    if state["connected"]:
        return "connected"
    if state.get("refused"):
        return "refused: connections cannot move (the log says what to do)"
    return "has gone: connections cannot move" if state["ever_connected"] else "none: connections cannot move"


def _short(feature: str) -> str:
    return re.sub(r"^(VIRTIO_NET_F|VIRTIO_F|VHOST_F|VHOST_USER_F)_", "", feature)


def _last(move: Mapping[str, Any]) -> str:
    parts = [f"{move['direction']}, {move['result'].replace('_', ' ')}"]
    if move["version"]:
        parts.append(f"version {move['version']}, {move['bytes']} bytes in {move['duration_seconds'] * 1000:.1f} ms")
    if move["result"] == "moved":
        parts.append(f"{move['connections_moved']} connections moved, {move['connections_lost']} lost")
    if move["standstill_seconds"]:
        parts.append(f"stood still here for {move['standstill_seconds'] * 1000:.1f} ms")
    if move["error"]:
        parts.append(move["error"])
    return "; ".join(parts)


def show_flows(found: Iterator[Mapping[str, Any]]) -> Iterator[str]:
    """A table. Lines are as wide as what was seen so far: nobody waits for the last flow."""
    widths = [5, 11, 24, 24, 10, 10, 6]
    count = 0
    for count, flow in enumerate(found, 1):
        if count == 1:
            yield _row(_FLOWS, widths)
        ends = (_end(flow["guest"]), _end(flow["peer"]) + _elsewhere(flow))
        bytes_ = size(flow["bytes_from_guest"]), size(flow["bytes_to_guest"])
        cells = (flow["protocol"], flow["state"], *ends, *bytes_, span(flow["idle_seconds"]))
        widths = [max(width, len(cell)) for width, cell in zip(widths, cells, strict=True)]
        yield _row(cells, widths)
    yield f"{count} flows"


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _end(end: Mapping[str, Any]) -> str:
    address = f"[{end['address']}]" if ":" in end["address"] else end["address"]
    return f"{address}:{end['port']}" if end["port"] else address  # of a ping's peer


def _elsewhere(flow: Mapping[str, Any]) -> str:
    """Where the peer is to the host, if the guest has another name for it."""
    return "" if flow["peer"] == flow["remote"] else f" ({_end(flow['remote'])})"


def show_metrics(lines: Iterator[bytes]) -> Iterator[str]:
    """A line for each sample that is not 0: its name, its labels, its value."""
    for line in lines:
        sample = _SAMPLE.fullmatch(line.decode())
        if sample is not None and float(sample[3]):
            yield f"{sample[1]}{' ' + sample[2] if sample[2] else ''}  {sample[3]}"


def labelled(lines: Iterator[bytes], labels: Sequence[str]) -> Iterator[str]:
    """Prometheus's text with more labels on each sample."""
    pairs = (label.partition("=") for label in labels)
    more = ",".join(f'{name}="{_escaped(value)}"' for name, _, value in pairs)
    for line in lines:
        sample = _SAMPLE.fullmatch(line.decode())
        if sample is None or not more:
            yield line.decode()
        else:
            yield f"{sample[1]}{{{','.join(part for part in (more, sample[2]) if part)}}} {sample[3]}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


# ---- the command


def _label(text: str) -> str:
    if not _LABEL.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=VALUE")
    return text


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from 0.1 to 86400")
    return seconds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="godwit ctl",
        description="Ask a running godwit how things stand. Nothing of it is changed.",
        epilog="Exit status: 0, 1 where there is no answer, 2 for a wrong command line, 3 with --check if something is"
        " amiss.",
    )
    parser.add_argument(
        "-s",
        "--socket",
        metavar="PATH",
        default=DEFAULT,
        help="the socket that it serves front-ends at, or its control socket, which ends in .ctl"
        f" (default: {DEFAULT}, where a godwit-passt listens that is told nothing else)",
    )
    parser.add_argument("what", choices=("status", "flows", "metrics"), help="what is asked")
    parser.add_argument(
        "filters", nargs="*", metavar="FILTER", help="of flows: tcp, udp, ping, or an address that they are with"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as JSON")
    form.add_argument("--prometheus", action="store_true", help="of metrics: in Prometheus's text format")
    parser.add_argument(
        "--label",
        metavar="NAME=VALUE",
        type=_label,
        action="append",
        default=[],
        help="with --prometheus: put this label on each sample, to tell one guest from another; may be repeated",
    )
    parser.add_argument("--check", action="store_true", help="of the status: exit with 3 if something is amiss")
    parser.add_argument("--watch", metavar="SECONDS", type=_seconds, help="ask again, so often, until interrupted")
    return parser


def _say(given: argparse.Namespace) -> int:
    """Ask once, and write the answer."""
    path = find(given.socket)
    if given.what == "status":
        now = document(path, "status")
        lines = iter([json.dumps(now, indent=2)]) if given.json else show_status(now)
    elif given.what == "flows":
        request = " ".join(("flows", *given.filters))
        lines = (line.decode() for line in ask(path, request)) if given.json else show_flows(flows(path, request))
    elif given.json:
        lines = iter([json.dumps(document(path, "metrics json"), indent=2)])
    else:
        answer = ask(path, "metrics")
        lines = labelled(answer, given.label) if given.prometheus else show_metrics(answer)
    for line in lines:
        sys.stdout.write(line + "\n")
    sys.stdout.flush()
    return 3 if given.check and now["health"]["state"] != "ok" else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = _parser()
    given = parser.parse_intermixed_args(argv)  # a filter may stand behind an option
    if given.filters and given.what != "flows":
        parser.error("there are filters for flows alone")
    if given.prometheus and given.what != "metrics":
        parser.error("--prometheus is for metrics")
    if given.label and not given.prometheus:
        parser.error("--label is for --prometheus")
    if given.check and given.what != "status":
        parser.error("--check is for the status")
    try:
        while True:
            status = _say(given)
            if given.watch is None:
                return status
            time.sleep(given.watch)
            sys.stdout.write("\n")
    except KeyboardInterrupt:
        return 0
    except CtlError as error:
        sys.stderr.write(f"godwit ctl: {error}\n")
        return 1
    except BrokenPipeError:
        # Whoever reads has seen enough. What is left in the buffer goes nowhere, at the end of the process too.
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
