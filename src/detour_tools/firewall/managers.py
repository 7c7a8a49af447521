# SPDX-License-Identifier: GPL-2.0-or-later
"""What lets requests in: nft, ufw or firewalld, each now and at boot, by rules of its own only."""

import contextlib
import os
import re
from collections.abc import Sequence
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any, Protocol

from detour_tools.errors import UserError
from detour_tools.firewall import look, nft, opening
from detour_tools.firewall.opening import Rule

_NFT_FILE = Path("/etc/nftables.d/detour-tools.nft")
_NFT_DROP_IN = Path("/etc/systemd/system/nftables.service.d/detour-tools.conf")
_ANY = "0.0.0.0/0"

# The rules that nftables.service loads come first, whatever its own file holds; ours follow.
_NFT_DROP_IN_TEXT = f"""\
# Made by 'detour-server firewall open': the detour's port is opened after the host's rules are
# loaded. Should that fail, because there is no such chain any more, those stand all the same.
[Service]
ExecStartPost=-/usr/sbin/nft -f {_NFT_FILE}
ExecReload=-/usr/sbin/nft -f {_NFT_FILE}
"""


class Firewall(Protocol):
    """What is the same for each. All methods block, and raise UserError."""

    def wanted(self, port: int, sources: list[IPv4Network]) -> list[Rule]:
        """The rules that let requests from the sources in."""

    def missing(self, rules: list[Rule]) -> list[Rule]:
        """Those that the host does not have."""

    def add(self, rules: list[Rule]) -> None:
        """Add those that are missing."""

    def remove(self, rules: list[Rule]) -> None:
        """Remove those that are there."""


class Ufw:
    """ufw: a rule a source."""

    @staticmethod
    def wanted(port: int, sources: list[IPv4Network]) -> list[Rule]:
        """The rules that let requests from the sources in."""
        return [("any" if str(source) == _ANY else str(source).removesuffix("/32"), str(port))
                for source in sources]

    @staticmethod
    def missing(rules: list[Rule]) -> list[Rule]:
        """Those that the host does not have."""
        added = {line.split(" comment ")[0]
                 for line in (_try("ufw", "show", "added") or "").splitlines()}
        return [(source, port) for source, port in rules if (
            f"ufw allow {port}/udp" if source == "any"
            else f"ufw allow from {source} to any port {port} proto udp") not in added]

    def add(self, rules: list[Rule]) -> None:
        """Add those that are missing."""
        for rule in self.missing(rules):
            _run("ufw", "allow", *self._words(rule), "comment", "detour-tools")

    def remove(self, rules: list[Rule]) -> None:
        """Remove those that are there."""
        for rule in rules:
            _try("ufw", "delete", "allow", *self._words(rule))

    @staticmethod
    def _words(rule: Rule) -> list[str]:
        source, port = rule
        return ["proto", "udp", "from", source, "to", "any", "port", port]


class Firewalld:
    """firewalld: a rich rule a source in each zone that has interfaces; now and at boot."""

    _WHEN: tuple[Sequence[str], ...] = ((), ("--permanent",))

    @staticmethod
    def wanted(port: int, sources: list[IPv4Network]) -> list[Rule]:
        """The rules that let requests from the sources in."""
        zones = {_run("firewall-cmd", "--get-default-zone").strip()}
        zones.update(re.findall(r"^([^\s(]+)", _run("firewall-cmd", "--get-active-zones"), re.M))
        return [(zone, f'rule family="ipv4" source address="{source}" port port="{port}" '
                       'protocol="udp" accept') for zone in sorted(zones) for source in sources]

    def missing(self, rules: list[Rule]) -> list[Rule]:
        """Those that the host does not have."""
        return [(zone, rule) for zone, rule in rules if any(
            _try("firewall-cmd", *when, f"--zone={zone}", f"--query-rich-rule={rule}") is None
            for when in self._WHEN)]

    def add(self, rules: list[Rule]) -> None:
        """Add those that are missing."""
        for zone, rule in rules:
            for when in self._WHEN:
                _run("firewall-cmd", *when, f"--zone={zone}", f"--add-rich-rule={rule}")

    def remove(self, rules: list[Rule]) -> None:
        """Remove those that are there."""
        for zone, rule in rules:
            for when in self._WHEN:
                _try("firewall-cmd", *when, f"--zone={zone}", f"--remove-rich-rule={rule}")


