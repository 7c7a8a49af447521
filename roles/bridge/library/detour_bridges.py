#!/usr/bin/python
# SPDX-License-Identifier: GPL-2.0-or-later
"""Ansible module: bridges, by whatever manages the host's network, with a way back."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import time
import uuid
from abc import ABC, abstractmethod
from ipaddress import IPv4Interface, ip_address, ip_interface
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = """
module: detour_bridges
short_description: Bridges by systemd-networkd, ifupdown or NetworkManager
description:
  - Writes what the host's network manager needs to make bridges, and has it make them.
  - A timer is started before the change; unless I(confirm) stops it in time, it puts back the
    files that stood before and applies them.
options:
  bridges:
    description: The bridges, as the role's argument specification tells.
    type: list
    elements: dict
    default: []
  manager:
    description: Who makes them.
    type: str
    choices: [auto, networkd, ifupdown, networkmanager]
    default: auto
  rollback:
    description: Seconds until all is put back.
    type: int
    default: 120
  unfiltered:
    description: Whether the role is about to switch filtering of bridged frames off.
    type: bool
    default: false
  qemu_acl:
    description: Whether QEMU's qemu-bridge-helper may use the bridges.
    type: bool
    default: false
  qemu_helper_setuid:
    description: Whether qemu-bridge-helper is made setuid root.
    type: bool
    default: false
  confirm:
    description: See that the change is done, and stop the timer.
    type: bool
    default: false
author: [detour-tools]
"""

EXAMPLES = """
- name: Bridge
  detour_bridges:
    bridges:
      - {name: br0, ports: [eth0], mac_from: eth0}
"""

RETURN = """
applied:
  description: Whether the network was changed, so that the change is to be confirmed.
  type: bool
  returned: success
manager:
  description: Who manages the network.
  type: str
  returned: always
"""

WORK = Path("/var/lib/detour-tools/bridge")
# Of what changes the network. Wide, as it has to come to its end: netplan and ifupdown run much.
LIMITS = ("MemoryMax=1G", "TasksMax=512")
ROLLBACK = "detour-bridge-rollback"
APPLY = "detour-bridge-apply"
UNITS = Path("/etc/systemd/system")
SYS = Path("/sys/class/net")
MARK = "#detour-bridge# "

Files = dict[str, tuple[str, int]]


class BridgeError(Exception):
    """What is wrong, in one line."""


def run(*command: str, check: bool = True) -> str:
    """Run a command and return what it prints; '' when it fails and ``check`` is off."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False,
                              env={**os.environ, "LC_ALL": "C"})
    except FileNotFoundError:
        if check:
            raise BridgeError(f"there is no '{command[0]}' on this host") from None
        return ""
    if done.returncode and check:
        raise BridgeError(f"'{shlex.join(command)}' failed: {done.stderr.strip()}")
    return "" if done.returncode else done.stdout


def text_of(path: str | Path) -> str | None:
    """A file's text, None when there is none."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return None


class Bridge:
    """One that is wanted, checked; raises BridgeError."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.name: str = given["name"]
        self.ports: list[str] = given.get("ports") or []
        self.mac_from: str = given.get("mac_from") or ""
        wanted = given.get("address") or []
        self.address: list[str] = [wanted] if isinstance(wanted, str) else wanted
        self.gateway: str = given.get("gateway") or ""
        self.dns: list[str] = given.get("dns") or []
        self.dhcp: dict[str, Any] = given.get("dhcp") or {}
        self.by_dhcp = self.address == ["dhcp"]
        # What the port was configured with becomes the bridge's.
        self.takes_over = bool(self.mac_from) and not self.address
        self._check()
        self.mac = ""
        if self.mac_from:
            self.mac = (text_of(SYS / self.mac_from / "address") or "").strip()

    def _wrong(self, what: str) -> BridgeError:
        return BridgeError(f"bridge {self.name}: {what}")

    def _check(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}", self.name):
            raise BridgeError(f"'{self.name}' is no name for a bridge: 15 letters and digits at "
                              "most")
        if (SYS / self.name).exists() and not (SYS / self.name / "bridge").exists():
            raise BridgeError(f"{self.name} is there already, and no bridge")
        for port in self.ports:
            if not (SYS / port).exists():
                raise self._wrong(f"there is no interface '{port}'; there are: "
                                  f"{' '.join(sorted(os.listdir(SYS)))}")
            master = (SYS / port / "master").resolve().name
            if master not in ("master", self.name):
                raise self._wrong(f"{port} belongs to {master}")
            if master != self.name and port != self.mac_from and _has_address(port):
                raise self._wrong(f"{port} has addresses, which a port cannot use: have "
                                  f"the bridge take them over with mac_from: {port}")
        if self.mac_from and self.mac_from not in self.ports:
            raise self._wrong(f"mac_from '{self.mac_from}' is none of its ports")
        self._check_addresses()

    def _check_addresses(self) -> None:
        try:
            networks = [] if self.by_dhcp else [ip_interface(each) for each in self.address]
            for each in [self.gateway, *self.dns]:
                if each:
                    ip_address(each)
        except ValueError as error:
            raise self._wrong(f"{error}") from None
        if any("/" not in each for each in self.address) and not self.by_dhcp:
            raise self._wrong("an address needs its prefix, as in 192.0.2.1/24")
        if networks:
            self.address = [str(each) for each in networks]  # as ip shows them
        if self.gateway and not any(ip_address(self.gateway) in each.network for each in networks):
            raise self._wrong(f"its gateway {self.gateway} is in none of its networks")
        if not self.dhcp:
            return
        if self.ports:
            raise self._wrong("a DHCP server is for a bridge without ports; on this one it would "
                              "answer hosts of the network behind them")
        self.network = next((each for each in networks if isinstance(each, IPv4Interface)), None)
        if self.network is None:
            raise self._wrong("a DHCP server needs an IPv4 address on the bridge")
        try:
            self.first, self.last = (ip_address(self.dhcp[end]) for end in ("first", "last"))
        except (KeyError, ValueError) as error:
            raise self._wrong(f"dhcp needs first and last, addresses: {error}") from None
        inside = self.first in self.network.network and self.last in self.network.network
        if not inside or int(self.first) > int(self.last) or (
                int(self.first) <= int(self.network.ip) <= int(self.last)):
            raise self._wrong(f"dhcp goes from {self.first} to {self.last}, which must lie in "
                              f"{self.network.network} beside the bridge's own address")

    def done(self) -> str:
        """What is still missing of it on the host; '' when it is there."""
        if not (SYS / self.name / "bridge").exists():
            return f"there is no bridge {self.name}"
        for port in self.ports:
            if (SYS / port / "master").resolve().name != self.name:
                return f"{port} is no port of {self.name}"
        if self.mac and (text_of(SYS / self.name / "address") or "").strip() != self.mac:
            return f"{self.name} has not the MAC address of {self.mac_from}"
        shown = run("ip", "-o", "addr", "show", "dev", self.name, "scope", "global")
        for each in self.address:
            if f" {each} " not in shown and not (self.by_dhcp and " inet " in shown):
                return f"{self.name} has no address {'by DHCP' if self.by_dhcp else each}"
        if self.gateway:
            hop = ip_address(self.gateway)
            if not run("ip", f"-{hop.version}", "route", "show", "default", "via", str(hop),
                       "dev", self.name):
                return f"{self.name} has no default route by {hop}"
        return "" if " inet" in shown or not self.takes_over else f"{self.name} has no address"


