# SPDX-License-Identifier: GPL-2.0-or-later
"""Which path manager to use."""

import logging

from detour_tools import sysctl
from detour_tools.client.settings import PathManagerChoice
from detour_tools.errors import UserError
from detour_tools.pathmanager import kernel
from detour_tools.pathmanager.base import PathManager
from detour_tools.pathmanager.detour_family import open_family
from detour_tools.pathmanager.kernel import KernelPathManager
from detour_tools.pathmanager.userspace import UserspacePathManager

log = logging.getLogger(__name__)

UPGRADE_SYSCTL = "net.mptcp.detour_upgrade_tcp"


def kernel_obstacle() -> UserError | None:
    """Why the kernel's detour path manager cannot be used here; None when it can."""
    try:
        open_family().close()
    except UserError as error:
        return error
    return None


def choose(wanted: PathManagerChoice, max_subflows: int, *, upgrade_tcp: bool) -> PathManager:
    """Open the path manager that was asked for (``auto``: the kernel's where there is one).

    ``max_subflows`` are those through detours; with ``upgrade_tcp`` the kernel makes ordinary TCP
    sockets MPTCP ones. Raises UserError when something of that cannot be had.
    """
    sysctls = {}
    if upgrade_tcp:
        if sysctl.read(UPGRADE_SYSCTL) is None:
            raise UserError(
                f"this kernel does not upgrade TCP sockets: it has no {UPGRADE_SYSCTL}",
                "do without --upgrade-tcp and use detour-client run, or boot the kernel of "
                "kernel/README.md")
        sysctls[UPGRADE_SYSCTL] = "1"
    if wanted == "kernel" or (wanted == "auto" and kernel_obstacle() is None):
        if max_subflows >= kernel.MOST_SUBFLOWS:
            log.warning("the kernel's path manager gives a connection %d subflows through "
                        "detours at most", kernel.MOST_SUBFLOWS - 1)
        return KernelPathManager(max_subflows + 1, sysctls)
    return UserspacePathManager(sysctls)
