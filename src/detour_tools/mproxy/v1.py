# SPDX-License-Identifier: GPL-2.0-or-later
"""MPROXY version 1 (docs/protocols.md): twelve bytes, big-endian, the same both ways.

======  ====  ========  ====================================================
offset  size  field     meaning
======  ====  ========  ====================================================
0       1     ver       1
1       1     op        0 request, 1 response
2       2     reserved  sent as 0, ignored when received
4       4     rip       IPv4 address of the remote
8       2     rpt       TCP port of the remote
10      2     dpt       detour port: proposed (0: any) or decided
======  ====  ========  ====================================================
"""

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address

from detour_tools.endpoint import Endpoint
from detour_tools.mproxy.errors import MalformedMessageError

VERSION = 1
LENGTH = 12
OP_REQUEST = 0
OP_RESPONSE = 1

_REQUEST = bytes((VERSION, OP_REQUEST))
_LAYOUT = struct.Struct("!BBH4sHH")


@dataclass(frozen=True, slots=True)
class Request:
    """A client's wish for a mapping to ``remote`` (IPv4), at ``detour_port`` if that is free."""

    remote: Endpoint
    detour_port: int


@dataclass(frozen=True, slots=True)
class Response:
    """A detour's answer: flows to its ``detour_port`` now reach ``remote`` (IPv4)."""

    remote: Endpoint
    detour_port: int


def encode(message: Request | Response) -> bytes:
    """Encode a message; the remote must be IPv4."""
    op = OP_REQUEST if isinstance(message, Request) else OP_RESPONSE
    remote = message.remote
    return _LAYOUT.pack(VERSION, op, 0, remote.address.packed, remote.port, message.detour_port)


def is_request(datagram: bytes) -> bool:
    """Whether the datagram is a request, for who does not want to know for what."""
    return len(datagram) == LENGTH and datagram.startswith(_REQUEST)


def decode(datagram: bytes) -> Request | Response:
    """Decode a datagram; raises MalformedMessageError when it is no version 1 message."""
    if len(datagram) != LENGTH:
        raise MalformedMessageError(f"{len(datagram)} bytes instead of {LENGTH}")
    version, op, _, rip, rpt, dpt = _LAYOUT.unpack(datagram)
    if version != VERSION:
        raise MalformedMessageError(f"version {version} instead of {VERSION}")
    remote = Endpoint(IPv4Address(rip), rpt)
    if op == OP_REQUEST:
        return Request(remote, dpt)
    if op == OP_RESPONSE:
        return Response(remote, dpt)
    raise MalformedMessageError(f"unknown op {op}")
