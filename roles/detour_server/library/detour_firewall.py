# SPDX-License-Identifier: GPL-2.0-or-later
"""Ansible module: opens one UDP port for some sources, in whichever firewall the host runs.

Only rules of its own are ever added or removed. What it added, and the host did not have, stands in
a file, so that a later run removes exactly that, also when port, sources or firewall are others.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import itertools
import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

from ansible.module_utils.basic import AnsibleModule

# One rule, as JSON keeps it: where it belongs or whom it is for, and what it is.
Rule = list[str]

STATE = "/etc/detour-tools/firewall.json"
NFT_FILE = "/etc/nftables.d/detour-tools.nft"
NFT_DROP_IN = "/etc/systemd/system/nftables.service.d/detour-tools.conf"

# The rules that nftables.service loads come first, whatever its own file holds; ours follow.
NFT_DROP_IN_TEXT = f"""\
# Ansible managed: role detour_server opens the detour's port after the host's rules are loaded.
# Should that fail, because there is no such chain any more, the host's rules stand all the same.
[Service]
MemoryMax=256M
TasksMax=16
ExecStartPost=-/usr/sbin/nft -f {NFT_FILE}
ExecReload=-/usr/sbin/nft -f {NFT_FILE}
"""

LEGACY_TABLES = "/proc/net/ip_tables_names"

# What is known of a request, by the names that nft gives it.
IPTABLES_KEYS = {"-s": "ip saddr", "-p": "meta l4proto", "-i": "meta iifname",
                 "--dport": "udp dport", "--dports": "udp dport",
                 "--ctstate": "ct state", "--state": "ct state"}
IPTABLES_MODULES = ("udp", "multiport", "conntrack", "state", "comment")
DEPTH = 16  # of jumps, as the kernel allows


class FirewallError(Exception):
    """Something that the user can mend, in one line."""


def run(*command: str, check: bool = True) -> str | None:
    """Run a command and return what it printed; None when there is none such, or it failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False,
                              env=dict(os.environ, LC_ALL="C", LANGUAGE="C"))
    except FileNotFoundError:
        return None
    if done.returncode:
        if check:
            said = (done.stderr or done.stdout).strip().splitlines() or ["it failed"]
            raise FirewallError("{}: {}".format(" ".join(command), said[-1]))
        return None
    return done.stdout


class Firewall(Protocol):
    """What is the same for each firewall; its rules are kept in STATE."""

    def wanted(self, port: int, sources: list[str]) -> list[Rule]:
        """The rules for these sources."""

    def missing(self, rules: list[Rule]) -> list[Rule]:
        """Those that the host does not have."""

    def add(self, rules: list[Rule]) -> None:
        """Add those that are missing."""

    def remove(self, rules: list[Rule]) -> None:
        """Remove those that are there."""


class Ufw:
    """ufw: a rule a source."""

    @staticmethod
    def wanted(port: int, sources: list[str]) -> list[Rule]:
        """The rules for these sources."""
        return [["any" if source == "0.0.0.0/0" else source.removesuffix("/32"), str(port)]
                for source in sources]

    @staticmethod
    def missing(rules: list[Rule]) -> list[Rule]:
        """Those that the host does not have."""
        added = {line.split(" comment ")[0]
                 for line in (run("ufw", "show", "added", check=False) or "").splitlines()}
        return [[source, port] for source, port in rules if (
            f"ufw allow {port}/udp" if source == "any"
            else f"ufw allow from {source} to any port {port} proto udp") not in added]

    def add(self, rules: list[Rule]) -> None:
        """Add those that are missing."""
        for rule in self.missing(rules):
            run("ufw", "allow", *self._words(rule), "comment", "detour-tools")

    def remove(self, rules: list[Rule]) -> None:
        """Remove those that are there."""
        for rule in rules:
            run("ufw", "delete", "allow", *self._words(rule), check=False)

    @staticmethod
    def _words(rule: Rule) -> list[str]:
        source, port = rule
        return ["proto", "udp", "from", source, "to", "any", "port", port]


