# SPDX-License-Identifier: GPL-2.0-or-later
"""Which chains of others tell that they rely on this host's forwarding; pure.

A chain does that lets new flows through the host, other than mapped ones, or translates their
sources. One that only drops, counts or knows ours tells nothing: any host may have it.
"""

import re
from collections.abc import Iterable
from typing import Any

from detour_tools.firewall import legacy, nft
from detour_tools.firewall.judge import Chain, may_accept
from detour_tools.firewall.packet import passing

_TRANSLATES = re.compile(r" -j (?:MASQUERADE|SNAT)\b")


def letting_through(chains: Iterable[Chain]) -> set[str]:
    """The forward chains that accept packets of others."""
    packets = (passing("tcp"), passing("udp"))
    return {chain.name for chain in chains if chain.hook == "forward"
            and any(may_accept(chain, packet) for packet in packets)}


def steering(objects: list[dict[str, Any]]) -> set[str]:
    """Forward chains with a named verdict map, of unknown content, or a flowtable: a router's."""
    forward = {(chain["family"], chain["table"], chain["name"]) for chain in (
        item["chain"] for item in objects if "chain" in item) if chain.get("hook") == "forward"}
    return {" ".join(chain) for chain, parts in (
        ((rule["family"], rule["table"], rule["chain"]), rule.get("expr", ()))
        for rule in (item["rule"] for item in objects if "rule" in item))
        if chain in forward and chain[0] in ("ip", "inet") and chain[:2] != nft.OURS and any(
            "flow" in part or isinstance(part.get("vmap", {}).get("data"), str)
            for part in parts)}


def translating(objects: list[dict[str, Any]]) -> set[str]:
    """Chains of IPv4 that translate sources; ``objects`` are those of ``nft -j``."""
    rules = [item["rule"] for item in objects if "rule" in item]
    return {f"{rule['family']} {rule['table']} {rule['chain']}" for rule in rules
            if rule["family"] in ("ip", "inet") and (rule["family"], rule["table"]) != nft.OURS
            and any(map(_translates, rule.get("expr", ())))}


def translating_by_iptables(printed: str, tool: str, table: str) -> set[str]:
    """The same of what ``iptables -t TABLE -S`` prints; ``tool`` is iptables-nft or -legacy."""
    # nft shows those of iptables-nft under the same name.
    prefix = f"{'ip' if tool == 'iptables-nft' else tool} {table}"
    return {f"{prefix} {line.split()[1]}" for line in printed.splitlines()
            if line.startswith("-A ") and line.split()[1] not in legacy.OURS
            and _TRANSLATES.search(line)}


def _translates(part: dict[str, Any]) -> bool:
    (kind, what), = part.items()
    return kind in ("masquerade", "snat") or (
        kind == "xt" and bool(what) and what.get("name") in ("MASQUERADE", "SNAT"))