def _has_address(port: str) -> bool:
    shown = run("ip", "-o", "addr", "show", "dev", port, "scope", "global", check=False)
    return bool(shown.strip())


def delete(names: set[str]) -> list[str]:
    """Shell commands that delete bridges, where they are."""
    return [f"ip link delete {name} type bridge 2>/dev/null || true" for name in sorted(names)]


class Manager(ABC):
    """What manages the network: its files, and the commands that make it read them."""

    name = ""
    patterns: tuple[str, ...] = ()
    # Those of patterns that say nothing of who made the bridges: other managers have them, too.
    shared: tuple[str, ...] = ()

    def ours(self) -> Files:
        """The files of ours that are there."""
        return {str(path): (path.read_text(encoding="utf-8"), path.stat().st_mode & 0o777)
                for pattern in self.patterns for path in sorted(Path("/").glob(pattern[1:]))}

    def made(self) -> bool:
        """Whether bridges were made by it."""
        return any(text for path, (text, _) in self.ours().items()
                   if not any(fnmatch.fnmatchcase(path, each) for each in self.shared))

    def check_source(self, bridge: Bridge, path: str) -> None:
        """Refuse to take over from a file of ours; raises BridgeError."""
        if fnmatch.fnmatchcase(path, self.patterns[0]):
            raise BridgeError(f"bridge {bridge.name}: {bridge.mac_from} is its port already, and "
                              "has nothing left to take over: take the bridge away first "
                              "(bridge_state: absent), or give an address")

    @abstractmethod
    def files(self, bridges: list[Bridge]) -> Files:
        """The files that are to be there; raises BridgeError."""

    def states(self, bridges: list[Bridge]) -> tuple[Files, Files]:
        """The files that are there, and those that are to be; raises BridgeError."""
        return self.ours(), self.files(bridges)

    def bridges_of(self, files: Files) -> dict[str, set[str]]:
        """The bridges that files are for, and which of the host's interfaces are ports of each."""
        found: dict[str, set[str]] = {}
        for path in files:
            match = re.search(
                r"/(?:05-detour-|detour-bridge-dhcp-|detour-|bridge-)([A-Za-z0-9_.-]+?)"
                r"(?:-port-(.*))?\.(?:netdev|link|network|nmconnection|dnsmasq|service)$", path)
            if match:
                found.setdefault(match[1], set()).update([match[2]] if match[2] else [])
        return found

    def anew(self, different: Files, known: set[str]) -> set[str]:
        """Those of the known bridges that files which differ make anew."""
        del known
        return set(self.bridges_of(different))

    @abstractmethod
    def down(self, bridges: set[str], ports: set[str]) -> list[str]:
        """Shell commands while the old files are there still."""

    @abstractmethod
    def up(self, bridges: set[str], ports: set[str], gone: set[str]) -> list[str]:
        """Shell commands once the new files are there; ``gone`` are bridges that are no more."""


