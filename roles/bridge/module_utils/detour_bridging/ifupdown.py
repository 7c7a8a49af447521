# SPDX-License-Identifier: GPL-2.0-or-later
"""Bridges by ifupdown."""

from __future__ import annotations

import fnmatch
import re
from ipaddress import ip_address, ip_interface
from pathlib import Path

from ansible.module_utils.detour_bridging import host
from ansible.module_utils.detour_bridging.bridge import Bridge
from ansible.module_utils.detour_bridging.dnsmasq import DhcpByDnsmasq
from ansible.module_utils.detour_bridging.host import BridgeError, Files
from ansible.module_utils.detour_bridging.manager import Manager, delete

MARK = "#detour-bridge# "


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
                if path not in old and (text := host.text_of(path) or "")}
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
            f"{f'echo {name} >{host.WORK}/failed' if name in bridges else 'true'}; fi"
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
