# SPDX-License-Identifier: GPL-2.0-or-later
"""Two questions to the routing table: what is this address to us, and what has changed?

Asked in the middle of an event loop, where pyroute2's own loop cannot run; a look-up takes some ten
microseconds, and the answer is never out of date.
"""

import socket
import struct
from ipaddress import IPv4Network

from detour_tools.endpoint import IPAddress
from detour_tools.netlink import codec
from detour_tools.netlink.socket import NETLINK_ROUTE, NetlinkSocket
from detour_tools.route import NO_ROUTE, Route

_RTM_NEWROUTE = 24
_RTM_DELROUTE = 25
_RTM_GETROUTE = 26
_RTA_DST = 1
_RTA_GATEWAY = 5
_RTA_MULTIPATH = 9
_RTA_VIA = 18
_RTM_F_FIB_MATCH = 0x2000
_GATEWAYS = {_RTA_GATEWAY, _RTA_MULTIPATH, _RTA_VIA}
_AF_INET = 2
_AF_INET6 = 10

# struct nlmsghdr: length, type, flags, sequence
_HEADER = struct.Struct("=IHHI4x")
# struct rtmsg of include/uapi/linux/rtnetlink.h
_RTMSG = struct.Struct("=BBBBBBBBI")
_RTN_LOCAL = 2
_RTN_BROADCAST = 3
# A bit a group: RTNLGRP_IPV4_ROUTE and RTNLGRP_IPV4_RULE
_CHANGES = 1 << 7 - 1 | 1 << 8 - 1

EVERYWHERE = IPv4Network("0.0.0.0/0")


class Routes(NetlinkSocket):
    """Look-ups in this network namespace's routing table."""

    def __init__(self) -> None:
        super().__init__(NETLINK_ROUTE)

    def look_up(self, address: IPAddress) -> Route:
        """The route to an address."""
        # Asked on every new mapping: the answer is read where it lies, and no end is asked for.
        family = _AF_INET if address.version == 4 else _AF_INET6
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        buffer = self._buffer
        try:
            self._socket.send(codec.message(
                _RTM_GETROUTE, codec.NLM_F_REQUEST, self._sequence,
                _RTMSG.pack(family, address.max_prefixlen, 0, 0, 0, 0, 0, 0, _RTM_F_FIB_MATCH)
                + codec.attribute(_RTA_DST, address.packed)))
            while True:
                self._socket.recv_into(buffer)
                length, answered, _, sequence = _HEADER.unpack_from(buffer)
                if sequence == self._sequence:
                    break
        except OSError:
            return NO_ROUTE
        if answered != _RTM_NEWROUTE:
            return NO_ROUTE
        _, prefix_length, _, _, _, _, _, kind, _ = _RTMSG.unpack_from(buffer, _HEADER.size)
        # A default route without a gateway (PPP, a tunnel) puts nobody on link.
        return Route(kind == _RTN_LOCAL, kind == _RTN_BROADCAST, prefix_length > 0 and not (
            codec.attributes(bytes(buffer[_HEADER.size + _RTMSG.size:length])).keys() & _GATEWAYS))


class RouteChanges:
    """Tells of which networks the IPv4 routes have changed."""

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
            NETLINK_ROUTE)
        self._socket.bind((0, _CHANGES))

    def read(self) -> set[IPv4Network]:
        """The networks since the last call; EVERYWHERE where it cannot be told, or by rules."""
        found: set[IPv4Network] = set()
        while True:
            try:
                data, (sender, _) = self._socket.recvfrom(1 << 16)
            except BlockingIOError:
                return found
            except OSError:  # more than the socket holds
                found.add(EVERYWHERE)
                continue
            for each in codec.messages(data) if sender == 0 else ():
                found.add(_network(each.payload) if each.type in (_RTM_NEWROUTE, _RTM_DELROUTE)
                          else EVERYWHERE)


def _network(payload: bytes) -> IPv4Network:
    address = codec.attributes(payload[_RTMSG.size:]).get(_RTA_DST, bytes(4))
    return IPv4Network((address, payload[1]), strict=False)
