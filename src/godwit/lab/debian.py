# SPDX-License-Identifier: GPL-2.0-or-later
"""Packages of another Debian suite, fetched beside the system.

The laboratory wants programs that this system's release has in too old a
version, or not installed at all. They come from the archive that the system
itself is configured to use: the sources of apt are read, and the same URI is
asked for another suite, with an apt state of its own, so that nothing of the
system changes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from godwit.lab.errors import LabError, UnavailableError

# How long one call of apt may take: an index of 10 MB over a slow line.
_APT_TIMEOUT = 600.0
# An archive fails now and then: a mirror changes under us, a server is busy.
_ATTEMPTS = 3
_BETWEEN_ATTEMPTS = 5.0  # seconds
RETRIES = ("-o", "Acquire::Retries=3")  # apt's own, of one file


def cache_dir() -> str:
    """Where the laboratory keeps what it fetched or built: $GODWIT_CACHE, or ~/.cache/godwit."""
    path = os.environ.get("GODWIT_CACHE")
    if not path:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        path = os.path.join(base, "godwit")
    os.makedirs(path, exist_ok=True)
    return os.path.abspath(path)


@contextlib.contextmanager
def cache_lock(name: str) -> Iterator[None]:
    """Let one process at a time fetch or build ``name`` in the cache."""
    with open(os.path.join(cache_dir(), f".{name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run(args: Sequence[str], *, cwd: str | None = None, env: dict[str, str] | None = None) -> str:
    """Run a tool to its end and return its standard output; :class:`LabError` if it fails."""
    try:
        done = subprocess.run(
            args,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_APT_TIMEOUT,
            check=False,
        )
    except FileNotFoundError as error:
        raise UnavailableError(f"{args[0]} is not installed, and the laboratory needs it") from error
    except subprocess.TimeoutExpired as error:
        raise LabError(f"{args[0]} did not end within {_APT_TIMEOUT:g} s") from error
    if done.returncode != 0:
        raise LabError(f"{args[0]}: exit status {done.returncode}: {done.stderr.strip()}")
    return done.stdout


# --- the sources of apt -----------------------------------------------------


@dataclass(frozen=True)
class Source:
    """One archive in apt's configuration: what a deb822 stanza or a ``deb`` line says."""

    uri: str
    suites: tuple[str, ...]
    components: tuple[str, ...]
    options: dict[str, str] = field(default_factory=dict, hash=False)

    def stanza(self) -> str:
        """The source in deb822 style, as sources.list(5) describes it."""
        lines = [
            "Types: deb",
            f"URIs: {self.uri}",
            f"Suites: {' '.join(self.suites)}",
            f"Components: {' '.join(self.components)}",
        ]
        lines += [f"{key}: {value}" for key, value in self.options.items()]
        return "\n".join(lines) + "\n"


# Options of a source that another suite of the same archive needs as well.
_KEPT_OPTIONS = ("Signed-By", "Trusted", "Check-Valid-Until")


def parse_deb822(text: str) -> list[Source]:
    """Return the enabled binary sources of a ``.sources`` file."""
    found = []
    stanza: dict[str, str] = {}
    key = ""
    for line in [*text.splitlines(), ""]:
        if line.startswith("#"):
            continue
        if line[:1] in (" ", "\t") and key:
            stanza[key] += "\n" + line
        elif line.strip():
            name, _, value = line.partition(":")
            key = name.strip().lower()
            stanza[key] = value.strip()
        elif stanza:
            enabled = stanza.get("enabled", "yes").lower() not in ("no", "false", "0", "off", "disable")
            if enabled and "deb" in stanza.get("types", "").split():
                options = {k: stanza[k.lower()] for k in _KEPT_OPTIONS if k.lower() in stanza}
                found += [
                    Source(
                        uri,
                        tuple(stanza.get("suites", "").split()),
                        tuple(stanza.get("components", "").split()),
                        options,
                    )
                    for uri in stanza.get("uris", "").split()
                ]
            stanza, key = {}, ""
    return found


def parse_one_line(text: str) -> list[Source]:
    """Return the binary sources of a ``.list`` file."""
    found = []
    names = {name.lower(): name for name in _KEPT_OPTIONS}
    for raw in text.splitlines():
        line = raw.partition("#")[0].strip()
        if not line.startswith(("deb ", "deb\t")):
            continue
        rest = line[3:].strip()
        options: dict[str, str] = {}
        if rest.startswith("["):
            inside, _, rest = rest[1:].partition("]")
            for word in inside.split():
                key, _, value = word.partition("=")
                if key.lower() in names:
                    options[names[key.lower()]] = value
        words = rest.split()
        if len(words) >= 3:
            found.append(Source(words[0], (words[1],), tuple(words[2:]), options))
    return found


