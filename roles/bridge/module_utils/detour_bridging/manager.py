# SPDX-License-Identifier: GPL-2.0-or-later
"""What every network manager has to tell."""

from __future__ import annotations

import fnmatch
import re
from abc import ABC, abstractmethod
from pathlib import Path

from ansible.module_utils.detour_bridging.bridge import Bridge
from ansible.module_utils.detour_bridging.host import BridgeError, Files


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


def delete(names: set[str]) -> list[str]:
    """Shell commands that delete bridges, where they are."""
    return [f"ip link delete {name} type bridge 2>/dev/null || true" for name in sorted(names)]
