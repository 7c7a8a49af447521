# SPDX-License-Identifier: GPL-2.0-or-later
"""A bridge that is wanted: what is wrong with it, and what is missing of it on the host."""

from __future__ import annotations

import os
import re
from ipaddress import IPv4Interface, ip_address, ip_interface
from typing import Any

from ansible.module_utils.detour_bridging import host
from ansible.module_utils.detour_bridging.host import BridgeError


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
            self.mac = _mac(self.mac_from)

    def _wrong(self, what: str) -> BridgeError:
        return BridgeError(f"bridge {self.name}: {what}")

    def _check(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}", self.name):
            raise BridgeError(f"'{self.name}' is no name for a bridge: 15 letters and digits at "
                              "most")
        if (host.SYS / self.name).exists() and not (host.SYS / self.name / "bridge").exists():
            raise BridgeError(f"{self.name} is there already, and no bridge")
        for port in self.ports:
            if not (host.SYS / port).exists():
                raise self._wrong(f"there is no interface '{port}'; there are: "
                                  f"{' '.join(sorted(os.listdir(host.SYS)))}")
            master = (host.SYS / port / "master").resolve().name
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
        if not (host.SYS / self.name / "bridge").exists():
            return f"there is no bridge {self.name}"
        for port in self.ports:
            if (host.SYS / port / "master").resolve().name != self.name:
                return f"{port} is no port of {self.name}"
        if self.mac and _mac(self.name) != self.mac:
            return f"{self.name} has not the MAC address of {self.mac_from}"
        shown = host.run("ip", "-o", "addr", "show", "dev", self.name, "scope", "global")
        for each in self.address:
            if f" {each} " not in shown and not (self.by_dhcp and " inet " in shown):
                return f"{self.name} has no address {'by DHCP' if self.by_dhcp else each}"
        if self.gateway:
            hop = ip_address(self.gateway)
            if not host.run("ip", f"-{hop.version}", "route", "show", "default", "via", str(hop),
                            "dev", self.name):
                return f"{self.name} has no default route by {hop}"
        return "" if " inet" in shown or not self.takes_over else f"{self.name} has no address"


def _mac(interface: str) -> str:
    return (host.text_of(host.SYS / interface / "address") or "").strip()


def _has_address(port: str) -> bool:
    shown = host.run("ip", "-o", "addr", "show", "dev", port, "scope", "global", check=False)
    return bool(shown.strip())
