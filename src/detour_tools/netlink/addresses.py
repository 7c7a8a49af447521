# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's own IPv4 addresses, all at once (include/uapi/linux/if_addr.h)."""

import contextlib
import struct
from ipaddress import IPv4Address, IPv4Network
from typing import NamedTuple

from detour_tools.netlink import codec
from detour_tools.netlink.socket import NETLINK_ROUTE, NetlinkSocket

_RTM_GETADDR = 22
_IFADDRMSG_IPV4 = struct.pack("=BBBBI", 2, 0, 0, 0, 0)
_IFADDRMSG_PREFIX_LENGTH = 1
_IFA_ADDRESS = 1  # the peer's, on a point-to-point link
_IFA_LOCAL = 2


class InterfaceAddress(NamedTuple):
    """An address of this host, and the network that it says is on the link."""

    address: IPv4Address
    network: IPv4Network


def interface_addresses() -> frozenset[InterfaceAddress]:
    """The addresses of this network namespace's interfaces. Raises OSError."""
    with contextlib.closing(NetlinkSocket(NETLINK_ROUTE)) as netlink:
        answers = netlink.request(_RTM_GETADDR, _IFADDRMSG_IPV4, dump=True)
    found = set()
    for answer in answers:
        attributes = codec.attributes(answer.payload[len(_IFADDRMSG_IPV4):])
        local = attributes.get(_IFA_LOCAL)
        if local is not None:
            length = answer.payload[_IFADDRMSG_PREFIX_LENGTH]
            found.add(InterfaceAddress(IPv4Address(local), IPv4Network(
                (attributes.get(_IFA_ADDRESS, local), length), strict=False)))
    return frozenset(found)
