# SPDX-License-Identifier: GPL-2.0-or-later
"""The server's settings: names, defaults and bounds; the same in TOML and on the command line."""

from dataclasses import dataclass
from math import ceil
from typing import Literal

from detour_tools import mproxy
from detour_tools.endpoint import Network, parse_endpoint
from detour_tools.errors import UserError
from detour_tools.nat.base import Relay, Terms
from detour_tools.server.policy import Rules

# What the kernel lets in of one client is far beyond what the server answers of it, in a second: no
# client that keeps to the rate meets it, whatever the network holds back and brings at once. Of one
# that is new it is a tenth at least (nat/base.py).
_LEAST_IN = 5000
_IN = 20

# What takes effect on a reload; the rest needs a restart.
RELOADABLE = ("relay", "router", "allow_client", "allow_remote", "deny_remote", "deny_port",
              "own_address", "forbid_port", "rate", "max_per_client", "max_mappings",
              "max_flows_per_client", "max_flows", "idle_timeout")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """``allow_client``: None is clients with private addresses, an empty tuple nobody.

    ``rate`` is requests a second of one client (0: no limit), ``idle_timeout`` seconds.

    ``relay``: what is translated, "joins" of MPTCP connections or any "tcp".

    ``router``: whether packets are forwarded that are no mapped flow's; "auto" is as it was before.

    ``max_flows_per_client`` and ``max_flows``: 0 is no limit; None is three quarters of what the
    kernel tracks at most.

    ``forbid_port`` and ``deny_port`` are ports and ranges of them, as ``8080`` and ``9000-9100``:
    detour ports that nobody gets, and ports of remotes that nobody reaches.
    """

    listen: str = f"0.0.0.0:{mproxy.PORT}"
    backend: Literal["auto", "nftables", "iptables"] = "auto"
    relay: Relay = "joins"
    router: Literal["auto", "yes", "no"] = "auto"
    allow_client: tuple[Network, ...] | None = None
    allow_remote: tuple[Network, ...] = ()
    deny_remote: tuple[Network, ...] = ()
    deny_port: tuple[str, ...] = ("25",)  # mail from server to server: what spam needs
    own_address: tuple[Network, ...] = ()
    forbid_port: tuple[str, ...] = ()
    rate: float = 100.0
    max_per_client: int = 4096
    max_mappings: int = 131072
    max_flows_per_client: int = 2000
    max_flows: int | None = None
    idle_timeout: float = 3600.0
    control_group: str | None = None

    def __post_init__(self) -> None:
        """Check the bounds; raises ValueError."""
        try:
            endpoint = parse_endpoint(self.listen, mproxy.PORT)
        except UserError as error:
            raise ValueError(f"listen: {error}") from None
        if endpoint.address.version != 4:
            raise ValueError("listen: MPROXY version 1 is IPv4 only")
        _port_ranges("forbid-port", self.forbid_port)
        _port_ranges("deny-port", self.deny_port)
        for name, value, least, most in (
                ("rate", self.rate, 0, 1e6),
                ("max-per-client", self.max_per_client, 1, 65535),
                ("max-mappings", self.max_mappings, 1, 10_000_000),
                ("max-flows-per-client", self.max_flows_per_client, 0, 10_000_000),
                ("max-flows", self.max_flows or 0, 0, 100_000_000),
                ("idle-timeout", self.idle_timeout, 1, 1e9)):
            if not least <= value <= most:
                raise ValueError(f"{name}: {value:g} is not from {least:g} to {most:g}")

    @property
    def rules(self) -> Rules:
        """The part that the policy applies."""
        return Rules(allow_clients=self.allow_client, allow_remotes=self.allow_remote,
                     deny_remotes=self.deny_remote, own_addresses=self.own_address,
                     deny_ports=_port_ranges("deny-port", self.deny_port),
                     forbid_ports=_port_ranges("forbid-port", self.forbid_port),
                     rate=self.rate, max_per_client=self.max_per_client,
                     max_mappings=self.max_mappings, idle_timeout=self.idle_timeout)

    def terms(self, *, router: bool) -> Terms:
        """The part that the kernel's rules apply; ``router``: whether the host was one before."""
        return Terms(relay=self.relay,
                     router={"yes": True, "no": False}.get(self.router, router),
                     flows_per_client=self.max_flows_per_client, flows=self.max_flows,
                     requests=parse_endpoint(self.listen, mproxy.PORT).port,
                     requests_per_client=max(_LEAST_IN, _IN * ceil(self.rate)) if self.rate else 0,
                     clients=self.rules.clients)


def _port_ranges(name: str, texts: tuple[str, ...]) -> tuple[range, ...]:
    return tuple(_port_range(name, text) for text in texts)


def _port_range(name: str, text: str) -> range:
    first, dash, last = text.partition("-")
    numbers = [int(each) if each.isascii() and each.isdigit() else 0
               for each in (first, last if dash else first)]
    if not 0 < numbers[0] <= numbers[1] < 65536:
        raise ValueError(f"{name}: '{text}' is not a port or range (write PORT or PORT-PORT, "
                         "of 1 to 65535)")
    return range(numbers[0], numbers[1] + 1)