class Networkd(Manager):
    """systemd-networkd: files that come before the host's own, which stay as they are."""

    name = "networkd"
    patterns = ("/etc/systemd/network/05-detour-*",)
    _from = "# taken over from "

    def files(self, bridges: list[Bridge]) -> Files:
        """The files that are to be there; raises BridgeError."""
        found: Files = {}
        for bridge in bridges:
            base = f"/etc/systemd/network/05-detour-{bridge.name}"
            head = "# Made by detour-tools (role bridge).\n"
            mac = f"MACAddress={bridge.mac}\n" if bridge.mac else ""
            found[f"{base}.netdev"] = (f"{head}[NetDev]\nName={bridge.name}\nKind=bridge\n{mac}\n"
                                       "[Bridge]\nSTP=no\n", 0o644)
            if bridge.mac:
                # Else a file for the port, matching its MAC address, would be for the bridge, too.
                found[f"{base}.link"] = (f"{head}[Match]\nOriginalName={bridge.name}\n\n"
                                         "[Link]\nNamePolicy=keep\nMACAddressPolicy=none\n", 0o644)
            for port in bridge.ports:
                found[f"{base}-port-{port}.network"] = (
                    f"{head}[Match]\nName={port}\n\n[Network]\nBridge={bridge.name}\n", 0o644)
            body = self._taken_over(bridge, f"{base}.network") if bridge.takes_over else (
                self._addressing(bridge))
            found[f"{base}.network"] = (f"{head}[Match]\nName={bridge.name}\n\n{body}", 0o644)
        return found

    def _taken_over(self, bridge: Bridge, path: str) -> str:
        before = text_of(path) or ""
        source = next((line.removeprefix(self._from) for line in before.splitlines()
                       if line.startswith(self._from)), "")
        iaid = re.search(r"^IAID=(.*)$", before, re.MULTILINE)
        number = iaid[1] if iaid else ""
        if not source:
            shown = run("networkctl", "status", "--no-pager", "--lines=0", bridge.mac_from)
            match = re.search(r"Network File: (\S+)", shown)
            if not match or match[1] in ("n/a", "-"):
                raise BridgeError(f"bridge {bridge.name}: systemd-networkd has no configuration of "
                                  f"{bridge.mac_from} to take over: give an address")
            source = match[1]
            self.check_source(bridge, source)
            # By it a DHCP server knows who asks; networkd makes it from the interface.
            match = re.search(r"DHCP4 Client ID: IAID:(0x[0-9a-f]+)/", shown)
            number = str(int(match[1], 16)) if match else ""
        parts = sorted(Path(f"{source}.d").glob("*.conf"))
        texts = [text_of(source), *(text_of(part) for part in parts)]
        if texts[0] is None:
            if before:  # it is gone; what was taken from it stays
                return before.partition("\n\n")[2]
            raise BridgeError(f"bridge {bridge.name}: cannot read {source}")
        text = re.sub(r"^\s*[#;].*\n", "", "\n".join(text or "" for text in texts),
                      flags=re.MULTILINE)
        sections = re.split(r"^(?=\[)", text, flags=re.MULTILINE)
        kept = [section.strip() for section in sections
                if re.match(r"\[(?!Match\]|Link\])", section)]
        if number and "IAID=" not in "".join(kept):
            kept.append(f"[DHCPv4]\nIAID={number}")
        return f"{self._from}{source}\n" + "\n\n".join(kept) + "\n"

    @staticmethod
    def _addressing(bridge: Bridge) -> str:
        lines = ["[Link]", "RequiredForOnline=no", ""] if not bridge.ports else []
        lines.append("[Network]")
        if bridge.by_dhcp:
            lines.append("DHCP=yes")
        elif bridge.address:
            lines += [f"Address={each}" for each in bridge.address]
        else:
            lines += ["LinkLocalAddressing=no", "IPv6AcceptRA=no"]
        lines += [f"Gateway={bridge.gateway}"] if bridge.gateway else []
        lines += [f"DNS={each}" for each in bridge.dns]
        if not bridge.ports:
            lines.append("ConfigureWithoutCarrier=yes")
        if bridge.dhcp and bridge.network is not None:
            dns = bridge.dhcp.get("dns") or []
            offset = int(bridge.first) - int(bridge.network.network.network_address)
            lines += ["DHCPServer=yes", "", "[DHCPServer]", f"PoolOffset={offset}",
                      f"PoolSize={int(bridge.last) - int(bridge.first) + 1}",
                      f"DefaultLeaseTimeSec={bridge.dhcp.get('lease') or 3600}",
                      f"EmitRouter={'yes' if bridge.dhcp.get('router') else 'no'}",
                      *([f"DNS={' '.join(dns)}"] if dns else ["EmitDNS=no"])]
        elif bridge.by_dhcp:
            # By its MAC address, which is that of the port: the server may know that one.
            lines += ["", "[DHCPv4]", "ClientIdentifier=mac"]
        return "\n".join(lines) + "\n"

    def anew(self, different: Files, known: set[str]) -> set[str]:
        """Those of the known bridges that files which differ make anew."""
        # With another .network it changes the bridge that is there; all else needs a new one.
        return super().anew({path: each for path, each in different.items()
                             if "-port-" in path or not path.endswith(".network")}, known)

    def down(self, bridges: set[str], ports: set[str]) -> list[str]:
        """Nothing: networkd works on what it has read."""
        return []

    def up(self, bridges: set[str], ports: set[str], gone: set[str]) -> list[str]:
        """Make bridges anew: networkd reads a .netdev only once."""
        names = sorted(bridges | ports)
        return [*delete(bridges | gone), "networkctl reload",
                # Those that are not there yet are configured as soon as they are.
                *(f"networkctl reconfigure {name} 2>/dev/null || true" for name in names)]


_DHCP_UNIT = """\
# Made by detour-tools (role bridge).
[Unit]
Description=DHCP server of the bridge {name}
After=network.target

[Service]
ExecStart=/usr/sbin/dnsmasq -k -C /etc/detour-tools/bridge-{name}.dnsmasq --pid-file
Restart=on-failure
RestartSec=2
MemoryMax=64M
TasksMax=16

User=dnsmasq
AmbientCapabilities={capabilities}
CapabilityBoundingSet={capabilities}
# Its leases outlive a change of its settings.
RuntimeDirectory=detour-bridge-{name}
RuntimeDirectoryPreserve=yes
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
PrivateDevices=yes
ProtectProc=invisible
ProtectClock=yes
ProtectHostname=yes
ProtectControlGroups=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
NoNewPrivileges=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RemoveIPC=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
"""
# To answer who has no address yet, to ask whether an address is taken, for its port.
_DHCP_CAPABILITIES = "CAP_NET_ADMIN CAP_NET_RAW CAP_NET_BIND_SERVICE"


