# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's IPv4 forwarding switch, while a server needs it on."""

import os

from detour_tools import runtime
from detour_tools.sysctl import BorrowedSysctls

FORWARDING = "net.ipv4.ip_forward"

_PER_INTERFACE = "/proc/sys/net/ipv4/conf"


class ForwardingSwitch:
    """``net.ipv4.ip_forward``, and what the kernel changes along with it."""

    def __init__(self, program: str) -> None:
        self._sysctls = BorrowedSysctls(runtime.directory(program) / f"{program}.sysctls")

    def on(self) -> bool:
        """Switch it on, remembering what was; raises UserError.

        Whether it was on, before this server or those before it that were killed.
        """
        # See inet_forward_change() in the kernel's net/ipv4/devinet.c.
        self._sysctls.set(FORWARDING, "1", resets={
            f"net/ipv4/conf/{name}/forwarding": "0" for name in os.listdir(_PER_INTERFACE)
            if name != "all"} | {"net/ipv4/conf/all/accept_redirects": "1"})
        return self._sysctls.found(FORWARDING) in (None, "1")

    def put_back(self) -> None:
        """Leave it as it was found, unless somebody else has changed it since."""
        self._sysctls.restore()
