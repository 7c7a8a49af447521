# SPDX-License-Identifier: GPL-2.0-or-later
"""What must be known of the detour itself: its addresses, and the ports it listens on."""

import struct
import time
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from detour_tools.endpoint import IPAddress
from detour_tools.netlink import codec
from detour_tools.netlink.socket import NETLINK_ROUTE, NETLINK_SOCK_DIAG, NetlinkSocket

_AF_INET = 2
_AF_INET6 = 10

_SOCK_DIAG_BY_FAMILY = 20
_IPPROTO_TCP = 6
_STATE_LISTEN = 1 << 10
# struct inet_diag_req_v2, and the start of struct inet_diag_msg (include/uapi/linux/inet_diag.h)
_DIAG_REQUEST = struct.Struct("=BBBBI48s")
_DIAG_ANSWER = struct.Struct("=4x2s2x16s")
_LOOPBACK = (IPv4Network("127.0.0.0/8"), IPv6Network("::1/128"),
             IPv6Network("::ffff:127.0.0.0/104"))

_RTM_GETROUTE = 26
_RTA_DST = 1
# struct rtmsg (include/uapi/linux/rtnetlink.h); type is its eighth byte
_RTMSG = struct.Struct("=8BI")
_RTMSG_TYPE = 7
_RTN_LOCAL = 2
_RTN_BROADCAST = 3

# Looking may take one part in so many of the time.
_LOOKING_SHARE = 20
_OLDEST_SECONDS = 1.0


class ListeningPorts:
    """The ports that TCP sockets of this host listen on, other than on loopback only.

    Read from inet_diag when a port is about to be granted, unless what is known is younger than
    20 times what reading took (some 50 microseconds with few listeners, so about a millisecond;
    at most a second): a program that just began to listen is seen, and a flood of requests costs
    a twentieth of the time at most. MPTCP listeners are TCP listeners too.
    """

    def __init__(self) -> None:
        self._netlink = NetlinkSocket(NETLINK_SOCK_DIAG)
        self._ports: frozenset[int] = frozenset()
        self._fresh_until = 0.0

    def __contains__(self, port: int) -> bool:
        now = time.monotonic()
        if now >= self._fresh_until:
            self._ports = self._read()
            done = time.monotonic()
            self._fresh_until = done + min(_OLDEST_SECONDS, _LOOKING_SHARE * (done - now))
        return port in self._ports

    def close(self) -> None:
        """Close the socket."""
        self._netlink.close()

    def _read(self) -> frozenset[int]:
        ports = set()
        for family, length in ((_AF_INET, 4), (_AF_INET6, 16)):
            request = _DIAG_REQUEST.pack(family, _IPPROTO_TCP, 0, 0, _STATE_LISTEN, b"")
            for answer in self._netlink.request(_SOCK_DIAG_BY_FAMILY, request, dump=True):
                port, source = _DIAG_ANSWER.unpack_from(answer.payload)
                address: IPAddress = (IPv4Address(source[:length]) if family == _AF_INET
                                      else IPv6Address(source))
                if not any(address in network for network in _LOOPBACK):
                    ports.add(int.from_bytes(port, "big"))
        return frozenset(ports)


class RouteTypes:
    """What the routing table says an address is."""

    def __init__(self) -> None:
        self._netlink = NetlinkSocket(NETLINK_ROUTE)

    def look_up(self, address: IPAddress) -> tuple[bool, bool]:
        """Whether the address is one of this host, and whether it is a broadcast address.

        One question of some ten microseconds, and never out of date.
        """
        family = _AF_INET if address.version == 4 else _AF_INET6
        question = _RTMSG.pack(family, address.max_prefixlen, 0, 0, 0, 0, 0, 0, 0)
        try:
            answers = self._netlink.request(
                _RTM_GETROUTE, question + codec.attribute(_RTA_DST, address.packed))
        except OSError:  # no route: so it is neither
            return False, False
        kind = answers[0].payload[_RTMSG_TYPE] if answers else 0
        return kind == _RTN_LOCAL, kind == _RTN_BROADCAST

    def close(self) -> None:
        """Close the socket."""
        self._netlink.close()
