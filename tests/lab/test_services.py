# SPDX-License-Identifier: GPL-2.0-or-later
"""Name service, web and shell, with the programs that people use: from the guest and to it."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from godwit.lab.netns import HOST4, HOST6, SERVER4, SERVER6, Namespace

from .world import HOST, LOOPBACK, SERVER, World, run

MAP_HOST = {4: "192.0.2.100", 6: "2001:db8::100"}
MAP_GUEST = {4: "192.0.2.101", 6: "2001:db8::101"}
DNS_FORWARD = {4: "192.0.2.53", 6: "2001:db8::53"}
WEB, SHELL = 8080, 2222
NAMES = {4: "192.0.2.77", 6: "2001:db8::77"}
LONG_TEXT = ["x" * 200 + str(number) for number in range(20)]  # more than a datagram of DNS takes


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    arguments = ["--tcp-ports", f"{WEB},{SHELL}:22", "--udp-ports", "none"]
    for version in (4, 6):
        arguments += ["--dns-host", LOOPBACK[version]]
        arguments += ["--map-host-loopback", MAP_HOST[version], "--map-guest-addr", MAP_GUEST[version]]
        arguments += ["--dns-forward", DNS_FORWARD[version]]
    with World(*arguments) as made:
        yield made


def url(addr: str, port: int = WEB) -> str:
    return f"http://[{addr}]:{port}/file" if ":" in addr else f"http://{addr}:{port}/file"


# --- names --------------------------------------------------------------------


def name_server(world: World, space: Namespace, addresses: list[str], owner: str) -> None:
    """A real name server that knows ``name.test``, a long text, and whose it is."""
    world.serve(
        space,
        "dnsmasq",
        "--keep-in-foreground",
        "--conf-file=/dev/null",
        "--no-resolv",
        "--no-hosts",
        "--pid-file=",
        "--user=root",
        "--log-facility=-",
        "--edns-packet-max=8192",
        "--bind-interfaces",
        *(f"--listen-address={addr}" for addr in addresses),
        *(f"--host-record=name.test,{addr}" for addr in NAMES.values()),
        *(f"--txt-record=long.test,{text}" for text in LONG_TEXT),
        f"--txt-record=owner.test,{owner}",
        port=53,
        addr=addresses[0],
    )


@pytest.fixture(scope="module")
def names(world: World) -> World:
    """With a name server in the network, and one on the host's loopback."""
    name_server(world, world.server, [SERVER4, SERVER6], "server")
    name_server(world, world.host, ["127.0.0.1", "::1"], "host")
    return world


def dig(world: World, server: str, *words: str) -> list[str]:
    """Ask from the guest; the answers' data, sorted."""
    done = run(world.guest, "dig", "+short", "+tries=1", "+time=3", f"@{server}", *words)
    return sorted(done.stdout.split("\n")[:-1])


@pytest.mark.parametrize("transport", ["+notcp", "+tcp"])
@pytest.mark.parametrize("version", [4, 6])
def test_names_from_a_server_in_the_network(names: World, version: int, transport: str) -> None:
    server = SERVER[version]
    assert dig(names, server, transport, "name.test", "A") == [NAMES[4]]
    assert dig(names, server, transport, "name.test", "AAAA") == [NAMES[6]]
    assert dig(names, server, transport, "owner.test", "TXT") == ['"server"']


@pytest.mark.parametrize("version", [4, 6])
def test_an_answer_too_long_is_fetched_over_tcp(names: World, version: int) -> None:
    cut = run(names.guest, "dig", "+ignore", "+noedns", "+time=3", f"@{SERVER[version]}", "long.test", "TXT").stdout
    assert "flags: qr aa tc" in cut
    assert dig(names, SERVER[version], "+noedns", "long.test", "TXT") == sorted(f'"{text}"' for text in LONG_TEXT)


@pytest.mark.parametrize("version", [4, 6])
def test_a_long_answer_in_one_datagram(names: World, version: int) -> None:
    """EDNS: 4 KiB at MTU 1500."""
    answer = run(
        names.guest, "dig", "+ignore", "+bufsize=8192", "+time=3", f"@{SERVER[version]}", "long.test", "TXT"
    ).stdout
    assert "flags: qr aa rd ra;" in answer  # not cut short
    assert f"SERVER: {SERVER[version]}#53({SERVER[version]}) (UDP)" in answer
    assert all(f'"{text}"' in answer for text in LONG_TEXT)


