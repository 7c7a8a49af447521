# SPDX-License-Identifier: GPL-2.0-or-later
"""Filters of role mptcp: what its variables mean for the kernel, and what the host says.

Texts of limits are as 'ip mptcp limits show' has them, 'add_addr_accepted 0 subflows 2' (iproute2).
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

# Of net.mptcp.pm_type; the third is our kernel's.
_TYPES = ("kernel", "userspace", "detour")


class FilterModule:
    """What Ansible looks for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        return {"detour_mptcp_sysctls": sysctls, "detour_mptcp_limits": limits,
                "detour_mptcp_now": now, "detour_mptcp_before": before,
                "detour_mptcp_has": has}


def sysctls(path_manager: str, enabled: bool, more: Mapping[str, Any]) -> dict[str, Any]:
    """What to set for a path manager ('' is whichever the kernel has), and what else is wanted."""
    wanted: dict[str, Any] = {"net.mptcp.enabled": int(enabled)}
    # For kernels from 6.15 on ...
    if path_manager in ("kernel", "userspace"):
        wanted["net.mptcp.path_manager"] = path_manager
    # ... and up to those, and ours, which has no other.
    if path_manager:
        wanted["net.mptcp.pm_type"] = _TYPES.index(path_manager)
    return wanted | dict(more)


def limits(wanted: Mapping[str, Any]) -> list[str]:
    """The limits to set, as 'ip mptcp limits set' takes them; those below 0 stay as they are."""
    return [word for name, number in wanted.items() if int(number) >= 0
            for word in (name, str(int(number)))]


def now(looked: str) -> str:
    """The limits that hold: the last line of what was looked at, a unit and the kernel's."""
    lines = looked.splitlines()
    return lines[-1] if lines else ""


def before(looked: str) -> str:
    """The limits to go back to: those that our unit knows, or else those that hold now."""
    found = re.search(r"^ExecStop=.* limits set (.*)$", looked, re.MULTILINE)
    return found[1] if found else now(looked)


def has(holds: str, wanted: list[str]) -> bool:
    """Whether the limits that hold are as wanted, which may name some of them only."""
    words = holds.split()
    having = dict(zip(words[::2], words[1::2], strict=False))
    return all(having.get(name) == number
               for name, number in zip(wanted[::2], wanted[1::2], strict=True))