class Nftables:
    """nftables: a rule at the beginning of each of the host's input chains that would drop the
    requests, and a file that brings them back whenever nftables.service loads the host's rules.

    (An accept in a table of our own would not do: the host's chain drops all the same.)
    """

    @staticmethod
    def wanted(port: int, sources: list[IPv4Network]) -> list[Rule]:
        """The rules that let requests from the sources in."""
        objects = opening.without_ours(_objects())
        chains = look.chains_of(objects, to_change=True)[0]
        for chain in opening.requests_stopped(chains, port, sources):
            if chain.program[0] != "nft":
                raise UserError(
                    f"{chain.program[0]} drops UDP {port} here, so no client can ask the detour",
                    f"run '{chain.program[0]} -I {chain.own_name} -p udp --dport {port} -s "
                    f"{','.join(map(str, sources))} -j ACCEPT', make that last, and leave the "
                    "firewall to yourself (role: detour_server_firewall is none)")
            if chain.owned:
                raise UserError(f"the chain {chain.name} drops UDP {port}, and belongs to a "
                                "program that lets nobody change it", "tell that one to accept it")
        return opening.for_requests(chains, port, sources)

    def missing(self, rules: list[Rule]) -> list[Rule]:
        """Those that the host does not have."""
        if rules and (_read(_NFT_FILE), _read(_NFT_DROP_IN)) != (
                self._text(rules), _NFT_DROP_IN_TEXT):
            return rules
        objects = _objects() if rules else []
        return [rule for rule in rules if not opening.handles(objects, rule)]

    def add(self, rules: list[Rule]) -> None:
        """Add those that are missing."""
        if not rules:
            return
        # All of them: the file is for all.
        write(_NFT_FILE, self._text(rules))
        write(_NFT_DROP_IN, _NFT_DROP_IN_TEXT)
        _reload_systemd()
        objects = _objects()
        for chain, text in rules:
            if not opening.handles(objects, (chain, text)):
                _run("nft", f"insert rule {chain} {text}")

    @staticmethod
    def remove(rules: list[Rule]) -> None:
        """Remove those that are there."""
        objects = _objects()
        for rule in rules:
            for handle in opening.handles(objects, rule):
                _try("nft", "delete", "rule", *rule[0].split(), "handle", handle)
        for path in (_NFT_FILE, _NFT_DROP_IN):
            remove(path)
        _reload_systemd()

    @staticmethod
    def _text(rules: list[Rule]) -> str:
        return ("# Made by 'detour-server firewall open': clients may ask the detour.\n"
                + "".join(f"insert rule {chain} {text}\n" for chain, text in rules))


KINDS: dict[str, type[Firewall]] = {"firewalld": Firewalld, "ufw": Ufw, "nftables": Nftables}


def detect() -> str:
    """Which firewall runs here; that of nft is for all who have no other."""
    if (_try("firewall-cmd", "--state") or "").startswith("running"):
        return "firewalld"
    if (_try("ufw", "status") or "").startswith("Status: active"):
        return "ufw"
    return "nftables"


def write(path: Path, text: str) -> None:
    """Make the file and its folder, unless it is so; whole or not at all."""
    if _read(path) == text:
        return
    new = path.with_name(f".{path.name}.new")  # a folder of root's
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        new.unlink(missing_ok=True)
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def remove(path: Path) -> None:
    """Remove the file, if it is there, and its folder, if that holds nothing more."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
        with contextlib.suppress(OSError):
            path.parent.rmdir()


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def _objects() -> list[dict[str, Any]]:
    try:
        return nft.parse(look.ruleset())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the rules of nftables: {error}") from None


def _reload_systemd() -> None:
    if os.path.isdir("/run/systemd/system"):
        _run("systemctl", "daemon-reload")


def _run(*command: str) -> str:
    try:
        return look.run(list(command)).decode("utf-8", "replace")
    except OSError as error:
        raise UserError(f"'{' '.join(command)}' failed: {error}") from None


def _try(*command: str) -> str | None:
    """What it printed; None when there is no such program, or it failed."""
    try:
        return look.run(list(command)).decode("utf-8", "replace")
    except OSError:
        return None
