# SPDX-License-Identifier: GPL-2.0-or-later
"""Bridges by systemd-networkd."""

from __future__ import annotations

import re
from pathlib import Path

from ansible.module_utils.detour_bridging import host
from ansible.module_utils.detour_bridging.bridge import Bridge
from ansible.module_utils.detour_bridging.host import BridgeError, Files
from ansible.module_utils.detour_bridging.manager import Manager, delete


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
        before = host.text_of(path) or ""
        source = next((line.removeprefix(self._from) for line in before.splitlines()
                       if line.startswith(self._from)), "")
        iaid = re.search(r"^IAID=(.*)$", before, re.MULTILINE)
        number = iaid[1] if iaid else ""
        if not source:
            shown = host.run("networkctl", "status", "--no-pager", "--lines=0", bridge.mac_from)
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
        texts = [host.text_of(source), *(host.text_of(part) for part in parts)]
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