class DhcpByDnsmasq:
    """A DHCP server for managers that have none of their own."""

    @staticmethod
    def files(bridges: list[Bridge]) -> Files:
        """Its configuration and unit."""
        found: Files = {}
        for bridge in bridges:
            if not bridge.dhcp:
                continue
            if not shutil.which("dnsmasq", path="/usr/sbin:/sbin:/usr/bin"):
                raise BridgeError(f"bridge {bridge.name}: its DHCP server needs dnsmasq: "
                                  "apt install dnsmasq-base")
            router = "" if bridge.dhcp.get("router") else "dhcp-option=option:router\n"
            dns = ",".join(bridge.dhcp.get("dns") or [])
            found[f"/etc/detour-tools/bridge-{bridge.name}.dnsmasq"] = (
                "# Made by detour-tools (role bridge).\n"
                f"interface={bridge.name}\nbind-dynamic\nport=0\nexcept-interface=lo\n"
                f"dhcp-range={bridge.first},{bridge.last},{bridge.dhcp.get('lease') or 3600}\n"
                f"{router}dhcp-option=option:dns-server{',' + dns if dns else ''}\n"
                f"dhcp-leasefile=/run/detour-bridge-{bridge.name}/leases\n", 0o644)
            found[f"/etc/systemd/system/detour-bridge-dhcp-{bridge.name}.service"] = (
                _DHCP_UNIT.format(name=bridge.name, capabilities=_DHCP_CAPABILITIES), 0o644)
        return found

    patterns = ("/etc/detour-tools/bridge-*.dnsmasq",
                "/etc/systemd/system/detour-bridge-dhcp-*.service")

    @staticmethod
    def down(bridges: set[str]) -> list[str]:
        """Stop those that change or go."""
        return [f"systemctl disable -q --now detour-bridge-dhcp-{name} 2>/dev/null || true"
                for name in sorted(bridges)]

    @staticmethod
    def up(bridges: set[str]) -> list[str]:
        """Start those that there are."""
        return ["rmdir /etc/detour-tools 2>/dev/null || true", "systemctl daemon-reload"] + [
            f"if [ -e /etc/systemd/system/detour-bridge-dhcp-{name}.service ]; then "
            f"systemctl enable -q --now detour-bridge-dhcp-{name}; "
            f"else rm -rf /run/detour-bridge-{name}; fi" for name in sorted(bridges)]


class Ifupdown(Manager):
    """/etc/network/interfaces: stanzas of ports are commented out, and become the bridge's."""

    name = "ifupdown"
    own = "/etc/network/interfaces.d/detour-bridges"
    shared = DhcpByDnsmasq.patterns
    patterns = (own, *shared)

    def ours(self) -> Files:
        """The files of ours, and those in which stanzas are commented out."""
        return super().ours() | {
            str(path): (text, path.stat().st_mode & 0o777)
            for path in self._hosts() if MARK in (text := path.read_text(encoding="utf-8"))}

    def states(self, bridges: list[Bridge]) -> tuple[Files, Files]:
        """The files that are there, and those that are to be; raises BridgeError."""
        old, new = super().states(bridges)
        # The host's own files among them: what they will be without us, and what they are now.
        for path in old.keys() - new.keys():
            text, mode = old[path]
            if MARK in text:
                new[path] = (text.replace(MARK, ""), mode)
        old |= {path: (text, mode) for path, (_, mode) in new.items()
                if path not in old and (text := text_of(path) or "")}
        return old, new

    @classmethod
    def _hosts(cls) -> list[Path]:
        return [path for path in (Path("/etc/network/interfaces"),
                                  *sorted(Path("/etc/network/interfaces.d").glob("*")))
                if path.is_file() and str(path) != cls.own]

    def files(self, bridges: list[Bridge]) -> Files:
        """The files that are to be there; raises BridgeError."""
        found: Files = {}
        stanzas: dict[str, list[str]] = {}
        ports = {port for bridge in bridges for port in bridge.ports}
        sourced = False
        for path in self._hosts():
            now = path.read_text(encoding="utf-8")
            plain = now.replace(MARK, "")
            sourced = sourced or bool(re.search(
                r"^\s*source(-directory)?\s+(/etc/network/)?interfaces\.d", plain, re.MULTILINE))
            text, taken = comment_out(plain, ports)
            for port, lines in taken.items():
                stanzas.setdefault(port, []).extend(lines)
            if text != plain:
                found[str(path)] = (text, path.stat().st_mode & 0o777)
        if bridges and not sourced:
            raise BridgeError("/etc/network/interfaces does not read interfaces.d: add the line "
                              "'source /etc/network/interfaces.d/*' to it")
        if bridges:
            made = "".join(self._stanza(bridge, stanzas) for bridge in bridges)
            found[self.own] = (f"# Made by detour-tools (role bridge).\n{made}", 0o644)
        return found | DhcpByDnsmasq.files(bridges)

    @staticmethod
    def _stanza(bridge: Bridge, stanzas: dict[str, list[str]]) -> str:
        mac = f"address {bridge.mac} " if bridge.mac else ""
        name = bridge.name
        make = [f"    pre-up ip link show {name} >/dev/null 2>&1 || "
                f"ip link add {name} {mac}type bridge",
                *(f"    pre-up ip link set {port} master {name} up" for port in bridge.ports),
                f"    post-down ip link delete {name} type bridge 2>/dev/null || true"]
        lines = ["", f"auto {name}"]
        if bridge.takes_over:
            taken = stanzas.get(bridge.mac_from, [])
            if not taken:
                raise BridgeError(f"bridge {name}: /etc/network/interfaces has no stanza of "
                                  f"{bridge.mac_from} to take over: give an address")
            for line in taken:
                words = line.split()
                if words[:2] == ["iface", bridge.mac_from]:
                    lines.append(" ".join(["iface", name, *words[2:]]))
                    lines += make
                    make = []
                elif re.search(r"\b(ethtool|ip link)\b", line):
                    lines.append(line)  # the port's own affair
                else:
                    space, option, rest = line.partition(words[0])
                    # Not those of its VLANs, as in 'dev eth0.10'.
                    lines.append(space + option + re.sub(
                        rf"(?<![\w-]){re.escape(bridge.mac_from)}(?![\w-]|\.\d)", name, rest))
        elif bridge.by_dhcp:
            lines += [f"iface {name} inet dhcp", *make]
        elif bridge.address:
            for each in bridge.address:
                family = "inet" if ip_interface(each).version == 4 else "inet6"
                lines += [f"iface {name} {family} static", *make, f"    address {each}"]
                if bridge.gateway and ip_address(bridge.gateway) in ip_interface(each).network:
                    lines.append(f"    gateway {bridge.gateway}")
                if make and bridge.dns:
                    lines.append(f"    dns-nameservers {' '.join(bridge.dns)}")
                make = []
        else:
            lines += [f"iface {name} inet manual", *make,
                      f"    up ip link set {name} up"]
        return "\n".join(lines) + "\n"

    def bridges_of(self, files: Files) -> dict[str, set[str]]:
        """The bridges that files are for, and which of the host's interfaces are ports of each."""
        found = super().bridges_of(files)
        text, _ = files.get(self.own, ("", 0))
        for name in re.findall(r"^auto (\S+)$", text, re.MULTILINE):
            found[name] = set(re.findall(
                rf"^    pre-up ip link set (\S+) master {re.escape(name)} up$", text,
                re.MULTILINE))
        return found

    def anew(self, different: Files, known: set[str]) -> set[str]:
        """All, as they are in one file."""
        del different
        return known

    def down(self, bridges: set[str], ports: set[str]) -> list[str]:
        """Take the old ones down by their old stanzas."""
        return DhcpByDnsmasq.down(bridges) + [
            f"ifdown --force {name} || true" for name in (*sorted(bridges), *sorted(ports))]

    def up(self, bridges: set[str], ports: set[str], gone: set[str]) -> list[str]:
        """Bring up what the new stanzas say."""
        # A port's stanza is the host's own; a bridge's has to work to be confirmed.
        return delete(gone) + [
            f"if ifquery {name} >/dev/null 2>&1; then ifup {name} || "
            f"{f'echo {name} >{WORK}/failed' if name in bridges else 'true'}; fi"
            for name in (*sorted(bridges), *sorted(ports))] + DhcpByDnsmasq.up(bridges)


