# SPDX-License-Identifier: GPL-2.0-or-later
"""What a firewall's chains do to a packet: let it through, drop it, or may drop it; pure."""

import re
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Network

from detour_tools.firewall.packet import Condition, Packet, arriving, mapped, request

_DEPTH = 16  # of jumps, as the kernel allows
_MAY_AT_MOST = 5
_MAY = re.compile(r"' of chain [^']* may (drop|leave) [^']* packets")


@dataclass(slots=True)
class Rule:
    """A rule with a verdict: accept, drop, return, notrack, or "jump X", "goto X"."""

    text: str
    conditions: tuple[Condition, ...]
    verdict: str


@dataclass(slots=True)
class Chain:
    """A chain; ``hook`` and ``policy`` are empty for one that only others jump to.

    ``insert`` is the command that puts a rule first, without the rule; ``tool`` whose words the
    rule is to have.
    """

    name: str
    insert: str
    tool: str
    hook: str = ""
    policy: str = ""
    rules: list[Rule] = field(default_factory=list)
    siblings: "dict[str, Chain]" = field(default_factory=dict)


def judge(chain: Chain, packet: Packet) -> Iterator[str]:
    """One line for each rule, or the policy, that drops the packet in this base chain.

    In a prerouting chain: for each rule that keeps connection tracking off it.
    """
    end = yield from _walk(chain, chain, packet, True, 0)
    if not end and chain.policy == "drop" and chain.hook != "prerouting":
        yield (f"chain {chain.name} has policy drop: {packet.what} will be dropped; "
               f"allow them with: {_cure(chain, packet)}")


def warnings(chains: list[Chain], port: int, sources: Iterable[IPv4Network]) -> list[str]:
    """All that stands in the way of mapped flows, and of requests to the UDP ``port``.

    What certainly does comes first, then some of what may. Without ``sources`` it is not known
    who asks.
    """
    before = [chain for chain in chains if chain.hook == "prerouting"]
    tracked = not any(True for chain in before for _ in judge(chain, request(port)))
    requests = [request(port, source, tracked=tracked) for source in sources] or [
        request(port, tracked=tracked)]
    by_hook = {"prerouting": [arriving()], "forward": [mapped()], "input": requests}
    found = list(dict.fromkeys(text for chain in chains for packet in by_hook.get(chain.hook, ())
                               for text in judge(chain, packet)))
    possible = [text for text in found if not is_certain(text)]
    return [text for text in found if is_certain(text)] + possible[:_MAY_AT_MOST]


def is_certain(warning: str) -> bool:
    """Whether it says what does happen, not only what may."""
    return not _MAY.search(warning)


def _walk(chain: Chain, base: Chain, packet: Packet, certain: bool,
          depth: int) -> Generator[str, None, bool]:
    """Yield warnings; return whether the walk through the base chain ends here."""
    bad = "notrack" if base.hook == "prerouting" else "drop"
    for rule in chain.rules if depth <= _DEPTH else ():
        met = _all(packet.meets(condition) for condition in rule.conditions)
        if met is False:
            continue
        sure = certain and bool(met)
        how, _, target = rule.verdict.partition(" ")
        if how == bad and (sure or packet.say_may):
            yield _said(rule, chain, base, packet, sure)
        elif how == "accept" and packet.is_meant(rule.conditions):
            return True
        elif target and target in base.siblings:
            if (yield from _walk(base.siblings[target], base, packet, sure, depth + 1)):
                return True
            if sure and how == "goto":
                return False  # to where this chain was called from
        if sure and how in ("accept", "drop"):
            return True
        if sure and how == "return":
            return False
    return False


def _all(found: Iterable[bool | None]) -> bool | None:
    each = list(found)
    return False if False in each else None if None in each else True


def _said(rule: Rule, chain: Chain, base: Chain, packet: Packet, sure: bool) -> str:
    where = f"rule '{rule.text}' of chain {chain.name}"
    cure = f"before it with: {_cure(base, packet)}"
    if rule.verdict == "notrack":
        return (f"{where} {'leaves' if sure else 'may leave'} {packet.what} untracked, so that "
                f"nothing is translated; let them pass {cure}")
    return f"{where} {'drops' if sure else 'may drop'} {packet.what}; allow them {cure}"


def _cure(base: Chain, packet: Packet) -> str:
    return f"{base.insert} {packet.allow[base.tool]}"