@pytest.mark.parametrize("transport", ["+notcp", "+tcp"])
@pytest.mark.parametrize(
    "address",
    [DNS_FORWARD[4], DNS_FORWARD[6], MAP_HOST[4], MAP_HOST[6]],
    ids=["forward4", "forward6", "loopback4", "loopback6"],
)
def test_a_resolver_on_the_hosts_loopback(names: World, address: str, transport: str) -> None:
    """Reached through ``--dns-forward`` and ``--dns-host``, or through ``--map-host-loopback``."""
    assert dig(names, address, transport, "owner.test", "TXT") == ['"host"']
    assert dig(names, address, transport, "name.test", "A") == [NAMES[4]]


def test_only_name_service_goes_to_the_resolver(names: World) -> None:
    """``--dns-forward`` maps ports 53 and 853: nothing else at that address leads to the host."""
    names.serve(names.host, *web_server(names, "loopback", "127.0.0.1", 8765), port=8765)
    done = run(names.guest, "curl", "-sS", "-m1", url(DNS_FORWARD[4], 8765), check=False)
    assert done.returncode in (7, 28), done.stdout  # could not connect, or timed out
    assert run(names.guest, "curl", "-sS", "-m3", url(MAP_HOST[4], 8765)).stdout == "loopback"


# --- web ----------------------------------------------------------------------


def web_server(world: World, content: str, addr: str, port: int) -> list[str]:
    """The words that start a web server whose ``/file`` is ``content``."""
    root = Path(world.folder, f"web-{content}")
    root.mkdir(exist_ok=True)
    (root / "file").write_text(content)
    where = f"[{addr}]:{port}" if ":" in addr else f"{addr}:{port}"
    return ["busybox", "httpd", "-f", "-p", where, "-h", str(root)]


@pytest.fixture(scope="module")
def web(world: World) -> World:
    """With web servers: at the server, in the guest, and on the host."""
    world.serve(world.server, *web_server(world, "server", "::", WEB), port=WEB)
    world.serve(world.guest, *web_server(world, "guest", "::", WEB), port=WEB)
    # The host's own port WEB is the guest's.
    for version in (4, 6):
        world.serve(
            world.host, *web_server(world, "loopback", LOOPBACK[version], 8090), port=8090, addr=LOOPBACK[version]
        )
        world.serve(world.host, *web_server(world, "host", HOST[version], 8090), port=8090, addr=HOST[version])
    return world


@pytest.mark.parametrize("version", [4, 6])
def test_web_from_the_guest(web: World, version: int) -> None:
    assert run(web.guest, "curl", "-sS", "-m5", url(SERVER[version])).stdout == "server"


@pytest.mark.parametrize("version", [4, 6])
def test_web_to_a_forwarded_port(web: World, version: int) -> None:
    assert run(web.server, "curl", "-sS", "-m5", url(HOST[version])).stdout == "guest"


@pytest.mark.parametrize("version", [4, 6])
def test_web_to_a_forwarded_port_from_afar(web: World, version: int) -> None:
    """Across a router and a link of a smaller MTU."""
    assert run(web.far, "curl", "-sS", "-m5", url(HOST[version])).stdout == "guest"


@pytest.mark.parametrize("version", [4, 6])
def test_web_on_the_hosts_loopback(web: World, version: int) -> None:
    assert run(web.guest, "curl", "-sS", "-m5", url(MAP_HOST[version], 8090)).stdout == "loopback"


@pytest.mark.parametrize("version", [4, 6])
def test_web_at_the_hosts_own_address(web: World, version: int) -> None:
    """``--map-guest-addr``: the guest has the host's address itself, and needs another one to name the host."""
    assert run(web.guest, "curl", "-sS", "-m5", url(MAP_GUEST[version], 8090)).stdout == "host"


def test_nothing_listens_there(web: World) -> None:
    """A refused connection is refused for the guest, at once."""
    done = run(web.guest, "curl", "-sS", "-m5", url(SERVER4, 9), check=False)
    assert done.returncode == 7, done.stdout  # could not connect; not 28, a timeout