def comment_out(text: str, ports: set[str]) -> tuple[str, dict[str, list[str]]]:
    """Comment out the stanzas of ports in the text of an interfaces file; also returns these."""
    lines: list[str] = []
    taken: dict[str, list[str]] = {}
    port = ""
    for line in text.splitlines():
        words = line.split()
        if words and words[0].startswith(("iface", "mapping", "source", "no-scripts", "rename",
                                          "auto", "allow-")):
            port = words[1] if words[0] == "iface" and words[1:] and words[1] in ports else ""
            if words[0].startswith(("auto", "allow-")):
                named = {each for each in words[1:]
                         if any(fnmatch.fnmatchcase(name, each) for name in ports)}
                if named and named != set(words[1:]):
                    raise BridgeError("/etc/network/interfaces: give each interface of "
                                      f"'{line.strip()}' a line of its own")
                lines.append(f"{MARK}{line}" if named else line)
                continue
        if port:
            if words and not words[0].startswith("#"):
                taken.setdefault(port, []).append(line)
            lines.append(f"{MARK}{line}" if words else line)
        else:
            lines.append(line)
    return "".join(f"{line}\n" for line in lines), taken


class NetworkManager(Manager):
    """NetworkManager: profiles that are preferred to the host's own."""

    name = "networkmanager"
    shared = DhcpByDnsmasq.patterns
    patterns = ("/etc/NetworkManager/system-connections/detour-*.nmconnection", *shared)
    _from = "# taken over from "

    def files(self, bridges: list[Bridge]) -> Files:
        """The files that are to be there; raises BridgeError."""
        found: Files = {}
        for bridge in bridges:
            name = f"detour-{bridge.name}"
            path = f"/etc/NetworkManager/system-connections/{name}.nmconnection"
            body = self._taken_over(bridge, path) if bridge.takes_over else self._addressing(bridge)
            mac = f"mac-address={bridge.mac}\n" if bridge.mac else ""
            found[path] = (_profile(name, "bridge", bridge.name)
                           + f"\n[bridge]\n{mac}stp=false\n\n{body}", 0o600)
            for port in bridge.ports:
                found[f"/etc/NetworkManager/system-connections/{name}-port-{port}.nmconnection"] = (
                    _profile(f"{name}-port-{port}", "ethernet", port)
                    + f"master={bridge.name}\nslave-type=bridge\n", 0o600)
        return found | DhcpByDnsmasq.files(bridges)

    def _taken_over(self, bridge: Bridge, path: str) -> str:
        before = text_of(path) or ""
        source = next((line.removeprefix(self._from) for line in before.splitlines()
                       if line.startswith(self._from)), "")
        if not source:
            current = run("nmcli", "-g", "GENERAL.CON-UUID", "device", "show", bridge.mac_from)
            shown = run("nmcli", "-t", "-f", "UUID,FILENAME", "connection", "show")
            for line in shown.splitlines():
                number, _, name = line.partition(":")
                if number == current.strip():
                    source = name.replace("\\:", ":")
            self.check_source(bridge, source)
        text = text_of(source) if source else None
        if text is None:
            if before:
                return before[before.index(self._from):]
            raise BridgeError(f"bridge {bridge.name}: NetworkManager has no profile of "
                              f"{bridge.mac_from} to take over: give an address")
        sections = re.split(r"^(?=\[)", text, flags=re.MULTILINE)
        kept = [section.strip() for section in sections
                if re.match(r"\[(ipv[46]|proxy)\]", section)]
        return f"{self._from}{source}\n" + "\n\n".join(kept) + "\n"

    @staticmethod
    def _addressing(bridge: Bridge) -> str:
        lines = []
        for version in (4, 6):
            mine = [each for each in bridge.address
                    if not bridge.by_dhcp and ip_interface(each).version == version]
            method = "auto" if bridge.by_dhcp else "manual" if mine else "disabled"
            lines += [f"[ipv{version}]", f"method={method}"]
            for number, each in enumerate(mine, 1):
                gateway = (f",{bridge.gateway}" if bridge.gateway
                           and ip_address(bridge.gateway) in ip_interface(each).network else "")
                lines.append(f"address{number}={each}{gateway}")
            dns = [each for each in bridge.dns if ip_address(each).version == version]
            if dns and (mine or bridge.by_dhcp):
                lines.append(f"dns={';'.join(dns)};")
            lines.append("")
        return "\n".join(lines)

    def down(self, bridges: set[str], ports: set[str]) -> list[str]:
        """Stop the DHCP servers of those that change or go."""
        return DhcpByDnsmasq.down(bridges)

    def up(self, bridges: set[str], ports: set[str], gone: set[str]) -> list[str]:
        """Have it read the profiles, and take them."""
        folder = "/etc/NetworkManager/system-connections"
        # First, or it would make those that are deleted anew.
        lines = ["nmcli connection reload", *delete(gone)]
        for name in sorted(bridges - gone):
            # Without its ports it may wait for a carrier.
            lines.append(f"nmcli --wait 0 connection up detour-{name} || true")
            lines.append(f"for file in {folder}/detour-{name}-port-*.nmconnection; do "
                         '[ ! -e "$file" ] || '
                         'nmcli connection up "$(basename "$file" .nmconnection)"; done')
        lines += [f"ls {folder}/detour-*-port-{port}.nmconnection >/dev/null 2>&1 || "
                  f"nmcli --wait 20 device connect {port} || true" for port in sorted(ports)]
        return lines + DhcpByDnsmasq.up(bridges)