class Firewalld:
    """firewalld: a rich rule a source in each zone that has interfaces; now and at boot."""

    @staticmethod
    def wanted(port: int, sources: list[str]) -> list[Rule]:
        """The rules for these sources."""
        zones = {(run("firewall-cmd", "--get-default-zone") or "").strip()}
        active = run("firewall-cmd", "--get-active-zones") or ""
        zones.update(re.findall(r"^([^\s(]+)", active, re.M))
        return [[zone, f'rule family="ipv4" source address="{source}" port port="{port}" '
                       'protocol="udp" accept'] for zone in sorted(zones) for source in sources]

    @staticmethod
    def missing(rules: list[Rule]) -> list[Rule]:
        """Those that the host does not have."""
        return [[zone, rule] for zone, rule in rules if any(
            run("firewall-cmd", *when, f"--zone={zone}", f"--query-rich-rule={rule}", check=False)
            is None for when in ([], ["--permanent"]))]

    @staticmethod
    def add(rules: list[Rule]) -> None:
        """Add those that are missing."""
        for zone, rule in rules:
            for when in ([], ["--permanent"]):
                run("firewall-cmd", *when, f"--zone={zone}", f"--add-rich-rule={rule}")

    @staticmethod
    def remove(rules: list[Rule]) -> None:
        """Remove those that are there."""
        for zone, rule in rules:
            for when in ([], ["--permanent"]):
                run("firewall-cmd", *when, f"--zone={zone}", f"--remove-rich-rule={rule}",
                    check=False)


class Nftables:
    """nftables: a rule at the beginning of each of the host's input chains that would drop the
    requests, and a file that brings them back whenever nftables.service loads the host's rules.

    (An accept in a table of our own would not do: the host's chain drops all the same.) Rules are
    judged by protocol, port, source and state; one that asks for more decides nothing here.
    """

    @staticmethod
    def wanted(port: int, sources: list[str]) -> list[Rule]:
        """The rules for these sources."""
        requests = [Request(ipaddress.IPv4Network(source), port) for source in sources]
        text = f"ip saddr {{ {', '.join(sources)} }} udp dport {port} accept"
        mark = "detour-tools " + hashlib.sha256(text.encode()).hexdigest()[:8]
        tables = nft_tables()
        tools = []
        # Only those that have rules here: to ask the others would load their tables.
        if "filter" in (read(LEGACY_TABLES) or "").split():
            tools.append("iptables-legacy")
        if "ip filter" in tables:
            tools.append("iptables-nft")
        for tool in tools:
            listed = run(tool, "-w", "5", "-S", check=False)
            if listed is None:
                continue
            if tool == "iptables-nft":  # a rule by nft would make it refuse to show this table
                del tables["ip filter"]
            if dropping(requests, iptables_table(listed), iptables_verdict):
                raise FirewallError(
                    f"{tool} drops UDP {port} here, so no client can ask the detour: run "
                    f"'{tool} -I INPUT -p udp --dport {port} -s {','.join(sources)} -j ACCEPT', "
                    "make that last and set detour_server_firewall to none")
        return [[f"{name} {chain}", f'{text} comment "{mark}"'] for name, table in tables.items()
                for chain in dropping(requests, table, nft_verdict)]

    def missing(self, rules: list[Rule]) -> list[Rule]:
        """Those that the host does not have."""
        if rules and (read(NFT_FILE) != self._text(rules) or read(NFT_DROP_IN) != NFT_DROP_IN_TEXT):
            return rules
        return [rule for rule in rules if not self._handles(rule)]

    def add(self, rules: list[Rule]) -> None:
        """Add those that are missing."""
        # All of them: the file is for all.
        write(NFT_FILE, self._text(rules))
        write(NFT_DROP_IN, NFT_DROP_IN_TEXT)
        run("systemctl", "daemon-reload")
        for rule in rules:
            if not self._handles(rule):
                run("nft", f"insert rule {rule[0]} {rule[1]}")

    def remove(self, rules: list[Rule]) -> None:
        """Remove those that are there."""
        for rule in rules:
            for handle in self._handles(rule):
                run("nft", "delete", "rule", *rule[0].split(), "handle", handle, check=False)
        for path in (NFT_FILE, NFT_DROP_IN):
            if os.path.exists(path):
                os.unlink(path)
                remove_if_empty(os.path.dirname(path))
        run("systemctl", "daemon-reload", check=False)

    @staticmethod
    def _text(rules: list[Rule]) -> str:
        return ("# Ansible managed: role detour_server lets clients ask the detour.\n"
                + "".join(f"insert rule {chain} {text}\n" for chain, text in rules))

    @staticmethod
    def _handles(rule: Rule) -> list[str]:
        mark = re.findall(r'"detour-tools \w+"', rule[1])[0]
        text = run("nft", "-a", "list", "chain", *rule[0].split(), check=False) or ""
        return [line.rsplit("# handle ", 1)[1].strip()
                for line in text.splitlines() if mark in line]


