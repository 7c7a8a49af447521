# SPDX-License-Identifier: GPL-2.0-or-later
"""Chains of nftables from the JSON that libnftables prints (libnftables-json(5)); pure.

Rules that iptables-nft made are there as "xt", without what they match: xtables() tells which
tables to ask iptables-nft for.
"""

import json
from typing import Any

from detour_tools.firewall.judge import Chain, Rule
from detour_tools.firewall.packet import INTERFACES, Condition
from detour_tools.nat.base import TABLE

OURS = ("ip", TABLE)
# What iptables-nft makes, as it names its tables and chains.
_XTABLES = ("raw", "mangle", "nat", "filter", "security")
_STATEMENTS = frozenset({"counter", "log", "comment"})
_VERDICTS = {"accept": "accept", "drop": "drop", "reject": "drop", "return": "return",
             "notrack": "notrack"}
# iptables-nft's tables and chains, which a rule by nft would make it refuse to show.
_IPTABLES = {("filter", "FORWARD"): "iptables -I FORWARD",
             ("filter", "INPUT"): "iptables -I INPUT",
             ("raw", "PREROUTING"): "iptables -t raw -I PREROUTING"}


def parse(printed: bytes) -> list[dict[str, Any]]:
    """The objects of ``nft -j -t list ruleset``; what is not UTF-8 is replaced. Raises ValueError.
    """
    text = printed.decode("utf-8", "replace")
    return list(json.loads(text, strict=False).get("nftables", ())) if text.strip() else []


def xtables(objects: list[dict[str, Any]], *, everything: bool = False) -> list[str]:
    """The tables with rules that only iptables-nft can read; ``everything``: all that are its."""
    found = {rule["table"] for rule in _each(objects, "rule")
             if rule["family"] == "ip" and rule["table"] in _XTABLES
             and any("xt" in part for part in rule.get("expr", ()))}
    if everything:
        found |= {chain["table"] for chain in _each(objects, "chain")
                  if chain["family"] == "ip" and (chain["table"], chain["name"]) in _IPTABLES}
    return sorted(found)


def chains(objects: list[dict[str, Any]], without: list[str] | None = None) -> list[Chain]:
    """The base chains of IPv4 packets, but of our table and of ``without`` (of family ip)."""
    tables: dict[tuple[str, str], dict[str, Chain]] = {}
    owned = {(table["family"], table["name"]) for table in _each(objects, "table")
             if "owner" in table.get("flags", ())}
    found = []
    for what in _each(objects, "chain"):
        family, table, name = what["family"], what["table"], what["name"]
        if (family not in ("ip", "inet") or (family, table) == OURS
                or (family == "ip" and table in (without or ()))):
            continue
        siblings = tables.setdefault((family, table), {})
        iptables = _IPTABLES.get((table, name)) if family == "ip" else None
        chain = Chain(f"{family} {table} {name}",
                      iptables or f"nft insert rule {family} {table} {name}",
                      "iptables" if iptables else "nft", siblings=siblings,
                      own_name=f"{family} {table} {name}", owned=(family, table) in owned)
        siblings[name] = chain
        if what.get("type") == "filter":
            chain.hook, chain.policy = what["hook"], what.get("policy", "accept")
            found.append(chain)
    for what in _each(objects, "rule"):
        owner = tables.get((what["family"], what["table"]), {}).get(what["chain"])
        if owner is not None:
            owner.rules += rules(what.get("expr", ()), str(what.get("handle", "")))
    return found


def rules(expressions: list[dict[str, Any]], handle: str = "") -> list[Rule]:
    """A rule; with a verdict map, one for each of its elements; none without a verdict."""
    text = " ".join(filter(None, map(_text, expressions)))
    conditions: list[Condition] = []
    found = []
    for part in expressions:
        (kind, what), = part.items()
        if kind == "match":
            conditions.append(_condition(what))
        elif kind == "vmap":
            key = _key(what["key"])
            elements = what["data"].get("set", ()) if isinstance(what["data"], dict) else ()
            for value, action in elements:
                if verdict := _verdict(action):
                    found.append(Rule(text, (*conditions, Condition(key, (value,))), verdict,
                                      handle))
        elif verdict := _verdict(part):
            found.append(Rule(text, tuple(conditions), verdict, handle))
        elif kind not in _STATEMENTS:
            conditions.append(Condition())  # a limit, a match of iptables', whatever comes
    return found


