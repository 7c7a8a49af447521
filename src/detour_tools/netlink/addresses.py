# SPDX-License-Identifier: GPL-2.0-or-later
"""The detour's own IPv4 addresses, all at once (include/uapi/linux/if_addr.h)."""

import contextlib
import struct
from ipaddress import IPv4Address

from detour_tools.endpoint import IPAddress
from detour_tools.netlink import codec
from detour_tools.netlink.socket import NETLINK_ROUTE, NetlinkSocket

_RTM_GETADDR = 22
_IFADDRMSG_IPV4 = struct.pack("=BBBBI", 2, 0, 0, 0, 0)
_IFA_LOCAL = 2


def own_addresses() -> frozenset[IPAddress]:
    """The addresses of this network namespace's interfaces. Raises OSError."""
    with contextlib.closing(NetlinkSocket(NETLINK_ROUTE)) as netlink:
        answers = netlink.request(_RTM_GETADDR, _IFADDRMSG_IPV4, dump=True)
    found = (codec.attributes(answer.payload[len(_IFADDRMSG_IPV4):]) for answer in answers)
    return frozenset(IPv4Address(each[_IFA_LOCAL]) for each in found if _IFA_LOCAL in each)
