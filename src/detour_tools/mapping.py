# SPDX-License-Identifier: GPL-2.0-or-later
"""What a detour keeps for a client; pure."""

from typing import NamedTuple

from detour_tools.endpoint import Endpoint, IPAddress


class Mapping(NamedTuple):
    """TCP flows from ``client`` to the detour's ``detour_port`` go on to ``remote``."""

    client: IPAddress
    detour_port: int
    remote: Endpoint

    def __str__(self) -> str:
        return f"{self.client} -> port {self.detour_port} -> {self.remote}"
