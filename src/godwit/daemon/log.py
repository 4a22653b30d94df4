# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the daemon's log goes.

In the foreground to stderr; with ``--log-file`` to that file; in the
background otherwise to syslog (on most systems, the journal). Until the
daemon is ready, errors go to stderr too, since whoever started it waits there
for the reason (`godwit.daemon.lifecycle`). Where there is no syslog, stderr is
told once that there is no log.

A log that cannot be written to is no reason to stop, and nobody is left to be
told: the daemon turns `logging.raiseExceptions` off.

The log file keeps its size limit without a second file and without opening
anything again: the daemon may have given up the right to do either.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import sys
from typing import BinaryIO

from godwit.daemon.errors import StartError, reason
from godwit.daemon.options import Options

TRACE = 5  # below logging.DEBUG: each message, each frame that goes up
SYSLOG = "/dev/log"
FORMAT = "%(message)s"
FILE_FORMAT = "%(asctime)s %(levelname)s %(message)s"


class BoundedFileHandler(logging.Handler):
    """Appends to a file, and drops its older half when it reaches ``limit`` bytes.

    Another process may do the same: one that takes over, or hands over.
    """

    def __init__(self, path: str, limit: int) -> None:
        super().__init__()
        self._limit = limit
        self._file: BinaryIO = open(  # noqa: SIM115  # open as long as the handler
            os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_APPEND, 0o600), "r+b", buffering=0
        )

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record as one line."""
        try:
            line = self.format(record).encode(errors="backslashreplace") + b"\n"
            size = self._file.seek(0, os.SEEK_END)
            if size + len(line) > self._limit:
                self._halve(size)
            self._file.write(line)
        except Exception:
            self.handleError(record)

    def _halve(self, size: int) -> None:
        """Keep the last half of the limit, from the start of a line."""
        keep = self._limit // 2
        self._file.seek(max(0, size - keep))
        kept = self._file.read(keep)
        kept = kept[kept.find(b"\n") + 1 :]
        self._file.truncate(0)
        self._file.write(kept)

    def fileno(self) -> int:
        """The file's descriptor."""
        return self._file.fileno()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def level(options: Options) -> int:
    """The level that the options ask for."""
    if options.trace:
        return TRACE
    if options.debug:
        return logging.DEBUG
    return logging.WARNING if options.quiet else logging.INFO


def _is_heard(path: str) -> bool:
    """Whether a syslog daemon has this socket. SysLogHandler itself tells nobody, since Python 3.11."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        return probe.connect_ex(path) == 0


class _Starting(logging.Formatter):
    """For stderr: until the daemon is ready, errors begin with the program's name, as those of the options do."""

    def __init__(self, program: str) -> None:
        super().__init__(FORMAT)
        self.program: str | None = program

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return f"{self.program}: {text}" if self.program and record.levelno >= logging.ERROR else text


def _lasting(options: Options, stderr: logging.Formatter) -> logging.Handler | None:
    """The handler for after the start; None where there is nowhere to log."""
    handler: logging.Handler
    if options.log_file is not None:
        try:
            handler = BoundedFileHandler(options.log_file, options.log_size)
        except OSError as error:
            raise StartError(
                f"cannot open the log file {options.log_file}: {reason(error, options.log_file)}"
            ) from error
        handler.setFormatter(logging.Formatter(FILE_FORMAT))
        return handler
    if options.foreground:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(stderr)
        return handler
    if not _is_heard(SYSLOG):
        return None  # a container without syslog; --log-file is what works there
    from logging.handlers import SysLogHandler  # only here: it brings much along that no other log needs

    handler = SysLogHandler(SYSLOG, SysLogHandler.LOG_DAEMON, socket.SOCK_DGRAM)
    handler.setFormatter(logging.Formatter(f"godwit[%(process)d]: {FORMAT}"))
    return handler


class Pace(logging.Filter):
    """Lets a line of the source log so often in a minute or longer, and says how often it would have been more.

    What others do again and again, a front-end that connects, fails and connects
    again for instance, shall not fill the log. What does not stop gets a longer
    time each time, up to an hour. What was ``asked_for`` (an attribute of the
    record), as debugging is, is let through.
    """

    def __init__(self, most: int = 20) -> None:
        super().__init__()
        self._most = most
        self._seen: dict[tuple[str, int], tuple[float, int, int]] = {}  # since when, how often, for how many minutes

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether this one is written; it may get a word on those before it that were not."""
        if record.levelno <= logging.DEBUG or getattr(record, "asked_for", False):
            return True
        place = record.pathname, record.lineno
        since, count, minutes = self._seen.get(place, (record.created, 0, 1))
        if not since <= record.created < since + 60 * minutes:
            if count > self._most:
                record.msg, record.args = f"{record.getMessage()} (and {count - self._most} more like that before)", ()
            goes_on = count > self._most and since <= record.created < since + 120 * minutes
            minutes = min(2 * minutes, 60) if goes_on else 1
            since, count = record.created, 0
        self._seen[place] = since, count + 1, minutes
        if count + 1 == self._most:
            until = "a minute" if minutes == 1 else f"{minutes} minutes"
            record.msg, record.args = f"{record.getMessage()} (no more like that for {until})", ()
        return count < self._most


class Log:
    """The process's log. ``ready()`` ends the time in which stderr gets the errors."""

    def __init__(self, options: Options) -> None:
        logging.addLevelName(TRACE, "TRACE")
        self._root = logging.getLogger()
        logging.getLogger("godwit").setLevel(level(options))
        # Of the libraries that we use, only what somebody should look at.
        self._root.setLevel(max(level(options), logging.WARNING))
        self._handlers: list[logging.Handler] = []
        self._stderr = _Starting(options.dialect.value)
        lasting = _lasting(options, self._stderr)
        if lasting is None and not options.quiet:
            print(  # noqa: T201  # there is no log to write it to
                f"{options.dialect.value}: goes on without a log, since there is no syslog ({SYSLOG}):"
                " give a file with --log-file",
                file=sys.stderr,
            )
        self._add(lasting or logging.NullHandler())
        self._starting: logging.Handler | None = None
        if options.log_file is not None or not options.foreground:
            self._starting = logging.StreamHandler(sys.stderr)
            self._starting.setLevel(logging.ERROR)
            self._starting.setFormatter(self._stderr)
            self._add(self._starting)

    def _add(self, handler: logging.Handler) -> None:
        handler.addFilter(Pace())
        self._root.addHandler(handler)
        self._handlers.append(handler)

    def ready(self) -> None:
        """From now on nothing but the lasting log is written to."""
        self._stderr.program = None
        if self._starting is not None:
            self._root.removeHandler(self._starting)
            self._handlers.remove(self._starting)
            self._starting = None

    def last_words(self) -> tuple[int, bytes]:
        """Where a line goes that is not written by Python: the descriptor, -1 for none, and what it begins with."""
        lasting = self._handlers[0]
        if isinstance(lasting, BoundedFileHandler):
            fd, before = lasting.fileno(), b"CRITICAL "
        elif isinstance(lasting, logging.StreamHandler):
            fd, before = lasting.stream.fileno(), b""
        elif (
            sock := getattr(lasting, "socket", None)
        ) is not None:  # of a SysLogHandler: facility daemon, and critical
            fd, before = sock.fileno(), b"<26>godwit[%d]: " % os.getpid()
        else:
            return -1, b""
        # One of its own: that of the log may be closed when its other end goes, and its number be another file's.
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3), before

    def close(self) -> None:
        """Take the handlers away again, and close them."""
        for handler in self._handlers:
            self._root.removeHandler(handler)
            handler.close()
        self._handlers.clear()
