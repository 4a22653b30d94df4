# SPDX-License-Identifier: GPL-2.0-or-later
"""The table of options: what each sets, and what each bad one is told."""

from __future__ import annotations

import json
import os
import re
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import pytest

from godwit.daemon.errors import OptionError
from godwit.daemon.options import TABLE, Dialect, Kind, Options, VirtioFeatures, parse
from godwit.net.config import NetOptions
from godwit.net.forward import Forward

SOCKET = ("--socket", "/run/vm.sock")


def _value(options: Options, name: str) -> Any:
    holder, _, last = name.rpartition(".")
    return getattr(options.net if holder else options, last)


CASES: list[tuple[str, str, object]] = [
    ("", "socket", "/run/vm.sock"),
    ("", "one_off", False),
    ("", "repair_path", None),
    ("", "migrate_version", 2),
    ("", "virtio_features", VirtioFeatures.FULL),
    ("", "net.dns", None),
    ("", "net.search", None),
    ("", "net.mtu", None),
    ("-f", "foreground", True),
    ("--foreground", "foreground", True),
    ("-1", "one_off", True),
    ("--one-off", "one_off", True),
    ("-f1", "one_off", True),
    ("-P /run/vm.pid", "pid", "/run/vm.pid"),
    ("--pid vm.pid", "pid", os.path.abspath("vm.pid")),
    ("-l /tmp/log", "log_file", "/tmp/log"),
    ("--log-file=/tmp/log", "log_file", "/tmp/log"),
    ("--log-size 65536", "log_size", 65536),
    ("-d", "debug", True),
    ("--trace", "trace", True),
    ("-q", "quiet", True),
    ("-d -q", "debug", False),
    ("-d -q", "quiet", True),
    ("-q --trace", "trace", True),
    ("-q --trace", "quiet", False),
    ("--vhost-user", "vhost_user", True),
    ("--runas 107:107", "runas", "107:107"),
    ("--repair-path /run/r", "repair_path", "/run/r"),
    ("--repair-path none", "repair_path", ""),
    ("", "takeover", None),
    ("--takeover /run/t", "takeover", "/run/t"),
    ("", "takeover_path", None),
    ("--takeover-path /run/t", "takeover_path", "/run/t"),
    ("--takeover-path none", "takeover_path", ""),
    ("", "ctl_path", None),
    ("--ctl-path /run/c", "ctl_path", "/run/c"),
    ("--ctl-path none", "ctl_path", ""),
    ("", "ctl_group", None),
    ("--ctl-group kvm", "ctl_group", "kvm"),
    ("--migrate-version 2", "migrate_version", 2),
    ("--migrate-version native", "migrate_version", 0x80000001),
    ("--migrate-version 0x80000001", "migrate_version", 0x80000001),
    ("--migrate-version 2147483649", "migrate_version", 0x80000001),
    ("--virtio-features passt", "virtio_features", VirtioFeatures.PASST),
    ("-p /tmp/x.pcap", "pcap", "/tmp/x.pcap"),
    ("", "stats", 0),
    ("--stats 5", "stats", 5),
    ("", "migrate_exit", False),
    ("--migrate-exit", "migrate_exit", True),
    ("", "migrate_linger", True),
    ("--migrate-no-linger", "migrate_linger", False),
    ("-o 192.0.2.3 --outbound 2001:db8::3", "net.outbound4", IPv4Address("192.0.2.3")),
    ("-o 192.0.2.3 --outbound 2001:db8::3", "net.outbound6", IPv6Address("2001:db8::3")),
    ("--outbound-if4 eth1", "net.outbound_if4", "eth1"),
    ("--outbound-if6 eth1", "net.outbound_if6", "eth1"),
    ("--freebind", "freebind", True),
    ("--busy-poll 50", "busy_poll", 50),
    ("--max-flows 1000", "max_flows", 1000),
    ("-f", "max_flows", 131072),
    ("--max-udp-flows 300", "max_udp_flows", 300),
    ("-f", "max_udp_flows", None),
    ("--max-half-open 10", "max_half_open", 10),
    ("-f", "max_half_open", 1024),
    ("-e --chroot-fallback", "freebind", False),
    ("-m 1500", "net.mtu", 1500),
    ("-m1280", "net.mtu", 1280),
    ("-m 68", "net.mtu", 68),
    ("--mtu 65520", "net.mtu", 65520),
    ("--mtu 0", "net.mtu", 0),
    ("-i eth0", "net.interface", "eth0"),
    ("-a 192.0.2.7", "net.address4", IPv4Address("192.0.2.7")),
    ("-a 192.0.2.7", "net.prefix_len4", None),
    ("-a 192.0.2.7/25", "net.prefix_len4", 25),
    ("-a 192.0.2.7 -n 24", "net.prefix_len4", 24),
    ("-a 192.0.2.7/24 -n 24", "net.prefix_len4", 24),
    ("-a 192.0.2.7 --netmask 255.255.240.0", "net.prefix_len4", 20),
    ("-a 192.0.2.7 -a 2001:db8::7/64", "net.address6", IPv6Address("2001:db8::7")),
    ("-a 192.0.2.7 -a 2001:db8::7/56", "net.prefix_len6", 56),
    ("-a 192.0.2.7/24 -a 192.0.2.8", "net.address4", IPv4Address("192.0.2.8")),
    ("-a 192.0.2.7/24 -a 192.0.2.8", "net.prefix_len4", None),
    ("-n 24", "net.prefix_len4", 24),
    ("-g 2001:db8::1 -g 2001:db8::2", "net.gateway6", IPv6Address("2001:db8::2")),
    ("-g 192.0.2.1 -g fe80::1", "net.gateway4", IPv4Address("192.0.2.1")),
    ("-g 192.0.2.1 -g fe80::1", "net.gateway6", IPv6Address("fe80::1")),
    ("-M 52:54:00:12:34:56", "net.mac", bytes.fromhex("525400123456")),
    ("-D 192.0.2.53 -D 2001:db8::53", "net.dns", (IPv4Address("192.0.2.53"), IPv6Address("2001:db8::53"))),
    ("-D none", "net.dns", ()),
    ("-D 192.0.2.53 -D none", "net.dns", ()),
    ("-D none -D 192.0.2.53", "net.dns", (IPv4Address("192.0.2.53"),)),
    ("-S a.example -S none", "net.search", ()),
    ("-S none -S a.example", "net.search", ("a.example",)),
    ("-S example.org --search a.example", "net.search", ("example.org", "a.example")),
    ("-S none", "net.search", ()),
    ("-H guest", "net.hostname", "guest"),
    ("--fqdn guest.example.org", "net.fqdn", "guest.example.org"),
    ("-t 22", "tcp_ports.ranges", (Forward(22, 22, 22),)),
    ("-t 22 -t 8000-8003:80-83", "tcp_ports.ranges", (Forward(22, 22, 22), Forward(8000, 8003, 80))),
    ("-t none", "tcp_ports.ranges", ()),
    ("-u 53", "udp_ports.ranges", (Forward(53, 53, 53),)),
    ("--no-map-gw", "net.map_gw", False),
    ("--map-host-loopback 192.0.2.9", "net.map_host4", IPv4Address("192.0.2.9")),
    ("--map-host-loopback none", "net.map_gw", False),
    ("--map-host-loopback none --map-host-loopback 192.0.2.9", "net.map_host4", IPv4Address("192.0.2.9")),
    ("--map-host-loopback none --map-host-loopback 192.0.2.9", "net.map_gw", False),
    ("--map-host-loopback 192.0.2.9 --map-host-loopback none", "net.map_host4", None),
    ("--map-host-loopback 192.0.2.9 --map-host-loopback 192.0.2.8", "net.map_host4", IPv4Address("192.0.2.8")),
    ("--map-guest-addr 192.0.2.9 --map-guest-addr none", "net.map_guest4", None),
    ("--map-guest-addr 2001:db8::9", "net.map_guest6", IPv6Address("2001:db8::9")),
    ("--dns-forward 192.0.2.10", "net.dns_forward4", IPv4Address("192.0.2.10")),
    ("--dns-host ::1", "net.dns_host6", IPv6Address("::1")),
    ("-4", "net.ipv6", False),
    ("-4", "net.ipv4", True),
    ("-6", "net.ipv4", False),
    ("-6 -4", "net.ipv4", True),
    ("-4 -6", "net.ipv6", True),
    ("--no-tcp", "tcp", False),
    ("--no-udp", "udp", False),
    ("--no-icmp", "icmp", False),
    ("--no-icmp", "net.ndp", False),
    ("--no-dhcp", "net.dhcp", False),
    ("--no-dhcpv6", "net.dhcpv6", False),
    ("--no-ndp", "net.ndp", False),
    ("--no-ra", "net.ra", False),
    ("--no-dhcp-dns", "net.tell_dns", False),
    ("--no-dhcp-search", "net.tell_search", False),
]


