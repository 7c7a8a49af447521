# SPDX-License-Identifier: GPL-2.0-or-later
"""The detours as they were given: which are used, and of each other why not. Pure.

What is wrong with a text stays so. All else may change: names come to be known, and addresses move
from host to host. So these are tried again until they can be used, and are kept then.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, ip_address
from random import Random

from detour_tools import mproxy
from detour_tools.endpoint import Endpoint, IPAddress, split_host_port
from detour_tools.errors import UserError
from detour_tools.route import NO_ROUTE, Route

FIRST_PAUSE = 2.0
"""Seconds until a detour that cannot be used is tried again; doubles each time."""

LONGEST_PAUSE = 60.0

_THIS_NETWORK = IPv4Network("0.0.0.0/8")
_BROADCAST = IPv4Address("255.255.255.255")
_NUMBERS = re.compile(r"[\d.]+", re.ASCII)
_NAME = re.compile(rb"(?!-)[\w-]{1,63}(\.[\w-]{1,63})*\.?")


def read_host(text: str, default_port: int | None = None) -> tuple[IPv4Address | str, int]:
    """The IPv4 address, or else the name, and the port of ``HOST[:PORT]``.

    Raises UserError for what is neither. Version 1 of the protocol knows no IPv6, neither for
    detours nor for remotes.
    """
    host, port = split_host_port(text, default_port)
    try:
        address = ip_address(host)
    except ValueError:
        # '10.6' would be looked up as 10.0.0.6.
        if _NUMBERS.fullmatch(host) or not _is_name(host):
            raise UserError(f"{host!r} is neither an IPv4 address nor a name", "check the spelling",
                            status=2) from None
        return host, port
    if not isinstance(address, IPv4Address):
        raise UserError(f"{address} is an IPv6 address, which MPROXY does not carry",
                        "give the host's IPv4 address", status=2)
    if not can_be_host(address):
        raise UserError(f"{address} is not the address of a host",
                        "give the host's IPv4 address", status=2)
    return address, port


def _is_name(text: str) -> bool:
    try:
        return _NAME.fullmatch(text.encode("idna")) is not None
    except UnicodeError:
        return False


def can_be_host(address: IPv4Address) -> bool:
    """Whether packets to the address go to one host."""
    return not (address.is_multicast or address in _THIS_NETWORK or address == _BROADCAST)


def unfit(address: IPAddress, route: Route) -> UserError | None:
    """Why the host at an address cannot be a detour of ours; None when it can."""
    if route.local or address.is_loopback:
        return UserError(f"{address} is an address of this host itself", "a detour is another host")
    if route.broadcast:
        return UserError(f"{address} is a network's broadcast address", "give a host's")
    return None


def unanswered(name: str) -> UserError:
    """What to say of a name as long as nobody has said anything about it."""
    return UserError(f"no name server has an answer for '{name}'",
                     "see /etc/resolv.conf, or give the host's IPv4 address")


@dataclass(slots=True, eq=False)
class Given:
    """One detour of the list: ``endpoint`` when it is used, else ``problem`` says why it is not.

    ``host`` is empty when the text is wrong, so that it can never be used.
    """

    text: str
    order: int
    host: IPv4Address | str = ""
    port: int = 0
    endpoint: Endpoint | None = None
    problem: UserError | None = None
    failures: int = 0

    def pause(self, random: Random) -> float:
        """Seconds until it is worth another try."""
        doubled = FIRST_PAUSE * 2.0 ** min(max(self.failures - 1, 0), 16)
        return min(doubled, LONGEST_PAUSE) * random.uniform(0.9, 1.1)


class GivenDetours:
    """All of the list, each text once, in its order."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._all = [_read(text, order) for order, text in enumerate(dict.fromkeys(texts))]

    @property
    def hopeful(self) -> list[Given]:
        """Those that are used, or may be one day."""
        return [given for given in self._all if given.host]

    @property
    def wrong(self) -> list[str]:
        """Of each that can never be used why, and how to mend it."""
        return [f"detour {given.text!r} cannot be used: {given.problem}"
                for given in self._all if not given.host]

    def warnings(self) -> list[str]:
        """Of each that is not used now why, and how to mend it."""
        none = [] if any(given.endpoint for given in self._all) else [
            "no detour can be used yet, so connections get none"]
        return none + self.wrong + [
            f"detour {given.text!r} is not used yet: {given.problem}"
            for given in self.hopeful if given.endpoint is None]

    def found(self, given: Given, addresses: Iterable[tuple[IPv4Address, Route]]
              ) -> Endpoint | None:
        """Use the first of a detour's addresses that will do; None when none of them will."""
        for address, route in addresses:
            given.problem = unfit(address, route) or self._taken(address)
            if given.problem is None:
                given.endpoint = Endpoint(address, given.port)
                return given.endpoint
        given.failures += 1
        return None

    def not_found(self, given: Given, problem: UserError) -> None:
        """The name of a detour could not be looked up."""
        given.problem = problem
        given.failures += 1

    def _taken(self, address: IPv4Address) -> UserError | None:
        # A subflow's remote address is what tells whose it is.
        for other in self._all:
            if other.endpoint is not None and other.endpoint.address == address:
                return UserError(f"{other.endpoint} is used already, as detour {other.text!r}",
                                 "give each host once")
        return None


def _read(text: str, order: int) -> Given:
    try:
        host, port = read_host(text, mproxy.PORT)
        problem = unanswered(host) if isinstance(host, str) else unfit(host, NO_ROUTE)
    except UserError as error:
        return Given(text, order, problem=error)
    if problem is not None and not isinstance(host, str):
        return Given(text, order, problem=problem)
    return Given(text, order, host, port, problem=problem)