def _profile(name: str, kind: str, interface: str) -> str:
    return ("# Made by detour-tools (role bridge).\n"
            f"[connection]\nid={name}\nuuid={uuid.uuid5(uuid.NAMESPACE_DNS, name)}\ntype={kind}\n"
            f"interface-name={interface}\nautoconnect-priority=100\n")


def active(unit: str) -> bool:
    """Whether a unit runs."""
    return run("systemctl", "is-active", unit, check=False).strip() == "active"


def managers() -> tuple[Manager, ...]:
    """All that there are, the likeliest first."""
    return Networkd(), NetworkManager(), Ifupdown()


def find_manager(wanted: str, bridges: list[Bridge]) -> Manager:
    """Who manages the ports, or else the host; raises BridgeError."""
    known = {each.name: each for each in managers()}
    for each in known.values():
        if each.made():
            if wanted not in ("auto", each.name):
                raise BridgeError(f"the bridges of this host were made by {each.name}: take them "
                                  "away first (bridge_state: absent)")
            return each
    if wanted != "auto":
        return known[wanted]
    ifstate = text_of("/run/network/ifstate") or ""
    devices = run("nmcli", "-t", "-f", "DEVICE,STATE", "device", check=False)
    links = run("networkctl", "list", "--no-legend", "--no-pager", check=False)
    for bridge in bridges:
        for port in bridge.ports:
            if re.search(rf"^{re.escape(port)}=", ifstate, re.MULTILINE):
                return known["ifupdown"]
            state = re.search(rf"^{re.escape(port)}:(.*)", devices, re.MULTILINE)
            if state and not state[1].startswith("unmanaged"):
                return known["networkmanager"]
            if re.search(rf"^\s*\d+ {re.escape(port)}\s.*configur", links, re.MULTILINE):
                return known["networkd"]
    for name, unit in (("networkd", "systemd-networkd"), ("networkmanager", "NetworkManager"),
                       ("ifupdown", "networking")):
        if active(f"{unit}.service"):
            return known[name]
    raise BridgeError("neither systemd-networkd nor NetworkManager nor ifupdown runs on this "
                      "host: start one of them, or set bridge_manager")


QEMU_ACL = Path("/etc/qemu/bridge.conf")
QEMU_HELPER = "/usr/lib/qemu/qemu-bridge-helper"
_ACL_BEGIN, _ACL_END = "# BEGIN detour-tools (role bridge)", "# END detour-tools (role bridge)"
_ACL_SETUID = "# qemu-bridge-helper was made setuid with it"


