# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon's options: one table, read by both commands that start it.

Names and meanings are passt's (passt(1)), since libvirt, QEMU and KubeVirt
pass those. An option of passt that godwit does not have stands in the table
too, so that it is refused by name, with the reason, and not as a misspelling;
so do pasta's, which mean nothing here. ``docs/passt-options.md`` compares them
all.

A row that is honoured names the field of `Options` or of its ``net`` that it
sets. `parse` does the rest: what spans several options, and where the two commands differ
(`Dialect`).
"""

from __future__ import annotations

import argparse
import enum
import ipaddress
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

from godwit import __version__
from godwit.daemon.errors import OptionError
from godwit.migration.errors import version_name
from godwit.net.config import (
    MAX_MTU,
    MIN_MTU4,
    NetConfigError,
    NetOptions,
    check_options,
    parse_mac,
    parse_prefix_len,
)
from godwit.net.forward import ForwardError, Forwards, parse_forwards
from godwit.net.native import NATIVE
from godwit.net.records import MAX_FLOWS
from godwit.net.versions import versions

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

LOG_SIZE_DEFAULT = 1 << 20
MAX_HALF_OPEN = 1024
LOG_SIZE_MIN = 4096
IFNAMSIZ = 16  # with its NUL
SUN_PATH_MAX = 107  # unix(7), less the final NUL


class Dialect(enum.Enum):
    """Which command's defaults hold."""

    GODWIT = "godwit serve"
    PASST = "godwit-passt"


class VirtioFeatures(enum.Enum):
    """The virtio features offered: all, or those that passt offers too."""

    FULL = "full"
    PASST = "passt"


class Options(NamedTuple):
    """What the command line says, checked. Paths are absolute.

    ``net`` is what the guest is told. ``repair_path``, ``takeover_path`` and ``ctl_path`` are None for the default
    beside the socket, and empty for none. ``socket`` is None for passt's
    default path, with ``PASST`` and without ``fd`` only.
    """

    dialect: Dialect = Dialect.GODWIT
    socket: str | None = None
    fd: int | None = None
    vhost_user: bool = False
    stream: bool = False  # frames over the socket itself, not vhost-user
    foreground: bool = False
    one_off: bool = False
    pid: str | None = None
    runas: str | None = None
    log_file: str | None = None
    log_size: int = LOG_SIZE_DEFAULT
    debug: bool = False
    trace: bool = False
    quiet: bool = False
    pcap: str | None = None
    stats: int = 0  # seconds between two reports at least; 0 for none
    repair_path: str | None = None
    takeover: str | None = None  # where the godwit listens whose guest this one is to go on with
    takeover_path: str | None = None
    ctl_path: str | None = None
    ctl_group: str | None = None  # its name or number: it may ask how things stand, too
    migrate_version: int = 2
    record: str | None = None
    migrate_exit: bool = False
    migrate_linger: bool = True
    virtio_features: VirtioFeatures = VirtioFeatures.FULL
    net: NetOptions = NetOptions()
    tcp_ports: Forwards = Forwards()
    udp_ports: Forwards = Forwards()
    freebind: bool = False
    busy_poll: int = 0  # microseconds before the data plane sleeps
    max_flows: int = MAX_FLOWS
    max_udp_flows: int | None = None  # None: half of ``max_flows``
    max_half_open: int = MAX_HALF_OPEN
    tcp: bool = True
    udp: bool = True
    icmp: bool = True
    sandbox: bool = True


# --- Values: each function takes an argument's text, or raises ArgumentTypeError.


def _wrong(message: str) -> NoReturn:
    raise argparse.ArgumentTypeError(message)