KINDS: dict[str, type[Firewall]] = {"firewalld": Firewalld, "ufw": Ufw, "nftables": Nftables}


class Table(NamedTuple):
    """Policies of the chains of incoming packets, and the rules of all chains."""

    policies: dict[str, str]
    rules: dict[str, list[Any]]


class Request(NamedTuple):
    """What is known of a client's packet to the detour: the first of its flow, UDP over IPv4."""

    source: ipaddress.IPv4Network
    port: int

    def meets(self, key: str, right: Any, *, negated: bool = False) -> bool:
        """Whether it surely meets a condition, which nft would print as ``key right``."""
        if isinstance(right, dict):
            right = right.get("set", right.get("|", right))
        found = [self._is(key, value) for value in (right if isinstance(right, list) else [right])]
        return all(each is False for each in found) if negated else True in found

    def _is(self, key: str, value: Any) -> bool | None:
        """None: that depends on what is not known."""
        if key == "ip saddr":
            networks = networks_of(value)
            if any(map(self.source.subnet_of, networks)):
                return True
            return False if networks and not any(map(self.source.overlaps, networks)) else None
        if key in ("meta iif", "meta iifname"):
            return False if value == "lo" else None
        known: tuple[object, ...] = {
            "ct state": ("new",), "meta nfproto": ("ipv4",), "meta l4proto": ("udp", 17),
            "ip protocol": ("udp", 17), "udp dport": (self.port,), "th dport": (self.port,),
        }.get(key, ())
        if isinstance(value, dict) and "range" in value and "dport" in key and known:
            return bool(value["range"][0] <= self.port <= value["range"][1])
        if not known or isinstance(value, dict) or str(value).startswith("@"):  # @: a named set
            return None
        return value in known


def networks_of(value: Any) -> list[ipaddress.IPv4Network]:
    """The IPv4 networks that nft prints so in JSON; none where it is something else."""
    try:
        if isinstance(value, dict) and "range" in value:
            first, last = map(ipaddress.IPv4Address, value["range"])
            return list(ipaddress.summarize_address_range(first, last))
        if isinstance(value, dict):
            value = "{addr}/{len}".format(**value["prefix"])
        return [ipaddress.IPv4Network(value)]
    except (KeyError, ValueError):
        return []


def dropping(requests: list[Request], table: Table,
             verdict_of: Callable[[Request, Any], str]) -> list[str]:
    """Chains of incoming packets that drop one of the requests where it comes to them."""
    return [chain for chain, policy in table.policies.items() if any(
        (end_of(request, chain, table.rules, verdict_of) or policy) == "drop"
        for request in requests)]


