# SPDX-License-Identifier: GPL-2.0-or-later
"""What happens in a soak: to migrations, to the programs, to the network; and what each may cost.

``EVENTS`` is the table. An event acts on a `Stage`, takes all that it leaves to chance from its ``random``, and leaves
everything as it was: both back-ends run with their helpers, the guest has one, and the weather is fine.
"""

from __future__ import annotations

import contextlib
import enum
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from godwit.daemon.mover import LOOK_SECONDS
from godwit.lab.backend import Backend
from godwit.lab.errors import LabError
from godwit.lab.guest import EmbeddedGuest
from godwit.lab.migration import Migration, MigrationError
from godwit.lab.qemu import QemuGuest
from godwit.lab.scenario import Scenario, qemu_guest
from godwit.lab.weather import Weather
from godwit.repair.client import TIMEOUT as REPAIR_TIMEOUT

DIALECTS = ("2", "native")
REFUSED = "connections stand still: they wait for a repair helper"  # of a godwit that does not let another take over


class Cost(enum.Enum):
    """What an event may cost.

    Handshakes in any migration: also in one that takes along what has only begun, the last segment of a caller's may be
    under way (docs/stream.md).
    """

    NOTHING = "nothing"
    HANDSHAKES = "handshakes in progress"
    CONNECTIONS = "the guest's connections, and whoever uses them is told"


class Stage:
    """Where events happen. ``pace`` is what times of waiting are multiplied with."""

    def __init__(self, scenario: Scenario, seed: int, *, pace: float = 1.0) -> None:
        self.scenario = scenario
        self.network = scenario.network
        self.weather = Weather(self.network)
        self.random = random.Random(seed)
        self.pace = pace
        self.hung_at: dict[str, float] = {}
        """When the helper of a back-end hung last (``time.monotonic``), by the back-end's name."""
        self._dialects = dict.fromkeys(scenario.backends, DIALECTS[0])
        self.restart("b", "native")

    @property
    def guest(self) -> EmbeddedGuest:
        """The guest, where it is no QEMU."""
        assert isinstance(self.scenario.guest, EmbeddedGuest)
        return self.scenario.guest

    @property
    def here(self) -> Backend:
        """The guest's back-end."""
        return self.scenario.backends[self.scenario.where]

    @property
    def there(self) -> Backend:
        """The one on the other host."""
        return self.scenario.backends[self.elsewhere]

    @property
    def elsewhere(self) -> str:
        """The host where the guest is not."""
        return self.network.other(self.scenario.where)

    @property
    def dialect(self) -> str:
        """What the guest's back-end would migrate it in."""
        return self._dialects[self.scenario.where]

    def wait(self, least: float, most: float) -> float:
        """Wait so many seconds, times the pace; return how many."""
        seconds = self.random.uniform(least, most) * self.pace
        time.sleep(seconds)
        return seconds

    def any_dialect(self) -> str:
        """Any of the dialects."""
        return self.random.choice(DIALECTS)

    def restart(self, name: str, dialect: str) -> Backend:
        """Start a host's back-end again, with its helper; it has ended, or is ended."""
        self.scenario.backends[name].close()
        self._dialects[name] = dialect
        return self.scenario.start_backend(name, "--migrate-version", dialect)

    def take_over(self, dialect: str) -> str:
        """Have another process take over from the guest's back-end, and speak that dialect; return how it went.

        For a while after its helper has not answered, it does not let go.
        """
        backend = self.here
        arguments = backend.arguments
        if "--migrate-version" in arguments:
            arguments = arguments[: arguments.index("--migrate-version")]
        try:
            still = backend.hand_over([*arguments, "--migrate-version", dialect])
        except LabError as error:
            hung_at = self.hung_at.get(backend.name, float("-inf"))
            if REFUSED not in str(error) or time.monotonic() > hung_at + LOOK_SECONDS + REPAIR_TIMEOUT:
                raise
            return "not taken over, for a helper that hung"
        self._dialects[self.scenario.where] = dialect
        return f"taken over in {still * 1000:.0f} ms"

    def new_helpers(self) -> None:
        """Replace both helpers, whatever has become of them."""
        for backend in self.scenario.backends.values():
            backend.kill_helper()
            backend.start_helper()