class QemuAcl:
    """Our lines in QEMU's list of bridges, and the helper's setuid bit."""

    def __init__(self, bridges: list[Bridge], allowed: bool, setuid: bool) -> None:
        setuid = setuid and bool(bridges)
        if setuid and not allowed:
            raise BridgeError("bridge_qemu_helper_setuid needs bridge_qemu_acl, or the helper may "
                              "use no bridge")
        self.before = text_of(QEMU_ACL) or ""
        theirs = re.sub(rf"^{re.escape(_ACL_BEGIN)}\n.*?^{re.escape(_ACL_END)}\n", "", self.before,
                        flags=re.MULTILINE | re.DOTALL)
        lines = [_ACL_BEGIN, *([_ACL_SETUID] if setuid else []),
                 *(f"allow {bridge.name}" for bridge in bridges), _ACL_END]
        gap = "" if not theirs or theirs.endswith("\n") else "\n"
        self.after = theirs + gap + "\n".join([*lines, ""]) if allowed and bridges else theirs
        self._add = setuid and _ACL_SETUID not in self.before
        self._remove = not setuid and _ACL_SETUID in self.before
        if self._add and not Path(QEMU_HELPER).exists():
            raise BridgeError(f"there is no {QEMU_HELPER} to make setuid: "
                              "apt install qemu-system-common")
        if self._add and run("dpkg-statoverride", "--list", QEMU_HELPER, check=False):
            self._add = False  # somebody else has decided on its mode
            self.after = self.after.replace(f"{_ACL_SETUID}\n", "")

    def write(self) -> None:
        """Make it so."""
        if self._add:
            run("dpkg-statoverride", "--update", "--add", "root", "root", "4755", QEMU_HELPER)
        if self._remove:
            run("dpkg-statoverride", "--remove", QEMU_HELPER, check=False)
            Path(QEMU_HELPER).chmod(0o755)
        if self.after:
            QEMU_ACL.parent.mkdir(exist_ok=True)
            QEMU_ACL.write_text(self.after, encoding="utf-8")
        elif self.before:
            QEMU_ACL.unlink()
            if not any(QEMU_ACL.parent.iterdir()):
                QEMU_ACL.parent.rmdir()


def script(manager: Manager, befores: tuple[Files, ...], after: Files, undone: set[str],
           source: str, marker: str) -> str:
    """A shell script that goes from any of some sets of files to one that is kept in a folder."""
    different = {path: each for before in befores
                 for path, each in before.items() ^ after.items()}
    known = [manager.bridges_of(each) for each in (*befores, after)]
    names = {name for each in known for name in each}
    there = known[-1].keys()
    anew = undone | manager.anew(different, names)
    changed = manager.bridges_of(different).keys() - anew
    ports = {port for each in known for name in anew for port in each.get(name, ())}
    # Noted in a file: the other script may have to attach them.
    lines = ["#!/bin/sh", *(f"ls {SYS}/{name}/brif 2>/dev/null >>{WORK}/carried-{name}"
                            for name in sorted(anew))]
    lines += manager.down(anew, ports)
    lines += [f"rm -f {shlex.quote(path)}" for path in sorted(
        {path for before in befores for path in before} - after.keys())]
    lines += [f"install -D -m {mode:o} {WORK}/{source}/{number} {shlex.quote(path)}"
              for number, (path, (_, mode)) in enumerate(after.items())]
    lines += manager.up(anew, ports | changed, names - there)
    lines += [attach(name, ports) for name in sorted(anew & there)]
    return "\n".join([*lines, f"touch {WORK}/{marker}", ""])


def attach(bridge: str, ports: set[str]) -> str:
    """Shell commands that put into a bridge what it carried, virtual machines, but for ports."""
    return f"""for guest in $(sort -u {WORK}/carried-{bridge}); do
    case $guest in {'|'.join(['lo', *sorted(ports)])}) continue;; esac
    tries=0  # the bridge comes when its manager has made it
    until [ ! -e {SYS}/$guest ] || [ -e {SYS}/$guest/master ] || [ $tries = 50 ] ||
          ip link set $guest master {bridge}; do tries=$((tries + 1)); sleep 0.2; done
done"""


def change(manager: Manager, old: Files, new: Files, bridges: list[Bridge], rollback: int) -> None:
    """Start the timer, then the change, and wait for it. All by files, so that it outlives us."""
    for unit in (APPLY, ROLLBACK):  # stuck, or main would have seen them end
        run("systemctl", "stop", f"{unit}.service", check=False)
    # After a change that nobody has confirmed, what stood before that one is the way back.
    kept = text_of(WORK / "old" / "files") if (WORK / "apply").exists() else None
    first: Files = {path: (text, mode) for path, (text, mode) in json.loads(kept).items()} if (
        kept) else old
    # And the host's own files that only this change touches.
    first |= {path: each for path, each in old.items() if path not in first
              and not any(fnmatch.fnmatchcase(path, pattern) for pattern in manager.patterns)}
    undone = {bridge.name for bridge in bridges if bridge.done()}
    start_timer(rollback)
    for marker in ("applied", "failed"):
        (WORK / marker).unlink(missing_ok=True)
    for folder, files in (("old", first), ("new", new)):
        (WORK / folder).mkdir(parents=True, exist_ok=True, mode=0o700)
        for number, (text, _) in enumerate(files.values()):
            (WORK / folder / str(number)).write_text(text, encoding="utf-8")
    (WORK / "old" / "files").write_text(json.dumps(first), encoding="utf-8")
    back = script(manager, (new, old), first, undone, "old", "rolled-back")
    (WORK / "rollback").write_text(
        f"systemctl stop {APPLY}.service 2>/dev/null\n{back}", encoding="utf-8")
    (WORK / "apply").write_text(
        script(manager, (old,), new, undone, "new", "applied"), encoding="utf-8")
    os.sync()  # of no use if a power cut loses it
    run("systemd-run", "-q", f"--unit={APPLY}", "--collect",
        *(f"--property={each}" for each in LIMITS), "/bin/sh", str(WORK / "apply"))
    wait_for(WORK / "applied", 60)


