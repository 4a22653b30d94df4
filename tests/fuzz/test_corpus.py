# SPDX-License-Identifier: GPL-2.0-or-later
"""What the fuzzer has kept, once more; and what is said of a run."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator

import pytest

from . import targets, tcp_model
from .campaign import result
from .devices import BrokenError
from .keep import MOST, within
from .ram import FREE, SIZE, TX, USED, Ram
from .registry import BY_NAME, CORPUS, kept, target
from .script import Script, Writer
from .tcp_rig import mostly
from .wire import check, with_lengths
from .worst import WORST


@pytest.fixture(scope="module", autouse=True)
def hosts() -> Iterator[None]:
    """Those of the model of TCP are for this module."""
    yield
    tcp_model.close()
    gc.collect()  # what counts descriptors later is not to see these go


def came(name: str, data: bytes) -> bool:
    """Whether something comes of an input."""
    return mostly(functools.partial(target(name).run, data))


@pytest.mark.parametrize("name", BY_NAME)
def test_what_was_kept_holds(name: str) -> None:
    """No input breaks what its target states; of those that something comes of there are some, and of the others."""
    assert {came(name, data) for data in kept(name)} == {True, False}


@pytest.mark.parametrize("name", BY_NAME)
def test_there_is_something_to_begin_with(name: str) -> None:
    """Something comes of one in four, and more."""
    ends = [came(name, data) for data in target(name).seeds() if len(data) <= target(name).longest]
    assert 4 * sum(ends) > len(ends) > 0


@pytest.mark.parametrize("kind", WORST)
@pytest.mark.parametrize("name", ["native", "inspect"])
def test_many_small_entries_are_read_within_limits(name: str, kind: str) -> None:
    assert targets.run(name, WORST[kind](300))


def test_the_corpus_is_small_and_of_known_targets() -> None:
    assert sorted(path.name for path in CORPUS.iterdir()) == sorted(BY_NAME)
    assert sum(path.stat().st_size for path in CORPUS.glob("*/*")) < 1_500_000


def test_of_what_was_found_the_small_is_kept() -> None:
    assert within([b"a", b"bb", b"c" * MOST], MOST) == [b"a", b"bb"]


def test_what_libfuzzer_says_of_a_run() -> None:
    said = (
        "#80\tINITED cov: 120 ft: 300 corp: 60/9Kb exec/s: 0 rss: 100Mb\n"
        "#99\tNEW    cov: 125 ft: 310 corp: 61/9Kb lim: 4 exec/s: 0 rss: 100Mb L: 1/2 MS: 1 x-\n"
        "stat::number_of_executed_units: 5000\nstat::average_exec_per_sec:     250\n"
    )
    found = result("rings", said, [])
    assert found[:6] == ("rings", 5000, 250, (120, 125), 310, "61/9Kb")
    assert result("rings", "", ["status 1"]).executions == 0


# ---- what the targets rest on


def test_a_script_and_its_writer() -> None:
    script = Script(Writer().put("BHIQ", 1, 2, 3, 4).bytes(b"rest").data)
    assert (script.u8(), script.u16(), script.u32(), script.u64()) == (1, 2, 3, 4)
    assert (script.take(2), script.rest(), bool(script)) == (b"re", b"st", False)
    assert (script.u8(), script.take(3)) == (0, b"")


@pytest.mark.parametrize("at", [FREE, SIZE - 1, USED[TX] - 1])
def test_a_write_where_none_is_allowed_is_seen(at: int) -> None:
    ram = Ram()
    ram.wipe()
    ram.num = 8
    ram.check([])
    ram.map[at] ^= 1
    ram.check([(at, at + 1)])
    with pytest.raises(BrokenError):
        ram.check([(at + 1, at + 9)])


FRAME = bytes.fromhex("02000000000202000000000108004500001e000000004011f6c3c0000201c000020a005007d0000a0b456869")


def test_a_frame_that_is_well_formed() -> None:
    assert check(FRAME, FRAME[6:12], 30).above[8:] == b"hi"


@pytest.mark.parametrize("at", [7, 12, 14, 17, 22, 24, 26, 39, 40, 42])
def test_a_frame_with_one_bit_wrong(at: int) -> None:
    with pytest.raises(BrokenError):
        check(FRAME[:at] + bytes([FRAME[at] ^ 1]) + FRAME[at + 1 :], FRAME[6:12])


def test_a_frame_that_is_too_long() -> None:
    with pytest.raises(BrokenError):
        check(FRAME, FRAME[6:12], 29)
    with pytest.raises(BrokenError):
        check(FRAME + b"!", FRAME[6:12])


def test_lengths_are_put_right() -> None:
    wrong = FRAME[:16] + b"\xff\xff" + FRAME[18:38] + b"\0\0" + FRAME[40:]
    assert with_lengths(wrong) == FRAME
