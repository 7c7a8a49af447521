# SPDX-License-Identifier: GPL-2.0-or-later
"""The ``DETOUR`` generic netlink family of the kernel's detour path manager; pure.

Its specification is docs/protocols.md; addresses and ports are in network byte order in it.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from detour_tools.endpoint import Endpoint, IPAddress
from detour_tools.netlink.codec import attribute, attributes

FAMILY = "DETOUR"
REQUEST_GROUP = "detour_req"

CMD_ECHO = 1
CMD_ADD = 2
CMD_DEL = 3
CMD_REQ = 4
CMD_STAT = 5
CMD_GET = 6

INTERFACE_NAME_SIZE = 16
"""Bytes of an interface's name at most, with the zero that ends it (IFNAMSIZ)."""

_ATTR_DETOUR_IP = 1
_ATTR_DETOUR_PORT = 2
_ATTR_REMOTE_IP = 3
_ATTR_REMOTE_PORT = 4
_ATTR_IFNAME = 5
_ATTR_DETOUR_IP6 = 6
_ATTR_REMOTE_IP6 = 7
_ATTR_LIFETIME = 8
_ATTR_STATS = 9

_STAT_MADE = 1
_STAT_FAILED = 2
_STAT_LIVE = 3
_STAT_BYTES_SENT = 4
_STAT_BYTES_RECEIVED = 5
_STAT_SRTT = 6

_BE16 = struct.Struct("!H")
_U32 = struct.Struct("=I")
_U64 = struct.Struct("=Q")

Attributes = Mapping[int, bytes]


class MalformedDetourMessageError(ValueError):
    """A message that is none of the family, or cannot be one; the text says why."""


@dataclass(frozen=True, slots=True)
class NatName:
    """Names a NAT entry: connections to ``remote`` may be joined at ``detour``."""

    detour: Endpoint
    remote: Endpoint


@dataclass(frozen=True, slots=True)
class VpnName:
    """Names a VPN entry: connections may be joined at the remote's own address by ``interface``."""

    interface: str


Name = NatName | VpnName


@dataclass(frozen=True, slots=True)
class Stats:
    """What the kernel counted for an entry; ``srtt_us`` in microseconds, None when not known.

    ``made`` and ``failed`` joins, ``live`` subflows; ``bytes_sent`` are those acknowledged.
    """

    made: int
    failed: int
    live: int
    bytes_sent: int
    bytes_received: int
    srtt_us: int | None


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry in the kernel; ``lifetime`` is what is left in seconds, None: for ever."""

    name: Name
    lifetime: int | None
    stats: Stats | None


def encode_name(name: Name, lifetime: int | None = None) -> bytes:
    """The attributes of ADD, DEL and STAT; raises MalformedDetourMessageError.

    ``lifetime`` (seconds; None or 0: for ever) is for ADD alone.
    """
    if isinstance(name, VpnName):
        raw = name.interface.encode()
        if not raw or b"\0" in raw or len(raw) >= INTERFACE_NAME_SIZE:
            raise MalformedDetourMessageError(
                f"'{name.interface}' is not an interface's name: 1 to "
                f"{INTERFACE_NAME_SIZE - 1} bytes")
        named = attribute(_ATTR_IFNAME, raw + b"\0")
    else:
        if name.detour.address.version != name.remote.address.version:
            raise MalformedDetourMessageError(
                f"{name.detour} and {name.remote} are not both IPv4 or both IPv6")
        v4 = name.detour.address.version == 4
        named = (attribute(_ATTR_DETOUR_IP if v4 else _ATTR_DETOUR_IP6, name.detour.address.packed)
                 + attribute(_ATTR_DETOUR_PORT, _BE16.pack(name.detour.port))
                 + attribute(_ATTR_REMOTE_IP if v4 else _ATTR_REMOTE_IP6,
                             name.remote.address.packed)
                 + attribute(_ATTR_REMOTE_PORT, _BE16.pack(name.remote.port)))
    if not lifetime:
        return named
    if not 0 < lifetime <= 0xFFFFFFFF:
        raise MalformedDetourMessageError(f"a lifetime of {lifetime} s does not fit")
    return named + attribute(_ATTR_LIFETIME, _U32.pack(lifetime))


def decode_request(found: Attributes) -> Endpoint:
    """The remote that a REQ is about; raises MalformedDetourMessageError."""
    return _endpoint(found, _ATTR_REMOTE_IP, _ATTR_REMOTE_IP6, _ATTR_REMOTE_PORT)


def decode_entry(found: Attributes) -> Entry:
    """An entry, as GET and STAT answer it; raises MalformedDetourMessageError."""
    name: Name
    if _ATTR_IFNAME in found:
        raw = found[_ATTR_IFNAME].partition(b"\0")[0]
        if not 0 < len(raw) < INTERFACE_NAME_SIZE:
            raise MalformedDetourMessageError("an interface's name of wrong length")
        name = VpnName(raw.decode(errors="backslashreplace"))
    else:
        name = NatName(_endpoint(found, _ATTR_DETOUR_IP, _ATTR_DETOUR_IP6, _ATTR_DETOUR_PORT),
                       decode_request(found))
    lifetime = _number(found, _ATTR_LIFETIME, _U32) if _ATTR_LIFETIME in found else None
    return Entry(name, lifetime,
                 _stats(attributes(found[_ATTR_STATS])) if _ATTR_STATS in found else None)


def _stats(found: Attributes) -> Stats:
    return Stats(_number(found, _STAT_MADE, _U32),
                 _number(found, _STAT_FAILED, _U32),
                 _number(found, _STAT_LIVE, _U32),
                 _number(found, _STAT_BYTES_SENT, _U64),
                 _number(found, _STAT_BYTES_RECEIVED, _U64),
                 _number(found, _STAT_SRTT, _U32) if _STAT_SRTT in found else None)


def _endpoint(found: Attributes, v4: int, v6: int, port: int) -> Endpoint:
    address: IPAddress
    if v4 in found:
        address = IPv4Address(_exactly(found, v4, 4))
    else:
        address = IPv6Address(_exactly(found, v6, 16))
    return Endpoint(address, _number(found, port, _BE16))


def _number(found: Attributes, kind: int, form: struct.Struct) -> int:
    return int(form.unpack(_exactly(found, kind, form.size))[0])


def _exactly(found: Attributes, kind: int, size: int) -> bytes:
    value = found.get(kind)
    if value is None:
        raise MalformedDetourMessageError(f"attribute {kind} is missing")
    if len(value) != size:
        raise MalformedDetourMessageError(f"attribute {kind} has {len(value)} bytes, not {size}")
    return value
