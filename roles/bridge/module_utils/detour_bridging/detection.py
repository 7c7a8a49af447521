# SPDX-License-Identifier: GPL-2.0-or-later
"""Which network manager is to make the bridges of this host."""

from __future__ import annotations

import re

from ansible.module_utils.detour_bridging import host
from ansible.module_utils.detour_bridging.bridge import Bridge
from ansible.module_utils.detour_bridging.host import BridgeError
from ansible.module_utils.detour_bridging.ifupdown import Ifupdown
from ansible.module_utils.detour_bridging.manager import Manager
from ansible.module_utils.detour_bridging.networkd import Networkd
from ansible.module_utils.detour_bridging.networkmanager import NetworkManager


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
    ifstate = host.text_of("/run/network/ifstate") or ""
    devices = host.run("nmcli", "-t", "-f", "DEVICE,STATE", "device", check=False)
    links = host.run("networkctl", "list", "--no-legend", "--no-pager", check=False)
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
        if host.active(f"{unit}.service"):
            return known[name]
    raise BridgeError("neither systemd-networkd nor NetworkManager nor ifupdown runs on this "
                      "host: start one of them, or set bridge_manager")
