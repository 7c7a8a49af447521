# SPDX-License-Identifier: GPL-2.0-or-later
"""DHCP servers of bridges, where the network manager has none of its own."""

from __future__ import annotations

import shutil

from ansible.module_utils.detour_bridging.bridge import Bridge
from ansible.module_utils.detour_bridging.host import BridgeError, Files

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
