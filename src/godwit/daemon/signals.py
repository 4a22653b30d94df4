# SPDX-License-Identifier: GPL-2.0-or-later
"""Signals that end the daemon, and who takes them: the main thread, as long as its loop runs.

The kernel gives a signal to any thread that has not blocked it. One of ours may be just about to end when the loop has
gone, and its handlers with it: a signal would then end the process in its own way, with another status than 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

ENDING: Final = (signal.SIGTERM, signal.SIGINT)


def block() -> None:
    """Have this thread take none of them any more."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Take none in this block: threads that are started in it never do."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def take(loop: asyncio.AbstractEventLoop, end: Callable[[], None]) -> None:
    """Have the main thread call ``end`` at each of them; threads that the loop starts take none."""
    loop.set_default_executor(ThreadPoolExecutor(thread_name_prefix="asyncio", initializer=block))
    for number in ENDING:
        loop.add_signal_handler(number, end)
