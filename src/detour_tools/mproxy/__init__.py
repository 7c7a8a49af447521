# SPDX-License-Identifier: GPL-2.0-or-later
"""MPROXY, the protocol by which a client asks a detour for a mapping.

One module a version; byte 0 of every datagram is the version and tells them apart.
"""

from detour_tools.mproxy import v1
from detour_tools.mproxy.errors import MalformedMessageError

PORT = 45672
"""The UDP port a detour listens on."""

MAX_DATAGRAM = 512
"""Bytes to receive at most; no version has a longer message."""

Message = v1.Request | v1.Response

_DECODERS = {v1.VERSION: v1.decode}


def decode(datagram: bytes) -> Message:
    """Decode a datagram of any known version; raises MalformedMessageError."""
    if not datagram:
        raise MalformedMessageError("empty datagram")
    decoder = _DECODERS.get(datagram[0])
    if decoder is None:
        raise MalformedMessageError(f"unknown version {datagram[0]}")
    return decoder(datagram)


__all__ = ["MAX_DATAGRAM", "PORT", "MalformedMessageError", "Message", "decode", "v1"]
