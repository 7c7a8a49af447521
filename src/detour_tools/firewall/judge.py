# SPDX-License-Identifier: GPL-2.0-or-later
"""What a firewall's chains do to a packet: let it through, drop it, or may drop it; pure."""

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Network

from detour_tools.firewall.packet import Condition, Packet, arriving, mapped, request

_DEPTH = 16  # of jumps, as the kernel allows
_MAY_AT_MOST = 5


@dataclass(slots=True)
class Rule:
    """A rule with a verdict: accept, drop, return, notrack, or "jump X", "goto X".

    ``position`` is what its tool names it by: nft's handle, or the number in the chain.
    """

    text: str
    conditions: tuple[Condition, ...]
    verdict: str
    position: str = ""


@dataclass(slots=True)
class Chain:
    """A chain; ``hook`` and ``policy`` are empty for one that only others jump to.

    ``insert`` is the command that puts a rule first, without the rule; ``tool`` whose words the
    rule is to have. ``program`` is what changes the chain, under the name ``own_name``; one that
    is ``owned`` only the program that made it can change.
    """

    name: str
    insert: str
    tool: str
    hook: str = ""
    policy: str = ""
    rules: list[Rule] = field(default_factory=list)
    siblings: "dict[str, Chain]" = field(default_factory=dict)
    program: tuple[str, ...] = ("nft",)
    own_name: str = ""
    owned: bool = False


@dataclass(frozen=True, slots=True)
class Finding:
    """What stands in a packet's way: ``text`` says it in a line; ``certain`` or only maybe.

    ``rule`` is the one of the base ``chain`` that drops the packet, or leads to where it is
    dropped; None: the chain's policy does. ``untracked``: it only keeps connection tracking off.
    """

    text: str
    certain: bool
    chain: Chain
    rule: Rule | None = None
    untracked: bool = False


def judge(chain: Chain, packet: Packet) -> Iterator[Finding]:
    """One for each rule, or the policy, that drops the packet in this base chain.

    In a prerouting chain: also for each rule that keeps connection tracking off it; of what only
    may drop it none, as there every filter of forged sources may.
    """
    end = yield from _walk(chain, chain, packet, True, None, ())
    if not end and chain.policy == "drop":
        yield Finding(f"chain {chain.name} has policy drop: {packet.what} will be dropped; "
                      f"{_cure(chain, packet, 'allow them')}", True, chain)


def may_accept(chain: Chain, packet: Packet) -> bool:
    """Whether a rule of this base chain, not its policy, accepts the packet or may do so."""
    return bool(_accepting(chain, chain, packet))


def findings(chains: list[Chain], port: int, sources: Iterable[IPv4Network]) -> list[Finding]:
    """All that stands in the way of mapped flows, and of requests to the UDP ``port``.

    What certainly does comes first, then some of what may. Without ``sources`` it is not known
    who asks.
    """
    tracked = are_tracked(chains, port)
    requests = [request(port, source, tracked=tracked) for source in sources] or [
        request(port, tracked=tracked)]
    by_hook = {"prerouting": [arriving(), *requests], "forward": [mapped()], "input": requests}
    # Requests are not translated.
    found = {each.text: each for chain in chains for packet in by_hook.get(chain.hook, ())
             for each in judge(chain, packet)
             if not (each.untracked and packet in requests)}.values()
    possible = [each for each in found if not each.certain]
    return [each for each in found if each.certain] + possible[:_MAY_AT_MOST]


def are_tracked(chains: list[Chain], port: int) -> bool:
    """Whether connection tracking sees requests to the UDP ``port``."""
    before = [chain for chain in chains if chain.hook == "prerouting"]
    return not any(found.untracked for chain in before for found in judge(chain, request(port)))


def _walk(chain: Chain, base: Chain, packet: Packet, certain: bool, via: Rule | None,
          given: tuple[Condition, ...], depth: int = 0) -> Generator[Finding, None, bool]:
    """Yield findings; return whether the walk through the base chain ends here.

    ``via`` is the base chain's rule by which the walk came to another chain, ``given`` what the
    rules on that way asked for.
    """
    before = base.hook == "prerouting"
    for rule in chain.rules if depth <= _DEPTH else ():
        met = _all(False if any(condition.excludes(other) for other in given)
                   else packet.meets(condition) for condition in rule.conditions)
        if met is False:
            continue
        sure = certain and bool(met)
        how, _, target = rule.verdict.partition(" ")
        untracked = how == "notrack" and before
        if (how == "drop" or untracked) and (sure or (packet.say_may and untracked == before)):
            yield Finding(_said(rule, chain, base, packet, sure), sure, base, via or rule,
                          untracked)
        elif how == "accept" and packet.is_meant(rule.conditions):
            return True
        elif target and target in base.siblings:
            if (yield from _walk(base.siblings[target], base, packet, sure, via or rule,
                                 (*given, *rule.conditions), depth + 1)):
                return True
            if sure and how == "goto":
                return False  # to where this chain was called from
        if sure and how in ("accept", "drop"):
            return True
        if sure and how == "return":
            return False
    return False


def _accepting(chain: Chain, base: Chain, packet: Packet, depth: int = 0) -> bool | None:
    """Whether a rule may accept it; None where it passes through, False where it is dropped."""
    for rule in chain.rules if depth <= _DEPTH else ():
        met = _all(packet.meets(condition) for condition in rule.conditions)
        if met is False:
            continue
        how, _, target = rule.verdict.partition(" ")
        if how == "accept":
            return True
        if target in base.siblings:
            found = _accepting(base.siblings[target], base, packet, depth + 1)
            if found or (met and (found is False or how == "goto")):
                return found
        elif met and how in ("drop", "return"):
            return False if how == "drop" else None
    return None


def _all(found: Iterable[bool | None]) -> bool | None:
    each = list(found)
    return False if False in each else None if None in each else True


def _said(rule: Rule, chain: Chain, base: Chain, packet: Packet, sure: bool) -> str:
    where = f"rule '{rule.text}' of chain {chain.name}"
    if rule.verdict == "notrack":
        return (f"{where} {'leaves' if sure else 'may leave'} {packet.what} untracked, so that "
                f"nothing is translated; {_cure(base, packet, 'let them pass before it')}")
    return (f"{where} {'drops' if sure else 'may drop'} {packet.what}; "
            f"{_cure(base, packet, 'allow them before it')}")


def _cure(base: Chain, packet: Packet, words: str) -> str:
    if base.owned:
        hint = f" ({packet.by_owner})" if packet.by_owner else ""
        return f"only the program that owns the table can let them through{hint}"
    return f"{words} with: {base.insert} {packet.allow[base.tool]}"
