# SPDX-License-Identifier: GPL-2.0-or-later
"""Which chains of others tell that they rely on this host's forwarding; pure."""

import re
from typing import Any

from detour_tools.nat.base import TABLE

_OURS = ("ip", TABLE)
_TRANSLATES = re.compile(r" -j (?:MASQUERADE|SNAT)\b")


def of_nft(objects: list[dict[str, Any]]) -> set[str]:
    """Chains of IPv4 with rules about forwarded packets, or that translate sources.

    ``objects`` are those of ``nft -j``. An empty chain is only what a look by iptables leaves.
    """
    forward, found = set(), set()
    for what in (item["chain"] for item in objects if "chain" in item):
        if what.get("hook") == "forward":
            forward.add((what["family"], what["table"], what["name"]))
    for rule in (item["rule"] for item in objects if "rule" in item):
        chain = (rule["family"], rule["table"], rule["chain"])
        if chain[0] in ("ip", "inet") and chain[:2] != _OURS and (
                chain in forward or any(map(_translates, rule.get("expr", ())))):
            found.add(" ".join(chain))
    return found


def of_iptables(printed: str, tool: str, table: str) -> set[str]:
    """The same of what ``iptables -t TABLE -S`` prints; ``tool`` is iptables-nft or -legacy."""
    found = set()
    for line in printed.splitlines():
        if line.startswith("-A ") and "DETOUR-" not in line:
            chain = line.split()[1]
            if (table, chain) == ("filter", "FORWARD") or _TRANSLATES.search(line):
                # nft shows those of iptables-nft under the same name.
                found.add(f"{'ip' if tool == 'iptables-nft' else tool} {table} {chain}")
    return found


def _translates(part: dict[str, Any]) -> bool:
    (kind, what), = part.items()
    return kind in ("masquerade", "snat") or (
        kind == "xt" and bool(what) and what.get("name") in ("MASQUERADE", "SNAT"))