def _number(name: str, low: int, high: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
            _wrong(f"{text!r} is no {name}: a number from {low} to {high}")
        return int(text)

    return convert


def _checked(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser of `godwit.net`, with its reasons as argparse wants them."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except NetConfigError as error:
            _wrong(str(error))

    return convert


def _mtu(text: str) -> int:
    if text == "0":  # passt's way to say: announce none
        return 0
    if not text.isascii() or not text.isdigit() or not MIN_MTU4 <= int(text) <= MAX_MTU:
        _wrong(f"{text!r} is no MTU: a number from {MIN_MTU4} to {MAX_MTU}, or 0 to announce none")
    return int(text)


def _path(text: str) -> str:
    if not text:
        _wrong("the path is empty")
    # Where it is now: links that lead there are not in reach later.
    folder, name = os.path.split(os.path.abspath(text))
    return os.path.join(os.path.realpath(folder), name)


def _socket_path(text: str) -> str:
    path = _path(text)
    if len(os.fsencode(path)) > SUN_PATH_MAX:
        _wrong(f"{path!r} is longer than the {SUN_PATH_MAX} bytes that the address of a UNIX socket can have")
    return path


def _path_or_none(text: str) -> str:
    """A path; empty for the word that says: nowhere."""
    return "" if text == "none" else _socket_path(text)


def _address(text: str) -> Address:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        once = "; give the option once for each" if "," in text else ""
        _wrong(f"{text!r} is no IPv4 or IPv6 address{once}")


def _address_and_length(text: str) -> tuple[Address, int | None]:
    """An address, and the prefix length after a slash; a slash alone is an error."""
    address, slash, length = text.partition("/")
    parsed = _address(text if "," in text else address)  # of several, all are shown
    most = 32 if parsed.version == 4 else 128
    return parsed, _number(f"prefix length for IPv{parsed.version}", 1, most)(length) if slash else None


def _interface(text: str) -> str:
    if not 0 < len(os.fsencode(text)) < IFNAMSIZ or "/" in text or any(map(str.isspace, text)):
        _wrong(f"{text!r} is not the name of an interface")
    return text


def _address_or_none(text: str) -> Address | None:
    """An address; None for the word or the empty text that switches the option off."""
    return None if text in ("", "none") else _address(text)


def _words(text: str) -> tuple[str, ...] | None:
    """A list separated by spaces; None for the word or the empty text that switches the option off."""
    return None if text.strip() in ("", "none") else tuple(text.split())


def _choice(kind: type[enum.Enum]) -> Callable[[str], Any]:
    def convert(text: str) -> enum.Enum:
        try:
            return kind(text)
        except ValueError:
            _wrong(f"{text!r} is none of {', '.join(str(member.value) for member in kind)}")

    return convert


def _migrate_version(text: str) -> int:
    """A number, or the word for the newest of our own."""
    known = {version.id: version for version in versions()}
    try:
        number = NATIVE if text == "native" else int(text, 0)
    except ValueError:
        number = 0
    if number not in known:
        names = ", ".join(version_name(one.id) for one in known.values() if not one.withdrawn)
        _wrong(f"{text!r} is no version of the device state that can be written: native, {names}")
    if known[number].withdrawn:
        _wrong(f"version {number} was withdrawn by passt: {known[number].withdrawn}; write 2, or native")
    return number


# --- The table.


class Kind(enum.Enum):
    """What a row does with its argument."""

    ON = enum.auto()  # no argument, sets the field
    OFF = enum.auto()  # no argument, clears the field
    SET = enum.auto()  # no argument, sets the field to ``const``; of several such rows the last one given counts
    VALUE = enum.auto()  # the last one given counts
    LIST = enum.auto()  # each one given is added
    NOTHING = enum.auto()  # passt's, accepted, and there is nothing to do
    REFUSED = enum.auto()  # passt's, not to be had here: refused by name, with the reason in ``help``
    PASTA = enum.auto()  # pasta's, means nothing for a guest: refused by name


class Row(NamedTuple):
    """One option: its names, and what becomes of it."""

    names: tuple[str, ...]
    kind: Kind
    field: str = ""
    metavar: str = ""
    convert: Callable[[str], Any] = str
    help: str = ""
    const: object = None


def _pastas(names: str) -> list[Row]:
    """Rows for options of pasta's; ``NAME=`` takes an argument."""
    rows = []
    for group in names.split():
        metavar = "ARG" if group.endswith("=") else ""
        reason = "an option of pasta, it means nothing for a guest"
        rows.append(Row(tuple(group.rstrip("=").split("|")), Kind.PASTA, metavar=metavar, help=reason))
    return rows


TABLE: tuple[Row, ...] = (
    Row(
        ("-s", "--socket", "--socket-path"),
        Kind.VALUE,
        "socket",
        "PATH",
        _socket_path,
        "listen here for a front-end (/tmp/passt_1.socket, or the next free one, for godwit-passt)",
    ),
    Row(("-F", "--fd"), Kind.VALUE, "fd", "N", _number("descriptor", 0, 1 << 20), "use this connected socket instead"),
    Row(("--vhost-user",), Kind.ON, "vhost_user", help="speak vhost-user (the default of godwit serve)"),
    Row(
        ("--stream",),
        Kind.ON,
        "stream",
        help="carry frames over the socket itself, as QEMU's -netdev stream does, with no migration"
        " (the default of godwit-passt)",
    ),
    Row(("-f", "--foreground"), Kind.ON, "foreground", help="stay in the foreground, log to stderr"),
    Row(("-1", "--one-off"), Kind.ON, "one_off", help="end when the front-end disconnects"),
    Row(("-P", "--pid"), Kind.VALUE, "pid", "PATH", _path, "write the process id to this file"),
    Row(("--runas",), Kind.VALUE, "runas", "USER[:GROUP]", str, "run as this user (as root, nobody by default)"),
    Row(("-l", "--log-file"), Kind.VALUE, "log_file", "PATH", _path, "log to this file, not to syslog"),
    Row(
        ("--log-size",),
        Kind.VALUE,
        "log_size",
        "BYTES",
        _number("size of a log", LOG_SIZE_MIN, 1 << 40),
        f"limit of the log file's size ({LOG_SIZE_DEFAULT})",
    ),
    Row(("-d", "--debug"), Kind.SET, "verbosity", help="log more", const="debug"),
    Row(("--trace",), Kind.SET, "verbosity", help="log even more", const="trace"),
    Row(("-q", "--quiet"), Kind.SET, "verbosity", help="log warnings and errors only", const="quiet"),
    Row(("-p", "--pcap"), Kind.VALUE, "pcap", "FILE", _path, "write the guest's frames to this file, in pcap format"),
    Row(
        ("--stats",),
        Kind.VALUE,
        "stats",
        "SECONDS",
        _number("time in seconds", 0, 1 << 30),
        "log what the data plane has done, so often at most; 0 for never",
    ),
    Row(
        ("--repair-path",),
        Kind.VALUE,
        "repair_path",
        "PATH",
        _path_or_none,
        "the repair helper's socket (the front-end's with .repair behind it), or none",
    ),
    Row(
        ("--takeover",),
        Kind.VALUE,
        "takeover",
        "PATH",
        _path,
        "go on with the guest of the godwit that listens there, which ends; without --socket, at the same path",
    ),
    Row(
        ("--takeover-path",),
        Kind.VALUE,
        "takeover_path",
        "PATH",
        _path_or_none,
        "where the next godwit may take over (the front-end's with .takeover behind it), or none",
    ),
    Row(
        ("--ctl-path",),
        Kind.VALUE,
        "ctl_path",
        "PATH",
        _path_or_none,
        "where godwit ctl asks how things stand (the front-end's with .ctl behind it), or none",
    ),
    Row(
        ("--ctl-group",),
        Kind.VALUE,
        "ctl_group",
        "GROUP",
        str,
        "let this group ask, too (by default the user that the daemon runs as, alone)",
    ),
    Row(
        ("--migrate-version",),
        Kind.VALUE,
        "migrate_version",
        "2|native|N",
        _migrate_version,
        "device state to write: 2, as passt reads it too (the default), or godwit's own",
    ),
    Row(
        ("--record",),
        Kind.VALUE,
        "record",
        "PATH",
        _path,
        "keep each device state that is saved or loaded, in PATH.N.saved or PATH.N.loaded (godwit inspect shows them)",
    ),
    Row(("--migrate-exit",), Kind.ON, "migrate_exit", help="end when the guest has moved away"),
    Row(
        ("--migrate-no-linger",),
        Kind.OFF,
        "migrate_linger",
        help="when the guest has moved away, close the sockets of its connections at once",
    ),
    Row(
        ("--virtio-features",),
        Kind.VALUE,
        "virtio_features",
        "full|passt",
        _choice(VirtioFeatures),
        "offer all features (the default of godwit serve), or only what passt has too, for guests that move to passt"
        " (the default of godwit-passt)",
    ),
    Row(
        ("-m", "--mtu"),
        Kind.VALUE,
        "mtu",
        "BYTES",
        _mtu,
        "announce this MTU to the guest (the host's interface's, 65520 in stream mode); 0 for none",
    ),
    Row(("-i", "--interface"), Kind.VALUE, "interface", "NAME", _interface, "take addresses and routes from here"),
    Row(("-o", "--outbound"), Kind.LIST, "outbound", "ADDR", _address, "the source of what leaves the host"),
    Row(("--outbound-if4",), Kind.VALUE, "outbound_if4", "NAME", _interface, "IPv4 leaves the host through here"),
    Row(("--outbound-if6",), Kind.VALUE, "outbound_if6", "NAME", _interface, "IPv6 leaves the host through here"),
    Row(("-a", "--address"), Kind.LIST, "address", "ADDR[/LEN]", _address_and_length, "an address of the guest"),
    Row(("-n", "--netmask"), Kind.VALUE, "netmask", "MASK", _checked(parse_prefix_len), "the IPv4 address's mask"),
    Row(("-g", "--gateway"), Kind.LIST, "gateway", "ADDR", _address, "the guest's default gateway"),
    Row(("-M", "--mac-addr"), Kind.VALUE, "mac", "MAC", _checked(parse_mac), "our own MAC address towards the guest"),
    Row(("-D", "--dns"), Kind.LIST, "dns", "ADDR", _address_or_none, "a resolver to announce; none for none"),
    Row(("-S", "--search"), Kind.LIST, "search", "DOMAINS", _words, "a search list to announce; none for none"),
    Row(("-H", "--hostname"), Kind.VALUE, "hostname", "NAME", str, "the guest's host name"),
    Row(("--fqdn",), Kind.VALUE, "fqdn", "NAME", str, "the guest's full domain name"),
    Row(("-t", "--tcp-ports"), Kind.LIST, "tcp_ports", "SPEC", str, "forward TCP ports to the guest: see below"),
    Row(("-u", "--udp-ports"), Kind.LIST, "udp_ports", "SPEC", str, "forward UDP ports, in the same way"),
    Row(
        ("--freebind",),
        Kind.ON,
        "freebind",
        help="listen also on addresses that the host does not have (yet); connections that move in wait for theirs",
    ),
    Row(
        ("--busy-poll",),
        Kind.VALUE,
        "busy_poll",
        "MICROSECONDS",
        _number("time in microseconds", 0, 10_000),
        "look for work so long before sleeping, which takes a processor's time for shorter ways (0)",
    ),
    Row(
        ("--max-flows",),
        Kind.VALUE,
        "max_flows",
        "N",
        _number("number of flows", 1, MAX_FLOWS),
        f"connections, UDP flows and pings that may be open at a time ({MAX_FLOWS}); what moves in may be more",
    ),
    Row(
        ("--max-udp-flows",),
        Kind.VALUE,
        "max_udp_flows",
        "N",
        _number("number of flows", 1, MAX_FLOWS),
        "of these, UDP flows and pings (half); beyond, those that are idle make room",
    ),
    Row(
        ("--max-half-open",),
        Kind.VALUE,
        "max_half_open",
        "N",
        _number("number of connections", 1, MAX_FLOWS),
        f"of the guest's connections, those that were not answered yet ({MAX_HALF_OPEN}); beyond, the oldest make room",
    ),
    Row(("--no-map-gw",), Kind.OFF, "map_gw", help="do not map the gateway's address to the host's loopback"),
    Row(
        ("--map-host-loopback",),
        Kind.LIST,
        "map_host",
        "ADDR",
        _address_or_none,
        "map this address to the host's loopback; none for none",
    ),
    Row(("--map-guest-addr",), Kind.LIST, "map_guest", "ADDR", _address_or_none, "map this address to the host's own"),
    Row(("--dns-forward",), Kind.LIST, "dns_forward", "ADDR", _address, "map this address to the host's resolver"),
    Row(("--dns-host",), Kind.LIST, "dns_host", "ADDR", _address, "the host's resolver"),
    Row(("-4", "--ipv4-only"), Kind.SET, "family", help="no IPv6", const=4),
    Row(("-6", "--ipv6-only"), Kind.SET, "family", help="no IPv4", const=6),
    Row(("--no-tcp",), Kind.OFF, "tcp", help="no TCP"),
    Row(("--no-udp",), Kind.OFF, "udp", help="no UDP"),
    Row(("--no-icmp",), Kind.OFF, "icmp", help="no ICMP and ICMPv6, NDP included"),
    Row(("--no-sandbox",), Kind.OFF, "sandbox", help="give up neither files nor system calls, for debugging"),
    Row(("--no-dhcp",), Kind.OFF, "dhcp", help="no DHCP server"),
    Row(("--no-dhcpv6",), Kind.OFF, "dhcpv6", help="no DHCPv6 server"),
    Row(("--no-ndp",), Kind.OFF, "ndp", help="no NDP"),
    Row(("--no-ra",), Kind.OFF, "ra", help="no router advertisements"),
    Row(("--no-dhcp-dns",), Kind.OFF, "tell_dns", help="announce no resolvers"),
    Row(("--no-dhcp-search",), Kind.OFF, "tell_search", help="announce no search list"),
    Row(("-e", "--stderr"), Kind.NOTHING),  # without effect in passt, too
    Row(("--chroot-fallback",), Kind.NOTHING),  # how passt hides the file system from itself
    Row(
        ("-c", "--conf-path"),
        Kind.REFUSED,
        metavar="PATH",
        help="there is no socket for pesto(1), which is experimental: give the forwards at the start, with -t and -u",
    ),
    *_pastas(
        "-I|--ns-ifname= -T|--tcp-ns= -U|--udp-ns= --userns= --netns= --netns-only --no-netns-quit --no-pidns"
        " --config-net --no-copy-routes --no-copy-addrs --ns-mac-addr= --no-splice --splice-only --host-lo-to-ns-lo"
        " --dhcp-dns --dhcp-search"
    ),
)


class _Refuse(argparse.Action):
    """Refuses its option with the reason that ``const`` gives."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> NoReturn:
        parser.error(f"{option_string}: {self.const}")


class _Parser(argparse.ArgumentParser):
    """Errors are one plain line: front-ends show it to the user as the reason.

    argparse makes a formatter for each option, and by default each looks how wide the terminal is: help alone needs it.
    """

    def format_help(self) -> str:
        self.formatter_class = argparse.RawDescriptionHelpFormatter
        return super().format_help()

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        # It takes "--" out of what an option is given, too: -u--, --mtu=--.
        if action.option_strings and arg_strings == ["--"]:
            self.error(f"argument {'/'.join(action.option_strings)}: '--' is no value")
        return super()._get_values(action, arg_strings)

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments"):
            message += f" ({self.prog} --help lists what there is)"
        elif "ignored explicit argument" in message:
            message = f"{message.partition(': ')[0]}: it takes no value"
        raise OptionError(message)


def _add(parser: argparse.ArgumentParser, row: Row) -> None:
    match row.kind:
        case Kind.ON:
            parser.add_argument(*row.names, dest=row.field, action="store_true", help=row.help)
        case Kind.OFF:
            parser.add_argument(*row.names, dest=row.field, action="store_false", help=row.help)
        case Kind.SET:
            parser.add_argument(*row.names, dest=row.field, action="store_const", const=row.const, help=row.help)
        case Kind.VALUE | Kind.LIST:
            action = "append" if row.kind is Kind.LIST else "store"
            parser.add_argument(
                *row.names, dest=row.field, action=action, type=row.convert, metavar=row.metavar, help=row.help
            )
        case Kind.NOTHING:
            parser.add_argument(*row.names, action="store_true", dest=argparse.SUPPRESS, help=argparse.SUPPRESS)
        case Kind.REFUSED | Kind.PASTA:
            parser.add_argument(
                *row.names,
                action=_Refuse,
                const=row.help,
                nargs=1 if row.metavar else 0,
                dest=argparse.SUPPRESS,
                help=argparse.SUPPRESS,
            )


_SPECS = """\
SPEC, which may be given more than once:
  2222:22             port 2222 of the host to port 22 of the guest
  127.0.0.1/2222:22   the same, listening on this address of the host alone
  %eth0/2222:22       or on this interface
  8000-8010           these ports, each to the same in the guest
  8000-8010:80-90     or to others
  80,443,8000-8010    several at once
  80:192.0.2.5/8080   to another address in the guest's network
  all                 all ports that are free, but those that the host itself
                      opens connections from (net.ipv4.ip_local_port_range)
  all,~22,~6000-6063  and but these
  none                no ports
"""


def parser(dialect: Dialect) -> argparse.ArgumentParser:
    """The parser that the table makes; ``--version`` and ``--print-capabilities`` end the process with status 0."""
    made = _Parser(
        prog=dialect.value,
        description="A guest's network, over vhost-user or, as frames, over a stream socket.",
        epilog=_SPECS,
        formatter_class=partial(argparse.HelpFormatter, width=80),
    )
    for row in TABLE:
        _add(made, row)
    made.add_argument("--version", action="version", version=f"{dialect.value.split()[0]} {__version__}")
    # The conventions for back-end programs in QEMU's docs/interop/vhost-user.
    made.add_argument(
        "--print-capabilities",
        action="version",
        version='{"type": "net"}',
        help="print the back-end program's type as JSON, and end",
    )
    return made


def _since_none(given: Sequence[Any]) -> list[Any]:
    """What was given after the last None, the word that takes back all before it."""
    last = max((at for at, one in enumerate(given) if one is None), default=-1)
    return list(given[last + 1 :])


_MAPPED = ("map_host", "map_guest", "dns_forward", "dns_host")


def _net(given: dict[str, Any]) -> NetOptions:
    """The options that `godwit.net` reads. Of several addresses of a family the last one counts, as with passt."""
    values: dict[str, Any] = {name: given[name] for name in NetOptions._fields if given.get(name) is not None}
    if not given["icmp"]:
        values["ndp"] = False  # as passt(1) has it
    if given["family"] is not None:
        values["ipv6" if given["family"] == 4 else "ipv4"] = False
    if "dns" in values:
        values["dns"] = tuple(_since_none(values["dns"]))
    if "search" in values:
        values["search"] = tuple(name for names in _since_none(values["search"]) for name in names)
    pairs = given["address"] or []
    for address, length in pairs:
        values[f"prefix_len{address.version}"] = length
    lists = {name: given[name] or [] for name in ("gateway", "outbound", *_MAPPED)}
    lists["address"] = [address for address, _ in pairs]
    if None in lists["map_host"]:
        values["map_gw"] = False
    for name, addresses in lists.items():
        option = {"map_host": "--map-host-loopback", "map_guest": "--map-guest-addr"}.get(name, f"--{name}")
        for address in _since_none(addresses):
            if not values.get(f"ipv{address.version}", True):
                raise OptionError(
                    f"{option.replace('_', '-')}: {address} is given, but IPv{address.version} is switched off"
                )
            values[f"{name}{address.version}"] = address
    if given["netmask"] is not None:
        if not 1 <= given["netmask"] <= 32:
            raise OptionError(f"--netmask: {given['netmask']} is out of range for IPv4: 1 to 32")
        if (values.get("prefix_len4") or given["netmask"]) != given["netmask"]:
            raise OptionError(
                f"--netmask is {given['netmask']} and --address says {values['prefix_len4']}: leave out one"
            )
        values["prefix_len4"] = given["netmask"]
    return NetOptions(**values)


def _cross_check(options: Options) -> None:
    """What spans several options."""
    if options.vhost_user and options.stream:
        raise OptionError("--vhost-user and --stream exclude each other")
    if options.socket and options.fd is not None:
        raise OptionError("--socket and --fd exclude each other")
    if options.takeover and options.fd is not None:
        raise OptionError("--takeover and --fd exclude each other: the connection is taken over, too")
    if options.takeover and options.stream:
        raise OptionError("--takeover: nothing can be taken over in stream mode, start with --vhost-user")
    if options.dialect is Dialect.GODWIT and not options.socket and options.fd is None and not options.takeover:
        raise OptionError("one of --socket PATH, --fd N and --takeover PATH is needed")
    if options.ctl_group is not None and not options.ctl_path and (options.ctl_path == "" or options.fd is not None):
        raise OptionError("--ctl-group: there is no control socket that the group could use; name one with --ctl-path")
    for protocol, on in (("tcp", options.tcp), ("udp", options.udp)):
        if not on and getattr(options, f"{protocol}_ports"):
            raise OptionError(f"--{protocol}-ports and --no-{protocol} exclude each other")
    names = {"--log-file": options.log_file, "--pid": options.pid, "--pcap": options.pcap, "--socket": options.socket}
    names["--ctl-path"] = options.ctl_path or None
    owners: dict[str, str] = {}
    for option, path in names.items():
        if path is not None and owners.setdefault(path, option) != option:
            raise OptionError(f"{owners[path]} and {option} name the same file")


def parse(argv: Sequence[str], dialect: Dialect) -> Options:
    """Read a command line.

    Raises `OptionError` with one line for the user. ``--help``, ``--version``
    and ``--print-capabilities`` print and raise SystemExit(0), as argparse does.
    """
    given = vars(parser(dialect).parse_args(list(argv)))
    values: dict[str, Any] = {name: given[name] for name in Options._fields if given.get(name) is not None}
    for name in ("tcp_ports", "udp_ports"):
        try:
            values[name] = parse_forwards(values.get(name, ()))
        except ForwardError as error:
            raise OptionError(f"argument -{name[0]}/--{name.replace('_', '-')}: {error}") from error
    if dialect is Dialect.PASST:
        # Its guests must be able to move to passt.
        values.setdefault("virtio_features", VirtioFeatures.PASST)
        values["stream"] |= not values["vhost_user"]
    values["one_off"] |= "fd" in values
    if given["verbosity"] is not None:
        values[given["verbosity"]] = True
    net = _net(given)
    if values["stream"] and net.mtu is None:
        # Each frame goes through the socket by itself: the fewer, the faster. That is passt's default, too.
        net = net._replace(mtu=MAX_MTU)
    try:
        check_options(net)
    except NetConfigError as error:
        raise OptionError(str(error)) from error
    options = Options(dialect=dialect, net=net, **values)
    _cross_check(options)
    return options
