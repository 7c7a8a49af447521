# SPDX-License-Identifier: GPL-2.0-or-later
"""One question to the routing table: is an address reached without a gateway?

Asked once a connection, in the middle of an event loop, where pyroute2's own loop cannot run.
"""

import struct

from detour_tools.endpoint import IPAddress
from detour_tools.netlink import codec
from detour_tools.netlink.socket import NETLINK_ROUTE, NetlinkSocket

_RTM_GETROUTE = 26
_RTA_DST = 1
_RTA_GATEWAY = 5
_RTA_VIA = 18
_AF_INET = 2
_AF_INET6 = 10

# struct rtmsg of include/uapi/linux/rtnetlink.h
_RTMSG = struct.Struct("=BBBBBBBBI")


class Routes(NetlinkSocket):
    """Look-ups in this network namespace's routing table."""

    def __init__(self) -> None:
        super().__init__(NETLINK_ROUTE)

    def is_on_link(self, address: IPAddress) -> bool:
        """Whether packets to the address leave without a gateway, or stay on this host.

        An address without a route counts as not on link.
        """
        family = _AF_INET if address.version == 4 else _AF_INET6
        question = _RTMSG.pack(family, address.max_prefixlen, 0, 0, 0, 0, 0, 0, 0)
        try:
            answers = self.request(
                _RTM_GETROUTE, question + codec.attribute(_RTA_DST, address.packed))
        except OSError:
            return False
        for answer in answers:
            attributes = codec.attributes(answer.payload[_RTMSG.size:])
            return _RTA_GATEWAY not in attributes and _RTA_VIA not in attributes
        return False
