# SPDX-License-Identifier: GPL-2.0-or-later
"""The page that compares the options with passt's: none is missing, none is made up."""

from __future__ import annotations

import gzip
import os
import re
import select
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from godwit.daemon.options import Dialect, parser
from godwit.lab import peer
from godwit.lab.netns import Namespace, Network
from godwit.net.forward import Forward, ForwardError, open_listeners, parse_forwards

PAGE = Path(__file__).resolve().parents[2] / "docs" / "passt-options.md"
EPHEMERAL = (32768, 60999)  # the kernel's own
# In the manual, and of no effect, so that --help leaves it out.
ONLY_IN_THE_MANUAL = {"-e", "--stderr"}


def _on_the_page() -> set[str]:
    text, _, _ = PAGE.read_text().partition("## Options that passt does not have")
    first_cells = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    return {name for cell in first_cells for name in re.findall(r"`([^`]+)`", cell)}


def _names(text: str) -> Iterator[str]:
    """The options that a --help explains: each at the start of a line, its names separated by commas."""
    for line in text.splitlines():
        if (found := re.match(r" {2,6}(-[-\w]+(?:, -[-\w]+)*)", line)) is not None:
            yield from found[1].split(", ")


def _help(program: str) -> set[str]:
    passt = peer.fetch()
    words = passt.command("--help")
    at = next(i for i, word in enumerate(words) if os.path.basename(word).startswith("passt"))
    words[at] = os.path.join(os.path.dirname(words[at]), program)
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=True)
    return set(_names(done.stdout))


def _manual() -> set[str]:
    """The options that passt(1) has a paragraph on."""
    with gzip.open(os.path.join(peer.fetch().root, "usr/share/man/man1/passt.1.gz"), "rt") as file:
        text = file.read()
    options = text.partition(".SH OPTIONS")[2].partition(".SH EXAMPLES")[0].replace("\\-", "-")
    found = set()
    for line in re.findall(r"^\.TP\n\.BR (-.*)$", options, re.MULTILINE):
        for word in line.split():
            if word.startswith("-"):
                found.add(word)
    return found


def test_each_option_of_passt_has_its_row_and_no_other_has() -> None:
    """The left column, from the passt that is installed. Where this fails, passt has changed: amend the page."""
    from_help = _help("passt") | _help("pasta")
    assert {"-s", "--socket", "--socket-path", "--trace", "--config-net", "-1"} <= from_help
    assert _on_the_page() == from_help | ONLY_IN_THE_MANUAL
    assert _manual() == from_help | ONLY_IN_THE_MANUAL


def test_each_option_that_passt_names_is_known() -> None:
    known = {name for action in parser(Dialect.PASST)._actions for name in action.option_strings}
    assert (_help("passt") | _help("pasta") | ONLY_IN_THE_MANUAL) - known == set()


# What both understand, and how: each line that passt prints of a rule, from a SPEC.
SPECS = [
    "2222:22",
    "8000-8010:80-90",
    "8000,8001-8003:9001-9003",
    "127.0.0.1/2222:22",
    "[::1]/2222",
    "::1/2222",
    "%lo/2222",
    "127.0.0.1%lo/2222",
    "::1%lo/2222:22",
    "0.0.0.0/5000:192.0.2.5/6000",
    "0.0.0.0/5000-5002:192.0.2.5",
    "::/5000:[2001:db8::5]/6000",
    "::/5000:2001:db8::5",
    "127.0.0.6/8000-8003:192.0.2.6,9000",
    "20000-25000,~23000-23010",
    "127.0.0.1/2020-2030,~2025",
    "2000-2010:3000-3010,~2005,~2000",
    "2000-2010,~2005,2020",
    "5000:0.0.0.0",
    "02222",
    "/2222",
    "none",
    "~1-32000",
    "all,~1-32000",
    "~1-32000,all",
    "127.0.0.1/all,~1-32000",
    "0.0.0.0/all:192.0.2.5,~1-32000",
    "40000",
]
BAD = [
    "", "0", "65536", "22:", ":22", "22-", "-22", "30-20", "2222-2223:22", ",2222", "2222,", "127.0.0.1/", "%/2222",
    "%nodev/2222", "192.0.2.199/2222", "2222,2222", "2222:0", "2222:65536", "2222:224.0.0.1/22", "127.0.0.1:2222:22",
    "2222:22/33", "127.0.0.1/2222/22", "~30-20", "~x", "~1-65000:5", "auto", "127.0.0.1/none", "nonsense",
    "::1/8000:192.0.2.5/80", "127.0.0.1/8000:2001:db8::5/80",
]  # fmt: skip


@pytest.fixture(scope="module")
def host() -> Iterator[Namespace]:
    with Network() as network:
        yield network.hosts["a"]


def _passt(host: Namespace, folder: Path, *args: str) -> tuple[bool, str]:
    """Whether passt starts with these arguments, and what it says up to then."""
    pid = folder / "pid"
    words = ["--vhost-user", "-s", str(folder / "s"), "-P", str(pid), "--repair-path", "none", *args]
    with host.popen(peer.fetch().command(*words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        said, _ = process.communicate(timeout=30)
    if process.returncode == 0:
        daemon = os.pidfd_open(int(pid.read_text()))
        signal.pidfd_send_signal(daemon, signal.SIGKILL)
        select.select([daemon], [], [], 10)  # its ports are free then
        os.close(daemon)
    return process.returncode == 0, said.decode()


def _rule(one: Forward) -> str:
    """A forward in passt's words."""
    place = f"[{one.place.address or '*'}]" + (f"%{one.place.device}" if one.place.device else "")
    target = "" if one.to_address is None else f"{one.to_address}:"
    to_last = one.to_first + one.last - one.first
    ports, to_ports = (
        str(first) if first == last else f"{first}-{last}"
        for first, last in ((one.first, one.last), (one.to_first, to_last))
    )
    return f"TCP {place}:{ports} => {target}{to_ports}" + (" (best effort)" if one.weak else "")


@pytest.mark.parametrize("spec", SPECS)
def test_a_spec_means_what_it_means_to_passt(host: Namespace, tmp_path: Path, spec: str) -> None:
    starts, said = _passt(host, tmp_path, "-t", spec)
    assert starts, said
    theirs = [" ".join(line.split()) for line in said.splitlines() if line.startswith("    TCP ")]
    forwards = parse_forwards(spec, ephemeral=EPHEMERAL)
    assert [_rule(one) for one in forwards.ranges] == theirs
    with host.enter():
        open_listeners(forwards).close()


@pytest.mark.parametrize("spec", BAD)
def test_a_spec_that_passt_refuses_is_refused(host: Namespace, tmp_path: Path, spec: str) -> None:
    starts, said = _passt(host, tmp_path, "-t", spec)
    assert not starts, said
    with host.enter(), pytest.raises(ForwardError):
        open_listeners(parse_forwards(spec)).close()
