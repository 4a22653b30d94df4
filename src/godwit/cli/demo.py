# SPDX-License-Identifier: GPL-2.0-or-later
"""``godwit demo``: a guest with open connections migrates to another host and back."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from godwit.lab import image, peer
from godwit.lab.errors import LabError, UnavailableError
from godwit.lab.netns import enter_user_namespace, missing_tun
from godwit.lab.scenario import Load, Move, Outcome, Scenario, qemu_guest

QEMU_RATE = 8_000_000  # an emulated processor's share: more would be the guest's own limit


class Display:
    """Steps as they happen, and below them how the streams stand.

    On a terminal the streams are redrawn in place; elsewhere they take a line
    each second.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = time.monotonic()
        self._load: Load | None = None
        self._before: dict[str, int] = {}
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="display", daemon=True)

    def step(self, text: str) -> None:
        """Say what happens now."""
        self._console.print(f"[dim]{time.monotonic() - self._began:7.2f} s[/dim]  {text}", highlight=False)

    def watch(self, load: Load | None) -> None:
        """Show these streams from now on."""
        self._load = load
        self._before = {}

    def _run(self) -> None:
        interval = 0.2 if self._console.is_terminal else 1.0
        while not self._ended.wait(interval):
            load = self._load
            if load is None:
                continue
            try:
                states = load.progress()
            except LabError:
                continue  # it is being taken down; whoever uses it says why
            lines = []
            for name, state in states.items():
                if state is not None:
                    rate = (state.bytes - self._before.get(name, state.bytes)) / interval
                    self._before[name] = state.bytes
                    lines.append(f"{name} {_size(state.bytes)}, {_size(rate)}/s")
            text = "   ".join(lines)
            if self._console.is_terminal:
                self._live.update(f"           {text}", refresh=True)
            else:
                self.step(f"  {text}")

    def __enter__(self) -> Self:
        self._live.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._live.stop()


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def _moves_table(moves: Sequence[Move]) -> Table:
    table = Table(title="migrations")
    for heading in ("", "state", "guest stood still", "blackout as the server saw it: download", "upload"):
        table.add_column(heading, justify="right")
    for move in moves:
        table.add_row(
            f"{move.source} to {move.target}",
            "in QEMU's stream" if move.state_bytes is None else _size(move.state_bytes),
            f"{move.downtime * 1000:.0f} ms",
            *(f"{move.blackout.get(name, 0) * 1000:.0f} ms" for name in ("download", "upload")),
        )
    return table


def _outcomes_table(outcomes: Sequence[Outcome]) -> Table:
    table = Table(title="connections")
    for heading in ("", "bytes sent", "bytes received", "CRC-32 sent", "CRC-32 received", "all there?"):
        table.add_column(heading, justify="right")
    for outcome in outcomes:
        ends = [""] * 4
        if outcome.sent or outcome.received:
            ends = [
                f"{outcome.sent:,}",
                f"{outcome.received:,}",
                f"{outcome.sent_crc:08x}",
                f"{outcome.received_crc:08x}",
            ]
        table.add_row(outcome.name, *ends, "[green]yes[/green]" if outcome.ok else f"[red]{outcome.error}[/red]")
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="godwit demo",
        description="Migrate a guest with a download, an upload and idle connections to another host and back.",
    )
    parser.add_argument("--qemu", action="store_true", help="with real QEMU guests (version 10 or later is needed)")
    parser.add_argument("-6", "--ipv6", action="store_true", help="connections over IPv6 (default: IPv4)")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="there and back so often (%(default)s)")
    parser.add_argument("--idle", type=int, default=1, metavar="N", help="idle connections (%(default)s)")
    parser.add_argument(
        "--delay",
        type=float,
        metavar="SECONDS",
        help="switch the network so long after each migration (default: while the guest stands still)",
    )
    parser.add_argument(
        "--rate",
        type=int,
        metavar="BYTES",
        help=f"bytes per second of each stream, 0 for no limit (default: 0; {QEMU_RATE} with --qemu and with passt)",
    )
    parser.add_argument(
        "--source", choices=("godwit", "passt"), default="godwit", help="the program on host a (%(default)s)"
    )
    parser.add_argument(
        "--target", choices=("godwit", "passt"), default="godwit", help="the program on host b (%(default)s)"
    )
    return parser


def _end(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.rounds < 1 or options.idle < 1 or (options.rate or 0) < 0 or (options.delay or 0) < 0:
        parser.error("--rounds and --idle are at least 1; --rate and --delay at least 0")
    signal.signal(signal.SIGTERM, _end)  # what has been started is ended on the way out
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(_what(options), highlight=False)
    try:
        # Before that: what fetches packages would take itself for root in there.
        if options.qemu:
            image.build()
        if "passt" in (options.source, options.target):
            peer.fetch()
        enter_user_namespace()
        if not options.qemu and (reason := missing_tun()) is not None:
            raise UnavailableError(reason)
        return _run(options, console)
    except UnavailableError as error:
        print(f"godwit demo: cannot run here: {error}", file=sys.stderr)
        return 2
    except LabError as error:
        print(f"godwit demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("godwit demo: interrupted", file=sys.stderr)
        return 130


def _what(options: argparse.Namespace) -> str:
    """What is going to be shown."""
    guest = "A QEMU guest" if options.qemu else "A guest"
    times = f", {options.rounds} times" if options.rounds > 1 else ""
    idle = f"{options.idle} idle connection{'s' if options.idle > 1 else ''}"
    return (
        f"{guest} moves from host a to host b and back{times}, with a download, an upload and {idle} open."
        " None may break, and what arrives is compared with what was sent."
    )


def _run(options: argparse.Namespace, console: Console) -> int:
    # passt at full speed may lose a stream when it is moved, also to another passt.
    passt = "passt" in (options.source, options.target)
    rate = options.rate if options.rate is not None else QEMU_RATE if options.qemu or passt else 0
    arguments: tuple[str, ...] = ()
    if passt and options.source != options.target:
        arguments = ("--virtio-features", "passt")
    moves: list[Move] = []
    with (
        Display(console) as display,
        Scenario(
            backends=(options.source, options.target),
            godwit_arguments=arguments,
            make_guest=qemu_guest if options.qemu else None,
            ipv6=options.ipv6,
            step=display.step,
        ) as scenario,
    ):
        load = scenario.start_load(idle=options.idle, rate=rate)
        display.watch(load)
        time.sleep(1.5)
        for _ in range(2 * options.rounds):
            moves.append(scenario.move(switch_delay=options.delay))
            wrong = load.check_idle()
            display.step(f"idle connections: {wrong or 'alive'}")
            time.sleep(1.5)
        display.step("ending the streams")
        outcomes = load.finish()
        display.watch(None)
    console.print(_moves_table(moves), _outcomes_table(outcomes))
    good = all(outcome.ok for outcome in outcomes)
    if good:
        console.print(f"[bold green]{len(moves)} migrations, nothing lost.[/bold green]")
    else:
        console.print("[bold red]Something was lost.[/bold red]")
    return 0 if good else 1
