# SPDX-License-Identifier: GPL-2.0-or-later
"""The connections that the kernel has translated for us, and how to cut them.

Over raw ctnetlink (include/uapi/linux/netfilter/nfnetlink_conntrack.h): pyroute2 needs 75
microseconds an entry, and its loop cannot run where another one does.
"""

import contextlib
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address
from typing import NamedTuple

from detour_tools.endpoint import Endpoint
from detour_tools.mapping import Mapping
from detour_tools.netlink import codec
from detour_tools.netlink.socket import NETLINK_NETFILTER, NetlinkSocket

_GET = 1 << 8 | 1     # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET
_DELETE = 1 << 8 | 2
_NFGENMSG_IPV4 = struct.pack("=BBH", 2, 0, 0)

_CTA_TUPLE_ORIG = 1
_CTA_TUPLE_REPLY = 2
_CTA_STATUS = 3
_CTA_ID = 12
_CTA_ZONE = 18
_CTA_STATUS_MASK = 26
_CTA_TUPLE_IP = 1
_CTA_TUPLE_PROTO = 2
_CTA_IP_V4_SRC = 1
_CTA_PROTO_NUM = 1
_CTA_PROTO_SRC_PORT = 2
_CTA_PROTO_DST_PORT = 3

_IPS_DST_NAT = struct.pack("!I", 1 << 5)
_TCP = b"\x06"


class Flow(NamedTuple):
    """A TCP connection whose destination was translated: as a mapping would have done it."""

    mapping: Mapping
    key: bytes


class Conntrack(NetlinkSocket):
    """This network namespace's connection tracking table. Blocks: not for an event loop."""

    def __init__(self) -> None:
        super().__init__(NETLINK_NETFILTER)

    def flows(self) -> Iterator[Flow]:
        """The TCP flows with a translated destination. Raises OSError."""
        # Linux 5.15 and newer sort out the others themselves.
        only_translated = (codec.attribute(_CTA_STATUS, _IPS_DST_NAT)
                           + codec.attribute(_CTA_STATUS_MASK, _IPS_DST_NAT))
        for answer in self.request(_GET, _NFGENMSG_IPV4 + only_translated, dump=True):
            flow = _flow(codec.attributes(answer.payload[len(_NFGENMSG_IPV4):]))
            if flow is not None:
                yield flow

    def cut(self, flow: Flow) -> None:
        """Forget a flow, so that its packets are translated no more."""
        with contextlib.suppress(OSError):  # it is gone already
            self.request(_DELETE, _NFGENMSG_IPV4 + flow.key)


def _flow(entry: dict[int, bytes]) -> Flow | None:
    original = codec.attributes(entry.get(_CTA_TUPLE_ORIG, b""))
    original_ports = codec.attributes(original.get(_CTA_TUPLE_PROTO, b""))
    reply = codec.attributes(entry.get(_CTA_TUPLE_REPLY, b""))
    try:
        if original_ports[_CTA_PROTO_NUM] != _TCP:
            return None
        client = codec.attributes(original[_CTA_TUPLE_IP])[_CTA_IP_V4_SRC]
        detour_port = original_ports[_CTA_PROTO_DST_PORT]
        address = codec.attributes(reply[_CTA_TUPLE_IP])[_CTA_IP_V4_SRC]
        port = codec.attributes(reply[_CTA_TUPLE_PROTO])[_CTA_PROTO_SRC_PORT]
    except KeyError:
        return None
    key = b"".join(codec.attribute(kind, entry[kind])
                   for kind in (_CTA_TUPLE_ORIG, _CTA_ID, _CTA_ZONE) if kind in entry)
    return Flow(Mapping(IPv4Address(client), int.from_bytes(detour_port, "big"),
                        Endpoint(IPv4Address(address), int.from_bytes(port, "big"))), key)
