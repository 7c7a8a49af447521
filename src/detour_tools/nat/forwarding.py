# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether the host's own firewall would drop what the detour forwards.

Reads the forward chains of nftables and of legacy iptables, and says which rule or policy stands
in the way. It never changes one. Judging rules from their text, it knows the common conditions;
a rule with others "may" drop.
"""

import re
import shlex
import shutil
import subprocess
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from detour_tools.errors import UserError
from detour_tools.nat import nftables
from detour_tools.nat.base import LABEL

_ALLOW_IPTABLES = f"-I FORWARD -m connlabel --label {LABEL} -j ACCEPT"
_LEGACY_TABLES = Path("/proc/net/ip_tables_names")
_MAY_DROP_AT_MOST = 5
_DEPTH = 16


@dataclass(slots=True)
class Rule:
    """A rule with a verdict. ``certain``: true of all detoured packets; otherwise of some."""

    text: str
    verdict: str  # accept, drop, return, or the chain it jumps to after "jump "
    certain: bool


@dataclass(slots=True)
class Chain:
    """A chain; ``policy`` is empty for one that only others jump to."""

    name: str
    allow: str
    policy: str = ""
    rules: list[Rule] = field(default_factory=list)
    siblings: "dict[str, Chain]" = field(default_factory=dict)


def warnings() -> list[str]:
    """One line for each chain or rule that would drop detoured packets. Blocks."""
    found = parse_nft(_nft_text())
    try:
        found += parse_legacy(_legacy_text())
    except PermissionError:
        unread = ["only root may look whether legacy iptables rules drop detoured packets here"]
    else:
        unread = []
    texts = [text for chain in found for text in judge(chain)]
    certain = [text for text in texts if " may drop " not in text]
    return certain + [text for text in texts
                      if " may drop " in text][:_MAY_DROP_AT_MOST] + unread


def judge(chain: Chain) -> Iterator[str]:
    """What a forward chain does to detoured packets that it should not do."""
    end = yield from _walk(chain, chain, True, 0)
    if not end and chain.policy == "drop":
        yield (f"chain {chain.name} has policy drop: detoured packets will be dropped; "
               f"allow them with: {chain.allow}")


def _walk(chain: Chain, base: Chain, certain: bool, depth: int) -> Generator[str, None, bool]:
    """Yield warnings; return whether the walk through the base chain ends here."""
    if depth > _DEPTH:
        return False
    for rule in chain.rules:
        sure = certain and rule.certain
        if rule.verdict == "drop":
            how = "drops" if sure else "may drop"
            yield (f"rule '{rule.text}' of chain {chain.name} {how} detoured packets; "
                   f"allow them before it with: {base.allow}")
        elif rule.verdict.startswith("jump "):
            target = base.siblings.get(rule.verdict[5:])
            if target is not None and (yield from _walk(target, base, sure, depth + 1)):
                return True
            continue
        if sure and rule.verdict == "return":
            return False
        if sure:
            return True
    return False


# nftables

_NFT_NOISE = re.compile(
    r'counter packets \d+ bytes \d+|\bcounter\b|\bcomment "[^"]*"|\blog\b( prefix "[^"]*")?'
    r'( (group|snaplen|queue-threshold|flags|level) \S+)*')
_NFT_VERDICT = re.compile(r"\b(accept|drop|reject|return|(?:jump|goto) \S+)\b")
_NFT_ALWAYS = re.compile(
    rf"meta l4proto (tcp|6)\b|ip protocol (tcp|6)\b|meta nfproto ipv4"
    rf"|ct label {LABEL}\b|ct status dnat"
    r"|ct state [a-z,]*\bnew\b[a-z,]*|meta l4proto \{[^}]*\btcp\b[^}]*\}")
_NFT_NEVER = re.compile(
    r"ct state (invalid|established|related|untracked)(,(invalid|established|related|untracked))*"
    r"(?![a-z,])|(ip protocol|meta l4proto) (udp|icmp|ipv6-icmp|sctp|esp|gre|\d+)\b"
    r"|meta nfproto ipv6|\bip6 |\budp |\bicmp |\bicmpv6 ")


def parse_nft(text: str) -> list[Chain]:
    """The forward chains of ``nft list ruleset``."""
    found: list[Chain] = []
    family = table = ""
    siblings: dict[str, Chain] = {}
    chain: Chain | None = None
    for line in (raw.strip() for raw in text.splitlines()):
        words = line.split()
        if line.startswith("table ") and line.endswith("{"):
            family, table = words[1], words[2]
            siblings = {}
        elif line.startswith("chain ") and line.endswith("{"):
            name = words[1]
            chain = Chain(f"{family} {table} {name}", _nft_allow(family, table, name),
                          siblings=siblings)
            siblings[name] = chain
        elif line == "}":
            chain = None
        elif chain is not None and line.startswith("type ") and " hook " in line:
            if " hook forward " in line and family in ("ip", "inet"):
                chain.policy = "drop" if "policy drop" in line else "accept"
                found.append(chain)
        elif chain is not None and (rule := _nft_rule(line)) is not None:
            chain.rules.append(rule)
    return found


def _nft_allow(family: str, table: str, chain: str) -> str:
    # A rule by nft would make iptables-nft refuse to show this table.
    if (family, table, chain) == ("ip", "filter", "FORWARD"):
        return f"iptables {_ALLOW_IPTABLES}"
    return f"nft insert rule {family} {table} {chain} ct label {LABEL} accept"


def _nft_rule(line: str) -> Rule | None:
    bare = " ".join(_NFT_NOISE.sub(" ", line).split())
    if " vmap " in bare:
        drops = ": drop" in bare and ("ct state vmap" not in bare or "new : drop" in bare)
        return Rule(line, "drop", certain=False) if drops else None
    match = _NFT_VERDICT.search(bare)
    if match is None:
        return None
    conditions = _NFT_ALWAYS.sub("", bare[:match.start()])
    if _NFT_NEVER.search(conditions):
        return None
    verdict = match[1].replace("goto ", "jump ").replace("reject", "drop")
    return Rule(line, verdict, certain=not conditions.strip())


# Legacy iptables

_LEGACY_ALWAYS = re.compile(
    rf'-p tcp\b|-m tcp\b|-m comment --comment (?:"[^"]*"|\S+)|-m connlabel --label "?{LABEL}"?'
    r"|-m (?:conntrack --ct|state --)state [A-Z,]*(?:NEW|DNAT)[A-Z,]*")
_LEGACY_NEVER = re.compile(
    r"(?<!! )(?:-p (?!tcp\b|all\b)\w+|--(?:ct)?state (?![A-Z,]*(?:NEW|DNAT))[A-Z,]+)")


def parse_legacy(text: str) -> list[Chain]:
    """The forward chain of ``iptables-legacy -S``."""
    chains: dict[str, Chain] = {}
    for line in text.splitlines():
        try:
            words = shlex.split(line)
        except ValueError:  # part of a rule whose comment has line breaks
            continue
        if words[:1] in (["-P"], ["-N"]):
            policy = words[2].lower() if words[0] == "-P" else ""
            chains[words[1]] = Chain(f"{words[1]} (legacy iptables)",
                                     f"iptables-legacy {_ALLOW_IPTABLES}", policy,
                                     siblings=chains)
        elif words[:1] == ["-A"] and words[1] in chains:
            rule = _legacy_rule(line.split(maxsplit=2)[2])
            if rule is not None:
                chains[words[1]].rules.append(rule)
    return [chains["FORWARD"]] if "FORWARD" in chains else []


def _legacy_rule(text: str) -> Rule | None:
    conditions, dash, action = text.rpartition("-j ")
    if not dash:
        conditions, dash, action = text.rpartition("-g ")
    if not action or _LEGACY_NEVER.search(conditions):
        return None
    target = action.split()[0]
    verdict = {"ACCEPT": "accept", "DROP": "drop", "REJECT": "drop", "RETURN": "return"}.get(
        target, f"jump {target}")
    return Rule(text, verdict, certain=not _LEGACY_ALWAYS.sub("", conditions).strip())


def _legacy_text() -> str:
    try:
        # Without this a mere look would load the legacy tables into the kernel.
        if "filter" not in _LEGACY_TABLES.read_text(encoding="ascii").split():
            return ""
    except FileNotFoundError:
        return ""
    command = shutil.which("iptables-legacy") or shutil.which("iptables")
    if command is None:
        return ""
    return subprocess.run([command, "-w", "5", "-S"], capture_output=True, text=True,
                          check=False).stdout


def _nft_text() -> str:
    try:
        return nftables.ruleset_text()
    except UserError:
        return ""  # no nftables, no chains of it