def end_of(request: Request, chain: str, chains: dict[str, list[Any]],
           verdict_of: Callable[[Request, Any], str], depth: int = 0) -> str:
    """How a chain surely ends for the request: 'accept', 'drop', or '' where no rule decides."""
    for rule in chains.get(chain, ()):
        verdict = verdict_of(request, rule)
        if verdict in ("accept", "drop"):
            return verdict
        how, _, target = verdict.partition(" ")
        found = end_of(request, target, chains, verdict_of, depth + 1) if (
            target and depth < DEPTH) else ""
        if found or how in ("goto", "return"):
            return found
    return ""


def nft_tables() -> dict[str, Table]:
    """All tables of nftables, but the detour's own, and without our rules."""
    tables: dict[str, Table] = {}
    for item in json.loads(run("nft", "-j", "-t", "list", "ruleset") or "{}").get("nftables", ()):
        (kind, what), = item.items()
        if kind == "table" and what["family"] in ("ip", "inet") and what["name"] != "detour-tools":
            tables["{family} {name}".format(**what)] = Table({}, {})
        table = tables.get("{family} {table}".format(**{"family": "", "table": ""} | what))
        if table and kind == "chain" and what.get("hook") == "input":
            table.policies[what["name"]] = what.get("policy", "accept")
        elif table and kind == "rule" and not what.get("comment", "").startswith("detour-tools "):
            table.rules.setdefault(what["chain"], []).append(what["expr"])
    return tables


def nft_verdict(request: Request, rule: Any) -> str:
    """accept, drop, return, 'jump X' or 'goto X' if the rule surely does that, else ''."""
    verdict = ""
    for part in rule:
        (kind, what), = part.items()
        if kind == "match":
            if what["op"] not in ("==", "in", "!=") or not request.meets(
                    nft_key(what["left"]), what["right"], negated=what["op"] == "!="):
                return ""
        elif kind == "vmap" and isinstance(what["data"], dict):
            verdict = next((nft_action(action) for value, action in what["data"].get("set", ())
                            if request.meets(nft_key(what["key"]), value)), "")
        elif nft_action(part):
            verdict = nft_action(part)
        elif kind not in ("counter", "log"):
            return ""
    return verdict


def nft_key(left: Any) -> str:
    """'ct state' of {"ct": {"key": "state"}}, and so on; '' of what is not as simple."""
    (kind, what), = left.items()
    if not isinstance(what, dict):
        return ""
    return f"{what.get('protocol', kind)} {what.get('key', what.get('field'))}"


def nft_action(part: dict[str, Any]) -> str:
    """The verdict that a part of a rule is, '' if it is none."""
    (kind, what), = part.items()
    return {"accept": "accept", "drop": "drop", "reject": "drop", "return": "return"}.get(
        kind, f"{kind} {what['target']}" if kind in ("jump", "goto") else "")


def iptables_table(listed: str) -> Table:
    """The table that ``iptables -S`` prints."""
    table = Table({}, {})
    for line in listed.splitlines():
        kind, chain, *rest = line.split(" ", 2)
        if kind == "-P" and chain == "INPUT":
            table.policies[chain] = rest[0].lower()
        elif kind == "-A":
            table.rules.setdefault(chain, []).append("".join(rest))
    return table


def iptables_verdict(request: Request, rule: str) -> str:
    """As nft_verdict, of a rule as ``iptables -S`` prints it."""
    words = iter(shlex.split(rule))
    negated = False
    for word in words:
        if word == "!":
            negated = True
            continue
        value = next(words, "")
        if word in ("-j", "-g"):
            return {"ACCEPT": "accept", "DROP": "drop", "REJECT": "drop", "RETURN": "return"}.get(
                value, f"{'jump' if word == '-j' else 'goto'} {value}")
        if word in IPTABLES_KEYS:
            if not request.meets(IPTABLES_KEYS[word], [literal(each) for each in value.split(",")],
                                 negated=negated):
                return ""
        elif word != "--comment" and (word != "-m" or value not in IPTABLES_MODULES):
            return ""
        negated = False
    return ""