def configured_sources(etc: str = "/etc/apt") -> list[Source]:
    """Return every enabled source that apt is configured with below ``etc``."""
    found = []
    paths = [os.path.join(etc, "sources.list")]
    with contextlib.suppress(FileNotFoundError):
        parts = os.path.join(etc, "sources.list.d")
        paths += [os.path.join(parts, name) for name in sorted(os.listdir(parts))]
    for path in paths:
        parse = {".list": parse_one_line, ".sources": parse_deb822}.get(os.path.splitext(path)[1])
        if parse is not None:
            with contextlib.suppress(FileNotFoundError), open(path) as file:
                found += parse(file.read())
    return found


def release() -> dict[str, str]:
    """Return os-release(5) of this system."""
    fields = {}
    with open("/etc/os-release") as file:
        for line in file:
            key, _, value = line.strip().partition("=")
            fields[key] = value.strip("\"'")
    return fields


def archive(suite: str) -> Source:
    """Return this system's own Debian archive, asked for ``suite`` instead.

    Raises :class:`UnavailableError` on a system that is not Debian or has no source
    for its own release.
    """
    system = release()
    if system.get("ID") != "debian":
        raise UnavailableError(
            f"this system is {system.get('PRETTY_NAME', 'unknown')}; packages are fetched on Debian only"
        )
    # Debian's own unstable has a codename as well, but its sources may say "sid".
    suites = {system.get("VERSION_CODENAME", ""), "stable", "testing", "sid", "unstable"}
    for source in configured_sources():
        if "main" in source.components and suites.intersection(source.suites):
            return replace(source, suites=(suite,), components=("main",))
    raise UnavailableError("apt has no source of Debian's main archive configured (sources.list(5))")


# --- apt with a state of its own --------------------------------------------


class Apt:
    """apt, working on one source, with its state below ``root``.

    Proxy settings and the like still come from the system's apt.conf.
    """

    def __init__(self, root: str, source: Source) -> None:
        self.source = source
        self.root = os.path.abspath(root)
        for name in ("state/lists/partial", "cache/archives/partial"):
            os.makedirs(os.path.join(self.root, name), exist_ok=True)
        with open(os.path.join(self.root, "status"), "w"):
            pass
        listed = os.path.join(self.root, "debian.sources")
        with open(listed, "w") as file:
            file.write(source.stanza())
        # Read first of all, so that the system's own files still add theirs; what has to win goes as options.
        self._options = [
            f"Dir::Etc::sourcelist={listed}",
            "Dir::Etc::sourceparts=/dev/null",
            "Dir::Etc::preferencesparts=/dev/null",
            f"Dir::State={self.root}/state",
            f"Dir::State::status={self.root}/status",
            f"Dir::Cache={self.root}/cache",
            "Acquire::Languages=none",
            "APT::Get::List-Cleanup=0",
        ]
        if os.getuid() == 0:
            # Its own user could not write to a cache in root's home.
            self._options.append("APT::Sandbox::User=root")

    def _apt(self, *args: str, cwd: str | None = None) -> str:
        options = [word for option in self._options for word in ("-o", option)]
        return run([args[0], *options, *args[1:]], cwd=cwd, env={**os.environ, "LC_ALL": "C"})

    def update(self) -> None:
        """Fetch the index of the suite."""
        self._apt("apt-get", "-qq", *RETRIES, "-o", "APT::Update::Error-Mode=any", "update")

    def version(self, package: str) -> str:
        """Return the newest version of ``package``; :class:`LabError` if there is none."""
        shown = self._apt("apt-cache", "show", "--no-all-versions", package)
        for line in shown.splitlines():
            if line.startswith("Version:"):
                return line.split()[1]
        raise LabError(f"no package {package} in {' '.join(self.source.suites)}")

    def closure(self, packages: Sequence[str]) -> list[str]:
        """Return ``packages`` and all that they need (``Depends``, no more), as if nothing were installed."""
        planned = self._apt("apt-get", "--simulate", "--no-install-recommends", "install", *packages)
        return [line.split()[1] for line in planned.splitlines() if line.startswith("Inst ")]

    def unpack(self, packages: Sequence[str], into: str) -> None:
        """Download the newest of ``packages`` and unpack them, one over the other, below ``into``."""
        os.makedirs(into, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.root) as folder:
            self._apt("apt-get", "-qq", *RETRIES, "download", *packages, cwd=folder)
            for name in sorted(os.listdir(folder)):
                run(["dpkg", "-x", os.path.join(folder, name), into])


