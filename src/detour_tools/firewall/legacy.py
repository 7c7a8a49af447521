# SPDX-License-Identifier: GPL-2.0-or-later
"""Chains of iptables, legacy or iptables-nft's, from what ``iptables -S`` prints; pure."""

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from typing import Any

from detour_tools.firewall.judge import Chain, Rule
from detour_tools.firewall.packet import Condition
from detour_tools.nat.base import FORWARD, POSTROUTING, PREROUTING

_HOOKS = {"FORWARD": "forward", "INPUT": "input", "PREROUTING": "prerouting"}
_KEYS = {"-s": "ip saddr", "-p": "meta l4proto", "-i": "meta iifname", "-o": "meta oifname",
         "--ctstate": "ct state", "--state": "ct state", "--label": "ct label",
         "--dst-type": "fib daddr type", "--pkt-type": "meta pkttype"}
_PORTS = ("--dport", "--dports")
# Modules whose options say all that they ask for.
_MODULES = frozenset({"tcp", "udp", "icmp", "multiport", "conntrack", "state", "comment",
                      "connlabel", "addrtype", "pkttype"})
OURS = (PREROUTING, POSTROUTING, FORWARD)
_VERDICTS = {"ACCEPT": "accept", "DROP": "drop", "REJECT": "drop", "RETURN": "return",
             "NOTRACK": "notrack"}


def chains(text: str, tool: str, table: str = "filter") -> list[Chain]:
    """The base chains of what ``tool -t table -S`` printed.

    ``tool`` is iptables-legacy or iptables-nft.
    """
    found: dict[str, Chain] = {}
    where = "" if table == "filter" else f" -t {table}"
    called = "legacy iptables" if tool == "iptables-legacy" else ""
    numbers: Counter[str] = Counter()
    for line in text.splitlines():
        if line.startswith("-A "):  # also one that cannot be read has its number
            numbers[line.split(" ", 2)[1]] += 1
        try:
            words = shlex.split(line)
        except ValueError:  # part of a rule whose comment has line breaks
            continue
        if words[-1:] and words[-1] in OURS:  # what these drop is meant to be dropped
            continue
        if len(words) > 1 and words[0] in ("-P", "-N"):
            name = words[1]
            of = f"{name} ({called}{', table ' + table if where else ''})" if called else (
                f"ip {table} {name}")
            found[name] = Chain(of, f"{tool if called else 'iptables'}{where} -I {name}",
                                "iptables", siblings=found, own_name=name,
                                program=(tool, "-w", "5", "-t", table))
            if words[0] == "-P" and len(words) > 2:
                found[name].hook, found[name].policy = _HOOKS.get(name, ""), words[2].lower()
        elif words[:1] == ["-A"] and len(words) > 2 and words[1] in found and (
                rule := _rule(line.split(maxsplit=2)[2], words[2:])) is not None:
            rule.position = str(numbers[words[1]])
            found[words[1]].rules.append(rule)
    return [chain for chain in found.values() if chain.hook]


def _rule(text: str, words: list[str]) -> Rule | None:
    conditions: list[Condition] = []
    protocol = ""
    for option, values, negated in _options(words):
        if option in ("-j", "-g"):
            target = values[0] if values else ""
            if target == "CT" and "--notrack" in words:
                target = "NOTRACK"
            verdict = _VERDICTS.get(target, f"{'jump' if option == '-j' else 'goto'} {target}")
            return Rule(text, tuple(conditions), verdict)
        if option == "-p":
            protocol = " ".join(values)
        if option == "--comment" or (option == "-m" and _MODULES.issuperset(values)):
            continue
        conditions.append(_condition(option, values, negated, protocol))
    return None


def _options(words: list[str]) -> Iterator[tuple[str, list[str], bool]]:
    position = 0
    while position < len(words):
        negated = words[position] == "!"
        position += negated
        option = words[position] if position < len(words) else ""
        position += 1
        values: list[str] = []
        # A comment may begin with anything.
        while position < len(words) and (
                (option == "--comment" and not values)
                or not (words[position] == "!" or re.match(r"-", words[position]))):
            values.append(words[position])
            position += 1
        yield option, values, negated


def _condition(option: str, values: list[str], negated: bool, protocol: str) -> Condition:
    if option == "--tcp-flags" and len(values) == 2:
        mask, flags = ([flag.lower() for flag in value.split(",")] for value in values)
        return Condition("tcp flags", (frozenset(flags) - {"none"},), negated, frozenset(mask))
    key = f"{protocol or 'th'} dport" if option in _PORTS else _KEYS.get(option, "")
    if not key or len(values) != 1:
        return Condition()
    return Condition(key, tuple(_literal(each) for each in values[0].split(",")), negated)


def _literal(text: str) -> Any:
    """A value of iptables as nft prints it in JSON."""
    if re.fullmatch(r"\d+:\d+", text):
        return {"range": [int(each) for each in text.split(":")]}
    return int(text) if text.isdecimal() else text.lower()
