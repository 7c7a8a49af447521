# SPDX-License-Identifier: GPL-2.0-or-later
"""What a detour keeps for a client; pure."""

import functools
import struct
from ipaddress import IPv4Address
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


def of_flow_key(key: bytes) -> Mapping:
    """The mapping of a ``flow_key``."""
    client, detour_port, address, port = _KEY.unpack(key)
    return Mapping(_address(client), detour_port, Endpoint(_address(address), port))


def pair(key: bytes) -> bytes:
    """Client and remote of a ``flow_key``."""
    return key[:4] + key[6:]


# Few that come again and again, mostly.
_address = functools.lru_cache(maxsize=4096)(IPv4Address)