@dataclass(frozen=True)
class Event:
    """``happen`` does it, and returns in words what there was to choose. ``weight``: how often, beside the others.

    ``said``: a regular expression for what may be in the log of it as an error. ``qemu``: whether it can happen to a
    QEMU guest; ``ends``: whether it ends a back-end's process.
    """

    name: str
    cost: Cost
    weight: int
    happen: Callable[[Stage], str]
    said: str = ""
    qemu: bool = False
    ends: bool = False


# --- migrations -------------------------------------------------------------------


def _migrate(stage: Stage) -> str:
    spoken = stage.dialect
    switch = stage.random.choice((None, None, 0.0, 0.2, 1.0))
    move = stage.scenario.move(switch_delay=switch)
    when = "meanwhile" if switch is None else f"{switch:g} s later"
    return f"version {spoken} to {move.target}, {move.downtime * 1000:.0f} ms, the network {when}"


STEPS = ("connect_target", "log_on", "suspend", "transfer")


def _begin(stage: Stage, steps: int) -> Migration:
    migration = stage.guest.migration(stage.there.socket)
    for step in STEPS[:steps]:
        getattr(migration, step)()
    return migration


def _cancelled(stage: Stage) -> str:
    if isinstance(stage.scenario.guest, QemuGuest):
        attempt = stage.scenario.guest.attempt(stage.there.socket)
        attempt.begin()
        stage.wait(0.0, 0.5)
        attempt.cancel()
        return f"version {stage.dialect}, before the switch-over"
    steps = stage.random.randint(1, len(STEPS))
    migration = _begin(stage, steps)
    stage.wait(0.0, 0.5)
    migration.cancel()
    return f"version {stage.dialect}, after {STEPS[steps - 1]}"


def _target_killed(stage: Stage) -> str:
    steps = stage.random.randint(1, len(STEPS))
    migration = _begin(stage, steps)
    stage.there.kill()
    migration.cancel()
    stage.restart(stage.elsewhere, stage.any_dialect())
    return f"version {stage.dialect}, after {STEPS[steps - 1]}"


def _stream_cut(stage: Stage) -> str:
    migration = _begin(stage, STEPS.index("transfer"))
    at = int(10 ** stage.random.uniform(0, 4))
    try:
        migration.transfer(cut=at)
    except MigrationError:
        pass
    else:
        if len(migration.record.stream) > at:
            raise LabError(f"the target found {at} of {len(migration.record.stream)} bytes good")
    migration.cancel()
    return f"version {stage.dialect}, after byte {at}"


def _helper_in_move(act: Callable[[Stage, Backend], None]) -> Callable[[Stage], str]:
    """Something happens to the helper of one side at any moment of a migration."""

    def happen(stage: Stage) -> str:
        side = stage.random.choice(("source", "target"))
        backend = stage.here if side == "source" else stage.there
        delay = stage.random.uniform(0.0, 0.15)
        timer = threading.Timer(delay, act, (stage, backend))
        timer.start()
        said = _move_if_it_goes(stage)
        timer.join()
        stage.new_helpers()
        return f"version {stage.dialect}, {side}'s, after {delay * 1000:.0f} ms; {said}"

    return happen


def _dies(_: Stage, backend: Backend) -> None:
    backend.kill_helper()


def _hangs(stage: Stage, backend: Backend) -> None:
    stage.hung_at[backend.name] = time.monotonic()
    backend.stop_helper()


