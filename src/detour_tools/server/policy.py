# SPDX-License-Identifier: GPL-2.0-or-later
"""Who may ask, how often, how much, and where to; pure.

A detour is not an open relay: unless told otherwise it serves private addresses only, and
relays to public ones only. Nothing in a datagram proves its source, so that nothing here keeps
state without bound for a source.
"""

import enum
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_network
from itertools import chain

from detour_tools.endpoint import Endpoint, IPAddress, Network
from detour_tools.mapping import Mapping
from detour_tools.route import Route

_BUCKETS = 65536
# Requests that the rate refused are remembered, for some retransmissions of a client: this many
# in all, of this age in seconds. Those let through for it are a share of the rate, and above it.
# In a flood at full speed (some 90,000 a second) they are kept for longer than a client waits.
_REFUSED = 65536
_SOONEST_AGAIN = 0.1
_LATEST_AGAIN = 3.0
_SECOND_SHARE = 0.25
# Above this share of max_mappings mappings expire sooner, so that a flood of them from many
# sources does not keep good clients out for an idle time-out.
_CROWDED = 0.9
_CROWDED_SECONDS = 60.0
# Longer than any client takes from an answer to its first packet.
_UNPROVEN_SECONDS = 120.0


class Refusal(enum.Enum):
    """Why a request was refused."""

    CLIENT = "the client is not allowed (see --allow-client)"
    RATE = "the client asks too often (see --rate)"
    PORT = "the remote port is 0"
    UNSPECIFIED = "the remote is unspecified"
    LOOPBACK = "the remote is loopback"
    LINK_LOCAL = "the remote is link-local"
    MULTICAST = "the remote is multicast"
    BROADCAST = "the remote is broadcast"
    RESERVED = "the remote is reserved"
    DETOUR = "the remote is the detour itself"
    PRIVATE = "the remote is private (see --allow-remote)"
    ON_LINK = "the remote is on a link of the detour (see --allow-remote)"
    PLATFORM = "the remote is a service of a cloud's host (see --allow-remote)"
    DENIED = "the remote is denied (see --deny-remote)"
    DENIED_PORT = "the remote port is denied (see --deny-port)"
    CLIENT_FULL = "the client has too many mappings (see --max-per-client)"
    FULL = "there are too many mappings (see --max-mappings)"
    NO_PORT = "no port is free for the client"

    @property
    def key(self) -> str:
        """Its name in statistics."""
        return self.name.lower().replace("_", "-")


# RFC 1918, RFC 4193
_PRIVATE = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")
# Also what the IANA special-purpose registries call not globally reachable and in private use:
# shared (RFC 6598), protocol assignments (RFC 6890), benchmarking (RFC 2544).
_PRIVATE_REMOTES = (*_PRIVATE, "100.64.0.0/10", "192.0.0.0/24", "198.18.0.0/15")
# A public address that each virtual machine of Azure reaches its host's services by; the other
# clouds' are link-local or private.
_PLATFORM = ("168.63.129.16/32",)
# The first that matches names the reason.
_NEVER = (
    (Refusal.UNSPECIFIED, ("0.0.0.0/32", "::/128")),
    (Refusal.LOOPBACK, ("127.0.0.0/8", "::1/128")),
    (Refusal.LINK_LOCAL, ("169.254.0.0/16", "fe80::/10")),
    (Refusal.MULTICAST, ("224.0.0.0/4", "ff00::/8")),
    (Refusal.BROADCAST, ("255.255.255.255/32",)),
    (Refusal.RESERVED, ("0.0.0.0/8", "240.0.0.0/4")),
)


@dataclass(frozen=True, slots=True)
class HostAddresses:
    """The detour's own addresses, and the networks on its links."""

    own: frozenset[IPAddress]
    on_link: "NetworkSet"


