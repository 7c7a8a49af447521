# SPDX-License-Identifier: GPL-2.0-or-later
"""Netlink messages and attributes as bytes (include/uapi/linux/netlink.h); pure.

Ours because nothing else speaks the ``mptcp_pm`` family beyond endpoints and limits, nor the
MPTCP part of inet_diag, and because the path manager's answer is on every connection's clock.
"""

import errno
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

NLM_F_REQUEST = 0x01
NLM_F_ACK = 0x04
NLM_F_DUMP = 0x300
NLM_F_CAPPED = 0x100
NLM_F_ACK_TLVS = 0x200

NLMSG_ERROR = 2
NLMSG_DONE = 3

_NLA_TYPE_MASK = 0x3FFF
_NLA_F_NESTED = 0x8000
_NLMSGERR_ATTR_MSG = 1

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_I32 = struct.Struct("=i")


class NetlinkError(OSError):
    """The kernel's refusal: ``errno``, and its own words (extack) where it gave any."""

    def __init__(self, code: int, text: str = "") -> None:
        super().__init__(code, text or os.strerror(code))


class Message(NamedTuple):
    """One netlink message; ``payload`` is what follows the header."""

    type: int
    flags: int
    sequence: int
    port: int
    payload: bytes


def attribute(kind: int, payload: bytes) -> bytes:
    """One attribute, padded to four bytes."""
    return (_ATTRIBUTE.pack(4 + len(payload), kind) + payload
            + b"\0" * (-len(payload) & 3))


def nested(kind: int, *attributes: bytes) -> bytes:
    """An attribute that holds attributes."""
    return attribute(kind | _NLA_F_NESTED, b"".join(attributes))


def message(kind: int, flags: int, sequence: int, payload: bytes) -> bytes:
    """One message, from port 0 (the kernel fills in ours)."""
    return _HEADER.pack(16 + len(payload), kind, flags, sequence, 0) + payload


def messages(data: bytes) -> Iterator[Message]:
    """The messages of a datagram; a damaged end is left out."""
    offset = 0
    while offset + 16 <= len(data):
        length, kind, flags, sequence, port = _HEADER.unpack_from(data, offset)
        if length < 16 or offset + length > len(data):
            return
        yield Message(kind, flags, sequence, port, data[offset + 16:offset + length])
        offset += (length + 3) & ~3


def attributes(data: bytes) -> dict[int, bytes]:
    """The attributes by type, the last of each; a damaged end is left out."""
    return dict(attribute_list(data))


def attribute_list(data: bytes) -> list[tuple[int, bytes]]:
    """The attributes in their order, type and payload; a damaged end is left out."""
    found: list[tuple[int, bytes]] = []
    offset = 0
    end = len(data)
    while offset + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < 4 or offset + length > end:
            break
        found.append((kind & _NLA_TYPE_MASK, data[offset + 4:offset + length]))
        offset += (length + 3) & ~3
    return found


def error_of(answer: Message) -> NetlinkError | None:
    """The error that an NLMSG_ERROR or NLMSG_DONE message carries, None for success."""
    if len(answer.payload) < 4:
        return None if answer.type == NLMSG_DONE else NetlinkError(errno.EPROTO)
    code = -_I32.unpack_from(answer.payload)[0]
    if code == 0:
        return None
    text = ""
    if answer.flags & NLM_F_ACK_TLVS:
        if answer.type == NLMSG_DONE:
            skip = 4
        else:  # errno, then the header of our request, then (unless capped) its payload
            request_length = _HEADER.unpack_from(answer.payload, 4)[0]
            skip = 4 + (16 if answer.flags & NLM_F_CAPPED else (request_length + 3) & ~3)
        raw = attributes(answer.payload[skip:]).get(_NLMSGERR_ATTR_MSG, b"")
        text = raw.rstrip(b"\0").decode(errors="replace")
    return NetlinkError(code, text)
