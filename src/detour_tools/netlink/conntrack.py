# SPDX-License-Identifier: GPL-2.0-or-later
"""The connections that the kernel has translated for us, and how to cut them.

Over raw ctnetlink (include/uapi/linux/netfilter/nfnetlink_conntrack.h): pyroute2 needs 75
microseconds an entry, and its loop cannot run where another one does.
"""

import contextlib
import struct
from collections.abc import Collection, Iterator
from ipaddress import IPv4Address
from typing import NamedTuple

from detour_tools.endpoint import Endpoint
from detour_tools.mapping import Mapping, flow_key
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
_CTA_IP_V4_DST = 2
_CTA_PROTO_NUM = 1
_CTA_PROTO_SRC_PORT = 2
_CTA_PROTO_DST_PORT = 3

_IPS_ASSURED = 1 << 2
_IPS_DST_NAT = 1 << 5
_TCP = b"\x06"


# How the kernel lays out an IPv4 flow's message from its start (ctnetlink_fill_info of
# net/netfilter/nf_conntrack_netlink.c): both tuples come first, with their attributes in a fixed
# order. A TCP flow without a zone in its tuples has these headers; any other is read one
# attribute after the other.
_USUAL = struct.Struct("=20x 12s4s 4s4x 16s4x 4s2s2x 12s4s 4s4x 16s2s")


def _usual_headers() -> tuple[bytes, ...]:
    pack = struct.Struct("=HH").pack
    nested = 0x8000
    found: list[bytes] = []
    for kind in (_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY):
        found += (
            pack(52, kind | nested) + pack(20, _CTA_TUPLE_IP | nested) + pack(8, _CTA_IP_V4_SRC),
            pack(8, _CTA_IP_V4_DST),
            pack(28, _CTA_TUPLE_PROTO | nested) + pack(5, _CTA_PROTO_NUM) + _TCP + bytes(3)
            + pack(6, _CTA_PROTO_SRC_PORT),
        )
        if kind == _CTA_TUPLE_ORIG:
            found.append(pack(6, _CTA_PROTO_DST_PORT))
    return tuple(found)


_USUAL_HEADERS = _usual_headers()
# Where the attributes begin: behind struct nlmsghdr and struct nfgenmsg.
_ATTRIBUTES = 20


class Flow(NamedTuple):
    """A TCP connection whose destination was translated: as a mapping would have done it."""

    mapping: Mapping
    key: bytes


class Conntrack(NetlinkSocket):
    """This network namespace's connection tracking table. Blocks: not for an event loop."""

    def __init__(self) -> None:
        super().__init__(NETLINK_NETFILTER)

    def live(self) -> set[bytes]:
        """The keys (``mapping.flow_key``) of the mappings that have flows. Raises OSError.

        Of flows that both ends have opened: anybody can forge the first packet of one.
        """
        found = set()
        for buffer, start, end in self._translated(_IPS_DST_NAT | _IPS_ASSURED):
            key = _key(buffer, start, end)
            if key is not None:
                found.add(key)
        return found

    def flows(self, wanted: Collection[bytes] | None = None) -> list[Flow]:
        """The TCP flows with a translated destination; of these mappings' keys if given.

        Raises OSError.
        """
        found = []
        for buffer, start, end in self._translated():
            if wanted is None or _key(buffer, start, end) in wanted:
                flow = _flow(codec.attributes(bytes(buffer[start + _ATTRIBUTES:end])))
                if flow is not None:
                    found.append(flow)
        return found

    def cut(self, flow: Flow) -> None:
        """Forget a flow, so that its packets are translated no more."""
        with contextlib.suppress(OSError):  # it is gone already
            self.request(_DELETE, _NFGENMSG_IPV4 + flow.key)

    def _translated(self, status: int = _IPS_DST_NAT) -> Iterator[tuple[memoryview, int, int]]:
        # Linux 5.15 and newer sort out the others themselves.
        bits = struct.pack("!I", status)
        return self.dump(_GET, _NFGENMSG_IPV4 + codec.attribute(_CTA_STATUS, bits)
                         + codec.attribute(_CTA_STATUS_MASK, bits))


def _key(buffer: memoryview, start: int, end: int) -> bytes | None:
    """The key of the mapping that the flow of a message goes through; None if it is no such."""
    if end - start >= _USUAL.size:
        (head1, client, head2, head3, head4, port,
         head5, address, head6, head7, remote_port) = _USUAL.unpack_from(buffer, start)
        if (head1, head2, head3, head4, head5, head6, head7) == _USUAL_HEADERS:
            key: bytes = client + port + address + remote_port
            return key
    flow = _flow(codec.attributes(bytes(buffer[start + _ATTRIBUTES:end])))
    return None if flow is None else flow_key(flow.mapping)


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
