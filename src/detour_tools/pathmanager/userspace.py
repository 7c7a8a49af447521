# SPDX-License-Identifier: GPL-2.0-or-later
"""Upstream's userspace path manager, Linux 5.19 and newer, through the ``mptcp_pm`` family."""

import errno
from collections.abc import Mapping

from detour_tools import sysctl
from detour_tools.errors import UserError
from detour_tools.netlink.codec import NetlinkError
from detour_tools.netlink.socket import GenericNetlink
from detour_tools.pathmanager import codec
from detour_tools.pathmanager.base import CreateSubflow, Offered, PathCommand
from detour_tools.pathmanager.borrowing import BorrowingPathManager, need_mptcp
from detour_tools.pathmanager.events import EventListener, Source

# A connection's first address has id 0 (RFC 8684, section 3.2), and one address keeps one id.
_INITIAL_ADDRESS_ID = 0


def sysctl_setting() -> tuple[str, str]:
    """The sysctl that chooses the userspace path manager on this kernel, and its value.

    Raises UserError when this kernel has none.
    """
    if sysctl.read("net.mptcp.path_manager") is not None:  # since 6.15
        return "net.mptcp.path_manager", "userspace"
    if sysctl.read("net.mptcp.pm_type") is not None:
        return "net.mptcp.pm_type", "1"
    raise UserError("this kernel has no userspace path manager", "Linux 5.19 or newer is needed")


class UserspacePathManager(BorrowingPathManager):
    """The ``mptcp_pm`` family of this network namespace."""

    name = "userspace"
    joins_by_itself = False

    def __init__(self, sysctls: Mapping[str, str]) -> None:
        """Open the sockets; raises UserError when the kernel or the privileges do not do.

        ``sysctls`` are set besides the choice of path manager.
        """
        need_mptcp()
        wanted = dict([sysctl_setting()]) | dict(sysctls)
        try:
            commands = GenericNetlink(codec.FAMILY)
            events = EventListener([
                Source(commands.family, codec.EVENT_GROUP, codec.decode_event)])
        except (OSError, KeyError) as error:
            raise UserError(f"cannot use the kernel's mptcp_pm netlink family: {error}",
                            "Linux 5.19 or newer is needed") from None
        super().__init__(commands, events, wanted)

    def perform(self, command: PathCommand) -> None:
        """Send a join; raises OSError when it cannot be sent."""
        if not isinstance(command, CreateSubflow):
            raise NetlinkError(errno.EOPNOTSUPP)
        self._commands.command(
            codec.CMD_SUBFLOW_CREATE,
            codec.subflow_create(command.token, command.local, _INITIAL_ADDRESS_ID,
                                 command.remote))

    def offered(self) -> list[Offered]:
        """Nothing: this path manager joins what it is told to, one by one."""
        return []
