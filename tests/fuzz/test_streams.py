# SPDX-License-Identifier: GPL-2.0-or-later
"""Sound streams come through, and others load whole or leave nothing: in few and always the same examples.

``make fuzz`` looks further.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from godwit.dataplane.state import Datagram, Observed, UdpPeer, UdpPort
from godwit.net import native
from godwit.net.native import NATIVE, UDP_PEER, UDP_PORT, WAITING, Waiting
from godwit.net.records import FLOW, OBSERVED
from godwit.net.state import usable

from .streams import LONGEST, Stream, mutated, mutated_file, octets, sound, sound_flow, sound_socket
from .targets import Device, load, run, save

Test = TypeVar("Test", bound=Callable[..., None])
VERSIONS = {"version2": 2, "native": NATIVE}


def examples(count: int) -> Callable[[Test], Test]:
    """The same in every run; without an end to the time that one may take on a busy machine."""

    def decorate(test: Test) -> Test:
        quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
        return settings(
            max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=quiet
        )(test)

    return decorate


randoms = st.integers(0, (1 << 64) - 1).map(Random)


def device(rng: Random, number: int) -> Device:
    """One with anything in it that a stream of that version has a place for."""
    made = Device()
    made.seen = usable(Observed._make(sound(rng, OBSERVED)))
    for flow in range(rng.randrange(5)):
        made.states.append(sound_flow(rng, FLOW if number == 2 else native.FLOW))
        socket = sound_socket(rng)
        ended = socket.tcpi_state in (6, 7)
        queues = octets(rng, socket.sndq), octets(rng, socket.rcvq)
        made.sockets[flow] = None if ended or not rng.randrange(4) else (socket, *queues)
    if number == NATIVE:
        made.told = {f"name {line}": f"value\t{line}" for line in range(rng.randrange(3))}
        for _ in range(rng.randrange(4)):
            peers = [UdpPeer._make(sound(rng, UDP_PEER)) for _ in range(rng.randrange(4))]
            heads = [Waiting._make(sound(rng, WAITING)) for _ in range(rng.randrange(4))]
            waiting = [Datagram(*head[:3], octets(rng, rng.randrange(LONGEST))) for head in heads]
            made.ports.append((UdpPort._make(sound(rng, UDP_PORT)), peers, waiting))
    return made


@pytest.mark.parametrize("number", VERSIONS.values(), ids=list(VERSIONS))
@examples(100)
@given(rng=randoms)
def test_what_is_saved_is_loaded_the_same_and_saved_again_in_the_same_bytes(number: int, rng: Random) -> None:
    source = device(rng, number)
    data = save(source, number)
    target, error, transfer = load(data)
    assert error is None
    loaded = target.device
    assert loaded.states == source.states
    assert {flow: loaded.sockets[flow] for flow in source.sockets} == source.sockets
    assert (loaded.seen, loaded.ports) == (source.seen, source.ports)
    assert (loaded.compared or {}) == source.told
    loaded.told = source.told
    assert save(loaded, number) == data
    transfer.close()


@pytest.mark.parametrize("target", VERSIONS)
@examples(60)
@given(rng=randoms)
def test_what_the_declarations_allow_is_taken(target: str, rng: Random) -> None:
    """Any kind of entry, in any sound order, those included that this file does not know."""
    assert run(target, Stream.made(rng, VERSIONS[target]).repaired())


@pytest.mark.parametrize("target", VERSIONS)
@examples(150)
@given(rng=randoms)
def test_what_was_changed_on_the_way_loads_whole_or_leaves_nothing(target: str, rng: Random) -> None:
    """With the counts and the check value made right again, so that the reader gets past them."""
    data, other = (Stream.made(rng, VERSIONS[target]).repaired() for _ in range(2))
    run(target, mutated(rng, data, other), memory=False)


@examples(100)
@given(rng=randoms)
def test_the_inspector_shows_any_file(rng: Random) -> None:
    number = rng.choice(list(VERSIONS.values()))
    data, other = (Stream.made(rng, number).repaired() for _ in range(2))
    run("inspect", mutated_file(rng, data, other), memory=False)
