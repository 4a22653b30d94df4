# SPDX-License-Identifier: GPL-2.0-or-later
"""The sources of apt, in both styles, and the archive derived from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from godwit.lab import debian
from godwit.lab.debian import Source
from godwit.lab.errors import LabError, UnavailableError

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"

ONE_LINE = [
    ("deb http://archive.example/debian bookworm main contrib", [("http://archive.example/debian", "bookworm")]),
    ("deb\thttp://archive.example/debian  bookworm  main # a comment", [("http://archive.example/debian", "bookworm")]),
    (f"deb [arch=amd64 signed-by={KEYRING}] http://a.example/d sid main", [("http://a.example/d", "sid")]),
    ("# deb http://archive.example/debian bookworm main", []),
    ("deb-src http://archive.example/debian bookworm main", []),
    ("deb http://archive.example/debian", []),
    ("", []),
]


@pytest.mark.parametrize(("text", "expected"), ONE_LINE)
def test_one_line_style(text: str, expected: list[tuple[str, str]]) -> None:
    assert [(source.uri, *source.suites) for source in debian.parse_one_line(text)] == expected


def test_one_line_options_that_stay() -> None:
    (source,) = debian.parse_one_line(f"deb [arch=amd64 signed-by={KEYRING}] http://a.example/d sid main")
    assert source.options == {"Signed-By": KEYRING}


DEB822 = f"""\
Types: deb deb-src
URIs: http://a.example/debian http://b.example/debian
# a comment
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: {KEYRING}

Types: deb-src
URIs: http://c.example/debian
Suites: bookworm
Components: main

Types: deb
URIs: http://d.example/debian
Suites: bookworm
Components: main
Enabled: no

types: deb
uris: http://e.example/debian
suites: bookworm
components: main
signed-by:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc
"""


def test_deb822_style() -> None:
    found = debian.parse_deb822(DEB822)
    assert [source.uri for source in found] == [f"http://{host}.example/debian" for host in "abe"]
    assert found[0].suites == ("bookworm", "bookworm-updates")
    assert found[0].components == ("main", "contrib")
    assert found[0].options == {"Signed-By": KEYRING}
    assert found[2].options["Signed-By"].splitlines()[1:] == [
        " -----BEGIN PGP PUBLIC KEY BLOCK-----",
        " .",
        " abc",
    ]


def test_a_stanza_reads_back() -> None:
    for source in debian.parse_deb822(DEB822):
        assert debian.parse_deb822(source.stanza()) == [source]


def test_configured_sources(tmp_path: Path) -> None:
    parts = tmp_path / "sources.list.d"
    parts.mkdir()
    (tmp_path / "sources.list").write_text("deb http://a.example/debian bookworm main\n")
    (parts / "b.sources").write_text("Types: deb\nURIs: http://b.example/debian\nSuites: sid\nComponents: main\n")
    (parts / "c.list").write_text("deb http://c.example/debian bookworm main\n")
    (parts / "d.sources.disabled").write_text("Types: deb\nURIs: http://d.example/\nSuites: sid\nComponents: main\n")
    assert [source.uri[7] for source in debian.configured_sources(str(tmp_path))] == ["a", "b", "c"]


def test_archive_is_this_release_s(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"Signed-By": KEYRING}
    sources = [
        Source("http://other.example/tools", ("bookworm",), ("contrib",)),
        Source("http://a.example/security", ("bookworm-security",), ("main",)),
        Source("http://a.example/debian", ("bookworm", "bookworm-updates"), ("main", "contrib"), options),
    ]
    monkeypatch.setattr(debian, "release", lambda: {"ID": "debian", "VERSION_CODENAME": "bookworm"})
    monkeypatch.setattr(debian, "configured_sources", lambda: sources)
    assert debian.archive("sid") == Source("http://a.example/debian", ("sid",), ("main",), options)
    sources.pop()
    with pytest.raises(UnavailableError, match="no source"):
        debian.archive("sid")
    monkeypatch.setattr(debian, "release", lambda: {"ID": "other", "PRETTY_NAME": "Other 1"})
    with pytest.raises(UnavailableError, match="Other 1"):
        debian.archive("sid")


def test_cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GODWIT_CACHE", str(tmp_path / "here"))
    assert debian.cache_dir() == str(tmp_path / "here")
    monkeypatch.delenv("GODWIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "there"))
    assert debian.cache_dir() == str(tmp_path / "there" / "godwit")


def test_replace_tree(tmp_path: Path) -> None:
    for content in ("first", "second"):
        new = tmp_path / "new"
        new.mkdir()
        (new / "file").write_text(content)
        debian.replace_tree(str(new), str(tmp_path / "at"))
        assert (tmp_path / "at" / "file").read_text() == content
    assert [path.name for path in tmp_path.iterdir()] == ["at"]


def test_run() -> None:
    assert debian.run(["echo", "yes"]) == "yes\n"
    with pytest.raises(LabError, match=r"sh: exit status 3: reason"):
        debian.run(["sh", "-c", "echo reason >&2; exit 3"])
    with pytest.raises(UnavailableError, match="not installed"):
        debian.run(["no-such-tool-of-godwit"])


class FakeApt:
    """Stands for apt with an archive of one package; the first ``failures`` downloads fail."""

    failures = 0
    downloads = 0

    def __init__(self, root: str, source: Source) -> None:
        assert source.suites == ("sid",)

    def update(self) -> None:
        pass

    def version(self, package: str) -> str:
        return f"1:{package}-2"

    def unpack(self, packages: list[str], into: str) -> None:
        FakeApt.downloads += 1
        if FakeApt.downloads <= FakeApt.failures:
            raise LabError("no such file on the mirror")
        Path(into).mkdir(parents=True)
        (Path(into) / "files").write_text(" ".join(packages))


@pytest.fixture
def fake_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[FakeApt]:
    monkeypatch.setenv("GODWIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(debian, "Apt", FakeApt)
    monkeypatch.setattr(debian, "archive", lambda suite: Source("http://a.example/d", (suite,), ("main",)))
    monkeypatch.setattr(debian, "_BETWEEN_ATTEMPTS", 0.0)
    monkeypatch.setattr(FakeApt, "failures", 0)
    monkeypatch.setattr(FakeApt, "downloads", 0)
    return FakeApt


def unpacked(*packages: str, refresh: bool = False) -> debian.Unpacked:
    return debian.unpacked("them", "sid", packages, more=lambda _: ["a", "libc"], check=lambda _: None, refresh=refresh)


def test_packages_are_fetched_once(fake_apt: type[FakeApt]) -> None:
    found = unpacked("a")
    assert found.versions == {"a": "1:a-2"}
    assert (Path(found.root) / "files").read_text() == "a libc"
    assert unpacked("a") == found
    assert fake_apt.downloads == 1
    assert unpacked("a", refresh=True) == found
    assert unpacked("a", "b").versions == {"a": "1:a-2", "b": "1:b-2"}  # what was cached was another list
    assert fake_apt.downloads == 3


def test_a_download_that_fails_is_repeated(fake_apt: type[FakeApt]) -> None:
    fake_apt.failures = 2
    assert unpacked("a").versions == {"a": "1:a-2"}
    fake_apt.failures = 100
    with pytest.raises(UnavailableError, match="a could not be fetched from Debian"):
        unpacked("a", refresh=True)
    assert fake_apt.downloads == 6
    assert unpacked("a").versions == {"a": "1:a-2"}  # what was there has stayed
    assert [path.name for path in Path(debian.cache_dir()).iterdir() if not path.name.startswith(".")] == ["them"]
