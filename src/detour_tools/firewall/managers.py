# SPDX-License-Identifier: GPL-2.0-or-later
"""What lets requests in: nft, ufw or firewalld, each now and at boot, by rules of its own only."""

import contextlib
import os
import re
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any, Protocol
from xml.etree import ElementTree

from detour_tools.errors import UserError
from detour_tools.firewall import look, nft, opening
from detour_tools.firewall.opening import Rule

_NFT_FILE = Path("/etc/nftables.d/detour-tools.nft")
_NFT_DROP_IN = Path("/etc/systemd/system/nftables.service.d/detour-tools.conf")
_ANY = "0.0.0.0/0"
_NOW, _AT_BOOT = " (now)", " (at boot)"  # after a zone's name
_ZONES = Path("/etc/firewalld/zones")
_ZONES_SHIPPED = Path("/usr/lib/firewalld/zones")

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

    def understood(self, stored: list[Rule]) -> list[Rule]:
        """Rules that were stored, also by an earlier release."""

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
    def understood(stored: list[Rule]) -> list[Rule]:
        """Rules that were stored, also by an earlier release."""
        return stored

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
    """firewalld: a rich rule a source in each zone that has interfaces, now and at boot.

    For the latter firewalld makes a file of the zone's settings, unless the host has one: that is
    among the rules here, so that it goes with them.
    """

    @staticmethod
    def wanted(port: int, sources: list[IPv4Network]) -> list[Rule]:
        """The rules that let requests from the sources in."""
        zones = {_run("firewall-cmd", "--get-default-zone").strip()}
        zones.update(re.findall(r"^([^\s(]+)", _run("firewall-cmd", "--get-active-zones"), re.M))
        found = []
        for zone in sorted(zones):
            rules = [f'rule family="ipv4" source address="{source}" port port="{port}" '
                     'protocol="udp" accept' for source in sources]
            found += [(zone + when, rule) for rule in rules for when in (_NOW, _AT_BOOT)]
            found += [(zone, str(_ZONES / f"{zone}.xml"))] if rules else []
        return found

    @staticmethod
    def understood(stored: list[Rule]) -> list[Rule]:
        """What an earlier release stored, which knew of no difference: as this one would."""
        return [(zone + when, what) for zone, what in stored for when in (
            (_NOW, _AT_BOOT) if _is_rule(what) and " " not in zone else ("",))]

    @staticmethod
    def missing(rules: list[Rule]) -> list[Rule]:
        """Those that the host does not have."""
        lacks = [(where, what) for where, what in rules if _is_rule(what)
                 and _try(*_zone(where), f"--query-rich-rule={what}") is None]
        written = {where.removesuffix(_AT_BOOT) for where, _ in lacks if where.endswith(_AT_BOOT)}
        return [(where, what) for where, what in rules if (where, what) in lacks
                or (where in written and not _is_rule(what) and not Path(what).exists())]

    def add(self, rules: list[Rule]) -> None:
        """Add those that are missing."""
        for where, rule in self.missing(rules):
            if _is_rule(rule):
                _run(*_zone(where), f"--add-rich-rule={rule}")

    @staticmethod
    def remove(rules: list[Rule]) -> None:
        """Remove those that are there; also where firewalld does not run, as it may again."""
        runs = _try("firewall-cmd", "--state") is not None
        for where, rule in rules:
            if _is_rule(rule) and (runs or where.endswith(_AT_BOOT)):
                of_zone = _zone(where, runs=runs)
                if _try(*of_zone, f"--query-rich-rule={rule}") is not None:
                    _run(*of_zone, f"--remove-rich-rule={rule}")
        for zone, what in rules:
            path = Path(what)
            # Not if the host's owner changed it since.
            if not _is_rule(what) and _settings(path) == _settings(_ZONES_SHIPPED / path.name):
                if runs:  # or it would not know
                    _run("firewall-cmd", "--permanent", f"--load-zone-defaults={zone}")
                for each in (path, path.with_name(f"{path.name}.old")):  # it keeps the one before
                    each.unlink(missing_ok=True)


def _is_rule(what: str) -> bool:
    return what.startswith("rule ")


def _zone(where: str, *, runs: bool = True) -> list[str]:
    """The command that is about the rules of a zone, now or at boot."""
    zone = f"--zone={where.partition(' ')[0]}"
    if not where.endswith(_AT_BOOT):
        return ["firewall-cmd", zone]
    return ["firewall-cmd", "--permanent", zone] if runs else ["firewall-offline-cmd", zone]


def _settings(path: Path) -> list[str]:
    """What a file of firewalld says, however it is written; [its name] if there is none."""
    try:
        root = ElementTree.parse(path).getroot()  # noqa: S314 - root's own
    except (OSError, ElementTree.ParseError):
        return [str(path)]
    parts = [ElementTree.canonicalize(ElementTree.tostring(each), strip_text=True) for each in root]
    return [str(root.attrib), *sorted(" ".join(part.split()) for part in parts)]


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

    @staticmethod
    def understood(stored: list[Rule]) -> list[Rule]:
        """Rules that were stored, also by an earlier release."""
        return stored

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
