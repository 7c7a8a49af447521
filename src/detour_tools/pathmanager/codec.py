# SPDX-License-Identifier: GPL-2.0-or-later
"""The ``mptcp_pm`` generic netlink family (include/uapi/linux/mptcp_pm.h); pure.

Its specification is the kernel's Documentation/netlink/specs/mptcp_pm.yaml.
"""

import struct
from ipaddress import IPv4Address, IPv6Address

from detour_tools.endpoint import Endpoint, IPAddress, unmapped
from detour_tools.netlink.codec import attribute, nested
from detour_tools.pathmanager.base import (
    ConnectionClosed,
    ConnectionCreated,
    ConnectionEstablished,
    Event,
    SubflowClosed,
    SubflowEstablished,
)

FAMILY = "mptcp_pm"
EVENT_GROUP = "mptcp_pm_events"
CMD_SUBFLOW_CREATE = 10

_AF_INET = 2
_AF_INET6 = 10

_EVENT_CREATED = 1
_EVENT_ESTABLISHED = 2
_EVENT_CLOSED = 3
_EVENT_SUB_ESTABLISHED = 10
_EVENT_SUB_CLOSED = 11

_ATTR_TOKEN = 1
_ATTR_SADDR4 = 5
_ATTR_SADDR6 = 6
_ATTR_DADDR4 = 7
_ATTR_DADDR6 = 8
_ATTR_SPORT = 9
_ATTR_DPORT = 10
_ATTR_ERROR = 12
_ATTR_FLAGS = 13
_ATTR_RESET_REASON = 16
_ATTR_SERVER_SIDE = 18

_FLAG_DENY_JOIN_ID0 = 1 << 0
_FLAG_SERVER_SIDE = 1 << 1

_PM_ATTR_ADDR = 1
_PM_ATTR_TOKEN = 4
_PM_ATTR_ADDR_REMOTE = 6

_ADDR_FAMILY = 1
_ADDR_ID = 2
_ADDR_ADDR4 = 3
_ADDR_ADDR6 = 4
_ADDR_PORT = 5

_U16 = struct.Struct("=H")
_U32 = struct.Struct("=I")
_BE16 = struct.Struct("!H")


def decode_event(command: int, attributes: dict[int, bytes]) -> Event | None:
    """Decode one notification; None for kinds that nobody here needs, or lacking a part."""
    try:
        token: int = _U32.unpack(attributes[_ATTR_TOKEN])[0]
        if command == _EVENT_CLOSED:
            return ConnectionClosed(token)
        if command not in (_EVENT_CREATED, _EVENT_ESTABLISHED, _EVENT_SUB_ESTABLISHED,
                           _EVENT_SUB_CLOSED):
            return None
        local = Endpoint(_address(attributes, _ATTR_SADDR4, _ATTR_SADDR6),
                         _BE16.unpack(attributes[_ATTR_SPORT])[0])
        remote = Endpoint(_address(attributes, _ATTR_DADDR4, _ATTR_DADDR6),
                          _BE16.unpack(attributes[_ATTR_DPORT])[0])
        if command == _EVENT_SUB_ESTABLISHED:
            return SubflowEstablished(token, local, remote)
        if command == _EVENT_SUB_CLOSED:
            reason = attributes.get(_ATTR_RESET_REASON)
            return SubflowClosed(token, local, remote, attributes.get(_ATTR_ERROR, b"\0")[0],
                                 _U32.unpack(reason)[0] if reason is not None else None)
        flags = _U16.unpack(attributes.get(_ATTR_FLAGS, b"\0\0"))[0]
        # Kernels before 6.18 tell the side by an attribute of its own, later ones by a flag.
        server_side = bool(flags & _FLAG_SERVER_SIDE
                           or any(attributes.get(_ATTR_SERVER_SIDE, b"\0")))
        kind = ConnectionCreated if command == _EVENT_CREATED else ConnectionEstablished
        return kind(token, local, remote, server_side, bool(flags & _FLAG_DENY_JOIN_ID0))
    except (KeyError, struct.error, IndexError):
        return None


def subflow_create(token: int, local: IPAddress, local_id: int, remote: Endpoint) -> bytes:
    """The attributes of SUBFLOW_CREATE; ports are in host byte order in this family."""
    return (attribute(_PM_ATTR_TOKEN, _U32.pack(token))
            + nested(_PM_ATTR_ADDR, *_encode_address(local),
                     attribute(_ADDR_ID, bytes([local_id])))
            + nested(_PM_ATTR_ADDR_REMOTE, *_encode_address(remote.address),
                     attribute(_ADDR_PORT, _U16.pack(remote.port))))


def _address(attributes: dict[int, bytes], v4: int, v6: int) -> IPAddress:
    if v4 in attributes:
        return IPv4Address(attributes[v4])
    return unmapped(IPv6Address(attributes[v6]))


def _encode_address(address: IPAddress) -> tuple[bytes, bytes]:
    if isinstance(address, IPv4Address):
        return (attribute(_ADDR_FAMILY, _U16.pack(_AF_INET)),
                attribute(_ADDR_ADDR4, address.packed))
    return (attribute(_ADDR_FAMILY, _U16.pack(_AF_INET6)),
            attribute(_ADDR_ADDR6, address.packed))
