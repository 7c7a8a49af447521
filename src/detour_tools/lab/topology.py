# SPDX-License-Identifier: GPL-2.0-or-later
"""The lab's network as data: hosts, links, routes. Pure: nothing here touches the kernel.

The reference network (two core routers, the direct link between them, the detour behind a
third router) is made by reference_topology().
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import (
    IPv4Interface,
    IPv4Network,
    IPv6Interface,
    IPv6Network,
    ip_address,
    ip_interface,
    ip_network,
)
from typing import Any, Final, Literal, get_args

from detour_tools.endpoint import IPAddress
from detour_tools.errors import UserError

Interface = IPv4Interface | IPv6Interface
Network = IPv4Network | IPv6Network
Config = Literal["core-limited", "symmetric"]

CONFIGS: Final[tuple[str, ...]] = get_args(Config)
MAX_DETOURS: Final = 16

_LINK_MBPS: Final = 10.0  # the reference's core links, and all links of "symmetric"
_DELAY_MS: Final = 5.0
_NO_OVERRIDES: Final[Mapping[str, float]] = {}


@dataclass(frozen=True)
class Host:
    """A host of the lab; one that ``forwards`` is a router."""

    name: str
    forwards: bool = False


@dataclass(frozen=True)
class End:
    """One end of a link: the host, and the address its interface has there."""

    host: str
    interface: Interface

    @property
    def address(self) -> IPAddress:
        """The address without its prefix length."""
        return self.interface.ip


@dataclass(frozen=True)
class Link:
    """A link between two hosts; rate, delay and loss hold each way, for each way alone.

    ``rate_mbps`` None is not shaped. The interface at either end has the link's name.
    """

    name: str
    a: End
    b: End
    rate_mbps: float | None
    delay_ms: float
    loss_percent: float = 0.0

    @property
    def ends(self) -> tuple[End, End]:
        """Both ends."""
        return self.a, self.b

    def end_of(self, host: str) -> End:
        """The end at ``host``."""
        return self.a if self.a.host == host else self.b

    def peer_of(self, host: str) -> End:
        """The end that is not at ``host``."""
        return self.b if self.a.host == host else self.a


@dataclass(frozen=True)
class Route:
    """A static route of ``host``."""

    host: str
    destination: Network
    gateway: IPAddress


@dataclass(frozen=True)
class Topology:
    """A whole network. ``title`` says in words what it is."""

    title: str
    hosts: tuple[Host, ...]
    links: tuple[Link, ...]
    routes: tuple[Route, ...]

    def host(self, name: str) -> Host:
        """The host called ``name``; raises UserError when there is none."""
        for host in self.hosts:
            if host.name == name:
                return host
        raise UserError(f"the lab has no host '{name}'",
                        "hosts: " + ", ".join(host.name for host in self.hosts), status=2)

    def link(self, name: str) -> Link:
        """The link called ``name``; raises UserError when there is none."""
        for link in self.links:
            if link.name == name:
                return link
        raise UserError(f"the lab has no link '{name}'",
                        "links: " + ", ".join(link.name for link in self.links), status=2)

    def links_of(self, host: str) -> list[Link]:
        """The links that end at ``host``."""
        return [link for link in self.links if host in (link.a.host, link.b.host)]

    def routes_of(self, host: str) -> list[Route]:
        """The static routes of ``host``."""
        return [route for route in self.routes if route.host == host]

    def address(self, host: str) -> IPAddress:
        """The address that ``host``'s name stands for: the one on its first link."""
        self.host(host)
        return self.links_of(host)[0].end_of(host).address

    def detours(self) -> list[str]:
        """The names of the detours, in order."""
        return [host.name for host in self.hosts if host.name.startswith("detour")]

    def path(self, source: str, destination: IPAddress) -> list[str]:
        """The links a packet from ``source`` to ``destination`` takes, by the routes.

        Longest prefix wins, as in the kernel. Raises ValueError when it would not arrive.
        """
        taken: list[str] = []
        here = source
        while len(taken) <= len(self.links):
            links = self.links_of(here)
            if any(link.end_of(here).address == destination for link in links):
                return taken
            if taken and not self.host(here).forwards:
                raise ValueError(f"{here} does not forward to {destination}")
            link = self._next_link(here, destination)
            taken.append(link.name)
            here = link.peer_of(here).host
        raise ValueError(f"routing loop from {source} to {destination}")

    def _next_link(self, host: str, destination: IPAddress) -> Link:
        """The link by which ``host`` sends to ``destination``."""
        candidates = [(link.end_of(host).interface.network, link.peer_of(host).address)
                      for link in self.links_of(host)]
        candidates += [(route.destination, route.gateway) for route in self.routes_of(host)]
        matching = [each for each in candidates if destination in each[0]]
        if not matching:
            raise ValueError(f"{host} has no route to {destination}")
        network, gateway = max(matching, key=lambda each: each[0].prefixlen)
        on_link = [link for link in self.links_of(host)
                   if destination in link.end_of(host).interface.network]
        if on_link and network == on_link[0].end_of(host).interface.network:
            if on_link[0].peer_of(host).address != destination:
                raise ValueError(f"nobody has {destination} on {on_link[0].name}")
            return on_link[0]
        for link in self.links_of(host):
            if link.peer_of(host).address == gateway:
                return link
        raise ValueError(f"{host} does not reach the gateway {gateway}")

    def to_json(self) -> dict[str, Any]:
        """This topology as plain data; from_json() reads it."""
        return {
            "title": self.title,
            "hosts": [dataclasses.asdict(host) for host in self.hosts],
            "links": [{
                "name": link.name,
                "ends": [{"host": end.host, "address": str(end.interface)} for end in link.ends],
                "rate_mbps": link.rate_mbps,
                "delay_ms": link.delay_ms,
                "loss_percent": link.loss_percent,
            } for link in self.links],
            "routes": [{"host": route.host, "destination": str(route.destination),
                        "gateway": str(route.gateway)} for route in self.routes],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Topology":
        """Read what to_json() gave; raises ValueError, KeyError or TypeError."""
        links = []
        for each in data["links"]:
            a, b = (End(end["host"], ip_interface(end["address"])) for end in each["ends"])
            links.append(Link(each["name"], a, b, each["rate_mbps"], each["delay_ms"],
                              each["loss_percent"]))
        return cls(
            data["title"],
            tuple(Host(each["name"], each["forwards"]) for each in data["hosts"]),
            tuple(links),
            tuple(Route(each["host"], ip_network(each["destination"]),
                        ip_address(each["gateway"])) for each in data["routes"]),
        )


@dataclass(frozen=True)
class _Branch:
    """A detour and the way to it: its own router, two core links and an access link."""

    detour: str
    router: str
    to_r1: int  # link numbers
    to_r2: int
    access: int


def _branches(detours: int) -> list[_Branch]:
    first = _Branch("detour", "r3", 4, 5, 6)
    return [first] + [
        _Branch(f"detour{n}", f"r{n + 2}", 3 * n + 1, 3 * n + 2, 3 * n + 3)
        for n in range(2, detours + 1)]


def _network(link: int) -> Network:
    """Link Ln is 10.0.n.0/24."""
    return ip_network(f"10.0.{link}.0/24")


def _address(link: int, number: int) -> IPAddress:
    return _network(link)[number]


def reference_topology(config: Config = "core-limited", l2_loss: float = 0.0,
                       l2_delay_ms: float = _DELAY_MS, detours: int = 1,
                       rates_mbps: Mapping[str, float] | None = _NO_OVERRIDES) -> Topology:
    """The reference network: client, r1, r2, server in a row; detour and r3 beside r1 and r2.

    ``l2_loss`` is in percent, of L2's packets each way. ``rates_mbps`` overrides rates by link
    name; None leaves every link unshaped and without delay (for tests and benchmarks).
    Detour number n > 1 is ``detour<n>`` behind its own router and core links, L7 to L9 and so
    on, so that each adds capacity. In core-limited the access links L1 and L3 carry the sum of
    all core paths: 20 Mbit/s with one detour as in the reference, 10 more for each further one.

    Raises UserError for values that make no network.
    """
    if config not in CONFIGS:
        raise UserError(f"there is no configuration '{config}'",
                        "configurations: " + ", ".join(CONFIGS), status=2)
    if not 1 <= detours <= MAX_DETOURS:
        raise UserError(f"{detours} detours", f"1 to {MAX_DETOURS} are possible", status=2)
    branches = _branches(detours)
    access = _LINK_MBPS * (1 + detours) if config == "core-limited" else _LINK_MBPS
    spur = 2 * _LINK_MBPS if config == "core-limited" else _LINK_MBPS
    # link number -> (host a, host b, rate)
    plan: dict[int, tuple[str, str, float]] = {
        1: ("client", "r1", access),
        2: ("r1", "r2", _LINK_MBPS),
        3: ("r2", "server", access),
    }
    for branch in branches:
        plan[branch.to_r1] = ("r1", branch.router, _LINK_MBPS)
        plan[branch.to_r2] = ("r2", branch.router, _LINK_MBPS)
        plan[branch.access] = (branch.router, branch.detour, spur)
    _check_overrides(rates_mbps or {}, {f"L{number}" for number in plan})
    links = []
    for number, (a, b, rate) in sorted(plan.items()):
        name = f"L{number}"
        prefix = _network(number).prefixlen
        delay = l2_delay_ms if number == 2 else _DELAY_MS
        links.append(Link(
            name,
            End(a, ip_interface(f"{_address(number, 1)}/{prefix}")),
            End(b, ip_interface(f"{_address(number, 2)}/{prefix}")),
            rate_mbps=None if rates_mbps is None else rates_mbps.get(name, rate),
            delay_ms=0.0 if rates_mbps is None else delay,
            loss_percent=l2_loss if number == 2 else 0.0,
        ))
    hosts = [Host("client"), Host("server"), *(Host(branch.detour) for branch in branches),
             Host("r1", True), Host("r2", True),
             *(Host(branch.router, True) for branch in branches)]
    notes = ["unshaped" if rates_mbps is None else config,
             "one detour" if detours == 1 else f"{detours} detours"]
    notes += [f"{name} {rate:g} Mbit/s" for name, rate in sorted((rates_mbps or {}).items())]
    notes += [f"L2 loses {l2_loss:g} %"] if l2_loss else []
    notes += [f"L2 delays {l2_delay_ms:g} ms"] if l2_delay_ms != _DELAY_MS else []
    return Topology("reference network: " + ", ".join(notes),
                    tuple(hosts), tuple(links), tuple(_routes(branches)))


def _check_overrides(rates: Mapping[str, float], known: set[str]) -> None:
    for name, rate in rates.items():
        if name not in known:
            links = sorted(known, key=lambda link: int(link[1:]))
            raise UserError(f"the lab has no link '{name}'", "links: " + ", ".join(links),
                            status=2)
        if not rate > 0:
            raise UserError(f"the rate of {name} must be above 0 Mbit/s", status=2)


def _routes(branches: list[_Branch]) -> list[Route]:
    """Client and server meet over L2; anything to or from a detour goes by its own router."""
    anywhere = ip_network("0.0.0.0/0")
    routes = [
        Route("client", anywhere, _address(1, 2)),
        Route("server", anywhere, _address(3, 1)),
        Route("r1", _network(3), _address(2, 2)),
        Route("r2", _network(1), _address(2, 1)),
    ]
    for branch in branches:
        by_r1, by_r2 = _address(branch.to_r1, 2), _address(branch.to_r2, 2)
        routes += [
            Route(branch.detour, anywhere, _address(branch.access, 1)),
            Route("r1", _network(branch.access), by_r1),
            Route("r1", _network(branch.to_r2), by_r1),
            Route("r2", _network(branch.access), by_r2),
            Route("r2", _network(branch.to_r1), by_r2),
            Route(branch.router, _network(3), _address(branch.to_r2, 1)),
            # client, r1, and the other detours
            Route(branch.router, anywhere, _address(branch.to_r1, 1)),
        ]
    return routes