def literal(text: str) -> object:
    """A value of iptables as nft prints it in JSON."""
    if re.fullmatch(r"\d+:\d+", text):
        return {"range": [int(each) for each in text.split(":")]}
    return int(text) if text.isdecimal() else text.lower()


def detect() -> str:
    """Which firewall runs here; that of nft is for all who have no other."""
    if (run("firewall-cmd", "--state", check=False) or "").startswith("running"):
        return "firewalld"
    if (run("ufw", "status", check=False) or "").startswith("Status: active"):
        return "ufw"
    return "nftables"


def read(path: str) -> str | None:
    """The file's text, None when there is none."""
    try:
        with open(path, encoding="utf-8") as stream:
            return stream.read()
    except FileNotFoundError:
        return None


def write(path: str, text: str) -> None:
    """Make the file and its folder, unless it is so."""
    if read(path) == text:
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(text)


def remove_if_empty(folder: str) -> None:
    """Remove a folder that holds nothing more."""
    with contextlib.suppress(OSError):
        os.rmdir(folder)


def apply(module: AnsibleModule) -> tuple[str, list[Rule], list[Rule]]:
    """Bring the host to what is wanted; returns the firewall, and the rules added and removed."""
    try:
        sources = [str(each) for each in ipaddress.collapse_addresses(  # nft takes no overlaps
            ipaddress.IPv4Network(each) for each in module.params["sources"])]
    except ValueError as error:
        raise FirewallError(f"detour_server_allow_client: {error}") from None
    kind = module.params["kind"]
    if module.params["state"] == "absent":
        kind = "none"
    elif kind == "auto":
        kind = detect()
    wanted = {} if kind == "none" else {
        kind: KINDS[kind]().wanted(module.params["port"], sources)}
    stored = json.loads(read(STATE) or "{}")
    gone = {each: [rule for rule in rules if rule not in wanted.get(each, [])]
            for each, rules in stored.items()}
    new = {each: KINDS[each]().missing(rules) for each, rules in wanted.items()}
    # Not those that the host's owner had: they stay when ours go.
    ours = {each: [rule for rule in rules if rule in new[each] or rule in stored.get(each, [])]
            for each, rules in wanted.items()}
    if not module.check_mode:
        if any(new.values()):  # before they are added, as the run may be interrupted
            remember({each: stored.get(each, []) + new.get(each, [])
                      for each in {**stored, **new}})
        for each, rules in gone.items():
            if rules:
                KINDS[each]().remove(rules)
        for each, rules in wanted.items():
            if new[each] or gone.get(each):
                KINDS[each]().add(rules)
        remember(ours)
    return kind, flat(new.values()), flat(gone.values())


def remember(rules: dict[str, list[Rule]]) -> None:
    """Keep in STATE which rules are ours."""
    if any(rules.values()):
        write(STATE, json.dumps(rules, indent=1) + "\n")
    elif os.path.exists(STATE):
        os.unlink(STATE)


def flat(lists: Iterable[list[Rule]]) -> list[Rule]:
    """All of them in one list."""
    return list(itertools.chain(*lists))


def main() -> None:
    """The module."""
    module = AnsibleModule(supports_check_mode=True, argument_spec={
        "kind": {"choices": ["auto", "none", *KINDS], "default": "auto"},
        "port": {"type": "int", "required": True},
        "sources": {"type": "list", "elements": "str", "required": True},
        "state": {"choices": ["present", "absent"], "default": "present"},
    })
    os.umask(0o022)  # whatever root's is: users may look at what systemd reads
    try:
        kind, new, gone = apply(module)
    except FirewallError as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=bool(new or gone), kind=kind, diff={
        "before": "".join(f"{each}\n" for each in gone),
        "after": "".join(f"{each}\n" for each in new)})


if __name__ == "__main__":
    main()
