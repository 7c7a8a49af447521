# SPDX-License-Identifier: GPL-2.0-or-later
"""Which rules open a firewall that drops the detour's packets, and how they are told; pure."""

import hashlib
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv4Network
from typing import Any

from detour_tools.firewall.judge import Chain, Finding, are_tracked, judge, may_accept
from detour_tools.firewall.packet import mapped, request

# How rules for mapped flows are found again, whichever release added them.
COMMENT = "detour-tools: mapped flows"
_MARK = "detour-tools "

# Where a rule belongs or whom it is for, and what it is.
Rule = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Change:
    """What was added and removed, or would be: a line each."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    def __add__(self, other: "Change") -> "Change":
        return Change(self.added + other.added, self.removed + other.removed)


# Mapped flows

def flows_stopped(chains: Iterable[Chain]) -> list[Finding]:
    """For each forward chain that drops mapped flows, what does so."""
    return [found for chain in chains if chain.hook == "forward"
            for found in judge(chain, mapped()) if found.certain]


def to_let_flows_pass(found: Finding) -> list[str]:
    """The command that adds a rule for mapped flows just before what drops them.

    Not at the beginning: what the host's own rules single out before stays dropped.
    """
    chain, rule = found.chain, found.rule
    if chain.program[0] == "nft":
        words = f'{mapped().allow["nft"]} comment "{COMMENT}"'
        return ["nft", f"insert rule {chain.own_name} position {rule.position} {words}" if rule
                else f"add rule {chain.own_name} {words}"]
    where = ["-I", chain.own_name, rule.position] if rule else ["-A", chain.own_name]
    return [*chain.program, *where, "-m", "comment", "--comment", COMMENT,
            *shlex.split(mapped().allow["iptables"])]


def to_take_flows_rules(objects: list[dict[str, Any]], listings: list[tuple[str, str, str]]
                        ) -> Iterator[list[str]]:
    """The commands that remove these rules, from what look.ruleset() and listings() gave."""
    for tool, table, text in listings:
        for line in text.splitlines():
            if line.startswith("-A ") and f'--comment "{COMMENT}"' in line:
                yield [tool, "-w", "5", "-t", table, "-D", *shlex.split(line)[1:]]
    # nft shows those of iptables-nft, too.
    read = {("ip", table) for tool, table, _ in listings if tool == "iptables-nft"}
    for item in objects:
        rule = item.get("rule", {})
        if rule.get("comment") == COMMENT and (rule["family"], rule["table"]) not in read:
            yield ["nft", "delete rule {family} {table} {chain} handle {handle}".format(**rule)]


# Requests, by nft

def for_requests(chains: list[Chain], port: int, sources: list[IPv4Network]) -> list[Rule]:
    """A rule for each chain of nftables that does not surely let requests from all sources in.

    It goes first: a chain may drop some of them anywhere.
    """
    listed = ", ".join(map(str, sources))
    text = f"ip saddr {{ {listed} }} udp dport {port} accept"
    mark = _MARK + hashlib.sha256(text.encode()).hexdigest()[:8]
    return [(chain.own_name, f'{text} comment "{mark}"')
            for chain in requests_stopped(chains, port, sources)
            if chain.program[0] == "nft"]


def requests_stopped(chains: list[Chain], port: int, sources: list[IPv4Network]) -> list[Chain]:
    """The input chains that drop requests from one of the sources."""
    tracked = are_tracked(chains, port)
    # A rule for the port that asks for more may let some in, which is not enough here.
    packets = [replace(request(port, source, tracked=tracked), meant=frozenset())
               for source in sources]
    return [chain for chain in chains if chain.hook == "input" and any(
        found.certain for packet in packets for found in judge(chain, packet))]


def requests_left(chains: list[Chain], port: int, sources: list[IPv4Network]) -> list[Finding]:
    """What surely drops requests from one of the sources when all is done that lets them in.

    Not where a rule may have let them in before, by the interface that they come by.
    """
    tracked = are_tracked(chains, port)
    packets = [request(port, source, tracked=tracked) for source in sources]
    return [found for chain in chains if chain.hook in ("prerouting", "input")
            for packet in packets if not may_accept(chain, packet)
            for found in judge(chain, packet) if found.certain and not found.untracked]


def without_ours(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rule set as it is without our rules for requests."""
    return [item for item in objects if not _mark(item)]


def handles(objects: list[dict[str, Any]], rule: Rule) -> list[str]:
    """The handles that one of our rules for requests has in the rule set."""
    return [str(item["rule"]["handle"]) for item in objects
            if (mark := _mark(item)) and f'comment "{mark}"' in rule[1]
            and "{family} {table} {chain}".format(**item["rule"]) == rule[0]]


def _mark(item: dict[str, Any]) -> str:
    comment = str(item.get("rule", {}).get("comment", ""))
    return comment if comment.startswith(_MARK) else ""


def changes(stored: dict[str, list[Rule]], wanted: dict[str, list[Rule]],
            missing: dict[str, list[Rule]]) -> tuple[dict[str, list[Rule]], dict[str, list[Rule]]]:
    """By firewall: which stored rules go, and which are ours to remember.

    Not those that the host's owner had: they stay when ours go.
    """
    gone = {kind: [rule for rule in rules if rule not in wanted.get(kind, ())]
            for kind, rules in stored.items()}
    ours = {kind: [rule for rule in rules
                   if rule in missing[kind] or rule in stored.get(kind, ())]
            for kind, rules in wanted.items()}
    return gone, ours
