# SPDX-License-Identifier: GPL-2.0-or-later
"""What nf_tables answers without a look at any element (include/uapi/linux/netfilter/nf_tables.h).

libnftables would read every element of every set to answer these.
"""

import struct

from detour_tools.netlink import codec
from detour_tools.netlink.socket import NETLINK_NETFILTER, NetlinkSocket

_GETTABLE = 10 << 8 | 1  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETTABLE
_GETGEN = 10 << 8 | 16   # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETGEN
_GETOBJ = 10 << 8 | 19   # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETOBJ
_NFGENMSG_ANY = struct.pack("=BBH", 0, 0, 0)
_NFGENMSG_IPV4 = struct.pack("=BBH", 2, 0, 0)
_NFTA_TABLE_NAME = 1
_NFTA_TABLE_HANDLE = 4
_NFTA_GEN_ID = 1
_NFTA_OBJ_TABLE = 1
_NFTA_OBJ_NAME = 2
_NFTA_OBJ_TYPE = 3
_NFTA_OBJ_DATA = 4
_NFT_OBJECT_COUNTER = struct.pack(">I", 1)
_NFTA_COUNTER_PACKETS = 2


class NfTables(NetlinkSocket):
    """This network namespace's nf_tables. Making one raises OSError where the kernel has none."""

    def __init__(self) -> None:
        super().__init__(NETLINK_NETFILTER)

    def table_handle(self, name: str) -> bytes | None:
        """The handle of an IPv4 table, another one when it was made anew; None: no such."""
        request = _NFGENMSG_IPV4 + codec.attribute(_NFTA_TABLE_NAME, name.encode() + b"\0")
        try:
            answers = self.request(_GETTABLE, request)
        except OSError:
            return None
        return codec.attributes(answers[0].payload[4:]).get(_NFTA_TABLE_HANDLE, b"")

    def counted(self, table: str, name: str) -> int:
        """The packets that a named counter of an IPv4 table has counted; 0 without such."""
        request = (_NFGENMSG_IPV4 + codec.attribute(_NFTA_OBJ_TABLE, table.encode() + b"\0")
                   + codec.attribute(_NFTA_OBJ_NAME, name.encode() + b"\0")
                   + codec.attribute(_NFTA_OBJ_TYPE, _NFT_OBJECT_COUNTER))
        try:
            answers = self.request(_GETOBJ, request)
        except OSError:
            return 0
        data = codec.attributes(answers[0].payload[4:])[_NFTA_OBJ_DATA]
        return int.from_bytes(codec.attributes(data)[_NFTA_COUNTER_PACKETS], "big")

    def generation(self) -> int:
        """A number that changes with every change of any rule or set. Raises OSError."""
        answers = self.request(_GETGEN, _NFGENMSG_ANY)
        found = codec.attributes(answers[0].payload[4:])
        return int.from_bytes(found[_NFTA_GEN_ID], "big")