@pytest.mark.parametrize("up", [False, True], ids=["down", "up"])
@pytest.mark.parametrize("version", [4, 6])
def test_a_large_file(web: World, tmp_path: Path, version: int, up: bool) -> None:
    content = random.Random(version).randbytes(5_000_000)
    Path(web.folder, f"web-{'guest' if up else 'server'}", "large").write_bytes(content)
    addr = f"[{HOST6}]" if version == 6 else HOST4
    server = f"[{SERVER6}]" if version == 6 else SERVER4
    target = tmp_path / "large"
    space, where = (web.server, addr) if up else (web.guest, server)
    run(space, "curl", "-sS", "-m10", "-o", str(target), f"http://{where}:{WEB}/large")
    assert hashlib.sha256(target.read_bytes()).digest() == hashlib.sha256(content).digest()


# --- shell --------------------------------------------------------------------


@pytest.fixture(scope="module")
def shells(world: World) -> World:
    """With sshd in the guest and at the server, and a key that opens both."""
    for name in ("host", "user"):
        key = os.path.join(world.folder, name)
        run(world.host, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
    os.makedirs("/run/sshd", mode=0o755, exist_ok=True)  # the system's service would make it
    for space in (world.guest, world.server):
        world.serve(
            space,
            "/usr/sbin/sshd",
            "-D",
            "-e",
            "-f",
            "/dev/null",
            *option(
                HostKey=f"{world.folder}/host",
                AuthorizedKeysFile=f"{world.folder}/user.pub",
                PidFile="none",
                StrictModes="no",
                UsePAM="no",
                PermitRootLogin="prohibit-password",
                UseDNS="no",
            ),
            port=22,
        )
    return world


def option(**options: str) -> list[str]:
    """Options of ssh and sshd as words."""
    return [word for name, value in options.items() for word in ("-o", f"{name}={value}")]


def ssh(world: World, space: Namespace, addr: str, port: int, command: str, stdin: str | None = None) -> str:
    """Log in and run a command; its output."""
    done = run(
        space,
        "ssh",
        "-F/dev/null",
        "-i",
        f"{world.folder}/user",
        "-p",
        str(port),
        *option(
            BatchMode="yes",
            StrictHostKeyChecking="no",
            UserKnownHostsFile="/dev/null",
            LogLevel="ERROR",
            ConnectTimeout="5",
        ),
        f"root@{addr}",
        command,
        stdin=stdin,
        timeout=20,
    )
    return done.stdout


@pytest.mark.parametrize("version", [4, 6])
def test_shell_in_the_guest(shells: World, version: int) -> None:
    """The guest sees who logs in, and at which of its own ports."""
    said = ssh(shells, shells.server, HOST[version], SHELL, "echo $SSH_CONNECTION").split()
    assert (said[0], said[2:]) == (SERVER[version], [HOST[version], "22"])


@pytest.mark.parametrize("version", [4, 6])
def test_shell_from_the_guest(shells: World, version: int) -> None:
    """The server sees the host's address."""
    said = ssh(shells, shells.guest, SERVER[version], 22, "echo $SSH_CONNECTION").split()
    assert (said[0], said[2:]) == (HOST[version], [SERVER[version], "22"])


@pytest.mark.parametrize("inwards", [True, False], ids=["in", "out"])
def test_much_through_a_shell_both_ways(shells: World, inwards: bool) -> None:
    text = random.Random(1).randbytes(500_000).hex()
    space, addr, port = (shells.server, HOST4, SHELL) if inwards else (shells.guest, SERVER4, 22)
    assert ssh(shells, space, addr, port, "cat", stdin=text) == text


def test_shell_from_the_guest_into_the_guest_by_way_of_the_server(shells: World) -> None:
    """Out and in again at the same time: one session inside the other."""
    inner = (
        f"ssh -F/dev/null -i {shells.folder}/user -p {SHELL} -o BatchMode=yes -o StrictHostKeyChecking=no"
        f" -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR root@{HOST4} 'cat; echo $SSH_CONNECTION'"
    )
    said = ssh(shells, shells.guest, SERVER4, 22, inner, stdin="through and through\n").splitlines()
    assert said[0] == "through and through"
    assert said[1].split()[0] == SERVER4