def system_download(packages: Sequence[str], into: str) -> None:
    """Download ``packages`` of this system's own release and unpack them below ``into``.

    The index of the system is used as it is; where it does not know a package
    any more, root has it refreshed once.
    """
    os.makedirs(into, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
        options = ["-o", "APT::Sandbox::User=root"] if os.getuid() == 0 else []
        command = ["apt-get", "-qq", *RETRIES, *options, "download", *packages]
        try:
            run(command, cwd=folder)
        except LabError:
            if os.getuid() != 0:
                raise
            run(["apt-get", "-qq", *RETRIES, "update"])
            run(command, cwd=folder)
        for name in sorted(os.listdir(folder)):
            run(["dpkg", "-x", os.path.join(folder, name), into])


# --- packages of another suite, in the cache --------------------------------


@dataclass(frozen=True)
class Unpacked:
    """Packages in the cache: ``root`` has their files, ``versions`` those of the packages asked for."""

    root: str
    versions: dict[str, str]


def unpacked(
    name: str,
    suite: str,
    packages: Sequence[str],
    *,
    more: Callable[[Apt], Sequence[str]],
    check: Callable[[Unpacked], object],
    refresh: bool = False,
) -> Unpacked:
    """Return ``packages`` of ``suite`` as ``name`` in the cache, fetched first if they are not there.

    ``more`` names what is unpacked with them, and ``check`` raises
    :class:`LabError` where what came is of no use. Raises :class:`UnavailableError`
    where they cannot be had (no Debian, no network).
    """
    folder = os.path.join(cache_dir(), name)
    found = None if refresh else _in_cache(folder, packages)
    if found is None:
        with cache_lock(name):
            found = None if refresh else _in_cache(folder, packages)
            if found is None:
                _unpack_into(folder, suite, packages, more, check)
                found = _in_cache(folder, packages)
    assert found is not None
    return found


def _in_cache(folder: str, packages: Sequence[str]) -> Unpacked | None:
    with contextlib.suppress(FileNotFoundError), open(os.path.join(folder, "about.json")) as file:
        versions = json.load(file).get("versions", {})
        if set(versions) == set(packages):
            return Unpacked(os.path.join(folder, "root"), versions)
    return None


def _unpack_into(
    folder: str,
    suite: str,
    packages: Sequence[str],
    more: Callable[[Apt], Sequence[str]],
    check: Callable[[Unpacked], object],
) -> None:
    source = archive(suite)
    for attempt in range(1, _ATTEMPTS + 1):
        # From the index on: where a package is not found, it is mostly that a newer one has replaced it.
        work = tempfile.mkdtemp(prefix=f"{os.path.basename(folder)}.", dir=cache_dir())
        try:
            apt = Apt(os.path.join(work, "apt"), source)
            apt.update()
            new = os.path.join(work, "new")
            found = Unpacked(os.path.join(new, "root"), {name: apt.version(name) for name in packages})
            apt.unpack(list(dict.fromkeys([*packages, *more(apt)])), found.root)
            # Started by a user who is not the cache's owner, too.
            os.chmod(new, 0o755)
            check(found)
            with open(os.path.join(new, "about.json"), "w") as file:
                json.dump({"suite": suite, "versions": found.versions}, file)
            replace_tree(new, folder)
            return
        except UnavailableError:
            raise
        except LabError as error:
            if attempt == _ATTEMPTS:
                names = ", ".join(packages)
                raise UnavailableError(f"{names} could not be fetched from Debian's suite {suite}: {error}") from error
            time.sleep(_BETWEEN_ATTEMPTS)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def replace_tree(new: str, at: str) -> None:
    """Put the finished tree ``new`` at ``at``, in the place of what is there."""
    old = f"{at}.old"
    shutil.rmtree(old, ignore_errors=True)
    if os.path.lexists(at):
        os.rename(at, old)
    os.rename(new, at)
    shutil.rmtree(old, ignore_errors=True)
