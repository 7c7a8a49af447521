# SPDX-License-Identifier: GPL-2.0-or-later
"""Ansible module: opens one UDP port for some sources, in whichever firewall the host runs.

Only rules of its own are ever added or removed. What it added stands in a file, so that a later
run removes exactly that, also when port, sources or firewall are others then.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import itertools
import json
import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from typing import Protocol

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
ExecStartPost=-/usr/sbin/nft -f {NFT_FILE}
ExecReload=-/usr/sbin/nft -f {NFT_FILE}
"""


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

    (An accept in a table of our own would not do: the host's chain drops all the same.)
    """

    @staticmethod
    def wanted(port: int, sources: list[str]) -> list[Rule]:
        """The rules for these sources."""
        rules = []
        text = f"ip saddr {{ {', '.join(sources)} }} udp dport {port} accept"
        mark = "detour-tools " + hashlib.sha256(text.encode()).hexdigest()[:8]
        for chain, found in input_chains(run("nft", "-t", "list", "ruleset", check=False) or ""):
            if not drops(found, port):
                continue
            if chain == "ip filter INPUT":  # a rule by nft would make iptables refuse to show it
                raise FirewallError(
                    f"iptables drops UDP {port} here, so no client can ask the detour: run "
                    f"'iptables -I INPUT -p udp --dport {port} -s {','.join(sources)} -j ACCEPT', "
                    "make that last and set detour_server_firewall to none")
            rules.append([chain, f'{text} comment "{mark}"'])
        return rules

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


def input_chains(ruleset: str) -> Iterator[tuple[str, str]]:
    """Name and text of the ruleset's filters of incoming packets."""
    for table in re.finditer(r"^table (ip|inet) (\S+) \{\n(.*?)^\}", ruleset, re.M | re.S):
        for chain in re.finditer(r"^\tchain (\S+) \{\n(.*?)^\t\}", table[3], re.M | re.S):
            if " hook input " in chain[2] and table[2] != "detour-tools":
                yield f"{table[1]} {table[2]} {chain[1]}", chain[2]


def drops(chain: str, port: int) -> bool:
    """Whether the chain drops what no rule of its own lets in (ours aside)."""
    lines = [line.strip() for line in chain.splitlines() if "detour-tools" not in line]
    if any(re.search(rf"udp dport (\{{[^}}]*\b)?{port}\b.* accept", line) for line in lines):
        return False
    return "policy drop" in chain or any(
        re.match(r"(counter packets \d+ bytes \d+ |log .*)?(drop|reject)\b", line)
        for line in lines)


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
    """Make the file and its folder."""
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
            ipaddress.IPv4Network(each, strict=False) for each in module.params["sources"])]
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
    if not module.check_mode:
        for each, rules in gone.items():
            if rules:
                KINDS[each]().remove(rules)
        for each, rules in wanted.items():
            if new[each] or gone.get(each):
                KINDS[each]().add(rules)
        if any(wanted.values()):
            if wanted != stored:
                write(STATE, json.dumps(wanted, indent=1) + "\n")
        elif os.path.exists(STATE):
            os.unlink(STATE)
    return kind, flat(new.values()), flat(gone.values())


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
    try:
        kind, new, gone = apply(module)
    except FirewallError as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=bool(new or gone), kind=kind, diff={
        "before": "".join(f"{each}\n" for each in gone),
        "after": "".join(f"{each}\n" for each in new)})


if __name__ == "__main__":
    main()
