# SPDX-License-Identifier: GPL-2.0-or-later
"""What networks do to frames: loss, duplicates, other orders, congestion, links that flap, other MTUs.

Made on the ports of the laboratory's bridge, both to the server and to the hosts, with nftables and a token bucket,
which kernels have that have no netem. What is sent twice, or is overtaken, takes a detour over a narrow link::

    weather = Weather(network)
    weather.lose(20)
    ...
    weather.calm()
"""

from __future__ import annotations

from godwit.lab.netns import Network

_TABLE = "weather"
# Of the detour: what goes there is overtaken, unless it is alone. Of more than there is room for, the rest is lost.
_NARROW = "rate 4mbit burst 1600 latency 200ms"
DETOUR_MTU = 9000


class Weather:
    """The weather over a network. Numbers are frames of a thousand."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._space = network.bridge
        self._ports = ("p-server", *(f"p-{name}" for name in network.hosts))
        self._narrow: set[str] = set()
        self._mtu = network.mtu
        self._space.ip(
            *(
                line
                for port in self._ports
                for line in (
                    f"link add {self._detour(port)} mtu {DETOUR_MTU} type veth"
                    f" peer name {self._detour(port)}-end mtu {DETOUR_MTU}",
                    f"link set {self._detour(port)} up",
                    f"link set {self._detour(port)}-end up",
                )
            )
        )
        for port in self._ports:
            self._space.run("tc", "qdisc", "add", "dev", self._detour(port), "root", "tbf", *_NARROW.split())

    @staticmethod
    def _detour(port: str) -> str:
        return port.replace("p-", "d-")

    def _rules(self, *statements: str) -> None:
        """Have each frame to any of the ports, be it from the detour, go through these statements."""
        chains = []
        for number, port in enumerate(self._ports):
            detour = self._detour(port)
            lines = "\n".join(statement.format(detour=f'"{detour}"') for statement in statements)
            chains.append(f"chain out{number} {{ type filter hook egress device {port} priority 0;\n{lines}\n}}")
            chains.append(
                f'chain back{number} {{ type filter hook ingress device {detour}-end priority 0; fwd to "{port}"; }}'
            )
        self._nft(f"table netdev {_TABLE} {{", *chains, "}")

    def _nft(self, *lines: str) -> None:
        forget = (f"table netdev {_TABLE}", f"delete table netdev {_TABLE}")
        self._space.run("nft", "-f", "-", stdin="\n".join((*forget, *lines, "")))

    def lose(self, share: int) -> None:
        """Drop so many frames."""
        self._rules(f"numgen random mod 1000 < {share} drop")

    def duplicate(self, share: int) -> None:
        """Deliver so many frames twice."""
        self._rules(f"numgen random mod 1000 < {share} dup to {{detour}}")

    def reorder(self, share: int) -> None:
        """Have so many frames overtaken by others."""
        self._rules(f"numgen random mod 1000 < {share} fwd to {{detour}}")

    def corrupt(self, share: int) -> None:
        """Change a byte of so many TCP segments; on these links nobody computes a checksum that would tell."""
        # Behind 12 bytes of options, which Linux always sends: the byte of the data with the number 24.
        self._rules(f"meta l4proto tcp meta length > 300 numgen random mod 1000 < {share} @th,448,8 set 0x58")

    def narrow(self, megabits: int) -> None:
        """Have links carry so much, with a queue of a tenth of a second, and no more."""
        for port in self._ports:
            self._space.run(
                *("tc", "qdisc", "replace", "dev", port, "root", "tbf"),
                *("rate", f"{megabits}mbit", "burst", "64k", "latency", "100ms"),
            )
            self._narrow.add(port)

    def cut(self, name: str) -> None:
        """Take down the link of ``server`` or of a host at the bridge's end: there is no carrier at the other."""
        self._space.ip(f"link set p-{name} down")

    def mtu(self, mtu: int) -> None:
        """Have all links carry packets of so many bytes."""
        self._mtu = mtu
        self._space.ip(*(f"link set {port} mtu {mtu}" for port in self._ports))
        for host in (self._network.server, *self._network.hosts.values()):
            host.ip(f"link set eth0 mtu {mtu}")

    def calm(self) -> None:
        """Back to fine weather, whatever it was; of the MTU too."""
        self._nft()
        for port in self._narrow:
            self._space.run("tc", "qdisc", "del", "dev", port, "root")
        self._narrow.clear()
        if self._mtu != self._network.mtu:
            self.mtu(self._network.mtu)
        self._space.ip(*(f"link set {port} up" for port in self._ports))
        self._network.switch(self._network.connected)  # a port that comes up forwards
