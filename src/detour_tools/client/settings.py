# SPDX-License-Identifier: GPL-2.0-or-later
"""What the client daemon can be set to: names, types and defaults."""

from dataclasses import dataclass
from typing import Literal

from detour_tools.endpoint import Network

Preference = Literal["rtt", "order"]
PathManagerChoice = Literal["auto", "userspace", "kernel"]


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """Settings of ``detour-client daemon``; raises ValueError out of range.

    ``max_subflows`` counts subflows through detours, so not the direct one. ``probe_interval``
    (seconds) is how often a detour that fell silent is asked again. ``path_manager`` is ``kernel``
    for that of our own kernel, ``auto`` for that where there is one. With ``upgrade_tcp`` such a
    kernel makes MPTCP sockets of programs' ordinary TCP sockets.
    """

    detours: tuple[str, ...] = ()
    max_subflows: int = 2
    path_manager: PathManagerChoice = "auto"
    upgrade_tcp: bool = False
    prefer: Preference = "rtt"
    include: tuple[Network, ...] = ()
    exclude: tuple[Network, ...] = ()
    probe_interval: float = 30.0
    control_group: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.max_subflows <= 8:
            raise ValueError("max-subflows: must be from 1 to 8")
        if not 1 <= self.probe_interval <= 86400:
            raise ValueError("probe-interval: must be from 1 to 86400 seconds")
