# SPDX-License-Identifier: GPL-2.0-or-later
"""What is known of a packet of the detour's, and which conditions of rules it meets; pure.

Conditions are named as nft names them ("ct state", "udp dport"), also those of iptables.
"""

from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, summarize_address_range
from typing import Any

from detour_tools.nat.base import LABEL

# A match on one of these holds of no packet of another protocol, whatever it asks for.
_PROTOCOLS = frozenset({"tcp", "udp", "udplite", "icmp", "icmpv6", "ip6", "sctp", "dccp", "esp",
                        "ah", "comp", "arp", "igmp"})
_PORTS = ("udp dport", "th dport")
INTERFACES = frozenset({"meta iif", "meta iifname", "meta oif", "meta oifname"})


@dataclass(frozen=True, slots=True)
class Condition:
    """What a rule asks for: one of ``values``; with ``mask``, of its flags just those of a value.

    ``key`` is empty where nobody can tell whether a packet meets it.
    """

    key: str = ""
    values: tuple[Any, ...] = ()
    negated: bool = False
    mask: frozenset[Any] | None = None

    def excludes(self, other: "Condition") -> bool:
        """Whether no packet meets both, as each has one interface that it came or leaves by."""
        if self.key != other.key or self.key not in INTERFACES:
            return False
        if self.negated != other.negated:
            return self.values == other.values
        return not self.negated and all(map(_is_one, (*self.values, *other.values))) and not any(
            value in other.values for value in self.values)


def _is_one(name: Any) -> bool:
    """Whether it is an interface's name: no pattern, and no set's."""
    return isinstance(name, str) and not name.endswith(("*", "+")) and not name.startswith("@")


@dataclass(frozen=True, slots=True)
class Packet:
    """A packet: how it is called, what lets it through, and what is known of it."""

    what: str
    allow: dict[str, str]  # by tool, nft or iptables
    protocol: str
    known: dict[str, frozenset[Any]]
    source: IPv4Network | None = None
    # What only may happen to it is said, too.
    say_may: bool = True
    # How a program lets it through that keeps its table of nftables to itself.
    by_owner: str = ""
    # Keys of which a rule that accepts is meant for it, whatever else the rule asks for.
    meant: frozenset[str] = field(default_factory=frozenset)

    def meets(self, condition: Condition) -> bool | None:
        """Whether it meets the condition; None: that depends on what is not known."""
        protocol = condition.key.partition(" ")[0]
        if protocol in _PROTOCOLS and protocol != self.protocol:
            return False
        if condition.mask is not None:
            found = self._masked(condition.key, condition.values, condition.mask)
        else:
            each = [self._is(condition.key, value) for value in condition.values]
            found = True if True in each else None if None in each or not each else False
        return found if found is None else found != condition.negated

    def is_meant(self, conditions: tuple[Condition, ...]) -> bool:
        """Whether a rule with these conditions, which accepts, is meant for this packet."""
        found = [(condition.key, self.meets(condition)) for condition in conditions]
        return False not in (met for _, met in found) and any(
            key in self.meant and (met or key == "ip saddr") for key, met in found)

    def _masked(self, key: str, values: tuple[Any, ...], mask: frozenset[Any]) -> bool | None:
        known = self.known.get(key)
        return None if known is None else (known & mask) in values

    def _is(self, key: str, value: Any) -> bool | None:
        if key == "ip saddr":
            return self._comes_from(networks(value))
        if key in INTERFACES:
            return False if value == "lo" else None
        known = self.known.get(key)
        if known is None or str(value).startswith("@"):  # @: a named set
            return None
        if isinstance(value, dict):
            try:
                first, last = value["range"]
                return any(first <= each <= last for each in known)
            except (KeyError, TypeError, ValueError):
                return None
        return None if isinstance(value, list) else value in known

    def _comes_from(self, wanted: list[IPv4Network]) -> bool | None:
        if any(network.prefixlen == 0 for network in wanted):
            return True
        if self.source is None or not wanted:
            return None
        if any(self.source.subnet_of(network) for network in wanted):
            return True
        return None if any(self.source.overlaps(network) for network in wanted) else False


_MAPPED: dict[str, frozenset[Any]] = {
    "meta l4proto": frozenset({"tcp", 6}), "ip protocol": frozenset({"tcp", 6}),
    "meta nfproto": frozenset({"ipv4"}), "meta protocol": frozenset({"ip"}),
    "tcp flags": frozenset({"syn"}), "ct direction": frozenset({"original"}),
}


def mapped() -> Packet:
    """The first packet of a mapped flow, where it is forwarded."""
    return Packet(
        "detoured packets",
        {"nft": f"ct label {LABEL} accept",
         "iptables": f"-m connlabel --label {LABEL} -j ACCEPT"},
        "tcp",
        # iptables has a state DNAT, which no nft has.
        _MAPPED | {"ct state": frozenset({"new", "dnat"}), "ct status": frozenset({"dnat"}),
                   "ct label": frozenset({LABEL})},
        by_owner="firewalld: StrictForwardPorts=no")


def passing(protocol: str) -> Packet:
    """The first packet of a flow that the host forwards as a router, and that is not mapped."""
    number = {"tcp": 6, "udp": 17}[protocol]
    named: frozenset[Any] = frozenset({protocol, number})
    return Packet(
        "forwarded packets", {}, protocol,
        _MAPPED | {"meta l4proto": named, "ip protocol": named, "ct state": frozenset({"new"}),
                   "ct status": frozenset(), "ct label": frozenset()})


def arriving() -> Packet:
    """The same packet when it comes in: neither tracked nor translated yet."""
    return Packet(
        "detoured packets",
        {"nft": "fib daddr type local meta l4proto tcp accept",
         "iptables": "-p tcp -m addrtype --dst-type LOCAL -j ACCEPT"},
        "tcp", _MAPPED | {"fib daddr type": frozenset({"local"})})


def request(port: int, source: IPv4Network | None = None, *, tracked: bool = True) -> Packet:
    """A client's request to the UDP ``port``, from any address of ``source`` (None: unknown)."""
    udp: frozenset[Any] = frozenset({"udp", 17})
    known: dict[str, frozenset[Any]] = {
        "meta l4proto": udp, "ip protocol": udp, "meta nfproto": frozenset({"ipv4"}),
        "meta protocol": frozenset({"ip"}),
        "ct state": frozenset({"new" if tracked else "untracked"}),
        "ct status": frozenset(), "ct label": frozenset(), "ct direction": frozenset({"original"}),
        "fib daddr type": frozenset({"local"}), "meta pkttype": frozenset({"host"}),
        **{key: frozenset({port}) for key in _PORTS},
    }
    nft, iptables = (f"ip saddr {source} ", f"-s {source} ") if source else ("", "")
    return Packet(
        f"clients' requests from {source}" if source else "clients' requests",
        {"nft": f"{nft}udp dport {port} accept",
         "iptables": f"{iptables}-p udp --dport {port} -j ACCEPT"},
        "udp", known, source, say_may=False,
        by_owner=f"detour-server firewall open requests --client {source or 'CIDR'}",
        meant=frozenset(_PORTS if source else (*_PORTS, "ip saddr")))


def networks(value: Any) -> list[IPv4Network]:
    """The IPv4 networks that nft's JSON, or iptables, writes so; none if it is something else."""
    try:
        if isinstance(value, dict) and "range" in value:
            first, last = map(IPv4Address, value["range"])
            return list(summarize_address_range(first, last))
        if isinstance(value, dict):
            value = "{addr}/{len}".format(**value["prefix"])
        return [IPv4Network(value)]
    except (KeyError, TypeError, ValueError):
        return []