class NetworkSet:
    """Networks, to ask whether an address is in one of them.

    As ranges in their order: ``address in network`` costs a microsecond each, on every request,
    and for every mapping after a reload.
    """

    def __init__(self, networks: Iterable[Network]) -> None:
        self._ranges: dict[int, tuple[list[int], list[int]]] = {4: ([], []), 6: ([], [])}
        for network in sorted(networks, key=lambda each: (each.version, int(each[0]))):
            firsts, lasts = self._ranges[network.version]
            first, last = int(network[0]), int(network[-1])
            if lasts and first <= lasts[-1]:  # networks are apart, or one is within the other
                lasts[-1] = max(lasts[-1], last)
            else:
                firsts.append(first)
                lasts.append(last)

    def __contains__(self, address: IPAddress) -> bool:
        number = int(address)
        firsts, lasts = self._ranges[address.version]
        place = bisect_right(firsts, number)
        return place > 0 and number <= lasts[place - 1]


def _networks(texts: Iterable[str]) -> NetworkSet:
    return NetworkSet(ip_network(text) for text in texts)


_PRIVATE_NETWORKS = tuple(ip_network(text) for text in _PRIVATE)
_PRIVATE_REMOTE_SET = _networks(_PRIVATE_REMOTES)
_PLATFORM_SET = _networks(_PLATFORM)
_NEVER_SETS = [(refusal, _networks(texts)) for refusal, texts in _NEVER]
_NEVER_SET = _networks(text for _, texts in _NEVER for text in texts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What the administrator decides. ``rate`` is requests a second of one client, 0 is no limit;
    ``idle_timeout`` is in seconds.

    With ``allow_clients`` None, clients are those with private addresses. ``own_addresses`` are
    translated to this host by somebody before it.
    """

    allow_clients: tuple[Network, ...] | None = None
    allow_remotes: tuple[Network, ...] = ()
    deny_remotes: tuple[Network, ...] = ()
    deny_ports: tuple[range, ...] = ()
    own_addresses: tuple[Network, ...] = ()
    forbid_ports: tuple[range, ...] = ()
    rate: float = 0.0
    max_per_client: int
    max_mappings: int
    idle_timeout: float

    @property
    def clients(self) -> tuple[Network, ...]:
        """Who may ask."""
        return _PRIVATE_NETWORKS if self.allow_clients is None else self.allow_clients


class RateLimiter:
    """A token bucket a client, holding one second's worth of requests (at least one).

    Only so many buckets are kept; the one longest unused goes first, which for a client that
    keeps to the rate makes no difference.
    """

    def __init__(self, rate: float, buckets: int = _BUCKETS) -> None:
        self._rate = rate
        self._capacity = max(1.0, rate)
        self._limit = buckets
        # By the address as a number: to hash an address costs a third of a microsecond.
        self._buckets: OrderedDict[int, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def allows(self, client: IPAddress, now: float) -> bool:
        """Whether the client may ask at ``now`` (seconds)."""
        if not self._rate:
            return True
        key = int(client)
        tokens, since = self._buckets.get(key, (self._capacity, now))
        tokens = min(self._capacity, tokens + (now - since) * self._rate)
        allowed = tokens >= 1.0
        self._buckets[key] = (tokens - 1.0 if allowed else tokens, now)
        self._buckets.move_to_end(key)
        if len(self._buckets) > self._limit:
            self._buckets.popitem(last=False)
        return allowed


class SecondAttempts:
    """Lets a request through that the rate refused before, when it comes again soon.

    Who forges a client's requests asks for another remote each time, or has to ask twice; a
    client that was refused asks for the same one again. ``rate`` is that of the client.
    """

    def __init__(self, rate: float, most: int = _REFUSED) -> None:
        self._limiter = RateLimiter(rate * _SECOND_SHARE)
        self._most = most
        self._refused: OrderedDict[tuple[int, int, int], float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._refused)

    def allows(self, client: IPAddress, remote: Endpoint, now: float) -> bool:
        """Whether the request, which the rate refuses at ``now``, may pass all the same."""
        key = int(client), int(remote.address), remote.port
        since = self._refused.pop(key, None)
        age = 0.0 if since is None else now - since
        if _SOONEST_AGAIN <= age <= _LATEST_AGAIN and self._limiter.allows(client, now):
            return True
        self._refused[key] = now if since is None or age > _LATEST_AGAIN else since
        if len(self._refused) > self._most:
            self._refused.popitem(last=False)
        return False


class Policy:
    """Applies the rules, and counts what they refuse."""

    def __init__(self, rules: Rules) -> None:
        self.refused: Counter[Refusal] = Counter()
        self.set_rules(rules)

    def set_rules(self, rules: Rules) -> None:
        """Go by other rules from now on."""
        self.rules = rules
        self._clients = NetworkSet(rules.clients)
        self._remotes = NetworkSet(rules.allow_remotes)
        self._denied = NetworkSet(rules.deny_remotes)
        self._own = NetworkSet(rules.own_addresses)
        # Most remotes are in none of these networks, which one look tells.
        self._particular = NetworkSet((
            *rules.own_addresses, *rules.deny_remotes,
            *(ip_network(text) for text in (*_PRIVATE_REMOTES, *_PLATFORM)),
            *(ip_network(text) for _, texts in _NEVER for text in texts)))
        self._denied_ports = frozenset(chain.from_iterable(rules.deny_ports))
        self._forbidden_ports = frozenset(chain.from_iterable(rules.forbid_ports))
        self._limiter = RateLimiter(rules.rate)
        self._second_attempts = SecondAttempts(rules.rate)

    def count(self, refusal: Refusal) -> Refusal:
        """Note a refusal that was decided elsewhere."""
        self.refused[refusal] += 1
        return refusal

    def check_client(self, client: IPAddress, remote: Endpoint, now: float) -> Refusal | None:
        """Whether the client may ask at all, and now; ``remote`` tells a second attempt."""
        if client not in self._clients:
            return self.count(Refusal.CLIENT)
        if not self._limiter.allows(client, now) and not self._second_attempts.allows(
                client, remote, now):
            return self.count(Refusal.RATE)
        return None

    def check_remote(self, remote: Endpoint, route: Route) -> Refusal | None:
        """Whether a mapping to the remote may be made; ``route`` is the detour's to it."""
        refusal = self._refusal_by_route(remote, route)
        return None if refusal is None else self.count(refusal)

    def permits(self, mapping: Mapping, host: HostAddresses) -> bool:
        """Whether a mapping that stands already may stay; counts nothing."""
        address = mapping.remote.address
        return (mapping.client in self._clients and not self.forbids_port(mapping.detour_port)
                and self._refusal(mapping.remote, own=address in host.own, broadcast=False,
                                  on_link=address in host.on_link) is None)

    def permits_by_route(self, mapping: Mapping, route: Route) -> bool:
        """Whether a mapping that stands may stay with this route to its remote; counts nothing."""
        return self._refusal_by_route(mapping.remote, route) is None

    def _refusal_by_route(self, remote: Endpoint, route: Route) -> Refusal | None:
        return self._refusal(remote, own=route.local, broadcast=route.broadcast,
                             on_link=route.on_link)

    def _refusal(self, remote: Endpoint, *, own: bool, broadcast: bool,
                 on_link: bool) -> Refusal | None:
        address = remote.address
        if not remote.port:
            return Refusal.PORT
        if not (own or broadcast or on_link or address in self._particular):
            return Refusal.DENIED_PORT if remote.port in self._denied_ports else None
        if address in _NEVER_SET:
            return next(refusal for refusal, networks in _NEVER_SETS if address in networks)
        if own or address in self._own:
            return Refusal.DETOUR
        if broadcast:
            return Refusal.BROADCAST
        if address in self._denied:
            return Refusal.DENIED
        if remote.port in self._denied_ports:
            return Refusal.DENIED_PORT
        if address in self._remotes:
            return None
        if address in _PRIVATE_REMOTE_SET:
            return Refusal.PRIVATE
        if on_link:
            return Refusal.ON_LINK
        return Refusal.PLATFORM if address in _PLATFORM_SET else None

    def forbids_port(self, port: int) -> bool:
        """Whether the detour port is given to nobody."""
        return port in self._forbidden_ports

    def idle_limit(self, in_all: int) -> float:
        """After how many seconds without flow and request a mapping goes, with so many there."""
        crowded = in_all > _CROWDED * self.rules.max_mappings
        return min(self.rules.idle_timeout, _CROWDED_SECONDS) if crowded else (
            self.rules.idle_timeout)

    def unproven_limit(self, in_all: int) -> float:
        """After how many seconds without request a mapping goes that never had a flow."""
        return min(self.idle_limit(in_all), _UNPROVEN_SECONDS)