@pytest.mark.parametrize(("text", "name", "expected"), CASES)
def test_an_option_sets_its_field(text: str, name: str, expected: object) -> None:
    options = parse([*SOCKET, *text.split()], Dialect.GODWIT)
    if name.endswith(".ranges"):
        assert getattr(options, name.removesuffix(".ranges")).ranges == expected
    else:
        assert _value(options, name) == expected


def test_empty_arguments_switch_dns_off() -> None:
    options = parse([*SOCKET, "-D", "", "-S", ""], Dialect.GODWIT)
    assert (options.net.dns, options.net.search) == ((), ())


BAD: list[tuple[str, str]] = [
    ("--mtu 67", "--mtu: '67' is no MTU: a number from 68 to 65520"),
    ("--mtu 65521", "is no MTU"),
    ("--mtu x", "is no MTU"),
    ("--mtu", "expected one argument"),
    ("--mtu=--", "argument -m/--mtu: '--' is no value"),
    ("-u--", "argument -u/--udp-ports: '--' is no value"),
    ("-a 192.0.2.300", "'192.0.2.300' is no IPv4 or IPv6 address"),
    ("-a 192.0.2.3/33", "'33' is no prefix length for IPv4"),
    ("-a 192.0.2.3/", "'' is no prefix length for IPv4"),
    ("-a 192.0.2.3 -n 33", "out of range"),
    ("-a 192.0.2.3 -n 255.0.255.0", "not a netmask"),
    ("-a 192.0.2.3/24 -n 25", "is 25 and --address says 24"),
    ("-4 -a 2001:db8::1", "IPv6 is switched off"),
    ("-6 -g 192.0.2.1", "IPv4 is switched off"),
    ("-a 192.0.2.1/24,192.0.2.2/24", "'192.0.2.1/24,192.0.2.2/24' is no IPv4 or IPv6 address; give the option once"),
    ("-t 2222:", "'2222:': a port is missing: 2222:22 has both"),
    ("-M 01:00:00:00:00", "is not a MAC address"),
    ("-D resolver", "is no IPv4 or IPv6 address"),
    ("-t 0", "--tcp-ports: '0': port 0 is out of range"),
    ("-t auto", "is not for a guest"),
    ("-c /tmp/x", "-c: there is no socket for pesto"),
    ("-4 -o 2001:db8::2", "IPv6 is switched off"),
    ("-i eth0/1", "is not the name of an interface"),
    ("--outbound-if4 " + "x" * 16, "is not the name of an interface"),
    ("-u 1-", "--udp-ports: .* is not a port"),
    ("-F 3", "--socket and --fd exclude each other"),
    ("-F -1", "expected one argument|is no descriptor"),
    ("-F x", "is no descriptor"),
    ("--log-size 1", "is no size of a log"),
    ("-l /tmp/x -P /tmp/x", "--log-file and --pid name the same file"),
    ("-p /tmp/x -l /tmp/x", "--log-file and --pcap name the same file"),
    ("--no-tcp -t 22", "--tcp-ports and --no-tcp exclude each other"),
    ("--ctl-path none --ctl-group kvm", "--ctl-group: there is no control socket"),
    ("--no-udp -u 53", "--udp-ports and --no-udp exclude each other"),
    ("--migrate-version 1", "version 1 was withdrawn"),
    ("--migrate-version 7", "is no version of the device state"),
    ("--virtio-features some", "is none of full, passt"),
    ("--repair-path " + "x" * 120, "longer than the 107 bytes"),
    ("--stats=-1", "is no time in seconds"),
    ("--dhcp-dns", "--dhcp-dns: an option of pasta"),
    ("--config-net", "--config-net: an option of pasta"),
    ("-T 80", "-T: an option of pasta"),
    ("--no-such-option", r"unrecognized arguments: --no-such-option \(godwit serve --help lists what there is\)"),
    ("--no-map-gw=1", "argument --no-map-gw: it takes no value$"),
    ("-D 192.0.2.1,192.0.2.2", "give the option once for each"),
    ("-t 22:", "argument -t/--tcp-ports: '22:': a port is missing"),
    ("-M 01:00:5e:00:00:01", "--mac-addr: 01:00:5e:00:00:01 is not the address of a single station"),
    ("-H " + "x" * 64, "--hostname: 'x+' is no name"),
    ("-a 192.0.2.1 -g 192.0.2.1", "--address and --gateway are both 192.0.2.1"),
    ("-a fe80::1", "--address: fe80::1 is link-local"),
    ("more", "unrecognized arguments: more"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_a_bad_option_says_why(text: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse([*SOCKET, *text.split()], Dialect.GODWIT)
    assert re.search(message, str(caught.value))
    assert "\n" not in str(caught.value)


def test_a_socket_is_needed() -> None:
    with pytest.raises(OptionError, match="one of --socket PATH, --fd N and --takeover PATH is needed"):
        parse([], Dialect.GODWIT)
    with pytest.raises(OptionError, match="longer than the 107 bytes"):
        parse(["-s", "/tmp/" + "x" * 103], Dialect.GODWIT)
    assert parse(["-s", "/tmp/" + "x" * 102], Dialect.GODWIT).socket == "/tmp/" + "x" * 102
    # passt has default paths.
    assert parse(["--vhost-user"], Dialect.PASST).socket is None


def test_what_is_taken_over() -> None:
    """The socket, too, unless another is named; an inherited connection is another guest's."""
    options = parse(["--takeover", "/run/t"], Dialect.GODWIT)
    assert (options.socket, options.takeover, options.one_off) == (None, "/run/t", False)
    assert parse(["--takeover", "/run/t", *SOCKET], Dialect.GODWIT).socket is not None
    with pytest.raises(OptionError, match="--takeover and --fd exclude each other"):
        parse(["--takeover", "/run/t", "--fd", "3"], Dialect.GODWIT)
    with pytest.raises(OptionError, match="nothing can be taken over in stream mode"):
        parse(["--takeover", "/run/t"], Dialect.PASST)


def test_fd_implies_one_off() -> None:
    options = parse(["--fd", "3"], Dialect.GODWIT)
    assert (options.fd, options.one_off, options.socket) == (3, True, None)


def test_with_fd_a_group_needs_a_control_socket_of_its_own() -> None:
    with pytest.raises(OptionError, match="--ctl-group: there is no control socket"):
        parse(["--fd", "3", "--ctl-group", "kvm"], Dialect.GODWIT)
    assert parse(["--fd", "3", "--ctl-group", "kvm", "--ctl-path", "/run/c"], Dialect.GODWIT).ctl_group == "kvm"


def test_which_protocol_is_spoken() -> None:
    """passt speaks vhost-user only if it is told to; we do unless told otherwise."""
    assert parse(SOCKET, Dialect.PASST).stream
    assert not parse([*SOCKET, "--vhost-user"], Dialect.PASST).stream
    assert not parse(SOCKET, Dialect.GODWIT).stream
    assert parse([*SOCKET, "--stream"], Dialect.GODWIT).stream
    with pytest.raises(OptionError, match="--vhost-user and --stream exclude each other"):
        parse([*SOCKET, "--vhost-user", "--stream"], Dialect.PASST)


def test_the_mtu_of_stream_mode() -> None:
    """The largest unless told otherwise: there is no segmentation offload in it."""
    assert parse(SOCKET, Dialect.PASST).net.mtu == 65520
    assert parse([*SOCKET, "--mtu", "1500"], Dialect.PASST).net.mtu == 1500
    assert parse([*SOCKET, "--mtu", "0"], Dialect.PASST).net.mtu == 0
    assert parse(SOCKET, Dialect.GODWIT).net.mtu is None


def test_passts_defaults() -> None:
    options = parse([*SOCKET, "--vhost-user"], Dialect.PASST)
    assert (options.migrate_version, options.virtio_features) == (2, VirtioFeatures.PASST)
    options = parse([*SOCKET, "--vhost-user", "--virtio-features", "full"], Dialect.PASST)
    assert options.virtio_features is VirtioFeatures.FULL


FRONT_ENDS = {
    "libvirt": (
        "--vhost-user --one-off --socket /run/s --pid /run/p --mtu 1500 --interface eth0 --log-file /tmp/l"
        " --hostname h --fqdn h.example.org --address 192.0.2.2 --netmask 24 --address 2001:db8::2"
        " --gateway 192.0.2.1 --gateway fe80::1 --tcp-ports 192.0.2.2/22:2222 --tcp-ports %eth0/8000-9000,~8500"
        " --udp-ports 53 --mac-addr 52:54:00:00:00:01"
    ),
    "QEMU": "--vhost-user --quiet --pid /tmp/p --fd 3 --mtu 1500 --no-udp --tcp-ports 22",
    "KubeVirt": (
        "--vhost-user --one-off --socket /run/s --interface eth0 --log-file /tmp/l --tcp-ports all --udp-ports all"
    ),
}


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_what_front_ends_pass_is_taken(name: str) -> None:
    options = parse(FRONT_ENDS[name].split(), Dialect.PASST)
    assert options.one_off
    assert options.tcp_ports.ports > 0


@pytest.mark.parametrize(
    ("option", "dialect", "expected"),
    [
        ("--version", Dialect.GODWIT, r"godwit \d+\.\d+"),
        ("--version", Dialect.PASST, r"godwit-passt \d+\.\d+"),
        ("--help", Dialect.GODWIT, r"usage: godwit serve "),
    ],
)
def test_options_that_print(option: str, dialect: Dialect, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse([option], dialect)
    assert caught.value.code == 0
    assert re.match(expected, capsys.readouterr().out)


def test_the_helps_examples_of_forwards_are_understood(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"], Dialect.GODWIT)
    shown = capsys.readouterr().out.partition("\nSPEC, ")[2]
    specs = re.findall(r"^  (\S+)  ", shown, re.MULTILINE)
    assert len(specs) == 10
    for spec in specs:
        assert bool(parse([*SOCKET, "-t", spec], Dialect.GODWIT).tcp_ports) == (spec != "none")


def test_capabilities_are_json(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--print-capabilities"], Dialect.PASST)
    assert caught.value.code == 0
    assert json.loads(capsys.readouterr().out) == {"type": "net"}


def test_each_row_is_read_by_somebody() -> None:
    known = {*Options._fields, *NetOptions._fields}
    # Those that parse() spreads over fields for IPv4 and IPv6.
    known |= {name.rstrip("46") for name in known if name.endswith(("4", "6"))} | {"netmask", "family", "verbosity"}
    for row in TABLE:
        assert row.kind in (Kind.NOTHING, Kind.REFUSED, Kind.PASTA) or row.field in known, row.names


def test_names_are_unique() -> None:
    names = [name for row in TABLE for name in row.names]
    assert len(names) == len(set(names))
