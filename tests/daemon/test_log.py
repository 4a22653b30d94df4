# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the log goes, and how large it gets."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from godwit.daemon import log as log_module
from godwit.daemon.errors import StartError
from godwit.daemon.log import TRACE, BoundedFileHandler, Log, level
from godwit.daemon.options import Options

logger = logging.getLogger("godwit.daemon.test")


@pytest.fixture(autouse=True)
def _levels() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in (None, "godwit")]
    before = [one.level for one in loggers]
    yield
    for one, was in zip(loggers, before, strict=True):
        one.setLevel(was)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (Options(), logging.INFO),
        (Options(quiet=True), logging.WARNING),
        (Options(debug=True), logging.DEBUG),
        (Options(debug=True, trace=True), TRACE),
    ],
)
def test_levels(options: Options, expected: int) -> None:
    assert level(options) == expected


def test_the_foreground_logs_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    log = Log(Options(foreground=True))
    log.ready()
    logger.info("hello")
    logger.debug("unheard")
    log.close()
    logger.error("after the end")
    assert capsys.readouterr().err == "hello\n"


def test_libraries_are_heard_only_when_something_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    log = Log(Options(foreground=True, debug=True))
    logger.debug("ours")
    logging.getLogger("library").info("unheard")
    logging.getLogger("library").warning("theirs")
    log.close()
    assert capsys.readouterr().err == "ours\ntheirs\n"


def test_a_file_gets_all_and_stderr_the_errors_of_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log"
    log = Log(Options(log_file=str(path)))
    logger.info("starting")
    logger.error("wrong at the start")
    log.ready()
    logger.error("wrong later")
    log.close()
    assert capsys.readouterr().err == "godwit serve: wrong at the start\n"
    assert [line.split(" ", 3)[2:] for line in path.read_text().splitlines()] == [
        ["INFO", "starting"],
        ["ERROR", "wrong at the start"],
        ["ERROR", "wrong later"],
    ]


def test_errors_of_a_start_in_the_foreground_have_the_programs_name(capsys: pytest.CaptureFixture[str]) -> None:
    log = Log(Options(foreground=True))
    logger.info("starting")
    logger.error("wrong at the start")
    log.ready()
    logger.error("wrong later")
    log.close()
    assert capsys.readouterr().err == "starting\ngodwit serve: wrong at the start\nwrong later\n"


def test_without_syslog_it_is_said_that_there_is_no_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(log_module, "SYSLOG", str(tmp_path / "absent"))
    log = Log(Options())
    logger.info("unheard")
    log.ready()
    logger.error("unheard too")
    log.close()
    said = capsys.readouterr().err
    assert said.startswith("godwit serve: goes on without a log, since there is no syslog")
    assert said.endswith("give a file with --log-file\n")
    assert said.count("\n") == 1
    # Who asks for errors only, as QEMU does, gets none.
    Log(Options(quiet=True)).close()
    Log(Options(log_file=str(tmp_path / "log"))).close()
    assert capsys.readouterr().err == ""


def test_the_background_logs_to_syslog(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(log_module, "SYSLOG", str(tmp_path / "log"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
        syslog.bind(str(tmp_path / "log"))
        syslog.settimeout(10)
        log = Log(Options())
        log.ready()
        logger.info("hello")
        log.close()
        assert re.match(rb"<30>godwit\[\d+\]: hello", syslog.recv(4096))
    assert capsys.readouterr().err == ""


def test_a_log_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"cannot open the log file .*: Is a directory"):
        Log(Options(log_file=str(tmp_path)))


def test_a_file_keeps_its_limit_and_its_newest_lines(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("from an earlier run\n")
    handler = BoundedFileHandler(str(path), 4096)
    for number in range(2000):
        handler.emit(logging.makeLogRecord({"msg": f"line {number}"}))
        assert path.stat().st_size <= 4096
    handler.close()
    lines = path.read_text().splitlines()
    assert lines == [f"line {number}" for number in range(2000 - len(lines), 2000)]
    assert len(lines) > 100


def test_a_file_keeps_its_limit_under_a_user_who_may_not_open_it(tmp_path: Path) -> None:
    """As after --runas: what root has opened, nobody goes on with."""
    path = tmp_path / "log"
    handler = BoundedFileHandler(str(path), 4096)
    os.chmod(path, 0)
    os.chmod(tmp_path, 0o500)
    child = os.fork()
    if not child:
        failed = 1
        try:
            if os.geteuid() == 0:
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
            try:
                path.open("rb").close()
            except PermissionError:
                for number in range(2000):
                    handler.emit(logging.makeLogRecord({"msg": f"line {number}"}))
                failed = 0
        finally:
            os._exit(failed)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    handler.close()
    os.chmod(tmp_path, 0o700)
    os.chmod(path, 0o600)
    lines = path.read_text().splitlines()
    assert path.stat().st_size <= 4096
    assert lines == [f"line {number}" for number in range(2000 - len(lines), 2000)]
    assert len(lines) > 100


def test_a_file_is_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("earlier\n")
    handler = BoundedFileHandler(str(path), 4096)
    handler.emit(logging.makeLogRecord({"msg": "later"}))
    handler.close()
    assert path.read_text() == "earlier\nlater\n"


def _record(seconds: float, lineno: int = 1, levelno: int = logging.INFO) -> logging.LogRecord:
    record = logging.LogRecord("godwit", levelno, "/somewhere.py", lineno, "again: %s", ("why",), None)
    record.created = seconds
    return record


def test_what_repeats_without_end_is_cut_short() -> None:
    pace = log_module.Pace(most=3)

    def lines(*seconds: float, **record: int) -> list[str]:
        records = [_record(one, **record) for one in seconds]
        return [one.getMessage() for one in records if pace.filter(one)]

    assert lines(0, 1, 2, 3, 59) == ["again: why", "again: why", "again: why (no more like that for a minute)"]
    assert lines(3, lineno=2) == ["again: why"]  # another line of the source
    assert len(lines(*range(50), levelno=logging.DEBUG)) == 50  # who asks for it gets it
    records = [_record(one) for one in range(50)]
    for one in records:
        one.asked_for = True
    assert all(map(pace.filter, records))
    assert lines(61, 62) == ["again: why (and 2 more like that before)", "again: why"]
    assert lines(-1000) == ["again: why"]  # somebody has set the clock


def test_what_does_not_stop_is_heard_of_ever_less() -> None:
    pace = log_module.Pace()
    day = 24 * 3600
    heard = [record.getMessage() for record in map(_record, range(day)) if pace.filter(record)]
    assert 20 * 24 <= len(heard) <= 20 * 31  # by the hour in the end, after 1, 2, 4, 8, 16 and 32 minutes
    assert heard[19] == "again: why (no more like that for a minute)"
    assert heard[39] == "again: why (no more like that for 2 minutes)"
    assert heard[-1].endswith("(no more like that for 60 minutes)")
    told = sum(int(line.split("(and ")[1].split()[0]) for line in heard if "(and " in line)
    assert day - 3600 <= told + len(heard) <= day  # of the last hour it is yet to be told
    later = [_record(2 * day + second) for second in range(20)]  # it had stopped: a minute again
    assert all(pace.filter(record) for record in later)
    assert later[-1].getMessage().endswith("for a minute)")