def start_timer(seconds: int) -> None:
    """Have all put back after that time, also when somebody reboots the lost host before."""
    what = "[Unit]\nDescription=Put back the network that was there before its bridges\n"
    (UNITS / f"{ROLLBACK}.service").write_text(
        f"{what}ConditionPathExists={WORK}/rollback\nConditionPathExists=!{WORK}/rolled-back\n\n"
        f"[Service]\nExecStart=/bin/sh {WORK}/rollback\n"
        + "".join(f"{each}\n" for each in LIMITS), encoding="utf-8")
    (UNITS / f"{ROLLBACK}.timer").write_text(
        f"{what}\n[Timer]\nOnActiveSec={seconds}\nAccuracySec=1s\n\n"
        "[Install]\nWantedBy=timers.target\n", encoding="utf-8")
    run("systemctl", "daemon-reload")
    run("systemctl", "stop", f"{ROLLBACK}.timer", check=False)  # it may run already
    run("systemctl", "enable", "-q", "--now", f"{ROLLBACK}.timer")


def wait_for(path: Path, seconds: float) -> bool:
    """Wait for a file."""
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def confirm(bridges: list[Bridge], seconds: float) -> None:
    """See that the change is done, and stop the timer; raises BridgeError."""
    if not (WORK / "apply").exists():
        return
    if (WORK / "rolled-back").exists() or active(f"{ROLLBACK}.service"):
        wait_for(WORK / "rolled-back", 30)
        clean()
        raise BridgeError("this host could not be reached with its new bridges in time, and has "
                          "put back what it had: look at the addresses and ports in "
                          "bridge_bridges")
    end = time.monotonic() + seconds
    missing = "the change is still going on"
    # Only what we came to after the change shows that the way is there.
    if (WORK / "applied").exists():
        failed = (text_of(WORK / "failed") or "").strip()
        missing = f"'ifup {failed}' failed: 'journalctl -u {APPLY}' says why" if failed else ""
        while not failed and (missing := next(
                (each for bridge in bridges if (each := bridge.done())), "")):
            if time.monotonic() > end:
                break
            time.sleep(0.5)
    if missing:
        raise BridgeError(f"{missing}; what stood before is put back when bridge_rollback_seconds "
                          "are over")
    clean()


def clean() -> None:
    """Stop the timer, and forget the files that stood before."""
    run("systemctl", "disable", "-q", "--now", f"{ROLLBACK}.timer", check=False)
    for kind in ("timer", "service"):
        (UNITS / f"{ROLLBACK}.{kind}").unlink(missing_ok=True)
    run("systemctl", "daemon-reload")
    shutil.rmtree(WORK, ignore_errors=True)
    with contextlib.suppress(OSError):  # others may keep something there
        WORK.parent.rmdir()


def main() -> None:
    """Run the module."""
    module = AnsibleModule({
        "bridges": {"type": "list", "elements": "dict", "default": []},
        "manager": {"type": "str", "default": "auto",
                    "choices": ["auto", "networkd", "ifupdown", "networkmanager"]},
        "rollback": {"type": "int", "default": 120},
        "unfiltered": {"type": "bool", "default": False},
        "qemu_acl": {"type": "bool", "default": False},
        "qemu_helper_setuid": {"type": "bool", "default": False},
        "confirm": {"type": "bool", "default": False},
    }, supports_check_mode=True)
    try:
        bridges = [Bridge(each) for each in module.params["bridges"]]
        if module.params["confirm"]:
            confirm(bridges, 30)
            module.exit_json(changed=False, manager="")
        names = [port for bridge in bridges for port in bridge.ports]
        names += [bridge.name for bridge in bridges]
        if len(set(names)) != len(names):
            raise BridgeError("bridge_bridges names a bridge or a port twice")
        if bridges and module.params["unfiltered"] and (SYS / "docker0").exists():
            raise BridgeError("Docker filters bridged frames on this host: set bridge_unfiltered "
                              "to false")
        acl = QemuAcl(bridges, module.params["qemu_acl"], module.params["qemu_helper_setuid"])
        if not module.check_mode:
            for unit, marker in ((APPLY, "applied"), (ROLLBACK, "rolled-back")):
                if active(f"{unit}.service"):
                    wait_for(WORK / marker, 60)
            if (WORK / "rolled-back").exists():
                clean()  # nobody came back then
        old: Files = {}
        new: Files = {}
        applied = False
        name = ""
        if bridges or any(each.made() for each in managers()):
            manager = find_manager(module.params["manager"], bridges)
            name = manager.name
            old, new = manager.states(bridges)
            applied = old != new or any(bridge.done() for bridge in bridges)
            if applied and not module.check_mode:
                change(manager, old, new, bridges, module.params["rollback"])
        if not applied and (WORK / "apply").exists():
            # It is as it should be, but nobody has confirmed it.
            applied = True
            if not module.check_mode:
                start_timer(module.params["rollback"])
        if acl.before != acl.after:
            if not module.check_mode:
                acl.write()
            old[str(QEMU_ACL)], new[str(QEMU_ACL)] = (acl.before, 0), (acl.after, 0)
        module.exit_json(changed=old != new or applied, applied=applied, manager=name, diff=[
            {"before_header": path, "after_header": path, "before": old.get(path, ("", 0))[0],
             "after": new.get(path, ("", 0))[0]}
            for path in sorted(old.keys() | new.keys()) if old.get(path) != new.get(path)])
    except BridgeError as error:
        module.fail_json(msg=str(error))


if __name__ == "__main__":
    main()