def _move_if_it_goes(stage: Stage) -> str:
    was = stage.scenario.where
    try:
        stage.scenario.move()
    except LabError as error:
        return f"stays at {was}: {str(error).splitlines()[0]}"
    return f"moved to {stage.scenario.where}"


def _no_helper(stage: Stage) -> str:
    """Without a helper at one side the guest moves, and its connections do not."""
    side = stage.random.choice(("source", "target"))
    (stage.here if side == "source" else stage.there).kill_helper()
    said = _move_if_it_goes(stage)
    stage.new_helpers()
    return f"{side}'s; {said}"


# --- programs -----------------------------------------------------------------------


def _helper_replaced(stage: Stage) -> str:
    backend = stage.random.choice(list(stage.scenario.backends.values()))
    backend.kill_helper()
    stage.wait(0.0, 1.0)
    backend.start_helper()
    return backend.name


def _front_end_gone(stage: Stage) -> str:
    if not isinstance(stage.scenario.guest, EmbeddedGuest):
        stage.scenario.guest.close()
        stage.wait(0.0, 1.0)
        stage.scenario.guest = qemu_guest(stage.here.socket)
        return "QEMU quits; another one"
    stage.guest.disconnect()
    stage.wait(0.0, 2.0)
    if stage.random.random() < 0.5:
        stage.guest.connect(stage.here.socket)
        return "rings from their beginning"
    stage.guest.reconnect(stage.here.socket)
    return "rings from where they were"


def _godwit_ends(end: Callable[[Backend], None]) -> Callable[[Stage], str]:
    def happen(stage: Stage) -> str:
        end(stage.here)
        stage.wait(0.0, 2.0)
        dialect = stage.any_dialect()
        stage.guest.reconnect(stage.restart(stage.scenario.where, dialect).socket)
        return f"version {dialect} from now on"

    return happen


def _terminate(backend: Backend) -> None:
    backend.terminate()
    backend.wait(20.0)


def _other_killed(stage: Stage) -> str:
    stage.there.kill()
    stage.wait(0.0, 1.0)
    dialect = stage.any_dialect()
    stage.restart(stage.elsewhere, dialect)
    return f"version {dialect} from now on"


def _taken_over(stage: Stage) -> str:
    dialect = stage.any_dialect()
    return f"{stage.take_over(dialect)}, version {stage.dialect} from now on"


def _godwit_stopped(stage: Stage) -> str:
    stage.here.stop()
    try:
        return f"{stage.wait(0.1, 3.0):.1f} s"
    finally:
        stage.here.resume()


def _guest_paused(stage: Stage) -> str:
    stage.guest.pause()
    seconds = stage.wait(0.1, 3.0)
    stage.guest.resume()
    return f"{seconds:.1f} s"


# --- the network ----------------------------------------------------------------------


def _weather(act: Callable[[Weather, random.Random], str]) -> Callable[[Stage], str]:
    """Some weather for some seconds, and in a third of the times a migration in it."""

    def happen(stage: Stage) -> str:
        with _fine_again(stage):
            said = act(stage.weather, stage.random)
            seconds = stage.wait(1.0, 8.0)
            if stage.random.random() < 0.3:
                stage.scenario.move()
                said += f", a migration to {stage.scenario.where}"
                seconds += stage.wait(0.0, 3.0)
        return f"{said}, {seconds:.1f} s"

    return happen


@contextlib.contextmanager
def _fine_again(stage: Stage) -> Iterator[None]:
    try:
        yield
    finally:
        stage.weather.calm()


def _some(do: Callable[[Weather, int], None], amounts: Sequence[int], unit: str) -> Callable[[Stage], str]:
    """Weather of one of these amounts."""

    def act(weather: Weather, chance: random.Random) -> str:
        amount = chance.choice(amounts)
        do(weather, amount)
        return f"{amount} {unit}"

    return _weather(act)