def _each(objects: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [item[kind] for item in objects if kind in item]


def _condition(match: dict[str, Any]) -> Condition:
    left, right, op = match["left"], match["right"], match["op"]
    if op not in ("==", "in", "!=", "!"):
        return Condition()
    negated = op in ("!=", "!")
    values = right.get("set", right.get("|", right)) if isinstance(right, dict) else right
    if "&" in left:
        left, bits = left["&"]
        wanted = right["set"] if isinstance(right, dict) and "set" in right else [right]
        return Condition(_key(left), tuple(frozenset(_flags(each)) - {0} for each in wanted),
                         negated, frozenset(_flags(bits)))
    return Condition(_key(left), tuple(values) if isinstance(values, list) else (values,), negated)


def _flags(bits: Any) -> list[Any]:
    """What nft joins with "|", as a list or as one in another; [None] of anything else."""
    if isinstance(bits, dict):
        bits = bits.get("|", [None])
    return [flag for each in bits for flag in _flags(each)] if isinstance(bits, list) else [bits]


def _key(left: Any) -> str:
    """'ct state' of {"ct": {"key": "state"}}, and so on; '' of what is not as simple."""
    if not isinstance(left, dict):
        return ""
    (kind, what), = left.items()
    if kind == "fib":
        flags = what["flags"]
        return f"fib {flags if isinstance(flags, str) else ' . '.join(flags)} {what['result']}"
    if not isinstance(what, dict):
        return ""
    return f"{what.get('protocol', kind)} {what.get('key', what.get('field'))}"


def _verdict(part: Any) -> str:
    if not isinstance(part, dict):
        return ""
    (kind, what), = part.items()
    if kind in ("jump", "goto"):
        return f"{kind} {what['target']}"
    if kind == "xt":
        return "drop" if what and what.get("name") == "REJECT" else ""
    return _VERDICTS.get(kind, "")


def _text(part: dict[str, Any]) -> str:
    """As nft would write it, without counters, which would make it another text every time."""
    (kind, what), = part.items()
    if kind == "match":
        op = "" if what["op"] in ("==", "in") else f"{what['op']} "
        left = what["left"]["&"][0] if "&" in what["left"] else what["left"]
        if "&" in what["left"]:
            bits = _flags(what["left"]["&"][1])
            op = f"& {_joined(bits)} {what['op']} "
        return f"{_short(_key(left))} {op}{_value(what['right'], quoted=_key(left) in INTERFACES)}"
    if kind == "vmap":
        data = what["data"]
        pairs = data if isinstance(data, str) else "{{ {} }}".format(", ".join(
            f"{_value(value)} : {_text(action)}" for value, action in data.get("set", ())))
        return f"{_short(_key(what['key']))} vmap {pairs}"
    if kind in ("jump", "goto"):
        return f"{kind} {what['target']}"
    if kind == "reject":
        # nft's own text leaves the default out, too.
        if what and what.get("expr") == "port-unreachable":
            return "reject"
        how = f" {what['type']} {what.get('expr', '')}".rstrip() if what else ""
        return f"reject with{how}" if how else "reject"
    if kind == "log":
        return f'log prefix "{what["prefix"]}"' if what and "prefix" in what else "log"
    if kind == "limit":
        return f"limit rate {'over ' if what.get('inv') else ''}{what['rate']}/{what['per']}"
    if kind == "xt":
        return f"{what['type']} {what['name']}" if what else "xt"
    return "" if kind in ("counter", "comment") else kind


def _joined(flags: list[Any]) -> str:
    return f"({'|'.join(map(str, flags))})" if len(flags) > 1 else str(flags[0])


def _short(key: str) -> str:
    name = key.removeprefix("meta ")
    return (name if name in ("iif", "iifname", "oif", "oifname", "mark") else key) or "..."


def _value(value: Any, *, quoted: bool = False) -> str:
    if isinstance(value, dict):
        if "range" in value:
            return "-".join(map(str, value["range"]))
        if "prefix" in value:
            return "{addr}/{len}".format(**value["prefix"])
        if "set" in value:
            return f"{{ {', '.join(_value(each, quoted=quoted) for each in value['set'])} }}"
        return "|".join(map(str, _flags(value))) if "|" in value else "..."
    if isinstance(value, list):
        return ",".join(map(_value, value))
    return f'"{value}"' if quoted and not str(value).startswith("@") else str(value)
