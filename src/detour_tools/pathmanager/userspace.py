# SPDX-License-Identifier: GPL-2.0-or-later
"""Upstream's userspace path manager, Linux 5.19 and newer, through the ``mptcp_pm`` family."""

import errno

from detour_tools import runtime, sysctl
from detour_tools.endpoint import Endpoint, IPAddress
from detour_tools.errors import UserError
from detour_tools.netlink.socket import GenericNetlink, GroupListener
from detour_tools.pathmanager import codec
from detour_tools.pathmanager.base import Event, EventsLostError

# An event is about 100 bytes, near 800 as the kernel counts them: room for some ten thousand.
_RECEIVE_BUFFER = 8 << 20

# A connection's first address has id 0 (RFC 8684, section 3.2), and one address keeps one id.
_INITIAL_ADDRESS_ID = 0


def sysctl_setting() -> tuple[str, str]:
    """The sysctl that chooses the userspace path manager on this kernel, and its value.

    Raises UserError when this kernel has none.
    """
    if sysctl.read("net.mptcp.enabled") is None:
        raise UserError("this kernel has no MPTCP",
                        "a kernel with CONFIG_MPTCP, Linux 5.19 or newer, is needed")
    if sysctl.read("net.mptcp.path_manager") is not None:  # since 6.15
        return "net.mptcp.path_manager", "userspace"
    if sysctl.read("net.mptcp.pm_type") is not None:
        return "net.mptcp.pm_type", "1"
    raise UserError("this kernel has no userspace path manager", "Linux 5.19 or newer is needed")


class UserspacePathManager:
    """The ``mptcp_pm`` family of this network namespace."""

    def __init__(self) -> None:
        """Open the sockets; raises UserError when the kernel or the privileges do not do."""
        name, self._value = sysctl_setting()
        self._name = name
        runtime.need_capability("CAP_NET_ADMIN", "managing paths")
        if sysctl.read("net.mptcp.enabled") == "0":
            raise UserError("MPTCP is switched off", "sysctl net.mptcp.enabled=1")
        try:
            self._commands = GenericNetlink(codec.FAMILY)
            self._events = GroupListener(self._commands.family.groups[codec.EVENT_GROUP],
                                         _RECEIVE_BUFFER)
        except (OSError, KeyError) as error:
            raise UserError(f"cannot use the kernel's mptcp_pm netlink family: {error}",
                            "Linux 5.19 or newer is needed") from None
        self._sysctls = sysctl.BorrowedSysctls(runtime.make_directory() / "detour-client.sysctls")

    def start(self) -> None:
        """Switch this network namespace's new sockets to the userspace path manager."""
        self._sysctls.set(self._name, self._value)

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
        try:
            pending = self._events.receive()
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                raise EventsLostError from None
            raise
        if pending is None:
            return None
        decoded = (codec.decode_event(command, attributes) for command, attributes in pending)
        return [event for event in decoded if event is not None]

    def create_subflow(self, token: int, local: IPAddress, remote: Endpoint) -> None:
        """Send a join from ``local`` to ``remote``; raises OSError when it cannot be sent."""
        self._commands.command(
            codec.CMD_SUBFLOW_CREATE,
            codec.subflow_create(token, local, _INITIAL_ADDRESS_ID, remote))
