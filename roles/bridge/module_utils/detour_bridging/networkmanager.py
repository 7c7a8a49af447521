# SPDX-License-Identifier: GPL-2.0-or-later
"""Bridges by NetworkManager."""

from __future__ import annotations

import re
import uuid
from ipaddress import ip_address, ip_interface

from ansible.module_utils.detour_bridging import host
from ansible.module_utils.detour_bridging.bridge import Bridge
from ansible.module_utils.detour_bridging.dnsmasq import DhcpByDnsmasq
from ansible.module_utils.detour_bridging.host import BridgeError, Files
from ansible.module_utils.detour_bridging.manager import Manager, delete


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
        before = host.text_of(path) or ""
        source = next((line.removeprefix(self._from) for line in before.splitlines()
                       if line.startswith(self._from)), "")
        if not source:
            current = host.run("nmcli", "-g", "GENERAL.CON-UUID", "device", "show", bridge.mac_from)
            shown = host.run("nmcli", "-t", "-f", "UUID,FILENAME", "connection", "show")
            for line in shown.splitlines():
                number, _, name = line.partition(":")
                if number == current.strip():
                    source = name.replace("\\:", ":")
            self.check_source(bridge, source)
        text = host.text_of(source) if source else None
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