def _flap(stage: Stage) -> str:
    name = stage.random.choice(("server", stage.scenario.where))
    times = stage.random.randint(1, 3)
    total = 0.0
    with _fine_again(stage):
        for _ in range(times):
            stage.weather.cut(name)
            total += stage.wait(0.1, 5.0 / times)
            stage.weather.calm()
            stage.wait(0.0, 0.3)
    return f"of {name}, {times} times, {total:.1f} s in all"


def _address_gone(stage: Stage) -> str:
    host = stage.network.hosts[stage.scenario.where]
    ipv6 = stage.random.random() < 0.5
    stage.network.take_address(host, ipv6=ipv6)
    try:
        seconds = stage.wait(0.1, 3.0)
    finally:
        stage.network.give_address(host, ipv6=ipv6)
    return f"{host.address(ipv6)} for {seconds:.1f} s"


# What is said of a handshake that version 2 does not take along.
_HANDSHAKE = r"lost, .*: the source could not move it"
# What is said of a helper that does not do its part.
_HELPER = (
    rf"repair helper|{_HANDSHAKE}"
    r"|device state not loaded: (.* stream ended|transfer cancelled: the front-end has hung up)"
)

EVENTS: Sequence[Event] = (
    Event("migration", Cost.HANDSHAKES, 20, _migrate, _HANDSHAKE, qemu=True),
    Event("migration cancelled", Cost.NOTHING, 5, _cancelled, qemu=True),
    Event("target killed in a migration", Cost.NOTHING, 3, _target_killed, ends=True),
    Event("stream cut", Cost.NOTHING, 3, _stream_cut, said="device state not loaded: .* stream ended"),
    Event("helper killed in a migration", Cost.CONNECTIONS, 2, _helper_in_move(_dies), _HELPER),
    Event("helper hangs in a migration", Cost.CONNECTIONS, 1, _helper_in_move(_hangs), _HELPER),
    Event("migration without a helper", Cost.CONNECTIONS, 1, _no_helper, _HELPER),
    Event("helper replaced", Cost.NOTHING, 3, _helper_replaced, qemu=True),
    Event("front-end gone", Cost.CONNECTIONS, 2, _front_end_gone, qemu=True),
    Event("godwit killed", Cost.CONNECTIONS, 1, _godwit_ends(Backend.kill), ends=True),
    Event("godwit terminated", Cost.CONNECTIONS, 1, _godwit_ends(_terminate), ends=True),
    Event("the other godwit killed", Cost.NOTHING, 1, _other_killed, qemu=True, ends=True),
    Event("taken over", Cost.NOTHING, 4, _taken_over, qemu=True, ends=True),
    Event("godwit stopped", Cost.NOTHING, 2, _godwit_stopped, qemu=True),
    Event("guest paused", Cost.NOTHING, 2, _guest_paused),
    Event("loss", Cost.HANDSHAKES, 3, _some(Weather.lose, (1, 5, 10, 30), "in 1000"), _HANDSHAKE, qemu=True),
    Event("duplicates", Cost.HANDSHAKES, 2, _some(Weather.duplicate, (5, 50, 300), "in 1000"), _HANDSHAKE, qemu=True),
    Event("another order", Cost.HANDSHAKES, 2, _some(Weather.reorder, (5, 20, 100), "in 1000"), _HANDSHAKE, qemu=True),
    Event("congestion", Cost.HANDSHAKES, 2, _some(Weather.narrow, (10, 30, 100), "Mbit/s"), _HANDSHAKE, qemu=True),
    Event("another MTU", Cost.HANDSHAKES, 2, _some(Weather.mtu, (1280, 1400, 1492), "bytes"), _HANDSHAKE, qemu=True),
    # Who asks for a neighbour for three seconds is told that there is none, behind godwit as elsewhere.
    Event("link flaps", Cost.HANDSHAKES, 3, _flap, qemu=True),
    Event("address gone", Cost.HANDSHAKES, 2, _address_gone, qemu=True),
)
