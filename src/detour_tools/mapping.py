# SPDX-License-Identifier: GPL-2.0-or-later
"""What a detour keeps for a client; pure."""

import struct
from typing import NamedTuple

from detour_tools.endpoint import Endpoint, IPAddress

_KEY = struct.Struct("!IHIH")


class Mapping(NamedTuple):
    """TCP flows from ``client`` to the detour's ``detour_port`` go on to ``remote``."""

    client: IPAddress
    detour_port: int
    remote: Endpoint

    def __str__(self) -> str:
        return f"{self.client} -> port {self.detour_port} -> {self.remote}"


def flow_key(mapping: Mapping) -> bytes:
    """An IPv4 mapping in the bytes of its flows: client, detour port, remote address, port."""
    client, detour_port, (address, port) = mapping
    return _KEY.pack(int(client), detour_port, int(address), port)
