# SPDX-License-Identifier: GPL-2.0-or-later
"""What both path managers of the kernel have in common: sockets, and sysctls that are put back."""

import re
from collections.abc import Mapping

from detour_tools import runtime, sysctl
from detour_tools.errors import UserError
from detour_tools.netlink.socket import GenericNetlink
from detour_tools.pathmanager.base import Event
from detour_tools.pathmanager.events import EventListener

# One journal for all: whichever runs next puts back what a killed one borrowed.
_PROGRAM = "detour-client"
_NAMES = re.compile(r"net\.mptcp\.(path_manager|pm_type|detour_subflows|detour_upgrade_tcp)")


def need_mptcp() -> None:
    """Raise UserError unless this kernel has MPTCP, switched on, and we may manage its paths."""
    enabled = sysctl.read("net.mptcp.enabled")
    if enabled is None:
        raise UserError("this kernel has no MPTCP",
                        "a kernel with CONFIG_MPTCP, Linux 5.19 or newer, is needed")
    runtime.need_capability("CAP_NET_ADMIN", "managing paths")
    if enabled == "0":
        raise UserError("MPTCP is switched off", "sysctl net.mptcp.enabled=1")


class BorrowingPathManager:
    """Takes over the new sockets of this network namespace by sysctl, and hears their events."""

    def __init__(self, commands: GenericNetlink, events: EventListener,
                 wanted: Mapping[str, str]) -> None:
        """``wanted`` are the sysctls to set. Both sockets are closed when it stops."""
        self._commands = commands
        self._events = events
        self._wanted = wanted
        self._sysctls = sysctl.BorrowedSysctls(
            runtime.make_directory(_PROGRAM) / f"{_PROGRAM}.sysctls", _NAMES)

    def start(self) -> None:
        """Switch this network namespace's new sockets to this path manager."""
        self._sysctls.hold(self._wanted)

    def stop(self) -> None:
        """Switch back, and close the sockets."""
        self._sysctls.restore()
        self._events.close()
        self._commands.close()

    def fileno(self) -> int:
        """Readable when there are events."""
        return self._events.fileno()

    def receive(self) -> list[Event] | None:
        """Some pending events, None when there are none; raises EventsLostError."""
        return self._events.receive()
